"""Is this data fit? Every scan with its label map is looked at; findings have a level and a remedy.

    python -m data.check data/raw

Prints the table of cases and below it every finding with what to do, and writes it as `check.csv`,
with `<case>.png`: three planes through the foreground with the outlines. `prepare.py` runs the same
check before it cuts anything.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.cases import Case, read_label_map, read_scan
from data.copies import find_duplicates, mark_scan
from data.judges import (
    Finding,
    find_busiest,
    is_label_map,
    judge_grid,
    judge_hu,
    judge_intensity,
    judge_outline,
    judge_side,
    judge_tumour,
    mask_values,
    read_coarse,
    read_outline,
)
from data.labels import Labels, find_label, find_values, list_values
from data.volumes import Volume
from utilities import (
    PLANES,
    InputError,
    class_colour,
    draw_plane,
    grey_window,
    save_figure,
    write_csv,
)

__all__ = ["RULES", "Terms", "compare_cases", "find_duplicates", "inspect_case", "judge_hu"]

RULES = {  # kind of finding → (level, what to do); an error stops its case, a note needs nothing
    "orphan": ("error", "add the missing file or remove this one"),
    "unreadable": ("error", "get the file again, or convert it as the message says"),
    "shape": ("error", "export the label map again on the grid of its scan"),
    "grid": ("error", "export the label map again, or lay it on the scan: --trust-image-grid"),
    "values": ("error", "correct the label map, or declare its values in dataset.json"),
    "empty": ("error", "add the outline or remove the case"),
    "nan": ("error", "convert the scan again; every voxel needs a number"),
    "hu": (
        "error",
        "convert to HU (rescale slope and intercept) as int16; for MR: --modality MR; to take it "
        "as it is: --accept hu",
    ),
    "outside": ("error", "look at the overlay; the label map may be shifted, flipped or another's"),
    "mirrored": ("error", "look at the overlay; flip the label map back"),
    "drawn": ("error", "give the right --label-every, or clear the slices in between"),
    "left_right": ("warning", "correct the header's left-right unless it is situs inversus"),
    "air": ("warning", "look whether HU were clipped"),
    "partly_outside": ("warning", "look at the overlay"),
    "no_foreground": ("warning", "look whether the organ is there; it gives no sub-volumes"),
    "tumour_apart": ("warning", "look whether these voxels belong to the liver's tumours"),
    "blank": ("warning", "look whether slices were lost on export"),
    "identity": ("warning", "millimetres and sides are not known; get the header with geometry"),
    "unoriented": ("warning", "sides are not known; get the header with its orientation"),
    "label_note": ("warning", "look at the overlay"),
    "dicom": ("warning", "look whether these images are part of the scan"),
    "spacing": ("warning", "compare with the scanner's protocol"),
    "duplicate": ("warning", "remove one; kept together in one split until then"),
    "near_grid": ("note", "the scan's own geometry is used"),
    "thin": ("note", "it is padded with air"),
    "mixture": ("note", "all sub-volumes are written in RAS"),
}
FOREGROUND = ("liver", "tumour")  # what must not be lost where nothing else is asked for
COARSE = 128  # voxels in-plane that are enough for the statistics


@dataclass(frozen=True)
class Terms:
    """What a case is checked against; `prepare.py` cuts by the same."""

    labels: Labels  # name → raw values that a label map may hold
    foreground: tuple[int, ...]  # raw values that must not be lost
    trust_grid: bool = False  # lay a label map on its scan if only the shapes agree
    modality: Literal["CT", "MR"] = "CT"
    depth: int = 16  # slices of a sub-volume
    ignore: tuple[int, ...] = ()  # raw values that count as neither foreground nor background
    label_every: int = 1  # only every so many-th slice was drawn

    @property
    def values(self) -> list[int]:
        """All raw values, the background among them."""
        return sorted({0, *list_values(self.labels)})


def choose_foreground(names: Sequence[str], labels: Labels) -> tuple[int, ...]:
    """Raw values of the labels that must not be lost, of their names (or values).

    The default, liver with tumours, takes tumours as far as the data declare them.
    """
    if tuple(names) == FOREGROUND and find_label("tumour", labels) is None:
        names = FOREGROUND[:1]
    if not (values := find_values(names, labels, "--foreground")) or 0 in values:
        raise InputError(f"--foreground {' '.join(names)}: must name labels, not the background")
    return values


def level(finding: Finding, accept: Sequence[str]) -> str:
    """An error stops its case, unless it was accepted; a warning is told, a note needs nothing."""
    return "warning" if finding[0] in accept else RULES[finding[0]][0]


def list_errors(record: dict[str, Any], accept: Sequence[str]) -> list[Finding]:
    """Findings that stop the case."""
    return [finding for finding in record["findings"] if level(finding, accept) == "error"]


# ---------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlay:
    """What the picture of a case shows."""

    planes: dict[str, np.ndarray]  # axial, coronal, sagittal: the scan (X, Y, Z), one voxel thick
    outline: np.ndarray  # label map (X, Y, Z)
    middle: tuple[int, int, int]  # where the planes lie
    spacing_mm: tuple[float, float, float]  # of the axes R, A, S


def inspect_case(case: Case, terms: Terms) -> tuple[dict[str, Any], Overlay | None]:
    """Record of a case with its findings, and what to draw of it; nothing that reading meets is
    raised. `record["sure"]` is False where a fault may not be the scan's (memory, a bug)."""
    record: dict[str, Any] = {"findings": [], "sure": True}
    if case.image is None or case.label is None:
        missing = "scan" if case.image is None else "label map"
        record["findings"].append(("orphan", f"{case.image or case.label} has no {missing}"))
        return record, None
    try:
        return record, _fill_record(record, case.image, case.label, terms)
    except InputError as error:
        kind = error.kind if error.kind in RULES else "unreadable"
        record["findings"].append((kind, str(error)))
    except Exception as error:
        record["sure"] = False
        record["findings"].append(("unreadable", describe_fault(error)))
    return record, None


