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
from data.settings import Count, Seed, Share, Whole, read_settings, run_script


@dataclass
class Config:
    source: tyro.conf.Positional[Path] = Path("data/raw")  # folder with the scans, as downloaded
    destination: Path = Path("data/prepared")  # folder to write
    images: Path | None = None  # folder of the scans, where names do not tell them
    labels: Path | None = None  # folder of their label maps
    values: tuple[str, ...] = ()  # what label values mean, such as liver=6 tumour=7
    foreground: tuple[str, ...] = FOREGROUND  # labels that must not be lost
    modality: Literal["CT", "MR"] = "CT"  # MR: intensities are no HU; kept in dataset.json
    label_every: Count = 1  # only every so many-th slice was drawn; those between are not counted
    subvolume_depth: Whole = 16  # axial slices per sub-volume; 0 keeps cases whole, for patches
    # crop sub-volumes of CT to the body, so that the network's pixels lie on the patient; on few
    # patients measured better
    crop_to_body: bool = False
    keep_empty: Share = 0.0  # fraction of the sub-volumes without foreground that is kept
    training: Share = 0.70  # fraction of the patients that the network is fitted to
    validation: Share = 0.15  # fraction of the patients that choose the checkpoint
    test: Share = 0.15  # fraction of the patients that are looked at once, at the end
    seed: Seed = 0  # of the split and of keep_empty
    folds: Whole = 0  # cross-validation: number of folds of the patients; train.py --fold picks one
    split: Path | None = None  # JSON with lists of cases: training, validation, test
    patients: Path | None = None  # CSV with columns case,patient, where one patient has many scans
    patient_pattern: str = ""  # or: regular expression whose first group, in a case name, is it
    check_only: bool = False  # stop after the check
    trust_image_grid: bool = False  # lay a label map on its scan's grid if only the shapes agree
    accept: tuple[Literal["mirrored", "outside", "hu"], ...] = ()  # errors to take as warnings
    leave_out: tuple[str, ...] = ()  # cases not to use
    overwrite: bool = False  # remove what was prepared here from another source
    compress: bool = False  # gzip the images too: half the disk, twice the time
    workers: Whole = 0  # processes; 0 means one per core


if __name__ == "__main__":  # help and mistakes are told before anything heavy is loaded
    CONFIG = read_settings(Config, __doc__)

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import torch
from isal import isal_zlib
from tqdm import tqdm

from data.check import (
    Finding,
    Overlay,
    Terms,
    compare_cases,
    count_per_slice,
    count_words,
    describe_fault,
    draw_overlay,
    inspect_case,
    list_errors,
    print_table,
    read_data_set,
    read_terms_label,
    undo_flips,
    write_table,
)
from data.datasets import Case
from data.files import (
    InputError,
    lock_folder,
    read_json,
    read_record,
    write_json,
    write_signed,
)
from data.labels import FOREGROUND, IMAGE, LABEL, as_plain
from data.scans import (
    describe_label,
    hash_inputs,
    list_cuts,
    mark_undrawn,
    read_scan,
    restore_label,
)
from data.settings import check_settings, handle_signals
from data.splits import (
    SPLITS,
    divide_patients,
    name_patients,
    refuse_no_validation,
    seeded,
    split_patients,
)
from data.volumes import AIR_HU, BODY_HU, Volume, enclose, find_body, find_bounding_box

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


def open_pool(workers: int, cases: int) -> contextlib.AbstractContextManager:
    """Processes for `run_cases`, one core each; None for one worker. `workers` 0: one per core.

    Forked from a clean server, which loads the libraries once: forking after threads can hang.
    """
    workers = min(workers or os.cpu_count() or 1, cases)
    if workers <= 1:
        return one_core()
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
    context = multiprocessing.get_context("forkserver" if forkserver else None)
    if forkserver:
        from multiprocessing.forkserver import ensure_running

        context.set_forkserver_preload(["data.check"])
        with handle_signals(signal.SIG_IGN):  # what is started in here ignores both from its start
            ensure_running()
    return ProcessPoolExecutor(workers, context, initializer=end_with_parent)


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
        parent = multiprocessing.parent_process()
        assert parent is not None  # a worker has one
        parent.join()
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
    how: dict[str, Any] = {"total": len(jobs), "desc": title, "unit": "case", "disable": None}
    with tqdm(**how) as bar, workers_ended(pool, title):  # None: a bar on a terminal alone
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


