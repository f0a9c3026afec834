"""Whole-volume Dice on real CTs in rotation: each patient is segmented by a network new to it.

    python benchmarks/real_ct.py ../shared/data/ct
    python benchmarks/real_ct.py --keep-empty 0.25 --name real_ct_keep_empty --entry 0.25
    python benchmarks/real_ct.py --recipe liver-tumour-ce --prepare-options="--subvolume-depth 0" \\
        --train-options="" --name real_ct_tumour

Runs the scripts as a user does: prepare.py with a given split, train.py, apply_model.py. The
held-out patients stand in the validation split to be monitored, and the LAST checkpoint is applied:
nothing is chosen by looking at them, so their Dice is that of unseen patients. It is applied with
and without post-processing, and what is falsely found is counted, also apart in the slices that
hold no foreground in truth: those that a network trained on sub-volumes with liver alone never saw.
A few patients show that the pipeline works on real CT and let two settings be compared; they say
nothing about accuracy in general. Writes benchmarks/results/real_ct.json.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from machine import RESULTS, ROOT, machine

import train
from data.files import read_json, write_json
from data.labels import Labels
from data.scans import read_label_map, read_volume
from utilities import load_checkpoint

VARIANTS = {  # post-processing → options of apply_model.py
    "with": "",
    "without": "--no-trim-by-hu --no-largest-component --no-fill-holes --no-tumour-inside",
}
FIGURES = ("dice", "false_positive_ml", "false_positive_ml_in_empty_slices")


@dataclass
class Config:
    """Data, and the options that are handed to the scripts."""

    source: tyro.conf.Positional[Path] = Path("../shared/data/ct")  # CTs with labels
    held_out: int = 2  # patients per round
    epochs: float = 100  # over ALL sub-volumes: with fewer of them kept, as many steps as that
    keep_empty: float = 1.0  # for prepare.py: fraction kept of the sub-volumes without foreground
    batch_size: int = 0  # for train.py; 0: that of the recipe
    recipe: str = ""  # of train.py; none: its first
    train_options: str = (  # for train.py; small enough for a CPU
        "--network unet --input-size 128 128 --loss dice_ce --learning-rate 2e-3"
    )
    prepare_options: str = ""  # more for prepare.py
    label_every: int = 1  # the network learns from every so many-th slice of the labels
    name: str = "real_ct"  # of the result file
    entry: str = ""  # key in that file, where it holds several rotations
    work: Path | None = None  # folder to keep what the scripts write; none: a temporary one


def run(*command: object) -> float:
    """Run one of the scripts; seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.perf_counter() - start


def thin_labels(source: Path, destination: Path, every: int) -> None:
    """A copy of a data set (links for scans) whose label maps hold slices 0, `every`, …."""
    for path in sorted((source / "imagesTr").glob("[!.]*.nii*")):
        for kind in ("imagesTr", "labelsTr"):
            (destination / kind).mkdir(parents=True, exist_ok=True)
        (destination / "imagesTr" / path.name).symlink_to(path.resolve())
        label = read_volume(source / "labelsTr" / path.name)
        array = np.array(label.ras.data)
        array[:, :, np.arange(array.shape[2]) % every != 0] = 0
        label.from_ras(array).write(destination / "labelsTr" / path.name)
    if (source / "dataset.json").exists():
        shutil.copyfile(source / "dataset.json", destination / "dataset.json")


def training_samples(prepared: dict) -> int:
    """Sub-volumes (or whole cases) of the training split."""
    return sum(item["split"] == "training" for item in prepared["subvolumes"])


def equal_steps(config: Config, prepared: dict) -> int:
    """Epochs that give as many steps as `config.epochs` over all sub-volumes would.

    All is what --keep-empty 1 would cut: a patient's slices in pieces of `subvolume_depth`. Where
    patches are cut from whole cases, nothing is left out.
    """
    depth = prepared["subvolume_depth"]
    if not depth:
        return round(config.epochs)
    recipe = train.RECIPES[config.recipe or next(iter(train.RECIPES))][1]
    batch = config.batch_size or recipe.batch_size
    cases = [case for case in prepared["cases"] if case["split"] == "training"]
    every = sum(math.ceil(case["slices"] / depth) for case in cases)
    each, all_of_them = (math.ceil(n / batch) for n in (training_samples(prepared), every))
    return round(config.epochs * all_of_them / each)


def steps_taken(saved: dict, prepared: dict) -> int:
    """Gradient steps behind a checkpoint."""
    settings = saved["config"]
    repeats = settings["patches_per_case"] if settings["sampling"] == "patches" else 1
    each = math.ceil(training_samples(prepared) * repeats / settings["batch_size"])
    return saved["epoch"] * each


