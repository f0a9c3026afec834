"""Speed of training: this project's loop, the usual tutorial loop, and the bare network.

    python benchmarks/train.py --data data/prepared --input-size 128 128 --steps 4

(a) plain: MONAI's transforms on the fly for each sample, float32, contiguous, `.item()` each step;
(b) bare: forward and backward on one resident batch, in this project's precision and layout;
(ours) `utilities.train_one_epoch` on cached, augmented sub-volumes.
All three use the same network, sub-volumes and batch size. The cache's build is timed against the
usual chain with the same workers.
Writes benchmarks/results/train_<device>.json.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import RESULTS, machine, name_command
from monai import transforms
from monai.data import CacheDataset
from torch.utils.flop_counter import FlopCounterMode

import preprocess
import train
from data.files import write_json
from data.labels import IMAGE, LABEL, as_labels, resolve_classes
from data.settings import pick
from data.splits import read_prepared
from preprocess import Augment, Chain, SubvolumeLoader, Subvolumes
from utilities import Run, build_network, pick_precision, train_one_epoch


@dataclass
class Config:
    """What is measured."""

    data: Path = Path("data/prepared")  # what prepare.py wrote
    input_size: tuple[int, int] = (128, 128)  # pixels in plane
    base_channels: int = 32  # 32 is the paper's network
    batch_size: int = 1  # sub-volumes per step
    steps: int = 4  # timed steps of each loop in a round, after one to warm up
    rounds: int = 3  # the loops take turns, so that a busy moment of the machine hits all of them
    device: str = "auto"  # auto, cpu, cuda
    workers: int = 2  # of the two caches
    results: Path | None = None  # JSON to write; none: benchmarks/results/train_<device>.json


KEYS = (IMAGE, LABEL)


def usual_chain(settings: train.Config) -> list[Any]:
    """The tutorial's deterministic chain: default arguments where they run at all."""
    low, high = settings.hu_window
    return [
        transforms.LoadImaged(KEYS),
        transforms.EnsureChannelFirstd(KEYS),
        transforms.Orientationd(KEYS, axcodes="RAS"),
        transforms.Spacingd(KEYS, pixdim=(*settings.spacing, -1.0), mode=("bilinear", "nearest")),
        transforms.ScaleIntensityRanged(IMAGE, low, high, 0.0, 1.0, clip=True),
        transforms.Resized(KEYS, (*settings.input_size, -1)),
        transforms.Lambdad(LABEL, lambda label: (label > 0).float()),
    ]


def usual_augmentation() -> list[Any]:
    return [
        transforms.RandAffined(KEYS, prob=0.5, rotate_range=(0, 0, 0.17),
                               translate_range=(6, 6, 0), mode=("bilinear", "nearest")),
        transforms.RandGaussianNoised(IMAGE, prob=0.5, std=0.02),
        transforms.ToTensord(KEYS),
    ]  # fmt: skip


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    step()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return (time.perf_counter() - start) / steps


