"""Figures of merit of label maps: hard, per patient, background excluded."""

from __future__ import annotations

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
