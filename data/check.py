"""Is this data fit? Every scan with its label map is looked at; findings have a level and a remedy.

    python -m data.check data/raw

Lists what was recognised, prints the table of cases and below it every finding with what to do, and
writes under `--destination` the table as `check.csv` and `<case>.png`: three planes through the
foreground with the outlines. `prepare.py` runs the same check before it cuts anything.
"""

from __future__ import annotations

import os
import traceback
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tyro
from tqdm import tqdm

from data.datasets import Case, describe_data_set, find_pairs
from data.files import InputError, write_csv
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
from data.pictures import LABEL_COLOURS, PLANES, choose_hu_window, save_figure, show_patient
from data.scans import Masks, describe_label, read_label_map, read_scan
from data.settings import command_line
from data.volumes import SLAB, Volume, list_slabs

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
    "ambiguous": ("error", "rename or remove one, or name two folders: --images --labels"),
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


def level(finding: Finding, accept: Sequence[str]) -> str:
    """An error stops its case, unless it was accepted; a warning is told, a note needs nothing."""
    return "warning" if finding[0] in accept else RULES[finding[0]][0]


def list_errors(record: dict[str, Any], accept: Sequence[str]) -> list[Finding]:
    """Findings that stop the case."""
    return [finding for finding in record["findings"] if level(finding, accept) == "error"]


def describe_fault(error: Exception) -> str:
    """A fault that nobody foresaw, in one line; LIVER_DEBUG=1 shows where it arose."""
    if os.environ.get("LIVER_DEBUG"):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


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


def list_findings(records: Iterable[dict[str, Any]], accept: Sequence[str]) -> Iterator[str]:
    """A line for every finding with what to do, errors first."""
    told = [(record["case"], *finding) for record in records for finding in record["findings"]]
    ranks = ("error", "warning", "note")
    for case, kind, found in sorted(told, key=lambda t: ranks.index(level((t[1], t[2]), accept))):
        text = f"{level((kind, found), accept)}: {case}: {found}; {RULES[kind][1]}"
        yield make_printable(text)


def print_table(records: Sequence[dict[str, Any]], accept: Sequence[str]) -> None:
    """One line per case, and below it every finding with what to do."""
    rows = tabulate(records, accept)
    names = list(rows[0]) if rows else []
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    for cells in [names, *([row[name] for name in names] for row in rows)]:
        first, *middle = zip(cells, widths, strict=True)
        *middle, last = middle
        texts = [f"{first[0]:<{first[1]}}", *(f"{text:>{w}}" for text, w in middle), last[0]]
        print("  ".join(texts))
    for line in list_findings(records, accept):
        print(line)


def write_table(records: Sequence[dict[str, Any]], accept: Sequence[str], path: Path) -> None:
    """The table with every finding as CSV."""
    rows = tabulate(records, accept)
    for row, record in zip(rows, records, strict=True):
        row["patient"] = record["patient"]
        found = (f"{level(finding, accept)}: {finding[1]}" for finding in record["findings"])
        row["findings"] = make_printable(" | ".join(found))
    write_csv(rows, path)


Finding = tuple[str, str]  # kind (a key of RULES), what was found

HIGHEST_HU = 31_000  # of any CT, metal included; padding read as unsigned is 62,512 and more


def judge_hu(array: np.ndarray, stored: np.dtype) -> list[Finding]:
    """What speaks against Hounsfield units of a CT, from every 8th voxel of an array (X, Y, Z).

    ("hu", why they cannot be) or ("air", what is only unusual); `stored` is the file's data type.
    """
    sample = np.asfortranarray(array[::2, ::2, ::2]).ravel("K")
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return [("hu", "no finite values")]
    low, high = float(sample.min()), float(sample.max())
    span = f"values from {low:.0f} to {high:.0f}"
    if stored.itemsize == 1:
        return [("hu", f"{span} in {stored}: 8 bits cannot hold HU")]
    if low == high:
        return [("hu", f"every voxel is {low:.0f}")]
    if high > HIGHEST_HU:
        return [("hu", f"{span}: padding outside the scan was read as HU, or it is no CT")]
    if high - low < 300:
        return [("hu", f"{span}: too narrow for HU")]
    if np.mean(sample[sample > -1500] < -30) < 0.01:  # −1500: padding outside the scan's circle
        return [("hu", f"{span}, no fat or air below 0: intercept not applied, or no CT")]
    if np.mean((sample > -1100) & (sample < -900)) < 0.001:
        return [("air", f"{span}: no air near −1000")]
    return []


