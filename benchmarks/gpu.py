"""Check, measure and record a GPU in at most ten minutes: `make gpu`. Without one: the forecast.

    python benchmarks/gpu.py

Runs tests/test_cuda.py on the GPU, then measures the default recipe (19 M 3D U-Net, batches of two
sub-volumes of 256 × 256 × 16) in two precisions and compiled: seconds and TFLOP/s of a step beside
those of a matrix product, the fraction of the time that the GPU is busy, with the cache on the GPU
and in host memory, peak memory, and a whole scan. Writes benchmarks/results/gpu.json.

The forecast simulates trainer, loader and GPU in seconds, see `forecast`; its assumptions are
CARDS, HOST and LOADERS.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import RESULTS, ROOT, machine, name_command
from monai.inferers import sliding_window_inference

import train
from data.files import write_json
from data.labels import IMAGE, LABEL
from data.settings import pick
from preprocess import Augment, SubvolumeLoader, Subvolumes
from utilities import Run, build_network, measure_step, on_device, pick_precision, train_step

STEP_TFLOP, WINDOW_TFLOP, WINDOWS = 11.7, 1.954, 56  # counted: forward and backward; forward
CARDS = {"H100": 0.045, "RTX 4070": 0.55}  # assumed seconds of a step's kernels
HOST = {"operation_s": 10e-6, "step_operations": 700}  # assumed; counted with a margin
# Of a batch of two, counted on a pretended GPU: operations, and how often the host waits. Seconds:
# CPU time beside the operations (noise drawn by numpy), and the GPU's, assumed.
LOADERS = {
    "before": {"operations": 302, "waits": 10, "host_s": 0.0252, "gpu_s": 0.001, "own": False},
    "now": {"operations": 66, "waits": 0, "host_s": 0.0005, "gpu_s": 0.001, "own": True},
}


@dataclass
class Config:
    steps: int = 40  # measured, after five to warm up
    check: bool = True  # run tests/test_cuda.py first
    results: Path = RESULTS / "gpu.json"  # JSON to write


def forecast(step_s: float, loader: dict[str, Any], steps: int = 300) -> float:
    """Return the fraction of the time that a GPU is busy with steps of so many seconds.

    Two threads share Python's lock, so that their work on the host adds up. The trainer starts a
    step's kernels without waiting, then the loader makes the next batch. Where the loader waits, it
    does so for all that its stream holds: in the trainer's own stream also for the step.
    """
    host = gpu = 0.0  # until when they have work
    pieces = loader["waits"] + 1
    loader_s = loader["host_s"] + HOST["operation_s"] * loader["operations"]
    for _ in range(steps):
        host += HOST["operation_s"] * HOST["step_operations"]
        gpu = max(gpu, host) + step_s
        for piece in range(pieces):
            host += loader_s / pieces
            if piece < loader["waits"] and not loader["own"]:
                host = max(host, gpu)
        gpu = max(gpu, host if not loader["own"] else 0.0) + loader["gpu_s"]
        host = max(host, gpu - 2 * step_s)  # no more kernels wait than those of two steps
    return steps * step_s / gpu


def seconds(work: Callable[[], Any], times: int) -> float:
    """Return the seconds of one call among many, after five to warm up."""
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def make_samples(config: train.Config, place: str) -> Subvolumes:
    """Return random sub-volumes, cached on a device, augmented on the GPU."""
    shape, random = (1, *config.input_size, 16), torch.Generator().manual_seed(0)
    cached = []
    for index in range(16):
        image = torch.rand(shape, generator=random)
        item = {IMAGE: image.half().to(place), LABEL: (image > 0.9).to(torch.uint8).to(place)}
        cached.append(item | {"index": index, "case": str(index)})
    augment = pick(Augment, config, classes=2)
    return Subvolumes(cached, augment, repeats=100, device="cuda:0")


def new_run(config: train.Config, precision: torch.dtype, compiled: bool) -> Run:
    network = build_network(
        config.network, in_channels=1, out_channels=2, base_channels=config.base_channels,
        input_size=(*config.input_size, 16),
    )  # fmt: skip
    device = torch.device("cuda:0")
    model = on_device(network, device)
    optimizer = train.OPTIMIZERS[config.optimizer](model.parameters(), config.learning_rate)
    carried = {"preprocessing": {"labels": ("background", "liver")}}
    return Run(model, optimizer, None, Path(), device, precision, carried, compile_network=compiled)


def measure_training(
    config: train.Config, precision: torch.dtype, compiled: bool, steps: int
) -> dict[str, Any]:
    """Return a step's figures: alone, and fed from both caches."""
    run, loss = new_run(config, precision, compiled), train.LOSSES[config.loss](None)
    row: dict[str, Any] = {"precision": str(precision), "compiled": compiled}
    if not compiled:
        shape = (config.batch_size, 1, *config.input_size, 16)
        row["step_forecast_gb"] = measure_step(run, loss, shape) / 1e9
    torch.cuda.reset_peak_memory_stats()
    step = functools.partial(train_step, run, loss_function=loss, clip=config.gradient_clip)
    for place in ("cuda:0", "cpu"):
        batches = iter(SubvolumeLoader(make_samples(config, place), config.batch_size, True, 0))
        if "step_s" not in row:
            alone = seconds(functools.partial(step, next(batches)), steps)
            row |= {"step_s": alone, "tflop_per_s": STEP_TFLOP / alone}
        fed = seconds(lambda coming=batches: step(next(coming)), steps)
        row[f"busy_percent_cache_on_{place[:3]}"] = 100 * row["step_s"] / fed
        batches.close()
    row["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return row


def measure_scan(config: train.Config) -> dict[str, float]:
    """Return the seconds of the network on a scan of 512 × 512 × 450 at the recipe's grid."""
    run = new_run(config, pick_precision("auto", torch.device("cuda:0")), False)
    run.model.eval()
    window = (*config.input_size, 16)
    volume = torch.rand(1, 1, *config.input_size, 450)

    @torch.no_grad()
    def segment() -> torch.Tensor:
        return sliding_window_inference(
            volume, window, 4, lambda x: run.ask(run.model, x), config.overlap, "gaussian",
            sw_device=run.device, device="cpu",
        )  # fmt: skip

    spent = seconds(segment, 3)
    return {"scan_s": spent, "scan_tflop_per_s": WINDOWS * WINDOW_TFLOP / spent}


def measure(config: Config) -> dict[str, Any]:
    """Return all that is measured on the GPU."""
    recipe, found = train.Config(), {}
    if config.check:
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found["tests"] = done.stdout.strip().splitlines()[-1]
    precisions = (torch.bfloat16, torch.float16)
    n = 8192
    for precision in precisions:
        a, b = (torch.randn(n, n, device="cuda", dtype=precision) for _ in range(2))
        spent = seconds(functools.partial(torch.matmul, a, b), 50)
        found[f"matmul_tflop_per_s {precision}"] = 2e-12 * n**3 / spent
    ways = [(precision, False) for precision in precisions] + [(precisions[0], True)]
    found["training"] = []
    for precision, compiled in ways:
        try:
            row = measure_training(recipe, precision, compiled, config.steps)
        except RuntimeError as error:  # what does not run here is a result, too
            row = {"precision": str(precision), "compiled": compiled, "error": str(error)[:300]}
        found["training"].append(row)
        print(json.dumps(row, indent=1), flush=True)
        torch.cuda.empty_cache()
    return found | measure_scan(recipe)


def main(config: Config) -> None:
    busy = {card: {name: round(100 * forecast(step_s, how), 1) for name, how in LOADERS.items()}
            for card, step_s in CARDS.items()}  # fmt: skip
    assumed = {"step_s": CARDS, **HOST, "loaders": LOADERS}
    result = {"command": name_command(), "machine": machine(torch_too=True)}
    result |= {"forecast_busy_percent": busy, "assumed": assumed, "measured": None}
    if torch.cuda.is_available():
        result["measured"] = measure(config)
    else:
        print("no GPU: only the forecast")
    write_json(result, config.results)
    print(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
