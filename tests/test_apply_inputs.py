"""apply_model.py on what users have: odd truths, damaged files, folders that are half done."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from conftest import SHARED_DATA, run_here
from nibabel.orientations import apply_orientation, inv_ornt_aff

import apply_model
from apply_model import Model
from data.files import InputError
from data.scans import read_volume
from data.volumes import Volume
from preprocess import Chain
from utilities import build_network, save_checkpoint
from visualize_3d import find_result

pytestmark = pytest.mark.usefixtures("blank_pictures")
SHAPE = (40, 36, 24)
AFFINE = np.array([[-3.0, 0, 0, 60], [0, -3.0, 0, 50], [0, 0, 5.0, -40], [0, 0, 0, 1]])  # LPS
CHAIN = Chain(
    "subvolumes",
    (3.0, 3.0),
    (-200.0, 250.0),
    (48, 48),
    {"background": (0,), "liver": (1, 2)},
    ignore=(),
    crop_to_body=False,
)
INFERENCE = {"window": (48, 48, 16), "overlap": 0.5}


class Threshold(torch.nn.Module):
    """A network whose answer is known: everything above 25 HU is liver."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 - x, x - 0.5], dim=1)


def known_model(**changes) -> Model:
    cpu = torch.device("cpu")
    return replace(Model(Threshold(), CHAIN, INFERENCE, cpu, torch.float32), **changes)


def patient(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU of air, a body of fat and a liver of 100 HU in it, and the liver's label map."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in SHAPE), indexing="ij")
    centre = rng.uniform(-0.15, 0.15, 3)
    body = sum(g**2 for g in grid) < 0.9
    liver = sum(((g - c) / 0.5) ** 2 for g, c in zip(grid, centre, strict=True)) < 1
    scan = np.where(body, -100, -1000)
    scan[liver] = 100
    return scan.astype(np.int16), liver.astype(np.uint8)


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE, codes: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.set_qform(affine, code=int(codes))
    image.set_sform(affine, code=int(codes))
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


def apply(use, *paths: Path, **more):
    apply_model.main(apply_model.Config(paths=paths, **{**use, **more}))
    text = (use["destination"] / "results.csv").read_text()
    return {row["case"]: row for row in csv.DictReader(text.splitlines())}


# ---------------------------------------------------------------------------------------
# Truths
# ---------------------------------------------------------------------------------------


def other_axes(label):
    turn = np.array([[1, -1], [2, 1], [0, -1]])
    return apply_orientation(label, turn), AFFINE @ inv_ornt_aff(turn, SHAPE)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda scan, label: (label, AFFINE), ""),
        (lambda scan, label: other_axes(label), ""),
        (lambda scan, label: (label, AFFINE + 0.03 * np.eye(4, k=3)), ""),
        (lambda scan, label: (label * np.float32(0.9999), AFFINE), "rounded"),
        (lambda scan, label: (label * 2, AFFINE), ""),
    ],
    ids=["plain", "other axes", "0.03 mm off", "0.9999", "tumour all over"],
)
def test_truths_that_mean_the_same_give_the_same_figures(use, tmp_path, make, told):
    scan, label = patient(0)
    array, affine = make(scan, label)
    truth = save(array, tmp_path / "truth.nii.gz", affine)
    row = apply(use, save(scan, tmp_path / "scan.nii.gz"), truth=(truth,))["scan"]
    assert float(row["liver_dice"]) > 0.98
    assert told in row["warnings"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda scan, label: (label * 255, AFFINE), "255"),
        (lambda scan, label: (label * 6, AFFINE), r"\[6\]"),
        (lambda scan, label: (label * np.float32(0.9), AFFINE), r"whole numbers, got \[0\.89"),
        (lambda scan, label: (scan, AFFINE), "-1000"),
        (lambda scan, label: (label.astype(np.int16) * -1, AFFINE), "-1"),
        (lambda scan, label: (label, AFFINE + 1.8 * np.eye(4, k=3)), "0.6 voxels apart"),
        (lambda scan, label: (label[:-1], AFFINE), "label map is"),
        (lambda scan, label: (label, None), "how its axes lie"),
    ],
    ids=["255", "6", "0.9", "the scan", "negative", "0.6 voxel", "shape", "codes 0"],
)
def test_a_truth_that_cannot_be_is_refused_by_name(use, tmp_path, make, told):
    scan, label = patient(0)
    array, affine = make(scan, label)
    codes, affine = affine is not None, AFFINE if affine is None else affine
    truth = save(array, tmp_path / "truth.nii.gz", affine, codes)
    with pytest.raises(InputError, match=rf"truth\.nii\.gz: .*{told}"):
        apply(use, save(scan, tmp_path / "scan.nii.gz"), truth=(truth,))
    assert not use["destination"].exists()


