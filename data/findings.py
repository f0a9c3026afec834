"""Findings of the check: their levels, what to do about each, and the tables that tell them."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.files import write_csv
from data.judges import Finding

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
