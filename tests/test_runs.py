"""What a run leaves and takes: checkpoints and prepared data that are damaged, resuming, splits."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from helpers import chain_of, comparable, small_config

import preprocess
import train
import utilities
from data.files import InputError, find_checkpoint
from data.settings import list_given, pick
from data.splits import read_prepared
from preprocess import Augment, Chain
from utilities import describe_epoch, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures")


def edit_prepared(prepared: Path, folder: Path, **changes) -> Path:
    """A copy of prepared data, its sub-volumes by a link, with other entries in dataset.json."""
    folder.mkdir()
    (folder / "subvolumes").symlink_to(prepared / "subvolumes")
    content = json.loads((prepared / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, **changes}))
    return folder


def few_records(prepared: Path, splits=("training", "validation"), count: int = 2) -> list[dict]:
    """Some sub-volumes of each split."""
    records = json.loads((prepared / "dataset.json").read_text())["subvolumes"]
    by_split = {split: [r for r in records if r["split"] == split] for split in splits}
    return [record for some in by_split.values() for record in some[-1 - count : -1]]


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """One epoch on few sub-volumes; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main(small_config(few, folder, max_epochs=1))
    return folder


def resave(run: Path, path: Path, **changes) -> Path:
    """A checkpoint with other entries (... takes one away), as another program would write it."""
    saved = torch.load(run / "last.pt", weights_only=True)
    torch.save({k: v for k, v in {**saved, **changes}.items() if v is not ...}, path)
    return path


# ---------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------


def test_one_flipped_bit_is_refused_by_name(run, tmp_path):
    whole, path = (run / "best.pt").read_bytes(), tmp_path / "flipped.pt"
    rng = np.random.default_rng(0)
    weights = load_checkpoint(run / "best.pt")["network_state"]
    refused = 0
    for place in rng.integers(0, len(whole), 24):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)["network_state"]
        except InputError as error:
            assert "flipped.pt" in str(error)
            refused += 1
        else:  # the bit lay in the padding between tensors
            assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert refused > 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable checkpoint"),
        (b"these are words", "not a readable checkpoint"),
        (b"PK\x03\x04", "not a readable checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.pt: {message}.*use another"):
        load_checkpoint(tmp_path / "a.pt")


def test_what_torch_wrote_of_something_else(tmp_path):
    for content in ([1, 2], {"state_dict": {}}, torch.zeros(2)):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"a\.pt: not a checkpoint of this project"):
            load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schema": 1},
            "schema must be 2, got 1; it was made by an earlier version.*train it again",
        ),
        ({"schema": 3}, "a later version of this program, update"),
        ({"network_state": ...}, "network_state is missing"),
        ({"preprocessing": ...}, "preprocessing is missing"),
        ({"declared": [1]}, "declared has the wrong type, got list"),
        ({"network_state": {"head.bias": torch.tensor([np.nan])}}, "not numbers"),
        ({"network_state": {"head.bias": torch.tensor([np.inf])}}, "not numbers"),
        ({"inference": {"window": (32, 32, 16), "overlap": 1.0}}, "--overlap must be a number"),
        ({"config": {"spacing": (0.0, 1.0)}}, "--spacing must be a number"),
    ],
)
def test_checkpoints_with_other_content_are_one_message(run, tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"a\.pt: .*{message}"):
        load_checkpoint(resave(run, tmp_path / "a.pt", **changes))


def test_a_run_is_given_by_its_folder_or_its_checkpoint(run):
    assert find_checkpoint(run) == run / "best.pt"
    assert find_checkpoint(run, ["last.pt"]) == run / "last.pt"
    assert load_checkpoint(run)["optimizer_state"] is None
    with pytest.raises(InputError, match=r"nothing: no such checkpoint"):
        load_checkpoint(run / "nothing")


def test_a_checkpoint_carries_chain_labels_and_modality(run, few):
    saved = load_checkpoint(run)
    assert Chain(**saved["preprocessing"]) == chain_of(small_config(few, run))
    assert saved["declared"] == {"background": (0,), "liver": (1,), "tumour": (2,)}
    assert saved["modality"] == "CT"
    assert "labels" not in saved


