"""Boxes of voxels: slabs of slices, the box around what is found, windows that slide."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Box = tuple[slice, ...]  # a part of a volume: first voxel and the one behind the last, by axis


def list_slabs(depth: int, step: int, reach_back: bool = False) -> list[tuple[int, int]]:
    """(first, last) of consecutive slabs of `step` slices.

    With `reach_back` the last one reaches back over its neighbour to be full.
    """
    if reach_back:
        firsts = [max(0, min(first, depth - step)) for first in range(0, depth, step)]
        return [(first, min(first + step, depth)) for first in firsts]
    return [(first, min(first + step, depth)) for first in range(0, depth, step)]


def find_bounding_box(mask: np.ndarray) -> Box:
    """Smallest box around what is not 0; of no voxels where nothing is."""
    box = [slice(0, size) for size in mask.shape]
    for axis in reversed(range(mask.ndim)):  # each axis looks at what the ones before left
        others = tuple(other for other in range(mask.ndim) if other != axis)
        used = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box[axis] = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
    return tuple(box)


def enclose(*boxes: Box) -> Box:
    """Smallest box around some boxes; those of no voxels are left out."""
    full = [box for box in boxes if all(part.stop > part.start for part in box)] or boxes[:1]
    return tuple(
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*full, strict=True)
    )


def list_starts(size: Sequence[int], window: Sequence[int], overlap: float) -> list[list[int]]:
    """First voxels of the windows along each axis of a volume; the last one ends with it."""
    starts = []
    for along, width in zip(size, window, strict=True):
        step, rest = max(int(width * (1 - overlap)), 1), max(along - width, 0)
        starts.append([*range(0, rest, step), rest])
    return starts


def list_windows(size: Sequence[int], window: Sequence[int], overlap: float) -> list[Box]:
    """Windows that slide along the axes of a volume of `size` voxels, the last axis fastest."""
    return [
        tuple(slice(start, start + width) for start, width in zip(corner, window, strict=True))
        for corner in itertools.product(*list_starts(size, window, overlap))
    ]
