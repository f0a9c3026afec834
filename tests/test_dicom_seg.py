"""DICOM SEG in and out, and through the scripts; of another scan, or torn, it is refused."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import SHARED_DATA, random_affine
from helpers import SECRETS, part_arrays, run, save, write_phantom_seg, write_phantom_series
from pydicom.sr.codedict import codes

import apply_model
import data.seg
from data.datasets import find_pairs
from data.dicom import read_series, write_series
from data.files import InputError
from data.labels import USUAL_LABELS
from data.scans import read_label_map
from data.seg import read_seg, write_seg
from data.volumes import Volume, read_file

DEPTH = 20
CLASSES = {"background": (0,), "liver": (1,), "tumour": (2,)}
REAL = SHARED_DATA / "dicom"


def make_series(folder: Path, **changes) -> tuple[Volume, np.ndarray, list[pydicom.Dataset]]:
    """A phantom's series as it is read, its label map (RAS) and its slices."""
    scan, label = part_arrays(0, DEPTH)
    slices = write_phantom_series(folder, scan, SeriesNumber=3, **changes)
    return read_series(folder), label.astype(np.uint8), slices


def make_seg(folder: Path, label=None, classes=CLASSES) -> tuple[Volume, Volume]:
    """A phantom's series and the DICOM SEG of its label map, as `write_seg` writes it."""
    image, truth, _ = make_series(folder / "ct")
    label = image.from_ras(truth if label is None else label.astype(np.uint8))
    assert write_seg(label, image, classes, folder / "ct_label.dcm") == []
    return image, label


def test_a_dicom_seg_says_what_it_is_and_where(tmp_path):
    make_seg(tmp_path)
    assert not list(tmp_path.glob(".*"))
    seg = pydicom.dcmread(tmp_path / "ct_label.dcm")
    first = pydicom.dcmread(next((tmp_path / "ct").iterdir()))
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID
    for key in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert seg[key].value == first[key].value
    found = [(s.SegmentNumber, s.SegmentLabel) for s in seg.SegmentSequence]
    assert found == [(1, "liver"), (2, "tumour")]
    codes = [s.SegmentedPropertyTypeCodeSequence[0].CodeValue for s in seg.SegmentSequence]
    assert codes == ["10200004", "108369006"]
    assert all(frame.any() for frame in seg.pixel_array)  # empty frames are left out


def test_a_seg_that_cannot_be_is_reported(tmp_path, monkeypatch):
    for changes, told in (
        ({"FrameOfReferenceUID": ""}, "the series has no FrameOfReferenceUID to refer to"),
        ({"StudyInstanceUID": ""}, "the series has no StudyInstanceUID to refer to"),
        ({"StudyDate": "long ago"}, "the headers of the series are not sound"),
    ):
        image, label, _ = make_series(tmp_path / next(iter(changes)), **changes)
        (reason,) = write_seg(image.from_ras(label), image, CLASSES, tmp_path / "seg.dcm")
        assert told in reason
    image, label, _ = make_series(tmp_path / "ct")
    labels = image.from_ras(label)
    (reason,) = write_seg(labels, image.like(image.read()), CLASSES, tmp_path / "seg.dcm")
    assert reason == "no DICOM SEG: the scan is no DICOM series"
    monkeypatch.setattr(data.seg, "read_seg", lambda *given: image.like(labels.read() * 0))
    with pytest.raises(InputError, match="changed in writing"):
        write_seg(labels, image, CLASSES, tmp_path / "seg.dcm")
    assert not list(tmp_path.glob("*.dcm")) and not list(tmp_path.glob(".*"))


