"""What tests of training share: small settings, caches of phantoms, and comparing two runs."""

from __future__ import annotations

import dataclasses

import torch

import preprocess
import train
from data.labels import as_labels, resolve_classes
from preprocess import Augment, Chain
from utilities import TIMING, load_checkpoint, pick

SMALL = {
    "base_channels": 4,
    "input_size": (32, 32),
    "spacing": (8.0, 8.0),
    "max_epochs": 3,
    "device": "cpu",
    "precision": "fp32",
    "ema_decay": 0.9,
}
TINY = {"max_epochs": 2, "base_channels": 4, "device": "cpu", "precision": "fp32"}
TINY_IN = {
    "subvolumes": {"input_size": (32, 32), "spacing": (8.0, 8.0)},
    "patches": {"input_size": (32, 32, 16), "spacing": (8.0, 8.0, 5.0), "patches_per_case": 2},
}


def small_config(prepared, run, **changes) -> train.Config:
    """A training of seconds on sub-volumes of phantoms."""
    return train.Config(**{**SMALL, "data": prepared, "run_folder": run, **changes})


def tiny(name: str, prepared, whole_cases, run, **changes) -> train.Config:
    """A recipe made small, on sub-volumes or whole cases as it needs them."""
    recipe = train.RECIPES[name][1]
    data = whole_cases if recipe.sampling == "patches" else prepared
    small = {**TINY, **TINY_IN[recipe.sampling], "data": data, "run_folder": run, **changes}
    return dataclasses.replace(recipe, **small)


def chain_of(config: train.Config) -> Chain:
    """The deterministic chain of a training, its classes resolved with the data's labels."""
    declared = as_labels(preprocess.read_prepared(config.data)["labels"])
    return pick(Chain, config, labels=resolve_classes(config.labels, declared))


def augment_of(config: train.Config, **changes) -> Augment:
    """The augmentation of a training."""
    return pick(Augment, config, **{"classes": len(config.labels) + 1, **changes})


def cached(config: train.Config, split: str = "training", device: str = "cpu"):
    """The cached sub-volumes of a training."""
    content = preprocess.read_prepared(config.data)
    return preprocess.cache_split(content, config.data, split, chain_of(config), device)


def comparable(history):
    """Rows without what depends on the machine's speed."""
    return [{key: value for key, value in row.items() if key not in TIMING} for row in history]


def assert_same_run(first, second):
    """Two runs ended with the same history and the same weights, bit for bit."""
    a, b = (load_checkpoint(run / "last.pt") for run in (first, second))
    assert comparable(a["history"]) == comparable(b["history"])
    for name, tensor in a["network_state"].items():
        assert torch.equal(tensor, b["network_state"][name]), name