def test_a_truth_of_other_data_is_read_by_its_names(use, tmp_path):
    scan, label = patient(0)
    scans = save(scan, tmp_path / "images" / "a.nii.gz").parent
    truth = save(label * 6, tmp_path / "labels" / "a.nii.gz").parent
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "6": "Liver"}}')
    row = apply(use, scans, truth=(truth,))["a"]
    assert float(row["liver_dice"]) > 0.98
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "6": "spleen"}}')
    with pytest.raises(InputError, match=r"spleen = 6, none of which is liver"):
        apply(use, scans, truth=(truth,))


def test_truths_are_found_by_what_remains_of_names(use, tmp_path):
    for seed in range(2):
        scan, label = patient(seed)
        save(scan, tmp_path / "imagesTr" / f"liver_{seed}_0000.nii.gz")
        save(label, tmp_path / "labelsTr" / f"liver_{seed}.nii.gz")
    rows = apply(use, tmp_path / "imagesTr", truth=(tmp_path / "labelsTr",))
    assert len(rows) == 2
    assert all(float(row["liver_dice"]) > 0.98 for row in rows.values())
    for path in (tmp_path / "labelsTr").iterdir():
        path.rename(path.with_name(path.name.replace("liver", "other")))
    with pytest.raises(InputError, match="none of 2 label maps"):
        apply(use, tmp_path / "imagesTr", truth=(tmp_path / "labelsTr",))


# ---------------------------------------------------------------------------------------
# Scans: bad ones, and their neighbours
# ---------------------------------------------------------------------------------------


def with_value(value):
    def spoil(path: Path) -> None:
        array = patient(1)[0].astype(np.float32)
        array[20, 18, 12] = value
        save(array, path)

    return spoil


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path, to: Path | str) -> None:
    path.unlink()
    path.symlink_to(to)


SPOILERS = {
    "nan": (with_value(np.nan), "NaN or infinite"),
    "inf": (with_value(-np.inf), "NaN or infinite"),
    "cut": (cut_off, "cut off|damaged"),
    "text": (lambda path: path.write_text("hello"), "gzip|not a readable"),
    "empty": (lambda path: path.write_bytes(b""), "."),
    "missing voxels": (lambda path: path.write_bytes(gzip.compress(b"\0" * 348)), "."),
    "4D": (lambda path: save(np.zeros((8, 8, 8, 3), np.int16), path), "one 3D volume"),
    "dead link": (lambda path: link(path, "b_bad.nii.gz.gone"), "no such file"),
    "link to itself": (lambda path: link(path, path), "no such file"),
    "all air": (lambda path: save(np.full(SHAPE, -1000, np.int16), path), "every voxel is"),
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_bad_scan_is_named_and_its_neighbours_are_done(use, tmp_path, kind, capsys):
    folder, (spoil, told) = tmp_path / "scans", SPOILERS[kind]
    for seed, name in enumerate(("a_good", "b_bad", "c_good")):
        save(patient(seed)[0], folder / f"{name}.nii.gz")
    spoil(folder / "b_bad.nii.gz")
    with pytest.raises(InputError, match=rf"1 of 3 scans failed:\n.*b_bad\.nii\.gz.*({told})"):
        apply(use, folder)
    assert "b_bad: failed, the others go on" in capsys.readouterr().out
    rows = json.loads((use["destination"] / "results.json").read_text())
    assert [row["case"] for row in rows] == ["a_good", "c_good"]
    assert not (use["destination"] / "b_bad").exists()
    with pytest.raises(InputError, match=r"^.*b_bad\.nii\.gz"):  # alone: no count, no others
        apply(use, folder / "b_bad.nii.gz")
    assert "the others" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [MemoryError, IndexError, UnicodeError, RecursionError, OSError])
