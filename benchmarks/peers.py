"""Other programs in the same CPU minutes, on the patients and in the rounds of `levers.py`.

    make peers      # makes their own environment, .venv-peers, and runs all: hours
    python benchmarks/peers.py --peers nnunet_lowres --seeds 0 1 2

nnU-Net plans, augments, trains and applies as it comes; what is shortened is its schedule, whose
learning rate falls to zero over the minutes, and it plans for a memory of MEMORY_GB. The network,
chain and training of MONAI's tutorial are in `peer_monai.py`. Both learn liver with tumours as one
class from the same four patients, on one thread, for as many CPU minutes as ours has with those of
its starter weights; loading, caching and augmenting count, nnU-Net's planning and preprocessing
stand apart. The last weights are applied to the two held-out patients, without mirroring, and
scored on the scans' own grids, as they are and with the largest component alone.
Each row is written as soon as it is known, and what is known is not run again.
Writes benchmarks/results/peers.json.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import levers
import tyro
from machine import DATA, RESULTS, ROOT, machine

from apply_model import Options, clean
from data.evaluate import evaluate
from data.files import read_json, write_json
from data.labels import BACKGROUND, USUAL_LABELS
from data.scans import read_label_map, read_volume
from data.volumes import Volume

OURS = "laptop"  # the setting of levers.py that is compared
OURS_MINUTES = 4.0  # of it; 16 more were spent on the starter weights
PEERS = {  # name → program, configuration
    "nnunet_lowres": ("nnU-Net", "3d_lowres"),
    "monai": ("MONAI tutorial", "spleen_segmentation_3d"),
    "nnunet_fullres": ("nnU-Net", "3d_fullres"),
}
PYTHONS = {"nnU-Net": ROOT / ".venv-peers/bin/python", "MONAI tutorial": Path(sys.executable)}
SCRIPTS = {"nnU-Net": "peer_nnunet.py", "MONAI tutorial": "peer_monai.py"}
LIVER = {BACKGROUND: (0,), "liver": (1, 2)}  # with its tumours
WAYS = ("as_it_is", "largest_component")
MEMORY_GB = 1.0  # that nnU-Net plans for; its usual 8 are minutes for one iteration on one thread
CONDITIONS = {
    "ours": f"{OURS}: {OURS_MINUTES:g} minutes and 16 for the starter weights",
    "nnU-Net": f"planned for {MEMORY_GB:g} GB, fold all, windows step by half, no mirroring",
    "MONAI tutorial": "the liver's HU window, padded to a patch, the last weights",
}
KEYS = ("program", "configuration", "minutes", "round", "seed")


@dataclass
class Config:
    """Which programs are compared, and on what."""

    peers: tuple[str, ...] = tuple(PEERS)
    minutes: float = 20.0  # of CPU time on one thread, for one training
    seeds: tuple[int, ...] = (0,)  # of weights, order and augmentation
    rounds: tuple[int, ...] = (0, 1, 2)
    source: Path = DATA / "ct"  # real CTs with labels
    work: Path = ROOT / "data" / "peers"  # what the programs write
    results: Path = RESULTS / "peers.json"


# Running


def call(program: str, step: str, job: Path) -> float:
    """Run one step of a program on one thread, its output to `step.log`; CPU minutes of it all."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = job.parent.parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "nnUNet_raw": f"{work}/raw", "nnUNet_preprocessed": f"{work}/preprocessed",
        "nnUNet_results": str(job.parent), "nnUNet_n_proc_DA": "1" if step == "prepare" else "0",
    }  # fmt: skip
    command = [PYTHONS[program], ROOT / "benchmarks" / SCRIPTS[program], step, job]
    with (job.parent / f"{step}.log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(spent / 60, 2)


def read_liver(path: Path, grid: Volume) -> Volume:
    """A label map on the grid of its scan: 1 where there is liver or tumour."""
    return read_label_map(path, grid, USUAL_LABELS, classes=LIVER)


def write_round(source: Path, training: list[str], held_out: list[str], folder: Path) -> None:
    """A round as a data set of nnU-Net v2: liver and tumours are one class."""
    if (folder / "dataset.json").exists():
        return
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in sorted([*training, *held_out]):
        scan = source / "imagesTr" / f"{name}.nii.gz"
        part = "imagesTr" if name in training else "imagesTs"
        shutil.copyfile(scan, folder / part / f"{name}_0000.nii.gz")
        if name in training:
            label = read_liver(source / "labelsTr" / scan.name, read_volume(scan))
            label.like(label.read()).write(folder / "labelsTr" / scan.name)
    about = {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1},
        "numTraining": len(training), "file_ending": ".nii.gz",
    }  # fmt: skip
    write_json(about, folder / "dataset.json")


def describe_job(config: Config, peer: str, turn: int, seed: int) -> Path:
    """Write what a program is to do, with its data; the file's path."""
    training, held_out = levers.split_patients(levers.Config(source=config.source), turn, seed)
    data = config.work / "raw" / f"Dataset{turn + 1:03d}_Liver"
    write_round(config.source, training, held_out, data)
    folder = config.work / f"{peer}_{config.minutes:g}min_{turn}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "configuration": PEERS[peer][1], "minutes": config.minutes, "seed": seed, "data": data,
        "folder": folder, "memory_gb": MEMORY_GB,
        "training": [
            {"image": data / "imagesTr" / f"{n}_0000.nii.gz",
             "label": data / "labelsTr" / f"{n}.nii.gz"} for n in training
        ],
        "held_out": {n: data / "imagesTs" / f"{n}_0000.nii.gz" for n in held_out},
    }  # fmt: skip
    write_json(job, folder / "job.json")
    return folder / "job.json"


