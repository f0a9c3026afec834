"""DICOM SEG in and out: the same voxels, names and slices; of another scan, or torn: refused."""

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import SHARED_DATA, random_affine
from helpers import (
    SECRETS,
    build_phantom_seg,
    part_arrays,
    save,
    write_phantom_seg,
    write_phantom_series,
)
from pydicom.sr.codedict import codes

import data.seg
from benchmarks.sweeps import sweep_seg
from data.dicom import read_series, write_series
from data.files import InputError
from data.labels import USUAL_LABELS
from data.seg import read_seg, write_seg
from data.volumes import Volume, read_file

DEPTH = 10
CLASSES = {"background": (0,), "liver": (1,), "tumour": (2,)}


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
    """Anonymised to nothing; unsound headers; changed in writing: a reason, and no file."""
    for changes, told in (
        ({"FrameOfReferenceUID": ""}, "the series has no FrameOfReferenceUID to refer to"),
        ({"StudyDate": "long ago"}, "the headers of the series are not sound"),
    ):
        image, label, _ = make_series(tmp_path / told.split()[-1], **changes)
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
    """Label → SEG → label on an oblique grid; nothing of a patient in it."""
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
    seg = build_phantom_seg(slices, label, order, masks=[masks[name[0]] for name in order])
    seg.save_as(tmp_path / "seg.dcm")
    found = read_seg(tmp_path / "seg.dcm", image, USUAL_LABELS)
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
    """Another spacing, 3 mm aside, half the columns, six slices; another frame of reference."""
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


def test_a_cut_seg_and_a_cut_slice_are_named(tmp_path):
    image, label, slices = make_series(tmp_path / "ct")
    seg = write_phantom_seg(tmp_path / "seg.dcm", slices, label)
    for path, read in (
        (seg, lambda: read_seg(seg, image, USUAL_LABELS)),
        (sorted((tmp_path / "ct").iterdir())[5], lambda: read_series(tmp_path / "ct")),
    ):
        content = path.read_bytes()
        for cut in (0.9, 0.3, 0.1):
            path.write_bytes(content[: int(cut * len(content))])
            with pytest.raises(InputError, match=re.escape(str(path))):
                read()


def test_a_seg_without_reference_and_labels_is_read(tmp_path):
    image, label, slices = make_series(tmp_path / "ct")
    seg = build_phantom_seg(slices, label)
    del seg.ReferencedSeriesSequence, seg.DimensionIndexSequence
    for segment in seg.SegmentSequence:
        del segment.SegmentLabel
    seg.save_as(tmp_path / "seg.dcm")
    found = read_seg(tmp_path / "seg.dcm", image, {"background": (0,)})
    assert np.array_equal(found.ras.data, label)
    assert found.classes == {"Segment 1": 1, "Segment 2": 2}


@pytest.mark.filterwarnings("ignore")
def test_a_tag_of_nonsense_gives_the_right_label_map_or_one_input_error(tmp_path):
    counts = sweep_seg(tmp_path, number=40)
    assert counts["right"] > 5 and counts["refused"] > 5, counts


def test_the_seg_of_a_real_series_goes_round(tmp_path):
    """44 axial slices and a coronal picture; a series whose UIDs were emptied has no SEG."""
    folder = SHARED_DATA / "dicom"
    if not folder.is_dir():
        pytest.skip("the real DICOM series are not here (shared/data beside the project)")
    image = read_series(folder / "axial_plus_coronal_45")
    truth = read_seg(folder / "liver_seg", image, USUAL_LABELS)
    assert np.count_nonzero(truth.read()) == 286_430
    classes = {"background": (0,), "liver": (1, 2)}
    assert write_seg(truth, image, classes, tmp_path / "seg.dcm") == []
    again = read_seg(tmp_path / "seg.dcm", image, classes)
    assert np.array_equal(again.read(), truth.read() > 0)
    bare = read_series(folder / "jpeg2000_20")
    (reason,) = write_seg(bare.like(bare.read() * 0), bare, classes, tmp_path / "bare.dcm")
    assert "no StudyInstanceUID" in reason and not (tmp_path / "bare.dcm").exists()
