"""Step 1: raw CTs with label maps → checked, split by patient, cut into sub-volumes of 16 slices.

    python prepare.py data/raw

What was recognised is listed first, then every case is checked before anything is cut; the table of
findings is worth reading. Writes under `--destination`: `check/<case>.png`, RAS sub-volumes
`subvolumes/<case>/image_<first slice>.nii` and `label_….nii.gz`, every voxel at its own place in
the patient, and last `dataset.json`: where it exists, the folder is complete. Nothing is resampled
and no intensity is changed. Stopped at any moment, the same command goes on where it was. Of a
patient only geometry is kept; the names of files and folders are your own and stay as they are.
The next step is preprocess.py.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import psutil
import torch
import tyro
from tqdm import tqdm

import utilities
from data.cases import Case, hash_inputs, read_label_map, read_scan
from data.check import (
    FOREGROUND,
    Overlay,
    Terms,
    choose_foreground,
    compare_cases,
    count_words,
    describe_fault,
    draw_overlay,
    inspect_case,
    list_errors,
    print_table,
    write_table,
)
from data.judges import Finding, count_per_slice, undo_flips
from data.labels import as_labels, as_plain
from data.volumes import Volume, find_bounding_box, list_slabs
from utilities import AIR_HU, IMAGE, LABEL, InputError

SCHEMA = 1  # of dataset.json
CUT = 2  # of the sub-volumes: what an earlier version of this file cut is cut again
SPLITS = ("training", "validation", "test")
BODY_HU = -500  # between lung and fat
OURS = re.compile(r"case\.json|(image|label)_\d{4,}\.nii(\.gz)?")  # files of a case's folder
PARTIAL = re.compile(r"\.(\d+)\.partial\..+")  # unfinished, of the process of this number


@dataclass
class Config:
    source: tyro.conf.Positional[Path] = Path("data/raw")  # folder with the scans, as downloaded
    destination: Path = Path("data/prepared")  # folder to write
    images: Path | None = None  # folder of the scans, where names do not tell them
    labels: Path | None = None  # folder of their label maps
    values: tuple[str, ...] = ()  # what label values mean, such as liver=6 tumour=7
    foreground: tuple[str, ...] = FOREGROUND  # labels that must not be lost
    modality: Literal["CT", "MR"] = "CT"  # MR: intensities are no HU; kept in dataset.json
    label_every: int = 1  # only every so many-th slice was drawn; those between are not counted
    subvolume_depth: int = 16  # axial slices per sub-volume; 0 keeps cases whole, for patches
    keep_empty: float = 0.0  # fraction of the sub-volumes without foreground that is kept
    training: float = 0.70  # fraction of the patients that the network is fitted to
    validation: float = 0.15  # fraction of the patients that choose the checkpoint
    test: float = 0.15  # fraction of the patients that are looked at once, at the end
    seed: int = 0  # of the split and of keep_empty
    folds: int = 0  # cross-validation: parts to divide the patients into (no test patients)
    fold: int = 0  # which part, from 0, is the validation split
    split: Path | None = None  # JSON with lists of cases: training, validation, test
    patients: Path | None = None  # CSV with columns case,patient, where one patient has many scans
    patient_pattern: str = ""  # or: regular expression whose first group, in a case name, is it
    check_only: bool = False  # stop after the check
    trust_image_grid: bool = False  # lay a label map on its scan's grid if only the shapes agree
    accept: tuple[Literal["mirrored", "outside", "hu"], ...] = ()  # errors to take as warnings
    leave_out: tuple[str, ...] = ()  # cases not to use
    overwrite: bool = False  # remove what was prepared here from another source
    compress: bool = False  # gzip the images too: half the disk, twice the time
    workers: int = 0  # processes; 0 means one per core


def main(config: Config) -> None:
    refuse_settings(config)
    everything, terms = read_data_set(config)
    cases = leave_out(everything, config)
    with utilities.lock_folder(config.destination):
        claim_destination(config)
        remove_leftovers(config.destination)
        try:
            with open_pool(config, len(cases)) as pool:
                records = run_cases(pool, check_case, cases, config, terms, title="checking")
                notes = compare_cases(records)
                print_table(records, notes, config.accept)
                write_table(records, config.accept, config.destination / "check" / "check.csv")
                if not config.check_only:
                    cut_cases(pool, records, notes, config, terms)
                    remove_orphans(config.destination, {case.name for case in everything})
        finally:
            remove_leftovers(config.destination)
    say_next(records, config)


def refuse_settings(config: Config) -> None:
    """Raise InputError for settings that cannot be, before anything is read."""
    fractions = (config.training, config.validation, config.test)
    folds = config.folds == 0 or (config.folds >= 2 and 0 <= config.fold < config.folds)
    rules = {
        "--keep-empty must be 0 to 1": 0 <= config.keep_empty <= 1,
        "--subvolume-depth must be 0 (whole cases) or more": config.subvolume_depth >= 0,
        "--label-every must be 1 or more": config.label_every >= 1,
        "--workers must be 0 (one per core) or more": config.workers >= 0,
        "--folds must be 0 or at least 2, and --fold from 0 to below it": folds,
        "--training, --validation and --test must be ≥ 0 and add up to 1, training above 0": (
            min(fractions) >= 0 and bool(np.isclose(sum(fractions), 1)) and config.training > 0
        ),
    }
    for text, holds in rules.items():
        if not holds:
            names = re.findall(r"--([a-z-]+)", text)
            got = ", ".join(f"{getattr(config, name.replace('-', '_'))}" for name in names)
            raise InputError(f"{text}, got {got}")
    try:
        re.compile(config.patient_pattern)
    except re.error as error:
        raise InputError(f"--patient-pattern {config.patient_pattern}: {error}") from error
    if config.validation == 0 and not (config.folds or config.split):
        print("--validation 0: no patient chooses the checkpoint; train.py needs one that does")


def leave_out(cases: list[Case], config: Config) -> list[Case]:
    """The cases without those of --leave-out."""
    names = {case.name for case in cases}
    for name in config.leave_out:
        if name not in names:
            print(f"--leave-out {name}: there is no such case")
    for name in names:  # they become folders and files of the destination
        if Path(name).name != name or name in (".", ".."):
            raise InputError(f"{config.source}: {name!r} cannot be a case's name; rename its files")
    if not (kept := [case for case in cases if case.name not in config.leave_out]):
        raise InputError(f"--leave-out names all {len(cases)} cases; leave one in")
    return kept


def say_next(records: list[dict[str, Any]], config: Config) -> None:
    """What to look at and the next command; an InputError if cases have errors."""
    destination = config.destination
    sound = [record for record in records if not list_errors(record, config.accept)]
    picture = destination / "check" / f"{sound[0]['case']}.png" if sound else None
    if picture and picture.is_file():
        print(f"look at {picture} and its neighbours, one for each case")
    if sound and not config.check_only:
        print(f"next: python preprocess.py --data {destination}")
    if left_out := len(records) - len(sound):
        elsewhere = f"; the others are in {destination}"
        raise InputError(
            f"{left_out} of {len(records)} cases have errors, see above; correct them, or name "
            f"them in --leave-out{elsewhere if sound and not config.check_only else ''}"
        )


def read_data_set(config: Config) -> tuple[list[Case], Terms]:
    """The cases of the source, and what they are checked against."""
    cases, values = find_cases(config)
    labels = as_labels(values)
    foreground = choose_foreground(config.foreground, labels)
    terms = Terms(
        labels,
        foreground,
        trust_grid=config.trust_image_grid,
        modality=config.modality,
        depth=config.subvolume_depth,
        label_every=config.label_every,
    )
    return cases, terms


# ---------------------------------------------------------------------------------------
# Finding cases: the layouts in which data sets are downloaded
# ---------------------------------------------------------------------------------------


VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", *utilities.ITK_SUFFIXES)
LABEL_WORDS = re.compile(r"label|seg|mask|truth|annot|outline", re.IGNORECASE)


def find_cases(config: Config) -> tuple[list[Case], dict[str, int]]:
    """Cases in the order of their names, and label name → value."""
    source = config.source.absolute()
    if not source.is_dir():
        raise InputError(f"{config.source}: no such folder; give the folder that holds the scans")
    files = files_below(source, config.destination.absolute())
    volumes = [path for path in files if path.name.endswith(VOLUME_SUFFIXES)]
    labels, announced = read_description(files, (1, 2))
    for layout in (decathlon, lits, patient_folders):
        if cases := layout(volumes):
            break
    else:
        layout, (cases, segments) = dicom, dicom(files, volumes)
        labels = name_segments(segments, labels)
    if not cases:
        raise InputError(
            f"{source}: no scans with label maps found among {len(files)} files; expected "
            "imagesTr and labelsTr (Decathlon), volume-N.nii and segmentation-N.nii (LiTS), one "
            "folder per patient with a CT and a file named like label or segmentation, or DICOM "
            "series with DICOM SEG or NIfTI label maps"
        )
    used = {path for case in cases for path in (case.image, case.label)}
    pairs = sum(case.image is not None and case.label is not None for case in cases)
    unused = [path for path in volumes if path not in used]
    print(f"{source}: layout {layout.__name__.replace('_', ' ')}, {pairs} scans with label maps")
    if announced not in (None, pairs):
        print(f"warning: dataset.json announces {announced} cases; download what is missing")
    if unused:
        print(f"not used: {len(unused)} other volumes, such as {unused[0]}")
    repeated = [name for name, n in Counter(case.name for case in cases).items() if n > 1]
    if repeated:
        raise InputError(f"{source}: {', '.join(repeated)} found more than once; keep one of each")
    name_patients(cases, config)
    return cases, labels


def name_segments(segments: dict[str, int], labels: dict[str, int]) -> dict[str, int]:
    """`labels` with the segments that they do not name; tells which value each segment has."""
    values = utilities.segment_values(segments, labels)
    if values:
        told = ", ".join(f"{name} = {value}" for name, value in values.items())
        print(f"label values of the DICOM SEGs, by segment names: {told}")
    spelt = {name.lower() for name in labels}
    return labels | {n: value for n, value in values.items() if n.lower() not in spelt}


def files_below(source: Path, destination: Path) -> list[Path]:
    """All files, also through links; hidden ones (macOS leaves `._x.nii`) and outputs are not."""
    files = []
    for folder, subfolders, names in os.walk(source, followlinks=True):
        subfolders[:] = sorted(
            n for n in subfolders if not n.startswith(".") and Path(folder, n) != destination
        )
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files


def pair_up(images: dict[str, Path], labels: dict[str, Path]) -> list[Case]:
    """Cases in natural order: liver_2 before liver_10."""

    def natural(name: str) -> list[str | int]:
        return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)]

    names = sorted(images.keys() | labels.keys(), key=natural)
    return [Case(name, name, images.get(name), labels.get(name)) for name in names]


def decathlon(volumes: list[Path]) -> list[Case]:
    """imagesTr/liver_3.nii.gz (nnU-Net: liver_3_0000.nii.gz) and labelsTr/liver_3.nii.gz."""
    folders = defaultdict(dict)
    for path in volumes:
        folders[path.parent.name][utilities.case_name(path)] = path
    images, labels = folders["imagesTr"], folders["labelsTr"]
    images = {n if n in labels else n.removesuffix("_0000"): path for n, path in images.items()}
    return pair_up(images, labels) if images else []


def lits(volumes: list[Path]) -> list[Case]:
    """volume-3.nii and segmentation-3.nii, in any folders below the source."""
    found = {"volume": {}, "segmentation": {}}
    for path in volumes:
        if match := re.fullmatch(r"(volume|segmentation)-(\d+)", utilities.case_name(path)):
            kind, name = match[1], f"volume-{match[2]}"
            if other := found[kind].get(name):
                raise InputError(f"{other} and {path}: two files of one case; keep one of them")
            found[kind][name] = path
    return pair_up(found["volume"], found["segmentation"]) if found["volume"] else []


def patient_folders(volumes: list[Path]) -> list[Case]:
    """A folder per patient with one CT and one label map, known by its name."""
    folders = defaultdict(lambda: ([], []))
    for path in volumes:
        folders[path.parent][bool(LABEL_WORDS.search(path.name))].append(path)
    if not any(images and labels for images, labels in folders.values()):
        return []
    images, labels = {}, {}
    for folder, (scans, outlines) in folders.items():
        if len(scans) > 1 or len(outlines) > 1:
            raise InputError(
                f"{folder}: must hold one CT and one label map, got {len(scans)} and "
                f"{len(outlines)}; give each scan its own folder"
            )
        images.update((folder.name, path) for path in scans)
        labels.update((folder.name, path) for path in outlines)
    return pair_up(images, labels)


def dicom(files: list[Path], volumes: list[Path]) -> tuple[list[Case], dict[str, int]]:
    """Series and their labels, segment name → number. Names are hashes of series UIDs: no patient's
    name, id or date. A label map is a DICOM SEG that names the series, or see `nifti_label`."""
    series, segments, numbers = defaultdict(list), {}, {}
    for folder in tqdm(sorted({path.parent for path in files}), desc="DICOM folders"):
        for path, header in utilities.dicom_headers(folder).items():
            if header.get("Modality") == "SEG":
                other = segments.setdefault(
                    header.ReferencedSeriesSequence[0].SeriesInstanceUID, path
                )
                if other != path:
                    raise InputError(f"{other} and {path}: DICOM SEGs of one series; keep one")
                for name, number in utilities.segments_of(header).items():
                    if name.lower() not in map(str.lower, numbers):
                        numbers[name] = number
            elif "ImagePositionPatient" in header:
                series[folder, header.SeriesInstanceUID].append((path, header.get("PatientID", "")))
    in_folder, cases, first_of = Counter(folder for folder, _ in series), [], {}
    for (folder, uid), slices in series.items():
        label = segments.get(uid) or nifti_label(folder, volumes, in_folder)
        name = "series_" + hashlib.sha256(uid.encode()).hexdigest()[:10]
        patient = first_of.setdefault(slices[0][1] or name, name)  # the id itself is not kept
        if label:
            cases.append(
                Case(name, patient, folder if in_folder[folder] == 1 else slices[0][0], label)
            )
        else:
            print(f"not used: {folder}, a series of {len(slices)} images without a label map")
    return sorted(cases, key=lambda case: case.name), numbers


def nifti_label(folder: Path, volumes: list[Path], series: Iterable[Path]) -> Path | None:
    """The label map of the series in `folder`: in it, beside it, or anywhere of the folder's name.

    `<folder>_label.nii.gz`, as `apply_model.py` writes it, counts as that name. Beside it any other
    name will do where there is one series and one volume.
    """
    beside = [path for path in volumes if path.parent == folder.parent]
    named = [p for p in volumes if utilities.case_name(p).removesuffix("_label") == folder.name]
    only = [other for other in series if other.parent == folder.parent] == [folder]
    groups = [[path for path in volumes if path.parent == folder]]
    groups += [[path for path in beside if path in named], beside if only else [], named]
    for group in groups:
        if len(group) > 1:
            group = [path for path in group if LABEL_WORDS.search(path.name)]
        if len(group) == 1:
            return group[0]
    return None


def read_description(
    files: Sequence[Path], foreground: Sequence[int]
) -> tuple[dict[str, int], int | None]:
    """Label name → value and number of cases, from a Decathlon or nnU-Net `dataset.json`.

    Without one: background, liver, tumour, and a name for every other foreground value.
    """
    path = next((path for path in files if path.name == "dataset.json"), None)
    if path is None:
        labels = utilities.LABEL_VALUES
        return labels | {f"label {v}": v for v in foreground if v not in labels.values()}, None
    content = utilities.read_json(path)
    try:
        entries = content["labels"].items()
        by_value = all(key.isdigit() for key, _ in entries)
        labels = {str(n): int(v) for v, n in entries} if by_value else dict(entries)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: must have 'labels' (value → name), got {error!r}; correct it, or remove it "
            "to use background 0, liver 1, tumour 2"
        ) from error
    if not set(foreground) & set(labels.values()):
        raise InputError(f"{path}: declares {labels}, none of --foreground {foreground}; choose")
    return labels, content.get("numTraining")


def name_patients(cases: list[Case], config: Config) -> None:
    """Set the patient of each case from --patients or --patient-pattern."""
    if config.patients:
        with config.patients.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or not {"case", "patient"} <= rows[0].keys():
            raise InputError(f"{config.patients}: must have the columns case,patient")
        table = {row["case"]: row["patient"] for row in rows}
        if missing := [case.name for case in cases if case.name not in table]:
            raise InputError(f"{config.patients}: has no row for {', '.join(missing)}; add them")
        for case in cases:
            case.patient = table[case.name]
    elif config.patient_pattern:
        for case in cases:
            match = re.search(config.patient_pattern, case.name)
            if not match or not match.groups():
                raise InputError(
                    f"--patient-pattern {config.patient_pattern}: finds no group in {case.name}; "
                    r"give a pattern like (patient_\d+) that fits every case"
                )
            case.patient = match[1]


# ---------------------------------------------------------------------------------------
# The check: every case passes through it before anything is cut
# ---------------------------------------------------------------------------------------


class DestinationError(InputError):
    """The destination cannot be written: it ends the run and says nothing about a scan."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in here failed in writing."""
    try:
        yield
    except (OSError, InputError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DestinationError(
            f"{path}: cannot be written ({reason or error}); choose a folder that is writable and "
            "has free space, then run the same command again: finished cases are kept"
        ) from error


def check_case(case: Case, config: Config, terms: Terms) -> dict[str, Any]:
    """Record of a case for `dataset.json` with its findings; draws `check/<case>.png`."""
    about = {"case": case.name, "patient": case.patient}
    about |= {IMAGE: str(case.image), LABEL: str(case.label)}
    memory = config.destination / "check" / f"{case.name}.json"
    known = read_record(memory)
    with ThreadPoolExecutor(1) as beside:  # hashing and decompressing let each other run
        mark = beside.submit(fingerprint, case, config, terms)
        if known and known.get("fingerprint") == mark.result():
            return known | about
        record, overlay = inspect_case(case, terms)
        record["fingerprint"] = mark.result()
    if overlay:
        draw_case(case.name, overlay, config, terms)
    sure = record.pop("sure")
    if sure and record["fingerprint"]:  # only what came from reading the scan is remembered
        with writing(memory), utilities.atomic_write(memory) as temporary:
            temporary.write_text(json.dumps(record))
    return record | about


def draw_case(name: str, overlay: Overlay, config: Config, terms: Terms) -> None:
    path = config.destination / "check" / f"{name}.png"
    with writing(path):
        draw_overlay(name, overlay, terms.labels, path)


def fingerprint(case: Case, config: Config, terms: Terms) -> str:
    """SHA-256 of the bytes of a case's files and of the settings that its sub-volumes depend on;
    empty where the files cannot be read."""
    settings = [SCHEMA, CUT, as_plain(terms.labels), terms.foreground, terms.trust_grid]
    settings += [terms.modality, terms.depth, terms.ignore, terms.label_every, config.compress]
    settings += [config.subvolume_depth, config.keep_empty, config.keep_empty and config.seed]
    try:
        content = hash_inputs((case.image, case.label))
    except (OSError, InputError):
        return ""
    return hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """A record that an earlier run kept; empty where there is none that can be used."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and "fingerprint" in content else {}


# ---------------------------------------------------------------------------------------
# Splitting by patient
# ---------------------------------------------------------------------------------------


def split_patients(records: Sequence[dict[str, Any]], config: Config) -> dict[str, str]:
    """Patient → "training", "validation" or "test"; drawn from seed and names alone.

    Rounding: largest remainder, in a tie the earlier split; a split with a fraction above 0 gets at
    least one patient. So 130 patients at 70/15/15 give 91 / 20 / 19.
    """
    if config.split:
        return given_split(records, config.split)
    names = {record["patient"] for record in records}
    patients = sorted(names, key=lambda name: seeded(config.seed, name))
    if config.folds:
        if not (2 <= config.folds <= len(patients) and 0 <= config.fold < config.folds):
            raise InputError(
                f"--folds {config.folds} --fold {config.fold}: must be 2 to {len(patients)} folds "
                "(one patient each at least), and a fold from 0"
            )
        held_out = set(patients[config.fold :: config.folds])
        return {name: SPLITS[name in held_out] for name in patients}
    fractions = np.array([config.training, config.validation, config.test])
    if (fractions < 0).any() or not np.isclose(fractions.sum(), 1) or fractions[0] == 0:
        raise InputError(
            f"--training, --validation and --test must be ≥ 0 and add up to 1, got {fractions}"
        )
    wanted = np.count_nonzero(fractions)
    if len(patients) < wanted:
        raise InputError(
            f"{len(patients)} patients cannot fill {wanted} splits; add patients or set a fraction "
            "to 0 (two patients: --training 0.5 --validation 0.5 --test 0)"
        )
    exact = fractions * len(patients)
    sizes = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(sizes - exact, kind="stable")[: len(patients) - sizes.sum()]:
        sizes[index] += 1
    while (short := (sizes == 0) & (fractions > 0)).any():
        sizes[sizes.argmax()] -= 1
        sizes[short.argmax()] += 1
    return dict(zip(patients, np.repeat(SPLITS, sizes).tolist(), strict=True))


def given_split(records: Sequence[dict[str, Any]], path: Path) -> dict[str, str]:
    """Split from JSON: "training", "validation" and "test", each a list of cases or patients."""
    lists = utilities.read_json(path)
    split = {}
    if not lists or not set(lists) <= set(SPLITS):
        raise InputError(f"{path}: must be JSON with lists of cases under {', '.join(SPLITS)}")
    where = {name: split_name for split_name in lists for name in lists[split_name]}
    if sum(map(len, lists.values())) > len(where):
        raise InputError(f"{path}: names a case in two splits; a case belongs to one")
    for record in records:
        name = where.get(record["case"], where.get(record["patient"]))
        if name is None:
            raise InputError(f"{path}: does not name {record['case']}; add it, or --leave-out it")
        if split.setdefault(record["patient"], name) != name:
            raise InputError(
                f"{path}: puts scans of patient {record['patient']} into two splits, which leaks; "
                "keep them together"
            )
    return split


def seeded(seed: int, name: str) -> float:
    """Number in [0, 1) that depends on seed and name alone: the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---------------------------------------------------------------------------------------
# Cutting
# ---------------------------------------------------------------------------------------


def cut_cases(
    pool: ProcessPoolExecutor | None,
    records: list[dict[str, Any]],
    notes: list[Finding],
    config: Config,
    terms: Terms,
) -> None:
    """Cut the sound cases and write `dataset.json`; what fails in cutting is a finding too."""
    sound = [record for record in records if not list_errors(record, config.accept)]
    if not sound:
        return
    split = split_patients(sound, config)
    if not all(finished(record, config) for record in sound):
        (config.destination / "dataset.json").unlink(missing_ok=True)
    results = run_cases(pool, cut_case, sound, config, terms, title="cutting")
    for record, result in zip(sound, results, strict=True):
        if "fault" in result:
            record["findings"].append(tuple(result["fault"]))
            print(f"error: {record['case']}: {result['fault'][1]}")
    done = {r["case"]: x for r, x in zip(sound, results, strict=True) if "fault" not in x}
    if done:
        write_dataset(done, records, notes, split, terms, config)


def cut_case(record: dict[str, Any], config: Config, terms: Terms) -> dict[str, Any]:
    """Write the sub-volumes of a case; returns them with the proof that no foreground is lost.

    What cannot be read any more, or fails in another way, is returned as a finding, "fault".
    """
    if known := finished(record, config):
        return known
    try:
        with whole_folder(config.destination / "subvolumes" / record["case"]) as folder:
            result = write_subvolumes(record, folder, config, terms)
            with writing(folder):
                (folder / "case.json").write_text(json.dumps(result))
        return result
    except DestinationError:
        raise
    except InputError as error:
        return {"fault": (error.kind, str(error))}
    except Exception as error:
        return {"fault": ("unreadable", describe_fault(error))}


def write_subvolumes(
    record: dict[str, Any], folder: Path, config: Config, terms: Terms
) -> dict[str, Any]:
    """Write the sub-volumes of a case into `folder`: the content of its `case.json`."""
    depth = config.subvolume_depth or record["slices"]
    scan = read_scan(Path(record[IMAGE]))
    label = read_label_map(Path(record[LABEL]), scan, terms.labels, trust_grid=terms.trust_grid)
    entries, covered = [], np.zeros(record["slices"], np.int64)
    outlines = choose_outlines(label, record["case"], config, terms)
    wanted = [(first, first + outline.shape[2]) for first, (outline, _) in outlines.items()]
    for first, slab in scan.slabs(wanted):
        outline, counts = outlines.pop(first)
        covered[first : first + depth] = sum(counts.get(v, 0) for v in terms.foreground)
        box = find_body(slab, outline) if not config.subvolume_depth else (slice(None),) * 2
        corner = [box[0].start or 0, box[1].start or 0, first]
        entry = {"case": record["case"], "first_slice": first}
        entry |= {"padded_slices": depth - slab.shape[2]}
        air = AIR_HU if terms.modality == "CT" else 0
        for key, array, fill in ((IMAGE, slab, air), (LABEL, outline, 0)):
            piece = pad_slices(flip_in_memory(array[box]), depth, fill)
            moved = scan.ras_affine @ nib.affines.from_matvec(np.eye(3), corner)
            entry |= write_piece(Volume(piece, moved), key, first, folder, config)
        entry["voxels_per_label"] = {str(value): int(n.sum()) for value, n in counts.items()}
        entries.append(entry)
    return {
        "fingerprint": record["fingerprint"],
        "slices": record["slices"],
        "covered_foreground_voxels": int(covered.sum()),
        "subvolumes": sorted(entries, key=lambda entry: entry["first_slice"]),
    }


def write_piece(
    piece: Volume, key: str, first: int, folder: Path, config: Config
) -> dict[str, Any]:
    """Write the image or label map of a sub-volume; its file, size and checksum, and its grid."""
    name = PARTIAL.fullmatch(folder.name)
    case = folder.name.partition(".partial.")[2] if name else folder.name
    file = f"{key}_{first:04d}{'.nii.gz' if config.compress or key == LABEL else '.nii'}"
    with writing(folder / file):
        checksum = piece.write(folder / file)
        size = (folder / file).stat().st_size
    return {
        key: f"subvolumes/{case}/{file}",
        f"{key}_bytes": size,
        f"{key}_crc32": f"{checksum:08x}",
        "shape": list(piece.shape),
        "spacing_mm": [round(step, 6) for step in piece.spacing_mm],
    }


def finished(record: dict[str, Any], config: Config) -> dict[str, Any]:
    """What an earlier run wrote of this case, if source, settings and files are the same; else
    empty. A file that is newer than its record is read again for its checksum."""
    path = config.destination / "subvolumes" / record["case"] / "case.json"
    known = read_record(path)
    if not known or known["fingerprint"] != record["fingerprint"]:
        return {}
    try:
        written = path.stat().st_mtime_ns
        for entry in known["subvolumes"]:
            for key in (IMAGE, LABEL):
                file = config.destination / entry[key]
                state = file.stat()
                if state.st_size != entry[f"{key}_bytes"]:
                    return {}
                if state.st_mtime_ns > written and sum_file(file) != entry[f"{key}_crc32"]:
                    return {}
    except (OSError, KeyError, TypeError, AttributeError):
        return {}
    return known


def sum_file(path: Path) -> str:
    """CRC-32 of a file's bytes, as `write_piece` notes it."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


def choose_outlines(
    label: Volume, case: str, config: Config, terms: Terms
) -> dict[int, tuple[np.ndarray, dict[int, np.ndarray]]]:
    """First slice → label map (X, Y, Z) and counts per slice, of the sub-volumes to keep."""
    depth, kept = label.ras_shape[2], {}
    values = sorted({*terms.values, *label.classes.values()})
    dtype = np.min_scalar_type(max(values))
    wanted = list_slabs(depth, config.subvolume_depth or depth, reach_back=True)
    for first, slab in label.slabs(wanted):
        chosen = seeded(config.seed, f"{case}:{first}") < config.keep_empty
        if chosen or undo_flips(slab).any():
            counts = count_per_slice(slab, values)
            if chosen or any(np.any(counts.get(v, 0)) for v in terms.foreground):
                kept[first] = slab.astype(dtype, copy=False), counts
    return kept


def find_body(image: np.ndarray, label: np.ndarray) -> tuple[slice, ...]:
    """In-plane box around what is denser than lung, in HU, and around all foreground."""
    body = (image > BODY_HU).any(axis=2) | (label > 0).any(axis=2)
    return find_bounding_box(body) if body.any() else (slice(None), slice(None))


def pad_slices(array: np.ndarray, depth: int, fill: int) -> np.ndarray:
    """`array` (X, Y, ≤ depth) with slices of `fill` above it, as far as its type can hold that."""
    if not (missing := depth - array.shape[2]):
        return array
    if array.dtype.kind in "iu":
        fill = max(fill, np.iinfo(array.dtype).min)
    return np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=fill)


def flip_in_memory(array: np.ndarray) -> np.ndarray:
    """The same array, its flips done in memory: by torch, which takes a quarter of numpy's time."""
    axes = [axis for axis, step in enumerate(array.strides) if step < 0]
    if not axes or array.itemsize > 8:
        return array
    bits = undo_flips(array).view(f"i{array.itemsize}")  # torch does not flip every type
    with warnings.catch_warnings():  # bytes read from a file may not be written to: nobody does
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(bits.T)
    return tensor.flip([2 - axis for axis in axes]).numpy().T.view(array.dtype)


# ---------------------------------------------------------------------------------------
# Files: whole or not there; nothing is removed that was not written here
# ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it takes that name once it is complete."""
    temporary = folder.with_name(f".{os.getpid()}.partial.{folder.name}")
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(folder):
            if folder.exists():
                remove_case(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_case(folder: Path) -> None:
    """Remove the folder of a case that an earlier run wrote; InputError if it is anybody else's."""
    foreign = [path.name for path in sorted(folder.iterdir()) if not OURS.fullmatch(path.name)]
    if foreign or not (folder / "case.json").is_file():
        raise InputError(
            f"{folder}: holds {foreign[0] if foreign else 'no case.json'}, so prepare.py did not "
            "write it; move it away"
        )
    shutil.rmtree(folder)


def remove_leftovers(destination: Path) -> None:
    """Remove what processes that were killed left unfinished."""
    for folder in (destination, destination / "check", destination / "subvolumes"):
        for path in folder.glob(".*.partial.*"):
            name = PARTIAL.fullmatch(path.name)
            if not name or psutil.pid_exists(int(name[1])):
                continue
            if path.is_file():
                path.unlink()
            elif all(
                PARTIAL.sub("", f.name) == "" or OURS.fullmatch(f.name) for f in path.iterdir()
            ):
                shutil.rmtree(path)


def remove_orphans(destination: Path, names: set[str]) -> None:
    """Remove sub-volumes and pictures of cases that the source does not hold any more."""
    for folder in sorted((destination / "subvolumes").glob("*/case.json")):
        if folder.parent.name not in names and read_record(folder):
            with contextlib.suppress(InputError):
                remove_case(folder.parent)
    for record in sorted((destination / "check").glob("*.json")):
        if record.stem not in names and read_record(record):
            record.with_suffix(".png").unlink(missing_ok=True)
            record.unlink()


def claim_destination(config: Config) -> None:
    """Keep one source per destination; --overwrite removes what was prepared from another one."""
    mark = config.destination / "check" / ".source.json"
    source = str(config.source.resolve())
    known = read_mark(mark) or read_mark(config.destination / "dataset.json")
    if known and known != source:
        if not config.overwrite:
            raise InputError(
                f"{config.destination}: was prepared from {known}, not from {source}; choose "
                "another --destination, or give --overwrite to replace it"
            )
        (config.destination / "dataset.json").unlink(missing_ok=True)
        remove_orphans(config.destination, set())
    with writing(mark):
        utilities.write_json({"source": source}, mark)


def read_mark(path: Path) -> str:
    """The source that a destination was prepared from; empty where that is not known."""
    try:
        return str(json.loads(path.read_bytes())["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def write_dataset(
    done: dict[str, dict[str, Any]],
    records: list[dict[str, Any]],
    notes: list[Finding],
    split: dict[str, str],
    terms: Terms,
    config: Config,
) -> None:
    """Write `dataset.json` last, in one step, with the proof that no foreground is lost."""
    cases, left_out, subvolumes = [], [], []
    for record in records:
        entry = describe_case(record, config)
        if record["case"] not in done:
            left_out.append(entry)
            continue
        result = done[record["case"]]
        entry["split"] = split[record["patient"]]
        entry["covered_foreground_voxels"] = result["covered_foreground_voxels"]
        cases.append(entry)
        subvolumes += [piece | {"split": entry["split"]} for piece in result["subvolumes"]]
    inside = sum(case["foreground_voxels"] for case in cases)
    covered = sum(case["covered_foreground_voxels"] for case in cases)
    if inside != covered:
        raise RuntimeError(f"{inside} foreground voxels, {covered} covered: a fault of prepare.py")
    dataset = describe_settings(config, terms) | {
        "notes": [found for _, found in notes],
        "cases": cases,
        "left_out": left_out,
        "subvolumes": subvolumes,
    }
    for name in SPLITS:
        chosen = [entry for entry in subvolumes if entry["split"] == name]
        dataset[name] = [{key: entry[key] for key in (IMAGE, LABEL, "case")} for entry in chosen]
    path = config.destination / "dataset.json"
    with writing(path):
        utilities.write_json(dataset, path)
    of_split = Counter(split[patient] for patient in {case["patient"] for case in cases})
    patients = " / ".join(f"{of_split[name]} {name}" for name in SPLITS)
    print(
        f"{config.destination}: {count_words(len(cases), 'case')}, "
        f"{count_words(len(subvolumes), 'sub-volume')}; patients {patients}\n"
        f"foreground voxels: {inside} in, {covered} covered"
    )


def describe_case(record: dict[str, Any], config: Config) -> dict[str, Any]:
    """The entry of a case in `dataset.json`."""
    entry = {key: value for key, value in record.items() if key not in ("marks", "findings")}
    entry["warnings"] = [found for _, found in record["findings"]]
    entry["accepted"] = sorted({kind for kind, _ in record["findings"]} & set(config.accept))
    return entry


def describe_settings(config: Config, terms: Terms) -> dict[str, Any]:
    """What `dataset.json` says of the whole: apply_model.py and train.py go by it."""
    aside = ("source", "destination", "workers", "check_only", "overwrite")  # same content
    settings = {key: value for key, value in asdict(config).items() if key not in aside}
    return {
        "schema": SCHEMA,
        "source": str(config.source.resolve()),
        "settings": settings,
        "subvolume_depth": config.subvolume_depth,
        "labels": as_plain(terms.labels),
        "foreground": list(terms.foreground),
        "ignore": list(terms.ignore),
    }


# ---------------------------------------------------------------------------------------
# All cases, in processes
# ---------------------------------------------------------------------------------------


def open_pool(config: Config, cases: int) -> contextlib.AbstractContextManager:
    """Processes for `run_cases`, one core each; None for one worker.

    Forked from a clean server, which loads the libraries once: forking after threads can hang.
    """
    workers = min(config.workers or os.cpu_count() or 1, cases)
    if workers <= 1:
        return one_core()
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
    context = multiprocessing.get_context("forkserver" if forkserver else None)
    if forkserver:
        from multiprocessing.forkserver import ensure_running

        context.set_forkserver_preload(["utilities", "data.check"])
        with signals_ignored():  # whoever is started in here ignores them from its first moment
            ensure_running()
    return ProcessPoolExecutor(workers, context, initializer=end_with_parent)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ctrl-C and SIGTERM do nothing, where signals can be set: in the main thread."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """torch's threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing; it keeps to one core.

    It leaves Ctrl-C and SIGTERM to its parent, which ends it.
    """
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cases(
    pool: ProcessPoolExecutor | None,
    work: Callable[..., dict[str, Any]],
    jobs: Sequence[Any],
    *arguments: Any,
    title: str,
) -> list[dict[str, Any]]:
    """`work(job, *arguments)` for each job, under one bar; results in the order of the jobs."""
    results, slices = {}, 0
    with tqdm(total=len(jobs), desc=title, unit="case") as bar, workers_ended(pool, title):
        if pool is None:
            done = ((index, work(job, *arguments)) for index, job in enumerate(jobs))
        else:
            futures = {pool.submit(work, job, *arguments): i for i, job in enumerate(jobs)}
            done = ((futures[future], future.result()) for future in as_completed(futures))
        for index, result in done:
            results[index] = result
            slices += result.get("slices", 0)
            bar.set_postfix_str(f"{slices / (bar.format_dict['elapsed'] + 1e-9):.0f} slices/s")
            bar.update()
    return [results[index] for index in range(len(jobs))]


@contextlib.contextmanager
def workers_ended(pool: ProcessPoolExecutor | None, title: str) -> Iterator[None]:
    """Whatever ends the work before its time ends the workers too, and nobody waits for them."""
    try:
        yield
    except BaseException as error:
        if pool:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
                process.join()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                f"{title}: a worker process was ended by the system, most likely for memory; run "
                "the same command again with fewer --workers, finished cases are kept"
            ) from error
        raise


if __name__ == "__main__":
    utilities.command_line(main, Config, __doc__)
