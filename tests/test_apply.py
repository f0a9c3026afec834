"""apply_model.py by hand: results on the scan's grid, honest numbers, clear refusals."""

import contextlib
import csv
import json
import signal
from pathlib import Path

import children
import nibabel as nib
import numpy as np
import pytest
import torch
from children import run_child
from conftest import SHARED_DATA, run_here
from matplotlib.image import imread

import apply_model
from data.datasets import find_scans
from data.evaluate import dice_metric
from data.files import InputError
from data.scans import read_volume
from data.volumes import AIR_HU


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
    same = json.loads((results / "results.json").read_text())
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in same] == list(
        rows.values()
    )
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
        assert json.loads((folder / f"{case}.json").read_text())["case"] == case
    assert not list(results.rglob(".*")), "nothing half-written stays behind"


def test_the_checkpoint_alone_says_how_to_use_it(checkpoint, prepared):
    """Two loads predict the same, bit for bit; a path and an image are the same input."""
    record = json.loads((prepared / "dataset.json").read_text())["cases"][0]
    first, second = (apply_model.load_model(checkpoint, "cpu", "fp32") for _ in range(2))
    assert first.chain.input_size == (32, 32)
    a = apply_model.segment(first, record["image"])
    b = apply_model.segment(second, read_volume(Path(record["image"])))
    assert np.array_equal(a.read(), b.read())


def test_the_summary_is_that_of_the_rows(results):
    rows = list(csv.DictReader((results / "results.csv").open()))
    summary = json.loads((results / "summary.json").read_text())
    dice = [float(row["liver_dice"]) for row in rows]
    assert summary["patients"] == summary["liver"]["dice"]["n"] == len(rows)
    assert summary["liver"]["dice"]["mean"] == pytest.approx(np.mean(dice))
    assert summary["liver"]["dice"]["worst"] == min(dice)
    assert (results / "summary.png").stat().st_size > 10_000
    for row in rows:
        assert float(row["seconds"]) > float(row["seconds_network"]) > 0
        assert len(row["weights"]) == 12


@pytest.fixture(scope="module")
def scans(prepared, tmp_path_factory):
    """Two phantoms in a folder with their labels in another, and the second scan cut off."""
    records = json.loads((prepared / "dataset.json").read_text())["cases"][:2]
    folder = tmp_path_factory.mktemp("scans")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for record in records:
        for key in ("image", "label"):
            target = folder / f"{key}s" / f"{record['case']}.nii.gz"
            target.write_bytes(Path(record[key]).read_bytes())
    return folder


