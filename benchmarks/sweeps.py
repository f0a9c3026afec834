"""Sweeps over what can be wrong with a file: right, told, or refused with one error that names it.

Each sweep tries every fault of a kind, or `number` of them drawn by `seed`, asserts how each ends
and returns how often each ending came.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import nibabel as nib
import numpy as np
import pydicom
import pytest
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

T = TypeVar("T")
RIGHT, TOLD, REFUSED = "right", "told", "refused"
UNWRITTEN = "unwritten"  # the fault cannot be put into a file


def choose(faults: Iterable[T], number: int | None, seed: int) -> list[T]:
    """All faults, or `number` of them, in their order."""
    faults = list(faults)
    if number is None or number >= len(faults):
        return faults
    chosen = np.random.default_rng(seed).choice(len(faults), number, replace=False)
    return [faults[index] for index in sorted(chosen)]


# ---------------------------------------------------------------------------------------
# Volume files
# ---------------------------------------------------------------------------------------

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


VALUES = {"zero": 0, "minus one": -1, "nan": np.nan, "huge": 1e30, "text": None}
GEOMETRY = ("srow", "qoffset", "quatern", "pixdim", "scl", "xyzt", "qform_code", "sform_code")


def put_value(dtype: np.dtype, value: float | None) -> bytes:
    """A value as a header field of `dtype` holds it; nothing where it cannot."""
    if value is None:
        return (b"PATIENT " * 10)[: dtype.itemsize]
    if dtype.kind in "iu":
        if np.isnan(value):
            return b""
        info = np.iinfo(dtype)
        value = info.max if value > info.max else value
        return np.array(int(value)).astype(dtype).tobytes()
    return (
        np.array(value, dtype).tobytes()
        if dtype.kind == "f"
        else (b"\0" if not value else b"\xff") * dtype.itemsize
    )


def same_place(a: Volume, b: Volume) -> bool:
    """Whether two volumes lie on one grid."""
    return a.shape == b.shape and np.allclose(a.affine, b.affine, rtol=0, atol=1e-6)


def sweep_nifti_header(folder: Path, number: int | None = None, seed: int = 0) -> Counter:
    """Each number of a header × each value of nonsense: nibabel's volume, or one error."""
    path = write_nifti(folder / "a.nii")
    sound, content = read_file(path), path.read_bytes()
    fields = nib.Nifti1Header(endianness="<")._structarr.dtype.fields
    mutations = [
        (key, what, offset + n * dtype.base.itemsize, put_value(dtype.base, value))
        for key, (dtype, offset) in fields.items()
        for n in range(int(np.prod(dtype.shape)))
        for what, value in VALUES.items()
    ]
    counts: Counter[str] = Counter()
    for key, what, start, new in choose(mutations, number, seed):
        path.write_bytes(content[:start] + new + content[start + len(new) :])
        counts[_try_nifti_header(path, sound, key, f"{key} at {start} = {what}")] += 1
    return counts


def _try_nifti_header(path: Path, sound: Volume, key: str, tell: str) -> str:
    try:
        volume = read_file(path)
        found = volume.read()
    except InputError as error:
        assert str(path) in str(error)
        return REFUSED
    if key == "datatype" or volume.notes:
        return RIGHT  # a type of the same size is as good as the one before
    if key.startswith(GEOMETRY):
        with np.errstate(all="ignore"):
            theirs = nib.load(path)
        assert np.allclose(volume.affine, theirs.affine), tell
        assert np.allclose(found, np.asanyarray(theirs.dataobj)), tell
    else:
        assert same_place(volume, sound), tell
        assert np.array_equal(found, make_array()), tell
    return RIGHT


WHOLE_FILES = ("a.nii", "a.nii.gz", "a.mha", "packed.mha", "a.nrrd", "packed.nrrd")
PACKED_FILES = ("a.nii.gz", "packed.mha", "packed.nrrd")


def sweep_cuts(folder: Path, name: str, number: int | None = None, seed: int = 0) -> Counter:
    """A file cut at any length is refused; the first, second and last one are always tried."""
    path = write_any(folder, name)
    content = path.read_bytes()
    lengths = {0, 1, len(content) - 1} | set(choose(range(len(content)), number, seed))
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_file(path).read()
    return Counter({REFUSED: len(lengths)})


