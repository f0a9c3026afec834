"""What speaks against a scan, a label map, or the two together: of volumes and arrays alone.

Each returns findings: (kind, what was found), the kinds being keys of `data.check.RULES`. Arrays
are RAS; `coarse` is every n-th voxel in-plane of the scan, `inside` the outline on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from data.labels import Labels, find_label
from data.volumes import SLAB, Volume, list_slabs

Finding = tuple[str, str]  # kind (a key of RULES), what was found

HIGHEST_HU = 31_000  # of any CT, metal included; padding read as unsigned is 62,512 and more


def judge_hu(array: np.ndarray, stored: np.dtype) -> list[Finding]:
    """What speaks against Hounsfield units of a CT, from every 8th voxel of an array (X, Y, Z).

    ("hu", why they cannot be) or ("air", what is only unusual); `stored` is the file's data type.
    """
    sample = np.asfortranarray(array[::2, ::2, ::2]).ravel("K")
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return [("hu", "no finite values")]
    low, high = float(sample.min()), float(sample.max())
    span = f"values from {low:.0f} to {high:.0f}"
    if stored.itemsize == 1:
        return [("hu", f"{span} in {stored}: 8 bits cannot hold HU")]
    if low == high:
        return [("hu", f"every voxel is {low:.0f}")]
    if high > HIGHEST_HU:
        return [("hu", f"{span}: padding outside the scan was read as HU, or it is no CT")]
    if high - low < 300:
        return [("hu", f"{span}: too narrow for HU")]
    if np.mean(sample[sample > -1500] < -30) < 0.01:  # −1500: padding outside the scan's circle
        return [("hu", f"{span}, no fat or air below 0: intercept not applied, or no CT")]
    if np.mean((sample > -1100) & (sample < -900)) < 0.001:
        return [("air", f"{span}: no air near −1000")]
    return []


def judge_grid(scan: Volume, label: Volume, depth: int) -> list[Finding]:
    """What reading told about the two grids, and what the scan's own does not say."""
    findings = [("dicom", note) for note in scan.notes]
    for note in label.notes:
        findings.append(("near_grid" if "apart" in note else "label_note", note))
    if not scan.oriented:
        findings.append(("unoriented", "the header does not say how the axes lie (form codes 0)"))
    if np.allclose(np.abs(scan.ras_affine[:3, :3]), np.eye(3)):
        findings.append(("identity", "the affine holds no spacing and no orientation"))
    if scan.ras_shape[2] < depth:
        findings.append(("thin", f"{scan.ras_shape[2]} slices, fewer than {depth}"))
    return findings


def judge_intensity(coarse: np.ndarray, stored: np.dtype, modality: str) -> list[Finding]:
    """Are these Hounsfield units (of a CT), and is there something on every slice?"""
    blank = int(np.sum(coarse.min(axis=(0, 1)) == coarse.max(axis=(0, 1))))
    findings = judge_hu(coarse, stored) if modality == "CT" else []
    if 0 < blank < coarse.shape[2] or (blank and modality != "CT"):
        findings.append(("blank", f"{blank} of {coarse.shape[2]} slices hold no data"))
    return findings


def judge_outline(coarse: np.ndarray, inside: np.ndarray, any_label: bool) -> list[Finding]:
    """Is there an outline, and does it lie in the body? `inside`: foreground on `coarse`."""
    if not any_label:
        return [("empty", "the label map is empty")]
    if not inside.any():
        return [("no_foreground", "the label map holds none of the foreground values")]
    in_air = float(np.mean(coarse[inside] < -300))
    kind = "outside" if in_air > 0.3 else "partly_outside"
    return [(kind, f"{in_air:.0%} of the foreground lies in air or lung")] * (in_air > 0.05)


def judge_side(coarse: np.ndarray, inside: np.ndarray, x_mm: float) -> list[Finding]:
    """The liver lies on the patient's right, and is more even in HU than what lies on the left."""
    rows = inside.any(axis=(0, 1))
    body, liver = (np.sum(a[:, :, rows], axis=(1, 2)) for a in (coarse > -300, inside))
    columns = np.arange(len(body))
    centre, liver_x = (float(columns @ c / max(c.sum(), 1)) for c in (body, liver))
    flipped = np.round(2 * centre - columns).astype(int)
    usable = (flipped >= 0) & (flipped < len(body))
    mirror = np.zeros_like(inside)
    mirror[columns[usable]] = inside[flipped[usable]]
    if not mirror.any():  # no body, or the outline's mirror image lies outside the scan
        return []
    own, other = (np.subtract(*np.percentile(coarse[m], [75, 25])) for m in (inside, mirror))
    offset = (liver_x - centre) * x_mm
    if own > 2 * other:
        text = f"HU spread over {own:.0f} in the label and {other:.0f} in its mirror image"
        return [("mirrored", text)]
    if offset < -10:
        text = f"scan and label show the liver {-offset:.0f} mm on the patient's left"
        return [("left_right", text)]
    return []


