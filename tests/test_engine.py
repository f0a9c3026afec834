"""Several processes train as one; the cache fits into the memory there is."""

import numpy as np
import pytest
import torch
from children import launch, run_child, tell
from helpers import small_config

import preprocess
import train
import utilities
from data.files import InputError
from utilities import load_checkpoint


def test_two_processes_train_stop_and_resume_as_one_and_one_writes(few, tmp_path):
    """See ddp.py. The interrupted run ends as the unbroken one; a dying process ends the other."""
    code = run_child(tell, tmp_path / "log", launch, few, tmp_path)
    said = (tmp_path / "log").read_text()
    assert said.count("done: look at the pictures") == 2, said  # of two runs
    assert "different networks" not in said
    assert "process 0: stopped" in said and "process 1: stopped" in said, said
    assert code != 0 and "process 1 dies on purpose" in said
    one, other = (load_checkpoint(tmp_path / name / "last.pt") for name in ("run", "broken"))
    assert [row["epoch"] for row in one["history"]] == [1, 2]
    assert np.isfinite(one["history"][-1]["val_dice"])
    for name, weights in one["network_state"].items():
        assert torch.equal(weights, other["network_state"][name]), name


def test_shares_of_processes_cover_everything():
    items = list(range(7))
    even = [preprocess.share_of_process(items, rank, 3, even=True) for rank in range(3)]
    assert even == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]
    parts = [preprocess.share_of_process(items, rank, 3, even=False) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_cache_that_does_not_fit_is_reported_and_cut(monkeypatch, capsys):
    monkeypatch.setattr(preprocess, "read_free_memory", lambda: 10_000)
    assert preprocess.cache_place(6_000, torch.device("cpu")) == (torch.device("cpu"), 1.0)
    place, rate = preprocess.cache_place(30_000, torch.device("cpu"))
    assert (place.type, rate) == ("cpu", pytest.approx(0.2))
    assert "do not fit in memory" in capsys.readouterr().out
    calls = []
    cached = preprocess.cache_items(range(10), lambda n: calls.append(n) or {"image": n}, rate)
    assert sorted(calls) == [0, 1]
    assert cached[1] == {"image": 1} and cached[9]() == {"image": 9}


def test_the_cache_leaves_a_gpu_what_a_step_takes(monkeypatch):
    """LiTS' cache of 2.9 GB and a step of 4.3 GB: beside each other on 12 GB, not on 6."""
    for gb, place in ((12, "cuda"), (6, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, gb=gb: (gb * 10**9, 0))
        found, _ = preprocess.cache_place(2_900_000_000, torch.device("cuda:0"), 4_300_000_000)
        assert found.type == place, gb


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(preprocess, "read_free_memory", lambda: 10_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert preprocess.cache_place(3_000, torch.device("cpu"))[1] == 0.5


@pytest.mark.parametrize("words", ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                                   "MPS backend out of memory (…)"])  # fmt: skip
def test_too_little_memory_names_what_to_lower(words, few, tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(utilities, "train_step", refuse)
    config = small_config(few, tmp_path, batch_size=3)
    with pytest.raises(InputError, match=r"--batch-size 3, --input-size 16 16 .* train.py laptop"):
        train.main(config)
    monkeypatch.setattr(utilities, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(config)
