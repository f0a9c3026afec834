"""A run knows its patients, its data and its settings, and says whether anything was learnt."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import copy_prepared, small_config, tiny

import apply_model
import train
import utilities
from data.check import identify_scan
from data.files import InputError
from data.pictures import find_best, judge_learning
from data.splits import count_voxels, find_seen, list_patients, read_prepared
from data.volumes import read_file
from utilities import load_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures")


def swap_splits(content, one="training", other="test"):
    for record in [*content["cases"], *content["subvolumes"]]:
        record["split"] = {one: other, other: one}.get(record["split"], record["split"])


def test_a_training_patient_is_never_reported_as_test(checkpoint, prepared, tmp_path):
    def rename(content):
        swap_splits(content)
        content["source"] = "elsewhere"
        for case in content["cases"]:
            case["patient"] = f"new_{case['patient']}"

    how = {"checkpoint": checkpoint, "device": "cpu", "split": "test"}
    apply_model.main(apply_model.Config(data=prepared, destination=tmp_path / "first", **how))
    rows = list(csv.DictReader((tmp_path / "first" / "results.csv").open()))
    assert [row["seen"] for row in rows] == [""]
    for number, edit in enumerate((swap_splits, rename)):
        data = copy_prepared(prepared, tmp_path / f"data_{number}", edit)
        config = apply_model.Config(data=data, destination=tmp_path / "results", **how)
        with pytest.raises(InputError, match=r"4 cases .* made this checkpoint: .*in training"):
            apply_model.main(config)
        assert not (tmp_path / "results").exists()
    config.accept = ("seen",)
    apply_model.main(config)
    rows = list(csv.DictReader((tmp_path / "results" / "results.csv").open()))
    assert [row["seen"] for row in rows] == 4 * ["seen in training"]


def test_a_training_scan_with_a_truth_is_refused_by_its_voxels(checkpoint, prepared, tmp_path):
    cases = {case["split"]: case for case in read_prepared(prepared)["cases"]}
    how = {"checkpoint": checkpoint, "device": "cpu", "destination": tmp_path / "results"}
    for split, seen in (("training", "seen in training"), ("test", "")):
        scan, truth = (tmp_path / f"{split}_{key}.nii.gz" for key in ("image", "label"))
        shutil.copy(cases[split]["image"], scan)
        shutil.copy(cases[split]["label"], truth)
        config = apply_model.Config(paths=(scan,), truth=(truth,), **how)
        if seen:
            with pytest.raises(InputError, match="a patient in the training of the checkpoint"):
                apply_model.main(config)
            config.accept = ("seen",)
        apply_model.main(config)
        rows = csv.DictReader((tmp_path / "results" / "results.csv").open())
        assert {row["case"]: row["seen"] for row in rows}[f"{split}_image"] == seen
    loaded = read_file(scan)
    known = [{"content": identify_scan(loaded), "split": split} for split in cases]
    for patients in (known, known[::-1]):  # one of several networks was trained on the patient
        model = SimpleNamespace(patients=patients)
        with pytest.raises(InputError, match="in the training of"):
            apply_model.judge_seen(model, loaded, scan, accepted=False)


def test_averaged_folds_know_all_their_patients(prepared):
    own = list_patients(content := read_prepared(prepared))
    other = [r | {"split": "training"} for r in own if r["split"] == "validation"]
    (case,) = [record["case"] for record in own if record["split"] == "validation"]
    assert find_seen(content, "validation", own) == {}
    assert find_seen(content, "validation", own + other) == {case: "seen in training"}
    chosen = [r | {"split": "validation", "content": ""} for r in own if r["split"] == "test"]
    assert set(find_seen(content, "test", chosen).values()) == {"seen in validation"}


def test_pretrained_weights_bring_their_patients(begun, few, tmp_path, capsys):
    data = copy_prepared(few, tmp_path / "data", lambda c: swap_splits(c, other="validation"))
    train.main(small_config(data, tmp_path, max_epochs=1, pretrained=begun))
    assert "was trained on 4 validation cases (phantom_000" in capsys.readouterr().out
    known = load_checkpoint(tmp_path)["patients"]
    assert len(known) == 2 * len(read_prepared(few)["cases"]) == 12
    assert {*known[0]} == {"patient", "case", "split", "content", "source"}
    with pytest.raises(InputError, match="must be the same network"):
        train.main(small_config(few, tmp_path / "other", base_channels=8, pretrained=begun))


def test_a_resume_takes_the_same_data_alone_from_anywhere(begun, few, tmp_path, monkeypatch):
    for name, edit, told in (
        ("thin", lambda content: content["subvolumes"].pop(), "began with.*is missing"),
        ("other", lambda content: swap_splits(content, other="validation"), "began.*is validation"),
        ("mr", lambda content: content["settings"].update(modality="MR"), "modality or crop"),
    ):
        data = copy_prepared(few, tmp_path / name, edit)
        with pytest.raises(InputError, match=told):
            train.main(train.Config(resume=begun, data=data, max_epochs=2))
    run = shutil.copytree(begun, tmp_path / "run")
    data = shutil.copytree(few, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train.main(train.Config(resume=run, data=data, max_epochs=2, device="cpu"))
    assert load_checkpoint(run / "last.pt")["epoch"] == 2


def test_a_run_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "project" / "data" / "prepared").mkdir(parents=True)
    run = tmp_path / "project" / "checkpoints" / "liver"
    settings = {"data": "data/prepared", "run_folder": "checkpoints/liver"}
    monkeypatch.chdir(tmp_path)
    assert train.find_data(settings, run) == tmp_path / "project" / "data" / "prepared"


@pytest.mark.parametrize("damage", ["voxels", "truncated", "missing"])
def test_a_prepared_file_that_was_changed_is_named(few, tmp_path, damage):
    data = shutil.copytree(few, tmp_path / "data")
    split = "validation" if damage == "voxels" else "training"
    record = next(r for r in read_prepared(data)["subvolumes"] if r["split"] == split)
    path = data / record["image"]
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(whole[:500] if damage == "truncated" else whole[:-1] + b"\7")
    with pytest.raises(InputError, match=rf"{path.name}: was changed .*prepare it again"):
        train.main(small_config(data, tmp_path / "run"))


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("cosine", [1, 0.8536, 0.5, 0.1464]), ("poly", [1, 0.7719, 0.5359, 0.2872])],
)
def test_more_epochs_go_on_at_the_rate_of_their_schedule(
    few, tmp_path, schedule, factors, monkeypatch
):
    """Poly and cosine end at 0: an epoch more at that rate would learn nothing; best.pt stays."""
    used, step, dice = [], utilities.train_step, iter((0.5, 0.9, 0.7, 0.8))

    def watch(run, *given):
        used.append(run.optimizer.param_groups[0]["lr"])
        return step(run, *given)

    monkeypatch.setattr(utilities, "train_step", watch)
    row = {"val_loss": 0.5, "val_chance": 0.1}
    monkeypatch.setattr(utilities, "validate", lambda *_: row | {"val_dice": next(dice)})
    train.main(small_config(few, tmp_path, max_epochs=1, schedule=schedule, learning_rate=8e-3))
    train.main(train.Config(resume=tmp_path, max_epochs=4, device="cpu"))
    rates = [row["learning_rate"] for row in load_checkpoint(tmp_path / "last.pt")["history"]]
    assert rates == pytest.approx([8e-3 * factor for factor in factors], rel=1e-3)
    assert [*dict.fromkeys(used)] == rates
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 2


def test_an_edited_config_is_used_or_refused_and_versions_named(begun, tmp_path, capsys):
    run = shutil.copytree(begun, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"learning_rate": 0.5}))
    with pytest.raises(InputError, match="but learning_rate differ"):
        train.main(train.Config(resume=run, device="cpu"))
    (run / "config.json").write_text(json.dumps(settings | {"learning_rat": 0.5}))
    with pytest.raises(InputError, match="no such setting: learning_rat"):
        train.main(train.Config(resume=run, device="cpu"))
    (run / "config.json").write_text(json.dumps(settings | {"max_epochs": 2}))
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["versions"]["torch"] = "1.0"
    saved["begun"] |= {"processes": 2}
    saved["begun"]["defaults"]["loss"] = "ce"
    torch.save(saved, run / "last.pt")
    train.main(train.Config(resume=run, device="cpu"))
    told = capsys.readouterr().out
    assert "used: max_epochs 2" in told and "not used: train.py now has loss dice" in told
    assert "torch 1.0, now 2" in told and "processes 2, now 1" in told
    assert load_checkpoint(run / "last.pt")["epoch"] == 2


def histories(losses, dice, rate=1e-3, chance=0.15):
    return [
        {"epoch": n, "train_loss": loss, "val_loss": loss, "val_dice": d, "val_chance": chance,
         "learning_rate": rate}
        for n, (loss, d) in enumerate(zip(losses, dice, strict=True), start=1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "losses", "dice", "rate"),
    [
        ("nothing learnt: .*lower --learning-rate", [0.9, 0.92, 0.92], [0.1569] * 3, 10.0),
        ("nothing learnt: .*raise --learning-rate", [0.9, 0.9, 0.899], [0.2, 0.25, 0.25], 1e-9),
        ("nothing learnt: .*--show", [0.91, 0.9, 0.905], [0.16, 0.15, 0.16], 1e-3),
        ("nothing learnt yet: .*more --max-epochs", [0.9, 0.7, 0.5], [0.0, 0.0, 0.0], 1e-3),
        ("little learnt: .*--show", [0.9, 0.83, 0.82], [0.1, 0.255, 0.214], 5e-3),
        ("learnt", [0.8, 0.3, 0.1, 0.1], [0.5, 0.9, 0.95, 0.95], 1e-3),
        ("still rising", [0.8, 0.6, 0.5, 0.4], [0.2, 0.4, 0.6, 0.7], 1e-3),
        ("learnt", [0.1, 0.1, 0.1, 0.1], [0.93, 0.93, 0.94, 0.935], 1e-3),  # from weights
        ("learnt", [0.9, 0.4, 0.2, 0.1], [0.3, 0.8, 0.7, 0.65], 1e-3),
        ("still rising", [0.8], [0.33], 1e-3),  # an epoch alone tells no fall of the loss
        ("nothing learnt: .*--show", [0.8], [0.16], 1e-3),
        ("still rising", [0.9, 0.85], [0.0, 0.33], 1e-3),
        ("learnt", [0.9, 0.4, 0.2], [np.nan, np.nan, 0.93], 1e-3),  # validated once
    ],
)
def test_the_verdict_says_whether_anything_was_learnt(word, losses, dice, rate):
    assert re.match(word, judge_learning(histories(losses, dice, rate)))


def test_without_validation_the_loss_tells():
    rows = [{"epoch": n, "train_loss": x, "learning_rate": 1e-3} for n, x in ((1, 0.9), (2, 0.5))]
    assert judge_learning(rows).startswith("learnt: training loss 0.9000 → 0.5000")
    assert judge_learning(rows[:1] + rows[:1]).startswith("nothing learnt")


def test_of_equal_dice_the_lower_loss_is_best():
    assert find_best(histories([0.9, 0.5, 0.7], [0.0, 0.0, 0.0])) == (2, 1)
    assert find_best(histories([0.9, 0.5, 0.7], [0.0, 0.1, 0.2])) == (3, 0)


def test_the_hu_of_each_class_are_compared_with_the_window(few, tmp_path, capsys):
    train.main(small_config(few, tmp_path, max_epochs=1, hu_window=(300.0, 1500.0)))
    told = capsys.readouterr().out
    assert "--hu-window 300 1500\nwarning: this window paints liver black" in told
    assert "liver: median 1" in told  # phantoms' liver has 100 HU and more


def test_hours_on_a_cpu_are_foretold(few, tmp_path, monkeypatch, capsys):
    """Two steps of two sub-volumes, 100 epochs, three passes each: 1,200 passes of 9 s are 3 h."""
    monkeypatch.setattr(utilities, "time_forward", lambda *_: 9.0)
    monkeypatch.setattr(utilities, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        train.main(small_config(few, tmp_path, max_epochs=100, batch_size=2))
    assert "about 3:00:00 on this CPU; the laptop recipe takes minutes" in capsys.readouterr().out


def test_voxels_that_nobody_judged_are_no_background():
    records = [{"split": "training", "voxels_per_label": {"0": 60, "1": 20, "255": 900, "9": 20}}]
    labels = {"background": (0,), "liver": (1,)}
    prepared = {"subvolumes": records, "ignore": [9]}
    assert count_voxels(prepared, labels, "training").tolist() == [60, 20]
    weights = train.class_weights(prepared, labels)  # as 1 / √60 to 1 / √20, their mean is 1
    assert weights.tolist() == pytest.approx([0.7321, 1.2679], abs=1e-4)


def test_the_recipe_laptop_starts_with_other_classes(whole_cases, tmp_path):
    """Half of the starter's weights are kept, but for a head of another number of classes."""
    classes = {"liver": ("liver",), "tumour": ("tumour",)}
    train.main(tiny("laptop", None, whole_cases, tmp_path, max_epochs=1, labels=classes))
    saved = load_checkpoint(tmp_path / "last.pt")
    first, learnt = load_checkpoint(ROOT / "checkpoints" / "starter.pt"), saved["resume"]["model"]
    head = set(saved["begun"]["anew"])
    assert head
    for name, weights in saved["network_state"].items():
        if weights.is_floating_point():
            start = learnt[name] if name in head else first["network_state"][name]
            assert torch.allclose(weights, learnt[name].lerp(start, 0.5), atol=1e-6), name


