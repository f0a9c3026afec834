"""DICOM through the scripts: prepared, segmented, compared and shown as NIfTI is; no names leak."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED_DATA
from helpers import SECRETS, part_arrays, run, write_phantom_seg, write_phantom_series

import apply_model
from data.datasets import find_pairs
from data.dicom import read_series
from data.files import InputError
from data.labels import USUAL_LABELS
from data.scans import read_label_map
from data.seg import read_seg, write_seg
from data.volumes import Volume, read_file

CLASSES = {"background": (0,), "liver": (1,), "tumour": (2,)}


def series_with_seg(folder: Path, label=None, classes=CLASSES) -> tuple[Volume, Volume]:
    """A phantom's series and the DICOM SEG of its label map, as apply_model.py writes it."""
    scan, truth = part_arrays(0, 20)
    write_phantom_series(folder / "ct", scan, SeriesNumber=3)
    image = read_series(folder / "ct")
    label = image.from_ras((truth if label is None else label).astype(np.uint8))
    assert write_seg(label, image, classes, folder / "ct_label.dcm") == []
    return image, label


def test_series_with_seg_and_nifti_labels_are_prepared_and_nothing_private_is_written(tmp_path):
    raw = tmp_path / "raw"
    for index in range(3):
        scan, label = part_arrays(index, 20)
        secret = {"PatientID": "ID-4711" if index < 2 else "ID-4712"}
        folder = raw / f"pat{index}"
        slices = write_phantom_series(folder / "scan", scan, name="IMG{:03d}", **secret)
        if index == 1:
            read_series(folder / "scan").from_ras(label).write(folder / "scan" / "liver.nii.gz")
        else:
            write_phantom_seg(folder / "seg.dcm", slices, label)
    dataset = run(raw, training=0.5, validation=0.5, test=0)
    assert len(dataset["cases"]) == 3
    for case in dataset["cases"]:
        index = int(Path(case["image"]).parent.name[3:])
        scan, label = part_arrays(index, 20)
        assert case["voxels_per_label"]["1"] == np.count_nonzero(label == 1)
        assert case["covered_foreground_voxels"] == np.count_nonzero(label)
        for entry in (e for e in dataset["subvolumes"] if e["case"] == case["case"]):
            window = slice(entry["first_slice"], entry["first_slice"] + 16)
            for key, array in (("image", scan), ("label", label)):
                piece = nib.load(tmp_path / "prepared" / entry[key])
                assert np.array_equal(np.asanyarray(piece.dataobj), array[:, :, window])
    assert len({case["patient"] for case in dataset["cases"]}) == 2  # one PatientID twice
    for path in (tmp_path / "prepared").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (*SECRETS.values(), "ID-4712", "19700101"):
            assert secret not in path.name and secret.encode() not in content


def test_a_series_has_one_name_for_preparing_and_for_applying(tmp_path):
    scan, label = part_arrays(0, 20)
    for form in ("{}", "{}/scan", "{}/CT", "{}/portal"):
        raw = tmp_path / f"raw{len(form)}"
        for patient in ("pat0", "pat1"):
            slices = write_phantom_series(raw / form.format(patient), scan)
            write_phantom_seg(raw / patient / "seg.dcm", slices, label)
        prepared = [case.name for case in find_pairs(raw).cases]
        assert [case.name for case in apply_model.list_cases([raw], [])] == prepared
        assert len(set(prepared)) == 2


OTHER_VALUES = {"background": (0,), "spleen": (9,), "liver": (1,), "Left Kidney": (4,)}


def test_prepare_reads_the_written_seg_as_it_reads_the_nifti(tmp_path):
    """The same sub-volumes bit for bit, though a SEG's own numbers must run from 1."""
    raw, classes = tmp_path / "raw", OTHER_VALUES
    _, label = series_with_seg(raw, np.array([0, 9, 1])[part_arrays(0, 20)[1]], classes)
    use = {"foreground": ("9", "1", "4"), "training": 1, "validation": 0}
    of_seg = run(raw, destination=tmp_path / "seg", test=0, **use)
    assert classes.items() <= {name: (v,) for name, v in of_seg["labels"].items()}.items()
    (raw / "ct_label.dcm").unlink()
    label.write(raw / "ct_label.nii.gz")
    use["values"] = tuple(f"{name}={value[0]}" for name, value in classes.items())
    of_nifti = run(raw, destination=tmp_path / "nifti", test=0, **use)
    assert of_seg["subvolumes"] and len(of_seg["subvolumes"]) == len(of_nifti["subvolumes"])
    for one, other in zip(of_seg["subvolumes"], of_nifti["subvolumes"], strict=True):
        a, b = (read_file(tmp_path / f / e["label"]) for f, e in (("seg", one), ("nifti", other)))
        assert np.array_equal(a.read(), b.read()) and np.array_equal(a.affine, b.affine)


