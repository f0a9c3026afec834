"""DICOM series: geometry counts, faults are refused with the reason, nothing is left out unsaid."""

import copy
import re
import shutil
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import SHARED_DATA, random_affine
from helpers import (
    SECRETS,
    build_phantom_series,
    call_script,
    ras_arrays,
    save,
    write_phantom_seg,
    write_phantom_series,
)
from pydicom.uid import generate_uid
from sweeps import sweep_series

from data.dicom import (
    find_dicom,
    is_dicom,
    is_dicom_input,
    list_series_files,
    read_series,
    write_series,
)
from data.files import InputError
from data.labels import USUAL_LABELS
from data.seg import read_seg
from data.volumes import Volume, read_file

DEPTH = 8


def small(depth: int = DEPTH) -> np.ndarray:
    return ras_arrays(0)[0][:, :, :depth]


def test_a_series_is_ordered_by_position_and_rescaled_to_hu(tmp_path):
    scan = small(20)
    write_phantom_series(tmp_path / "ct", scan)
    image = read_series(tmp_path / "ct")
    assert np.array_equal(image.read(), scan[::-1, ::-1])
    assert image.read().dtype == np.int16
    assert np.allclose(
        image.affine, np.diag([-5, -5, 5, 1]) + [[0, 0, 0, v] for v in (100, 90, 30, 0)]
    )
    one = read_series(next((tmp_path / "ct").iterdir()))  # one file stands for its series
    assert np.array_equal(one.read(), image.read())


