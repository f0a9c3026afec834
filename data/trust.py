"""How far to trust a label map whose truth nobody knows: one number, one word, where to look first.

The number is the Dice that the label map may be expected to have. It comes from what the network's
probabilities say of the map, calibrated on scans that were made bad on purpose, and from how far
the organ's volume lies from those that the network learnt from. How it was validated, and what it
cannot say: `docs/trust.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.labels import IMAGE, LABEL, PRED, Labels, group_tumours
from data.pictures import save_figure, show_patient
from data.volumes import find_bounding_box

SURE, UNSURE = 0.73, 0.27  # probabilities; logits of 1 and −1
FAINT = -3.0  # scores below it cannot add up to UNSURE
WORDS = {"good": 0.87, "look": 0.75, "distrust": 0.0}  # word → the lowest expected Dice of it
# Weights of the evidence for the logit of the Dice, fitted by benchmarks/trust.py.
OFFSET, STEADINESS, VOLUME = -0.97, 1.15, -0.28
ENDING = 0.05  # of its largest slice: an organ's end is smaller than that
USUAL_SD = 0.3  # of the logarithm of an organ's volume among adults
USUAL_WEIGHT = 4  # training patients that this counts for


@dataclass
class Evidence:
    """What the probabilities say about the label map of one organ with its tumours."""

    classes: tuple[str, ...]  # the organ and its tumours
    # Dice between what is organ at SURE and what at UNSURE: how much of the map hangs on where
    # the line is drawn. 1: nothing; 0: no voxel is sure.
    steadiness: float = 0.0
    cut: bool = False  # reaches the first or the last slice, so that some of it may be missing
    slice: int = 0  # of the scan (RAS index), the one with most voxels between the two
    doubt: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))  # they there, (x, y)
    edges: tuple[float, ...] = (0, 0, 0, 0)  # of `doubt` in voxels of the scan: x, x, y, y


@dataclass
class Trust:
    """The organ of a scan that is trusted least, and how far."""

    evidence: Evidence
    expected_dice: float
    word: str  # of WORDS

    @property
    def row(self) -> dict[str, Any]:
        """What stands of it in a case's row; slices are counted from 1, as in pictures."""
        return {
            "expected_dice": round(self.expected_dice, 3),
            "trust": self.word,
            "least_sure_slice": self.evidence.slice + 1,
        }


# ---------------------------------------------------------------------------------------
# Evidence of one scan
# ---------------------------------------------------------------------------------------


def weigh_scores(
    scores: np.ndarray, to_network: np.ndarray, slices: int, names: Sequence[str]
) -> list[Evidence]:
    """Evidence for each organ of `names`, those of the classes 1, 2, …

    Args:
        scores: (C − 1, X, Y, Z) logits above the background's, on the network's grid, where they
            are quicker to go through than on the scan's and tell as much.
        to_network: 4×4, voxel of the scan (RAS) → of the network; no rotation.
        slices: of the scan.
    """
    box, evidence = find_bounding_box(np.asarray((scores > FAINT).any(axis=0))), []
    edges = [  # of the box, in voxels of the scan
        (at - 0.5 - to_network[axis, 3]) / to_network[axis, axis]
        for axis, part in enumerate(box)
        for at in (part.start, part.stop)
    ]
    likely, limits = scores[(slice(None), *box)], (SURE, UNSURE)
    if len(likely) == 1:  # a single score says as much as its probability, and is there already
        limits = (math.log(SURE / (1 - SURE)), math.log(UNSURE / (1 - UNSURE)))
    else:
        likely = np.exp(likely.clip(None, 30))
        likely /= 1 + likely.sum(axis=0)
    for body in group_bodies(names):
        some = [likely[index - 1] for index in body]
        p = some[0] if len(some) == 1 else sum(some)
        sure, unsure = (p > limit for limit in limits)
        counts = np.count_nonzero(sure), np.count_nonzero(unsure)
        known = Evidence(tuple(names[index - 1] for index in body), edges=tuple(edges[:4]))
        if counts[1]:
            known.steadiness = float(2 * counts[0] / sum(counts))
            areas = np.count_nonzero(unsure, axis=(0, 1))
            used = np.flatnonzero(areas > ENDING * areas.max()) + box[2].start
            known.cut = bool(used[0] == 0 or used[-1] == scores.shape[3] - 1)
            doubt = unsure & ~sure
            worst = int(np.count_nonzero(doubt, axis=(0, 1)).argmax())
            at = round((box[2].start + worst - to_network[2, 3]) / to_network[2, 2])
            known.slice, known.doubt = min(max(at, 0), slices - 1), doubt[:, :, worst].copy()
        evidence.append(known)
    return evidence


