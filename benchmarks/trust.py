"""Is the expected Dice true? Scans that are made bad on purpose, and three networks.

    python benchmarks/trust.py                # about an hour on one thread
    python benchmarks/trust.py --score-only   # of what was segmented before

Bodies of `benchmarks/bodies.py` (seeds that no network saw) and six real CTs are harmed at random
(kind and strength are drawn, sometimes two kinds), segmented, and their true Dice is measured. The
weights, intervals and words are fitted on two thirds of the bodies; the last third and the real CTs
are for the test alone. Scans that are done are kept in `data/trust/rows.json`. Beside the starter
it needs these runs, the last two below `data/trust`:

- laptop: `benchmarks/levers.py --settings laptop --epochs 18` leaves three; each real CT is
  segmented by the one that did not train on it;
- subvolumes: bodies 0 to 27 of seed 5 at 4 4 4 mm and 28 to 39 at 4 4 2 mm (`prepare.py
  --foreground liver --accept outline outside hu empty --training 0.9 --validation 0.1 --test 0`),
  `train.py --spacing 4 4 --input-size 96 96 --network unet --base-channels 16 --loss dice_ce
  --learning-rate 2e-3 --max-epochs 25 --val-interval 5`; half_trained: with `--max-epochs 3`.

Writes benchmarks/results/trust.json and docs/pictures/trust.png.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
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
from data.scans import read_scan, read_volume
from data.volumes import Volume, find_bounding_box

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
SEED, BODIES = 1001, 180  # scans of synthetic bodies, two of each body
TWICE = 0.3  # of the scans have two harms
GOOD = 0.85  # a Dice below it wants correcting
FAILED = 0.7  # a Dice below it is a failure that must not pass
COVERED = 0.9  # of the scans are to lie within their interval
FOLDS = 10  # of the bodies that are fitted on
LEVELS = (0.92, 0.85, 0.7, 0.3, 0.0)  # lowest expected Dice of those that share a spread
NETWORKS = {  # name → checkpoints, of a real CT the one that it did not train
    "starter": ("checkpoints/starter.pt",),
    "laptop": tuple(f"data/levers/runs/laptop_4p_{turn}_0/last.pt" for turn in range(3)),
    "subvolumes": ("data/trust/subvolumes/best.pt",),
    "half_trained": ("data/trust/half_trained/best.pt",),  # tested, fitted on never, as is this:
    "starter_tumours": ("checkpoints/starter_tumours.pt",),
}
PARTS = ("fit", "fit", "test")  # of the bodies, in turn
FITTED = ("starter", "laptop", "subvolumes")


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


def measure_far(hu: np.ndarray) -> np.ndarray:
    """Return the distance from the middle in plane (X, Y, 1); the nearest edges have 1."""
    x, y = (np.linspace(-1, 1, n) for n in hu.shape[:2])
    return np.hypot(x[:, None, None], y[:, None])


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
    "round frame of 0 HU": lambda hu, _, s, *more: np.where(measure_far(hu) > s, 0, hu),
    "end slices of 0 HU": lambda hu, _, s, *more: np.pad(
        hu[:, :, round(s) : -round(s)], [(0, 0), (0, 0), [round(s)] * 2]
    ),
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


def open_scan(group: str, index: int) -> tuple[Volume, np.ndarray, str]:
    """A scan (RAS, HU as float32) before it is harmed, its label map, and its name."""
    if group == "bodies":
        about = bodies.Config(seed=SEED, spacing=(2, 2, 3), edition=2, tumours=BODIES)
        scan, label = bodies.make_body(index // 2, about)
        return scan.like(scan.data.astype(np.float32)), label.data, str(index // 2)
    path = sorted((DATA / "ct" / "imagesTr").glob("[!.]*.nii.gz"))[index // 5]
    scan, label = read_scan(path).ras, read_volume(DATA / "ct" / "labelsTr" / path.name).ras
    name = path.name.removesuffix(".nii.gz")
    return scan.like(scan.data.astype(np.float32)), np.asarray(label.data), name


def make_case(group: str, index: int) -> tuple[Volume, np.ndarray, list[tuple[str, float]], str]:
    """A harmed scan, its label map, what was done to it, and its name; of each real CT one stays as
    it is, and four have a harm each."""
    scan, label, name = open_scan(group, index)
    if group == "real":
        rng, drawn = np.random.default_rng([78, index // 5]), dict[str, float]()
        while len(drawn) < index % 5:
            kind, strength = draw_harm(rng)
            if kind != "as it is":
                drawn.setdefault(kind, strength)
        done, rng = list(drawn.items())[-1:], np.random.default_rng([79, index])
    else:
        rng = np.random.default_rng([77, index, 0])
        done = [draw_harm(rng)]
        if rng.random() < TWICE:
            done.append(draw_harm(rng))
    for kind, strength in done:
        if label.any():
            scan, label = harm(scan, label, kind, strength, rng)
    return scan, label, done, name


def judge_case(model: Model, scan: Volume, label: np.ndarray) -> dict[str, float]:
    """True Dice of the liver with its tumours, and the evidence for the expected one."""
    found = segment(model, scan)
    row, name = measure(found.classes, scan, model.names), model.names[0]
    truth = scan.like((label > 0).astype(np.uint8)).ras.data
    dice = float(dice_metric(found.classes.data > 0, truth)[0])
    known = trust.weigh_scores(found.scores.numpy(), found.to_network, scan, model.names)[0]
    ml = sum(float(row[f"{one}_volume_ml"] or 0) for one in model.names)
    usual = (model.expected or {}).get(name)
    return {
        "dice": round(dice, 4) if np.isfinite(dice) else 0.0,  # nothing there and nothing found
        "steadiness": round(known.steadiness, 5), "ml": ml, "place": round(known.misplaced, 4),
        "volume": round(trust.rate_volume(ml, usual, known.cut), 4),
    }  # fmt: skip


def collect(score_only: bool) -> dict[str, dict[str, Any]]:
    """Rows of all scans by network, part and number; those of an earlier call are kept."""
    path = ROOT / "data" / "trust" / "rows.json"
    rows = read_json(path) if path.exists() else {}
    for group, count in {"bodies": BODIES, "real": 30 * DATA.is_dir()}.items():
        for index in range(0 if score_only else count):
            part = "real" if group == "real" else PARTS[index // 2 % 3]
            used = FITTED if part == "fit" else NETWORKS
            names = {network: f"{network} {part} {index:03d}" for network in used}
            if set(names.values()) <= set(rows):
                continue
            scan, label, done, case = make_case(group, index)
            harms = "; ".join(f"{kind} {strength:.3g}" for kind, strength in done)
            for network, name in names.items():
                if name not in rows:
                    judged = judge_case(pick_model(network, case), scan, label)
                    about = {"network": network, "part": part, "fold": index // 6 % FOLDS}
                    rows[name] = {**about, "harms": harms, **judged}
                    print(name, rows[name], flush=True)
            write_json(rows, path)
    return rows


def pick_model(network: str, case: str) -> Model:
    """The first network of this name that was not trained on a case."""
    models = (load_model(ROOT / path, "cpu", "fp32") for path in NETWORKS[network])
    learnt = {"case": case, "split": "training"}.items()
    return next(model for model in models if not any(learnt <= p.items() for p in model.patients))


def expect(weights: np.ndarray, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Expected Dice as `data.trust` has it, 0 where nothing was found."""
    keys = ("ml", "steadiness", "volume", "place")
    ml, steady, *strange = np.array([[row[key] for key in keys] for row in rows]).T
    steady = steady.clip(1e-3, 1 - 1e-3)
    known = np.stack([np.ones(len(rows)), np.log(steady / (1 - steady)), *strange])
    most = np.where(ml > trust.PLAUSIBLE_ML["liver"][1], trust.TOO_LARGE, 1)
    return np.minimum((ml > 0) / (1 + np.exp(-weights @ known)), most)


