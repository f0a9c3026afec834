"""README and docs: each command runs as it stands, links lead somewhere."""

import csv
import dataclasses
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from documents import EVIDENCE, PAGES, USER_PAGES, find_links, list_blocks, list_commands, run_block
from helpers import PATCHES, SMALL, build_2d_network, write_phantom_seg, write_phantom_series

import apply_model
import data.check
import data.make_phantoms as make_phantoms
import data.settings
import train
import utilities
from benchmarks.machine import RESULTS, sum_sources
from data.files import read_json
from data.scans import read_volume
from utilities import load_checkpoint

PHANTOMS = {"cases": 5, "size": 48, "slices": (32, 40)}


def make_small(config, learnt):
    """Settings that take seconds, of a command's that would take hours; networks that begin with
    no weights begin with those that have `learnt`, because one epoch teaches nothing."""
    names = {field.name for field in dataclasses.fields(config)}
    small = {"workers": 1, "device": "cpu"} | (PHANTOMS if "tumours" in names else {})
    if "max_epochs" in names:
        small |= SMALL | (PATCHES if config.sampling == "patches" else {}) | {"max_epochs": 1}
        small |= {"val_interval": 1, "learning_rate": 1e-3}
        if config.network == "resnet34_unet":  # five halvings must leave a pixel
            small |= {"input_size": (32, 32)}
        if (config.sampling, config.network, config.pretrained) == ("subvolumes", "unet3d", None):
            small |= {"pretrained": learnt}
        if config.pretrained and config.pretrained.name.startswith("starter"):  # it has a width
            del small["base_channels"]
            small |= {"spacing": (4.0, 4.0, 4.0)}  # and knows no livers of a few voxels
        if config.resume:
            small = {"device": "cpu"}
    if "screenshot" in names:
        small |= {"size": (80, 60)}
        if not any((config.screenshot, config.turntable, config.movie, config.mesh, config.html)):
            small |= {"screenshot": Path("window.png")}  # in place of a window
    return dataclasses.replace(config, **{n: v for n, v in small.items() if n in names})


def test_figures_that_are_older_than_the_code_say_their_commit():
    for path in RESULTS.glob("*.json"):
        measured = path.read_text()
        commit = re.search(r'"commit": "(\w+)"', measured)[1]
        fresh = all(f'"{file}": "{mark}"' in measured for file, mark in sum_sources().items())
        for page, text in PAGES.items():
            if f"{path.name}`" in text and not fresh:
                assert re.search(rf"`{path.name}`\s{commit}", text), (page, path.name)


@pytest.fixture
def world(tmp_path, monkeypatch, blank_pictures, raw_phantoms, checkpoint):
    """An empty folder with the starter weights, where commands take seconds."""
    whole = data.settings.read_settings

    def read_settings(*args, **options):
        config = whole(*args, **options)
        small = make_small(config, checkpoint)
        if hasattr(config, "given"):
            small.given = config.given
        return small

    monkeypatch.setattr(data.settings, "read_settings", read_settings)
    monkeypatch.setattr(data.check, "draw_overlay", lambda *_: None)
    monkeypatch.setattr(utilities, "build_resnet34", build_2d_network)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for starter in ROOT.glob("checkpoints/starter*.pt"):
        shutil.copy(starter, tmp_path / "checkpoints")
    shutil.copy(min((raw_phantoms / "imagesTr").iterdir()), tmp_path / "scan.nii.gz")
    return tmp_path


@pytest.fixture
def trained(world, raw_phantoms, few, checkpoint):
    """The same with data, prepared data and a checkpoint, as the five steps leave them."""
    for source, place in (
        (raw_phantoms, "data/raw"), (few, "data/prepared"),
        (checkpoint.parent, "checkpoints/liver"),
    ):  # fmt: skip
        shutil.copytree(source, world / place)
    return world


def follow(page, world, between=lambda block: None):
    """Run the blocks of a page in their order; return the words of all commands."""
    done = []
    for block in list_commands(page):
        done += run_block(block, world)
        between(block)
    return done


