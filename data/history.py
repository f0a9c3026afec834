"""The history of a training, a row per epoch: the best one, a line about the last, its curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.metrics import nan_mean
from data.pictures import class_colour
from data.settings import format_seconds

History = list[dict[str, float]]


def _validated(history: History) -> History:
    return [row for row in history if math.isfinite(row.get("val_dice", math.nan))]


def best_epoch(history: History) -> int:
    """Epoch of the highest validation Dice (the first one of equals); 0 before any validation."""
    best = max(_validated(history), key=lambda row: row["val_dice"], default={"epoch": 0})
    return int(best["epoch"])


def validations_since_best(history: History) -> int:
    """How many validations gave no better Dice since the best one."""
    best = best_epoch(history)
    return sum(row["epoch"] > best for row in _validated(history))


def describe_epoch(history: History, max_epochs: int) -> str:
    """One line on the last epoch: losses, Dice, and the time that is left."""
    row = history[-1]
    line = f"epoch {row['epoch']}/{max_epochs}: loss {row['train_loss']:.4f}"
    if "val_dice" in row:
        mark = " (best so far)" if best_epoch(history) == row["epoch"] else ""
        line += f", validation loss {row['val_loss']:.4f}, Dice {row['val_dice']:.4f}{mark}"
    line += f", {row['samples_per_s']:.2f} samples/s, {format_seconds(row['epoch_seconds'])}"
    recent = [known["epoch_seconds"] for known in history[-5:] if "epoch_seconds" in known]
    left = (max_epochs - row["epoch"]) * float(np.mean(recent))
    return f"{line}, {format_seconds(left)} left" if left else line


def curves_figure(history: History, class_names: Sequence[str]) -> Any:
    """Loss and Dice over the epochs, the best epoch marked; how long an epoch takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, dice_axes = figure.subplots(1, 2)

    def line(axes: Any, key: str, label: str, colour: str, style: str) -> None:
        points = [(row["epoch"], row[key]) for row in history if key in row]
        if any(math.isfinite(value) for _, value in points):
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)

    line(loss_axes, "train_loss", "training", "#0072B2", "-o")
    line(loss_axes, "val_loss", "validation", "#E69F00", "-s")
    line(dice_axes, "train_dice", "training (augmented)", "0.5", "--")
    for value, name in enumerate(class_names, start=1):
        line(dice_axes, f"val_dice_{name}", name, class_colour(value), "-s")
    best = best_epoch(history)
    if best:
        dice_axes.axvline(best, color="0.6", linestyle=":", label=f"best.pt (epoch {best})")
    seconds = nan_mean([row.get("epoch_seconds", math.nan) for row in history])
    pace = f" ({format_seconds(seconds)} an epoch)" if math.isfinite(seconds) else ""
    loss_axes.set(xlabel=f"epoch{pace}", ylabel="loss", title="Loss")
    dice_axes.set(xlabel="epoch", ylabel="Dice", ylim=(0, 1), title="Dice of validation patients")
    for axes in (loss_axes, dice_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure
