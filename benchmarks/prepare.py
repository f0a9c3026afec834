"""Time and memory of prepare.py, against the plain nibabel way and against the floor.

    python benchmarks/prepare.py --source ../shared/data/ct

On the same files, in one run, caches warm, medians of --repeats: (a) cutting and writing by
prepare.py with one worker, (b) the plain way: get_fdata, one slicer per sub-volume, nib.save of the
same files, (c) the floor: each file decompressed once by isal, the bytes of (a) written. The check
with its overlay is counted apart. Then the peak memory of one worker on the largest LiTS grid,
512 × 512 × 987, axial and sagittal. Writes benchmarks/results/prepare.json, one entry per source.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bodies
import nibabel as nib
import numpy as np
import tyro
from isal import igzip
from machine import DATA, RESULTS, machine, name_command
from prepare_lits import prepare_one

import prepare
from data.check import Terms, read_data_set
from data.files import read_json, write_json
from data.volumes import Volume, list_slabs, read_file
from prepare import one_core, open_pool, run_cases


@dataclass
class Config:
    source: Path | None = None  # folder with .nii.gz cases; default: painted LiTS grids
    livers: Path = DATA / "lits_labels"  # liver masks to paint around
    work: Path = Path("/tmp/prepare_benchmark")  # folder that is made and removed
    results: Path = RESULTS / "prepare.json"  # JSON to write
    repeats: int = 3  # runs of each way; the median counts
    memory: bool = True  # also measure the memory on 512 × 512 × 987
    first: int = 118  # of the LiTS masks to paint around, without --source
    cases: int = 8  # number of them: enough that two workers are not idle at the end


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds, and seconds of this process's CPU, which other programs do not change."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def plain_way(records: list[dict], destination: Path) -> None:
    """(b) As tutorials do it, on the same sub-volumes and with the same file formats."""
    for record in records:
        folder = destination / record["case"]
        folder.mkdir(parents=True)
        image, label = (
            nib.as_closest_canonical(nib.load(record[key])) for key in ("image", "label")
        )
        _, outline = image.get_fdata(), label.get_fdata()
        for first, last in list_slabs(outline.shape[2], 16, reach_back=True):
            if outline[:, :, first:last].any():
                nib.save(image.slicer[:, :, first:last], folder / f"image_{first:04d}.nii")
                nib.save(label.slicer[:, :, first:last], folder / f"label_{first:04d}.nii.gz")


def floor(records: list[dict], pieces: dict[Path, bytes], destination: Path) -> None:
    """(c) Nothing but one decompression of each file and the writing of the same bytes."""
    for record in records:
        for key in ("image", "label"):
            with igzip.open(record[key]) as stream:
                while stream.read(1 << 20):
                    pass
        for path, content in pieces.items():
            if path.parent.name == record["case"]:
                target = destination / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


def cut_all(
    records: list[dict], config: prepare.Config, terms: Terms, pool: ProcessPoolExecutor | None
) -> None:
    """(a) What prepare.py does once the check is done."""
    alone = contextlib.nullcontext() if pool else one_core()
    with contextlib.redirect_stderr(io.StringIO()), alone:
        run_cases(pool, prepare.cut_case, records, config, terms, title="cutting")


def check_all(config: prepare.Config) -> tuple[list[dict], Terms, list[tuple[float, float]]]:
    """Records of all cases, what they were checked against, and the seconds of each."""
    cases, terms = read_data_set(config)
    prepare.check_case(cases[0], config, terms)  # libraries are loaded once, not per case
    shutil.rmtree(config.destination)
    records: list[dict] = []
    with one_core():
        times = [
            seconds(lambda case=case: records.append(prepare.check_case(case, config, terms)))
            for case in cases
        ]
    return records, terms, times


def in_turns(
    records: list[dict], terms: Terms, settings: prepare.Config, config: Config
) -> tuple[dict[str, list], int]:
    """Seconds of the ways, which take turns; the first turn warms up. And the sub-volumes."""
    times: dict[str, list] = {"a": [], "b": [], "c": [], "two": []}
    cut, pieces = settings.destination / "subvolumes", {}
    with open_pool(2, 2) as pool:
        for index in range(config.repeats + 1):
            shutil.rmtree(cut, ignore_errors=True)
            two = seconds(lambda: cut_all(records, settings, terms, pool))
            shutil.rmtree(cut)
            one = seconds(lambda: cut_all(records, settings, terms, None))
            pieces = {path: path.read_bytes() for path in cut.rglob("*.nii*")}
            least = seconds(lambda: floor(records, pieces, config.work / "c"))  # noqa: B023
            plain = seconds(lambda: plain_way(records, config.work / "b"))
            shutil.rmtree(config.work / "b")
            shutil.rmtree(config.work / "c")
            for way, run in zip(times, (one, plain, least, two), strict=True):
                times[way] += [run] * (index > 0)
    return times, len(pieces) // 2


def measure(source: Path, config: Config) -> dict[str, Any]:
    """Seconds of all ways on the cases of `source`."""
    settings = prepare.Config(source=source, destination=config.work / "a", workers=1)
    records, terms, check = check_all(settings)
    times, subvolumes = in_turns(records, terms, settings, config)
    wall, cpu = (
        {way: statistics.median(run[clock] for run in runs) for way, runs in times.items()}
        for clock in (0, 1)
    )
    clocks, slices = {"wall": wall, "cpu": cpu}, sum(record["slices"] for record in records)

    def each(of: Callable[[dict], float], digits: int) -> dict[str, float]:
        return {clock: round(of(medians), digits) for clock, medians in clocks.items()}

    return {
        "n": len(records),
        "shapes": [" x ".join(map(str, record["shape"])) for record in records],
        "slices": slices,
        "subvolumes": subvolumes,
        "repeats": config.repeats,
        "a_prepare_s": each(lambda t: t["a"], 3),
        "b_plain_nibabel_s": each(lambda t: t["b"], 3),
        "c_floor_s": each(lambda t: t["c"], 3),
        "faster_than_plain": each(lambda t: t["b"] / t["a"], 2),
        "times_the_floor": each(lambda t: t["a"] / t["c"], 2),
        "two_workers_s": {"wall": round(wall["two"], 3)},
        "speedup_of_two_workers": round(wall["a"] / wall["two"], 2),
        "cut_ms_per_slice": round(1000 * wall["a"] / slices, 2),
        "check_s_mean": {
            clock: round(statistics.mean(run[index] for run in check), 2)
            for index, clock in enumerate(clocks)
        },
        "check_s_per_case": [round(run[0], 2) for run in check],
        "load_average": round(os.getloadavg()[0], 1),
    }


def measure_memory(config: Config) -> dict:
    """Peak MB of one worker above the loaded program, on the largest grid of LiTS."""
    result = {}
    for name in ("axial", "sagittal"):
        work = config.work / name
        paint(config, work / "raw", 127, 1)
        if name == "sagittal":
            for path in (work / "raw").rglob("*.nii.gz"):
                turn(path)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result[name] = pool.apply(prepare_one, (work,))
        shutil.rmtree(work)
    return result


def turn(path: Path) -> None:
    """Store a volume anew, so that the slices of its file lie along the patient's x."""
    axes = np.array([[1, 1], [2, 1], [0, 1]])
    image = read_file(path).to_nibabel().as_reoriented(axes)
    Volume(np.asfortranarray(image.dataobj), image.affine, header=image.header).write(path)


def paint(config: Config, folder: Path, first: int, cases: int) -> None:
    bodies.main(bodies.Config(folder, cases, first, livers=config.livers))


def main(config: Config) -> None:
    config.work.mkdir()
    try:
        source = config.source or config.work / "raw"
        if not config.source:
            paint(config, source, config.first, config.cases)
        last = config.first + config.cases - 1
        painted = f"CT painted around LiTS masks {config.first}-{last}, full size"
        name = f"{source.parent.name}/{source.name}" if config.source else painted
        known = read_json(config.results) if config.results.exists() else {}
        known |= {
            "machine": machine(),
            name: {"command": name_command(), **measure(source, config)},
        }
        if config.memory:
            known["memory on 512 x 512 x 987"] = measure_memory(config)
    finally:
        shutil.rmtree(config.work)
    write_json(known, config.results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
