"""Label maps against truth, from any program: figures per patient, tables, summary, pictures.

    python -m data.evaluate PREDICTIONS TRUTHS            # two files, or two folders of equal names
    python -m data.evaluate nnunet/test labelsTs --labels liver=1,2 tumour=2

A prediction is laid on the grid of its truth, which must be the same patient place. Classes are
those of a `dataset.json` beside the truths, or given by `--labels`, or liver = 1 and tumour = 2.
"""

from __future__ import annotations

import itertools
import math
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cc3d
import numpy as np
import tyro
from isal import isal_zlib
from tqdm import tqdm

from data.datasets import describe_truths, find_labels, name_scans, pair_by_name
from data.files import InputError, read_record, read_signed, write_csv, write_json, write_signed
from data.labels import (
    BACKGROUND,
    IGNORED,
    USUAL_LABELS,
    Labels,
    find_values,
    is_tumour,
    list_values,
)
from data.pictures import class_colour, save_figure
from data.scans import read_label_map, read_volume
from data.settings import command_line, show_progress
from data.volumes import Volume, enclose, find_bounding_box, name_case


def overlap_counts(prediction: Any, label: Any, num_classes: int) -> np.ndarray:
    """(3, num_classes − 1) voxel counts: in both, in the prediction, in the label; class 1 first.

    `prediction` and `label` are class-index arrays or tensors of one shape.
    """
    if tuple(prediction.shape) != tuple(label.shape):
        raise ValueError(f"shapes must be equal, got {prediction.shape} and {label.shape}")
    overlaps = list_overlaps(prediction, label, num_classes)
    counts = [[int(number) for number in numbers] for numbers in overlaps]
    return np.array(counts, dtype=np.int64).reshape(-1, 3).T


def list_overlaps(prediction: Any, label: Any, num_classes: int) -> list[list[Any]]:
    """The same of class 1, 2, …; of tensors as tensors, which a GPU need not hand over yet."""
    masks = [(prediction == value, label == value) for value in range(1, num_classes)]
    return [[(found & true).sum(), found.sum(), true.sum()] for found, true in masks]


def dice_metric(
    prediction: Any = None, label: Any = None, num_classes: int = 2, *, counts: Any = None
) -> np.ndarray:
    """Hard Dice of one patient for the foreground classes 1 … num_classes − 1, background excluded.

    2·|both| / (|prediction| + |label|). A prediction on an empty label gives 0: a false alarm must
    not vanish from the mean.

    Args:
        prediction, label: class indices, arrays or tensors of one shape (any number of axes), on
            the scan's own grid if the figure is to be reported.
        counts: instead of both, the sum of their `overlap_counts` over the pieces of a patient.

    Returns:
        (num_classes − 1,) Dice in 0..1; NaN where a class is in neither (`mean_dice` skips it).
    """
    if counts is None:
        counts = overlap_counts(prediction, label, num_classes)
    both, predicted, true = np.asarray(counts, float)
    with np.errstate(invalid="ignore"):
        return 2 * both / (predicted + true)


