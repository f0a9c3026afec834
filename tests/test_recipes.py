"""Recipes take each form of labels and are what was measured; patches are balanced and whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import augment_of, cached, chain_of, tiny

import train
from data.evaluate import dice_metric
from data.files import read_json
from data.labels import IMAGE, LABEL
from data.splits import read_prepared
from data.volumes import read_file
from preprocess import SubvolumeLoader, Subvolumes, preprocess_files, preprocess_volume
from utilities import Run, validate

pytestmark = pytest.mark.usefixtures("blank_pictures")


FORMS = (  # of --labels, as the pages write them
    None, {"liver": ("liver", "tumour")}, {"liver": ("liver",), "tumour": ("tumour",)},
    {"liver": ("1", "2")}, {"liver": ("1",), "tumour": ("2",)},
)  # fmt: skip


@pytest.mark.parametrize("name", train.RECIPES)
def test_a_recipe_starts_with_each_form_of_labels(name, few, whole_cases, tmp_path):
    """Of pretrained weights the head alone begins anew, and only where it has other classes."""
    config = tiny(name, few, whole_cases, tmp_path)
    for labels in FORMS:
        asked = replace(config, labels=labels or config.labels)
        prepared, chain = read_prepared(asked.data), chain_of(asked)
        run = train.build_run(asked, prepared, chain, torch.device("cpu"), None)
        assert run.carried["network_args"]["out_channels"] == 1 + len(asked.labels)
        assert bool(run.anew) == bool(config.pretrained and len(asked.labels) > 1)
        assert {part[:8] for part in run.anew} <= {"model.2."}


def test_the_recipe_laptop_is_the_setting_that_was_measured():
    """The figures of docs/evidence/few_patients.md are those of what a user gets."""
    result = read_json(ROOT / "benchmarks" / "results" / "few_patients.json")
    recipe = train.RECIPES["laptop"][1]
    assert result["laptop"] == json.loads(json.dumps(recipe.plain()))
    epochs = {row["epochs"] for row in result["rows"] if row["setting"] == "laptop"}
    assert epochs == {recipe.max_epochs}


# Patches of whole cases
@pytest.mark.parametrize("hu_window", [(-200.0, 250.0), None])
def test_cached_volume_is_the_preprocessed_volume(whole_cases, hu_window):
    """Training and inference see the same voxels, in all three axes."""
    chain = chain_of(tiny("liver-tumour-ce", None, whole_cases, None, hu_window=hu_window))
    record = read_prepared(whole_cases)["subvolumes"][0]
    files = {key: whole_cases / record[key] for key in (IMAGE, LABEL)}
    item = preprocess_files(files, chain, "cpu")
    volume, _ = preprocess_volume(read_file(files[IMAGE]), chain, "cpu")
    assert torch.equal(item[IMAGE], volume.half())
    assert item[LABEL].shape == item[IMAGE].shape
    assert set(item[LABEL].unique().tolist()) <= {0, 1, 2}
    assert volume.min() == 0 and volume.max() <= 1
    if hu_window is None:  # each slice was divided by its maximum, before z was interpolated
        assert volume.amax(dim=(0, 1, 2)).min() > 0.7


def test_patches_show_a_rare_class_as_often_as_a_common_one(whole_cases):
    plain = {"foreground_sampling": 1.0, "augment_probability": 0.0, "input_size": (8, 8, 8)}
    config = tiny("liver-tumour-ce", None, whole_cases, None, **plain)
    with_tumour = [item for item in cached(config) if (item[LABEL] == 2).any()]
    assert all((item[LABEL] == 2).float().mean() < 0.02 for item in with_tumour)
    patches = Subvolumes(with_tumour, augment_of(config), seed=0, repeats=100)
    samples = [patches[index] for index in range(len(patches))]
    assert all(sample[IMAGE].shape == sample[LABEL].shape == (1, 8, 8, 8) for sample in samples)
    assert all(sample[LABEL].any() for sample in samples)
    tumours = np.mean([bool((sample[LABEL] == 2).any()) for sample in samples])
    assert tumours > 0.45  # half of them are centred on it


class Neighbours(torch.nn.Module):
    """Finds what is bright around a voxel: at the edge of a window half of that is missing."""

    def forward(self, x):
        smooth = torch.nn.functional.avg_pool3d(x, 5, stride=1, padding=2)
        return torch.cat([0.45 - smooth, smooth - 0.45, torch.full_like(x, -9)], dim=1)


def test_patches_are_validated_as_whole_cases(whole_cases, tmp_path):
    """The Dice of validation is that of the whole case: windows are blended, no edge spoils it."""
    config = tiny("liver-tumour-ce", None, whole_cases, None)
    known, window = cached(config), (16, 16, 8)
    loader = SubvolumeLoader(Subvolumes(known), batch_size=1, shuffle=False, seed=0)
    classes = {"labels": chain_of(config).labels}
    carried = {"inference": {"window": window}, "preprocessing": classes}
    run = Run(Neighbours(), None, None, tmp_path, torch.device("cpu"), torch.float32, carried)
    row, whole = validate(run, loader, train.LOSSES["dice"](None)), []
    for item in known:
        found = run.kept(item[IMAGE][None].float()).argmax(dim=1)[0]
        whole.append(dice_metric(found, item[LABEL][0], 3)[0])
    assert row["val_dice_liver"] == pytest.approx(np.mean(whole), abs=0.01)
    shown = loader.dataset.examples(2, window)
    assert all(item[IMAGE].shape == item[LABEL].shape == (1, *window) for item in shown)
    assert all((item[LABEL] > 0).any() for item in shown)
