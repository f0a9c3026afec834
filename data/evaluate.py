"""Compare label maps with their reference: metrics per patient, tables, summary, worst cases.

    python -m data.evaluate PREDICTIONS TRUTHS            # two files, or two folders of equal names
    python -m data.evaluate nnunet/test labelsTs --labels liver=1,2 tumour=2

A prediction of any program is laid on the grid of its reference. Classes are those of a
`dataset.json` beside the references, or given by `--labels`; results of apply_model.py have those
of their network; else liver = 1 and tumour = 2.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cc3d  # of uint8, see apply_model
import numpy as np
import tyro
from scipy.ndimage import find_objects
from scipy.spatial import cKDTree
from tqdm import tqdm

from data.datasets import find_labels, name_scans, pair_truths
from data.files import InputError, atomic_write, explain, read_record, write_csv, write_json
from data.labels import (
    BACKGROUND,
    IGNORED,
    USUAL_LABELS,
    Description,
    Labels,
    Masks,
    as_labels,
    describe_truths,
    is_tumour,
    parse_values,
    translate_classes,
)
from data.pictures import class_colour, save_figure
from data.scans import find_others, read_label_map, read_volume
from data.settings import Classes, read_settings, run_script, show_progress
from data.volumes import Volume, enclose, find_bounding_box

FIGURES = {  # metric → which of its values is the worst; the order is that of the tables
    "dice": "low", "iou": "low", "precision": "low", "recall": "low", "specificity": "low",
    "accuracy": "low", "nsd_2mm": "low", "hd95_mm": "high", "asd_mm": "high",
    "volume_error_ml": "far", "volume_error_percent": "far",
}  # fmt: skip
PRINTED = ("dice", "nsd_2mm", "hd95_mm", "volume_error_percent")
PANELS = {  # unit → metrics that are drawn in it
    "ratio (1 is best)": ("dice", "iou", "precision", "recall", "nsd_2mm"),
    "distance in mm (0 is best)": ("hd95_mm", "asd_mm"),
    "volume error in % (0 is best)": ("volume_error_percent",),
}
NSD_MM = 2.0  # tolerance of the normalised surface Dice
LESION_IOU = 0.1  # from which on a lesion is found
LESION_SIZES = {"_0_to_10_mm": (0, 10), "_10_to_20_mm": (10, 20), "_from_20_mm": (20, math.inf)}
WORST_SHOWN = 3  # cases named, and previews in worst.png
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a text that begins so
NO_COLUMNS = ("lesion_list", "files", "classes", "labels", "declared", "trust_image_grid")

T = TypeVar("T")


def dice_metric(
    prediction: Any = None, label: Any = None, num_classes: int = 2, *, counts: Any = None
) -> np.ndarray:
    """Return (num_classes − 1,) hard Dice of one patient: 2·|both| / (|prediction| + |label|). It
    is NaN for a class in neither, and 0 for a false alarm, which must not vanish from the mean.
    `prediction` and `label` are class indices, arrays or tensors of one shape; to be reported, on
    the scan's grid. `counts` replaces both: `overlap_counts`, summed over sub-volumes."""
    if counts is None:
        counts = overlap_counts(prediction, label, num_classes)
    both, predicted, true = np.asarray(counts, float)
    with np.errstate(invalid="ignore"):
        return 2 * both / (predicted + true)


def overlap_counts(prediction: Any, label: Any, num_classes: int) -> np.ndarray:
    """Return (3, num_classes − 1) voxel counts: in both, in the prediction, in the label."""
    if tuple(prediction.shape) != tuple(label.shape):
        raise ValueError(f"shapes must be equal, got {prediction.shape} and {label.shape}")
    overlaps = list_overlaps(prediction, label, num_classes)
    counts = [[int(number) for number in numbers] for numbers in overlaps]
    return np.array(counts, dtype=np.int64).reshape(-1, 3).T


def list_overlaps(prediction: Any, label: Any, num_classes: int) -> list[list[Any]]:
    """Return these counts class by class; those of tensors stay on their device."""
    masks = [(prediction == value, label == value) for value in range(1, num_classes)]
    return [[(found & true).sum(), found.sum(), true.sum()] for found, true in masks]


