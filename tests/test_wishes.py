"""Options that other programs have: median spacing, single slices, ImageNet, dropout."""

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import without_pictures
from helpers import chain_of, small_config
from monai.networks.nets import UNet
from torch.nn import functional

import apply_model
import prepare
import train
import utilities
from data.files import InputError
from data.scans import read_volume
from data.settings import check_settings
from data.splits import read_prepared
from data.volumes import find_body
from utilities import SliceBySlice, build_network, load_checkpoint

ARGUMENTS = {"in_channels": 1, "out_channels": 2, "base_channels": 16, "input_size": (32, 32, 32)}


def test_a_network_of_cropped_slices_crops_what_it_is_applied_to(raw_phantoms, tmp_path):
    """The checkpoint says so; the result lies on the whole scan, with the organ in its place."""
    data, run = tmp_path / "prepared", tmp_path / "run"
    with without_pictures():
        prepare.main(prepare.Config(raw_phantoms, data, workers=1, crop_to_body=True))
    train.main(small_config(data, run, max_epochs=1))
    model = apply_model.load_model(run / "last.pt", "cpu", "fp32")
    assert model.chain.crop_to_body
    scan = read_volume(min((raw_phantoms / "imagesTr").iterdir()))
    tensor, to_network = apply_model.preprocess_volume(scan, model.chain, "cpu")
    box = find_body(scan)
    edges = np.array([[part.start, part.stop - 1] for part in box])
    ends = np.diag(to_network)[:2, None] * edges + to_network[:2, 3, None]
    assert np.abs(ends - [[0, n - 1] for n in tensor.shape[1:3]]).max() < 1  # network voxels
    assert apply_model.segment(model, scan).label.shape == scan.shape


def edit_spacing(source, folder):
    """The data with other spacings; the median of the training patients."""
    content = read_prepared(source)
    folder.mkdir()
    (folder / "subvolumes").symlink_to(source / "subvolumes")
    steps = {}
    for number, case in enumerate(content["cases"]):
        far = 100.0 if case["split"] == "training" else 0.5  # the others must not count
        steps[case["case"]] = [4.0 + number, 5.0 + 2 * number, far - number]
    for record in content["subvolumes"]:
        record["spacing_mm"] = steps[record["case"]]
    (folder / "dataset.json").write_text(json.dumps(content))
    chosen = {r["case"] for r in content["subvolumes"] if r["split"] == "training"}
    return np.median([steps[case] for case in chosen], axis=0)


def test_spacing_median_is_that_of_the_training_scans_and_kept_as_numbers(
    few, tmp_path, capsys, monkeypatch
):
    middle = edit_spacing(few, tmp_path / "data")
    config = small_config(tmp_path / "data", tmp_path / "run", spacing="median", max_epochs=1)
    train.main(config)
    assert f"--spacing median: {middle[0]} × {middle[1]} mm" in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    for content in (saved["config"], saved["preprocessing"]):
        assert content["spacing"] == pytest.approx(middle[:2])
    resumed = train.resume_settings(train.Config(resume=tmp_path), tmp_path, saved)
    assert resumed.spacing == saved["config"]["spacing"]


def test_spacing_median_of_patches_has_three_axes(whole_cases, tmp_path):
    middle = edit_spacing(whole_cases, tmp_path / "data")
    config = train.Config(sampling="patches", spacing="median")
    chosen = train.choose_spacing(config, read_prepared(tmp_path / "data"))
    assert chosen.spacing == pytest.approx(middle)


def test_spacing_in_other_words_is_refused():
    check_settings(train.Config(spacing="median"))
    for settings in (train.Config(spacing="mean"), {"spacing": "median"}):  # a checkpoint's
        with pytest.raises(InputError, match="--spacing must be a number"):
            check_settings(settings)


