"""On a GPU: the same voxels, the same training, the same label maps as on the CPU; else skipped."""

import numpy as np
import pytest
import torch
from helpers import augment_of, cached, tiny

import apply_model
import train
from data.evaluate import dice_metric
from data.labels import IMAGE, LABEL
from data.volumes import read_file
from preprocess import Subvolumes, augmentation
from utilities import load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
MODES = pytest.mark.parametrize("name", ["liver-unet3d", "liver-tumour-ce"])


@MODES
def test_cache_and_augmentation_lie_on_the_gpu_and_equal_the_cpus(
    name, prepared, whole_cases, tmp_path
):
    config = tiny(name, prepared, whole_cases, tmp_path, augment_probability=1.0)
    made = []
    for device in ("cpu", "cuda"):
        known = cached(config, device=device)
        augment = augmentation(augment_of(config, noise_sd=0.0), device)
        made.append([*known, Subvolumes(known, augment, seed=3)[0]])
    for one, other in zip(*made, strict=True):
        assert other[IMAGE].device.type == "cuda"
        assert (one[IMAGE].float() - other[IMAGE].cpu().float()).abs().mean() < 2e-3
        assert (one[LABEL] == other[LABEL].cpu()).float().mean() > 0.999


@MODES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trains_resumes_and_applies(name, precision, prepared, whole_cases, tmp_path):
    """Half precision and its gradient scaling, a resumed run, and label maps as the CPU's."""
    run, depth = tmp_path / "run", (16,) if name == "liver-tumour-ce" else ()
    how = {"device": "cuda", "precision": precision, "learning_rate": 5e-3, "max_epochs": 3}
    how |= {"input_size": (64, 64, *depth), "spacing": (4.0, 4.0, 5.0)[: 2 + len(depth)]}
    config = tiny(name, prepared, whole_cases, run, **how)
    train.main(config)
    train.main(train.Config(resume=run, device="cuda", max_epochs=6))
    history = load_checkpoint(run / "last.pt")["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    labels = []
    for device in ("cpu", "cuda"):
        apply_model.main(apply_model.Config(
            split="test", data=config.data, checkpoint=run / "last.pt", device=device,
            destination=tmp_path / device, precision="fp32",
        ))  # fmt: skip
        paths = sorted((tmp_path / device).glob("*/*_label.nii.gz"))
        labels.append([read_file(path).read() for path in paths])
    for one, other in zip(*labels, strict=True):
        assert np.nan_to_num(dice_metric(one, other, 3), nan=1.0).min() > 0.99


def test_a_compiled_network_trains_and_keeps_a_share_when_resumed(prepared, checkpoint, tmp_path):
    how = {"compile": True, "pretrained": checkpoint, "pretrained_share": 0.5}
    config = tiny("liver-unet3d", prepared, None, tmp_path, device="cuda", max_epochs=1, **how)
    train.main(config)
    train.main(train.Config(resume=tmp_path, device="cuda", max_epochs=2))
    assert load_checkpoint(tmp_path / "last.pt")["history"][1]["train_loss"] > 0
