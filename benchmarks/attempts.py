"""Trying something that may crash, hang or eat memory: in a forked process, with limits.

Shared by the attacks of `reliability.py`, each of which yields how its attempts ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import RESULTS, ROOT

from data.files import InputError

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


WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[-1] if event != "socket.getaddrinfo" else arguments[0]
        if not isinstance(address, (str, bytes)) or event == "socket.getaddrinfo":
            print("SOCKET", event, address, file=sys.stderr)
            raise OSError("no connection is allowed here")
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
TINY = "--input-size 32 32 --spacing 12 12 --base-channels 4 --device cpu --precision fp32"


def environment() -> dict[str, str]:
    """One thread, no window, no bar."""
    more = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more, "TQDM_DISABLE": "1"}


def build_demo(config: Config) -> tuple[Demo, list[Outcome]]:
    """Run the scripts once, watched for connections; how each ended, by its name."""
    demo, log = Demo(config.work / "demo"), config.work / "demo" / "log.json"
    if log.is_file():
        return demo, [tuple(entry) for entry in json.loads(log.read_text())]
    demo.folder.mkdir(parents=True)
    steps = [
        f"data/make_phantoms.py --destination {demo.raw} --cases 6 --size 32",
        f"prepare.py {demo.raw} --destination {demo.prepared} --workers 1",
        f"preprocess.py --data {demo.prepared} --input-size 32 32 --spacing 12 12",
        f"train.py --data {demo.prepared} --run-folder {demo.run} --max-epochs 1 {TINY}",
        f"apply_model.py {demo.raw / 'imagesTr'} --truth {demo.raw / 'labelsTr'} --device cpu "
        f"--checkpoint {demo.run / 'best.pt'} --destination {demo.results}",
        f"visualize_3d.py {demo.scan} --label {demo.truth} --screenshot {demo.folder / 'view.png'} "
        f"--html {demo.folder / 'view.html'}",
        f"-m data.evaluate {demo.results} {demo.raw / 'labelsTr'} "
        f"--destination {demo.folder / 'evaluation'}",
    ]
    ends = [_run_watched(step) for step in steps]
    log.write_text(json.dumps(ends))
    return demo, ends


def _run_watched(step: str) -> Outcome:
    script, *arguments = step.split()
    command = [sys.executable, "-c", WATCHED, script, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            text=True,
            capture_output=True,
            timeout=2 * WAITING,
        )
    except subprocess.TimeoutExpired:
        return "hang", script
    outcome = "other exception" if done.returncode else SOUND
    if "SOCKET" in done.stderr:
        outcome = "socket opened"
    return outcome, f"{script} {done.stderr[-300:] if outcome != SOUND else ''}"