def judge_grid(scan: Volume, label: Volume, depth: int) -> list[Finding]:
    """What reading told about the two grids, and what the scan's own does not say."""
    findings = [("dicom", note) for note in scan.notes]
    for note in label.notes:
        findings.append(("near_grid" if "apart" in note else "label_note", note))
    if not scan.oriented:
        findings.append(("unoriented", "the header does not say how the axes lie (form codes 0)"))
    if np.allclose(np.abs(scan.ras_affine[:3, :3]), np.eye(3)):
        findings.append(("identity", "the affine holds no spacing and no orientation"))
    if scan.ras_shape[2] < depth:
        findings.append(("thin", f"{scan.ras_shape[2]} slices, fewer than {depth}"))
    return findings


def judge_intensity(coarse: np.ndarray, stored: np.dtype, modality: str) -> list[Finding]:
    """Are these Hounsfield units (of a CT), and is there something on every slice?"""
    blank = int(np.sum(coarse.min(axis=(0, 1)) == coarse.max(axis=(0, 1))))
    findings = judge_hu(coarse, stored) if modality == "CT" else []
    if 0 < blank < coarse.shape[2] or (blank and modality != "CT"):
        findings.append(("blank", f"{blank} of {coarse.shape[2]} slices hold no data"))
    return findings


def judge_outline(coarse: np.ndarray, inside: np.ndarray, any_label: bool) -> list[Finding]:
    """Is there an outline, and does it lie in the body? `inside`: foreground on `coarse`."""
    if not any_label:
        return [("empty", "the label map is empty")]
    if not inside.any():
        return [("no_foreground", "the label map holds none of the foreground values")]
    in_air = float(np.mean(coarse[inside] < -300))
    kind = "outside" if in_air > 0.3 else "partly_outside"
    return [(kind, f"{in_air:.0%} of the foreground lies in air or lung")] * (in_air > 0.05)


def judge_side(coarse: np.ndarray, inside: np.ndarray, x_mm: float) -> list[Finding]:
    """The liver lies on the patient's right, and is more even in HU than what lies on the left."""
    rows = inside.any(axis=(0, 1))
    body, liver = (np.sum(a[:, :, rows], axis=(1, 2)) for a in (coarse > -300, inside))
    columns = np.arange(len(body))
    centre, liver_x = (float(columns @ c / max(c.sum(), 1)) for c in (body, liver))
    flipped = np.round(2 * centre - columns).astype(int)
    usable = (flipped >= 0) & (flipped < len(body))
    mirror = np.zeros_like(inside)
    mirror[columns[usable]] = inside[flipped[usable]]
    if not mirror.any():  # no body, or the outline's mirror image lies outside the scan
        return []
    own, other = (np.subtract(*np.percentile(coarse[m], [75, 25])) for m in (inside, mirror))
    offset = (liver_x - centre) * x_mm
    if own > 2 * other:
        text = f"HU spread over {own:.0f} in the label and {other:.0f} in its mirror image"
        return [("mirrored", text)]
    if offset < -10:
        text = f"scan and label show the liver {-offset:.0f} mm on the patient's left"
        return [("left_right", text)]
    return []


