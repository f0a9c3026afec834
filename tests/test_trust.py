"""The expected Dice of a label map, its word, and the list of cases to look at."""

import csv
import json
import math

import numpy as np
import pytest

import apply_model
from data import evaluate, trust
from data.volumes import Volume
from utilities import load_checkpoint


def scores_of(probability: np.ndarray) -> np.ndarray:
    """Logits (1, X, Y, Z) of one class."""
    return np.log(probability / (1 - probability))[None].astype(np.float32)


def blank(*shape: int) -> Volume:
    """A scan without air, in which no place is unusual."""
    return Volume(np.zeros(shape, np.int16), np.eye(4))


def test_voxels_between_the_two_thresholds_lower_the_steadiness():
    """By hand: 8 sure voxels and 4 undecided ones have a Dice of 2·8 / (8 + 12)."""
    p = np.full((6, 6, 8), 0.001)
    p[2:4, 2:4, 2:4] = 0.99
    p[2:4, 2:4, 5] = [[0.7, 0.5], [0.5, 0.3]]
    scores, before = scores_of(p), scores_of(p)
    to_network = np.diag([0.5, 0.5, 0.25, 1.0])  # the scan has four slices for each of these
    to_network[:2, 3] = -0.25  # and two voxels in plane, from edge to edge
    (known,) = trust.weigh_scores(scores, to_network, blank(12, 14, 32), ["liver"])
    assert known.steadiness == pytest.approx(16 / 20)
    assert known.slice == 20, "the slice of the scan in which the undecided voxels lie"
    doubt = np.zeros((12, 14), bool)  # the network's grid ends before the scan's last columns
    doubt[4:8, 4:8] = True
    assert np.array_equal(known.doubt, doubt), "on the scan's grid"
    assert np.array_equal(scores, before), "the label map is made of the same scores afterwards"
    assert not known.cut
    (known,) = trust.weigh_scores(scores[..., :6], to_network, blank(12, 12, 24), ["liver"])
    assert known.cut, "it reaches the last slice"


def test_a_tumour_belongs_to_its_organ_and_the_least_sure_organ_decides():
    p = np.full((3, 8, 4, 4), 1e-4)
    p[0, :3] = 0.97  # liver
    p[1, 3] = 0.97  # its tumour
    p[2, 5:] = 0.5  # spleen
    scores = np.log(p / (1 - p.sum(axis=0)).clip(1e-4)).astype(np.float32)
    flat = blank(8, 4, 4)
    liver, spleen = trust.weigh_scores(scores, np.eye(4), flat, ["liver", "tumour", "spleen"])
    assert liver.classes == ("liver", "tumour")
    assert (liver.steadiness, spleen.steadiness) == (1.0, 0.0)
    row = {f"{name}_volume_ml": 100.0 for name in ("liver", "tumour", "spleen")}
    judged = trust.judge_trust([liver, spleen], row, None)
    assert judged is spleen
    assert judged.row["trust"] == "distrust"
    row["spleen_volume_ml"] = 0.0
    assert trust.judge_trust([liver, spleen], row, None) is liver, "what is there counts"
    alone = trust.weigh_scores(scores[1:2], np.eye(4), flat, ["tumour"])
    assert alone[0].classes == ("tumour",), "a network of tumours alone"


def test_tumours_have_a_word_of_their_own():
    row = {"liver_volume_ml": 280.0, "tumour_volume_ml": 120.0, "lesion_list": [{}] * 20}
    for odd in ({}, {"tumour_volume_ml": 121.0}, {"lesion_list": [{}] * 21}):  # 30 % are 120 ml
        word = trust.judge_tumours(["liver", "tumour"], row | odd, outside=False)["tumour_trust"]
        assert word == ("distrust" if odd else "look")
    assert trust.judge_tumours(["liver", "tumour"], row, True) == {"tumour_trust": "distrust"}
    assert trust.judge_tumours(["liver"], row, True) == {}


def test_an_empty_label_map_is_distrusted():
    p = np.full((4, 4, 4), 1e-6)
    (known,) = trust.weigh_scores(scores_of(p), np.eye(4), blank(4, 4, 4), "l")
    judged = trust.judge_trust([known], {"l_volume_ml": 0.0}, None)
    assert [*judged.row.values()] == [0.0, 0.0, 0.0, "distrust", 1]


def test_the_number_falls_with_steadiness_and_with_a_strange_volume():
    def expect(steadiness: float, ml: float = 1500.0, cut: bool = False) -> float:
        known = trust.Evidence(("liver",), steadiness, cut)
        usual = {"liver": {"log_ml": math.log(1500), "sd": 0.3}}
        return trust.judge_trust([known], {"liver_volume_ml": ml}, usual).expected_dice

    values = [expect(steady) for steady in (0.0, 0.5, 0.8, 0.9, 0.95, 1.0)]
    assert values == sorted(values)
    assert 0 <= values[0] < values[-1] <= 1
    assert expect(0.9) > expect(0.9, 700.0) > expect(0.9, 200.0)
    assert expect(0.9) > expect(0.9, 6000.0) == expect(0.9, 6000.0, cut=True)
    assert expect(0.9, 200.0, cut=True) == expect(0.9), "a truncated organ may be small"
    for steady, word in ((0.95, "good"), (0.945, "look"), (0.857, "look"), (0.855, "distrust")):
        known = trust.Evidence(("liver",), steady)  # expected Dice 0.926, 0.916, 0.702, 0.697
        assert trust.judge_trust([known], {"liver_volume_ml": 1500.0}, None).word == word
    assert expect(0.98, 4000.0) > 0.8 > expect(0.98, 4001.0) == 0.3, "no liver is as large"


