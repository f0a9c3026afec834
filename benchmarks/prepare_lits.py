"""All liver masks of LiTS on their real grids, a CT painted around each, through prepare.py.

    python benchmarks/prepare_lits.py --livers ../shared/data/lits_labels

One case at a time is painted, checked, cut, measured and removed, so that a few GB of disk are
enough for 58,638 slices. Writes benchmarks/results/prepare_lits.json after every case; a new call
goes on behind the last one. Only the folder --work is written to and removed.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import bodies
import numpy as np
import tyro
from machine import DATA, RESULTS, machine
from tqdm import tqdm

import prepare
from data.files import atomic_write, read_json
from data.volumes import read_file


@dataclass
class Config:
    livers: Path = DATA / "lits_labels"  # folder of the liver masks
    work: Path = Path("/tmp/prepare_lits")  # folder for one case; removed afterwards
    results: Path = RESULTS / "prepare_lits.json"  # JSON to write
    first: int = 0  # index of the first mask
    cases: int = 131  # number of masks


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measured(work: Path, check_only: bool) -> tuple[float, float]:
    """Seconds and peak MB above the loaded program of one worker, one case."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory_mb("VmRSS"), time.perf_counter()
    config = prepare.Config(
        source=work / "raw", destination=work / "prepared", check_only=check_only, workers=1,
        training=1.0, validation=0.0, test=0.0,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare.main(config)
    return time.perf_counter() - start, memory_mb("VmHWM") - before


def prepare_one(work: Path) -> dict:
    """Check, then cut (the check is remembered, only the source's bytes are hashed again)."""
    check_s, check_mb = measured(work, check_only=True)
    cut_s, cut_mb = measured(work, check_only=False)
    dataset = read_json(work / "prepared/dataset.json")
    case = dataset["cases"][0]
    kept = [
        int(np.count_nonzero(read_file(work / "prepared" / entry["label"]).read()))
        for entry in dataset["subvolumes"]
    ]
    keys = ("case", "shape", "orientation", "slices", "foreground_voxels", "warnings")
    return {key: case[key] for key in keys} | {
        "covered_foreground_voxels": case["covered_foreground_voxels"],
        "foreground_voxels_in_files": sum(kept),  # the last sub-volume may repeat its neighbour's
        "subvolumes": len(kept),
        "check_s": round(check_s, 3),
        "check_peak_mb": round(check_mb),
        "cut_s": round(cut_s, 3),
        "cut_peak_mb": round(cut_mb),
    }


def main(config: Config) -> None:
    known = read_json(config.results)["cases"] if config.results.exists() else []
    names = {case["case"] for case in known}
    last = min(config.first + config.cases, len(list(config.livers.glob("*.nii*"))))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for index in tqdm(range(config.first, last), unit="case"):
            if f"liver_{index:03d}" in names:
                continue
            bodies.main(bodies.Config(config.work / "raw", 1, index, livers=config.livers))
            known.append(pool.apply(prepare_one, (config.work,)))
            shutil.rmtree(config.work)
            write_results(known, config)


def write_results(cases: list[dict], config: Config) -> None:
    slices = sum(case["slices"] for case in cases)
    lost = [c["foreground_voxels"] - c["covered_foreground_voxels"] for c in cases]
    summary = {
        "command": "python benchmarks/prepare_lits.py --livers ../shared/data/lits_labels",
        "data": "CT painted around the 131 liver masks of LiTS on their own grids, .nii.gz, int16",
        "machine": machine(),
        "n": len(cases),
        "slices": slices,
        "foreground_voxels": sum(case["foreground_voxels"] for case in cases),
        "foreground_voxels_lost": sum(lost),
        "cases_with_loss": sum(map(bool, lost)),
        "check_ms_per_slice": round(1000 * sum(c["check_s"] for c in cases) / slices, 2),
        "check_s_per_case": round(sum(c["check_s"] for c in cases) / len(cases), 2),
        "cut_ms_per_slice": round(1000 * sum(c["cut_s"] for c in cases) / slices, 2),
        "cut_s_per_case": round(sum(c["cut_s"] for c in cases) / len(cases), 2),
        "peak_mb": max(max(c["check_peak_mb"], c["cut_peak_mb"]) for c in cases),
    }
    with atomic_write(config.results) as temporary:
        lines = ",\n  ".join(json.dumps(case, ensure_ascii=False) for case in cases)
        head = json.dumps(summary, indent=1).removesuffix("\n}")
        temporary.write_text(f'{head},\n "cases": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
