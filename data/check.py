"""Check a data set: each scan with its label map; findings with a level and a remedy.

    python -m data.check data/raw

Lists the recognised data, prints the table of cases and every finding with its remedy, and writes
the table as `check.csv` and a picture `<case>.png` of each case under `--destination`: three planes
through the foreground with the annotated outlines. `prepare.py` runs the same check first.
"""

from __future__ import annotations

import hashlib
import os
import traceback
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from data.datasets import Case, describe_data_set, find_pairs
from data.files import InputError, write_csv
from data.labels import (
    FOREGROUND,
    IGNORED,
    IMAGE,
    LABEL,
    Labels,
    find_label,
    find_values,
    index_classes,
    list_values,
    parse_values,
)
from data.pictures import PLANES, choose_hu_window, find_busiest_slice, save_figure, show_patient
from data.scans import describe_label, read_label_map, read_scan, restore_label
from data.settings import Count, Whole, read_settings, run_script, show_progress
from data.volumes import Volume, find_bounding_box

Finding = tuple[str, str]  # kind (a key of RULES), text

RULES = {  # kind of finding → (level, remedy); an error stops its case, a note needs nothing
    "orphan": ("error", "add the missing file or remove this one"),
    "unreadable": ("error", "get the file again, or convert it as the message says"),
    "shape": ("error", "export the label map again on the grid of its scan"),
    "grid": ("error", "export the label map again, or lay it on the scan: --trust-image-grid"),
    "values": ("error", "correct the label map, or declare its values in dataset.json"),
    "empty": ("error", "annotate the scan or remove the case"),
    "nan": ("error", "convert the file again; every voxel needs a number"),
    "small": ("error", "get the scan in its full size"),
    "hu": ("error", "convert to HU as int16; for MR: --modality MR; to keep it: --accept hu"),
    "outside": ("error", "look at the picture; the label map may be shifted, flipped or another's"),
    "mirrored": ("error", "look at the picture; flip the label map back"),
    "ambiguous": ("error", "rename or remove one, or name two folders: --images --labels"),
    "drawn": ("error", "give the right --label-every, or clear the slices in between"),
    "left_right": ("warning", "correct the header's left-right unless it is situs inversus"),
    "air": ("warning", "look whether HU were clipped"),
    "partly_outside": ("warning", "look at the picture"),
    "no_foreground": ("warning", "look whether the organ is there; it gives no sub-volumes"),
    "tumour_apart": ("warning", "look whether these voxels belong to the liver's tumours"),
    "blank": ("warning", "look whether slices were lost on export"),
    "identity": ("warning", "millimetres and sides are not known; get the header with geometry"),
    "unoriented": ("warning", "sides are not known; get the header with its orientation"),
    "label_note": ("warning", "look at the picture"),
    "dicom": ("warning", "look whether these images are part of the scan"),
    "spacing": ("warning", "compare with the scanner's protocol"),
    "duplicate": ("warning", "remove one; kept together in one split until then"),
    "near_grid": ("note", "the scan's own geometry is used"),
    "thin": ("note", "it is padded with air"),
    "mixture": ("note", "all sub-volumes are written in RAS"),
}
LEVELS = ("error", "warning", "note")
HIGHEST_HU = 31_000  # of any CT, metal included; padding read as unsigned is 62,512 and more
COARSE = 128  # voxels in-plane that are enough for the statistics
SMALLEST = 8  # voxels in-plane; a network halves a slice three times


@dataclass(frozen=True)
class Terms:
    """What a case is checked against; `prepare.py` cuts by the same."""

    labels: Labels  # name → raw values that a label map may hold
    foreground: tuple[int, ...]  # raw values that must not be lost
    trust_grid: bool = False  # lay a label map on its scan if only the shapes agree
    modality: Literal["CT", "MR"] = "CT"
    depth: int = 16  # slices of a sub-volume
    ignore: tuple[int, ...] = ()  # raw values that count as neither foreground nor background
    label_every: int = 1  # only every n-th slice is annotated


