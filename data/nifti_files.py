"""NIfTI-1, NIfTI-2 and Analyze: what a header says, checked field by field before it is believed.

Nibabel's own reader mends what it doubts (a negative spacing, an unknown form code) without a word
to the caller; here a field that matters and cannot be right is refused, one that does not is noted.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from data.files import InputError
from data.voxel_files import AGAIN, DAMAGE, StoredVoxels, SummedFile

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units & 7: unknown, metre, mm, micron
FORM_CODES = range(6)  # 0: this form is not used
# What says where voxels lie. Nothing else of a header is written again: descriptions, names and
# extensions may hold what identifies a patient.
GEOMETRY_FIELDS = (
    "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
KINDS = {  # size of the header → its class and the magic word of a single file, of a pair
    348: (nib.Nifti1Header, b"n+1\0", b"ni1\0"),
    540: (nib.Nifti2Header, b"n+2\0", b"ni2\0"),
}
FORMS_APART = 0.5  # voxels between the places that sform and qform give, from which on it is told


@dataclass(frozen=True)
class NiftiFile:
    """What `read_nifti` finds: voxels still in the file, their affine (RAS mm), its header."""

    voxels: StoredVoxels
    affine: np.ndarray
    header: nib.Nifti1Header | None  # geometry only; None of an Analyze file
    oriented: bool
    notes: tuple[str, ...]


def read_nifti(path: Path) -> NiftiFile:
    """Header of a NIfTI or Analyze file, or of a pair by either name. Raises InputError."""
    head, data = find_pair(path)
    _refuse_false_name(head)
    block = _read_block(head)
    little, big = (int.from_bytes(block[:4], order) for order in ("little", "big"))
    size = next((n for n in (little, big) if n in KINDS), 0)
    if size == 0 or len(block) < size:
        raise InputError(f"{path}: not a readable NIfTI volume (its header is none); {AGAIN}")
    kind, single, pair = KINDS[size]
    raw = kind(block[:size], endianness="<" if size == little else ">", check=False)
    magic = raw["magic"].tobytes()
    if magic == single and head == data:
        return _from_header(path, raw, data, 4 + size)
    if magic == pair and head != data:
        return _from_header(path, raw, data, 0)
    if head != data and size == 348 and magic not in (single, pair):
        return _read_analyze(path, head, data)
    raise InputError(
        f"{path}: not a readable NIfTI volume (it is marked {magic!r}, a single file is "
        f"{single!r}, a .hdr/.img pair {pair!r}); {AGAIN}"
    )


def find_pair(path: Path) -> tuple[Path, Path]:
    """File of the header and file of the voxels, of a .hdr/.img pair by either name; else twice
    the path itself."""
    name = path.name[: -3 * path.name.lower().endswith(".gz") or None]
    ending, stem = name[-4:].lower(), name[:-4]
    if ending not in (".hdr", ".img"):
        return path, path
    other = ".img" if ending == ".hdr" else ".hdr"
    tail = path.name[len(name) :]
    other = other if name[-4:] == ending else other.upper()
    choices = [path.with_name(stem + other + end) for end in (tail, "" if tail else ".gz")]
    found = next((choice for choice in choices if choice.is_file()), choices[0])
    if ending == ".img" and not found.is_file():
        raise InputError(f"{path}: voxels without header, {found.name} is missing; get both")
    return (path, found) if ending == ".hdr" else (found, path)


def _refuse_false_name(path: Path) -> None:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    if zipped != path.name.lower().endswith(".gz"):
        found, wanted = ("is", path.name + ".gz") if zipped else ("is not", path.name[:-3])
        raise InputError(f"{path}: its content {found} gzip, against its name; rename it {wanted}")


def _read_block(path: Path) -> bytes:
    """The first bytes of a header: more than any header is long."""
    try:
        with path.open("rb") as file:
            if not path.name.lower().endswith(".gz"):
                return file.read(560)
            with igzip.IGzipFile(fileobj=file, mode="rb") as stream:
                return stream.read(560)
    except DAMAGE as error:
        raise InputError(f"{path}: not a readable NIfTI volume ({error}); {AGAIN}") from error


def _from_header(path: Path, raw: Any, data: Path, least_offset: int) -> NiftiFile:
    shape, dtype = _read_shape(path, raw), _read_dtype(path, raw)
    offset, slope, inter = (float(raw[k]) for k in ("vox_offset", "scl_slope", "scl_inter"))
    if not (offset.is_integer() and offset >= least_offset):
        raise _wrong(path, "vox_offset", offset, f"a whole number from {least_offset} on")
    if slope == 0 or not math.isfinite(slope):  # by the standard: the numbers are the values
        slope, inter = 1.0, 0.0
    if not math.isfinite(inter):
        raise _wrong(path, "scl_inter", inter, "a number")
    voxels = StoredVoxels(
        str(path), data, shape, dtype, _codec(data), 0, None, int(offset), slope, inter
    )
    notes: list[str] = []
    header = _copy_geometry(path, raw, shape, notes)
    oriented = bool(header["qform_code"]) or bool(header["sform_code"])
    unit = UNIT_MM[int(header["xyzt_units"]) & 7]
    affine = np.diag([unit, unit, unit, 1.0]) @ header.get_best_affine()
    return NiftiFile(voxels, affine, header, oriented, tuple(notes))


def _codec(data: Path) -> Any:
    return "gzip" if data.name.lower().endswith(".gz") else "raw"


def _wrong(path: Path, key: str, found: object, expected: str) -> InputError:
    return InputError(
        f"{path}: not a readable NIfTI volume (its header has {key} {found}, expected {expected}); "
        "correct the header, or convert the scan again"
    )


def _read_shape(path: Path, raw: Any) -> tuple[int, int, int]:
    """(X, Y, Z); axes of length 1 behind them are left out."""
    count, *sizes = (int(size) for size in raw["dim"])
    if not 1 <= count <= 7 or min(sizes[:count]) < 1:
        raise _wrong(path, "dim", [count, *sizes], "the number of axes, then their sizes from 1 on")
    x, y, z, *more = [*sizes[:count], 1, 1][: max(count, 3)]
    if count < 3 or set(more) - {1}:
        raise InputError(
            f"{path}: must be one 3D volume, got shape {tuple(sizes[:count])}; split or convert it "
            "first"
        )
    return x, y, z


def _read_dtype(path: Path, raw: Any) -> np.dtype:
    try:
        dtype = raw.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError):
        raise _wrong(path, "datatype", int(raw["datatype"]), "the code of a type") from None
    if dtype.kind not in "iuf":
        raise InputError(
            f"{path}: must hold numbers, got voxels of type {dtype}; convert colours or complex "
            "values to one number per voxel"
        )
    return dtype


def _copy_geometry(path: Path, raw: Any, shape: tuple[int, ...], notes: list[str]) -> Any:
    """A new header of the same kind and geometry, of whose forms each that is used is sound."""
    header = type(raw)()
    header.set_data_shape(shape)
    for key in GEOMETRY_FIELDS:
        header[key] = raw[key]
    header["pixdim"][:4] = raw["pixdim"][:4]
    header["pixdim"][0] = raw["pixdim"][0] or 1  # 0 means 1
    for key in ("qform_code", "sform_code"):
        if int(raw[key]) not in FORM_CODES:
            raise _wrong(path, key, int(raw[key]), "0 to 5")
    unit = int(raw["xyzt_units"]) & 7
    if unit not in UNIT_MM:
        notes.append(f"the header's unit {unit} is none of NIfTI's; millimetres are taken")
        header["xyzt_units"] = 2
    if int(raw["sform_code"]) == 0:
        if fault := _qform_fault(raw, with_turn=int(raw["qform_code"]) > 0):
            raise _wrong(path, *fault)
        return header
    if int(raw["qform_code"]) > 0:
        _compare_forms(raw, header, shape, notes)
    if int(header["qform_code"]) == 0:  # other programs read the spacing there
        lengths = nib.affines.voxel_sizes(header.get_sform())
        if _qform_fault(raw, with_turn=False):
            header["pixdim"][:4] = [1, *np.nan_to_num(lengths, posinf=0, neginf=0)]
        for key in GEOMETRY_FIELDS:
            if key.startswith("q") and not np.isfinite(header[key]):
                header[key] = 0
    return header


def _qform_fault(raw: Any, with_turn: bool) -> tuple[str, object, str] | None:
    """The field of the qform (of the spacing alone, without turn) that cannot be right."""
    qfac, *lengths = (float(number) for number in raw["pixdim"][:4])
    if not all(math.isfinite(length) and length > 0 for length in lengths):
        return "pixdim", lengths, "three lengths above 0"
    if not with_turn:
        return None
    if qfac not in (-1, 0, 1):
        return "pixdim[0]", qfac, "-1 or 1"
    turn = np.array([float(raw[f"quatern_{axis}"]) for axis in "bcd"])
    if not np.isfinite(turn).all() or turn @ turn > 1 + 3e-7:
        return "quatern", turn.tolist(), "a rotation"
    place = [float(raw[f"qoffset_{axis}"]) for axis in "xyz"]
    return None if np.isfinite(place).all() else ("qoffset", place, "a position")


def _compare_forms(raw: Any, header: Any, shape: tuple[int, ...], notes: list[str]) -> None:
    """Tell where qform and sform differ; a qform that cannot be right is not copied."""
    if fault := _qform_fault(raw, with_turn=True):
        notes.append(f"the qform is not sound ({fault[0]} {fault[1]}); the sform is used")
        header["qform_code"] = 0
        return
    corners = np.stack(np.meshgrid(*[(0, size - 1) for size in shape]), -1).reshape(-1, 3)
    sform, qform = header.get_sform(), header.get_qform(coded=False)
    gap = nib.affines.apply_affine(sform, corners) - nib.affines.apply_affine(qform, corners)
    apart = float(np.linalg.norm(gap, axis=1).max() / max(min(raw["pixdim"][1:4]), 1e-6))
    if not apart <= FORMS_APART:
        notes.append(
            f"sform and qform disagree by up to {apart:.3g} voxels; the sform is used, programs "
            "that use the qform see another place"
        )


def _read_analyze(path: Path, head: Path, data: Path) -> NiftiFile:
    """An Analyze pair by nibabel; its axes are a guess, which the notes tell."""
    try:
        image: Any = nib.load(head)
        proxy, affine = image.dataobj, np.array(image.affine, float)
        offset = int(proxy.offset)
        slope, inter = float(proxy.slope), float(proxy.inter)
        shape, dtype = _read_shape(path, image.header), _read_dtype(path, image.header)
    except InputError:
        raise
    except Exception as error:  # nibabel raises whatever a damaged header leads it to
        raise InputError(f"{path}: not a readable Analyze volume ({error}); {AGAIN}") from error
    note = "an Analyze header does not say where right and left are; the usual is taken"
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise _wrong(path, "scale", slope, "a number")
    if fault := _qform_fault(image.header, with_turn=False):
        raise _wrong(path, *fault)
    voxels = StoredVoxels(
        str(path), data, shape, dtype, _codec(data), 0, None, offset, slope, inter
    )
    return NiftiFile(voxels, affine, None, False, (note,))


# ---------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------

DATA_OFFSET = 352  # bytes before the voxels of a NIfTI-1 file


def make_header(grid: Any, dtype: np.dtype, slope: float) -> nib.Nifti1Header:
    """Header of a NIfTI-1 file on the grid of a Volume: geometry, type, slope, nothing else."""
    header = nib.Nifti1Image(np.empty((1, 1, 1), np.uint8), grid.affine).header
    header.set_xyzt_units("mm")
    if grid.header is not None:
        for key in GEOMETRY_FIELDS:
            header[key] = grid.header[key]
    try:
        header.set_data_shape(grid.shape)
        header.set_data_dtype(dtype)
    except nib.spatialimages.HeaderDataError as error:
        raise InputError(f"{grid.name}: cannot be written as NIfTI ({error})") from error
    if grid.header is not None:
        header["pixdim"][:4] = grid.header["pixdim"][:4]
    header["vox_offset"], header["magic"] = DATA_OFFSET, header.single_magic
    header.set_slope_inter(slope, 0)
    return header


def write_stream(
    path: Path, header: nib.Nifti1Header, slabs: Iterable[np.ndarray], verify: bool = True
) -> tuple[int, int, int]:
    """Header and slabs to a file, by isal at level 1 if it ends in .gz.

    Returns the number of slices, the CRC-32 of their voxels (to `verify` them) and of the file.
    """
    dtype, depth, checksum = header.get_data_dtype(), 0, 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(SummedFile(path))
        stream: io.BufferedIOBase = file
        if path.suffix == ".gz":  # no name and no time in the file
            stream = stack.enter_context(igzip.IGzipFile("", "wb", 1, stream, mtime=0))
        stream.write(header.binaryblock.ljust(DATA_OFFSET, b"\0"))
        for slab in slabs:
            if slab.shape[:2] != header.get_data_shape()[:2] or slab.dtype != dtype:
                raise ValueError(f"slab must be {header.get_data_shape()[:2]} of {dtype}")
            for plane in np.moveaxis(slab, 2, 0):
                content = plane.tobytes(order="F")
                checksum = isal_zlib.crc32(content, checksum) if verify else 0
                stream.write(content)
            depth += slab.shape[2]
    return depth, checksum, file.crc32
