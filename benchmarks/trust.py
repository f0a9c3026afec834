"""Is the expected Dice true? Scans that are made bad on purpose, and six real CTs.

    python benchmarks/trust.py --work data/trust                # about an hour on one thread
    python benchmarks/trust.py --work data/trust --score-only   # of what was segmented before

Bodies of `benchmarks/bodies.py` (seeds that the starter weights never saw) and phantoms around real
liver masks are harmed at random (kind and strength are drawn, sometimes two kinds), segmented, and
their true Dice is measured. The calibration is fitted on one half of the bodies and reported on the
other, both ways; that of all bodies is reported on painted and on real scans: no scan is reported
that its calibration saw. Every scan that is done is kept in `WORK/rows.json`, so that the same
command goes on.
Writes benchmarks/results/trust.json and docs/pictures/trust.png.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from machine import DATA, RESULTS, ROOT, machine, name_command
from nibabel.affines import from_matvec
from scipy.ndimage import gaussian_filter, gaussian_filter1d, rotate
from scipy.optimize import minimize
from scipy.stats import spearmanr

sys.path.insert(1, str(ROOT / "data"))  # the makers import each other as scripts

import bodies

from apply_model import Model, load_model, segment
from data import trust
from data.evaluate import dice_metric, measure
from data.files import read_json, write_json
from data.pictures import save_figure
from data.scans import read_label_map, read_scan
from data.volumes import Volume, find_bounding_box
from utilities import load_checkpoint

# Harm → least and largest strength, and how often it is drawn. Strengths are drawn evenly in their
# logarithm; those of SIGNED are negative half of the time.
GRADES = {
    "as it is": (1, 1, 2.0), "noise": (10, 80, 1.0), "HU shifted": (30, 200, 1.0),
    "contrast": (0.35, 2, 1.0), "liver's HU": (20, 120, 2.0), "thick slices": (2, 6, 1.0),
    "cropped z": (0.08, 0.7, 1.5), "cropped view": (0.35, 0.9, 1.0), "without liver": (1, 1, 0.3),
    "turned": (10, 180, 1.0), "mirrored": (1, 1, 0.4), "upside down": (1, 1, 0.4),
    "blur": (3, 20, 1.0), "streaks": (20, 200, 1.0),
}  # fmt: skip
SIGNED = ("HU shifted", "liver's HU", "turned")
TWICE = 0.3  # of the scans have two harms
GOOD = 0.85  # a Dice below it wants correcting
FLAGGED = 0.2  # part of the scans that are looked at
BAD_SHARE = 0.1  # of a clinic's scans that are below GOOD, for the figure on flagging


@dataclass
class Config:
    """What is segmented, by which network, and where it is kept."""

    work: Path = Path("data/trust")  # rows.json is kept here; relative: below the project
    checkpoint: Path = Path("checkpoints/starter.pt")
    bodies: int = 104  # scans of synthetic bodies, two of each body
    painted: int = 7  # scans painted around real liver masks, two around each
    seed: int = 1001  # of the bodies
    score_only: bool = False  # nothing is segmented


def draw_harm(rng: np.random.Generator) -> tuple[str, float]:
    """Return a kind of harm and its strength."""
    share = np.array([often for _, _, often in GRADES.values()])
    name = str(rng.choice(list(GRADES), p=share / share.sum()))
    low, high, _ = GRADES[name]
    strength = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return name, -strength if name in SIGNED and rng.random() < 0.5 else strength


def streak(hu: np.ndarray, strength: float, mm: Sequence[float], rng: Any) -> np.ndarray:
    """Return HU with horizontal streaks (SD `strength`) across the body, as of arms beside it."""
    lines = gaussian_filter1d(rng.normal(size=hu.shape[1:]), 3 / mm[1], axis=0)
    lines = gaussian_filter1d(lines, 2 / mm[2], axis=1)
    body = np.flatnonzero((hu > -300).any(axis=(0, 2)))
    height = (np.arange(hu.shape[1]) - body.mean()) / max(np.ptp(body) / 4, 1)
    lines *= strength / max(lines.std(), 1e-6) * np.exp(-0.5 * height**2)[:, None]
    return hu + lines[None].astype(np.float32) * (hu > -500)


HU_HARMS: dict[str, Callable[..., np.ndarray]] = {  # of HU, label, strength, mm, generator
    "as it is": lambda hu, *_: hu,
    "noise": lambda hu, _, s, mm, rng: hu + rng.normal(0, s, hu.shape).astype(np.float32),
    "HU shifted": lambda hu, _, s, *more: hu + np.float32(s) * (hu > -500),
    "contrast": lambda hu, _, s, *more: np.where(
        (hu > -200) & (hu < 400), (hu - 40) * np.float32(s) + 40, hu
    ),
    "liver's HU": lambda hu, label, s, *more: (
        hu + np.float32(s) * gaussian_filter((label > 0).astype(np.float32), 0.5)
    ),
    "blur": lambda hu, _, s, mm, rng: gaussian_filter(hu, [s / step for step in mm]),
    "streaks": lambda hu, _, s, mm, rng: streak(hu, s, mm, rng),
    "mirrored": lambda hu, *_: hu[::-1],  # the header does not say so: situs inversus
    "upside down": lambda hu, *_: hu[:, :, ::-1],
    "turned": lambda hu, _, s, *more: rotate(hu, s, (0, 1), reshape=False, order=1, cval=-1000.0),
}
LABEL_HARMS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {  # of label, strength
    "mirrored": lambda label, _: label[::-1],
    "upside down": lambda label, _: label[:, :, ::-1],
    "turned": lambda label, s: rotate(label, s, (0, 1), reshape=False, order=0, cval=0),
}


def harm(
    scan: Volume, label: np.ndarray, name: str, strength: float, rng: np.random.Generator
) -> tuple[Volume, np.ndarray]:
    """Return a RAS scan (HU as float32) and its label map with one thing wrong with them."""
    scan = scan.ras
    if name in HU_HARMS:
        harmed = scan.like(HU_HARMS[name](scan.data, label, strength, scan.spacing_mm, rng))
        return harmed, np.ascontiguousarray(LABEL_HARMS.get(name, lambda a, _: a)(label, strength))
    if name == "thick slices":  # several averaged into one; liver is what is liver in half of them
        many = round(strength)
        count = scan.shape[2] // many
        thick, share = (
            array[:, :, : count * many].reshape(*array.shape[:2], count, many)
            .mean(axis=3, dtype=np.float32) for array in (scan.data, label > 0)
        )  # fmt: skip
        coarse = from_matvec(np.diag([1, 1, many]), [0, 0, (many - 1) / 2])
        return Volume(thick, scan.affine @ coarse), (share >= 0.5).astype(np.uint8)
    z, size, box = find_bounding_box(label > 0)[2], scan.shape[2], [slice(None)] * 3
    if name == "cropped z":  # a part of the liver's slices stays, its lower or its upper end
        cut, upper = round((z.stop - z.start) * (1 - strength)), rng.random() < 0.5
        box[2] = slice(z.start + cut, None) if upper else slice(0, max(z.stop - cut, z.start + 1))
    elif name == "cropped view":  # the field of view in plane, about its own centre
        cuts = [round(n * (1 - strength) / 2) for n in scan.shape[:2]]
        box[:2] = [slice(cut, n - cut) for cut, n in zip(cuts, scan.shape[:2], strict=True)]
    else:  # without liver: the slices on the side of it where there are more
        below = z.start >= size - z.stop
        box[2] = slice(0, max(z.start, 8)) if below else slice(min(z.stop, size - 8), size)
    return scan.crop(tuple(box)), np.ascontiguousarray(label[tuple(box)])


def open_scan(group: str, index: int, config: Config) -> tuple[Volume, np.ndarray]:
    """A scan (RAS, HU as float32) before it is harmed, and its label map."""
    if group == "bodies":
        scan, label = bodies.make_body(index // 2, bodies.Config(seed=config.seed))
        return scan.like(scan.data.astype(np.float32)), label.data
    if group == "painted":
        path = sorted((DATA / "lits_labels").glob("*.nii.gz"))[index // 2 * 3]
        volume, label = bodies.paint_around(path, index // 2 * 3, bodies.Config(seed=5, step=4))
        return volume.ras.like(volume.ras.data.astype(np.float32)), np.asarray(label.ras.data)
    path = sorted((DATA / "ct" / "imagesTr").glob("[!.]*.nii.gz"))[index]
    volume = read_scan(path)
    known = load_checkpoint(config.checkpoint)
    label = read_label_map(
        DATA / "ct" / "labelsTr" / path.name, volume, known["declared"],
        classes=known["preprocessing"]["labels"],
    )  # fmt: skip
    return volume.ras.like(volume.ras.data.astype(np.float32)), np.asarray(label.ras.data)


def make_case(
    group: str, index: int, config: Config
) -> tuple[Volume, np.ndarray, list[tuple[str, float]]]:
    """A harmed scan, its label map, and what was done to it; real ones stay as they are."""
    scan, label = open_scan(group, index, config)
    if group == "real":
        return scan, label, []
    rng = np.random.default_rng([77, index, group == "painted"])
    done = [draw_harm(rng)]
    if rng.random() < TWICE:
        done.append(draw_harm(rng))
    for name, strength in done:
        if label.any():
            scan, label = harm(scan, label, name, strength, rng)
    return scan, label, done


def judge_case(model: Model, scan: Volume, label: np.ndarray) -> dict[str, float]:
    """True Dice of the first class, and the evidence for the expected one."""
    start = time.perf_counter()
    found = segment(model, scan)
    seconds = time.perf_counter() - start
    row, name = measure(found.classes, scan, model.names), model.names[0]
    truth = scan.like((label > 0).astype(np.uint8)).ras.data
    dice = float(dice_metric(found.classes.data, truth)[0])
    shape = scan.ras_shape
    evidence = trust.weigh_scores(found.scores.numpy(), found.to_network, shape, model.names)
    expected, known = trust.judge_trust(evidence, row, model.expected).expected_dice, evidence[0]
    dice = round(dice, 4) if np.isfinite(dice) else 0.0  # nothing there and nothing found
    ml, cut = float(row[f"{name}_volume_ml"] or 0), known.cut
    return {"dice": dice, "steadiness": round(known.steadiness, 5), "cut": cut, "ml": ml,
            "expected_dice": round(expected, 4), "seconds": round(seconds, 2)}  # fmt: skip


def collect(config: Config) -> dict[str, dict[str, Any]]:
    """Rows of all scans by name; those of an earlier call are not made again."""
    path = ROOT / config.work / "rows.json"
    rows = read_json(path) if path.exists() else {}
    model = load_model(config.checkpoint, "cpu", "fp32")
    counts = {"bodies": config.bodies, "painted": config.painted, "real": 6}
    for group, count in counts.items():
        if group != "bodies" and not DATA.is_dir():
            print(f"{group}: {DATA} is not there")
            continue
        for index in range(0 if config.score_only else count):
            name = f"{group}_{index:03d}"
            if name not in rows:
                scan, label, done = make_case(group, index, config)
                rows[name] = {"harms": done, **judge_case(model, scan, label)}
                write_json(rows, path)
                print(name, rows[name], flush=True)
    return rows


# Calibration and figures


def evidence(rows: Sequence[dict[str, Any]], usual: dict[str, float] | None) -> np.ndarray:
    """(n, 3): 1, the logit of the steadiness, and the strangeness of the volume."""
    steady = np.clip([row["steadiness"] for row in rows], 1e-3, 1 - 1e-3)
    strange = [trust.rate_volume(row["ml"], usual, row["cut"]) for row in rows]
    return np.stack([np.ones(len(rows)), np.log(steady / (1 - steady)), strange], axis=1)


def expect(weights: np.ndarray, known: np.ndarray, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Expected Dice, 0 where nothing was found."""
    found = np.array([row["ml"] > 0 for row in rows])
    return found / (1 + np.exp(-known @ weights))


