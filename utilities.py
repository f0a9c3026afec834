"""Networks, checkpoints, devices and the training loop, with its curves and preview.

Each section can be read alone. Code that needs no torch lives in `data/`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from monai.inferers import sliding_window_inference
from monai.networks import nets
from torch import nn
from torch.nn import functional

from data import pictures, settings
from data.evaluate import dice_metric, list_overlaps, nan_mean, overlap_counts
from data.files import InputError, atomic_write, explain, find_checkpoint, one_error, write_csv
from data.labels import IGNORED, IMAGE, LABEL, PRED
from data.splits import KNOWN

# -- Networks -------------------------------------------------------------------------------------


def build_network(name: str, *, in_channels: int, out_channels: int, base_channels: int,
                  input_size: Sequence[int], dropout: float = 0.0,
                  projections: bool = False) -> nn.Module:  # fmt: skip
    """Return a network of NETWORKS, or raise InputError; the others are a checkpoint's arguments.
    `base_channels` scales the width: 32 is the paper's for unet3d and about MONAI's default for the
    others. `input_size` (X, Y, Z) in voxels is for transformers. `dropout` acts at the bottom of
    unet3d, elsewhere where MONAI has it. `projections`: see `build_resnet34`."""
    if name not in NETWORKS:
        raise InputError(f"network must be one of {', '.join(NETWORKS)}, got {name!r}")
    given = (in_channels, out_channels, base_channels, dropout)
    return NETWORKS[name](*given, size=tuple(input_size), projections=projections)


# name → network of channels in and out, width, dropout (and size, projections)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "unet3d": lambda i, o, c, d, **_: UNet3D(i, o, c, d),
    "unet": lambda i, o, c, d, **_: nets.UNet(
        3, i, o, [max(c // 2, 1) << level for level in range(5)], (2, 2, 2, 2), num_res_units=2,
        norm="batch", dropout=d,
    ),
    "attention_unet": lambda i, o, c, d, **_: nets.AttentionUnet(
        3, i, o, [max(c // 2, 1) << level for level in range(5)], (2, 2, 2, 2), dropout=d
    ),
    "segresnet": lambda i, o, c, d, **_: nets.SegResNet(  # group norm: at least 8 channels
        3, max(c // 2, 8), i, o, dropout_prob=d or None
    ),
    "vnet": lambda i, o, c, d, **_: nets.VNet(  # 0.5 is MONAI's own
        3, i, o, dropout_prob_down=d or 0.5, dropout_prob_up=(d or 0.5, d or 0.5)
    ),
    "unetr": lambda i, o, c, d, size, **_: nets.UNETR(
        i, o, size, feature_size=max(c // 2, 1), hidden_size=24 * c, mlp_dim=96 * c, dropout_rate=d
    ),
    "dynunet": lambda i, o, c, d, **_: nets.DynUNet(
        3, i, o, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, dropout=d or None,
        filters=[c, 2 * c, 4 * c, 8 * c, 10 * c],
    ),
    "swin_unetr": lambda i, o, c, d, **_: PaddedSlices(
        nets.SwinUNETR(i, o, feature_size=12 * max(c // 16, 1), drop_rate=d), 32
    ),
    "resnet34_unet": lambda i, o, c, d, projections, **_: build_resnet34(i, o, d, projections),
}  # fmt: skip


class UNet3D(nn.Module):
    """The 3D U-Net of Çiçek et al. 2016 (doi:10.1007/978-3-319-46723-8_49), with padding. Channels
    double before each pooling; batch norm stands before each ReLU. Images (B, in_channels, X, Y,
    Z), X, Y and Z multiples of 8 → logits (B, out_channels, X, Y, Z). The paper counts 19,069,955
    parameters for 3 channels in and 3 labels out, with biases and without the scales of batch norm,
    whose shifts replace the biases here: 19,072,291 less 2,336."""

    def __init__(self, in_channels: int = 1, out_channels: int = 2, base_channels: int = 32,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__()
        c1, c2, c3, c4, c5 = (base_channels * 2**level for level in range(5))
        self.encoders = nn.ModuleList(
            convolve_twice(*channels)
            for channels in ((in_channels, c1, c2), (c2, c2, c3), (c3, c3, c4))
        )
        self.bottom = convolve_twice(c4, c4, c5)
        self.dropout = nn.Dropout3d(dropout)
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose3d(c, c, kernel_size=2, stride=2, bias=False) for c in (c5, c4, c3)
        )
        self.decoders = nn.ModuleList(
            convolve_twice(deep + skip, skip, skip) for deep, skip in ((c5, c4), (c4, c3), (c3, c2))
        )
        self.head = nn.Conv3d(c2, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = functional.max_pool3d(x, kernel_size=2)
        x = self.dropout(self.bottom(x))
        for upsample, decoder in zip(self.upsamplers, self.decoders, strict=True):
            x = decoder(torch.cat([upsample(x), skips.pop()], dim=1))
        return self.head(x)


def convolve_twice(channels_in: int, middle: int, channels_out: int) -> nn.Sequential:
    """Return two 3×3×3 convolutions, each with batch norm (which makes a bias useless) and ReLU."""
    layers: list[nn.Module] = []
    for before, after in ((channels_in, middle), (middle, channels_out)):
        layers.append(nn.Conv3d(before, after, kernel_size=3, padding=1, bias=False))
        layers += [nn.BatchNorm3d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class PaddedSlices(nn.Module):
    """A network that needs a multiple of `multiple` slices: pads with air and crops the logits."""

    def __init__(self, network: nn.Module, multiple: int):
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slices = x.shape[-1]
        return self.network(functional.pad(x, (0, -slices % self.multiple)))[..., :slices]


class SliceBySlice(nn.Module):
    """A 2D network on volumes (B, C, X, Y, Z): folds the slices into the batch and back."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slices = x.movedim(-1, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.network(slices).unflatten(0, (x.shape[0], x.shape[-1])).movedim(1, -1)


