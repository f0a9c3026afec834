"""CPU milliseconds of a window: torch with windows alone and together, and OpenVINO.

    python benchmarks/engines.py --checkpoints checkpoints/starter.pt data/run/last.pt
    python benchmarks/engines.py --packages FOLDER --checkpoints checkpoints/starter.pt

One thread, 32 bit, random windows, medians of `--repeats` calls in turns after a first one of each.
OpenVINO is no requirement of the project: where it is not installed torch alone is measured;
`--packages` is a folder that has it (pip install --target FOLDER openvino). Converting a network is
timed too, because it would be done at each start. Writes benchmarks/results/engines.json.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import RESULTS, machine, name_command

import apply_model
from data.files import write_json


@dataclass
class Config:
    checkpoints: tuple[Path, ...]  # of trained networks
    packages: Path | None = None  # folder of packages that holds OpenVINO
    repeats: int = 8  # calls of each kind; the median counts
    results: Path = RESULTS / "engines.json"  # JSON to write


def convert(network: torch.nn.Module, windows: torch.Tensor) -> Callable[..., Any]:
    """The network as OpenVINO runs it, for windows of this number and size."""
    import openvino

    model = openvino.convert_model(network, example_input=windows, input=list(windows.shape))
    how = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", how)
    return lambda batch: torch.from_numpy(compiled(batch.contiguous().numpy())[0])


@torch.inference_mode()
def measure(checkpoint: Path, repeats: int, openvino: bool) -> dict[str, Any]:
    """Milliseconds a window of each way, and how far the answers lie apart."""
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    window = model.inference["window"]
    most = min(max(apply_model.AT_ONCE // math.prod(window), 2), 4)
    every = torch.rand(most, 1, *window).to(memory_format=torch.channels_last_3d)
    found: dict[str, Any] = {"window": list(window)}
    ways: dict[str, tuple[Callable[..., Any], int]] = {}
    for count in (1, most):
        ways[f"torch, {count} together"] = (model.network, count)
        if openvino:
            start = time.process_time()
            ways[f"OpenVINO, {count} together"] = (convert(model.network, every[:count]), count)
            found["conversion_s"] = round(time.process_time() - start, 1)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    for _ in range(repeats + 1):
        for way, (network, count) in ways.items():
            start = time.process_time()
            answers[way] = network(every[:count])
            spent[way].append(1000 * (time.process_time() - start) / count)
    first, *others = answers.values()
    apart = max(float((other[:1] - first).abs().max()) for other in others)
    found["ms_a_window"] = {way: round(float(np.median(ms[1:])), 1) for way, ms in spent.items()}
    return found | {"largest_difference_of_logits": apart}


def main(config: Config) -> None:
    torch.set_num_threads(1)
    sys.path += [str(config.packages)] if config.packages else []
    try:
        from openvino import __version__ as version
    except ImportError:
        version = ""
    found = {str(path): measure(path, config.repeats, bool(version)) for path in config.checkpoints}
    about = {"command": name_command(), "machine": machine(torch_too=True), "openvino": version}
    write_json({**about, "networks": found}, config.results)
    print(found)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
