"""Estimate the Dice of a label map without a reference: a number, a word, where to look first.

It comes from the network's probabilities, calibrated on scans that were degraded on purpose, and
from the organ's volume and place. Its validation and its limits: `docs/evidence/trust.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.labels import Labels, group_tumours, is_tumour
from data.volumes import Volume, find_bounding_box

SURE, UNSURE = 0.73, 0.27  # probabilities; logits of 1 and −1
FAINT = -3.0  # scores below it cannot add up to UNSURE
WORDS = {"good": 0.92, "look": 0.7, "distrust": 0.0}  # word → its lowest expected Dice
# Fitted by benchmarks/trust.py: weights of the evidence for the logit of the Dice; and, lowest
# expected Dice → how far below and above it 90 % of other scans end.
OFFSET, STEADINESS, VOLUME, PLACE = -1.74, 1.45, -0.44, -2.58
SPREAD = {0.92: (0.06, 0.02), 0.85: (0.14, 0.07), 0.7: (0.7, 0.13), 0.3: (0.6, 0.3), 0: (0.3, 0.4)}
USUAL_PLACE = {"liver": (0.6, 0.3)}  # to the right and front, in SD of the voxels of the body
BODY_HU, ROOM = -110, 0.3  # the least HU of a body; SD around the usual place
PLAUSIBLE_ML, TOO_LARGE = {"liver": (500, 4000)}, 0.3  # of adults; highest expected Dice of more
TUMOUR_SHARE, TUMOUR_COUNT = 0.3, 20  # of the organ; more of them are distrusted
ENDING = 0.05  # of its largest slice: an organ's end is smaller than that
USUAL_SD = 0.3  # of the logarithm of an organ's volume among adults
USUAL_WEIGHT = 4  # training patients that this counts for


@dataclass
class Evidence:
    """What the probabilities say about the label map of one organ with its tumours."""

    classes: tuple[str, ...]  # the organ and its tumours
    steadiness: float = 0.0  # Dice between the masks at SURE and UNSURE; 0: no voxel is sure
    cut: bool = False  # reaches the first or last slice, so that part of it may be missing
    misplaced: float = 0.0  # SD, from `rate_place`
    slice: int = 0  # of the scan (RAS index), the one with most voxels in doubt
    doubt: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))  # they, (X, Y)
    expected_dice: float = 0.0  # this, its interval and the word are set by `judge_trust`
    interval: tuple[float, float] = (0.0, 0.0)
    word: str = "distrust"  # of WORDS

    @property
    def row(self) -> dict[str, Any]:
        """Return the columns of a case's row; slices are counted from 1, as in pictures."""
        values = [round(value, 3) for value in (self.expected_dice, *self.interval)]
        dice = dict(zip(("expected_dice", "expected_low", "expected_high"), values, strict=True))
        return dice | {"trust": self.word, "least_sure_slice": self.slice + 1}


def weigh_scores(
    scores: np.ndarray, to_network: np.ndarray, scan: Volume, names: Sequence[str]
) -> list[Evidence]:
    """Return the evidence for each organ of `names`, those of the classes 1, 2, … `scores` (C − 1,
    X, Y, Z) are logits above the background's on the network's grid, to which `to_network` (4×4, no
    rotation) maps voxels of the scan; both in RAS order."""
    box, evidence = find_bounding_box(np.asarray((scores > FAINT).any(axis=0))), []
    likely = np.exp(scores[(slice(None), *box)].clip(None, 30))
    likely /= 1 + likely.sum(axis=0)
    # the network's voxel at each row and column of the scan, in one of padded slices
    shape, scale, shift = scan.ras_shape, np.diag(to_network)[:3], to_network[:3, 3]
    at = [np.arange(shape[n]) * scale[n] + shift[n] + 1 for n in (0, 1)]
    near = [np.clip(np.rint(p).astype(int), 0, scores.shape[n] + 1) for n, p in enumerate(at, 1)]
    for body in group_bodies(names):
        p = sum(likely[index - 1] for index in body)
        sure, unsure = p > SURE, p > UNSURE
        counts = np.count_nonzero(sure), np.count_nonzero(unsure)
        known = Evidence(tuple(names[index - 1] for index in body))
        if counts[1]:
            known.steadiness = float(2 * counts[0] / sum(counts))
            areas = np.count_nonzero(unsure, axis=(0, 1))
            used = np.flatnonzero(areas > ENDING * areas.max()) + box[2].start
            known.cut = bool(used[0] == 0 or used[-1] == scores.shape[3] - 1)
            inside = np.argwhere(sure if counts[0] else unsure) + [edge.start for edge in box]
            known.misplaced = rate_place((inside - shift) / scale, scan, known.classes[0])
            doubt = unsure & ~sure
            worst = int(np.count_nonzero(doubt, axis=(0, 1)).argmax())
            place = round((box[2].start + worst - shift[2]) / scale[2])
            known.slice, flat = min(max(place, 0), shape[2] - 1), np.zeros(scores.shape[1:3], bool)
            flat[box[:2]] = doubt[:, :, worst]
            known.doubt = np.pad(flat, 1)[np.ix_(*near)]
        evidence.append(known)
    return evidence