def judge_trust(
    evidence: Sequence[Evidence], row: Mapping[str, Any], expected: Mapping[str, Any] | None
) -> Trust:
    """How far to trust a scan's label map: as far as the least sure organ of those in it.

    Args:
        evidence: of each organ, from `weigh_scores`.
        row: of `data.evaluate.measure`, with `{class}_volume_ml`.
        expected: of the checkpoint, from `learn_volumes`; None: nothing is known of the training.
    """
    found, missed = list[Trust](), list[Trust]()
    for known in evidence:
        ml = sum(row[f"{name}_volume_ml"] or 0.0 for name in known.classes)
        usual = (expected or {}).get(known.classes[0])
        dice = expect_dice(known.steadiness, rate_volume(ml, usual, known.cut)) if ml else 0.0
        word = next(word for word, lowest in WORDS.items() if dice >= lowest)
        (found if ml else missed).append(Trust(known, dice, word))
    return min(found or missed, key=lambda trust: trust.expected_dice)


def group_bodies(names: Sequence[str]) -> list[list[int]]:
    """Class indices of each organ with its tumours; of tumours whose organ is no class, each."""
    organs = group_tumours(names) or {index: [] for index in range(1, len(names) + 1)}
    return [[organ, *tumours] for organ, tumours in organs.items()]


def expect_dice(steadiness: float, strangeness: float) -> float:
    """The Dice that such evidence came with where the truth was known."""
    steady = min(max(steadiness, 1e-3), 1 - 1e-3)
    logit = OFFSET + STEADINESS * math.log(steady / (1 - steady)) + VOLUME * strangeness
    return 1 / (1 + math.exp(-logit))


def rate_volume(ml: float, usual: Mapping[str, float] | None, cut: bool = False) -> float:
    """SD by which ln(ml) lies farther than 2 SD from the training patients'; 3 at most.

    An organ that the scan has `cut` off may be small.
    """
    if usual is None or ml <= 0:
        return 0.0
    distance = (math.log(ml) - usual["log_ml"]) / usual["sd"]
    return 0.0 if cut and distance < 0 else min(max(abs(distance) - 2, 0.0), 3.0)


def learn_volumes(prepared: Mapping[str, Any], classes: Labels) -> dict[str, dict[str, float]]:
    """Organ → mean and SD of ln(volume in ml), tumours counted, of the cases to train on.

    Of few patients the SD says little: that of adults counts as much as USUAL_WEIGHT of them.

    Args:
        prepared: content of `dataset.json`, whose cases have voxels_per_label and spacing_mm.
        classes: class name → raw label values, background first.
    """
    names, learnt = list(classes)[1:], dict[str, dict[str, float]]()
    every = int(prepared["settings"].get("label_every") or 1)  # slice that was drawn
    for body in group_bodies(names):
        values = [value for index in body for value in classes[names[index - 1]]]
        logs = []
        for case in prepared.get("cases", ()):
            voxels = sum(case["voxels_per_label"].get(str(value), 0) for value in values)
            if case["split"] == "training" and voxels:
                logs.append(math.log(voxels * every * math.prod(case["spacing_mm"]) / 1000))
        if logs:
            spread = len(logs) * float(np.var(logs)) + USUAL_WEIGHT * USUAL_SD**2
            sd = math.sqrt(spread / (len(logs) + USUAL_WEIGHT))
            learnt[names[body[0] - 1]] = {
                "log_ml": round(float(np.mean(logs)), 3),
                "sd": round(sd, 3),
            }
    return learnt


# ---------------------------------------------------------------------------------------
# What a person looks at
# ---------------------------------------------------------------------------------------


def draw_doubt(data: Mapping[str, Any], trust: Trust, path: Path) -> None:
    """Write the least sure slice of a scan that wants looking at, as it is and with its doubts.

    A scan that is trusted needs none: one of an earlier run is removed.
    """
    from matplotlib.figure import Figure

    if trust.word == "good":
        path.unlink(missing_ok=True)
        return
    known, figure = trust.evidence, Figure(figsize=(11, 5.8), layout="constrained")
    plain, marked = figure.subplots(1, 2)
    show_patient({IMAGE: data[IMAGE]}, known.slice, axes=plain, title="as it is")
    drawn = {key: data[key] for key in (IMAGE, LABEL, PRED) if key in data}
    show_patient(drawn, known.slice, axes=marked, title="the network's outline; doubt in red")
    if known.doubt.size:
        width, height = data[IMAGE].ras_shape[:2]
        red = np.ma.masked_equal(known.doubt.astype(np.uint8), 0)
        x0, x1, y0, y1 = known.edges  # pictures run to the patient's left and down
        marked.imshow(
            red[::-1, ::-1].T, cmap="autumn", alpha=0.45, interpolation="none",
            extent=(width - 1 - x1, width - 1 - x0, height - 1 - y0, height - 1 - y1),
        )  # fmt: skip
        marked.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        x, y, _ = data[IMAGE].ras.spacing_mm
        marked.set_aspect(y / x)
    where = f"{path.name.removesuffix('_doubt.png')} · {known.classes[0]} · slice {known.slice + 1}"
    told = f"{where} · expected Dice {trust.expected_dice:.2f}: {trust.word}"
    figure.suptitle(told, fontsize=11)
    save_figure(figure, path)
