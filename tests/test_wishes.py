"""Options that other programs have: median spacing, single slices, ImageNet, dropout."""

import json

import numpy as np
import pytest
import torch
from helpers import build_2d_network, chain_of, copy_prepared, small_config
from helpers import run as prepare
from monai.networks import nets

import apply_model
import train
import utilities
from data.files import InputError, read_json
from data.scans import read_volume
from data.settings import check_settings
from data.splits import read_prepared
from data.volumes import find_body
from utilities import build_network, load_checkpoint

ARGUMENTS = {"in_channels": 1, "out_channels": 2, "base_channels": 16, "input_size": (32, 32, 32)}


def test_a_network_of_cropped_slices_crops_what_it_is_applied_to(raw, tmp_path):
    data, run = tmp_path / "prepared", tmp_path / "run"
    prepare(raw, destination=data, crop_to_body=True)
    train.main(small_config(data, run, max_epochs=1))
    model = apply_model.load_model(run / "last.pt", "cpu", "fp32")
    assert model.chain.crop_to_body
    scan = read_volume(min((raw / "imagesTr").iterdir()))
    tensor, to_network = apply_model.preprocess_volume(scan, model.chain, "cpu")
    edges = np.array([[part.start, part.stop - 1] for part in find_body(scan)])
    ends = np.diag(to_network)[:2, None] * edges + to_network[:2, 3, None]
    assert np.abs(ends - [[0, n - 1] for n in tensor.shape[1:3]]).max() < 1  # network voxels
    assert apply_model.segment(model, scan).label.shape == scan.shape


def edit_spacing(content):
    """Other spacings; keeps the median of the training patients in `content`."""
    steps = {}
    for number, case in enumerate(content["cases"]):
        far = 100.0 if case["split"] == "training" else 10.0  # the others must not count
        steps[case["case"]] = [4.0 + number, 5.0 + 2 * number, far - number]
    for record in content["subvolumes"]:
        record["spacing_mm"] = steps[record["case"]]
    chosen = {r["case"] for r in content["subvolumes"] if r["split"] == "training"}
    content["middle"] = np.median([steps[case] for case in chosen], axis=0).tolist()


def test_spacing_median_is_that_of_the_training_scans_and_kept_as_numbers(few, tmp_path, capsys):
    data = copy_prepared(few, tmp_path / "data", edit_spacing)
    middle = read_prepared(data)["middle"]
    train.main(small_config(data, tmp_path / "run", spacing="median", max_epochs=1))
    assert f"--spacing median: {middle[0]} × {middle[1]} mm" in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    for content in (saved["config"], saved["preprocessing"]):
        assert content["spacing"] == pytest.approx(middle[:2])
    resumed = train.resume_settings(train.Config(resume=tmp_path), tmp_path, saved)
    assert resumed.spacing == saved["config"]["spacing"]
    patches = train.Config(sampling="patches", spacing="median")
    chosen = train.choose_spacing(patches, read_prepared(data)).spacing
    assert chosen == pytest.approx(middle)
    with pytest.raises(InputError, match="--spacing must be"):
        check_settings(train.Config(spacing="mean"))


def test_single_slices_train_the_2d_network_and_are_applied(raw, tmp_path, monkeypatch):
    data, run, results = (tmp_path / name for name in ("slices", "run", "results"))
    prepare(raw, destination=data, subvolume_depth=1)
    content = read_prepared(data)
    for record in content["subvolumes"]:  # only slices with liver
        assert record["shape"][2] == 1 and record["voxels_per_label"].keys() > {"0"}
    content["subvolumes"] = content["subvolumes"][::16]
    (data / "dataset.json").write_text(json.dumps(content))
    monkeypatch.setattr(utilities, "build_resnet34", build_2d_network)
    train.main(small_config(
        data, run, network="resnet34_unet", overlap=0.0, batch_size=4, max_epochs=1,
        input_size=(64, 32), spacing=(4.0, 4.0),
    ))  # fmt: skip
    assert load_checkpoint(run)["inference"]["window"] == (64, 32, 1)
    apply_model.main(apply_model.Config(
        split="test", data=data, checkpoint=run, destination=results, device="cpu", precision="fp32"
    ))  # fmt: skip
    assert len(read_json(results / "results.json")) >= 1


