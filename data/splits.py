"""Assign patients to splits and folds, drawn or as given; read split files and prepared data.

`config` has the settings of `prepare.Config` that are named here. A patient is never in two splits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
from isal import isal_zlib

from data.datasets import Case, read_paths
from data.files import InputError, make_safe, read_csv, read_json, show_path
from data.labels import IGNORED, IMAGE, LABEL, Description, Labels, as_labels
from data.scans import restore_label
from data.settings import (
    Count,
    Positive,
    Share,
    Whole,
    check_settings,
    check_types,
    is_first_process,
    show_progress,
)

SPLITS = ("training", "validation", "test")
SPLIT_WORDS = {
    "training": "training", "train": "training", "validation": "validation", "val": "validation",
    "valid": "validation", "test": "test", "testing": "test",
}  # fmt: skip
# PatientIDs that say nobody.
NOBODY = {"", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "patient"}
# --patient-pattern → how many different ends follow the patient: dates, or counters and words.
PATTERNS = {
    r"^(.+?)[_-](?:19|20)\d\d[_.-]?\d\d[_.-]?\d\d(?:[T_-]?\d{4,6})?$": 10**6,
    r"^(.+?)[_-]\d\d[_.-]?\d\d[_.-]?(?:19|20)\d\d$": 10**6,
    r"^(.+?)(?:[_-]+[a-zA-Z]*|(?<=\d)[a-zA-Z]+)\d{1,2}_?$": 5,
    r"^(.*\d)[_-]?[a-zA-Z]+$": 5,
    r"^(.*\d\d)\d\d$": 5,
}
# Entries of dataset.json that training reads, and their types; of each sub-volume likewise.
PREPARED_SCHEMA = 1
PREPARED = {
    "labels": dict, "settings": dict, "subvolume_depth": int, "cases": list, "subvolumes": list,
}  # fmt: skip
CASE = {"case": str, "patient": str, "split": str, "spacing_mm": list, "voxels_per_label": dict}
SUBVOLUME = {
    "case": str, "split": str, IMAGE: str, LABEL: str, "image_crc32": str, "label_crc32": str,
    "first_slice": int, "shape": list, "spacing_mm": list, "voxels_per_label": dict,
}  # fmt: skip
# Entries of a case that a checkpoint keeps; "content" is the checksum of its scan's voxels.
KNOWN = ("patient", "case", "split", "content")


class PreparedEntry:
    """Entries of dataset.json, its cases and its sub-volumes, with a range."""

    subvolume_depth: Whole
    labels: dict[str, Whole | tuple[Whole, ...]]
    ignore: tuple[Whole, ...]
    split: Literal["training", "validation", "test"]
    fold: Whole
    first_slice: Whole
    shape: tuple[Whole, Whole, Whole]
    spacing_mm: tuple[Positive, Positive, Positive]
    voxels_per_label: dict[str, Whole]


class PreparedSettings:
    """Settings of prepare.py in dataset.json, with a range."""

    modality: Literal["CT", "MR"]
    label_every: Count
    validation: Share
    folds: Whole


def name_as_told(cases: Sequence[Case], config: Any) -> None:
    """Set the patient of each case by --patients, else by --patient-pattern."""
    table = read_patients(config.patients) if config.patients else {}
    if config.patients and (missing := [case.name for case in cases if case.name not in table]):
        raise InputError(f"{config.patients}: has no row for {', '.join(missing)}; add them")
    for case in cases:
        match = re.search(config.patient_pattern, case.name)
        patient = table.get(case.name) or (match[1] if match and match.groups() else None)
        if patient is None:
            what = f"--patient-pattern {config.patient_pattern}: finds no group in {case.name}"
            raise InputError(rf"{what}; give a pattern like (patient_\d+) for every case")
        case.patient = patient


def name_patients(cases: Sequence[Case], config: Any) -> None:
    """Set the patient of each case; print if names look like several scans of one patient."""
    if config.patients or config.patient_pattern:
        name_as_told(cases, config)
        return
    known = any(case.patient_id is not None for case in cases) and name_by_id(cases)
    if not known and (pattern := guess_pattern([case.name for case in cases])):
        what = f"case names such as {cases[0].name} look like several scans of one patient"
        print(f"{what}; if they are, keep them in one split: --patient-pattern '{pattern}'")


def name_by_id(cases: Sequence[Case]) -> bool:
    """Set the patients by PatientIDs; return whether there is one. One of NOBODY, or one of all
    scans, is none; print this."""
    ids = [None if case.patient_id is None else case.patient_id.strip() for case in cases]
    same = len(cases) > 1 and len(set(ids)) == 1
    nobody = [one for one in ids if one is not None and (same or one.lower() in NOBODY)]
    first: dict[str, str] = {}
    for case, one in zip(cases, ids, strict=True):
        if one and one not in nobody:
            case.patient = first.setdefault(one, case.name)
    if len(nobody) > 1:
        shown = f'"{nobody[0]}"' if nobody[0].lower() in NOBODY else "the same"
        told = f"{len(nobody)} series have {shown} as PatientID, which tells no patients apart"
        print(f"{told}: each is a patient of its own; else give --patients or --patient-pattern")
    return bool(first)


def guess_pattern(names: Sequence[str]) -> str | None:
    """Return the --patient-pattern by which most patients have two to five scans, and none more."""
    for pattern, most in PATTERNS.items():
        found = [match for name in names if (match := re.search(pattern, name))]
        scans = Counter(match[1] for match in found)
        ends = {match.string[match.end(1) :] for match in found}
        several = sum(count > 1 for count in scans.values())
        few = len(ends) <= most and max(scans.values(), default=0) <= 5
        if len(found) == len(names) and few and 2 * several > len(scans) > 1:
            return pattern
    return None


def read_patients(path: Path) -> dict[str, str]:
    """Return case → patient of a CSV with the columns case,patient, also as Excel writes it."""
    table: dict[str, str] = {}
    for row in read_csv(path, ("case", "patient")):
        case, patient = (normalize("NFC", row[k] or "").strip() for k in ("case", "patient"))
        if not case or not patient:
            raise InputError(f"{show_path(path)}: a row lacks case or patient: {row}; fill it in")
        if table.setdefault(case, patient) != patient:
            raise InputError(f"{show_path(path)}: gives {case} two patients; keep one row")
    return table


def split_patients(records: Sequence[dict[str, Any]], config: Any) -> dict[str, str]:
    """Return patient → split, drawn from seed and names alone: the largest remainder is rounded up,
    in a tie that of the earlier split, and no split that is asked for stays empty."""
    if config.split:
        return _take_split(records, config)
    if config.folds:
        return {name: SPLITS[part == 0] for name, part in divide_patients(records, config).items()}
    patients = _order_patients(records, config)
    fractions = np.array([config.training, config.validation, config.test])
    wanted = np.count_nonzero(fractions)
    if len(patients) < wanted:
        what = f"{len(patients)} patients cannot fill {wanted} splits; add some or set a fraction"
        raise InputError(f"{what} to 0 (two: --training 0.5 --validation 0.5 --test 0)")
    exact = fractions * len(patients)
    sizes = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(sizes - exact, kind="stable")[: len(patients) - sizes.sum()]:
        sizes[index] += 1
    while (short := (sizes == 0) & (fractions > 0)).any():
        sizes[sizes.argmax()] -= 1
        sizes[short.argmax()] += 1
    return dict(zip(patients, np.repeat(SPLITS, sizes).tolist(), strict=True))


def divide_patients(records: Sequence[dict[str, Any]], config: Any) -> dict[str, int]:
    """Return patient → fold, from 0, all about equally large."""
    patients = _order_patients(records, config)
    if config.folds > len(patients):
        most = f"must be 2 to {len(patients)}, one patient each at least"
        raise InputError(f"--folds {config.folds}: {most}")
    return {name: place % config.folds for place, name in enumerate(patients)}


def _order_patients(records: Sequence[dict[str, Any]], config: Any) -> list[str]:
    names = {record["patient"] for record in records}
    return sorted(names, key=lambda name: seeded(config.seed, name))


def seeded(seed: int, name: str) -> float:
    """Return a number in [0, 1) of seed and name alone: the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _take_split(records: Sequence[dict[str, Any]], config: Any) -> dict[str, str]:
    """Return patient → split from the JSON of --split: see `read_split`."""
    path = config.split
    where = read_split(path, [r[key] for r in records for key in ("case", "patient")])
    split: dict[str, str] = {}
    for record in records:
        name = where.get(record["case"], where.get(record["patient"]))
        if name is None:
            raise InputError(f"{path}: does not name {record['case']}; add it, or --leave-out it")
        if split.setdefault(record["patient"], name) != name:
            what = f"puts scans of patient {record['patient']} into two splits, which leaks"
            raise InputError(f"{path}: {what}; keep them together")
    if config.validation > 0 and "validation" not in split.values():
        what = f"{path}: puts no patient into validation, which chooses the checkpoint"
        raise InputError(f"{what}; name some, or give --training 1 --validation 0 --test 0")
    return split


