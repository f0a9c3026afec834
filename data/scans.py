"""The one door: reading scans and label maps, which scans there are, their bytes; or `InputError`.

Whoever needs a scan or a label map asks here: prepare, apply, evaluate, visualize. How the files of
a data set pair is in `data.layouts`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import inv_ornt_aff

from data.dicom import (
    is_dicom,
    is_dicom_input,
    is_seg_header,
    list_series_files,
    read_header,
    read_series,
    read_text,
)
from data.files import InputError, list_plain_files, natural, show_path
from data.labels import (
    IGNORED,
    Labels,
    as_labels,
    describe_labels,
    find_label,
    index_classes,
    is_tumour,
    list_values,
)
from data.seg import read_seg
from data.volumes import (
    Volume,
    find_bounding_box,
    list_parts,
    list_slabs,
    read_file,
)

GRID_TOLERANCE = 0.5  # voxels that scan and label map may lie apart, at the worst corner
GRID_NOTICE = 0.01  # voxels from which on it is told
ROUNDING = 0.01  # label values that are nearer to a whole number are that number


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------


def read_volume(path: Path) -> Volume:
    """Any volume file or DICOM series. Raises InputError, and nothing else, when it cannot be."""
    try:
        if not path.exists():
            is_link = "is a link to a file that is not there; correct the link"
            what = is_link if path.is_symlink() else "no such file; check the path"
            raise InputError(f"{show_path(path)}: {what}")
        if is_dicom_input(path):
            return read_series(path)
        if path.is_dir():
            what = "holds no DICOM series; give a file, or the series' folder"
            raise InputError(f"{show_path(path)}: {what}")
        return read_file(path)
    except InputError:
        raise
    except PermissionError as error:
        what = f"may not be read ({error.strerror}); ask its owner"
        raise InputError(f"{show_path(path)}: {what}") from error
    except Exception as error:  # a reader met what it was not made for
        raise InputError(
            f"{show_path(path)}: cannot be read ({type(error).__name__}: {error}); the file is "
            "damaged or of an unusual kind, convert it to .nii.gz"
        ) from error


def read_scan(path: Path) -> Volume:
    """A scan, as `read_volume`; refuses a DICOM SEG or another object, which holds no scan."""
    return read_volume(path)


def read_label_map(
    path: Path | Masks,
    scan: Volume,
    declared: Labels | Mapping[str, int],
    *,
    classes: Labels | None = None,
    trust_grid: bool = False,
    ignore: Sequence[int] = (),
) -> Volume:
    """The label map of `scan`, on its grid; its voxels are checked where they are read.

    Args:
        path: a file, a DICOM SEG or series; or (name, mask) of each structure, which are laid into
            one label map with the declared values of their names.
        declared: label name → raw values that may occur; a SEG's segments are known by these names.
        classes: class name → raw values, to get class indices (uint8) instead of raw values.
        trust_grid: lay the label map on the scan voxel by voxel, whatever its header says, if the
            shapes agree.
        ignore: raw values of voxels that nobody judged; with `classes` they become IGNORED (255).

    Raises InputError of the kinds "shape", "grid" (see `lay_on_grid`), "values" (a value that is
    not declared) and those of `read_volume`.
    """
    declared = as_labels(declared)
    try:
        label = _open_label(path, scan, declared, trust_grid)
    except InputError:
        raise
    except Exception as error:  # a reader met what it was not made for
        raise InputError(
            f"{path}: the label map cannot be read ({type(error).__name__}: {error}); convert it "
            "to .nii.gz"
        ) from error
    if label.dtype.kind == "f":
        label = _round_values(label, scan)
    allowed = {*list_values(declared), *label.classes.values(), *ignore, 0}
    convert = _label_converter(label.name, allowed, declared, scan)
    if classes is None:
        return replace(label, convert=convert)
    kept = tuple(ignore)
    return replace(label, convert=lambda slab: index_classes(convert(slab), classes, kept))


def _open_label(path: Path | Masks, scan: Volume, declared: Labels, trust: bool) -> Volume:
    if isinstance(path, tuple):
        return _lay_masks(path, scan, declared, trust)
    if is_png_stack(path):
        return _lay_masks((("liver", path),), scan, declared, trust)
    dicom = [path] if path.is_file() else list_plain_files(path) if path.is_dir() else []
    dicom = [file for file in dicom if is_dicom(file)]
    if len(dicom) == 1 and is_seg_header(read_header(dicom[0])):
        return read_seg(dicom[0], scan, declared)
    return lay_on_grid(read_volume(path), scan, trust)


def _lay_masks(masks: Masks, scan: Volume, declared: Labels, trust: bool) -> Volume:
    """(name, mask) of each structure as one label map on the grid of `scan`."""
    wanted = [(name, path) for name, path in masks if value_of(name, declared) is not None]
    if not wanted:
        raise InputError(
            f"{masks[0][1]}: none of the masks {', '.join(name for name, _ in masks[:8])} is one "
            f"of the labels {describe_labels(declared)}; name them: --values",
            kind="values",
        )
    notes: list[str] = []

    def opened():
        for name, path in wanted:
            if is_png_stack(path):
                yield name, read_png_stack(path, name, scan)
                continue
            mask = read_volume(path)
            if not trust:
                refuse_other_frame(path, mask, scan)
            laid = lay_on_grid(mask, scan, trust)
            notes.extend(f"{name}: {note}" for note in laid.notes)
            yield name, laid

    label = scan.like(paint_masks(opened(), declared, scan))
    known = {name: value for name, _ in wanted if (value := value_of(name, declared)) is not None}
    place = os.path.commonpath([path for _, path in masks])
    return replace(label, name=place, notes=tuple(notes), classes=known)


def _round_values(label: Volume, scan: Volume) -> Volume:
    """A label map of floats in whole numbers, told in its notes; refused where they are none."""
    array = label.read()
    whole = np.empty(array.shape, np.int32, order="F")
    off, odd = 0.0, set()
    for first, last in list_slabs(array.shape[2], 16):
        part = array[:, :, first:last]
        near = np.rint(part)
        apart = np.abs(part - near)
        off = max(off, float(apart.max()))
        wild = (apart > ROUNDING) | (np.abs(near) > 2**31 - 1)
        odd |= set(np.unique(part[wild])[:5].tolist())
        whole[:, :, first:last] = np.where(wild, 0, near)
    if odd:
        raise InputError(
            f"{label.name}: label values must be whole numbers, got {sorted(odd)[:5]}; "
            + _guess_swap(sorted(odd), scan)
            + "is this a scan, or a label map that was resampled? Export it again with "
            "nearest-neighbour interpolation",
            kind="values",
        )
    notes = [f"label values were up to {off:.2g} off whole numbers and are rounded"] * (off > 0)
    return replace(label, data=whole, notes=(*label.notes, *notes), convert=None)


def _label_converter(name: str, allowed: set[int], declared: Labels, scan: Volume):
    """What each slab of a label map goes through: no value that nobody declared gets past."""
    known = np.zeros(max(allowed) + 1, bool)
    known[list(allowed)] = True

    def convert(slab: np.ndarray) -> np.ndarray:
        if not slab.size:
            return slab
        inside = slab.min() >= 0 and slab.max() < len(known)
        if not inside or not (known.all() or known[slab].all()):  # 0 … n: two comparisons tell
            odd = sorted(set(np.unique(slab).tolist()) - allowed)
            if odd:
                raise InputError(
                    f"{name}: the label map holds {odd[:5]}, expected {describe_labels(declared)}; "
                    + _guess_swap(odd, scan)
                    + "correct it, or declare its values and their names",
                    kind="values",
                )
        return slab

    return convert


def _guess_swap(odd: Sequence[float], scan: Volume) -> str:
    """What to ask where a "label map" holds `odd` values as a scan does."""
    if len(odd) < 20 and min(odd) >= -100:
        return ""
    try:
        part = scan.read()[:, :, :: max(1, scan.shape[2] // 8)]
    except InputError:
        return ""
    swapped = part.min() >= 0 and len(np.unique(part)) <= 64
    return "are scan and label map swapped? " if swapped else "is it a scan? "


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
        if label.shape != scan.shape:  # voxel on voxel needs the same axes
            raise _wrong_shape(label, scan)
        return _with_grid(label, scan.affine, scan)
    if not label.oriented and not scan.oriented:
        told = "neither scan nor label map says how its axes lie (form codes 0)"
        label = replace(label, notes=(*label.notes, told))
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
# Bytes of inputs
# ---------------------------------------------------------------------------------------


def list_files(path: Path | Masks) -> list[Path]:
    """Every file that is read for a path: a header and its data, the files of a series or stack."""
    if isinstance(path, tuple):
        return [file for _, part in path for file in list_files(part)]
    if is_png_stack(path):
        return list_pngs(path)
    if is_dicom_input(path):
        return list_series_files(path)
    return list_parts(path)


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 of the content of some files."""
    together = hashlib.sha256()
    for path in files:
        try:
            if not path.is_file():  # a pipe would let us wait for ever
                raise FileNotFoundError
            with path.open("rb") as stream:
                together.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            why = (
                "no such file; check the path" if missing else f"cannot be read ({error.strerror})"
            )
            raise InputError(f"{show_path(path)}: {why}") from error
    return together.hexdigest()


