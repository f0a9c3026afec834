"""The one door: which scans and label maps there are, and reading them; else one `InputError`.

Whoever needs a scan, a label map or a data set asks here: prepare, apply, evaluate, visualize.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nibabel.orientations import inv_ornt_aff

from data.dicom import is_dicom, is_dicom_input, read_seg, read_series
from data.labels import (
    Labels,
    describe_labels,
    index_classes,
    list_values,
)
from data.volumes import (
    VOLUME_SUFFIXES,
    Volume,
    has_suffix,
    read_file,
)
from utilities import InputError

GRID_TOLERANCE = 0.5  # voxels that scan and label map may lie apart, at the worst corner
GRID_NOTICE = 0.01  # voxels from which on it is told
ROUNDING = 0.01  # label values that are nearer to a whole number are that number
LABEL_WORDS = re.compile(r"label|seg|mask|truth|annot|outline", re.IGNORECASE)


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------


def read_volume(path: Path) -> Volume:
    """Any volume file or DICOM series. Raises InputError, and nothing else, when it cannot be."""
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    try:
        return read_series(path) if is_dicom_input(path) else read_file(path)
    except InputError:
        raise
    except Exception as error:  # a reader met what it was not made for
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged or of "
            "an unusual kind, convert it to .nii.gz"
        ) from error


def read_scan(path: Path) -> Volume:
    """A scan, as `read_volume`; refuses a DICOM SEG, which holds no scan."""
    return read_volume(path)


def read_label_map(
    path: Path,
    scan: Volume,
    declared: Labels,
    *,
    classes: Labels | None = None,
    trust_grid: bool = False,
) -> Volume:
    """The label map of `scan`, on its grid; its voxels are checked where they are read.

    Args:
        declared: label name → raw values that may occur; a SEG's segments are known by these names.
        classes: class name → raw values, to get class indices (uint8) instead of raw values.
        trust_grid: lay the label map on the scan voxel by voxel, whatever its header says, if the
            shapes agree.

    Raises InputError of the kinds "shape", "grid" (see `lay_on_grid`), "values" (a value that is
    not declared) and those of `read_volume`.
    """
    if path.is_dir():
        inside = [file for file in path.iterdir() if file.is_file() and is_dicom(file)]
        path = inside[0] if len(inside) == 1 else path
    if path.is_file() and is_dicom(path):
        label = read_seg(path, scan, declared)
    else:
        label = lay_on_grid(read_volume(path), scan, trust_grid)
    if label.dtype.kind == "f" or (label.header is not None and _is_scaled(label)):
        label = _round_values(label)
    allowed = {*list_values(declared), *label.classes.values(), 0}
    return replace(label, convert=_label_converter(str(path), allowed, declared, classes))


def _is_scaled(label: Volume) -> bool:
    slope, inter = (getattr(label.data, key, plain) for key, plain in (("slope", 1), ("inter", 0)))
    return (slope, inter) != (1, 0)


def _round_values(label: Volume) -> Volume:
    """A label map of floats in whole numbers, told in its notes; refused where they are none."""
    array = label.read()
    whole = np.rint(array)
    off = float(np.abs(array - whole).max())
    if off > ROUNDING:
        odd = np.unique(array[np.abs(array - whole) > ROUNDING])[:5].tolist()
        raise InputError(
            f"{label.name}: label values must be whole numbers, got {odd}; is this a scan, or a "
            "label map that was resampled? Export it again with nearest-neighbour interpolation",
            kind="values",
        )
    notes = [f"label values were up to {off:.2g} off whole numbers and are rounded"] * (off > 0)
    return replace(label, data=whole.astype(np.int32), notes=(*label.notes, *notes), convert=None)


def _label_converter(name: str, allowed: set[int], declared: Labels, classes: Labels | None):
    """What each slab of a label map goes through: no value that nobody declared gets past."""
    dense = max(allowed) + 1 == len(allowed)  # 0 … n: one comparison tells

    def convert(slab: np.ndarray) -> np.ndarray:
        if not slab.size:
            return slab
        low, high = slab.min(), slab.max()
        if low < 0 or high > max(allowed) or not (dense or low == high == 0):
            odd = sorted(set(np.unique(slab).tolist()) - allowed)
            if odd:
                raise InputError(
                    f"{name}: the label map holds {odd[:5]}, expected {describe_labels(declared)}; "
                    "correct it, or declare its values and their names",
                    kind="values",
                )
        return slab if classes is None else index_classes(slab, classes)

    return convert


# ---------------------------------------------------------------------------------------
# One rule for "on the same grid"
# ---------------------------------------------------------------------------------------


def lay_on_grid(label: Volume, scan: Volume, trust: bool = False) -> Volume:
    """`label` with the scan's own geometry, if both describe the same grid.

    They may be stored in different axes. At the worst corner they may lie GRID_TOLERANCE voxels
    apart. Where one of them does not say how its axes lie, nothing can be compared: refused, unless
    `trust` lays voxel on voxel. Raises InputError of kind "shape" or "grid".
    """
    if trust:
        if label.shape != scan.shape:
            raise _wrong_shape(label, scan)
        return _with_grid(label, scan.affine, scan)
    if label.oriented != scan.oriented:
        unknown = label if scan.oriented else scan
        raise InputError(
            f"{label.name}: {unknown.name} does not say how its axes lie (both form codes 0), "
            f"so it cannot be compared with {(scan if scan.oriented else label).name}; export it "
            "with its orientation, or lay the label map voxel on voxel: --trust-image-grid",
            kind="grid",
        )
    if label.shape == scan.shape:
        apart = _voxels_apart(label.affine, scan.affine, scan.shape)
        if apart <= GRID_TOLERANCE:
            return _with_grid(label, scan.affine, scan, apart)
    if label.ras_shape != scan.ras_shape:
        raise _wrong_shape(label, scan)
    apart = _voxels_apart(label.ras_affine, scan.ras_affine, scan.ras_shape)
    if apart > GRID_TOLERANCE:
        raise InputError(
            f"{label.name}: scan and label map lie up to {apart:.2g} voxels apart; use the label "
            "map of this scan, or lay it voxel on voxel: --trust-image-grid",
            kind="grid",
        )
    affine = scan.ras_affine @ np.linalg.inv(inv_ornt_aff(label.orientation, label.shape))
    return _with_grid(label, affine, scan, apart)


def _with_grid(label: Volume, affine: np.ndarray, scan: Volume, apart: float = 0.0) -> Volume:
    notes = list(label.notes)
    if apart > GRID_NOTICE:
        notes.append(f"scan and label map lie up to {apart:.2g} voxels apart")
    same = label.shape == scan.shape and np.array_equal(affine, scan.affine)
    header = scan.header if same else None
    return replace(label, affine=affine, header=header, oriented=scan.oriented, notes=tuple(notes))


def _voxels_apart(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    corners = np.array(np.meshgrid(*([0, n - 1] for n in shape), [1])).reshape(4, -1)
    return float(np.abs(np.linalg.inv(other) @ (one - other) @ corners).max())


def _wrong_shape(label: Volume, scan: Volume) -> InputError:
    return InputError(
        f"{label.name}: scan is {scan.shape}, label map is {label.shape} voxels; use the label map "
        "of this scan",
        kind="shape",
    )


# ---------------------------------------------------------------------------------------
# Names and bytes of inputs
# ---------------------------------------------------------------------------------------


def name_case(path: Path) -> str:
    """`liver_3` for `…/liver_3.nii.gz`; the folder's own name for a DICOM folder."""
    known = [s for s in (*VOLUME_SUFFIXES, ".dcm") if path.name.lower().endswith(s)]
    return path.name[: len(path.name) - len(max(known, key=len, default=""))]


