"""Settings, files, locks and signals: what was given wrongly is one line, what is begun is kept."""

import contextlib
import errno
import io
import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from children import HANGS, caching, start_busy, watched
from conftest import ROOT, run_here, run_script
from helpers import small_config

import apply_model
import train
from data.evaluate import measure_nearest
from data.files import InputError, atomic_write, lock_folder, read_signed, write_csv, write_signed
from data.settings import LIMITS, NETWORK_LIBRARIES, SEVERAL, check_settings, format_seconds
from data.settings import run_script as start_script
from utilities import pick_device


@dataclass
class Settings:
    """One of each kind."""

    overlap: float = 0.5
    hu_window: tuple[float, float] | None = (-200.0, 250.0)
    device: str = "cpu"


# ---------------------------------------------------------------------------------------
# Ranges
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
def test_every_setting_has_a_range_that_nan_and_words_are_outside_of(name):
    low, above, _, below, high = LIMITS[name].split()
    outside = [math.nan, "many"]
    outside += [float(low) - 1] if math.isfinite(float(low)) else [-math.inf]
    outside += [float(high) + 1] if math.isfinite(float(high)) else [math.inf]
    outside += [float(low)] * (above == "<") + [float(high)] * (below == "<")
    for value in outside:
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(InputError, match=rf"{option} must be a number .*, got"):
            check_settings({name: value})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("hu_window", (250.0, -200.0), "low, then high"),
        ("hu_window", (5.0, 5.0), "low, then high"),
        ("hu_window", (-200.0, math.nan), "must be a number"),
        ("spacing", (0.0, 0.0), "must be a number 0.05 <= x <= 50"),
        ("ema_decay", math.nan, "must be a number 0 <= x < 1"),
        ("val_interval", -1, "must be a number 1 <= x"),
        ("overlap", 1.0, "must be a number 0 <= x < 1"),
        ("batch_size", 0, "must be a number 1 <= x"),
        ("max_epochs", 0, "must be a number 1 <= x"),
        ("learning_rate", 0.0, "must be a number 0 < x"),
        ("device", "gpu", "must be auto, cpu, cuda, cuda:1 or mps, got gpu"),
    ],
)
def test_wrong_settings_of_train_are_one_line_before_anything_is_read(
    setting, value, message, tmp_path
):
    with pytest.raises(InputError, match=message):
        train.main(train.Config(data=tmp_path / "none", **{setting: value}))


def test_a_wrong_setting_on_the_command_line_is_one_line():
    assert run_here("train.py", "--device", "gpu") == (
        "error: --device must be auto, cpu, cuda, cuda:1 or mps, got gpu"
    )


def test_ranges_let_the_defaults_and_recipes_through():
    for _, config in train.RECIPES.values():
        check_settings(config)
    for config in (apply_model.Config(), apply_model.Config(folds=(Path("a.pt"),))):
        check_settings(config)  # a name of two scripts: the folds of prepare.py are numbers
    with pytest.raises(InputError, match="--folds must be a number"):
        check_settings({"folds": -1})
    check_settings(Settings())


def test_what_is_no_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert str(pick_device("auto")) == str(pick_device("cuda")) == "cuda:0"
    assert pick_device("mps").type == "mps"
    with pytest.raises(InputError, match="cuda:1: torch sees no such GPU"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto").type == "cpu"  # never Apple's of itself: 3D layers are wrong there
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device mps"):
        pick_device("mps")


# ---------------------------------------------------------------------------------------
# Files and locks
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RuntimeError("full"), ValueError()]
)
def test_any_writers_failure_is_one_message_and_leaves_nothing(tmp_path, error):
    target = tmp_path / "a.nii.gz"
    target.write_text("before")
    with (
        pytest.raises(InputError, match=r"a\.nii\.gz: cannot be written"),
        atomic_write(target) as t,
    ):
        t.write_text("half")
        raise error
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("write", [lambda path: None, lambda path: path.touch()])
def test_a_writer_that_fails_silently_is_found(tmp_path, write):
    with (
        pytest.raises(InputError, match="cannot be written"),
        atomic_write(tmp_path / "a.stl") as t,
    ):
        write(t)
    assert list(tmp_path.iterdir()) == []