def build_resnet34(inputs: int, outputs: int, dropout: float, projections: bool) -> nn.Module:
    """Return MONAI's 2D U-Net with a ResNet-34 as encoder, applied slice by slice; `projections`
    makes its shortcuts torchvision's (option B of He et al. 2016, arXiv:1512.03385)."""
    network = nets.FlexibleUNet(inputs, outputs, "resnet34", spatial_dims=2, dropout=dropout)
    for layer in ("layer2", "layer3", "layer4") if projections else ():
        block = getattr(network.encoder, layer)[0]
        before, after = block.conv1.in_channels, block.conv1.out_channels
        convolution = nn.Conv2d(before, after, kernel_size=1, stride=2, bias=False)
        block.downsample = nn.Sequential(convolution, nn.BatchNorm2d(after))
    return SliceBySlice(network)


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on a device, its weights in the layout of its input."""
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    flat = isinstance(network, SliceBySlice) and device.type != "mps"
    layout = torch.channels_last if flat else choose_layout(device)
    return network.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch's types lack it


def choose_layout(device: torch.device) -> torch.memory_format:
    """Return the layout of images (B, C, X, Y, Z): channels last; Apple's GPUs are wrong in it."""
    return torch.preserve_format if device.type == "mps" else torch.channels_last_3d


# -- Checkpoints: plain Python types and tensors, so that loading cannot run code -----------------

SCHEMA = 2
FIXED_SIZE = {"unetr"}  # networks whose weights depend on the input size
CHECKPOINT: dict[str, Any] = {  # entry → type; docs/checkpoints.md explains them
    "network_args": dict, "network_state": dict, "preprocessing": dict, "inference": dict,
    "declared": dict, "modality": str, "config": dict, "epoch": int, "val_dice": float,
    "history": list, "expected": dict | None, "resume": dict | None,
    "patients": list, "content": dict, "begun": dict,
}  # fmt: skip
INSIDE: dict[str, dict[str, Any]] = {  # the same of what some of them hold
    "preprocessing": {"labels": dict}, "inference": {"window": tuple, "overlap": float},
    "config": {"data": str, "run_folder": str}, "begun": {"anew": list, "defaults": dict},
    "history": {"epoch": int}, "patients": dict.fromkeys((*KNOWN, "source"), str),
    "expected": {"log_ml": float, "sd": float},
}  # fmt: skip
USUAL_TYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64}


def save_checkpoint(path: Path, **entries: Any) -> None:
    """Write the entries of CHECKPOINT completely or not at all; None may be left out."""
    settings.check_types(entries, CHECKPOINT, str(path), "give every entry of CHECKPOINT")
    with atomic_write(path) as temporary:
        torch.save({"schema": SCHEMA, **entries, "versions": read_versions()}, temporary)