def fit(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Weights of the least absolute error (rounded off below 0.03) where something was found."""
    some = [row for row in rows if row["ml"] > 0]
    true = np.array([row["dice"] for row in some])

    def miss(weights: np.ndarray) -> float:
        error = np.sqrt((expect(weights, some) - true) ** 2 + 0.03**2).mean()
        return float(error + 0.03 / len(some) * (weights[1:] ** 2).sum())

    return minimize(miss, [-1.0, 1.2, -0.3, -0.7], method="BFGS").x


def expect_unseen(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Expected Dice of each scan by weights that were fitted on the other bodies."""
    fold, expected = np.array([row["fold"] for row in rows]), np.zeros(len(rows))
    for one in range(FOLDS):
        others = [row for row in rows if row["fold"] != one]
        expected[fold == one] = expect(fit(others), [row for row in rows if row["fold"] == one])
    return expected


def fit_spreads(rows: Sequence[dict[str, Any]], unseen: np.ndarray) -> dict[float, list[float]]:
    """Conformal prediction: of each level the residuals that (1 − COVERED) / 2 of the scans lie
    below, and above, as if the next scan were one of them; where something was found."""
    spreads, tail, residual = {}, (1 - COVERED) / 2, [row["dice"] for row in rows] - unseen
    for lowest, highest in zip(LEVELS, (2.0, *LEVELS), strict=False):
        beyond = np.sort(residual[(unseen >= lowest) & (unseen < highest) & (unseen > 0)])
        rank = max(int(np.floor((len(beyond) + 1) * tail)), 1)
        spreads[lowest] = np.round([max(-beyond[rank - 1], 0), max(beyond[-rank], 0)], 3).tolist()
    return spreads


def fit_words(rows: Sequence[dict[str, Any]], unseen: np.ndarray) -> dict[str, float]:
    """The lowest limits, in steps of 0.01, at which at most one in a hundred scans that are called
    good is bad, and of each network COVERED of the scans below FAILED are distrusted."""
    limits = np.arange(50, 100) / 100
    true, network = (np.array([row[key] for row in rows]) for key in ("dice", "network"))
    lost = [unseen[(true < FAILED) & (network == name)] for name in FITTED]
    good = next(x for x in limits if np.mean(true[unseen >= x] < GOOD) <= 0.01)
    look = next(x for x in limits if min(np.mean(some < x) for some in lost) >= COVERED)
    return {"good": float(good), "look": float(look)}


def score(
    rows: Sequence[dict[str, Any]], expected: np.ndarray, words: dict[str, float]
) -> dict[str, Any]:
    """Figures of one group of scans."""
    true = np.array([row["dice"] for row in rows])
    good, bad, failed = expected >= words["good"], true < GOOD, true < FAILED
    return {
        "n": len(rows), "median_dice": round(float(np.median(true)), 3),
        "spearman": round(float(spearmanr(expected, true).statistic), 3),
        "mean_absolute_error": round(float(np.abs(expected - true).mean()), 3),
        "bias": round(float((expected - true).mean()), 3),
        "below_0.85": int(bad.sum()), "below_0.85_and_good": int((bad & good).sum()),
        "below_0.70": int(failed.sum()),
        "below_0.70_and_distrust": int((failed & (expected < words["look"])).sum()),
        "from_0.85": int((~bad).sum()), "from_0.85_and_good": int((~bad & good).sum()),
    }  # fmt: skip


def cover(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the intervals of those scans in which something was found."""
    some = [(row["dice"], row["low"], row["high"]) for row in rows if row["ml"] > 0]
    within = sum(low <= dice <= high for dice, low, high in some)
    width = round(float(np.mean([high - low for _, low, high in some])), 3)
    return {"found": len(some), "within_the_interval": within, "mean_width": width}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Expected against true Dice of test bodies and of real CTs, and the intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.8), layout="constrained")
    titles = {"test": "synthetic CTs that were not fitted on", "real": "real CTs"}
    for axes, (part, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        ends = sorted((row["expected"], row["low"], row["high"]) for row in rows if row["ml"])
        axes.fill_betweenx(*np.transpose(ends), color="0.92", label="interval")
        for word, lowest in trust.WORDS.items():
            axes.axhline(lowest, color="0.7", linewidth=1)
            axes.text(0.01, lowest + 0.01, word, color="0.4", fontsize=9)
        for network, colour in zip(FITTED, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            some = [r for r in rows if (r["network"], r["part"]) == (network, part)]
            true, expected = ([row[key] for row in some] for key in ("dice", "expected"))
            axes.plot(true, expected, "o", color=colour, alpha=0.7, markersize=5,
                      label=f"{network}, n = {len(true)}")  # fmt: skip
        axes.set(xlabel="true Dice", xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
        axes.legend(loc="lower right")
    figure.axes[0].set_ylabel("expected Dice")
    save_figure(figure, path)


def main(score_only: bool = False) -> None:
    rows = collect(score_only)
    every, parts = list(rows.values()), defaultdict(list)
    for row in every:
        parts[row["network"], row["part"]].append(row)
    fitted = [row for network in FITTED for row in parts[network, "fit"]]
    weights, unseen = fit(fitted), expect_unseen(fitted)
    used = np.array([trust.OFFSET, trust.STEADINESS, trust.VOLUME, trust.PLACE])
    for row, dice in zip(every, expect(used, every), strict=True):
        below, above = next(ends for low, ends in trust.SPREAD.items() if dice >= low)
        ends = np.clip([dice, dice - below, dice + above], 0, 1).round(4).tolist()
        row |= dict(zip(("expected", "low", "high"), ends, strict=True))
    table = {}
    for (name, part), some in parts.items():
        others = fit([row for n in FITTED if n != name for row in parts[n, "fit"]])
        table[f"{name}, {part}"] = {
            "in_use": score(some, expect(used, some), trust.WORDS) | cover(some),
            "fitted_without_this_network": score(some, expect(others, some), trust.WORDS),
        }
    keys = ("offset", "steadiness", "volume", "place")
    result = {
        "command": name_command(), "machine": machine(torch_too=True), "groups": table,
        "weights": dict(zip(keys, weights.round(3).tolist(), strict=True)),
        "weights_in_use": dict(zip(keys, used.tolist(), strict=True)),
        "words": fit_words(fitted, unseen), "spreads": fit_spreads(fitted, unseen),
        "networks": NETWORKS, "columns": ", ".join(["name", *every[0]]),
        "scans": [", ".join(map(str, [name, *row.values()])) for name, row in rows.items()],
    }  # fmt: skip
    write_json(result, RESULTS / "trust.json")
    draw(every, ROOT / "docs" / "pictures" / "trust.png")
    print(json.dumps({key: result[key] for key in result if key != "scans"}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
