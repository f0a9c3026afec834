"""The check of prepare.py: every planted fault is found and named, sound data raises no alarm."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED_DATA, without_pictures
from helpers import call_script, ras_arrays, run, save, write_patients

import prepare
from data.check import RULES, compare_cases, list_errors
from data.files import InputError
from prepare import Config

AFFINE = np.diag([-5.0, -5, 5, 1])


@pytest.fixture(autouse=True)
def plain():
    """No pictures, but where the script itself is called."""
    with without_pictures():
        yield


def findings(case: Path, **settings) -> dict[str, str]:
    """Kind → text for the only case of a Decathlon folder."""
    config = Config(source=case, destination=case.parent / "checked", workers=1, **settings)
    cases, terms = prepare.read_data_set(config)
    return dict(prepare.check_case(cases[0], config, terms)["findings"])


def shifted(array: np.ndarray, x: int, fill: int) -> np.ndarray:
    moved = np.full_like(array, fill)
    moved[x:] = array[:-x]
    return moved


def one_tumour_apart(label: np.ndarray) -> np.ndarray:
    label = np.where(label == 2, 1, label)
    label[2:4, 2:4, 2:4] = 2
    return label


def some_nan(scan: np.ndarray) -> np.ndarray:
    scan = scan.astype(np.float32)
    scan[20:22, 20, 20] = np.nan, np.inf
    return scan


def blank_slices(scan: np.ndarray) -> np.ndarray:
    scan = scan.copy()
    scan[:, :, 3:6] = -1024
    return scan


# name: (kind that must be found, what is done to scan and label (RAS arrays))
PLANTED = {
    "constant": ("hu", lambda s, m: (np.full_like(s, 40), m)),
    "8 bits": ("hu", lambda s, m: (np.clip(s / 8 + 128, 0, 255).astype(np.uint8), m)),
    "intercept not applied": ("hu", lambda s, m: (s + 1024, m)),
    "intercept not applied, padded": ("hu", lambda s, m: (padded_circle(s + 1024), m)),
    "scaled to 0..1": ("hu", lambda s, m: ((s.astype(np.float32) + 1024) / 2048, m)),
    "magnetic resonance": ("hu", lambda s, m: (np.abs(s), m)),
    "clipped to a window": ("air", lambda s, m: (np.clip(s, -200, 250), m)),
    "NaN and inf": ("nan", lambda s, m: (some_nan(s), m)),
    "slices without data": ("blank", lambda s, m: (blank_slices(s), m)),
    "empty label": ("empty", lambda s, m: (s, np.zeros_like(m))),
    "fractions": ("values", lambda s, m: (s, m * np.float32(0.9))),
    "NaN in the label": ("values", lambda s, m: (s, np.where(m > 0, np.nan, 0).astype("f4"))),
    "undeclared value": ("values", lambda s, m: (s, m * 7)),
    "negative value": ("values", lambda s, m: (s, -m.astype(np.int16))),
    "mirrored label": ("mirrored", lambda s, m: (s, m[::-1])),
    "scan and label mirrored": ("left_right", lambda s, m: (s[::-1], m[::-1])),
    "label in the air": ("outside", lambda s, m: (s, shifted(m, 16, 0))),
    "tumour outside the liver": ("tumour_apart", lambda s, m: (s, one_tumour_apart(m))),
    "only tumour asked, none there": ("no_foreground", lambda s, m: (s, m * 0 + (m > 0))),
    "too few slices": ("thin", lambda s, m: (s[:, :, 22:30], m[:, :, 22:30])),
    "other shape": ("shape", lambda s, m: (s, m[:-2])),
}


def padded_circle(scan: np.ndarray) -> np.ndarray:
    x, y = np.indices(scan.shape[:2]) - 23.5
    return np.where((x**2 + y**2 > 22**2)[..., None], -2000, scan).astype(scan.dtype)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_in_the_voxels_is_found(name, tmp_path):
    kind, plant = PLANTED[name]
    scan, label = plant(*ras_arrays(1))
    save(scan, AFFINE, tmp_path / "raw/imagesTr/case.nii.gz")
    save(label, AFFINE, tmp_path / "raw/labelsTr/case.nii.gz")
    asked = {"foreground": ("tumour",)} if kind == "no_foreground" else {}
    found = findings(tmp_path / "raw", **asked)
    assert kind in found
    assert RULES[kind][1]  # what to do


@pytest.mark.parametrize(
    ("kind", "affine"),
    [
        ("grid", AFFINE + np.array([[0, 0, 0, 3.0], *[[0, 0, 0, 0]] * 3])),
        ("grid", np.diag([-5.0, -5, 4.8, 1])),
        ("grid", np.diag([5.0, -5, 5, 1])),  # the label map says its first axis runs the other way
        ("near_grid", AFFINE + np.array([[0, 0, 0, 1.0], *[[0, 0, 0, 0]] * 3])),
    ],
)
def test_a_label_map_beside_its_scan_is_found(kind, affine, tmp_path):
    for folder, array, where in zip(
        ("imagesTr", "labelsTr"), ras_arrays(1), (AFFINE, affine), strict=True
    ):
        path = tmp_path / "raw" / folder / "case.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(array[::-1, ::-1], where), path)  # stored as LPS
    assert kind in findings(tmp_path / "raw")
    if kind == "grid":
        with pytest.raises(InputError, match="1 of 1 cases have errors"):
            run(tmp_path / "raw", check_only=True)
        trusted = run(tmp_path / "raw", trust_image_grid=True, training=1, validation=0, test=0)
        entry = trusted["subvolumes"][0]
        piece = nib.load(tmp_path / "prepared" / entry["label"])
        expected = ras_arrays(1)[1][:, :, entry["first_slice"] :][:, :, :16]
        assert np.array_equal(np.asanyarray(piece.dataobj), expected)


def test_identity_affine_and_odd_spacing_are_told(tmp_path):
    affines = (np.eye(4), AFFINE, np.diag([5.0, 5, 45, 1]), None)
    write_patients(tmp_path / "raw", affines=affines)
    dataset = run(tmp_path / "raw")
    warnings = {case["case"]: " ".join(case["warnings"]) for case in dataset["cases"]}
    assert "no spacing and no orientation" in warnings["case_0"]
    assert "far from the other scans" in warnings["case_2"]
    assert "LPS" in dataset["notes"][0] and "RAS" in dataset["notes"][0]


def copies(scan: np.ndarray) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).normal(0, 8, scan.shape)
    return {
        "the same file": scan,
        "noise added": (scan + noise).astype(np.int16),
        "clipped and float": np.clip(scan, -1000, 1000).astype(np.float32) + 3,
        "a part of its slices": scan[:, :, 6:],
    }


@pytest.mark.parametrize("how", list(copies(np.zeros((2, 2, 8)))))
def test_one_scan_under_two_names_becomes_one_patient(how, tmp_path):
    write_patients(tmp_path / "raw", affines=(None,) * 4)
    scan, label = copies(ras_arrays(0)[0])[how], ras_arrays(0)[1]
    save(scan, AFFINE, tmp_path / "raw/imagesTr/other.nii.gz")
    save(label[:, :, -scan.shape[2] :], AFFINE, tmp_path / "raw/labelsTr/other.nii.gz")
    dataset = run(tmp_path / "raw")
    case = {c["case"]: c for c in dataset["cases"]}
    assert case["other"]["patient"] == case["case_0"]["patient"]
    assert case["other"]["split"] == case["case_0"]["split"]
    assert "same scan as case_0" in " ".join(case["other"]["warnings"])
    assert not any("same scan" in " ".join(case[f"case_{i}"]["warnings"]) for i in (1, 2, 3))


def test_orphans_and_broken_files_stop_their_case_only(tmp_path):
    raw = write_patients(tmp_path / "raw", affines=(None,) * 6)
    (raw / "imagesTr/case_1.nii.gz").unlink()
    (raw / "labelsTr/case_2.nii.gz").unlink()
    whole = (raw / "imagesTr/case_3.nii.gz").read_bytes()
    (raw / "imagesTr/case_3.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = call_script("prepare.py", raw, "--destination", tmp_path / "out", "--workers", 1)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "3 of 6 cases" in result.stderr
    for text in ("error: case_1: ", "has no scan", "error: case_2: ", "has no label map",
                 "case_3.nii.gz: cannot be read"):  # fmt: skip
        assert text in result.stdout
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [case["case"] for case in dataset["cases"]] == ["case_0", "case_4", "case_5"]
    assert [case["case"] for case in dataset["left_out"]] == ["case_1", "case_2", "case_3"]
    faulty = ("case_1", "case_2", "case_3")
    run(raw, destination=tmp_path / "out", leave_out=faulty)  # known: no error any more


def test_nothing_is_cut_by_check_only(tmp_path):
    raw = write_patients(tmp_path / "raw")
    result = call_script(
        "prepare.py", raw, "--destination", tmp_path / "out", "--workers", 1, "--check-only"
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["check"]
    pictures = sorted((tmp_path / "out/check").glob("*.png"))
    assert [path.stem for path in pictures] == ["case_0", "case_1", "case_2"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_clean_phantoms_raise_no_alarm(tmp_path, raw_phantoms):
    for spleen in (False, True):
        source = raw_phantoms
        if spleen:
            import make_phantoms

            source = tmp_path / "spleen"
            make_phantoms.main(
                make_phantoms.Config(destination=source, cases=4, size=48, organ="spleen")
            )
        organ = {"foreground": ("spleen",)} if spleen else {}
        config = Config(source=source, destination=tmp_path / "out", workers=1, **organ)
        cases, terms = prepare.read_data_set(config)
        for case in cases:
            assert prepare.check_case(case, config, terms)["findings"] == []


def test_six_real_cases_raise_no_alarm(tmp_path, real_ct):
    config = Config(source=real_ct, destination=tmp_path, workers=1)
    cases, terms = prepare.read_data_set(config)
    records = [prepare.check_case(case, config, terms) for case in cases]
    compare_cases(records)
    assert [record["findings"] for record in records] == [[]] * 6


AWKWARD = {  # file → part of the one message; None: read, and no CT of a liver for another reason
    "5D_small.nii": "one 3D volume, got shape (1, 2, 3, 1, 3)",
    "functional.nii": "one 3D volume, got shape (17, 21, 3, 20)",
    "nifti1.hdr": "no such file, nifti1.img",
    "not-nifti.nii": "cannot be read",
    "air2.hdr.gz": "too narrow for HU",
    "alireza_case2_bigendian_f32.nii": "",
    "avg152T1_LR_nifti2.nii.gz": "",
    "big.nii.gz": "",
    "example_mr_sm.nii.gz": "no fat or air below 0",
    "niivue_CT_AVM.nii.gz": "no fat or air below 0",
    "niivue_CT_pitch.nii.gz": "8 bits cannot hold HU",
    "standard.nii.gz": "8 bits cannot hold HU",
    "with_extension.nii.gz": "8 bits cannot hold HU",
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_files_get_one_clear_error(name, tmp_path):
    source = SHARED_DATA / "awkward" / name
    if not source.exists():
        pytest.skip("the awkward files are not here (beside the project)")
    (tmp_path / "raw/imagesTr").mkdir(parents=True)
    (tmp_path / "raw/labelsTr").mkdir(parents=True)
    for file in source.parent.glob(f"{name.split('.hdr')[0]}*"):
        (tmp_path / "raw/imagesTr" / file.name).symlink_to(file)
    scan = nib.load(source) if name != "not-nifti.nii" else None
    shape, affine = (scan.shape[:3], scan.affine) if scan else ((4, 4, 4), np.eye(4))
    label = np.zeros(shape, np.uint8)
    label[1:3, 1:3, 1:2] = 1
    stem = name.removesuffix(".gz").removesuffix(".nii").removesuffix(".hdr")
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "raw/labelsTr" / f"{stem}.nii.gz")
    config = Config(source=tmp_path / "raw", destination=tmp_path / "out", workers=1)
    cases, terms = prepare.read_data_set(config)
    record = prepare.check_case(cases[0], config, terms)
    stopping = list_errors(record, config.accept)
    assert len(stopping) == 1, record["findings"]
    assert AWKWARD[name] in stopping[0][1]
