"""Dice means what a reader takes it for: hard, per patient, background excluded."""

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric

from data.evaluate import dice_metric, nan_mean


def test_a_false_alarm_counts_and_an_absent_organ_does_not():
    empty = np.zeros((4, 4, 4), int)
    assert np.isnan(dice_metric(empty, empty)).all()
    assert dice_metric(empty + 1, empty) == dice_metric(empty, empty + 1) == [0.0]
    assert nan_mean([np.nan, 0.0, 1.0]) == 0.5


def test_dice_of_tensors_and_arrays_is_monais():
    prediction, label = np.random.default_rng(0).integers(0, 4, (2, 12, 12, 12))
    ours = dice_metric(prediction, label, num_classes=4)
    tensors = [torch.from_numpy(a) for a in (prediction, label)]
    assert np.array_equal(ours, dice_metric(*tensors, num_classes=4))
    metric = DiceMetric(include_background=False, num_classes=4)
    theirs = metric(*(tensor[None, None] for tensor in tensors))
    assert ours == pytest.approx(theirs.numpy()[0], abs=1e-6)
