"""The weights that the repository carries: small, loadable, and good on bodies they never saw."""

import make_bodies
import pytest
from conftest import ROOT
from helpers import as_volume

import apply_model
from data.evaluate import dice_metric
from data.files import read_json

STARTER = ROOT / "checkpoints" / "starter.pt"


def test_the_starter_outlines_a_body_that_it_never_saw():
    assert STARTER.stat().st_size <= 5_000_000
    scan, truth = make_bodies.make_body(5000, make_bodies.Config())
    model = apply_model.load_model(STARTER, "cpu")
    label = apply_model.segment(model, as_volume(scan.dataobj, scan.affine)).label
    assert dice_metric(label.read() > 0, truth.get_fdata() > 0)[0] > 0.85


def test_the_readme_says_what_was_measured():
    result = read_json(ROOT / "benchmarks" / "results" / "starter.json")["seed_0"]
    text = (ROOT / "README.md").read_text()
    assert f"liver Dice {result['dice_mean']:.3f} in the mean" in text
    assert f"{result['dice_worst']:.3f} in the worst" in text
    card = (ROOT / "docs" / "starter.md").read_text()
    for name, figures in result["scans"].items():
        assert f"| {name} | {figures['dice']:.3f} |" in card


@pytest.mark.parametrize("word", ["medical device", "substitute for training"])
def test_the_card_says_what_it_is_not(word):
    for path in ("README.md", "docs/starter.md"):
        assert word in " ".join((ROOT / path).read_text().split())
