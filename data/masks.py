"""A label map in pieces: a file, series or stack of PNGs for each structure, laid into one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.boxes import find_bounding_box
from data.files import InputError
from data.headers import read_header, read_text
from data.labels import IGNORED, Labels, find_label, is_tumour
from data.names import natural
from data.volumes import Volume, list_slabs

Masks = tuple[tuple[str, Path], ...]  # name of a structure, its file, series or stack of PNGs
# Grey values of the organs in one stack of PNGs, as CHAOS draws them on MR.
GREY_VALUES = {"liver": 63, "right kidney": 126, "left kidney": 189, "spleen": 252}


def describe_label(label: Path | Masks | None) -> str | list[list[str]]:
    """A case's label map for JSON: its path, or [name, path] of each mask."""
    return [[name, str(path)] for name, path in label] if isinstance(label, tuple) else str(label)


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
