"""Training learns, repeats itself, resumes exactly, and writes what it promises."""

import csv
import inspect
import json
import pickle

import pytest
import torch
from conftest import run_here
from documents import PAGES
from helpers import assert_same_run, augment_of, cached, comparable, small_config

import apply_model
import preprocess
import train
from data.evaluate import dice_metric
from data.files import InputError
from utilities import UNet3D, load_checkpoint, predicted_classes, save_checkpoint

QUICK = {"batch_size": 1, "learning_rate": 5e-3}
pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    train.main(small_config(few, run, **QUICK))
    return run


def test_a_run_leaves_what_the_readme_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "best.pt", "last.pt", "config.json", "metrics.csv", "curves.png", "preview.png",
    }  # fmt: skip
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert json.loads((finished / "config.json").read_text())["base_channels"] == 4
    best = load_checkpoint(finished / "best.pt")
    assert best["val_dice"] == max(row["val_dice"] for row in best["history"])
    assert best["optimizer_state"] is None


def test_same_seed_same_run_and_another_seed_another(finished, few, tmp_path):
    train.main(small_config(few, tmp_path / "again", **QUICK))
    assert_same_run(finished, tmp_path / "again")
    train.main(small_config(few, tmp_path / "other", **QUICK | {"seed": 1, "max_epochs": 1}))
    other = load_checkpoint(tmp_path / "other" / "last.pt")["history"]
    assert comparable(other)[0] != comparable(load_checkpoint(finished / "last.pt")["history"])[0]