def test_readme(world):
    """Follow a user: phantoms, prepare, look, train, apply, see, resume."""
    follow("README.md", world)
    for promised in (
        "data/prepared/dataset.json", "data/prepared/preprocess.png", "checkpoints/liver/best.pt",
        "checkpoints/liver/curves.png", "results/results.csv", "scan_3d.png", "scan.gif",
        "results/scan/scan_label.nii.gz", "scan.html", "scan.stl",
    ):  # fmt: skip
        assert (world / promised).exists(), promised
    python = next(text for _, kind, text in list_blocks("README.md") if kind == "python")
    scan = read_volume(world / "scan.nii.gz").ras
    names = {"array": scan.data, "affine": scan.affine}
    exec(python, names)
    assert names["found"].label.shape == scan.shape
    assert read_volume(world / "label.nii.gz").shape == read_volume(world / "scan.nii.gz").shape


def test_first_ten_minutes(world):
    follow("docs/start.md", world)
    pictures = [path.stat().st_size for path in world.glob("liver_*.png")]
    assert pictures and min(pictures) > 1000
    assert read_json(world / "results/summary.json")


def test_applying(trained):
    follow("docs/applying.md", trained)
    row = next(csv.DictReader((trained / "results/evaluation/results.csv").open()))
    assert "liver_dice" in row and "tumour_dice" not in row


def test_viewing(trained):
    run_block("python apply_model.py scan.nii.gz --checkpoint checkpoints/starter.pt", trained)
    follow("docs/viewing.md", trained)
    for name in ("window.png", "organs.png", "turn.gif", "slices.gif", "scan.html", "liver.stl"):
        assert (trained / name).stat().st_size > 1000, name


def test_training(trained):
    """Every recipe trains as the page says; another organ and MR are learnt by their names."""
    (trained / "data/spleen").mkdir()

    def make_others(block):
        if "--organ spleen" in block and not (trained / "data/mr").exists():
            shutil.copytree(trained / "data/spleen/raw", trained / "data/mr/raw")
            for path in (trained / "data/mr/raw/imagesTr").iterdir():
                scan = read_volume(path)
                scan.like((scan.read() + 1024).clip(0).astype(np.uint16)).write(path)

    done = follow("docs/training.md", trained, make_others)
    recipes = {words[2] for words in done if words[1] == "train.py" and words[2][0] != "-"}
    assert recipes == set(train.RECIPES) - {"liver-unet3d"}
    for _, recipe in map(train.RECIPES.get, recipes):
        run = recipe.run_folder
        use = {"data": recipe.data, "checkpoint": run, "destination": run / "a", "device": "cpu"}
        apply_model.main(apply_model.Config(split="test", **use))
        row = next(csv.DictReader((run / "a/results.csv").open()))
        assert all(0 <= float(row[f"{organ}_dice"] or 0) <= 1 for organ in recipe.labels)
        assert 0 < float(row["accuracy"]) <= 1
    assert all(f"| `{name}`" in PAGES["docs/training.md"] for name in train.RECIPES)
    labels = load_checkpoint(trained / "checkpoints/spleen")["preprocessing"]["labels"]
    assert set(labels) == {"background", "spleen"}
    row = next(csv.DictReader((trained / "results/spleen/results.csv").open()))
    assert "spleen_dice" in row and "liver" not in row["warnings"]


def test_lits(world):
    """Two zip files, as downloaded; five folds in a loop and by Slurm; the figure."""
    make_phantoms.main(make_phantoms.Config(world / "unseen", **PHANTOMS | {"cases": 6, "seed": 5}))
    scans, labels = (sorted((world / "unseen" / k).iterdir()) for k in ("imagesTr", "labelsTr"))
    for batch, numbers in enumerate(([0, 1, 2], [3, 4, 28]), start=1):
        with zipfile.ZipFile(world / f"Training_Batch{batch}.zip", "w") as file:
            for place, number in enumerate(numbers, start=3 * batch - 3):
                folder = f"Training Batch {batch}"
                file.write(scans[place], f"{folder}/volume-{number}.nii.gz")
                file.write(labels[place], f"{folder}/segmentation-{number}.nii.gz")
    (world / "scans").mkdir()
    for number in range(4):
        shutil.copy(scans[number], world / "scans" / f"{number}.nii.gz")
    follow("docs/lits.md", world)
    assert read_json(world / "results/evaluation/summary.json")
    assert not list((world / "results/folds").glob("*28*"))
    assert len([path for path in (world / "results/folds").iterdir() if path.is_dir()]) == 5
    for fold in (0, 4):
        assert load_checkpoint(world / f"checkpoints/slurm_{fold}")["config"]["fold"] == fold
    assert len(list((world / "results").glob("shard_[03]/*/*_label.nii.gz"))) == 2