def sweep_flips(folder: Path, name: str, number: int | None = None, seed: int = 0) -> Counter:
    """A flipped bit of a compressed part never changes a voxel: refused, or without effect."""
    path = write_any(folder, name)
    sound, content = read_file(path), path.read_bytes()
    first = 0 if ".gz" in name else max(content.find(b"\x78\x9c"), content.find(b"\x1f\x8b"))
    counts: Counter[str] = Counter()
    flips = [(position, bit) for position in range(first, len(content)) for bit in (1, 128)]
    for position, bit in choose(flips, number, seed):
        changed = bytearray(content)
        changed[position] ^= bit
        path.write_bytes(changed)
        try:
            volume = read_file(path)
            assert np.array_equal(volume.read(), make_array())
            assert np.array_equal(volume.affine, sound.affine)
            counts[RIGHT] += 1
        except InputError:
            counts[REFUSED] += 1
    return counts


# ---------------------------------------------------------------------------------------
# DICOM series
# ---------------------------------------------------------------------------------------

SERIES_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID",
    "PatientID", "ImageType", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "Rows", "Columns", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "PixelData",
)  # fmt: skip


def as_words(value: object) -> bytes:
    return str(value).strip("[]").replace(", ", "\\").encode()


FAULTS = {
    "empty": lambda h, t: put_raw(h, t, h[t].VR if t in h else "DS", b""),
    "missing": lambda h, t: h.pop(t, None),
    "text": lambda h, t: put_raw(h, t, "DS", b"some words"),
    "wrong count": lambda h, t: put_raw(h, t, "DS", b"1\\2\\3\\4"),
    "too few": lambda h, t: put_raw(h, t, "DS", b"1" if t in h and h[t].VM > 1 else b"one"),
    "NaN": lambda h, t: put_raw(h, t, "DS", b"nan\\nan\\nan"),
    "infinite": lambda h, t: put_raw(h, t, "DS", b"1e999"),
    "as LO": lambda h, t: put_raw(h, t, "LO", as_words(h.get(t))),
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
    _write_slices(folder, sound)
    expected = read_series(folder)
    assert np.array_equal(expected.read(), scan[::-1, ::-1])
    faults = [
        (tag, name, which) for tag in SERIES_TAGS for name in FAULTS for which in (range(5), (3,))
    ]
    counts: Counter[str] = Counter()
    for tag, name, which in choose(faults, number, seed):
        files = list(sound)
        for z in which:
            header = pydicom.dcmread(io.BytesIO(sound[z]))
            FAULTS[name](header, tag)
            files[z] = as_file(header)
        if None in files:
            counts[UNWRITTEN] += 1
            continue
        _write_slices(folder, files)
        counts[_try_series(folder, expected, tag, f"{tag} {name} in {which}")] += 1
    return counts


def _write_slices(folder: Path, files: Sequence[bytes]) -> None:
    for z, content in enumerate(files):
        (folder / f"{z}").write_bytes(content)


def _try_series(folder: Path, expected: Volume, tag: str, tell: str) -> str:
    try:
        image = read_series(folder)
        found = image.read()
    except InputError as error:
        assert str(folder) in str(error), tell
        named = (tag, "its DICOM header", "its PixelData")
        assert tag == "SeriesInstanceUID" or any(w in str(error) for w in named), (tell, error)
        return REFUSED
    same = image.shape == expected.shape and np.array_equal(found, expected.read())
    same = same and np.array_equal(image.affine, expected.affine)
    assert same or image.notes, tell
    return RIGHT if same else TOLD


# ---------------------------------------------------------------------------------------
# DICOM SEG
# ---------------------------------------------------------------------------------------

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
    faults = [(tag, name, first) for tag in SEG_TAGS for name in FAULTS for first in (False, True)]
    counts: Counter[str] = Counter()
    for tag, name, first in choose(faults, number, seed):
        header = pydicom.dcmread(io.BytesIO(sound))
        for holder in list_holders(header, tag)[: 1 if first else None]:
            FAULTS[name](holder, tag)
        try:
            header.save_as(path)
        except Exception:  # pydicom cannot write it
            counts[UNWRITTEN] += 1
            continue
        counts[_try_seg(path, image, label, tag, f"{tag} {name} {first}")] += 1
        find_dicom([path])
    return counts


def _try_seg(path: Path, image: Volume, label: np.ndarray, tag: str, tell: str) -> str:
    try:
        found = read_seg(path, image, USUAL_LABELS)
    except InputError as error:
        assert str(path) in str(error), tell
        return REFUSED
    known = tag in ("SegmentLabel", "SegmentDescription")  # the values may be others
    assert np.array_equal(found.ras.data > 0, label > 0), tell
    assert known or np.array_equal(found.ras.data, label), (tell, found.classes)
    return RIGHT