def mean_dice(per_patient: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over patients of (patients, classes) Dice, NaN left out, and how many counted."""
    table = np.asarray(per_patient, dtype=float)
    counted = np.isfinite(table).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.nansum(table, axis=0) / counted, counted


def nan_mean(values: Iterable[float]) -> float:
    """Mean of what is a number; NaN of nothing, without a warning."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def measure_nearest(points: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """Distance of each point (N, 3) to the nearest one of a cloud (M, 3), on all cores.

    The threads are ours, not the tree's own, which outlive Ctrl-C and crash Python at its end.
    """
    from scipy.spatial import cKDTree

    tree, cores = cKDTree(cloud, balanced_tree=False, compact_nodes=False), os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        parts = pool.map(lambda part: tree.query(part)[0], np.array_split(points, cores))
        return np.concatenate(list(parts))


def measure_shape(mask: np.ndarray, to_mm: np.ndarray) -> dict[str, float | None]:
    """Sphericity and elongation of a mask (X, Y, Z), in mm by the 3×3 map `to_mm` of a voxel step.

    As IBSI has them (arXiv:1612.07003): the surface of the ball of equal volume over the mask's
    own, 1 for a ball; the root of the second largest over the largest variance of the voxels'
    centres, 0 for a needle. None of an empty mask, and elongation of a single voxel.
    """
    area, volume = measure_area(mask, to_mm), np.count_nonzero(mask) * abs(np.linalg.det(to_mm))
    if not volume:
        return dict.fromkeys(("sphericity", "elongation"))
    mean, second = np.zeros(3), np.zeros((3, 3))
    for a, b in ((0, 1), (1, 2), (2, 0)):  # each axis once as `a`
        plane = np.count_nonzero(mask, axis=3 - a - b)
        plane = (plane if a < b else plane.T) / plane.sum()
        along, across = np.arange(mask.shape[a]), np.arange(mask.shape[b])
        mean[a], second[a, a] = along @ plane.sum(axis=1), along**2 @ plane.sum(axis=1)
        second[a, b] = second[b, a] = along @ plane @ across
    _, middle, largest = np.linalg.eigvalsh(to_mm @ (second - np.outer(mean, mean)) @ to_mm.T)
    long = largest > 1e-9 * volume ** (2 / 3)
    elongation = float(np.sqrt(max(middle, 0) / largest)) if long else None
    sphericity = min(1.0, float(np.cbrt(36 * np.pi * volume**2) / area))
    return {"sphericity": sphericity, "elongation": elongation}


def measure_area(mask: np.ndarray, to_mm: np.ndarray) -> float:
    """Surface of a mask (X, Y, Z) in mm², by Crofton's formula: how often lines cross it.

    Lines in 13 directions (Legland et al. 2007, doi:10.5566/ias.v26.p83-92), each with the part of
    the sphere nearest to it, that step over several voxels where edges are short. Of flat sides
    along the axes a tenth is missing; the voxels' faces would count half too much of a ball.
    """
    edges = np.linalg.norm(to_mm, axis=0)
    reach = np.maximum(np.round(edges.max() / edges), 1).astype(int)
    padded = np.pad(np.asarray(mask, bool), [(n, n) for n in reach])
    steps = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0)]) * reach
    lengths = np.linalg.norm(steps @ to_mm.T, axis=1)
    points = np.random.default_rng(0).normal(size=(50_000, 3))  # in all directions alike
    nearest = np.abs(points @ (to_mm @ (steps.T / lengths))).argmax(axis=1)
    shares = np.bincount(nearest, minlength=len(steps)) / len(points)
    crossings = [np.count_nonzero(padded != np.roll(padded, n, axis=(0, 1, 2))) for n in steps]
    return 2 * float(np.sum(shares * crossings / lengths) * abs(np.linalg.det(to_mm)))


# Figure of merit → which end is the worst. The order is that of the tables.
FIGURES = {
    "dice": "low", "iou": "low", "precision": "low", "recall": "low", "specificity": "low",
    "accuracy": "low", "nsd_2mm": "low", "hd95_mm": "high", "asd_mm": "high",
    "volume_error_ml": "far", "volume_error_percent": "far",
}  # fmt: skip
WORST_SHOWN = 3  # cases named, and previews in worst.png
PRINTED = ("dice", "nsd_2mm", "hd95_mm", "volume_error_percent")
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a text that begins so

UNLISTED = ("files", "classes", "trust_image_grid", "mark")  # of a record: in no table
RESULTS = (
    "label.nii.gz",
    "masked.nii.gz",
    "probability.nii.gz",
    "label.dcm",
    "preview.png",
    "doubt.png",
)

T = TypeVar("T")


def divide(part: float, whole: float) -> float | None:
    """Their ratio; None of nothing."""
    return part / whole if whole else None


def do_each(cases: Sequence[T], name: Callable[[T], str], do: Callable[[T], Any]) -> list[str]:
    """Do every case, whatever happens to the others; returns a line for each that failed.

    Everything is caught but an interrupt; LIVER_DEBUG=1 shows where it came from.
    """
    failed: list[str] = []
    for number, case in enumerate(show_progress(cases, unit="case"), start=1):
        try:
            do(case)
        except Exception as error:
            if os.environ.get("LIVER_DEBUG"):
                traceback.print_exc()
            kind = type(error).__name__
            known = isinstance(error, InputError)
            failed.append(str(error) if known else f"{name(case)}: {kind}: {error or 'no more'}")
            if len(cases) > 1:
                rest = ", the others go on" if number < len(cases) else ""
                tqdm.write(f"{name(case)}: failed{rest}")
    return failed


def refuse_failures(failed: Sequence[str], count: int, what: str) -> None:
    """End with an InputError that tells what failed, if anything did."""
    if failed and count == 1:
        raise InputError(failed[0])
    if failed:
        told = "\n".join(dict.fromkeys(failed))  # once what is wrong with all of them
        raise InputError(f"{len(failed)} of {count} {what} failed:\n{told}")


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV; a text that a spreadsheet would take for a formula gets an apostrophe."""

    def defuse(value: Any) -> Any:
        risky = isinstance(value, str) and value.startswith(FORMULA_SIGNS)
        return f"'{value}" if risky else value

    write_csv([{key: defuse(value) for key, value in row.items()} for row in rows], path)


def describe_values(values: dict[str, float], worst: str) -> dict[str, Any]:
    """Mean, SD (n − 1), median, the worst and whose it is, n; of case → value."""
    if not values:
        return {"n": 0}
    badness = {"low": lambda v: -v, "high": lambda v: v, "far": abs}[worst]
    array, case = np.array(list(values.values())), max(values, key=lambda c: badness(values[c]))
    spread = float(array.std(ddof=1)) if len(array) > 1 else None
    middle = {"mean": float(array.mean()), "sd": spread, "median": float(np.median(array))}
    return {**middle, "worst": values[case], "worst_case": case, "n": len(array)}


def summarise(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Per class and figure `describe_values` over patients; undefined ones are left out of n.

    `empty` counts patients without the class in truth, prediction or both; `lesions` are pooled.
    """

    def known(key: str) -> dict[str, float]:
        return {row["case"]: row[key] for row in rows if row.get(key) is not None}

    summary: dict[str, Any] = {"patients": len(rows)}
    for key in ("mean_iou", "accuracy"):
        summary[key] = describe_values(known(key), "low")
    for name in names:
        part: dict[str, Any] = {
            figure: describe_values(known(f"{name}_{figure}"), worst)
            for figure, worst in FIGURES.items()
        }
        empty = [row.get(f"{name}_empty") for row in rows]
        part["empty"] = {which: empty.count(which) for which in ("truth", "prediction", "both")}
        if is_tumour(name):
            counts = [key for key in rows[0] if key.startswith(f"{name}_lesions")]
            pooled = {key.removeprefix(f"{name}_"): sum(known(key).values()) for key in counts}
            found, right = (pooled.get(f"lesions_{key}", 0) for key in ("found", "right"))
            part["lesions"] = pooled | {
                "lesion_recall": divide(found, pooled.get("lesions", 0)),
                "lesion_precision": divide(right, pooled.get("lesions_predicted", 0)),
            }
        summary[name] = part
    return summary


def print_summary(summary: dict[str, Any], names: Sequence[str]) -> None:
    """The figures that are reported most, in columns that never touch."""
    lines = [("", "mean ± SD", "median", "worst", "n", "worst case")]
    for name, figure in itertools.product(names, PRINTED):
        got = summary[name][figure]
        if got["n"]:
            spread = "" if got["sd"] is None else f" ± {got['sd']:.3f}"  # one patient has no spread
            mean, middle = f"{got['mean']:.3f}{spread}", f"{got['median']:.3f}"
            worst = f"{got['worst']:.3f}"
            lines.append(
                (f"{name} {figure}", mean, middle, worst, str(got["n"]), got["worst_case"])
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *numbers, case in lines:
        cells = [text.rjust(width) for text, width in zip(numbers, widths[1:-1], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells, case]).rstrip())
    for name in names:
        if any(summary[name]["empty"].values()):
            empty = summary[name]["empty"]
            print(
                f"{name}: absent in {empty['both']} and falsely found in {empty['truth']}, "
                f"missed in {empty['prediction']} patients; undefined figures are left out of n"
            )
        if "lesions" in summary[name]:
            got = summary[name]["lesions"]
            print(
                f"{name}: {got['lesions_found']} of {got['lesions']} lesions found, "
                f"{got['lesions_right']} of {got['lesions_predicted']} findings right"
            )


PANELS = {  # unit → figures of merit that are drawn in it
    "ratio (1 is best)": ("dice", "iou", "precision", "recall", "nsd_2mm"),
    "distance in mm (0 is best)": ("hd95_mm", "asd_mm"),
    "volume error in % (0 is best)": ("volume_error_percent",),
}


def draw_summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    """Figure with box plots over patients, a dot for each, of the figures in PANELS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[5, 3, 2])
    for axes, (unit, keys) in zip(panels, PANELS.items(), strict=True):
        for index, name in enumerate(names, start=1):
            colour = class_colour(index)
            for place, key in enumerate(keys):
                values = [row.get(f"{name}_{key}") for row in rows]
                values = [value for value in values if value is not None]
                at = place + (index - (len(names) + 1) / 2) * 0.8 / len(names)
                axes.boxplot(
                    [values], positions=[at], widths=0.5 / len(names), showfliers=False,
                    medianprops={"color": "black"}, boxprops={"color": colour},
                )  # fmt: skip
                axes.plot([at] * len(values), values, "o", color=colour, alpha=0.6, markersize=4)
            axes.plot([], [], "o", color=colour, label=name)
        labels = [key.removesuffix("_mm").replace("_", " ") for key in keys]
        axes.set_xticks(range(len(keys)), [label.replace("2mm", "2 mm") for label in labels])
        axes.set(ylabel=unit, xlim=(-0.6, len(keys) - 0.4))
        axes.grid(axis="y", alpha=0.3)
        if unit.startswith("ratio"):
            axes.set_ylim(-0.02, 1.02)
            axes.legend()
    patients = "1 patient" if len(rows) == 1 else f"{len(rows)} patients"
    figure.suptitle(f"whole volumes on their own grid, n = {patients}")
    return figure


def find_worst(rows: Iterable[dict[str, Any]], name: str) -> dict[str, float]:
    """Case → Dice of class `name`, the lowest first."""
    dice = {row["case"]: row.get(f"{name}_dice") for row in rows}
    known = {case: value for case, value in dice.items() if value is not None}
    return dict(sorted(known.items(), key=lambda item: item[1]))


def tell_worst(worst: Mapping[str, float]) -> str:
    """The first few of them, for the terminal."""
    some = itertools.islice(worst.items(), WORST_SHOWN)
    return ", ".join(f"{case} (Dice {dice:.4f})" for case, dice in some)


def report(rows: Sequence[dict[str, Any]], names: Sequence[str], folder: Path, **more: str) -> None:
    """Write summary.json (with `more` in it) and summary.png of evaluated rows, and print it."""
    summary = summarise(rows, names)
    write_json({**summary, **more}, folder / "summary.json")
    save_figure(draw_summary(rows, names), folder / "summary.png")
    print_summary(summary, names)


def show_worst(rows: Sequence[dict[str, Any]], name: str, folder: Path) -> None:
    """worst.png: the previews `<case>/<case>_preview.png` of the lowest Dice, the worst on top."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    worst = find_worst(rows, name)
    previews = {case: folder / case / f"{case}_preview.png" for case in worst}
    shown = [case for case, path in previews.items() if path.exists()][:WORST_SHOWN]
    if not shown:
        return
    figure = Figure(figsize=(13, 7.2 * len(shown)))
    figure.subplots_adjust(0, 0, 1, 1, hspace=0)
    for axes, case in zip(figure.subplots(len(shown), squeeze=False).flat, shown, strict=True):
        axes.imshow(imread(previews[case]), interpolation="none")
        axes.axis("off")
    save_figure(figure, folder / "worst.png")
    print(f"look first at {folder / 'worst.png'}: {tell_worst({c: worst[c] for c in shown})}")


# ---------------------------------------------------------------------------------------
# Review: which results a person looks at first
# ---------------------------------------------------------------------------------------


def tell_row(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """`liver 1637 ml, Dice 0.9141, expected Dice 0.91: good`, for the terminal and the preview."""
    parts = []
    for name in names:
        parts.append(f"{name} {row[f'{name}_volume_ml']:.0f} ml")
        if (dice := row.get(f"{name}_dice")) is not None:
            parts.append(f"Dice {dice:.4f}")
    return ", ".join([*parts, f"expected Dice {row['expected_dice']:.2f}: {row['trust']}"])


def write_review(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """review.csv: the cases in the order in which a person should look at them, the least sure
    first, with the picture to look at; tells the first of them."""
    known = [row for row in rows if row.get("expected_dice") is not None]
    known.sort(key=lambda row: row["expected_dice"])
    if len(known) < len(rows):
        print(f"{len(rows) - len(known)} of {len(rows)} cases were done by an earlier version and "
              "have no expected Dice; --overwrite does them again")  # fmt: skip
    if not known:
        return
    table = []
    for row in known:
        picture = f"{row['case']}/{row['case']}_preview.png"
        keys = ("case", "trust", "expected_dice", "least_sure_slice", "truth", "warnings")
        table.append({key: row.get(key) for key in keys} | {"picture": picture})
    write_table(table, folder / "review.csv")
    flagged = [row for row in known if row["trust"] != "good"]
    if len(known) > 1:
        some = (f"{row['case']} ({row['expected_dice']:.2f})" for row in flagged[:WORST_SHOWN])
        told = f"{len(flagged)} of {len(known)} want looking at"
        todo = "" if all(row.get("truth") for row in known) else ", and correcting, in this order"
        first = f"{todo}: {', '.join(some)}{', …' * (len(flagged) > WORST_SHOWN)}"
        print(f"{told}{first if flagged else ''}; all by expected Dice: {folder / 'review.csv'}")


# ---------------------------------------------------------------------------------------
# Records: `<case>/<case>.json`, which says that a case is finished and signs what was written
# ---------------------------------------------------------------------------------------


def sign_file(path: Path) -> str:
    """Size and CRC-32 of a result, by which a cut or changed one is known."""
    size, crc = 0, 0
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            size, crc = size + len(part), isal_zlib.crc32(part, crc)
    return f"{size}:{crc:08x}"


def read_case_record(path: Path) -> dict[str, Any] | None:
    """A case's record; None, and told, where the file is no record of this program."""
    try:
        record = read_signed(path)
        if record["case"] != path.stem or not isinstance(record["files"], dict):
            raise InputError(f"{path}: is of another program or version; left out")
    except (InputError, KeyError, TypeError) as error:
        tqdm.write(f"{path}: is no record of a finished case ({error})")
        return None
    return record


def is_finished(record: Path, mark: str) -> bool:
    """Whether a case was done with the same inputs and all that was written is still whole."""
    known = read_case_record(record) if record.is_file() else None
    if known is None or known.get("fingerprint") != mark or not known["files"]:
        return False
    for name, signature in known["files"].items():
        path = record.parent / Path(name).name
        if not path.is_file() or sign_file(path) != signature:
            tqdm.write(f"{path}: is missing or changed; {record.stem} is done again")
            return False
    return True


def write_record(row: dict[str, Any], path: Path) -> None:
    """Write a case's record, with a signature of each file beside it."""
    names = (f"{path.stem}_{ending}" for ending in RESULTS)
    files = {n: sign_file(path.parent / n) for n in names if (path.parent / n).is_file()}
    write_signed(row | {"files": files}, path)


def report_all(destination: Path, names: Sequence[str], weights: str) -> list[dict[str, Any]]:
    """Write the table of all cases in the folder, of earlier calls too, and the summary of those
    that were evaluated with these networks; returns the table."""
    records = [folder / f"{folder.name}.json" for folder in sorted(destination.iterdir())]
    read = [read_record(path) for path in records if path.is_file()]
    rows = [{k: v for k, v in row.items() if k not in UNLISTED} for row in read if row]
    write_table(rows, destination / "results.csv")
    write_json(rows, destination / "results.json")
    same = [row for row in rows if row.get("truth") and row.get("weights") == weights[:12]]
    evaluated = [row for row in same if f"{names[0]}_dice" in row]
    if evaluated:
        report(evaluated, names, destination, weights=weights[:12])
        show_worst(evaluated, names[0], destination)
    write_review(rows, destination)
    return rows


NSD_MM = 2.0  # tolerance of the normalised surface Dice
LESION_OVERLAP = 0.1  # a lesion counts as found when this part of it is covered
LESION_SIZES_MM = (10, 20)  # diameters that part small, medium and large lesions

# ---------------------------------------------------------------------------------------
# Figures of one patient: class indices on one grid
# ---------------------------------------------------------------------------------------


def measure(classes: Volume, scan: Volume, names: Sequence[str]) -> dict[str, float | None]:
    """Volume in ml, mean and SD of HU, extent in mm along x, y, z (RAS), and shape of each class.

    `classes` (class indices) and `scan` (HU) lie on one grid; `names` are those of 1, 2, …
    """
    row: dict[str, float | None] = {}
    outer = find_bounding_box(classes.ras.data)
    indices, hu = classes.ras.data[outer], scan.ras.data[outer]
    exact = hu.dtype.kind in "iu"  # the sum is the same in any order
    for index, name in enumerate(names, start=1):
        mask = indices == index
        box = find_bounding_box(mask)
        values = hu[box].T[mask[box].T] if exact else hu[box][mask[box]]  # .T: as they are stored
        row[f"{name}_volume_ml"] = round(values.size * scan.ras.voxel_ml, 2)
        row[f"{name}_hu_mean"] = round(float(values.mean()), 1) if values.size else None
        row[f"{name}_hu_sd"] = round(float(values.std()), 1) if values.size else None
        for axis, part, step in zip("xyz", box, scan.ras.spacing_mm, strict=True):
            row[f"{name}_extent_{axis}_mm"] = round((part.stop - part.start) * step, 1)
        for figure, value in measure_shape(mask[box], scan.ras_affine[:3, :3]).items():
            row[f"{name}_{figure}"] = None if value is None else round(value, 3)
    return row


def evaluate(predicted: Volume, truth: Volume, names: Sequence[str]) -> dict[str, Any]:
    """Figures of merit of one patient, per class, on the grid that both lie on.

    Args:
        predicted, truth: class indices (X, Y, Z); `names` are those of the classes 1, 2, …; where
            the truth is IGNORED nothing is counted.

    Returns:
        `{name}_{figure}` of every class and `FIGURES`, `{name}_empty` ("", "truth", "prediction" or
        "both"), lesion counts of tumours, and over all classes, background counted, `accuracy` and
        `mean_iou`. None where a figure is not defined: a ratio without denominator, a distance to
        nothing. A false alarm or a missed organ has Dice and surface Dice 0.
    """
    total = math.prod(truth.shape)
    box = enclose(*(find_bounding_box(volume.ras.data) for volume in (predicted, truth)))
    ours, true = predicted.ras.data[box], truth.ras.data[box]  # outside both are background
    if (unknown := true == IGNORED).any():  # nobody judged these: they count nowhere
        ours, true = (np.where(unknown, np.uint8(0), array) for array in (ours, true))
        total -= int(np.count_nonzero(unknown))
    counts = overlap_counts(ours, true, len(names) + 1)
    some_p, some_t = int(np.count_nonzero(ours)), int(np.count_nonzero(true))
    neither = total - int(np.count_nonzero((ours | true) > 0))
    row: dict[str, Any] = {"accuracy": (neither + int(counts[0].sum())) / total}
    ious = [divide(neither, 2 * total - some_p - some_t - neither)]
    for index, name in enumerate(names, start=1):
        both, found, wanted = map(int, counts[:, index - 1])
        scores = score_overlap(both, found, wanted, total)
        ious.append(scores["iou"])
        scores["volume_error_ml"] = (found - wanted) * truth.voxel_ml
        scores["volume_error_percent"] = divide(100 * (found - wanted), wanted)
        scores |= score_surfaces(ours == index, true == index, truth)
        row |= {f"{name}_{figure}": scores[figure] for figure in FIGURES}
        empty = {(True, True): "both", (True, False): "prediction", (False, True): "truth"}
        row[f"{name}_empty"] = empty.get((found == 0, wanted == 0), "")
        if is_tumour(name):
            lesions = score_lesions(ours == index, true == index, truth)
            row |= {f"{name}_{key}": value for key, value in lesions.items()}
    known = [iou for iou in ious if iou is not None]
    return {"mean_iou": divide(sum(known), len(known)), **row}


def score_overlap(both: int, found: int, true: int, total: int) -> dict[str, float | None]:
    """Figures of one class from voxel counts: in both, predicted, true, in the whole scan."""
    neither = total - found - true + both
    return {
        "dice": divide(2 * both, found + true),
        "iou": divide(both, found + true - both),
        "precision": divide(both, found),
        "recall": divide(both, true),
        "specificity": divide(neither, total - true),
        "accuracy": divide(both + neither, total),
    }


def find_surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of `mask` with a face to its outside or to the scan's end, as a mask."""
    inner = mask.copy(order="K")
    for axis in range(3):
        along, inside = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        inside[1:] &= along[:-1]
        inside[:-1] &= along[1:]
        inside[:1] = inside[-1:] = False
    return mask & ~inner


def list_voxels(mask: np.ndarray) -> np.ndarray:
    """(n, 3) indices of what is True; faster than numpy's own of an array that is 3D."""
    return np.stack(np.unravel_index(np.flatnonzero(mask), mask.shape), axis=1)


def measure_distances(points: np.ndarray, known: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance in mm of each of `points` (n, 3) to the nearest of `others`; those that are
    `known` (n,) to be among them are not asked about."""
    distances = np.zeros(len(points))
    distances[~known] = measure_nearest(points[~known], others)
    return distances


def score_surfaces(
    predicted: np.ndarray, truth: np.ndarray, grid: Volume
) -> dict[str, float | None]:
    """HD95, mean symmetric surface distance, and surface Dice at 2 mm, of two masks in RAS order.

    Between voxel centres of the surfaces in mm, as `grid` has them. HD95 is the larger of both
    directions' 95th percentiles. Surface Dice: Nikolov et al. 2018 (arXiv:1809.04430), counted in
    surface voxels.
    """
    boxed, to_mm = find_bounding_box(predicted | truth), grid.ras_affine[:3, :3].T
    ours, true = (find_surface(mask[boxed]) for mask in (predicted, truth))
    points = [list_voxels(surface) @ to_mm for surface in (ours, true)]
    if not (len(points[0]) and len(points[1])):
        none = None if len(points[0]) == len(points[1]) else 0.0
        return {"hd95_mm": None, "asd_mm": None, "nsd_2mm": none}
    there = measure_distances(points[0], true[ours], points[1])
    back = measure_distances(points[1], ours[true], points[0])
    every = np.concatenate([there, back])
    return {
        "hd95_mm": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "asd_mm": float(every.mean()),
        "nsd_2mm": float(np.mean(every <= NSD_MM + 1e-6)),  # 2 mm that rounding made longer
    }


def group_lesions(mask: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of each connected piece of `mask`, and whether enough of it is covered by `other`."""
    labels, count = cc3d.connected_components(mask, connectivity=26, return_N=True)
    sizes, covered = (np.bincount(labels[m], minlength=count + 1)[1:] for m in (mask, other))
    return sizes, covered >= LESION_OVERLAP * sizes


def score_lesions(
    predicted: np.ndarray, truth: np.ndarray, grid: Volume
) -> dict[str, float | int | None]:
    """How many lesions (connected pieces) were found, how many findings are right, by size.

    Of two masks (X, Y, Z). A true lesion is found, and a predicted one is right, when a tenth of it
    is covered by the other mask. Its size is the diameter of the ball of equal volume.
    """
    (sizes, found), (_, right) = group_lesions(truth, predicted), group_lesions(predicted, truth)
    row: dict[str, float | int | None] = {
        "lesions": len(found), "lesions_found": int(found.sum()),
        "lesion_recall": divide(int(found.sum()), len(found)),
        "lesions_predicted": len(right), "lesions_right": int(right.sum()),
        "lesion_precision": divide(int(right.sum()), len(right)),
    }  # fmt: skip
    diameters = np.cbrt(6 / np.pi * 1000 * sizes * grid.voxel_ml)
    edges = (0, *LESION_SIZES_MM, math.inf)
    for low, high in itertools.pairwise(edges):
        group = f"{low}_to_{high}_mm" if high < math.inf else f"from_{low}_mm"
        inside = (diameters >= low) & (diameters < high)
        row[f"lesions_{group}"] = int(inside.sum())
        row[f"lesions_found_{group}"] = int(found[inside].sum())
    return row


# ---------------------------------------------------------------------------------------
# Run as a script: files of any program
# ---------------------------------------------------------------------------------------


@dataclass
class Config:
    """Which label maps are compared, what their values mean, and where the figures go."""

    predictions: tyro.conf.Positional[Path]  # a label map, or a folder of them
    truths: tyro.conf.Positional[Path]  # the reference: a label map, or a folder of equal names
    destination: Path = Path("results/evaluation")  # the table, the summary and its picture
    # Classes as NAME=VALUES, such as liver=1,2 tumour=2 (they may overlap), or NAME=NAMES of a
    # dataset.json beside the truths. Without: what that file declares, else liver=1 tumour=2.
    labels: tuple[str, ...] = ()
    predicted: tuple[str, ...] = ()  # the same of the predictions, where they number otherwise
    others: tuple[int, ...] = ()  # values that may occur beside the classes; they are background
    trust_grid: bool = False  # lay voxel on voxel whatever the headers say, if the shapes agree


def parse_class_values(words: Sequence[str], declared: Labels | None, setting: str) -> Labels:
    """`["liver=1,2", "tumour=2"]` → class name → raw values, background first."""
    classes: Labels = {BACKGROUND: (0,)}
    for word in words:
        name, _, values = word.partition("=")
        parts, known = (values or name).split(","), declared is not None
        if not name or name.isdigit() or not (known or all(part.isdigit() for part in parts)):
            raise InputError(
                f"{setting} {word}: must be NAME=VALUES such as liver=1,2; names in the place of "
                "values need a dataset.json beside the truths that declares them"
            )
        given = {part: (int(part),) for part in parts if part.isdigit()}
        classes[name] = find_values(parts, (declared or {}) | given, setting)
        if 0 in classes[name]:
            raise InputError(f"{setting} {word}: 0 is the background; name other values")
    return classes


def part_classes(classes: Labels) -> list[Labels]:
    """Groups of classes that share no value, so that each group is one map of class indices."""
    groups: list[Labels] = []
    for name, values in itertools.islice(classes.items(), 1, None):
        fits = (g for g in groups if not set(list_values(g)) & set(values))
        group = next(fits, None)
        if group is None:
            group = {BACKGROUND: (0,)}
            groups.append(group)
        group[name] = values
    return groups


def open_pair(prediction: Path, truth: Path) -> Volume:
    """The grid that both are laid on: the truth's, or the prediction's where the truth has none."""
    try:
        return read_volume(truth)
    except InputError:  # a DICOM SEG lies on the grid of what it was drawn on
        return read_volume(prediction)


def evaluate_files(prediction: Path, truth: Path, config: Config) -> dict[str, Any]:
    """`evaluate` of two label maps; of classes that overlap each group for itself.

    `accuracy` and `mean_iou` are then those of the first group.
    """
    described, words = describe_truths(truth), config.labels
    found = described.labels if described else None
    ignore = described.ignore if described else ()
    asked = parse_class_values(words, found, "--labels") if words else found or USUAL_LABELS
    theirs = (
        parse_class_values(config.predicted, None, "--predicted") if config.predicted else asked
    )
    if missing := set(asked) - set(theirs):
        raise InputError(f"--predicted: lacks {', '.join(sorted(missing))}; name them too")
    others = {"others": tuple(config.others)} if config.others else {}
    grid = open_pair(prediction, truth)
    row: dict[str, Any] = {}
    for group in part_classes(asked):
        maps = [
            read_label_map(
                path, grid, {**(found or {}), **classes, **others},
                classes={name: classes[name] for name in group}, trust_grid=config.trust_grid,
                ignore=ignore,
            )
            for path, classes in ((prediction, theirs | {BACKGROUND: (0,)}), (truth, asked))
        ]  # fmt: skip
        row = evaluate(maps[0], maps[1], list(group)[1:]) | row
        notes = [note for label in maps for note in label.notes]
    return row | {"warnings": "; ".join(notes)}


def find_pairs(config: Config) -> list[tuple[str, Path, Path]]:
    """(case, prediction, truth) of two files, or of two folders by names."""
    if not config.predictions.is_dir() and not config.truths.is_dir():
        return [(name_case(config.predictions), config.predictions, config.truths)]
    predictions, truths = find_labels(config.predictions), find_labels(config.truths)
    pairs = pair_by_name(predictions, truths)
    results = all(path.name == f"{path.parent.name}_label.nii.gz" for path in predictions)
    names = (
        [p.parent.name for p in predictions]
        if results
        else name_scans(predictions, config.predictions)
    )
    for path, truth in zip(predictions, pairs, strict=True):
        if truth is None:
            print(f"{path}: no truth of this name; not evaluated")
    if unused := [truth for truth in truths if truth not in pairs]:
        told = ", ".join(path.name for path in unused[:5])
        print(f"{len(unused)} truths without prediction, such as {told}; not evaluated")
    return [(n, p, t) for n, p, t in zip(names, predictions, pairs, strict=True) if t is not None]


def main(config: Config) -> None:
    pairs, rows = find_pairs(config), []

    def do(pair: tuple[str, Path, Path]) -> None:
        name, prediction, truth = pair
        row = evaluate_files(prediction, truth, config)
        rows.append({"case": name, **row, "prediction": str(prediction), "truth": str(truth)})

    failed = do_each(pairs, lambda pair: pair[0], do)
    if rows:
        names = [key.removesuffix("_dice") for key in rows[0] if key.endswith("_dice")]
        write_table(rows, config.destination / "results.csv")
        write_json(rows, config.destination / "results.json")
        report(rows, names, config.destination)
        print(f"the worst: {tell_worst(find_worst(rows, names[0]))}")
        print(f"look at {config.destination / 'summary.png'}")
    refuse_failures(failed, len(pairs), "cases")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