def judge_tumour(
    outline: np.ndarray, counts: dict[int, np.ndarray], labels: Labels
) -> list[Finding]:
    """Tumour voxels in parts that touch no liver. `counts`: see `count_per_slice`."""
    import cc3d

    organ, lesion = find_label("liver", labels), find_label("tumour", labels)
    if organ is None or lesion is None:
        return []
    liver, tumour = labels[organ], labels[lesion]
    rows = np.flatnonzero(sum(counts[value] for value in tumour))
    if not rows.size:
        return []
    box = outline[:, :, max(rows[0] - 1, 0) : rows[-1] + 2]
    shadow = np.asarray(mask_values(box, tumour).any(axis=2))
    sides = [np.flatnonzero(shadow.any(axis=axis)) for axis in (1, 0)]
    box = box[tuple(slice(max(side[0] - 1, 0), side[-1] + 2) for side in sides)]
    in_liver, in_tumour = mask_values(box, liver), mask_values(box, tumour)
    parts = cc3d.connected_components(in_liver | in_tumour)
    with_liver = np.bincount(parts[in_liver], minlength=parts.max() + 1) > 0
    apart = int(np.count_nonzero(~with_liver[parts[in_tumour]]))
    return [("tumour_apart", f"{apart} tumour voxels touch no liver")] * (apart > 0)


def is_label_map(array: np.ndarray, values: Sequence[int]) -> bool:
    """Whether what should be a scan holds nothing but label values."""
    return bool(array.size) and bool(np.isin(array, values).all())


# ---------------------------------------------------------------------------------------
# Counting, in the order in which voxels lie in memory
# ---------------------------------------------------------------------------------------


def mask_values(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where an array holds one of some values, in its own memory order."""
    return reduce(np.logical_or, [array == value for value in values])


def undo_flips(array: np.ndarray) -> np.ndarray:
    """The same voxels as they lie in memory: counting in a flipped view is 8 times slower."""
    return array[tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)]


def count_per_slice(label: np.ndarray, values: Sequence[int]) -> dict[int, np.ndarray]:
    """Value → voxels with it in each slice of (X, Y, Z); background is what remains."""
    planes = [undo_flips(label[:, :, z]) for z in range(label.shape[2])]
    counts = {v: np.array([np.count_nonzero(p == v) for p in planes]) for v in values if v}
    filled = sum(counts.values(), start=np.zeros(len(planes), int))
    return {0: planes[0].size - filled} | counts


def find_busiest(mask: np.ndarray) -> tuple[int, int, int]:
    """Index of the sagittal, coronal and axial slice with most voxels; the middle if none has."""
    if not mask.any():
        x, y, z = (size // 2 for size in mask.shape)
    else:
        x, y, z = (int(mask.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


# ---------------------------------------------------------------------------------------
# Reading, slab by slab
# ---------------------------------------------------------------------------------------


def read_outline(label: Volume, values: Sequence[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Label map (X, Y, Z) RAS of the smallest type, and `count_per_slice` of it."""
    x, y, depth = label.ras_shape
    kind = np.min_scalar_type(max(values))
    outline = np.zeros((x, y, depth), kind, order="F")  # slabs not written to take no memory
    counts = {value: np.zeros(depth, np.int64) for value in values}
    counts[0] = np.full(depth, x * y)
    for first, slab in label.slabs(list_slabs(depth, SLAB)):
        if undo_flips(slab).any():
            here = slice(first, first + slab.shape[2])
            for value, number in count_per_slice(slab, values).items():
                counts[value][here] = number
            outline[:, :, here] = slab
    return outline, counts


def read_coarse(
    scan: Volume, step: int, middle: tuple[int, int, int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every `step`-th voxel in-plane, and three planes through `middle`: axial, coronal, sagittal.

    One pass over the scan, one slab at a time, in Fortran order: a slice lies in one piece.
    """
    (x, y, z), shape = middle, scan.ras_shape
    coarse, planes = None, {}
    for first, slab in scan.slabs(list_slabs(shape[2], SLAB)):
        if coarse is None:
            small = slab[::step, ::step].shape[:2]
            coarse = np.empty((*small, shape[2]), slab.dtype, order="F")
            sizes = {"axial": (*shape[:2], 1), "coronal": (shape[0], 1, shape[2])}
            sizes["sagittal"] = (1, *shape[1:])
            planes = {plane: np.empty(n, slab.dtype, order="F") for plane, n in sizes.items()}
        here = slice(first, first + slab.shape[2])
        coarse[:, :, here] = slab[::step, ::step]
        planes["sagittal"][:, :, here] = slab[x : x + 1]
        planes["coronal"][:, :, here] = slab[:, y : y + 1]
        if first <= z < here.stop:
            planes["axial"][:, :, 0] = slab[:, :, z - first]
    assert coarse is not None  # a Volume has at least one slice
    return coarse, planes