def test_an_expected_dice_has_the_interval_of_its_level():
    """By hand: 1.45 ln(0.945 / 0.055) − 1.74 − 2.58 / 10 is the logit of 0.893, where 90 % of other
    scans end from 0.14 below to 0.07 above."""
    known = trust.Evidence(("liver",), 0.945, misplaced=0.1)
    row = {"liver_volume_ml": 1500.0, "liver_dice": 0.9}
    told = evaluate.tell_row(row | trust.judge_trust([known], row, None).row, ["liver"])
    assert told == "liver 1500 ml, Dice 0.9000, expected Dice 0.89 (0.75–0.96): look"


def test_a_liver_on_the_wrong_side_is_misplaced():
    """By hand: 12 columns have their mean at 9.5 and an SD of √(143 / 12); the usual place is 0.6
    SD to the right, 0.3 to the front of it. A liver at 6.5, 9.5 lies 3 / SD + 0.6 to its left."""
    scan, sd = Volume(np.full((20, 20, 4), -1000, np.int16), np.eye(4)), math.sqrt(143 / 12)
    scan.data[4:16, 4:16], p = 40, np.full((40, 40, 4), 0.001)
    p[12:15, 18:21, 1:3] = 0.99  # on a grid that is twice as fine
    far = math.hypot(3 / sd + 0.6, 0.3) - 0.3  # 0.3 SD are usual
    flat = blank(20, 20, 4)
    for organ, where, away in (("liver", scan, far), ("spleen", scan, 0), ("liver", flat, 0)):
        (known,) = trust.weigh_scores(scores_of(p), np.diag([2.0, 2, 1, 1]), where, [organ])
        assert known.misplaced == pytest.approx(away), "of other organs, or without air, not known"


def test_a_checkpoint_knows_the_volumes_of_its_training_patients(checkpoint, prepared):
    content = json.loads((prepared / "dataset.json").read_text())
    ml = [
        sum(case["voxels_per_label"].get(value, 0) for value in ("1", "2"))
        * math.prod(case["spacing_mm"]) / 1000
        for case in content["cases"] if case["split"] == "training"
    ]  # fmt: skip
    learnt = load_checkpoint(checkpoint)["expected"]["liver"]
    assert learnt["log_ml"] == pytest.approx(np.mean(np.log(ml)), abs=1e-3)
    few = (len(ml) * np.var(np.log(ml)) + 4 * 0.3**2) / (len(ml) + 4)
    assert learnt["sd"] == pytest.approx(np.sqrt(few), abs=1e-3), "few patients tell no SD"
    content["settings"]["label_every"] = 4
    fourth = trust.learn_volumes(content, {"": (0,), "liver": (1, 2)})["liver"]
    assert fourth["log_ml"] == pytest.approx(learnt["log_ml"] + np.log(4), abs=2e-3)
    cases = [case for case in content["cases"] if case["split"] == "training"]
    assert not any(case["cut"] for case in cases)
    for case in cases[1:]:  # organs that a scan cuts off tell no volume
        case["cut"] = True
    whole = trust.learn_volumes(content, {"": (0,), "liver": (1, 2)})["liver"]
    assert whole["log_ml"] == pytest.approx(np.log(4 * ml[0]), abs=2e-3)


def test_results_list_the_least_sure_case_first(
    checkpoint, raw_phantoms, tmp_path, capsys, monkeypatch
):
    scans = sorted((raw_phantoms / "imagesTr").iterdir())[:2]
    monkeypatch.setattr(trust, "WORDS", {"good": 0.01, "look": 0.001, "distrust": 0.0})
    weigh, seen = trust.weigh_scores, []

    def doubtful(*given):
        known = weigh(*given)
        known[0].steadiness = 0.0 if len(seen) == 1 else 0.9
        seen.append(known)
        return known

    monkeypatch.setattr(trust, "weigh_scores", doubtful)
    monkeypatch.setattr(apply_model, "find_doubts", lambda *_: [])  # an epoch finds strange livers
    config = apply_model.Config(
        paths=tuple(scans), checkpoint=checkpoint, destination=tmp_path, device="cpu"
    )
    apply_model.main(config)
    sure, unsure = (path.name.removesuffix(".nii.gz") for path in scans)
    assert f"1 of 2 want looking at, in this order: {unsure} (" in capsys.readouterr().out
    with (tmp_path / "review.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["trust"]) for row in rows] == [(unsure, "distrust"), (sure, "good")]
    assert all((tmp_path / row["picture"]).is_file() for row in rows)
    path = tmp_path / sure / f"{sure}.json"  # the record of an earlier version lists no lesions
    record = json.loads(path.read_text())
    for key in ("lesion_list", "expected_dice", "trust"):
        del record[key]
    path.write_text(json.dumps(record))
    other = tmp_path / unsure / f"{unsure}.json"
    tumour = {"lesion_list": [{"class": "tumour", "ml": 2.5}]}
    other.write_text(json.dumps(json.loads(other.read_text()) | tumour))
    evaluate.report_all(tmp_path, ["liver"], "")
    lines = (tmp_path / "lesions.csv").read_text().split()
    assert lines == ["case,class,ml", f"{unsure},tumour,2.5"]