def test_a_nifti_scan_has_its_seg_by_the_series_of_it(tmp_path):
    scan, label = part_arrays(0, DEPTH)
    for name, array in (("scan", scan), ("label", label)):
        save(array, random_affine(2), tmp_path / f"Doe^Jane_{name}.nii.gz")
    volume, truth = (read_file(tmp_path / f"Doe^Jane_{name}.nii.gz") for name in ("scan", "label"))
    write_series(volume, tmp_path / "ct")
    series = read_series(tmp_path / "ct")
    assert write_seg(series.from_ras(truth.ras.data), series, CLASSES, tmp_path / "s.dcm") == []
    again = read_seg(tmp_path / "s.dcm", series, CLASSES)
    assert np.array_equal(again.ras.data, truth.ras.data)
    of_nifti = read_seg(tmp_path / "s.dcm", volume, CLASSES)  # NIfTI's own axes
    assert np.array_equal(of_nifti.read(), truth.read()) and of_nifti.header is volume.header
    assert not any(s.encode() in (tmp_path / "s.dcm").read_bytes() for s in SECRETS.values())


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_every_kind_of_seg_is_read_without_its_empty_frames_and_with_them(kind, tmp_path):
    image, label, slices = make_series(tmp_path / "ct")
    label[:, :, :4] = 0
    how = {}
    if kind == "FRACTIONAL":  # a half and more count
        how["fractional_type"] = "PROBABILITY"
        how["masks"] = [np.where(label == n, 0.7, 0.3 * (label > 0)) for n in (1, 2)]
    for partial in (True, False):
        how["omit_empty_frames"] = partial
        write_phantom_seg(tmp_path / "seg.dcm", slices, label, kind=kind, **how)
        found = read_seg(tmp_path / "seg.dcm", image, USUAL_LABELS)
        assert np.array_equal(found.ras.data, label) and found.notes == ()
        assert found.classes == {"Liver": 1, "Tumour": 2} and found.dtype == np.uint8


@pytest.mark.parametrize("order", [("Liver", "Tumour"), ("Tumor", "Liver")])
def test_where_segments_overlap_the_tumour_wins_and_it_is_told(order, tmp_path):
    image, label, slices = make_series(tmp_path / "ct")
    masks = {"L": label > 0, "T": label == 2}
    given = {"names": order, "masks": [masks[name[0]] for name in order]}
    seg = write_phantom_seg(tmp_path / "seg.dcm", slices, label, **given)
    found = read_seg(seg, image, USUAL_LABELS)
    assert np.array_equal(found.ras.data, label)
    assert found.notes[0].startswith(f"{np.count_nonzero(label == 2)} voxels are in several")


