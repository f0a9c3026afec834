"""Starter weights from synthetic bodies alone, the gate of the bodies, and scores of the weights.

    python benchmarks/starter.py --gate                            # shapes against real masks
    python benchmarks/starter.py                                   # make the weights, then score
    python benchmarks/starter.py --score checkpoints/starter.pt --sets painted bodies

No voxel of a real CT is trained on. The sets `painted` and `bodies` are synthetic: they choose
settings and seed. `six` and `degraded` are real CTs, a test that chooses nothing. What `--work`
holds already is not made again. Writes `starter.pt` and `starter_tumours.pt` below WORK/seed_N, and
benchmarks/results/starter.json.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bodies
import nibabel as nib
import numpy as np
import torch
import tyro
from machine import DATA, RESULTS, ROOT, machine, name_command
from tqdm import tqdm
from trust import harm

import apply_model
from apply_model import load_model, segment
from data.evaluate import LESION_SIZES, evaluate
from data.files import read_json, write_json
from data.scans import lay_on_grid, read_volume
from data.volumes import Volume

# The second stage goes on at 3 mm, on other bodies, most of them with tumours of many kinds. The
# third goes on from there with three seeds; half of its bodies are slabs. From their mean go the
# stages of liver and tumour apart, the third with two seeds. From their mean go the liver alone,
# with two seeds, and tumours among trees of vessels and fat at the porta. From these goes the liver
# alone once more; it is half of the starter.
BODIES = {
    "4mm": "--cases 640 --spacing 4 4 4", "3mm": "--cases 560 --spacing 3 3 3 --tumours 400",
    "slabs": "--cases 600 --spacing 3 3 3 --tumours 480 --slabs 0.45 --slab-middle -170 60",
    "tumours_3mm": "--cases 600 --spacing 3 3 3 --tumours 540 --slabs 0.3 --slab-middle -170 60",
    "tumours_2mm": "--cases 320 --spacing 2 2 2 --tumours 300 --slabs 0.2 --slab-middle -170 60",
    "2mm": "--cases 300 --spacing 2 2 2 --tumours 300 --slabs 0.45 --slab-middle -170 60",
    "vessels": "--cases 300 --spacing 2 2 2 --tumours 300 --slabs 0.3 --slab-middle -170 60 "
    "--edition 2",
}  # fmt: skip
SEEDS: dict[str, Callable[[int], tuple[int, int]]] = {  # of a training → of bodies and their split
    "4mm": lambda n: (n, n), "3mm": lambda n: (n + 100, n), "slabs": lambda n: (n + 300, n),
    "tumours_3mm": lambda n: (400, 5), "tumours_2mm": lambda n: (500, 6),
    "2mm": lambda n: (n + 600, n), "vessels": lambda n: (n + 700, n),
}  # fmt: skip
PREPARE = (
    "--subvolume-depth 0 --foreground liver --accept outline outside hu empty left_right "
    "--training 0.95 --validation 0.05 --test 0"
)
TRAIN = (
    "--sampling patches --network unet --base-channels 16 --loss dice_ce --batch-size 2 "
    "--patches-per-case 2 "
)
SMALL = "--spacing 3 3 3 --input-size 96 96 64 --learning-rate 1e-3 --pretrained {before} "
APART = SMALL + "--labels liver=liver tumour=tumour --foreground-sampling 0.8 "
FINE = APART + "--spacing 2 2 2 --patches-per-case 4 "
LONG = "--foreground-sampling 0.67 --max-epochs 8 --val-interval 8 "
LIVER = SMALL + "--spacing 2 2 2 --patches-per-case 4 --max-epochs 5 --val-interval 5"
STAGES = {  # {before}: checkpoint that a stage goes on from
    "4mm": "--spacing 4 4 4 --input-size 80 80 48 --learning-rate 2e-3 --max-epochs 6 "
    "--val-interval 6",
    "3mm": SMALL + "--max-epochs 7 --val-interval 7",
    "slabs": SMALL + "--max-epochs 6 --val-interval 6 --pretrained-share 0.5",
    "tumours_3mm": APART + "--max-epochs 5 --val-interval 5",
    "tumours_2mm": FINE + "--max-epochs 10 --val-interval 10",
    "2mm": FINE + LONG,
    "vessels": FINE + LONG + "--pretrained-share 0.5",
    "liver": LIVER,
    "liver_vessels": LIVER,
}
LAST = (0, 1, 2)  # seeds of a last stage, whose weights are averaged
KEYS = ("dice", "hd95_mm", "false_positive_ml")
SLAB = 40  # mm, of slabs that are cut from painted scans
NOISE = 100  # HU, SD in each voxel, of degraded real CTs
DEGRADED = [  # what else is done to them, and how strongly (`harm` of trust.py)
    ("thick slices", 2), ("thick slices", 4), ("HU shifted", 40), ("HU shifted", -40),
    ("contrast", 0.6), ("blur", 4), ("streaks", 40), ("turned", 10), ("cropped view", 0.7),
    ("cropped z", 0.5), ("mirrored", 1), ("upside down", 1), ("round frame of 0 HU", 0.9),
    ("end slices of 0 HU", 5),
]  # fmt: skip
Item = tuple[str, str, Volume, Volume]  # set, case, scan, label map


@dataclass
class Config:
    """What is made or scored, and where."""

    work: Path = Path("data/starter")  # for bodies and runs; relative: below the project
    seed: int = 2  # of the first two stages: bodies, weights, order and augmentation
    score: tuple[Path, ...] = ()  # checkpoints that are scored; none: make those of the seed
    sets: tuple[str, ...] = ("painted", "bodies", "six")  # what they are scored on
    sure: float = apply_model.SURE  # probability that a tumour must exceed somewhere; 0: any
    gate: bool = False  # only compare the bodies' livers with real ones


def make_weights(config: Config, folder: Path) -> dict[str, float]:
    """Write both starters; bodies, cases and runs as far as they are not there. Return minutes."""
    minutes = dict[str, float]()

    def go_on(before: Path, stage: str, seed: int) -> Path:
        """Make a stage from a checkpoint on, and return its own."""
        kind = {"liver": "2mm", "liver_vessels": "vessels"}.get(stage, stage)
        drawn, split = SEEDS[kind](seed)
        raw, data = (folder / f"{part}_{kind}_{drawn}" for part in ("raw", "prepared"))
        run = folder / f"run_{stage}_{seed}"
        for made, *command in (
            (raw / "dataset.json", "benchmarks/bodies.py", "--destination", raw,
             "--seed", drawn, *BODIES[kind].split()),
            (data / "dataset.json", "prepare.py", raw, "--destination", data, *PREPARE.split(),
             "--seed", split),
            (run / "best.pt", "train.py", "--data", data, "--run-folder", run, *TRAIN.split(),
             *STAGES[stage].format(before=before).split(), "--seed", seed),
        ):  # fmt: skip
            start, words = time.perf_counter(), [sys.executable, *map(str, command)]
            if not (ROOT / made).exists():
                subprocess.run(words, cwd=ROOT, check=True)
                minutes[f"{command[0]}, {run.name}"] = round((time.perf_counter() - start) / 60, 1)
        return run / "best.pt"

    second = go_on(go_on(Path(), "4mm", config.seed), "3mm", config.seed)
    last = [go_on(second, "slabs", seed) for seed in LAST]
    save_starter(last, folder / "slabs.pt")
    fine = go_on(go_on(folder / "slabs.pt", "tumours_3mm", 0), "tumours_2mm", 0)
    save_starter([go_on(fine, "2mm", seed) for seed in LAST[:2]], mean := folder / "2mm.pt")
    save_starter([go_on(mean, "vessels", 0)], apart := folder / "starter_tumours.pt")
    liver = [go_on(mean, "liver", seed) for seed in LAST[:2]]
    save_starter([*liver, *[go_on(apart, "liver_vessels", 0)] * 2], folder / "starter.pt")
    return minutes


def save_starter(paths: list[Path], path: Path) -> None:
    """Write the mean weights of checkpoints. It lists no patients, because bodies are none."""
    runs = [torch.load(ROOT / run, weights_only=True) for run in paths]
    states = [run["network_state"] for run in runs]
    mean = {k: torch.stack([s[k] for s in states]).float().mean(0) for k in states[0]}
    mean = {name: value.to(states[0][name].dtype) for name, value in mean.items()}
    torch.save(runs[0] | {"network_state": mean, "patients": []}, ROOT / path)


def is_whole(label: np.ndarray) -> bool:
    """Return whether there is a liver which no end of the scan cuts off."""
    return label.any() and not any(label.take((0, -1), axis).any() for axis in (0, 1, 2))


# The gate


def measure_shape(mask: np.ndarray, spacing: np.ndarray) -> dict[str, float]:
    """Return measures of a liver mask (X, Y, Z), RAS, in mm from its right, front and top."""
    at = np.argwhere(mask) * spacing
    extent, at = np.ptp(at, 0) + spacing, at.max(0) - at
    ml = len(at) * float(np.prod(spacing)) / 1000
    row = {"ml": ml, "share of its box": ml * 1000 / np.prod(extent)}
    row["share left of the middle"] = float((at[:, 0] > extent[0] / 2).mean())
    for axis, end in enumerate(("right", "front", "top")):
        row[f"extent from its {end}, mm"] = extent[axis]
        for share in (10, 25, 50, 75, 90):
            row[f"{share} % lie within mm of its {end}"] = np.percentile(at[:, axis], share)
    for mm in (20, 40, 60, 80):
        away = np.abs(at[:, 0].max() - at[:, 0] - mm)
        part = at[at[:, 0] == at[away.argmin(), 0]]  # one plane of voxels
        name = f"left lobe, {mm} mm from its end"
        for axis, end in enumerate(("front", "top"), start=1):
            near, far = part[:, axis].min(), part[:, axis].max()
            row[f"{name}: mm from the {end}, near side"] = near
            row[f"{name}: mm from the {end}, far side"] = far
            row[f"{name}: mm thick from the {end}"] = far - near
        row[f"{name}: cm²"] = len(part) * np.prod(spacing[1:]) / 100
    dome, tip = (at[near].mean(0) for near in (at[:, 2] < 12, at[:, 2] > extent[2] - 12))
    row |= {"dome, mm from the right": dome[0], "dome, mm from the front": dome[1]}
    return row | {"lower tip, mm from the right": tip[0]}


def compare_shapes(count: int = 240) -> dict[str, Any]:
    """Return 5, 50 and 95 % of each measure of real masks and of bodies that no scan cuts off.

    `inside`: share of the real ones within 5 to 95 % of the bodies, give or take a voxel.
    """
    rows: dict[str, list[dict[str, float]]] = {"real": [], "bodies": []}
    masks = list_masks()
    for index in tqdm(range(-count, len(masks)), "gate", disable=None):
        body = bodies.make_body(-index, bodies.Config(seed=98))[1] if index < 0 else None
        volume = body or read_volume(masks[index]).ras
        step = np.maximum(np.round(4 / np.array(volume.spacing_mm)), 1).astype(int)
        mask = volume.data[:: step[0], :: step[1], :: step[2]] > 0
        if is_whole(mask):
            row = measure_shape(mask, step * volume.spacing_mm)
            rows["bodies" if body else "real"].append(row)
    table: dict[str, Any] = {"n": {kind: len(some) for kind, some in rows.items()}}
    for name in rows["real"][0]:
        real, ours = (np.array([row[name] for row in some]) for some in rows.values())
        spans = [np.percentile(some, [5, 50, 95]).round(2).tolist() for some in (real, ours)]
        low, high = np.array(spans[1])[[0, 2]] + np.array([-4, 4]) * ("mm" in name)
        inside = round(float(((real >= low) & (real <= high)).mean()), 2)
        table[name] = {"real": spans[0], "bodies": spans[1], "inside": inside}
        print(f"{name:56}", *table[name].values())
    return table


def list_masks() -> list[Path]:
    """Real liver masks, but those of LiTS without geometry: their spacing is 1."""
    paths = sorted((DATA / "lits_labels").glob("[!.]*.nii*"))
    return [path for path in paths if set(nib.load(path).header.get_zooms()) != {1}]


# Scores


def draw_scans(sets: tuple[str, ...]) -> Iterator[Item]:
    """Yield the scans of each set, and slabs of them."""
    for index, path in enumerate(list_masks()[1::2] if "painted" in sets else ()):
        pair = bodies.paint_around(path, index, bodies.Config(seed=5, step=4))
        yield from cut_slabs("painted", path.name, *(volume.ras for volume in pair))
    for index in range(60 if "bodies" in sets else 0):
        scan, label = bodies.make_body(index, bodies.Config(seed=99))
        kind = "bodies" if scan.shape[2] * scan.spacing_mm[2] > 160 else "slabs of bodies"
        yield kind + " without liver" * (not label.data.any()), f"{index}", scan, label
    real = sorted((DATA / "ct" / "imagesTr").glob("[!.]*"))
    for path in real if {"six", "degraded"} & {*sets} else ():
        scan, label = read_volume(path), read_volume(DATA / "ct" / "labelsTr" / path.name)
        label = lay_on_grid(label, scan)
        if "six" in sets:
            yield "six", path.name, scan, label
            noise = np.random.default_rng(0).normal(0, NOISE, scan.shape).astype(np.float32)
            yield f"six with noise of {NOISE} HU", path.name, scan.like(scan.data + noise), label
        for kind, strength in DEGRADED if "degraded" in sets else ():
            whole, rng = scan.ras.like(scan.ras.data.astype(np.float32)), np.random.default_rng(0)
            harmed, truth = harm(whole, label.ras.data, kind, strength, rng)
            yield f"six, {kind} {strength:g}", path.name, harmed, harmed.like(truth)


def cut_slabs(kind: str, name: str, scan: Volume, label: Volume) -> Iterator[Item]:
    """Yield a RAS scan, a slab through its liver, and one without liver where it has room."""
    yield kind, name, scan, label
    rng, thick = np.random.default_rng(len(scan.data)), round(SLAB / scan.spacing_mm[2])
    liver = (label.data > 0).sum((0, 1)) * scan.voxel_ml
    held = np.convolve(liver, np.ones(thick), "valid")  # ml in the slab from each slice on
    for what, starts in (("", held >= 50), (" without liver", held == 0)):
        if starts.any():
            start = int(rng.choice(np.flatnonzero(starts)))
            box = (slice(None), slice(None), slice(start, start + thick))
            yield f"slabs of {kind}{what}", name, scan.crop(box), label.crop(box)


def score(config: Config, checkpoints: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """Return the figures of each checkpoint in each set, after the usual post-processing."""
    how = "" if config.sure == apply_model.SURE else f" --sure {config.sure:g}"
    models = {f"{path}{how}": load_model(ROOT / path, "cpu") for path in checkpoints}
    apply_model.SURE = config.sure
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    for kind, case, scan, label in tqdm(draw_scans(config.sets), "scans", disable=None):
        truth = label.ras.like((label.ras.data > 0).astype(np.uint8))
        for name, model in models.items():
            classes = segment(model, scan).classes
            found = truth.like((classes.data > 0).astype(np.uint8))
            every = evaluate(found, truth, ["liver"])
            row = {key: every[f"liver_{key}"] for key in (*KEYS[:2], "precision", "recall")}
            row["found_ml"] = float(found.data.sum()) * found.voxel_ml
            row["false_positive_ml"] = float((found.data > truth.data).sum()) * found.voxel_ml
            if "tumour" in model.names:
                row |= score_tumours(classes, label.ras, model.names)
            row = {key: value and round(value, 4) for key, value in row.items()}
            rows[name].setdefault(kind, {})[case.removesuffix(".nii.gz")] = row
    return {
        name: {k: summarise(k, some) for k, some in sets.items()} for name, sets in rows.items()
    }


def score_tumours(found: Volume, truth: Volume, names: list[str]) -> dict[str, Any]:
    """Return the figures of the tumours of one scan, from class indices: lesions of 10 mm and more,
    found at an IoU of 0.1, and findings of any size that match no lesion."""
    every = evaluate(found, truth, names)
    ml = int((truth.data == names.index("tumour") + 1).sum()) * truth.voxel_ml
    row = {"dice": every["tumour_dice"], "ml": ml, "found_ml": ml + every["tumour_volume_error_ml"]}
    for key in ("lesions", "lesions_found"):
        row[key] = sum(every[f"tumour_{key}{group}"] for group in list(LESION_SIZES)[1:])
    false = every["tumour_lesions_predicted"] - every["tumour_lesions_right"]
    return {f"tumour_{key}": value for key, value in (row | {"false_findings": false}).items()}


def sum_tumours(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the tumours' figures of a set: Dice where 10 ml and more are, lesions, false ones."""
    dice = [row["tumour_dice"] for row in rows if row["tumour_ml"] >= 10]
    none = [row["tumour_found_ml"] for row in rows if row["tumour_ml"] <= 3]
    keys = ("lesions", "lesions_found", "false_findings")
    table = {key: sum(row[f"tumour_{key}"] for row in rows) for key in keys}
    table["false findings a scan"] = round(table["false_findings"] / len(rows), 2)
    table["dice, n"] = [round(float(np.mean(dice)), 4), len(dice)] if dice else None
    return table | {"ml found where at most 3 ml are": sorted(none)}


