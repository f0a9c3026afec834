"""What anatomy says of a label map: what it excludes is removed, what is implausible is told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cc3d
import numpy as np

from data.labels import group_tumours
from data.volumes import Volume, find_bounding_box

PLAUSIBLE_ML = {"liver": (500, 4000)}  # volumes of adults
RIGHT_SIDED = ("liver",)  # organs on the patient's right


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
        classes: class indices (X, Y, Z); `names` are those of the classes 1, 2, …
        largest_component: of an organ's voxels only those in its largest body stay.
        fill_holes: background that an organ encloses on all sides becomes organ.
        tumour_inside: tumours that touch no kept organ are dropped; of those that do all stay.
    """
    result, box = classes.copy(order="K"), find_bounding_box(classes > 0)
    part = result[box]  # a view
    for organ, tumours in group_tumours(names).items():
        in_organ, in_tumour = part == organ, np.isin(part, tumours) if tumours else None
        body = in_organ if in_tumour is None else in_organ | in_tumour
        if not body.any():
            continue
        if largest_component or tumours:
            pieces = cc3d.connected_components(body, connectivity=26)
            sizes = cc3d.statistics(pieces, no_slice_conversion=True)["voxel_counts"].astype(int)
            sizes[0] = 0
            if tumours:  # a piece without organ is no candidate
                sizes[np.bincount(pieces[in_organ], minlength=len(sizes)) == 0] = 0
            good = sizes > 0
            if largest_component and good.any():
                good = np.arange(len(sizes)) == sizes.argmax()
            outside = ~good[pieces]
            part[in_organ & outside] = 0
            if in_tumour is not None and tumour_inside:
                part[in_tumour & outside] = 0
        if fill_holes:
            _fill(part, organ, [organ, *tumours])
    return result


def _fill(part: np.ndarray, organ: int, body: Sequence[int]) -> None:
    """Give to `organ` the background that the classes of `body` enclose; in place."""
    box = find_bounding_box(np.isin(part, body))
    closed = np.pad(np.isin(part[box], body), 1)
    spaces = cc3d.connected_components(~closed, connectivity=6)
    holes = (~closed & (spaces != spaces[0, 0, 0]))[1:-1, 1:-1, 1:-1]
    part[box][holes & (part[box] == 0)] = organ


def find_doubts(classes: Volume, scan: Volume, names: Sequence[str]) -> list[str]:
    """What is implausible about a segmentation: class indices and HU on one grid."""
    found, indices, hu = [], classes.ras.data, scan.ras.data
    for organ, tumours in group_tumours(names).items():
        name, body = names[organ - 1], indices == organ
        for tumour in tumours:
            body |= indices == tumour
        box = find_bounding_box(body)
        if box[0].stop == 0:
            found.append(f"no {name} found")
            continue
        low, high = PLAUSIBLE_ML.get(name, (0, math.inf))
        if not low <= (ml := np.count_nonzero(body[box]) * scan.voxel_ml) <= high:
            found.append(f"{name} of {ml:.0f} ml, expected {low} to {high}")
        sides = (("left", "right"), ("back", "front"), ("lower", "upper"))
        for part, size, (first, last) in zip(box, body.shape, sides, strict=True):
            touched = [first] * (part.start == 0) + [last] * (part.stop == size)
            found += [f"{name} reaches the {end} end of the scan: cut off?" for end in touched]
        if name in RIGHT_SIDED:
            patient = hu[:, ::4, box[2]][:, :, ::4] > -300
            columns = np.arange(body.shape[0])
            centre, own = (
                float(columns @ count) / max(int(count.sum()), 1)
                for count in (patient.sum(axis=(1, 2)), body.sum(axis=(1, 2)))
            )
            if own < centre:
                found.append(f"{name} on the patient's left: are the scan's sides right?")
    return found