def read_data_set(config: Any) -> tuple[list[Case], Terms]:
    """Return the cases of a folder and the terms of their check; print what was recognised.

    `config` has the settings of this file's `Config`.
    """
    named, values = (
        {"images": config.images, "labels": config.labels},
        parse_values(config.values, "--values"),
    )
    data = find_pairs(config.source, **named, exclude=config.destination, values=values or None)
    print(*describe_data_set(data), sep="\n")
    ignore = data.ignore
    if config.label_every > 1:
        if IGNORED in list_values(data.declared):
            raise InputError(
                f"--label-every: marks slices without annotation with {IGNORED}, which is a label "
                "of these data; give that label another value"
            )
        ignore = tuple(dict.fromkeys([*ignore, IGNORED]))
    foreground = choose_foreground(config.foreground, data.declared)
    how = (config.trust_image_grid, config.modality, config.subvolume_depth)
    return data.cases, Terms(data.declared, foreground, *how, ignore, config.label_every)


def choose_foreground(names: Sequence[str], labels: Labels) -> tuple[int, ...]:
    """Return the raw values of the labels (by name or value) that must not be lost.

    The default, liver with tumours, takes tumours as far as the data declare them.
    """
    if tuple(names) == FOREGROUND and find_label("tumour", labels) is None:
        names = ("liver",)
    if not (values := find_values(names, labels, "--foreground")) or 0 in values:
        raise InputError(f"--foreground {' '.join(names)}: must name labels, not the background")
    return values


# ---------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------


def check_case(case: Case, terms: Terms, folder: Path) -> dict[str, Any]:
    """Return the record of a case with its findings and draw `folder/<case>.png`.

    A fault of the case is a finding. Raises InputError only where the picture cannot be written.
    """
    findings = [("ambiguous", fault) for fault in case.faults]
    if not findings and (case.image is None or case.label is None):
        missing = "scan" if case.image is None else "label map"
        findings.append(("orphan", f"{case.image or case.label} has no {missing}"))
    record: dict[str, Any] = {"case": case.name, "patient": case.patient, "findings": findings}
    record |= {IMAGE: str(case.image), LABEL: describe_label(case.label)}
    figure = None
    try:
        figure = None if findings else inspect_case(record, terms)
    except Exception as error:
        findings.append(describe_fault(error))
    if figure:
        save_figure(figure, folder / f"{case.name}.png")
    return record


def describe_fault(error: Exception) -> Finding:
    """Return an exception as a finding; LIVER_DEBUG=1 shows where an unexpected one arose."""
    if isinstance(error, InputError):
        return error.kind if error.kind in RULES else "unreadable", str(error)
    if os.environ.get("LIVER_DEBUG"):
        traceback.print_exception(error)
    return "unreadable", f"{type(error).__name__}: {error}"


def inspect_case(record: dict[str, Any], terms: Terms) -> Any:
    """Add grid, voxel counts and findings to `record`; return the picture of the case.

    `record["slice_sums"]`, the checksums of its slices, is there if the case was read to its end.
    """
    scan, label = read_pair(record, terms)
    hu, outline, findings = scan.ras.data, label.data, record["findings"]
    record["shape"], record["orientation"] = list(scan.shape), scan.axcodes
    record["spacing_mm"] = [round(step, 6) for step in scan.spacing_mm]
    record["slices"] = hu.shape[2]
    findings += judge_grid(scan, label, terms.depth)
    counts = count_per_slice(label, terms)
    annotated = np.sum([counts[v] for v in counts if v and v not in terms.ignore], axis=0) > 0
    findings += judge_gaps(annotated, terms.label_every)
    record["drawn_slice"] = int(annotated.argmax())
    thinned = coarsen(hu.shape)
    step = thinned[0].step
    # an array in one piece is masked 10 times faster than a view
    coarse, small = (np.ascontiguousarray(array[thinned]) for array in (hu, outline))
    inside = mask_values(small, terms.foreground)
    x, y, z = (find_busiest_slice(inside, axis) for axis in range(3))
    if terms.modality == "CT":
        findings += judge_hu(coarse, scan.dtype)
    findings += judge_slices(coarse)
    findings += judge_outline(coarse, inside, bool(annotated.any()))
    names = (find_label(name, terms.labels) or "" for name in ("liver", "tumour"))
    liver, tumour = (set(terms.labels.get(name, ())) for name in names)
    if liver & set(terms.foreground):
        wanted = mask_values(small, (liver | tumour) & set(terms.foreground))
        findings += judge_side(coarse, wanted, scan.ras.spacing_mm[0] * step)
        findings += judge_tumour(outline, liver, tumour)
    low, high = np.percentile(coarse[::4, ::4, ::2], [0.5, 99.5])
    voxels = {value: int(number.sum()) for value, number in sorted(counts.items())}
    record["hu_range"] = [round(float(low)), round(float(high))]
    record["foreground_voxels"] = sum(voxels.get(value, 0) for value in terms.foreground)
    record["voxels_per_label"] = {str(value): number for value, number in voxels.items()}
    figure = draw_overlay(record["case"], scan.ras, outline, (x * step, y * step, z), terms.labels)
    record["slice_sums"] = sum_slices(coarse)
    return figure


