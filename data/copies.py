"""Is one scan there twice? Crops are found by their slices, other copies by their look."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

ALIKE = 0.985  # correlation of two scans' pictures from which on they are copies


def mark_scan(coarse: np.ndarray) -> dict[str, list[int]]:
    """What a copy of the scan shares: checksums of its slices, and a 16×16×16 picture of it."""
    import torch

    whole = np.clip(coarse, -3000, 3000).round().astype(np.int16)
    full = [z for z in range(whole.shape[2]) if whole[:, :, z].min() < whole[:, :, z].max()]
    soft = torch.from_numpy(np.clip(whole[::2, ::2], -200, 250).astype(np.float32))
    picture = torch.nn.functional.adaptive_avg_pool3d(soft[None, None], 16).numpy()
    return {
        "slices": [zlib.crc32(np.ascontiguousarray(whole[:, :, z]).data) for z in full],
        "picture": np.rint(picture.ravel()).astype(int).tolist(),
    }


def find_duplicates(marks: Sequence[dict[str, list[int]]]) -> list[tuple[int, int, str]]:
    """Pairs (i, j), i < j, that are one scan, and why: crops by slices, other copies by look.

    `marks`: see `mark_scan`. Work grows with the scans and with what is found, not with the pairs.
    """
    shared: Counter[tuple[int, int]] = Counter()
    seen: defaultdict[int, list[int]] = defaultdict(list)
    for index, mark in enumerate(marks):
        for checksum in set(mark["slices"]):
            shared.update((other, index) for other in seen[checksum])
            seen[checksum].append(index)
    found = {}
    for (one, other), number in shared.items():
        if number > 1 and number >= 0.1 * min(len(marks[i]["slices"]) for i in (one, other)):
            found[one, other] = f"{number} slices are identical"
    for one, other, alike in find_lookalikes([mark["picture"] for mark in marks]):
        found.setdefault((one, other), f"correlation {alike:.4f}")
    return [(one, other, how) for (one, other), how in sorted(found.items())]


def find_lookalikes(pictures: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, float]]:
    """Pairs of 16×16×16 pictures that correlate by more than ALIKE.

    As unit vectors they lie √(2 − 2r) apart. Sums over 4×4×4 blocks (an orthogonal projection onto
    64 numbers: no distance grows by it) let a k-d tree find the few pairs that are worth comparing.
    """
    from scipy.spatial import cKDTree

    if len(pictures) < 2:
        return
    units = np.reshape(np.asarray(pictures, np.float64), (len(pictures), -1))
    units = units - units.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(units, axis=1)
    usable = np.flatnonzero(lengths > 0)
    if len(usable) < 2:
        return
    units = units[usable] / lengths[usable, None]
    blocks = units.reshape(-1, 4, 4, 4, 4, 4, 4).sum(axis=(2, 4, 6)).reshape(len(units), 64) / 8
    radius = np.sqrt(2 - 2 * ALIKE) + 1e-6
    pairs = cKDTree(blocks).query_pairs(radius, output_type="ndarray")
    for (a, b), alike in zip(pairs.tolist(), correlate(units, pairs), strict=True):
        if alike > ALIKE:
            one, other = sorted((int(usable[a]), int(usable[b])))
            yield one, other, alike


def correlate(units: np.ndarray, pairs: np.ndarray) -> list[float]:
    """Correlation of each pair (n, 2) of rows of `units`, which have mean 0 and length 1."""
    return [float(units[one] @ units[other]) for one, other in pairs]
