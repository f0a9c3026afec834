"""Synthetic bodies, the starter weights that were trained on them, and what pages say of both."""

from collections import defaultdict

import nibabel as nib
import numpy as np
from conftest import ROOT

import apply_model
from benchmarks import bodies
from data.evaluate import dice_metric
from data.files import read_json

STARTER = ROOT / "checkpoints" / "starter.pt"
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
    one, other = (bodies.make_body(index, config)[0] for index in (0, 1))
    assert one.shape != other.shape or not np.array_equal(one.data, other.data)
    label = bodies.make_body(0, config)[1].data
    assert np.argwhere(label)[:, 0].mean() > label.shape[0] / 2, "in RAS, x grows to the right"


def test_some_bodies_are_slabs_or_lie_in_a_frame_and_some_hold_no_liver():
    made = [bodies.make_body(i, bodies.Config(spacing=(16.0, 16.0, 16.0))) for i in range(20, 50)]
    assert 2 < sum(image.shape[2] * 16 <= 160 for image, _ in made) < 15
    assert 0 < sum(not label.data.any() for _, label in made) < 6
    assert {0, -1024, -2000} <= {image.data[0, 0, 0] for image, _ in made}


def test_a_phantom_around_a_mask_keeps_its_voxels_and_its_grid(tmp_path):
    mask, affine = np.zeros((40, 36, 20), np.uint8), np.diag([-8.0, -8, 8, 1])
    mask[8:24, 8:28, 4:16] = 1
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "liver.nii.gz")
    image, label = bodies.paint_around(tmp_path / "liver.nii.gz", 0, bodies.Config())
    assert np.array_equal(label.data > 0, mask > 0)
    assert np.array_equal(label.affine, affine) and np.array_equal(image.affine, affine)
    assert 80 < np.median(image.data[label.data == 1]) < 130


def test_the_starter_segments_a_body_that_it_never_saw():
    assert STARTER.stat().st_size <= 6_000_000
    scan, truth = bodies.make_body(5000, bodies.Config())
    label = apply_model.segment(apply_model.load_model(STARTER, "cpu"), scan).label
    assert dice_metric(label.read() > 0, truth.data > 0)[0] > 0.85


def test_the_pages_give_the_measured_dice_of_the_starter_and_say_what_it_is_not():
    results = read_json(RESULTS / "starter.json")
    six = results[results["shipped"]]["sets"]["six"]
    assert all(row["inside"] >= 0.85 for row in results["gate"].values() if "inside" in row)
    readme, card = ((ROOT / name).read_text() for name in ("README.md", "docs/evidence/starter.md"))
    assert all(f"{dice:.3f}" in readme for dice in six["dice"][:2])  # mean and lowest
    for name, figures in six["scans"].items():
        assert f"| {name} | {figures['dice']:.3f} |" in card
    for page in (readme, card):
        assert "medical device" in page


def test_the_table_of_other_programs_is_that_of_the_benchmark():
    page = (ROOT / "docs" / "evidence" / "few_patients.md").read_text(encoding="utf-8")
    programs = defaultdict(list)
    for row in read_json(RESULTS / "peers.json")["rows"]:
        name = f"{row['program']}, `{row['configuration']}`, seed {row['seed']}"
        programs[name] += row.get("scans", {}).values()  # none where nnU-Net made no plan
    for name, scans in programs.items():
        cells = [str(len(scans))]
        for way in ("as_it_is", "largest_component"):
            dice = [scan[way]["dice"] for scan in scans]
            cells.append(f"{np.mean(dice):.3f} / {min(dice):.3f}")
        assert not scans or f"\n| {name} | {' | '.join(cells)} | " in page