def test_checkpoints_with_other_content_are_one_message(begun, tmp_path):
    saved, path = torch.load(begun / "last.pt", weights_only=True), tmp_path / "last.pt"
    state, bias = saved["network_state"], "head.bias"
    variance = next(name for name in state if name.endswith("running_var"))
    two, chain = torch.zeros(2), saved["preprocessing"]
    odd = (two.to_sparse(), two.to("meta"), "text", two.to(torch.float8_e4m3fn))
    biases = [(value, "no plain tensors") for value in odd]
    biases += [(torch.tensor([1.0, value]), "not numbers") for value in (np.nan, np.inf)]
    cases = [({"network_state": state | {bias: value}}, told) for value, told in biases]
    cases += [
        ({"schema": 1}, "schema must be 2, got 1; train it again"),
        ({"schema": 3}, "schema must be 2, got 3; update this program"),
        ({"network_state": None}, "network_state has the wrong type"),
        ({"declared": [1]}, "declared has the wrong type, got list"),
        ({"inference": {"window": (32, 32, 16), "overlap": 1.0}}, "--overlap must be a number"),
        ({"inference": {}}, "inference: window is missing"),
        ({"patients": None}, "patients has the wrong type"),
        ({"versions": None}, "versions has the wrong type"),
        ({"modality": "x"}, "--modality must be"),
        ({"config": {}}, "config: data is missing"),
        ({"config": saved["config"] | {"spacing": (0.0, 1.0)}}, "--spacing must be a number"),
        ({"network_state": state | {variance: -state[variance] - 1}}, "negative variance"),
        ({"expected": {"liver": {"log_ml": 7.0, "sd": 0.0}}}, "--sd must be"),
        ({"expected": {"liver": {"log_ml": np.nan, "sd": 1.0}}}, "--log-ml must be"),
        ({"preprocessing": chain | {"labels": {"liver": ("x",)}}}, "--labels must be"),
        ({"preprocessing": chain | {"sampling": "words"}}, "--sampling must be"),
        ({"preprocessing": chain | {"hu_window": (250.0, -200.0)}}, "--hu-window must be"),
        ({"declared": {"liver": "x"}}, "--declared must be"),
        ({"patients": [{"case": 1}]}, "patients: patient is missing"),
        ({"network_args": saved["network_args"] | {"base_channels": -1}}, "--base-channels must"),
    ]
    for changes, message in cases:
        torch.save(saved | changes, path)
        with pytest.raises(InputError, match=rf"last\.pt: .*{message}"):
            load_checkpoint(path)


