"""`Volume`: voxels and where they lie in the patient; the only reader and writer of volume files.

Headers are read in `data.nifti_files` and `data.itk_files`, DICOM in `data.dicom`; whether a file
is what it should be (a scan, a label map of that scan) is asked at the door, `data.cases`.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, TypeVar

import nibabel as nib
import numpy as np
from isal import igzip, igzip_lib, isal_zlib
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage

from data.files import InputError, atomic_write


def name_case(path: Path) -> str:
    """`liver_3` for `…/liver_3.nii.gz`; the folder's own name for a DICOM folder."""
    name = path.name
    known = [s for s in (*VOLUME_SUFFIXES, ".dcm") if name.lower().endswith(s)]
    return name[: len(name) - len(max(known, key=len, default=""))]


def keep_volumes(files: Sequence[Path]) -> list[Path]:
    """The volume files among some, a header and its voxels once."""
    there = {str(file).lower() for file in files}

    def is_voxels(file: Path) -> bool:
        head, _, end = str(file).lower().rpartition(".img")
        return end in ("", ".gz") and any(f"{head}.hdr{e}" in there for e in ("", ".gz"))

    volumes = [file for file in files if has_suffix(file, VOLUME_SUFFIXES)]
    return [f for f in volumes if not (".img" in f.name.lower() and is_voxels(f))]


def list_pair(path: Path) -> list[Path]:
    """Header and voxels of an Analyze or NIfTI pair, whichever of them was named."""
    stem, kind, packed = re.split(r"(hdr|img)", path.name, flags=re.IGNORECASE)[-3:]
    stem = path.name[: len(path.name) - len(kind + packed)]
    header, voxels = ("HDR", "IMG") if kind.isupper() else ("hdr", "img")
    others = [f"{stem}{one}{end}" for one in (header, voxels) for end in ("", ".gz", ".GZ")]
    found = [path, *(path.with_name(n) for n in others if n != path.name)]
    return [file for file in found if file == path or file.is_file()]


def list_data_files(header: Path) -> list[Path]:
    """Files that hold the voxels of a .mhd or .nhdr, as its text names them."""
    text = header.read_bytes()[: 1 << 20].decode("latin-1")
    found = re.search(
        r"^\s*(?:ElementDataFile\s*=|data ?file\s*:)\s*(.*?)\s*$",
        text,
        re.MULTILINE | re.IGNORECASE,
    )
    if found is None or found[1].upper() == "LOCAL":
        return []
    names = [found[1]]
    if found[1].upper().startswith("LIST"):
        names = [line.strip() for line in text[found.end() :].splitlines() if line.strip()]
    elif pattern := re.fullmatch(r"(\S*%\d*d\S*)((?:\s+-?\d+)*)", found[1]):
        first, last, step = [*map(int, pattern[2].split()), 1, 1, 1][:3]
        names = [pattern[1] % number for number in range(first, last + 1, max(step, 1))]
    return [file for name in names if (file := header.parent / name).is_file()]


BODY_HU = -500  # between lung and fat


def find_body(scan: Volume) -> Box:
    """In-plane box of the patient in a CT (RAS voxels), without table and air: around the largest
    thing denser than lung, looked at every 3 mm, along z every 5 mm. All where there is none."""
    sizes = scan.ras.spacing_mm
    x, y, z = (max(1, round(mm / size)) for mm, size in zip((3, 3, 5), sizes, strict=True))
    slabs = scan.slabs([(first, first + 1) for first in range(0, scan.ras_shape[2], z)])
    body = np.concatenate([slab[::x, ::y] > BODY_HU for _, slab in slabs], axis=2)
    solid = ndimage.binary_opening(body, np.ones((3, 3, 1)))  # a table is thin, or hangs on thin
    pieces, number = ndimage.label(solid)
    sides = scan.ras_shape[:2]
    if not number:
        return tuple(slice(0, side) for side in sides)
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    box = zip(find_bounding_box(pieces == largest), (x, y), sides, strict=False)  # not along z
    return tuple(
        slice(max(part.start - 1, 0) * step, min((part.stop + 1) * step, side))
        for part, step, side in box
    )


BEST_RATIO = 1032  # no deflate stream is smaller than this fraction of its content
CHUNK = 2**20
# isal's types call its errors instances, not classes
DAMAGE: Any = (OSError, EOFError, ValueError, zlib.error, isal_zlib.error, igzip_lib.error)
Stream = io.RawIOBase | io.BufferedIOBase
Found = TypeVar("Found")
AGAIN = "the file is cut off or damaged, download or convert it again"