def judge_tumour(
    outline: np.ndarray, counts: dict[int, np.ndarray], labels: Labels
) -> list[Finding]:
    """Tumour voxels in parts that touch no liver. `counts`: see `count_per_slice`."""
    import cc3d

    organ, lesion = find_label("liver", labels), find_label("tumour", labels)
    if organ is None or lesion is None:
        return []
    liver, tumour = labels[organ], labels[lesion]
    rows = np.flatnonzero(sum(counts[value] for value in tumour))
    if not rows.size:
        return []
    box = outline[:, :, max(rows[0] - 1, 0) : rows[-1] + 2]
    shadow = np.asarray(mask_values(box, tumour).any(axis=2))
    sides = [np.flatnonzero(shadow.any(axis=axis)) for axis in (1, 0)]
    box = box[tuple(slice(max(side[0] - 1, 0), side[-1] + 2) for side in sides)]
    in_liver, in_tumour = mask_values(box, liver), mask_values(box, tumour)
    parts = cc3d.connected_components(in_liver | in_tumour)
    with_liver = np.bincount(parts[in_liver], minlength=parts.max() + 1) > 0
    apart = int(np.count_nonzero(~with_liver[parts[in_tumour]]))
    return [("tumour_apart", f"{apart} tumour voxels touch no liver")] * (apart > 0)


def is_label_map(array: np.ndarray, values: Sequence[int] | None = None) -> bool:
    """Return whether voxels are label values alone: of `values`, or at most 32 of 0 to 255."""
    if values is None:
        in_range = array.size and array.min() >= 0 and array.max() <= 255
        values = np.unique(array.astype(np.uint8))[:32].tolist() if in_range else []
    return bool(array.size) and bool(np.isin(array, values).all())


# ---------------------------------------------------------------------------------------
# Counting, in the order in which voxels lie in memory
# ---------------------------------------------------------------------------------------


