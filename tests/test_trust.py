"""How far a label map is trusted: the number, the word, and what a person is told to look at."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT

import apply_model
from data import trust
from data.evaluate import write_review
from data.files import InputError, read_json
from utilities import load_checkpoint


def scores_of(probability: np.ndarray) -> np.ndarray:
    """Logits (1, X, Y, Z) of one class."""
    return np.log(probability / (1 - probability))[None].astype(np.float32)


def test_what_hangs_on_where_the_line_is_drawn_is_not_steady():
    """By hand: 8 sure voxels and 4 undecided ones have a Dice of 2·8 / (8 + 12)."""
    p = np.full((6, 6, 8), 0.001)
    p[2:4, 2:4, 2:4] = 0.99
    p[2:4, 2:4, 5] = 0.5
    scores, before = scores_of(p), scores_of(p)
    to_network = np.diag([0.5, 0.5, 0.25, 1.0])  # the scan has four slices for each of these
    (known,) = trust.weigh_scores(scores, to_network, 32, ["liver"])
    assert known.steadiness == pytest.approx(16 / 20)
    assert known.slice == 20, "the slice of the scan in which the undecided voxels lie"
    assert known.doubt.sum() == 4
    assert known.edges[:2] == (3.0, 7.0), "voxels 2 and 3 of the network are 4 to 7 of the scan"
    assert np.array_equal(scores, before), "the label map is made of the same scores afterwards"
    assert not known.cut
    (known,) = trust.weigh_scores(scores[..., :6], to_network, 24, ["liver"])
    assert known.cut, "it reaches the last slice"


def test_a_tumour_belongs_to_its_organ_and_the_least_sure_organ_decides():
    p = np.full((3, 8, 4, 4), 1e-4)
    p[0, :3] = 0.97  # liver
    p[1, 3] = 0.97  # its tumour
    p[2, 5:] = 0.5  # spleen
    scores = np.log(p / (1 - p.sum(axis=0)).clip(1e-4)).astype(np.float32)
    liver, spleen = trust.weigh_scores(scores, np.eye(4), 4, ["liver", "tumour", "spleen"])
    assert liver.classes == ("liver", "tumour")
    assert (liver.steadiness, spleen.steadiness) == (1.0, 0.0)
    row = {f"{name}_volume_ml": 100.0 for name in ("liver", "tumour", "spleen")}
    judged = trust.judge_trust([liver, spleen], row, None)
    assert judged.evidence is spleen
    row["spleen_volume_ml"] = 0.0
    assert trust.judge_trust([liver, spleen], row, None).evidence is liver, "what is there counts"
    alone = trust.weigh_scores(scores[1:2], np.eye(4), 4, ["tumour"])
    assert alone[0].classes == ("tumour",), "a network of tumours alone"
    assert judged.row["trust"] == "distrust"


def test_nothing_found_is_distrusted():
    (known,) = trust.weigh_scores(scores_of(np.full((4, 4, 4), 1e-6)), np.eye(4), 4, ["liver"])
    judged = trust.judge_trust([known], {"liver_volume_ml": 0.0}, None)
    assert judged.row == {"expected_dice": 0.0, "trust": "distrust", "least_sure_slice": 1}


def test_the_number_falls_with_steadiness_and_with_a_strange_volume():
    values = [trust.expect_dice(steady, 0.0) for steady in (0.0, 0.5, 0.8, 0.9, 0.95, 1.0)]
    assert values == sorted(values)
    assert 0 <= values[0] < values[-1] <= 1
    usual = {"log_ml": math.log(1500), "sd": 0.3}
    assert trust.rate_volume(1500, usual) == trust.rate_volume(1500, None) == 0
    assert trust.rate_volume(200, usual) > trust.rate_volume(700, usual) > 0
    assert trust.rate_volume(6000, usual) > 0
    assert trust.rate_volume(200, usual, cut=True) == 0, "an organ that is cut off may be small"
    assert trust.rate_volume(6000, usual, cut=True) > 0
    assert trust.expect_dice(0.95, 3.0) < trust.expect_dice(0.95, 0.0)


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


def test_a_checkpoint_that_knows_no_volumes_is_applied_all_the_same(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    del saved["expected"]
    torch.save(saved, tmp_path / "earlier.pt")
    assert apply_model.load_model(tmp_path / "earlier.pt", "cpu", "fp32").expected is None
    torch.save({**saved, "expected": {"liver": {"log_ml": "x"}}}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: expected liver: log_ml has the wrong type"):
        load_checkpoint(tmp_path / "odd.pt")


def test_results_say_what_to_look_at_first(checkpoint, raw_phantoms, tmp_path, capsys, monkeypatch):
    """Two scans without truth, one of them noise: it comes first, and has its picture."""
    scans = sorted((raw_phantoms / "imagesTr").iterdir())[:2]
    monkeypatch.setattr(trust, "WORDS", {"good": 0.01, "look": 0.001, "distrust": 0.0})
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    monkeypatch.setattr(apply_model, "load_model", lambda *_: model)
    weigh = trust.weigh_scores

    def doubtful(scores, *rest):
        known = weigh(scores, *rest)
        known[0].steadiness = 0.0 if len(seen) == 1 else 0.9
        return seen.append(known) or known

    seen: list = []
    monkeypatch.setattr(trust, "weigh_scores", doubtful)
    config = apply_model.Config(
        paths=tuple(scans), checkpoint=checkpoint, destination=tmp_path, device="cpu"
    )
    apply_model.main(config)
    sure, unsure = (path.name.removesuffix(".nii.gz") for path in scans)
    said = capsys.readouterr().out
    assert f"1 of 2 want looking at, and correcting, in this order: {unsure} (" in said
    assert f"{tmp_path / 'review.csv'}" in said
    with (tmp_path / "review.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [unsure, sure]
    assert [row["trust"] for row in rows] == ["distrust", "good"]
    for row in rows:
        assert (tmp_path / row["picture"]).stat().st_size > 10_000
    table = {row["case"]: row for row in read_json(tmp_path / "results.json")}
    assert table[unsure]["expected_dice"] < table[sure]["expected_dice"]


def test_the_review_leaves_out_results_of_earlier_versions(tmp_path, capsys):
    write_review([{"case": "a", "liver_volume_ml": 3.0}], tmp_path)
    assert not (tmp_path / "review.csv").exists()
    assert "1 of 1 cases were done by an earlier version" in capsys.readouterr().out


def test_the_figures_of_the_page_are_those_of_the_benchmark():
    result = read_json(ROOT / "benchmarks" / "results" / "trust.json")
    page = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    used = {"offset": trust.OFFSET, "steadiness": trust.STEADINESS, "volume": trust.VOLUME}
    assert result["weights_in_use"] == used
    for figures in result["groups"].values():
        assert f"{figures['spearman']:.2f}" in page
        assert f"{figures['mean_absolute_error']:.3f}" in page
