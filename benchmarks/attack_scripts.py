"""Whole scripts killed, on full disks, and two at once: what lies there is whole, and the same
command ends as if nothing had happened, byte for byte.

Each runs forked from this warm process, with blank pictures. What differs between two unbroken
runs (seconds, dates) must be readable; everything else must be equal.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import torch
from attack_bytes import same_content
from attempts import REFUSED, SOUND, Attempt, Config, Demo, Outcome, build_demo, limit_time
from machine import ROOT
from PIL import Image

import apply_model
import prepare
import train
import utilities
import visualize_3d
from data import evaluate, volumes
from data.files import InputError, read_json, write_json
from data.labels import as_labels, resolve_classes
from data.settings import pick, run_script, signals_ignored
from data.splits import SPLITS, read_prepared
from preprocess import Chain, cache_split

sys.path.append(str(ROOT / "tests"))
from children import draw_nothing

SMALL = {
    "input_size": (16, 16), "spacing": (16.0, 16.0), "base_channels": 4, "device": "cpu",
    "precision": "fp32",
}  # fmt: skip
VIEWS = {"screenshot": "png", "mesh": "stl", "html": "html"}
LIMITS = 25  # of bytes of a file that are tried, at most


@dataclass(frozen=True)
class Step:
    """A script that writes into a folder; a second call is the command that goes on."""

    name: str
    call: Callable[[Path], None]
    kills: int  # of the long form
    locked: bool = True  # a second process is refused; else both write whole files


def list_steps(demo: Demo) -> list[Step]:
    """Every script that writes, on small phantoms."""
    raw, truth = demo.raw, demo.raw / "labelsTr"
    scans = tuple(sorted((raw / "imagesTr").iterdir())[:3])

    def cut(folder: Path, workers: int) -> None:
        prepare.main(prepare.Config(source=raw, destination=folder, workers=workers))

    few = keep_few(demo.prepared, demo.folder / "few")

    def learn(folder: Path) -> None:
        if (folder / "last.pt").exists():
            train.main(train.Config(resume=folder, device="cpu"))
        else:
            config = {"data": few, "run_folder": folder, "max_epochs": 2}
            train.main(train.Config(**config, **SMALL))

    def cache(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder / "subvolumes").symlink_to(demo.prepared / "subvolumes")
        prepared, config = read_prepared(demo.prepared), train.Config(**SMALL)
        labels = resolve_classes(config.labels, as_labels(prepared["labels"]))
        chain = pick(Chain, config, labels=labels, ignore=(), crop_to_body=False)
        for split in ("training", "validation"):
            cache_split(prepared, folder, split, chain, "cpu", disk_cache=True)

    def segment(folder: Path) -> None:
        config = {"checkpoint": demo.run / "best.pt", "destination": folder, "device": "cpu"}
        apply_model.main(apply_model.Config(paths=scans, truth=(truth,), **config))

    def measure(folder: Path) -> None:
        evaluate.main(evaluate.Config(demo.results, truth, destination=folder))

    def view(folder: Path) -> None:
        files = {
            "screenshot": folder / "a.png",
            "mesh": folder / "a.stl",
            "html": folder / "a.html",
        }
        drawn = {"paths": scans[:1], "label": truth / scans[0].name, "size": (200, 150)}
        visualize_3d.main(visualize_3d.Config(**drawn, **files))

    return [
        Step("prepare.py, 1 worker", lambda folder: cut(folder, 1), 40),
        Step("prepare.py, 2 workers", lambda folder: cut(folder, 2), 20),
        Step("cache of train.py", cache, 30, locked=False),
        Step("train.py", learn, 30),
        Step("apply_model.py", segment, 30),
        Step("data.evaluate", measure, 30, locked=False),
        Step("visualize_3d.py", view, 20, locked=False),
    ]


def keep_few(prepared: Path, folder: Path) -> Path:
    """The same data with two sub-volumes of each split, so that an epoch is short."""
    if not folder.is_dir():
        folder.mkdir()
        content = read_json(prepared / "dataset.json")
        records = [[r for r in content["subvolumes"] if r["split"] == name] for name in SPLITS]
        content["subvolumes"] = [record for some in records for record in some[:2]]
        (folder / "subvolumes").symlink_to(prepared / "subvolumes")
        write_json(content, folder / "dataset.json")
    return folder


# ---------------------------------------------------------------------------------------
# Running and comparing
# ---------------------------------------------------------------------------------------


def fork_step(step: Step, folder: Path, limit: int | None = None) -> tuple[int, int]:
    """Process that runs a step, and the pipe of what it says; `limit`: bytes a file may have."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code: Any = 70
    try:
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        limit_time(2)
        forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        del sys.modules["__main__"].__file__  # workers need not import this benchmark
        draw_nothing()
        if limit is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        run_script(step.call, folder)
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def wait_for(child: int, reading: int) -> tuple[int, str]:
    """Exit code, negative for a signal, and all that a process said."""
    with os.fdopen(reading, errors="replace") as stream:
        told = stream.read()
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), told


