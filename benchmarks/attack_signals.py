"""Ctrl-C and SIGTERM in the middle: exit code 130, nothing half-written, and how to go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attempts import SOUND, TINY, WAITING, Attempt, Config, Demo, Outcome, build_demo, environment
from machine import ROOT

from data.settings import ECHO_SECONDS

COPIES = 60  # of each scan, so that no script is done before it is stopped


@dataclass(frozen=True)
class Job:
    """A script, and how it is known that it is in the middle of its work."""

    script: str
    words: str
    begun: Callable[[], bool]
    folder: Path  # that it writes
    told: str  # that its last lines hold


def list_jobs(demo: Demo, work: Path) -> Iterator[Job]:
    many, prepared, run, results = (work / name for name in ("many", "prepared", "run", "results"))
    for kind in ("imagesTr", "labelsTr"):
        (many / kind).mkdir(parents=True)
        for path in sorted((demo.raw / kind).glob("*.nii.gz")):
            for number in range(COPIES):
                shutil.copy(path, many / kind / path.name.replace("_", f"_{number}_", 1))
    yield Job(
        "prepare.py", f"{many} --destination {prepared} --workers 2",
        lambda: any((prepared / "check").glob("*_*.json")), prepared, "prepare.py",
    )  # fmt: skip
    yield Job(
        "train.py", f"--data {demo.prepared} --run-folder {run} --max-epochs 5000 {TINY}",
        lambda: (run / "metrics.csv").is_file(), run, "--resume",
    )  # fmt: skip
    yield Job(
        "apply_model.py",
        f"{many / 'imagesTr'} --checkpoint {demo.run} --destination {results} --device cpu",
        lambda: any(results.glob("*/*.json")), results, "same command again",
    )  # fmt: skip


def stop(job: Job, kind: signal.Signals, again_s: float | None = None) -> Outcome:
    """Start the script, send the signal once it is in the middle, and look at what it leaves.

    `again_s`: seconds after which the signal is sent once more; None: it is not.
    """
    command = [sys.executable, job.script, *job.words.split()]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    start = time.monotonic()
    while process.poll() is None and not job.begun() and time.monotonic() - start < WAITING:
        time.sleep(0.05)
    process.send_signal(kind)
    if again_s is not None:
        time.sleep(again_s)
        process.send_signal(kind)
    try:
        _, errors = process.communicate(timeout=WAITING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "hang", f"went on for {WAITING} s"
    return judge_end(job, process.returncode, errors)


def judge_end(job: Job, code: int, errors: str) -> Outcome:
    left = [str(p) for p in job.folder.rglob("*") if ".partial." in p.name or p.name == ".lock"]
    if left:
        return "left behind", ", ".join(left[:3])
    last = " ".join(errors.strip().splitlines()[-2:])
    if code != 130 or job.told not in last or "Traceback" in errors:
        return "wrong end", f"exit code {code}: {errors[-300:]}"
    return SOUND, last


def attack_signals(work: Path, config: Config) -> Iterator[Attempt]:
    """prepare.py, train.py and apply_model.py, each stopped by both signals."""
    demo = build_demo(config)
    for job in list_jobs(demo, work):
        for kind in (signal.SIGTERM, signal.SIGINT):
            for _ in range(1 if config.quick else 2):
                shutil.rmtree(job.folder, ignore_errors=True)
                yield Attempt(f"{kind.name}: {job.script}", *stop(job, kind))
        for again_s in (0.3,) if config.quick else (0.0, 0.3, 0.8, 1.5):
            if job.script != "train.py" or again_s < ECHO_SECONDS:  # its second stops it at once
                shutil.rmtree(job.folder, ignore_errors=True)
                yield Attempt(f"twice: {job.script}", *stop(job, signal.SIGTERM, again_s))
        if alive := list_children(job.folder):
            yield Attempt(f"signals: {job.script}", "left behind", f"processes {alive}")


def list_children(folder: Path) -> list[int]:
    """Processes that still work for a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found
