"""On a GPU: the same voxels, the same training, the same label maps as on the CPU; no waiting.
Without a GPU `test_all_of_it_on_a_pretended_gpu` runs the others on a pretended one (see
`pretended_gpu`), in a process of its own."""

import contextlib
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from children import run_child, tell
from conftest import ROOT
from helpers import augment_of, cached, tiny

import apply_model
import preprocess
import train
from data.evaluate import dice_metric
from data.labels import IGNORED, IMAGE, LABEL
from data.volumes import read_file
from preprocess import SubvolumeLoader, Subvolumes
from utilities import Run, UNet3D, load_checkpoint, load_network, on_device, train_step

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
PRETENDED = sys.modules.get("pretended_gpu")  # counts what a real GPU's debug mode forbids
CUDA = torch.device("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests run on the GPU itself")
def test_all_of_it_on_a_pretended_gpu(tmp_path):
    """Fails with the reason where a new torch needs another pretended GPU."""
    log, words = tmp_path / "log", ["-x", "-n0", "-p", "pretended_gpu", __file__]
    assert run_child(tell, log, pytest.main, words) == 0, log.read_text()


@contextlib.contextmanager
def waiting_for_nothing(copies: int = 0):
    """The host waits for nothing, and no more than so many tensors go to the GPU."""
    if not PRETENDED:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    before = Counter(PRETENDED.TRIPS)
    yield
    trips = Counter(PRETENDED.TRIPS) - before
    sent = {trip: times for trip, times in trips.items() if trip[0] == "cpu→cuda async"}
    assert trips == sent and sum(sent.values()) <= copies, trips


# Feeding
@ON_GPU
@pytest.mark.parametrize("name", ["liver-unet3d", "liver-tumour-ce"])
def test_cache_and_augmentation_lie_on_the_gpu_and_equal_the_cpus(name, few, whole_cases, tmp_path):
    config = tiny(name, few, whole_cases, tmp_path, augment_probability=1.0)
    augment, made = augment_of(config, noise_sd=0.0), []
    for device in ("cpu", "cuda"):
        known = cached(config, device=device)
        samples = Subvolumes(known, augment, seed=3)
        made.append([*known, samples[0]])
    for one, other in zip(*made, strict=True):
        assert other[IMAGE].device.type == "cuda"
        assert (one[IMAGE].float() - other[IMAGE].cpu().float()).abs().mean() < 2e-3
        assert (one[LABEL] == other[LABEL].cpu()).float().mean() > 0.999
    for cache, copies in ((made[1][:-1], 1), (made[0][:-1], 3)):  # on the GPU, in host memory
        samples = Subvolumes(cache, augment_of(config), seed=3, device=CUDA)
        with waiting_for_nothing(copies):
            batch = samples.make_batch([1, 0])
        assert batch[IMAGE].is_cuda and batch[LABEL].is_cuda


def make_item(index: int, device: str = "cpu") -> dict:
    image = torch.rand(1, 16, 16, 8, generator=torch.Generator().manual_seed(index))
    item = {IMAGE: image.half().to(device), LABEL: (image > 0.7).to(torch.uint8).to(device)}
    return item | {"index": index, "case": f"case_{index}"}


def make_samples(device: str = "cpu") -> Subvolumes:
    """Three sub-volumes in host memory, augmented in every way on the GPU."""
    augment = preprocess.Augment(
        sampling="subvolumes", input_size=(16, 16), classes=2, foreground_sampling=0.5,
        augment_probability=1.0, rotation_degrees=15.0, translation=0.1, scaling=0.2,
        noise_sd=0.1, intensity_scaling=0.1, intensity_shift=0.1, flip_probability=0.5,
    )  # fmt: skip
    return Subvolumes([make_item(index, device) for index in range(3)], augment, 0, 1, CUDA)


@ON_GPU
def test_a_batch_waits_for_nothing_and_depends_on_seed_epoch_and_sample_only():
    """One batch: no waiting, three copies; the same again, and another in another epoch."""
    samples = make_samples()
    with waiting_for_nothing(copies=3):
        batch = samples.make_batch([2, 0])
    assert batch[IMAGE].is_cuda and batch[LABEL].is_cuda
    again = samples.make_batch([0])
    assert torch.equal(batch[IMAGE][1].cpu(), again[IMAGE][0].cpu())
    samples.epoch = 1
    assert not torch.equal(samples.make_batch([0])[IMAGE].cpu(), again[IMAGE].cpu())


@pytest.mark.skipif(not PRETENDED, reason="counted on the pretended GPU alone")
def test_batches_are_made_in_a_stream_of_their_own_and_each_side_waits_for_the_other():
    loader = SubvolumeLoader(make_samples("cuda"), 1, shuffle=False, seed=0)
    PRETENDED.LOG.clear()
    PRETENDED.STREAMS.clear()
    for batch in loader:
        assert batch[IMAGE].is_cuda
    assert PRETENDED.STREAMS["usual"] == 0 < PRETENDED.STREAMS["own"]
    assert Counter(PRETENDED.LOG) == {
        ("own", "waits for", "usual"): 3, ("usual", "waits for", "own"): 3,
    }  # fmt: skip


