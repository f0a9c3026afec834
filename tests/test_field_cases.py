"""Small inputs that reproduce trouble reported in public; each ends as its `expect.txt` says."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from helpers import build_field_case, field_patient, run, save

import apply_model
from data import evaluate
from data.datasets import find_scans
from data.files import InputError
from data.scans import find_others, read_scan
from data.seg import convert_to_seg, convert_to_series


@pytest.fixture
def built(request, tmp_path) -> Path:
    """The inputs of the field case that the test is named after."""
    name = request.node.name.partition("[")[0].removeprefix("test_")
    return build_field_case(name, tmp_path / "raw")


@pytest.fixture
def segment(checkpoint, tmp_path, blank_pictures) -> Callable[..., dict[str, dict]]:
    """apply_model.py on some paths, without its pictures: case → row of results.json."""

    def apply(*paths: Path, out: str = "results", **settings) -> dict[str, dict]:
        how = {"checkpoint": checkpoint, "device": "cpu", "destination": tmp_path / out}
        settings = how | settings
        apply_model.main(apply_model.Config(paths=paths, **settings))
        rows = json.loads((tmp_path / out / "results.json").read_text())
        return {row["case"]: row for row in rows}

    return apply


# prepare.py
@pytest.mark.parametrize(
    ("name", "settings", "foreground", "cases"),
    [
        ("03_series_in_two_folders_seg", {}, [1, 2], 3),
        ("10_seg_of_original_uids", {"trust_image_grid": ()}, [1, 2], 3),
        ("55_trust_turns_sound_labels", {"trust_image_grid": ()}, [1, 2], 3),
        ("09_all_patients_anonymous", {"folds": 2}, [1, 2], 4),
        ("14_segnrrd_names_swapped", {}, [2, 1], 3),
        ("16_monailabel_final_original", {}, [1, 2], 3),
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
        (
            "13_rtstruct_only",
            r"RS\.dcm: .*got RTSTRUCT.*convert its contours to DICOM SEG or NIfTI",
        ),
    ],
)
def test_sets_whose_liver_nobody_names_are_refused(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(build_field_case(name, tmp_path / "raw"))


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("43_tumour_only_as_1", {}, "p0, p1, p2: liver of 13.5 ml, expected 500 to 4000"),
        ("10_seg_of_original_uids", {}, "FrameOfReferenceUID"),
        ("34_png_stack_beside_nifti", {}, "says how it lies on its scan"),
        ("71_phases_by_trigger_interleaved_seg", {}, "AcquisitionNumber of a0018.dcm: 1; b0018"),
        ("55_trust_turns_sound_labels", {"trust_image_grid": ()}, "note: liver_0: the label map"),
    ],
)
def test_what_cannot_be_is_told(name, settings, text, tmp_path, capsys):
    with contextlib.suppress(InputError):
        run(build_field_case(name, tmp_path / "raw"), **settings)
    assert text in capsys.readouterr().out


def test_unicode_names(tmp_path):
    """Composed and decomposed letters are the same, in folders and in files of names."""
    source = build_field_case("56_unicode_names", tmp_path / "raw")
    apart = run(source, images=source / "images", labels=source / "labels")
    assert len(apart["cases"]) == 4
    rows = run(source / "b", split=source / "split.json")["cases"]
    split = {row["case"]: row["split"] for row in rows}
    asked = json.loads((source / "split.json").read_text())
    assert {normalize("NFC", n): s for s, names in asked.items() for n in names} == split
    rows = run(source / "b", patients=source / "patients.csv")["cases"]
    assert {row["patient"] for row in rows} == {"P0", "P2", "P3"}


def test_own_series_are_several_patients(tmp_path, capsys):
    source = build_field_case("90_own_series_are_one_patient", tmp_path / "raw")
    for name in ("p0", "p1", "p2"):
        place = source / "d" / name
        convert_to_series(source / f"nii/{name}.nii.gz", place / "ct")
        convert_to_seg(source / f"lab/{name}.nii.gz", place / "ct", place / "seg.dcm")
    patients = {row["patient"] for row in run(source / "d")["cases"]}
    assert patients == {"p0", "p1", "p2"}
    assert '3 series have "anonymous" as PatientID' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset.json", '{"labels": {"1": "spleen", "1": "liver"}}', "'1' twice"),
        ("patients.csv", "case,patient\n" + "a" * 140_000 + ",p\n", "field limit"),
        ("patients.csv", None, "no plain file"),
        ("dataset.json", None, "no plain file"),
    ],
)
def test_odd_files_beside_a_set_end_in_one_line(name, content, message, tmp_path):
    """None is a named pipe, which would be read for ever."""
    source = build_field_case("17_case_numbers_from_0000", tmp_path / "raw")
    file = source / name
    file.unlink(missing_ok=True)
    os.mkfifo(file) if content is None else file.write_text(content)
    with pytest.raises(InputError, match=message):
        run(source, patients=file if name == "patients.csv" else None)


@pytest.mark.parametrize("begin", [b"PK\3\4", b"\xfd7zXZ\0", b"BZh9", b"<html>", b"version ht"])
def test_other_archives_and_texts_in_place_of_a_file_are_told(begin, tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(begin + bytes(400))
    told = r"a\.nii\.gz: is a ((zip|xz|bzip2) file; unpack|web page or a Git LFS pointer; download)"
    with pytest.raises(InputError, match=told):
        read_scan(tmp_path / "a.nii.gz")


# prepare.py, then apply_model.py
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


# apply_model.py
@pytest.mark.parametrize(
    ("name", "places", "found"),
    [
        ("01_series_in_two_folders", "export", 1),
        ("01_series_in_two_folders", "export/DIR000", "its series goes on in .*DIR001"),
        ("01_series_in_two_folders", "export/DIR001", "its series goes on in .*DIR000"),
        ("02_series_one_slice_per_folder", "export", 1),
        ("04_slices_given_by_glob", "ct/*.dcm", 1),
        ("51_two_patients_one_series", "ct", r"several \(PatientID.* of a0000.dcm; b0000.dcm\)"),
        ("82_nifti_at_depth", "set", 2),
    ],
)
def test_paths_stand_for_whole_scans(name, places, found, tmp_path):
    """`found` is how many scans of all slices there are, or why there is none."""
    paths = sorted(build_field_case(name, tmp_path / "raw").glob(places))
    if isinstance(found, int):
        slices = 6 if "glob" in name else 24
        assert [read_scan(path).shape[2] for path in find_scans(*paths)] == [slices] * found
        return
    with pytest.raises(InputError, match=found):
        read_scan(find_scans(*paths)[0])


def test_a_damaged_file_stops_no_series(segment, tmp_path):
    built = build_field_case("69_bad_file_beside_two_series", tmp_path / "raw")
    with pytest.raises(InputError, match=r"1 of 3 scans failed:\n.*z_damaged\.dcm"):
        segment(built / "dicom")
    assert len(list((tmp_path / "results").glob("*/*_label.nii.gz"))) == 2


def test_names_in_a_truth_are_not_contradicted(tmp_path, blank_pictures):
    """Its header says tumour = 1, liver = 2, and its prediction liver = 1, tumour = 2."""
    built = build_field_case("48_labels_swapped_in_truth", tmp_path / "raw")
    files = (built / "pred.nii.gz", built / "truth.seg.nrrd", tmp_path / "out")
    classes = {"liver": ("1",), "tumour": ("2",)}
    with pytest.raises(InputError, match=r"contradicts the data, which declare .*tumour = 1"):
        evaluate.main(evaluate.Config(*files, labels=classes))
    with pytest.raises(InputError, match="are its values exchanged"):
        evaluate.main(evaluate.Config(*files))
    evaluate.main(evaluate.Config(*files, predicted=classes))
    assert json.loads((tmp_path / "out/results.json").read_text())[0]["liver_dice"] == 1


def test_classes_are_those_of_the_network(segment, tmp_path):
    """A liver network counts tumours as liver; `--truth` and data.evaluate agree on it."""
    built = build_field_case("truth_values", tmp_path / "raw")
    truth = built / "truth_ok.nii.gz"
    (row,) = segment(built / "scan.nii.gz", truth=(truth,)).values()
    evaluate.main(
        evaluate.Config(tmp_path / "results/scan/scan_label.nii.gz", truth, tmp_path / "out")
    )
    (again,) = json.loads((tmp_path / "out/results.json").read_text())
    assert again["liver_dice"] == row["liver_dice"] > 0 and "tumour_dice" not in again


def test_maps_of_many_organs(tmp_path, capsys):
    """Of a map with 40 structures, `--values liver=5` takes the liver alone."""
    folders = [tmp_path / "raw" / name for name in ("images", "labels")]
    for index in range(3):
        hu, label = field_patient(index)
        many = np.where(label > 0, 5, 0).astype(np.uint8)
        many[2:42, 2, 2] = np.arange(6, 46)
        for folder, array in zip(folders, (hu, many), strict=True):
            save(array, np.diag([5.0, 5, 6, 1]), folder / f"p{index}.nii.gz")
    dataset = run(tmp_path / "raw", values=("liver=5",), foreground=("liver",))
    assert (dataset["foreground"], len(dataset["cases"])) == ([5], 3)
    assert "values that --values does not name are background" in capsys.readouterr().out
    with pytest.raises(InputError, match="cases have errors"):
        run(tmp_path / "raw")
    assert find_others(folders[1] / "p0.nii.gz", {"liver": (5,), "b": (*range(6, 38),)}) == ()


def test_truths_of_a_folder_of_segs(segment, tmp_path):
    built = build_field_case("42_segs_as_truth_folder", tmp_path / "raw")
    rows = segment(built / "ct", truth=(built / "segs",))
    (alone,) = segment(built / "ct/p0", truth=(built / "segs/p0.dcm",), out="alone").values()
    assert rows["p0"]["liver_dice"] == alone["liver_dice"] and "liver_dice" in rows["p1"]
