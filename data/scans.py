"""Read a scan, read its label map on its grid, list the files that are read; or `InputError`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cc3d  # of uint8, see apply_model
import numpy as np
from nibabel.orientations import inv_ornt_aff

from data import dicom
from data.files import InputError, list_plain_files, natural, one_error, show_path, stamp_files
from data.labels import (
    IGNORED,
    Labels,
    Masks,
    as_labels,
    describe_labels,
    find_label,
    index_classes,
    list_values,
)
from data.seg import compare_frames, lay_structures, read_seg, rename_segments, wrong_grid
from data.volumes import AIR_HU, Volume, list_parts, read_file

GRID_TOLERANCE = 0.5  # voxels that scan and label map may lie apart, at the worst corner
GRID_NOTICE = 0.01  # voxels from which on a note reports it
MANY = 8  # values that a label map of many organs holds more than are named
ROUNDING = 0.01  # label values that are nearer to a whole number are that number
DENSEST_AIR, PADDING_SHARE = -500, 0.05  # HU; of the edges that one value of padding fills
# Grey values of the organs in one stack of PNGs, as CHAOS draws them on MR.
GREY_VALUES = {"liver": 63, "right kidney": 126, "left kidney": 189, "spleen": 252}


# Reading


def read_volume(path: Path) -> Volume:
    """Return any volume file or DICOM series. Raises InputError, and nothing else."""
    with one_error(Path(show_path(path)), "cannot be read"):
        if not path.exists():
            what = "a link to a file that is not there" if path.is_symlink() else "no such file"
            raise InputError(f"{show_path(path)}: {what}; check the path")
        if dicom.is_dicom_input(path):
            return dicom.read_series(path)
        if path.is_dir():
            raise InputError(f"{show_path(path)}: holds no DICOM series; give a file or a series")
        return read_file(path)


def read_scan(path: Path) -> Volume:
    """Return `read_volume` of a scan, whose padding is air."""
    return clear_padding(read_volume(path))


def clear_padding(scan: Volume) -> Volume:
    """Return a CT whose padding is air, as a note tells: what has a value of much of the volume's
    edges, and is connected with them. A scan without air stays as it is, because it is no CT."""
    array = scan.read()
    held, counts = np.unique(list_edges(array), return_counts=True)
    values = held[(held > DENSEST_AIR) & (counts > PADDING_SHARE * counts.sum())]
    if not values.size or array.min() > DENSEST_AIR:
        return scan
    filled = array.copy(order="K")
    for value in values:
        parts = cc3d.connected_components((array == value).view(np.uint8), connectivity=6)
        filled.T[np.isin(parts.T, np.setdiff1d(list_edges(parts), 0))] = AIR_HU
    note = f"{np.count_nonzero(filled != array)} voxels of padding ({values[0]:g} HU) are now air"
    return replace(scan, data=filled, convert=None, notes=(*scan.notes, note))


def list_edges(array: np.ndarray) -> np.ndarray:
    """Return the voxels of the twelve edges of a volume, in one row; no patient reaches them."""
    return np.hstack([np.moveaxis(array, n, 2)[[0, -1]][:, [0, -1]].ravel() for n in range(3)])


def read_label_map(
    path: Path | Masks,  # a file, a DICOM SEG or series; or (name, mask) of each structure
    scan: Volume,
    declared: Labels | Mapping[str, int],  # raw values that may occur; names of a SEG's segments
    *,
    classes: Labels | None = None,  # to get class indices (uint8) instead of raw values
    trust_grid: bool = False,  # lay it on the scan voxel by voxel, if the shapes agree
    ignore: Sequence[int] = (),  # values of unannotated voxels; with `classes` IGNORED (255)
) -> Volume:
    """Return the label map of `scan`, on its grid, in whole numbers that are declared; InputError
    of kind "values" for others, of kind "shape" or "grid" as `lay_on_grid` raises it."""
    declared = as_labels(declared)
    with one_error(Path(name_label(path)), "the label map cannot be read"):
        label = _open_label(path, scan, declared, trust_grid)
        allowed = {*list_values(declared), *label.classes.values(), *ignore, 0}
        label = replace(label, data=label.read(), convert=None)
        if not hold_only(label.data, allowed):
            label = _round_values(label, allowed, declared, scan)
        if classes is None:
            return label
        return replace(label, data=index_classes(label.data, classes, tuple(ignore)))


def _open_label(path: Path | Masks, scan: Volume, declared: Labels, trust: bool) -> Volume:
    if isinstance(path, tuple) or list_pngs(path):
        masks = path if isinstance(path, tuple) else (("liver", path),)
        return _lay_masks(masks, scan, declared, trust)
    files = list_plain_files(path) if path.is_dir() else [path]
    found = [file for file in files if dicom.is_dicom(file)]
    if len(found) == 1 and dicom.is_seg_header(dicom.read_header(found[0])):
        return read_seg(found[0], scan, declared, trust)
    return lay_on_grid(rename_segments(read_volume(path), path, declared), scan, trust)


def hold_only(array: np.ndarray, allowed: set[int]) -> bool:
    """Return whether voxels are whole numbers that are allowed."""
    if array.dtype.kind == "f" or array.min() < 0 or array.max() > max(allowed):
        return False
    known = np.isin(np.arange(max(allowed) + 1), [*allowed])
    return bool(known.all() or known[array].all())  # 0 … n: two comparisons tell


def _round_values(label: Volume, allowed: set[int], declared: Labels, scan: Volume) -> Volume:
    """Return a label map in whole numbers, all of which are allowed; InputError names others."""
    array, known = label.data, np.zeros(max(allowed) + 1, bool)
    known[list(allowed)] = True
    whole = np.zeros(array.shape, np.min_scalar_type(max(allowed)), order="F")
    off, odd = 0.0, set[float]()
    for z in range(array.shape[2]):
        plane, near = array[:, :, z], np.rint(array[:, :, z])
        apart = np.abs(plane - near)
        wild = (apart > ROUNDING) | (near < 0) | (near >= len(known))
        wild |= ~known[np.where(wild, 0, near).astype(int)]
        odd |= set(np.unique(plane[wild])[:50].tolist())
        off = max(off, float(apart.max()))
        whole[:, :, z] = np.where(wild, 0, near)
    if odd:
        guess = "was it resampled? " if off > ROUNDING else ""
        if len(odd) > 20 or min(odd) < -100:  # as a scan does
            voxels = scan.read()[:, :, :: max(1, scan.shape[2] // 8)]
            swapped = voxels.min() >= 0 and len(np.unique(voxels)) <= 64
            guess = "are scan and label map swapped? " if swapped else "is it a scan? "
        found = ", ".join(f"{value:g}" for value in sorted(odd)[:5])
        raise InputError(
            f"{label.name}: the label map holds [{found}], expected {describe_labels(declared)}; "
            f"{guess}correct it, or declare its values and names",
            kind="values",
        )
    notes = [f"label values were up to {off:.2g} off whole numbers and are rounded"] * (off > 0)
    return replace(label, data=whole, notes=(*label.notes, *notes))


def find_others(label: Path | Masks, named: Labels) -> tuple[int, ...]:
    """Return the values that may occur beside those that a user named: all up to 254 if more than
    MANY others occur, as in TotalSegmentator's maps; else none, for a single one is a mistake."""
    if isinstance(label, tuple) or label.is_dir() or dicom.is_dicom_input(label):
        return ()
    values = np.unique(read_volume(label).read()[::2, ::2, ::2])
    known = list_values(named)
    whole = values.min() >= 0 and values.max() < IGNORED and not (values % 1).any()
    if not whole or not MANY < len(np.setdiff1d(values, known)) <= IGNORED // 2:
        return ()
    return tuple(value for value in range(1, IGNORED) if value not in known)


