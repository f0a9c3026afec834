"""`Volume`: voxels and where they lie in the patient; the only reader and writer of volume files.

NIfTI, Analyze pairs, .mha/.mhd and .nrrd/.nhdr are read here, DICOM in `data.dicom`; whether a file
is what it should be (a scan, a label map of that scan) is asked at the door, `data.cases`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from utilities import InputError, atomic_write

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
SPACING_RANGE_MM = (0.05, 50.0)  # of a scan of a person; outside, the unit is not millimetres
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS mm ↔ LPS mm, as ITK and DICOM have them
RAS = np.array([[0, 1], [1, 1], [2, 1]])  # orientation whose axes run to R, A, S
SLAB = 16  # slices that are read at a time
UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units & 7: unknown, metre, mm, micron
# What says where a NIfTI's voxels lie. Nothing else of a header is written again: descriptions,
# names and extensions may hold what identifies a patient.
GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D array of numbers, in memory or still in its file, and its place in the patient.

    Raises InputError when it is not 3D, holds no numbers, or its affine does not say where voxels
    lie. Voxels that are not finite are refused where they are read: no caller meets one.
    """

    data: Any  # (X, Y, Z): an array, or nibabel's proxy of one that is read when asked for
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
        depth = self.shape[2]
        with self._reader() as read:
            if not nib.is_proxy(self.data):
                return read(0, depth)
            part = read(0, min(SLAB, depth))
            array = np.empty(self.shape, part.dtype, order="F")
            array[:, :, : part.shape[2]] = part
            for first in range(SLAB, depth, SLAB):
                array[:, :, first : first + SLAB] = read(first, min(first + SLAB, depth))
        return array

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
            slab, end = None, 0
            for first, last in stored:
                fresh = read(max(first, end), last)
                kept = end - first  # slices shared with the slab before
                slab = np.concatenate([slab[:, :, -kept:], fresh], axis=2) if kept > 0 else fresh
                end = last
                yield (depth - last if flipped else first), apply_orientation(slab, orientation)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Callable[[int, int], np.ndarray]]:
        """Yield `read(first, last)` → voxels (X, Y, first:last) along the last stored axis.

        A compressed file is decompressed by isal (3 times as fast as zlib) as far as it is read,
        and once only as long as `first` ascends.
        """
        if not nib.is_proxy(self.data):
            yield lambda first, last: self._finished(self.data[:, :, first:last], first)
            return
        proxy, data_file = self.data, str(self.data.file_like)
        open_file = igzip.open if data_file.lower().endswith(".gz") else io.FileIO
        with open_file(data_file) as stream:
            kind = (self.shape, proxy.dtype, proxy.offset)
            stored = nib.arrayproxy.ArrayProxy(stream, kind, mmap=False)

            def read(first: int, last: int) -> np.ndarray:
                try:
                    array = stored[:, :, first:last]
                    if last == self.shape[2]:
                        stream.read(1)  # past the last voxel: the checksum of a .gz is verified
                except (OSError, EOFError, ValueError, igzip.isal_zlib.error) as error:
                    raise InputError(
                        f"{self.name}: its voxels cannot be read ({error}); the file is cut off or "
                        "damaged, download or convert it again"
                    ) from error
                if (proxy.slope, proxy.inter) != (1, 0):
                    array = array.astype(np.float32) * np.float32(proxy.slope)
                    array += np.float32(proxy.inter)
                return self._finished(array, first)

            yield read

    def _finished(self, array: np.ndarray, first: int) -> np.ndarray:
        """Voxels as callers get them: native byte order, finite, converted."""
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
            raise InputError(
                f"{self.name}: {np.count_nonzero(~finite)} voxels are NaN or infinite in the "
                f"stored slices {first + 1} to {first + array.shape[2]}; every voxel needs a "
                "number, convert it again",
                kind="nan",
            )
        return self.convert(array) if self.convert else array

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
        """NIfTI-1 image with the form codes and the unit of the file the grid came from.

        `slope`: what readers multiply the stored numbers with.
        """
        header, affine = None, self.affine
        if self.header is not None:
            header = nib.Nifti1Header()
            for key in GEOMETRY_FIELDS:
                header[key] = self.header[key]
            affine = nib.Nifti1Header.from_header(self.header, check=False).get_best_affine()
        array = self.read()
        image = nib.Nifti1Image(array, affine, header, dtype=array.dtype)
        if header is None:
            image.header.set_xyzt_units("mm")
        image.header.set_slope_inter(slope, 0)
        return image

    def write(self, path: Path, slope: float = 1.0) -> int:
        """Write `.nii` or `.nii.gz` (isal, level 1) whole or not at all; same voxels, same bytes.

        Returns the CRC-32 of the file, taken while it is written.
        """
        image = self.to_nibabel(slope)
        with atomic_write(path) as temporary, _SummedFile(io.FileIO(temporary, "w")) as stream:
            if path.suffix == ".gz":  # no name and no time in the file
                with igzip.IGzipFile("", "wb", 1, stream, mtime=0) as compressed:
                    image.to_stream(compressed)
            else:
                image.to_stream(stream)
        return stream.crc32

    def write_checked(self, path: Path, slope: float = 1.0) -> None:
        """`write`, and read back: the file lies on exactly this grid and holds these voxels."""
        with atomic_write(path) as temporary:
            self.write(temporary, slope)
            written, expected = read_file(temporary), self.read()
            expected = expected if slope == 1 else expected * np.float32(slope)
            same = {
                "shape": written.shape == self.shape,
                "affine": np.allclose(written.affine, self.affine, rtol=0, atol=1e-4),
                "qform and sform codes": self.header is None
                or form_codes(written) == form_codes(self),
                "voxels": np.array_equal(written.read(), expected),
            }
            wrong = [name for name, equal in same.items() if not equal]
            if wrong:
                raise InputError(f"{path}: {', '.join(wrong)} changed in writing; nothing was kept")


