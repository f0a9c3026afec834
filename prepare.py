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

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from data.labels import FOREGROUND
from data.settings import read_settings, run_script


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
    crop_to_body: bool = False  # of a CT: sub-volumes lose the air beside the body, so that the
    # network's pixels lie on the patient; on few patients measured better
    keep_empty: float = 0.0  # fraction of the sub-volumes without foreground that is kept
    training: float = 0.70  # fraction of the patients that the network is fitted to
    validation: float = 0.15  # fraction of the patients that choose the checkpoint
    test: float = 0.15  # fraction of the patients that are looked at once, at the end
    seed: int = 0  # of the split and of keep_empty
    folds: int = 0  # cross-validation: parts to divide the patients into; train.py --fold picks one
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


if __name__ == "__main__":  # help and mistakes are told before anything heavy is loaded
    CONFIG = read_settings(Config, __doc__)

import hashlib
import json
import re
import shlex
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from data.boxes import enclose, find_bounding_box
from data.cases import Case, hash_inputs, read_scan
from data.check import (
    FOREGROUND,
    Overlay,
    Terms,
    compare_cases,
    draw_overlay,
    inspect_case,
    read_data_set,
    read_terms_label,
)
from data.descriptions import SPLITS
from data.destination import (
    DestinationError,
    claim_destination,
    read_record,
    remove_leftovers,
    remove_orphans,
    whole_folder,
    writing,
)
from data.files import InputError, lock_folder, write_json, write_signed
from data.findings import count_words, describe_fault, list_errors, print_table, write_table
from data.judges import Finding, count_per_slice, undo_flips
from data.labels import IMAGE, LABEL, as_plain
from data.masks import describe_label, list_cuts, mark_undrawn, restore_label
from data.pieces import find_body, find_written, frame_body, pad_slices, write_piece
from data.processes import open_pool, run_cases
from data.settings import check_settings
from data.splits import (
    divide_patients,
    name_patients,
    refuse_no_validation,
    seeded,
    split_patients,
)
from data.volumes import AIR_HU, Volume

SCHEMA = 1  # of dataset.json
CUT = 3  # of the sub-volumes: what an earlier version of this file cut is cut again


def main(config: Config) -> None:
    refuse_settings(config)
    everything, terms = read_data_set(config)
    name_patients(everything, config)
    cases = leave_out(everything, config)
    with lock_folder(config.destination):
        claim_destination(config.destination, config.source, config.overwrite)
        remove_leftovers(config.destination)
        try:
            with open_pool(config.workers, len(cases)) as pool:
                records = run_cases(pool, check_case, cases, config, terms, title="checking")
                notes = compare_cases(records)
                print_table(records, config.accept)
                write_table(records, config.accept, config.destination / "check" / "check.csv")
                if not config.check_only:
                    cut_cases(pool, records, notes, config, terms)
                    remove_orphans(config.destination, {case.name for case in everything})
        except KeyboardInterrupt as stop:
            command = f"python {shlex.join(sys.argv)}"
            raise KeyboardInterrupt(f"finished cases are kept, to go on:\n{command}") from stop
        finally:
            remove_leftovers(config.destination)
    say_next(records, config)


def refuse_settings(config: Config) -> None:
    """Raise InputError for settings that cannot be, before anything is read."""
    check_settings(config)
    if config.folds == 1:
        raise InputError("--folds must be 2 or more, got 1; 0 leaves them out")
    fractions = (config.training, config.validation, config.test)
    if not np.isclose(sum(fractions), 1) or config.training == 0:
        raise InputError(
            "--training, --validation and --test must add up to 1, training above 0, got "
            f"{fractions}"
        )
    if config.crop_to_body and (config.modality != "CT" or not config.subvolume_depth):
        raise InputError(
            "--crop-to-body is of sub-volumes of CT (whole cases lose their air anyway, MR has no "
            "HU to know it by); leave it out"
        )
    try:
        re.compile(config.patient_pattern)
    except re.error as error:
        raise InputError(
            f"--patient-pattern {config.patient_pattern}: is no regular expression ({error})"
        ) from error
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
        # whole cases are what recipes of patches take
        script = "preprocess.py" if config.subvolume_depth else "train.py laptop"
        print(f"next: python {script} --data {destination}")
    if left_out := len(records) - len(sound):
        elsewhere = f"; the others are in {destination}"
        raise InputError(
            f"{left_out} of {len(records)} cases have errors, see above; correct them, or name "
            f"them in --leave-out{elsewhere if sound and not config.check_only else ''}"
        )


# ---------------------------------------------------------------------------------------
# The check: every case passes through it before anything is cut
# ---------------------------------------------------------------------------------------


