"""Pictures: radiological view (the patient's right on the picture's left), colour-blind safe.

`show_patient` is the one drawing of a slice with outlines, which check, previews and results use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import atomic_write
from data.labels import IGNORED, IMAGE, LABEL, PRED
from data.volumes import find_bounding_box

HU_WINDOW = (-200.0, 250.0)  # HU window of every picture for people (training has its own setting)


# Okabe & Ito's palette. Reference and prediction must be told apart by everyone, on grey.
TRUTH_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#E69F00"


LABEL_COLOURS = {1: "#E69F00", 2: "#CC79A7", 3: "#009E73", 4: "#F0E442", 5: "#0072B2"}


PLANES = {  # plane → (axis that is cut, letters at the picture's left, right, top, bottom)
    "axial": (2, "RLAP"),
    "coronal": (1, "RLSI"),
    "sagittal": (0, "APSI"),
}


def choose_hu_window(scan: np.ndarray) -> tuple[float, float]:
    """Values shown as black and white: HU_WINDOW for CT in HU, which has fat and air below 0.

    Of a network's input, 0 and 1; of anything else (MR) its own range.
    """
    sample = scan[tuple(slice(None, None, max(1, size // 64)) for size in scan.shape)]
    if np.mean(sample < -30) >= 0.01:
        return HU_WINDOW
    low, high = np.percentile(sample, [1, 99])
    if 0 <= sample.min() <= sample.max() <= 1:
        return 0.0, 1.0
    return float(low), float(max(high, low + 1))


def find_busiest_slice(mask: np.ndarray, axis: int = 2) -> int:
    """Index of the slice along `axis` with most of a mask (X, Y, Z); the middle one of an empty."""
    counts = np.count_nonzero(mask, axis=tuple(other for other in range(3) if other != axis))
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


def draw_plane(
    axes: Any,
    image: np.ndarray,
    plane: str,
    index: int,
    spacing: tuple[float, float, float],
    outlines: dict[str, np.ndarray] | None = None,
    window: tuple[float, float] = HU_WINDOW,
) -> None:
    """Draw one slice of a RAS array (X, Y, Z) with outlines of masks, to scale, with its letters.

    `outlines` maps a colour to a mask (X, Y, Z), or to class indices, between which lines are drawn
    too; `spacing` is in mm per voxel.
    """
    cut, letters = PLANES[plane]
    across, up = (step for axis, step in enumerate(spacing) if axis != cut)

    def picture(array: np.ndarray) -> np.ndarray:  # first axis runs leftwards, second one up
        # np.take would copy a whole volume that is stored in Fortran order
        return np.moveaxis(array, cut, 0)[index][::-1, ::-1].T

    grey = picture(image)
    axes.imshow(grey, cmap="gray", vmin=window[0], vmax=window[1], aspect=up / across)
    for colour, mask in (outlines or {}).items():
        flat = picture(mask)
        if flat.any() and not flat.all() and min(flat.shape) > 1:  # a line has no outline
            # contours keep three numbers for each pixel: of those around the mask only
            box = [slice(max(b.start - 1, 0), b.stop + 1) for b in find_bounding_box(flat)]
            ys, xs = (np.arange(size)[part] for size, part in zip(flat.shape, box, strict=True))
            levels = np.arange(0.5, int(flat.max()))
            lines = {"levels": levels, "colors": [colour] * len(levels), "linewidths": 1.2}
            axes.contour(xs, ys, flat[tuple(box)], **lines)
    sides = (0.02, 0.5), (0.98, 0.5), (0.5, 0.97), (0.5, 0.03)  # left, right, top, bottom
    for letter, (x, y) in zip(letters, sides, strict=True):
        axes.text(
            x, y, letter, transform=axes.transAxes, color="white", fontsize=9, weight="bold",
            ha={0.02: "left", 0.98: "right"}.get(x, "center"),
            va={0.97: "top", 0.03: "bottom"}.get(y, "center"),
        )  # fmt: skip
    axes.set(xticks=[], yticks=[])


def outlines_of(
    truth: np.ndarray | None, prediction: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """Class indices → colour and mask for `draw_plane`: truth in blue, each class in its colour."""
    outlines = {} if truth is None else {TRUTH_COLOUR: truth}
    for value in range(1, num_classes):  # after five classes the colours come again
        colour, mask = class_colour(value), prediction == value
        outlines[colour] = outlines[colour] | mask if colour in outlines else mask
    return outlines


def class_colour(value: int) -> str:
    """Colour of class 1, 2, …; after five they come again."""
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS) + 1]


def add_legend(figure: Any, class_names: Sequence[str], truth: bool) -> None:
    """Say below a figure which colour is what."""
    from matplotlib.lines import Line2D

    lines = {"truth": TRUTH_COLOUR} if truth else {}
    for value, name in enumerate(class_names, start=1):
        lines[f"predicted {name}" if truth else name] = class_colour(value)
    handles = [Line2D([], [], color=colour, label=text) for text, colour in lines.items()]
    columns = max(1, min(len(handles), int(figure.get_figwidth() // 2)))  # an entry takes 2 inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def draw_planes(
    data: Mapping[str, Any], names: Sequence[str], title: str, axial_slices: int = 6
) -> Any:
    """Figure for `save_figure`: three planes of a patient where most label is, and axial slices.

    Args:
        data: as `show_patient` takes it, with a label, a prediction or both; the label, where there
            is one, chooses the planes.
        names: of the foreground classes, for the legend.
        axial_slices: as many in a second row, from the lowest to the highest with an outline.
    """
    from matplotlib.figure import Figure

    image, maps = as_array(data[IMAGE]), [as_array(data[k]) for k in (LABEL, PRED) if k in data]
    boxes = [find_bounding_box(array) for array in maps]
    masks = [(a[b] != 0) & (a[b] != IGNORED) for a, b in zip(maps, boxes, strict=True)]
    window = choose_hu_window(image)
    figure = Figure(figsize=(13, 7.2))  # no layout engine: it would draw everything twice
    top = figure.add_gridspec(1, 3, left=0.01, right=0.99, bottom=0.41, top=0.9, wspace=0.02)
    row = figure.add_gridspec(1, axial_slices, left=0.01, right=0.99, bottom=0.06, top=0.35)
    for place, (plane, (cut, _)) in enumerate(PLANES.items()):
        index, axes = image.shape[cut] // 2, figure.add_subplot(top[place])
        if masks[0].any():
            index = boxes[0][cut].start + find_busiest_slice(masks[0], cut)
        told = f"{plane}, slice {index + 1} of {image.shape[cut]}"
        show_patient(data, index, axes=axes, plane=plane, hu_window=window, title=told)
    used = [
        number + box[2].start
        for box, mask in zip(boxes, masks, strict=True)
        for number in np.flatnonzero(mask.any(axis=(0, 1)))
    ]
    lowest, highest = (min(used), max(used)) if used else (0, image.shape[2] - 1)
    chosen = np.linspace(lowest, highest, axial_slices).round().astype(int)
    for place, index in enumerate(chosen):
        axes, told = figure.add_subplot(row[place]), f"slice {index + 1}"
        show_patient(data, int(index), axes=axes, hu_window=window, title=told)
    figure.suptitle(title, fontsize=11)
    add_legend(figure, names, truth=len(maps) == 2)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_write(path) as temporary:
        # zlib at 3 is twice as fast as at its usual 6, and no larger
        figure.savefig(temporary, dpi=110, facecolor="white", pil_kwargs={"compress_level": 3})


def show_patient(
    data: Mapping[str, Any],
    slice_index: int | None = None,
    path: Path | None = None,
    *,
    axes: Any = None,
    plane: str = "axial",
    names: Sequence[str] = (),
    hu_window: tuple[float, float] | None = None,
    title: str | None = None,
) -> Any:
    """Draw one slice of a patient: image, outlines of label and prediction. The one such drawing.

    With label and prediction, the label is blue and each class of the prediction has its own
    colour; with one of them, each of its classes has.

    Args:
        data: "image" and, when known, "label" and "pred" (class indices; what is IGNORED is not
            drawn): a Volume, or (1, X, Y, Z) or (X, Y, Z) RAS arrays or tensors; an image in 0..1
            or in HU.
        slice_index: along the plane's axis; the slice with most label when left out.
        path: write a PNG there; without it, draw into the notebook or open a window.
        axes: matplotlib Axes to draw into; then no figure is made.
        plane: "axial", "coronal" or "sagittal".
        names: of the foreground classes, for a legend below a figure.
        hu_window: values that are black and white; `choose_hu_window` when left out.

    Returns:
        The matplotlib Figure.
    """
    cut = PLANES[plane][0]
    arrays = {key: as_array(data[key]) for key in (IMAGE, LABEL, PRED) if key in data}
    image = arrays.pop(IMAGE)
    if slice_index is None:
        guide = next(iter(arrays.values())) > 0 if arrays else image > image.mean()
        slice_index = find_busiest_slice(guide, cut)
    part = [slice(None)] * 3
    part[cut] = slice(slice_index, slice_index + 1)
    maps = {key: array[tuple(part)].astype(np.uint8) for key, array in arrays.items()}
    maps = {key: np.where(flat == IGNORED, 0, flat) for key, flat in maps.items()}
    truth, found = maps.get(LABEL) if len(maps) == 2 else None, maps.get(PRED, maps.get(LABEL))
    outlines = {} if found is None else outlines_of(truth, found, int(found.max()) + 1)
    figure = make_figure(path is None) if axes is None else axes.figure
    drawn, window = axes or figure.subplots(), hu_window or choose_hu_window(image)
    spacing = getattr(getattr(data[IMAGE], "ras", None), "spacing_mm", (1.0, 1.0, 1.0))
    draw_plane(drawn, image[tuple(part)], plane, 0, spacing, outlines, window)
    both = " · label in blue · prediction in orange" if truth is not None and not names else ""
    drawn.set_title(title or f"slice {slice_index + 1} of {image.shape[cut]}{both}", fontsize=10)
    if axes is None and names:
        add_legend(figure, names, truth is not None)
    if path is not None:
        save_figure(figure, path)
    elif axes is None:
        from matplotlib import pyplot

        pyplot.show()
    return figure


def make_figure(interactive: bool) -> Any:
    """A figure for a notebook or window, or for a file alone."""
    if interactive:
        from matplotlib import pyplot

        return pyplot.figure(figsize=(6, 6), layout="constrained")
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 6), layout="constrained")


def as_array(volume: Any) -> np.ndarray:
    """(X, Y, Z) of a Volume (RAS), an array or a tensor with or without a channel axis."""
    volume = getattr(volume, "ras", volume)
    volume = volume.data if hasattr(volume, "spacing_mm") else volume
    if hasattr(volume, "detach"):  # a tensor of torch, or of MONAI
        volume = volume.detach().float().cpu().numpy()
    return np.reshape(volume, np.shape(volume)[-3:])


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly over `length`."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def draw_inputs(before: Any, after: Any, names: Sequence[str]) -> Any:
    """Figure of some items {"image", "label", "case", "first_slice"}: a slice, and histograms."""
    from matplotlib.figure import Figure

    chosen = spread(len(before), 4)
    figure = Figure(figsize=(11, 3.6 * len(chosen)), layout="constrained")
    for row, index in zip(figure.subplots(len(chosen), 3, squeeze=False), chosen, strict=True):
        for axes, dataset, style in zip(row, (before, after), ("-", "--"), strict=False):
            item, kind = dataset[index], "as cached" if dataset is before else "augmented"
            title = f"{item['case']} from slice {item['first_slice']}, {kind}"
            show_patient(item, axes=axes, names=names, title=title)
            image, label = as_array(item[IMAGE]), as_array(item[LABEL])
            organ = (label > 0) & (label != IGNORED)
            shown = {"all": (image, "0.4"), "organ": (image[organ], class_colour(1))}
            for what, (values, colour) in shown.items():
                bins = {"bins": 60, "range": (0, 1), "histtype": "step", "linestyle": style}
                row[2].hist(values.ravel(), **bins, color=colour, label=f"{what}, {kind}")
        row[2].set(xlabel="network input (0..1 over the HU window)", ylabel="voxels", yscale="log")
        row[2].legend(fontsize=8)
    return figure
