"""Step 1: check raw CTs with label maps, split them by patient, cut sub-volumes of 16 slices.

    python prepare.py data/raw

Lists what was recognised and checks every case before it cuts any; read the table of findings.
Writes under `--destination`: `check/<case>.png`, RAS sub-volumes
`subvolumes/<case>/image_<first slice>.nii` and `label_….nii.gz`, every voxel at its physical
position, and last `dataset.json`: where it exists, the folder is complete. Nothing is resampled
and no intensity is changed. Stopped at any moment, the same command continues where it was. Of a
patient only geometry and the names of files and folders are kept. The next step: preprocess.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))  # Python's safe path leaves it out

from data.labels import ACCEPTABLE, FOREGROUND
from data.settings import Count, Positional, Seed, Share, Whole, read_settings, run_script


@dataclass
class Config:
    source: Positional[Path] = Path("data/raw")  # folder with the scans, as downloaded
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
    trust_image_grid: tuple[str, ...] | None = None  # cases whose label map is laid on the scan
    # voxel on voxel; without names: all whose headers disagree
    accept: tuple[ACCEPTABLE, ...] = ()  # errors to take as warnings
    leave_out: tuple[str, ...] = ()  # cases not to use
    overwrite: bool = False  # remove what was prepared here from another source
    compress: bool = False  # gzip the images too: half the disk, twice the time
    workers: Whole = 0  # processes; 0 means one per core


if __name__ == "__main__":  # help and mistakes need no heavy library
    CONFIG = read_settings(Config, __doc__)

import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from data import check, splits
from data.datasets import Case
from data.files import InputError, lock_folder, read_record, write_json
from data.labels import IMAGE, LABEL, as_plain
from data.scans import list_cuts, mark_undrawn, stamp_inputs
from data.settings import check_settings, format_seconds, human_bytes, show_progress
from data.volumes import AIR_HU, BODY_HU, Volume, find_body, find_bounding_box

CUT = 4  # of the sub-volumes: what an earlier version of this file cut is cut again
UNFINISHED = ".prepare_unfinished"  # folder of the cases that are being cut
OURS = re.compile(r"case\.json|(image|label)_\d{4,}\.nii(\.gz)?")  # files of a case's folder
STOPS = (signal.SIGINT, signal.SIGTERM)
ALL = (slice(None), slice(None))  # of a slice
Record = dict[str, Any]  # of a case: what the check found, later its entry in dataset.json


def main(config: Config) -> None:
    refuse_settings(config)
    everything, terms = check.read_data_set(config)
    splits.name_patients(everything, config)
    cases = choose_cases(everything, config) if config.leave_out else everything
    workers = min(config.workers or os.cpu_count() or 1, len(cases))
    with lock_folder(config.destination):
        claim_destination(config.destination, config.source, config.overwrite)
        remove_leftovers(config.destination)
        try:
            with open_pool(workers) if workers > 1 else contextlib.nullcontext(map) as do_each:
                do = partial(check_once, config=config, terms=terms)
                bar = {"total": len(cases), "desc": "checking", "unit": "case"}
                records = list(show_progress(do_each(do, cases), **bar))
                told = check.compare_cases(records, terms)
                table = config.destination / "check" / "check.csv"
                check.report_cases(records, told, config.accept, table)
                if not config.check_only:
                    cut_cases(do_each, records, [text for _, text in told], config, terms)
                    remove_gone(config.destination, {case.name for case in everything})
        except KeyboardInterrupt as stop:
            command = f"python {shlex.join(sys.argv)}"
            raise KeyboardInterrupt(f"finished cases are kept, to go on:\n{command}") from stop
        finally:
            remove_leftovers(config.destination)
    report_next(records, config)


def refuse_settings(config: Config) -> None:
    """Raise InputError for settings that contradict each other, before anything is read."""
    check_settings(config)
    if config.folds == 1:
        raise InputError("--folds must be 2 or more, got 1; 0 makes none")
    parts = (config.training, config.validation, config.test)
    if not np.isclose(sum(parts), 1) or config.training == 0:
        what = "--training, --validation and --test must add up to 1, training above 0"
        raise InputError(f"{what}, got {parts}")
    if config.crop_to_body and (config.modality != "CT" or not config.subvolume_depth):
        raise InputError("--crop-to-body is of sub-volumes of CT; leave it out")
    try:
        re.compile(config.patient_pattern)
    except re.error as error:
        what = f"--patient-pattern {config.patient_pattern}"
        raise InputError(f"{what}: is no regular expression ({error})") from error


def choose_cases(cases: list[Case], config: Config) -> list[Case]:
    """Return the cases without those of --leave-out."""
    if missing := sorted(set(config.leave_out) - {case.name for case in cases}):
        print(f"--leave-out: there is no such case: {', '.join(missing)}")
    if not (kept := [case for case in cases if case.name not in config.leave_out]):
        raise InputError(f"--leave-out names all {len(cases)} cases; leave one in")
    return kept


def report_next(records: list[Record], config: Config) -> None:
    """Print the pictures to look at and the next command; raise InputError if cases have errors."""
    print(f"look at {config.destination / 'check'}: a picture of each case")
    wrong = sum(bool(check.list_errors(record, config.accept)) for record in records)
    if wrong < len(records) and not config.check_only:
        script = "preprocess.py" if config.subvolume_depth else "train.py laptop"  # of patches
        print(f"next: python {script} --data {config.destination}")
    if wrong:
        what = f"{wrong} of {len(records)} cases have errors, see above"
        raise InputError(f"{what}; correct them, or name them in --leave-out")


def check_once(case: Case, config: Config, terms: check.Terms) -> Record:
    """Return the record of a case, of an earlier run if its inputs and settings are the same."""
    settings = [CUT, asdict(terms), config.compress, config.crop_to_body, config.keep_empty]
    settings += [config.keep_empty and config.seed]
    with contextlib.suppress(OSError, InputError):  # the check tells what cannot be read
        settings += stamp_inputs([case.image, case.label])
    mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    path = config.destination / "check" / f"{case.name}.json"
    record = read_record(path, mark)
    if not record:
        record = check.check_case(case, terms, path.parent) | {"mark": mark}
        if "slice_sums" in record:  # a fault is looked at again
            write_json(record, path)
    return record | {"patient": case.patient}


def cut_cases(
    do_each: Callable, records: list[Record], notes: list[str], config: Config, terms: check.Terms
) -> None:
    """Cut the sound cases and write `dataset.json`; a case that cannot be cut gets a finding."""
    sound = [record for record in records if not check.list_errors(record, config.accept)]
    if not sound:
        return
    split = splits.split_patients(sound, config)
    folds = splits.divide_patients(sound, config) if config.folds else {}
    (config.destination / "dataset.json").unlink(missing_ok=True)
    cut, results = do_each(partial(cut_case, config=config, terms=terms), sound), list[Record]()
    begin = time.perf_counter()
    for result in show_progress(cut, total=len(sound), desc="cutting", unit="case"):
        if not results and result.get("subvolumes"):
            foresee(sound, result, time.perf_counter() - begin, config)
        results.append(result)
    for record, result in zip(sound, results, strict=True):
        if "fault" in result:
            record["findings"].append(tuple(result["fault"]))
            print(f"error: {record['case']}: {result['fault'][1]}")
            continue
        record |= {key: result[key] for key in ("covered_foreground_voxels", "subvolumes")}
        record["split"] = split[record["patient"]]
        if folds:
            record["fold"] = folds[record["patient"]]
    cut = [record["subvolumes"] for record in sound if "split" in record]
    if cut and not any(record["foreground_voxels"] for record in sound if "split" in record):
        what = "no case holds foreground; correct what the check found, or name it by --foreground"
        raise InputError(f"{config.source}: {what}")
    if cut:
        write_dataset(records, notes, config, terms)


def foresee(sound: list[Record], first: Record, seconds: float, config: Config) -> None:
    """Print disk and time of all cases, by those of the first; InputError for too small a disk."""
    voxels = [math.prod(record["shape"]) for record in sound]
    pieces, more = first["subvolumes"], sum(voxels[1:]) / voxels[0]
    size = sum(piece[f"{key}_bytes"] for piece in pieces for key in (IMAGE, LABEL)) * more
    free = shutil.disk_usage(config.destination).free
    told = f"{config.destination}: about {human_bytes(size)} more for {len(sound)} cases"
    if size > free:
        remedy = "free some, give another --destination, or --compress"
        raise InputError(f"{told}, but {human_bytes(free)} are free; {remedy}")
    left = seconds * more / (config.workers or os.cpu_count() or 1)
    print(f"{told} ({human_bytes(free)} are free), about {format_seconds(left)}")


def cut_case(record: Record, config: Config, terms: check.Terms) -> Record:
    """Write the sub-volumes of a case and return their entries; or "fault", why it is not read."""
    if known := find_written(record, config.destination):
        return known
    name, size = record["case"], config.subvolume_depth or record["slices"]
    try:
        scan, label = check.read_pair(record, terms)
        whole = config.subvolume_depth and not config.crop_to_body
        frame = ALL if whole else choose_frame(scan, label.data, config)
        marked = mark_undrawn(label.data, record["drawn_slice"], terms.label_every)
        outline = replace(label, data=marked)
        counts = check.count_per_slice(outline.crop((*frame, slice(None))), terms)  # as written
    except Exception as error:
        return {"fault": check.describe_fault(error)}
    cuts = list_cuts(record["slices"], size, terms.label_every, splits.seeded(0, name))
    foreground = np.sum([counts[value] for value in terms.foreground], axis=0)
    entries, covered = [], np.zeros_like(foreground)
    with replace_folder(config.destination / "subvolumes" / name) as folder:
        for first, last in cuts:
            here, chosen = slice(first, last), splits.seeded(config.seed, f"{name}:{first}")
            empty = config.subvolume_depth and not foreground[here].any()
            if empty and chosen >= config.keep_empty:  # a whole case that is accepted stays
                continue
            covered[here] = foreground[here]
            entry: Record = {"case": name, "first_slice": first}
            entry["padded_slices"] = size - (last - first)
            for key, volume in ((IMAGE, scan.ras), (LABEL, outline)):
                entry |= write_piece(volume.crop((*frame, here)), key, entry, folder, config)
            voxels = {str(value): int(number[here].sum()) for value, number in counts.items()}
            entries.append(entry | {"voxels_per_label": voxels})
        result = {"mark": record["mark"], "covered_foreground_voxels": int(covered.sum())}
        write_json(result | {"subvolumes": entries}, folder / "case.json")
    return result | {"subvolumes": entries}


def find_written(record: Record, destination: Path) -> Record | None:
    """Return the entries that an earlier run wrote of this case, if its mark and files agree."""
    known = read_record(destination / "subvolumes" / record["case"] / "case.json", record["mark"])
    for piece, key in itertools.product(known["subvolumes"] if known else (), (IMAGE, LABEL)):
        file = destination / piece[key]
        if not file.is_file() or file.stat().st_size != piece[f"{key}_bytes"]:
            return None
    return known


def choose_frame(scan: Volume, outline: np.ndarray, config: Config) -> tuple[slice, ...]:
    """Return the in-plane box (RAS) of the body and whatever is annotated."""
    kept = np.asarray((outline > 0).any(axis=2))
    if config.subvolume_depth:
        kept[find_body(scan)] = True
    else:
        kept |= (scan.ras.data > BODY_HU).any(axis=2)
    return find_bounding_box(kept) if kept.any() else ALL


def write_piece(piece: Volume, key: str, entry: Record, folder: Path, config: Config) -> Record:
    """Write a sub-volume, padded with air or background; return path, size, checksum, grid."""
    if entry["padded_slices"]:
        air = key == IMAGE and config.modality == "CT"
        piece = pad_piece(piece, entry["padded_slices"], AIR_HU if air else 0)
    ending = ".nii.gz" if config.compress or key == LABEL else ".nii"
    file = folder / f"{key}_{entry['first_slice']:04d}{ending}"
    checksum = piece.write(file)
    return {
        key: f"subvolumes/{entry['case']}/{file.name}",
        f"{key}_bytes": file.stat().st_size,
        f"{key}_crc32": f"{checksum:08x}",
        "shape": list(piece.shape),
        "spacing_mm": [round(step, 6) for step in piece.spacing_mm],
    }


def pad_piece(piece: Volume, missing: int, fill: int) -> Volume:
    """Return a sub-volume with so many slices more of a value, or of the lowest one of its type."""
    if piece.dtype.kind in "iu":
        fill = max(fill, np.iinfo(piece.dtype).min)
    padded = np.pad(piece.data, ((0, 0), (0, 0), (0, missing)), constant_values=fill)
    return Volume(padded, piece.affine)


def write_dataset(
    records: list[Record], notes: list[str], config: Config, terms: check.Terms
) -> None:
    """Write `dataset.json`, with the proof that no foreground is lost, and print a summary."""
    cases, left_out, subvolumes = list[Record](), list[Record](), list[Record]()
    for record in records:
        aside = ("slice_sums", "findings", "mark", "subvolumes")
        entry = {key: value for key, value in record.items() if key not in aside}
        entry["warnings"] = [text for _, text in record["findings"]]
        entry["accepted"] = sorted({kind for kind, _ in record["findings"]} & set(config.accept))
        entry["content"] = check.join_sums(record.get("slice_sums", ()))
        (cases if "split" in entry else left_out).append(entry)
        where = {key: entry[key] for key in ("split", "fold") if key in entry}
        subvolumes += [piece | where for piece in record.get("subvolumes", ())]
    inside = sum(case["foreground_voxels"] for case in cases)
    covered = sum(case["covered_foreground_voxels"] for case in cases)
    if inside != covered:
        raise RuntimeError(f"{inside} foreground voxels, {covered} covered: a fault of prepare.py")
    same = ("source", "destination", "workers", "check_only", "overwrite")  # content without them
    dataset = {
        "schema": splits.PREPARED_SCHEMA,
        "source": str(config.source.resolve()),
        "settings": {key: value for key, value in asdict(config).items() if key not in same},
        "subvolume_depth": config.subvolume_depth,
        "labels": as_plain(terms.labels),
        "foreground": list(terms.foreground),
        "ignore": list(terms.ignore),
        "notes": notes,
        "cases": cases,
        "left_out": left_out,
        "subvolumes": subvolumes,
    }
    for name in splits.SPLITS:  # as MONAI reads them
        chosen = [entry for entry in subvolumes if entry["split"] == name]
        dataset[name] = [{key: entry[key] for key in (IMAGE, LABEL, "case")} for entry in chosen]
    write_json(dataset, config.destination / "dataset.json")
    patients = Counter({case["patient"]: case["split"] for case in cases}.values())
    pieces = f"{len(subvolumes)} sub-volumes" if config.subvolume_depth else "kept whole"
    print(
        f"{config.destination}: {len(cases)} cases, {pieces}; patients "
        f"{' / '.join(f'{patients[name]} {name}' for name in splits.SPLITS)}\n"
        f"foreground voxels: {inside} in, {covered} covered"
    )


@contextlib.contextmanager
def open_pool(workers: int) -> Iterator[Callable]:
    """Yield `map` over worker processes that end with the work, or plain `map` if none start."""
    pool = None
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in STOPS}
    try:  # a process that is started in here ignores both from its first moment
        pool = start_pool(workers)
    except (OSError, NotImplementedError) as error:  # TMPDIR too long for sockets, no /dev/shm
        print(f"one process does all: no others can be started ({error})")
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    try:
        yield pool.map if pool else map
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            what = "the system ended a worker process, most likely for memory"
            raise InputError(f"{what}; run again with fewer --workers") from error
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def start_pool(workers: int) -> Executor:
    """Return processes, forked from a server that loads the libraries once (not on Windows)."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        from multiprocessing.forkserver import ensure_running

        context.set_forkserver_preload(["data.check"])
        ensure_running()
    return ProcessPoolExecutor(min(workers, 61), context, initializer=end_with_parent)