def figures(folder: Path, case: str, truth: Path, saved: dict[str, Any]) -> dict[str, dict]:
    """Of each foreground class Dice, and ml of false positives: all, and in empty slices."""
    labels: Labels = saved["preprocessing"]["labels"]
    row, grid = read_json(folder / case / f"{case}.json"), read_volume(truth)
    predicted, known = (
        read_label_map(path, grid, saved["declared"], classes=labels).ras.data
        for path in (folder / case / f"{case}_label.nii.gz", truth)
    )
    empty, result = ~known.any(axis=(0, 1)), {}
    for index, name in enumerate(labels):
        if index:
            false = ((predicted == index) & (known != index)).sum(axis=(0, 1))
            in_ml = (part.sum() * grid.voxel_ml for part in (false, false[empty]))
            result[name] = {
                key: None if value is None else round(float(value), 4 if key == "dice" else 2)
                for key, value in zip(FIGURES, (row[f"{name}_dice"], *in_ml), strict=True)
            }
    return result


def whole_scan(folder: Path, case: str) -> dict[str, float]:
    """Mean IoU over the classes and pixel accuracy, background counted in both."""
    row = read_json(folder / case / f"{case}.json")
    return {key: round(row[key], 4) for key in ("mean_iou", "accuracy")}


def one_round(config: Config, held_out: list[str], others: list[str], work: Path) -> list[dict]:
    """Train on `others`, apply to `held_out`; one row per held-out patient."""
    split, data, checkpoint = work / "split.json", work / "prepared", work / "run" / "last.pt"
    split.write_text(json.dumps({"training": others, "validation": held_out, "test": []}))
    if config.label_every > 1:
        thin_labels(config.source, work / "raw", config.label_every)
    run("prepare.py", work / "raw" if config.label_every > 1 else config.source, "--destination",
        data, "--split", split, "--keep-empty", config.keep_empty, "--label-every",
        config.label_every, *shlex.split(config.prepare_options))  # fmt: skip
    prepared = read_json(data / "dataset.json")
    epochs = equal_steps(config, prepared)
    batch = ["--batch-size", config.batch_size] if config.batch_size else []
    seconds = run("train.py", *filter(None, [config.recipe]), "--data", data, "--run-folder",
                  checkpoint.parent, "--max-epochs", epochs, *batch,
                  *shlex.split(config.train_options))  # fmt: skip
    for variant, options in VARIANTS.items():
        run("apply_model.py", *(config.source / "imagesTr" / f"{name}.nii.gz" for name in held_out),
            "--truth", config.source / "labelsTr", "--checkpoint", checkpoint,
            "--destination", work / variant, *shlex.split(options))  # fmt: skip
    saved = load_checkpoint(checkpoint)
    return [
        {"patient": patient, "epochs": epochs, "steps": steps_taken(saved, prepared),
         "training_minutes": round(seconds / 60, 1),
         **whole_scan(work / "with", patient),
         **{variant: figures(work / variant, patient,
                             config.source / "labelsTr" / f"{patient}.nii.gz", saved)
            for variant in VARIANTS}}
        for patient in held_out
    ]  # fmt: skip


def describe(values: Iterable[float | None], figure: str) -> dict[str, float | None]:
    """Mean, median and worst of the values that are known."""
    known, worst = [v for v in values if v is not None], min if figure == "dice" else max
    return {
        key: round(float(of(known)), 4) if known else None
        for key, of in (("mean", np.mean), ("median", np.median), ("worst", worst))
    }


def summary(table: list[dict]) -> dict:
    """Per post-processing and class mean, median and worst of each figure over the patients."""
    return {
        variant: {
            name: {
                fig: describe((row[variant][name][fig] for row in table), fig) for fig in FIGURES
            }
            for name in table[0][variant]
        }
        for variant in VARIANTS
    }


def write(result: dict, config: Config) -> None:
    """The file, or its entry beside the others."""
    path = RESULTS / f"{config.name}.json"
    if config.entry:
        known = read_json(path) if path.exists() else {}
        result = dict(sorted({**known, config.entry: result}.items()))
    write_json(result, path)


def rotate(config: Config) -> list[dict]:
    """A row per patient, each held out in one round."""
    patients = sorted(
        path.name.removesuffix(".nii.gz") for path in (config.source / "imagesTr").glob("*.nii.gz")
    )
    rounds, table = len(patients) // config.held_out, []
    for turn in range(rounds):
        held_out = patients[turn::rounds]
        others = [patient for patient in patients if patient not in held_out]
        with tempfile.TemporaryDirectory() as temporary:
            work = config.work / str(turn) if config.work else Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            table += one_round(config, held_out, others, work)
        print(json.dumps(table, indent=1), flush=True)
    return table


def main(config: Config) -> None:
    table = rotate(config)
    minutes = {row["patient"]: row["training_minutes"] for row in table}
    given = shlex.join(sys.argv).replace(f" --work {config.work}", "")
    result = {
        "command": f"python {given}",
        "keep_empty": config.keep_empty,
        "train_options": f"{config.recipe} {config.train_options}".strip(),
        "prepare_options": config.prepare_options,
        "label_every": config.label_every,
        "epochs_over_all_subvolumes": config.epochs,
        "n": f"{len(table)} patients, each unseen by its network",
        "machine": machine(torch_too=True),
        "median_training_minutes": statistics.median(minutes.values()),
        "mean_iou": round(float(np.mean([row["mean_iou"] for row in table])), 4),
        "accuracy": round(float(np.mean([row["accuracy"] for row in table])), 4),
        "summary": summary(table),
        "patients": table,
    }
    write(result, config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