def test_whatever_happens_in_a_case_the_others_are_done(use, tmp_path, monkeypatch, error):
    whole = apply_model.measure

    def fail(classes, scan, names):
        if scan.name.endswith("a.nii.gz"):
            raise error("odd")
        return whole(classes, scan, names)

    monkeypatch.setattr(apply_model, "measure", fail)
    for seed, name in enumerate("ab"):
        save(patient(seed)[0], tmp_path / "scans" / f"{name}.nii.gz")
    with pytest.raises(InputError, match=rf"1 of 2 scans failed:\na: {error.__name__}: odd"):
        apply(use, tmp_path / "scans")
    assert (use["destination"] / "b" / "b_label.nii.gz").exists()


def test_an_interrupt_is_no_failure_and_leaves_nothing_torn(use, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    for seed, name in enumerate("ab"):
        save(patient(seed)[0], tmp_path / "scans" / f"{name}.nii.gz")
    monkeypatch.setattr(apply_model, "write_masked", stop)
    with pytest.raises(KeyboardInterrupt):
        apply(use, tmp_path / "scans")
    assert not list(use["destination"].rglob(".*"))
    assert not list(use["destination"].rglob("*.json"))


def test_scans_of_one_name_in_two_folders_are_both_done(use, tmp_path):
    scans = [save(patient(s)[0], tmp_path / f"hospital_{s}" / "ct.nii.gz") for s in range(2)]
    rows = apply(use, *scans)
    assert len(rows) == 2
    assert len({row["liver_volume_ml"] for row in rows.values()}) == 2
    folders = [path for path in use["destination"].iterdir() if path.is_dir()]
    assert sorted(rows) == sorted(folder.name for folder in folders)


def test_mr_needs_no_force_and_is_black_outside(use, tmp_path, model):
    model.modality = "MR"
    scan = patient(0)[0].astype(np.int32) + 1000
    apply(use, save(scan.astype(np.uint16), tmp_path / "mr.nii.gz"))
    outside = read_volume(use["destination"] / "mr" / "mr_masked.nii.gz").read()
    assert outside.min() == outside[0, 0, 0] == 0


def test_a_scan_may_be_given_as_volume_path_or_image(tmp_path):
    array, _ = patient(0)
    path = save(array, tmp_path / "scan.nii.gz")
    given = [path, str(path), nib.load(path), Volume(array, AFFINE)]
    first, *others = (apply_model.segment(known_model(), scan) for scan in given)
    assert first.read().any()
    assert first.classes == {"background": 0, "liver": 1}
    for other in others:
        assert np.array_equal(first.read(), other.read())
        assert np.allclose(first.affine, other.affine)


# ---------------------------------------------------------------------------------------
# Prepared data: what prepare.py decided holds
# ---------------------------------------------------------------------------------------


def write_prepared(folder: Path, label: np.ndarray, scan=None, **changes) -> None:
    """A `dataset.json` with one test case, as prepare.py writes it."""
    scan = patient(0)[0] if scan is None else scan
    record = {
        "case": "a", "patient": "a", "split": "test", "warnings": [],
        "image": str(save(scan, folder / "raw" / "a.nii.gz")),
        "label": str(save(label, folder / "raw" / "a_seg.nii.gz", changes.pop("affine", AFFINE))),
    }  # fmt: skip
    content = {
        "schema": 1, "labels": {"background": 0, "liver": 1, "tumour": 2}, "settings": {},
        "subvolume_depth": 16, "subvolumes": [], "cases": [record | changes.pop("record", {})],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content | changes))


def test_the_trust_of_prepare_holds_for_its_test_split(use, tmp_path):
    label, moved = patient(0)[1], AFFINE + 30 * np.eye(4, k=3)
    write_prepared(tmp_path / "data", label, affine=moved)
    with pytest.raises(InputError, match="voxels apart"):
        apply(use, split="test", data=tmp_path / "data")
    write_prepared(tmp_path / "data", label, affine=moved, settings={"trust_image_grid": True})
    row = apply(use, split="test", data=tmp_path / "data")["a"]
    assert float(row["liver_dice"]) > 0.98


def test_what_prepare_accepted_is_done_and_told(use, tmp_path):
    scan, label = patient(0)
    found = {"accepted": ["hu"], "warnings": ["values from 24 to 1124, no fat or air below 0"]}
    write_prepared(tmp_path / "data", label, scan + 1024, record=found)
    row = apply(use, split="test", data=tmp_path / "data")["a"]
    assert "prepare.py: values from 24 to 1124" in row["warnings"]


def test_labels_of_prepared_data_are_known_by_name(use, tmp_path):
    labels = {"background": 0, "spleen": 1, "liver": 6, "lesion": [7, 8]}
    write_prepared(tmp_path / "data", patient(0)[1] * 7, labels=labels)
    row = apply(use, split="test", data=tmp_path / "data")["a"]
    assert float(row["liver_dice"]) > 0.98


