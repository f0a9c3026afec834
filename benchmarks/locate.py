"""What `--locate` saves and costs, and what the overlap of windows is worth: Dice and voxels asked.

    python benchmarks/locate.py --runs WORK/0/run/last.pt WORK/1/run/last.pt WORK/2/run/last.pt \\
        --painted data/raw_painted

`--runs` are the networks of `benchmarks/real_ct.py --work WORK`, in the order of its rounds: each
real CT is segmented by the one that never saw it. `--painted` is a folder of `data/make_phantoms.py
--livers`; the first network segments it. Each scan is preprocessed once, segmented whole and with
--locate, in CPU seconds of the network alone, and whole with each overlap and blending. Writes
benchmarks/results/locate.json after every scan.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import DATA, RESULTS, machine, name_command
from monai.data.utils import compute_importance_map

import apply_model
from data.anatomy import clean
from data.cases import read_label_map, read_scan
from data.files import write_json
from data.metrics import dice_metric
from preprocess import classes_on_grid, preprocess_volume

OVERLAPS = (0.5, 0.25, 0.125)
BLENDINGS = ("gaussian", "constant")


@dataclass
class Config:
    runs: tuple[Path, ...]  # a network for each round of the rotation
    real: Path = DATA / "ct"  # real CTs with labels
    painted: Path | None = None  # painted scans with labels; none: only real ones
    most: int = 30  # painted scans at most
    results: Path = RESULTS / "locate.json"  # JSON to write


def segment_once(model: apply_model.Model, scan: Any, truth: np.ndarray, given: tuple) -> dict:
    """Dice, false positives in ml, CPU seconds and windows of one way to segment a scan."""
    tensor, to_network, look = given
    start = time.process_time()
    scores = apply_model.predict(model, tensor, look=look)
    seconds = time.process_time() - start
    windows, model.windows = model.windows, 0
    classes = clean(classes_on_grid(scores, to_network, scan.ras_shape), model.names)
    false_ml = np.count_nonzero((classes > 0) & (truth == 0)) * scan.voxel_ml
    row = {
        "dice": round(float(dice_metric(classes > 0, truth > 0)[0]), 4),
        "false_positive_ml": round(float(false_ml), 1),
        "network_cpu_s": round(seconds, 2),
        "windows": windows,
    }
    return row | (look.describe(to_network, scan.ras_shape) if look else {})


def do_scan(path: Path, label: Path, checkpoint: Path) -> dict[str, Any]:
    """One scan in every way."""
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    scan = read_scan(path)
    truth = read_label_map(label, scan, model.declared, classes=model.labels).ras.data
    tensor, to_network = preprocess_volume(scan, model.chain, "cpu")
    row: dict[str, Any] = {"case": path.name.removesuffix(".nii.gz"), "slices": scan.shape[2]}
    look = apply_model.open_look(model, scan, to_network)
    for overlap in OVERLAPS:
        for blending in BLENDINGS:
            model.inference = {**model.inference, "overlap": overlap}
            apply_model.compute_importance_map = lambda size, mode, kind=blending: (
                compute_importance_map(size, mode=kind)
            )
            given = (tensor, to_network, None)
            row[f"{overlap} {blending}"] = segment_once(model, scan, truth, given)
    apply_model.compute_importance_map = compute_importance_map
    model.inference = {**model.inference, "overlap": OVERLAPS[0]}
    row["located"] = segment_once(model, scan, truth, (tensor, to_network, look))
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over scans of each way, and of what --locate changes."""
    ways = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    whole, found = ([row[way] for row in rows] for way in ("0.5 gaussian", "located"))
    changes = [b["dice"] - a["dice"] for a, b in zip(whole, found, strict=True)]
    return {
        "n": len(rows),
        "mean": {
            way: {
                key: round(statistics.mean(row[way][key] for row in rows), 4)
                for key in ("dice", "false_positive_ml", "windows")
            }
            for way in ways
        },
        "dice_change_mean": round(statistics.mean(changes), 4),
        "dice_change_worst": round(min(changes), 4),
        "network_share_mean": round(statistics.mean(row["network_share"] for row in found), 3),
        "network_share_most": max(row["network_share"] for row in found),
        "cpu_ratio": round(
            sum(b["network_cpu_s"] for b in found) / sum(a["network_cpu_s"] for a in whole), 3
        ),
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)
    groups: dict[str, list[dict[str, Any]]] = {}
    todo = []
    names = sorted(path.name for path in (config.real / "imagesTr").glob("*.nii.gz"))
    for number, name in enumerate(names):
        todo.append(("real", config.real, name, config.runs[number % len(config.runs)]))
    if config.painted:
        painted = sorted(path.name for path in (config.painted / "labelsTr").glob("*.nii.gz"))
        todo += [("painted", config.painted, n, config.runs[0]) for n in painted[: config.most]]
    for group, folder, name, checkpoint in todo:
        row = do_scan(folder / "imagesTr" / name, folder / "labelsTr" / name, checkpoint)
        groups.setdefault(group, []).append(row)
        print(group, row["case"], row["0.5 gaussian"], row["located"], flush=True)
        result = {
            "command": name_command(),
            "meaning": "dice: liver with tumours on the scan's grid, after post-processing; "
            "network_share: voxels that the network was asked, of those of all windows",
            "machine": machine(torch_too=True),
            "summary": {key: summarise(rows) for key, rows in groups.items()},
            "scans": groups,
        }
        write_json(result, config.results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