def list_files(path: Path) -> list[Path]:
    """Every file that is read for a path: a header and its data, or the folder of a series."""
    if is_dicom_input(path):
        folder = path if path.is_dir() else path.parent
        return sorted(file for file in folder.iterdir() if file.is_file())
    pair = has_suffix(path, (".hdr", ".hdr.gz"))
    return [path, *(sorted(path.parent.glob(f"{name_case(path)}.img*")) if pair else [])]


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 of the content of some files."""
    together = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            together.update(hashlib.file_digest(stream, "sha256").digest())
    return together.hexdigest()


def hash_inputs(paths: Iterable[Path | None]) -> str:
    """SHA-256 of every byte that is read for some scans and label maps."""
    return hash_files(file for path in paths if path is not None for file in list_files(path))


# ---------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """One scan and its label map; None where one is missing."""

    name: str
    patient: str
    image: Path | None
    label: Path | None


def find_scans(path: Path) -> list[Path]:
    """The scans that a path stands for: a file, a DICOM series, or a folder of several."""
    if not path.is_dir():
        return [path]
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    files = [entry for entry in entries if entry.is_file()]
    if any(is_dicom(file) for file in files):
        return [path]
    headers = {file.name.replace(".img", ".hdr") for file in files if ".img" in file.suffixes}
    volumes = [f for f in files if has_suffix(f, VOLUME_SUFFIXES) and f.name not in headers]
    series = [
        folder
        for folder in entries
        if folder.is_dir() and any(is_dicom(file) for file in folder.iterdir() if file.is_file())
    ]
    if not volumes + series:
        raise InputError(
            f"{path}: holds no scan; expected {', '.join(VOLUME_SUFFIXES)} files or DICOM series"
        )
    return volumes + series
