"""Windows that slide, and --locate: the organ's box is found first, and nothing of it is lost."""

import csv
import json

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

import apply_model
from apply_model import Look
from data.volumes import Volume
from preprocess import Chain

MM = (6.0, 6.0, 2.0)


class Bright(torch.nn.Module):
    """An organ is what is brighter than a half; `shapes` of the windows that it was asked."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        return torch.cat([0.5 - x, x - 0.5], dim=1)


def model_of(sampling="subvolumes", window=(64, 64, 16), grain=8, overlap=0.5):
    spacing = MM if sampling == "patches" else MM[:2]
    labels = {"background": (0,), "liver": (1,)}
    chain = Chain(sampling, spacing, (-200.0, 250.0), window[: len(spacing)], labels, (), False)
    inference = {"window": window, "overlap": overlap}
    cpu = torch.device("cpu")
    return apply_model.Model(Bright(), chain, inference, cpu, torch.float32, grain=grain)


def body_with(*boxes, shape=(64, 64, 120)):
    """A body of 0.2 in air, and organs of 0.9 in it: boxes ((x, x), (y, y), (z, z))."""
    volume = torch.zeros(1, *shape)
    volume[:, 4:-4, 4:-4] = 0.2
    for box in boxes:
        volume[(0, *(slice(*edge) for edge in box))] = 0.9
    return volume


LIVER = ((10, 34), (20, 44), (50, 90))
CASES = {
    "one": [LIVER],
    "two bodies": [LIVER, ((40, 50), (20, 30), (4, 20))],
    "a pair": [((8, 16), (20, 30), (40, 70)), ((48, 56), (20, 30), (44, 74))],
    "cut off above": [((10, 34), (20, 44), (90, 120))],
    "cut off below and in front": [((10, 34), (40, 64), (0, 30))],
    "leaning": [((8 + z // 2, 14 + z // 2), (20, 26), (z, z + 4)) for z in range(20, 90, 4)],
    "everywhere": [((4, 60), (4, 60), (0, 120))],
}


@pytest.mark.parametrize("organs", CASES.values(), ids=CASES)
@pytest.mark.parametrize("sampling", ["subvolumes", "patches"])
def test_all_of_an_organ_is_found_whatever_its_place(organs, sampling):
    """A network that needs no surroundings finds with --locate the same, to the last bit."""
    window = (64, 64, 16) if sampling == "subvolumes" else (32, 32, 32)
    volume, look = body_with(*organs), Look(MM, 8 if sampling == "subvolumes" else 0)
    expected = apply_model.predict(model_of(sampling, window), volume)
    model = model_of(sampling, window)
    scores = apply_model.predict(model, volume, look=look)
    inside = expected > 0
    assert inside.sum() == (volume > 0.5).sum() > 0
    assert torch.equal(scores > 0, inside)
    assert torch.allclose(scores[inside], expected[inside])
    for edge, size, along in zip(look.box, volume.shape[1:], inside[0].nonzero().T, strict=True):
        assert 0 <= edge.start <= along.min() <= along.max() < edge.stop <= size
    if sampling == "subvolumes" and organs[0] == LIVER and len(organs) == 1:
        assert look.share < 0.65
        assert min(shape[0] for shape in model.network.shapes) < 64
        assert all(n % 8 == 0 for shape in model.network.shapes for n in shape)


def test_a_false_finding_far_away_does_not_widen_the_box():
    """A little beside the organ's many voxels; the organ itself is found whole."""
    speck, look = ((44, 50), (8, 14), (4, 8)), Look(MM, 8)
    found = apply_model.predict(model_of(), body_with(LIVER, speck), look=look) > 0
    alone = body_with(LIVER) > 0.5
    assert torch.equal(found & alone, alone)
    assert look.box[2].start > 40
    assert look.share < 0.65


def test_where_the_first_look_finds_nothing_the_whole_scan_is_segmented():
    """An organ so short that it lies between the windows of the first look, and no organ."""
    short = body_with(((20, 40), (20, 40), (17, 23)))
    look = Look(MM, 8)
    assert torch.equal(apply_model.predict(model_of(), short, look=look) > 0, short > 0.5)
    assert (look.box is None) or look.share > 0.5
    nothing, look = body_with(), Look(MM, 8)
    assert (apply_model.predict(model_of(), nothing, look=look) <= 0).all()
    assert look.box is None
    told = look.describe(np.eye(4), nothing.shape[1:])
    assert told["located_box"].startswith("nothing found")
    assert told["outside_box_percent"] == 0


@pytest.mark.parametrize("shape", [(64, 64, 10), (40, 64, 16), (64, 50, 30)])
def test_a_scan_smaller_than_a_window_is_padded(shape):
    volume, look = body_with(((10, 30), (20, 40), (2, 9)), shape=shape), Look(MM, 8)
    found = apply_model.predict(model_of(), volume, look=look) > 0
    assert torch.equal(found, volume > 0.5)
    told = look.describe(np.eye(4), shape)
    assert told["located_box"].startswith("x 3-38 of ")
    assert f"z 1-{min(shape[2], 14)} of {shape[2]}" in told["located_box"]


def test_a_network_that_takes_one_size_is_given_no_other():
    model, look = model_of(grain=0), Look(MM, 0)
    volume = body_with(LIVER)
    assert torch.equal(apply_model.predict(model, volume, look=look) > 0, volume > 0.5)
    assert set(model.network.shapes) == {(64, 64, 16)}
    assert look.share < 1


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize(
    ("shape", "window"),
    [((24, 24, 50), (24, 24, 16)), ((24, 20, 9), (24, 24, 16)), ((40, 30, 50), (16, 24, 16))],
)
def test_windows_slide_and_blend_as_monais_do(shape, window, overlap):
    model = model_of("subvolumes", window, overlap=overlap)
    convolve = torch.nn.Conv3d(1, 2, 3, padding=1)
    model.network = convolve
    volume = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = sliding_window_inference(
            volume[None], window, 1, convolve, overlap=overlap, mode="gaussian"
        )[0]
    ours = apply_model.predict(model, volume)
    assert torch.allclose(ours, theirs[1:] - theirs[:1], atol=1e-5)


def test_results_say_where_was_looked(checkpoint, raw_phantoms, tmp_path):
    scan = min((raw_phantoms / "imagesTr").iterdir())
    config = apply_model.Config(
        paths=(scan,), checkpoint=checkpoint, destination=tmp_path, device="cpu", locate=True
    )
    apply_model.main(config)
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    record = json.loads((tmp_path / row["case"] / f"{row['case']}.json").read_text())
    for found in (row, record):
        assert found["located_box"]
        assert 0 <= float(found["outside_box_percent"]) < 100
        assert float(found["network_share"]) > 0
    config.locate = False  # another way: done again, and then nothing is said of a box
    apply_model.main(config)
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert "located_box" not in row


def test_a_label_map_is_zero_outside_the_box():
    array = np.full((64, 64, 120), -1000, np.int16)
    array[4:-4, 4:-4] = -100
    array[10:34, 20:44, 50:90] = 200
    scan, trace = Volume(array, np.diag([*MM, 1.0])), apply_model.Trace()
    options = apply_model.Options(locate=True)
    found = apply_model.segment(model_of(), scan, options, trace).read() > 0
    assert np.array_equal(found, array == 200)
    assert trace.located["network_share"] < 0.65
    assert trace.located["outside_box_percent"] > 50
