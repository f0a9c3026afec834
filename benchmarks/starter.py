"""Starter weights from synthetic bodies alone, and their Dice on real CTs that they never saw.

    python benchmarks/starter.py --work data/starter               # make the weights, 1 to 2 hours
    python benchmarks/starter.py --work data/starter --seed 1      # once more, all drawn anew
    python benchmarks/starter.py --work data/starter --score-only  # of weights that are there

The scripts are run as a user runs them: `benchmarks/bodies.py`, `prepare.py`, `train.py`, and
`apply_model.py` on the real CTs. What is there already in `--work` is not made again. Not one real
voxel is trained on; the settings were chosen on the two scans in `CHOSEN_ON`, so the mean over the
others, which stands apart in the result, is the one to believe.
Writes `WORK/seed_N/starter.pt` and an entry of benchmarks/results/starter.json.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from machine import ROOT, machine

from data.files import read_json, write_json
from data.scans import lay_on_grid, read_volume

CHOSEN_ON = ("ircad_19", "tace_1720")  # real scans that settings were chosen on
BODIES = "--cases 160 --spacing 4 4 4"
PREPARE = (
    "--subvolume-depth 0 --foreground liver --accept outline outside hu empty "
    "--training 0.95 --validation 0.05 --test 0"
)
TRAIN = (
    "--sampling patches --spacing 4 4 4 --input-size 80 80 48 --network unet --base-channels 16 "
    "--loss dice_ce --learning-rate 2e-3 --batch-size 2 --patches-per-case 2 --max-epochs 6 "
    "--val-interval 6"
)


@dataclass
class Config:
    """Where to work, and what to score on."""

    work: Path = Path("data/starter")  # for bodies, run and results; relative: below the project
    seed: int = 0  # of bodies, weights, order and augmentation
    source: Path = Path("../shared/data/ct")  # real CTs with labels, to score on; nothing else
    score_only: bool = False  # weights are there, only score them


def run(*command: object) -> float:
    """Run one of the scripts; seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.perf_counter() - start


def make_weights(config: Config, folder: Path) -> dict[str, float]:
    """Bodies, sub-volumes and training, as far as they are not there; minutes of each."""
    raw, data, seconds = folder / "raw", folder / "prepared", {}
    if not (ROOT / raw / "dataset.json").exists():
        seconds["bodies"] = run("benchmarks/bodies.py", "--destination", raw, "--seed", config.seed,
                                *shlex.split(BODIES))  # fmt: skip
    if not (ROOT / data / "dataset.json").exists():
        seconds["prepare"] = run("prepare.py", raw, "--destination", data, "--seed", config.seed,
                                 *shlex.split(PREPARE))  # fmt: skip
    checkpoint = folder / "run" / "best.pt"
    if not (ROOT / checkpoint).exists():
        seconds["training"] = run("train.py", "--data", data, "--run-folder", checkpoint.parent,
                                  "--seed", config.seed, *shlex.split(TRAIN))  # fmt: skip
    shutil.copyfile(ROOT / checkpoint, ROOT / folder / "starter.pt")
    return {name: round(value / 60, 1) for name, value in seconds.items()}


def score(config: Config, folder: Path) -> dict[str, dict[str, float]]:
    """Whole-volume figures of the liver with its tumours, of each real CT."""
    images = sorted((config.source / "imagesTr").glob("[!.]*.nii.gz"))
    run("apply_model.py", *(path.resolve() for path in images),
        "--truth", (config.source / "labelsTr").resolve(), "--checkpoint", folder / "starter.pt",
        "--destination", folder / "results", "--overwrite")  # fmt: skip
    table = {}
    for name in (path.name.removesuffix(".nii.gz") for path in images):
        row = read_json(ROOT / folder / "results" / name / f"{name}.json")
        found = read_volume(ROOT / folder / "results" / name / f"{name}_label.nii.gz")
        truth = lay_on_grid(read_volume(config.source / "labelsTr" / f"{name}.nii.gz"), found)
        false = (found.ras.data > 0) & (truth.ras.data == 0)
        table[name] = {
            key: round(row[f"liver_{key}"], 4) for key in ("dice", "precision", "recall", "hd95_mm")
        } | {"false_positive_ml": round(float(false.sum()) * found.voxel_ml, 1)}
    return table


def main(config: Config) -> None:
    folder = config.work / f"seed_{config.seed}"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    minutes = {} if config.score_only else make_weights(config, folder)
    if not (config.source / "imagesTr").is_dir():
        print(f"{folder / 'starter.pt'} is made; not scored, {config.source} holds no imagesTr")
        return
    table = score(config, folder)
    dice = {name: row["dice"] for name, row in table.items()}
    others = [value for name, value in dice.items() if name not in CHOSEN_ON]
    path = ROOT / "benchmarks" / "results" / "starter.json"
    result = read_json(path) if path.exists() else {}
    result[f"seed_{config.seed}"] = {
        "command": f"python benchmarks/starter.py --seed {config.seed}",
        "bodies": BODIES,
        "prepare": PREPARE,
        "train": TRAIN,
        "minutes": minutes or result.get(f"seed_{config.seed}", {}).get("minutes", {}),
        "machine": {**machine(), "torch_threads": torch.get_num_threads()},
        "n": f"{len(dice)} real CTs, none trained on; settings chosen on {', '.join(CHOSEN_ON)}",
        "dice_mean": round(float(np.mean(list(dice.values()))), 4),
        "dice_worst": min(dice.values()),
        "dice_mean_of_the_others": round(float(np.mean(others)), 4) if others else None,
        "scans": table,
    }
    write_json(result, path)
    print(json.dumps(result[f"seed_{config.seed}"], indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
