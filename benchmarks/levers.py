"""Accuracy on real CTs in 3-fold cross-validation: settings compared at equal epochs.

    python benchmarks/levers.py --seeds 0 1 2
    python benchmarks/levers.py --settings laptop "laptop --pretrained-share 0" --patients 1
    python benchmarks/levers.py --settings "liver-tumour-ce --loss dice_ce" --epochs 50

Three rounds over the six patients of `--source`: four train (or the first `--patients` of them),
two are new to the network. A setting is options of train.py, with or without a recipe. The
scripts are run as a user runs them, on one thread; the CPU minutes of train.py stand in each row.
The held-out patients are in the validation split, and the LAST checkpoint is applied: nothing is
chosen by looking at them. Figures are per patient, on the scan's own grid.
Each row is written as soon as it is known, and what is known is not run again.
Writes benchmarks/results/few_patients.json. Answered questions, with the first edition of the
starter, are in levers.json, and their settings in its commit.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from machine import DATA, RESULTS, ROOT, machine

import train
from data.files import read_json, write_json

FIGURES = ("dice", "precision", "recall", "hd95_mm")


@dataclass
class Config:
    """What is compared, and on what."""

    settings: tuple[str, ...] = ("laptop",)  # options of train.py, as one text each
    seeds: tuple[int, ...] = (0,)  # of weights, order and augmentation
    epochs: int = 18  # of each training
    patients: int = 4  # of the four training patients of a round, how many are used
    rounds: tuple[int, ...] = (0, 1, 2)
    source: Path = DATA / "ct"  # real CTs with labels
    work: Path = Path("data/levers")  # what the scripts write; relative: below the project


def run(*command: object) -> float:
    """Run one of the scripts on one thread; CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    words = [sys.executable, *map(str, command)]
    subprocess.run(words, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def split_patients(config: Config, turn: int, seed: int) -> tuple[list[str], list[str]]:
    """Return training and held-out patients; another seed begins with another patient."""
    patients = list_cases(config.source)
    held_out = patients[turn::3]
    others = [name for name in patients if name not in held_out]
    first = seed % len(others)
    return (others[first:] + others[:first])[: config.patients], held_out


def list_cases(source: Path) -> list[str]:
    """Return the names of all cases of a data set."""
    return sorted(p.name[:-7] for p in (source / "imagesTr").glob("[!.]*.nii.gz"))


def name_file(text: str) -> str:
    """Return a text as a name of a file."""
    return text.replace(", ", "_").replace(" ", "_").replace("/", "_")


def read_options(setting: str) -> tuple[list[str], bool]:
    """Return the words for train.py, and whether they take patches of whole cases."""
    words = shlex.split(setting)
    recipe = train.RECIPES.get(words[0], train.RECIPES[next(iter(train.RECIPES))])[1]
    patches = words[words.index("--sampling") + 1] if "--sampling" in words else recipe.sampling
    return words, patches == "patches"


def prepare(config: Config, training: list[str], held_out: list[str], patches: bool) -> Path:
    """Prepare the data of a round once; return their folder."""
    kind = "patches" if patches else "subvolumes"
    name = name_file("_".join([kind, *training, "without", *held_out]))
    data = config.work / "prepared" / name
    if not (ROOT / data / "dataset.json").exists():
        split = ROOT / config.work / f"{name}.json"
        split.parent.mkdir(parents=True, exist_ok=True)
        unused = sorted({*list_cases(config.source)} - {*training, *held_out})
        split.write_text(json.dumps({"training": training, "validation": held_out, "test": unused}))
        run("prepare.py", config.source, "--destination", data, "--split", split,
            "--subvolume-depth", 0 if patches else 16)  # fmt: skip
    return data


def fit(setting: str, data: Path, folder: Path, seed: int, epochs: int) -> float:
    """Train once; return the CPU seconds."""
    words, _ = read_options(setting)
    recipe = [] if words[0].startswith("--") else [words.pop(0)]
    return run("train.py", *recipe, "--data", data, "--run-folder", folder, "--seed", seed,
               "--max-epochs", epochs, "--val-interval", epochs, *words)  # fmt: skip


def score(data: Path, held_out: list[str], run_folder: Path, results: Path) -> dict:
    """Figures of each held-out patient, segmented by the last checkpoint."""
    run("apply_model.py", "--split", "validation", "--data", data, "--checkpoint",
        run_folder / "last.pt", "--destination", results)  # fmt: skip
    rows = {name: read_json(ROOT / results / name / f"{name}.json") for name in held_out}
    return {
        name: {key: round(row[f"liver_{key}"], 4) for key in FIGURES} for name, row in rows.items()
    }


def run_once(config: Config, setting: str, turn: int, seed: int) -> dict:
    """Train, apply to the held-out patients; return the row."""
    training, held_out = split_patients(config, turn, seed)
    data = prepare(config, training, held_out, read_options(setting)[1])
    name = name_file(f"{setting}_{config.patients}p_{turn}_{seed}")
    folder = config.work / "runs" / name
    seconds = fit(setting, data, folder, seed, config.epochs)
    return {
        "setting": setting,
        "patients": config.patients, "round": turn, "seed": seed,
        "training": training, "epochs": config.epochs,
        "training_cpu_minutes": round(seconds / 60, 2),
        "scans": score(data, held_out, folder, config.work / "results" / name),
    }  # fmt: skip


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Of each setting: mean, worst, and the mean of each seed."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        key = f"{row['setting']}, {row['patients']} patients"
        groups.setdefault(key, []).append(row)
    table = {}
    for key, group in groups.items():
        dice = {pair: scan["dice"] for pair, scan in list_scans(group).items()}
        seeds = sorted({seed for seed, _ in dice})
        means = [statistics.mean(v for (s, _), v in dice.items() if s == seed) for seed in seeds]
        apart = [scan["hd95_mm"] for scan in list_scans(group).values()]
        minutes = statistics.mean(row["training_cpu_minutes"] for row in group)
        table[key] = {
            "n": len(dice), "seeds": len(seeds),
            "dice_mean": round(statistics.mean(dice.values()), 4),
            "dice_worst": round(min(dice.values()), 4),
            "dice_of_each_seed": [round(value, 4) for value in means],
            "hd95_mm_mean": round(statistics.mean(apart), 2), "cpu_minutes_mean": round(minutes, 2),
        }  # fmt: skip
    return table


def list_scans(rows: list[dict]) -> dict[tuple[int, str], dict]:
    """Return the figures of each seed and scan."""
    return {(row["seed"], name): scan for row in rows for name, scan in row["scans"].items()}


def main(config: Config) -> None:
    path = RESULTS / "few_patients.json"
    known = read_json(path) if path.exists() else {"rows": []}
    keys = ("setting", "patients", "round", "seed")
    done = {tuple(row[key] for key in keys) for row in known["rows"]}
    wanted = itertools.product(config.seeds, config.rounds, config.settings)
    for seed, turn, setting in wanted:
        run_key = (setting, config.patients, turn, seed)
        if run_key in done:
            continue
        known["rows"].append(run_once(config, setting, turn, seed))
        known |= {"machine": machine(), "summary": summarise(known["rows"])}
        known["laptop"] = train.RECIPES["laptop"][1].plain()
        write_json(known, path)
    print(json.dumps(summarise(known["rows"]), indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