def describe_fault(error: Exception) -> str:
    """A fault that nobody foresaw, in one line; LIVER_DEBUG=1 shows where it arose."""
    if os.environ.get("LIVER_DEBUG"):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def _fill_record(record: dict[str, Any], image: Path, outlined: Path, terms: Terms) -> Overlay:
    """Grid, voxel counts, findings and the marks by which a second copy of a scan is known."""
    scan = read_scan(image)
    record["shape"], record["orientation"] = list(scan.shape), scan.axcodes
    record["spacing_mm"] = [round(step, 6) for step in scan.spacing_mm]
    record["slices"] = scan.ras_shape[2]
    label, outline, counts = _read_label(outlined, scan, terms)
    findings = record["findings"]
    findings += judge_grid(scan, label, terms.depth)
    findings += judge_drawn(counts, terms)
    shape, spacing_mm = scan.ras_shape, Volume(outline, scan.ras_affine).spacing_mm
    step = max(1, round(max(shape[:2]) / COARSE))
    small = np.asfortranarray(outline[::step, ::step])
    # chooses voxels 10 times faster than in Fortran order
    inside = np.ascontiguousarray(mask_values(small, terms.foreground))
    x, y, z = find_busiest(inside)
    coarse, planes = read_coarse(scan, step, (x * step, y * step, z))
    findings += judge_intensity(coarse, scan.dtype, terms.modality)
    drawn = [counts[value] for value in counts if value and value not in terms.ignore]
    findings += judge_outline(coarse, inside, any(number.any() for number in drawn))
    if (organ := _liver_values(terms)) and (liver := _only(small, inside, organ, terms)).any():
        findings += judge_side(coarse, liver, spacing_mm[0] * step)
        findings += judge_tumour(outline, counts, terms.labels)
    low, high = np.percentile(coarse[::4, ::4, ::2], [0.5, 99.5])
    voxels = {value: int(number.sum()) for value, number in counts.items()}
    record["hu_range"] = [round(float(low)), round(float(high))]
    record["foreground_voxels"] = sum(voxels.get(value, 0) for value in terms.foreground)
    record["voxels_per_label"] = {str(value): voxels[value] for value in sorted(voxels)}
    record["marks"] = mark_scan(coarse)
    return Overlay(planes, outline, (x * step, y * step, z), spacing_mm)


