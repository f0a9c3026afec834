"""The first hour of a new user: options, a run's settings and log, folds, notebook, container."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from children import attack, run_child, tell
from conftest import ROOT, without_pictures
from helpers import small_config

import prepare
import train
from data.files import InputError
from data.settings import read_settings
from data.splits import choose_fold, read_prepared
from utilities import load_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures")
NEXT = {"prepare.py": "preprocess.py", "preprocess.py": "apply_model.py"}
NEXT |= {"train.py": "apply_model.py", "apply_model.py": "visualize_3d.py"}


def run_lightly(script, *words):
    """What a script prints, without having loaded anything that costs seconds."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {['x', *words]}\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    print(end)\n"
        "heavy = {'torch', 'monai', 'vedo', 'scipy', 'matplotlib', 'nibabel'} & set(sys.modules)\n"
        "print('heavy:', *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *told, last = done.stdout.strip().splitlines()
    assert last == "heavy:" or script.startswith("data/")
    return "\n".join(told)


@pytest.mark.parametrize("script", [*NEXT, "visualize_3d.py", "data/check.py", "data/evaluate.py"])
def test_help_takes_no_time_and_explains_each_option_by_its_own_text(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    told = run_lightly(script, "--help")
    lines = [line.strip("│ ") for line in told.partition("options ─")[2].splitlines()]
    options = "\n".join(lines).split("\n--")[1:]
    texts = [re.sub(r"^.*?(  +|\n)", "", option).partition("(default:")[0] for option in options]
    assert len(set(texts)) == len(texts) > 4
    assert all(text.strip() and not text.startswith("--") for text in texts)
    assert NEXT.get(script, "") in told


def test_closed_streams_a_safe_path_and_a_foreign_backend_stop_no_script(raw, tmp_path):
    prepare = f"{sys.executable} {ROOT}/prepare.py {raw} --destination {tmp_path}/prepared"
    env = os.environ | {"PYTHONSAFEPATH": "1", "MPLBACKEND": "nonsense"}
    command = f"{prepare} --workers 1 --check-only <&- 2>&-"
    done = subprocess.run(command, shell=True, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout.count("ok\n") == 3


def test_a_missing_scan_or_checkpoint_is_told_at_once(tmp_path):
    none = str(tmp_path / "none")
    assert "none: no such file or folder" in run_lightly("apply_model.py", none)
    told = run_lightly("apply_model.py", str(tmp_path), "--checkpoint", none)
    assert told.startswith("error: ") and "none: no such checkpoint" in told


@pytest.mark.parametrize("script", [*NEXT, "visualize_3d.py", "data/make_phantoms.py"])
def test_a_missing_environment_is_one_line(script):
    """A Python without packages (-SE) names the environment to activate."""
    done = subprocess.run(
        [sys.executable, "-SE", ROOT / script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: the packages of requirements")
    assert "source .venv/bin/activate" in done.stderr and done.stderr.count("\n") == 1


def read(monkeypatch, *words, config_class=train.Config, recipes=None):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    return read_settings(config_class, "", recipes)


def test_a_recipe_gives_its_settings_and_options_win(monkeypatch):
    assert read(monkeypatch) == train.Config()
    for name, (_, recipe) in train.RECIPES.items():
        assert read(monkeypatch, name, recipes=train.RECIPES) == recipe
    mixed = read(monkeypatch, "laptop", "--no-amsgrad", "--loss=ce", recipes=train.RECIPES)
    assert (mixed.loss, mixed.network) == ("ce", "unet")
    assert {"amsgrad", "loss", "network"} <= mixed.list_given()
    with pytest.raises(SystemExit, match=r"must be one of liver-unet3d"):
        read(monkeypatch, "liver-tumor", recipes=train.RECIPES)
    labels = read(monkeypatch, "--labels", "liver=liver,tumour", "spleen").labels
    assert labels == {"liver": ("liver", "tumour"), "spleen": ("spleen",)}


def test_the_settings_of_a_run_are_fed_back_and_options_win(begun, tmp_path, monkeypatch):
    saved = load_checkpoint(begun)["config"]
    for words in (["--config", begun], [f"--config={begun / 'config.json'}"]):
        again = read(monkeypatch, *words, "--loss", "ce", "--run-folder", tmp_path)
        assert again.plain() == {**saved, "loss": "ce", "run_folder": str(tmp_path)}
        assert {"loss", "hu_window", "base_channels"} <= again.list_given()
    laptop = read(monkeypatch, "laptop", "--config", begun, recipes=train.RECIPES)
    assert laptop.input_size == tuple(saved["input_size"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"learnig_rate": 1}', "no such setting: learnig_rate; correct it, see --help"),
        ('{"loss": "dicee"}', "--loss must be as --help says, got 'dicee'"),
        ('{"input_size": "256"}', "--input-size must be as --help says, got '256'"),
        ("[1]", "must be a JSON object of settings, got [1]"),
    ],
)
def test_settings_of_a_file_that_cannot_be_are_one_error(content, message, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=re.escape(message)) as stop:
        read(monkeypatch, "--config", path)
    assert str(stop.value).startswith(f"error: {path}: ")


@pytest.fixture(scope="module")
def folds(raw_phantoms, tmp_path_factory):
    """Phantoms prepared in three folds; tests must not change it."""
    folder = tmp_path_factory.mktemp("folds") / "data"
    with without_pictures():
        prepare.main(prepare.Config(raw_phantoms, folder, folds=3, workers=1))
    return folder


def test_every_case_is_validated_in_one_fold_and_trained_on_in_the_others(folds, prepared):
    content, validated = read_prepared(folds), []
    for fold in range(3):
        chosen = choose_fold(content, fold, folds)
        cases = {(record["case"], record["split"]) for record in chosen["cases"]}
        assert cases == {(record["case"], record["split"]) for record in chosen["subvolumes"]}
        validated += [name for name, split in cases if split == "validation"]
    assert sorted(validated) == sorted(case["case"] for case in content["cases"])
    everything = choose_fold(content, "all", folds)
    assert {record["split"] for record in everything["subvolumes"]} == {"training"}
    plain = read_prepared(prepared)  # data without folds keep their split
    assert choose_fold(plain, 0, prepared) is plain
    for data, fold, has in ((content, 3, "folds 0 to 2"), (plain, 1, "no folds")):
        with pytest.raises(InputError, match=rf"got {fold}; .* has {has}"):
            choose_fold(data, fold, folds)


def test_a_training_on_all_folds_says_what_is_missing(folds, tmp_path, capsys):
    train.main(small_config(folds, tmp_path, fold="all", max_epochs=1))
    told = capsys.readouterr().out
    assert "without validation there is no best.pt" in told and "apply_model.py SCAN" in told


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs/first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code, changed = re.subn(r"(?m)^(CASES, SIZE, EPOCHS) = .*", r"\1 = 4, 32, 1", code)
    assert changed == 1
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "data/first_steps/liver_3d.png").stat().st_size > 1000
    assert names["found"].shape == names["scan"].shape


def test_bad_inputs_and_settings_are_refused_by_their_names(
    raw_phantoms, prepared, checkpoint, tmp_path
):
    """The quick form of the attacks; the long form attacks bytes and the steps, too."""
    demo, log = tmp_path / "demo", tmp_path / "log"
    scan = demo / "raw/imagesTr/phantom_000.nii.gz"
    (tmp_path / "work").mkdir()
    for source, name in ((raw_phantoms, "raw"), (prepared, "prepared"), (checkpoint.parent, "run")):
        shutil.copytree(source, demo / name)
    (demo / "results").mkdir()
    places = {"demo": demo, "scan": scan, "truth": demo / "raw/labelsTr" / scan.name}
    assert run_child(tell, log, attack, tmp_path / "work", places) == 0, log.read_text()
