"""Label maps against truth, from any program: figures per patient, tables, summary, pictures.

    python -m data.evaluate PREDICTIONS TRUTHS            # two files, or two folders of equal names
    python -m data.evaluate nnunet/test labelsTs --labels liver=1,2 tumour=2

A prediction is laid on the grid of its truth, which must be the same patient place. Classes are
those of a `dataset.json` beside the truths, or given by `--labels`, or liver = 1 and tumour = 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import tyro

from data.boxes import enclose, find_bounding_box
from data.cases import Masks, find_scans, read_label_map, read_volume
from data.descriptions import Description, read_description
from data.files import InputError, write_json
from data.labels import (
    BACKGROUND,
    IGNORED,
    USUAL_LABELS,
    Labels,
    find_values,
    is_tumour,
    list_values,
)
from data.metrics import measure_nearest, measure_shape, overlap_counts
from data.names import name_case, name_scans, pair_by_name
from data.settings import command_line
from data.summary import (
    FIGURES,
    divide,
    do_each,
    find_worst,
    refuse_failures,
    report,
    tell_worst,
    write_table,
)
from data.volumes import Volume

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
# Truths: which belongs to which, and what their values mean
# ---------------------------------------------------------------------------------------


def find_labels(path: Path) -> list[Path]:
    """The label maps that a path stands for: those of apply_model.py's results, or any volumes."""
    return sorted(path.glob("*/*_label.nii.gz")) or find_scans(path)


def pair_truths(scans: Sequence[Path], truth: Sequence[Path]) -> list[Path | None]:
    """A label map for each scan: of a folder the one of equal name, else one by one."""
    if len(truth) == 1 and truth[0].is_dir():
        known = find_labels(truth[0])
        if len(scans) > 1 or known != [truth[0]]:
            pairs = pair_by_name(scans, known)
            missing = [path.name for path, pair in zip(scans, pairs, strict=True) if pair is None]
            if missing:
                print(f"{truth[0]}: no label map for {', '.join(missing)}; not evaluated")
            return pairs
    if gone := [path for path in truth if not path.exists()]:
        raise InputError(f"--truth {gone[0]}: no such file or folder; check the path")
    if truth and len(truth) != len(scans):
        raise InputError(
            f"--truth must give one label map per volume, got {len(truth)} for {len(scans)}"
        )
    return list(truth) or [None] * len(scans)


def describe_truths(path: Path | Masks) -> Description | None:
    """What the `dataset.json` beside a label map or its folder says; None where there is none."""
    path = path if isinstance(path, Path) else path[0][1]
    folders = [path, *path.parents[:2]] if path.is_dir() else path.parents[:2]
    found = (folder / "dataset.json" for folder in folders)
    file = next((file for file in found if file.is_file()), None)
    return None if file is None else read_description(file)


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


def parse_classes(words: Sequence[str], declared: Labels | None, setting: str) -> Labels:
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
    asked = parse_classes(words, found, "--labels") if words else found or USUAL_LABELS
    theirs = parse_classes(config.predicted, None, "--predicted") if config.predicted else asked
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
