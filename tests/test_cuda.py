"""On a GPU: the same voxels, the same training, the same label maps as on the CPU; else skipped."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import augment_of, chain_of, tiny

import apply_model
import train
from data.evaluate import dice_metric
from data.labels import IMAGE, LABEL
from data.splits import read_prepared
from data.volumes import read_file
from preprocess import Subvolumes, augmentation, cache_split
from utilities import load_checkpoint

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
MODES = pytest.mark.parametrize("name", ["liver-unet3d", "liver-tumour-ce"])


@MODES
def test_the_cache_lies_on_the_gpu_and_equals_the_cpus(name, prepared, whole_cases, tmp_path):
    config = tiny(name, prepared, whole_cases, tmp_path)
    content = read_prepared(config.data)
    caches = [
        cache_split(content, config.data, "training", chain_of(config), torch.device(d))
        for d in ("cpu", GPU)
    ]
    for one, other in zip(*caches, strict=True):
        assert other[IMAGE].device.type == torch.device(GPU).type
        assert (one[IMAGE].float() - other[IMAGE].cpu().float()).abs().max() < 2e-3
        assert (one[LABEL] == other[LABEL].cpu()).float().mean() > 0.9999


@MODES
def test_augmentation_runs_where_the_cache_lies(name, prepared, whole_cases, tmp_path):
    config = tiny(name, prepared, whole_cases, tmp_path, augment_probability=1.0)
    samples = []
    for device in ("cpu", GPU):
        place = torch.device(device)
        content = read_prepared(config.data)
        known = cache_split(content, config.data, "training", chain_of(config), place)
        augment = augmentation(augment_of(config, noise_sd=0.0), place)
        samples.append(Subvolumes(known, augment, seed=3)[0])
    assert samples[1][IMAGE].device.type == torch.device(GPU).type
    difference = (samples[0][IMAGE] - samples[1][IMAGE].cpu()).abs()
    assert difference.mean() < 2e-3
    assert (samples[0][LABEL] == samples[1][LABEL].cpu()).float().mean() > 0.999


@MODES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trains_resumes_and_applies(name, precision, prepared, whole_cases, tmp_path):
    """Half precision and its gradient scaling, a resumed run, and label maps as the CPU's."""
    run = tmp_path / "run"
    how = {"device": GPU, "precision": precision, "input_size": (64, 64), "spacing": (4.0, 4.0)}
    if name == "liver-tumour-ce":
        how |= {"input_size": (64, 64, 16), "spacing": (4.0, 4.0, 5.0)}
    config = tiny(name, prepared, whole_cases, run, learning_rate=5e-3, max_epochs=3, **how)
    train.main(config)
    train.main(train.Config(resume=run, device=GPU, max_epochs=6))
    history = load_checkpoint(run / "last.pt")["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    labels = []
    for device in ("cpu", GPU):
        settings = apply_model.Config(
            split="test", data=config.data, checkpoint=run / "last.pt", device=device,
            destination=tmp_path / device, precision="fp32",
        )  # fmt: skip
        apply_model.main(settings)
        paths = sorted((tmp_path / device).glob("*/*_label.nii.gz"))
        labels.append([read_file(path).read() for path in paths])
    for one, other in zip(*labels, strict=True):
        assert one.shape == other.shape
        assert np.nan_to_num(dice_metric(one, other, 3), nan=1.0).min() > 0.99


def test_a_compiled_network_trains(prepared, tmp_path):
    config = tiny("liver-unet3d", prepared, None, tmp_path / "run", device=GPU, compile=True)
    train.main(dataclasses.replace(config, max_epochs=1))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["history"][0]["train_loss"] > 0
