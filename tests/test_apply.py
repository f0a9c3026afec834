"""apply_model.py by hand: results on the scan's grid, honest numbers, clear refusals."""

import csv
import json
import shutil
import signal
from pathlib import Path

import children
import nibabel as nib
import numpy as np
import pytest
from children import run_child
from conftest import drawing_nothing
from matplotlib.image import imread

import apply_model
from data.evaluate import dice_metric
from data.files import InputError
from data.scans import read_volume
from data.volumes import AIR_HU


@pytest.fixture(scope="module")
def results(checkpoint, prepared, tmp_path_factory):
    destination = tmp_path_factory.mktemp("apply") / "results"
    apply_model.main(apply_model.Config(
        split="test", data=prepared, checkpoint=checkpoint, destination=destination, device="cpu",
    ))  # fmt: skip
    return destination


def test_results_lie_on_the_scan_and_say_what_they_hold(results, prepared):
    records = json.loads((prepared / "dataset.json").read_text())["cases"]
    tested = [record for record in records if record["split"] == "test"]
    rows = {row["case"]: row for row in csv.DictReader((results / "results.csv").open())}
    assert set(rows) == {record["case"] for record in tested} != set()
    same = json.loads((results / "results.json").read_text())
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in same]
    assert as_text == [*rows.values()]
    for record in tested:
        case = record["case"]
        folder = results / case
        scan = read_volume(Path(record["image"]))
        label = read_volume(folder / f"{case}_label.nii.gz")
        outside = read_volume(folder / f"{case}_masked.nii.gz")
        for written in (label, outside):
            assert written.shape == scan.shape
            assert np.allclose(written.affine, scan.affine, rtol=0, atol=1e-4)
            for form in ("qform_code", "sform_code"):
                assert written.header[form] == scan.header[form]
        assert label.dtype == np.uint8
        inside = label.read() > 0
        assert np.array_equal(outside.read()[inside], scan.read()[inside])
        assert (outside.read()[~inside] == AIR_HU).all()
        truth = read_volume(Path(record["label"])).read() > 0
        assert float(rows[case]["liver_dice"]) == pytest.approx(dice_metric(inside, truth)[0])
        ml = inside.sum() * np.prod(scan.spacing_mm) / 1000
        assert float(rows[case]["liver_volume_ml"]) == pytest.approx(ml, rel=1e-3, abs=0.01)
        assert (folder / f"{case}_preview.png").stat().st_size > 10_000
        assert float(rows[case]["seconds"]) > float(rows[case]["seconds_network"]) > 0
        assert json.loads((folder / f"{case}.json").read_text())["case"] == case
    assert not list(results.rglob(".*")), "nothing half-written stays behind"


@pytest.fixture(scope="module")
def scans(prepared, tmp_path_factory):
    """Two phantoms in a folder, with their label maps in another."""
    folder = tmp_path_factory.mktemp("scans")
    for record in json.loads((prepared / "dataset.json").read_text())["cases"][:2]:
        for key in ("image", "label"):
            (folder / f"{key}s").mkdir(exist_ok=True)
            target = folder / f"{key}s" / f"{record['case']}.nii.gz"
            target.write_bytes(Path(record[key]).read_bytes())
    return folder


def test_a_broken_scan_stops_nothing_and_finished_ones_are_skipped(
    scans, checkpoint, tmp_path, capsys
):
    images, out = shutil.copytree(scans / "images", tmp_path / "images"), tmp_path / "out"
    first, second = sorted(images.iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    (images / "._junk.nii.gz").write_text("macOS")
    config = apply_model.Config(
        paths=(images,), truth=(scans / "labels",), checkpoint=checkpoint, device="cpu",
        destination=out, accept=("seen",),
    )  # fmt: skip
    names = [path.name.removesuffix(".nii.gz") for path in (first, second)]
    with pytest.raises(InputError, match=rf"1 of 2 scans failed:\n.*{names[0]}.*cut off"):
        apply_model.main(config)
    made = out / names[1] / f"{names[1]}_label.nii.gz"
    assert not (out / names[0]).exists()
    before = made.stat().st_mtime_ns
    first.write_bytes(whole)
    capsys.readouterr()
    apply_model.main(config)
    assert f"{names[1]}: finished before" in capsys.readouterr().out
    assert made.stat().st_mtime_ns == before
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["case"] for row in rows] == names
    names.sort(key={row["case"]: float(row["liver_dice"]) for row in rows}.get)
    previews = [imread(out / name / f"{name}_preview.png") for name in names]
    stacked = imread(out / "worst.png")  # the worst one on top
    assert np.abs(stacked - np.concatenate(previews)).max() < 0.01
    config.background = -500  # another result is asked for
    with drawing_nothing():
        apply_model.main(config)
    assert made.stat().st_mtime_ns > before