@dataclass(frozen=True, eq=False)
class StoredVoxels:
    """Voxels of `shape` (X, Y, Z), x fastest, in `file`, which must not change until they are read.

    Raises InputError, when it is made, where the file cannot hold what the header announces.
    """

    name: str  # for messages: the header's path
    file: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    codec: Literal["raw", "gzip", "zlib"] = "raw"
    start: int = 0  # byte of the file at which the stream begins
    stop: int | None = None  # byte behind it; None: the end of the file
    offset: int = 0  # byte of the (decompressed) stream at which the voxels begin
    slope: float = 1.0  # value = stored number × slope + inter
    inter: float = 0.0
    stamp: tuple[int, int] = field(init=False)  # size and time of change, as the header was read

    is_proxy = True  # for nibabel

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise InputError(
                f"{self.name}: header without voxels, {self.file.name} is missing; get both"
            )
        object.__setattr__(self, "stamp", _stamp(self.file))
        size = self.stamp[0]
        held = min(size if self.stop is None else self.stop, size) - self.start
        room = held * (1 if self.codec == "raw" else BEST_RATIO)
        if min(self.start, self.offset) < 0 or self.offset + self.nbytes > room:
            raise InputError(
                f"{self.name}: its voxels cannot be read (its header announces {self.nbytes} "
                f"bytes, more than {self.file.name} can hold); {AGAIN}"
            )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def plane_bytes(self) -> int:
        """Bytes of one slice of the last axis."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.plane_bytes * self.shape[2]

    @contextlib.contextmanager
    def open(self, scaled: bool = True) -> Iterator[Callable[[int, int], np.ndarray]]:
        """Yield `read(first, last)` → values (X, Y, first:last), the file read once as long as
        `first` ascends: float32 where the header rescales them, unless not `scaled`.

        Raises InputError where the file is gone, was changed since its header was read, is cut off,
        fails its checksum, goes on behind the last voxel, or holds what is no number.
        """
        with contextlib.ExitStack() as stack, np.errstate(over="ignore", invalid="ignore"):
            stream = self._guard(lambda: self._open_stream(stack))
            slope, inter = np.float32(self.slope), np.float32(self.inter)

            def read(first: int, last: int) -> np.ndarray:
                array = self._guard(lambda: self._read(stream, first, last))
                if scaled and (slope, inter) != (1, 0):
                    array = array.astype(np.float32) * slope
                    array += inter
                return make_native(array, self.name, first) if scaled else array

            yield read

    def _guard(self, work: Callable[[], Found]) -> Found:
        try:
            return work()
        except InputError:
            raise
        except DAMAGE as error:
            raise InputError(
                f"{self.name}: its voxels cannot be read ({error}); {AGAIN}"
            ) from error

    def _open_stream(self, stack: contextlib.ExitStack) -> Stream:
        if _stamp(self.file) != self.stamp:
            raise InputError(
                f"{self.name}: {self.file.name} was changed while it was read; start again once "
                "nobody writes it"
            )
        file = stack.enter_context(self.file.open("rb", buffering=0))
        if self.codec == "raw":
            return file
        file.seek(self.start)
        if self.codec == "gzip":  # by isal: 3 times as fast as zlib
            return stack.enter_context(igzip.IGzipFile(fileobj=file, mode="rb"))
        return _ZlibStream(file, None if self.stop is None else self.stop - self.start)

    def _read(self, stream: Stream, first: int, last: int) -> np.ndarray:
        begin = self.offset + (self.start if self.codec == "raw" else 0)
        stream.seek(begin + first * self.plane_bytes)
        raw = self._read_bytes(stream, (last - first) * self.plane_bytes)
        if (found := len(raw)) < (last - first) * self.plane_bytes:
            missing = (self.shape[2] - first) * self.plane_bytes - found
            raise EOFError(f"{missing} of {self.nbytes} bytes are missing")
        if last == self.shape[2]:
            self._refuse_rest(stream)
        return raw.view(self.dtype).reshape((*self.shape[:2], last - first), order="F")

    def _read_bytes(self, stream: Stream, count: int) -> np.ndarray:
        """The next `count` bytes, or as many as there are; a part may be read-only."""
        if self.codec == "gzip" and count < self.nbytes:
            with contextlib.suppress(MemoryError):  # `allocate` tells
                return np.frombuffer(stream.read(count), np.uint8)
        raw, done = allocate((count,), np.uint8, self.name), 0
        view = raw.data
        while done < count and (more := stream.readinto(view[done : done + CHUNK])):
            done += more
        return raw[:done]

    def _refuse_rest(self, stream: Stream) -> None:
        """Read on behind the last voxel: only zeros may follow, and then the checksum."""
        while rest := stream.read(CHUNK):
            if rest.strip(b"\0"):
                raise ValueError(
                    f"the file goes on behind the {self.nbytes} bytes that its header announces"
                )


def make_native(array: np.ndarray, name: str, first: int = 0) -> np.ndarray:
    """Voxels in this machine's byte order; `first`: the slice at which they begin.

    Raises InputError of kind "nan" for what is no number: nobody is ever given one.
    """
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        raise InputError(
            f"{name}: {np.count_nonzero(~finite)} voxels are NaN or infinite in the stored slices "
            f"{first + 1} to {first + array.shape[2]}; every voxel needs a number, convert "
            "it again",
            kind="nan",
        )
    return array


def allocate(shape: tuple[int, ...], dtype: Any, name: str) -> np.ndarray:
    """An array without content, first axis fastest. Raises InputError where memory is short."""
    try:
        return np.empty(shape, dtype, order="F")
    except (MemoryError, ValueError) as error:  # ValueError: more than any machine has
        raise InputError(
            f"{name}: its voxels {shape} do not fit into the memory; free some, or crop or "
            "resample the volume first"
        ) from error


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file}: no such file any more ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns


class _ZlibStream(io.RawIOBase):
    """A zlib (or gzip) stream of `length` bytes of a file; reads forwards, seeks backwards anew."""

    def __init__(self, file: io.RawIOBase, length: int | None):
        self.file, self.start, self.length = file, file.tell(), length
        self._rewind()

    def _rewind(self) -> None:
        self.file.seek(self.start)
        self.left = self.length if self.length is not None else 2**63
        self.inflate, self.position = zlib.decompressobj(47), 0  # 47: the stream says which

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, target: int, whence: int = 0) -> int:
        if target < self.position:
            self._rewind()
        while self.position < target and self.read(min(CHUNK, target - self.position)):
            pass
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted, part = len(buffer), b""
        while not part and not self.inflate.eof:
            given = self.inflate.unconsumed_tail or self.file.read(min(CHUNK, self.left))
            if not self.inflate.unconsumed_tail:
                self.left -= len(given)
            part = self.inflate.decompress(given, wanted)
            if not given and not part:
                raise EOFError("the compressed stream ends early")
        if not part and (self.inflate.unused_data or (self.length and self.left)):
            raise ValueError("the compressed stream is shorter than its header announces")
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


class SummedFile(io.BufferedWriter):
    """A new file that is written from front to back, and the CRC-32 of what went into it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.crc32 = 0

    def write(self, data: Any) -> int:
        self.crc32 = isal_zlib.crc32(data, self.crc32)
        return super().write(data)


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


