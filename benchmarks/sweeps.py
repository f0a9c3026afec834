"""Sweeps over what can be wrong with a file: right, told, or refused with one error that names it.

Each sweep tries every fault of a kind, or `number` of them drawn by `seed`, asserts how each ends
and returns how often each ending came.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from conftest import random_affine
from helpers import (
    build_phantom_series,
    put_raw,
    ras_arrays,
    write_phantom_seg,
    write_phantom_series,
)

from data.dicom import find_dicom, read_series
from data.files import InputError
from data.labels import USUAL_LABELS
from data.seg import read_seg
from data.volumes import Volume, read_file

RIGHT, TOLD, REFUSED = "right", "told", "refused"
UNWRITTEN = "unwritten"  # the fault cannot be put into a file


def count_endings(
    place: Path, attempt: Callable[..., str], faults: Iterable[tuple], number: int | None, seed: int
) -> Counter[str]:
    """Call `attempt` with all faults, or `number` of them; an InputError must name `place`."""
    faults, counts = list(faults), Counter()
    if number is not None and number < len(faults):
        chosen = np.random.default_rng(seed).choice(len(faults), number, replace=False)
        faults = [faults[index] for index in sorted(chosen)]
    for fault in faults:
        try:
            counts[attempt(*fault)] += 1
        except InputError as error:
            assert str(place) in str(error), fault
            counts[REFUSED] += 1
        except AssertionError as error:
            error.add_note(f"the fault: {fault}")
            raise
    return counts


# --- Volume files -----------------------------------------------------------------------

SHAPE = (8, 7, 6)
AFFINE = random_affine(5, shuffle=False)


def make_array(dtype: object = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Numbers of a type, all different where it has as many; none is 0."""
    array = np.arange(1, np.prod(shape) + 1).reshape(shape, order="F") % 120 + 1
    return np.asfortranarray(array.astype(dtype))


def write_nifti(path: Path, kind=nib.Nifti1Image, codes=(1, 2), endian="<", dtype="i2") -> Path:
    """A sound file of `make_array` on AFFINE, with the given qform and sform codes."""
    header = kind.header_class(endianness=endian)
    image = kind(make_array(dtype), AFFINE, header)
    image.set_data_dtype(np.dtype(dtype).newbyteorder(endian))
    image.set_qform(AFFINE, codes[0])
    image.set_sform(AFFINE, codes[1])
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, 0)
    nib.save(image, path)
    return path


META = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "1 2 3", "ElementSpacing": "1.5 1.5 2.5",
    "DimSize": "8 7 6", "ElementType": "MET_SHORT",
}  # fmt: skip
NRRD = {
    "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "8 7 6",
    "space directions": "(1.5,0,0) (0,1.5,0) (0,0,2.5)", "kinds": "domain domain domain",
    "encoding": "raw", "space origin": "(1,2,3)",
}  # fmt: skip


def change_keys(keys: dict[str, str], lines: str, sign: str) -> tuple[dict[str, str], str]:
    """The keys of a header with `lines` instead of those of the same key, and their text."""
    keys = keys | dict(line.split(sign) for line in filter(None, lines.split("\n")))
    keys = {key: value for key, value in keys.items() if value != "-"}
    return keys, "".join(f"{key}{sign}{value}\n" for key, value in keys.items())


def write_meta(path: Path, array: np.ndarray, lines: str = "", data: bytes | None = None) -> Path:
    """A MetaImage by hand; `lines` replace those of the same key."""
    order = {"BinaryDataByteOrderMSB": str(array.dtype.byteorder == ">")}
    keys, text = change_keys(META | order, lines, " = ")
    text += "" if "ElementDataFile" in keys else "ElementDataFile = LOCAL\n"
    path.write_bytes(text.encode() + (array.tobytes("F") if data is None else data))
    return path


def write_nrrd(path: Path, array: np.ndarray, lines: str = "", data: bytes | None = None) -> Path:
    """A NRRD by hand; `lines` replace those of the same key."""
    order = {"endian": "big" if array.dtype.byteorder == ">" else "little"}
    keys, text = change_keys(NRRD | order, lines, ": ")
    body = array.tobytes("F") if data is None else data
    end = b"" if "data file" in keys else b"\n"
    path.write_bytes(b"NRRD0004\n# remark\n" + text.encode() + end + body)
    return path


def write_any(folder: Path, name: str) -> Path:
    """A sound file of `make_array` in the format that its name says."""
    path, array = folder / name, make_array("<i2")
    content = array.tobytes("F")
    if ".nii" in name:
        return write_nifti(path)
    if name == "packed.mha":
        return write_meta(path, array, "CompressedData = True", zlib.compress(content))
    if name == "packed.nrrd":
        return write_nrrd(path, array, "encoding: gzip", gzip.compress(content))
    return (write_meta if path.suffix == ".mha" else write_nrrd)(path, array)