def test_a_broken_scan_stops_nothing_and_finished_ones_are_skipped(
    scans, checkpoint, tmp_path, capsys
):
    images = tmp_path / "images"
    images.mkdir()
    for path in (scans / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    first, second = sorted(images.iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    (images / "._junk.nii.gz").write_text("macOS")
    config = apply_model.Config(
        paths=(images,), truth=(scans / "labels",), checkpoint=checkpoint, device="cpu",
        destination=tmp_path / "out",
    )  # fmt: skip
    names = [path.name.removesuffix(".nii.gz") for path in (first, second)]
    with pytest.raises(InputError, match=rf"1 of 2 scans failed:\n.*{names[0]}.*cut off"):
        apply_model.main(config)
    made = tmp_path / "out" / names[1] / f"{names[1]}_label.nii.gz"
    assert [path.name for path in (tmp_path / "out" / names[1]).iterdir()]
    assert not (tmp_path / "out" / names[0]).exists()
    before = made.stat().st_mtime_ns
    first.write_bytes(whole)
    capsys.readouterr()
    apply_model.main(config)
    assert f"{names[1]}: finished before" in capsys.readouterr().out
    assert made.stat().st_mtime_ns == before
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [row["case"] for row in rows] == names
    names.sort(key={row["case"]: float(row["liver_dice"]) for row in rows}.get)
    out = tmp_path / "out"
    previews = [imread(out / name / f"{name}_preview.png") for name in names]
    stacked = imread(out / "worst.png")  # the worst one on top
    assert np.abs(stacked - np.concatenate(previews)).max() < 0.01
    config.background = -500  # another result is asked for
    config.paths = (second,)
    config.truth = ()
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
    config = apply_model.Config(
        paths=(scan,), checkpoint=checkpoint, folds=(checkpoint,), destination=tmp_path,
        mirror=True, probability=True, device="cpu", precision="fp32", largest_component=False,
        fill_holes=False,
    )  # fmt: skip
    apply_model.main(config)
    name = scan.name.removesuffix(".nii.gz")
    likely = read_volume(tmp_path / name / f"{name}_probability.nii.gz")
    assert likely.header.get_data_dtype() == np.uint8  # as stored
    assert np.allclose(likely.affine, read_volume(scan).affine, atol=1e-4)
    label = read_volume(tmp_path / name / f"{name}_label.nii.gz").read() > 0
    values = likely.read()
    assert 0 <= values.min() <= values.max() <= 1
    assert values[label].min() >= 0.499
    assert values[~label].max() <= 0.501
    one, two = (apply_model.load_model(c, "cpu", "fp32") for c in (checkpoint, [checkpoint] * 2))
    assert np.array_equal(
        apply_model.segment(one, scan).read(), apply_model.segment(two, scan).read()
    )
    assert json.loads((tmp_path / name / f"{name}.json").read_text())["network_windows"] % 4 == 0


def test_mirroring_is_front_to_back_alone(checkpoint):
    """What is symmetric front to back is predicted so, and left and right keep their difference."""
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    half = torch.rand(1, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    volume = torch.cat([half, half.flip(2)], dim=2)
    scores = apply_model.predict(model, volume, mirror=True)
    assert torch.allclose(scores, scores.flip(2), atol=1e-4)
    assert not torch.allclose(scores, scores.flip(1), atol=1e-2)


class Device(torch.nn.Module):
    """A network on a device that holds few windows; its error is that of torch on a GPU."""

    def __init__(self, network, holds):
        super().__init__()
        self.network, self.holds, self.refused = network, holds, []

    def forward(self, x):
        if len(x) > self.holds[x.device.type]:
            self.refused.append((x.device.type, len(x)))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(x)


@pytest.mark.parametrize(
    ("holds", "begin", "refused"),
    [
        # nine windows, of which none is left alone where there may be several
        ({"cpu": 3}, "cpu", [("cpu", 5)]),
        ({"cpu": 1}, "cpu", [("cpu", 5), ("cpu", 3), ("cpu", 2)]),
        # "meta" stands for a GPU: windows go there, and not even one of them fits
        ({"meta": 0, "cpu": 1}, "meta", [("meta", n) for n in (5, 3, 2, 1)]),
    ],
)
def test_too_little_memory_makes_smaller_batches_and_then_the_cpu(
    checkpoint, capsys, monkeypatch, holds, begin, refused
):
    monkeypatch.setattr(apply_model, "autocast", lambda *_: contextlib.nullcontext())
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    volume = torch.rand(1, 32, 32, 80, generator=torch.Generator().manual_seed(0))
    expected = apply_model.predict(model, volume, windows=1)
    model.network, model.device = Device(model.network, holds), torch.device(begin)
    scores = apply_model.predict(model, volume, windows=8)
    assert torch.allclose(scores, expected, atol=1e-4)
    assert model.network.refused == refused
    assert model.device.type == "cpu"
    told = capsys.readouterr().out
    assert told.count("out of memory") == len(refused)
    assert ("the CPU takes over" in told) == (begin != "cpu")


@pytest.mark.parametrize(
    ("size", "slices", "sizes"), [(32, 72, [4, 4]), (32, 40, [4]), (256, 24, [1, 1])]
)
def test_a_cpu_is_given_small_windows_together(checkpoint, size, slices, sizes):
    model, given = apply_model.load_model(checkpoint, "cpu", "fp32"), []
    model.inference = {"window": (size, size, 16), "overlap": 0.5}
    model.network = lambda x: given.append(len(x)) or torch.cat([x, x], dim=1)
    apply_model.predict(model, torch.rand(1, size, size, slices))
    assert given == sizes


def test_too_little_memory_for_one_window_on_the_cpu_fails_the_scan_alone(checkpoint):
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    model.network = Device(model.network, {"cpu": 0})
    with pytest.raises(torch.OutOfMemoryError):
        apply_model.predict(model, torch.rand(1, 32, 32, 20), windows=2)
    assert model.network.refused == [("cpu", 2), ("cpu", 1)]


@pytest.mark.usefixtures("blank_pictures")
def test_a_dicom_series_is_a_scan(checkpoint, tmp_path):
    series = SHARED_DATA / "dicom" / "jpeg2000_20"
    if not series.is_dir():
        pytest.skip("the DICOM series are not here (shared/data beside the project)")
    assert find_scans(series) == [series]
    assert series in find_scans(series.parent)
    config = apply_model.Config(
        paths=(series,), checkpoint=checkpoint, destination=tmp_path, device="cpu", force=True
    )
    apply_model.main(config)
    scan = read_volume(series)
    label = read_volume(tmp_path / series.name / f"{series.name}_label.nii.gz")
    assert label.shape == scan.shape
    assert np.allclose(label.affine, scan.affine, atol=1e-4)


def test_a_trailing_axis_of_length_one_is_no_hindrance(scans, checkpoint, tmp_path):
    scan = nib.load(min((scans / "images").iterdir()))
    nib.save(nib.Nifti1Image(scan.dataobj[..., None], scan.affine), tmp_path / "four.nii.gz")
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    label = apply_model.segment(model, tmp_path / "four.nii.gz")
    assert np.array_equal(
        label.read(), apply_model.segment(model, read_volume(Path(scan.get_filename()))).read()
    )


# ---------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------


def _outputs(folder: Path) -> dict[str, object]:
    """Everything under a final name, whole: voxels as bytes, records without their seconds."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".png":
            found[name] = imread(path).tobytes()
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            rows = content if isinstance(content, list) else [content]
            timed = {"crc32", *(k for row in rows for k in row if "seconds" in k)}
            timeless = [{k: v for k, v in row.items() if k not in timed} for row in rows]
            found[name] = json.dumps(timeless)
        elif path.suffix == ".gz":
            found[name] = path.read_bytes()
            read_volume(path).read()
    return found


def test_killed_at_any_moment_the_same_command_finishes_the_rest(scans, checkpoint, tmp_path):
    """SIGKILL within writes: no torn file, and at the end the undisturbed bytes."""
    unbroken, broken = (
        {
            "paths": (scans / "images",), "truth": (scans / "labels",), "checkpoint": checkpoint,
            "destination": tmp_path / name, "device": "cpu", "precision": "fp32",
        }
        for name in ("unbroken", "broken")
    )  # fmt: skip
    assert run_child(children.apply, unbroken) == 0
    expected = _outputs(unbroken["destination"])
    unsure = [name for name in expected if name.endswith("_doubt.png")]
    assert len(expected) == 2 * 4 + len(unsure) + 4
    # Writes: the dead one's lock 1, of a case label map, masked volume, preview and record 2 to 5;
    # the tables follow. At the fourth death the first case is finished.
    for write in (1, 3, 5, 7):
        assert run_child(children.apply, broken, ("write", write)) == -signal.SIGKILL
        for name, content in _outputs(broken["destination"]).items():
            if "/" in name:  # of a case; the tables grow with the cases
                assert content == expected[name], name
    assert run_child(children.apply, broken) == 0
    assert _outputs(broken["destination"]) == expected
    assert not list(broken["destination"].glob("*/.*"))


def refused(arguments, match):
    with pytest.raises(InputError, match=match):
        apply_model.main(apply_model.Config(**arguments, device="cpu"))


def test_bad_input_is_named(tmp_path, checkpoint, prepared):
    use = {"checkpoint": checkpoint, "destination": tmp_path / "results"}
    refused(use, "nothing to segment")
    refused(use | {"paths": (tmp_path / "no.nii.gz",)}, r"no\.nii\.gz: no such file")
    (tmp_path / "text.nii.gz").write_text("hello")
    refused(
        use | {"paths": (tmp_path / "text.nii.gz",)},
        r"text\.nii\.gz: .*(not a readable|is not gzip)",
    )
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
    refused(use | paths | {"truth": (tmp_path / "other.nii.gz",)}, "use the label map of this scan")
    refused(use | {"paths": paths["paths"] * 2}, "two volumes are called scan")
    refused(use | {"checkpoint": tmp_path / "no.pt"} | paths, r"no\.pt: no such checkpoint")
    (tmp_path / "file").write_text("")
    refused(use | {"destination": tmp_path / "file"} | paths, r"file.*cannot be written")
    assert not list(tmp_path.rglob(".*partial*"))
    assert not (tmp_path / "results").exists()


def test_a_fault_ends_in_one_line_and_a_code(tmp_path, capsys):
    ended = run_here("apply_model.py", tmp_path / "no.nii.gz", "--checkpoint", tmp_path / "no.pt")
    assert str(ended).startswith("error: ")
    assert "\n" not in ended
    assert "Traceback" not in capsys.readouterr().err