def fit(rows: Sequence[dict[str, Any]], usual: dict[str, float] | None) -> np.ndarray:
    """Weights of least cross-entropy, where something was found; the steadier, the better."""
    some = [row for row in rows if row["ml"] > 0]
    known, true = evidence(some, usual), np.array([row["dice"] for row in some])

    def miss(weights: np.ndarray) -> float:
        dice = np.clip(expect(weights, known, some), 1e-6, 1 - 1e-6)
        return float(-(true * np.log(dice) + (1 - true) * np.log(1 - dice)).mean())

    return minimize(miss, [-1.0, 1.2, -0.5], method="BFGS").x


def recall_flagged(true: np.ndarray, expected: np.ndarray) -> float:
    """Part of the scans below GOOD that are among the FLAGGED part of lowest expected Dice, where
    BAD_SHARE of the scans are bad: mean over draws of as many bad ones beside all good ones."""
    rng, found = np.random.default_rng(0), []
    good, bad = np.flatnonzero(true >= GOOD), np.flatnonzero(true < GOOD)
    count = max(1, round(len(good) * BAD_SHARE / (1 - BAD_SHARE)))
    for _ in range(2000):
        some = rng.choice(bad, count, replace=count > len(bad))
        every = np.concatenate([good, some])
        first = np.argsort(expected[every], kind="stable")[: round(FLAGGED * len(every))]
        found.append(np.mean(first >= len(good)) * len(first) / count)
    return float(np.mean(found))