FAULTS = {
    "uneven gaps": (
        "uneven gaps of 5.00 to 10.00 mm",
        {"ImagePositionPatient": lambda z: [0, 0, 5 * z + 5 * (z > 3)]},
    ),
    "gantry tilt": ("gantry tilt of 16.7°", {"tilt": 1.5}),
    "one slice aside": (
        r"lies .* mm beside the stack \(ImagePositionPatient\)",
        {"ImagePositionPatient": lambda z: [9 * (z == 4), 0, 5 * z]},
    ),
    "several acquisitions": (
        "share a position: several acquisitions",
        {"ImagePositionPatient": lambda z: [0, 0, 5 * (z // 2)]},
    ),
    "two stacks": (
        "must be one stack of parallel slices",
        {"ImageOrientationPatient": lambda z: [1, 0, 0, 0, 1, 0] if z % 2 else [1, 0, 0, 0, 0, -1]},
    ),
    "two series": (
        "must hold one DICOM series",
        {"SeriesInstanceUID": lambda z: "1.2.3" if z % 2 else "1.2.4"},
    ),
    "pixels cut off": ("cannot be decoded", {"PixelData": b"\0" * 100}),
    "no shift of one slice": (
        "RescaleSlope and RescaleIntercept must be numbers as in the other",
        {"RescaleIntercept": lambda z: None if z == 3 else -1024},
    ),
    "crooked axes": ("perpendicular vectors", {"ImageOrientationPatient": [1, 0, 0, 0.1, 1, 0]}),
    "no distance": ("PixelSpacing must be positive", {"PixelSpacing": [0, 5]}),
    "slope of nothing": ("RescaleSlope must not be 0", {"RescaleSlope": 0}),
    "colours": ("PhotometricInterpretation must be", {"PhotometricInterpretation": "RGB"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_series_that_is_no_regular_grid_is_refused_with_the_reason(fault, tmp_path):
    message, changes = FAULTS[fault]
    write_phantom_series(tmp_path / "ct", small(), **changes)
    with pytest.raises(InputError, match=message) as error:
        read_series(tmp_path / "ct").read()
    assert str(tmp_path / "ct") in str(error.value)


def test_a_stray_image_and_a_copy_are_left_out_and_told(tmp_path):
    scan = small()
    slices = write_phantom_series(tmp_path / "ct", scan)
    slices[3].save_as(tmp_path / "ct" / "copy", enforce_file_format=True)
    stray = slices[5]
    stray.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    stray.SOPInstanceUID = stray.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    stray.save_as(tmp_path / "ct" / "stray", enforce_file_format=True)
    image = read_series(tmp_path / "ct")
    assert np.array_equal(image.read(), scan[::-1, ::-1])
    assert [note.split()[0] for note in image.notes] == ["1", "1"]


# ---------------------------------------------------------------------------------------
# Sound series that look odd
# ---------------------------------------------------------------------------------------


def rounded(number: float, step: float) -> float:
    return round(number / step) * step


ODD = {
    "equal storage UIDs": {"SOPInstanceUID": "1.2.3"},
    "cosines beside a rounding": {
        "ImageOrientationPatient": lambda z: [1, 0.00049 + 2e-5 * (z % 2), 0, 0, 1, 0]
    },
    "spacing in six and seven digits": {
        "PixelSpacing": lambda z: [0.742188, 0.742188] if z % 2 else [0.7421875, 0.7421875]
    },
    "positions rounded to 0.1 mm": {
        "ImagePositionPatient": lambda z: [0, 0, rounded(30 + 1.25 * z, 0.1)]
    },
    "positions rounded to 0.1 mm, thin": {
        "ImagePositionPatient": lambda z: [rounded(0.33, 0.1), 0, rounded(30 + 0.625 * z, 0.1)]
    },
    "empty rescale": {"RescaleSlope": None, "RescaleIntercept": None, "signed": True},
    "no SOP class, no modality": {"SOPClassUID": None, "Modality": None},
    "no series UID": {"SeriesInstanceUID": None},
    "inverted on screens": {"PhotometricInterpretation": "MONOCHROME1"},
    "MR": {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"},
    "padding that is rare": {"PixelPaddingValue": 65000},
    "cosines of three digits": {"ImageOrientationPatient": [1, 0, 0, 0, 0.906, -0.423]}
    | {"ImagePositionPatient": lambda z: [0, 2.115 * z, 4.53 * z]},
}


@pytest.mark.parametrize("kind", ODD)
def test_sound_series_that_look_odd_are_read_whole(kind, tmp_path):
    changes = dict(ODD[kind])
    intercept = 0 if changes.get("signed") else -1024
    slices = write_phantom_series(tmp_path / "ct", small(), intercept=intercept, **changes)
    if kind == "equal storage UIDs":
        shutil.rmtree(tmp_path / "ct")
        (tmp_path / "ct").mkdir()
        for z, header in enumerate(slices):
            header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
            header.save_as(tmp_path / "ct" / f"{z}", enforce_file_format=True)
    image = read_series(tmp_path / "ct")
    assert np.array_equal(image.read(), small()[::-1, ::-1])
    assert not any("left out" in note for note in image.notes)


@pytest.mark.parametrize("where", [0, 3, DEPTH - 1], ids=["first", "inside", "last"])
@pytest.mark.parametrize(
    "tag, value",
    [("PixelSpacing", [4, 4]), ("ImageOrientationPatient", [0.99, 0.141, 0, -0.141, 0.99, 0])],
)
def test_a_slice_of_the_stack_is_never_left_out_as_a_stray(where, tag, value, tmp_path):
    slices = build_phantom_series(small())
    setattr(slices[where], tag, value)
    for z, header in enumerate(slices):
        header.save_as(tmp_path / f"{z}", enforce_file_format=True)
    with pytest.raises(InputError, match=tag) as error:
        read_series(tmp_path)
    assert str(tmp_path / f"{where}") in str(error.value)


@pytest.mark.parametrize("signed", [False, True])
def test_padding_brighter_than_tissue_becomes_air_and_is_told(signed, tmp_path):
    """−2000 declared in the other sign: 62,512 HU to who takes it as it stands."""
    scan = small().copy()
    slices = build_phantom_series(scan)
    corner = np.zeros(scan.shape[:2], bool)
    corner[:6, :6] = True
    for z, header in enumerate(slices):
        stored = np.frombuffer(header.PixelData, np.uint16).reshape(48, 48).copy()
        stored[corner.T] = 63536
        header.PixelData = stored.tobytes()
        if signed:
            header.add_new("PixelPaddingValue", "SS", -2000)
        else:
            header.PixelPaddingValue, header.PixelPaddingRangeLimit = 63530, 63540
        header.save_as(tmp_path / f"{z}", enforce_file_format=True)
    image = read_series(tmp_path)
    scan[::-1, ::-1][corner] = -1024
    assert np.array_equal(image.read(), scan[::-1, ::-1])
    assert re.search(
        rf"{36 * DEPTH} voxels of padding \(PixelPaddingValue, 62\d+ HU\)", image.notes[0]
    )


def encode(slices: list[pydicom.Dataset], kind: str) -> None:
    """Stored in another way: the same HU."""
    for z, header in enumerate(slices):
        stored = np.frombuffer(header.PixelData, np.uint16).reshape(48, 48)
        if kind == "big endian":
            header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
            header.PixelData = stored.astype(">u2").tobytes()
        elif kind == "12 bits signed":
            header.BitsStored, header.HighBit, header.PixelRepresentation = 12, 11, 1
            header.RescaleIntercept = 0
            header.PixelData = ((stored.astype(np.int16) - 1024) & 0x0FFF).astype("<u2").tobytes()
        elif kind == "overlay bits":
            header.BitsStored, header.HighBit = 12, 11
            header.PixelData = (stored | 0xF000).astype("<u2").tobytes()
        elif kind == "a slope for each slice":
            header.RescaleSlope, factor = (0.5, 2) if z % 2 else (1, 1)
            header.PixelData = (stored * factor).astype("<u2").tobytes()
        elif kind == "RLELossless":
            header.compress(pydicom.uid.RLELossless)
        else:
            slices[z] = encode_by_gdcm(header, kind)


def encode_by_gdcm(header: pydicom.Dataset, kind: str) -> pydicom.Dataset:
    import gdcm

    with tempfile.NamedTemporaryFile() as plain, tempfile.NamedTemporaryFile() as encoded:
        header.save_as(plain.name, enforce_file_format=True)
        reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
        change = gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(plain.name)
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(encoded.name)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return pydicom.dcmread(encoded.name)


@pytest.mark.parametrize(
    "kind",
    ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless", "big endian", "12 bits signed",
     "overlay bits", "a slope for each slice"],
)  # fmt: skip
def test_however_pixels_are_stored_hu_are_the_same(kind, tmp_path):
    scan = np.clip(small(8), -1024, 1000)
    slices = build_phantom_series(scan)
    encode(slices, kind)
    for z, header in enumerate(slices):
        header.save_as(
            tmp_path / f"{z}", enforce_file_format=True,
            **({"little_endian": False, "implicit_vr": False} if kind == "big endian" else {}),
        )  # fmt: skip
    assert np.array_equal(read_series(tmp_path).read(), scan[::-1, ::-1])


def build_enhanced(scan: np.ndarray, shared: bool) -> pydicom.Dataset:
    """The slices in one enhanced multi-frame file, frames in random order."""
    slices = build_phantom_series(scan)
    file = copy.deepcopy(slices[0])
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del file[tag]
    del file.RescaleSlope, file.RescaleIntercept
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = pydicom.uid.EnhancedCTImageStorage
    order = np.random.default_rng(1).permutation(len(slices))
    file.NumberOfFrames, file.PixelData = len(order), b"".join(slices[z].PixelData for z in order)

    def group(**tags: object) -> list[pydicom.Dataset]:
        item = pydicom.Dataset()
        item.update(tags)
        for key, value in tags.items():
            setattr(item, key, value)
        return [item]

    common = {
        "PlaneOrientationSequence": group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        "PixelMeasuresSequence": group(PixelSpacing=[5, 5]),
        "PixelValueTransformationSequence": group(RescaleSlope=1, RescaleIntercept=-1024),
    }
    frames = []
    for z in order:
        frame = pydicom.Dataset()
        position = group(ImagePositionPatient=slices[z].ImagePositionPatient)
        for key, value in {
            "PlanePositionSequence": position,
            **(common if not shared else {}),
        }.items():
            setattr(frame, key, value)
        frames.append(frame)
    file.PerFrameFunctionalGroupsSequence = frames
    file.SharedFunctionalGroupsSequence = [pydicom.Dataset()]
    for key, value in (common if shared else {}).items():
        setattr(file.SharedFunctionalGroupsSequence[0], key, value)
    return file


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per frame"])
def test_an_enhanced_multi_frame_file_is_a_series(shared, tmp_path):
    file = build_enhanced(small(), shared)
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    image = read_series(tmp_path)
    assert np.array_equal(image.read(), small()[::-1, ::-1]) and image.spacing_mm == (5, 5, 5)
    assert [item.images for item in find_dicom(tmp_path.iterdir())] == [1]
    del file.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    file.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match=r"one\.dcm: ImagePositionPatient must be 3 numbers"):
        read_series(tmp_path)


# ---------------------------------------------------------------------------------------
# What is asked for is what is read
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0.1, 0.2, 0.3, 0.5, 0.9, 0.99])
def test_a_cut_file_is_named(cut, tmp_path):
    write_phantom_series(tmp_path / "ct", small())
    file = sorted((tmp_path / "ct").iterdir())[5]
    content = file.read_bytes()
    file.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(InputError, match=re.escape(str(file))):
        read_series(tmp_path / "ct")


def write_sc(path: Path, like: pydicom.Dataset, **changes) -> Path:
    """Another object of the same series: made of a slice, without a place."""
    other = copy.deepcopy(like)
    del other.ImagePositionPatient, other.ImageOrientationPatient
    other.SOPInstanceUID = generate_uid()
    for key, value in changes.items():
        setattr(other, key, value)
    other.file_meta.MediaStorageSOPClassUID = other.SOPClassUID
    other.save_as(path, enforce_file_format=True)
    return path


def test_other_objects_are_no_scans_and_say_what_they_are(tmp_path):
    scan, label = small(), ras_arrays(0)[1][:, :, :DEPTH]
    slices = write_phantom_series(tmp_path / "ct", scan)
    seg = write_phantom_seg(tmp_path / "ct" / "seg.dcm", slices, label)
    storage = "1.2.840.10008.5.1.4.1.1."
    contours = write_sc(
        tmp_path / "ct/rt", slices[0], Modality="RTSTRUCT", SOPClassUID=storage + "481.3"
    )
    dose = write_sc(
        tmp_path / "ct/dose", slices[0], Modality="RTDOSE", SOPClassUID=storage + "481.2"
    )
    for path, name in ((seg, "SEG"), (contours, "RTSTRUCT"), (dose, "RTDOSE")):
        with pytest.raises(InputError, match=rf"must be an image of a scan, got a DICOM {name}"):
            read_series(path)
        assert list_series_files(path) == [path]
    (tmp_path / "ct" / "notes.txt").write_text("not DICOM")
    with pytest.raises(InputError, match="must be a DICOM file"):
        read_series(tmp_path / "ct" / "notes.txt")
    image = read_series(tmp_path / "ct")
    assert image.shape[2] == DEPTH and image.notes == ()
    private = pydicom.dcmread(tmp_path / "ct" / "000")
    private.file_meta.MediaStorageSOPClassUID = private.SOPClassUID = "1.3.12.2.1107.5.9.77"
    del private.Rows, private.Columns, private.PixelData
    private.save_as(tmp_path / "ct" / "private", enforce_file_format=True)
    write_sc(tmp_path / "ct/screen", slices[0], SOPClassUID=storage + "7", Modality="CT")
    image = read_series(tmp_path / "ct")
    assert image.shape[2] == DEPTH and image.notes == ("1 images without a position left out",)
    files = list_series_files(tmp_path / "ct")
    assert {file.name for file in files} == {*(f"{z:03d}" for z in range(DEPTH)), "screen"}
    (tmp_path / "alone").mkdir()
    seg.rename(tmp_path / "alone" / "seg.dcm")
    with pytest.raises(InputError, match=r"got 0 \(SEG \(Segmentation Storage\)\)"):
        read_series(tmp_path / "alone")


def write_dicomdir(path: Path) -> None:
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.FileSetID, header.DirectoryRecordSequence = "X", []
    header.save_as(path, enforce_file_format=True)


def test_everything_is_found_however_it_lies(tmp_path):
    """Nested folders, two series in one, SEGs whole and cut, DICOMDIR, a broken file, no DICOM."""
    scan, label = small(8), ras_arrays(0)[1][:, :, :8]
    write_phantom_series(tmp_path / "a" / "b" / "c" / "d", scan, PatientID="A")
    slices = write_phantom_series(tmp_path / "two", scan, name="x{:02d}", PatientID="B")
    write_phantom_series(tmp_path / "two", scan, name="y{:02d}", PatientID="C")
    write_dicomdir(tmp_path / "DICOMDIR")
    seg = write_phantom_seg(tmp_path / "seg" / "whole.dcm", slices, label)
    content = seg.read_bytes()
    (tmp_path / "seg" / "cut.dcm").write_bytes(content[: content.index(b"\x62\x00\x02\x00SQ")])
    bare = pydicom.dcmread(seg)
    del bare.ReferencedSeriesSequence, bare.SegmentSequence[0].SegmentLabel
    bare.save_as(tmp_path / "seg" / "bare.dcm")
    whole = (tmp_path / "two" / "x00").read_bytes()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "file").write_bytes(whole[:400])
    (tmp_path / "torn" / "no.dcm").write_bytes(whole[128:])  # no preamble: not DICOM
    items = {
        item.path.relative_to(tmp_path).as_posix(): item for item in find_dicom(tmp_path.rglob("*"))
    }
    assert set(items) == {
        "a/b/c/d", "two/x00", "two/y00", "seg/whole.dcm", "seg/cut.dcm", "seg/bare.dcm",
        "torn/file",
    }  # fmt: skip
    assert [items[key].patient for key in ("a/b/c/d", "two/x00", "two/y00")] == ["A", "B", "C"]
    assert {file.name[0] for file in items["two/x00"].files} == {"x"}
    assert items["two/x00"].images == len(items["two/x00"].files) == 8
    assert items["seg/whole.dcm"].uid == items["two/x00"].uid and items["seg/whole.dcm"].is_seg
    assert items["seg/bare.dcm"].uid == "" and list(items["seg/bare.dcm"].segments.values()) == [
        1,
        2,
    ]
    assert "SegmentSequence must describe" in items["seg/cut.dcm"].fault
    assert "torn/file: its DICOM header" in items["torn/file"].fault
    assert [item.fault for item in items.values()].count("") == 5
    assert read_series(items["two/y00"].path).shape == (48, 48, 8)
    assert {file.name[0] for file in list_series_files(items["two/y00"].path)} == {"y"}


def test_an_input_is_a_dicom_file_or_a_folder_of_them(tmp_path):
    write_phantom_series(tmp_path / "a" / "ct", small(4))
    write_dicomdir(tmp_path / "a" / "DICOMDIR")
    save(small(4), np.eye(4), tmp_path / "results" / "ct_label.nii.gz")
    folders = [path for path in sorted(tmp_path.rglob("*")) if path.is_dir()]
    assert [path.name for path in folders if is_dicom_input(path)] == ["ct"]
    assert is_dicom_input(tmp_path / "a" / "ct" / "000")
    for other in (tmp_path / "a" / "DICOMDIR", tmp_path / "results" / "ct_label.nii.gz"):
        assert not is_dicom(other) and not is_dicom_input(other)


def test_a_header_is_read_once(tmp_path, monkeypatch):
    for index in range(3):
        write_phantom_series(tmp_path / f"{index}", small(4))
    opened, read = [], pydicom.dcmread
    monkeypatch.setattr(pydicom, "dcmread", lambda f, **how: opened.append(f) or read(f, **how))
    assert len(find_dicom(tmp_path.rglob("*"))) == 3
    assert len(opened) == len(set(opened)) == 12


@pytest.mark.filterwarnings("ignore")
def test_a_tag_of_nonsense_gives_the_right_result_or_one_input_error(tmp_path):
    counts = sweep_series(tmp_path, number=60)
    assert counts["right"] > 5 and counts["refused"] > 5, counts


# ---------------------------------------------------------------------------------------
# Scan → series
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["straight", "flipped", "oblique", "oblique and shuffled"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_scan_becomes_a_series_and_comes_back(kind, dtype, tmp_path):
    """Bit-identical voxels, affine within 1e-3 mm; the same scan gives the same series."""
    affine = {
        "straight": np.array([[0.8, 0, 0, -20], [0, 0.7, 0, 3], [0, 0, 2.5, 99], [0, 0, 0, 1]]),
        "flipped": np.array([[-0.8, 0, 0, 20], [0, 0.7, 0, 3], [0, 0, -2.5, 9], [0, 0, 0, 1.0]]),
        "oblique": random_affine(3, shuffle=False),
        "oblique and shuffled": random_affine(4),
    }[kind]
    scan = small(10)[:30, :40].astype(dtype)
    save(scan, affine, tmp_path / "Doe^Jane.nii.gz")
    volume = read_file(tmp_path / "Doe^Jane.nii.gz")
    files = write_series(volume, tmp_path / "ct")
    assert all(file.parent == tmp_path / "ct" for file in files)
    image = read_series(tmp_path / "ct")
    assert np.array_equal(image.ras.data, volume.ras.data) and image.read().dtype == np.int16
    assert np.abs(image.ras_affine - volume.ras_affine).max() < 1e-3
    assert list(image.files) == files and image.notes == ()
    again = write_series(volume, tmp_path / "again")
    assert [a.read_bytes() for a in files] == [b.read_bytes() for b in again]
    other = write_series(volume.like(volume.read() + 1), tmp_path / "other")
    uids = [pydicom.dcmread(f[0]).SeriesInstanceUID for f in (files, other)]
    assert uids[0] != uids[1]
    assert pydicom.dcmread(files[0]).PatientID == "anonymous"
    for file in files:
        assert not any(secret.encode() in file.read_bytes() for secret in SECRETS.values())
    assert not list(tmp_path.glob(".*"))


REFUSED = {
    "fractions": (lambda: small(4) + np.float32(0.5), np.eye(4), "whole HU .* got fractions"),
    "too bright": (lambda: small(4).astype(np.int32) + 70000, np.eye(4), "whole HU from -32768"),
    "sheared": (lambda: small(4), random_affine(1, shear=0.1), "perpendicular axes"),
    "one slice": (lambda: small(1), np.eye(4), "needs 2 slices or more"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_series_cannot_hold_is_refused(kind, tmp_path):
    make, affine, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        write_series(Volume(make(), affine, "scan.nii.gz"), tmp_path / "ct")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="must be a new folder"):
        write_series(Volume(small(4), np.eye(4)), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_the_commands_convert_both_ways(tmp_path):
    scan, label = (array[:, :, 12:28] for array in ras_arrays(0))
    for name, array in (("scan", scan), ("label", label)):
        save(array, random_affine(5), tmp_path / f"{name}.nii.gz")
    for command, *paths in (
        ("to-series", "scan.nii.gz", "ct"),
        ("to-nifti", "ct", "again.nii.gz"),
        ("to-seg", "label.nii.gz", "ct", "seg.dcm"),
    ):
        done = call_script("-m", "data.seg", command, *(tmp_path / path for path in paths))
        assert done.returncode == 0, done.stderr
        assert "next: " in done.stdout
    again, volume = read_file(tmp_path / "again.nii.gz"), read_file(tmp_path / "scan.nii.gz")
    assert np.array_equal(again.ras.data, volume.ras.data)
    series = read_series(tmp_path / "ct")
    seg = read_seg(tmp_path / "seg.dcm", series, USUAL_LABELS)
    assert np.array_equal(seg.ras.data, read_file(tmp_path / "label.nii.gz").ras.data)
    for words, message in (
        (("to-nifti", tmp_path / "none", tmp_path / "x.nii.gz"), "no such"),
        (("to-nifti", tmp_path / "ct", tmp_path / "x.txt"), "must end in"),
        (("to-seg", tmp_path / "scan.nii.gz", tmp_path / "ct", tmp_path / "x.dcm"), "holds"),
        (("to-series", tmp_path / "scan.nii.gz", tmp_path / "ct"), "must be a new folder"),
    ):
        done = call_script("-m", "data.seg", *words)
        assert done.returncode == 1
        assert re.search(f"^error: .*{message}", done.stderr, re.MULTILINE), done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("x.*"))


# ---------------------------------------------------------------------------------------
# Real series
# ---------------------------------------------------------------------------------------


def test_gantry_tilt_is_refused_and_jpeg_2000_is_read():
    folder = SHARED_DATA / "dicom"
    if not folder.is_dir():
        pytest.skip("the real DICOM series are not here (dicom beside the project)")
    with pytest.raises(InputError, match=r"uneven gaps of 1.08 to 7.00 mm.*gantry tilt of 18.5°"):
        read_series(folder / "gantry_tilt_28")
    image = read_series(folder / "jpeg2000_20")
    assert image.shape == (512, 512, 20) and image.notes == ()
    assert (image.read().min(), image.read().dtype) == (-1024, np.int16)
    nifti = SHARED_DATA / "ct" / "imagesTr" / "tace_0697.nii.gz"
    if nifti.exists():
        image = read_series(folder / "axial_plus_coronal_45")
        expected = nib.as_closest_canonical(nib.load(nifti))
        assert np.array_equal(image.ras.data, np.asanyarray(expected.dataobj))
        assert np.abs(image.ras_affine - expected.affine).max() < 1e-3