def nan_mean(values: Iterable[float]) -> float:
    """Return the mean of all finite values; NaN if there are none."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


# Metrics of one patient: class indices on one grid
def measure(classes: Volume, scan: Volume, names: Sequence[str]) -> dict[str, float | None]:
    """Return volume in ml, mean and SD of HU, and extent in mm along x, y, z (RAS) of each class.
    `classes` (class indices) and `scan` (HU) lie on one grid; `names` are those of 1, 2, …"""
    row: dict[str, float | None] = {}
    outer = find_bounding_box(classes.ras.data)
    indices, hu = classes.ras.data[outer], scan.ras.data[outer]
    for index, name in enumerate(names, start=1):
        mask = indices == index
        box, values = find_bounding_box(mask), hu.T[mask.T]  # .T: in the order of storage
        row[f"{name}_volume_ml"] = round(values.size * scan.voxel_ml, 2)
        row[f"{name}_hu_mean"] = round(float(values.mean()), 1) if values.size else None
        row[f"{name}_hu_sd"] = round(float(values.std()), 1) if values.size else None
        for axis, part, step in zip("xyz", box, scan.ras.spacing_mm, strict=True):
            row[f"{name}_extent_{axis}_mm"] = round((part.stop - part.start) * step, 1)
    return row


def evaluate(predicted: Volume, truth: Volume, names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of one patient from class indices (X, Y, Z) on one grid; IGNORED voxels of
    the truth count nowhere. Keys: `{name}_{figure}` of each class in `names` and FIGURES, `_empty`
    ("", "truth", "prediction", "both"), lesions; over all classes `accuracy` and `mean_iou`. None
    is undefined: without denominator or distance. A false alarm or a missed organ has Dice 0."""
    total = math.prod(truth.shape)
    box = enclose(*(find_bounding_box(volume.ras.data) for volume in (predicted, truth)))
    ours, true = predicted.ras.data[box], truth.ras.data[box]  # outside both are background
    if (unknown := true == IGNORED).any():
        ours, true = (np.where(unknown, np.uint8(0), array) for array in (ours, true))
        total -= int(np.count_nonzero(unknown))
    row: dict[str, Any] = {"accuracy": (total - int(np.count_nonzero(ours != true))) / total}
    either, both = (int(np.count_nonzero(mask)) for mask in (ours | true, (ours > 0) & (true > 0)))
    ious = [divide(total - either, total - both)]
    for index, name in enumerate(names, start=1):
        scores = score_class(ours == index, true == index, truth, total)
        ious.append(scores["iou"])
        if is_tumour(name):
            scores |= score_lesions(ours == index, true == index, truth)
        row |= {f"{name}_{key}": value for key, value in scores.items()}
    known = [iou for iou in ious if iou is not None]
    return {"mean_iou": divide(sum(known), len(known)), **row}


def divide(part: float, whole: float) -> float | None:
    """Return their ratio; None for a denominator of 0."""
    return part / whole if whole else None


def score_class(found: np.ndarray, true: np.ndarray, grid: Volume, total: int) -> dict[str, Any]:
    """Return FIGURES and `empty` of two masks of one class, of a scan with `total` voxels."""
    both, ours, theirs = overlap_counts(found, true, 2)[:, 0].tolist()
    neither = total - ours - theirs + both
    return {
        "dice": divide(2 * both, ours + theirs),
        "iou": divide(both, ours + theirs - both),
        "precision": divide(both, ours),
        "recall": divide(both, theirs),
        "specificity": divide(neither, total - theirs),
        "accuracy": divide(both + neither, total),
        **score_surfaces(found, true, grid),
        "volume_error_ml": (ours - theirs) * grid.voxel_ml,
        "volume_error_percent": divide(100 * (ours - theirs), theirs),
        "empty": ("", "truth", "prediction", "both")[(not theirs) + 2 * (not ours)],
    }