Box = tuple[slice, ...]  # a part of a volume: first voxel and the one behind the last, by axis


def find_bounding_box(mask: np.ndarray) -> Box:
    """Smallest box around what is not 0; of no voxels where nothing is."""
    box = [slice(0, size) for size in mask.shape]
    for axis in reversed(range(mask.ndim)):  # each axis looks at what the ones before left
        others = tuple(other for other in range(mask.ndim) if other != axis)
        part = mask[tuple(box)]
        turned = tuple(other for other in others if part.strides[other] < 0)
        # read in the order in which it is stored: 10 times faster
        used = np.flatnonzero(np.flip(part, turned).any(axis=others))
        box[axis] = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
    return tuple(box)


def enclose(*boxes: Box) -> Box:
    """Smallest box around some boxes; those of no voxels are left out."""
    full = [box for box in boxes if all(part.stop > part.start for part in box)] or boxes[:1]
    return tuple(
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*full, strict=True)
    )


ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
AIR_HU = -1024  # what lies outside a scan
SPACING_RANGE_MM = (0.05, 50.0)  # of a scan of a person; outside, the unit is not millimetres
FARTHEST_MM = 1e5  # of the first voxel from the origin; beyond, float32 loses the voxels' places
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS mm ↔ LPS mm, as ITK and DICOM have them
RAS = np.array([[0, 1], [1, 1], [2, 1]])  # orientation whose axes run to R, A, S
SLAB = 16  # slices that are read, resampled or written at a time: what stays in the cache


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D array of numbers, in memory or still in its file, and its place in the patient.

    Raises InputError when it is not 3D, holds no numbers, or its affine does not say where voxels
    lie. Voxels that are not finite are refused where they are read: no caller meets one.
    """

    data: Any  # (X, Y, Z): an array, or `StoredVoxels`, which are read when asked for
    affine: np.ndarray  # 4×4, voxel index → patient millimetres, RAS+
    name: str = "volume"  # for messages: the path it was read from
    header: nib.Nifti1Header | None = None  # forms of the file whose grid this is; None: our own
    oriented: bool = True  # False where the file does not say how its axes lie (form codes 0)
    notes: tuple[str, ...] = ()  # what reading left out, corrected or doubts
    files: tuple[Path, ...] = ()  # of a DICOM series, in the order of its slices
    classes: dict[str, int] = field(default_factory=dict)  # of a label map: name → value in it
    convert: Callable[[np.ndarray], np.ndarray] | None = None  # of each slab, as it is read

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or 0 in self.shape:
            raise InputError(
                f"{self.name}: must be one 3D volume, got shape {self.shape}; split or convert it "
                "first"
            )
        if self.data.dtype.kind not in "iuf":
            raise InputError(
                f"{self.name}: must hold numbers, got voxels of type {self.data.dtype}; convert "
                "colours or complex values to one number per voxel"
            )
        if np.shape(self.affine) != (4, 4) or not is_invertible(self.affine):
            raise InputError(
                f"{self.name}: its affine says not where the voxels lie "
                f"({np.asarray(self.affine).tolist()}); export it again with its geometry"
            )
        if np.abs(self.affine[:3, 3]).max() > FARTHEST_MM:
            raise InputError(
                f"{self.name}: its first voxel must lie within {FARTHEST_MM:g} mm of the origin, "
                f"got {self.affine[:3, 3].tolist()}; correct the header"
            )
        low, high = SPACING_RANGE_MM
        if not low <= min(self.spacing_mm) <= max(self.spacing_mm) <= high:
            steps = " × ".join(f"{step:g}" for step in self.spacing_mm)
            raise InputError(
                f"{self.name}: spacing must be {low:g} to {high:g} mm, got {steps} mm; correct the "
                "header's spacing and its unit"
            )

    # -- grid

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis, as stored."""
        return tuple(int(size) for size in self.data.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the voxels as the file stores them."""
        return self.data.dtype

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of each voxel axis in mm, in the order of the array's axes."""
        x, y, z = (float(length) for length in nib.affines.voxel_sizes(self.affine))
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel: |determinant of the affine|, which holds for sheared grids too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @cached_property
    def orientation(self) -> np.ndarray:
        """(3, 2): which patient axis each array axis follows, and its direction, as in nibabel."""
        return io_orientation(self.affine)

    @property
    def axcodes(self) -> str:
        """Where the array's axes run: "RAS", "LPS", …"""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """Shape that the volume has once its axes run R, A, S."""
        x, y, z = (self.shape[axis] for axis in np.argsort(self.orientation[:, 0]))
        return x, y, z

    @cached_property
    def ras_affine(self) -> np.ndarray:
        """Affine that the volume has once its axes run R, A, S."""
        return self.affine @ inv_ornt_aff(self.orientation, self.shape)

    # -- voxels

    def read(self) -> np.ndarray:
        """All voxels (X, Y, Z) as stored; float32 where the header rescales them."""
        if not isinstance(self.data, StoredVoxels):
            held = make_native(self.data, self.name)
            return self.convert(held) if self.convert else held
        array: np.ndarray | None = None
        for first, part in self.stored_slabs():
            if array is None:
                array = allocate(self.shape, part.dtype, self.name)
            array[:, :, first : first + part.shape[2]] = part
        assert array is not None  # every volume has slices
        return array

    def stored_slabs(self, step: int = SLAB) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, array (X, Y, step)) in the stored axes, along the last of them."""
        with self._reader() as read:
            for first, last in list_slabs(self.shape[2], step):
                yield first, read(first, last)

    @cached_property
    def ras(self) -> Volume:
        """The volume in memory, axes nearest to R, A, S; every voxel keeps its place."""
        array = apply_orientation(self.read(), self.orientation)  # a view
        return replace(self, data=array, affine=self.ras_affine, header=None, convert=None)

    def slabs(self, wanted: Iterable[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, RAS array (X, Y, last − first)) for RAS slice ranges, each read once.

        The ranges come in the order in which the file stores them, so that a compressed axial file
        is decompressed once while only one slab is in memory; other files are read whole.
        """
        orientation, depth = self.orientation, self.shape[2]
        if orientation[2, 0] != 2:  # the last stored axis does not run feet to head
            array = self.ras.data
            yield from ((first, array[:, :, first:last]) for first, last in wanted)
            return
        flipped = orientation[2, 1] < 0
        stored = sorted((depth - b, depth - a) if flipped else (a, b) for a, b in wanted)
        with self._reader() as read:
            slab: np.ndarray = np.empty(0)
            end = 0
            for first, last in stored:
                fresh = read(max(first, end), last)
                kept = end - first  # slices shared with the slab before
                slab = np.concatenate([slab[:, :, -kept:], fresh], axis=2) if kept > 0 else fresh
                end = last
                yield (depth - last if flipped else first), apply_orientation(slab, orientation)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Callable[[int, int], np.ndarray]]:
        """Yield `read(first, last)` → voxels (X, Y, first:last) along the last stored axis."""
        convert = self.convert
        if not isinstance(self.data, StoredVoxels):
            array = make_native(self.data, self.name)
            yield lambda a, b: convert(array[:, :, a:b]) if convert else array[:, :, a:b]
            return
        with self.data.open() as read:
            yield (lambda a, b: convert(read(a, b))) if convert else read

    # -- other volumes on this grid

    def like(self, array: np.ndarray) -> Volume:
        """`array`, in the stored axes, on exactly this grid: shape, affine, form codes."""
        if array.shape != self.shape:
            raise ValueError(f"array must have the grid's shape {self.shape}, got {array.shape}")
        return replace(self, data=array, notes=(), files=(), classes={}, convert=None)

    def from_ras(self, array: np.ndarray) -> Volume:
        """`array`, whose axes run R, A, S, on exactly this grid, in its own axes."""
        turn = ornt_transform(RAS, self.orientation)
        return self.like(np.asfortranarray(apply_orientation(array, turn)))

    def crop(self, box: Sequence[slice]) -> Volume:
        """The part in `box` (a slice with bounds and step, or `slice(None)`, per axis)."""
        bounds = [part.indices(size) for part, size in zip(box, self.shape, strict=True)]
        corner, steps = [b[0] for b in bounds], np.diag([b[2] for b in bounds])
        moved = self.affine @ nib.affines.from_matvec(steps, corner)
        return replace(self, data=self.read()[tuple(box)], affine=moved, header=None, convert=None)

    def to_nibabel(self, slope: float = 1.0) -> nib.Nifti1Image:
        """NIfTI-1 image on this grid; `slope`: what readers multiply the stored numbers with."""
        array = self.read()
        header = make_header(self, array.dtype, slope)
        image = nib.Nifti1Image(array, header.get_best_affine(), header, dtype=array.dtype)
        image.header.set_slope_inter(slope, 0)
        return image

    def write(self, path: Path, slope: float = 1.0) -> int:
        """Write `.nii` or `.nii.gz` whole or not at all; same voxels give same bytes.

        Returns the CRC-32 of the file, taken while it is written.
        """
        array = self.read()
        with atomic_write(path) as temporary:
            header = make_header(self, array.dtype, slope)
            return write_stream(temporary, header, [array], verify=False)[2]

    def write_checked(self, path: Path, slope: float = 1.0) -> None:
        """`write`, and read back: the file lies on exactly this grid and holds these voxels."""
        array = self.read()
        write_slabs(path, self, array.dtype, [array], slope)


