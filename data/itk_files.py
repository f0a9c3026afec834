"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): headers read strictly, voxels left in the file.

ITK's own reader says nothing about a flipped byte in a compressed file and dies of some headers.
What a header means is as in ITK; a value that is malformed, or would place voxels elsewhere than we
do, is refused, and geometry that a header does not give is told in the notes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Literal

import numpy as np

from data.files import InputError
from data.voxel_files import AGAIN, StoredVoxels

HEADER_LIMIT = 2**20  # bytes; a header is some hundred
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
META_KEYS = {  # key → other names of it; every other key is a remark
    "NDims": (), "BinaryData": (), "CompressedData": (), "CompressedDataSize": (), "DimSize": (),
    "BinaryDataByteOrderMSB": ("ElementByteOrderMSB",), "HeaderSize": (), "ElementType": (),
    "TransformMatrix": ("Rotation", "Orientation"), "Offset": ("Position", "Origin"),
    "ElementSpacing": (), "ElementSize": (), "ElementNumberOfChannels": (), "ElementDataFile": (),
    "ElementToIntensityFunctionSlope": (), "ElementToIntensityFunctionOffset": (),
}  # fmt: skip
META_NAME = {other: key for key, others in META_KEYS.items() for other in (key, *others)}
NRRD_TYPES = {
    "i1": "signed char,int8,int8_t", "u1": "uchar,unsigned char,uint8,uint8_t",
    "i2": "short,short int,signed short,signed short int,int16,int16_t",
    "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
    "i4": "int,signed int,int32,int32_t", "u4": "uint,unsigned int,uint32,uint32_t",
    "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
    "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
    "f4": "float", "f8": "double",
}  # fmt: skip
NRRD_TYPE = {name: code for code, names in NRRD_TYPES.items() for name in names.split(",")}
SPACES = {  # space → what takes it to left, posterior, superior
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
SPACE_UNITS = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "micron": 0.001}
NRRD_OLD = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}


@dataclass
class ItkFile:
    """What `read_itk` finds: voxels still in the file, their affine (LPS mm)."""

    voxels: StoredVoxels
    affine: np.ndarray
    oriented: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass
class _Header:
    """Key → value of a header, `end` its length in bytes."""

    path: Path
    values: dict[str, str]
    end: int

    def wrong(self, key: str, expected: str) -> InputError:
        return InputError(
            f"{self.path}: cannot be read (its header has {key} {self.values.get(key)!r}, expected "
            f"{expected}); {AGAIN}, or convert it to .nii.gz"
        )

    def numbers(self, key: str, count: int, default: str | None = None) -> list[float]:
        """`count` finite numbers. Raises InputError for anything else."""
        words = self.values.get(key, default or "").split()
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise self.wrong(key, f"{count} numbers")
        return numbers

    def sizes(self, key: str, count: int, default: str | None = None, least: int = 1) -> list[int]:
        """`count` whole numbers from `least` on."""
        words = self.values.get(key, default or "").split()
        if len(words) != count or not all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words):
            raise self.wrong(key, f"{count} whole numbers")
        if min(map(int, words)) < least:
            raise self.wrong(key, f"at least {least}")
        return [int(word) for word in words]

    def choose(self, key: str, choices: dict, default: str | None = None):
        """The value that a word stands for, in small letters or not."""
        word = self.values.get(key, default or "").strip()
        for choice, value in choices.items():
            if choice.lower() == word.lower():
                return value
        raise self.wrong(key, f"one of {', '.join(choices)}")

    def data_file(self, key: str) -> Path:
        """The file that holds the voxels: one, in the header's folder or below it."""
        name = self.values.get(key, "").strip()
        if not name or "\0" in name or re.match(r"LIST\b", name) or "%" in name:
            raise self.wrong(key, "one file; join lists of slices to one volume first")
        parts = PureWindowsPath(name)
        if parts.is_absolute() or parts.drive or name.startswith("/") or ".." in parts.parts:
            raise self.wrong(key, "a file in the folder of the header; move it there")
        return self.path.parent / name


def read_itk(path: Path) -> ItkFile:
    """Header of a MetaImage or NRRD file. Raises InputError for anything but one 3D volume."""
    with path.open("rb") as stream:
        raw = stream.read(HEADER_LIMIT)
    return (_read_nrrd if path.name.lower().endswith(("nrrd", "nhdr")) else _read_meta)(path, raw)


def _put(header: _Header, key: str, value: str) -> None:
    if key in header.values:
        raise InputError(f"{header.path}: cannot be read (its header has {key} twice); {AGAIN}")
    value = value.strip(" \t\r")
    if re.search(r"[\0-\x08\n-\x1f\x7f]", value):  # Python reads some of them as spaces
        raise InputError(
            f"{header.path}: cannot be read (its header has {key} {value!r}, expected no control "
            f"character); {AGAIN}"
        )
    header.values[key] = value


