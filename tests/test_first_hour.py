"""The first hour of a new user: options, a run's settings and log, folds, notebook, container."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from helpers import small_config
from monai.bundle import ConfigParser

import apply_model
import prepare
import train
from data.files import InputError
from data.scans import read_volume
from data.settings import keep_log, read_comments, read_settings
from data.splits import choose_fold, read_prepared
from utilities import load_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures")
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


# ---------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------


@dataclass
class Settings:
    """A class of settings with every kind of comment."""

    where: Path = Path("here")  # before any section

    # -- colours
    # Two lines above the first
    # one of a section.
    red: int = 1
    green: float = 2.0  # behind it,
    # and below it.
    blue: tuple[int, ...] = (3, 4)

    # Above, after a blank line.
    grey: bool = False  # and behind

    # -- last ones
    name: str | None = None


def test_comments_belong_to_their_settings_and_sections_to_none():
    assert read_comments(Settings) == {
        "where": ("", "before any section"),
        "red": ("colours", "Two lines above the first one of a section."),
        "green": ("colours", "behind it, and below it."),
        "blue": ("colours", ""),
        "grey": ("colours", "Above, after a blank line. and behind"),
        "name": ("last ones", ""),
    }


def test_help_has_a_group_for_each_section_and_no_title_leaks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run_here("train.py", "--help") == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    _, *parts = re.split(r"(?m)^\W*(\w[\w ]*) options\W*$", shown)
    groups = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(groups) == [
        "data and run", "input", "augmentation", "network", "optimisation", "machine", "inference"
    ]  # fmt: skip
    assert "--device" in groups["machine"] and "--learning-rate" not in groups["machine"]
    assert "None, for MR: negatives" in groups["input"]  # a comment below its setting
    assert not re.search(r"-- \w", shown)


def read(monkeypatch, *words, config_class=train.Config, recipes=None):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    return read_settings(config_class, "", recipes)


def test_grouped_options_are_flat_on_the_command_line(monkeypatch):
    found = read(monkeypatch, "--green", 5, "--grey", "--blue", 7, 8, 9, config_class=Settings)
    assert found == Settings(green=5.0, grey=True, blue=(7, 8, 9))
    assert read(monkeypatch) == train.Config()
    for name, (_, recipe) in train.RECIPES.items():
        assert read(monkeypatch, name, recipes=train.RECIPES) == recipe


def run_lightly(script, *words):
    """What a script prints, without having loaded anything that costs seconds."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {['x', *words]}\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end)\n"
        "heavy = {'torch', 'monai', 'vedo', 'scipy', 'matplotlib', 'nibabel'} & set(sys.modules)\n"
        "print('heavy:', *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *told, last = done.stdout.strip().splitlines()
    assert last == "heavy:"
    return "\n".join(told)


@pytest.mark.parametrize(
    "script", ["prepare", "train", "apply_model", "visualize_3d", "preprocess"]
)
def test_help_takes_no_time_and_names_the_next_script(script):
    """Below 0.7 s of CPU on the machine it was measured on."""
    told = run_lightly(script, "--help")
    following = {"prepare": "preprocess.py", "apply_model": "visualize_3d.py"}
    following |= {"preprocess": "apply_model.py", "train": "apply_model.py"}
    assert following.get(script, "") in told


def test_a_missing_scan_or_checkpoint_is_told_at_once(tmp_path):
    none = str(tmp_path / "none")
    assert "none: no such file or folder" in run_lightly("apply_model", none)
    told = run_lightly("apply_model", str(tmp_path), "--checkpoint", none)
    assert told.startswith("error: ")
    assert "none: no such checkpoint" in told


# ---------------------------------------------------------------------------------------
# The settings of a run fed back
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """Two epochs, the second one resumed; tests must not change it."""
    folder = tmp_path_factory.mktemp("first_hour") / "run"
    shared = {"hu_window": (-150.0, 200.0), "labels": {"liver": ("liver", "tumour")}}
    train.main(small_config(few, folder, max_epochs=1, loss="dice_ce", **shared))
    train.main(train.Config(resume=folder, max_epochs=2, device="cpu"))
    return folder


