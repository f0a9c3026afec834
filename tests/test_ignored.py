"""Voxels that nobody judged: no loss, no gradient and no metric counts them."""

import numpy as np
import pytest
import torch

import train
from data.labels import IGNORED
from preprocess import Chain, ValuesToClassesd
from utilities import predicted_classes


@pytest.fixture
def batch():
    """Logits (2, 2, 8, 8, 8), a label, and which voxels nobody judged."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 8, 8, 8, generator=generator)
    label = (torch.rand(2, 1, 8, 8, 8, generator=generator) > 0.7).float()
    unknown = torch.rand(2, 1, 8, 8, 8, generator=generator) > 0.5
    return logits, label, unknown


@pytest.mark.parametrize("name", train.LOSSES)
def test_what_nobody_judged_changes_neither_loss_nor_gradient(name, batch):
    logits, label, unknown = batch
    loss = train.JudgedLoss(train.LOSSES[name](torch.ones(2)))
    seen = []
    for other in (0.0, 3.0):  # what the network says there
        given = torch.where(unknown, logits + other * torch.randn_like(logits), logits)
        given.requires_grad_()
        value = loss(given, label.masked_fill(unknown, IGNORED))
        value.backward()
        assert torch.isfinite(value)
        assert (given.grad[unknown.expand_as(logits)] == 0).all()
        assert given.grad.abs().sum() > 0
        seen.append((value.item(), given.grad))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-6)
    assert torch.allclose(seen[0][1], seen[1][1])


def test_dice_loss_of_the_judged_is_that_of_these_alone(batch):
    logits, label, _ = batch
    loss = train.LOSSES["dice"](None)
    half = logits.clone()[..., :4], label[..., :4]
    hidden = label.clone()
    hidden[..., 4:] = IGNORED
    assert train.JudgedLoss(loss)(logits, hidden).item() == pytest.approx(loss(*half).item())


def test_raw_values_become_ignored():
    chain = Chain(
        "subvolumes", (1.0, 1.0), None, (8, 8), {"background": (0,), "liver": (1, 2)}, (9,)
    )
    raw = torch.tensor([[0.0, 1, 2, 9, 7]])
    classes = ValuesToClassesd(["label"], chain)({"label": raw})["label"]
    assert classes.tolist() == [[0, 1, 1, IGNORED, 0]]


def test_counts_of_a_step_leave_the_ignored_out(monkeypatch, batch):
    """A network that finds everything everywhere is wrong only where somebody judged."""
    import utilities

    _, label, unknown = batch
    certain = torch.stack([torch.zeros(2, 8, 8, 8), torch.ones(2, 8, 8, 8)], dim=1)
    found = predicted_classes(certain).masked_fill(unknown[:, 0], 0)
    hidden = label.masked_fill(unknown, IGNORED)[:, 0]
    both, predicted, true = np.array(utilities.overlap_counts(found, hidden, 2))[:, 0]
    judged = label[~unknown]
    assert (both, predicted, true) == (judged.sum(), judged.numel(), judged.sum())
