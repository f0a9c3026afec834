"""Dice means what a reader takes it for: hard, per patient, background excluded."""

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric

from data.metrics import dice_metric, mean_dice


def test_half_an_organ_scores_two_thirds():
    label = np.zeros((10, 10, 10), int)
    label[2:6] = 1
    prediction = label.copy()
    prediction[4:6] = 0
    assert dice_metric(prediction, label) == pytest.approx([2 / 3])


def test_all_background_scores_nothing():
    label = np.zeros((8, 8, 8), int)
    label[:2] = 1
    assert dice_metric(np.zeros_like(label), label) == [0.0]


def test_empty_cases():
    empty = np.zeros((4, 4, 4), int)
    assert np.isnan(dice_metric(empty, empty)).all()  # nothing to find, nothing found
    assert dice_metric(empty + 1, empty) == [0.0]  # a false alarm stays visible
    mean, counted = mean_dice([[np.nan], [0.0], [1.0]])
    assert mean == [0.5]
    assert counted == [2]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_monai_on_tensors_and_arrays(seed):
    rng = np.random.default_rng(seed)
    prediction, label = rng.integers(0, 4, (2, 12, 12, 12))
    ours = dice_metric(prediction, label, num_classes=4)
    tensors = [torch.from_numpy(a) for a in (prediction, label)]
    assert np.array_equal(ours, dice_metric(*tensors, num_classes=4))
    metric = DiceMetric(include_background=False, num_classes=4)
    theirs = metric(*(tensor[None, None] for tensor in tensors))
    assert ours == pytest.approx(theirs.numpy()[0], abs=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes must be equal"):
        dice_metric(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
