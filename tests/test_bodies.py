"""Synthetic bodies, the starter weights that were trained on them, and what pages say of both."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT

import apply_model
from benchmarks import bodies
from data.evaluate import dice_metric
from data.files import read_json
from data.volumes import find_bounding_box as find_box

RESULTS = ROOT / "benchmarks" / "results"


def test_bodies_are_repeatable_and_differ(tmp_path):
    config = bodies.Config(tmp_path, cases=2, spacing=(12.0, 12.0, 12.0))
    bodies.main(config)
    for index in (0, 1):
        for folder, volume in zip(
            ("imagesTr", "labelsTr"), bodies.make_body(index, config), strict=True
        ):
            written = nib.load(tmp_path / folder / f"body_{index:05d}.nii.gz")
            assert np.array_equal(np.asanyarray(written.dataobj), volume.data)
    one, other = (bodies.make_body(index, config)[0].data for index in (0, 1))
    assert not np.array_equal(one, other)
    label = bodies.make_body(0, config)[1].data
    assert np.argwhere(label)[:, 0].mean() > label.shape[0] / 2, "in RAS, x grows to the right"
    many = bodies.make_body(0, dataclasses.replace(config, tumours=1))
    assert (many[1].data == 2).sum() > (label == 2).sum() and many[1].shape == label.shape


def test_a_phantom_around_a_mask_keeps_its_voxels_and_its_grid(tmp_path):
    mask, affine = np.zeros((40, 36, 20), np.uint8), np.diag([-8.0, -8, 8, 1])
    mask[8:24, 8:28, 4:16] = 1
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "liver.nii.gz")
    image, label = bodies.paint_around(tmp_path / "liver.nii.gz", 0, bodies.Config())
    assert np.array_equal(label.data > 0, mask > 0)
    assert np.array_equal(label.affine, affine) and np.array_equal(image.affine, affine)
    assert 80 < np.median(image.data[label.data == 1]) < 130


@pytest.mark.parametrize("name", ["starter", "starter_tumours"])
def test_starters_segment_a_body_that_they_never_saw(name):
    path = ROOT / "checkpoints" / f"{name}.pt"
    assert path.stat().st_size <= 6_000_000
    scan, truth = bodies.make_body(5002, bodies.Config(tumours=5003))
    box = tuple(slice(max(part.start - 4, 0), part.stop + 4) for part in find_box(truth.data))
    scan, true = scan.crop(box), truth.data[box]
    found = apply_model.segment(apply_model.load_model(path, "cpu"), scan).label.read()
    assert dice_metric(found > 0, true > 0)[0] > 0.85
    assert "tumours" not in name or dice_metric(found, true, 3)[1] > 0.5


def test_what_is_implausible_is_not_called_good(tmp_path):
    """A body that is stored upside down, whose Dice is expected to be 0.96."""
    scan = bodies.make_body(21, bodies.Config(seed=1001))[0]
    scan.like(scan.data[:, :, ::-1].copy()).write(tmp_path / "scan.nii.gz")
    starter = ROOT / "checkpoints" / "starter.pt"
    apply_model.main(apply_model.Config(
        paths=(tmp_path / "scan.nii.gz",), checkpoint=starter, destination=tmp_path, device="cpu",
    ))  # fmt: skip
    row = read_json(tmp_path / "scan" / "scan.json")
    assert row["expected_dice"] > 0.92 and row["trust"] == "look"
    assert "upside down" in row["warnings"]


def test_the_pages_give_the_measured_dice_of_the_starter():
    results = read_json(RESULTS / "starter.json")
    six = results[results["shipped"]]["sets"]["six"]
    assert all(row["inside"] >= 0.85 for row in results["gate"].values() if "inside" in row)
    readme, card = ((ROOT / name).read_text() for name in ("README.md", "docs/evidence/starter.md"))
    assert all(f"{dice:.3f}" in readme for dice in six["dice"][:2])  # mean and lowest
    for name, figures in six["scans"].items():
        assert f"| {name} | {figures['dice']:.3f} |" in card