@pytest.mark.usefixtures("blank_pictures")
def test_processes_share_the_scans(scans, checkpoint, tmp_path, monkeypatch):
    """As torchrun starts them: each takes its part, the last one's table holds all."""
    config = apply_model.Config(
        paths=(scans / "images",), checkpoint=checkpoint, destination=tmp_path, device="cpu"
    )
    names = sorted(path.name.removesuffix(".nii.gz") for path in (scans / "images").iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        apply_model.main(config)
        done = [row["case"] for row in csv.DictReader((tmp_path / "results.csv").open())]
        assert done == names[: rank + 1]


@pytest.mark.usefixtures("blank_pictures")
def test_networks_are_averaged_and_probabilities_written(scans, checkpoint, tmp_path):
    scan = min((scans / "images").iterdir())
    apply_model.main(apply_model.Config(
        paths=(scan,), checkpoint=checkpoint, folds=(checkpoint,), destination=tmp_path,
        probability=True, device="cpu", precision="fp32", largest_component=False, fill_holes=False,
    ))  # fmt: skip
    name = scan.name.removesuffix(".nii.gz")
    likely = read_volume(tmp_path / name / f"{name}_probability.nii.gz")
    assert np.allclose(likely.affine, read_volume(scan).affine, atol=1e-4)
    label = read_volume(tmp_path / name / f"{name}_label.nii.gz").read() > 0
    values = likely.read()
    assert 0 <= values.min() <= values.max() <= 1
    assert values[label].min() >= 0.499
    assert values[~label].max() <= 0.501


def read_outputs(folder: Path) -> dict[str, object]:
    """Read all under a final name: voxels as bytes, records without their seconds."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("[!.]*.*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            rows = np.atleast_1d(json.loads(path.read_text()))
            found[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
        elif path.suffix == ".gz":
            found[name] = path.read_bytes()
            read_volume(path).read()
        else:
            found[name] = path.stat().st_size > 0
    return found


def test_killed_at_any_moment_the_same_command_finishes_the_rest(scans, checkpoint, tmp_path):
    """SIGKILL within writes: no torn file, and at the end the undisturbed bytes."""
    how = {"truth": (scans / "labels",), "checkpoint": checkpoint, "accept": ("seen",)}
    unbroken = how | {"paths": (scans / "images",), "destination": tmp_path / "a"}
    unbroken |= {"device": "cpu", "precision": "fp32"}
    broken = unbroken | {"destination": tmp_path / "b"}
    assert run_child(children.apply, unbroken) == 0
    expected = read_outputs(unbroken["destination"])
    for write in (1, 3, 4):
        assert run_child(children.apply, broken, ("write", write)) == -signal.SIGKILL
        for name, content in read_outputs(broken["destination"]).items():
            if "/" in name:  # of a case; the tables grow with the cases
                assert content == expected[name], name
    assert run_child(children.apply, broken) == 0
    assert read_outputs(broken["destination"]) == expected
    assert not list(broken["destination"].glob("*/.*"))


def test_bad_input_is_named(tmp_path, checkpoint):
    scan, other = tmp_path / "scan.nii.gz", tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((16, 16, 16), np.int16), np.eye(4)), scan)
    nib.save(nib.Nifti1Image(np.zeros((16, 16, 17), np.uint8), np.eye(4)), other)
    (tmp_path / "file").write_text("")
    use = {"checkpoint": checkpoint, "destination": tmp_path / "results", "device": "cpu"}
    for match, more in (
        ("nothing to segment", {"paths": ()}),
        (r"no\.nii\.gz: .*[Nn]o such file", {"paths": (tmp_path / "no.nii.gz",)}),
        (r"scan\.nii\.gz: does not look like CT in HU .*--force", {"force": False}),
        ("use the label map of this scan", {"truth": (other,)}),
        ("is given twice", {"paths": (scan, scan)}),
        (r"no\.pt: no such checkpoint", {"checkpoint": tmp_path / "no.pt"}),
        (r"file.*cannot be written", {"destination": tmp_path / "file"}),
    ):
        settings = {"paths": (scan,), "force": True, **use, **more}
        with pytest.raises(InputError, match=match):
            apply_model.main(apply_model.Config(**settings))
        assert not list(tmp_path.rglob(".*partial*"))
        assert not (tmp_path / "results").exists()
