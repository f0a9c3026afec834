"""Estimate the Dice of a label map without a reference: one number, one word, where to look first.

It comes from the network's probabilities, calibrated on scans that were degraded on purpose, and
from the organ's volume. Its validation and its limits: `docs/evidence/trust.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.labels import Labels, group_tumours
from data.volumes import find_bounding_box

SURE, UNSURE = 0.73, 0.27  # probabilities; logits of 1 and −1
FAINT = -3.0  # scores below it cannot add up to UNSURE
WORDS = {"good": 0.87, "look": 0.75, "distrust": 0.0}  # word → its lowest expected Dice
# Weights of the evidence for the logit of the Dice, fitted by benchmarks/trust.py.
OFFSET, STEADINESS, VOLUME = -0.97, 1.15, -0.28
ENDING = 0.05  # of its largest slice: an organ's end is smaller than that
USUAL_SD = 0.3  # of the logarithm of an organ's volume among adults
USUAL_WEIGHT = 4  # training patients that this counts for


@dataclass
class Evidence:
    """What the probabilities say about the label map of one organ with its tumours."""

    classes: tuple[str, ...]  # the organ and its tumours
    steadiness: float = 0.0  # Dice between the masks at SURE and UNSURE; 0: no voxel is sure
    cut: bool = False  # reaches the first or last slice, so that part of it may be missing
    slice: int = 0  # of the scan (RAS index), the one with most voxels in doubt
    doubt: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))  # they, (X, Y)
    expected_dice: float = 0.0  # this and the word are set by `judge_trust`
    word: str = "distrust"  # of WORDS

    @property
    def row(self) -> dict[str, Any]:
        """Return the columns of a case's row; slices are counted from 1, as in pictures."""
        dice = {"expected_dice": round(self.expected_dice, 3), "trust": self.word}
        return dice | {"least_sure_slice": self.slice + 1}


def weigh_scores(
    scores: np.ndarray, to_network: np.ndarray, shape: Sequence[int], names: Sequence[str]
) -> list[Evidence]:
    """Return the evidence for each organ of `names`, those of the classes 1, 2, … `scores` (C − 1,
    X, Y, Z) are logits above the background's on the network's grid, to which `to_network` (4×4, no
    rotation) maps voxels of the scan, of this `shape`; both in RAS order."""
    box, evidence = find_bounding_box(np.asarray((scores > FAINT).any(axis=0))), []
    likely = np.exp(scores[(slice(None), *box)].clip(None, 30))
    likely /= 1 + likely.sum(axis=0)
    # the network's voxel at each row and column of the scan, in one of padded slices
    at = [np.arange(shape[n]) * to_network[n, n] + to_network[n, 3] + 1 for n in (0, 1)]
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
            doubt = unsure & ~sure
            worst = int(np.count_nonzero(doubt, axis=(0, 1)).argmax())
            place = round((box[2].start + worst - to_network[2, 3]) / to_network[2, 2])
            known.slice, flat = min(max(place, 0), shape[2] - 1), np.zeros(scores.shape[1:3], bool)
            flat[box[:2]] = doubt[:, :, worst]
            known.doubt = np.pad(flat, 1)[np.ix_(*near)]
        evidence.append(known)
    return evidence


def judge_trust(
    evidence: Sequence[Evidence], row: Mapping[str, Any], expected: Mapping[str, Any] | None
) -> Evidence:
    """Return the found organ with the lowest expected Dice, with this Dice and its word. `row` is
    of `data.evaluate.measure` ({class}_volume_ml); `expected` of the checkpoint, from
    `learn_volumes`, or None."""
    for known in evidence:
        ml = sum(row[f"{name}_volume_ml"] or 0.0 for name in known.classes)
        steady = min(max(known.steadiness, 1e-3), 1 - 1e-3)
        strange = rate_volume(ml, (expected or {}).get(known.classes[0]), known.cut)
        logit = OFFSET + STEADINESS * math.log(steady / (1 - steady)) + VOLUME * strange
        known.expected_dice = 1 / (1 + math.exp(-logit)) if ml else 0.0
        known.word = next(word for word, lowest in WORDS.items() if known.expected_dice >= lowest)
    found = [known for known in evidence if known.expected_dice > 0]
    return min(found or evidence, key=lambda known: known.expected_dice)


def rate_volume(ml: float, usual: Mapping[str, float] | None, cut: bool = False) -> float:
    """Return the SD by which ln(ml) lies farther than 2 SD from the training patients'; at most 3.
    An organ that is `cut` off by the scan's end may be small."""
    if usual is None or ml <= 0:
        return 0.0
    distance = (math.log(ml) - usual["log_ml"]) / usual["sd"]
    return 0.0 if cut and distance < 0 else min(max(abs(distance) - 2, 0.0), 3.0)


def group_bodies(names: Sequence[str]) -> list[list[int]]:
    """Return the class indices of each organ with its tumours; tumours without organ one by one."""
    organs = group_tumours(names) or {index: [] for index in range(1, len(names) + 1)}
    return [[organ, *tumours] for organ, tumours in organs.items()]


def learn_volumes(prepared: Mapping[str, Any], classes: Labels) -> dict[str, dict[str, float]]:
    """Return organ → mean and SD of ln(volume in ml), tumours counted, of the training cases; of
    those alone that no scan cuts off, if there are any. Few patients say little about the SD: that
    of adults counts as much as USUAL_WEIGHT of them."""
    names, learnt = list(classes)[1:], dict[str, dict[str, float]]()
    every = int(prepared["settings"].get("label_every") or 1)  # each n-th slice is annotated
    training = [case for case in prepared.get("cases", ()) if case["split"] == "training"]
    whole = [case for case in training if not case.get("cut")]
    for body in group_bodies(names):
        values = [value for index in body for value in classes[names[index - 1]]]
        logs = []
        for case in whole or training:
            voxels = sum(case["voxels_per_label"].get(str(value), 0) for value in values)
            if voxels:
                logs.append(math.log(voxels * every * math.prod(case["spacing_mm"]) / 1000))
        if logs:
            spread = len(logs) * float(np.var(logs)) + USUAL_WEIGHT * USUAL_SD**2
            sd, mean = math.sqrt(spread / (len(logs) + USUAL_WEIGHT)), float(np.mean(logs))
            learnt[names[body[0] - 1]] = {"log_ml": round(mean, 3), "sd": round(sd, 3)}
    return learnt
