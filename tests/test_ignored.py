"""Voxels that nobody judged: no loss, no gradient and no metric counts them."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import train
from data.labels import IGNORED
from data.scans import list_cuts
from preprocess import SLICE_MM, Chain, SliceSpacingd, ValuesToClassesd
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


@pytest.mark.parametrize("name", train.LOSSES)
def test_loss_of_the_judged_is_that_of_these_alone(name, batch):
    """A quarter of the slices drawn must not make the cross-entropy a quarter of itself."""
    logits, label, _ = batch
    loss = train.LOSSES[name](torch.tensor([0.5, 1.5]))
    some = logits[..., :4].clone(), label[..., :4].clone()
    hidden = label.clone()
    hidden[..., 4:] = IGNORED
    judged = train.JudgedLoss(loss)(logits, hidden)
    assert judged.item() == pytest.approx(loss(*some).item(), rel=1e-5)


def test_a_batch_that_nobody_judged_moves_nothing(batch):
    logits, label, _ = batch
    logits.requires_grad_()
    loss = train.JudgedLoss(train.LOSSES["dice_ce"](None))
    value = loss(logits, torch.full_like(label, IGNORED))
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("every, size", [(2, 16), (3, 16), (4, 16), (8, 16), (15, 16), (4, 1)])
def test_each_place_of_a_window_is_drawn_in_some_subvolume(every, size):
    """Strided layers tell the places of a window apart: all must be learnt."""
    cases = [list_cuts(100, size, every, shift / 20) for shift in range(20)]
    for cuts in cases:
        assert all(last - first == size and first >= 0 and last <= 100 for first, last in cuts)
        assert {z for first, last in cuts for z in range(first, last)} == set(range(100))
    drawn = {z - f for cuts in cases for f, last in cuts for z in range(f, last) if z % every == 0}
    assert drawn == set(range(size))
    assert list_cuts(10, 16, every, 0.5) == [(0, 10)]


@pytest.mark.parametrize("drawn", range(4))
def test_a_drawn_slice_between_two_slices_of_a_patch_is_not_lost(drawn):
    """1 mm slices, every fourth drawn, at 4 mm: the nearest one is never a drawn one otherwise."""
    label = torch.full((41, 2, 2), float(IGNORED))
    label[drawn::4] = 1
    slices = MetaTensor(label, meta={SLICE_MM: 1.0})
    coarse = SliceSpacingd(["label"], 4.0)({"label": slices})["label"]
    assert len(coarse) == 11 and (coarse[1:-1] == 1).all()


def test_slices_that_are_all_judged_give_the_nearest_one():
    slices = MetaTensor(torch.arange(41.0)[:, None, None], meta={SLICE_MM: 1.0})
    coarse = SliceSpacingd(["label"], 3.7)({"label": slices})["label"].flatten()
    there = np.minimum(3.7 * np.arange(len(coarse)), 40)  # the last one lies behind the last slice
    assert np.abs(coarse.numpy() - there).max() <= 0.5


def test_raw_values_become_ignored():
    chain = Chain(
        "subvolumes", (1.0, 1.0), None, (8, 8), {"background": (0,), "liver": (1, 2)}, (9,), False
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
