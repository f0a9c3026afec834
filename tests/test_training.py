"""Training learns, repeats itself, resumes exactly after any kill, and writes what it promises."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from children import run_child, train_or_resume
from conftest import run_here
from helpers import assert_same_run, augment_of, cached, chain_of, small_config, tiny
from scipy.ndimage import center_of_mass

import preprocess
import train
import utilities
from data.evaluate import dice_metric
from data.files import InputError
from data.splits import read_prepared
from utilities import UNet3D, load_checkpoint, pick_precision, predict_classes

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
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert json.loads((finished / "config.json").read_text())["base_channels"] == 4
    best = load_checkpoint(finished / "best.pt")
    assert best["val_dice"] == max(row["val_dice"] for row in best["history"])
    assert best["resume"] is None


def test_killed_at_any_moment_and_resumed_is_the_unbroken_run(few, tmp_path):
    """SIGKILL within steps and writes: the same bits at the end, and never a torn checkpoint."""
    unbroken, broken = (small_config(few, tmp_path / name) for name in ("unbroken", "broken"))
    train.main(unbroken)
    # Two steps an epoch. Writes: settings, and of an epoch best.pt, table, two pictures and
    # last.pt: the first epoch is finished at the second death.
    moments = [("write", 6), ("step", 3), ("write", 4)]
    for moment in moments:
        assert run_child(train_or_resume, vars(broken), moment) == -signal.SIGKILL, moment
        for name in ("best.pt", "last.pt"):  # complete, or not there yet
            if (broken.run_folder / name).exists():
                load_checkpoint(broken.run_folder / name)
    assert run_child(train_or_resume, vars(broken)) == 0
    assert_same_run(unbroken.run_folder, broken.run_folder)


def test_control_c_finishes_the_step_and_resume_goes_on_from_there(few, tmp_path, monkeypatch):
    """Dropout draws from torch's random numbers, which the checkpoint holds too."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    how = {"max_epochs": 2, "batch_size": 1, "dropout": 0.2}
    train.main(small_config(few, whole, **how))
    original, calls = preprocess.Subvolumes.make_batch, []

    def press_control_c(self, indices):
        if self.epoch == 2 and self.augment:
            calls.append(indices)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, indices)

    monkeypatch.setattr(preprocess.Subvolumes, "make_batch", press_control_c)
    with pytest.raises(KeyboardInterrupt, match=r"go on with: python train\.py --resume"):
        train.main(small_config(few, stopped, **how))
    monkeypatch.undo()
    saved = load_checkpoint(stopped / "last.pt")
    assert saved["epoch"] == 1
    assert 0 < len(saved["resume"]["losses"]) < 4  # in the middle of the second epoch
    train.main(train.Config(resume=stopped, device="cpu"))
    assert_same_run(whole, stopped)


def test_a_share_of_the_pretrained_weights_stays(finished, few, tmp_path):
    """The weights that are kept lie between the first ones and those learnt; resume is exact, and
    does without the file of the first ones."""
    start = shutil.copy(finished / "best.pt", tmp_path / "start.pt")
    how = QUICK | {"pretrained": start, "pretrained_share": 0.25, "schedule": "constant"}
    how |= {"max_epochs": 2}
    train.main(small_config(few, tmp_path / "whole", **how))
    saved, begun = load_checkpoint(tmp_path / "whole" / "last.pt"), load_checkpoint(finished)
    held = saved["resume"]["model"]
    for name, first in begun["network_state"].items():
        kept, learnt = saved["network_state"][name], held[name]
        expected = 0.25 * first + 0.75 * learnt if learnt.is_floating_point() else learnt
        assert torch.allclose(kept, expected, atol=1e-6), name
        assert "weight" not in name or not torch.equal(first, learnt)
    train.main(small_config(few, tmp_path / "broken", **how | {"max_epochs": 1}))
    start.unlink()
    train.main(train.Config(resume=tmp_path / "broken", device="cpu", max_epochs=2))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    resumed = load_checkpoint(tmp_path / "broken" / "last.pt")
    assert resumed["config"]["pretrained"] == saved["config"]["pretrained"] == str(start)


def test_a_resumed_run_keeps_its_settings(finished, few, capsys):
    """Settings that are given by hand are compared, even if they equal a default."""
    with pytest.raises(InputError, match="learning_rate differ"):
        train.main(train.Config(resume=finished, learning_rate=0.5))
    config = train.Config(resume=finished)
    config.given = frozenset({"resume", "base_channels", "max_epochs"})
    with pytest.raises(InputError, match="but base_channels differ"):
        train.main(config)
    with pytest.raises(InputError, match="holds a run already"):
        train.main(small_config(few, finished))
    before = (finished / "last.pt").read_bytes()
    train.main(train.Config(resume=finished / "last.pt"))
    assert "finished after 2 epochs; train on with more --max-epochs" in capsys.readouterr().out
    assert (finished / "last.pt").read_bytes() == before