# -- MetaImage


def _meta_header(path: Path, raw: bytes) -> _Header:
    header = _Header(path, {}, 0)
    while b"\n" in raw[header.end :] or header.end == 0:
        end = raw.find(b"\n", header.end)
        end = len(raw) if end < 0 else end
        line = raw[header.end : end].decode("latin-1")
        header.end = end + 1
        key, mark, value = line.partition("=")
        if not line.strip():
            continue
        if not mark or not key.strip().isprintable():
            break
        if name := META_NAME.get(key.strip()):
            _put(header, name, value)
        if name == "ElementDataFile":
            return header
    raise header.wrong("ElementDataFile", "LOCAL or the name of a file as the header's last line")


def _read_meta(path: Path, raw: bytes) -> ItkFile:
    header, flags = _meta_header(path, raw), {"true": True, "false": False, "1": True, "0": False}
    (count,) = header.sizes("NDims", 1)
    if not 3 <= count <= 7:
        raise header.wrong("NDims", "3: one volume; convert it first")
    shape = header.sizes("DimSize", count)
    x, y, z, *more = shape
    if set(more) - {1}:
        raise header.wrong("DimSize", "one 3D volume; split or convert it first")
    if header.sizes("ElementNumberOfChannels", 1, "1") != [1]:
        raise header.wrong("ElementNumberOfChannels", "1: one number per voxel")
    for key, plain in (("Slope", 1), ("Offset", 0)):
        if header.numbers(f"ElementToIntensityFunction{key}", 1, str(plain)) != [plain]:
            raise header.wrong(f"ElementToIntensityFunction{key}", f"{plain}; convert it first")
    if not header.choose("BinaryData", flags, "True"):
        raise header.wrong("BinaryData", "True; text is not read")
    order = ">" if header.choose("BinaryDataByteOrderMSB", flags, "False") else "<"
    dtype = np.dtype(order + header.choose("ElementType", META_TYPES))
    local = header.values["ElementDataFile"].upper() == "LOCAL"
    file = path if local else header.data_file("ElementDataFile")
    (skip,) = header.sizes("HeaderSize", 1, "0", least=-1)
    codec: Literal["raw", "zlib"] = "raw"
    start, stop = header.end if local else max(skip, 0), None
    needed = math.prod(shape) * dtype.itemsize
    if header.choose("CompressedData", flags, "False"):
        codec = "zlib"
        if "CompressedDataSize" in header.values:
            stop = start + header.sizes("CompressedDataSize", 1)[0]
        if stop is not None and file.is_file() and stop > file.stat().st_size:
            raise header.wrong("CompressedDataSize", f"no more than {file.name} holds")
    elif skip == -1 and file.is_file():
        start = max(file.stat().st_size - needed, start)
    voxels = StoredVoxels(str(path), file, (x, y, z), dtype, codec, start, stop)
    return ItkFile(voxels, *_meta_affine(header, count))


def _meta_affine(header: _Header, count: int) -> tuple[np.ndarray, bool, list[str]]:
    size = "ElementSpacing" if "ElementSpacing" in header.values else "ElementSize"
    spacing = header.numbers(size, count, "1 " * count)[:3]
    identity = " ".join(str(float(number)) for number in np.eye(count).ravel())
    turn = np.reshape(header.numbers("TransformMatrix", count**2, identity), (count, count))
    affine = np.eye(4)
    affine[:3, :3] = turn[:3, :3].T * spacing  # the file has an axis in each row
    affine[:3, 3] = header.numbers("Offset", count, "0 " * count)[:3]
    missing = [key for key in (size, "TransformMatrix", "Offset") if key not in header.values]
    notes = [f"the header gives no {key}; the usual is taken" for key in missing]
    return affine, "TransformMatrix" in header.values, notes


# -- NRRD


def _nrrd_header(path: Path, raw: bytes) -> _Header:
    if not re.match(rb"NRRD000[1-6]\r?\n", raw):
        raise InputError(f"{path}: cannot be read (it does not begin with NRRD000…); {AGAIN}")
    header = _Header(path, {}, raw.index(b"\n") + 1)
    while 0 < header.end < len(raw):
        end = raw.find(b"\n", header.end)
        end = len(raw) if end < 0 else end
        line = raw[header.end : end].decode("latin-1").rstrip("\r")
        header.end = end + 1
        if not line:
            return header
        if line.startswith("#") or ":=" in line:
            continue
        key, mark, value = line.partition(": ")
        if not mark:
            key, mark, value = line.partition(":")
        if not mark:
            raise InputError(f"{path}: cannot be read (header line {line[:80]!r}); {AGAIN}")
        key = key.strip().lower()
        _put(header, NRRD_OLD.get(key, key), value)
    return header