def _liver_values(terms: Terms) -> list[int]:
    """Foreground values of the liver and its tumours; none where the liver is not asked for."""
    names = (find_label(name, terms.labels) for name in ("liver", "tumour"))
    liver, tumour = (terms.labels[name] if name else () for name in names)
    wanted = {*liver, *tumour} & set(terms.foreground)
    return sorted(wanted) if wanted & set(liver) else []


def _only(small: np.ndarray, inside: np.ndarray, values: Sequence[int], terms: Terms) -> np.ndarray:
    if set(values) == set(terms.foreground):
        return inside
    return np.ascontiguousarray(mask_values(small, values))


def judge_drawn(counts: dict[int, np.ndarray], terms: Terms) -> list[Finding]:
    """With --label-every k: the slices between the drawn ones must be empty."""
    if terms.label_every == 1:
        return []
    total = sum(counts[value] for value in terms.foreground)
    drawn = np.flatnonzero(total)
    phases = sorted({int(z) % terms.label_every for z in drawn})
    if len(phases) < 2:
        return []
    text = f"--label-every {terms.label_every}, but slices {drawn[:6].tolist()} … are drawn"
    return [("drawn", f"{text}: {len(drawn)} of {drawn[-1] - drawn[0] + 1} in a row")]


def _read_label(
    path: Path, scan: Volume, terms: Terms
) -> tuple[Volume, np.ndarray, dict[int, np.ndarray]]:
    """Label map on the grid of `scan`, read, and its counts per slice; tells a swapped pair."""
    try:
        label = read_label_map(path, scan, terms.labels, trust_grid=terms.trust_grid)
        return label, *read_outline(label, sorted({*terms.values, *label.classes.values()}))
    except InputError as error:
        if error.kind not in ("values", "nan"):
            raise
        thin = scan.read()[::4, ::4, ::4] if scan.dtype.itemsize < 8 else np.zeros(0)
        swapped = is_label_map(thin, terms.values)
        hint = f"; are scan and label map swapped? {scan.name} holds label values" * swapped
        raise InputError(f"{error}{hint}", kind="values") from error