# ---------------------------------------------------------------------------------------
# dataset.json
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be what prepare.py wrote"),
        ("words", "must be what prepare.py wrote"),
        ("[]", "must be a dictionary, got list"),
        ("{}", "schema is missing"),
        ('{"schema": 99}', "a later version"),
        ('{"schema": "1"}', "schema has the wrong type"),
    ],
)
def test_a_dataset_json_of_something_else(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=rf"dataset\.json: .*{message}"):
        read_prepared(tmp_path)


@pytest.mark.parametrize("key", ["labels", "settings", "subvolume_depth", "subvolumes"])
def test_a_dataset_json_that_lacks_something(prepared, tmp_path, key):
    content = read_prepared(prepared)
    del content[key]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{key} is missing; prepare the data again"):
        read_prepared(tmp_path)


@pytest.mark.parametrize("values", [["x", "x"], "liver", None, [[1]], {"a": 1}])
def test_labels_that_are_no_numbers_are_refused(prepared, tmp_path, values):
    labels = {"background": 0, "liver": values}
    folder = edit_prepared(prepared, tmp_path / "data", labels=labels)
    with pytest.raises(InputError, match=r"labels must be whole numbers, .*prepare the data again"):
        read_prepared(folder)


@pytest.mark.parametrize(
    "path", ["../other/image.nii", "/etc/image.nii", "a/../../b.nii", "C:\\a.nii", "..\\a.nii", 7]
)
@pytest.mark.parametrize("key", ["image", "label"])
def test_paths_that_leave_the_folder_are_refused(prepared, tmp_path, path, key):
    records = few_records(prepared)
    records[0][key] = path
    folder = edit_prepared(prepared, tmp_path / "data", subvolumes=records)
    with pytest.raises(InputError, match=r"lies outside of|wrong type"):
        read_prepared(folder)


# ---------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------


def test_what_was_given_is_known_as_given(run, few, tmp_path):
    """Also when it equals a default: compared with the saved run."""
    config = train.Config(resume=run)
    config.given = list_given(["--resume", str(run), "--max-epochs=100"], config)
    assert config.given == {"resume", "max_epochs"}
    assert train.resume_settings(config, run, load_checkpoint(run / "last.pt")).max_epochs == 100
    config.given = frozenset({"resume", "learning_rate", "batch_size", "base_channels"})
    with pytest.raises(InputError, match="but base_channels differ"):  # 32, the default, against 4
        train.resume_settings(config, run, load_checkpoint(run / "last.pt"))
    given = list_given(["--resume", "x", "--no-compile"], config)
    assert given == {"resume", "compile"}


@pytest.mark.parametrize("name", ["", "last.pt"])
def test_a_finished_run_says_so(run, name, capsys):
    before = (run / "last.pt").read_bytes()
    train.main(train.Config(resume=run / name))
    out = capsys.readouterr().out
    assert "finished after 1 epochs (--max-epochs 1); train on with more --max-epochs" in out
    assert (run / "last.pt").read_bytes() == before


