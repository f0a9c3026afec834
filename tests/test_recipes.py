"""Each recipe trains, reloads, predicts and is evaluated; patches lose nothing and are balanced."""

import csv
import re
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from helpers import augment_of, cached, chain_of, tiny

import apply_model
import train
from data.evaluate import dice_metric
from data.files import read_json
from data.labels import IMAGE, LABEL
from data.settings import read_settings
from data.splits import read_prepared
from data.volumes import read_file
from preprocess import (
    SubvolumeLoader,
    Subvolumes,
    augmentation,
    preprocess_files,
    preprocess_volume,
)
from utilities import Run, load_checkpoint, validate

pytestmark = pytest.mark.usefixtures("blank_pictures")


def cached_patches(whole_cases, **changes):
    config = tiny("liver-tumour-ce", None, whole_cases, None, **changes)
    return config, cached(config)


@pytest.mark.parametrize("name", train.RECIPES)
def test_a_recipe_trains_reloads_predicts_and_is_evaluated(name, few, whole_cases, tmp_path):
    config = tiny(name, few, whole_cases, tmp_path / "run", max_epochs=1)
    train.main(config)
    saved = load_checkpoint(tmp_path / "run" / "best.pt")
    assert saved["preprocessing"]["labels"] == chain_of(config).labels
    apply = apply_model.Config(
        split="test", data=config.data, checkpoint=tmp_path / "run" / "best.pt",
        destination=tmp_path / "results", device="cpu",
    )  # fmt: skip
    apply_model.main(apply)
    with (tmp_path / "results" / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    for organ in config.labels:
        assert 0 <= float(row[f"{organ}_dice"] or 0) <= 1
    assert 0 < float(row["accuracy"]) <= 1
    assert 0 <= float(row["mean_iou"]) <= 1


def test_a_recipe_by_name_on_the_command_line(whole_cases, tmp_path):
    """A name first, then any option: those win over the recipe, which wins over the defaults."""
    ended = run_here(
        "train.py", "liver-tumour-ce", "--data", whole_cases, "--run-folder", tmp_path, "--loss",
        "weighted_ce", "--input-size", 32, 32, 16, "--spacing", 8, 8, 5, "--base-channels", 4,
        "--max-epochs", 1, "--patches-per-case", 1, "--labels", "liver=1", "tumour=2",
    )  # fmt: skip
    assert ended == 0
    saved = load_checkpoint(tmp_path / "best.pt")
    assert (saved["config"]["sampling"], saved["config"]["loss"]) == ("patches", "weighted_ce")
    expected = {"background": (0,), "liver": (1,), "tumour": (2,)}
    assert saved["preprocessing"]["labels"] == expected


def test_the_recipe_laptop_is_the_setting_that_was_measured(monkeypatch):
    """The figures of docs/few_patients.md are those of what a user gets."""
    result = read_json(ROOT / "benchmarks" / "results" / "levers.json")
    options = {}  # the last of two equal ones counts
    for option in re.split(r"(?:^| )--", result["settings"]["laptop"])[1:]:
        name, *values = option.split()
        options[name] = [f"--{name}", *values]
    words = [word for option in options.values() for word in option]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    measured, recipe = read_settings(train.Config, ""), train.RECIPES["laptop"][1]
    places = {"data": None, "run_folder": None, "max_epochs": None}
    assert measured.plain() | places == recipe.plain() | places
    epochs = {row["epochs"] for row in result["rows"] if row["setting"] == "laptop"}
    assert epochs == {recipe.max_epochs}


def test_help_explains_the_recipes_and_a_wrong_name_is_refused(capsys):
    assert run_here("train.py", "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in train.RECIPES)
    assert "--learning-rate" in shown
    assert "must be one of liver-unet3d" in str(run_here("train.py", "liver-tumor"))


def test_whole_cases_keep_every_labelled_voxel_in_its_place(raw_phantoms, whole_cases):
    prepared = read_prepared(whole_cases)
    assert len(prepared["subvolumes"]) == len(prepared["cases"])
    for case, record in zip(prepared["cases"], prepared["subvolumes"], strict=True):
        source = read_file(raw_phantoms / "labelsTr" / f"{case['case']}.nii.gz").ras
        kept = read_file(whole_cases / record[LABEL])
        assert list(kept.shape) == record["shape"]
        found = []
        for image in (source, kept):
            where = np.argwhere(image.read() > 0)
            found.append(nib.affines.apply_affine(image.affine, where))
        assert len(found[0]) == len(found[1]) > 0
        assert np.allclose(found[0], found[1], atol=1e-3)


def test_cached_volume_is_the_preprocessed_volume(whole_cases):
    """Training and inference see the same voxels, in all three axes."""
    config, _ = cached_patches(whole_cases)
    record = read_prepared(whole_cases)["subvolumes"][0]
    files = {key: whole_cases / record[key] for key in (IMAGE, LABEL)}
    item = preprocess_files(files, chain_of(config), "cpu")
    volume, _ = preprocess_volume(read_file(files[IMAGE]), chain_of(config), "cpu")
    assert torch.equal(item[IMAGE], volume.half())
    assert item[LABEL].shape == item[IMAGE].shape
    assert set(item[LABEL].unique().tolist()) <= {0, 1, 2}


def test_patches_show_a_rare_class_as_often_as_a_common_one(whole_cases):
    plain = {"foreground_sampling": 1.0, "augment_probability": 0.0, "input_size": (8, 8, 8)}
    config, known = cached_patches(whole_cases, **plain)
    augment = augmentation(augment_of(config), "cpu")
    with_tumour = [item for item in known if (item[LABEL] == 2).any()]
    assert with_tumour
    assert all((item[LABEL] == 2).float().mean() < 0.02 for item in with_tumour)
    patches = Subvolumes(with_tumour, augment, seed=0, repeats=100)
    samples = [patches[index] for index in range(len(patches))]
    assert all(sample[IMAGE].shape == sample[LABEL].shape == (1, 8, 8, 8) for sample in samples)
    assert all(sample[LABEL].any() for sample in samples)
    tumours = np.mean([bool((sample[LABEL] == 2).any()) for sample in samples])
    assert tumours > 0.45  # half of them are centred on it


def test_patches_are_validated_as_whole_cases(whole_cases, tmp_path):
    """The Dice of validation is that of the whole case: windows are blended, no edge spoils it."""
    config, known = cached_patches(whole_cases)
    labels, window = chain_of(config).labels, (16, 16, 8)
    loader = SubvolumeLoader(Subvolumes(known), batch_size=1, shuffle=False, seed=0)
    carried = {"inference": {"window": window}, "preprocessing": {"labels": labels}}

    class Neighbours(torch.nn.Module):
        """Finds what is bright around a voxel: at the edge of a window half of that is missing."""

        def forward(self, x):
            smooth = torch.nn.functional.avg_pool3d(x, 5, stride=1, padding=2)
            return torch.cat([0.45 - smooth, smooth - 0.45, torch.full_like(x, -9)], dim=1)

    run = Run(Neighbours(), None, None, tmp_path, torch.device("cpu"), torch.float32, carried)
    row, whole = validate(run, loader, train.LOSSES["dice"](None)), []
    for item in known:
        found = run.kept(item[IMAGE][None].float()).argmax(dim=1)[0]
        whole.append(dice_metric(found, item[LABEL][0], 3)[0])
    assert row["val_dice_liver"] == pytest.approx(np.mean(whole), abs=0.01)
    shown = loader.dataset.examples(2, window)
    assert all(item[IMAGE].shape == item[LABEL].shape == (1, *window) for item in shown)
    assert all((item[LABEL] > 0).any() for item in shown)


def test_without_a_window_each_slice_is_divided_by_its_maximum(prepared):
    config = train.Config(data=prepared, hu_window=None, input_size=(32, 32))
    record = read_prepared(prepared)["subvolumes"][0]
    files = {key: prepared / record[key] for key in (IMAGE, LABEL)}
    image = preprocess_files(files, chain_of(config), "cpu")[IMAGE]
    assert image.min() == 0
    # the resize to the network's input smooths the brightest pixel
    assert 0.7 < image.amax(dim=(0, 1, 2)).min() <= image.max() <= 1