VALUES = (0, -1, np.nan, 1e30, None)  # None: text
GEOMETRY = ("srow", "qoffset", "quatern", "pixdim", "scl", "xyzt", "qform_code", "sform_code")


def put_value(dtype: np.dtype, value: float | None) -> bytes:
    """A value as a header field of `dtype` holds it; nothing where it cannot."""
    if value is None:
        return (b"PATIENT " * 10)[: dtype.itemsize]
    if dtype.kind in "iu":
        if np.isnan(value):
            return b""
        return np.array(int(min(value, np.iinfo(dtype).max))).astype(dtype).tobytes()
    if dtype.kind == "f":
        return np.array(value, dtype).tobytes()
    return (b"\xff" if value else b"\0") * dtype.itemsize


def same_place(a: Volume, b: Volume) -> bool:
    """Whether two volumes lie on one grid."""
    return a.shape == b.shape and np.allclose(a.affine, b.affine, rtol=0, atol=1e-6)


def sweep_nifti_header(folder: Path, number: int | None = None, seed: int = 0) -> Counter:
    """Each number of a header × each value of nonsense: nibabel's volume, or one error."""
    path = write_nifti(folder / "a.nii")
    sound, content = read_file(path), path.read_bytes()

    def attempt(key: str, start: int, new: bytes) -> str:
        path.write_bytes(content[:start] + new + content[start + len(new) :])
        volume = read_file(path)
        found = volume.read()
        if key == "datatype" or volume.notes:
            return RIGHT  # a type of the same size is as good as the one before
        if key.startswith(GEOMETRY):
            with np.errstate(all="ignore"):
                theirs = nib.load(path)
            assert np.allclose(volume.affine, theirs.affine)
            assert np.allclose(found, np.asanyarray(theirs.dataobj))
        else:
            assert same_place(volume, sound)
            assert np.array_equal(found, make_array())
        return RIGHT

    fields = nib.Nifti1Header(endianness="<")._structarr.dtype.fields
    faults = [
        (key, offset + n * dtype.base.itemsize, put_value(dtype.base, value))
        for key, (dtype, offset) in fields.items()
        for n in range(int(np.prod(dtype.shape)))
        for value in VALUES
    ]
    return count_endings(path, attempt, faults, number, seed)


WHOLE_FILES = ("a.nii", "a.nii.gz", "a.mha", "packed.mha", "a.nrrd", "packed.nrrd")
PACKED_FILES = ("a.nii.gz", "packed.mha", "packed.nrrd")


def sweep_cuts(folder: Path, name: str, number: int | None = None, seed: int = 0) -> Counter:
    """A file cut at any length is refused; the first, second and last one are always tried."""
    path = write_any(folder, name)
    content = path.read_bytes()

    def attempt(length: int) -> str:
        path.write_bytes(content[:length])
        read_file(path).read()
        raise AssertionError("a cut file was read")

    ends = [(0,), (1,), (len(content) - 1,)]
    counts = count_endings(path, attempt, ends, None, seed)
    return counts + count_endings(path, attempt, zip(range(len(content))), number, seed)


def sweep_flips(folder: Path, name: str, number: int | None = None, seed: int = 0) -> Counter:
    """A flipped bit of a compressed part never changes a voxel: refused, or without effect."""
    path = write_any(folder, name)
    sound, content = read_file(path), path.read_bytes()

    def attempt(position: int, bit: int) -> str:
        changed = bytearray(content)
        changed[position] ^= bit
        path.write_bytes(changed)
        volume = read_file(path)
        assert np.array_equal(volume.read(), make_array())
        assert np.array_equal(volume.affine, sound.affine)
        return RIGHT

    first = 0 if ".gz" in name else max(content.find(b"\x78\x9c"), content.find(b"\x1f\x8b"))
    flips = product(range(first, len(content)), (1, 128))
    return count_endings(path, attempt, flips, number, seed)


# --- DICOM series -----------------------------------------------------------------------