def read_versions() -> dict[str, str]:
    """Return the versions of the libraries that a network's numbers depend on."""
    return {"torch": str(torch.__version__), "monai": version("monai")}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote to a file, or to best.pt of a run's folder; InputError
    unless checksums, schema, types, ranges of the settings and weights are right."""
    path = find_checkpoint(path)
    remedy = "the file is damaged or foreign, use another one"
    with one_error(path, "not a readable checkpoint of this project", remedy):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not compare the checksums
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    settings.check_types(
        checkpoint, {"schema": int}, f"{path}: not a checkpoint of this project", remedy
    )
    if (found := checkpoint["schema"]) != SCHEMA:
        change = "train it again" if found < SCHEMA else "update this program"
        raise InputError(f"{path}: checkpoint schema must be {SCHEMA}, got {found}; {change}")
    settings.check_types(checkpoint, CHECKPOINT | {"versions": dict}, str(path), remedy)
    expected = list((checkpoint.get("expected") or {}).values())
    for part, kinds in INSIDE.items():
        content = expected if part == "expected" else checkpoint[part]
        for row in content if isinstance(content, list) else [content]:
            settings.check_types(row, kinds, f"{path}: {part}", remedy)
    asked = {k: v for k, v in checkpoint["config"].items() if k != "labels"}  # names, not values
    parts = (checkpoint[part] for part in ("preprocessing", "inference", "network_args"))
    for part in (checkpoint, *parts, asked, *expected):
        settings.check_settings(part, f"{path}: its setting ", SavedSettings)
    refuse_odd_weights(checkpoint["network_state"], path)
    return checkpoint


SavedLabels = Annotated[
    dict[str, tuple[int, ...]],
    settings.Limit(
        "names of whole numbers", lambda of: all(type(n) is str and v for n, v in of.items())
    ),
]


class SavedSettings:
    """Settings of a checkpoint with a range."""

    sampling: Literal["subvolumes", "patches"]
    modality: Literal["CT", "MR"]
    labels: SavedLabels
    declared: SavedLabels
    log_ml: Annotated[float, settings.Limit("a finite number", math.isfinite)]
    sd: settings.Positive
    in_channels: settings.Count
    out_channels: settings.Count
    base_channels: settings.Count
    max_epochs: settings.Count
    spacing: tuple[settings.Spacing, ...]
    hu_window: settings.HuWindow | None
    input_size: tuple[settings.Count, ...]
    window: tuple[settings.Count, ...]
    overlap: settings.Part
    device: settings.Device


def load_network(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Return a checkpoint's network, ready to predict, and the checkpoint; else InputError."""
    saved = load_checkpoint(path)
    try:
        network = build_network(**saved["network_args"])
        network.load_state_dict(saved["network_state"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = f"its weights do not fit its network ({error})"
        raise InputError(f"{path}: {what}; use another file") from error
    return on_device(network, device).eval(), saved


def refuse_odd_weights(weights: dict[str, Any], path: Path) -> None:
    """Raise InputError unless all weights are dense tensors of finite numbers, variances ≥ 0."""
    for name, tensor in weights.items():
        fault, dense = "", isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not dense or tensor.is_meta or tensor.dtype not in USUAL_TYPES:
            fault = f"are no plain tensors ({name})"
        elif not torch.isfinite(tensor).all():
            fault = f"are not numbers (NaN or infinite in {name})"
        elif name.endswith("running_var") and (tensor < 0).any():
            fault = f"have a negative variance ({name})"
        if fault:
            remedy = "use an earlier one, or train with --precision fp32"
            raise InputError(f"{path}: its weights {fault}; {remedy}")


# -- Machine: device, precision, processes --------------------------------------------------------


def is_memory_short(error: BaseException) -> bool:
    """Return whether an error of CUDA, cuDNN or MPS says that a device has too little memory."""
    words = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def measure_step(run: Run, loss_function: nn.Module, shape: Sequence[int]) -> int:
    """Return the bytes that a training step on images of a shape (B, C, X, Y, Z) takes from an
    NVIDIA GPU's free memory. A copy of the network does a step."""
    before = torch.cuda.memory_reserved(run.device)
    torch.cuda.reset_peak_memory_stats(run.device)
    model = copy.deepcopy(run.model).train()
    image = torch.zeros(*shape, device=run.device)
    loss_function(run.ask(model, image), image.to(torch.uint8)).backward()
    taken = torch.cuda.max_memory_reserved(run.device) - before
    weights = sum(parameter.nbytes for parameter in model.parameters())
    del model, image
    torch.cuda.empty_cache()
    return taken + 2 * weights  # Adam's two moments


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return a setting's type; `auto`: bfloat16, on older GPUs float16, where slow float32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def read_rank() -> tuple[int, int]:
    """Return the number of this process and of all, of RANK and WORLD_SIZE; else InputError."""
    keys = ("RANK", "WORLD_SIZE")
    rank, size = (os.environ.get(key, "unset") for key in keys)
    if not {*keys} & {*os.environ}:
        return 0, 1
    if not (rank.isdecimal() and size.isdecimal()) or int(rank) >= int(size):
        what = f"RANK={rank} and WORLD_SIZE={size}"
        raise InputError(f"{what}: RANK must be 0 to WORLD_SIZE − 1; unset both, or use torchrun")
    return int(rank), int(size)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that torchrun started."""
    if "MASTER_ADDR" not in os.environ:
        raise InputError("RANK and WORLD_SIZE without MASTER_ADDR: unset both, or use torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's collectives use the current one
    # objects go between CPUs, so that no process waits for its GPU
    dist.init_process_group("cpu:gloo" + ",cuda:nccl" * (device.type == "cuda"))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Return the numbers of this process and of all under torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """Return the value of every process, in the order of their ranks; all must call it."""
    values = [value] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


# -- Training -------------------------------------------------------------------------------------


def train(run: Run, train_loader: Any, val_loader: Any, loss_function: nn.Module, *,
          max_epochs: int, val_interval: int = 1, gradient_clip: float = 0.0,
          patience: int = 0) -> list[dict[str, float]]:  # fmt: skip
    """Fit `run.model`, write files into `run.folder` after each epoch, and return the history. The
    loaders yield {"image" (B, C, X, Y, Z), "label" (B, 1, X, Y, Z) class indices, "case" names};
    without a `val_loader` there is no best.pt. `loss_function` maps (logits, label) to a scalar;
    `gradient_clip` and `patience` (validations without a better Dice) are off at 0. Ctrl-C finishes
    the step in all processes, writes last.pt and raises KeyboardInterrupt."""
    with settings.delayed_interrupt() as interrupted:
        for epoch in range(len(run.history) + 1, max_epochs + 1):
            begun = time.perf_counter()
            train_loader.set_epoch(epoch, len(run.losses))
            row = {"epoch": epoch, "learning_rate": float(run.scheduler.get_last_lr()[0])}
            how = (loss_function, gradient_clip, (epoch, max_epochs), interrupted)
            row |= train_one_epoch(run, train_loader, *how)
            if any(gather(interrupted())):
                stop(run)
            run.losses, run.counts = [], 0
            run.scheduler.step()
            if dist.is_initialized():
                run.share_buffers()
            if val_loader is not None and (epoch % val_interval == 0 or epoch == max_epochs):
                row |= validate(run, val_loader, loss_function)
            run.history.append(row | {"epoch_seconds": time.perf_counter() - begun})
            if rank_and_size()[0] == 0:
                run.finish_epoch(val_loader, max_epochs)
            if patience and pictures.find_best(run.history)[1] >= patience:
                print(f"no better Dice in {patience} validations: stopped after epoch {epoch}")
                break
    return run.history


def stop(run: Run) -> None:
    """Write last.pt in the first process, and raise KeyboardInterrupt in all."""
    if rank_and_size()[0] == 0:
        run.save("last.pt")
    gather("saved")  # nobody ends, which would end the others, before it is
    raise KeyboardInterrupt(f"go on with: python train.py --resume {run.folder}")


def train_one_epoch(run: Run, loader: Any, loss_function: nn.Module, clip: float,
                    epochs: tuple[int, int],
                    interrupted: Callable[[], bool]) -> dict[str, float]:  # fmt: skip
    """Train on all batches of an epoch, or on its rest; return mean loss, Dice and speed. `epochs`
    are this one and the last. Losses leave the GPU only when the bar is redrawn."""
    run.network.train()
    done, steps = len(run.losses), len(run.losses) + len(loader)
    start = redrawn = time.perf_counter()
    pending, waited, samples = [], 0.0, 0
    bar = settings.show_progress(total=steps, initial=done, desc=f"epoch {epochs[0]}/{epochs[1]}")
    with bar, contextlib.closing(iter(loader)) as batches:
        while done < steps and not any(gather(interrupted())):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            pending.append((batch["case"], *train_step(run, batch, loss_function, clip)))
            done, samples = done + 1, samples + len(batch["case"])
            bar.update()
            if done == steps or time.perf_counter() - redrawn > 0.5:
                run.fetch(pending)
                redrawn = time.perf_counter()
                bar.set_postfix(loss=f"{np.mean(run.losses):.4f}")
    run.fetch(pending)
    seconds = time.perf_counter() - start
    on_gpu = run.device.type == "cuda"
    peak_mb = torch.cuda.max_memory_allocated(run.device) / 1e6 if on_gpu else math.nan
    return {
        "train_loss": nan_mean(gather(nan_mean(run.losses))),
        "train_dice": nan_mean(dice_metric(counts=sum(gather(run.counts)))) if done else math.nan,
        "samples_per_s": rank_and_size()[1] * samples / seconds,
        "data_wait_percent": 100 * waited / seconds,
        "peak_memory_mb": peak_mb,
    }


def train_step(run: Run, batch: dict, loss_function: nn.Module, clip: float) -> tuple:
    """Update the weights by one batch; return its loss and `overlap_counts`, on the device."""
    run.optimizer.zero_grad(set_to_none=True)
    logits = run.ask(run.network, batch[IMAGE])
    label = batch[LABEL].to(run.device, non_blocking=True)
    loss = loss_function(logits, label)
    run.scaler.scale(loss).backward()
    if clip:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    found = predict_classes(logits.detach()).masked_fill(label[:, 0] == IGNORED, 0)
    counts = list_overlaps(found, label[:, 0], logits.shape[1])
    return loss.detach(), torch.stack([torch.stack(numbers) for numbers in counts], dim=1)


@torch.no_grad()
def time_forward(run: Run, window: Sequence[int]) -> float:
    """Return the seconds of a network's pass over one window; draws no random number."""
    run.model.eval()
    image = torch.zeros((1, 1, *window))
    begin = time.perf_counter()
    run.ask(run.model, image)
    return time.perf_counter() - begin


def predict_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return uint8 class indices (B, …) of logits (B, C, …)."""
    if logits.shape[1] == 2:  # argmax over two classes is 100 times slower than a comparison
        return (logits[:, 1] > logits[:, 0]).to(torch.uint8)
    return logits.argmax(dim=1).to(torch.uint8)


@torch.no_grad()
def validate(run: Run, loader: Any, loss_function: nn.Module) -> dict[str, float]:
    """Return the mean loss of batches with foreground, and the Dice per class over the patients, at
    the network's resolution: it chooses best.pt. It is NaN for a class that no patient has."""
    if run.first:
        run.update_kept()
    run.kept.eval()
    names, losses, counts, voxels = run.class_names, [], [], []
    for batch in settings.show_progress(loader, desc="validation", unit="batch"):
        logits = run.predict(batch[IMAGE])
        label = batch[LABEL].to(logits.device)
        if ((label > 0) & (label != IGNORED)).any():  # else the Dice loss is nearly always 1
            losses.append(loss_function.to(logits.device)(logits, label).item())
        found = predict_classes(logits).masked_fill(label[:, 0] == IGNORED, 0)
        for case, predicted, true in zip(batch["case"], found, label[:, 0], strict=True):
            counts.append((case, overlap_counts(predicted, true, len(names) + 1)))
            voxels.append(int((true != IGNORED).sum()))
    loss_function.to(run.device)
    total = sum(itertools.chain(*gather(voxels)))
    patients: dict[str, Any] = defaultdict(int)  # one's sub-volumes may be in several processes
    for case, count in itertools.chain(*gather(counts)):
        patients[case] += count
    table = np.array([dice_metric(counts=count) for count in patients.values()])
    table[:, sum(patients.values())[2] == 0] = math.nan
    dice = [nan_mean(column) for column in table.T]
    row = {"val_loss": nan_mean(itertools.chain(*gather(losses))), "val_dice": nan_mean(dice)}
    shares = sum(patients.values())[2] / max(total, 1)
    row["val_chance"] = nan_mean(2 * share / (1 + share) for share in shares if share)
    return row | {f"val_dice_{name}": float(d) for name, d in zip(names, dice, strict=True)}


@dataclass
class Run:
    """A training under way: what changes with each step, and what its checkpoints carry."""

    model: nn.Module  # on `device`; `network` is the model as it is trained: parallel, compiled
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler  # stepped once an epoch
    folder: Path  # of the files that `train` writes
    device: torch.device
    precision: torch.dtype  # of the convolutions
    carried: dict[str, Any]  # the entries of checkpoints that training does not change
    pretrained_share: float = 0.0  # of the first weights in those that are kept
    compile_network: bool = False  # run the network through torch.compile
    tensorboard: bool = False  # also write the history as TensorBoard event files
    anew: Collection[str] = ()  # weights that `pretrained_share` leaves out
    history: list[dict[str, float]] = field(default_factory=list)  # a row per epoch
    losses: list[float] = field(default_factory=list)  # one per step of the epoch under way
    counts: Any = 0  # the sum of their `overlap_counts`, (3, classes − 1)

    def __post_init__(self) -> None:
        parallel = nn.parallel.DistributedDataParallel
        network = parallel(self.model) if dist.is_initialized() else self.model
        self.network: Any = torch.compile(network) if self.compile_network else network
        half = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        # what is validated, saved and applied: the weights learnt, or nearer to the first ones
        self.first = copy.deepcopy(self.model) if self.pretrained_share else None
        self.kept = copy.deepcopy(self.model) if self.pretrained_share else self.model
        self.class_names = list(self.carried["preprocessing"]["labels"])[1:]
        names = ("model", "optimizer", "scheduler", "scaler", "first")
        parts = {name: getattr(self, name) for name in names}
        self.resumed = {name: part for name, part in parts.items() if part is not None}

    def share_buffers(self) -> None:
        """Give every process the first one's batch-norm statistics, which are those saved."""
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)

    def update_kept(self) -> None:
        """Interpolate between the first weights and those learnt since, of which few patients then
        degrade less: Wortsman et al. 2022, arXiv:2109.01903."""
        assert self.first
        share, state = self.pretrained_share, self.model.state_dict()
        pairs = zip(state.items(), self.first.state_dict().values(), strict=True)
        known = [(n, v, old) for (n, v), old in pairs if n not in self.anew]
        mixed = {n: v.lerp(old, share) for n, v, old in known if v.is_floating_point()}
        self.kept.load_state_dict(state | mixed)

    def ask(self, network: nn.Module, image: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C, X, Y, Z) float32 of images (B, 1, X, Y, Z), moved to the device."""
        layout = choose_layout(self.device)
        image = image.to(self.device, non_blocking=True, memory_format=layout)
        with torch.autocast(self.device.type, self.precision, self.precision != torch.float32):
            return network(image).float()

    def predict(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C, X, Y, Z) float32 of the network that is kept; those of a whole case
        are blended from windows, and stay where it lies."""
        ask = functools.partial(self.ask, self.kept)
        if tuple(image.shape[2:]) == (window := tuple(self.carried["inference"]["window"])):
            return ask(image)
        how = (image, window, 1, ask, 0.25, "gaussian")  # an overlap of 0.5 takes 3 times as long
        places: dict[str, Any] = {"sw_device": self.device, "device": image.device}
        return cast(torch.Tensor, sliding_window_inference(*how, **places))

    def fetch(self, pending: list[tuple[list[str], torch.Tensor, torch.Tensor]]) -> None:
        """Take (cases, loss, counts) from the device; InputError for cases of an infinite loss."""
        values = torch.stack([loss for _, loss, _ in pending]).tolist() if pending else []
        for (cases, _, counts), value in zip(pending, values, strict=True):
            if not math.isfinite(value):
                what = f"the loss became {value} in a batch of {', '.join(cases)}; look at them"
                raise InputError(f"{what}, lower --learning-rate, or use --precision fp32")
            self.losses.append(value)
            self.counts = self.counts + counts.cpu().numpy()
        pending.clear()

    def finish_epoch(self, val_loader: Any, max_epochs: int) -> None:
        """Write what an epoch leaves; last.pt at the end, so that a killed run lacks nothing."""
        row, epoch = self.history[-1], len(self.history)
        if is_best := pictures.find_best(self.history)[0] == epoch:
            self.save("best.pt")
        write_csv(self.history, self.folder / "metrics.csv")
        curves = pictures.curves_figure(self.history, self.class_names)
        pictures.save_figure(curves, self.folder / "curves.png")
        if "val_dice" in row:
            pictures.save_figure(preview_figure(self, val_loader), self.folder / "preview.png")
        if self.tensorboard:  # a file per epoch: a crash tears none
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self.folder / "events"), filename_suffix=f".{epoch}") as writer:
                for key, value in row.items():
                    writer.add_scalar(key, value, epoch)
        self.save("last.pt")
        figures = [f"{k} {row[k]:.4f}" for k in ("train_loss", "val_loss", "val_dice") if k in row]
        best = " (best so far)" * (is_best and row.get("val_dice", 0) > 0)
        left = (max_epochs - epoch) * row["epoch_seconds"]
        print(f"epoch {epoch}/{max_epochs}: {', '.join(figures)}{best}, "
              f"{settings.format_seconds(left)} left", flush=True)  # fmt: skip

    def save(self, name: str) -> None:
        """Write best.pt, or last.pt, which also has all that resuming needs."""
        if self.first:
            self.update_kept()
        row = self.history[-1] if self.history else {}
        resume: dict[str, Any] = {key: part.state_dict() for key, part in self.resumed.items()}
        resume |= {"losses": self.losses, "counts": np.asarray(self.counts).tolist()}
        resume |= {"random": torch.get_rng_state()}
        save_checkpoint(
            self.folder / name, **self.carried, network_state=self.kept.state_dict(),
            history=self.history, epoch=len(self.history), val_dice=row.get("val_dice", math.nan),
            resume=resume if name == "last.pt" else None,
        )  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """Put everything back as it was when a last.pt was written, but the learning rate, which is
        that of the schedule as it is now."""
        if not (resume := saved.get("resume")):
            raise InputError("a best.pt cannot be resumed; give the run's last.pt")
        path = self.folder / "last.pt"
        try:
            for key, part in self.resumed.items():
                part.load_state_dict(resume[key])
            self.history, self.losses = list(saved["history"]), list(map(float, resume["losses"]))
            self.counts = np.array(resume["counts"], np.int64)
            torch.set_rng_state(resume["random"].cpu())
            for state in (resume["model"], *self.optimizer.state.values()):
                refuse_odd_weights({n: v for n, v in state.items() if torch.is_tensor(v)}, path)
        except Exception as error:  # states of torch's own, damaged in any way
            what = f"its state cannot be resumed ({explain(error):.100})"
            raise InputError(f"{path}: {what}; begin anew with --pretrained {path}") from error
        given: Any = self.scheduler
        pairs = zip(given.base_lrs, given.lr_lambdas, strict=True)
        rates = [base * factor(given.last_epoch) for base, factor in pairs]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        given._last_lr = rates


# -- Curves and preview of a training -------------------------------------------------------------


@torch.no_grad()
def preview_figure(run: Run, loader: Any) -> Any:
    """Return the figure of the same few validation slices each time, reference and prediction: of
    each sub-volume the slice with most of its last class, the tumour if there is one."""
    run.kept.eval()
    examples = loader.dataset.examples(6, run.carried["inference"]["window"])
    rows = math.ceil(len(examples) / 3)
    figure = Figure(figsize=(12, 4.2 * rows + 0.4), layout="constrained")
    for place, item in enumerate(examples, start=1):
        truth = item[LABEL][0].masked_fill(item[LABEL][0] == IGNORED, 0)
        middle = pictures.find_busiest_slice((truth == max(int(truth.max()), 1)).cpu().numpy())
        found = predict_classes(run.predict(item[IMAGE][None]))[0]
        title = f"{item['case']}, slice {item['first_slice'] + middle + 1}"
        axes = figure.add_subplot(rows, 3, place)
        drawn = {IMAGE: item[IMAGE], LABEL: truth, PRED: found}
        pictures.show_patient(drawn, middle, axes=axes, names=run.class_names, title=title)
    pictures.add_legend(figure, run.class_names, truth=True)
    return figure