def lay_on_grid(label: Volume, scan: Volume, trust: bool = False) -> Volume:
    """Return `label` with the scan's own geometry, if both describe the same grid; `trust` lays
    voxel on voxel. Raises InputError of kind "shape" or "grid"."""
    same = label.shape == scan.shape and (trust or (label.oriented and scan.oriented))
    if same and (trust or _voxels_apart(label.affine, scan.affine, scan.shape) <= GRID_NOTICE):
        return replace(label, affine=scan.affine, header=scan.header, oriented=scan.oriented)
    return _turn_on_grid(label, scan, trust)


def _turn_on_grid(label: Volume, scan: Volume, trust: bool) -> Volume:
    """Return `label` with the scan's geometry, if it is stored in other axes, if they lie up to
    GRID_TOLERANCE voxels apart at the worst corner, or if neither has an orientation."""
    if not trust and label.oriented != scan.oriented:
        unknown = label.name if scan.oriented else scan.name
        raise wrong_grid(label.name, scan, f"{unknown} has no orientation: both form codes 0")
    if trust or label.ras_shape != scan.ras_shape:
        what = f"{label.name}: scan is {scan.shape}, label map is {label.shape} voxels"
        raise InputError(f"{what}; use the label map of this scan", kind="shape")
    notes, affine, header = list(label.notes), scan.affine, scan.header
    apart = _voxels_apart(label.affine, scan.affine, scan.shape)
    if label.shape != scan.shape or apart > GRID_TOLERANCE:  # stored in other axes
        apart = _voxels_apart(label.ras_affine, scan.ras_affine, scan.ras_shape)
        turned = inv_ornt_aff(label.orientation, label.shape)
        affine, header = scan.ras_affine @ np.linalg.inv(turned), None
    if apart > GRID_TOLERANCE:
        raise wrong_grid(label.name, scan, f"they lie up to {apart:.2g} voxels apart")
    if not label.oriented:
        notes.append("neither scan nor label map has an orientation (form codes 0)")
    if apart > GRID_NOTICE:
        notes.append(f"scan and label map lie up to {apart:.2g} voxels apart")
    return replace(label, affine=affine, header=header, oriented=scan.oriented, notes=tuple(notes))