SERIES_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID",
    "PatientID", "ImageType", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "Rows", "Columns", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "PixelData",
)  # fmt: skip
FAULTS = {
    "empty": lambda h, t: put_raw(h, t, h[t].VR if t in h else "DS", b""),
    "missing": lambda h, t: h.pop(t, None),
    "text": lambda h, t: put_raw(h, t, "DS", b"some words"),
    "wrong count": lambda h, t: put_raw(h, t, "DS", b"1\\2\\3\\4"),
    "too few": lambda h, t: put_raw(h, t, "DS", b"1" if t in h and h[t].VM > 1 else b"one"),
    "NaN": lambda h, t: put_raw(h, t, "DS", b"nan\\nan\\nan"),
    "infinite": lambda h, t: put_raw(h, t, "DS", b"1e999"),
    "as LO": lambda h, t: put_raw(
        h, t, "LO", str(h.get(t)).strip("[]").replace(", ", "\\").encode()
    ),
    "as UN": lambda h, t: put_raw(h, t, "UN", b"\x01\x02\x03\x04"),
    "as SQ": lambda h, t: h.add_new(t, "SQ", [pydicom.Dataset()]),
}


def as_file(header: pydicom.Dataset) -> bytes | None:
    """The file of a DICOM header; None where pydicom cannot write it."""
    stream, header.preamble = io.BytesIO(), bytes(128)
    try:
        header.save_as(stream, enforce_file_format=False)
    except Exception:
        return None
    return stream.getvalue()


def sweep_series(folder: Path, number: int | None = None, seed: int = 0) -> Counter:
    """Each tag that is read × each way it can be wrong, in all five slices and in one."""
    scan = ras_arrays(0)[0][16:32, 16:32, 8:13]
    sound = [as_file(header) for header in build_phantom_series(scan)]

    def read(files: list[bytes]) -> Volume:
        for z, content in enumerate(files):
            (folder / f"{z}").write_bytes(content)
        return read_series(folder)

    expected = read(sound)
    assert np.array_equal(expected.read(), scan[::-1, ::-1])

    def attempt(tag: str, name: str, which: Iterable[int]) -> str:
        files = list(sound)
        for z in which:
            header = pydicom.dcmread(io.BytesIO(sound[z]))
            FAULTS[name](header, tag)
            files[z] = as_file(header)
        if None in files:
            return UNWRITTEN
        try:
            image = read(files)
            found = image.read()
        except InputError as error:
            named = (tag, "its DICOM header", "its PixelData")
            assert tag == "SeriesInstanceUID" or any(w in str(error) for w in named), error
            raise
        same = image.shape == expected.shape and np.array_equal(found, expected.read())
        same = same and np.array_equal(image.affine, expected.affine)
        assert same or image.notes
        return RIGHT if same else TOLD

    faults = product(SERIES_TAGS, FAULTS, (range(5), (3,)))
    return count_endings(folder, attempt, faults, number, seed)


# --- DICOM SEG --------------------------------------------------------------------------

SEG_TAGS = (
    "Modality", "SOPClassUID", "FrameOfReferenceUID", "SegmentationType", "SegmentSequence",
    "SegmentNumber", "SegmentLabel", "SegmentDescription", "SegmentedPropertyTypeCodeSequence",
    "CodeValue", "ReferencedSeriesSequence", "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence", "PlanePositionSequence", "ImagePositionPatient",
    "PlaneOrientationSequence", "ImageOrientationPatient", "PixelMeasuresSequence", "PixelSpacing",
    "SegmentIdentificationSequence", "ReferencedSegmentNumber", "Rows", "Columns",
    "NumberOfFrames", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation",
    "PhotometricInterpretation", "PixelData",
)  # fmt: skip


def list_holders(header: pydicom.Dataset, tag: str) -> list[pydicom.Dataset]:
    """The datasets, at any depth, that hold a tag."""
    below = [item for e in header if e.VR == "SQ" for item in e.value]
    return [header] * (tag in header) + [found for b in below for found in list_holders(b, tag)]


def sweep_seg(folder: Path, number: int | None = None, seed: int = 0) -> Counter:
    """Each tag of a SEG × each way it can be wrong, wherever it stands and in the first place."""
    scan, label = (array[24:36, 16:32, 16:20] for array in ras_arrays(0))
    slices = write_phantom_series(folder / "ct", scan)
    image, path = read_series(folder / "ct"), folder / "seg.dcm"
    sound = write_phantom_seg(path, slices, label).read_bytes()

    def attempt(tag: str, name: str, first: bool) -> str:
        header = pydicom.dcmread(io.BytesIO(sound))
        for holder in list_holders(header, tag)[: 1 if first else None]:
            FAULTS[name](holder, tag)
        content = as_file(header)
        if content is None:
            return UNWRITTEN
        path.write_bytes(content)
        find_dicom([path])
        found = read_seg(path, image, USUAL_LABELS)
        known = tag in ("SegmentLabel", "SegmentDescription")  # the values may be others
        assert np.array_equal(found.ras.data > 0, label > 0)
        assert known or np.array_equal(found.ras.data, label), found.classes
        return RIGHT

    faults = product(SEG_TAGS, FAULTS, (False, True))
    return count_endings(path, attempt, faults, number, seed)