def read_half(path):
    """Every second slice of a volume: what is done with DICOM takes its time by the slice."""
    return read_volume(path).crop((slice(None), slice(None), slice(None, None, 2)))


def test_labelling(trained, raw_phantoms):
    """Correct drafts: of NIfTI as label maps, of DICOM as SEG, in the last case as NIfTI."""
    scans, labels = (sorted((raw_phantoms / k).iterdir())[:3] for k in ("imagesTr", "labelsTr"))
    (trained / "data/own/imagesTr").mkdir(parents=True)
    slices, truths = {}, {path.name: read_half(path) for path in labels}
    for path in scans:
        scan, case = read_half(path), path.name.removesuffix(".nii.gz")
        scan.write(trained / "data/own/imagesTr" / path.name)
        x, y, z = np.round(scan.ras.spacing_mm, 3)
        slices[case] = write_phantom_series(
            trained / "data/dicom" / case, scan.ras.data, PatientID=case, PixelSpacing=[y, x],
            ImagePositionPatient=lambda n, z=z: [-100.0, -90.0, z * n],
        )  # fmt: skip

    def correct(block):
        for name, truth in truths.items():
            case = name.removesuffix(".nii.gz")
            if "apply_model.py data/own" in block:
                draft = read_volume(trained / f"results/own/{case}/{case}_label.nii.gz")
                target = trained / "data/own/labelsTr" / name
                target.parent.mkdir(exist_ok=True)
                draft.like(truth.read().astype(np.uint8)).write(target)
            if "apply_model.py data/dicom" in block:
                draft = trained / f"results/dicom/{case}/{case}_label.nii.gz"
                assert draft.with_name(f"{case}_label.dcm").exists()
                target = trained / "data/dicom"
                if case != max(slices):
                    write_phantom_seg(target / case / "a.dcm", slices[case], truth.ras.data)
                else:
                    array = truth.ras.data[::-1, ::-1].astype(np.uint8)
                    read_volume(draft).like(array).write(target / f"{case}_label.nii.gz")

    follow("docs/labelling.md", trained, correct)
    for name in ("own", "dicom"):
        prepared = read_json(trained / f"data/{name}/prepared/dataset.json")
        found = sum(case["foreground_voxels"] for case in prepared["cases"])
        assert found == sum(np.count_nonzero(truth.read()) for truth in truths.values())
    config = load_checkpoint(trained / "checkpoints/own")["config"]
    assert config["pretrained"] == "checkpoints/liver/best.pt"


@pytest.mark.parametrize("page", PAGES)
def test_no_command_escapes(page):
    """A block names its language; those of bash are followed above, or say why they are not."""
    followed = re.findall(r'follow\("(.*?)"', Path(__file__).read_text())
    for reason, kind, text in list_blocks(page):
        assert kind in ("bash", "json", "python", "text"), f"{page}: {kind}: {text}"
        if kind == "bash":
            assert reason or page in followed, f"{page}: {text}"
        else:
            assert not re.search(r"^(python3?|make|torchrun|sbatch) ", text, re.MULTILINE), text


def test_links_lead_to_files_and_headings_and_the_readme_reaches_every_page():
    reached, pending = {"README.md"}, ["README.md"]
    while pending:
        page = pending.pop()
        for target in find_links(page):
            file, _, heading = target.partition("#")
            path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)", path.read_text(), flags=re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert heading in slugs, f"{page}: {target}"
            name = path.relative_to(ROOT).as_posix()
            if name in PAGES and name not in reached:
                reached.add(name)
                pending.append(name)
    assert reached == set(PAGES)


def test_the_pages_are_few_and_short():
    words = {page: len(text.split()) for page, text in PAGES.items()}
    assert words["README.md"] <= 1300
    assert len(USER_PAGES) <= 10 and sum(words[page] for page in USER_PAGES) <= 6500
    assert sum(words[page] for page in EVIDENCE) <= 5000
