"""Unannotated voxels: no loss, no gradient and no metric counts them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import cached, copy_prepared, small_config

import train
from data.labels import IGNORED, IMAGE, LABEL
from data.scans import list_cuts
from preprocess import Chain, preprocess_slices, resample_depth
from utilities import Run, load_checkpoint, train_step, validate

CHAIN = Chain(
    sampling="subvolumes", spacing=(1.0, 1.0), hu_window=None, input_size=(40, 8),
    labels={"background": (0,), "liver": (1, 2)}, ignore=(9,), crop_to_body=False,
)  # fmt: skip
PATCHES = replace(CHAIN, sampling="patches", spacing=(1.0, 1.0, 4.0))


@pytest.fixture
def batch():
    """Logits (2, 2, 8, 8, 8) and a label."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 8, 8, 8, generator=generator)
    return logits, (torch.rand(2, 1, 8, 8, 8, generator=generator) > 0.7).float()


@pytest.mark.parametrize("name", train.LOSSES)
def test_loss_and_gradient_are_those_of_the_annotated_slices_alone(name, batch):
    """Annotating half of the slices must not halve the cross-entropy either."""
    logits, label = batch
    loss = train.LOSSES[name](torch.tensor([0.5, 1.5]))
    hidden = label.clone()
    hidden[..., 4:] = IGNORED
    logits.requires_grad_()
    value = train.AnnotatedLoss(loss)(logits, hidden)
    value.backward()
    assert value.item() == pytest.approx(loss(logits[..., :4], label[..., :4]).item(), rel=1e-5)
    assert not logits.grad[..., 4:].any()
    assert logits.grad[..., :4].any()


def test_a_batch_without_annotation_moves_nothing(batch):
    logits, label = batch
    logits.requires_grad_()
    value = train.AnnotatedLoss(train.LOSSES["dice_ce"](None))(logits, label * 0 + IGNORED)
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


def make_run(network, rate, folder):
    carried = {"preprocessing": {"labels": ("other", "liver")}, "inference": {"window": (8, 8, 8)}}
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    return Run(network, optimizer, None, folder, torch.device("cpu"), torch.float32, carried)


def test_gradients_are_clipped(batch, tmp_path):
    network = torch.nn.Conv3d(1, 2, 1)
    run, (image, label) = make_run(network, 1.0, tmp_path), batch
    given, loss = {IMAGE: image[:, :1], LABEL: label, "case": "ab"}, train.LOSSES["ce"](None)
    before = torch.nn.utils.parameters_to_vector(network.parameters()).clone()
    train_step(run, given, loss, 0.01)
    moved = torch.nn.utils.parameters_to_vector(network.parameters()) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_training_and_validation_leave_unannotated_voxels_out(batch, tmp_path):
    """A network that finds everything everywhere is wrong only at annotated voxels."""
    network = torch.nn.Conv3d(1, 2, kernel_size=1)
    network.bias.data = torch.tensor([0.0, 99.0])
    run = make_run(network, 0.0, tmp_path)
    image, label = batch
    hidden = label.clone()
    hidden[..., 4:] = IGNORED
    given = {IMAGE: image[:, :1], LABEL: hidden, "case": ["same", "same"]}
    loss, known = train.AnnotatedLoss(train.LOSSES["ce"](None)), label[..., :4]
    _, counts = train_step(run, given, loss, 0.0)
    assert counts[:, 0].tolist() == [known.sum(), known.numel(), known.sum()]
    expected = 2 * known.sum() / (known.numel() + known.sum())
    assert validate(run, [given], loss)["val_dice_liver"] == pytest.approx(expected.item())
    given[LABEL] = 0 * label  # a class that nobody has, found everywhere
    assert np.isnan(validate(run, [given], loss)["val_dice_liver"])


@pytest.mark.parametrize("every, size", [(2, 16), (3, 16), (15, 16), (4, 1)])
def test_each_place_of_a_window_is_annotated_in_some_subvolume(every, size):
    """Strided layers tell the places of a window apart: all must be learnt."""
    cases = [list_cuts(100, size, every, shift / 20) for shift in range(20)]
    for cuts in cases:
        assert all(last - first == size and first >= 0 and last <= 100 for first, last in cuts)
        assert {z for first, last in cuts for z in range(first, last)} == set(range(100))
    drawn = {z - f for cuts in cases for f, last in cuts for z in range(f, last) if z % every == 0}
    assert drawn == set(range(size))


@pytest.mark.parametrize("first", range(4))
def test_an_annotated_slice_between_two_slices_of_a_patch_is_not_lost(first):
    """1 mm slices, every fourth annotated, at 4 mm: the nearest one is never an annotated one."""
    label = torch.full((41, 2, 2), float(IGNORED))
    label[first::4] = 1
    coarse = resample_depth(label, 1.0, PATCHES, LABEL)
    assert len(coarse) == 11 and (coarse[1:-1] == 1).all()


def test_slices_that_are_all_annotated_give_the_nearest_one():
    numbers = torch.arange(41.0)[:, None, None]
    coarse = resample_depth(numbers, 1.0, replace(PATCHES, spacing=(1.0, 1.0, 3.5)), LABEL)
    assert coarse.flatten().tolist() == [0, 3, 7, 10, 14, 17, 21, 24, 28, 31, 35, 38]


def test_raw_values_become_classes_or_ignored():
    raw = np.repeat(np.array([0, 1, 2, 9, 7], np.uint8), 8)[:, None, None].repeat(8, axis=1)
    classes = preprocess_slices(raw, (1.0, 1.0, 5.0), CHAIN, "cpu", LABEL)
    assert classes[0, 4::8, 0].tolist() == [0, 1, 1, IGNORED, 0]


@pytest.mark.usefixtures("blank_pictures")
def test_a_training_ignores_the_values_that_the_data_declare(few, tmp_path):
    data = copy_prepared(few, tmp_path / "data", lambda content: content.update(ignore=[2]))
    config = small_config(data, tmp_path / "run", max_epochs=1, labels={"liver": ("liver",)})
    assert any((item[LABEL] == IGNORED).any() for item in cached(config))
    train.main(config)
    row = load_checkpoint(tmp_path / "run" / "last.pt")["history"][0]
    assert 0 < row["train_loss"] < 1 and np.isfinite(row["val_loss"])