def test_a_series_in_and_a_seg_out_and_in_again_as_truth(checkpoint, tmp_path):
    scan, _ = part_arrays(0, 20)
    write_phantom_series(tmp_path / "scans" / "ct", scan)
    nifti = nib.Nifti1Image(scan, np.diag([5.0, 5, 5, 1]))
    nib.save(nifti, tmp_path / "scans" / "other.nii.gz")
    use = {"checkpoint": checkpoint, "device": "cpu", "dicom_seg": True}
    apply_model.main(
        apply_model.Config(paths=(tmp_path / "scans",), destination=tmp_path / "out", **use)
    )
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    reason = "no DICOM SEG: the scan is no DICOM series"
    assert {row["case"]: reason in row["warnings"] for row in rows} == {"ct": False, "other": True}
    made = tmp_path / "out" / "ct" / "ct_label.dcm"
    assert [path.name for path in (tmp_path / "out").rglob("*.dcm")] == ["ct_label.dcm"]
    image = read_series(tmp_path / "scans" / "ct")
    found = read_seg(made, image, USUAL_LABELS).read()
    assert found.any()
    assert np.array_equal(found, read_file(made.with_suffix(".nii.gz")).read())
    apply_model.main(
        apply_model.Config(
            paths=(tmp_path / "scans" / "ct",), truth=(made,), destination=tmp_path / "again", **use
        )
    )
    (row,) = json.loads((tmp_path / "again" / "results.json").read_text())
    assert row["liver_dice"] == 1 and row["truth"] == str(made)
    assert (tmp_path / "again" / "worst.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="is no DICOM series; --dicom-seg"):
        use["destination"] = tmp_path / "never"
        apply_model.main(apply_model.Config(paths=(tmp_path / "scans" / "other.nii.gz",), **use))
    assert not (tmp_path / "never").exists()


def test_segments_are_known_by_name_whatever_their_numbers(tmp_path):
    """Spleen 1 and liver 2 in one SEG must not make a liver of the spleen."""
    raw, truth = tmp_path / "raw", part_arrays(0, 20)[1]
    swapped = np.array([0, 2, 1], np.uint8)[truth]
    image, _ = series_with_seg(raw, swapped, {"background": (0,), "Spleen": (1,), "LIVER": (2,)})
    labels = {"background": (0,), "liver": (1, 2)}  # a network that takes tumours as liver
    known = read_label_map(raw / "ct_label.dcm", image, labels, classes=labels)
    assert np.array_equal(known.ras.data, truth == 1)
    dataset = run(raw, training=1, validation=0, test=0, foreground=("liver",))
    assert dataset["labels"]["liver"] == 1 and dataset["labels"]["Spleen"] == 3
    (case,) = dataset["cases"]
    assert case["voxels_per_label"]["1"] == np.count_nonzero(truth == 1)
    assert case["voxels_per_label"]["3"] == np.count_nonzero(truth == 2)


def test_the_3d_view_compares_with_a_dicom_seg(tmp_path):
    import visualize_3d

    _, label = series_with_seg(tmp_path)
    label.write(tmp_path / "a_label.nii.gz")
    config = visualize_3d.Config(truth=tmp_path / "ct_label.dcm")
    case = visualize_3d.find_case(tmp_path / "a_label.nii.gz", config)
    assert np.array_equal(case.reference.data, case.labels.data)
    assert case.labels.data.max() == 2


# --- Real series and reported situations ------------------------------------------------


def test_the_real_series_equals_its_nifti(tmp_path, real_ct):
    real_dicom = SHARED_DATA / "dicom"
    if not real_dicom.is_dir():
        pytest.skip("the real DICOM series are not here (dicom beside the project)")
    dataset = run(real_dicom, destination=tmp_path / "out", training=1, validation=0, test=0)
    (case,) = dataset["cases"]
    assert (case["slices"], case["spacing_mm"][2]) == (44, 5.0)
    assert "1 images of another orientation" in " ".join(case["warnings"])
    nifti = nib.as_closest_canonical(nib.load(real_ct / "imagesTr/tace_0697.nii.gz"))
    expected = np.asanyarray(nifti.dataobj)
    for entry in dataset["subvolumes"]:
        first = entry["first_slice"]
        piece = nib.load(tmp_path / "out" / entry["image"])
        assert np.array_equal(np.asanyarray(piece.dataobj), expected[:, :, first : first + 16])
        window = nifti.slicer[:, :, first : first + 16]
        assert np.abs(piece.affine - window.affine).max() < 1e-3  # mm
    text = json.dumps(dataset)
    assert "0697" not in text.replace(str(real_dicom), "")