def read_pair(record: dict[str, Any], terms: Terms) -> tuple[Volume, Volume]:
    """Return a scan and its label map (RAS, of the smallest type, slice by slice in memory)."""
    scan = read_scan(Path(record[IMAGE]))
    how: dict[str, Any] = {"trust_grid": terms.trust_grid, "ignore": terms.ignore}
    label = read_label_map(restore_label(record[LABEL]), scan, terms.labels, **how)
    kind = np.min_scalar_type(max(list_raw_values(label, terms)))
    return scan, replace(label.ras, data=np.asfortranarray(label.ras.data, kind))


def list_raw_values(label: Volume, terms: Terms) -> list[int]:
    """Return all raw values that `label` may hold, the background among them."""
    return sorted({0, *list_values(terms.labels), *terms.ignore, *label.classes.values()})


def count_per_slice(label: Volume, terms: Terms) -> dict[int, np.ndarray]:
    """Return raw value → voxels with it in each slice of a label map (RAS, in memory)."""
    planes, values = np.moveaxis(label.data, 2, 0), list_raw_values(label, terms)
    counts = {v: np.array([np.count_nonzero(p == v) for p in planes]) for v in values if v}
    return {0: planes[0].size - np.sum(list(counts.values()), axis=0)} | counts


def mask_values(array: np.ndarray, values: Iterable[int]) -> np.ndarray:
    """Return where an array holds one of some values."""
    return reduce(np.logical_or, (array == v for v in values), np.zeros_like(array, bool))


def sum_slices(coarse: np.ndarray) -> list[int]:
    """Return the CRC-32 of each slice (X, Y, Z) that is not blank; crops of one scan share them."""
    whole = np.clip(coarse, -3000, 3000).round().astype(np.int16)
    full = whole.min(axis=(0, 1)) < whole.max(axis=(0, 1))
    return [zlib.crc32(whole[:, :, z].tobytes()) for z in np.flatnonzero(full)]


def identify_scan(scan: Volume) -> str:
    """Return the checksum of a scan's voxels (RAS, in memory), whatever file holds them."""
    return join_sums(sum_slices(np.ascontiguousarray(scan.ras.data[coarsen(scan.ras_shape)])))


def join_sums(sums: Sequence[int]) -> str:
    """Return one checksum of those of `sum_slices`; none of a scan whose slices are all blank."""
    return hashlib.sha256(repr([*map(int, sums)]).encode()).hexdigest()[:16] if len(sums) else ""


def coarsen(shape: Sequence[int]) -> tuple[slice, slice]:
    """Return which pixels of slices (X, Y, …) the check looks at: about COARSE along an axis."""
    step = max(1, round(max(shape[:2]) / COARSE))
    return slice(None, None, step), slice(None, None, step)


