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

    As IBSI has them (arXiv:1612.07003): the surface of the ball of equal volume over the mask's
    own, 1 for a ball; the root of the second largest over the largest variance of the voxels'
    centres, 0 for a needle. None of an empty mask, and elongation of a single voxel.
    """
    area, volume = measure_area(mask, to_mm), np.count_nonzero(mask) * abs(np.linalg.det(to_mm))
    if not volume:
        return dict.fromkeys(("sphericity", "elongation"))
    mean, second = np.zeros(3), np.zeros((3, 3))
    for a, b in ((0, 1), (1, 2), (2, 0)):  # each axis once as `a`
        plane = np.count_nonzero(mask, axis=3 - a - b)
        plane = (plane if a < b else plane.T) / plane.sum()
        along, across = np.arange(mask.shape[a]), np.arange(mask.shape[b])
        mean[a], second[a, a] = along @ plane.sum(axis=1), along**2 @ plane.sum(axis=1)
        second[a, b] = second[b, a] = along @ plane @ across
    _, middle, largest = np.linalg.eigvalsh(to_mm @ (second - np.outer(mean, mean)) @ to_mm.T)
    long = largest > 1e-9 * volume ** (2 / 3)
    elongation = float(np.sqrt(max(middle, 0) / largest)) if long else None
    sphericity = min(1.0, float(np.cbrt(36 * np.pi * volume**2) / area))
    return {"sphericity": sphericity, "elongation": elongation}


def measure_area(mask: np.ndarray, to_mm: np.ndarray) -> float:
    """Surface of a mask (X, Y, Z) in mm², by Crofton's formula: how often lines cross it.

    Lines in 13 directions (Legland et al. 2007, doi:10.5566/ias.v26.p83-92), each with the part of
    the sphere nearest to it, that step over several voxels where edges are short. Of flat sides
    along the axes a tenth is missing; the voxels' faces would count half too much of a ball.
    """
    edges = np.linalg.norm(to_mm, axis=0)
    reach = np.maximum(np.round(edges.max() / edges), 1).astype(int)
    padded = np.pad(np.asarray(mask, bool), [(n, n) for n in reach])
    steps = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0)]) * reach
    lengths = np.linalg.norm(steps @ to_mm.T, axis=1)
    points = np.random.default_rng(0).normal(size=(50_000, 3))  # in all directions alike
    nearest = np.abs(points @ (to_mm @ (steps.T / lengths))).argmax(axis=1)
    shares = np.bincount(nearest, minlength=len(steps)) / len(points)
    crossings = [np.count_nonzero(padded != np.roll(padded, n, axis=(0, 1, 2))) for n in steps]
    return 2 * float(np.sum(shares * crossings / lengths) * abs(np.linalg.det(to_mm)))
