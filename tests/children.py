"""What tests do in processes of their own, which may die: begun from a server that knows torch."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import ddp
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import apply_model
import data.evaluate
import train
import utilities
from data.settings import delayed_interrupt
from data.settings import run_script as start_script

HANGS = 300  # seconds after which a process counts as hanging


def open_server() -> Any:
    """Where processes come from: not forked from a test's own, whose threads torch waits for."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server finds it nowhere else
    context.set_forkserver_preload(["children", "torch._dynamo"])  # which optimizers need
    return context


def start_busy() -> tuple[Any, TextIO]:
    """A process that is `busy`, and what it says."""
    context = open_server()
    begun, (read, write) = context.Event(), context.Pipe(duplex=False)
    child = context.Process(target=busy, args=(begun, write))
    child.start()
    write.close()
    assert begun.wait(HANGS)
    return child, os.fdopen(os.dup(read.fileno()))


def run_child(target: Callable[..., None], *given: object) -> int:
    """Run a function of this module in a process of its own; its exit code."""
    child = open_server().Process(target=target, args=given)
    child.start()
    child.join(HANGS)
    assert child.exitcode is not None, f"{target.__name__} hangs"
    return child.exitcode


def busy(begun: Any, told: Any) -> None:
    """A script in the midst of its training steps."""
    sys.stderr = os.fdopen(os.dup(told.fileno()), "w")
    os.dup2(told.fileno(), 2)
    for number in (signal.SIGINT, signal.SIGTERM):  # those of prepare.py's server ignore them
        signal.signal(number, signal.default_int_handler)

    def step(_: None) -> None:
        with delayed_interrupt():
            begun.set()
            while True:
                time.sleep(0.01)

    start_script(step, None)


def write_blank(figure: Figure, path: Path | str, **how: object) -> None:
    """In the place of `Figure.savefig`, which takes longer than all else: a small picture."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(path, format=how.get("format"))


def draw_nothing(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Blank pictures from now on, for whoever looks at none."""
    set_attribute(Figure, "savefig", write_blank)
    for module in (apply_model, utilities.pictures):  # scripts that tests run load it anew
        set_attribute(module, "draw_planes", lambda *_, **__: Figure())
    set_attribute(data.evaluate, "draw_summary", lambda *_: Figure())
    set_attribute(utilities.pictures, "curves_figure", lambda *_: Figure())
    set_attribute(utilities, "preview_figure", lambda *_: Figure())


def die(path: Path | None = None) -> None:
    """SIGKILL; a file that was being written is half there."""
    if path is not None:
        os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def begin(dies: tuple[str, int] | None) -> None:
    """One thread, no output, and death at the n-th "write" of a file or "step" of training."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    draw_nothing()
    kind, moment = dies or ("never", 0)
    writes, steps = itertools.count(1), itertools.count(1)
    replace, step = Path.replace, utilities.train_step

    def replace_or_die(temporary: Path, final: Path) -> Path:
        if next(writes) == moment and kind == "write":
            die(temporary)
        return replace(temporary, final)

    def step_or_die(*given: object) -> object:
        if next(steps) == moment and kind == "step":
            die()
        return step(*given)

    Path.replace, utilities.train_step = replace_or_die, step_or_die


def train_or_resume(settings: dict, dies: tuple[str, int] | None = None) -> None:
    """Begin, or go on, as a user would after a crash."""
    begin(dies)
    if (settings["run_folder"] / "last.pt").exists():
        train.main(train.Config(resume=settings["run_folder"], device="cpu"))
    else:
        train.main(train.Config(**settings))


def tell(log: Path, target: Callable[..., Any], *given: object) -> None:
    """Call something; all that it says goes to a file, and what it returns is the exit code."""
    torch.set_num_threads(1)
    stream = log.open("w")  # for the rest of this process
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    sys.exit(target(*given))


def launch(data: Path, run: Path) -> None:
    """`ddp.work` in two processes, as torchrun begins them, but forked."""
    draw_nothing()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    elastic_launch(config, ddp.work)(data, run)


def attack(work: Path, places: dict[str, Path]) -> int:
    """The quick form of two kinds of attacks; the number of faults."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import reliability as attacks

    how, ends = attacks.Config(quick=True), (attacks.SOUND, attacks.REFUSED)
    kinds = (attacks.KINDS[kind](work, places, how) for kind in ("inputs", "settings"))
    faults = [row for row in itertools.chain(*kinds) if row[1] not in ends]
    print(*faults, sep="\n", flush=True)
    return len(faults)


def import_alone(folder: Path, modules: list[str]) -> None:
    """Import each in a process that knows no other module of the project; say what it does."""
    os.chdir(folder)
    import vedo  # noqa: F401  # as torch and the others: once for all

    own = {name.partition(".")[0] for name in modules}
    for known in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[known]
    for module in modules:
        if not os.fork():
            try:
                with contextlib.redirect_stdout(io.StringIO()) as told:
                    importlib.import_module(module)
                done = (told.getvalue(), [*folder.iterdir()], torch.cuda.is_initialized())
            except BaseException as error:
                done = (repr(error),)
            if any(done):
                print(f"{module}: {done}", flush=True)
            os._exit(0)
        os.wait()


def apply(settings: dict, dies: tuple[str, int] | None = None) -> None:
    """Segment, or go on with what is not finished."""
    begin(dies)
    apply_model.main(apply_model.Config(**settings))
