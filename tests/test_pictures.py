"""Pictures show what they say: the right side, both outlines, readable without a display."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from data.labels import IGNORED, IMAGE, LABEL, PRED
from data.pictures import (
    HU_WINDOW,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    add_legend,
    choose_hu_window,
    class_colour,
    draw_planes,
    find_busiest_slice,
    outlines_of,
    save_figure,
    show_patient,
)
from data.volumes import Volume
from utilities import curves_figure


def patient() -> dict:
    """A body in RAS with the organ on the patient's right: at high x."""
    image, label = torch.zeros(1, 64, 64, 16), torch.zeros(1, 64, 64, 16)
    image[0, 8:56, 12:52] = 0.5
    label[0, 38:50, 20:40, 4:12] = 1
    prediction = torch.roll(label, 3, dims=2)
    return {IMAGE: image, LABEL: label, PRED: prediction}


def pixels_of(picture: np.ndarray, colour: str) -> np.ndarray:
    """(n, 2) rows and columns of pixels near a colour."""
    return np.argwhere(np.abs(picture[..., :3] - to_rgb(colour)).max(axis=-1) < 0.1)


def test_show_patient_draws_both_outlines_on_the_patients_right(tmp_path):
    show_patient(patient(), 8, tmp_path / "patient.png")
    picture = imread(tmp_path / "patient.png")
    for colour in (TRUTH_COLOUR, PREDICTION_COLOUR):
        found = pixels_of(picture, colour)
        assert len(found) > 50
        assert found[:, 1].mean() < 0.45 * picture.shape[1]  # right of the patient: picture's left


def test_show_patient_chooses_the_slice_with_most_label_and_needs_no_label(tmp_path):
    data = patient()
    figure = show_patient(data, path=tmp_path / "a.png")
    assert "slice 5 of 16" in figure.axes[0].get_title()
    only_image = {IMAGE: data[IMAGE][0].numpy()}
    figure = show_patient(only_image, 3, tmp_path / "b.png")
    assert figure.axes[0].get_title() == "slice 4 of 16"


def test_show_patient_in_a_notebook_returns_the_figure(monkeypatch):
    matplotlib.use("Agg")
    assert show_patient(patient(), 8).axes


def test_a_tumour_is_outlined_in_its_own_colour(tmp_path):
    image = np.zeros((64, 64, 16), np.float32)
    truth = np.zeros(image.shape, np.uint8)
    truth[20:50, 20:50] = 1
    truth[30:40, 30:40, 6:10] = 2
    names = ["liver", "tumour"]
    figure = draw_planes({IMAGE: image, PRED: truth}, names, "case")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    save_figure(figure, tmp_path / "both.png")
    picture = imread(tmp_path / "both.png")
    liver, tumour = (len(pixels_of(picture, class_colour(v))) for v in (1, 2))
    assert liver > tumour > 50
    assert len(pixels_of(picture, TRUTH_COLOUR)) == 0
    figure = draw_planes({IMAGE: image, LABEL: truth, PRED: 0 * truth}, names, "case")
    save_figure(figure, tmp_path / "truth.png")
    assert len(pixels_of(imread(tmp_path / "truth.png"), TRUTH_COLOUR)) > 300


def test_what_nobody_judged_is_not_outlined_and_chooses_no_slice():
    image, label = np.zeros((32, 32, 16), np.float32), np.zeros((32, 32, 16), np.uint8)
    label[8:20, 8:20, 3] = 1
    label[:, :, 9:] = IGNORED
    figure = draw_planes({IMAGE: image, LABEL: label}, ["liver"], "case")
    assert figure.axes[0].get_title() == "axial, slice 4 of 16"
    assert sum(len(axes.collections) for axes in figure.axes[3:]) == 6  # slice 4, six times
    assert figure.axes[-1].get_title() == "slice 4"


def test_after_five_classes_the_colours_come_again_and_none_is_lost():
    classes = np.arange(8).reshape(1, 8, 1).repeat(4, axis=0)
    outlines = outlines_of(None, classes, 8)
    assert len(outlines) == 5
    assert sum(np.count_nonzero(mask) for mask in outlines.values()) == 4 * 7


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_one_map_has_the_colours_of_its_classes_and_two_the_truths(plane, tmp_path):
    """On every plane, of Volumes and arrays alike; into given axes without a new figure."""
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])  # LPS: drawn as RAS
    image, label = np.full((40, 30, 20), 50, np.int16), np.zeros((40, 30, 20), np.uint8)
    image[:8] = -1000
    label[10:30, 8:24, 4:16] = 1
    label[18:24, 12:18, 8:12] = 2
    volumes = {IMAGE: Volume(image, affine), LABEL: Volume(label, affine)}
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    names = ["liver", "tumour"]
    index = {"axial": 9, "coronal": 14, "sagittal": 19}[plane]  # of the RAS volume: the tumour
    show_patient(volumes, index, one, plane=plane)
    show_patient({**volumes, PRED: volumes[LABEL]}, index, two, plane=plane, names=names)
    first, second = imread(one), imread(two)
    assert min(len(pixels_of(first, class_colour(value))) for value in (1, 2)) > 30
    assert len(pixels_of(first, TRUTH_COLOUR)) == 0
    assert len(pixels_of(second, TRUTH_COLOUR)) > 30
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert show_patient(volumes, axes=axes[0], plane=plane, title="mine") is figure
    assert axes[0].get_title() == "mine"
    assert not figure.legends
    assert not axes[1].images


def test_the_slice_with_most_of_a_mask():
    mask = np.zeros((5, 6, 7), bool)
    assert [find_busiest_slice(mask, axis) for axis in range(3)] == [2, 3, 3]
    mask[1, 2, 4] = mask[1, 3, 4] = mask[2, 2, 5] = True
    assert [find_busiest_slice(mask, axis) for axis in range(3)] == [1, 2, 4]


def test_grey_values_of_ct_of_a_network_and_of_mr():
    ramp = np.linspace(0, 1, 1000).reshape(10, 10, 10)
    assert choose_hu_window(2000 * ramp - 1000) == HU_WINDOW
    assert choose_hu_window(ramp) == (0.0, 1.0)
    low, high = choose_hu_window(900 * ramp)
    assert 0 < low < 20
    assert 880 < high < 900


def test_curves_mark_the_best_epoch(tmp_path):
    history = [
        {"epoch": 1, "train_loss": 0.9, "val_loss": 0.8, "val_dice": 0.5, "val_dice_liver": 0.5},
        {"epoch": 2, "train_loss": 0.5, "val_loss": 0.4, "val_dice": 0.8, "val_dice_liver": 0.8},
        {"epoch": 3, "train_loss": 0.4, "val_loss": 0.5, "val_dice": 0.7, "val_dice_liver": 0.7},
    ]
    figure = curves_figure(history, ["liver"])
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert "best.pt (epoch 2)" in labels
    save_figure(figure, tmp_path / "curves.png")
    assert len(pixels_of(imread(tmp_path / "curves.png"), "#0072B2")) > 100


def test_a_legend_fits_into_a_narrow_figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots()
    add_legend(figure, ["liver", "tumour"], truth=True)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