@pytest.fixture(scope="module")
def resnet34():
    """A ResNet-34 whose weights have the names and shapes of torchvision's, for colours."""
    how = {"shortcut_type": "B", "bias_downsample": False, "num_classes": 1000}
    sizes = {"spatial_dims": 2, "n_input_channels": 3, "conv1_t_size": 7, "conv1_t_stride": 2}
    return nets.resnet34(**how, **sizes).eval()


@pytest.fixture(scope="module")
def encoder():
    return build_network("resnet34_unet", **ARGUMENTS, projections=True).eval()


def test_an_encoder_with_given_weights_is_that_resnet34(resnet34, encoder, tmp_path, capsys):
    state, path = resnet34.state_dict(), tmp_path / "torchvision.pth"
    torch.save(state, path)
    train.begin_with_encoder(encoder, path)
    said = capsys.readouterr().out
    assert "torchvision.pth: 216 weights of the encoder; left out: fc.bias, fc.weight" in said
    grey = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        x = resnet34.maxpool(resnet34.act(resnet34.bn1(resnet34.conv1(grey.expand(2, 3, 64, 64)))))
        for layer in (resnet34.layer1, resnet34.layer2, resnet34.layer3, resnet34.layer4):
            x = layer(x)
        ours = encoder.network.encoder(grey)[-1]
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))
    of_smp = {f"encoder.{name}": value + 1 for name, value in state.items() if name[:2] != "fc"}
    torch.save({"state_dict": of_smp | {"decoder.weight": torch.zeros(3)}}, path)
    train.begin_with_encoder(encoder, path)
    taken = encoder.network.encoder.state_dict()
    assert torch.equal(taken["layer4.2.bn2.running_var"], state["layer4.2.bn2.running_var"] + 1)
    assert "left out: decoder.weight" in capsys.readouterr().out


def test_a_run_begins_with_the_encoder_and_keeps_its_shape(few, resnet34, tmp_path, monkeypatch):
    torch.save(resnet34.state_dict(), tmp_path / "a.pth")
    how = {"network": "resnet34_unet", "encoder_weights": tmp_path / "a.pth"}
    config = small_config(few, tmp_path, **how)
    given = (config, read_prepared(few), chain_of(config), torch.device("cpu"))
    run, name = train.build_run(*given, None), "layer2.0.downsample.0.weight"
    taken = run.model.state_dict()[f"network.encoder.{name}"]
    assert torch.equal(taken, resnet34.state_dict()[name])
    assert run.carried["network_args"]["projections"] is True
    monkeypatch.setattr(train, "begin_with_encoder", lambda *_: pytest.fail("read once more"))
    monkeypatch.setattr(utilities.Run, "restore", lambda *_: None)
    train.build_run(*given, {"patients": [], "begun": {"anew": []}})


def test_a_file_that_is_no_resnet34_is_one_clear_error(resnet34, encoder, tmp_path, checkpoint):
    state, name = resnet34.state_dict(), "layer1.0.conv1.weight"
    files = {"list.pth": [1, 2], "nan.pth": state | {name: state[name] * torch.nan}}
    files["less.pth"] = {name: value for name, value in state.items() if "layer3.5" not in name}
    files["wide.pth"] = state | {"layer4.2.bn2.bias": torch.zeros(7)}
    files["plain.pth"] = {n: v for n, v in state.items() if "downsample" not in n}
    for file, content in files.items():
        torch.save(content, tmp_path / file)
    (tmp_path / "text.pth").write_bytes(b"no weights")
    before = encoder.network.encoder.state_dict()[name].clone()
    for path in [*tmp_path.iterdir(), tmp_path / "missing.pth", checkpoint]:
        with pytest.raises(InputError, match=rf"{path.name}: --encoder-weights: no ResNet-34"):
            train.begin_with_encoder(encoder, path)
    assert torch.equal(before, encoder.network.encoder.state_dict()[name])


def test_dropout_goes_into_the_checkpoint_and_may_differ_from_the_pretrained(few, tmp_path):
    train.main(small_config(few, tmp_path, max_epochs=1, dropout=0.2))
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["network_args"]["dropout"] == saved["config"]["dropout"] == 0.2
    other = {**saved["network_args"], "out_channels": 3}
    del other["dropout"]
    train.begin_with(build_network(**other), other, tmp_path / "last.pt")
