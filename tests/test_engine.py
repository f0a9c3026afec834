"""The engine's promises: exact resume after any kill, every entry by name, several processes."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from children import launch, run_child, train_or_resume
from conftest import random_affine
from helpers import as_volume, assert_same_run, comparable, small_config

import apply_model
import preprocess
import train
from data.files import InputError
from data.splits import read_prepared
from utilities import load_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures")


# ---------------------------------------------------------------------------------------
# Killed and resumed
# ---------------------------------------------------------------------------------------


def test_killed_at_any_moment_and_resumed_is_the_unbroken_run(few, tmp_path):
    """SIGKILL within steps and writes: the same bits at the end, and never a torn checkpoint."""
    unbroken, broken = (small_config(few, tmp_path / name) for name in ("unbroken", "broken"))
    train.main(unbroken)
    # Two steps an epoch. Writes: the dead one's lock, settings, and of an epoch best.pt, table, two
    # pictures and last.pt; so the first epoch is finished at the third death.
    moments = [("write", 1), ("write", 7), ("step", 3), ("write", 4)]
    for moment in moments:
        assert run_child(train_or_resume, vars(broken), moment) == -signal.SIGKILL, moment
        for name in ("best.pt", "last.pt"):  # never torn: whole, or not there yet
            if (broken.run_folder / name).exists():
                load_checkpoint(broken.run_folder / name)
    assert run_child(train_or_resume, vars(broken)) == 0
    assert_same_run(unbroken.run_folder, broken.run_folder)


def test_control_c_finishes_the_batch_and_goes_on_from_there(few, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main(small_config(few, whole, max_epochs=2, batch_size=1))
    original, calls = preprocess.Subvolumes.__getitem__, []

    def press_control_c(self, index):
        if self.epoch == 2 and self.augment:
            calls.append(index)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, index)

    monkeypatch.setattr(preprocess.Subvolumes, "__getitem__", press_control_c)
    with pytest.raises(KeyboardInterrupt):
        train.main(small_config(few, stopped, max_epochs=2, batch_size=1))
    monkeypatch.undo()
    saved = load_checkpoint(stopped / "last.pt")
    assert saved["epoch"] == 1
    assert 0 < len(saved["step_losses"]) < 4  # in the middle of the second epoch
    train.main(train.Config(resume=stopped, device="cpu"))
    assert_same_run(whole, stopped)


# ---------------------------------------------------------------------------------------
# Every entry by name
# ---------------------------------------------------------------------------------------


def one_step_and_reload(prepared: Path, run: Path, **settings) -> None:
    """Train one epoch on little, rebuild from the checkpoint alone, segment a scan."""
    config = small_config(prepared, run, **{"max_epochs": 1, **settings})
    train.main(config)
    model = apply_model.load_model(run / "last.pt", "cpu", "fp32")
    scan = as_volume(np.full((40, 36, 18), 60), random_affine(0))
    label = apply_model.segment(model, scan).label
    assert label.shape == scan.shape
    assert set(np.unique(label.read())) <= {0, 1}


@pytest.mark.parametrize("network", get_args(train.NetworkName))
def test_every_network_trains_and_reloads(network, few, tmp_path):
    size = (64, 64) if network == "swin_unetr" else (32, 32)  # five halvings must leave a voxel
    content = read_prepared(few)
    one_of_each = {r["split"]: r for r in content["subvolumes"]}.values()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "subvolumes").symlink_to(few / "subvolumes")
    content["subvolumes"] = list(one_of_each)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    how = {"input_size": size, "ema_decay": 0.0, "optimizer": "sgd", "batch_size": 1}
    one_step_and_reload(tmp_path / "data", tmp_path / "run", network=network, **how)


@pytest.mark.parametrize("loss", get_args(train.LossName))
def test_every_loss_trains_and_reloads(loss, few, tmp_path):
    one_step_and_reload(few, tmp_path / "run", loss=loss)


@pytest.mark.parametrize("optimizer", get_args(train.OptimizerName))
def test_every_optimizer_trains_and_reloads(optimizer, few, tmp_path):
    one_step_and_reload(few, tmp_path / "run", optimizer=optimizer, schedule="poly")


def test_names_and_dictionaries_agree():
    assert set(train.LOSSES) == set(get_args(train.LossName))
    assert set(train.OPTIMIZERS) == set(get_args(train.OptimizerName))
    assert set(train.SCHEDULES) == set(get_args(train.ScheduleName))
    with pytest.raises(InputError, match="network must be one of unet3d, unet"):
        train.build_network(
            "unet4d", in_channels=1, out_channels=2, base_channels=8, input_size=(32, 32, 16)
        )


def test_class_weights_come_from_the_counted_voxels(prepared):
    content = read_prepared(prepared)
    labels = {"background": (0,), "liver": (1,), "tumour": (2,)}
    weights = train.class_weights(content, labels)
    assert weights.mean() == pytest.approx(1.0)
    assert weights[0] < weights[1] < weights[2]


def test_tensorboard_shows_the_history(few, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train.main(small_config(few, run, max_epochs=2, tensorboard=True))
    events = EventAccumulator(str(run / "events")).Reload()
    history = load_checkpoint(run / "last.pt")["history"]
    for key in ("train_loss", "val_dice"):
        assert [event.value for event in events.Scalars(key)] == pytest.approx(
            [row[key] for row in history]
        )


# ---------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------


def test_the_disk_cache_gives_the_same_run_and_is_keyed_by_the_settings(few, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(few, data)
    train.main(small_config(data, tmp_path / "plain", max_epochs=1))
    for name in ("first", "second"):
        train.main(small_config(data, tmp_path / name, max_epochs=1, disk_cache=True))
    first, second, plain = (
        load_checkpoint(tmp_path / name / "last.pt") for name in ("first", "second", "plain")
    )
    assert comparable(first["history"]) == comparable(second["history"])
    assert comparable(first["history"]) == comparable(plain["history"])
    count = len(list((data / "cache").iterdir()))
    changed = {"max_epochs": 1, "disk_cache": True, "hu_window": (-100.0, 200.0)}
    train.main(small_config(data, tmp_path / "third", **changed))
    assert len(list((data / "cache").iterdir())) == 2 * count


def test_a_cache_that_does_not_fit_is_told_and_cut(monkeypatch, capsys):
    place, rate = preprocess.cache_place(1000, torch.device("cpu"))
    assert (place.type, rate) == ("cpu", 1.0)
    available = preprocess.psutil.virtual_memory().available
    place, rate = preprocess.cache_place(3 * available, torch.device("cpu"))
    assert 0.1 < rate < 0.3
    assert "do not fit in memory" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchrun(few, tmp_path_factory):
    """What two processes did and said, and how it ended: see ddp.py."""
    folder = tmp_path_factory.mktemp("torchrun")
    code = run_child(launch, folder / "log", few, folder / "run")
    return folder / "run", (folder / "log").read_text(), code


def test_two_processes_give_the_gradients_of_the_joined_batch(torchrun):
    _, said, _ = torchrun
    assert "process 0: equal" in said, said
    assert "process 1: equal" in said, said


def test_torchrun_trains_and_one_process_writes(torchrun):
    run, said, _ = torchrun
    assert said.count("done: look at") == 1, said
    history = load_checkpoint(run / "last.pt")["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert np.isfinite(history[-1]["val_dice"])


def test_a_dying_process_ends_the_run(torchrun):
    """The other one waits for it, and does not go on waiting."""
    _, said, code = torchrun
    assert code != 0
    assert "process 1 dies on purpose" in said


def test_shares_of_processes_cover_everything():
    items = list(range(7))
    even = [preprocess.share_of_process(items, rank, 3, even=True) for rank in range(3)]
    assert {len(share) for share in even} == {3}
    assert set().union(*even) == set(items)
    parts = [preprocess.share_of_process(items, rank, 3, even=False) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