def test_single_slices_with_liver_train_the_2d_network_and_are_applied(
    raw_phantoms, tmp_path, monkeypatch
):
    data, run, results = (tmp_path / name for name in ("slices", "run", "results"))
    with without_pictures():
        prepare.main(prepare.Config(
            source=raw_phantoms, destination=data, subvolume_depth=1, workers=1
        ))  # fmt: skip
    content = read_prepared(data)
    slices = content["subvolumes"]
    assert all(record["shape"][2] == 1 for record in slices)
    assert sum(case["slices"] for case in content["cases"]) > len(slices) > 100  # with liver
    content["subvolumes"] = slices[::16]
    (data / "dataset.json").write_text(json.dumps(content))
    monkeypatch.setattr(  # of 23 million parameters
        utilities, "build_resnet34", lambda i, o, *_: SliceBySlice(UNet(2, i, o, (4, 8), (2,)))
    )
    config = small_config(
        data, run, network="resnet34_unet", overlap=0.0, batch_size=4, max_epochs=1,
        input_size=(64, 32), spacing=(4.0, 4.0),
    )  # fmt: skip
    train.main(config)
    assert load_checkpoint(run)["inference"]["window"] == (64, 32, 1)
    apply_model.main(apply_model.Config(
        split="test", data=data, checkpoint=run, destination=results, device="cpu", precision="fp32"
    ))  # fmt: skip
    with pytest.raises(InputError, match="multiple of 8"):
        train.main(dataclasses.replace(config, network="unet3d", run_folder=tmp_path / "other"))


# ---------------------------------------------------------------------------------------
# ImageNet weights
# ---------------------------------------------------------------------------------------


