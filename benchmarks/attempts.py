"""Trying something that may crash, hang or eat memory: in a forked process, with limits.

Shared by the attacks of `reliability.py`, each of which yields how its attempts ended.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import RESULTS, ROOT

import apply_model
import prepare
import train
from data import make_phantoms
from data.files import InputError

sys.path.append(str(ROOT / "tests"))
from children import draw_nothing

SOUND, REFUSED = "sound", "refused"
FAULTS = (
    "other exception", "crash", "hang", "wrong grid", "wrong voxels", "not named", "torn file",
    "left behind", "accepted", "wrong end", "slow", "socket opened", "identifier",
    "lost or added file",
)  # fmt: skip
SECONDS = 60  # of CPU that one attempt may take
WAITING = 10 * SECONDS  # that it may take on a clock, on a machine that has other work
MEMORY = 2**30  # bytes that one attempt may allocate beyond what the warm process has
SECRET = "DOE^JANE"


@dataclass
class Config:
    quick: bool = False  # a hundred attempts of each kind, < 4 minutes
    attacks: tuple[str, ...] = ()  # kinds to try, whose results take the old ones' place; none: all
    formats: tuple[str, ...] = ()  # first letters of the formats whose bytes are changed; none: all
    seed: int = 0  # of the mutations: same seed, same bytes
    limit_s: float = 7200.0  # that one kind of attack may take; what is left is not tried
    work: Path = Path("/tmp/reliability_benchmark")  # folder that is made and removed
    results: Path = RESULTS / "reliability.json"  # JSON to write


@dataclass(frozen=True)
class Attempt:
    """One attack and how it ended; `detail` helps to repeat it."""

    row: str
    outcome: str
    detail: str = ""


Outcome = tuple[str, str]  # and its detail


def judge_refusal(work: Callable[[], Any], *names: str) -> Outcome:
    """Sound, or an InputError that holds one of `names`; any other exception is a fault."""
    try:
        work()
    except InputError as error:
        named = not names or any(name in str(error) for name in names)
        return (REFUSED if named else "not named"), str(error)[:300]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return "other exception", f"{type(error).__name__}: {error} ({where})"[:300]
    return SOUND, ""


def try_forked(
    row: str, count: int, attempt: Callable[[int], Outcome], batch: int = 100
) -> Iterator[Attempt]:
    """Attempts 0 … count − 1, `batch` of them in each child; a child that dies is counted."""
    done = 0
    while done < count:
        last = min(done + batch, count)
        lines, status = in_child(lambda write, a=done, b=last: _try_some(a, b, attempt, write))
        for outcome, detail in lines:
            yield Attempt(row, outcome, detail)
        done += len(lines)
        if done < last:
            killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            hung = killed in (signal.SIGALRM, signal.SIGPROF)
            yield Attempt(row, "hang" if hung else "crash", f"number {done}")
            done += 1


def in_child(work: Callable[[Callable[[Any], None]], None]) -> tuple[list[Any], int]:
    """What `work(write)` writes in a forked child, object by object, and how the child ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            os.close(reading)
            stream = os.fdopen(writing, "wb", buffering=0)
            work(lambda item: stream.write(pickle.dumps(item)))
        os._exit(0)
    os.close(writing)
    items = []
    with os.fdopen(reading, "rb") as stream, contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            items.append(pickle.load(stream))
    return items, os.waitpid(child, 0)[1]


def _try_some(first: int, last: int, attempt: Callable, write: Callable[[Any], None]) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    for index in range(first, last):
        limit_time()
        try:
            result = attempt(index)
        except BaseException as error:
            result = "other exception", f"number {index}: {type(error).__name__}: {error}"[:300]
        limit_time(0)
        write(result)


def limit_time(times: float = 1.0) -> None:
    """End this process by a signal after so many times SECONDS of CPU; 0 takes that back."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, times * SECONDS)
    signal.setitimer(signal.ITIMER_REAL, times * WAITING)


# ---------------------------------------------------------------------------------------
# The pipeline on phantoms, which several attacks begin with
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """Six small phantoms on their way, from scans to label maps."""

    folder: Path

    @property
    def raw(self) -> Path:
        return self.folder / "raw"

    @property
    def prepared(self) -> Path:
        return self.folder / "prepared"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def scan(self) -> Path:
        return self.raw / "imagesTr" / "phantom_000.nii.gz"

    @property
    def truth(self) -> Path:
        return self.raw / "labelsTr" / "phantom_000.nii.gz"


SMALL = {
    "input_size": (32, 32), "spacing": (12.0, 12.0), "base_channels": 4, "device": "cpu",
    "precision": "fp32",
}  # fmt: skip
TINY = "--input-size 32 32 --spacing 12 12 --base-channels 4 --device cpu --precision fp32"


def environment() -> dict[str, str]:
    """One thread, no window, no bar."""
    more = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more, "TQDM_DISABLE": "1"}


def build_demo(config: Config) -> Demo:
    """Run the scripts once, forked from this process."""
    demo = Demo(config.work / "demo")

    def build(write: Callable[[Any], None]) -> None:
        try:
            draw_nothing()
            make_phantoms.main(make_phantoms.Config(destination=demo.raw, cases=6, size=32))
            prepare.main(prepare.Config(source=demo.raw, destination=demo.prepared, workers=1))
            given = {"data": demo.prepared, "run_folder": demo.run, "max_epochs": 1}
            train.main(train.Config(**given, **SMALL))
            given = {"checkpoint": demo.run / "best.pt", "destination": demo.results}
            given |= {"paths": (demo.raw / "imagesTr",), "truth": (demo.raw / "labelsTr",)}
            apply_model.main(apply_model.Config(device="cpu", **given))
        except BaseException as error:
            write(f"{type(error).__name__}: {error}")

    if not demo.folder.is_dir() and (failed := in_child(build)[0]):
        raise RuntimeError(f"nothing to attack: {failed[0]}")
    return demo