def draw_overlay(
    name: str, scan: Volume, outline: np.ndarray, middle: tuple[int, ...], labels: Labels
) -> Any:
    """Return a figure: three planes of a scan (RAS) through `middle` with each label's outline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6))  # no layout engine: it would draw everything twice
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.87, wspace=0.02)
    window = choose_hu_window(scan.data[:, :, middle[2], None])
    classes = {"": (0,)} | {label: values for label, values in labels.items() if values != (0,)}
    for axes, (plane, (cut, _)) in zip(figure.subplots(1, 3), PLANES.items(), strict=True):
        part = [slice(None)] * 3
        part[cut] = slice(middle[cut], middle[cut] + 1)
        shown = {IMAGE: scan.crop(part), LABEL: index_classes(outline[tuple(part)], classes)}
        title = f"{plane}, slice {middle[cut] + 1} of {outline.shape[cut]}"
        show_patient(shown, 0, axes=axes, plane=plane, hu_window=window, title=title)
    figure.suptitle(name, fontsize=11)
    return figure


# ---------------------------------------------------------------------------------------
# Rules for one case
# ---------------------------------------------------------------------------------------


def judge_grid(scan: Volume, label: Volume, depth: int) -> list[Finding]:
    """Return what reading noted about both grids, and what the scan's own grid lacks."""
    findings = [("dicom", note) for note in scan.notes]
    findings += [("near_grid" if "apart" in n else "label_note", n) for n in label.notes]
    if not scan.oriented:
        findings.append(("unoriented", "the header has no orientation (form codes 0)"))
    if np.allclose(np.abs(scan.ras_affine[:3, :3]), np.eye(3)):
        findings.append(("identity", "the affine holds no spacing and no orientation"))
    if min(scan.ras_shape[:2]) < SMALLEST:
        size = " × ".join(map(str, scan.ras_shape[:2]))
        findings.append(("small", f"slices have {size} voxels, fewer than {SMALLEST} on a side"))
    if scan.ras_shape[2] < depth:
        findings.append(("thin", f"{count_words(scan.ras_shape[2], 'slice')}, fewer than {depth}"))
    return findings


def judge_gaps(annotated: np.ndarray, every: int) -> list[Finding]:
    """With --label-every n, require that only every n-th slice is annotated (a flag per slice)."""
    drawn = np.flatnonzero(annotated)
    off = drawn[(drawn - drawn[:1]) % every != 0][:1]
    text = f"--label-every {every}, but slices {{}} and {{}} are annotated"
    return [("drawn", text.format(drawn[0] + 1, slice_ + 1)) for slice_ in off]


def judge_hu(array: np.ndarray, stored: np.dtype) -> list[Finding]:
    """Return what speaks against Hounsfield units of a CT, from every 8th voxel of (X, Y, Z).

    Kind "hu" says why they cannot be, "air" what is unusual; `stored` is the file's data type.
    """
    sample = array[::2, ::2, ::2].ravel("K")
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return [("hu", "no finite values")]
    low, high = float(sample.min()), float(sample.max())
    held = sample[sample > -1500]  # below lies padding outside the scan's circle
    airless = np.mean((sample > -1100) & (sample < -900)) < 0.001
    rules = (
        ("hu", stored.itemsize == 1, f"{stored}, 8 bits cannot hold HU"),
        ("hu", low == high, f"every voxel is {low:.0f}"),
        ("hu", high > HIGHEST_HU, "padding outside the scan was read as HU, or it is no CT"),
        ("hu", high - low < 300, "too narrow for HU"),
        ("hu", np.count_nonzero(held < -30) < 0.01 * held.size,
         "no fat or air below 0, so the intercept was not applied, or it is no CT"),
        ("air", airless, "no air near −1000"),
    )  # fmt: skip
    span = f"values from {low:.0f} to {high:.0f}"
    return [(kind, f"{span}: {text}") for kind, wrong, text in rules if wrong][:1]


def judge_slices(coarse: np.ndarray) -> list[Finding]:
    """Return how many slices hold a single value."""
    blank = int(np.sum(coarse.min(axis=(0, 1)) == coarse.max(axis=(0, 1))))
    return [("blank", f"{blank} of {coarse.shape[2]} slices hold no data")] * (blank > 0)


