"""Locate, then segment: which windows a network is asked first, and which the organ's box needs.

The network looks at every n-th window. Around what it finds there lies a box; the windows that
touch it follow, in plane cut to it, on the same grid and scale, until nothing is found at its rim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.boxes import Box, enclose, find_bounding_box

GAP_MM = 40.0  # between the windows of the first look: an organ is longer
MARGIN_MM = (45.0, 45.0, 10.0)  # around what is found, along x, y, z: what the network needs to see
SPECK_ML = 0.5  # a window in which less is found does not widen the box,
SPECK_PART = 0.05  # nor one with less of each class than this part of its fullest window


@dataclass
class Look:
    """How a preprocessed volume is searched, and what came of it."""

    spacing_mm: tuple[float, float, float]  # of the network's grid
    grain: int  # pictures of multiples of so many voxels are taken in plane; 0: only whole windows
    box: Box | None = None  # that was segmented, in voxels of the network's grid; None: everything
    share: float = 1.0  # of the voxels that all windows have: what the network was asked

    def choose_first(self, windows: Sequence[Box]) -> list[int]:
        """Numbers of the windows that are looked at first: every n-th, and the last, by axis."""
        chosen = []
        for axis, mm in enumerate(self.spacing_mm):
            starts = sorted({window[axis].start for window in windows})
            step = starts[1] - starts[0] if len(starts) > 1 else 1
            width = windows[0][axis].stop - windows[0][axis].start
            every = max(int((width + GAP_MM / mm) / step), 1)
            chosen.append({*starts[::every], starts[-1]})
        return [
            number
            for number, window in enumerate(windows)
            if all(part.start in some for part, some in zip(window, chosen, strict=True))
        ]

    def choose_next(
        self, windows: Sequence[Box], answers: Mapping[int, tuple[Box, Any]], body: Box
    ) -> dict[int, Box]:
        """Number and box of each window that is still to be asked, by the `answers` so far.

        `answers`: number of a window → its box and its scores (C, x, y, z), above 0 where an organ
        is. Where nothing was found all windows follow, cut to the `body`. A window is asked again
        only where less than half of the margin is left around what was found.
        """
        found, speck = [], 1000 * SPECK_ML / math.prod(self.spacing_mm)
        counts = [[np.count_nonzero(one > 0) for one in scores] for _, scores in answers.values()]
        least = np.maximum(SPECK_PART * np.max(counts, axis=0), speck)  # of each class
        for (box, scores), own in zip(answers.values(), counts, strict=True):
            if (own >= least).any():
                inner = find_bounding_box(np.any(np.asarray(scores) > 0, axis=0))
                found.append(shift(inner, [part.start for part in box]))
        self.box = self.grow(enclose(*found), windows) if found else None
        near, wanted = self.box or body, {}
        enough = self.grow(enclose(*found), windows, 0.5) if found else body
        for number, window in enumerate(windows):
            if self.box is None or is_overlapping(window, near):
                asked, needed = answers.get(number, (None, None))[0], self.cut(window, enough)
                if asked is None or enclose(needed, asked) != asked:
                    wanted[number] = self.cut(window, near)
        return wanted

    def grow(self, box: Box, windows: Sequence[Box], part_of_margin: float = 1.0) -> Box:
        """A box with (a part of) the margin around it, within the volume."""
        grown = []
        for part, size, margin, mm in zip(
            box, enclose(*windows), MARGIN_MM, self.spacing_mm, strict=True
        ):
            reach = math.ceil(part_of_margin * margin / mm)
            grown.append(slice(max(part.start - reach, 0), min(part.stop + reach, size.stop)))
        return tuple(grown)

    def cut(self, window: Box, near: Box) -> Box:
        """The part of a window, in plane, that holds `near`: its corners on the network's grain, so
        that pooling takes the same voxels together."""
        parts = list(window)
        for axis in (0, 1) if self.grain else ():
            part = window[axis]
            if (part.stop - part.start) % self.grain == 0 and near[axis].stop > near[axis].start:
                low, high = near[axis].start - part.start, near[axis].stop - part.start
                first, last = low // self.grain, -(-high // self.grain)
                start, stop = part.start + first * self.grain, part.start + last * self.grain
                parts[axis] = slice(max(start, part.start), min(stop, part.stop))
        return tuple(parts)

    def describe(self, to_network: np.ndarray, shape: Sequence[int]) -> dict[str, Any]:
        """For a case's record: the box in voxels of the scan in RAS order (`shape`), counted from
        1, what part of the scan lies outside, and what part of all windows' voxels was asked."""
        row: dict[str, Any] = {"located_box": "nothing found at first look: the whole scan"}
        inside, told = 1.0, []
        for axis, size in enumerate(shape) if self.box else ():
            part = self.box[axis]  # type: ignore[index]  # it is there
            scale, offset = to_network[axis, axis], to_network[axis, 3]
            first = max(math.ceil((part.start - offset) / scale), 0)
            last = min(math.floor((part.stop - 1 - offset) / scale) + 1, size)
            inside *= (last - first) / size
            told.append(f"{'xyz'[axis]} {first + 1}-{last} of {size}")
        if told:
            row["located_box"] = ", ".join(told)
        return row | {
            "outside_box_percent": round(100 * (1 - inside), 1),
            "network_share": round(self.share, 3),
        }


def shift(box: Box, by: Sequence[int]) -> Box:
    """A box moved by so many voxels along each axis."""
    return tuple(slice(p.start + n, p.stop + n) for p, n in zip(box, by, strict=True))


def is_overlapping(one: Box, other: Box) -> bool:
    """Whether two boxes share a voxel."""
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))