def test_the_settings_of_a_run_are_fed_back_and_options_win(run, tmp_path, monkeypatch):
    saved = load_checkpoint(run)["config"]
    for words in (["--config", run], [f"--config={run / 'config.json'}"]):
        again = read(monkeypatch, *words, "--loss", "ce", "--run-folder", tmp_path)
        expected = {**saved, "loss": "ce", "run_folder": str(tmp_path), "resume": None}
        assert again.plain() == expected | {"max_epochs": 2}
        assert {"loss", "hu_window", "base_channels"} <= again.list_given()
    (tmp_path / "own.json").write_text('{"spacing": "median"}')
    assert read(monkeypatch, "--config", tmp_path / "own.json").spacing == "median"
    laptop = read(monkeypatch, "laptop", "--config", run, recipes=train.RECIPES)
    assert laptop.input_size == tuple(saved["input_size"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"learnig_rate": 1}', "no such setting: learnig_rate; correct it, see --help"),
        ('{"loss": "dicee"}', "loss must be as --help says, got 'dicee'; correct it"),
        ('{"max_epochs": 1, "compile": "maybe"}', "compile must be as --help says, got 'maybe'"),
        ('{"overlap": 2}', "--overlap must be a number 0 <= x < 1, got 2"),
        ("[1]", "must be a JSON object of settings, got [1]"),
        ("words", "must be a JSON object of settings"),
        (None, "must be a JSON object of settings"),
    ],
)
def test_settings_of_a_file_that_cannot_be_are_one_error(content, message, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit, match=re.escape(message)) as stop:
        read(monkeypatch, "--config", path)
    assert str(stop.value).startswith(f"error: {path}: ")


def test_every_script_takes_a_file_of_settings(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"accept": ["hu", "outside"], "keep_empty": 0.5, "images": None}))
    found = read(monkeypatch, tmp_path, "--config", path, config_class=prepare.Config)
    assert found == prepare.Config(source=tmp_path, accept=("hu", "outside"), keep_empty=0.5)


# ---------------------------------------------------------------------------------------
# train.log
# ---------------------------------------------------------------------------------------


def test_the_log_has_what_the_terminal_said_and_goes_on_when_resumed(run):
    text = (run / "train.log").read_text()
    assert not set(text) & {"\r", "\x1b"}
    begun = [line for line in text.splitlines() if re.match(r"\d{4}-\d\d-\d\d .* python ", line)]
    assert len(begun) == 2
    assert [text.count(f"epoch {n}/{n}: loss") for n in (1, 2)] == [1, 1]
    assert text.count("done: look at curves.png") == 2


def test_of_bars_nothing_stays_and_an_error_is_the_last_line(tmp_path, capsys):
    (tmp_path / "last.pt").touch()
    path = tmp_path / "train.log"
    path.write_text("before\n")
    with pytest.raises(InputError), keep_log(path):
        print("one", end=" ")
        print("line\x1b[1m bold\x1b[0m")
        for percent in (10, 50):
            print(f"\r{percent} % of a bar", end="", file=sys.stderr)
        print("\r" + " " * 12 + "\rtold beside it", file=sys.stderr)
        raise InputError("the reason")
    first, second, *lines = path.read_text().splitlines()
    assert first == "before"
    assert "python " in second
    assert lines == ["one line bold", "told beside it", "InputError: the reason"]
    assert "50 % of a bar" in capsys.readouterr().err


def test_a_run_that_does_not_begin_leaves_no_log(few, run, tmp_path):
    with pytest.raises(InputError, match="same network"):
        train.main(small_config(few, tmp_path / "run", base_channels=8, pretrained=run))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------
# Folds: prepared once
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folds(raw_phantoms, tmp_path_factory):
    """Phantoms prepared in three folds; tests must not change it."""
    folder = tmp_path_factory.mktemp("folds") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "draw_case", lambda *_: None)
        prepare.main(prepare.Config(raw_phantoms, folder, folds=3, workers=1))
    return folder


def test_every_case_is_validated_in_one_fold_and_trained_on_in_the_others(folds):
    prepared = read_prepared(folds)
    validated = []
    for fold in range(3):
        chosen = choose_fold(prepared, fold, folds)
        by_split = {
            key: {(r["case"], r["split"]) for r in chosen[key]} for key in ("cases", "subvolumes")
        }
        assert by_split["cases"] == by_split["subvolumes"]
        validated += [name for name, split in by_split["cases"] if split == "validation"]
    assert sorted(validated) == sorted(case["case"] for case in prepared["cases"])
    everything = choose_fold(prepared, "all", folds)
    assert {record["split"] for record in everything["subvolumes"]} == {"training"}
    for wrong in (3, -1):
        with pytest.raises(InputError, match=rf"got {wrong}; .* has folds 0 to 2"):
            choose_fold(prepared, wrong, folds)


def test_data_without_folds_keep_their_split(prepared):
    content = read_prepared(prepared)
    assert choose_fold(content, 0, prepared) is content
    with pytest.raises(InputError, match=r"has no folds, prepare.py --folds 5"):
        choose_fold(content, 1, prepared)
    assert len(choose_fold(content, "all", prepared)["subvolumes"]) == len(content["subvolumes"])