def hash_inputs(paths: Iterable[Path | Masks | None]) -> str:
    """SHA-256 of every byte that is read for some scans and label maps."""
    return hash_files(file for path in paths if path is not None for file in list_files(path))


Masks = tuple[tuple[str, Path], ...]  # name of a structure, its file, series or stack of PNGs
# Grey values of the organs in one stack of PNGs, as CHAOS draws them on MR.
GREY_VALUES = {"liver": 63, "right kidney": 126, "left kidney": 189, "spleen": 252}


def describe_label(label: Path | Masks | None) -> str | list[list[str]]:
    """Return a case's label map for JSON: its absolute path, or [name, path] of each mask."""
    if isinstance(label, tuple):
        return [[name, str(path.absolute())] for name, path in label]
    return str(label and label.absolute())


def name_label(label: Path | Masks | None) -> str:
    """A case's label map for messages: its path, or those of its masks."""
    return ", ".join(str(p) for _, p in label) if isinstance(label, tuple) else str(label)


def restore_label(content: str | list[list[str]]) -> Path | Masks:
    """What `describe_label` described."""
    if isinstance(content, str):
        return Path(content)
    return tuple((str(name), Path(path)) for name, path in content)


def resolve_label(label: Path | Masks) -> Path | Masks:
    """A case's label map with absolute paths."""
    if isinstance(label, tuple):
        return tuple((name, path.resolve()) for name, path in label)
    return label.resolve()


