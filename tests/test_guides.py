"""The guides in docs/ are followed to the letter: recipes, another organ, MR, own labels, DICOM.

Each command is read from its page, and made small by options that are added to it. It runs in
this process, because starting Python twenty times would take longer than the work.
"""

import csv
import json
import shutil
from pathlib import Path

import make_phantoms
import numpy as np
import pytest
from conftest import ROOT
from documents import PAGES, commands, first_block, follow
from helpers import write_phantom_seg, write_phantom_series

import train
from data.scans import read_volume
from data.volumes import Volume
from utilities import load_checkpoint

SUBVOLUMES = "--input-size 16 16 --spacing 16 16"
LARGER = "--input-size 32 32 --spacing 8 8"  # a pixel is left of it after five halvings
PATCHES = "--input-size 32 32 16 --spacing 8 8 5 --patches-per-case 1"
NETWORK = "--base-channels 4 --device cpu --precision fp32"
pytestmark = pytest.mark.usefixtures("blank_pictures")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def labels_of(checkpoint: str) -> dict:
    """Class name → raw values of a checkpoint."""
    return load_checkpoint(Path(checkpoint))["preprocessing"]["labels"]


def link(folder: Path, target: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(target)


def test_recipes(raw_phantoms, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link(tmp_path / "data/raw", raw_phantoms)
    link(tmp_path / "data/prepared", few)
    link(tmp_path / "checkpoints/starter.pt", ROOT / "checkpoints/starter.pt")
    used = set()
    for line in commands("docs/recipes.md"):
        small = {"prepare.py": "--workers 1", "apply_model.py": "--device cpu"}
        for name in (word for word in line.split() if word in train.RECIPES):
            used.add(name)
            patches = train.RECIPES[name][1].sampling == "patches"
            sizes = PATCHES if patches else LARGER if "resnet" in name else SUBVOLUMES
            begun = train.RECIPES[name][1].pretrained  # whose network is as wide as it is
            network = NETWORK.replace("--base-channels 4 ", "") if begun else NETWORK
            small["train.py"] = f"{sizes} {network} --max-epochs 1 --batch-size 8"
        follow(line, small[line.split()[1]])
    assert used == set(list(train.RECIPES)[1:])  # the first one is `python train.py` alone
    table = PAGES["docs/recipes.md"]
    assert all(f"| `{name}`" in table for name in train.RECIPES)
    assert set(labels_of("checkpoints/liver-tumour-ce/best.pt")) == {
        "background", "liver", "tumour"
    }  # fmt: skip
    assert rows(tmp_path / "results/liver-tumour-ce")[0]["tumour_volume_ml"]


def small_run(prepared: Path, folder: Path, **changes) -> dict:
    """The last checkpoint of a training of one epoch."""
    settings = {"base_channels": 4, "max_epochs": 1, "precision": "fp32", "device": "cpu"}
    settings |= {"input_size": (16, 16), "spacing": (16.0, 16.0)}
    train.main(train.Config(**{**settings, "data": prepared, "run_folder": folder, **changes}))
    return load_checkpoint(folder / "last.pt")


@pytest.fixture(scope="module")
def first(few, tmp_path_factory) -> Path:
    """The folder of a short training of the liver."""
    folder = tmp_path_factory.mktemp("first") / "liver"
    small_run(few, folder, max_epochs=5, val_interval=5, batch_size=1, learning_rate=1e-2)
    return folder


def test_a_run_that_began_with_other_weights_resumes_without_them(few, first, tmp_path):
    start = shutil.copy(first / "last.pt", tmp_path / "start.pt")
    half = small_run(few, tmp_path / "run", pretrained=start, schedule="constant")
    start.unlink()
    train.main(train.Config(resume=tmp_path / "run", device="cpu", max_epochs=2))
    resumed = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (half["epoch"], resumed["epoch"]) == (1, 2)
    assert resumed["config"]["pretrained"] == half["config"]["pretrained"] == str(start)


SPLEEN = {
    "data/make_phantoms.py": "--cases 6 --size 48 --slices 24 32",
    "prepare.py": "--workers 1",
    "train.py": f"--input-size 32 32 --spacing 8 8 {NETWORK} --max-epochs 30 --learning-rate 1e-2 "
    "--val-interval 10",
    "apply_model.py": "--device cpu",
    "visualize_3d.py": "--screenshot spleen.png",
}


def as_mr(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Intensities unlike HU: air and bone dark, fat bright, each scan with a gain of its own."""
    soft = np.clip(4 * hu.astype(float), 0, 600)
    signal = np.select([hu < -300, hu < 0, hu > 150], [5, 900, 60], soft) * rng.uniform(0.6, 1.6)
    return (signal + np.abs(rng.normal(0, 8, hu.shape))).astype(np.uint16)


def test_another_organ_or_mr(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = "docs/organs_and_mr.md"
    lines = commands(page)
    for line in lines:
        small = SPLEEN[line.split()[1]]
        if "data/mr" in line and not Path("data/mr").exists():
            told = capsys.readouterr().out
            shutil.copytree("data/spleen/raw", "data/mr/raw")
            rng = np.random.default_rng(0)
            for path in Path("data/mr/raw/imagesTr").iterdir():
                scan = read_volume(path)
                scan = scan.like(as_mr(scan.read(), rng))
                scan.write(path)
        if "--hu-window" in line:  # the same network, so that a single epoch shows it runs
            small = small.replace("--max-epochs 30", "--max-epochs 1")
        if "results/spleen/phantom_000" in line:
            first = min(path for path in Path("results/spleen").iterdir() if path.is_dir())
            line = line.replace("results/spleen/phantom_000", str(first))
        follow(line, small)
        if "make_phantoms" in line:  # as the README says for scans of one's own
            Path("data/spleen/raw/dataset.json").write_text(first_block(page, "json"))
    (spleen,), (mr,) = rows(Path("results/spleen")), rows(Path("results/mr"))
    assert float(spleen["spleen_dice"]) > 0.6
    assert "liver" not in spleen["warnings"] + told
    assert "patient's left" not in spleen["warnings"] + told
    assert "spleen_volume_ml" in mr
    assert Path("spleen.png").stat().st_size > 1000


def correct(case: str, truth: Volume, path: Path) -> None:
    """What a reader makes of the prediction: a label map on its grid, here the truth."""
    predicted = read_volume(Path(f"results/own/{case}/{case}_label.nii.gz"))
    assert predicted.shape == truth.shape
    assert np.allclose(predicted.affine, truth.affine, atol=1e-4)
    path.parent.mkdir(exist_ok=True)
    predicted.like(truth.read().astype(np.uint8)).write(path)


def test_label_your_own_scans(first, tmp_path, monkeypatch):
    """Predict unlabelled scans, correct, prepare, train on; then the same with DICOM."""
    monkeypatch.chdir(tmp_path)
    link(tmp_path / "checkpoints/liver", first)
    source = tmp_path / "new"
    make_phantoms.main(make_phantoms.Config(source, cases=4, size=48, slices=(20, 24), first=50))
    shutil.copytree(source / "imagesTr", "data/own/imagesTr")
    slices = write_dicom(source)
    voxels_in = 0
    for line in commands("docs/labelling.md"):
        follow(line, {"train.py": f"{SUBVOLUMES} {NETWORK} --max-epochs 1"}.get(
            line.split()[1], "--device cpu" if "apply_model" in line else "--workers 1"
        ))  # fmt: skip
        if "apply_model.py data/own" in line:
            for path in sorted((source / "labelsTr").iterdir()):
                case = path.name.removesuffix(".nii.gz")
                truth = read_volume(path)
                voxels_in += np.count_nonzero(truth.read())
                correct(case, truth, Path("data/own/labelsTr") / path.name)
        if "apply_model.py data/dicom" in line:
            correct_dicom(source, slices)
    own = json.loads(Path("data/own/prepared/dataset.json").read_text())
    assert sum(case["foreground_voxels"] for case in own["cases"]) == voxels_in
    config = load_checkpoint(Path("checkpoints/own/best.pt"))["config"]
    assert config["pretrained"] == "checkpoints/liver/best.pt"
    dicom = json.loads(Path("data/dicom/prepared/dataset.json").read_text())
    assert sum(case["foreground_voxels"] for case in dicom["cases"]) == voxels_in


def write_dicom(source: Path) -> dict[str, list]:
    """Each scan of a Decathlon folder as a series data/dicom/<case>."""
    slices = {}
    for path in sorted((source / "imagesTr").iterdir()):
        scan = read_volume(path).ras
        x, y, z = scan.spacing_mm
        case = path.name.removesuffix(".nii.gz")
        slices[case] = write_phantom_series(
            Path("data/dicom") / case, scan.data, PatientID=case,
            PixelSpacing=[round(y, 3), round(x, 3)],
            ImagePositionPatient=lambda n, z=z: [-100.0, -90.0, round(z, 3) * n],
        )  # fmt: skip
    return slices


def correct_dicom(source: Path, slices: dict[str, list]) -> None:
    """Beside each series a corrected label: DICOM SEG in three cases, NIfTI in the last."""
    for case, series in slices.items():
        label = read_volume(source / "labelsTr" / f"{case}.nii.gz").ras.data
        out = Path("results/dicom") / case
        assert (out / f"{case}_label.dcm").exists()
        if case != max(slices):
            write_phantom_seg(Path("data/dicom") / case / "corrected.dcm", series, label)
        else:
            predicted = read_volume(out / f"{case}_label.nii.gz")
            scan = read_volume(Path("data/dicom") / case)
            assert np.allclose(predicted.affine, scan.affine, atol=1e-4)
            array = label[::-1, ::-1].astype(np.uint8)
            predicted.like(array).write(Path("data/dicom") / f"{case}_label.nii.gz")