def judge_outline(coarse: np.ndarray, inside: np.ndarray, any_label: bool) -> list[Finding]:
    """Return whether the foreground (`inside`, on `coarse`) is missing or outside the body."""
    if not any_label:
        return [("empty", "the label map is empty")]
    if not inside.any():
        return [("no_foreground", "the label map holds none of the foreground values")]
    in_air = float(np.mean(coarse[inside] < -300))
    kind = "outside" if in_air > 0.3 else "partly_outside"
    return [(kind, f"{in_air:.0%} of the foreground lies in air or lung")] * (in_air > 0.05)


def judge_side(coarse: np.ndarray, inside: np.ndarray, x_mm: float) -> list[Finding]:
    """Return what is odd: the liver lies on the right, more even in HU than its mirror image."""
    rows = inside.any(axis=(0, 1))
    body, liver = (np.sum(a[:, :, rows], axis=(1, 2)) for a in (coarse > -300, inside))
    columns = np.arange(len(body))
    centre, liver_x = (float(columns @ c / max(c.sum(), 1)) for c in (body, liver))
    flipped = np.round(2 * centre - columns).astype(int)
    usable = (flipped >= 0) & (flipped < len(body))
    mirror = np.zeros_like(inside)
    mirror[columns[usable]] = inside[flipped[usable]]
    if not mirror.any():  # no body, or the mirror image lies outside the scan
        return []
    own, other = (np.subtract(*np.percentile(coarse[m], [75, 25])) for m in (inside, mirror))
    if own > 2 * other:
        text = f"HU spread over {own:.0f} in the label and {other:.0f} in its mirror image"
        return [("mirrored", text)]
    left_mm = (centre - liver_x) * x_mm
    text = f"scan and label show the liver {left_mm:.0f} mm on the patient's left"
    return [("left_right", text)] * (left_mm > 10)


def judge_tumour(
    outline: np.ndarray, liver_values: set[int], tumour_values: set[int]
) -> list[Finding]:
    """Return how many tumour voxels lie in connected components without liver."""
    import cc3d

    tumour = mask_values(outline, tumour_values)
    box = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in find_bounding_box(tumour))
    liver, tumour = mask_values(outline[box], liver_values), tumour[box]
    parts = cc3d.connected_components(liver | tumour)
    with_liver = np.bincount(parts[liver], minlength=parts.max() + 1) > 0
    apart = int(np.count_nonzero(~with_liver[parts[tumour]]))
    return [("tumour_apart", f"{apart} tumour voxels touch no liver")] * (apart > 0)


def compare_cases(records: list[dict[str, Any]]) -> list[Finding]:
    """Add findings between cases, make copies one patient; return findings of the whole set."""
    readable = [record for record in records if "slice_sums" in record]
    for i, j, number in find_duplicates([record["slice_sums"] for record in readable]):
        one, other = readable[i], readable[j]
        text, former = f"{number} slices are identical", other["patient"]
        one["findings"].append(("duplicate", f"the same scan as {other['case']}: {text}"))
        other["findings"].append(("duplicate", f"the same scan as {one['case']}: {text}"))
        for record in records:
            if record["patient"] == former:
                record["patient"] = one["patient"]
    usual = np.median([sorted(r["spacing_mm"]) for r in readable] or [[1, 1, 1]], axis=0)
    for record in readable:
        ratio = np.sort(record["spacing_mm"]) / usual
        if np.abs(np.log2(ratio)).max() > 3 or max(record["spacing_mm"]) > 10:
            text = " × ".join(f"{s:g}" for s in record["spacing_mm"])
            record["findings"].append(("spacing", f"{text} mm is far from the other scans'"))
    mixture = Counter(record["orientation"] for record in readable)
    text = ", ".join(f"{number} {axes}" for axes, number in mixture.most_common())
    return [("mixture", f"orientations are mixed: {text}")] * (len(mixture) > 1)