def test_a_network_is_applied_to_the_fold_it_has_not_seen(folds, tmp_path, capsys):
    small = {"base_channels": 4, "input_size": (16, 16), "spacing": (16.0, 16.0), "device": "cpu"}
    trained = tmp_path / "run"
    train.main(train.Config(folds, 2, run_folder=trained, max_epochs=1, **small))
    assert "apply_model.py --split validation" in capsys.readouterr().out
    assert load_checkpoint(trained)["config"]["fold"] == 2
    config = apply_model.Config(split="validation", data=folds, checkpoint=trained)
    chosen = apply_model.find_cases(config, apply_model.read_fold)
    expected = [case["case"] for case in read_prepared(folds)["cases"] if case["fold"] == 2]
    assert [case.name for case in chosen] == expected != []
    train.main(train.Config(folds, "all", run_folder=tmp_path / "all", max_epochs=1, **small))
    told = capsys.readouterr().out
    assert "without validation there is no best.pt" in told
    assert "apply_model.py SCAN" in told


# ---------------------------------------------------------------------------------------
# MONAI bundle
# ---------------------------------------------------------------------------------------


def segment_by_bundle(folder: Path, scan: Path) -> tuple[np.ndarray, np.ndarray]:
    """Label map and affine that MONAI makes of a bundle alone."""
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser["bundle_root"] = str(folder)
    found = parser.get_parsed_content("segment")(str(scan))["pred"]
    return found.numpy()[0], found.affine.numpy()


@pytest.mark.parametrize("kind", ["subvolumes", "patches", "by maximum, other values"])
def test_a_bundle_gives_the_same_voxels(kind, checkpoint, whole_cases, raw_phantoms, tmp_path):
    """By MONAI's transforms, without a line of this project: not one voxel differs."""
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    if kind == "patches":  # of networks that know nothing, only the windows and grids matter
        run = tmp_path / "run"
        sizes = {"spacing": (8.0, 8.0, 6.0), "input_size": (32, 32, 16), "base_channels": 4}
        train.main(train.Config(
            whole_cases, run_folder=run, sampling="patches", patches_per_case=1, max_epochs=1,
            network="unet", learning_rate=1e-2, labels={"liver": ("liver",), "tumour": ("tumour",)},
            loss="weighted_ce", device="cpu", **sizes,
        ))  # fmt: skip
        checkpoint = run
    elif kind != "subvolumes":
        saved = torch.load(checkpoint, weights_only=True)
        saved["preprocessing"] |= {"hu_window": None}
        saved["preprocessing"]["labels"] = {"background": (0,), "liver": (6,)}
        checkpoint = tmp_path / "other.pt"
        torch.save(saved, checkpoint)
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    folder = tmp_path / "bundle"
    apply_model.main(apply_model.Config(checkpoint=checkpoint, export_bundle=folder))
    for scan in sorted((raw_phantoms / "imagesTr").iterdir())[3:4]:  # an oblique one
        ours = apply_model.segment(model, scan, apply_model.Options(trim_by_hu=False))
        theirs, affine = segment_by_bundle(folder, scan)
        assert np.count_nonzero(ours.data != theirs) == 0
        assert np.allclose(affine, ours.affine, atol=1e-4)


def test_a_bundle_says_what_it_is_and_runs_by_monai_alone(checkpoint, raw_phantoms, tmp_path):
    folder = tmp_path / "bundle"
    ended = run_here("apply_model.py", "--checkpoint", checkpoint, "--export-bundle", folder)
    assert ended == 0
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert outputs["channel_def"] == {"0": "background", "1": "liver"}
    assert outputs["spatial_shape"] == [32, 32, 16]
    (folder / "input").mkdir()
    scan = min((raw_phantoms / "imagesTr").iterdir())
    shutil.copy(scan, folder / "input")
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser["bundle_root"] = str(folder)
    parser.get_parsed_content("run")
    (written,) = (folder / "output").rglob("*.nii.gz")
    name = scan.name.removesuffix(".nii.gz")
    assert written.name == f"{name}_label.nii.gz"
    assert read_volume(written).shape == read_volume(scan).shape


# ---------------------------------------------------------------------------------------
# Notebook and container
# ---------------------------------------------------------------------------------------


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict = {}
    sizes = re.compile(r"^CASES, SIZE, EPOCHS = .*", flags=re.MULTILINE)
    changed = 0
    for cell in cells:
        code, found = sizes.subn("CASES, SIZE, EPOCHS = 4, 32, 1", "".join(cell["source"]))
        changed += found
        exec(code, names)
    assert changed == 1
    assert (tmp_path / "data/first_steps/liver_3d.png").stat().st_size > 1000
    assert names["found"].shape == names["scan"].shape


def test_the_container_is_made_of_what_is_there():
    """Every file that the Dockerfile copies exists, and the demo is a target of the Makefile."""
    text = (ROOT / "Dockerfile").read_text()
    assert (ROOT / "requirements.txt").exists() and "COPY requirements.txt ." in text
    assert 'CMD ["make", "demo"]' in text
    kept = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "data/*", "!data/*.py", "!checkpoints/starter.pt"} <= set(kept)