def _read_nrrd(path: Path, raw: bytes) -> ItkFile:
    header = _nrrd_header(path, raw)
    (count,) = header.sizes("dimension", 1)
    if not 3 <= count <= 16:
        raise header.wrong("dimension", "3: one volume; convert it first")
    shape = header.sizes("sizes", count)
    affine, kept, notes = _nrrd_affine(header, shape)
    dtype = np.dtype(header.choose("type", NRRD_TYPE))
    if dtype.itemsize > 1:
        dtype = dtype.newbyteorder(header.choose("endian", {"little": "<", "big": ">"}))
    choices = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
    codec = header.choose("encoding", choices)
    file, start = path, header.end
    if "data file" in header.values:
        file, start = header.data_file("data file"), 0
    (lines,) = header.sizes("line skip", 1, "0", least=0)
    (skip,) = header.sizes("byte skip", 1, "0", least=-1 if codec == "raw" else 0)
    if lines and file.is_file():
        start = _skip_lines(header, file, start, lines)
    if skip == -1 and file.is_file():
        skip = file.stat().st_size - start - math.prod(shape) * dtype.itemsize
    x, y, z = (shape[axis] for axis in kept)
    voxels = StoredVoxels(str(path), file, (x, y, z), dtype, codec, start, None, skip)
    oriented = "space directions" in header.values and "space" in header.values
    return ItkFile(voxels, affine, oriented, notes)


def _skip_lines(header: _Header, file: Path, start: int, lines: int) -> int:
    with file.open("rb") as stream:
        stream.seek(start)
        head = stream.read(HEADER_LIMIT).split(b"\n", lines)
    if len(head) <= lines:
        raise header.wrong("line skip", "no more lines than there are")
    return start + sum(len(line) + 1 for line in head[:lines])


def _nrrd_affine(header: _Header, shape: list[int]) -> tuple[np.ndarray, list[int], list[str]]:
    """Affine (LPS mm), the three axes that are kept, and what was assumed."""
    notes, affine = [], np.eye(4)
    words = header.values.get("space directions", "")
    vectors = re.findall(r"none|\([^()]*\)", words)
    if words and (
        len(vectors) != len(shape) or "".join(vectors) != re.sub(r"\s(?![^(]*\))", "", words)
    ):
        raise header.wrong("space directions", "a vector or none for each axis")
    spread = vectors or ["none" if size == 1 and n > 2 else "" for n, size in enumerate(shape)]
    kept = [axis for axis, vector in enumerate(spread) if vector != "none"]
    if len(kept) != 3 or any(shape[axis] != 1 for axis in range(len(shape)) if axis not in kept):
        raise header.wrong("sizes", "one 3D volume; split or convert it first")
    if vectors:
        affine[:3, :3] = np.transpose([_vector(header, spread[axis]) for axis in kept])
    else:
        notes.append("the header gives no space directions; the usual are taken")
        steps = header.numbers("spacings", len(shape), "1 " * len(shape))
        affine[:3, :3] = np.diag([steps[axis] for axis in kept])
    if "space origin" in header.values:
        affine[:3, 3] = _vector(header, header.values["space origin"])
    else:
        notes.append("the header gives no space origin; 0 is taken")
    if "space" in header.values:
        flips = header.choose("space", SPACES)
    else:
        flips = (1, 1, 1)
        notes.append("the header names no space; left-posterior-superior is taken")
    scale = _space_unit(header, notes)
    return np.diag([*flips, 1]) @ np.diag([scale, scale, scale, 1]) @ affine, kept, notes


def _space_unit(header: _Header, notes: list[str]) -> float:
    units = set(re.findall(r'"([^"]*)"', header.values.get("space units", "")))
    known = {SPACE_UNITS.get(unit.strip().lower()) for unit in units}
    if len(known) == 1 and None not in known:
        return known.pop() or 1.0
    if units:
        notes.append(f"space units {', '.join(sorted(units))} are not known; millimetres are taken")
    return 1.0


def _vector(header: _Header, text: str) -> list[float]:
    try:
        vector = [
            float(number) for number in text.strip().removeprefix("(").removesuffix(")").split(",")
        ]
    except ValueError:
        vector = []
    if len(vector) != 3 or not all(map(math.isfinite, vector)):
        raise InputError(
            f"{header.path}: cannot be read (its header has the vector {text}, expected three "
            f"numbers); {AGAIN}"
        )
    return vector