def score_surfaces(found: np.ndarray, true: np.ndarray, grid: Volume) -> dict[str, float | None]:
    """Return surface Dice at 2 mm, HD95 and mean symmetric surface distance of two RAS masks.
    Distances are in mm between centres of surface voxels, by the affine of `grid`, because it may
    be sheared; HD95 is the larger of both directions. Surface Dice: arXiv:1809.04430, in voxels."""
    box = find_bounding_box(found | true)
    ours, theirs = (list_surface(m[box]) @ grid.ras_affine[:3, :3].T for m in (found, true))
    if not (len(ours) and len(theirs)):
        none = None if len(ours) == len(theirs) else 0.0
        return {"nsd_2mm": none, "hd95_mm": None, "asd_mm": None}
    fast = {"balanced_tree": False, "compact_nodes": False}  # on regular grids
    pairs = ((ours, theirs), (theirs, ours))
    there, back = (cKDTree(cloud, **fast).query(points)[0] for points, cloud in pairs)
    every = np.concatenate([there, back])
    hd95 = float(max(np.percentile(there, 95), np.percentile(back, 95)))
    near = float(np.mean(every <= NSD_MM + 1e-6))  # 2 mm that rounding made longer
    return {"nsd_2mm": near, "hd95_mm": hd95, "asd_mm": float(every.mean())}


def list_surface(mask: np.ndarray) -> np.ndarray:
    """Return (N, 3) voxels of a mask (X, Y, Z) that touch the outside by a face."""
    whole = np.pad(mask.T, 1)  # as volumes are stored
    inner = whole.copy()
    for axis in range(3):
        here, there = np.moveaxis(inner, axis, 0), np.moveaxis(whole, axis, 0)
        here[1:] &= there[:-1]
        here[:-1] &= there[1:]
    return np.argwhere(whole & ~inner)[:, ::-1] - 1


def score_lesions(predicted: np.ndarray, truth: np.ndarray, grid: Volume) -> dict[str, Any]:
    """Return how many lesions were found and how many findings are right, in all and by size (the
    diameter of the ball of equal volume). A lesion is a connected component of a mask (X, Y, Z): it
    is found, or right, if it and what touches it have LESION_IOU; `_dice_50`: as LiTS counts."""
    sizes, found, dice = match_lesions(truth, predicted)
    right = match_lesions(predicted, truth)[1]
    row: dict[str, Any] = {"lesions_predicted": len(right), "lesions_right": int(right.sum())}
    row |= {"lesions": len(found), "lesions_found": int(found.sum())}
    row["lesions_found_dice_50"] = int((dice >= 0.5).sum())
    row["lesion_recall"] = divide(int(found.sum()), len(found))
    row["lesion_precision"] = divide(int(right.sum()), len(right))
    diameters = np.cbrt(6 / np.pi * 1000 * sizes * grid.voxel_ml)
    for group, (low, high) in LESION_SIZES.items():
        inside = (diameters >= low) & (diameters < high)
        row[f"lesions{group}"] = int(inside.sum())
        row[f"lesions_found{group}"] = int(found[inside].sum())
    return row


