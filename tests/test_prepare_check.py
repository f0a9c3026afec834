"""The check of prepare.py: every planted fault is found and named, sound data raises no alarm."""

import json
import re
from pathlib import Path

import make_phantoms
import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED_DATA, without_pictures
from helpers import LPS, call_script, ras_arrays, read_voxels, run, save_case, write_patients

import prepare
from data import check
from data.volumes import Volume
from prepare import Config

SHIFT = np.outer([1.0, 0, 0, 0], [0, 0, 0, 1])  # by 1 mm along x


@pytest.fixture(autouse=True)
def plain():
    with without_pictures():
        yield


def findings(case: Path, **settings) -> dict[str, str]:
    """Kind → text for the only case of a Decathlon folder."""
    cases, terms = prepare.check.read_data_set(Config(case, case.parent / "checked", **settings))
    return dict(check.check_case(cases[0], terms, case.parent)["findings"])


at = lambda array: np.indices(array.shape)  # noqa: E731
# name: (kind that must be found, what is done to scan and label (RAS arrays))
PLANTED = {
    "constant": ("hu", lambda s, m: (np.full_like(s, 40), m)),
    "8 bits": ("hu", lambda s, m: (np.clip(s / 8 + 128, 0, 255).astype(np.uint8), m)),
    "intercept not applied": ("hu", lambda s, m: (s + 1024, m)),
    "the same, padded": ("hu", lambda s, m: (np.where(at(s)[0] < 4, -2000, s + 1024), m)),
    "rescaled twice": ("hu", lambda s, m: (s - 1024, m)),
    "ten times": ("hu", lambda s, m: (s * 10, m)),
    "scaled to 0..1": ("hu", lambda s, m: ((s.astype(np.float32) + 1024) / 2048, m)),
    "magnetic resonance": ("hu", lambda s, m: (np.abs(s), m)),
    "clipped to a window": ("air", lambda s, m: (np.clip(s, -200, 250), m)),
    "inf": ("nan", lambda s, m: (np.where(s == s.max(), np.inf, s).astype("f4"), m)),
    "air alone": ("hu", lambda s, m: (np.full_like(s, -1000), m)),
    "padding read as HU": ("hu", lambda s, m: (np.where(s < -900, 62512, s.astype("i4")), m)),
    "slices without data": ("blank", lambda s, m: (np.where(at(s)[2] // 3 == 1, -1024, s), m)),
    "empty label": ("empty", lambda s, m: (s, np.zeros_like(m))),
    "undeclared value": ("values", lambda s, m: (s, m * 7)),
    "mirrored label": ("outline", lambda s, m: (s, m[::-1])),
    "scan and label mirrored": ("left_right", lambda s, m: (s[::-1], m[::-1])),
    "label in the air": ("outside", lambda s, m: (s, np.roll(m, 16, axis=0))),
    "tumour in a corner": ("tumour_apart", lambda s, m: (s, np.where(at(m).max(0) < 4, 2, m > 0))),
    "only tumour asked, none there": ("empty", lambda s, m: (s, m * 0 + (m > 0))),
    "too few slices": ("thin", lambda s, m: (s[:, :, 22:30], m[:, :, 22:30])),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_in_the_voxels_is_found(name, tmp_path):
    kind, plant = PLANTED[name]
    scan, label = plant(*ras_arrays(1))
    scan = scan.astype(np.int32) if scan.dtype == np.int64 else scan
    save_case(tmp_path / "raw", "case", scan, label.astype(np.uint8))
    asked = {"foreground": ("tumour",)} if "asked" in name else {}
    assert kind in findings(tmp_path / "raw", **asked)


@pytest.mark.parametrize(
    ("kind", "affine"),
    [
        ("grid", LPS + 3 * SHIFT),
        ("grid", np.diag([-5.0, -5, 4.8, 1])),
        ("grid", np.diag([5.0, -5, 5, 1])),  # the label map says its first axis runs the other way
        ("near_grid", LPS + SHIFT),
    ],
)
def test_a_label_map_beside_its_scan_is_found(kind, affine, tmp_path):
    save_case(tmp_path / "raw", "case", *ras_arrays(1))
    path = tmp_path / "raw/labelsTr/case.nii.gz"
    nib.save(nib.Nifti1Image(read_voxels(path), affine), path)  # stored as LPS
    assert kind in findings(tmp_path / "raw")


def make_liver() -> tuple[np.ndarray, np.ndarray]:
    """HU and mask, 40 × 40 × 24 voxels of 5 mm: a liver of 210 ml, even in an uneven body."""
    rng, hu = np.random.default_rng(0), np.full((40, 40, 24), -1000, np.int16)
    hu[4:36, 4:36] = rng.normal(0, 60, (32, 32, 24))
    mask = np.zeros(hu.shape, bool)
    mask[22:32, 8:22, 11:23] = True  # 10 × 14 × 12 voxels of 0.125 ml
    hu[mask] = rng.normal(100, 8, 1680)
    return hu, mask


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m[::-1], "mirrored left-right"),
        (lambda m: m[:, ::-1], "mirrored front-back"),
        (lambda m: m[:, :, ::-1], "upside down"),
        (lambda m: m[::-1, ::-1], "turned by 180°"),
        (lambda m: m.transpose(1, 0, 2), "with rows and columns exchanged"),
        (lambda m: m.transpose(1, 0, 2)[::-1], "turned by 90°"),
        (lambda m: np.roll(m, -5, 0), "25 mm to the right"),
        (lambda m: np.roll(m, (5, -5), (1, 2)), "25 mm to the back and 25 mm to the head"),
        (lambda m: np.roll(m[:, :, ::-1], 5, 0), "upside down and 25 mm to the left"),
    ],
)
def test_an_outline_that_fits_elsewhere_is_found_there(change, where):
    hu, mask = make_liver()
    ((kind, text),), place = check.judge_fit(hu, change(mask), (5.0, 5.0, 5.0))
    assert (kind, where in text) == ("outline", True), text
    assert np.array_equal(check.move_mask(change(mask), place, 1), mask)


def test_an_outline_that_fits_is_left_alone():
    hu, mask = make_liver()
    small = mask & (np.indices(mask.shape)[2] < 16)  # 5 of 12 slices, 88 ml
    for outline in (mask, np.roll(small, 5, 0)):
        assert check.judge_fit(hu, outline, (5.0, 5.0, 5.0)) == ([], None)
    edge = ((0, 4), (0, 0), (0, 0))  # no square
    wide = np.pad(hu, edge, constant_values=-1000)
    assert check.judge_fit(wide, np.pad(mask[::-1], edge), (5, 5, 5))[0][0][0] == "outline"


def test_the_tip_of_a_liver_that_the_scan_cuts_off_has_no_side():
    """5 × 5 voxels of 0.125 ml in each slice: 75 ml at an end, 125 ml, 75 ml within the scan."""
    hu = np.zeros((40, 40, 40), np.int16)
    for first, last, expected in ((16, 40, ""), (0, 40, "left_right"), (4, 28, "organ left_right")):
        mask = np.zeros(hu.shape, bool)
        mask[4:9, 10:15, first:last] = True
        found = check.doubt_organ("liver", mask, mask & False, hu, (5.0, 5.0, 5.0))
        assert " ".join(kind for kind, _ in found) == expected


def test_six_real_cases_raise_no_alarm_and_their_turned_outlines_do(tmp_path, real_ct):
    cases, terms = prepare.check.read_data_set(Config(source=real_ct, destination=tmp_path))
    records = [check.check_case(case, terms, tmp_path) for case in cases]
    check.compare_cases(records, terms)
    assert [record["findings"] for record in records] == [[]] * 6
    for record in records[3:]:  # the small files
        scan, label = check.read_pair(record, terms)
        hu, mask = scan.ras.data[::4, ::4], label.data[::4, ::4] > 0
        mm = tuple(np.multiply(scan.ras.spacing_mm, (4, 4, 1)))
        for wrong in (mask[::-1], mask[:, ::-1], mask[:, :, ::-1], mask.transpose(1, 0, 2)):
            assert dict(check.judge_fit(hu, wrong, mm)[0]).keys() == {"outline"}
        assert check.judge_fit(hu, np.roll(mask, 8, 0), mm)[0]  # 24 mm


def test_organs_are_doubted_by_volume_side_parts_and_tumours():
    """Voxels of 1 ml in a body of 40 × 20 × 10; the patient's right is at high indices."""
    hu = np.zeros((40, 20, 10), np.int16)

    def doubt(*boxes, tumour=0, name="liver"):
        organ, inside = np.zeros(hu.shape, bool), np.zeros(hu.shape, bool)
        for first, last in boxes:
            organ[first:last, :, 2:8] = True
        inside[boxes[0][0] : boxes[0][0] + tumour, :, 2:8] = True
        found = check.doubt_organ(name, organ & ~inside, inside, hu, (10.0, 10.0, 10.0))
        return "; ".join(text for _, text in found)

    assert doubt((25, 35)) == doubt((25, 35), tumour=5) == doubt((5, 15), name="spleen") == ""
    assert doubt((25, 28)) == "liver of 360 ml, expected 500 to 4000"
    assert doubt((25, 35), tumour=8) == "tumour of 960 ml in 240 ml of liver: values exchanged?"
    assert "two parts side by side" in doubt((5, 12), (30, 37))
    assert "on the patient's left" in doubt((5, 15))
    hu[:, :8, 5:] = -900  # lung beside the upper half
    assert doubt((25, 35)) == ""
    hu[:] = hu[:, :, ::-1].copy()
    assert "upside down" in doubt((25, 35))


def test_slices_that_nobody_annotated_are_noticed():
    for drawn, every, text in (
        (range(3, 20), 1, ""),
        (range(4, 20, 3), 1, "--label-every 3?"),
        (range(3, 20, 4), 2, "--label-every 4?"),
        (range(3, 20, 4), 4, ""),
        ([3, 4, 5, 12, 13, 14], 1, ""),  # two lesions
        ([3, 4, 5, 7, 8, 9], 1, "1 gaps between annotated slices, the first behind slice 6"),
        (range(3, 20), 4, "but slices 4 and 5 are annotated"),
        ([], 1, ""),
    ):
        found = check.judge_gaps(np.isin(np.arange(24), drawn), every)
        assert [text in told for _, told in found] == [True] * bool(text)


def test_geometry_that_no_patient_has_is_noticed():
    for slices, affine, kinds in (
        (100, np.eye(4), ["identity"]),
        (100, np.diag([-1.0, -1, 1, 1]), ["identity"]),
        (100, np.eye(4) + 50 * SHIFT, []),  # resampled to 1 mm
        (100, np.diag([5.0, 0.7, 0.7, 1]), ["turned"]),  # 2560 mm from side to side
        (400, np.diag([-0.97, -0.97, 5, 1]), []),  # 2 m from head to feet
    ):
        scan = Volume(np.broadcast_to(np.int16(0), (512, 512, slices)), affine)
        assert [kind for kind, _ in check.judge_geometry(scan)] == kinds


def test_a_set_that_lacks_an_organ_is_told_with_names():
    terms = check.Terms({"background": (0,), "liver": (1,), "spleen": (3,)}, (1, 3))
    same = {"slice_sums": [], "patient": "", "spacing_mm": [1, 1, 1], "orientation": "RAS"}
    records = [
        same | {"case": name, "findings": [], "voxels_per_label": {"1": 9, "3": spleen}}
        for name, spleen in (("a", 5), ("b", 0), ("c", 0))
    ]
    told = check.compare_cases(records, terms)
    assert told == [("lacking", "2 of 3 cases hold no voxel of spleen: b, c")]
    check.compare_cases(records[1:], terms)
    lacking = ("empty", "2 of 2 cases hold no voxel of spleen")
    assert [[*map(tuple, r["findings"])] for r in records] == [[], [lacking], [lacking]]


def test_identity_affine_and_odd_spacing_are_told(tmp_path):
    affines = (np.eye(4), LPS, np.diag([5.0, 5, 45, 1]), None)
    write_patients(tmp_path / "raw", affines=affines)
    dataset = run(tmp_path / "raw", accept=("identity",))
    warnings = {case["case"]: " ".join(case["warnings"]) for case in dataset["cases"]}
    assert "no geometry" in warnings["case_0"]
    assert "far from the other scans" in warnings["case_2"]
    assert "LPS" in dataset["notes"][0] and "RAS" in dataset["notes"][0]


@pytest.mark.parametrize("first", [0, 6], ids=["the same file", "a part of its slices"])
def test_one_scan_under_two_names_becomes_one_patient(first, tmp_path):
    write_patients(tmp_path / "raw", affines=(None,) * 4)
    save_case(tmp_path / "raw", "other", *(array[:, :, first:] for array in ras_arrays(0)))
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
    faulty = [case["case"] for case in dataset["left_out"]]
    assert faulty == ["case_1", "case_2", "case_3"] and len(dataset["cases"]) == 3
    run(raw, destination=tmp_path / "out", leave_out=faulty)  # known: no error any more


def test_clean_phantoms_raise_no_alarm(tmp_path, raw_phantoms):
    spleens = tmp_path / "spleen"
    make_phantoms.main(make_phantoms.Config(spleens, cases=4, size=48, organ="spleen"))
    for source, organ in ((raw_phantoms, {}), (spleens, {"foreground": ("spleen",)})):
        cases, terms = prepare.check.read_data_set(Config(source, tmp_path / "out", **organ))
        for case in cases:
            assert check.check_case(case, terms, tmp_path)["findings"] == []


AWKWARD = {  # file → part of the one message
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
    cases, terms = prepare.check.read_data_set(Config(tmp_path / "raw", tmp_path / "out"))
    ((_, text),) = check.list_errors(check.check_case(cases[0], terms, tmp_path / "out"), ())
    assert AWKWARD[name] in text