def check_case(case: Case, config: Config, terms: Terms) -> dict[str, Any]:
    """Record of a case for `dataset.json` with its findings; draws `check/<case>.png`."""
    about: dict[str, Any] = {"case": case.name, "patient": case.patient}
    about |= {IMAGE: str(case.image), LABEL: describe_label(case.label)}
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
        with writing(memory):
            write_signed(record, memory)
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
    settings += ["body"] * config.crop_to_body
    try:
        content = hash_inputs((case.image, case.label))
    except (OSError, InputError):
        return ""
    return hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()


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
    split, folds = split_patients(sound, config), divide_patients(sound, config)
    refuse_no_validation(split, config)
    for record in sound if folds else ():
        record["fold"] = folds[record["patient"]]
    if not all(find_written(record, config.destination) for record in sound):
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
    if known := find_written(record, config.destination):
        return known
    try:
        with whole_folder(config.destination / "subvolumes" / record["case"]) as folder:
            result = write_subvolumes(record, folder, config, terms)
            with writing(folder):
                write_signed(result, folder / "case.json")
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
    label = read_terms_label(restore_label(record[LABEL]), scan, terms)
    entries, covered = [], np.zeros(record["slices"], np.int64)
    outlines = choose_outlines(label, record, config, terms)
    wanted = [(first, first + outline.shape[2]) for first, (outline, _) in outlines.items()]
    frame = choose_frame(scan, [outline for outline, _ in outlines.values()], config)
    for first, slab in scan.slabs(wanted):
        outline, counts = outlines.pop(first)
        covered[first : first + depth] = sum(counts.get(v, 0) for v in terms.foreground)
        box = frame if config.subvolume_depth else frame_body(slab, outline)
        corner = [box[0].start or 0, box[1].start or 0, first]
        entry = {"case": record["case"], "first_slice": first}
        entry |= {"padded_slices": depth - slab.shape[2]}
        air = AIR_HU if terms.modality == "CT" else 0
        for key, array, fill in ((IMAGE, slab, air), (LABEL, outline, 0)):
            piece = pad_slices(flip_in_memory(array[box]), depth, fill)
            moved = scan.ras_affine @ nib.affines.from_matvec(np.eye(3), corner)
            entry |= write_piece(Volume(piece, moved), key, first, folder, config.compress)
        entry["voxels_per_label"] = {str(value): int(n.sum()) for value, n in counts.items()}
        entries.append(entry)
    return {
        "fingerprint": record["fingerprint"],
        "slices": record["slices"],
        "covered_foreground_voxels": int(covered.sum()),
        "subvolumes": sorted(entries, key=lambda entry: entry["first_slice"]),
    }


def choose_frame(scan: Volume, outlines: list[np.ndarray], config: Config) -> tuple[slice, ...]:
    """The part of each slice that sub-volumes hold: all, or body and whatever is outlined."""
    if not config.crop_to_body:
        return (slice(None),) * 2
    return enclose(find_body(scan), *(find_bounding_box(outline)[:2] for outline in outlines))


def choose_outlines(
    label: Volume, record: dict[str, Any], config: Config, terms: Terms
) -> dict[int, tuple[np.ndarray, dict[int, np.ndarray]]]:
    """First slice → label map (X, Y, Z) and counts per slice, of the sub-volumes to keep."""
    depth, kept = label.ras_shape[2], {}
    values = terms.list_values(label)
    dtype = np.min_scalar_type(max(values))
    size, shift = config.subvolume_depth or depth, seeded(0, record["case"])
    wanted = list_cuts(depth, size, terms.label_every, shift)
    for first, slab in label.slabs(wanted):
        chosen = seeded(config.seed, f"{record['case']}:{first}") < config.keep_empty
        if chosen or undo_flips(slab).any():
            slab = mark_undrawn(slab, first, record.get("drawn_slice", 0), terms.label_every)
            counts = count_per_slice(slab, values)
            if chosen or any(np.any(counts.get(v, 0)) for v in terms.foreground):
                kept[first] = slab.astype(dtype, copy=False), counts
    return kept


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
        where = {key: entry[key] for key in ("split", "fold") if key in entry}
        subvolumes += [piece | where for piece in result["subvolumes"]]
    inside, covered = (
        sum(case[f"{kind}foreground_voxels"] for case in cases) for kind in ("", "covered_")
    )
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
        write_json(dataset, path)
    patients = Counter(split[patient] for patient in {case["patient"] for case in cases})
    print(
        f"{config.destination}: {count_words(len(cases), 'case')}, "
        f"{count_words(len(subvolumes), 'sub-volume')}; patients "
        f"{' / '.join(f'{patients[name]} {name}' for name in SPLITS)}\n"
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


if __name__ == "__main__":
    run_script(main, CONFIG)