def test_overfits_one_subvolume(prepared):
    """One sub-volume to Dice > 0.99: data, loss, gradient and metric fit together."""
    known = cached(small_config(prepared, None))
    item = preprocess.Subvolumes(known)[len(known) // 2]
    torch.manual_seed(0)
    model = UNet3D(base_channels=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss_function, dice = train.LOSSES["dice"](torch.ones(2)), 0.0
    for step in range(100):
        optimizer.zero_grad()
        logits = model(item["image"][None])
        loss_function(logits, item["label"][None]).backward()
        optimizer.step()
        if step % 5 == 4:
            dice = dice_metric(predict_classes(logits)[0], item["label"][0])
            if dice > 0.99:
                break
    assert dice > 0.99


def test_non_finite_loss_stops_with_the_names_of_the_cases(few, tmp_path):
    with pytest.raises(InputError, match=r"the loss became .* in a batch of phantom_"):
        train.main(small_config(few, tmp_path / "run", learning_rate=1e38, gradient_clip=0.0))


def test_augmentation_depends_on_seed_epoch_and_sample_only(prepared):
    config = small_config(prepared, None)
    known, always = cached(config), augment_of(config, augment_probability=1.0)
    first, second = (preprocess.Subvolumes(known, always, seed=3) for _ in range(2))
    a = {index: first[index] for index in range(3)}
    for index in (2, 0, 1, 0):
        assert torch.equal(second[index]["image"], a[index]["image"])
        assert torch.equal(second[index]["label"], a[index]["label"])
    assert not torch.equal(a[0]["image"], known[0]["image"].float())
    second.epoch = 1
    assert not torch.equal(second[0]["image"], a[0]["image"])
    assert set(a[1]["label"].unique().tolist()) <= {0.0, 1.0}
    other = preprocess.Subvolumes(known, always, seed=4)
    assert not torch.equal(other[0]["image"], a[0]["image"])
    orders = []
    for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1)):
        loader = preprocess.SubvolumeLoader(first, 1, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        orders.append([batch["index"] for batch in loader])
    assert orders[0] == orders[1] and orders[0] not in orders[2:]


CHANGES = ("rotation_degrees", "translation", "scaling", "noise_sd", "intensity_scaling",
           "intensity_shift")  # fmt: skip


def test_augmentation_is_as_strong_as_its_settings(prepared):
    """Of 200 pictures that are changed in one way alone, the largest change is the setting's."""
    image = np.zeros((40, 40), np.float32)
    image[22:32, 5:25] = 0.5
    x, y = np.array(center_of_mass(image)) - 19.5

    def turn(picture):
        there = np.array(center_of_mass(picture)) - 19.5
        return np.degrees(np.arctan2(*there) - np.arctan2(x, y))

    def draw(setting, value):
        off = {"augment_probability": 1.0, "input_size": (40, 40), **dict.fromkeys(CHANGES, 0.0)}
        given = torch.tensor(image).expand(200, 1, 40, 40)[..., None]
        rngs = [np.random.default_rng(seed) for seed in range(200)]
        augment = augment_of(small_config(prepared, None), **off | {setting: value})
        made, label = preprocess.augment_batch(given, given, augment, rngs)
        assert ((made > 0.25) == (label > 0.25)).float().mean() > 0.98, "warped apart"
        return made[:, 0, ..., 0].numpy()

    for setting, value, most, measure in (
        ("rotation_degrees", 15.0, 15, turn),
        ("translation", 0.1, 4, lambda picture: center_of_mass(picture)[0] - 19.5 - x),
        ("translation", 0.1, 4, lambda picture: center_of_mass(picture)[1] - 19.5 - y),
        ("scaling", 0.2, 0.2, lambda picture: 5 / picture[:, 15].sum() - 1),
        ("noise_sd", 0.02, 0.02, lambda picture: (picture - image).std()),
        ("intensity_scaling", 0.15, 0.15, lambda picture: 2 * picture.max() - 1),
        ("intensity_shift", 0.1, 0.1, lambda picture: picture[0, 0]),
    ):
        largest = max(abs(measure(picture)) for picture in draw(setting, value))
        assert 0.93 * most < largest < 1.06 * most, (setting, largest)
    assert np.allclose(draw("flip_probability", 1.0), image[::-1], atol=1e-4), "left-right alone"


def test_training_is_in_train_mode_and_validation_is_not(few, tmp_path, monkeypatch):
    ask, seen = utilities.Run.ask, set()

    def watch(run, network, image):
        seen.add((torch.is_grad_enabled(), network.training))
        return ask(run, network, image)

    monkeypatch.setattr(utilities.Run, "ask", watch)
    train.main(small_config(few, tmp_path, max_epochs=2))
    assert seen == {(True, True), (False, False)}


def test_what_a_training_begins_with(whole_cases, tmp_path, monkeypatch):
    """Three patches of each training case by the seed; validation cases as they are."""
    given = []
    monkeypatch.setattr(utilities, "train", lambda *them, **_: given.append(them) or 1 / 0)
    for seed in (1, 2, 2):
        how = {"patches_per_case": 3, "seed": seed}
        config = tiny("liver-tumour-ce", None, whole_cases, tmp_path, **how)
        with pytest.raises(ZeroDivisionError):
            train.main(config)
    one, two, again = (run.model.head.weight for run, *_ in given)
    assert torch.equal(two, again) and not torch.equal(one, two)
    _, training, validation, _ = given[-1]
    assert (training.seed, training.dataset.seed, training.shuffle) == (2, 2, True)
    split = {record["case"]: record["split"] for record in read_prepared(whole_cases)["cases"]}
    cases = [item["case"] for item in training.dataset.cached]
    assert {case for case in split if split[case] == "training"} == {*cases}
    assert len(training.dataset) == 3 * len(cases)
    for batch, item in zip(validation, cached(config, "validation"), strict=True):
        assert torch.equal(batch["image"][0], item["image"].float())


def test_wrong_settings_are_refused_before_training(prepared, tmp_path, capsys):
    run = tmp_path / "run"
    for change, message in (
        ({"input_size": (36, 36)}, "unet3d must be a multiple of 8"),
        ({"input_size": (40, 40), "network": "unet"}, "unet must be a multiple of 16"),
        ({"input_size": (48, 48), "network": "resnet34_unet"}, "must be a multiple of 32"),
        ({"sampling": "patches"}, "--subvolume-depth 0"),
        ({"spacing": (1.0, 1.0, 1.0)}, "--spacing of subvolumes must be x y"),
        ({"input_size": (16, 16), "network": "unet"}, "a single one after the poolings"),
        ({"labels": {"spleen": ("7",)}}, "--labels 7: is no label of these data"),
        ({"data": tmp_path}, "not found"),
        ({"pretrained_share": 0.5}, "keeps a share of --pretrained; give it"),
        ({"encoder_weights": tmp_path / "a.pth"}, "only --network resnet34_unet has that encoder"),
    ):
        with pytest.raises(InputError, match=message):
            train.main(small_config(prepared, run, **change))
    assert not run.exists()
    assert run_here("train.py", "--optimizer", "adamm") != 0
    told = capsys.readouterr()
    assert "adam" in told.err + told.out


def test_tiny_inputs_train_in_float32_on_a_cpu():
    """There, bfloat16 gradients of torch are partly left unwritten; what is asked for is kept."""
    cpu, asked = torch.device("cpu"), train.Config(precision="bf16")
    usual = pick_precision("auto", cpu)
    assert train.choose_precision(train.Config(), cpu, (32, 32, 16)) == torch.float32
    assert train.choose_precision(train.Config(), cpu, (128, 128, 8)) == torch.float32
    assert train.choose_precision(train.Config(), cpu, (64, 64, 16)) == usual
    assert train.choose_precision(asked, cpu, (32, 32, 16)) == torch.bfloat16


def test_tensorboard_shows_the_history(few, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(small_config(few, tmp_path, max_epochs=2, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("val_dice")
    history = load_checkpoint(tmp_path / "last.pt")["history"]
    assert [e.value for e in events] == pytest.approx([row["val_dice"] for row in history])


def test_options_reach_the_optimizer(few, tmp_path):
    for options in ({"optimizer": "adamw", "weight_decay": 0.2, "amsgrad": True}, {}):
        config = small_config(few, tmp_path, **options)
        run = train.build_run(
            config, read_prepared(few), chain_of(config), torch.device("cpu"), None
        )
        defaults = run.optimizer.defaults
        assert defaults["weight_decay"] == options.get("weight_decay", 0)
        assert defaults["amsgrad"] is options.get("amsgrad", False)
