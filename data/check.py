"""Is this data fit? Every scan with its label map is looked at; findings have a level and a remedy.

    python -m data.check data/raw

Lists what was recognised, prints the table of cases and below it every finding with what to do, and
writes under `--destination` the table as `check.csv` and `<case>.png`: three planes through the
foreground with the outlines. `prepare.py` runs the same check before it cuts anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tyro
from tqdm import tqdm

from data.cases import Case, read_label_map, read_scan
from data.copies import find_duplicates, mark_scan
from data.files import InputError
from data.findings import RULES, count_words, describe_fault, list_errors, print_table, write_table
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
from data.labels import (
    FOREGROUND,
    IGNORED,
    IMAGE,
    LABEL,
    LARGEST_VALUE,
    Labels,
    find_label,
    find_values,
    index_classes,
    list_values,
)
from data.layouts import describe_data_set, find_pairs
from data.masks import Masks, describe_label
from data.pictures import LABEL_COLOURS, PLANES, choose_hu_window, save_figure, show_patient
from data.settings import command_line
from data.volumes import Volume

__all__ = [
    "RULES", "Terms", "choose_foreground", "compare_cases", "find_duplicates", "inspect_case",
    "judge_hu", "list_errors", "print_table", "read_data_set", "write_table",
]  # fmt: skip

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

    def list_values(self, label: Volume) -> list[int]:
        """All raw values that `label` may hold, the background among them."""
        return sorted({0, *list_values(self.labels), *self.ignore, *label.classes.values()})


class Settings(Protocol):
    """What a script must ask for to check a data set."""

    source: Path
    destination: Path
    images: Path | None
    labels: Path | None
    values: tuple[str, ...]
    foreground: tuple[str, ...]
    modality: Literal["CT", "MR"]
    label_every: int
    subvolume_depth: int
    trust_image_grid: bool


def read_data_set(config: Settings) -> tuple[list[Case], Terms]:
    """The cases of a folder and what they are checked against; prints what was recognised."""
    values = parse_values(config.values)
    data = find_pairs(
        config.source,
        images=config.images,
        labels=config.labels,
        exclude=config.destination,
        values=values or None,
    )
    for line in describe_data_set(data):
        print(line)
    ignore = data.ignore
    if config.label_every > 1:
        if IGNORED in list_values(data.declared):
            raise InputError(
                f"--label-every: marks slices that were not drawn with {IGNORED}, which is a label "
                "of these data; give that label another value"
            )
        ignore = (*ignore, IGNORED)
    return data.cases, Terms(
        data.declared,
        choose_foreground(config.foreground, data.declared),
        trust_grid=config.trust_image_grid,
        modality=config.modality,
        depth=config.subvolume_depth,
        ignore=tuple(dict.fromkeys(ignore)),
        label_every=config.label_every,
    )


def parse_values(words: Sequence[str]) -> Labels:
    """`["liver=6", "tumour=7,8"]` → {"liver": (6,), "tumour": (7, 8)}."""
    labels: Labels = {}
    for word in words:
        name, _, numbers = word.partition("=")
        parts = numbers.split(",")
        if not name or not all(part.isdecimal() for part in parts):
            raise InputError(f"--values {word}: must be NAME=VALUE or NAME=VALUE,VALUE")
        labels[name] = tuple(map(int, parts))
    listed = [value for values in labels.values() for value in values]
    twice = sorted(value for value, n in Counter(listed).items() if n > 1)
    if twice or max(listed, default=0) > LARGEST_VALUE:
        raise InputError(
            f"--values {' '.join(words)}: each value from 0 to {LARGEST_VALUE} has one name"
        )
    return labels


def choose_foreground(names: Sequence[str], labels: Labels) -> tuple[int, ...]:
    """Raw values of the labels that must not be lost, of their names (or values).

    The default, liver with tumours, takes tumours as far as the data declare them.
    """
    if tuple(names) == FOREGROUND and find_label("tumour", labels) is None:
        names = FOREGROUND[:1]
    if not (values := find_values(names, labels, "--foreground")) or 0 in values:
        raise InputError(f"--foreground {' '.join(names)}: must name labels, not the background")
    return values


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
    if case.faults:
        record["findings"] += [("ambiguous", fault) for fault in case.faults]
        return record, None
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


def _fill_record(
    record: dict[str, Any], image: Path, outlined: Path | Masks, terms: Terms
) -> Overlay:
    """Grid, voxel counts, findings and the marks by which a second copy of a scan is known."""
    scan = read_scan(image)
    record["shape"], record["orientation"] = list(scan.shape), scan.axcodes
    record["spacing_mm"] = [round(step, 6) for step in scan.spacing_mm]
    record["slices"] = scan.ras_shape[2]
    label, outline, counts = _read_label(outlined, scan, terms)
    findings = record["findings"]
    findings += judge_grid(scan, label, terms.depth)
    findings += judge_drawn(record, counts, terms)
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


def read_terms_label(path: Path | Masks, scan: Volume, terms: Terms) -> Volume:
    """The label map of `scan`, read by these terms."""
    return read_label_map(
        path, scan, terms.labels, trust_grid=terms.trust_grid, ignore=terms.ignore
    )


def judge_drawn(
    record: dict[str, Any], counts: dict[int, np.ndarray], terms: Terms
) -> list[Finding]:
    """With --label-every k: the slices between the drawn ones must be empty; notes one of them."""
    drawn = np.flatnonzero(sum(counts[v] for v in counts if v and v not in terms.ignore))
    if terms.label_every == 1 or not drawn.size:
        return []
    record["drawn_slice"] = int(drawn[0])
    off = drawn[(drawn - drawn[0]) % terms.label_every != 0]
    text = f"--label-every {terms.label_every}, but slices {drawn[0] + 1} and {{}} are drawn"
    return [("drawn", text.format(off[0] + 1))] if off.size else []


def _read_label(
    path: Path | Masks, scan: Volume, terms: Terms
) -> tuple[Volume, np.ndarray, dict[int, np.ndarray]]:
    """Label map on the grid of `scan`, read, and its counts per slice; tells a swapped pair."""
    try:
        label = read_terms_label(path, scan, terms)
        return label, *read_outline(label, terms.list_values(label))
    except InputError as error:
        if error.kind not in ("values", "nan"):
            raise
        told = "swapped?" in str(error)
        swapped = not told and is_label_map(
            scan.read()[::4, ::4, ::4], [0, *list_values(terms.labels)]
        )
        hint = f"; are scan and label map swapped? {scan.name} holds label values"
        raise InputError(f"{error}{hint if swapped else ''}", kind="values") from error


def draw_overlay(name: str, overlay: Overlay, labels: Labels, path: Path) -> None:
    """Write a PNG: three planes through the foreground with each label's outline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6))  # no layout engine: it would draw everything twice
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.87, wspace=0.02)
    window = choose_hu_window(overlay.planes["axial"])
    classes: Labels = {"0": (0,)}
    for index, values in enumerate(v for v in labels.values() if v != (0,)):
        colour = str(index % len(LABEL_COLOURS) + 1)  # after five labels the colours come again
        classes[colour] = (*classes.get(colour, ()), *values)
    for axes, (plane, picture) in zip(figure.subplots(1, 3), overlay.planes.items(), strict=True):
        cut, _ = PLANES[plane]
        at, steps = overlay.middle[cut], [-(-n // 512) for n in picture.shape]  # all that is seen
        coarser = [slice(None, None, step) for step in steps]
        flat = overlay.outline[(*coarser[:cut], slice(at, at + 1), *coarser[cut + 1 :])]
        spacing = [s * step for s, step in zip(overlay.spacing_mm, steps, strict=True)]
        image = Volume(picture[tuple(coarser)], np.diag([*spacing, 1]))
        drawn = {IMAGE: image, LABEL: index_classes(flat, classes)}
        title = f"{plane}, slice {at + 1} of {overlay.outline.shape[cut]}"
        show_patient(drawn, 0, axes=axes, plane=plane, hu_window=window, title=title)
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


# ---------------------------------------------------------------------------------------
# Alone: python -m data.check SOURCE
# ---------------------------------------------------------------------------------------


@dataclass
class Config:
    source: tyro.conf.Positional[Path] = Path("data/raw")  # folder with the scans, as downloaded
    destination: Path = Path("check")  # folder for check.csv and the pictures
    images: Path | None = None  # folder of the scans, where names do not tell them
    labels: Path | None = None  # folder of their label maps
    values: tuple[str, ...] = ()  # what label values mean, such as liver=6 tumour=7
    foreground: tuple[str, ...] = FOREGROUND  # labels that must not be lost
    modality: Literal["CT", "MR"] = "CT"  # MR: intensities are no HU
    label_every: int = 1  # only every so many-th slice was drawn
    subvolume_depth: int = 16  # slices below which a scan is thin
    trust_image_grid: bool = False  # lay a label map on its scan's grid if only the shapes agree
    accept: tuple[Literal["mirrored", "outside", "hu"], ...] = ()  # errors to take as warnings


def main(config: Config) -> None:
    cases, terms = read_data_set(config)
    records = []
    for case in tqdm(cases, desc="checking", unit="case", disable=None):
        record, overlay = inspect_case(case, terms)
        about = {"case": case.name, "patient": case.patient, IMAGE: str(case.image)}
        records.append(record | about | {LABEL: describe_label(case.label)})
        if overlay:
            draw_overlay(case.name, overlay, terms.labels, config.destination / f"{case.name}.png")
    compare_cases(records)
    print_table(records, config.accept)
    write_table(records, config.accept, config.destination / "check.csv")
    print(f"look at {config.destination}; next: python prepare.py {config.source}")
    if wrong := sum(bool(list_errors(record, config.accept)) for record in records):
        raise InputError(f"{wrong} of {count_words(len(records), 'case')} with errors, see above")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