def write_slabs(
    path: Path, grid: Volume, dtype: Any, slabs: Iterable[np.ndarray], slope: float = 1.0
) -> None:
    """Write slabs (X, Y, any) in the stored axes of `grid`, first to last, as one volume on it.

    Only one slab is in memory. The file is read back: it lies on exactly this grid, with the same
    form codes, and holds these voxels (by checksum). Raises InputError, and leaves no file, if not.
    """
    dtype = np.dtype(dtype).newbyteorder("=")
    with atomic_write(path) as temporary:
        header = make_header(grid, dtype, slope)
        depth, checksum, _ = write_stream(temporary, header, slabs)
        if depth != grid.shape[2]:
            raise ValueError(f"slabs must hold the grid's {grid.shape[2]} slices, got {depth}")
        written, found = read_file(temporary), 0
        with written.data.open(scaled=False) as read:
            for first, last in list_slabs(written.shape[2], SLAB):
                found = isal_zlib.crc32(read(first, last).ravel(order="F").view(np.uint8), found)
        stored_slope = written.data.slope, written.data.inter
        same = {
            "shape": written.shape == grid.shape,
            "affine": np.allclose(written.affine, grid.affine, rtol=0, atol=1e-4),
            "qform and sform codes": grid.header is None or form_codes(written) == form_codes(grid),
            "voxels": written.dtype == dtype and found == checksum,
            "slope": stored_slope == (np.float32(slope), 0),
        }
        wrong = [name for name, equal in same.items() if not equal]
        if wrong:
            raise InputError(f"{path}: {', '.join(wrong)} changed in writing; nothing was kept")