def test_masks_of_prepared_data_are_one_truth(use, tmp_path):
    """As prepare.py notes them: the name and the path of each structure's mask."""
    label = patient(0)[1]
    tumour = np.zeros_like(label)
    tumour[18:22, 16:20, 11:13] = 1
    masks = [["liver", label], ["liver tumour", tumour]]
    paths = [[name, str(save(a, tmp_path / "masks" / f"{name}.nii.gz"))] for name, a in masks]
    write_prepared(tmp_path / "data", label, record={"label": paths})
    row = apply(use, split="test", data=tmp_path / "data")["a"]
    assert float(row["liver_dice"]) > 0.98
    case = find_result(use["destination"] / "a")
    assert np.count_nonzero(case.reference.data == 1) == np.count_nonzero(label)
    Path(paths[1][1]).unlink()
    assert find_result(use["destination"] / "a").truth is None


def test_what_nobody_judged_in_prepared_data_counts_nowhere(use, tmp_path):
    """Values that dataset.json ignores, and slices between those that were drawn."""
    label = patient(0)[1]
    label[:20] = np.where(label[:20], 9, 0)  # half of the liver: not known to be one
    write_prepared(tmp_path / "data", label, ignore=[9])
    row = apply(use, split="test", data=tmp_path / "data")["a"]
    assert float(row["liver_dice"]) > 0.96
    label = patient(0)[1]
    drawn = label * (np.arange(SHAPE[2]) % 4 == 2)
    found = {"settings": {"label_every": 4}, "record": {"drawn_slice": 10}}
    write_prepared(tmp_path / "data", drawn, **found)
    row = apply(use, split="test", data=tmp_path / "data")["a"]
    assert float(row["liver_dice"]) > 0.96
    assert float(row["liver_recall"]) > 0.96


def test_the_record_says_what_the_values_mean_and_3d_reads_it(use, tmp_path, model):
    model.chain = replace(CHAIN, labels={"background": (0,), "spleen": (3,)})
    model.declared = {"background": (0,), "spleen": (3,)}
    scan, label = patient(0)
    moved = AFFINE + 30 * np.eye(4, k=3)
    settings = {"settings": {"trust_image_grid": True}, "labels": {"background": 0, "spleen": 3}}
    write_prepared(tmp_path / "data", label * 3, affine=moved, **settings)
    apply(use, split="test", data=tmp_path / "data")
    record = json.loads((use["destination"] / "a" / "a.json").read_text())
    assert record["classes"] == {"background": 0, "spleen": 3}
    assert record["trust_image_grid"] is True
    case = find_result(use["destination"] / "a")
    assert case.names == case.classes == {"spleen": 3}
    assert case.reference.data.any()  # read although its header lies elsewhere
    apply(use, save(scan, tmp_path / "b.nii.gz"))
    assert find_result(use["destination"] / "b").trust_grid is False


@pytest.mark.parametrize("name", ["..", "../a", "/tmp/a", "a/b", "=1+1"])
def test_a_case_name_that_is_a_path_is_refused(use, tmp_path, name):
    write_prepared(tmp_path / "data", patient(0)[1], record={"case": name})
    with pytest.raises(InputError, match="no case name"):
        apply(use, split="test", data=tmp_path / "data")


@pytest.mark.parametrize("changes", [{"cases": [{}]}, {"cases": [1]}, {"cases": 1}, {"labels": 1}])
def test_a_foreign_dataset_json_is_one_clear_error(use, tmp_path, changes):
    write_prepared(tmp_path / "data", patient(0)[1], **changes)
    with pytest.raises(InputError, match=r"dataset\.json"):
        apply(use, split="test", data=tmp_path / "data")


# ---------------------------------------------------------------------------------------
# Finished cases
# ---------------------------------------------------------------------------------------

OUTPUTS = ("label.nii.gz", "masked.nii.gz", "probability.nii.gz", "preview.png")