def read_tree(folder: Path) -> dict[str, bytes]:
    """Name → content of all files but unfinished ones and locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".partial." not in str(path) and path.name != ".lock"
    }


def is_whole(path: Path) -> bool:
    """Whether a file can be read to its end by what reads its format."""
    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.name.endswith((".nii", ".nii.gz")):
            volumes.read_file(path).read()
        elif path.parent.name == "cache":
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        elif path.suffix == ".pt":
            utilities.load_checkpoint(path)
        return path.stat().st_size > 0
    except (InputError, OSError, zipfile.BadZipFile):
        return False


@dataclass
class Unbroken:
    """What a step leaves that nothing disturbs."""

    files: dict[str, bytes]
    varying: set[str]  # names of files that differ from run to run
    seconds: float

    def compare(self, folder: Path) -> Outcome:
        """Sound where the same files lie there, equal or, where they vary, whole."""
        found = read_tree(folder)
        if odd := sorted(set(found) ^ set(self.files)):
            return "lost or added file", ", ".join(odd[:3])
        for name, content in found.items():
            if name in self.varying:
                same = is_whole(folder / name) and self.is_same(folder / name, name)
            else:
                same = content == self.files[name]
            if not same:
                return "torn file", name
        return SOUND, ""

    def is_same(self, path: Path, name: str) -> bool:
        """Of a checkpoint: the same weights; of a file of the cache: the same content."""
        if path.suffix != ".pt":
            return True
        files = (path, io.BytesIO(self.files[name]))
        one, two = (torch.load(file, weights_only=True) for file in files)
        key = "network_state"
        return same_content(one.get(key, one), two.get(key, two))


def run_unbroken(step: Step, folder: Path) -> Unbroken:
    """Two runs; an exception where one fails, as then there is nothing to attack."""
    trees, seconds = [], 0.0
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        code, told = wait_for(*fork_step(step, folder))
        seconds = time.perf_counter() - start
        if code:
            raise RuntimeError(f"{step.name} alone ends with {code}: {told[-2000:]}")
        trees.append(read_tree(folder))
    varying = {name for name in trees[0] if trees[0][name] != trees[1].get(name)}
    return Unbroken(trees[1], varying, seconds)


def go_on(step: Step, folder: Path, unbroken: Unbroken, what: str) -> Outcome:
    """What lies there is whole; the same command again, and what it leaves is the unbroken run."""
    torn = [str(path) for path in map(folder.joinpath, read_tree(folder)) if not is_whole(path)]
    if torn:
        return "torn file", f"{what}: {torn[0]}"
    code, told = wait_for(*fork_step(step, folder))
    if code:
        return "wrong end", f"{what}; again: {code}: {told[-300:]}"
    outcome, detail = unbroken.compare(folder)
    return outcome, f"{what} {detail}"


# ---------------------------------------------------------------------------------------
# Attacks
# ---------------------------------------------------------------------------------------


def prepare_steps(work: Path, config: Config) -> Iterator[tuple[Step, Path, Unbroken]]:
    demo = build_demo(config)
    os.environ["TQDM_DISABLE"] = "1"
    get_context("forkserver").set_forkserver_preload(["data.check"])  # one for all children
    with signals_ignored():
        forkserver.ensure_running()
    for number, step in enumerate(list_steps(demo)):
        folder = work / str(number) / "out"
        yield step, folder, run_unbroken(step, folder)


def attack_killed_scripts(work: Path, config: Config) -> Iterator[Attempt]:
    """SIGKILL at a random moment of a whole script."""
    for step, folder, unbroken in prepare_steps(work, config):
        rng = random.Random(f"{config.seed} {step.name}")
        for number in range(2 if config.quick else step.kills):
            shutil.rmtree(folder, ignore_errors=True)
            moment = rng.random() * unbroken.seconds
            child, reading = fork_step(step, folder)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            code, _ = wait_for(child, reading)
            what = f"number {number}, after {moment:.2f} s"
            late = " (it was done)" * (code == 0)
            outcome, detail = go_on(step, folder, unbroken, what + late)
            yield Attempt(f"kill: {step.name}", outcome, detail)


def attack_full_scripts(work: Path, config: Config) -> Iterator[Attempt]:
    """A disk on which no file gets larger than so many bytes: for each file of a step one below
    its size, so that every writing fails in its turn."""
    for step, folder, unbroken in prepare_steps(work, config):
        if "2 workers" in step.name:  # who are no children of the process that is limited
            continue
        limits = sorted({0, *(len(content) - 1 for content in unbroken.files.values())})
        few = 3 if config.quick else LIMITS
        for limit in limits[:: max(1, -(-len(limits) // few))]:
            shutil.rmtree(folder, ignore_errors=True)
            code, told = wait_for(*fork_step(step, folder, limit))
            what = f"{limit} bytes: {told.strip()[-200:]}"
            outcome, detail = go_on(step, folder, unbroken, what)
            if outcome == SOUND and code:
                named = str(folder) in told and code == 1
                outcome = REFUSED if named else "not named"
                if "Traceback" in told or "LIVER_DEBUG" in told:
                    outcome = "other exception"
            yield Attempt(f"full disk: {step.name}", outcome, detail)


def attack_script_pairs(work: Path, config: Config) -> Iterator[Attempt]:
    """Two processes of one step into one folder: one does it, the other is refused or finds all
    done; where there is no lock both write the same whole files."""
    for step, folder, unbroken in prepare_steps(work, config):
        for number in range(1 if config.quick else 5):
            shutil.rmtree(folder, ignore_errors=True)
            rivals = [fork_step(step, folder), fork_step(step, folder)]
            ends = [wait_for(*rival) for rival in rivals]
            outcome, detail = unbroken.compare(folder)
            codes = sorted(code for code, _ in ends)
            told = " | ".join(said.strip()[-150:] for code, said in ends if code)
            if codes not in ([0, 0], [0, 1]) or (
                codes[1] and ("write" not in told or "finished" in told)
            ):
                outcome = "wrong end"
            elif codes == [0, 1] and outcome == SOUND:
                outcome = REFUSED if step.locked else "wrong end"
            yield Attempt(f"two at once: {step.name}", outcome, f"number {number} {detail} {told}")