def torchvision_resnet34(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights as torchvision's `resnet34().state_dict()` names and shapes them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def draw(name, *shape):
        state[name] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5

    def add_norm(name, channels):
        state[f"{name}.weight"] = 0.5 + torch.rand(channels, generator=generator)
        state[f"{name}.bias"] = torch.randn(channels, generator=generator) / 10
        state[f"{name}.running_mean"] = torch.randn(channels, generator=generator) / 10
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    draw("conv1.weight", 64, 3, 7, 7)
    add_norm("bn1", 64)
    before = 64
    for layer, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            draw(f"{name}.conv1.weight", width, before, 3, 3)
            add_norm(f"{name}.bn1", width)
            draw(f"{name}.conv2.weight", width, width, 3, 3)
            add_norm(f"{name}.bn2", width)
            if before != width:
                draw(f"{name}.downsample.0.weight", width, before, 1, 1)
                add_norm(f"{name}.downsample.1", width)
            before = width
    draw("fc.weight", 1000, 512)
    state["fc.bias"] = torch.zeros(1000)
    return state


def run_resnet34(state: dict[str, torch.Tensor], grey: torch.Tensor) -> torch.Tensor:
    """The last features of torchvision's ResNet-34 (option B) of a grey picture (B, 1, X, Y)."""

    def norm(x, name):
        ends = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(state[f"{name}.{end}"] for end in ends))

    x = functional.conv2d(grey.expand(-1, 3, -1, -1), state["conv1.weight"], stride=2, padding=3)
    x = functional.max_pool2d(functional.relu(norm(x, "bn1")), 3, stride=2, padding=1)
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            step = 2 if layer > 1 and block == 0 else 1
            y = functional.conv2d(x, state[f"{name}.conv1.weight"], stride=step, padding=1)
            y = functional.relu(norm(y, f"{name}.bn1"))
            y = norm(functional.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if step == 2:
                x = functional.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
                x = norm(x, f"{name}.downsample.1")
            x = functional.relu(x + y)
    return x


def name_alike(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names and shapes, each tensor of one number, which files keep as one."""
    return {
        name: torch.tensor(float(place)).expand(value.shape)
        for place, (name, value) in enumerate(state.items())
    }


@pytest.fixture(scope="module")
def imagenet():
    return torchvision_resnet34()


@pytest.fixture(scope="module")
def encoder():
    return build_network("resnet34_unet", **ARGUMENTS, projections=True).eval()


def test_an_encoder_with_given_weights_is_that_resnet34(imagenet, encoder, tmp_path, capsys):
    torch.save(imagenet, tmp_path / "torchvision.pth")
    train.begin_with_encoder(encoder, tmp_path / "torchvision.pth")
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = encoder.network.encoder(grey)[-1]
        theirs = run_resnet34(imagenet, grey)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    said = capsys.readouterr().out
    assert "torchvision.pth: 216 weights of the encoder; left out: fc.bias, fc.weight" in said


def test_of_a_whole_unet_of_smp_the_encoder_is_taken(imagenet, encoder, tmp_path, capsys):
    alike = name_alike(imagenet)
    of_smp = {f"encoder.{name}": value for name, value in alike.items() if name[:2] != "fc"}
    of_smp["decoder.blocks.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": of_smp}, tmp_path / "smp.pth")
    train.begin_with_encoder(encoder, tmp_path / "smp.pth")
    taken = encoder.network.encoder.state_dict()
    for name in ("layer3.0.downsample.0.weight", "layer4.2.bn2.running_var"):
        assert torch.equal(taken[name], alike[name])
    assert "left out: decoder.blocks.0.weight" in capsys.readouterr().out


def test_a_run_begins_with_the_encoder_and_its_checkpoint_knows_its_shape(
    few, tmp_path, imagenet, monkeypatch
):
    file = tmp_path / "alike.pth"
    torch.save(name_alike(imagenet), file)
    config = small_config(few, tmp_path, network="resnet34_unet", encoder_weights=file)
    given = (config, read_prepared(few), chain_of(config), torch.device("cpu"))
    run = train.build_run(*given, None)
    weights = run.model.state_dict()["network.encoder.layer2.0.downsample.0.weight"]
    assert weights.unique().numel() == 1
    assert run.carried["network_args"]["projections"] is True
    monkeypatch.setattr(train, "begin_with_encoder", lambda *_: pytest.fail("read once more"))
    monkeypatch.setattr(train.Run, "restore", lambda *_: None)
    train.build_run(*given, {"resumed": True})


def test_a_file_that_is_no_resnet34_is_one_clear_error(imagenet, encoder, tmp_path, checkpoint):
    state = name_alike(imagenet)
    less = {name: value for name, value in state.items() if "layer3.5" not in name}
    broken = state | {"layer1.0.conv1.weight": torch.tensor(float("nan")).expand(64, 64, 3, 3)}
    files = {"list.pth": [1, 2], "less.pth": less, "nan.pth": broken}
    files["wide.pth"] = state | {"layer4.2.bn2.bias": torch.zeros(7)}
    files["plain.pth"] = {n: v for n, v in state.items() if "downsample" not in n}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pth").write_bytes(b"no weights")
    before = encoder.network.encoder.state_dict()["layer1.0.conv1.weight"].clone()
    for path in [*tmp_path.iterdir(), tmp_path / "missing.pth", checkpoint]:
        with pytest.raises(InputError, match=rf"{path.name}: --encoder-weights: no ResNet-34"):
            train.begin_with_encoder(encoder, path)
    after = encoder.network.encoder.state_dict()["layer1.0.conv1.weight"]
    assert torch.equal(before, after)


def test_encoder_weights_of_another_network_are_refused(few, tmp_path):
    config = small_config(few, tmp_path / "run", encoder_weights=tmp_path / "smp.pth")
    with pytest.raises(InputError, match="only --network resnet34_unet has that encoder"):
        train.main(config)


# ---------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", get_args(train.NetworkName))
def test_dropout_is_in_every_network_and_changes_no_name_of_a_weight(name):
    with torch.device("cpu" if name == "swin_unetr" else "meta"):
        plain, network = (build_network(name, **ARGUMENTS, dropout=rate) for rate in (0.0, 0.3))
    shapes = [{n: v.shape for n, v in net.state_dict().items()} for net in (plain, network)]
    assert shapes[0] == shapes[1]
    rates = [m.p for m in network.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    assert 0.3 in rates


def test_dropout_is_of_training_alone():
    torch.manual_seed(0)
    network = build_network("unet3d", **ARGUMENTS | {"base_channels": 4}, dropout=0.5)
    image = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert not torch.equal(network(image), network(image))
        assert torch.equal(network.eval()(image), network(image))


def test_dropout_goes_into_the_checkpoint_and_may_differ_from_the_pretrained(few, tmp_path):
    train.main(small_config(few, tmp_path / "one", max_epochs=1, dropout=0.2))
    saved = load_checkpoint(tmp_path / "one" / "last.pt")
    assert saved["network_args"]["dropout"] == saved["config"]["dropout"] == 0.2
    other = {**saved["network_args"], "out_channels": 3}
    del other["dropout"]
    train.begin_with(build_network(**other), other, tmp_path / "one" / "last.pt")
    with pytest.raises(InputError, match="--dropout"):
        train.main(small_config(few, tmp_path / "three", dropout=1.0))
