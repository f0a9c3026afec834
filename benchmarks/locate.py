"""What `--locate` saves and costs, and what the overlap of windows is worth: Dice and voxels asked.

    python benchmarks/locate.py --runs WORK/0/run/last.pt WORK/1/run/last.pt WORK/2/run/last.pt \\
        --painted data/raw_painted

`--runs` are the networks of `benchmarks/real_ct.py --work WORK`, or of `benchmarks/levers.py`, in
the order of the rounds: each real CT is segmented by the one that never saw it. `--painted` is a
folder of `benchmarks/bodies.py --livers`; the first network segments it. Each scan is preprocessed
once, and segmented with each overlap whole, with either blending, and with --locate, in CPU seconds
of the network alone. Writes benchmarks/results/locate.json after every scan.
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
from apply_model import clean
from data.evaluate import dice_metric
from data.files import read_json, write_json
from data.scans import read_label_map, read_scan
from preprocess import classes_on_grid, preprocess_volume

OVERLAPS = (0.5, 0.25, 0.125)
BLENDINGS = ("gaussian", "constant")


@dataclass
class Config:
    runs: tuple[Path, ...]  # a network for each round of the rotation
    real: Path = DATA / "ct"  # real CTs with labels
    painted: Path | None = None  # painted scans with labels; none: only real ones
    most: int = 30  # painted scans at most
    groups: tuple[str, ...] = ("real", "painted")  # done now; of the others what is known stays
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
    """One scan in every way; located ones with a Gaussian."""
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    scan = read_scan(path)
    truth = read_label_map(label, scan, model.declared, classes=model.labels).ras.data
    tensor, to_network = preprocess_volume(scan, model.chain, "cpu")
    row: dict[str, Any] = {"case": path.name.removesuffix(".nii.gz"), "slices": scan.shape[2]}
    for overlap in OVERLAPS:
        model.inference = {**model.inference, "overlap": overlap}
        for blending in BLENDINGS:
            apply_model.compute_importance_map = lambda size, mode, kind=blending: (
                compute_importance_map(size, mode=kind)
            )
            given = (tensor, to_network, None)
            row[f"{overlap} {blending}"] = segment_once(model, scan, truth, given)
        apply_model.compute_importance_map = compute_importance_map
        look = apply_model.open_look(model, scan, to_network)
        given = (tensor, to_network, look)
        row[f"{overlap} located"] = segment_once(model, scan, truth, given)
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over scans of each way, and how it differs from windows half of which overlap."""
    table: dict[str, Any] = {"n": len(rows)}
    whole = [row["0.5 gaussian"] for row in rows]
    for way in (key for key, value in rows[0].items() if isinstance(value, dict)):
        found = [row[way] for row in rows]
        keys = ("dice", "false_positive_ml", "windows", "network_share")
        table[way] = {
            key: round(statistics.mean(each[key] for each in found), 4)
            for key in keys
            if key in found[0]
        }
        pairs = list(zip(whole, found, strict=True))
        changes = [b["dice"] - a["dice"] for a, b in pairs]
        more = [b["false_positive_ml"] - a["false_positive_ml"] for a, b in pairs]
        seconds = [sum(each["network_cpu_s"] for each in some) for some in (whole, found)]
        table[way] |= {
            "dice_change_mean": round(statistics.mean(changes), 4),
            "dice_change_worst": round(min(changes), 4),
            "false_positive_ml_change_mean": round(statistics.mean(more), 2),
            "false_positive_ml_change_median": round(statistics.median(more), 2),
            "cpu_ratio": round(seconds[1] / seconds[0], 3),
        }
    return table


def main(config: Config) -> None:
    torch.set_num_threads(1)
    known = read_json(config.results) if config.results.exists() else {}
    groups = {k: rows for k, rows in known.get("scans", {}).items() if k not in config.groups}
    commands = {k: text for k, text in known.get("commands", {}).items() if k in groups}
    todo = []
    names = sorted(path.name for path in (config.real / "imagesTr").glob("*.nii.gz"))
    for number, name in enumerate(names):
        todo.append(("real", config.real, name, config.runs[number % len(config.runs)]))
    if config.painted:
        painted = sorted(path.name for path in (config.painted / "labelsTr").glob("*.nii.gz"))
        todo += [("painted", config.painted, n, config.runs[0]) for n in painted[: config.most]]
    for group, folder, name, checkpoint in (each for each in todo if each[0] in config.groups):
        row = do_scan(folder / "imagesTr" / name, folder / "labelsTr" / name, checkpoint)
        groups.setdefault(group, []).append(row)
        commands[group] = name_command()
        print(group, row["case"], row["0.5 gaussian"], row["0.5 located"], flush=True)
        result = {
            "commands": commands,
            "meaning": "dice: liver with tumours on the scan's grid, after post-processing; "
            "network_share: voxels that the network was asked, of those of all windows",
            "machine": machine(torch_too=True),
            "summary": {key: summarise(rows) for key, rows in groups.items()},
            "scans": groups,
        }
        write_json(result, config.results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
