"""Full disks, kills and rivals: under a file's name lies the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from attack_bytes import write_checkpoint
from attempts import REFUSED, SOUND, Attempt, Config, limit_time, try_forked

import utilities
from data import volumes
from data.files import InputError, write_json
from data.volumes import Volume


def make_writers(work: Path) -> dict[str, Callable[[Path], None]]:
    """Name of a file → what writes it, every way in which this project writes one."""
    rng = np.random.default_rng(0)
    volume = Volume(rng.integers(-1000, 1000, (40, 40, 40)).astype(np.int16), np.diag([2, 2, 2, 1]))
    record = {"numbers": rng.random(2000).tolist()}

    def write_slabs(path: Path) -> None:
        slabs = (slab for _, slab in volume.stored_slabs(8))
        volumes.write_slabs(path, volume, volume.dtype, slabs)

    return {
        "volume.nii": volume.write,
        "checked.nii.gz": volume.write_checked,
        "slabs.nii.gz": write_slabs,
        "record.json": lambda path: write_json(record, path),
        "best.pt": write_checkpoint,
    }


def attack_full_disk(work: Path, config: Config) -> Iterator[Attempt]:
    """A disk that is full after so many bytes: the old file stays, or the new one is whole."""
    for name, write in make_writers(work).items():
        folder = work / f"full_{name}"
        folder.mkdir()
        path = folder / name
        write(path)
        whole = path.read_bytes()
        rng = random.Random(config.seed)
        limits = [0, 1, len(whole) // 2, len(whole) - 1, len(whole)]
        limits += [rng.randrange(len(whole)) for _ in range(5 if config.quick else 60)]

        def attempt(index: int, path=path, write=write, whole=whole, limits=limits):
            path.write_bytes(b"old")
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[index], hard))
            try:
                write(path)
                outcome, detail = SOUND, ""
            except InputError as error:
                outcome = REFUSED if str(path) in str(error) else "not named"
                detail = str(error)[:300]
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            return look_at(path, whole if outcome == SOUND else b"old", outcome), detail

        yield from try_forked(f"full disk: {name}", len(limits), attempt)


def fork_writer(write: Callable[[Path], None], path: Path) -> int:
    """Process that writes `path`; one that hangs is ended."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            limit_time()
            write(path)
        os._exit(0)
    return child


def look_at(path: Path, expected: bytes, outcome: str, strict: bool = True) -> str:
    """The outcome, or a fault where a file is not as it must be or another one lies beside it."""
    if path.read_bytes() != expected and not (path.suffix == ".pt" and expected != b"old"):
        return "torn file"
    return "left behind" if strict and len(list(path.parent.iterdir())) > 1 else outcome


def attack_kills(work: Path, config: Config) -> Iterator[Attempt]:
    """SIGKILL while a file is written: under its name lies the old one or the new one, whole."""
    for name, write in make_writers(work).items():
        folder = work / f"kill_{name}"
        folder.mkdir()
        path, rng = folder / name, random.Random(config.seed)
        write(path)
        whole, start = path.read_bytes(), time.perf_counter()
        write(path)
        duration = time.perf_counter() - start
        for number in range(8 if config.quick else 60):
            path.write_bytes(b"old")
            child = fork_writer(write, path)
            time.sleep(rng.random() * duration * 1.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            content = path.read_bytes()
            fine = content in (b"old", whole) or (path.suffix == ".pt" and is_loaded(path))
            yield Attempt(f"kill: {name}", SOUND if fine else "torn file", f"number {number}")
            for left in folder.glob(".*"):
                left.unlink()


def is_loaded(path: Path) -> bool:
    with contextlib.suppress(InputError):
        return bool(utilities.load_checkpoint(path))
    return False


def attack_pairs(work: Path, config: Config) -> Iterator[Attempt]:
    """Two processes write one file at the same time: it is whole, and nothing else is left."""
    for name, write in make_writers(work).items():
        folder = work / f"pair_{name}"
        folder.mkdir()
        path = folder / name
        write(path)
        whole = path.read_bytes()
        for number in range(4 if config.quick else 20):
            children = [fork_writer(write, path) for _ in range(2)]
            ends = [os.waitpid(child, 0)[1] for child in children]
            outcome = "hang" if any(ends) else look_at(path, whole, SOUND)
            yield Attempt(f"two at once: {name}", outcome, f"number {number}")
