"""Liver Dice of networks that learnt from every k-th slice, against fully drawn labels.

    python benchmarks/label_every.py      # phantoms, 20 CPU minutes
    python benchmarks/label_every.py --real ../shared/data/ct --every 1 2 4 8      # real CTs
    python benchmarks/label_every.py --real ../shared/data/ct --every 1 8 --epochs 20 --from-noise

Each k: the labels to learn from keep every k-th slice (`prepare.py --label-every k`), the network
is trained for equally many steps, and the last checkpoint segments phantoms that it never
saw, whose labels are whole. The real CTs go through `benchmarks/real_ct.py` in rotation, each round
from the starter weights, which is the same for all k.
Writes benchmarks/results/label_every.json.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import real_ct
import tyro
from machine import RESULTS, machine, name_command
from real_ct import run, thin_labels, training_samples

from data.files import read_csv, read_json, write_json

PREPARE = "--training 0.875 --validation 0.125 --test 0"
TRAIN = (
    "--network unet --base-channels 16 --spacing 3 3 --input-size 64 64 --loss dice_ce "
    "--learning-rate 2e-3 --val-interval 100"
)
REAL = (
    "--sampling patches --spacing 4 4 4 --input-size 80 80 48 "
    "--network unet --base-channels 16 --loss dice_ce --learning-rate 1e-3 --val-interval 10"
)


@dataclass
class Config:
    every: tuple[int, ...] = (1, 4)  # which slices are drawn
    cases: int = 16  # phantoms to train on, an eighth of them in the validation split
    unseen: int = 8  # phantoms to segment
    steps: int = 400  # of each training
    seeds: tuple[int, ...] = (0, 1)  # of the weights and the order
    real: Path | None = None  # real CTs with labels instead of phantoms
    epochs: int = 10  # of a round on real CTs
    from_noise: bool = False  # on real CTs, instead of from the starter weights
    name: str = "label_every"  # of the result file


def train_once(config: Config, raw: Path, every: int, seed: int, work: Path) -> dict:
    """One training on the thinned phantoms and its Dice on the unseen ones."""
    data, folder, results = (work / f"{what}_{every}" for what in ("data", "run", "results"))
    if not data.exists():
        thin_labels(raw / "known", work / f"raw_{every}", every)
        run("prepare.py", work / f"raw_{every}", "--destination", data, "--label-every", every,
            *PREPARE.split())  # fmt: skip
    samples = training_samples(read_json(data / "dataset.json"))
    each = -(-samples // 2)  # steps of an epoch, of two sub-volumes each
    epochs = round(config.steps / each)
    minutes = run("train.py", "--data", data, "--run-folder", folder, "--max-epochs", epochs,
                  "--seed", seed, *TRAIN.split()) / 60  # fmt: skip
    run("apply_model.py", *sorted((raw / "unseen/imagesTr").iterdir()), "--truth",
        raw / "unseen/labelsTr", "--checkpoint", folder / "last.pt",
        "--destination", results)  # fmt: skip
    rows = read_csv(results / "results.csv", ("case", "liver_dice"))
    shutil.rmtree(folder)
    shutil.rmtree(results)
    return {
        "seed": seed, "steps": epochs * each, "sub-volumes": samples, "minutes": round(minutes, 1),
        "dice": {row["case"]: round(float(row["liver_dice"]), 4) for row in rows},
    }  # fmt: skip


def compare_phantoms(config: Config, work: Path) -> dict:
    """Mean Dice of each k over seeds and phantoms, and how far it is from k = 1."""
    for part, first, count in (("known", 0, config.cases), ("unseen", 500, config.unseen)):
        run("data/make_phantoms.py", "--destination", work / "raw" / part, "--first", first,
            "--cases", count)  # fmt: skip
    rows, table = {every: [] for every in config.every}, {}
    for seed in config.seeds:
        for every in config.every:
            rows[every].append(train_once(config, work / "raw", every, seed, work))
            means = [np.mean(list(row["dice"].values())) for row in rows[every]]
            known = [value for row in rows[every] for value in row["dice"].values()]
            table[f"every {every}"] = {
                "mean": round(float(np.mean(means)), 4),
                "mean_of_each_seed": [round(float(mean), 4) for mean in means],
                "worst": min(known),
                "runs": rows[every],
            }
            write(config, {"phantoms": {
                "command": name_command(), "train_options": TRAIN,
                "n": f"{config.unseen} unseen phantoms × {len(rows[every])} seeds",
                "machine": machine(torch_too=True), **table,
            }})  # fmt: skip
    return table


def write(config: Config, entry: dict) -> None:
    path = RESULTS / f"{config.name}.json"
    write_json({**(read_json(path) if path.exists() else {}), **entry}, path)


def main(config: Config) -> None:
    if config.real is None:
        with tempfile.TemporaryDirectory() as folder:
            compare_phantoms(config, Path(folder))
        return
    start = "" if config.from_noise else " --pretrained checkpoints/starter.pt"
    for every in config.every:
        given = real_ct.Config(
            source=config.real, epochs=config.epochs, train_options=REAL + start,
            label_every=every, prepare_options="--subvolume-depth 0", keep_empty=0.0,
            name=config.name, entry=f"real_ct_every_{every}{'_from_noise' * config.from_noise}",
        )  # fmt: skip
        real_ct.main(given)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