def draw_overlay(name: str, overlay: Overlay, labels: Labels, path: Path) -> None:
    """Write a PNG: three planes through the foreground with each label's outline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6))  # no layout engine: it would draw everything twice
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.87, wspace=0.02)
    window = grey_window(overlay.planes["axial"])
    values = [v for v in labels.values() if v != (0,)]
    colours = [(class_colour(index), v) for index, v in enumerate(values, start=1)]
    for axes, (plane, picture) in zip(figure.subplots(1, 3), overlay.planes.items(), strict=True):
        cut, _ = PLANES[plane]
        at, steps = overlay.middle[cut], [-(-n // 512) for n in picture.shape]  # all that is seen
        coarser = [slice(None, None, step) for step in steps]
        flat = overlay.outline[(*coarser[:cut], slice(at, at + 1), *coarser[cut + 1 :])]
        outlines = {}
        for colour, some in colours:  # after five labels the colours come again
            outlines[colour] = outlines.get(colour, False) | mask_values(flat, some)
        spacing = tuple(s * step for s, step in zip(overlay.spacing_mm, steps, strict=True))
        draw_plane(axes, picture[tuple(coarser)], plane, 0, spacing, outlines, window)
        axes.set_title(f"{plane}, slice {at + 1} of {overlay.outline.shape[cut]}", fontsize=10)
    figure.suptitle(name, fontsize=11)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------
# All cases together
# ---------------------------------------------------------------------------------------


def compare_cases(records: list[dict[str, Any]]) -> list[Finding]:
    """Findings between cases, those of the whole set returned; copies become one patient."""
    readable = [record for record in records if "marks" in record]
    of_patient = defaultdict(list)
    for record in records:
        of_patient[record["patient"]].append(record)
    for i, j, how in find_duplicates([record["marks"] for record in readable]):
        one, other = readable[i], readable[j]
        for a, b in ((one, other), (other, one)):
            a["findings"].append(("duplicate", f"the same scan as {b['case']}: {how}"))
        if one["patient"] != other["patient"]:
            moved = of_patient.pop(other["patient"])
            of_patient[one["patient"]] += moved
            for record in moved:
                record["patient"] = one["patient"]
    usual = np.median([sorted(r["spacing_mm"]) for r in readable] or [[1, 1, 1]], axis=0)
    for record in readable:
        ratio = np.sort(record["spacing_mm"]) / usual
        if np.abs(np.log2(ratio)).max() > 3 or max(record["spacing_mm"]) > 10:
            text = " × ".join(f"{s:g}" for s in record["spacing_mm"])
            found = f"spacing {text} mm is far from the other scans'"
            record["findings"].append(("spacing", found))
    mixture = Counter(record["orientation"] for record in readable)
    text = ", ".join(f"{number} {axes}" for axes, number in mixture.most_common())
    return [("mixture", f"orientations are mixed: {text}")] * (len(mixture) > 1)


def count_words(number: int, word: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{number} {word}{'s' * (number != 1)}"


def make_printable(text: str) -> str:
    """Text that any terminal and file takes: a name that is not UTF-8 is shown as \\udc.. ."""
    return text.encode("utf-8", "backslashreplace").decode()


def tabulate(records: Sequence[dict[str, Any]], accept: Sequence[str]) -> list[dict[str, str]]:
    """A row of texts for each case, under the names of the columns."""
    rows = []
    for record in records:
        levels = Counter(level(finding, accept) for finding in record["findings"])
        told = [count_words(levels[name], name) for name in ("error", "warning") if levels[name]]
        row = {
            "case": record["case"],
            "shape": "×".join(map(str, record.get("shape", []))),
            "spacing mm": "×".join(f"{s:.3g}" for s in record.get("spacing_mm", [])),
            "axes": record.get("orientation", ""),
            "values": "…".join(map(str, record.get("hu_range", []))),
            "foreground": str(record.get("foreground_voxels", "")),
            "verdict": ", ".join(told) or "ok",
        }
        rows.append({key: make_printable(text) for key, text in row.items()})
    return rows


def list_findings(
    records: Iterable[dict[str, Any]], notes: Iterable[Finding], accept: Sequence[str]
) -> Iterator[str]:
    """A line for every finding with what to do, errors first."""
    told = [(record["case"], *finding) for record in records for finding in record["findings"]]
    told += [("", *finding) for finding in notes]
    ranks = ("error", "warning", "note")
    for case, kind, found in sorted(told, key=lambda t: ranks.index(level((t[1], t[2]), accept))):
        name = f"{case}: " * bool(case)
        text = f"{level((kind, found), accept)}: {name}{found}; {RULES[kind][1]}"
        yield make_printable(text)


def print_table(
    records: Sequence[dict[str, Any]], notes: Sequence[Finding], accept: Sequence[str]
) -> None:
    """One line per case, and below it every finding with what to do."""
    rows = tabulate(records, accept)
    names = list(rows[0]) if rows else []
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    for cells in [names, *([row[name] for name in names] for row in rows)]:
        first, *middle = zip(cells, widths, strict=True)
        *middle, last = middle
        texts = [f"{first[0]:<{first[1]}}", *(f"{text:>{w}}" for text, w in middle), last[0]]
        print("  ".join(texts))
    for line in list_findings(records, notes, accept):
        print(line)


def write_table(records: Sequence[dict[str, Any]], accept: Sequence[str], path: Path) -> None:
    """The table with every finding as CSV."""
    rows = tabulate(records, accept)
    for row, record in zip(rows, records, strict=True):
        row["patient"] = record["patient"]
        found = (f"{level(finding, accept)}: {finding[1]}" for finding in record["findings"])
        row["findings"] = make_printable(" | ".join(found))
    write_csv(rows, path)