def list_pngs(folder: Path) -> list[Path]:
    """The PNGs in a folder, slice_2 before slice_10."""
    found = [f for f in folder.iterdir() if f.suffix.lower() == ".png" and f.name[0] != "."]
    return sorted(found, key=lambda file: natural(file.name))


def is_png_stack(path: Path) -> bool:
    """Whether a path is a folder of PNGs."""
    return path.is_dir() and bool(list_pngs(path))


def read_png_stack(folder: Path, name: str, scan: Volume) -> Volume:
    """The mask (uint8, 0 and 1) of `name` in a stack of PNGs: a picture for each slice of `scan`.

    The pictures in the order of their names belong to the files of the series in the order of
    theirs (CHAOS); to the slices from the first on where the scan is one file.
    """
    from PIL import Image

    pictures = list_pngs(folder)
    if len(pictures) != scan.shape[2]:
        raise InputError(
            f"{folder}: holds {len(pictures)} PNGs, but {scan.name} has {scan.shape[2]} slices; a "
            "stack needs one picture per slice, add or remove what differs",
            kind="shape",
        )
    by_name = list(range(scan.shape[2]))
    if scan.files:
        by_name.sort(key=lambda z: natural(scan.files[z].name))
    array = np.zeros(scan.shape, np.uint8, order="F")
    for picture, z in zip(pictures, by_name, strict=True):
        try:
            with Image.open(picture) as image:
                plane = np.asarray(image)
        except Exception as error:  # whatever a damaged picture leads the library to
            raise InputError(f"{picture}: not a readable PNG ({error}); get it again") from error
        plane = plane.astype(np.uint8).max(axis=2) if plane.ndim == 3 else plane.astype(np.uint8)
        if plane.T.shape != scan.shape[:2]:
            raise InputError(
                f"{picture}: is {plane.T.shape} pixels, but the slices of {scan.name} are "
                f"{scan.shape[:2]}; use the pictures of this scan",
                kind="shape",
            )
        array[:, :, z] = plane.T
    return scan.like(_choose_grey(array, name, folder))