@ON_GPU
@pytest.mark.parametrize("name", train.LOSSES)
def test_a_step_waits_for_nothing(name):
    """With scaled, clipped gradients and unannotated slices."""
    loss = train.AnnotatedLoss(train.LOSSES[name](torch.tensor([0.5, 1.5])).to(CUDA))
    model = on_device(UNet3D(base_channels=2), CUDA)
    optimizer = train.OPTIMIZERS["adam"](model.parameters(), 1e-3)
    carried = {"preprocessing": {"labels": ("other", "liver")}}
    run = Run(model, optimizer, None, ROOT, CUDA, torch.float16, carried)
    batch = Subvolumes([make_item(0), make_item(1)], device=CUDA).make_batch([0, 1])
    batch[LABEL][:, :, :4] = IGNORED
    train_step(run, batch, loss, 12.0)  # the optimizer makes its state
    with waiting_for_nothing():
        value, _ = train_step(run, batch, loss, 12.0)
    assert 0 < value.item() < 9


@ON_GPU
def test_the_probe_finds_no_fault():
    assert preprocess.try_device(CUDA, "fp32") == ""


# Whole trainings
@ON_GPU
@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("name, precision", [("liver-unet3d", "bf16"), ("liver-tumour-ce", "fp16")])
def test_trains_resumes_and_applies(name, precision, few, whole_cases, tmp_path):
    """Half precision and its gradient scaling, exact resume, and label maps as the CPU's."""
    how = {"device": "cuda", "precision": precision, "schedule": "constant"}
    how |= {"learning_rate": 5e-3, "max_epochs": 2}
    if name == "liver-unet3d":  # in smaller ones a CPU's bfloat16 gradients are wrong
        how |= {"input_size": (64, 64), "spacing": (4.0, 4.0)}
    else:  # few windows in a scan
        how |= {"spacing": (12.0, 12.0, 10.0)}
    train.main(tiny(name, few, whole_cases, tmp_path / "whole", **how))
    run = tmp_path / "broken"
    train.main(tiny(name, few, whole_cases, run, **how | {"max_epochs": 1}))
    train.main(train.Config(resume=run, device="cuda", max_epochs=2))
    whole, resumed = (load_checkpoint(tmp_path / f / "last.pt") for f in ("whole", "broken"))
    losses = [[row["train_loss"] for row in saved["history"]] for saved in (whole, resumed)]
    assert losses[1][1] < losses[1][0]
    assert losses[1] == (losses[0] if PRETENDED else pytest.approx(losses[0], rel=0.02))
    if PRETENDED:  # a real GPU's sums are in no fixed order
        for key, weights in whole["network_state"].items():
            assert torch.equal(weights, resumed["network_state"][key]), key
    labels = []
    for device in ("cpu", "cuda"):
        apply_model.main(apply_model.Config(
            split="test", data=few if name == "liver-unet3d" else whole_cases, device=device,
            checkpoint=run / "last.pt", destination=tmp_path / device, precision="fp32",
        ))  # fmt: skip
        paths = sorted((tmp_path / device).glob("*/*_label.nii.gz"))
        labels.append([read_file(path).read() for path in paths])
    assert labels[0]
    for one, other in zip(*labels, strict=True):
        assert np.nan_to_num(dice_metric(one, other, 3), nan=1.0).min() > 0.99


@ON_GPU
def test_a_checkpoint_goes_to_the_gpu_once():
    """Its weights do not come back to be checked."""
    before = Counter(PRETENDED.TRIPS) if PRETENDED else Counter()
    network, _ = load_network(ROOT / "checkpoints" / "starter.pt", CUDA)
    assert next(network.parameters()).is_cuda
    trips = Counter(PRETENDED.TRIPS) - before if PRETENDED else {}
    assert {kind for kind, _ in trips} <= {"cpu→cuda"}


@ON_GPU
@pytest.mark.usefixtures("blank_pictures")
def test_a_compiled_network_trains_and_keeps_a_share_when_resumed(
    few, checkpoint, tmp_path, monkeypatch
):
    if PRETENDED:  # traced, but no kernel is built for it
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    how = {"compile": True, "pretrained": checkpoint, "pretrained_share": 0.5}
    config = tiny("liver-unet3d", few, None, tmp_path, device="cuda", max_epochs=1, **how)
    train.main(config)
    train.main(train.Config(resume=tmp_path, device="cuda", max_epochs=2))
    assert load_checkpoint(tmp_path / "last.pt")["history"][1]["train_loss"] > 0