@pytest.mark.parametrize("key", ["random", "optimizer", "counts", "losses", "model"])
def test_a_damaged_state_is_one_message_at_resume(begun, tmp_path, key):
    run = shutil.copytree(begun, tmp_path / "run")
    saved = torch.load(run / "last.pt", weights_only=True)
    damaged = {"random": torch.zeros(3), "counts": "x", "losses": ["x"]}.get(key, {})
    torch.save(saved | {"resume": saved["resume"] | {key: damaged}}, run / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt: its state cannot be resumed .*--pretrained"):
        train.main(train.Config(resume=run, device="cpu", max_epochs=2))


def test_a_dataset_json_that_prepare_did_not_write_is_one_message(few, tmp_path):
    content = read_prepared(few)
    less = {key: value for key, value in content.items() if key != "subvolume_depth"}
    for text, message in (
        ("words", "must be what prepare.py wrote"),
        ("[]", "must be a dictionary, got list"),
        ("{}", "schema is missing"),
        ('{"schema": 99}', "got 99; update this program"),
        (json.dumps(less), "subvolume_depth is missing; prepare the data again"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=rf"dataset\.json: .*{message}"):
            read_prepared(tmp_path)
    piece, case = content["subvolumes"][0], content["cases"][0]
    other = next(c["split"] for c in content["cases"] if c["split"] != case["split"])
    for entry, changes, message in (
        (content, {"labels": {"liver": ["x"]}}, "--labels must be a number"),
        (content, {"ignore": "x"}, "--ignore must be"),
        (content, {"subvolume_depth": 8}, "shape must be of 8 slices"),
        (content, {"settings": {"folds": "x"}}, "--folds must be a number"),
        (content, {"settings": {"label_every": 0}}, "--label-every must be a number"),
        (piece, {"image": piece["label"], "label": piece["image"]}, "its case's file"),
        (piece, {"first_slice": 3}, "its case's file image_0003"),
        (piece, {"voxels_per_label": {"0": -5}}, "must be a number 0 <= x"),
        (piece, {"voxels_per_label": {"liver": 5}}, "must count label values"),
        (piece, {"shape": [48, 48]}, "--shape must be"),
        (piece, {"spacing_mm": [1.0, 1.0, 0.0]}, "--spacing-mm must be a number 0 < x"),
        (piece, {"split": "train"}, "--split must be"),
        (case, {"case": "nobody"}, "belongs to no case"),
        (case, {"split": other}, "is in two splits"),
    ):
        before = dict(entry)
        entry |= changes
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        entry |= before
        with pytest.raises(InputError, match=rf"dataset\.json: .*{message}") as error:
            read_prepared(tmp_path)
        assert "prepare the data again" in str(error.value)


@pytest.mark.parametrize("ranks", ["x 1", "0 0", "3 2", "-1 2", "1", " 2"])
def test_impossible_processes_are_refused(monkeypatch, ranks):
    for key, value in zip(("RANK", "WORLD_SIZE"), ranks.split(" "), strict=False):
        if value:
            monkeypatch.setenv(key, value)
    for main, config in ((apply_model.main, apply_model.Config()), (train.main, train.Config())):
        with pytest.raises(InputError, match="RANK must be 0 to WORLD_SIZE"):
            main(config)
