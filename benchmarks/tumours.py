"""Tumour Dice on unseen phantoms: balanced patches against 16-slice sub-volumes, equal CPU minutes.

    python benchmarks/tumours.py

Makes phantoms with 1 to 4 tumours each, and trains the same network twice, each within the CPU
minutes that are given: on patches at one spacing with Dice + cross-entropy, and on sub-volumes
resized to 64 × 64 with plain cross-entropy. The last checkpoint segments phantoms that neither saw.
Writes benchmarks/results/tumours.json and the README's picture of tumours.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from machine import RESULTS, ROOT, machine, name_command

from data.files import read_csv, write_json

COMMON = "--network unet --learning-rate 1e-3 --val-interval 20"
SETTINGS = {  # name → (options for prepare.py, options for train.py)
    "patches, Dice + cross-entropy": (
        "--subvolume-depth 0",
        "--spacing 2.5 2.5 3 --input-size 64 64 32 --loss dice_ce",
    ),
    "sub-volumes, cross-entropy": (
        "",
        "--sampling subvolumes --spacing 2.5 2.5 --input-size 128 128 --loss ce",
    ),
}


@dataclass
class Config:
    cases: int = 30  # phantoms: 60 % train, 10 % watch, 30 % are never seen
    epochs: tuple[int, int] = (150, 150)  # of the two settings; chosen to fill the minutes
    seed: int = 0  # of the weights and the order
    results: Path = RESULTS / "tumours.json"  # JSON to write


def run(*command: object) -> float:
    """Run a script on one thread; the CPU minutes that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def patients(results: Path) -> list[dict]:
    keys = ("liver_dice", "tumour_dice", "tumour_lesion_recall", "tumour_lesion_precision")
    rows = read_csv(results / "results.csv", ("case", *keys))
    return [
        {"case": row["case"]} | {key: round(float(row[key]), 4) for key in keys if row[key]}
        for row in rows
    ]


def one(options: tuple[str, str], epochs: int, config: Config, raw: Path, work: Path) -> dict:
    data, checkpoint, results = work / "data", work / "run", work / "results"
    split = ["--training", 0.6, "--validation", 0.1, "--test", 0.3]
    run("prepare.py", raw, "--destination", data, *split, *options[0].split())
    minutes = run("train.py", "liver-tumour-ce", "--data", data, "--run-folder", checkpoint,
                  "--max-epochs", epochs, "--seed", config.seed, *COMMON.split(),
                  *options[1].split())  # fmt: skip
    run("apply_model.py", "--split", "test", "--data", data, "--checkpoint",
        checkpoint / "last.pt", "--destination", results)  # fmt: skip
    table = patients(results)
    return {
        "options": f"liver-tumour-ce {COMMON} {options[1]} --max-epochs {epochs}",
        "training_cpu_minutes": round(minutes, 1),
        "mean_liver_dice": round(float(np.mean([row["liver_dice"] for row in table])), 4),
        "mean_tumour_dice": round(float(np.mean([row["tumour_dice"] for row in table])), 4),
        "n": f"{len(table)} unseen phantoms, seed {config.seed}",
        "patients": table,
    }


def main(config: Config) -> None:
    found = {"command": name_command(), "machine": {**machine(), "threads": 1}}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        run("data/make_phantoms.py", "--destination", raw, "--cases", config.cases,
            "--tumours", 1, 4)  # fmt: skip
        for (name, options), epochs in zip(SETTINGS.items(), config.epochs, strict=True):
            work = Path(folder) / name.split(",")[0]
            found[name] = one(options, epochs, config, raw, work)
            if "patches" in name:
                shutil.copy(work / "run/preview.png", ROOT / "docs/pictures/tumours.png")
            print(json.dumps(found, indent=2))
    write_json(found, config.results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