OURS = re.compile(r"case\.json|(image|label)_\d{4,}\.nii(\.gz)?")  # files of a case's folder
PARTIAL = re.compile(r"\.(\d+)\.partial\..+")  # unfinished, of the process of this number


class DestinationError(InputError):
    """The destination cannot be written: it ends the run and says nothing about a scan."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in here failed in writing."""
    try:
        yield
    except DestinationError:
        raise
    except (OSError, InputError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise DestinationError(
            f"{path}: cannot be written ({reason or error}); choose a folder that is writable and "
            "has free space, then run the same command again: finished cases are kept"
        ) from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it takes that name once it is complete."""
    temporary = folder.with_name(f".{os.getpid()}.partial.{folder.name}")
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(folder):
            if folder.is_dir():
                remove_case(folder)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_case(folder: Path) -> None:
    """Remove the folder of a case that an earlier run wrote; refuses anybody else's."""
    foreign = [path.name for path in sorted(folder.iterdir()) if not OURS.fullmatch(path.name)]
    if foreign or not (folder / "case.json").is_file():
        raise DestinationError(
            f"{folder}: holds {foreign[0] if foreign else 'no case.json'}, so prepare.py did not "
            "write it; move it away"
        )
    shutil.rmtree(folder)


def remove_leftovers(destination: Path) -> None:
    """Remove what processes that were killed left unfinished."""
    for folder in (destination, destination / "check", destination / "subvolumes"):
        for path in folder.glob(".*.partial.*"):
            name = PARTIAL.fullmatch(path.name)
            if not name:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(int(name[1])).status() != psutil.STATUS_ZOMBIE:
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
            with contextlib.suppress(DestinationError):
                remove_case(folder.parent)
    for record in sorted((destination / "check").glob("*.json")):
        if record.stem not in names and read_record(record):
            record.with_suffix(".png").unlink(missing_ok=True)
            record.unlink()


def claim_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Keep one source per destination; `overwrite` removes what was prepared from another one."""
    mark = destination / "check" / ".source.json"
    asked = str(source.resolve())
    known = read_mark(mark) or read_mark(destination / "dataset.json")
    if known and known != asked:
        if not overwrite:
            raise InputError(
                f"{destination}: was prepared from {known}, not from {asked}; choose another "
                "--destination, or give --overwrite to replace it"
            )
        (destination / "dataset.json").unlink(missing_ok=True)
        remove_orphans(destination, set())
    if known != asked or not mark.is_file():
        with writing(mark):
            write_json({"source": asked}, mark)


def read_mark(path: Path) -> str:
    """The source that a destination was prepared from; empty where that is not known."""
    try:
        return str(read_json(path)["source"])
    except (InputError, KeyError, TypeError):
        return ""


def frame_body(image: np.ndarray, label: np.ndarray) -> tuple[slice, ...]:
    """In-plane box around what is denser than lung, in HU, and around all foreground."""
    body = np.asarray((image > BODY_HU).any(axis=2) | (label > 0).any(axis=2))
    return find_bounding_box(body) if body.any() else (slice(None), slice(None))


def pad_slices(array: np.ndarray, depth: int, fill: int) -> np.ndarray:
    """`array` (X, Y, ≤ depth) with slices of `fill` above it, as far as its type can hold that."""
    if not (missing := depth - array.shape[2]):
        return array
    if array.dtype.kind in "iu":
        fill = max(fill, np.iinfo(array.dtype).min)
    return np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=fill)


def write_piece(
    piece: Volume, key: str, first: int, folder: Path, compress: bool
) -> dict[str, Any]:
    """Write the image or label map of a sub-volume; its file, size and checksum, and its grid."""
    case = folder.name.partition(".partial.")[2]
    file = f"{key}_{first:04d}{'.nii.gz' if compress or key == LABEL else '.nii'}"
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


def find_written(record: dict[str, Any], destination: Path) -> dict[str, Any]:
    """What an earlier run wrote of this case, if source, settings and files are the same; else
    empty. A file that is newer than its record is read again for its checksum."""
    path = destination / "subvolumes" / record["case"] / "case.json"
    known = read_record(path)
    if not known or known["fingerprint"] != record["fingerprint"]:
        return {}
    try:
        written = path.stat().st_mtime_ns
        for entry in known["subvolumes"]:
            for key in (IMAGE, LABEL):
                file = destination / entry[key]
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
    return f"{isal_zlib.crc32(path.read_bytes()):08x}"


if __name__ == "__main__":
    run_script(main, CONFIG)