def find_duplicates(sums: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Return (i, j, shared slices) of scans that share two and a tenth of the shorter one."""
    shared: Counter[tuple[int, int]] = Counter()
    seen: defaultdict[int, list[int]] = defaultdict(list)
    for index, checksums in enumerate(sums):
        for checksum in set(checksums):
            shared.update((other, index) for other in seen[checksum])
            seen[checksum].append(index)
    return [
        (one, other, number)
        for (one, other), number in sorted(shared.items())
        if number > 1 and number >= 0.1 * min(len(sums[one]), len(sums[other]))
    ]


def find_level(finding: Finding, accept: Sequence[str]) -> str:
    """Return error (it stops its case, unless accepted), warning, or note (it needs nothing)."""
    return "warning" if finding[0] in accept else RULES[finding[0]][0]


def list_errors(record: dict[str, Any], accept: Sequence[str]) -> list[Finding]:
    """Return the findings that stop the case."""
    return [finding for finding in record["findings"] if find_level(finding, accept) == "error"]


def count_words(number: int, word: str) -> str:
    """Return `1 error`, `2 errors`."""
    return f"{number} {word}{'s' * (number != 1)}"


def report_cases(records: Iterable[dict[str, Any]], accept: Sequence[str], path: Path) -> None:
    """Print a line per case, then every finding with its remedy, errors first; write all as CSV."""
    rows, told = [], []
    for record in records:
        findings = [(find_level(finding, accept), *finding) for finding in record["findings"]]
        levels = Counter(level for level, *_ in findings)
        verdict = [count_words(levels[name], name) for name in ("error", "warning") if levels[name]]
        rows.append({
            "case": record["case"],
            "shape": "×".join(map(str, record.get("shape", []))),
            "spacing mm": "×".join(f"{s:.3g}" for s in record.get("spacing_mm", [])),
            "axes": record.get("orientation", ""),
            "values": "…".join(map(str, record.get("hu_range", []))),
            "foreground": str(record.get("foreground_voxels", "")),
            "verdict": ", ".join(verdict) or "ok",
            "patient": record["patient"],
            "findings": " | ".join(f"{level}: {found}" for level, _, found in findings),
        })  # fmt: skip
        told += [(level, record["case"], found, RULES[kind][1]) for level, kind, found in findings]
    table = [list(rows[0])[:7], *(list(row.values())[:7] for row in rows)]
    width, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    for first, *middle, last in table:
        cells = [f"{text:>{width}}" for text, width in zip(middle, widths, strict=False)]
        print(f"{first:<{width}}", *cells, last, sep="  ")
    for level, case, found, remedy in sorted(told, key=lambda line: LEVELS.index(line[0])):
        print(f"{level}: {case}: {found}; {remedy}")
    write_csv(rows, path)


@dataclass
class Config:
    source: tyro.conf.Positional[Path] = Path("data/raw")  # folder with the scans, as downloaded
    destination: Path = Path("check")  # folder for check.csv and the pictures
    images: Path | None = None  # folder of the scans, where names do not tell them
    labels: Path | None = None  # folder of their label maps
    values: tuple[str, ...] = ()  # what label values mean, such as liver=6 tumour=7
    foreground: tuple[str, ...] = FOREGROUND  # labels that must not be lost
    modality: Literal["CT", "MR"] = "CT"  # MR: intensities are no HU
    label_every: Count = 1  # only every so many-th slice was drawn
    subvolume_depth: Whole = 16  # slices below which a scan is thin
    trust_image_grid: bool = False  # lay a label map on its scan's grid if only the shapes agree
    accept: tuple[Literal["mirrored", "outside", "hu"], ...] = ()  # errors to take as warnings


def main(config: Config) -> None:
    cases, terms = read_data_set(config)
    cases = show_progress(cases, desc="checking", unit="case")
    records = [check_case(case, terms, config.destination) for case in cases]
    compare_cases(records)
    report_cases(records, config.accept, config.destination / "check.csv")
    print(f"look at {config.destination}; next: python prepare.py {config.source}")
    if wrong := sum(bool(list_errors(record, config.accept)) for record in records):
        raise InputError(f"{wrong} of {count_words(len(records), 'case')} with errors, see above")


if __name__ == "__main__":
    run_script(main, read_settings(Config, __doc__))