@pytest.mark.parametrize(
    ("output", "damage"),
    [*((output, flip) for output in OUTPUTS), (OUTPUTS[0], Path.unlink), (OUTPUTS[1], cut_off)],
)
def test_a_damaged_result_is_made_again(use, tmp_path, output, damage, capsys):
    scan = save(patient(0)[0], tmp_path / "a.nii.gz")
    apply(use, scan, probability=True)
    path = use["destination"] / "a" / f"a_{output}"
    whole = path.read_bytes()
    damage(path)
    apply(use, scan, probability=True)
    assert path.read_bytes() == whole
    assert f"a_{output}: is missing or changed" in capsys.readouterr().out
    apply(use, scan, probability=True)
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "text", "[]", "{}", '{"case": "a"}', '{"case": 1, "files": 2}']
)
def test_a_foreign_record_is_no_finished_case(use, tmp_path, content, capsys):
    scan = save(patient(0)[0], tmp_path / "a.nii.gz")
    record = use["destination"] / "a" / "a.json"
    record.parent.mkdir(parents=True)
    record.write_text(content)
    other = use["destination"] / "other" / "other.json"
    other.parent.mkdir()
    other.write_text(content)
    assert list(apply(use, scan)) == ["a"]
    assert "no record of a finished case" in capsys.readouterr().out
    assert json.loads(record.read_text())["case"] == "a"
    assert other.read_text() == content


def test_new_voxels_behind_the_same_header_are_another_scan(use, tmp_path):
    path = tmp_path / "scan.mhd"
    for seed in (0, 1):
        image = SimpleITK.GetImageFromArray(patient(seed)[0].T)
        image.SetSpacing((3.0, 3.0, 5.0))
        header = path.read_bytes() if seed else None
        SimpleITK.WriteImage(image, str(path))
        assert header in (None, path.read_bytes())
        row = apply(use, path)["scan"]
        volume = np.count_nonzero(patient(seed)[1]) * 0.045
        assert float(row["liver_volume_ml"]) == pytest.approx(volume, rel=0.02)


def test_two_processes_do_not_write_into_one_folder(use, tmp_path):
    scan = save(patient(0)[0], tmp_path / "a.nii.gz")
    with (
        apply_model.lock_folder(use["destination"]),
        pytest.raises(InputError, match="another process writes here"),
    ):
        apply(use, scan)


# ---------------------------------------------------------------------------------------
# What is told and written
# ---------------------------------------------------------------------------------------


def test_nothing_of_a_header_but_geometry_is_written(use, tmp_path):
    image = nib.Nifti1Image(patient(0)[0], AFFINE)
    for key in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[key] = b"DOE^JANE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE 1970"))
    path = tmp_path / "scan.nii.gz"
    nib.save(image, path)
    assert b"DOE^JANE" in gzip.decompress(path.read_bytes())
    apply(use, path, probability=True)
    for file in (use["destination"]).rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        assert b"DOE" not in content, file


def test_the_end_names_the_picture_and_the_next_command(use, tmp_path, capsys):
    apply(use, save(patient(0)[0], tmp_path / "a.nii.gz"))
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == f"look at {use['destination'] / 'a' / 'a_preview.png'}"
    assert Path(last[0].removeprefix("look at ")).is_file()
    assert last[1] == f"3D: python visualize_3d.py {use['destination'] / 'a'}"


def test_overlap_is_the_checkpoints_or_the_one_that_is_asked_for(tmp_path):
    path = write_checkpoint(tmp_path / "best.pt")
    counts = []
    for overlap in (None, 0.0, 0.75):
        model = apply_model.load_model(path, "cpu", "fp32", overlap)
        trace = apply_model.Trace()
        apply_model.segment(model, Volume(patient(0)[0], AFFINE), trace=trace)
        counts.append(trace.windows)
    assert counts == [2, 2, 3]
    for overlap in (1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="overlap"):
            apply_model.load_model(path, "cpu", "fp32", overlap)


# ---------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------


def write_checkpoint(path: Path, **changes) -> Path:
    """A small untrained network, as train.py saves it."""
    arguments = {
        "in_channels": 1, "out_channels": 2, "base_channels": 1, "input_size": (48, 48, 16),
        "name": "unet3d",
    }  # fmt: skip
    content = {
        "network_args": arguments, "network_state": build_network(**arguments).state_dict(),
        "preprocessing": vars(CHAIN), "inference": INFERENCE, "config": {}, "epoch": 1,
        "val_dice": 0.5, "history": [], "modality": "CT",
        "declared": {"background": (0,), "liver": (1,), "tumour": (2,)},
    }  # fmt: skip
    save_checkpoint(path, **content | changes)
    return path