def score(prediction: Path, truth: Path) -> dict[str, dict]:
    """Figures of the liver on the truth's grid, as predicted and with the largest component."""
    grid = read_volume(truth)
    true, found = read_liver(truth, grid), read_liver(prediction, grid)
    found = found.like(found.read())
    largest = found.like(clean(found.read(), ["liver"], Options(fill_holes=False)))
    rows = {}
    for way, volume in zip(WAYS, (found, largest), strict=True):
        row = evaluate(volume, true, ["liver"])
        figures = {key: row[f"liver_{key}"] for key in levers.FIGURES}
        rows[way] = {k: None if v is None else round(v, 4) for k, v in figures.items()}
    return rows


def run_once(config: Config, peer: str, turn: int, seed: int) -> dict:
    """Prepare, train, apply to the held-out patients; the row. Without figures if not planned."""
    program, configuration = PEERS[peer]
    job = describe_job(config, peer, turn, seed)
    about, folder = read_json(job), job.parent
    row = dict(zip(KEYS, (program, configuration, config.minutes, turn, seed), strict=True))
    if program == "nnU-Net":
        row["preparing_cpu_minutes"] = call(program, "prepare", job)
        row["plan"] = read_json(folder / "plan.json")
        if row["plan"] is None:  # its planner makes no such configuration of these patients
            return row
    row["training_cpu_minutes"] = call(program, "train", job)
    row |= read_json(folder / "training.json")
    row["applying_cpu_minutes"] = call(program, "predict", job)
    row["scans"] = {
        name: score(folder / f"{name}.nii.gz", config.source / "labelsTr" / f"{name}.nii.gz")
        for name in about["held_out"]
    }
    return row


# Comparing


def find_ours(rows: list[dict]) -> dict[tuple[int, str], float]:
    """(seed, patient) → Dice, of our rows in levers.json."""
    keys, ours = ("setting", "minutes", "patients"), (OURS, OURS_MINUTES, 4)
    chosen = [row for row in rows if tuple(row[key] for key in keys) == ours]
    return {pair: scan["dice"] for pair, scan in levers.list_scans(chosen).items()}


def summarise(rows: list[dict], ours: dict[tuple[int, str], float]) -> dict[str, dict]:
    """Of each configuration: mean, worst, and ours minus theirs in each patient of each seed."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        key = f"{row['program']}, {row['configuration']}, {row['minutes']:g} min"
        groups.setdefault(key, []).append(row)
    return {key: summarise_group(group, ours) for key, group in groups.items()}


def summarise_group(group: list[dict], ours: dict[tuple[int, str], float]) -> dict:
    """The same of the rows of one configuration; its rounds without a plan are named."""
    known = [row for row in group if "scans" in row]
    entry: dict = {"not_planned": [[r["round"], r["seed"]] for r in group if "scans" not in r]}
    if not known:
        return entry
    for key in ("preparing_cpu_minutes", "training_cpu_minutes", "iterations"):
        if key in known[0]:
            entry[f"{key}_mean"] = round(statistics.mean(row[key] for row in known), 2)
    for way in WAYS:
        scans = {(r["seed"], name): s[way] for r in known for name, s in r["scans"].items()}
        dice = {key: scan["dice"] for key, scan in scans.items()}
        far = [scan["hd95_mm"] for scan in scans.values() if scan["hd95_mm"] is not None]
        less = {key: round(ours[key] - dice[key], 4) for key in dice if key in ours}
        entry[way] = {
            "n": len(dice), "dice_worst": min(dice.values()),
            "dice_mean": round(statistics.mean(dice.values()), 4),
            "hd95_mm_mean": round(statistics.mean(far), 2) if far else None,
            "ours_minus_theirs": {f"{name} seed {seed}": d for (seed, name), d in less.items()},
            "ours_minus_theirs_mean": round(statistics.mean(less.values()), 4) if less else None,
            "ours_at_least_in": f"{sum(d >= 0 for d in less.values())} of {len(less)}",
        }  # fmt: skip
    return entry


def main(config: Config) -> None:
    known = read_json(config.results) if config.results.exists() else {"rows": []}
    ours = find_ours(read_json(RESULTS / "levers.json")["rows"])
    done = {tuple(row[key] for key in KEYS) for row in known["rows"]}
    wanted = [(p, t, s) for s in config.seeds for p in config.peers for t in config.rounds]
    for peer, turn, seed in wanted:
        if (*PEERS[peer], config.minutes, turn, seed) in done:
            continue
        known["rows"].append(run_once(config, peer, turn, seed))
        known |= {"conditions": CONDITIONS, "machine": machine()}
        known["summary"] = summarise(known["rows"], ours)
        write_json(known, config.results)
    print(json.dumps(summarise(known["rows"], ours), indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