def break_off(config, monkeypatch):
    """Train, interrupted inside the second epoch; then resume."""
    original, calls = preprocess.Subvolumes.__getitem__, []

    def interrupted(self, index):
        calls.append(index)
        if self.epoch == 2 and len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(preprocess.Subvolumes, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    monkeypatch.undo()
    assert len(load_checkpoint(config.run_folder / "last.pt")["history"]) == 1
    train.main(train.Config(resume=config.run_folder, device="cpu"))


def test_resume_ends_as_the_unbroken_run(finished, few, tmp_path, monkeypatch):
    """The same weights, bit for bit."""
    break_off(small_config(few, tmp_path / "broken", **QUICK), monkeypatch)
    assert_same_run(finished, tmp_path / "broken")


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_share_of_the_pretrained_weights_stays(ema_decay, finished, few, tmp_path, monkeypatch):
    """What is kept lies between the weights of the beginning and those learnt; resume is exact."""
    how = QUICK | {"pretrained": finished, "pretrained_share": 0.25, "ema_decay": ema_decay}
    train.main(small_config(few, tmp_path / "whole", **how))
    saved, begun = load_checkpoint(tmp_path / "whole" / "last.pt"), load_checkpoint(finished)
    held = saved["averaging_state"]
    for name, learnt in (held["average"] or held["weights"]).items():
        kept, first = saved["network_state"][name], begun["network_state"][name]
        expected = 0.25 * first + 0.75 * learnt if learnt.is_floating_point() else learnt
        assert torch.allclose(kept, expected, atol=1e-6), name
        assert "weight" not in name or not torch.equal(first, learnt)
    best = load_checkpoint(tmp_path / "whole")
    assert best["averaging_state"] is None
    break_off(small_config(few, tmp_path / "broken", **how), monkeypatch)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_resumed_run_keeps_its_settings(finished):
    with pytest.raises(InputError, match="learning_rate differ"):
        train.main(train.Config(resume=finished, learning_rate=0.5))


def test_a_finished_run_is_not_overwritten(finished, few):
    with pytest.raises(InputError, match="holds a run already"):
        train.main(small_config(few, finished))


def test_overfits_one_subvolume(prepared):
    """One sub-volume to Dice > 0.99: data, loss, gradient and metric fit together."""
    config = small_config(prepared, None)
    known = cached(config)
    item = preprocess.Subvolumes(known)[len(known) // 2]
    torch.manual_seed(0)
    model = UNet3D(base_channels=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss_function = train.LOSSES["dice"](torch.ones(2))
    for step in range(100):
        optimizer.zero_grad()
        logits = model(item["image"][None])
        loss_function(logits, item["label"][None]).backward()
        optimizer.step()
        if step % 5 == 4 and dice_metric(predicted_classes(logits)[0], item["label"][0]) > 0.99:
            break
    assert dice_metric(predicted_classes(logits)[0], item["label"][0]) > 0.99


def test_non_finite_loss_stops_with_the_names_of_the_cases(few, tmp_path):
    with pytest.raises(InputError, match=r"the loss became .* in a batch of phantom_"):
        train.main(small_config(few, tmp_path / "run", learning_rate=1e38, gradient_clip=0.0))


def test_augmentation_depends_on_seed_epoch_and_sample_only(prepared):
    config = small_config(prepared, None)
    known = cached(config)
    always = augment_of(config, augment_probability=1.0)
    first, second = (
        preprocess.Subvolumes(known, preprocess.augmentation(always, "cpu"), seed=3)
        for _ in range(2)
    )
    order = [2, 0, 1, 0]
    a = {i: first[i] for i in range(3)}
    for index in order:
        for key in ("image", "label"):
            assert torch.equal(second[index][key], a[index][key])
    assert not torch.equal(a[0]["image"], first.cached[0]["image"].float())
    second.epoch = 1
    assert not torch.equal(second[0]["image"], a[0]["image"])
    assert set(a[1]["label"].unique().tolist()) <= {0.0, 1.0}


def test_the_checkpoint_schema_is_the_table_of_its_page():
    keys = set(inspect.signature(save_checkpoint).parameters) - {"path"}
    page = PAGES["docs/checkpoints.md"]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    in_page = {name.strip(" `") for row in rows for name in row.split(",")}
    assert in_page == keys | {"schema", "versions", "checksum"}


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    for name, save in (
        ("zip.pt", torch.save),
        ("raw.pt", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        save({"schema": 1, "network_state": Evil()}, tmp_path / name)
        with pytest.raises(InputError, match="not a readable checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def test_unusable_checkpoints_are_named(tmp_path, finished):
    with pytest.raises(InputError, match=r"nothing\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "nothing.pt")
    torn = tmp_path / "torn.pt"
    torn.write_bytes((finished / "last.pt").read_bytes()[:-500])
    with pytest.raises(InputError, match=r"torn\.pt: not a readable checkpoint"):
        load_checkpoint(torn)
    torch.save({"schema": 0}, tmp_path / "old.pt")
    with pytest.raises(InputError, match=r"old\.pt: checkpoint schema must be 2, got 0"):
        apply_model.load_model(tmp_path / "old.pt")


def test_wrong_settings_are_refused_before_training(prepared, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="multiple of 8"):
        train.main(small_config(prepared, run, input_size=(36, 36)))
    with pytest.raises(InputError, match="--labels 7: is no label of these data"):
        train.main(small_config(prepared, run, labels={"spleen": ("7",)}))
    with pytest.raises(InputError, match="not found"):
        train.main(small_config(tmp_path, run))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no GPU"):
            train.main(small_config(prepared, run, device="cuda"))
    assert not run.exists()


def test_a_wrong_word_is_refused_with_the_right_ones(capsys):
    assert run_here("train.py", "--optimizer", "adamm") != 0
    told = capsys.readouterr()
    assert "adam" in told.err + told.out


def test_tiny_inputs_train_in_float32_on_a_cpu():
    """There, bfloat16 gradients of torch are partly left unwritten; what is asked for is kept."""
    cpu, settings = torch.device("cpu"), train.Config()
    assert train.safe_precision(settings, cpu, (32, 32, 16)) == "fp32"
    assert train.safe_precision(settings, cpu, (128, 128, 8)) == "fp32"
    assert train.safe_precision(settings, cpu, (64, 64, 16)) == "auto"
    assert train.safe_precision(settings, torch.device("cuda"), (32, 32, 16)) == "auto"
    assert train.safe_precision(train.Config(precision="bf16"), cpu, (32, 32, 16)) == "bf16"