def judge_trust(
    evidence: Sequence[Evidence], row: Mapping[str, Any], expected: Mapping[str, Any] | None
) -> Evidence:
    """Return the found organ with the lowest expected Dice, with its interval and word. `row` is of
    `data.evaluate.measure` ({class}_volume_ml); `expected` of `learn_volumes`, or None."""
    for known in evidence:
        ml = sum(row[f"{name}_volume_ml"] or 0.0 for name in known.classes)
        steady = min(max(known.steadiness, 1e-3), 1 - 1e-3)
        strange = rate_volume(ml, (expected or {}).get(known.classes[0]), known.cut)
        logit = OFFSET + STEADINESS * math.log(steady / (1 - steady)) + VOLUME * strange
        odds = math.exp(logit + PLACE * known.misplaced)
        most = TOO_LARGE if ml > PLAUSIBLE_ML.get(known.classes[0], (0, math.inf))[1] else 1.0
        known.expected_dice = dice = min(odds / (1 + odds), most) if ml else 0.0
        below, above = next(ends for lowest, ends in SPREAD.items() if dice >= lowest)
        known.interval = (max(dice - below, 0.0), min(dice + above, 1.0)) if ml else (0.0, 0.0)
        known.word = next(word for word, lowest in WORDS.items() if known.expected_dice >= lowest)
    return min(evidence, key=lambda known: known.expected_dice or 2)  # 2: not found


def judge_tumours(names: Sequence[str], row: Mapping[str, Any], outside: bool) -> dict[str, str]:
    """Return the word of the tumours; not "good", because nothing tells how many were missed."""
    kinds = [name for name in names if is_tumour(name)]
    ml, whole = (sum(row[f"{name}_volume_ml"] for name in some) for some in (kinds, names))
    odd = outside or len(row["lesion_list"]) > TUMOUR_COUNT or ml > TUMOUR_SHARE * whole
    return {"tumour_trust": "distrust" if odd else "look"} if kinds else {}


def rate_volume(ml: float, usual: Mapping[str, float] | None, cut: bool = False) -> float:
    """Return the SD by which ln(ml) lies farther than 2 SD from the training patients'; at most 3.
    An organ that is `cut` off by the scan's end may be small."""
    if usual is None or ml <= 0:
        return 0.0
    distance = (math.log(ml) - usual["log_ml"]) / usual["sd"]
    return 0.0 if cut and distance < 0 else min(max(abs(distance) - 2, 0.0), 3.0)


def rate_place(inside: np.ndarray, scan: Volume, organ: str) -> float:
    """Return the SD of the body by which an organ's centre lies farther than ROOM from its usual
    place in plane; `inside` are its voxels (n, 3; RAS). 0 without air: not HU, or cropped."""
    first, last = np.rint([inside[:, 2].min(), inside[:, 2].max()]).astype(int)
    step = max(min(scan.ras_shape[:2]) // 64, 1)
    hu = scan.ras.data[::step, ::step, max(first, 0) : last + 1]
    body = np.argwhere(hu > BODY_HU)[:, :2] * step
    if organ not in USUAL_PLACE or len(body) in (0, hu.size):
        return 0.0
    away = (inside[:, :2].mean(axis=0) - body.mean(axis=0)) / body.std(axis=0).clip(1)
    return max(math.dist(away, USUAL_PLACE[organ]) - ROOM, 0.0)


def group_bodies(names: Sequence[str]) -> list[list[int]]:
    """Return the class indices of each organ with its tumours; tumours without organ one by one."""
    organs = group_tumours(names) or {index: [] for index in range(1, len(names) + 1)}
    return [[organ, *tumours] for organ, tumours in organs.items()]


def learn_volumes(prepared: Mapping[str, Any], classes: Labels) -> dict[str, dict[str, float]]:
    """Return organ → mean and SD of ln(volume in ml), tumours counted, of the training cases; of
    those that no scan cuts off, if any. The SD of adults counts as much as USUAL_WEIGHT of them."""
    names, learnt = list(classes)[1:], dict[str, dict[str, float]]()
    every = int(prepared["settings"].get("label_every") or 1)  # each n-th slice is annotated
    training = [case for case in prepared.get("cases", ()) if case["split"] == "training"]
    whole = [case for case in training if not case.get("cut")]
    for body in group_bodies(names):
        values = [value for index in body for value in classes[names[index - 1]]]
        logs = []
        for case in whole or training:
            if voxels := sum(case["voxels_per_label"].get(str(value), 0) for value in values):
                logs.append(math.log(voxels * every * math.prod(case["spacing_mm"]) / 1000))
        if logs:
            spread = len(logs) * float(np.var(logs)) + USUAL_WEIGHT * USUAL_SD**2
            sd, mean = math.sqrt(spread / (len(logs) + USUAL_WEIGHT)), float(np.mean(logs))
            learnt[names[body[0] - 1]] = {"log_ml": round(mean, 3), "sd": round(sd, 3)}
    return learnt
