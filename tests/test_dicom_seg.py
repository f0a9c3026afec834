"""DICOM out of apply_model.py and back in: the same voxels, names and slices."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import SHARED_DATA
from helpers import ras_arrays, run
from test_prepare_dicom import write_seg, write_series

import apply_model
from utilities import InputError, like, read_label, read_volume, voxels

CLASSES = {"background": (0,), "liver": (1,), "tumour": (2,)}


def series_with_seg(folder: Path, label=None, classes=CLASSES) -> tuple[nib.Nifti1Image, ...]:
    """A phantom's series and the DICOM SEG of its label, as apply_model.py writes it."""
    scan, truth = ras_arrays(0)
    write_series(folder / "ct", scan, SeriesNumber=3)
    image = read_volume(folder / "ct")
    label = like(image, (truth if label is None else label)[::-1, ::-1].astype(np.uint8))
    assert apply_model.write_dicom_seg(label, image, classes, folder / "ct_label.dcm") == []
    return image, label


def test_a_dicom_seg_says_what_it_is_and_where(tmp_path):
    _, label = series_with_seg(tmp_path)
    assert not list(tmp_path.glob(".*"))
    seg = pydicom.dcmread(tmp_path / "ct_label.dcm")
    slices = {h.SOPInstanceUID: h for h in map(pydicom.dcmread, (tmp_path / "ct").iterdir())}
    first = next(iter(slices.values()))
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID
    for key in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert seg[key].value == first[key].value
    liver, tumour = seg.SegmentSequence
    codes = [s.SegmentedPropertyTypeCodeSequence[0] for s in (liver, tumour)]
    assert [(s.SegmentNumber, s.SegmentLabel) for s in (liver, tumour)] == [
        (1, "liver"), (2, "tumour")
    ]  # fmt: skip
    assert [code.CodeValue for code in codes] == ["10200004", "108369006"]
    frames = seg.pixel_array
    array = voxels(label)
    counted = 0
    for frame, content in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = content.DerivationImageSequence[0].SourceImageSequence[0]
        there = slices[source.ReferencedSOPInstanceUID].ImagePositionPatient
        assert content.PlanePositionSequence[0].ImagePositionPatient == there
        number = content.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        z = round((there[2] - 30) / 5)
        assert np.array_equal(frame.T > 0, array[:, :, z] == number)
        assert frame.any()  # empty frames are left out
        counted += np.count_nonzero(frame)
    assert counted == np.count_nonzero(array)


OTHER_VALUES = {"background": (0,), "spleen": (9,), "liver": (1,), "Left Kidney": (4,)}


@pytest.mark.parametrize("classes", [CLASSES, OTHER_VALUES], ids=["liver", "any values"])
def test_prepare_reads_the_written_seg_as_it_reads_the_nifti(tmp_path, classes):
    """The same sub-volumes bit for bit, though a SEG's own numbers must run from 1."""
    raw = tmp_path / "raw"
    values = np.array([v[0] for v in classes.values()] + [0] * 3, np.uint8)
    _, label = series_with_seg(raw, values[ras_arrays(0)[1]], classes)
    use = {"foreground": tuple(v for v in values.tolist() if v), "training": 1, "validation": 0}
    of_seg = run(raw, destination=tmp_path / "seg", test=0, **use)
    for name, value in classes.items():
        assert of_seg["labels"][name] == value[0]
    (raw / "ct_label.dcm").unlink()
    nib.save(label, raw / "ct_label.nii.gz")
    of_nifti = run(raw, destination=tmp_path / "nifti", test=0, **use)
    assert of_seg["subvolumes"] and len(of_seg["subvolumes"]) == len(of_nifti["subvolumes"])
    for one, other in zip(of_seg["subvolumes"], of_nifti["subvolumes"], strict=True):
        a, b = (nib.load(tmp_path / f / e["label"]) for f, e in (("seg", one), ("nifti", other)))
        assert np.array_equal(voxels(a), voxels(b)) and np.array_equal(a.affine, b.affine)
        for key, number in other["voxels_per_label"].items():
            assert one["voxels_per_label"][key] == number


