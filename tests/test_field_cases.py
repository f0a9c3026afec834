"""Small inputs that reproduce trouble reported in public; each ends as its `expect.txt` says."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import build_field_case, field_patient, run

import apply_model
from data.files import InputError
from data.scans import read_scan
from data.volumes import read_file


@pytest.fixture
def built(request, tmp_path) -> Path:
    """The inputs of the field case that the test is named after."""
    name = request.node.name.partition("[")[0].removeprefix("test_")
    return build_field_case(name, tmp_path / "raw")


@pytest.fixture
def segment(checkpoint, tmp_path, blank_pictures) -> Callable[..., dict[str, dict]]:
    """apply_model.py on some paths, without its pictures: case → row of results.json."""

    def apply(*paths: Path, out: str = "results", **settings) -> dict[str, dict]:
        settings = {
            "checkpoint": checkpoint,
            "device": "cpu",
            "destination": tmp_path / out,
        } | settings
        apply_model.main(apply_model.Config(paths=paths, **settings))
        rows = json.loads((tmp_path / out / "results.json").read_text())
        return {row["case"]: row for row in rows}

    return apply


def label_of(folder: Path, case: str) -> np.ndarray:
    """The label map that apply_model.py wrote for a case, axes R, A, S."""
    return read_file(folder / case / f"{case}_label.nii.gz").ras.data


# ---------------------------------------------------------------------------------------
# prepare.py
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "foreground", "cases"),
    [
        ("json_bom", {}, [1, 2], 3),
        ("nnunet_regions", {}, [1, 2], 3),
        ("seg_no_reference", {}, [1, 2], 3),
        ("units_metres", {}, [1, 2], 3),
        ("values_of_dataset_json", {}, [6], 3),
        ("09_all_patients_anonymous", {"folds": 2}, [1, 2], 4),
        ("12_seg_whole_liver_name", {}, [1, 2], 3),
        ("14_segnrrd_names_swapped", {}, [2, 1], 3),
        ("16_monailabel_final_original", {}, [1, 2], 3),
        ("17_case_numbers_from_0000", {}, [1, 2], 5),
        ("18_timepoints_in_flat_names", {"patient_pattern": r"^(.*\d\d)\d\d$"}, [1, 2], 12),
        ("74_monailabel_series_names", {}, [1, 2], 3),
        ("94_masks_whole_liver", {}, [1, 2], 3),
    ],
)
def test_sets_are_prepared_with_their_own_liver(name, settings, foreground, cases, tmp_path):
    """The phantoms of all sets have a liver of 5,961 voxels with a tumour of 90, or like these."""
    dataset = run(build_field_case(name, tmp_path / "raw"), **settings)
    assert (len(dataset["cases"]), dataset["foreground"]) == (cases, foreground)
    for case in dataset["cases"]:
        assert np.allclose(case["spacing_mm"], (5, 5, 6), atol=1e-3)
        voxels = {int(value): count for value, count in case["voxels_per_label"].items()}
        assert 2000 < voxels[foreground[0]] < 9000
        assert case["foreground_voxels"] == sum(voxels[value] for value in foreground)
        assert "original" not in str(case["label"])
    patients = {case["patient"] for case in dataset["cases"]}
    assert len(patients) == (4 if "patient_pattern" in settings else cases)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("53_seg_default_names", "Segment_1 = .*Segment_2 = .*name one of them"),
        ("80_one_json_for_two_sets", "lits/segmentation-0.nii, which no dataset.json describes"),
    ],
)
def test_sets_whose_liver_nobody_names_are_refused(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(build_field_case(name, tmp_path / "raw"))


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("43_tumour_only_as_1", {}, "p0, p1, p2: liver of 13.5 ml, expected 500 to 4000"),
        ("76_values_swapped_without_json", {}, "of liver: values exchanged?"),
        ("06_intercept_twice_nifti", {}, "applied twice?"),
        ("44_spacing_reversed", {}, "1536 × 320 × 30 mm is no body"),
        ("55_trust_turns_sound_labels", {"trust_image_grid": ()}, "note: liver_0: the label map"),
    ],
)
def test_what_cannot_be_is_told(name, settings, text, tmp_path, capsys):
    with contextlib.suppress(InputError):
        run(build_field_case(name, tmp_path / "raw"), **settings)
    assert text in capsys.readouterr().out


def test_split_nnunet(built):
    dataset = run(built, split=built / "splits_final.json")
    split = {case["case"]: case["split"] for case in dataset["cases"]}
    assert split == {"liver_0": "training", "liver_1": "training", "liver_2": "validation"}


# ---------------------------------------------------------------------------------------
# prepare.py, then apply_model.py
# ---------------------------------------------------------------------------------------


def test_label_other_axes(built, segment, tmp_path):
    dataset = run(built)
    assert len(dataset["cases"]) == 3 and not dataset["left_out"]
    (case,) = (case for case in dataset["cases"] if case["split"] == "test")
    scan, label = read_scan(Path(case["image"])), read_scan(Path(case["label"]))
    assert (scan.axcodes, label.axcodes) == ("LPS", "RAS")
    scan.from_ras(label.ras.data).write(tmp_path / "lps.nii.gz")
    (of_split,) = segment(split="test", data=tmp_path / "prepared", out="split").values()
    image, truth = Path(case["image"]), Path(case["label"])
    (of_truth,) = segment(image, truth=(truth,), out="truth").values()
    (of_lps,) = segment(image, truth=(tmp_path / "lps.nii.gz",), out="lps").values()
    assert of_split["liver_dice"] == of_truth["liver_dice"] == of_lps["liver_dice"] > 0


def test_label_other_origin(built, segment, tmp_path):
    with pytest.raises(InputError, match="cases have errors"):
        run(built)
    dataset = run(built, trust_image_grid=())
    assert len(dataset["cases"]) == 3 and all(c["trust_image_grid"] for c in dataset["cases"])
    (case,) = (case for case in dataset["cases"] if case["split"] == "test")
    image, truth = Path(case["image"]), Path(case["label"])
    scan, label = read_scan(image), read_scan(truth)
    scan.like(label.read()).write(tmp_path / "placed.nii.gz")
    (of_split,) = segment(split="test", data=tmp_path / "prepared", out="split").values()
    (placed,) = segment(image, truth=(tmp_path / "placed.nii.gz",), out="placed").values()
    assert of_split["liver_dice"] == placed["liver_dice"] > 0
    with pytest.raises(InputError, match="voxels apart"):
        segment(image, truth=(truth,), out="untrusted")


def test_mhd_raw_changed(built, segment, tmp_path):
    """The second run notices that voxels changed and does the case again."""
    segment(built / "scan.mhd")
    before = label_of(tmp_path / "results", "scan")
    (built / "scan.raw").write_bytes((built / "other.raw").read_bytes())
    assert np.array_equal(read_scan(built / "scan.mhd").ras.data, field_patient(0)[0])
    segment(built / "scan.mhd")
    segment(built / "scan.mhd", out="fresh")
    after = label_of(tmp_path / "results", "scan")
    assert np.array_equal(after, label_of(tmp_path / "fresh", "scan"))
    assert not np.array_equal(after, before)


# ---------------------------------------------------------------------------------------
# apply_model.py
# ---------------------------------------------------------------------------------------


def test_dicom_batch_one_bad(built, segment, tmp_path, capsys):
    with pytest.raises(InputError, match="1 of 2 scans failed") as error:
        segment(built)
    assert "a_bad" in str(error.value) and "ImageOrientationPatient" in str(error.value)
    assert "a_bad: failed, the others go on" in capsys.readouterr().out
    assert label_of(tmp_path / "results", "b_good").shape == (64, 64, 24)
    assert not (tmp_path / "results/a_bad/a_bad_label.nii.gz").exists()


def test_dicom_rescale_empty(built, segment, tmp_path):
    scan = read_scan(built / "ct")
    assert np.array_equal(scan.ras.data, field_patient(2)[0])  # as of the plain series
    assert list(segment(built / "ct")) == ["ct"]
    assert label_of(tmp_path / "results", "ct").shape == scan.ras_shape


def test_dicomdir_beside_series(built, segment, tmp_path):
    assert list(segment(built / "export")) == ["SER0", "SER1"]
    labels = [label_of(tmp_path / "results", name) for name in ("SER0", "SER1")]
    assert not np.array_equal(*labels)


def test_truths_of_a_folder_of_segs(segment, tmp_path):
    built = build_field_case("42_segs_as_truth_folder", tmp_path / "raw")
    rows = segment(built / "ct", truth=(built / "segs",))
    (alone,) = segment(built / "ct/p0", truth=(built / "segs/p0.dcm",), out="alone").values()
    assert rows["p0"]["liver_dice"] == alone["liver_dice"] and "liver_dice" in rows["p1"]


def test_nan_voxels(built, segment, tmp_path):
    with pytest.raises(InputError, match=r"scan\.nii\.gz: .*8 .*NaN"):
        segment(built / "scan.nii.gz", truth=(built / "truth.nii.gz",))
    assert not (tmp_path / "results").exists()


def test_truth_values(built, segment, capsys):
    scan = built / "scan.nii.gz"
    reference = segment(scan, truth=(built / "truth_ok.nii.gz",), out="ok")["scan"]
    assert reference["liver_dice"] > 0
    for value in (255, 6):
        with pytest.raises(InputError, match=rf"truth_{value}\.nii\.gz: .*holds \[{value}\]"):
            segment(scan, truth=(built / f"truth_{value}.nii.gz",), out=f"of_{value}")
    rounded = segment(scan, truth=(built / "truth_float.nii.gz",), out="float")["scan"]
    assert rounded["liver_dice"] == reference["liver_dice"]
    assert "rounded" in rounded["warnings"]
