"""apply_model.py on what users have: odd truths, damaged files, folders that are half done."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import Threshold

import apply_model
from apply_model import Model, Options
from data.files import InputError
from data.labels import USUAL_LABELS
from data.scans import read_volume
from data.volumes import Volume
from preprocess import Chain
from utilities import build_network, save_checkpoint
from visualize_3d import Config as View
from visualize_3d import find_case

pytestmark = pytest.mark.usefixtures("blank_pictures")
SHAPE = (40, 36, 24)
AFFINE = np.array([[-3.0, 0, 0, 60], [0, -3.0, 0, 50], [0, 0, 5.0, -40], [0, 0, 0, 1]])  # LPS
LABELS = {"background": (0,), "liver": (1, 2)}
CHAIN = Chain("subvolumes", (3.0, 3.0), (-200.0, 250.0), (48, 48), LABELS, (), False)
INFERENCE = {"window": (48, 48, 16), "overlap": 0.5}


def known_model(sampling="subvolumes", window=(48, 48, 16), **changes) -> Model:
    """A model whose answer is known: everything above 25 HU is liver."""
    spacing = (3.0, 3.0, 5.0) if sampling == "patches" else (3.0, 3.0)
    chain = replace(CHAIN, sampling=sampling, spacing=spacing, input_size=window[: len(spacing)])
    inference, cpu = {"window": window, "overlap": 0.5}, torch.device("cpu")
    model = Model(Threshold(), chain, inference, cpu, torch.float32, dict(USUAL_LABELS))
    return replace(model, **changes)


def patient(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU of air, a body of fat and a liver of 100 HU in it, and the liver's label map."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in SHAPE), indexing="ij")
    centre = rng.uniform(-0.15, 0.15, 3)
    liver = sum(((g - c) / 0.5) ** 2 for g, c in zip(grid, centre, strict=True)) < 1
    scan = np.where(sum(g**2 for g in grid) < 0.9, -100, -1000)
    scan[liver] = 100
    return scan.astype(np.int16), liver.astype(np.uint8)


SCAN, LABEL = patient(0)


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, path)
    return path


@pytest.fixture
def model(monkeypatch):
    """What `load_model` gives: the known network, without a training."""
    known = known_model()
    monkeypatch.setattr(apply_model, "load_model", lambda *_: known)
    return known


@pytest.fixture
def use(tmp_path, model):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"known")
    return {"checkpoint": weights, "destination": tmp_path / "out", "device": "cpu"}


@pytest.fixture
def segment_case(use, tmp_path):
    """Segment the one test case of prepared data, written as prepare.py does; its row."""

    def segment(label: np.ndarray, scan=SCAN, affine=AFFINE, record=(), **changes) -> dict:
        folder = tmp_path / "data"
        case = {
            "case": "a", "patient": "a", "split": "test", "warnings": [],
            "spacing_mm": [3.0, 3.0, 5.0], "voxels_per_label": {},
            "image": str(save(scan, folder / "raw" / "a.nii.gz")),
            "label": str(save(label, folder / "raw" / "a_seg.nii.gz", affine)),
        }  # fmt: skip
        content = {
            "schema": 1, "labels": {"background": 0, "liver": 1, "tumour": 2}, "settings": {},
            "subvolume_depth": 16, "subvolumes": [], "cases": [case | dict(record)],
        }  # fmt: skip
        (folder / "dataset.json").write_text(json.dumps(content | changes))
        return apply(use, split="test", data=folder)["a"]

    return segment


def apply(use, *paths: Path, **more):
    """Segment; the rows of results.csv by case."""
    apply_model.main(apply_model.Config(paths=paths, **use | more))
    text = (use["destination"] / "results.csv").read_text()
    return {row["case"]: row for row in csv.DictReader(text.splitlines())}


def test_a_truth_of_other_data_is_read_by_its_names(use, tmp_path):
    scans = save(SCAN, tmp_path / "images" / "a.nii.gz").parent
    truth = save(LABEL * 6, tmp_path / "labels" / "a.nii.gz").parent
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "6": "Liver"}}')
    assert float(apply(use, scans, truth=(truth,))["a"]["liver_dice"]) > 0.98
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "6": "spleen"}}')
    with pytest.raises(InputError, match=r"spleen = 6, none of which is liver"):
        apply(use, scans, truth=(truth,))


@pytest.mark.parametrize("error", [MemoryError, IndexError, OSError, KeyboardInterrupt])
def test_an_error_stops_one_case_and_an_interrupt_all(use, tmp_path, monkeypatch, error):
    measure = apply_model.measure

    def fail(classes, scan, names):
        if scan.name.endswith("a.nii.gz"):
            raise error("odd")
        return measure(classes, scan, names)

    monkeypatch.setattr(apply_model, "measure", fail)
    for seed, name in enumerate("ab"):
        save(patient(seed)[0], tmp_path / "scans" / f"{name}.nii.gz")
    stopped = error is KeyboardInterrupt
    told = "odd" if stopped else rf"1 of 2 scans failed:\na: {error.__name__}: odd"
    with pytest.raises(error if stopped else InputError, match=told):
        apply(use, tmp_path / "scans")
    assert (use["destination"] / "b" / "b_label.nii.gz").exists() == (not stopped)
    assert not list(use["destination"].rglob(".*"))


def test_scans_of_one_name_in_two_folders_are_both_done(use, tmp_path):
    scans = [save(patient(s)[0], tmp_path / f"hospital_{s}" / "ct.nii.gz") for s in range(2)]
    rows = apply(use, *scans)
    assert len({row["liver_volume_ml"] for row in rows.values()}) == len(rows) == 2
    folders = [path for path in use["destination"].iterdir() if path.is_dir()]
    assert sorted(rows) == sorted(folder.name for folder in folders)


def test_mr_needs_no_force_and_is_black_outside(use, tmp_path, model):
    model.modality = "MR"
    scan = (SCAN.astype(np.int32) + 1000).astype(np.uint16)
    apply(use, save(scan, tmp_path / "mr.nii.gz"))
    outside = read_volume(use["destination"] / "mr" / "mr_masked.nii.gz").read()
    assert outside.min() == outside[0, 0, 0] == 0


def test_several_networks_give_the_mean_of_their_logits():
    model = known_model(network=Threshold(0.2), others=(Threshold(0.4),))
    scores = apply_model.predict(model, torch.full((1, 48, 48, 16), 0.5), Options())
    assert torch.allclose(scores, torch.tensor(0.4))  # of 0.6 and 0.2


@pytest.mark.parametrize(
    ("shortages", "device", "sizes"),
    [
        (0, "cpu", [4, 1]),  # five windows
        (1, "cpu", [4, 1, 1, 1, 1, 1]),
        (2, "cpu:0", [4, 1, 1, 1, 1, 1, 1]),  # stands for a GPU, on which not even one fits
    ],
)
def test_where_memory_is_short_a_scan_is_done_with_less(shortages, device, sizes, capsys):
    volume = torch.rand(1, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    model = known_model(device=torch.device(device), network=Threshold(shortages=shortages))
    scores = apply_model.predict(model, volume, Options())
    assert torch.allclose(scores, 2 * volume - 1, atol=1e-5)
    assert [shape[0] for shape in model.network.shapes] == sizes
    assert capsys.readouterr().out.count("out of memory") == shortages
    model.network.shapes.clear()
    with pytest.raises(RuntimeError, match="out of memory"):  # not even one window on the CPU
        apply_model.predict(known_model(network=Threshold(shortages=2)), volume, Options())
    model.network.shortages = 0
    apply_model.predict(model, volume, Options())
    assert [shape[0] for shape in model.network.shapes] == [4, 1], "the next scan begins anew"


def test_patches_slide_where_there_is_anything_but_air():
    model = known_model("patches", (32, 32, 32))
    volume = torch.zeros(1, 100, 64, 80)
    volume[0, 10:30, 20:40, 30:50] = 0.9
    scores = apply_model.predict(model, volume, Options())
    assert torch.equal(scores > 0, volume > 0.5)
    assert model.network.shapes == [(1, 1, 32, 32, 32)]
    nothing = apply_model.predict(model, torch.zeros(1, 40, 40, 40), Options())
    assert (nothing < 0).all()


def long_scan(low: int, high: int) -> Volume:
    """A scan of 120 slices of 5 mm with a liver of 200 HU in the slices from low to high."""
    array = np.full((48, 48, 120), -1000, np.int16)
    array[4:-4, 4:-4] = -100
    array[10:34, 20:44, low:high] = 200
    return Volume(array, np.diag([3.0, 3.0, 5.0, 1.0]))


@pytest.mark.parametrize("sampling", ["subvolumes", "patches"])
@pytest.mark.parametrize("ends", [(50, 60), (0, 20), (104, 120)])
def test_all_of_an_organ_is_found_in_the_box_that_another_network_finds(ends, sampling):
    window = (48, 48, 32) if sampling == "subvolumes" else (24, 24, 32)
    model, scan = known_model(sampling, window, finder=known_model()), long_scan(*ends)
    found = apply_model.segment(model, scan)
    assert np.array_equal(found.label.data > 0, scan.data == 200)
    asked = sum(shape[0] for shape in model.network.shapes)
    everywhere = known_model(sampling, window)
    apply_model.segment(everywhere, scan)
    assert asked < 0.6 * sum(shape[0] for shape in everywhere.network.shapes)
    seen = (found.scores[0] > apply_model.OUTSIDE).any(dim=0).any(dim=0).sum()
    assert 32 <= seen < 60, "a window is filled by the scan, not by padding"


@pytest.mark.parametrize("limit", [2.0, 0.6], ids=["nothing", "a part"])
def test_where_the_other_network_misses_the_organ_it_is_found_all_the_same(limit):
    scan = long_scan(20, 110)
    scan.data[10:34, 20:44, 40:110] = 30  # 0.51 of the HU window
    scan.data[scan.data < -100], scan.data[8, 8, 8] = 40, -1000  # padding, more than liver; gas
    model = known_model(finder=known_model(network=Threshold(limit)))
    found = apply_model.segment(model, scan, Options()).label.data
    assert np.array_equal(found > 0, long_scan(20, 110).data > 0)


def test_what_prepare_trusted_or_accepted_is_done_and_told(use, segment_case):
    moved = AFFINE + 30 * np.eye(4, k=3)
    with pytest.raises(InputError, match="voxels apart"):
        segment_case(LABEL, affine=moved)
    row = segment_case(LABEL, affine=moved, record={"trust_image_grid": True})
    assert float(row["liver_dice"]) > 0.98
    case = find_case(use["destination"] / "a", View())
    assert case.reference.data.any(), "3D reads it although its header lies elsewhere"
    found = {"accepted": ["hu"], "warnings": ["values from 24 to 1124, no fat or air below 0"]}
    row = segment_case(LABEL, SCAN + 1024, record=found)
    assert "prepare.py: values from 24 to 1124" in row["warnings"]


def test_masks_of_prepared_data_are_one_truth(use, segment_case, tmp_path):
    tumour = np.zeros_like(LABEL)
    tumour[18:22, 16:20, 11:13] = 1
    masks = {"liver": LABEL, "liver tumour": tumour}
    paths = [[n, str(save(a, tmp_path / "masks" / f"{n}.nii.gz"))] for n, a in masks.items()]
    assert float(segment_case(LABEL, record={"label": paths})["liver_dice"]) > 0.98
    case = find_case(use["destination"] / "a", View())
    assert np.count_nonzero(case.reference.data == 1) == np.count_nonzero(LABEL)


def test_what_nobody_judged_in_prepared_data_counts_nowhere(segment_case):
    unknown = np.where(np.arange(SHAPE[0])[:, None, None] < 20, 9 * LABEL, LABEL)
    assert float(segment_case(unknown, ignore=[9])["liver_dice"]) > 0.96
    drawn = LABEL * (np.arange(SHAPE[2]) % 4 == 2)
    found = {"settings": {"label_every": 4}, "record": {"drawn_slice": 10}}
    assert float(segment_case(drawn, **found)["liver_dice"]) > 0.96


def test_a_foreign_dataset_json_and_a_case_that_is_a_path_are_refused(segment_case):
    names = [{"record": {"case": name}} for name in ("..", "../a", "/tmp/a", "a/b", "=1+1")]
    for changes in (*names, {"cases": [{}]}, {"cases": [1]}, {"cases": 1}, {"labels": 1}):
        with pytest.raises(InputError, match=r"dataset\.json"):
            segment_case(LABEL, **changes)


def test_a_missing_result_is_made_again_and_a_corrected_one_stays(use, tmp_path, capsys):
    scan, result = save(SCAN, tmp_path / "a.nii.gz"), use["destination"] / "a"
    apply(use, scan, probability=True)
    for output in ("label", "masked", "probability"):
        path = result / f"a_{output}.nii.gz"
        whole = path.read_bytes()
        path.unlink()
        apply(use, scan, probability=True)
        assert path.read_bytes() == whole
    assert "finished before" not in capsys.readouterr().out
    corrected = save(patient(1)[1], result / "a_label.nii.gz").read_bytes()
    apply(use, scan, probability=True)
    assert "finished before" in capsys.readouterr().out
    assert (result / "a_label.nii.gz").read_bytes() == corrected


def write_checkpoint(path: Path, **changes) -> Path:
    """A small untrained network, as train.py saves it."""
    arguments = {
        "in_channels": 1, "out_channels": 2, "base_channels": 1, "input_size": (48, 48, 16),
        "name": "unet3d",
    }  # fmt: skip
    content = {
        "network_args": arguments, "network_state": build_network(**arguments).state_dict(),
        "preprocessing": vars(CHAIN), "inference": INFERENCE, "epoch": 1, "val_dice": 0.5,
        "config": {"data": "data", "run_folder": "run"}, "modality": "CT", "history": [],
        "declared": USUAL_LABELS, "patients": [], "content": {},
        "begun": {"anew": [], "defaults": {}},
    }  # fmt: skip
    save_checkpoint(path, **content | changes)
    return path


def test_a_checkpoint_says_how_it_is_used_and_the_overlap_may_be_another(tmp_path):
    path = write_checkpoint(tmp_path / "run" / "best.pt")
    loaded = [apply_model.load_model(p, "cpu", "fp32") for p in (path, path.parent, str(path))]
    assert [(model.chain, model.declared) for model in loaded] == [(CHAIN, USUAL_LABELS)] * 3
    calls = []
    for overlap in (None, 0.0, 0.75):
        model = apply_model.load_model(path, "cpu", "fp32", overlap)
        model.network = Threshold()
        apply_model.segment(model, Volume(SCAN, AFFINE), Options(windows=1))
        calls.append(len(model.network.shapes))
    assert calls == [2, 2, 3]  # of 24 slices, 16 at a time


def test_networks_of_other_settings_are_not_averaged(tmp_path):
    other = vars(replace(CHAIN, hu_window=(-100.0, 250.0)))
    paths = [write_checkpoint(tmp_path / "a.pt")]
    paths.append(write_checkpoint(tmp_path / "b.pt", preprocessing=other))
    with pytest.raises(InputError, match=r"b\.pt: .*a\.pt"):
        apply_model.load_model(paths, "cpu")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network_state": torch.nn.Linear(2, 2).state_dict()}, "do not fit its network"),
        ({"network_args": {"name": "unet3d"}}, "do not fit its network"),
        ({"preprocessing": {"labels": {}, "odd": 1}}, "preprocessing"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path, changes, told):
    path = write_checkpoint(tmp_path / "best.pt", **changes)
    with pytest.raises(InputError, match=rf"best\.pt: .*({told})"):
        apply_model.load_model(path, "cpu")
