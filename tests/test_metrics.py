"""Dice means what a reader takes it for: hard, per patient, background excluded."""

import numpy as np
import pytest
import torch
from conftest import random_affine
from monai.metrics import DiceMetric
from scipy.spatial.transform import Rotation

from data.evaluate import dice_metric, mean_dice, measure_area, measure_shape


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


# ---------------------------------------------------------------------------------------
# Shape
# ---------------------------------------------------------------------------------------


def fill_ellipsoid(radii, to_mm) -> np.ndarray:
    """Mask (X, Y, Z) of an ellipsoid whose axes lie oblique to the grid's."""
    size = [int(2 * max(radii) * 1.4 / edge) + 8 for edge in np.linalg.norm(to_mm, axis=0)]
    index = np.stack(np.meshgrid(*(np.arange(n) - 0.48 * n for n in size), indexing="ij"), axis=-1)
    turn = Rotation.from_euler("xyz", [30, 40, 50], degrees=True).as_matrix()
    return ((index @ to_mm.T @ turn / radii) ** 2).sum(axis=-1) < 1


GRIDS = {
    "even": np.eye(3),
    "thick slices": np.diag([0.8, 0.7, 3.0]),
    "oblique, sheared, mirrored": random_affine(3, (-0.8, 0.7, 2.5), shear=0.3)[:3, :3],
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("radii", [(20, 20, 20), (30, 20, 12), (40, 15, 15)])
def test_shape_of_an_ellipsoid_is_the_analytic_one_on_any_grid(radii, grid):
    mask = fill_ellipsoid(radii, GRIDS[grid])
    a, b, c = (radius**1.6075 for radius in radii)  # Thomsen's formula, within 1.1 %
    surface = 4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / 1.6075)
    assert measure_area(mask, GRIDS[grid]) == pytest.approx(surface, rel=0.03)
    volume = 4 / 3 * np.pi * np.prod(radii)
    shape = measure_shape(mask, GRIDS[grid])
    sphericity = (36 * np.pi * volume**2) ** (1 / 3) / surface
    assert shape["sphericity"] == pytest.approx(sphericity, abs=0.02)
    assert shape["elongation"] == pytest.approx(sorted(radii)[1] / max(radii), abs=0.02)


def test_shape_of_next_to_nothing():
    mask = np.zeros((4, 4, 4), bool)
    assert measure_shape(mask, np.eye(3)) == {"sphericity": None, "elongation": None}
    mask[1, 1, 1] = True
    assert measure_shape(mask, np.eye(3))["elongation"] is None
    mask[1, 1, :] = True  # a needle to the array's ends
    shape = measure_shape(mask, np.eye(3))
    assert shape["elongation"] == pytest.approx(0, abs=1e-6) and 0 < shape["sphericity"] <= 1


def test_surface_of_a_box_along_the_axes_is_the_worst_case():
    """Flat sides lie between no directions: a tenth too little at most."""
    mask = np.zeros((44, 34, 24), bool)
    mask[2:42, 2:32, 2:22] = True
    assert measure_area(mask, np.eye(3)) == pytest.approx(2 * (1200 + 800 + 600), rel=0.1)
