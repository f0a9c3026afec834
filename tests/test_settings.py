"""Settings, files, locks and signals: a wrong value is one line, what is begun is kept."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from children import HANGS, start_busy
from conftest import ROOT, run_script
from helpers import small_config

import apply_model
import prepare
import preprocess
import train
import visualize_3d
from data import evaluate
from data.files import InputError, atomic_write, lock_folder, read_record, write_csv
from data.settings import check_settings
from data.settings import run_script as start_script
from preprocess import pick_device

CONFIGS = [m.Config for m in (train, prepare, apply_model, visualize_3d, evaluate)]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("hu_window", (250.0, -200.0), "low, then high"),
        ("spacing", (0.0, 0.0), "a number 0.05 <= x <= 50"),
        ("input_size", (256, 0), "a number 1 <= x"),
        ("dropout", math.nan, "a number 0 <= x < 1"),
        ("flip_probability", 1.01, "a number 0 <= x <= 1"),
        ("noise_sd", math.inf, "a number 0 <= x"),
        ("batch_size", True, "a number"),
        ("seed", 2**32, "a number 0 <= x < 4294967296"),
        ("loss", "dicee", "as --help says"),
        ("device", "gpu", "auto, cpu, cuda, cuda:1 or mps"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_before_anything_is_read(setting, value, message, tmp_path):
    option = f"--{setting.replace('_', '-')}"
    with pytest.raises(InputError, match=rf"^{option} must be {re.escape(message)}, got "):
        train.main(train.Config(data=tmp_path / "none", **{setting: value}))


def test_ranges_let_the_defaults_and_recipes_through():
    for config in [*(recipe for _, recipe in train.RECIPES.values()), *(c() for c in CONFIGS[:4])]:
        check_settings(config)
    check_settings(apply_model.Config(background=-32768))
    for wrong in ({"background": 2**15}, {"overlap": -0.1}, {"windows": -1}):
        with pytest.raises(InputError, match="must be a number"):
            check_settings(apply_model.Config(**wrong))


@pytest.fixture
def machine(monkeypatch):
    """Say how many GPUs of NVIDIA there are, what is wrong with them, and this process's rank."""

    def pretend(gpus=0, fault="", rank=None, mps=False):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(preprocess, "try_device", lambda *_: fault)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))
        preprocess.find_fault.cache_clear()

    yield pretend
    preprocess.find_fault.cache_clear()


def test_what_is_no_gpu_is_told(machine):
    machine(gpus=1)
    assert str(pick_device("auto")) == str(pick_device("cuda")) == "cuda:0"
    with pytest.raises(InputError, match="cuda:1: torch sees no such GPU"):
        pick_device("cuda:1")
    machine(mps=True)
    assert pick_device("auto").type == "cpu"  # never Apple's of itself: 3D layers are wrong there
    machine()
    with pytest.raises(InputError, match="--device mps"):
        pick_device("mps")


def test_a_gpu_that_fails_is_told_once_and_the_cpu_takes_over(machine, capsys):
    """An old card has no kernels in torch's wheels."""
    reason = "CUDA error: no kernel image is available for execution on the device"
    machine(gpus=1, fault=reason)
    assert [pick_device("auto").type for _ in range(2)] == ["cpu", "cpu"]
    assert capsys.readouterr().out == f"cuda:0 is not used: {reason}\n"
    with pytest.raises(InputError, match="--device cuda:0: CUDA error: no kernel"):
        pick_device("cuda")
    machine(gpus=1, fault=reason, rank=0)
    with pytest.raises(InputError, match="no kernel image"):  # the other processes go on on GPUs
        pick_device("auto")


def test_each_process_of_torchrun_has_a_gpu_of_its_own(machine):
    machine(gpus=4, rank=3)
    assert str(pick_device("auto")) == "cuda:3"
    machine(gpus=1, rank=3)
    with pytest.raises(InputError, match=r"cuda:3 of process 3 of torchrun: .*\(1 of NVIDIA\)"):
        pick_device("auto")


def test_apples_gpus_are_tried_in_a_process_of_their_own(machine, monkeypatch):
    machine(mps=True)
    run, code = subprocess.run, ["print()"]
    monkeypatch.setattr(subprocess, "run", lambda command, **how: run([*command[:2], *code], **how))
    assert pick_device("mps").type == "mps"
    for code[0], reason in (
        ("import os; os.abort()", "ended its process"), ("print('half is no type')", "half is no"),
    ):  # fmt: skip
        preprocess.find_fault.cache_clear()
        with pytest.raises(InputError, match=reason):
            pick_device("mps", "bf16")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RuntimeError("full"), ValueError(), None]
)
def test_any_writers_failure_is_one_message_and_leaves_what_was_there(tmp_path, error):
    target = tmp_path / f"{'n' * 240}.nii.gz"  # as long as a name may be
    with atomic_write(target) as temporary:
        temporary.write_text("before")
    with (
        pytest.raises(InputError, match=r"n\.nii\.gz: cannot be written"),
        atomic_write(target) as temporary,
    ):
        temporary.write_text("half" if error else "")  # an empty file is a silent failure
        if error:
            raise error
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_for_one_process_until_it_ends(prepared, raw, checkpoint, tmp_path):
    folder = tmp_path / "run"
    use = {"paths": (raw / "imagesTr",), "checkpoint": checkpoint, "device": "cpu"}
    configs = {
        prepare: prepare.Config(raw, folder), train: small_config(prepared, folder),
        apply_model: apply_model.Config(destination=folder, **use),
    }  # fmt: skip
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    hold += "from pathlib import Path; from data.files import lock_folder\n"
    hold += f"with lock_folder(Path({str(folder)!r})): print('held', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    for script, config in configs.items():
        with pytest.raises(InputError, match=rf"{folder}: another process writes here.*wait"):
            script.main(config)
    child.kill()
    child.communicate()
    with lock_folder(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not list(folder.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be written"), lock_folder(tmp_path / "file"):
        pass


def test_a_record_is_read_by_its_mark_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    assert read_record(path) is None
    path.write_text(json.dumps({"mark": "m", "n": 1}))
    assert read_record(path, "m") == read_record(path) == {"mark": "m", "n": 1}
    assert read_record(path, "other") is None
    for damaged in ('{"mark": "m"', "[1]", '{"n": 1}', ""):
        path.write_text(damaged)
        assert read_record(path) is None


SCRIPT = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from data.settings import run_script

def main(word):
    raise KeyError(word)

run_script(main, "odd")
"""


def test_an_unexpected_error_is_one_line_and_a_traceback_when_asked():
    done = run_script("-c", SCRIPT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: KeyError: 'odd'; run again with LIVER_DEBUG=1 for")
    assert "Traceback" in run_script("-c", SCRIPT, "--debug").stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_a_step_finish_and_the_next_one_ends_with_130_and_what_to_do(number):
    """But not its echo within a second, as `timeout` and torchrun send it."""
    child, said = start_busy()
    try:
        os.kill(child.pid, number)
        assert said.readline() == "\n"
        assert said.readline() == "finishing this step; Ctrl-C again stops at once\n"
        os.kill(child.pid, signal.SIGTERM)
        child.join(1.1)
        assert child.exitcode is None
        os.kill(child.pid, number)
        child.join(HANGS)
        assert child.exitcode == 130
        assert said.readline() == "interrupted; run the same command again to go on\n"
    finally:
        child.kill()


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
