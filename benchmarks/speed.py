"""CPU seconds and memory of the scripts, beside those of an earlier commit: one table of ratios.

    python benchmarks/speed.py --before d2f021e
    python benchmarks/speed.py --steps large --before ""     # only this commit, only one step

Both commits run the same commands in turns, on one thread; CPU seconds, which other programs on the
machine disturb least, are medians of `--repeats`, start of Python included; memory is the peak of
the process. `prepare`, `train` and `apply` take the real CTs of `--source`, `large` a scan of
512 × 512 × 450 voxels, resampled from one of them. Writes benchmarks/results/speed.json.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from machine import DATA, RESULTS, ROOT, machine, name_command

from data.files import write_json
from data.scans import read_volume
from data.volumes import Volume

STEPS = {  # step → its command; {out} is removed before each run, {kept} is of an earlier step
    "help": "apply_model.py --help",
    "prepare": "prepare.py {source} --destination {out} --workers 1",
    "train": "train.py --data {prepare} --run-folder {out} --network unet --input-size 128 128 "
    "--max-epochs 1 --device cpu --precision fp32",
    "apply": "apply_model.py {source}/imagesTr --truth {source}/labelsTr "
    "--checkpoint checkpoints/starter.pt --destination {out} --device cpu --precision fp32",
    "large": "apply_model.py {work}/large.nii.gz --checkpoint checkpoints/starter.pt "
    "--destination {out} --device cpu --precision fp32",
}
MEASURED = (  # runs a command in a small process, which reports the seconds and memory of it alone
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
    "stdout=subprocess.DEVNULL); used = resource.getrusage(resource.RUSAGE_CHILDREN); "
    "print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
)
SHAPE = (512, 512, 450)  # of the large scan


@dataclass
class Config:
    source: Path = DATA / "ct"  # real CTs with labels
    work: Path = Path("/tmp/speed_benchmark")  # folder that is made and removed
    results: Path = RESULTS / "speed.json"  # JSON to write
    steps: tuple[str, ...] = tuple(STEPS)  # names in STEPS; train needs prepare
    before: str = ""  # commit to compare with; empty: none
    repeats: int = 3  # runs of each step; the median counts


def make_large(config: Config) -> None:
    """Write a scan of SHAPE: the first of the source, its nearest voxels."""
    scan = read_volume(min((config.source / "imagesTr").glob("[!.]*.nii.gz"))).ras
    places = [np.arange(n) * size // n for n, size in zip(SHAPE, scan.shape, strict=True)]
    steps = np.diag([*(size / n for n, size in zip(SHAPE, scan.shape, strict=True)), 1.0])
    large = Volume(np.asfortranarray(scan.data[np.ix_(*places)]), scan.affine @ steps)
    large.write(config.work / "large.nii.gz")


def run_step(command: str, root: Path) -> tuple[float, float]:
    """Run a command of the commit in `root`; return its CPU seconds and peak memory in MB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    words = [sys.executable, "-c", MEASURED, sys.executable, *command.split()]
    done = subprocess.run(words, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{root}: {command} failed, see above")
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) / 1024


@contextlib.contextmanager
def check_out(config: Config) -> Iterator[dict[str, Path]]:
    """Yield the folders of this code and, beside it, of the earlier commit."""
    beside = config.work / "before"
    if not config.before:
        yield {"now": ROOT}
        return
    git = ["git", "-C", ROOT, "worktree"]
    subprocess.run([*git, "add", "--detach", "--force", beside, config.before], check=True)
    try:
        yield {"now": ROOT, "before": beside}
    finally:
        subprocess.run([*git, "remove", "--force", beside], check=True)


def measure(config: Config, roots: dict[str, Path]) -> dict[str, Any]:
    """Return medians of seconds and MB of each step and commit, and now divided by before."""
    table: dict[str, Any] = {}
    for step in config.steps:
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in roots}
        for _ in range(config.repeats):
            for name, root in roots.items():
                places = {key: config.work / name / key for key in STEPS}
                shutil.rmtree(places[step], ignore_errors=True)
                given = {"source": config.source.resolve(), "work": config.work, **places}
                runs[name].append(run_step(STEPS[step].format(out=places[step], **given), root))
        medians = {
            name: [statistics.median(values) for values in zip(*some, strict=True)]
            for name, some in runs.items()
        }
        row = {n: {"cpu_s": round(s, 2), "peak_mb": round(mb)} for n, (s, mb) in medians.items()}
        if "before" in medians:
            pairs = zip(("cpu", "memory"), medians["now"], medians["before"], strict=True)
            row["ratio"] = {what: round(now / before, 2) for what, now, before in pairs}
        table[step] = row
        print(f"{step:8} {row}", flush=True)
    return table


def main(config: Config) -> None:
    config.work.mkdir()
    try:
        if "large" in config.steps:
            make_large(config)
        with check_out(config) as roots:
            table = measure(config, roots)
    finally:
        shutil.rmtree(config.work)
    about = {"command": name_command(), "before": config.before, "machine": machine()}
    write_json({**about, "steps": table}, config.results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