def end_with_parent() -> None:
    """Leave signals to the parent, and end once it has ended, however that happened."""
    for kind in STOPS:
        signal.signal(kind, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def claim_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Keep one source per destination, unless `overwrite` replaces what another one gave."""
    path, asked = destination / "check" / ".source.json", str(source.resolve())
    known = (read_record(path) or {}).get("mark", asked)
    if known != asked and not overwrite:
        remedy = "choose another --destination, or give --overwrite to replace it"
        raise InputError(f"{destination}: was prepared from {known}, not from {asked}; {remedy}")
    if known != asked:
        (destination / "dataset.json").unlink(missing_ok=True)
    write_json({"mark": asked}, path)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which takes the place of `folder` once it is complete."""
    temporary = folder.parent / UNFINISHED / folder.name
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            remove_case(folder)
        temporary.rename(folder)
    except OSError as error:
        remedy = "choose a folder that is writable and has free space; finished cases are kept"
        what = f"cannot be written ({error.strerror or error})"
        raise InputError(f"{folder}: {what}; {remedy}") from error


def remove_case(folder: Path) -> None:
    """Remove the folder of a case; raise InputError where others wrote into it."""
    names = {path.name for path in folder.iterdir()}
    if "case.json" not in names or not all(map(OURS.fullmatch, names)):
        raise InputError(f"{folder}: holds files that prepare.py did not write; move it away")
    shutil.rmtree(folder)


def remove_gone(destination: Path, names: set[str]) -> None:
    """Remove the sub-volumes of cases that the source does not hold any more."""
    for folder in destination.glob("subvolumes/*"):
        if folder.name not in names:
            with contextlib.suppress(InputError, OSError):
                remove_case(folder)


def remove_leftovers(destination: Path) -> None:
    """Remove what a stopped run left unfinished; the lock keeps living ones out of here."""
    shutil.rmtree(destination / "subvolumes" / UNFINISHED, ignore_errors=True)
    for path in [*destination.glob(".*.partial.*"), *destination.glob("check/.*.partial.*")]:
        if re.fullmatch(r"\.\d+\.partial\..+", path.name) and path.is_file():
            path.unlink()


if __name__ == "__main__":
    run_script(main, CONFIG)
