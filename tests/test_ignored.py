"""Unannotated voxels: no loss, no gradient and no metric counts them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from data.labels import IGNORED, LABEL
from data.scans import list_cuts
from preprocess import Chain, preprocess_slices, resample_depth
from utilities import Run, train_step

CHAIN = Chain(
    sampling="subvolumes", spacing=(1.0, 1.0), hu_window=None, input_size=(8, 8),
    labels={"background": (0,), "liver": (1, 2)}, ignore=(9,), crop_to_body=False,
)  # fmt: skip


@pytest.fixture
def batch():
    """Logits (2, 2, 8, 8, 8), a label, and which voxels are unannotated."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 8, 8, 8, generator=generator)
    label = (torch.rand(2, 1, 8, 8, 8, generator=generator) > 0.7).float()
    unknown = torch.rand(2, 1, 8, 8, 8, generator=generator) > 0.5
    return logits, label, unknown


@pytest.mark.parametrize("name", train.LOSSES)
def test_unannotated_voxels_change_neither_loss_nor_gradient(name, batch):
    logits, label, unknown = batch
    loss = train.AnnotatedLoss(train.LOSSES[name](torch.ones(2)))
    seen = []
    for other in (0.0, 3.0):  # what the network finds there
        given = torch.where(unknown, logits + other * torch.randn_like(logits), logits)
        given.requires_grad_()
        value = loss(given, label.masked_fill(unknown, IGNORED))
        value.backward()
        assert (given.grad[unknown.expand_as(logits)] == 0).all()
        assert given.grad.abs().sum() > 0
        seen.append((value.item(), given.grad))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-6)
    assert torch.allclose(seen[0][1], seen[1][1])


@pytest.mark.parametrize("name", train.LOSSES)
def test_the_loss_is_that_of_the_annotated_slices_alone(name, batch):
    """Annotating half of the slices must not halve the cross-entropy."""
    logits, label, _ = batch
    loss, hidden = train.LOSSES[name](torch.tensor([0.5, 1.5])), label.clone()
    hidden[..., 4:] = IGNORED
    found = train.AnnotatedLoss(loss)(logits, hidden)
    assert found.item() == pytest.approx(loss(logits[..., :4], label[..., :4]).item(), rel=1e-5)


def test_a_batch_without_annotation_moves_nothing(batch):
    logits, label, _ = batch
    logits.requires_grad_()
    value = train.AnnotatedLoss(train.LOSSES["dice_ce"](None))(logits, label * 0 + IGNORED)
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


def test_counts_of_a_step_leave_unannotated_voxels_out(batch, tmp_path):
    """A network that finds everything everywhere is wrong only at annotated voxels."""
    image, label, unknown = batch
    network = torch.nn.Conv3d(1, 2, kernel_size=1)
    torch.nn.init.zeros_(network.weight)
    network.bias.data = torch.tensor([0.0, 1.0])
    optimizer, carried = (
        torch.optim.SGD(network.parameters(), 0.1),
        {"preprocessing": {"labels": ()}},
    )
    run = Run(network, optimizer, None, tmp_path, torch.device("cpu"), torch.float32, carried)
    given = {"image": image[:, :1], "label": label.masked_fill(unknown, IGNORED)}
    _, counts = train_step(run, given, train.AnnotatedLoss(train.LOSSES["ce"](None)), 0.0)
    known = label[~unknown]
    assert counts[:, 0].tolist() == [known.sum(), known.numel(), known.sum()]


@pytest.mark.parametrize("every, size", [(2, 16), (3, 16), (8, 16), (15, 16), (4, 1)])
def test_each_place_of_a_window_is_annotated_in_some_subvolume(every, size):
    """Strided layers tell the places of a window apart: all must be learnt."""
    cases = [list_cuts(100, size, every, shift / 20) for shift in range(20)]
    for cuts in cases:
        assert all(last - first == size and first >= 0 and last <= 100 for first, last in cuts)
        assert {z for first, last in cuts for z in range(first, last)} == set(range(100))
    drawn = {z - f for cuts in cases for f, last in cuts for z in range(f, last) if z % every == 0}
    assert drawn == set(range(size))
    assert list_cuts(10, 16, every, 0.5) == [(0, 10)]


@pytest.mark.parametrize("first", range(4))
def test_an_annotated_slice_between_two_slices_of_a_patch_is_not_lost(first):
    """1 mm slices, every fourth annotated, at 4 mm: the nearest one is never an annotated one."""
    label = torch.full((41, 2, 2), float(IGNORED))
    label[first::4] = 1
    patches = replace(CHAIN, sampling="patches", spacing=(1.0, 1.0, 4.0))
    coarse = resample_depth(label, 1.0, patches, LABEL)
    assert len(coarse) == 11 and (coarse[1:-1] == 1).all()


def test_slices_that_are_all_annotated_give_the_nearest_one():
    patches = replace(CHAIN, sampling="patches", spacing=(1.0, 1.0, 3.7))
    coarse = resample_depth(torch.arange(41.0)[:, None, None], 1.0, patches, LABEL).flatten()
    there = np.minimum(3.7 * np.arange(len(coarse)), 40)  # the last one lies behind the last slice
    assert np.abs(coarse.numpy() - there).max() <= 0.5


def test_raw_values_become_classes_or_ignored():
    raw = np.repeat(np.array([0, 1, 2, 9, 7], np.uint8), 8)[:, None, None] + np.zeros(
        (1, 8, 1), "u1"
    )
    wide = replace(CHAIN, input_size=(40, 8))
    classes = preprocess_slices(raw, (1.0, 1.0, 5.0), wide, "cpu", LABEL)
    assert classes[0, 4::8, 0].tolist() == [0, 1, 1, IGNORED, 0]
