"""What a run takes and leaves: damaged checkpoints and prepared data, splits, folds, modality."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from documents import PAGES
from helpers import chain_of, copy_prepared, small_config

import train
from data.files import InputError, find_checkpoint
from data.splits import read_prepared
from preprocess import Chain
from utilities import CHECKPOINT, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures")


def test_one_flipped_bit_is_refused_by_name(begun, tmp_path):
    whole, path = (begun / "best.pt").read_bytes(), tmp_path / "a.pt"
    rng = np.random.default_rng(0)
    weights, refused = load_checkpoint(begun / "best.pt")["network_state"], 0
    for place in rng.integers(0, len(whole), 24):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)["network_state"]
        except InputError as error:
            refused += str(path) in str(error)
        else:  # the bit lay in the padding between tensors
            assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert refused > 12


def test_foreign_files_are_no_checkpoints_and_run_no_code(begun, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    path = tmp_path / "a.pt"
    torn, evil = ((begun / "last.pt").read_bytes()[:-500], pickle.dumps({"schema": 2, "a": Evil()}))
    for content in (b"", b"these are words", b"PK\x03\x04", torn, evil, {"schema": 2, "a": Evil()}):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(InputError, match=r"a\.pt: not a readable checkpoint .*use another"):
            load_checkpoint(path)
    for content in ([1, 2], {"state_dict": {}}, torch.zeros(2)):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"a\.pt: not a checkpoint of this project"):
            load_checkpoint(path)
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_is_given_by_its_run_and_carries_chain_labels_and_modality(begun, few):
    assert find_checkpoint(begun) == begun / "best.pt"
    with pytest.raises(InputError, match=r"nothing: no such checkpoint"):
        load_checkpoint(begun / "nothing")
    saved = load_checkpoint(begun)
    assert Chain(**saved["preprocessing"]) == chain_of(small_config(few, begun))
    assert saved["declared"] == {"background": (0,), "liver": (1,), "tumour": (2,)}
    assert saved["modality"] == "CT"


def test_the_checkpoint_schema_is_the_table_of_its_page(tmp_path):
    page = PAGES["docs/checkpoints.md"]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    in_page = {name.strip(" `") for row in rows for name in row.split(",")}
    assert in_page == CHECKPOINT.keys() | {"schema", "versions"}
    with pytest.raises(InputError, match="network_state is missing"):
        save_checkpoint(tmp_path / "a.pt", network_args={})


@pytest.mark.parametrize("key", ["image", "label"])
def test_paths_that_leave_the_folder_are_refused(prepared, tmp_path, key):
    content = read_prepared(prepared)
    for path in ("../other/image.nii", "/etc/image.nii", "a/../../b.nii", "C:\\a.nii", "..\\a", 7):
        content["subvolumes"][0][key] = path
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"lies outside of|wrong type"):
            read_prepared(tmp_path)


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


def test_an_empty_split_is_refused_before_anything_is_cached(few, tmp_path, monkeypatch):
    def empty(content):
        content["subvolumes"] = [r for r in content["subvolumes"] if r["split"] != split]

    monkeypatch.setattr(train, "cache_split", lambda *_: pytest.fail("something was cached"))
    for split in ("training", "validation"):
        data = copy_prepared(few, tmp_path / split, empty)
        with pytest.raises(InputError, match=f"no sub-volume in the {split} split"):
            train.main(small_config(data, tmp_path / "run"))


def test_a_class_that_no_validation_patient_has_chooses_no_checkpoint(few, tmp_path, capsys):
    def lose_liver(content):
        for record in content["subvolumes"]:
            if record["split"] == "validation":
                record["voxels_per_label"] = {"0": 1000}

    data = copy_prepared(few, tmp_path / "data", lose_liver)
    train.main(small_config(data, tmp_path / "run", max_epochs=1))
    assert "no validation patient has liver" in capsys.readouterr().out
    assert not (tmp_path / "run" / "best.pt").exists()


def test_mr_is_trained_without_a_hu_window_unless_one_is_given(capsys):
    assert train.drop_hu_window(train.Config()).hu_window is None
    assert "--hu-window None is used" in capsys.readouterr().out
    given = train.Config(hu_window=(0.0, 500.0))
    assert train.drop_hu_window(given) == given
