"""What many patients' figures say together: each for itself, the table, the summary, its pictures.

Of `data.evaluate`'s rows: a dict for each patient, `case` and `{class}_{figure}`.
"""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from isal import isal_zlib
from tqdm import tqdm

from data.files import InputError, read_signed, write_csv, write_json, write_signed
from data.labels import is_tumour
from data.pictures import class_colour, save_figure
from data.settings import show_progress

# Figure of merit → which end is the worst. The order is that of the tables.
FIGURES = {
    "dice": "low", "iou": "low", "precision": "low", "recall": "low", "specificity": "low",
    "accuracy": "low", "nsd_2mm": "low", "hd95_mm": "high", "asd_mm": "high",
    "volume_error_ml": "far", "volume_error_percent": "far",
}  # fmt: skip
WORST_SHOWN = 3  # cases named, and previews in worst.png
PRINTED = ("dice", "nsd_2mm", "hd95_mm", "volume_error_percent")
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a text that begins so

UNLISTED = ("files", "classes", "trust_image_grid")  # of a record: for programs, in no table
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
        case, flagged = row["case"], row["trust"] != "good"
        picture = f"{case}/{case}_{'doubt' if flagged else 'preview'}.png"
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


def read_record(path: Path) -> dict[str, Any] | None:
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
    known = read_record(record) if record.is_file() else None
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