def correct_some(true: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Mean Dice of the scans once the FLAGGED part of them is corrected (Dice 1), by what order."""
    many, before = round(FLAGGED * len(true)), float(true.mean())

    def after(order: np.ndarray) -> float:
        corrected = true.copy()
        corrected[order[:many]] = 1
        return round(float(corrected.mean()), 3)

    random = round(before + many / len(true) * (1 - before), 3)  # in the mean
    orders = {"expected Dice": expected, "true Dice": true}
    ends = {name: after(np.argsort(values, kind="stable")) for name, values in orders.items()}
    return {"before": round(before, 3), "random": random, **ends}


def score(rows: Sequence[dict[str, Any]], expected: np.ndarray) -> dict[str, Any]:
    """Figures of one group of scans."""
    true = np.array([row["dice"] for row in rows])
    look, bad, error = expected < trust.WORDS["good"], true < GOOD, np.abs(expected - true)
    mixed = bad.any() and not bad.all()
    return {
        "n": len(rows),
        "dice_min_median_max": [round(float(np.quantile(true, q)), 3) for q in (0, 0.5, 1)],
        "spearman": round(float(spearmanr(expected, true).statistic), 3),
        "mean_absolute_error": round(float(error.mean()), 3),
        "mean_absolute_error_where_dice_is_from_0.3": round(float(error[true >= 0.3].mean()), 3),
        "bias": round(float((expected - true).mean()), 3),
        "below_0.85": int(bad.sum()), "not_good_by_word": int(look.sum()),
        "below_0.85_and_not_good": int((bad & look).sum()),
        "mean_dice_once_20_percent_are_corrected": correct_some(true, expected),
        "recall_in_lowest_20_percent_if_10_percent_are_bad":
            round(recall_flagged(true, expected), 3) if mixed else None,
    }  # fmt: skip


def expect_unseen(
    rows: dict[str, dict[str, Any]], usual: dict[str, float] | None
) -> tuple[dict[str, float], np.ndarray, list[np.ndarray]]:
    """Expected Dice of each scan by a calibration that did not see it; the calibration of all
    bodies, and those of their halves."""
    halves = [
        {n: r for n, r in rows.items() if n.startswith("bodies") and int(n[-3:]) // 2 % 2 == half}
        for half in (0, 1)
    ]
    both = [fit(list(half.values()), usual) for half in halves]
    weights = fit([row for half in halves for row in half.values()], usual)
    expected = {}
    for name, row in rows.items():
        unseen = next((both[1 - h] for h in (0, 1) if name in halves[h]), weights)
        expected[name] = float(expect(unseen, evidence([row], usual), [row])[0])
    return expected, weights, both


def draw(groups: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Expected against true Dice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for word, lowest in trust.WORDS.items():
        axes.axhline(lowest, color="0.8", linewidth=1)
        axes.text(0.01, lowest + 0.01, word, color="0.4", fontsize=9)
    styles = {"bodies": ("o", "#0072B2"), "painted around real masks": ("^", "#009E73"),
              "real": ("s", "#D55E00")}  # fmt: skip
    for title, (marker, colour) in styles.items():
        if title in groups:
            expected, true = groups[title]
            axes.plot(true, expected, marker, color=colour, alpha=0.75, markersize=5,
                      label=f"{title}, n = {len(true)}")  # fmt: skip
    axes.set(xlabel="true Dice", ylabel="expected Dice", xlim=(0, 1), ylim=(0, 1), aspect="equal",
             title="Scans that the calibration never saw")  # fmt: skip
    axes.grid(alpha=0.2)
    axes.legend(loc="lower right")
    save_figure(figure, path)


GROUPS = {  # title → beginning of the names
    "bodies": ("bodies",), "painted around real masks": ("painted",),
    "synthetic": ("bodies", "painted"), "real": ("real",), "all": ("bodies", "painted", "real"),
}  # fmt: skip
WEIGHTS = ("offset", "steadiness", "volume")


def main(config: Config) -> None:
    rows = collect(config)
    usual = load_checkpoint(config.checkpoint).get("expected") or {}
    expected, weights, halves = expect_unseen(rows, next(iter(usual.values()), None))
    used = [trust.OFFSET, trust.STEADINESS, trust.VOLUME]
    print("fitted on all bodies", np.round(weights, 2), "in use", used)
    drawn, table = {}, {}
    for title, beginnings in GROUPS.items():
        names = [name for name in rows if name.split("_")[0] in beginnings]
        if names:
            some, values = [rows[n] for n in names], np.array([expected[n] for n in names])
            drawn[title] = values, np.array([row["dice"] for row in some])
            table[title] = score(some, values)
    result = {
        "command": name_command(), "checkpoint": str(config.checkpoint),
        "machine": machine(torch_too=True), "groups": table,
        "weights_in_use": dict(zip(WEIGHTS, used, strict=True)),
        "weights_of_all_bodies": dict(zip(WEIGHTS, np.round(weights, 3).tolist(), strict=True)),
        "weights_of_the_halves": [np.round(half, 3).tolist() for half in halves],
        "scans": {n: row | {"expected_unseen": round(expected[n], 4)} for n, row in rows.items()},
    }  # fmt: skip
    write_json(result, RESULTS / "trust.json")
    draw(drawn, ROOT / "docs" / "pictures" / "trust.png")
    print(json.dumps({key: result[key] for key in result if key != "scans"}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
