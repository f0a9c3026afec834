"""What several tests share: small volumes, phantoms, and running a script as a user does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def run_script(
    *arguments: object, cwd: Path | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the project's folder, as the README says, without a display."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    environment.pop("DISPLAY", None)
    return subprocess.run(
        command, cwd=cwd or ROOT, env=environment, text=True, capture_output=True, check=False,
        timeout=timeout,
    )  # fmt: skip


@contextlib.contextmanager
def drawing_nothing() -> Iterator[None]:
    """Pictures stay blank: drawing one takes longer than all else that a test does."""
    from children import draw_nothing  # loads torch, which who hands out the tests does not need

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch.setattr)
        yield


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """prepare.py draws no picture of a case, which takes five sixths of its time on phantoms."""
    import data.check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.check, "draw_overlay", lambda *_: None)
        yield


def run_here(*arguments: object) -> int | str:
    """As `run_script`, in this process, where all libraries are imported already.
    Returns the exit code, or the message that a script ends with."""
    words = list(map(str, arguments))
    before, module = sys.argv, words[0] == "-m"
    sys.argv = words[module:]
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


def random_affine(
    seed: int, spacing=(0.8, 0.7, 2.5), shear: float = 0.0, shuffle: bool = True
) -> np.ndarray:
    """An oblique affine: axes in a random order and direction, then a rotation of some degrees."""
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3) if shuffle else np.eye(3)
    tilt = Rotation.from_euler("xyz", rng.uniform(-12, 12, 3), degrees=True).as_matrix()
    skew = np.eye(3)
    skew[1, 2] = shear
    affine = np.eye(4)
    affine[:3, :3] = tilt @ skew @ axes @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def ct_image(array: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """int16 NIfTI image with both forms set."""
    image = nib.Nifti1Image(array.astype(np.int16), affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=1)
    return image


def pytest_configure(config: pytest.Config) -> None:
    """All processes of the tests share one folder of what several tests only read."""
    if "SHARED_FIXTURES" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="tests_")
        os.environ["SHARED_FIXTURES"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who needs processes of their own shares the one server that begins them."""
    for item in items:
        if {"run_child", "start_busy"} & set(item.function.__code__.co_names):
            item.add_marker(pytest.mark.xdist_group("children"))


def make_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder in it, made by the process that needs it first; tests must not change it."""
    folder = Path(os.environ["SHARED_FIXTURES"]) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(autouse=True)
def usual_signals() -> None:
    """Ctrl-C is heard, also where a shell began the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_ct() -> Path:
    folder = SHARED_DATA / "ct"
    if not folder.is_dir():
        pytest.skip(f"real CTs are not here ({folder.name} beside the project)")
    return folder


@pytest.fixture(scope="session")
def raw_phantoms() -> Path:
    """A folder of small phantoms in Decathlon layout."""
    import make_phantoms

    known = {"cases": 6, "size": 48, "slices": (34, 42)}
    return make_once(
        "raw", lambda folder: make_phantoms.main(make_phantoms.Config(destination=folder, **known))
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A Decathlon folder of three phantoms, which a test may change."""
    from helpers import write_patients

    return write_patients(tmp_path / "raw")


@pytest.fixture(scope="session")
def prepared(raw_phantoms: Path) -> Path:
    """The same phantoms after prepare.py."""
    from helpers import run

    return make_once("prepared", lambda folder: run(raw_phantoms, destination=folder))


@pytest.fixture(scope="session")
def whole_cases(raw_phantoms: Path) -> Path:
    """The same phantoms, each case kept whole for patches."""
    from helpers import run

    return make_once(
        "whole", lambda folder: run(raw_phantoms, destination=folder, subvolume_depth=0)
    )


@pytest.fixture(scope="session")
def few(prepared: Path) -> Path:
    """At most four sub-volumes per split of the same, enough for a step."""
    from helpers import copy_prepared

    def cut(content: dict) -> None:
        splits: dict[str, list] = {}
        for record in content["subvolumes"]:
            splits.setdefault(record["split"], []).append(record)
        content["subvolumes"] = [r for split in sorted(splits) for r in splits[split][:4]]

    return make_once("few", lambda folder: copy_prepared(prepared, folder, cut))


@pytest.fixture(scope="session")
def begun(few: Path) -> Path:
    """The folder of a run of one epoch on few sub-volumes."""
    from helpers import small_config

    import train

    with drawing_nothing():
        return make_once("begun", lambda run: train.main(small_config(few, run, max_epochs=1)))


@pytest.fixture
def blank_pictures() -> Iterator[None]:
    """For tests that look at no picture."""
    with drawing_nothing():
        yield


@pytest.fixture(scope="session")
def checkpoint(prepared: Path) -> Path:
    """A network that has learnt something: a few seconds on small phantoms."""
    import train

    config = train.Config(
        data=prepared, base_channels=4, input_size=(16, 16), spacing=(16.0, 16.0),
        learning_rate=5e-3, max_epochs=3, val_interval=3, device="cpu", precision="fp32",
    )  # fmt: skip
    with drawing_nothing():
        make = lambda run: train.main(dataclasses.replace(config, run_folder=run))  # noqa: E731
        return make_once("run", make) / "best.pt"
