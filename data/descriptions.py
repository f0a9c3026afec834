"""What lies beside the scans: names of labels, splits, patients; also as other programs write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from data.files import InputError, read_csv, read_json
from data.labels import (
    BACKGROUND,
    IMAGE,
    LABEL,
    LARGEST_VALUE,
    USUAL_LABELS,
    Labels,
    as_labels,
    describe_labels,
)
from data.names import name_files, show_path
from data.settings import check_types

SPLITS = ("training", "validation", "test")
SPLIT_WORDS = {
    "training": "training", "train": "training", "validation": "validation", "val": "validation",
    "valid": "validation", "test": "test", "testing": "test",
}  # fmt: skip
EXPECTED_LABELS = (
    '"labels" as Decathlon {"1": "liver", "2": "tumour"} or nnU-Net {"liver": 1, "tumour": 2} has '
    "them"
)


@dataclass
class Description:
    """What a `dataset.json` says of its label maps."""

    labels: Labels = field(default_factory=lambda: dict(USUAL_LABELS))
    ignore: tuple[int, ...] = ()  # values of voxels that nobody judged
    announced: int | None = None  # cases there should be
    path: Path | None = None


def read_description(path: Path) -> Description:
    """Labels of a `dataset.json` of Decathlon or nnU-Net (1 or 2, also with regions).

    Raises InputError with the expected form where it has another.
    """
    content = read_json(path)
    try:
        found = _read_labels(content["labels"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: must have {EXPECTED_LABELS}, got {type(error).__name__}: {error}; correct "
            "it, or remove it to use background 0, liver 1, tumour 2"
        ) from error
    ignore = tuple(v for name in list(found) if name.lower() == "ignore" for v in found.pop(name))
    labels = _name_regions(found)
    both = set(ignore) & {value for some in labels.values() for value in some}
    if both or 0 in ignore:
        raise InputError(f"{path}: {sorted(both) or 0} is to be ignored and is a label too; choose")
    if (zero := next((n for n, v in labels.items() if 0 in v), None)) is None:
        labels = {BACKGROUND: (0,)} | labels
    elif len(labels[zero]) > 1:
        raise InputError(f"{path}: {zero} must be 0 alone, got {labels[zero]}; correct it")
    announced = content.get("numTraining")
    whole = isinstance(announced, int) and not isinstance(announced, bool)
    return Description(labels, ignore, announced if whole else None, path)


def _read_labels(entries: dict[str, Any]) -> Labels:
    """Name → values of either form; several values of one name are one label."""

    def number(value: Any) -> int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(f"{value!r} is no label value")
        if not 0 <= int(value) <= LARGEST_VALUE:
            raise ValueError(f"label values must be 0 to {LARGEST_VALUE}, got {value}")
        return int(value)

    found: dict[str, tuple[int, ...]] = {}
    by_value = all(str(key).strip().isdigit() for key in entries)
    for key, content in entries.items():
        if by_value and not isinstance(content, str):
            raise ValueError(f"the name of {key} must be a text, got {content!r}")
        listed = content if isinstance(content, list) else [content]
        values = [key] if by_value else listed
        name = str(content if by_value else key)
        found[name] = tuple(sorted({*found.get(name, ()), *map(number, values)}))
        if not found[name]:
            raise ValueError(f"{name} has no value")
    if not set(sum(found.values(), ())) - {0}:
        raise ValueError("no label beside the background")
    return found


def _name_regions(found: Labels) -> Labels:
    """Regions overlap (liver [1, 2], tumour [2]): the smallest that has a value names it."""
    owner: dict[int, str] = {}
    for name, values in sorted(found.items(), key=lambda item: len(item[1])):
        for value in values:
            if value in owner and len(found[owner[value]]) == len(values):
                raise InputError(
                    f"dataset.json: {owner[value]} and {name} both have the value {value}; each "
                    "value needs one name"
                )
            owner.setdefault(value, name)
    labels = {n: tuple(v for v in values if owner[v] == n) for n, values in found.items()}
    return {name: values for name, values in labels.items() if values}


def find_description(files: Iterable[Path], cases: Iterable[Path], root: Path) -> Description:
    """The description that is nearest to the files of the cases, up to `root`; else any one.

    Raises InputError naming two that differ.
    """
    known = {path.parent: path for path in files if path.name == "dataset.json"}
    used: dict[Path, None] = {}
    for folder in {path.parent for path in cases} if known else ():
        near = next((known[up] for up in (folder, *folder.parents) if up in known), None)
        if near is not None:
            used[near] = None
    read = [read_description(path) for path in sorted(used or known.values())]
    for other in read[1:]:
        if (other.labels, other.ignore) != (read[0].labels, read[0].ignore):
            raise InputError(
                f"{read[0].path} says {describe_labels(read[0].labels)}, {other.path} says "
                f"{describe_labels(other.labels)}; prepare one data set at a time, or give "
                "--values for both"
            )
    if not read:
        return Description()
    counts = [one.announced for one in read if one.announced is not None]
    read[0].announced = sum(counts) if counts else None
    return read[0]


# ---------------------------------------------------------------------------------------
# Splits and patients
# ---------------------------------------------------------------------------------------


def read_split(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Case or patient of `names` → "training", "validation" or "test".

    From lists of names under these words, nnU-Net's `splits_final.json` (its fold 0) or lists of
    MONAI ({"training": [{"image": …}]}; `fold` 0 is the validation). Names that are not asked for
    are left out. Raises InputError for other content and for a name in two splits.
    """
    content = read_json(path)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        print(f"{path}: nnU-Net's folds; fold 0 of {len(content)} is taken")
        content = content[0]
    expected = f"{path}: must be JSON with lists of cases under {', '.join(SPLITS)}"
    if not isinstance(content, dict):
        raise InputError(f"{expected}, got {type(content).__name__}")
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    described = any(isinstance(e, dict) for value in lists.values() for e in value)
    odd = [key for key in lists if key not in SPLIT_WORDS]
    if not set(lists) & set(SPLIT_WORDS) or (odd and not described):
        raise InputError(f"{expected}, got {', '.join(map(str, content)) or 'nothing'}")
    known = _spell_names(names)
    split: dict[str, str] = {}
    for key in lists.keys() & SPLIT_WORDS.keys():
        for entry in lists[key]:
            where = SPLIT_WORDS[key]
            if isinstance(entry, dict):
                where = "validation" if entry.get("fold") == 0 and where == "training" else where
                entry = entry.get("image", entry.get("label"))
                entry = entry[0] if isinstance(entry, list) and entry else entry
            if not isinstance(entry, str):
                raise InputError(f"{expected}, got {str(entry)[:60]!r} under {key}")
            for name in known.get(entry) or _match_path(entry, known):
                if split.setdefault(name, where) != where:
                    raise InputError(
                        f"{path}: names {name} in two splits; a case belongs to one split"
                    )
    return split