class _SummedFile(io.BufferedWriter):
    """A new file that is written from front to back, and the CRC-32 of what went into it."""

    crc32 = 0

    def write(self, data: Any) -> int:
        self.crc32 = igzip.isal_zlib.crc32(data, self.crc32)
        return super().write(data)


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

    Of NIfTI and Analyze the header only; voxels are read when asked for, whole or in slabs.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    if not has_suffix(path, VOLUME_SUFFIXES):
        raise InputError(
            f"{path}: the ending must be one of {', '.join(VOLUME_SUFFIXES)}, got "
            f"{''.join(path.suffixes[-2:]) or 'none'}; unpack or convert it first"
        )
    return _read_itk(path) if has_suffix(path, ITK_SUFFIXES) else _read_nifti(path)


def _read_nifti(path: Path) -> Volume:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    if zipped != has_suffix(path, (".gz",)):
        found, wanted = ("is", path.name + ".gz") if zipped else ("is not", path.name[:-3])
        raise InputError(f"{path}: its content {found} gzip, against its name; rename it {wanted}")
    try:
        image = nib.load(path)
        affine, data_file = image.affine, Path(image.file_map["image"].filename or path)
    except Exception as error:  # nibabel raises whatever a damaged header leads it to
        raise InputError(
            f"{path}: not a readable NIfTI volume ({error}); download or convert it again"
        ) from error
    if not data_file.exists():
        raise InputError(f"{path}: header without voxels, {data_file.name} is missing; get both")
    proxy, header, oriented = image.dataobj, None, False
    if isinstance(image.header, nib.Nifti1Header):
        header = image.header
        affine = np.diag([*[UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)] * 3, 1]) @ affine
        oriented = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0
    if len(image.shape) > 3 and set(image.shape[3:]) == {1}:
        proxy = proxy.reshape(image.shape[:3])  # still unread after this
    _refuse_impossible_size(path, data_file, proxy)
    return Volume(proxy, affine, str(path), header, oriented)


def _refuse_impossible_size(path: Path, data_file: Path, proxy: Any) -> None:
    """A damaged header must not make us allocate what the file cannot hold."""
    needed = int(np.prod([int(size) for size in proxy.shape], dtype=object)) * proxy.dtype.itemsize
    gzip_limit = 1032  # no gzip stream is smaller than this fraction of its content
    room = data_file.stat().st_size * (gzip_limit if has_suffix(data_file, (".gz",)) else 1)
    if needed + max(int(proxy.offset), 0) > room:
        raise InputError(
            f"{path}: its voxels cannot be read (its header announces {needed} bytes, more than "
            f"{data_file.name} can hold); the file is cut off or damaged, download or convert it "
            "again"
        )


def _read_itk(path: Path) -> Volume:
    import SimpleITK

    try:
        itk = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{path}: cannot be read ({reason}); download or convert it again"
        ) from error
    array = SimpleITK.GetArrayFromImage(itk).T  # ITK's last axis is x
    if itk.GetDimension() != 3 or array.ndim != 3:
        raise InputError(
            f"{path}: must be one 3D volume, got shape {array.shape}; convert it first"
        )
    columns = np.reshape(itk.GetDirection(), (3, 3)) * itk.GetSpacing()
    return Volume(array, TO_LPS @ nib.affines.from_matvec(columns, itk.GetOrigin()), str(path))


# ---------------------------------------------------------------------------------------
# Ranges and boxes
# ---------------------------------------------------------------------------------------


def list_slabs(depth: int, step: int, reach_back: bool = False) -> list[tuple[int, int]]:
    """(first, last) of consecutive slabs of `step` slices.

    With `reach_back` the last one reaches back over its neighbour to be full.
    """
    if reach_back:
        firsts = [max(0, min(first, depth - step)) for first in range(0, depth, step)]
        return [(first, min(first + step, depth)) for first in firsts]
    return [(first, min(first + step, depth)) for first in range(0, depth, step)]


def find_bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box around what is True; of no voxels where nothing is."""
    box = [slice(0, size) for size in mask.shape]
    for axis in reversed(range(mask.ndim)):  # each axis looks at what the ones before left
        others = tuple(other for other in range(mask.ndim) if other != axis)
        used = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box[axis] = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
    return tuple(box)