def mask_values(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where an array holds one of some values, in its own memory order."""
    return reduce(np.logical_or, [array == value for value in values])


def undo_flips(array: np.ndarray) -> np.ndarray:
    """The same voxels as they lie in memory: counting in a flipped view is 8 times slower."""
    return array[tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)]


def count_per_slice(label: np.ndarray, values: Sequence[int]) -> dict[int, np.ndarray]:
    """Value → voxels with it in each slice of (X, Y, Z); background is what remains."""
    planes = [undo_flips(label[:, :, z]) for z in range(label.shape[2])]
    counts = {v: np.array([np.count_nonzero(p == v) for p in planes]) for v in values if v}
    filled = sum(counts.values(), start=np.zeros(len(planes), int))
    return {0: planes[0].size - filled} | counts


def find_busiest(mask: np.ndarray) -> tuple[int, int, int]:
    """Index of the sagittal, coronal and axial slice with most voxels; the middle if none has."""
    if not mask.any():
        x, y, z = (size // 2 for size in mask.shape)
    else:
        x, y, z = (int(mask.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


# ---------------------------------------------------------------------------------------
# Reading, slab by slab
# ---------------------------------------------------------------------------------------


def read_outline(label: Volume, values: Sequence[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Label map (X, Y, Z) RAS of the smallest type, and `count_per_slice` of it."""
    x, y, depth = label.ras_shape
    kind = np.min_scalar_type(max(values))
    outline = np.zeros((x, y, depth), kind, order="F")  # slabs not written to take no memory
    counts = {value: np.zeros(depth, np.int64) for value in values}
    counts[0] = np.full(depth, x * y)
    for first, slab in label.slabs(list_slabs(depth, SLAB)):
        if undo_flips(slab).any():
            here = slice(first, first + slab.shape[2])
            for value, number in count_per_slice(slab, values).items():
                counts[value][here] = number
            outline[:, :, here] = slab
    return outline, counts


def read_coarse(
    scan: Volume, step: int, middle: tuple[int, int, int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every `step`-th voxel in-plane, and three planes through `middle`: axial, coronal, sagittal.

    One pass over the scan, one slab at a time, in Fortran order: a slice lies in one piece.
    """
    (x, y, z), shape = middle, scan.ras_shape
    coarse, planes = None, {}
    for first, slab in scan.slabs(list_slabs(shape[2], SLAB)):
        if coarse is None:
            small = slab[::step, ::step].shape[:2]
            coarse = np.empty((*small, shape[2]), slab.dtype, order="F")
            sizes = {"axial": (*shape[:2], 1), "coronal": (shape[0], 1, shape[2])}
            sizes["sagittal"] = (1, *shape[1:])
            planes = {plane: np.empty(n, slab.dtype, order="F") for plane, n in sizes.items()}
        here = slice(first, first + slab.shape[2])
        coarse[:, :, here] = slab[::step, ::step]
        planes["sagittal"][:, :, here] = slab[x : x + 1]
        planes["coronal"][:, :, here] = slab[:, y : y + 1]
        if first <= z < here.stop:
            planes["axial"][:, :, 0] = slab[:, :, z - first]
    assert coarse is not None  # a Volume has at least one slice
    return coarse, planes


ALIKE = 0.985  # correlation of two scans' pictures from which on they are copies


def mark_scan(coarse: np.ndarray) -> dict[str, list[int]]:
    """What a copy of the scan shares: checksums of its slices, and a 16×16×16 picture of it."""
    import torch

    whole = np.clip(coarse, -3000, 3000).round().astype(np.int16)
    full = [z for z in range(whole.shape[2]) if whole[:, :, z].min() < whole[:, :, z].max()]
    soft = torch.from_numpy(np.clip(whole[::2, ::2], -200, 250).astype(np.float32))
    picture = torch.nn.functional.adaptive_avg_pool3d(soft[None, None], 16).numpy()
    return {
        "slices": [zlib.crc32(np.ascontiguousarray(whole[:, :, z]).data) for z in full],
        "picture": np.rint(picture.ravel()).astype(int).tolist(),
    }


def find_duplicates(marks: Sequence[dict[str, list[int]]]) -> list[tuple[int, int, str]]:
    """Pairs (i, j), i < j, that are one scan, and why: crops by slices, other copies by look.

    `marks`: see `mark_scan`. Work grows with the scans and with what is found, not with the pairs.
    """
    shared: Counter[tuple[int, int]] = Counter()
    seen: defaultdict[int, list[int]] = defaultdict(list)
    for index, mark in enumerate(marks):
        for checksum in set(mark["slices"]):
            shared.update((other, index) for other in seen[checksum])
            seen[checksum].append(index)
    found = {}
    for (one, other), number in shared.items():
        if number > 1 and number >= 0.1 * min(len(marks[i]["slices"]) for i in (one, other)):
            found[one, other] = f"{number} slices are identical"
    for one, other, alike in find_lookalikes([mark["picture"] for mark in marks]):
        found.setdefault((one, other), f"correlation {alike:.4f}")
    return [(one, other, how) for (one, other), how in sorted(found.items())]


def find_lookalikes(pictures: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, float]]:
    """Pairs of 16×16×16 pictures that correlate by more than ALIKE.

    As unit vectors they lie √(2 − 2r) apart. Sums over 4×4×4 blocks (an orthogonal projection onto
    64 numbers: no distance grows by it) let a k-d tree find the few pairs that are worth comparing.
    """
    from scipy.spatial import cKDTree

    if len(pictures) < 2:
        return
    units = np.reshape(np.asarray(pictures, np.float64), (len(pictures), -1))
    units = units - units.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(units, axis=1)
    usable = np.flatnonzero(lengths > 0)
    if len(usable) < 2:
        return
    units = units[usable] / lengths[usable, None]
    blocks = units.reshape(-1, 4, 4, 4, 4, 4, 4).sum(axis=(2, 4, 6)).reshape(len(units), 64) / 8
    radius = np.sqrt(2 - 2 * ALIKE) + 1e-6
    pairs = cKDTree(blocks).query_pairs(radius, output_type="ndarray")
    for (a, b), alike in zip(pairs.tolist(), correlate(units, pairs), strict=True):
        if alike > ALIKE:
            one, other = sorted((int(usable[a]), int(usable[b])))
            yield one, other, alike


def correlate(units: np.ndarray, pairs: np.ndarray) -> list[float]:
    """Correlation of each pair (n, 2) of rows of `units`, which have mean 0 and length 1."""
    return [float(units[one] @ units[other]) for one, other in pairs]


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