NAMED = {
    "swapped": (("Tumor", "Liver"), (), {1: 2, 2: 1}, {"Tumor": 2, "Liver": 1}),
    "synonyms": (("Leber", "Hepatic lesion"), (), {}, {"Leber": 1, "Hepatic lesion": 2}),
    "codes, swapped": (
        ("A", "B"), (codes.SCT.Mass, codes.SCT.Liver), {1: 2, 2: 1}, {"tumour": 2, "liver": 1},
    ),
    "others keep out of the way": (
        ("Spleen", "liver"), (codes.SCT.Liver, codes.SCT.Liver), {1: 3, 2: 1},
        {"Spleen": 3, "liver": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_names_and_codes_decide_not_numbers(kind, tmp_path):
    names, what, values, classes = NAMED[kind]
    image, label, slices = make_series(tmp_path / "ct")
    write_phantom_seg(tmp_path / "seg.dcm", slices, label, names=names, codes=what)
    found = read_seg(tmp_path / "seg.dcm", image, USUAL_LABELS)
    table = np.array([0, values.get(1, 1), values.get(2, 2)])
    assert np.array_equal(found.ras.data, table[label]) and found.classes == classes


def test_a_folder_with_a_seg_is_that_seg_empty_or_not(tmp_path):
    image, _ = make_seg(tmp_path / "none", np.zeros_like(part_arrays(0, DEPTH)[1]))
    assert not read_seg(tmp_path / "none/ct_label.dcm", image, CLASSES).read().any()
    image, label = make_seg(tmp_path)
    (tmp_path / "outline").mkdir()
    (tmp_path / "ct_label.dcm").rename(tmp_path / "outline" / "a.dcm")
    assert np.array_equal(read_seg(tmp_path / "outline", image, CLASSES).read(), label.read())
    with pytest.raises(InputError, match="must hold one DICOM SEG, got none"):
        read_seg(tmp_path / "ct", image, CLASSES)


def test_a_seg_of_another_scan_is_refused(tmp_path):
    image, label, slices = make_series(tmp_path / "ct")
    seg = write_phantom_seg(tmp_path / "seg.dcm", slices, label)
    ras, aside = image.ras, np.eye(4)
    aside[0, 3] = 3
    for other in (
        Volume(ras.data, ras.affine * [[0.8], [0.8], [0.8], [1]]),
        Volume(ras.data, aside @ ras.affine),
        ras.crop((slice(0, 24), slice(None), slice(None))),
        ras.crop((slice(None), slice(None), slice(0, 6))),
    ):
        with pytest.raises(InputError, match="not on the grid of") as error:
            read_seg(seg, other, CLASSES)
        assert error.value.kind == "grid" and str(seg) in str(error.value)
    again, *_ = make_series(tmp_path / "other")
    with pytest.raises(InputError, match=r"another frame of reference.*--trust-image-grid"):
        read_seg(seg, again, CLASSES)
    trusted = read_seg(seg, again, CLASSES, trust_grid=True)  # its UIDs were anonymised
    assert np.array_equal(trusted.ras.data, label)
    assert "another frame of reference" in trusted.notes[0]
    with pytest.raises(InputError, match="must be a DICOM SEG, got image"):
        read_seg(image.files[0], image, CLASSES)
    whole = seg.read_bytes()
    for part in (0.9, 0.3, 0.1):  # cut off
        seg.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(InputError, match=r"seg\.dcm"):
            read_seg(seg, image, USUAL_LABELS)


def test_a_seg_without_reference_and_labels_is_read(tmp_path):
    image, label, slices = make_series(tmp_path / "ct")
    seg = pydicom.dcmread(write_phantom_seg(tmp_path / "seg.dcm", slices, label))
    del seg.ReferencedSeriesSequence, seg.DimensionIndexSequence
    for segment in seg.SegmentSequence:
        del segment.SegmentLabel
    seg.save_as(tmp_path / "seg.dcm")
    found = read_seg(tmp_path / "seg.dcm", image, {"background": (0,)})
    assert np.array_equal(found.ras.data, label)
    assert found.classes == {"Segment 1": 1, "Segment 2": 2}


def test_series_with_seg_and_nifti_labels_are_prepared_and_nothing_private_is_written(tmp_path):
    raw = tmp_path / "raw"
    for index in range(3):
        scan, label = part_arrays(index, DEPTH)
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
        scan, label = part_arrays(index, DEPTH)
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
    scan, label = part_arrays(0, DEPTH)
    for form in ("{}", "{}/scan", "{}/CT", "{}/portal"):
        raw = tmp_path / f"raw{len(form)}"
        for patient in ("pat0", "pat1"):
            slices = write_phantom_series(raw / form.format(patient), scan)
            write_phantom_seg(raw / patient / "seg.dcm", slices, label)
        prepared = [case.name for case in find_pairs(raw).cases]
        assert [case.name for case in apply_model.list_cases([raw], [])] == prepared
        assert len(set(prepared)) == 2


def test_a_series_in_and_a_seg_out_and_in_again_as_truth(checkpoint, tmp_path):
    scan, _ = part_arrays(0, DEPTH)
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
    assert not (tmp_path / "again" / "worst.png").exists()  # it would be the preview once more
    with pytest.raises(InputError, match="is no DICOM series; --dicom-seg"):
        use["destination"] = tmp_path / "never"
        apply_model.main(apply_model.Config(paths=(tmp_path / "scans" / "other.nii.gz",), **use))
    assert not (tmp_path / "never").exists()


def test_segments_are_known_by_name_whatever_their_numbers(tmp_path):
    raw, truth = tmp_path / "raw", part_arrays(0, DEPTH)[1]
    swapped = np.array([0, 2, 1], np.uint8)[truth]
    image, _ = make_seg(raw, swapped, {"background": (0,), "Spleen": (1,), "LIVER": (2,)})
    labels = {"background": (0,), "liver": (1, 2)}  # a network that takes tumours as liver
    known = read_label_map(raw / "ct_label.dcm", image, labels, classes=labels)
    assert np.array_equal(known.ras.data, truth == 1)
    dataset = run(raw, training=1, validation=0, test=0, foreground=("liver",))
    assert dataset["labels"]["liver"] == 1 and dataset["labels"]["Spleen"] == 3
    (case,) = dataset["cases"]
    assert case["voxels_per_label"]["1"] == np.count_nonzero(truth == 1)
    assert case["voxels_per_label"]["3"] == np.count_nonzero(truth == 2)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real DICOM series are not here")
def test_the_real_series_equals_its_nifti(tmp_path, real_ct):
    dataset = run(REAL, destination=tmp_path / "out", training=1, validation=0, test=0)
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
    assert "0697" not in text.replace(str(REAL), "")