def test_a_run_and_its_best_checkpoint_are_the_same(tmp_path):
    path = write_checkpoint(tmp_path / "run" / "best.pt")
    models = [apply_model.load_model(p, "cpu", "fp32") for p in (path, path.parent, str(path))]
    assert len({str(model.chain) for model in models}) == 1
    assert models[0].declared == {"background": (0,), "liver": (1,), "tumour": (2,)}


def foreign_keys(path: Path) -> None:
    write_checkpoint(path, network_state=torch.nn.Linear(2, 2).state_dict())


def not_a_number(path: Path) -> None:
    state = torch.load(path, weights_only=True)["network_state"]
    key = next(key for key, tensor in state.items() if tensor.is_floating_point())
    write_checkpoint(path, network_state=state | {key: state[key] * float("nan")})


def flip_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (foreign_keys, "do not fit its network"),
        (not_a_number, "not numbers|not finite"),
        (flip_weight, "checksum|not a readable"),
        (lambda path: path.write_bytes(b""), "not a readable"),
        (lambda path: path.write_text("hello"), "not a readable"),
        (lambda path: torch.save([1, 2], path), "checkpoint"),
        (lambda path: write_checkpoint(path, network_args={"name": "unet3d"}), "fit its network"),
        (lambda path: write_checkpoint(path, preprocessing={"labels": {}, "odd": 1}), "preproc"),
        (Path.unlink, "no such checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path, spoil, told):
    path = write_checkpoint(tmp_path / "best.pt")
    spoil(path)
    with pytest.raises(InputError, match=rf"best\.pt: .*({told})"):
        apply_model.load_model(path, "cpu")


# ---------------------------------------------------------------------------------------
# Cases that people met, as they are shared beside the project
# ---------------------------------------------------------------------------------------


@pytest.fixture
def field_case(tmp_path):
    """Builds one of the shared cases and returns its folder."""

    def build(name: str) -> Path:
        script = SHARED_DATA / "field_cases" / name / "make.py"
        if not script.is_file():
            pytest.skip("the field cases are not here (shared/data beside the project)")
        assert run_here(script, tmp_path / name) == 0
        return tmp_path / name

    return build


def test_field_case_nan_voxels(use, field_case):
    folder = field_case("nan_voxels")
    with pytest.raises(InputError, match=r"scan\.nii\.gz: .*NaN"):
        apply(use, folder / "scan.nii.gz", truth=(folder / "truth.nii.gz",))


def test_field_case_truth_values(use, field_case):
    folder = field_case("truth_values")
    rows = {}
    for name in ("ok", "float"):
        truth = folder / f"truth_{name}.nii.gz"
        rows[name] = apply(use, folder / "scan.nii.gz", truth=(truth,))["scan"]
    assert rows["ok"]["liver_dice"] == rows["float"]["liver_dice"]
    assert float(rows["ok"]["liver_dice"]) > 0
    for name in ("255", "6"):
        with pytest.raises(InputError, match=name):
            apply(use, folder / "scan.nii.gz", truth=(folder / f"truth_{name}.nii.gz",))


def test_field_case_dicom_batch_one_bad(use, field_case):
    with pytest.raises(InputError, match=r"1 of 2 scans failed:\n.*a_bad.*ImageOrientationPatient"):
        apply(use, field_case("dicom_batch_one_bad"), force=True)
    assert list(use["destination"].rglob("b_good_label.nii.gz"))


def test_field_case_dicomdir(use, field_case):
    assert len(apply(use, field_case("dicomdir_beside_series") / "export", force=True)) == 2


def test_field_case_rescale_empty(use, field_case):
    assert len(apply(use, field_case("dicom_rescale_empty") / "ct", force=True)) == 1


def test_field_case_mhd(use, field_case, capsys):
    folder = field_case("mhd_raw_changed")
    first = apply(use, folder / "scan.mhd", force=True)["scan"]["liver_volume_ml"]
    (folder / "scan.raw").write_bytes((folder / "other.raw").read_bytes())
    assert apply(use, folder / "scan.mhd", force=True)["scan"]["liver_volume_ml"] != first
    assert "finished before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "settings"), [("label_other_axes", {}), ("label_other_origin", {"trust": True})]
)
def test_field_case_of_prepared_data(use, field_case, name, settings):
    import prepare

    folder = field_case(name)
    trust = {"trust_image_grid": True} if settings else {}
    prepare.main(prepare.Config(source=folder, destination=folder / "prepared", workers=1, **trust))
    (row,) = apply(use, split="test", data=folder / "prepared").values()
    assert float(row["liver_dice"]) > 0
