"""Draw slices with outlines, legends and figures, in radiological view, colour-blind safe.

`show_patient` is the one drawing of a slice with outlines; the patient's right is on the left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import atomic_write
from data.labels import IGNORED, IMAGE, LABEL, PRED
from data.volumes import enclose, find_bounding_box

HU_WINDOW = (-200.0, 250.0)  # HU window of every picture for people (training has its own setting)
# Okabe & Ito's palette, which everyone can tell apart, also on grey.
TRUTH_COLOUR, DOUBT_COLOUR = "#56B4E9", "#FF2020"
LABEL_COLOURS = {1: "#E69F00", 2: "#CC79A7", 3: "#009E73", 4: "#F0E442", 5: "#0072B2"}
# plane → (axis that is cut, letters at the picture's left, right, top, bottom)
PLANES = {"axial": (2, "RLAP"), "coronal": (1, "RLSI"), "sagittal": (0, "APSI")}
SIDES = (  # where these letters stand: x, y, horizontal and vertical alignment
    (0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
    (0.5, 0.97, "center", "top"), (0.5, 0.03, "center", "bottom"),
)  # fmt: skip


def choose_hu_window(scan: np.ndarray) -> tuple[float, float]:
    """Return the values shown as black and white: HU_WINDOW for CT, which has fat and air below 0.
    Of a network's input 0 and 1; of anything else (MR) its own range."""
    sample = scan[tuple(slice(None, None, max(1, size // 64)) for size in scan.shape)]
    if np.mean(sample < -30) >= 0.01:
        return HU_WINDOW
    if 0 <= sample.min() <= sample.max() <= 1:
        return 0.0, 1.0
    low, high = np.percentile(sample, [1, 99])
    return float(low), float(max(high, low + 1))


def find_busiest_slice(mask: np.ndarray, axis: int = 2) -> int:
    """Return the slice along `axis` with most of a mask (X, Y, Z); the middle one of an empty."""
    counts = np.count_nonzero(mask, axis=tuple(other for other in range(3) if other != axis))
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


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
    """Draw a slice of a patient, the one with most label unless given, and return the figure: a PNG
    at `path`, or in `axes`, a notebook or a window. `data`: "image" (in 0..1 or HU), and if known
    "label" and "pred" (class indices), each a Volume, or a (1, X, Y, Z) or (X, Y, Z) RAS array or
    tensor. Each class has its colour; with a prediction, the label is blue. `names` of the classes
    make a legend; `hu_window` is black and white."""
    cut = PLANES[plane][0]
    arrays = {key: as_array(data[key]) for key in (IMAGE, LABEL, PRED) if key in data}
    image = arrays.pop(IMAGE)
    if slice_index is None:
        guide = next(iter(arrays.values())) > 0 if arrays else image > image.mean()
        slice_index = find_busiest_slice(guide, cut)
    maps = {key: flatten(array, cut, slice_index).astype(np.uint8) for key, array in arrays.items()}
    maps = {key: np.where(flat == IGNORED, 0, flat) for key, flat in maps.items()}
    truth, found = maps.get(LABEL) if len(maps) == 2 else None, maps.get(PRED, maps.get(LABEL))
    figure = axes.figure if axes else make_figure(path is None)
    drawn, window = axes or figure.subplots(), hu_window or choose_hu_window(image)
    spacing = getattr(getattr(data[IMAGE], "ras", None), "spacing_mm", (1.0, 1.0, 1.0))
    across, up = (step for axis, step in enumerate(spacing) if axis != cut)
    grey = {"cmap": "gray", "vmin": window[0], "vmax": window[1], "aspect": up / across}
    drawn.imshow(flatten(image, cut, slice_index), **grey)
    draw_outlines(drawn, truth, found)
    for letter, (x, y, ha, va) in zip(PLANES[plane][1], SIDES, strict=True):
        style = {"color": "white", "fontsize": 9, "weight": "bold", "ha": ha, "va": va}
        drawn.text(x, y, letter, transform=drawn.transAxes, **style)
    drawn.set(xticks=[], yticks=[])
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


def as_array(volume: Any) -> np.ndarray:
    """Return (X, Y, Z) of a Volume (RAS), an array or a tensor with or without a channel axis."""
    volume = getattr(volume, "ras", volume)
    volume = volume.data if hasattr(volume, "spacing_mm") else volume
    if hasattr(volume, "detach"):  # a tensor of torch, or of MONAI
        volume = volume.detach().float().cpu().numpy()
    return np.reshape(volume, np.shape(volume)[-3:])


def flatten(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Return a slice (rows, columns) of a RAS array; left and down in it are right and back."""
    # np.take would copy a whole volume that is stored in Fortran order
    return np.moveaxis(array, axis, 0)[index][::-1, ::-1].T


def draw_outlines(
    axes: Any, truth: np.ndarray | None, found: np.ndarray | None, style: str = "solid"
) -> None:
    """Draw lines around the classes of two maps (rows, columns): the truth in one colour. Colours
    come again after five classes; lines between classes of one colour are drawn too."""
    outlines: dict[str, Any] = {} if truth is None else {TRUTH_COLOUR: truth}
    for value in range(1, 0 if found is None else int(found.max()) + 1):
        outlines[class_colour(value)] = outlines.get(class_colour(value), False) | (found == value)
    for colour, mask in outlines.items():
        if mask.any() and not mask.all() and min(mask.shape) > 1:  # a line has no outline
            # contours keep three numbers for each pixel: of those around the mask only
            box = [slice(max(b.start - 1, 0), b.stop + 1) for b in find_bounding_box(mask)]
            ys, xs = (np.arange(size)[part] for size, part in zip(mask.shape, box, strict=True))
            lines = {"levels": np.arange(0.5, int(mask.max())), "colors": colour, "linewidths": 1.2}
            axes.contour(xs, ys, mask[tuple(box)], linestyles=style, **lines)


def class_colour(value: int) -> str:
    """Return the colour of class 1, 2, …; after five they come again."""
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS) + 1]


def make_figure(interactive: bool) -> Any:
    """Return a figure for a notebook or window, or for a file alone."""
    if not interactive:
        from matplotlib.figure import Figure

        return Figure(figsize=(6, 6), layout="constrained")
    from matplotlib import pyplot

    return pyplot.figure(figsize=(6, 6), layout="constrained")


def add_legend(figure: Any, class_names: Sequence[str], truth: bool, **more: str) -> None:
    """Write below a figure which colour stands for what; `more`: other words and their colours."""
    from matplotlib.lines import Line2D

    lines = {"truth": TRUTH_COLOUR} if truth else {}
    for value, name in enumerate(class_names, start=1):
        lines[f"predicted {name}" if truth else name] = class_colour(value)
    lines |= {text.replace("_", " "): colour for text, colour in more.items()}
    handles = [Line2D([], [], color=colour, label=text) for text, colour in lines.items()]
    columns = max(1, min(len(handles), int(figure.get_figwidth() // 2)))  # an entry takes 2 inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG completely or not at all."""
    with atomic_write(path) as temporary:
        # zlib at 3 is twice as fast as at its usual 6, and no larger
        figure.savefig(temporary, dpi=110, facecolor="white", pil_kwargs={"compress_level": 3})


def draw_planes(
    data: Mapping[str, Any], names: Sequence[str], title: str, doubt: Any = None
) -> Any:
    """Return a figure of `data`, as `show_patient` takes it: three planes where most label (or else
    prediction) is, six axial slices, and the least sure slice of `doubt`, an Evidence."""
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure

    window, views = choose_hu_window(as_array(data[IMAGE])), choose_views(data)
    if doubt is not None:
        note = f"least sure: slice {doubt.slice + 1}, trust: {doubt.word}"
        views.insert(3, ("axial", doubt.slice, note))
    figure = Figure(figsize=(13, 7.2))  # no layout engine: it would draw everything twice
    ends = {"left": 0.01, "right": 0.99, "wspace": 0.02}
    top = figure.add_gridspec(1, len(views) - 6, bottom=0.41, top=0.9, **ends)
    row = figure.add_gridspec(1, 6, bottom=0.06, top=0.35, **ends)
    places = [*(top[n] for n in range(len(views) - 6)), *(row[n] for n in range(6))]
    for place, (plane, index, note) in zip(places, views, strict=True):
        axes = figure.add_subplot(place)
        show_patient(data, index, axes=axes, plane=plane, hu_window=window, title=note)
    if doubt is not None and doubt.doubt.size:
        red = flatten(doubt.doubt[..., None], 2, 0)[..., None] * to_rgba(DOUBT_COLOUR, 0.6)
        figure.axes[3].imshow(red, interpolation="none", aspect=figure.axes[3].get_aspect())
    unit = " HU" if window == HU_WINDOW else ""
    figure.suptitle(f"{title} · grey: {window[0]:g} to {window[1]:g}{unit}", fontsize=11)
    more = {} if doubt is None else {"in_doubt": DOUBT_COLOUR}
    add_legend(figure, names, truth=LABEL in data and PRED in data, **more)
    return figure


def choose_views(data: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Return plane, index and title of the slice with most label in each plane, and of six axial
    slices from the lowest to the highest with an outline."""
    shape = as_array(data[IMAGE]).shape
    maps = [as_array(data[key]) for key in (LABEL, PRED) if key in data]
    box = enclose(*map(find_bounding_box, maps))
    masks = [(array[box] != 0) & (array[box] != IGNORED) for array in maps]
    views = []
    for plane, (cut, _) in PLANES.items():
        index = shape[cut] // 2
        if masks[0].any():
            index = box[cut].start + find_busiest_slice(masks[0], cut)
        views.append((plane, index, f"{plane}, slice {index + 1} of {shape[cut]}"))
    used = box[2].start + np.flatnonzero((masks[0] | masks[-1]).any(axis=(0, 1)))
    every = used if used.size else np.arange(shape[2])
    chosen = np.linspace(every.min(), every.max(), 6).round().astype(int).tolist()
    return [*views, *(("axial", index, f"slice {index + 1}") for index in chosen)]


def spread(length: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly over `length`."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def draw_inputs(before: Any, after: Any, names: Sequence[str]) -> Any:
    """Return a figure of four items, as cached and augmented: a slice of each, and histograms.
    `before` and `after` are datasets of {"image", "label", "case", "first_slice"}."""
    from matplotlib.figure import Figure

    chosen = spread(len(before), 4)
    figure = Figure(figsize=(11, 3.6 * len(chosen)), layout="constrained")
    for row, index in zip(figure.subplots(len(chosen), 3, squeeze=False), chosen, strict=True):
        for axes, dataset, style in zip(row, (before, after), ("-", "--"), strict=False):
            item, kind = dataset[index], "as cached" if dataset is before else "augmented"
            image, label = as_array(item[IMAGE]), as_array(item[LABEL])
            organ = (label > 0) & (label != IGNORED)
            number = item["first_slice"] + find_busiest_slice(organ) + 1
            show_patient(item, axes=axes, title=f"{item['case']}, slice {number}, {kind}")
            shown = {"all": (image, "0.4"), "organ": (image[organ], class_colour(1))}
            for what, (values, colour) in shown.items():
                bins = {"bins": 60, "range": (0, 1), "histtype": "step", "linestyle": style}
                row[2].hist(values.ravel(), **bins, color=colour, label=f"{what}, {kind}")
        row[2].set(xlabel="network input (0..1 over the HU window)", ylabel="voxels", yscale="log")
        row[2].legend(fontsize=8)
    add_legend(figure, names, truth=False)
    return figure


def curves_figure(history: list[dict[str, float]], class_names: Sequence[str]) -> Any:
    """Return the figure of loss and Dice over the epochs, with the best epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, dices = figure.subplots(1, 2)
    losses.set(xlabel="epoch", title="Loss")
    dices.set(xlabel="epoch", ylim=(0, 1), title="Dice at the network's resolution")
    lines = [
        (losses, "train_loss", "training", "#0072B2"),
        (losses, "val_loss", "validation", "#E69F00"),
        (dices, "train_dice", "training (augmented)", "0.5"),
    ]
    for value, name in enumerate(class_names, start=1):
        lines.append((dices, f"val_dice_{name}", f"validation, {name}", class_colour(value)))
    for axes, key, label, colour in lines:
        points = [(row["epoch"], row[key]) for row in history if key in row]
        axes.plot(*np.reshape(points, (-1, 2)).T, "-o", color=colour, label=label, markersize=4)
    figure.suptitle(judge_learning(history), fontsize=9, wrap=True)
    if best := find_best(history)[0]:
        dices.axvline(best, color="0.6", linestyle=":", label=f"best.pt (epoch {best})")
    for axes in (losses, dices):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def find_best(history: list[dict[str, float]]) -> tuple[int, int]:
    """Return the first epoch of the highest validation Dice (or 0), and the validations since. Of
    equal Dice, such as 0 at the beginning, that of the lower loss is the best."""
    validated = [row for row in history if math.isfinite(row.get("val_dice", math.nan))]
    order = {int(row["epoch"]): (row["val_dice"], -row["val_loss"]) for row in validated}
    best = max(order, key=lambda epoch: order[epoch], default=0)
    return best, sum(epoch > best for epoch in order)


def judge_learning(history: list[dict[str, float]]) -> str:
    """Return the verdict on a training in one line, with the likeliest cause where it failed, by
    the training's loss, and by the Dice of the validation, if any: nothing is learnt where it is
    hardly above `val_chance` (everything is foreground), or low while the loss did not fall."""
    if not history:
        return "nothing learnt: no epoch was finished"
    losses = [row["train_loss"] for row in history]
    fell = (losses[0] - min(losses)) / max(abs(losses[0]), 1e-9)
    moved = f"training loss {losses[0]:.4f} → {losses[-1]:.4f}"
    rows = [row for row in history if math.isfinite(row.get("val_dice", math.nan))]
    if not rows:
        return f"learnt: {moved}" if fell > 0.02 else f"nothing learnt: {moved}; {suggest(history)}"
    dice = [row["val_dice"] for row in rows]
    chance = float(np.nanmean([row["val_chance"] for row in rows]))
    best, since = find_best(history)
    told = f"validation Dice {max(dice):.4f} in epoch {best} (chance {chance:.4f}), {moved}"
    rough = min(2.5 * chance, (1 + chance) / 2)
    if max(dice) < 1.2 * chance + 0.01 or (fell < 0.02 and max(dice) < rough and rows[1:]):
        if fell > 0.1 and losses[-1] < losses[0]:
            told += "; the loss falls: more --max-epochs, or"
            return f"nothing learnt yet: {told} {suggest(history)}"
        return f"nothing learnt: {told}; {suggest(history)}"
    earlier = max(dice[: -max(len(dice) // 4, 1)], default=math.inf if history[1:] else 0.0)
    if max(dice) - earlier > 0.01 and since <= len(dice) // 4:
        return f"still rising: {told}; more --max-epochs may help"
    return f"learnt: {told}" if max(dice) >= 0.5 else f"little learnt: {told}; {suggest(history)}"


def suggest(history: list[dict[str, float]]) -> str:
    """Return what to try first where a training learnt little."""
    rate = max(row["learning_rate"] for row in history)
    if 1e-5 <= rate <= 0.02:
        return "does train.py --show show the organ grey, and the outline on it?"
    change, size = ("raise", "small") if rate < 1e-5 else ("lower", "large")
    return f"{change} --learning-rate, {rate:g} is {size}"