def _choose_grey(array: np.ndarray, name: str, folder: Path) -> np.ndarray:
    """What is drawn in one grey on black; of CHAOS' greys, the one of `name`."""
    found = set(np.flatnonzero(np.bincount(array.ravel(order="K"), minlength=256))) - {0}
    if len(found) <= 1 and not found & ({*GREY_VALUES.values()} - {GREY_VALUES.get(name)}):
        return (array > 0).view(np.uint8)
    if found <= {*GREY_VALUES.values()} and name in GREY_VALUES:
        return (array == GREY_VALUES[name]).view(np.uint8)
    raise InputError(
        f"{folder}: its pictures hold the greys {sorted(map(int, found))[:8]}, expected black and "
        f"one other, or {GREY_VALUES}; give each structure a stack of its own",
        kind="values",
    )


def refuse_other_frame(path: Path, mask: Volume, scan: Volume) -> None:
    """Raise InputError for a mask series of another frame of reference than the scan's."""
    if not mask.files or not scan.files:
        return
    frames = [read_text(read_header(v.files[0]), "FrameOfReferenceUID") for v in (mask, scan)]
    if all(frames) and frames[0] != frames[1]:
        raise InputError(
            f"{path}: the mask has another frame of reference than {scan.name}, so it was drawn on "
            "another scan; use the masks of this scan, or lay them voxel on voxel: "
            "--trust-image-grid",
            kind="grid",
        )


def value_of(name: str, declared: Labels) -> int | None:
    """Label value of the structure that a mask is called by; None where nobody declared it."""
    label = find_label(name, declared)
    return declared[label][0] if label is not None else None


def paint_masks(masks: Iterable[tuple[str, Volume]], declared: Labels, scan: Volume) -> np.ndarray:
    """One label map (X, Y, Z) in the axes of `scan` of masks that lie on its grid.

    Small structures over large ones and tumours last, so that what lies in another one is seen.
    """
    pieces = []
    for name, mask in masks:
        inside = scan.from_ras(_read_inside(mask).view(np.uint8)).data.view(bool)
        box = find_bounding_box(inside)
        rank = (is_tumour(name), -int(np.count_nonzero(inside)))
        pieces.append((rank, value_of(name, declared) or 0, box, inside[box].copy()))
    largest = max((value for _, value, *_ in pieces), default=0)
    array = np.zeros(scan.shape, np.min_scalar_type(largest), order="F")
    for _, value, box, inside in sorted(pieces, key=lambda piece: piece[0]):
        array[box][inside] = value
    return array


def _read_inside(mask: Volume) -> np.ndarray:
    """Which voxels (RAS) a mask holds: it has one value beside its background's."""
    array = mask.ras.data
    low, high = array.min(), array.max()
    if low > 0 or np.count_nonzero((array != low) & (array != high)):
        raise InputError(
            f"{mask.name}: must be the mask of one structure, 0 and one other value, got "
            f"{np.unique(array)[:5].tolist()}; is it a label map, or a scan?",
            kind="values",
        )
    return array > min(low, 0) if low < high else array > 0


def mark_undrawn(slab: np.ndarray, first: int, drawn: int, every: int) -> np.ndarray:
    """A label map (X, Y, Z), whose slices begin at RAS index `first`, with IGNORED in all of them
    but `drawn` ± n times `every`: what `--label-every` says nobody drew."""
    if every == 1:
        return slab
    slab = np.array(slab, order="F")
    slab[:, :, (np.arange(first, first + slab.shape[2]) - drawn) % every != 0] = IGNORED
    return slab


def list_cuts(depth: int, size: int, every: int, shift: float) -> list[tuple[int, int]]:
    """(first, last) of the sub-volumes of `size` slices that cover a scan of `depth` slices.

    They overlap where only each `every`-th slice was drawn: a network of strided layers learns
    nothing of places in a window that are never drawn. `shift` (0..1) is where the first begins.
    """
    if every == 1 or size >= depth:
        return list_slabs(depth, size, reach_back=True)
    step = max(n for n in range(1, size + 1) if math.gcd(n, every) == 1)
    firsts = (min(max(f, 0), depth - size) for f in range(-int(shift * every), depth, step))
    return [(first, first + size) for first in dict.fromkeys(firsts)]


def stamp_inputs(paths: Iterable[Path | Masks | None]) -> list[list[Any]]:
    """Return [name, size, time of change in ns] of every file read for scans and label maps."""
    files = [file for path in paths if path is not None for file in list_files(path)]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{show_path(missing[0])}: no such file; check the path")
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
