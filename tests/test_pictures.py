"""Pictures show what they say: the right side, both outlines, readable without a display."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from data import check
from data.labels import IGNORED, IMAGE, LABEL, PRED
from data.pictures import (
    HU_WINDOW,
    TRUTH_COLOUR,
    choose_hu_window,
    class_colour,
    curves_figure,
    draw_planes,
    find_busiest_slice,
    save_figure,
    show_patient,
)
from data.trust import Evidence
from data.volumes import Volume


def count_pixels(path, colour: str) -> int:
    return np.count_nonzero(np.abs(imread(path)[..., :3] - to_rgb(colour)).max(axis=-1) < 0.1)


def test_both_outlines_of_a_liver_are_on_the_left_of_the_picture(tmp_path):
    image, label = torch.zeros(1, 64, 64, 16), torch.zeros(1, 64, 64, 16)
    image[0, 8:56, 12:52] = 0.5
    label[0, 38:50, 20:40, 4:12] = 1  # in RAS the patient's right is at high x
    data = {IMAGE: image, LABEL: label, PRED: torch.roll(label, 3, dims=2)}
    figure = show_patient(data, path=tmp_path / "a.png")
    assert "slice 5 of 16" in figure.axes[0].get_title(), "the first with most label"
    picture = imread(tmp_path / "a.png")[..., :3]
    for colour in (TRUTH_COLOUR, class_colour(1)):
        found = np.argwhere(np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.1)
        assert len(found) > 50
        assert found[:, 1].mean() < 0.45 * picture.shape[1]
    figure = show_patient({IMAGE: image[0].numpy()}, 3, tmp_path / "b.png")
    assert figure.axes[0].get_title() == "slice 4 of 16", "without any label"
    matplotlib.use("Agg")
    assert show_patient(data, 8).axes, "in a notebook"


def test_a_preview_shows_each_class_and_the_voxels_in_doubt(tmp_path):
    image = np.zeros((64, 64, 16), np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[20:50, 20:50] = 1
    label[30:40, 30:40, 6:10] = 2
    doubt = np.zeros((64, 64), bool)
    doubt[50:60, 5:15] = True
    evidence = Evidence(("liver", "tumour"), slice=7, doubt=doubt, word="look")
    figure = draw_planes({IMAGE: image, PRED: label}, ["liver", "tumour"], "case", doubt=evidence)
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["liver", "tumour", "in doubt"]
    assert figure.axes[3].get_title() == "least sure: slice 8, trust: look"
    red = np.asarray(figure.axes[3].images[1].get_array())[..., 3]
    assert red[49:59, 4:14].all() and (red > 0).sum() == 100, "63 − 59 = 4 from the left"
    path = tmp_path / "preview.png"
    save_figure(figure, path)
    assert count_pixels(path, class_colour(1)) > count_pixels(path, class_colour(2)) > 50
    assert count_pixels(path, TRUTH_COLOUR) == 0
    figure = draw_planes({IMAGE: image, LABEL: label, PRED: 0 * label}, ["liver"], "case")
    save_figure(figure, path)
    assert count_pixels(path, TRUTH_COLOUR) > 300


def test_ignored_voxels_are_not_outlined_and_choose_no_slice():
    image, label = np.zeros((32, 32, 16), np.float32), np.zeros((32, 32, 16), np.uint8)
    label[8:20, 8:20, 3] = 1
    label[:, :, 9:] = label[24:, :, 3] = IGNORED
    figure = draw_planes({IMAGE: image, LABEL: label}, ["liver"], "case")
    assert figure.axes[0].get_title() == "axial, slice 4 of 16"
    assert sum(len(axes.collections) for axes in figure.axes[3:]) == 6  # slice 4, six times
    assert figure.axes[-1].get_title() == "slice 4"


def test_each_of_seven_classes_is_outlined_in_one_of_five_colours():
    classes = np.zeros((40, 6, 1), np.uint8)
    for value in range(1, 8):
        classes[5 * value : 5 * value + 3, 2:4] = value
    figure = show_patient({IMAGE: 0.0 * classes, PRED: classes}, 0, axes=Figure().subplots())
    lines = [path for line in figure.axes[0].collections for path in line.get_paths()]
    assert len(figure.axes[0].collections) == 5
    assert sum(len(path.to_polygons()) for path in lines) == 7


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_volumes_of_any_orientation_are_drawn_on_every_plane(plane, tmp_path):
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])  # LPS: drawn as RAS
    image, label = np.full((40, 30, 20), 50, np.int16), np.zeros((40, 30, 20), np.uint8)
    image[:8] = -1000
    label[10:30, 8:24, 4:16] = 1
    label[18:24, 12:18, 8:12] = 2
    data = {IMAGE: Volume(image, affine), LABEL: Volume(label, affine)}
    index, path = {"axial": 9, "coronal": 14, "sagittal": 19}[plane], tmp_path / "a.png"
    show_patient(data, index, path, plane=plane)  # of the RAS volume: the tumour
    assert min(count_pixels(path, class_colour(value)) for value in (1, 2)) > 30
    assert count_pixels(path, TRUTH_COLOUR) == 0, "one map has the colours of its classes"
    show_patient({**data, PRED: data[LABEL]}, index, path, plane=plane, names=["liver", "tumour"])
    assert count_pixels(path, TRUTH_COLOUR) > 30


def test_grey_values_of_ct_of_a_network_and_of_mr():
    ramp = np.linspace(0, 1, 1000).reshape(10, 10, 10)
    assert choose_hu_window(2000 * ramp - 1000) == HU_WINDOW
    assert choose_hu_window(ramp) == (0.0, 1.0)
    assert choose_hu_window(900 * ramp) == pytest.approx((9, 891))


def test_the_picture_of_a_case_carries_its_verdict(monkeypatch):
    told = []
    monkeypatch.setattr(Figure, "suptitle", lambda _, text, **look: told.append((text, look)))
    record = {"case": "a", "findings": []}
    terms = check.Terms({"background": (0,), "liver": (1,)}, (1,))
    volume = Volume(np.zeros((8, 8, 8), np.int16), np.eye(4))
    for kind in ("mixture", "air", "hu", "hu"):  # a note, a warning, an error
        check.draw_overlay(record, volume, volume.data, (4, 4, 4), terms, None)
        record["findings"].append((kind, f"text of {kind}"))
    fine, odd, wrong = "✓ nothing to correct", "warning: text of air", "error: text of hu"
    assert [text.partition("\n")[2] for text, _ in told] == [fine, fine, odd, f"{wrong}\n{odd}"]
    assert [look["color"] for _, look in told] == ["green", "green", "darkorange", "firebrick"]


def test_the_slice_with_most_of_a_mask():
    mask = np.zeros((5, 6, 7), bool)
    assert [find_busiest_slice(mask, axis) for axis in range(3)] == [2, 3, 3]
    mask[1, 2, 4] = mask[1, 3, 4] = mask[2, 2, 5] = True
    assert [find_busiest_slice(mask, axis) for axis in range(3)] == [1, 2, 4]


def test_curves_mark_the_best_epoch():
    keys = ("val_dice", "val_dice_liver", "train_loss", "val_loss", "learning_rate", "val_chance")
    dice = enumerate((0.5, 0.8, 0.7), start=1)
    figure = curves_figure([{"epoch": n, **dict.fromkeys(keys, v)} for n, v in dice], ["liver"])
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert "best.pt (epoch 2)" in labels