def read_split(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return case or patient of `names` → "training", "validation" or "test"; leave out others.
    Reads lists of names under these words, nnU-Net's `splits_final.json` (fold 0) and MONAI's lists
    ({"training": [{"image": …}]}; `fold` 0 is the validation)."""
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
    known: dict[str, set[str]] = {}
    for name in names:
        known.setdefault("_".join(_split_path(name)), set()).add(name)
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
            for name in {normalize("NFC", entry)} & {*names} or _match_path(entry, known):
                if split.setdefault(name, where) != where:
                    raise InputError(f"{path}: names {name} in two splits; keep it in one")
    return split


def _split_path(text: str) -> tuple[str, ...]:
    """Return what remains of a path's parts without words of scans and label maps, and `_0000`."""
    names = re.sub(r"_0000(?=\.|$)", "", text.replace("\\", "/")).split("/")
    (item,) = read_paths([Path(os.sep, *names)], Path(os.sep))
    return item.parts


def _match_path(text: str, known: dict[str, set[str]]) -> set[str]:
    """Return the name that a file's path stands for: by as many of its last parts as are known."""
    parts = _split_path(text)
    found = (known.get("_".join(parts[first:]), set()) for first in range(len(parts)))
    names = next(filter(None, found), set())
    if len(names) > 1:
        raise InputError(f"{text}: may be {' or '.join(sorted(names))}; write the case's name")
    return names


# Prepared data, as training asks for them


def read_prepared(folder: Path) -> dict[str, Any]:
    """Return the verified `dataset.json` of a folder that prepare.py has completed."""
    path, remedy = folder / "dataset.json", "prepare the data again"
    if not path.is_file():
        raise InputError(
            f"{path}: not found; it is written last by prepare.py, so {folder} is not (completely) "
            "prepared; run `python prepare.py SOURCE` with this folder as --destination"
        )
    prepared = read_json(path, "what prepare.py wrote")
    check_types(prepared, {"schema": int}, str(path), remedy)
    if (found := prepared["schema"]) != PREPARED_SCHEMA:
        later = "update this program" if found > PREPARED_SCHEMA else remedy
        raise InputError(f"{path}: schema must be {PREPARED_SCHEMA}, got {found}; {later}")
    check_types(prepared, PREPARED, str(path), remedy)
    check_settings(prepared, f"{path}: {remedy}: ", PreparedEntry)
    check_settings(prepared["settings"], f"{path}: {remedy}: ", PreparedSettings)
    for kind, schema in (("cases", CASE), ("subvolumes", SUBVOLUME)):
        for record in prepared[kind]:
            check_types(record, schema, f"{path}: an entry of {kind}", remedy)
            check_settings(record, f"{path}: {record['case']}: {remedy}: ", PreparedEntry)
            if fault := find_fault(record, prepared["subvolume_depth"]):
                raise InputError(f"{path}: {record['case']}: {fault}; {remedy}")
    groups = {case["case"]: case["patient"] for case in prepared["cases"]}
    places: dict[str, tuple[str, Any]] = {}
    for record in [*prepared["cases"], *prepared["subvolumes"]]:
        patient, here = groups.get(record["case"]), (record["split"], record.get("fold"))
        if patient is None or places.setdefault(patient, here) != here:
            what = "belongs to no case" if patient is None else "is in two splits or folds"
            raise InputError(f"{path}: {record['case']}: {what}; {remedy}")
    return prepared


def find_fault(record: dict[str, Any], depth: int) -> str:
    """Return what contradicts itself in an entry of `dataset.json`, whose sub-volumes have `depth`
    slices (0: as their scan); or nothing."""
    if not all(map(str.isdecimal, record["voxels_per_label"])):
        return "voxels_per_label must count label values"
    piece = "first_slice" in record
    if piece and record["shape"][2] != (depth or record["shape"][2]):
        return f"shape must be of {depth} slices"
    for key in (IMAGE, LABEL) if piece else ():
        file, name = PureWindowsPath(record[key]), f"{key}_{record['first_slice']:04d}."
        if file.root or file.drive or ".." in file.parts:  # of / and of \\
            return f"{record[key]} lies outside of its folder"
        if file.parent.name != record["case"] or not file.name.startswith(name):
            return f"{key} must name its case's file {name}…"
    return ""


def list_patients(prepared: dict[str, Any]) -> list[dict[str, str]]:
    """Return KNOWN and a checksum of the source's path for each case, as a checkpoint keeps it."""
    source = hashlib.sha256(str(prepared.get("source")).encode()).hexdigest()[:16]
    cases = prepared["cases"]
    return [{key: str(case.get(key, "")) for key in KNOWN} | {"source": source} for case in cases]


def find_seen(
    prepared: dict[str, Any], split: str, known: Sequence[dict[str, str]]
) -> dict[str, str]:
    """Return case → "seen in training" (or in validation) of a split's cases whose patients made a
    checkpoint: one of its `known` scans has the same voxels, or the same source and name."""
    mine, seen = list_patients(prepared), dict[str, str]()
    for where in SPLITS[: 1 if split == "validation" else 2][::-1]:
        theirs = [record for record in known if record["split"] == where]
        contents = {r["content"] for r in theirs} - {""}
        names = {(r["source"], r["patient"]) for r in theirs}
        same = [r["content"] in contents or (r["source"], r["patient"]) in names for r in mine]
        patients = {record["patient"] for record, one in zip(mine, same, strict=True) if one}
        here = [r["case"] for r in mine if r["split"] == split and r["patient"] in patients]
        seen |= dict.fromkeys(here, f"seen in {where}")
    return seen


def describe_content(prepared: dict[str, Any]) -> dict[str, str]:
    """Return what training takes from prepared data: each sub-volume's split and checksums."""
    content = {key: str(prepared.get(key)) for key in ("labels", "ignore", "subvolume_depth")}
    kept = ("split", "image_crc32", "label_crc32")
    return content | {r[IMAGE]: " ".join(r[key] for key in kept) for r in prepared["subvolumes"]}


def refuse_other_data(saved: dict[str, str], prepared: dict[str, Any], folder: Path) -> None:
    """Raise InputError unless data have the `describe_content` that a run began with."""
    now = describe_content(prepared)
    changed = sorted(key for key in saved | now if saved.get(key) != now.get(key))
    if changed:
        was, became = (content.get(changed[0], "missing") for content in (saved, now))
        what = f"{len(changed)} entries differ: {changed[0]} was {was}, is {became}"
        remedy = "give the same --data, or start another --run-folder with --pretrained"
        raise InputError(f"{folder}: not the data that this run began with, {what}; {remedy}")


def refuse_damaged(prepared: dict[str, Any], folder: Path, rank: int = 0, size: int = 1) -> None:
    """Raise InputError unless the files of training and validation have their checksums."""
    used = [r for r in prepared["subvolumes"] if r["split"] in SPLITS[:2]][rank::size]
    for record in show_progress(used, desc="verifying", unit="file"):
        for key in (IMAGE, LABEL):
            path, expected = folder / record[key], record[f"{key}_crc32"]
            content = path.read_bytes() if path.is_file() else None
            found = "missing" if content is None else f"{isal_zlib.crc32(content):08x}"
            if found != expected:
                what = f"was changed after prepare.py wrote it ({found}, expected {expected})"
                raise InputError(f"{path}: {what}; prepare it again")


def read_fold(folder: Path, fold: int | str) -> dict[str, Any]:
    """Return prepared data; of data with folds, `fold` is the one that is validated."""
    prepared = read_prepared(folder)
    return part_folds(prepared, fold, folder) if prepared["settings"].get("folds") else prepared


def choose_fold(prepared: dict[str, Any], fold: int | str, folder: Path) -> dict[str, Any]:
    """Return prepared data as `fold` asks; those without folds keep their split."""
    asked = prepared["settings"].get("folds") or fold != 0
    return part_folds(prepared, fold, folder) if asked else prepared


def part_folds(prepared: dict[str, Any], fold: int | str, folder: Path) -> dict[str, Any]:
    """Return prepared data in which one fold validates and the others train; "all": none does."""
    settings, everything = prepared["settings"], fold == "all"
    count = settings.get("folds") or 0
    parts = [record.get("fold") for record in prepared["subvolumes"]]
    if not everything and (fold not in range(count) or None in parts):
        has = f"folds 0 to {count - 1}" if count and None not in parts else "no folds"
        what = f"--fold must be one of the data's, or all, got {fold}"
        raise InputError(f"{what}; {folder} has {has}, prepare.py --folds 5 makes five")
    split = {
        key: [record | {"split": SPLITS[record.get("fold") == fold]} for record in prepared[key]]
        for key in ("cases", "subvolumes")
    }
    return prepared | split | {"settings": settings | ({"validation": 0.0} if everything else {})}


def check_splits(prepared: dict[str, Any], labels: Labels, folder: Path) -> bool:
    """Return whether there is validation; raise InputError for data that cannot be trained on."""
    found, settings = {record["split"] for record in prepared["subvolumes"]}, prepared["settings"]
    wanted = settings.get("split") is None and settings.get("validation", 1) > 0
    for split, asked in {"training": True, "validation": wanted}.items():
        if asked and split not in found:
            what = f"{folder / 'dataset.json'}: no sub-volume in the {split} split"
            remedy = "prepare three patients or more, or leave validation out: --validation 0"
            raise InputError(f"{what}; {remedy}")
    names = list(labels)[1:]
    seen = {s: count_voxels(prepared, labels, s)[1:] for s in ("training", "validation")}
    if not seen["training"].any():
        raise InputError(f"{folder}: no training patient has {', '.join(names)}; check --labels")
    for split in [split for split in seen if split in found]:
        lacking = [n for n, voxels in zip(names, seen[split].tolist(), strict=True) if not voxels]
        if lacking and is_first_process():
            print(f"warning: no {split} patient has {', '.join(lacking)}: its Dice is undefined")
    if not seen["validation"].any() and is_first_process():
        print("without validation there is no best.pt; last.pt is the network to apply")
    return bool(seen["validation"].any())


def count_voxels(prepared: dict[str, Any], labels: Labels, split: str) -> np.ndarray:
    """Return the annotated voxels of each class in the sub-volumes of a split."""
    counts, unknown = np.zeros(len(labels)), {IGNORED, *prepared.get("ignore", ())}
    for record in [r for r in prepared["subvolumes"] if r["split"] == split]:
        judged = {int(raw): n for raw, n in record["voxels_per_label"].items()}
        for raw in judged.keys() - unknown:
            classes = (i for i, values in enumerate(labels.values()) if raw in values)
            counts[next(classes, 0)] += judged[raw]
    return counts


def read_cases(folder: Path, split: str, fold: int | str) -> list[Case]:
    """Return the cases of one split of prepared data, with what prepare.py was told about them."""
    prepared, path = read_fold(folder, fold), folder / "dataset.json"
    settings = prepared["settings"]
    try:
        described = Description(as_labels(prepared["labels"]), tuple(prepared.get("ignore", ())))
        chosen = [record for record in prepared["cases"] if record["split"] == split]
        cases = [
            Case(
                record["case"], record["patient"], Path(record[IMAGE]),
                restore_label(record[LABEL]), described=described,
                trust_grid=bool(record.get("trust_image_grid")),
                modality=settings.get("modality") or "",
                warnings=tuple(record.get("warnings", ())),
                accepted=tuple(record.get("accepted", settings.get("accept") or ())),
                drawn=(int(record.get("drawn_slice", 0)), int(settings.get("label_every") or 1)),
                alone=len(chosen) == 1,
            )
            for record in chosen
        ]  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"must be as prepare.py writes it, got {error!r}"
        raise InputError(f"{path}: {what}; prepare the data again") from error
    if not cases:
        raise InputError(f"{path}: no case in the {split} split; choose another split")
    if odd := [case.name for case in cases if make_safe(case.name) != case.name]:
        raise InputError(f"{path}: {odd[0]!r} is no case name; prepare the data again")
    return cases