def form_codes(volume: Volume) -> tuple[int, int]:
    """qform and sform code of the file that a volume's grid came from."""
    if volume.header is None:
        return (0, 0)
    return int(volume.header["qform_code"]), int(volume.header["sform_code"])


def is_invertible(affine: np.ndarray) -> bool:
    """Whether an affine says where voxels lie: finite, and no axis without length or direction."""
    matrix = np.asarray(affine, float)
    if not np.isfinite(matrix).all() or not np.allclose(matrix[3], [0, 0, 0, 1]):
        return False
    if np.abs(matrix).max() > 1e100:  # whose squares have no number
        return False
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    return bool((lengths > 0).all()) and abs(np.linalg.det(matrix[:3, :3] / lengths)) > 1e-3


# ---------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------


def has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file's name ends so, in capitals or not."""
    return path.name.lower().endswith(tuple(suffixes))


def read_file(path: Path) -> Volume:
    """Read a NIfTI, Analyze, MetaImage or NRRD file. Raises InputError for anything else.

    Only the header: voxels are read, and verified, when they are asked for, whole or in slabs.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    if not has_suffix(path, VOLUME_SUFFIXES):
        raise InputError(
            f"{path}: the ending must be one of {', '.join(VOLUME_SUFFIXES)}, got "
            f"{''.join(path.suffixes[-2:]) or 'none'}; unpack or convert it first"
        )
    if has_suffix(path, ITK_SUFFIXES):
        itk = read_itk(path)
        affine = TO_LPS @ itk.affine
        return Volume(itk.voxels, affine, str(path), None, itk.oriented, tuple(itk.notes))
    nifti = read_nifti(path)
    return Volume(nifti.voxels, nifti.affine, str(path), nifti.header, nifti.oriented, nifti.notes)


def list_slabs(depth: int, step: int, reach_back: bool = False) -> list[tuple[int, int]]:
    """(first, last) of consecutive slabs of `step` slices.

    With `reach_back` the last one reaches back over its neighbour to be full.
    """
    if reach_back:
        firsts = [max(0, min(first, depth - step)) for first in range(0, depth, step)]
        return [(first, min(first + step, depth)) for first in firsts]
    return [(first, min(first + step, depth)) for first in range(0, depth, step)]


# ---------------------------------------------------------------------------------------
# Masked volumes
# ---------------------------------------------------------------------------------------


def mask_scan(scan: np.ndarray, label: np.ndarray, background: int) -> np.ndarray:
    """HU (X, Y, Z) where the label is not 0, and `background` elsewhere; a type that holds both."""
    array = scan.astype(np.result_type(scan.dtype, np.min_scalar_type(background)), order="K")
    np.copyto(array, array.dtype.type(background), where=label == 0)
    return array


def write_masked(scan: Volume, label: Volume, background: int, path: Path) -> None:
    """Write `mask_scan` of a scan and a label map on its grid, some slices at a time."""
    dtype = np.result_type(scan.dtype, np.min_scalar_type(background))
    masked = (
        mask_scan(scan.data[:, :, a:b], label.data[:, :, a:b], background)
        for a, b in list_slabs(scan.shape[2], SLAB)
    )
    write_slabs(path, scan, dtype, masked)
