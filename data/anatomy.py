"""What anatomy says of a segmentation: what it excludes is removed, what is implausible is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import cc3d
import numpy as np

from data.boxes import find_bounding_box
from data.labels import group_tumours
from data.volumes import Volume

PLAUSIBLE_ML = {"liver": (500, 4000)}  # volumes of adults
RIGHT_SIDED = ("liver",)  # organs on the patient's right
# How much darker than its inside an organ's edge may be, in HU, of organs of one brightness: fat,
# bile and bowel are darker still. A voxel half of which is fat is 100 darker than a liver of 100.
DARKER_HU = {"liver": 80.0}
NOISE = 3.0  # times the noise's SD, where that is more: noise is no edge


def trim_by_hu(
    scores: np.ndarray, image: np.ndarray, names: Sequence[str], hu_per_unit: float = 1.0
) -> None:
    """Take from an organ the edge that is far darker than its inside; in place.

    The inside is the half that the network is surer of. It stays, as does what the rest encloses
    in its slice: tumours, cysts.

    Args:
        scores: (C − 1, X, Y, Z) logits of the classes `names` above the background's.
        image: (X, Y, Z) of a CT on the same grid, in units of so many HU.
    """
    for every, name in zip(scores, names, strict=True):
        if name not in DARKER_HU or not (every > 0).any():
            continue
        box = find_bounding_box(every > 0)
        score = every[box]
        found = score > 0
        known, hu = score[found], image[box][found]
        inside = known >= np.median(known)
        below = np.median(hu[inside]) - hu
        noise = 1.4826 * np.median(np.abs(below[inside]))  # SD, if it is a normal one
        dark = np.zeros_like(found)
        dark[found] = (below > max(DARKER_HU[name] / hu_per_unit, NOISE * noise)) & ~inside
        left = found & ~dark
        for number in np.flatnonzero(dark.any(axis=(0, 1))):
            dark[:, :, number] &= ~find_holes(left[:, :, number])
        np.negative(score, out=score, where=dark)  # as surely not: the edge lies in the middle


def clean(
    classes: np.ndarray,
    names: Sequence[str],
    *,
    largest_component: bool = True,
    fill_holes: bool = True,
    tumour_inside: bool = True,
) -> np.ndarray:
    """Remove what anatomy excludes. An organ and the tumours in it are one body.

    Args:
        classes: class indices (X, Y, Z), which stay; `names` are those of the classes 1, 2, …
        largest_component: of an organ's voxels only those in its largest body stay.
        fill_holes: background that an organ encloses on all sides becomes organ.
        tumour_inside: tumours that touch no kept organ are dropped; of those that do all stay.
    """
    box = find_bounding_box(classes)
    part = classes[box].copy(order="K")
    for organ, tumours in group_tumours(names).items():
        in_organ, in_tumour = part == organ, np.isin(part, tumours) if tumours else None
        body = in_organ if in_tumour is None else in_organ | in_tumour
        if not body.any():
            continue
        if largest_component or tumours:
            good, pieces = _judge_pieces(body, in_organ if tumours else body, largest_component)
            outside = ~good[pieces]
            part[in_organ & outside] = 0
            if in_tumour is not None and tumour_inside:
                part[in_tumour & outside] = 0
        if fill_holes:
            _fill(part, organ, [organ, *tumours])
    result = np.zeros_like(classes)  # memory that nobody writes to is not taken
    result[box] = part
    return result


def _judge_pieces(body: np.ndarray, organ: np.ndarray, largest: bool) -> tuple[Any, Any]:
    """Which connected pieces of `body` stay, by their number, and the number of each voxel's."""
    pieces, count = cc3d.connected_components(body, connectivity=26, return_N=True)
    sizes = np.bincount(pieces.ravel("K"), minlength=count + 1)
    sizes[0] = 0
    if organ is not body:  # a piece without organ is no candidate
        sizes[np.bincount(pieces[organ], minlength=len(sizes)) == 0] = 0
    good = sizes > 0
    if largest and good.any():
        good = np.arange(len(sizes)) == sizes.argmax()
    return good, pieces


def _fill(part: np.ndarray, organ: int, body: Sequence[int]) -> None:
    """Give to `organ` the background that the classes of `body` enclose; in place."""
    inside = part == body[0] if len(body) == 1 else np.isin(part, body)
    box = find_bounding_box(inside)
    part[box][find_holes(inside[box]) & (part[box] == 0)] = organ


def find_holes(mask: np.ndarray) -> np.ndarray:
    """What a mask of two or three axes encloses on all sides, corners not counted."""
    around = np.pad(~mask, 1, constant_values=True)
    sides: Literal[4, 6] = 4 if mask.ndim == 2 else 6
    spaces, count = cc3d.connected_components(around, connectivity=sides, return_N=True)
    inner = (slice(1, -1),) * mask.ndim
    return (around & (spaces != spaces.flat[0]))[inner] if count > 1 else np.zeros_like(mask)


def find_doubts(classes: Volume, scan: Volume, names: Sequence[str]) -> list[str]:
    """What is implausible about a segmentation: class indices and HU on one grid."""
    found, hu, size = [], scan.ras.data, classes.ras_shape
    outer = find_bounding_box(classes.ras.data)
    indices = classes.ras.data[outer]
    for organ, tumours in group_tumours(names).items():
        name, body = names[organ - 1], indices == organ
        for tumour in tumours:
            body |= indices == tumour
        inner = find_bounding_box(body)
        if inner[0].stop == 0:
            found.append(f"no {name} found")
            continue
        low, high = PLAUSIBLE_ML.get(name, (0, math.inf))
        if not low <= (ml := np.count_nonzero(body) * scan.voxel_ml) <= high:
            found.append(f"{name} of {ml:.0f} ml, expected {low} to {high}")
        sides = (("left", "right"), ("back", "front"), ("lower", "upper"))
        box = [
            slice(a.start + b.start, a.start + b.stop) for a, b in zip(outer, inner, strict=True)
        ]
        for part, length, (first, last) in zip(box, size, sides, strict=True):
            touched = [first] * (part.start == 0) + [last] * (part.stop == length)
            found += [f"{name} reaches the {end} end of the scan: cut off?" for end in touched]
        if name in RIGHT_SIDED:
            patient = hu[:, ::4, box[2]][:, :, ::4] > -300
            counts = ((0, patient.sum(axis=(1, 2))), (outer[0].start, body.sum(axis=(1, 2))))
            centre, own = (
                float(np.arange(begin, begin + len(count)) @ count) / max(int(count.sum()), 1)
                for begin, count in counts
            )
            if own < centre:
                found.append(f"{name} on the patient's left: are the scan's sides right?")
    return found