def match_lesions(mask: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each component of `mask` its voxels, whether its IoU with the components of `other`
    that touch it is LESION_IOU, and the Dice. What lies in another component does not count."""
    (mine, n), (its, m) = (
        cc3d.connected_components(a.view(np.uint8), connectivity=26, return_N=True)
        for a in (mask, other)
    )
    pairs = mine.ravel().astype(np.int64) * (m + 1) + its.ravel()
    table = np.bincount(pairs, minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
    sizes, both = table[1:].sum(axis=1), table[1:, 1:].sum(axis=1)
    theirs = both + (table[1:, 1:] > 0) @ table[0, 1:]
    return sizes, both >= LESION_IOU * (sizes + theirs - both), 2 * both / (sizes + theirs)


def list_lesions(classes: Volume, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return of each connected part of the tumours in class indices: ml, the longest diameter in an
    axial slice in mm, as RECIST reads, and its slices, counted from 1; the largest first."""
    from skimage.measure import regionprops

    rows, flat = list[dict[str, Any]](), {"spacing": classes.ras.spacing_mm[:2]}
    for index, name in [pair for pair in enumerate(names, start=1) if is_tumour(pair[1])]:
        mask = (classes.ras.data == index).view(np.uint8)
        parts = cc3d.connected_components(mask, connectivity=26)
        for number, box in enumerate(find_objects(parts), start=1):
            levels = np.moveaxis(parts[box] == number, 2, 0).astype(np.uint8)
            longest = max(regionprops(level, **flat)[0].feret_diameter_max for level in levels)
            row = {"class": name, "ml": round(int(levels.sum()) * classes.voxel_ml, 2)}
            row |= {"longest_axial_mm": round(float(longest), 1)}
            rows.append(row | {"first_slice": box[2].start + 1, "last_slice": box[2].stop})
    return sorted(rows, key=lambda row: -row["ml"])


# Tables and pictures of all patients
def report(
    rows: Sequence[dict[str, Any]], names: Sequence[str], folder: Path, weights: str = ""
) -> None:
    """Write results.csv and .json; of rows of the networks `weights` with a truth the summary."""
    write_table(rows, folder / "results.csv")
    write_json(rows, folder / "results.json")
    same = [row for row in rows if row.get("truth") and row.get("weights", "") == weights]
    if evaluated := [row for row in same if f"{names[0]}_dice" in row]:
        summary = summarise(evaluated, names)
        write_json(summary | {"weights": weights}, folder / "summary.json")
        save_figure(draw_summary(evaluated, names), folder / "summary.png")
        print_summary(summary, names)
        if seen := [row["case"] for row in evaluated if row.get("seen")]:
            print(f"{len(seen)} of {len(evaluated)} cases made the checkpoint: {', '.join(seen)}")
        if len(evaluated) > 1:
            show_worst(evaluated, f"{names[0]}_dice", folder)


def show_worst(rows: Sequence[dict[str, Any]], key: str, folder: Path) -> None:
    """Stack the previews of the rows with the lowest values of `key` in worst.png."""
    from matplotlib.image import imread, imsave

    known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    previews = [folder / row["case"] / f"{row['case']}_preview.png" for row in known]
    if shown := [path for path in previews if path.exists()][:WORST_SHOWN]:
        with atomic_write(folder / "worst.png") as temporary:
            imsave(temporary, np.vstack([imread(path) for path in shown]))
        told = ", ".join(path.parent.name for path in shown)
        print(f"look first at {folder / 'worst.png'}: {told}")


def summarise(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return `describe_values` over patients of each metric and class, as far as it is defined.
    `empty` counts patients without the class in truth, prediction or both; `lesions` are pooled."""
    known = defaultdict[str, dict[str, Any]](dict)  # an earlier version's rows lack some
    for row in rows:
        for key in (key for key in row if row[key] is not None):
            known[key][row["case"]] = row[key]
    summary: dict[str, Any] = {"patients": len(rows)}
    summary |= {key: describe_values(known[key], "low") for key in ("mean_iou", "accuracy")}
    for name in names:
        part = {key: describe_values(known[f"{name}_{key}"], end) for key, end in FIGURES.items()}
        empty = list(known[f"{name}_empty"].values())
        part["empty"] = {which: empty.count(which) for which in ("truth", "prediction", "both")}
        if is_tumour(name):
            part["lesions"] = pool_lesions(known, f"{name}_")
        summary[name] = part
    return summary


def pool_lesions(known: dict[str, dict[str, Any]], start: str) -> dict[str, Any]:
    """Return the counts of lesions over all patients, whose keys begin with `start`."""
    counts = [key for key in known if key.startswith(f"{start}lesions")]
    got = defaultdict(int, {key.removeprefix(start): sum(known[key].values()) for key in counts})
    got["lesion_recall"] = divide(got["lesions_found"], got["lesions"])
    got["lesion_precision"] = divide(got["lesions_right"], got["lesions_predicted"])
    return got


def describe_values(values: dict[str, float], worst: str) -> dict[str, Any]:
    """Return mean, SD (n − 1), median, worst value with its case, and n, of case → value."""
    if not values:
        return {"n": 0}
    badness = {"low": lambda v: -v, "high": lambda v: v, "far": abs}[worst]
    array, case = np.array(list(values.values())), max(values, key=lambda c: badness(values[c]))
    spread = float(array.std(ddof=1)) if len(array) > 1 else None
    row = {"mean": float(array.mean()), "sd": spread, "median": float(np.median(array))}
    return {**row, "worst": values[case], "worst_case": case, "n": len(array)}


def print_summary(summary: dict[str, Any], names: Sequence[str]) -> None:
    """Print the metrics that are reported most; counts of lesions and of cases without a class."""
    print(f"{'':<28} {'mean ± SD':>16} {'median':>9} {'worst':>9} {'n':>4}  worst case")
    for name, figure in itertools.product(names, PRINTED):
        if (got := summary[name][figure])["n"]:
            mean = f"{got['mean']:.3f}" + ("" if got["sd"] is None else f" ± {got['sd']:.3f}")
            print(f"{f'{name} {figure}':<28} {mean:>16} {got['median']:>9.3f}", end=" ")
            print(f"{got['worst']:>9.3f} {got['n']:>4}  {got['worst_case']}")
    for name in names:
        counts = {f"empty in {key}": n for key, n in summary[name]["empty"].items() if n}
        counts |= {key: n for key, n in summary[name].get("lesions", {}).items() if n}
        if counts:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


def draw_summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    """Return a figure with box plots over patients, and a dot for each, of the PANELS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[5, 3, 2])
    for axes, (unit, keys) in zip(panels, PANELS.items(), strict=True):
        for index, name in enumerate(names, start=1):
            for place, key in enumerate(keys):
                found = [row.get(f"{name}_{key}") for row in rows]
                values = [value for value in found if value is not None]
                at, width = place - 0.5 + index / (len(names) + 1), 0.4 / len(names)
                axes.boxplot([values], positions=[at], widths=width, showfliers=False)
                dots = axes.plot([at] * len(values), values, "o", color=class_colour(index))
            dots[0].set_label(name)
        axes.set_xticks(range(len(keys)), [key.replace("_", " ") for key in keys])
        axes.set(ylabel=unit, xlim=(-0.6, len(keys) - 0.4))
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(-0.02, 1.02)
    panels[0].legend()
    seen = sum(bool(row.get("seen")) for row in rows)
    told = f", {seen} of them seen in training or validation" if seen else ""
    figure.suptitle(f"whole volumes on their own grid, patients: {len(rows)}{told}")
    return figure


def tell_row(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return `liver 1637 ml, Dice 0.9141, expected Dice 0.92 (0.88–0.95): good`, as is printed."""
    parts = []
    for name in names:
        parts.append(f"{name} {row[f'{name}_volume_ml']:.0f} ml")
        if (dice := row.get(f"{name}_dice")) is not None:
            parts.append(f"Dice {dice:.4f}")
    parts += [seen] if (seen := row.get("seen")) else []
    dice, low, high = (row[f"expected_{end}"] for end in ("dice", "low", "high"))
    parts.append(f"expected Dice {dice:.2f} ({low:.2f}–{high:.2f}): {row['trust']}")
    parts += [f"tumours: {row['tumour_trust']}"] if "tumour_trust" in row else []
    return ", ".join(parts)


def report_all(folder: Path, names: Sequence[str], weights: str) -> None:
    """Write the tables of all cases in a folder of results, of earlier calls too. review.csv lists
    the cases that a person should look at, the lowest expected Dice first."""
    paths = (path for path in sorted(folder.glob("*/*.json")) if path.stem == path.parent.name)
    records = list(filter(None, map(read_record, paths)))
    rows = [{k: v for k, v in row.items() if k not in NO_COLUMNS} for row in records]
    report(rows, names, folder, weights[:12])
    lesions = [{"case": r["case"], **one} for r in records for one in r.get("lesion_list", ())]
    if lesions:
        write_table(lesions, folder / "lesions.csv")
    rows.sort(key=lambda row: row.get("expected_dice") or 0.0)  # an earlier version wrote none
    keys = ("case", "trust", "expected_dice", "expected_low", "expected_high", "least_sure_slice",
            "truth", "warnings")  # fmt: skip
    review = [{key: row.get(key) for key in keys} for row in rows]
    for row in review:
        row["picture"] = f"{row['case']}/{row['case']}_preview.png"
    write_table(review, folder / "review.csv")
    unsure = [row for row in rows if row.get("trust") != "good"]
    if unsure and len(rows) > 1:
        shown = [f"{r['case']} ({r.get('expected_dice') or 0:.2f})" for r in unsure[:WORST_SHOWN]]
        print(f"{len(unsure)} of {len(rows)} want looking at, in this order: {', '.join(shown)}; "
              f"all: {folder / 'review.csv'}")  # fmt: skip


def write_table(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV; a text that a spreadsheet would take for a formula gets an apostrophe."""
    table = [dict(row) for row in rows]
    for row in table:
        texts = {key: value for key, value in row.items() if isinstance(value, str)}
        row |= {key: f"'{text}" for key, text in texts.items() if text.startswith(FORMULA_SIGNS)}
    write_csv(table, path)


def do_each(cases: Sequence[T], name: Callable[[T], str], do: Callable[[T], Any]) -> list[str]:
    """Do every case, whatever happens to the others; return a line for each that failed."""
    failed = []
    for case in show_progress(cases, unit="case"):
        try:
            do(case)
        except Exception as error:
            failed.append(explain(error, f"{name(case)}: "))
            if len(cases) > 1:
                tqdm.write(f"{name(case)}: failed, the others go on")
    return failed


def refuse_failures(failed: Sequence[str], count: int, what: str) -> None:
    """Raise an InputError that lists the failures, if there are any."""
    if failed:  # a line that is the same for all is shown once
        lines = [f"{len(failed)} of {count} {what} failed:"] if count > 1 else []
        raise InputError("\n".join([*lines, *dict.fromkeys(failed)]))


# Run as a script: label maps of any program
@dataclass
class Config:
    """Which label maps are compared, what their values mean, and where the tables go."""

    predictions: tyro.conf.Positional[Path]  # a label map, or a folder of them
    truths: tyro.conf.Positional[Path]  # the reference: a label map, or a folder of equal names
    destination: Path = Path("results/evaluation")  # the table, the summary and its picture
    # Classes as NAME=VALUES, such as liver=1,2 tumour=2 (they may overlap), or NAME=NAMES of a
    # dataset.json beside the truths. Without: those of the network that made the predictions,
    # else what that file declares, else liver=1 tumour=2.
    labels: Classes = field(default_factory=dict)
    predicted: Classes = field(default_factory=dict)  # the same of predictions numbered otherwise
    others: tuple[int, ...] = ()  # values that may occur beside the classes; they are background
    trust_grid: bool = False  # lay voxel on voxel whatever the headers say, if the shapes agree


def main(config: Config) -> None:
    pairs, rows = find_pairs(config), []

    def do(pair: tuple[str, Path, Path | Masks]) -> None:
        name, prediction, truth = pair
        row = evaluate_files(prediction, truth, config)
        rows.append({"case": name, **row, "prediction": str(prediction), "truth": str(truth)})

    failed = do_each(pairs, lambda pair: pair[0], do)
    if rows:
        names = [key.removesuffix("_dice") for key in rows[0] if key.endswith("_dice")]
        report(rows, names, config.destination)
        print(f"look at {config.destination / 'summary.png'}")
    refuse_failures(failed, len(pairs), "cases")


def find_pairs(config: Config) -> list[tuple[str, Path, Path | Masks]]:
    """Return (case, prediction, truth) of two files, or of two folders by names."""
    predictions = find_labels(config.predictions)
    truths = pair_truths(predictions, [config.truths])
    if config.truths.is_dir() and (unused := {*find_labels(config.truths)} - {*truths}):
        told = f"{len(unused)} truths without prediction, such as {next(iter(unused))}"
        print(f"{told}; not evaluated")
    names = name_scans(predictions, config.predictions)
    if all(path.name == f"{path.parent.name}_label.nii.gz" for path in predictions):
        names = [path.parent.name for path in predictions]  # results of apply_model.py
    pairs = zip(names, predictions, truths, strict=True)
    return [(name, path, truth) for name, path, truth in pairs if truth is not None]


def evaluate_files(prediction: Path, truth: Path | Masks, config: Config) -> dict[str, Any]:
    """Return `evaluate` of two label maps, on the grid of the truth. Classes that share values are
    evaluated one by one; `accuracy` and `mean_iou` are then those of the first class."""
    known = describe_truths(truth) or Description({})
    asked = find_class_values(config.labels, known.labels, "--labels")
    theirs = find_class_values(config.predicted, {}, "--predicted")
    if not asked and not theirs:
        asked, theirs = find_network_classes(prediction, known.labels or USUAL_LABELS)
    asked = asked or known.labels or USUAL_LABELS
    theirs = theirs or asked
    if missing := set(asked) - set(theirs):
        raise InputError(f"--predicted: lacks {', '.join(sorted(missing))}; name them too")
    try:
        grid = read_volume(truth if isinstance(truth, Path) else prediction)
    except InputError:  # a DICOM SEG lies on the grid of the prediction
        grid = read_volume(prediction)
    names = [name for name in asked if asked[name] != (0,)]
    values = [value for name in names for value in asked[name]]
    row, notes = dict[str, Any](), list[str]()
    for group in [names] if len(set(values)) == len(values) else [[name] for name in names]:
        maps = []
        for path, classes in ((prediction, theirs), (truth, asked)):
            wanted = {BACKGROUND: (0,), **{name: classes[name] for name in group}}
            more = find_others(path, classes) if config.labels or config.predicted else ()
            others = (*config.others, *more)
            declared = {**known.labels, **classes, **({"others": others} if others else {})}
            maps.append(read_label_map(path, grid, declared, classes=wanted, ignore=known.ignore,
                                       trust_grid=config.trust_grid))  # fmt: skip
        refuse_exchanged(prediction, *maps)
        row |= evaluate(maps[0], maps[1], group) | row  # classes stay in the order asked for
        notes += [note for label in maps for note in label.notes]
    return row | {"warnings": "; ".join(dict.fromkeys(notes))}


def refuse_exchanged(path: Path, label: Volume, truth: Volume) -> None:
    """Raise InputError where foreground lies on foreground, but never the truth's largest class."""
    one, other = label.ras.data, truth.ras.data
    sizes = np.bincount(other[(other > 0) & (other < IGNORED)], minlength=2)
    both, largest = np.count_nonzero((one > 0) & (other > 0)), sizes.argmax()
    hit = ((one == largest) & (other == largest)).any()
    if not hit and 4 * both > np.count_nonzero(one) + np.count_nonzero(other):
        what = f"{path}: are its values exchanged? No voxel of the largest class is right"
        raise InputError(f"{what}; give them by --predicted liver=1 tumour=2")


def find_class_values(asked: Mapping[str, Sequence[str]], declared: Labels, setting: str) -> Labels:
    """Return class name → raw values, background first, of class name → values or names. Raises
    InputError where a name contradicts what the label map declares."""
    words = [f"{name}={','.join(values)}" for name, values in asked.items()]
    classes = parse_values(words, setting, declared, overlap=True)
    return {BACKGROUND: (0,), **classes} if classes else {}


def find_network_classes(prediction: Path, declared: Labels) -> tuple[Labels, Labels]:
    """Return the classes of the network that made a result, in values of the truth and of the
    result; empty where no record lies beside it. A liver network's truth counts tumours, too."""
    record = read_record(prediction.with_name(f"{prediction.parent.name}.json")) or {}
    if not {"labels", "declared", "classes"} <= record.keys():
        return {}, {}
    own, meant = (as_labels(record[key]) for key in ("declared", "labels"))
    return translate_classes(meant, own, declared), as_labels(record["classes"])


if __name__ == "__main__":
    run_script(main, read_settings(Config, __doc__))
