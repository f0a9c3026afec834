"""The network is the published one, and every entry of the list can be built and trained."""

import itertools

import numpy as np
import torch

from utilities import UNet3D, predicted_classes


def test_parameters_as_counted_in_the_paper():
    model = UNet3D(in_channels=3, out_channels=3)
    scales = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.BatchNorm3d)
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (total, scales) == (19_072_291, 2_336)
    assert total - scales == 19_069_955  # Çiçek et al. 2016
    liver = UNet3D(in_channels=1, out_channels=2)
    assert sum(parameter.numel() for parameter in liver.parameters()) == 19_070_498


def test_logits_have_the_shape_of_the_input_and_batch_norm_stands_before_each_relu():
    model = UNet3D(in_channels=2, out_channels=4, base_channels=4).eval()
    assert model(torch.zeros(2, 2, 24, 16, 8)).shape == (2, 4, 24, 16, 8)
    layers = [m for m in model.modules() if not list(m.children())]
    before_relu = [a for a, b in itertools.pairwise(layers) if isinstance(b, torch.nn.ReLU)]
    assert len(before_relu) == 14
    assert all(isinstance(layer, torch.nn.BatchNorm3d) for layer in before_relu)


def test_skip_connections_carry_detail():
    """A change of one voxel reaches the same place in the output: nothing is flipped."""
    torch.manual_seed(0)
    model = UNet3D(base_channels=4).eval()
    x = torch.zeros(1, 1, 32, 32, 16)
    y = x.clone()
    y[0, 0, 20, 9, 5] = 10.0
    with torch.no_grad():
        change = (model(y) - model(x)).abs().sum(dim=1)[0]
    found = np.array(np.unravel_index(int(change.argmax()), change.shape))
    assert np.abs(found - (20, 9, 5)).max() <= 2  # within reach of the four last convolutions


def test_predicted_classes_is_argmax():
    logits = torch.randn(2, 2, 8, 8, 8)
    assert torch.equal(predicted_classes(logits), logits.argmax(1).to(torch.uint8))
    logits = torch.randn(2, 4, 8, 8, 8)
    assert torch.equal(predicted_classes(logits), logits.argmax(1).to(torch.uint8))
