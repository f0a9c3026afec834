"""CPU milliseconds of a window: torch with windows alone and together, OpenVINO in fp32 and int8.

    python benchmarks/engines.py --checkpoints checkpoints/starter.pt data/run/last.pt
    python benchmarks/engines.py --packages FOLDER --checkpoints checkpoints/starter.pt
    python benchmarks/engines.py --packages FOLDER --checkpoints data/run/last.pt \
        --calibrate ct/imagesTr/a.nii.gz --scans ct/imagesTr/b.nii.gz      # int8, and Dice

One thread, 32 bit, random windows, medians of `--repeats` calls in turns after a first one of each.
OpenVINO is no requirement of the project: where it is not installed torch alone is measured;
`--packages` is a folder that has it (pip install --target FOLDER openvino nncf). Converting a
network is timed too, because it would be done at each start. int8 is calibrated on windows of scans
that the network was trained on. `--scans` are new to it, with a label map of their name in labelsTr
beside their folder: Dice with each engine. What is known of other networks stays in
benchmarks/results/engines.json, which it writes.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import RESULTS, machine, name_command
from monai.data.utils import dense_patch_slices

import apply_model
from data.evaluate import evaluate
from data.files import read_json, write_json
from data.labels import BACKGROUND, USUAL_LABELS
from data.scans import read_label_map, read_volume
from preprocess import preprocess_volume


@dataclass
class Config:
    checkpoints: tuple[Path, ...]  # of trained networks
    packages: Path | None = None  # folder of packages that holds OpenVINO and nncf
    calibrate: tuple[Path, ...] = ()  # scans whose windows set the ranges of int8; none: no int8
    scans: tuple[Path, ...] = ()  # scans with label maps, new to the networks
    repeats: int = 8  # calls of each kind; the median counts
    results: Path = RESULTS / "engines.json"  # JSON to write


class Converted(torch.nn.Module):
    """A network as OpenVINO runs it, for windows of this number and size; some make it int8."""

    def __init__(self, network: torch.nn.Module, windows: torch.Tensor, some: list[np.ndarray]):
        import openvino

        super().__init__()
        self.number = len(windows)
        model = openvino.convert_model(network, example_input=windows, input=list(windows.shape))
        if some:
            import nncf

            model = nncf.quantize(model, nncf.Dataset(some), subset_size=len(some))
        how = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = openvino.Core().compile_model(model, "CPU", how)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        parts = [self.compiled(part.contiguous().numpy())[0] for part in batch.split(self.number)]
        return torch.from_numpy(np.concatenate(parts))


def cut_windows(model: apply_model.Model, scans: tuple[Path, ...]) -> list[np.ndarray]:
    """Up to 16 windows (1, 1, X, Y, Z) of each scan, as the network sees them."""
    found, window = [], model.inference["window"]
    for scan in scans:
        tensor, _ = preprocess_volume(read_volume(scan), model.chain, model.device)
        gaps = [max(n - size, 0) for n, size in zip(window, tensor.shape[1:], strict=True)]
        tensor = torch.nn.functional.pad(tensor, [0, gaps[2], 0, gaps[1], 0, gaps[0]])
        boxes = dense_patch_slices(tensor.shape[1:], window, [n // 2 for n in window])
        some = boxes[:: max(len(boxes) // 16, 1)]
        found += [tensor[(slice(None), *box)][None].contiguous().numpy() for box in some]
    return found


def score(model: apply_model.Model, engines: dict[str, torch.nn.Module], scan: Path) -> dict:
    """Dice of the liver in one scan with each engine."""
    volume, found = read_volume(scan), {}
    truth = scan.parent.parent / "labelsTr" / scan.name
    label = read_label_map(truth, volume, USUAL_LABELS, classes={BACKGROUND: (0,), "liver": (1, 2)})
    for name, engine in engines.items():
        result = apply_model.segment(replace(model, network=engine), volume)
        found[name] = round(evaluate(result, label, ["liver"])["liver_dice"], 4)
    return found


@torch.inference_mode()
def measure(checkpoint: Path, config: Config, openvino: bool) -> dict[str, Any]:
    """Milliseconds a window of each way, and how far the answers lie apart."""
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    window = model.inference["window"]
    most = min(max(apply_model.AT_ONCE // math.prod(window), 2), 4)
    every = torch.rand(most, 1, *window).to(memory_format=torch.channels_last_3d)
    found: dict[str, Any] = {"window": list(window)}
    ways: dict[str, tuple[torch.nn.Module, int]] = {}
    engines = {"torch": model.network}
    for count in (1, most):
        ways[f"torch, {count} together"] = (model.network, count)
        if openvino:
            start = time.process_time()
            converted = Converted(model.network, every[:count], [])
            found["conversion_s"] = round(time.process_time() - start, 1)
            ways[f"OpenVINO, {count} together"] = (converted, count)
            engines.setdefault("OpenVINO", converted)
    if openvino and config.calibrate:
        start = time.process_time()
        engines["int8"] = Converted(model.network, every[:1], cut_windows(model, config.calibrate))
        found["int8_conversion_s"] = round(time.process_time() - start, 1)
        ways["OpenVINO int8, 1 together"] = (engines["int8"], 1)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    for _ in range(config.repeats + 1):
        for way, (network, count) in ways.items():
            start = time.process_time()
            answers[way] = network(every[:count])
            spent[way].append(1000 * (time.process_time() - start) / count)
    first, *others = (answer for way, answer in answers.items() if "int8" not in way)
    apart = max(float((other[:1] - first).abs().max()) for other in others)
    found["ms_a_window"] = {way: round(float(np.median(ms[1:])), 1) for way, ms in spent.items()}
    found["dice"] = {scan.name: score(model, engines, scan) for scan in config.scans}
    return found | {"largest_difference_of_logits": apart}


def main(config: Config) -> None:
    torch.set_num_threads(1)
    sys.path += [str(config.packages)] if config.packages else []
    try:
        from openvino import __version__ as version
    except ImportError:
        version = ""
    found = {str(path): measure(path, config, bool(version)) for path in config.checkpoints}
    about = {"command": name_command(), "machine": machine(torch_too=True), "openvino": version}
    known = read_json(config.results)["networks"] if config.results.exists() else {}
    write_json({**about, "networks": known | found}, config.results)
    print(found)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
