"""The check of prepare.py: every planted fault is found and named, sound data raises no alarm."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED_DATA, without_pictures
from helpers import call_script, ras_arrays, run, save, write_patients

import prepare
from data.check import check_case, compare_cases, list_errors
from prepare import Config

AFFINE = np.diag([-5.0, -5, 5, 1])
SHIFT = np.outer([1.0, 0, 0, 0], [0, 0, 0, 1])  # by 1 mm along x


@pytest.fixture(autouse=True)
def plain():
    """No pictures, but where the script itself is called."""
    with without_pictures():
        yield


def findings(case: Path, **settings) -> dict[str, str]:
    """Kind → text for the only case of a Decathlon folder."""
    cases, terms = prepare.read_data_set(Config(case, case.parent / "checked", **settings))
    return dict(check_case(cases[0], terms, case.parent)["findings"])


at = lambda array: np.indices(array.shape)  # noqa: E731
# name: (kind that must be found, what is done to scan and label (RAS arrays))
PLANTED = {
    "constant": ("hu", lambda s, m: (np.full_like(s, 40), m)),
    "8 bits": ("hu", lambda s, m: (np.clip(s / 8 + 128, 0, 255).astype(np.uint8), m)),
    "intercept not applied": ("hu", lambda s, m: (s + 1024, m)),
    "the same, padded": ("hu", lambda s, m: (np.where(at(s)[0] < 4, -2000, s + 1024), m)),
    "scaled to 0..1": ("hu", lambda s, m: ((s.astype(np.float32) + 1024) / 2048, m)),
    "magnetic resonance": ("hu", lambda s, m: (np.abs(s), m)),
    "clipped to a window": ("air", lambda s, m: (np.clip(s, -200, 250), m)),
    "inf": ("nan", lambda s, m: (np.where(s == s.max(), np.inf, s).astype("f4"), m)),
    "air alone": ("hu", lambda s, m: (np.full_like(s, -1000), m)),
    "padding read as HU": ("hu", lambda s, m: (np.where(s < -900, 62512, s.astype("i4")), m)),
    "slices without data": ("blank", lambda s, m: (np.where(at(s)[2] // 3 == 1, -1024, s), m)),
    "empty label": ("empty", lambda s, m: (s, np.zeros_like(m))),
    "fractions": ("values", lambda s, m: (s, m * np.float32(0.9))),
    "NaN in the label": ("nan", lambda s, m: (s, np.where(m > 0, np.nan, 0).astype("f4"))),
    "undeclared value": ("values", lambda s, m: (s, m * 7)),
    "negative value": ("values", lambda s, m: (s, -m.astype(np.int16))),
    "mirrored label": ("outline", lambda s, m: (s, m[::-1])),
    "scan and label mirrored": ("left_right", lambda s, m: (s[::-1], m[::-1])),
    "label in the air": ("outside", lambda s, m: (s, np.roll(m, 16, axis=0))),
    "tumour in a corner": ("tumour_apart", lambda s, m: (s, np.where(at(m).max(0) < 4, 2, m > 0))),
    "only tumour asked, none there": ("empty", lambda s, m: (s, m * 0 + (m > 0))),
    "too few slices": ("thin", lambda s, m: (s[:, :, 22:30], m[:, :, 22:30])),
    "one column": ("small", lambda s, m: (s[24:25], m[24:25])),
    "other shape": ("shape", lambda s, m: (s, m[:-2])),
    "swapped": ("values", lambda s, m: (m.astype(np.int16), s)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_in_the_voxels_is_found(name, tmp_path):
    kind, plant = PLANTED[name]
    for folder, array in zip(("imagesTr", "labelsTr"), plant(*ras_arrays(1)), strict=True):
        stored = array.astype(np.int32) if array.dtype == np.int64 else array
        save(stored, AFFINE, tmp_path / "raw" / folder / "case.nii.gz")
    asked = {"foreground": ("tumour",)} if "asked" in name else {}
    assert kind in findings(tmp_path / "raw", **asked)


@pytest.mark.parametrize(
    ("kind", "affine"),
    [
        ("grid", AFFINE + 3 * SHIFT),
        ("grid", np.diag([-5.0, -5, 4.8, 1])),
        ("grid", np.diag([5.0, -5, 5, 1])),  # the label map says its first axis runs the other way
        ("near_grid", AFFINE + SHIFT),
    ],
)
def test_a_label_map_beside_its_scan_is_found(kind, affine, tmp_path):
    affines = {"imagesTr": AFFINE, "labelsTr": affine}
    for (folder, where), array in zip(affines.items(), ras_arrays(1), strict=True):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        image = nib.Nifti1Image(array[::-1, ::-1], where)  # stored as LPS
        nib.save(image, tmp_path / "raw" / folder / "case.nii.gz")
    assert kind in findings(tmp_path / "raw")
    if kind == "grid":
        trusted = run(tmp_path / "raw", trust_image_grid=(), training=1, validation=0, test=0)
        entry = trusted["subvolumes"][0]
        piece = nib.load(tmp_path / "prepared" / entry["label"])
        expected = ras_arrays(1)[1][:, :, entry["first_slice"] :][:, :, :16]
        assert np.array_equal(np.asanyarray(piece.dataobj), expected)


def test_identity_affine_and_odd_spacing_are_told(tmp_path):
    affines = (np.eye(4), AFFINE, np.diag([5.0, 5, 45, 1]), None)
    write_patients(tmp_path / "raw", affines=affines)
    dataset = run(tmp_path / "raw", accept=("identity",))
    warnings = {case["case"]: " ".join(case["warnings"]) for case in dataset["cases"]}
    assert "no geometry" in warnings["case_0"]
    assert "far from the other scans" in warnings["case_2"]
    assert "LPS" in dataset["notes"][0] and "RAS" in dataset["notes"][0]


@pytest.mark.parametrize("first", [0, 6], ids=["the same file", "a part of its slices"])
def test_one_scan_under_two_names_becomes_one_patient(first, tmp_path):
    write_patients(tmp_path / "raw", affines=(None,) * 4)
    for folder, array in zip(("imagesTr", "labelsTr"), ras_arrays(0), strict=True):
        save(array[:, :, first:], AFFINE, tmp_path / "raw" / folder / "other.nii.gz")
    dataset = run(tmp_path / "raw")
    case = {c["case"]: c for c in dataset["cases"]}
    for key in ("patient", "split"):
        assert case["other"][key] == case["case_0"][key]
    assert "same scan as case_0" in " ".join(case["other"]["warnings"])
    assert not any("same scan" in " ".join(case[f"case_{i}"]["warnings"]) for i in (1, 2, 3))


def test_orphans_and_broken_files_stop_their_case_only(tmp_path):
    raw = write_patients(tmp_path / "raw", affines=(None,) * 6)
    (raw / "imagesTr/case_1.nii.gz").unlink()
    (raw / "labelsTr/case_2.nii.gz").unlink()
    whole = (raw / "imagesTr/case_3.nii.gz").read_bytes()
    (raw / "imagesTr/case_3.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = call_script("prepare.py", raw, "--destination", tmp_path / "out", "--workers", 1)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "3 of 6 cases" in result.stderr
    for text in ("1: .* has no scan", "2: .* has no label map", "3: .*case_3.nii.gz"):
        assert re.search(f"error: case_{text}", result.stdout)
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [case["case"] for case in dataset["cases"]] == ["case_0", "case_4", "case_5"]
    faulty = ["case_1", "case_2", "case_3"]
    assert [case["case"] for case in dataset["left_out"]] == faulty
    run(raw, destination=tmp_path / "out", leave_out=faulty)  # known: no error any more


def test_clean_phantoms_raise_no_alarm(tmp_path, raw_phantoms):
    import make_phantoms

    make_phantoms.main(
        make_phantoms.Config(destination=tmp_path / "spleen", cases=4, size=48, organ="spleen")
    )
    for source, organ in ((raw_phantoms, {}), (tmp_path / "spleen", {"foreground": ("spleen",)})):
        cases, terms = prepare.read_data_set(Config(source, tmp_path / "out", **organ))
        for case in cases:
            assert check_case(case, terms, tmp_path)["findings"] == []


def test_six_real_cases_raise_no_alarm(tmp_path, real_ct):
    cases, terms = prepare.read_data_set(Config(source=real_ct, destination=tmp_path))
    records = [check_case(case, terms, tmp_path) for case in cases]
    compare_cases(records, terms)
    assert [record["findings"] for record in records] == [[]] * 6


AWKWARD = {  # file → part of the one message; None: read, and no CT of a liver for another reason
    "5D_small.nii": "one 3D volume, got shape (1, 2, 3, 1, 3)",
    "functional.nii": "one 3D volume, got shape (17, 21, 3, 20)",
    "nifti1.hdr": "nifti1.img",
    "not-nifti.nii": "not-nifti.nii: ",
    "alireza_case2_bigendian_f32.nii": "",
    "niivue_CT_pitch.nii.gz": "8 bits cannot hold HU",
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_files_get_one_clear_error(name, tmp_path):
    source = SHARED_DATA / "awkward" / name
    if not source.exists():
        pytest.skip("the awkward files are not here (beside the project)")
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
    for file in source.parent.glob(f"{name.split('.hdr')[0]}*"):
        (tmp_path / "raw/imagesTr" / file.name).symlink_to(file)
    scan = nib.load(source) if name != "not-nifti.nii" else None
    shape, affine = (scan.shape[:3], scan.affine) if scan else ((4, 4, 4), np.eye(4))
    label = np.zeros(shape, np.uint8)
    label[1:3, 1:3, 1:2] = 1
    stem = name.removesuffix(".gz").removesuffix(".nii").removesuffix(".hdr")
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "raw/labelsTr" / f"{stem}.nii.gz")
    cases, terms = prepare.read_data_set(Config(tmp_path / "raw", tmp_path / "out"))
    ((_, text),) = list_errors(check_case(cases[0], terms, tmp_path / "out"), ())
    assert AWKWARD[name] in text