def summarise(kind: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return mean, lowest and highest figures of a set; of scans without liver, the ml found."""
    table: dict[str, Any] = {"n": len(rows)}
    keys = ("found_ml",) if "without" in kind else KEYS
    for key in keys:
        some = [row[key] for row in rows.values() if row[key] is not None]
        table[key] = [round(float(v), 4) for v in (np.mean(some), min(some), max(some))]
    if any("tumour_ml" in row for row in rows.values()):
        table["tumours"] = sum_tumours([*rows.values()])
    print(kind, table)
    return table | {"scans": rows if kind == "six" else {n: r[keys[0]] for n, r in rows.items()}}


def main(config: Config) -> None:
    path, checkpoints, about = RESULTS / "starter.json", config.score, {}
    result = read_json(path)
    if config.gate:
        result["gate"] = {"command": name_command(), **compare_shapes()}
    elif not checkpoints:
        folder = config.work / f"seed_{config.seed}"
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        about = {"minutes": make_weights(config, folder)}
        about |= {"bodies": BODIES, "prepare": PREPARE, "train": [TRAIN, STAGES]}
        checkpoints = (folder / "starter.pt", folder / "starter_tumours.pt")
    about |= {"command": name_command(), "machine": machine(torch_too=True)}
    for name, sets in score(config, checkpoints).items() if checkpoints else ():
        entry = result.setdefault(name, {})
        entry |= {**about, "sets": entry.get("sets", {}) | sets}
    write_json(result, path)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
