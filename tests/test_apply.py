"""apply_model.py by hand: results on the scan's grid, honest numbers, clear refusals."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from conftest import run_script

import apply_model
import train
from utilities import AIR_HU, InputError, dice_metric, read_volume, voxels


@pytest.fixture(scope="module")
def checkpoint(prepared, tmp_path_factory):
    """A network that has learnt something: a few seconds on small phantoms."""
    run = tmp_path_factory.mktemp("apply") / "run"
    train.main(
        train.Config(
            data=prepared, run_folder=run, base_channels=4, input_size=(32, 32), spacing=(8.0, 8.0),
            learning_rate=5e-3, max_epochs=4, device="cpu", precision="fp32",
        )
    )  # fmt: skip
    return run / "best.pt"


@pytest.fixture(scope="module")
def results(checkpoint, prepared, tmp_path_factory):
    destination = tmp_path_factory.mktemp("apply") / "results"
    apply_model.main(
        apply_model.Config(
            split="test",
            data=prepared,
            checkpoint=checkpoint,
            destination=destination,
            device="cpu",
        )
    )
    return destination


def test_results_lie_on_the_scan_and_say_what_they_hold(results, prepared):
    records = json.loads((prepared / "dataset.json").read_text())["cases"]
    tested = [record for record in records if record["split"] == "test"]
    assert tested
    rows = {row["case"]: row for row in csv.DictReader((results / "results.csv").open())}
    assert set(rows) == {record["case"] for record in tested}
    for record in tested:
        case = record["case"]
        folder = results / case
        scan = read_volume(record_path(record["image"]))
        label = nib.load(folder / f"{case}_label.nii.gz")
        outside = nib.load(folder / f"{case}_masked.nii.gz")
        for written in (label, outside):
            assert written.shape == scan.shape
            assert np.allclose(written.affine, scan.affine, rtol=0, atol=1e-4)
            for form in ("qform_code", "sform_code"):
                assert written.header[form] == scan.header[form]
        assert label.get_data_dtype() == np.uint8
        inside = voxels(label) > 0
        assert np.array_equal(voxels(outside)[inside], voxels(scan)[inside])
        assert (voxels(outside)[~inside] == AIR_HU).all()
        truth = voxels(read_volume(record_path(record["label"]))) > 0
        assert float(rows[case]["liver_dice"]) == pytest.approx(dice_metric(inside, truth)[0])
        ml = inside.sum() * np.prod(scan.header.get_zooms()) / 1000
        assert float(rows[case]["liver_volume_ml"]) == pytest.approx(ml, rel=1e-3, abs=0.01)
        assert (folder / f"{case}_preview.png").stat().st_size > 10_000
        assert json.loads((folder / f"{case}.json").read_text())["case"] == case
    assert not list(results.rglob(".*")), "nothing half-written stays behind"


def record_path(text):
    from pathlib import Path

    return Path(text)


def test_the_checkpoint_alone_says_how_to_use_it(checkpoint, prepared):
    """Two loads predict the same, bit for bit; a path and an image are the same input."""
    record = json.loads((prepared / "dataset.json").read_text())["cases"][0]
    first, second = (apply_model.load_model(checkpoint, "cpu", "fp32") for _ in range(2))
    assert first.preprocessing["input_size"] == (32, 32)
    a = apply_model.segment(first, record["image"])
    b = apply_model.segment(second, read_volume(record_path(record["image"])))
    assert np.array_equal(voxels(a), voxels(b))


def refused(arguments, match):
    with pytest.raises(InputError, match=match):
        apply_model.main(apply_model.Config(**arguments, device="cpu"))


def test_bad_input_is_named(tmp_path, checkpoint, prepared):
    use = {"checkpoint": checkpoint, "destination": tmp_path / "results"}
    refused(use, "nothing to segment")
    refused(use | {"paths": (tmp_path / "no.nii.gz",)}, r"no\.nii\.gz: no such file")
    (tmp_path / "text.nii.gz").write_text("hello")
    refused(use | {"paths": (tmp_path / "text.nii.gz",)}, r"text\.nii\.gz: not a readable")
    flat = nib.Nifti1Image(np.zeros((8, 8, 8, 3), np.int16), np.eye(4))
    nib.save(flat, tmp_path / "four.nii.gz")
    refused(use | {"paths": (tmp_path / "four.nii.gz",)}, r"four\.nii\.gz: must be one 3D volume")
    scan = nib.Nifti1Image(np.zeros((16, 16, 16), np.int16), np.eye(4))
    nib.save(scan, tmp_path / "scan.nii.gz")
    paths = {"paths": (tmp_path / "scan.nii.gz",)}
    torn = (tmp_path / "scan.nii.gz").read_bytes()[:-20]
    (tmp_path / "torn.nii.gz").write_bytes(torn)
    refused(use | {"paths": (tmp_path / "torn.nii.gz",)}, r"torn\.nii\.gz: .*(cut off|damaged)")
    other = nib.Nifti1Image(np.zeros((16, 16, 17), np.uint8), np.eye(4))
    nib.save(other, tmp_path / "other.nii.gz")
    refused(use | paths, r"scan\.nii\.gz: does not look like CT in HU .*--force")
    assert not (tmp_path / "results").exists()
    use["force"] = True
    refused(use | paths | {"truth": (tmp_path / "other.nii.gz",)}, "must lie on the scan's grid")
    refused(use | {"paths": paths["paths"] * 2}, "two volumes are called scan")
    refused(use | {"checkpoint": tmp_path / "no.pt"} | paths, r"no\.pt: no such checkpoint")
    (tmp_path / "file").write_text("")
    refused(use | {"destination": tmp_path / "file"} | paths, r"file.*cannot be written")
    assert not list(tmp_path.rglob(".*partial*"))
    assert not (tmp_path / "results").exists()


def test_a_fault_ends_in_one_line_and_a_code(tmp_path):
    done = run_script("apply_model.py", tmp_path / "no.nii.gz", "--checkpoint", tmp_path / "no.pt")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: ")
    assert "Traceback" not in done.stderr
