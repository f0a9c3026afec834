"""Which scan to correct next: does the order of the expected Dice help a network to learn faster?

    python benchmarks/label_next.py          # about ten minutes on one thread

For each seed a small network learns from bodies of `benchmarks/bodies.py` as they are, and then
meets a pool and a test set in which most scans differ from them (`benchmarks/harms.py`). The first
k of the pool are corrected, that is, their true labels are added, and training goes on for the
same number of steps: in the order of the expected Dice (the least first), in random order, and in
the order of the true Dice, which nobody knows. The test set is the same for all. Whole scans in
voxels of 12 mm, so that a training takes seconds. Writes benchmarks/results/label_next.json and
docs/pictures/label_next.png.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from harms import harm
from machine import RESULTS, ROOT, machine, name_command
from monai.losses import DiceCELoss

sys.path.insert(1, str(ROOT / "data"))  # the makers import each other as scripts

import bodies

from data.evaluate import dice_metric
from data.files import read_json, write_json
from data.pictures import save_figure
from data.trust import judge_trust, weigh_scores
from data.volumes import Volume
from utilities import build_network

SIDE, STEP_MM = 32, 12.0  # voxels along each axis of the box in which every body lies
DIFFERENT = {  # what the pool and the test set have and the first training lacks: strengths, share
    "as it is": (1, 1, 3), "contrast": (0.4, 0.7, 2), "liver's HU": (-70, -30, 2),
    "noise": (30, 60, 2), "blur": (10, 18, 1),
}  # fmt: skip
ORDERS = ("expected Dice", "random", "true Dice")


@dataclass
class Config:
    """Sizes of the experiment."""

    work: Path = Path("data/label_next")  # rows.json is kept here; relative: below the project
    seeds: int = 5
    known: int = 10  # bodies with labels at the beginning
    pool: int = 16  # scans without labels
    tested: int = 12
    corrected: tuple[int, ...] = (2, 4, 8)
    first_steps: int = 200
    more_steps: int = 50  # after the correction, whatever was corrected


Pair = tuple[torch.Tensor, torch.Tensor]  # image in 0..1 and label, (1, SIDE, SIDE, SIDE)


def make_pair(index: int, seed: int, different: bool) -> Pair:
    """A body, harmed or not, in the middle of a box of air."""
    settings = bodies.Config(seed=5000 + seed, spacing=(STEP_MM,) * 3)
    image, label = bodies.make_body(index, settings)
    scan = Volume(np.asarray(image.dataobj).astype(np.float32), image.affine)
    outline = np.asarray(label.dataobj)
    if different:
        rng = np.random.default_rng([seed, index])
        share = np.array([often for _, _, often in DIFFERENT.values()])
        name = str(rng.choice(list(DIFFERENT), p=share / share.sum()))
        low, high, _ = DIFFERENT[name]
        scan, outline = harm(scan, outline, name, rng.uniform(low, high), rng)
    box, fill = np.full((SIDE,) * 3, -1000, np.float32), np.zeros((SIDE,) * 3, np.int64)
    there, here = [], []
    for size in scan.shape:
        cut, gap = max(size - SIDE, 0) // 2, max(SIDE - size, 0) // 2
        here.append(slice(cut, cut + min(size, SIDE)))
        there.append(slice(gap, gap + min(size, SIDE)))
    box[tuple(there)], fill[tuple(there)] = scan.data[tuple(here)], outline[tuple(here)] > 0
    image01 = torch.from_numpy(((box + 200) / 450).clip(0, 1))
    return image01[None], torch.from_numpy(fill)[None]


def train_on(model: torch.nn.Module, pairs: list[Pair], steps: int, seed: int) -> torch.nn.Module:
    """A copy of the network after some steps of two scans each, contrast and brightness varied."""
    model, rng = copy.deepcopy(model).train(), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = DiceCELoss(include_background=False, softmax=True, to_onehot_y=True)
    for _ in range(steps):
        some = [pairs[i] for i in rng.integers(len(pairs), size=2)]
        image = torch.stack([x * rng.uniform(0.9, 1.1) + rng.uniform(-0.05, 0.05) for x, _ in some])
        optimizer.zero_grad()
        loss(model(image.float()), torch.stack([y for _, y in some])).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: torch.nn.Module, pairs: list[Pair]) -> list[tuple[float, float]]:
    """Expected and true Dice of each."""
    judged = []
    for image, label in pairs:
        logits = model(image[None].float())[0]
        scores = (logits[1:] - logits[:1]).numpy()
        (known,) = weigh_scores(scores, np.eye(4), (SIDE,) * 3, ["liver"])
        dice = float(dice_metric((scores[0] > 0).astype(np.uint8), label[0].numpy())[0])
        judged.append((judge_trust([known], {"liver_volume_ml": 1}, None).expected_dice, dice))
    return judged


def run_seed(seed: int, config: Config) -> dict[str, Any]:
    """Mean Dice of the test set before, and after k corrections in each order."""
    counts = np.cumsum([0, config.known, config.pool, config.tested])
    known, pool, tested = (
        [make_pair(index, seed, part > 0) for index in range(counts[part], counts[part + 1])]
        for part in range(3)
    )
    torch.manual_seed(seed)
    blank = build_network("unet", in_channels=1, out_channels=2, base_channels=8,
                          input_size=(SIDE,) * 3)  # fmt: skip
    start = time.process_time()
    first = train_on(blank, known, config.first_steps, seed)
    judged = np.array(judge(first, pool))
    orders = dict(zip(ORDERS, (
        np.argsort(judged[:, 0]), np.random.default_rng(seed).permutation(config.pool),
        np.argsort(judged[:, 1]),
    ), strict=True))  # fmt: skip
    same = train_on(first, known, config.more_steps, seed)  # as many steps, nothing corrected
    row: dict[str, Any] = {"0": float(np.mean([dice for _, dice in judge(same, tested)]))}
    row["rank correlation in the pool"] = float(
        np.corrcoef(np.argsort(np.argsort(judged.T), axis=1))[0, 1]
    )
    for name, order in orders.items():
        for k in config.corrected:
            more = [pool[index] for index in order[:k]]
            # a corrected scan is seen as often as a known one would be, were there as many
            model = train_on(
                first, known + more * max(1, config.known // k), config.more_steps, seed
            )
            row[f"{name}, {k}"] = float(np.mean([dice for _, dice in judge(model, tested)]))
    row["cpu_seconds"] = round(time.process_time() - start)
    return row


def draw(rows: list[dict[str, Any]], config: Config, path: Path) -> None:
    """Mean Dice of the test sets over the number of corrected scans, a thin line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(ORDERS, ("#0072B2", "#E69F00", "0.5"), strict=True):
        keys = ["0", *(f"{name}, {k}" for k in config.corrected)]
        table = np.array([[row[key] for key in keys] for row in rows])
        axes.plot((0, *config.corrected), table.T, color=colour, alpha=0.2, linewidth=1)
        axes.plot((0, *config.corrected), table.mean(axis=0), "o-", color=colour, label=name)
    axes.set(xlabel="corrected scans", ylabel="mean Dice of the test set",
             title=f"the first to be corrected by …, {len(rows)} seeds")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def main(config: Config) -> None:
    path = ROOT / config.work / "rows.json"
    rows = read_json(path) if path.exists() else []
    for seed in range(len(rows), config.seeds):
        rows.append(run_seed(seed, config))
        write_json(rows, path)
        print(seed, {key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    gains = {}
    for k in config.corrected:
        for other in ("random", "true Dice"):
            gain = np.array([row[f"expected Dice, {k}"] - row[f"{other}, {k}"] for row in rows])
            gains[f"{k}, over {other}"] = {
                "mean": round(float(gain.mean()), 4),
                "standard_error": round(float(gain.std(ddof=1) / np.sqrt(len(gain))), 4),
                "seeds_better": int((gain > 0).sum()),
            }
    result = {
        "command": name_command(),
        "machine": machine(torch_too=True),
        "n": f"{len(rows)} seeds; {config.known} known, {config.pool} in the pool, "
        f"{config.tested} tested",
        "mean": {
            key: round(float(np.mean([row[key] for row in rows])), 4)
            for key in rows[0] if key != "cpu_seconds"
        },
        "gain_of_the_expected_order": gains,
        "seeds": rows,
    }  # fmt: skip
    write_json(result, RESULTS / "label_next.json")
    draw(rows, config, ROOT / "docs" / "pictures" / "label_next.png")
    print({key: result[key] for key in ("mean", "gain_of_the_expected_order")})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