def test_nothing_found_is_a_sound_seg_too(tmp_path):
    image, label = series_with_seg(tmp_path, np.zeros_like(ras_arrays(0)[1]))
    again = read_label(tmp_path / "ct_label.dcm", image)
    assert again.shape == label.shape and not voxels(again).any()


def test_a_series_in_and_a_seg_out_and_in_again_as_truth(checkpoint, tmp_path, capsys):
    scan, _ = ras_arrays(0)
    write_series(tmp_path / "scans" / "ct", scan)
    nifti = nib.Nifti1Image(scan, np.diag([5.0, 5, 5, 1]))
    nib.save(nifti, tmp_path / "scans" / "other.nii.gz")
    use = {"checkpoint": checkpoint, "device": "cpu", "dicom_seg": True}
    apply_model.main(apply_model.Config((tmp_path / "scans",), destination=tmp_path / "out", **use))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    reason = "no DICOM SEG: the scan is no DICOM series"
    assert {row["case"]: reason in row["warnings"] for row in rows} == {"ct": False, "other": True}
    made = tmp_path / "out" / "ct" / "ct_label.dcm"
    assert [path.name for path in (tmp_path / "out").rglob("*.dcm")] == ["ct_label.dcm"]
    image = read_volume(tmp_path / "scans" / "ct")
    found = voxels(read_label(made, image))
    assert found.any()
    assert np.array_equal(found, voxels(nib.load(made.with_suffix(".nii.gz"))))
    apply_model.main(
        apply_model.Config(
            (tmp_path / "scans" / "ct",), truth=(made,), destination=tmp_path / "again", **use
        )
    )
    (row,) = json.loads((tmp_path / "again" / "results.json").read_text())
    assert row["liver_dice"] == 1 and row["truth"] == str(made)
    assert "look first at" in capsys.readouterr().out
    assert (tmp_path / "again" / "worst.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="none of the scans is a DICOM series"):
        use["destination"] = tmp_path / "never"
        apply_model.main(apply_model.Config((tmp_path / "scans" / "other.nii.gz",), **use))
    assert not (tmp_path / "never").exists()


def test_segments_are_known_by_name_whatever_their_numbers(tmp_path):
    """Spleen 1 and liver 2 in one SEG must not make a liver of the spleen."""
    raw, truth = tmp_path / "raw", ras_arrays(0)[1]
    swapped = np.array([0, 2, 1], np.uint8)[truth]
    series_with_seg(raw, swapped, {"background": (0,), "Spleen": (1,), "LIVER": (2,)})
    image = read_volume(raw / "ct")
    labels = {"background": (0,), "liver": (1, 2)}  # a network that takes tumours as liver
    known = voxels(apply_model.read_truth(raw / "ct_label.dcm", image, labels))
    assert np.array_equal(apply_model.class_indices(known, labels) > 0, truth[::-1, ::-1] == 1)
    dataset = run(raw, training=1, validation=0, test=0, foreground=(1,))
    assert dataset["labels"]["liver"] == 1 and dataset["labels"]["Spleen"] == 3
    (case,) = dataset["cases"]
    assert case["voxels_per_label"]["1"] == np.count_nonzero(truth == 1)
    assert case["voxels_per_label"]["3"] == np.count_nonzero(truth == 2)


def test_a_corrected_label_map_is_found_beside_its_series(tmp_path):
    """Several patients, the series' folders of equal names, results of this project beside."""
    raw = tmp_path / "raw"
    for index in range(3):
        scan, label = ras_arrays(index)
        write_series(raw / f"p{index}" / "ct", scan, PatientID=f"P{index}")
        image = read_volume(raw / f"p{index}" / "ct")
        for name, array in (("label", label), ("masked", scan)):
            nib.save(like(image, array[::-1, ::-1]), raw / f"p{index}" / f"ct_{name}.nii.gz")
    dataset = run(raw, training=1, validation=0, test=0)
    assert {Path(case["label"]).relative_to(raw).as_posix() for case in dataset["cases"]} == {
        f"p{index}/ct_label.nii.gz" for index in range(3)
    }
    for case in dataset["cases"]:
        _, label = ras_arrays(int(Path(case["label"]).parent.name[1:]))
        assert case["covered_foreground_voxels"] == np.count_nonzero(label)


def test_two_segs_of_one_series_are_not_chosen_from(tmp_path):
    scan, label = ras_arrays(0)
    slices = write_series(tmp_path / "raw" / "ct", scan)
    for name in ("mine", "yours"):
        write_seg(tmp_path / "raw" / f"{name}.dcm", slices, label)
    with pytest.raises(InputError, match=r"mine\.dcm and .*yours\.dcm: DICOM SEGs of one series"):
        run(tmp_path / "raw")


def test_a_seg_that_cannot_be_is_told(tmp_path, monkeypatch):
    """Anonymised to nothing; unsound headers; torn in writing: a reason, and no file."""
    scan, label = ras_arrays(0)
    for changes, told in (
        ({"FrameOfReferenceUID": ""}, "the series has no FrameOfReferenceUID to refer to"),
        ({"StudyDate": "long ago"}, "the headers of the series are not sound"),
    ):
        folder = tmp_path / told.split()[-1]
        write_series(folder, scan, **changes)
        image = read_volume(folder)
        labels = like(image, label[::-1, ::-1].astype(np.uint8))
        (reason,) = apply_model.write_dicom_seg(labels, image, CLASSES, tmp_path / "seg.dcm")
        assert told in reason
    write_series(tmp_path / "ct", scan)
    image = read_volume(tmp_path / "ct")
    read = apply_model.read_label
    monkeypatch.setattr(
        apply_model, "read_label", lambda *given: like(image, voxels(read(*given)) * 0)
    )
    with pytest.raises(InputError, match="changed in writing"):
        apply_model.write_dicom_seg(labels, image, CLASSES, tmp_path / "seg.dcm")
    assert not list(tmp_path.glob("*.dcm")) and not list(tmp_path.glob(".*"))


def test_real_series_with_a_stray_picture(tmp_path):
    """44 axial slices and a coronal picture; the manual SEG of that patient goes round."""
    folder = SHARED_DATA / "dicom"
    if not folder.is_dir():
        pytest.skip("the real DICOM series are not here (shared/data beside the project)")
    image = read_volume(folder / "axial_plus_coronal_45")
    (manual,) = (folder / "liver_seg").iterdir()
    truth = read_label(manual, image)
    assert voxels(truth).any()
    liver = like(image, (voxels(truth) > 0).astype(np.uint8))
    classes = {"background": (0,), "liver": (1, 2)}
    assert apply_model.write_dicom_seg(liver, image, classes, tmp_path / "seg.dcm") == []
    assert np.array_equal(voxels(read_label(tmp_path / "seg.dcm", image)), voxels(liver))
    bare = read_volume(folder / "jpeg2000_20")  # its UIDs were emptied
    empty = like(bare, np.zeros(bare.shape, np.uint8))
    (reason,) = apply_model.write_dicom_seg(empty, bare, classes, tmp_path / "bare.dcm")
    assert "no StudyInstanceUID" in reason and not (tmp_path / "bare.dcm").exists()


def test_a_folder_with_a_seg_is_that_seg(tmp_path):
    image, label = series_with_seg(tmp_path)
    (tmp_path / "outline").mkdir()
    (tmp_path / "ct_label.dcm").rename(tmp_path / "outline" / "a.dcm")
    assert np.array_equal(voxels(read_label(tmp_path / "outline", image)), voxels(label))


def test_the_3d_view_compares_with_a_dicom_seg(tmp_path):
    import visualize_3d

    _, label = series_with_seg(tmp_path)
    nib.save(label, tmp_path / "a_label.nii.gz")
    case = visualize_3d.Case(
        "a", label=tmp_path / "a_label.nii.gz", truth=tmp_path / "ct_label.dcm"
    )
    assert np.array_equal(case.reference.dataobj, case.labels.dataobj)
    assert np.asarray(case.reference.dataobj).max() == 2
