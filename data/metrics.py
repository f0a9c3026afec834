"""Figures of label maps: overlap, hard, per patient, background excluded; and shape."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


def overlap_counts(prediction: Any, label: Any, num_classes: int) -> np.ndarray:
    """(3, num_classes − 1) voxel counts: in both, in the prediction, in the label; class 1 first.

    `prediction` and `label` are class-index arrays or tensors of one shape.
    """
    if tuple(prediction.shape) != tuple(label.shape):
        raise ValueError(f"shapes must be equal, got {prediction.shape} and {label.shape}")
    overlaps = list_overlaps(prediction, label, num_classes)
    counts = [[int(number) for number in numbers] for numbers in overlaps]
    return np.array(counts, dtype=np.int64).reshape(-1, 3).T


def list_overlaps(prediction: Any, label: Any, num_classes: int) -> list[list[Any]]:
    """The same of class 1, 2, …; of tensors as tensors, which a GPU need not hand over yet."""
    masks = [(prediction == value, label == value) for value in range(1, num_classes)]
    return [[(found & true).sum(), found.sum(), true.sum()] for found, true in masks]


def dice_metric(
    prediction: Any = None, label: Any = None, num_classes: int = 2, *, counts: Any = None
) -> np.ndarray:
    """Hard Dice of one patient for the foreground classes 1 … num_classes − 1, background excluded.

    2·|both| / (|prediction| + |label|). A prediction on an empty label gives 0: a false alarm must
    not vanish from the mean.

    Args:
        prediction, label: class indices, arrays or tensors of one shape (any number of axes), on
            the scan's own grid if the figure is to be reported.
        counts: instead of both, the sum of their `overlap_counts` over the pieces of a patient.

    Returns:
        (num_classes − 1,) Dice in 0..1; NaN where a class is in neither (`mean_dice` skips it).
    """
    if counts is None:
        counts = overlap_counts(prediction, label, num_classes)
    both, predicted, true = np.asarray(counts, float)
    with np.errstate(invalid="ignore"):
        return 2 * both / (predicted + true)


def mean_dice(per_patient: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over patients of (patients, classes) Dice, NaN left out, and how many counted."""
    table = np.asarray(per_patient, dtype=float)
    counted = np.isfinite(table).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.nansum(table, axis=0) / counted, counted


def nan_mean(values: Iterable[float]) -> float:
    """Mean of what is a number; NaN of nothing, without a warning."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def measure_nearest(points: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """Distance of each point (N, 3) to the nearest one of a cloud (M, 3), on all cores.

    The threads are ours, not the tree's own, which outlive Ctrl-C and crash Python at its end.
    """
    from scipy.spatial import cKDTree

    tree, cores = cKDTree(cloud, balanced_tree=False, compact_nodes=False), os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        parts = pool.map(lambda part: tree.query(part)[0], np.array_split(points, cores))
        return np.concatenate(list(parts))


def measure_shape(mask: np.ndarray, to_mm: np.ndarray) -> dict[str, float | None]:
    """Sphericity and elongation of a mask (X, Y, Z), in mm by the 3×3 map `to_mm` of a voxel step.

    As IBSI defines them (Zwanenburg et al. 2016, arXiv:1612.07003): sphericity is the surface of
    the ball of equal volume over the mask's own, 1 for a ball; elongation the root of the second
    largest over the largest variance of the voxels' centres, 1 where no axis is the longest, 0 for
    a needle. None of an empty mask, and elongation of a single voxel.
    """
    area, volume = measure_area(mask, to_mm), np.count_nonzero(mask) * abs(np.linalg.det(to_mm))
    if not volume:
        return {"sphericity": None, "elongation": None}
    along, second, size = [np.arange(n, dtype=float) for n in mask.shape], np.zeros((3, 3)), 0.0
    mean = np.zeros(3)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        plane = np.count_nonzero(mask, axis=3 - a - b)
        size = plane.sum()
        mean[a], mean[b] = along[a] @ plane.sum(axis=1) / size, plane.sum(axis=0) @ along[b] / size
        second[a, b] = second[b, a] = along[a] @ plane @ along[b] / size
        second[a, a] = along[a] ** 2 @ plane.sum(axis=1) / size
        second[b, b] = plane.sum(axis=0) @ along[b] ** 2 / size
    _, middle, largest = np.linalg.eigvalsh(to_mm @ (second - np.outer(mean, mean)) @ to_mm.T)
    long = largest > 1e-9 * volume ** (2 / 3)
    return {
        "sphericity": min(1.0, float((36 * np.pi * volume**2) ** (1 / 3) / area)),
        "elongation": float(np.sqrt(max(middle, 0) / largest)) if long else None,
    }


def measure_area(mask: np.ndarray, to_mm: np.ndarray) -> float:
    """Surface of a mask (X, Y, Z) in mm², by Crofton's formula: how often lines cross it.

    Lines in 13 directions (Legland et al. 2007, doi:10.5566/ias.v26.p83-92), each with the part of
    the sphere that is nearest to it. Along short voxel edges they step over several voxels, so that
    the directions are about even also where slices are thick. Right for round bodies (3 % in tests
    of ellipsoids); of flat sides along the axes a tenth is missing. The faces of the voxels would
    count half too much of a ball.
    """
    edges = np.linalg.norm(to_mm, axis=0)
    reach = np.maximum(np.round(edges.max() / edges), 1).astype(int)
    padded = np.pad(np.asarray(mask, bool), [(n, n) for n in reach])
    steps = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0)]) * reach
    lines = steps @ to_mm.T
    lengths = np.linalg.norm(lines, axis=1)
    count = 5000  # points that are even on the sphere, by the golden angle
    z = np.linspace(1, -1, 2 * count + 1)[1::2]
    turn = np.arange(count) * np.pi * (3 - 5**0.5)
    flat = np.sqrt(1 - z * z)
    points = np.stack([flat * np.cos(turn), flat * np.sin(turn), z], axis=1)
    nearest = np.abs(points @ (lines / lengths[:, None]).T).argmax(axis=1)
    shares = np.bincount(nearest, minlength=len(steps)) / count
    area = 0.0
    for step, length, share in zip(steps, lengths, shares, strict=True):
        here = tuple(
            slice(max(n, 0), m + min(n, 0)) for n, m in zip(step, padded.shape, strict=True)
        )
        there = tuple(
            slice(max(-n, 0), m - max(n, 0)) for n, m in zip(step, padded.shape, strict=True)
        )
        area += share * np.count_nonzero(padded[here] != padded[there]) / length
    return 2 * area * abs(float(np.linalg.det(to_mm)))