def _spell_names(names: Iterable[str]) -> dict[str, set[str]]:
    """Spelling → names: as they are, and what remains without words of scans and label maps."""
    exact = {name: {name} for name in names}
    known: dict[str, set[str]] = {}
    for name in exact:
        known.setdefault("_".join(_remains(name)), set()).add(name)
    return known | exact


def _remains(text: str) -> tuple[str, ...]:
    path = Path(os.sep, *text.replace("\\", "/").split("/"))
    (named,) = name_files([path], Path(os.sep))
    return named.parts


def _match_path(text: str, known: dict[str, set[str]]) -> set[str]:
    """The name that the path of a file stands for: by as many of its last parts as are known."""
    parts = _remains(text)
    for first in range(len(parts)):
        found = known.get("_".join(parts[first:]), set())
        if len(found) > 1:
            raise InputError(f"{text}: may be {' or '.join(sorted(found))}; write the case's name")
        if found:
            return found
    return set()


def read_patients(path: Path) -> dict[str, str]:
    """Case → patient of a CSV with the columns case,patient, also as Excel writes it."""
    table: dict[str, str] = {}
    for row in read_csv(path, ("case", "patient")):
        case, patient = ((row[key] or "").strip() for key in ("case", "patient"))
        if not case or not patient:
            raise InputError(f"{show_path(path)}: a row lacks case or patient: {row}; fill it in")
        if table.setdefault(case, patient) != patient:
            raise InputError(f"{show_path(path)}: gives {case} two patients; keep one row")
    return table


# ---------------------------------------------------------------------------------------
# What prepare.py wrote
# ---------------------------------------------------------------------------------------

# Of dataset.json: what training reads, and its types; of each sub-volume likewise.
PREPARED_SCHEMA = 1
PREPARED = {"labels": dict, "settings": dict, "subvolume_depth": int, "subvolumes": list}
SUBVOLUME = {
    "case": str, "split": str, IMAGE: str, LABEL: str, "first_slice": int, "shape": list,
    "spacing_mm": list, "voxels_per_label": dict,
}  # fmt: skip


def read_prepared(folder: Path) -> dict[str, Any]:
    """`dataset.json` of a folder that prepare.py has completed, verified; else one InputError."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"{path}: not found; it is written last by prepare.py, so {folder} is not (completely) "
            "prepared; run `python prepare.py SOURCE` with this folder as --destination"
        )
    prepared = read_json(path, "what prepare.py wrote")
    remedy = "prepare the data again"
    check_types(prepared, {"schema": int}, str(path), remedy)
    if (found := prepared["schema"]) != PREPARED_SCHEMA:
        newer = found > PREPARED_SCHEMA
        raise InputError(
            f"{path}: schema must be {PREPARED_SCHEMA}, got {found}; "
            + ("it comes from a later version, update this program" if newer else remedy)
        )
    check_types(prepared, PREPARED, str(path), remedy)
    try:
        as_labels(prepared["labels"])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: labels must be whole numbers, got {prepared['labels']}; {remedy}"
        ) from error
    for record in prepared["subvolumes"]:
        check_types(record, SUBVOLUME, f"{path}: a sub-volume", remedy)
        for key in (IMAGE, LABEL):
            parts = PurePosixPath(record[key].replace("\\", "/")).parts
            rooted = record[key].startswith("/") or PureWindowsPath(record[key]).drive
            if rooted or ".." in parts:
                raise InputError(f"{path}: {record[key]} lies outside of {folder}; {remedy}")
    return prepared
