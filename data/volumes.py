"""`Volume`: voxels and where they lie in the patient; the only reader and writer of volume files.

Headers are read in `data.nifti_files` and `data.itk_files`, DICOM in `data.dicom`; whether a file
is what it should be (a scan, a label map of that scan) is asked at the door, `data.cases`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import isal_zlib
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from data.files import InputError, atomic_write
from data.itk_files import read_itk
from data.nifti_files import NIFTI_SUFFIXES, find_pair, make_header, read_nifti, write_stream
from data.voxel_files import StoredVoxels, allocate, make_native

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


def list_data_files(path: Path) -> list[Path]:
    """Every file that `read_file` reads for a path: the header, and the voxels where they are
    another file. Raises InputError where there is no sound header."""
    if has_suffix(path, ITK_SUFFIXES):
        return list(dict.fromkeys([path, read_itk(path).voxels.file]))
    if not has_suffix(path, NIFTI_SUFFIXES):
        return [path]
    head, data = find_pair(path)
    matrix = head.with_suffix(".mat")  # SPM's affine, beside an Analyze pair
    return list(dict.fromkeys([head, data, *[matrix] * (head != data and matrix.is_file())]))


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