def test_long_names_are_written(tmp_path):
    with atomic_write(tmp_path / f"{'n' * 240}.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [f"{'n' * 240}.nii.gz"]


def test_a_folder_is_kept_for_one_and_taken_over_from_the_dead(tmp_path):
    lock = tmp_path / ".lock"
    with lock_folder(tmp_path):
        mine = rf"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(InputError, match=mine), lock_folder(tmp_path):
            pass
        assert lock.exists()  # the second one did not remove it
    assert not lock.exists()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = {"pid": child.pid, "started": time.time(), "host": socket.gethostname()}
    lock.write_text(json.dumps(dead))
    with lock_folder(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    lock.write_text(json.dumps({**dead, "host": "elsewhere"}))
    with (
        pytest.raises(InputError, match=r"on elsewhere writes here.*remove"),
        lock_folder(tmp_path),
    ):
        pass
    assert lock.exists()


def test_a_full_disk_leaves_no_lock_that_nobody_owns(tmp_path, monkeypatch):
    def fail(_, stream):
        stream.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.files.json.dump", fail)
    with pytest.raises(InputError, match="No space left"), lock_folder(tmp_path):
        pass
    monkeypatch.undo()
    with lock_folder(tmp_path):
        pass


def test_a_second_training_into_a_run_folder_is_refused(prepared, tmp_path):
    with lock_folder(tmp_path / "run"), pytest.raises(InputError, match="writes here"):
        train.main(small_config(prepared, tmp_path / "run"))


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_only_settings_of_several_numbers_take_a_list(name):
    """A list in the place of a number would fail hours later."""
    low, _, _, below, high = LIMITS[name].split()
    middle = 1 if float(low) < 1 <= float(high) else float(low)
    middle = 0.5 if (below, high) == ("<", "1") else middle
    check_settings({name: (0.0, 1.0) if name == "hu_window" else middle})
    if name not in SEVERAL:
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}"):
            check_settings({name: [middle]})


def test_apply_model_takes_the_checkpoints_of_folds():
    check_settings(apply_model.Config(folds=(Path("a.pt"), Path("b.pt"))))


def test_a_record_that_was_changed_is_none(tmp_path):
    path, record = tmp_path / "a.json", {"case": "ä", "n": 1.5, "of": {"1": [None, True]}}
    write_signed(record | {"place": tmp_path, 2: 3}, path)
    assert read_signed(path) == record | {"place": str(tmp_path), "2": 3}
    content = path.read_text()
    for old, new in (("1.5", "1.6"), ("true", "false"), ("crc32", "crc"), ("{", "[")):
        path.write_text(content.replace(old, new, 1))
        with pytest.raises(InputError, match=r"a\.json"):
            read_signed(path)


def test_times_are_readable():
    assert [format_seconds(s) for s in (0.3, 45, 720, 12000)] == [
        "0.3 s", "45 s", "12 min", "3 h 20 min",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------
# Unexpected errors and signals
# ---------------------------------------------------------------------------------------

SCRIPT = f"""
import atexit, sys, time; sys.path.insert(0, {str(ROOT)!r})
from dataclasses import dataclass
from data.settings import command_line

@dataclass
class Config:
    word: str = "wait"

def main(config):
    print("begun", flush=True)
    if config.word == "fail":
        raise KeyError("odd")
    try:
        time.sleep(600)
    finally:
        time.sleep(1)
        atexit.register(time.sleep, 1)  # as large libraries take their time to go

command_line(main, Config, "test")
"""


def test_an_unexpected_error_is_one_line_and_a_traceback_when_asked(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_script(script, "--word", "fail")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: KeyError: 'odd'; run again with LIVER_DEBUG=1 for the traceback"
    )
    assert "Traceback" in run_script(script, "--word", "fail", "--debug").stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pause", [None, 0, 0.3, 1.3])
def test_a_signal_ends_a_script_with_130_and_what_to_do(tmp_path, number, pause):
    """Also where it comes again at once (to the process and to its group, as `timeout` does),
    while the script cleans up, and while Python itself ends."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    child = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "begun\n"
    child.send_signal(number)
    if pause is not None:
        time.sleep(pause)
        child.send_signal(number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 130
    assert errors.strip() == "interrupted; run the same command again to go on"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_libraries_are_loaded_is_one_line(tmp_path, number):
    script = tmp_path / "script.py"
    read = SCRIPT.replace("command_line", "read_settings").replace("(main, Config, ", "(Config, ")
    script.write_text(read + "print('begun', flush=True); time.sleep(600)")
    child = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "begun\n"
    child.send_signal(number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 130
    assert errors == "interrupted before anything was begun; run the same command again\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("echo", [0.0, math.inf])
def test_the_first_interrupt_is_told_at_once_and_the_second_stops(number, echo):
    """But not an echo: what comes so soon after the first one is the same."""
    child, said = start_busy(watched, echo)
    try:
        os.kill(child.pid, number)
        with said as told:
            assert told.readline() == "\n"
            assert told.readline() == "finishing this step; Ctrl-C again stops at once\n"
        os.kill(child.pid, number)  # nobody reads any more what it says
        child.join(1 if echo else HANGS)
        assert child.exitcode == (None if echo else 130)
    finally:
        child.kill()


def test_an_interrupt_while_volumes_are_cached_ends_in_order():
    """Its threads are waited for: torch would abort the process under them."""
    child, said = start_busy(caching)
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.05)
    child.join(300)
    assert child.exitcode == 130
    with said as told:
        assert told.read() == "interrupted; run the same command again to go on\n"


@pytest.mark.parametrize("cores", [1, 3])
def test_distances_are_those_of_the_tree_and_no_thread_outlives_them(cores, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    points, cloud = torch.rand(50, 3).numpy(), torch.rand(70, 3).numpy()
    expected = [min(float(((p - c) ** 2).sum()) ** 0.5 for c in cloud) for p in points]
    before = threading.active_count()
    assert measure_nearest(points, cloud) == pytest.approx(expected, abs=1e-6)
    assert threading.active_count() == before


def test_names_that_are_no_utf8_reach_tables_and_consoles(tmp_path, monkeypatch):
    """Also a console that knows no Greek, as on Windows."""
    name = os.fsdecode(b"caf\xe9") + " \u03b1"
    write_csv([{"case": name}], tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[1] == r"caf\udce9 α"
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    start_script(lambda _: print(name), None)
    console.flush()
    assert console.buffer.getvalue().decode().strip() == r"caf\udce9 \u03b1"


def test_on_a_terminal_the_libraries_load_under_a_bar(tmp_path):
    """They take seconds, and no bar of the work itself can be shown before them."""
    (tmp_path / "empty.pt").touch()
    (tmp_path / "best.pt").write_bytes(b"no checkpoint")
    words = ["apply_model.py", str(tmp_path / "empty.pt"), "--checkpoint", str(tmp_path)]
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    shown = os.environ | {"TQDM_DISABLE": "0"}
    child = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=terminal, env=shown)
    os.close(terminal)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while part := os.read(master, 1000):
            said += part
    os.close(master)
    assert child.wait() == 1
    *bars, error = said.decode().rstrip().split("\r")
    assert any("loading torch" in bar and f"1/{len(NETWORK_LIBRARIES)}" in bar for bar in bars)
    assert bars[-1].isspace() and error.startswith("error:")  # the bar is gone then