def test_a_full_disk_ends_a_training_in_one_message(few, tmp_path, monkeypatch):
    """torch raises RuntimeError; what it wrote so far gets no name."""
    config, write = small_config(few, tmp_path / "run", max_epochs=1), torch.save

    def fill(content, path):
        write(content, path)
        os.truncate(path, path.stat().st_size // 2)
        raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(InputError, match=r"best\.pt: cannot be written .*free space"):
        train.main(config)
    assert not list((tmp_path / "run").rglob("*.pt*"))
    monkeypatch.undo()
    train.main(config)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_an_epoch_counts_only_once_its_pictures_are_drawn(few, tmp_path, monkeypatch):
    """Whatever ends the last epoch before them, the run that goes on draws them."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(utilities, "save_figure", stop)
    config = small_config(few, tmp_path / "run", max_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "last.pt").exists()  # by which a run is known as finished
    train.main(config)
    assert {"curves.png", "preview.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_finished_run_goes_on_with_more_epochs(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    train.main(train.Config(resume=tmp_path / "run" / "last.pt", max_epochs=2, device="cpu"))
    history = load_checkpoint(tmp_path / "run" / "last.pt")["history"]
    assert [row["epoch"] for row in history] == [1, 2]


# ---------------------------------------------------------------------------------------
# Splits, classes, modality, weights to begin with
# ---------------------------------------------------------------------------------------


def test_without_validation_the_last_network_is_kept_and_it_is_said(prepared, tmp_path, capsys):
    records = few_records(prepared, ("training",))
    settings = {**read_prepared(prepared)["settings"], "validation": 0.0}
    data = edit_prepared(prepared, tmp_path / "d", subvolumes=records, settings=settings)
    train.main(small_config(data, tmp_path / "run", max_epochs=2))
    out = capsys.readouterr().out
    assert out.count("without validation there is no best.pt") == 1
    assert not (tmp_path / "run" / "best.pt").exists()
    assert find_checkpoint(tmp_path / "run").name == "last.pt"
    row = load_checkpoint(tmp_path / "run")["history"][-1]
    assert "val_dice" not in row


@pytest.mark.parametrize("split", ["training", "validation"])
def test_an_empty_split_is_refused_before_anything_is_cached(
    prepared, tmp_path, split, monkeypatch
):
    other = {"training": "validation", "validation": "training"}[split]
    records = few_records(prepared, (other,))
    data = edit_prepared(prepared, tmp_path / "data", subvolumes=records)
    monkeypatch.setattr(train, "cache_split", lambda *_: pytest.fail("something was cached"))
    with pytest.raises(InputError, match=f"no sub-volume in the {split} split"):
        train.main(small_config(data, tmp_path / "run"))


def test_a_class_that_no_validation_patient_has_chooses_no_checkpoint(prepared, tmp_path, capsys):
    records = few_records(prepared)
    for record in records:
        if record["split"] == "validation":
            record["voxels_per_label"] = {"0": 1000}
    data = edit_prepared(prepared, tmp_path / "data", subvolumes=records)
    train.main(small_config(data, tmp_path / "run", max_epochs=1))
    assert "no validation patient has liver" in capsys.readouterr().out
    assert not (tmp_path / "run" / "best.pt").exists()


def test_mr_is_trained_without_a_hu_window_unless_one_is_given(capsys):
    config = train.choose_hu_window(train.Config(), "MR")
    assert config.hu_window is None
    assert "--hu-window None is used" in capsys.readouterr().out
    given = train.Config(hu_window=(0.0, 500.0))
    assert train.choose_hu_window(given, "MR") == given
    assert train.choose_hu_window(train.Config(), "CT") == train.Config()


def test_weights_to_begin_with_of_other_classes_leave_the_head_out(run, few, tmp_path, capsys):
    two = {"liver": ("liver",), "tumour": ("tumour",)}
    begin = {"pretrained": run, "pretrained_share": 0.5}  # of a new head none can be kept
    train.main(small_config(few, tmp_path / "run", max_epochs=1, labels=two, **begin))
    told = capsys.readouterr().out
    assert "2 classes; begins anew: head.bias, head.weight" in told
    assert "--pretrained-share is 0: there is no share" in told
    assert load_checkpoint(tmp_path / "run" / "last.pt")["averaging_state"]["first"] is None
    with pytest.raises(InputError, match="keeps a share of --pretrained; give it"):
        train.main(small_config(few, tmp_path / "none", pretrained_share=0.5))
    other = small_config(few, tmp_path / "other", base_channels=8, pretrained=run)
    with pytest.raises(InputError, match="must be the same network"):
        train.main(other)


# ---------------------------------------------------------------------------------------
# Cache on the disk
# ---------------------------------------------------------------------------------------


def test_the_disk_cache_knows_content_and_heals_itself(prepared, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    config, records = small_config(data, None), few_records(prepared, ("training",), 1)
    content = {**read_prepared(data), "subvolumes": records}

    def cached():
        how = (content, data, "training", chain_of(config), "cpu", True)
        return preprocess.cache_split(*how)[0]

    first = cached()
    (kept,) = (data / "cache").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-100], whole[:2000] + b"\x00" * 500 + whole[2500:]):
        kept.write_bytes(damaged)
        assert torch.equal(cached()["image"], first["image"])
        assert kept.read_bytes() == whole
    image = data / records[0]["image"]
    image.write_bytes(image.read_bytes()[:-2000] + b"\x00" * 2000)  # prepared again, other voxels
    if not any(key.endswith("crc32") for key in records[0]):
        assert not torch.equal(cached()["image"], first["image"])
        assert len(list((data / "cache").iterdir())) == 2
    content["subvolumes"] = [{**records[0], "sha256": "of other voxels"}]
    assert not torch.equal(cached()["image"], first["image"])


# ---------------------------------------------------------------------------------------
# Machines
# ---------------------------------------------------------------------------------------


def test_trains_without_a_terminal_without_bars_and_without_unix(few, tmp_path):
    """TQDM_DISABLE, no terminal, no Unix-only module: a line per epoch, no control characters."""
    unix = "('resource', 'fcntl', 'termios', 'pwd')"  # the libraries have their own ways round
    block = f"import sys, monai, psutil, torch\nsys.modules.update(dict.fromkeys({unix}))\n"
    script = tmp_path / "blocked.py"
    script.write_text(
        f"{block}sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'\n"
        f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    words = "--base-channels 4 --input-size 16 16 --spacing 16 16 --max-epochs 2 --device cpu"
    options = ["--data", few, "--run-folder", tmp_path / "run", *words.split()]
    os.environ["TQDM_DISABLE"] = "1"
    try:
        done = run_script(script, *options)
    finally:
        del os.environ["TQDM_DISABLE"]
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2
    assert " left" in epochs[0]
    assert not {"\r", "\x1b"} & set(done.stdout + done.stderr)
    assert "python apply_model.py" in lines[-1]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert {"epoch_seconds", "train_dice"} <= set(file.readline().strip().split(","))


def test_how_long_it_takes_is_said_once_and_a_cpu_is_shown_the_smaller_recipe(capsys):
    class Clock:
        told, device = False, torch.device("cpu")

    run = Clock()
    utilities.tell_pace(run, [(1, 10.0)], 200, (1, 100))
    utilities.tell_pace(run, [(1, 10.0), (2, 40.0)], 200, (1, 100))
    utilities.tell_pace(run, [(1, 10.0), (3, 40.0)], 200, (1, 100))
    out = capsys.readouterr().out
    assert out.count("an epoch takes about 1 h 40 min, 100 about 166 h 40 min") == 1
    assert "python train.py laptop" in out
    assert "laptop" in train.RECIPES


def test_the_line_of_an_epoch_has_the_time_left():
    row = {"train_loss": 0.5, "samples_per_s": 2.0, "epoch_seconds": 60.0}
    history = [{"epoch": n, **row} for n in (1, 2)]
    assert describe_epoch(history, 12).endswith("60 s, 10 min left")
    assert "left" not in describe_epoch(history, 2)


def test_settings_of_preprocessing_have_no_values_of_their_own():
    for kind in (Chain, Augment):
        fields = dataclasses.fields(kind)
        assert all(field.default is dataclasses.MISSING for field in fields)
        assert {f.name for f in fields} <= {f.name for f in dataclasses.fields(train.Config)} | {
            "classes", "ignore", "crop_to_body"  # of the data
        }  # fmt: skip
    with pytest.raises(AttributeError):
        pick(Augment, train.Config())  # the number of classes is not a setting


def test_training_dice_of_a_resumed_epoch_is_that_of_the_whole(few, tmp_path, monkeypatch):
    """Its voxel counts go through last.pt."""
    train.main(small_config(few, tmp_path / "whole", max_epochs=1, batch_size=1))
    original = utilities.train_step
    monkeypatch.setattr(utilities, "delayed_interrupt", stop_after_one(monkeypatch, original))
    with pytest.raises(KeyboardInterrupt, match=r"go on with: python train\.py --resume"):
        train.main(small_config(few, tmp_path / "broken", max_epochs=1, batch_size=1))
    monkeypatch.undo()
    assert len(load_checkpoint(tmp_path / "broken" / "last.pt")["step_losses"]) == 1
    train.main(train.Config(resume=tmp_path / "broken", device="cpu"))
    one, other = (load_checkpoint(tmp_path / n / "last.pt")["history"] for n in ("whole", "broken"))
    assert comparable(one) == comparable(other)


def stop_after_one(monkeypatch, original):
    """A `delayed_interrupt` that is asked to stop after the first step."""
    import contextlib

    steps = []
    monkeypatch.setattr(
        utilities, "train_step", lambda *given: (steps.append(1), original(*given))[1]
    )

    @contextlib.contextmanager
    def interrupt(**_):
        yield lambda: bool(steps)

    return interrupt


def test_save_checkpoint_needs_every_key(tmp_path):
    with pytest.raises(TypeError, match="missing"):
        save_checkpoint(tmp_path / "a.pt", network_args={})