def _voxels_apart(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    corners = np.array(np.meshgrid(*([0, n - 1] for n in shape), [1])).reshape(4, -1)
    return float(np.abs(np.linalg.inv(other) @ (one - other) @ corners).max())


def _lay_masks(masks: Masks, scan: Volume, declared: Labels, trust: bool) -> Volume:
    """Return (name, mask) of each structure as one label map on the grid of `scan`."""
    labels = {name: find_label(name, declared) for name, _ in masks}
    values = {name: declared[label][0] for name, label in labels.items() if label is not None}
    if not values:
        what = f"{name_label(masks)}: none of the masks {', '.join(labels)} is one of the labels"
        raise InputError(f"{what} {describe_labels(declared)}; name them: --values", kind="values")
    notes, structures = [], []
    for name, path in ((name, path) for name, path in masks if name in values):
        if list_pngs(path):
            mask = read_png_stack(path, name, scan)
        else:
            mask = read_volume(path)
            if mask.files:
                notes += compare_frames(path, dicom.read_header(mask.files[0]), scan, trust)
            mask = lay_on_grid(mask, scan, trust)
        notes += [f"{name}: {note}" for note in mask.notes]
        array = mask.ras.data
        low, high = array.min(), array.max()
        if low > 0 or np.count_nonzero((array != low) & (array != high)):
            what, got = f"{path}: must be the mask of one structure", np.unique(array)[:5].tolist()
            raise InputError(f"{what}, 0 and one other value, got {got}; is it one?", kind="values")
        inside = scan.from_ras((array > min(low, 0)).view(np.uint8)).data
        structures.append((name, values[name], np.flatnonzero(inside.ravel(order="F"))))
    label = scan.like(lay_structures(structures, scan.shape)[0])
    place = os.path.commonpath([path for _, path in masks])
    return replace(label, name=place, notes=tuple(notes), classes=values)


def list_pngs(folder: Path) -> list[Path]:
    """Return the PNGs in a folder, slice_2 before slice_10; none where it is no folder."""
    files = list_plain_files(folder) if folder.is_dir() else []
    found = [file for file in files if file.suffix.lower() == ".png"]
    return sorted(found, key=lambda file: natural(file.name))


def read_png_stack(folder: Path, name: str, scan: Volume) -> Volume:
    """Return the mask (uint8, 0 and 1) of `name` in a stack of PNGs. As in CHAOS, pictures in the
    order of their names belong to the files of the DICOM series in the order of theirs. A picture
    is black and one grey; of CHAOS' greys `name` chooses one."""
    from PIL import Image

    pictures, shape = list_pngs(folder), scan.shape
    if len(pictures) != len(scan.files):
        raise InputError(
            f"{folder}: must hold a PNG for each file of a DICOM series, got {len(pictures)} for "
            f"{len(scan.files)} files of {scan.name}; give the label map as NIfTI, which says how "
            "it lies on its scan",
            kind="shape",
        )
    array, greys = np.zeros(shape, np.uint8, order="F"), set[int]()
    by_name = sorted(range(shape[2]), key=lambda z: natural(scan.files[z].name))
    for picture, z in zip(pictures, by_name, strict=True):
        with one_error(picture, "not a readable PNG"), Image.open(picture) as image:
            plane = np.asarray(image).astype(np.uint8)
        plane = plane.max(axis=2).T if plane.ndim == 3 else plane.T
        if plane.shape != shape[:2]:
            what = f"{picture}: must have {shape[:2]} pixels as the slices of {scan.name}, got"
            raise InputError(f"{what} {plane.shape}; use the pictures of this scan", kind="shape")
        greys |= {*np.unique(plane).tolist()} - {0}
        array[:, :, z] = plane
    known = {*GREY_VALUES.values()}
    if greys <= known and name in GREY_VALUES:
        return scan.like((array == GREY_VALUES[name]).view(np.uint8))
    if len(greys) <= 1 and not greys & known:
        return scan.like((array > 0).view(np.uint8))
    what = f"must hold black and one grey, or {GREY_VALUES}, got the greys {sorted(greys)[:8]}"
    raise InputError(f"{folder}: {what}; give each structure a stack of its own", kind="values")


# Files of inputs, label maps in JSON


def list_files(path: Path | Masks) -> list[Path]:
    """Return every file that is read for a path: header and data, files of a series or stack."""
    if isinstance(path, tuple):
        return [file for _, part in path for file in list_files(part)]
    if dicom.is_dicom_input(path):
        return dicom.list_series_files(path)
    if path.is_dir():
        return list_pngs(path)
    return list_parts(path)


def stamp_inputs(paths: Iterable[Path | Masks | None]) -> list[list[Any]]:
    """Return [name, size, time of change in ns] of every file read for scans and label maps."""
    return stamp_files(file for path in paths if path is not None for file in list_files(path))


def describe_label(label: Path | Masks | None) -> str | list[list[str]]:
    """Return a case's label map for JSON: its absolute path, or [name, path] of each mask."""
    if isinstance(label, tuple):
        return [[name, str(path.absolute())] for name, path in label]
    return str(label and label.absolute())


def restore_label(content: str | list[list[str]]) -> Path | Masks:
    """Return the label map that `describe_label` described."""
    if isinstance(content, str):
        return Path(content)
    return tuple((str(name), Path(path)) for name, path in content)


def name_label(label: Path | Masks | None) -> str:
    """Return a case's label map for messages: its path, or those of its masks."""
    return ", ".join(str(p) for _, p in label) if isinstance(label, tuple) else str(label)


def mark_undrawn(array: np.ndarray, drawn: int, every: int) -> np.ndarray:
    """Return a label map (X, Y, Z) with IGNORED but in the slices `drawn` ± n times `every`."""
    if every > 1:
        array = np.array(array, order="F")
        array[:, :, (np.arange(array.shape[2]) - drawn) % every != 0] = IGNORED
    return array


def list_cuts(depth: int, size: int, every: int, shift: float) -> list[tuple[int, int]]:
    """Return (first, last) of sub-volumes. Where only each `every`-th slice is annotated they
    overlap, `shift` (0..1) moved: strided layers learn nothing of places never annotated."""
    if every == 1 or size >= depth:
        firsts = [min(n, max(depth - size, 0)) for n in range(0, depth, size)]  # the last is full
        return [(first, min(first + size, depth)) for first in firsts]
    step = max(n for n in range(1, size + 1) if math.gcd(n, every) == 1)
    starts = (min(max(f, 0), depth - size) for f in range(-int(shift * every), depth, step))
    return [(first, first + size) for first in dict.fromkeys(starts)]
