"""The network is the published one; every network, loss and optimizer trains and reloads."""

from itertools import cycle
from typing import get_args

import pytest
import torch
from helpers import copy_prepared, small_config
from torch.nn.modules.dropout import _DropoutNd

import apply_model
import train
from utilities import UNet3D, build_network, predict_classes

ARGUMENTS = {"in_channels": 1, "out_channels": 2, "base_channels": 16, "input_size": (32, 32, 32)}


def test_parameters_as_counted_in_the_paper():
    model = UNet3D(in_channels=3, out_channels=3)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm3d)]
    scales = sum(module.weight.numel() for module in norms)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (total, scales) == (19_072_291, 2_336)
    assert total - scales == 19_069_955  # Çiçek et al. 2016


def test_predicted_classes_are_the_largest_logits():
    for classes in (2, 4):
        logits = torch.randn(2, classes, 8, 8, 8)
        assert torch.equal(predict_classes(logits), logits.argmax(1).to(torch.uint8))


def test_the_2d_network_sees_each_slice_alone():
    network = build_network("resnet34_unet", **ARGUMENTS).eval()
    volume = torch.randn(2, 1, 32, 32, 5)
    with torch.no_grad():
        together, alone = network(volume), network(volume[..., 3:4])
    assert together.shape == (2, 2, 32, 32, 5)
    assert torch.allclose(together[..., 3:4], alone, atol=1e-5)


@pytest.mark.parametrize("name", get_args(train.NetworkName))
def test_dropout_is_in_every_network_and_changes_no_name_of_a_weight(name):
    with torch.device("cpu" if name == "swin_unetr" else "meta"):
        plain, network = (build_network(name, **ARGUMENTS, dropout=rate) for rate in (0.0, 0.3))
    shapes = [{n: v.shape for n, v in net.state_dict().items()} for net in (plain, network)]
    assert shapes[0] == shapes[1]
    assert 0.3 in [m.p for m in network.modules() if isinstance(m, _DropoutNd)]


NAMES = (train.NetworkName, train.LossName, train.OptimizerName, train.ScheduleName)
NETWORKS, *OTHERS = (get_args(names) for names in NAMES)
OTHERS[1] = OTHERS[1][1:] + OTHERS[1][:1]  # of the largest networks no optimizer's state is saved


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize(
    ("network", "loss", "optimizer", "schedule"), zip(NETWORKS, *map(cycle, OTHERS), strict=False)
)
def test_every_name_trains_an_epoch_and_is_rebuilt_from_its_checkpoint(
    network, loss, optimizer, schedule, few, tmp_path
):
    assert len(NETWORKS) >= max(map(len, OTHERS))  # so every name is met

    def keep_one(content):
        training = [record for record in content["subvolumes"] if record["split"] == "training"]
        content["subvolumes"], content["settings"]["validation"] = training[:1], 0.0

    data = copy_prepared(few, tmp_path / "data", keep_one)
    side = {"swin_unetr": 64}.get(network, 32)  # five halvings must leave a voxel
    how = {"input_size": (side, side), "batch_size": 1, "network": network}
    how |= {"loss": loss, "optimizer": optimizer, "schedule": schedule}
    train.main(small_config(data, tmp_path / "run", max_epochs=1, **how))
    model = apply_model.load_model(tmp_path / "run" / "last.pt", "cpu", "fp32")
    if network != "swin_unetr":  # a window of it takes seconds
        with torch.no_grad():
            logits = model.network(torch.zeros(1, 1, *model.inference["window"]))
        assert logits.shape == (1, 2, side, side, 16) and logits.isfinite().all()


def test_dice_and_tversky_by_hand():
    """Of 8 voxels 3 are found, 2 are liver and 1 is both; the batch's other sample holds none."""
    found, label = torch.zeros(2, 2, 1, 2, 2, 2)
    found.view(-1)[:3] = label.view(-1)[2:4] = 1
    logits = 50 * torch.cat([1 - found, found], dim=1)
    for name, expected in (("dice", 1 - 2 / 5), ("tversky", 1 - 1 / (1 + 0.3 * 2 + 0.7 * 1))):
        assert train.LOSSES[name](None)(logits, label).item() == pytest.approx(expected, abs=1e-4)


def test_cross_entropy_is_that_of_torch_with_and_without_class_weights():
    logits, label = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4))
    weights = torch.tensor([0.5, 1.0, 1.5])
    for name, given in (("ce", None), ("weighted_ce", weights)):
        expected = torch.nn.functional.cross_entropy(logits, label[:, 0], given)
        assert train.LOSSES[name](weights)(logits, label) == pytest.approx(expected.item())