def new_network(config: Config, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(
        "unet3d", in_channels=1, out_channels=2, base_channels=config.base_channels,
        input_size=(*config.input_size, 16),
    ).to(device)  # fmt: skip


def measure_plain(config: Config, items: list, settings: train.Config, device: Any) -> dict:
    """(a) the loop of the usual tutorial."""
    chain = transforms.Compose([*usual_chain(settings), *usual_augmentation()])
    model = new_network(config, device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    loss_function = train.LOSSES["dice"](torch.ones(2)).to(device)
    turn = iter(range(10**6))

    def step() -> float:
        first = next(turn) * config.batch_size
        batch = [chain(items[(first + i) % len(items)]) for i in range(config.batch_size)]
        image, label = (
            torch.stack([torch.as_tensor(b[k]) for b in batch]).to(device) for k in KEYS
        )
        optimizer.zero_grad()
        loss = loss_function(model(image), label)
        loss.backward()
        optimizer.step()
        return loss.item()

    return {"seconds_per_step": seconds_per_step(step, config.steps, device)}


def measure_bare(config: Config, device: torch.device, precision: torch.dtype) -> dict:
    """(b) forward and backward on one resident batch."""
    model = new_network(config, device).to(memory_format=torch.channels_last_3d)
    size = (config.batch_size, 1, *config.input_size, 16)
    image = torch.rand(size, device=device).to(memory_format=torch.channels_last_3d)
    with (
        FlopCounterMode(display=False) as counter,
        torch.autocast(device.type, precision, enabled=precision != torch.float32),
    ):
        model(image).float().sum().backward()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(image)
        logits.float().mean().backward()

    seconds = seconds_per_step(step, config.steps, device)
    tflop = counter.get_total_flops() / 1e12
    return {"seconds_per_step": seconds, "tflop_per_step": tflop, "tflop_per_s": tflop / seconds}


def measure_ours(
    config: Config, cached: Any, settings: train.Config, chain: Chain, device: torch.device
) -> dict:
    """This project's loop: cache, augmentation, precision, layout."""
    augment = pick(Augment, settings, classes=len(chain.labels))
    model = new_network(config, device).to(memory_format=torch.channels_last_3d)
    optimizer = train.OPTIMIZERS["adam"](model.parameters(), 1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    precision = pick_precision("auto", device)
    carried = {"preprocessing": {"labels": chain.labels}}
    run = Run(model, optimizer, scheduler, Path(), device, precision, carried)
    loss_function = train.LOSSES["dice"](torch.ones(2)).to(device)
    row: dict[str, float] = {}
    for steps in (1, config.steps):  # the first one warms up
        run.losses, run.counts = [], 0
        repeats = -(-steps * config.batch_size // len(cached))
        augmented = Subvolumes(cached, augment, 0, repeats, device)
        loader = SubvolumeLoader(augmented, config.batch_size, shuffle=True, seed=0)
        how = (loss_function, settings.gradient_clip, (1, 1), lambda: False)
        row = train_one_epoch(run, loader, *how)
    each = {"seconds_per_step": config.batch_size / row["samples_per_s"]}
    return each | {key: row[key] for key in ("data_wait_percent", "peak_memory_mb")}


def measure_matmul(device: torch.device, precision: torch.dtype) -> float:
    """TFLOP/s of a square matrix product, the ceiling of what convolutions can reach."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=precision) for _ in range(2))
    return 2 * n**3 / seconds_per_step(lambda: a @ b, 10, device) / 1e12


def measure_caches(
    config: Config, items: list, settings: train.Config, chain: Chain, device: torch.device
) -> tuple[dict, CacheDataset]:
    """The cache's build against the usual chain, the same files and workers; and our cache."""
    chains = {
        "usual_chain": transforms.Compose([*usual_chain(settings), transforms.ToTensord(KEYS)]),
        "ours": functools.partial(preprocess.preprocess_files, chain=chain, device=device),
    }
    result: dict[str, Any] = {"items": len(items), "workers": config.workers}
    for name, steps in chains.items():
        start = time.perf_counter()
        built = CacheDataset(items, steps, num_workers=config.workers, copy_cache=False)
        result[f"{name}_s"] = time.perf_counter() - start
    result["speedup"] = result["usual_chain_s"] / result["ours_s"]
    return result, built


def in_turns(rounds: int, **loops: Callable[[], dict]) -> dict[str, dict]:
    """Measure the loops one after the other, several times; the median of each figure."""
    results = [{name: loop() for name, loop in loops.items()} for _ in range(rounds)]
    return {n: {key: statistics.median(result[n][key] for result in results) for key in first}
            for n, first in results[0].items()}  # fmt: skip


def main(config: Config) -> None:
    warnings.simplefilter("ignore")
    device = preprocess.pick_device(config.device)
    precision = pick_precision("auto", device)
    settings = train.Config(data=config.data, input_size=config.input_size)
    prepared = read_prepared(config.data)
    labels = resolve_classes(settings.labels, as_labels(prepared["labels"]))
    chain = pick(Chain, settings, labels=labels, ignore=(), crop_to_body=False)
    items = preprocess.subvolume_items(prepared, config.data, "training")
    cache, cached = measure_caches(config, items, settings, chain, device)
    loops: dict[str, Callable[[], dict]] = {
        "plain": functools.partial(measure_plain, config, items, settings, device),
        "bare": functools.partial(measure_bare, config, device, precision),
        "ours": functools.partial(measure_ours, config, cached, settings, chain, device),
    }
    result: dict[str, Any] = {
        "command": name_command(),
        "n": f"median of {config.rounds} rounds in turns, each of {config.steps} steps of "
        f"{config.batch_size} sub-volumes after one to warm up",
        "machine": machine(torch_too=True), "precision": str(precision), "cache": cache,
        **in_turns(config.rounds, **loops),
        "matmul_tflop_per_s": measure_matmul(device, precision),
    }  # fmt: skip
    ours = result["ours"]["seconds_per_step"]
    result["ours_over_plain"] = result["plain"]["seconds_per_step"] / ours
    result["ours_of_bare"] = result["bare"]["seconds_per_step"] / ours
    write_json(result, config.results or RESULTS / f"train_{device.type}.json")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
