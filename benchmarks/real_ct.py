"""Whole-volume Dice on real CTs in rotation: each patient is segmented by a network new to it.

    python benchmarks/real_ct.py ../shared/data/ct

Runs the scripts as a user does: prepare.py with a given split, train.py, apply_model.py. The
held-out patients stand in the validation split to be monitored, and the LAST checkpoint is applied:
nothing is chosen by looking at them, so their Dice is that of unseen patients. A few patients show
that the pipeline works on real CT and let two settings be compared; they say nothing about accuracy
in general. Writes benchmarks/results/real_ct.json.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    """Data, and the options that are handed to train.py."""

    source: tyro.conf.Positional[Path] = Path("../shared/data/ct")  # CTs with labels
    held_out: int = 2  # patients per rotation
    epochs: int = 100  # of each rotation
    train_options: str = (
        "--network unet --input-size 128 128 --loss dice_ce --learning-rate 2e-3"  # for train.py
    )
    prepare_options: str = "--keep-empty 1.0"  # for prepare.py
    name: str = "real_ct"  # of the result file


def run(*command: object) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.perf_counter() - start


def rotation(config: Config, held_out: list[str], others: list[str], work: Path) -> list[dict]:
    """Train on `others`, apply to `held_out`; one row per held-out patient."""
    split = work / "split.json"
    split.write_text(json.dumps({"training": others, "validation": held_out, "test": []}))
    data, checkpoint, results = work / "prepared", work / "run", work / "results"
    run("prepare.py", config.source, "--destination", data, "--split", split,
        *config.prepare_options.split())  # fmt: skip
    seconds = run("train.py", "--data", data, "--run-folder", checkpoint, "--max-epochs",
                  config.epochs, *config.train_options.split())  # fmt: skip
    run("apply_model.py", "--split", "validation", "--data", data, "--checkpoint",
        checkpoint / "last.pt", "--destination", results)  # fmt: skip
    with (results / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {"patient": row["case"], "liver_dice": round(float(row["liver_dice"]), 4),
         "liver_volume_ml": float(row["liver_volume_ml"]),
         "training_minutes": round(seconds / 60, 1)}
        for row in rows
    ]  # fmt: skip


def main(config: Config) -> None:
    patients = sorted(
        path.name.removesuffix(".nii.gz") for path in (config.source / "imagesTr").glob("*.nii.gz")
    )
    rounds = len(patients) // config.held_out
    table: list[dict] = []
    for turn in range(rounds):
        held_out = patients[turn::rounds]
        others = [patient for patient in patients if patient not in held_out]
        with tempfile.TemporaryDirectory() as folder:
            table += rotation(config, held_out, others, Path(folder))
        print(json.dumps(table, indent=2))
    dice = [row["liver_dice"] for row in table]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "train_options": config.train_options,
        "prepare_options": config.prepare_options,
        "epochs": config.epochs,
        "n": f"{len(table)} patients, each unseen by its network; seed 0",
        "patients": table,
        "mean_liver_dice": round(float(np.mean(dice)), 4),
        "worst_liver_dice": min(dice),
    }
    path = ROOT / "benchmarks" / "results" / f"{config.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
