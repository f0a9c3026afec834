"""What several scripts share about networks: `train`, `dice_metric`, `show_patient` and the rest.

Sections, each readable alone: networks · checkpoints · machine · training · its pictures. What
needs no network, and no torch, lives in `data/`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import time
import types
import typing
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data.evaluate import dice_metric, list_overlaps, nan_mean, overlap_counts
from data.files import InputError, atomic_write, find_checkpoint, write_csv
from data.labels import IGNORED, IMAGE, LABEL, PRED
from data.pictures import (
    add_legend,
    as_array,
    class_colour,
    find_busiest_slice,
    save_figure,
    show_patient,
)
from data.settings import (
    check_settings,
    check_types,
    delayed_interrupt,
    format_seconds,
    show_progress,
)

# ---------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------


def _double_convolution(channels_in: int, middle: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((channels_in, middle), (middle, channels_out)):
        # No bias: batch norm subtracts the mean, so a bias would be learnt in vain.
        layers += [
            nn.Conv3d(before, after, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm3d(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet3D(nn.Module):
    """The 3D U-Net of Çiçek et al. 2016 (doi:10.1007/978-3-319-46723-8_49), with padding.

    Channels double before each pooling, so that no bottleneck throws information away; batch norm
    stands before each ReLU. Input (B, in_channels, X, Y, Z) → logits (B, out_channels, X, Y, Z);
    X, Y and Z must be multiples of 8.

    The paper counts 19,069,955 parameters for 3 channels in and 3 labels out: all convolution
    weights, one bias per 3×3×3 filter and output label, batch-norm scales left out. Here the
    batch norm's shift takes the place of that bias, so the count is all parameters (19,072,291)
    less the 2,336 batch-norm scales.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 2, base_channels: int = 32,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__()
        self.dropout = nn.Dropout3d(dropout)
        c1, c2, c3, c4, c5 = (base_channels * 2**level for level in range(5))
        self.encoders = nn.ModuleList(
            [
                _double_convolution(in_channels, c1, c2),
                _double_convolution(c2, c2, c3),
                _double_convolution(c3, c3, c4),
            ]
        )
        self.bottom = _double_convolution(c4, c4, c5)
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose3d(c, c, kernel_size=2, stride=2, bias=False) for c in (c5, c4, c3)
        )
        self.decoders = nn.ModuleList(
            _double_convolution(deep + skip, skip, skip)
            for deep, skip in ((c5, c4), (c4, c3), (c3, c2))
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


class SliceBySlice(nn.Module):
    """A 2D network on volumes (B, C, X, Y, Z): slices are folded into the batch and back."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slices = x.movedim(-1, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.network(slices).unflatten(0, (x.shape[0], x.shape[-1])).movedim(1, -1)


class PaddedSlices(nn.Module):
    """A network whose slice count must be a multiple of `multiple`: pads with air, crops back."""

    def __init__(self, network: nn.Module, multiple: int):
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slices = x.shape[-1]
        return self.network(functional.pad(x, (0, -slices % self.multiple)))[..., :slices]


def build_network(
    name: str,
    *,
    in_channels: int,
    out_channels: int,
    base_channels: int,
    input_size: Sequence[int],
    dropout: float = 0.0,
    projections: bool = False,
) -> nn.Module:
    """Network by name; its keyword arguments are `network_args` of the checkpoint.

    `base_channels` scales the width: 32 is the paper's for unet3d and about MONAI's default for the
    others. `input_size` is (X, Y, Z), which only transformers need. `dropout` is at the bottom of
    unet3d, where MONAI has it in the others; `projections` are of resnet34_unet, see there. Raises
    InputError for an unknown name.
    """
    from monai.networks import nets

    i, o, c, d, v = in_channels, out_channels, base_channels, dropout, dropout or 0.5
    half = max(c // 2, 1)
    widths = [half * 2**level for level in range(5)]
    factories: dict[str, Callable[[], nn.Module]] = {
        "unet3d": lambda: UNet3D(i, o, c, d),
        "unet": lambda: nets.UNet(
            3, i, o, widths, (2, 2, 2, 2), num_res_units=2, norm="batch", dropout=d
        ),
        "attention_unet": lambda: nets.AttentionUnet(3, i, o, widths, (2, 2, 2, 2), dropout=d),
        # norm groups: 8 channels
        "segresnet": lambda: nets.SegResNet(3, max(half, 8), i, o, dropout_prob=d or None),
        # of one width; of MONAI's own dropout, a half, unless another one is given
        "vnet": lambda: nets.VNet(3, i, o, dropout_prob_down=v, dropout_prob_up=(v, v)),
        "unetr": lambda: nets.UNETR(i, o, tuple(input_size), feature_size=half, dropout_rate=d),
        "dynunet": lambda: nets.DynUNet(
            3,
            i,
            o,
            [3] * 5,
            [1, 2, 2, 2, 2],
            [2] * 4,
            filters=[c, 2 * c, 4 * c, 8 * c, 10 * c],
            dropout=d or None,
        ),
        "swin_unetr": lambda: PaddedSlices(
            nets.SwinUNETR(i, o, feature_size=12 * max(c // 16, 1), drop_rate=d), multiple=32
        ),
        "resnet34_unet": lambda: build_resnet34(i, o, d, projections),
    }
    if name not in factories:
        raise InputError(f"network must be one of {', '.join(factories)}, got {name!r}")
    return factories[name]()


# Networks that take pictures of any size, and the voxels whose multiples their pooling divides. The
# others take the training's alone, or normalise by what else a picture holds.
GRAINS = {"unet3d": 8, "unet": 16, "attention_unet": 16, "vnet": 16, "resnet34_unet": 32}


def build_resnet34(
    channels_in: int, channels_out: int, dropout: float, projections: bool
) -> SliceBySlice:
    """MONAI's 2D U-Net with a ResNet-34 as encoder.

    Its shortcuts skip pixels and fill channels with zeros (option A of He et al. 2016,
    arXiv:1512.03385). `projections` makes them those of torchvision (option B), which weights from
    ImageNet need.
    """
    from monai.networks import nets

    network = nets.FlexibleUNet(
        channels_in, channels_out, "resnet34", spatial_dims=2, dropout=dropout
    )
    for layer in ("layer2", "layer3", "layer4") if projections else ():
        block = getattr(network.encoder, layer)[0]
        some, more = block.conv1.in_channels, block.conv1.out_channels
        convolution = nn.Conv2d(some, more, kernel_size=1, stride=2, bias=False)
        block.downsample = nn.Sequential(convolution, nn.BatchNorm2d(more))
    return SliceBySlice(network)


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network; channels last in its weights is the fastest layout in half precision."""
    flat = isinstance(network, SliceBySlice)
    layout = torch.channels_last if flat else torch.channels_last_3d
    return network.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch's types lack it


# ---------------------------------------------------------------------------------------
# Checkpoints: plain Python types and tensors, so that loading cannot run code
# ---------------------------------------------------------------------------------------

SCHEMA = 2


def save_checkpoint(
    path: Path,
    *,
    network_args: dict[str, Any],
    network_state: dict[str, torch.Tensor],
    preprocessing: dict[str, Any],
    inference: dict[str, Any],
    declared: dict[str, Sequence[int]],
    modality: str,
    expected: dict[str, Any] | None = None,
    config: dict[str, Any],
    epoch: int,
    val_dice: float,
    history: list[dict[str, float]],
    step_losses: list[float] | None = None,
    step_counts: list[list[int]] | None = None,
    averaging_state: dict[str, Any] | None = None,
    optimizer_state: dict[str, Any] | None = None,
    scheduler_state: dict[str, Any] | None = None,
    scaler_state: dict[str, Any] | None = None,
    rng_state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint whole or not at all. These keywords are its schema (see the README).

    torch.save writes a zip archive with a checksum of each tensor and of the rest.
    """
    content = {key: value for key, value in locals().items() if key != "path"}
    versions = {"torch": str(torch.__version__), "monai": version("monai"), "schema": SCHEMA}
    with atomic_write(path) as temporary:
        torch.save({"schema": SCHEMA, **content, "versions": versions}, temporary)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, or of a run's folder best.pt; else one InputError.

    Verified are the checksums, the schema and the types of its entries, that all weights are
    numbers, and the ranges of its settings.
    """
    path = find_checkpoint(path)
    remedy = "the file is damaged or foreign, use another one"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not compare the checksums
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a foreign file may lead to anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: not a readable checkpoint of this project ({reason}); {remedy}"
        ) from error
    check_types(checkpoint, {"schema": int}, f"{path}: not a checkpoint of this project", remedy)
    if (found := checkpoint["schema"]) != SCHEMA:
        older = "an earlier version of this program, train it again"
        raise InputError(
            f"{path}: checkpoint schema must be {SCHEMA}, got {found}; it was made by "
            + (older if found < SCHEMA else "a later version of this program, update this one")
        )
    check_types(checkpoint, checkpoint_types(), str(path), remedy)
    check_types(checkpoint["preprocessing"], {"labels": dict}, f"{path}: preprocessing", remedy)
    check_types(checkpoint["inference"], {"window": tuple, "overlap": float}, str(path), remedy)
    for organ, usual in (checkpoint.get("expected") or {}).items():
        check_types(usual, {"log_ml": float, "sd": float}, f"{path}: expected {organ}", remedy)
    for settings in ("preprocessing", "inference", "config"):
        check_settings(checkpoint[settings], f"{path}: its setting ")
    refuse_non_finite(checkpoint["network_state"], path)
    return checkpoint


def load_network(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Return a checkpoint's network with its weights, ready to predict, and the checkpoint.

    Raises InputError where the weights do not fit the network.
    """
    saved = load_checkpoint(path, device)
    try:
        network = build_network(**saved["network_args"])
        network.load_state_dict(saved["network_state"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its weights do not fit its network ({error}); the checkpoint is foreign or "
            "damaged, use another one"
        ) from error
    return on_device(network, device).eval(), saved


def checkpoint_types() -> dict[str, tuple[type, ...]]:
    """Type of each entry of a checkpoint: the annotations of `save_checkpoint`."""
    hints = typing.get_type_hints(save_checkpoint)
    kinds = {}
    for name in hints.keys() - {"path", "return"}:
        union = isinstance(hints[name], types.UnionType)
        parts = typing.get_args(hints[name]) if union else (hints[name],)
        kinds[name] = tuple(typing.get_origin(part) or part for part in parts)
    return kinds


def refuse_non_finite(weights: dict[str, Any], path: Path) -> None:
    """Raise InputError for weights that are no tensors or no numbers: they segment nothing."""
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: its weights are not numbers (NaN or infinite in {name}); use an earlier "
                "checkpoint, or train again with a lower --learning-rate or --precision fp32"
            )


# ---------------------------------------------------------------------------------------
# Machine: device, precision, processes, signals
# ---------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one (under torchrun: this process's own), else the CPU."""
    check_settings({"device": name})
    if name == "auto":
        gpu = "cuda" if torch.cuda.is_available() else "mps"
        name = gpu if gpu == "cuda" or torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= count:
            sees = f"torch sees {count or 'no'} GPU"
            raise InputError(f"device {name} was asked for, but {sees}; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps was asked for, but torch sees no GPU of Apple; use cpu")
    if name == "mps" and not _convolves("mps"):
        name = "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


@functools.cache
def _convolves(device: str) -> bool:
    """Whether a 3D network trains there; Apple's GPUs learnt it late. Told once where not."""
    try:
        UNet3D(base_channels=2).to(device)(
            torch.zeros(1, 1, 8, 8, 8, device=device)
        ).sum().backward()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        print(f"{device}: no 3D convolutions on this system ({reason}); the CPU is used instead")
        return False
    return True


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float16 on older GPUs, else float32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    ask: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = ask() if device.type == "cpu" else {}
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Context in which convolutions run in `precision`; does nothing for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all processes under torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes when torchrun started this one; otherwise do nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's collectives use the current one
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    values = [value] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------

VALIDATION_OVERLAP = 0.25  # of the windows of a whole case; 0.5 takes up to three times as long
LONG_SECONDS = 1800  # of training on a CPU; from there on the smaller recipe is named
TIMING = ("samples_per_s", "data_wait_percent", "peak_memory_mb", "epoch_seconds")  # of a history


@dataclass
class Run:
    """A training under way: what changes with each step, and what its checkpoints carry."""

    model: nn.Module  # on `device`; under torchrun each process brings its own copy
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler  # stepped once an epoch
    folder: Path  # best.pt, last.pt, metrics.csv, curves.png and preview.png are left here
    device: torch.device
    precision: torch.dtype  # of the convolutions
    # What every checkpoint carries along: network_args, preprocessing (its labels name the
    # classes), inference, declared, modality and config.
    carried: dict[str, Any]
    # Validate and keep, as best.pt, an exponential moving average of the weights, with this decay
    # per step; 0 uses the weights as they are.
    ema_decay: float = 0.0
    # Of the weights that are kept, so much stays what they were at first; the rest is learnt.
    pretrained_share: float = 0.0
    compile_network: bool = False  # run the network through torch.compile
    tensorboard: bool = False  # also write the history as TensorBoard event files
    history: list[dict[str, float]] = field(default_factory=list)  # a row per epoch
    losses: list[float] = field(default_factory=list)  # one per step of the epoch under way
    counts: Any = 0  # the sum of their `overlap_counts`, (3, classes − 1)
    told: bool = False  # how long an epoch takes

    def __post_init__(self) -> None:
        scaled = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        moving = get_ema_multi_avg_fn(self.ema_decay)
        averaged = functools.partial(AveragedModel, multi_avg_fn=moving, use_buffers=True)
        self.average = averaged(self.model) if self.ema_decay else None
        self.mixed = copy.deepcopy(self.model) if self.pretrained_share else None
        self.first = copy.deepcopy(self.model.state_dict()) if self.mixed else None

    @property
    def learnt(self) -> nn.Module:
        """The network with the latest weights, or with their average."""
        return self.average.module if self.average else self.model

    @property
    def kept(self) -> nn.Module:
        """What is validated, saved and applied later."""
        return self.mixed or self.learnt

    def mix(self) -> None:
        """Lay what is kept between the first weights and those learnt since.

        It keeps what few patients would unlearn: Wortsman et al. 2022, arXiv:2109.01903.
        """
        if self.mixed and self.first:
            learnt = self.learnt.state_dict()
            self.mixed.load_state_dict({
                name: new.lerp(self.first[name], self.pretrained_share)
                if new.is_floating_point() else new
                for name, new in learnt.items()
            })  # fmt: skip

    @property
    def class_names(self) -> list[str]:
        """Of the foreground, in the order of the channels."""
        return list(self.carried["preprocessing"]["labels"])[1:]

    def wrap_network(self) -> nn.Module:
        """The model as it is trained: over all processes, compiled."""
        parallel = nn.parallel.DistributedDataParallel
        network = parallel(self.model) if dist.is_initialized() else self.model
        return cast(nn.Module, torch.compile(network)) if self.compile_network else network

    def predict(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (B, C, X, Y, Z) in float32 of what is kept; of whole cases blended from windows as
        inference does it, and left where the case lies: a large one may not fit on a GPU."""
        from monai.inferers import sliding_window_inference

        def ask(part: torch.Tensor) -> torch.Tensor:
            with autocast(self.device, self.precision):
                return self.kept(move_image(part, self.device)).float()

        if tuple(image.shape[2:]) == (window := tuple(self.carried["inference"]["window"])):
            return ask(image)
        logits = sliding_window_inference(
            image, window, 1, ask, VALIDATION_OVERLAP, "gaussian", sw_device=self.device,
            device=image.device,
        )  # fmt: skip
        return cast(torch.Tensor, logits)

    def save(self, name: str) -> None:
        """Write best.pt (what applying needs) or last.pt (also all that resuming needs)."""
        self.mix()
        state: dict[str, Any] = {
            "network_state": self.kept.state_dict(),
            "epoch": len(self.history),
            "val_dice": self.history[-1].get("val_dice", math.nan) if self.history else math.nan,
            "history": self.history,
        }
        if name == "last.pt":
            state |= {
                "step_losses": self.losses,
                "step_counts": np.asarray(self.counts).tolist() if self.losses else None,
                "averaging_state": self.hold_back(),
                "optimizer_state": self.optimizer.state_dict(),
                "scheduler_state": self.scheduler.state_dict(),
                "scaler_state": self.scaler.state_dict(),
                "rng_state": {"cpu": torch.get_rng_state()},
            }
        save_checkpoint(self.folder / name, **self.carried, **state)

    def hold_back(self) -> dict[str, Any] | None:
        """What resuming needs where the weights kept are not those that are trained."""
        if self.kept is self.model:
            return None
        apart = self.average and self.mixed  # else the average is what is kept
        return {
            "weights": self.model.state_dict(),
            "average": self.learnt.state_dict() if apart else None,
            "steps": int(self.average.n_averaged) if self.average else 0,
            "first": self.first,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Put everything back as it was when a last.pt was written."""
        if saved["optimizer_state"] is None:
            raise InputError("a best.pt holds no optimizer state; resume from the run's last.pt")
        held = saved.get("averaging_state") or {}
        self.model.load_state_dict(held.get("weights") or saved["network_state"])
        if self.average:
            self.average.module.load_state_dict(held.get("average") or saved["network_state"])
            self.average.n_averaged.fill_(held["steps"])
        if self.first:
            self.first = held["first"]
        self.optimizer.load_state_dict(saved["optimizer_state"])
        self.scheduler.load_state_dict(saved["scheduler_state"])
        self.scaler.load_state_dict(saved["scaler_state"])
        torch.set_rng_state(saved["rng_state"]["cpu"].cpu())
        self.history, self.losses = list(saved["history"]), list(saved["step_losses"])
        self.counts = np.array(saved["step_counts"]) if self.losses else 0

    def finish_epoch(self, val_loader: Any, max_epochs: int) -> None:
        """Write what an epoch leaves; last.pt at the end, so that a killed run lacks nothing."""
        row = self.history[-1]
        if best_epoch(self.history) == row["epoch"]:
            self.save("best.pt")
        write_csv(self.history, self.folder / "metrics.csv")
        save_figure(curves_figure(self.history, self.class_names), self.folder / "curves.png")
        if "val_dice" in row:
            save_figure(preview_figure(self, val_loader), self.folder / "preview.png")
        if self.tensorboard:
            _write_events(row, self.folder)
        self.save("last.pt")
        print(describe_epoch(self.history, max_epochs), flush=True)

    def fetch(self, pending: list[tuple[list[str], torch.Tensor, torch.Tensor]]) -> None:
        """Move losses and counts of steps, which still wait on the device, here."""
        if not pending:
            return
        values = torch.stack([loss for _, loss, _ in pending]).tolist()
        for (cases, _, _), value in zip(pending, values, strict=True):
            if not math.isfinite(value):
                raise InputError(
                    f"the loss became {value} in a batch of {', '.join(cases)}; look at these "
                    "cases (preprocess.png), lower --learning-rate, or use --precision fp32"
                )
        self.losses += values
        self.counts += torch.stack([counts for *_, counts in pending]).sum(dim=0).cpu().numpy()
        pending.clear()


def train(
    run: Run,
    train_loader: Any,
    val_loader: Any,
    loss_function: nn.Module,
    *,
    max_epochs: int,
    val_interval: int = 1,
    gradient_clip: float = 0.0,
    patience: int = 0,
) -> list[dict[str, float]]:
    """Fit `run.model`; best.pt, last.pt, metrics.csv, curves.png and preview.png in `run.folder`.

    Args:
        train_loader, val_loader: batches of {"image" (B, C, X, Y, Z), "label" (B, 1, X, Y, Z) class
            indices, "case" names}; `train_loader.set_epoch(epoch, step)` starts an epoch at a step.
            Without a `val_loader` (None) there is no best.pt.
        loss_function: (logits, label) → scalar.
        val_interval: validate every so many epochs, and after the last one.
        gradient_clip: largest norm of the gradient; 0 leaves it alone.
        patience: stop after so many validations without a better Dice; 0 never stops early.

    Returns the history, as in metrics.csv. Ctrl-C finishes the step under way, writes last.pt and
    raises KeyboardInterrupt.
    """
    network, first_process = run.wrap_network(), rank_and_size()[0] == 0
    with delayed_interrupt(usual=dist.is_initialized()) as interrupted:
        for epoch in range(len(run.history) + 1, max_epochs + 1):
            begun = time.perf_counter()
            row = {"epoch": epoch, "learning_rate": float(run.scheduler.get_last_lr()[0])}
            train_loader.set_epoch(epoch, len(run.losses))
            how = (loss_function, gradient_clip, (epoch, max_epochs), interrupted)
            row |= train_one_epoch(run, network, train_loader, *how)
            if interrupted():
                run.save("last.pt")
                raise KeyboardInterrupt(f"go on with: python train.py --resume {run.folder}")
            run.losses, run.counts = [], 0
            run.scheduler.step()
            if val_loader is not None and (epoch % val_interval == 0 or epoch == max_epochs):
                row |= validate(run, val_loader, loss_function)
            run.history.append(row | {"epoch_seconds": time.perf_counter() - begun})
            if first_process:
                run.finish_epoch(val_loader, max_epochs)
            if patience and validations_since_best(run.history) >= patience:
                print(f"no better Dice in {patience} validations: stopped after epoch {epoch}")
                break
    return run.history


def train_one_epoch(
    run: Run,
    network: nn.Module,
    loader: Any,
    loss_function: nn.Module,
    clip: float,
    epochs: tuple[int, int],
    interrupted: Callable[[], bool],
) -> dict[str, float]:
    """One pass over the training sub-volumes, or the rest of one, of `epochs` (this one, the last).

    The loss is fetched from the GPU only when the bar is redrawn, so that the GPU never waits; a
    loss that is not finite stops the run there, with the names of its cases. Returns mean loss,
    Dice and speed.
    """
    network.train()
    done, steps = len(run.losses), len(run.losses) + len(loader)
    start = redrawn = time.perf_counter()
    pending, marks, waited, samples, memory = [], [], 0.0, 0, 0.0
    batches = iter(loader)
    title = f"epoch {epochs[0]}/{epochs[1]}"
    with show_progress(total=steps, initial=done, desc=title, unit="batch") as bar:
        while done < steps and not interrupted():
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            loss, counts = train_step(run, network, batch, loss_function, clip)
            pending.append((list(batch["case"]), loss, counts))
            done, samples = done + 1, samples + len(batch["case"])
            bar.update()
            if done == steps or time.perf_counter() - redrawn > 0.5:
                run.fetch(pending)
                redrawn, memory = time.perf_counter(), max(memory, used_memory_mb(run.device))
                bar.set_postfix(loss=f"{np.mean(run.losses):.4f}")
                marks.append((done, redrawn))
                tell_pace(run, marks, steps, epochs)
    batches.close()
    run.fetch(pending)
    seconds = time.perf_counter() - start
    return {
        "train_loss": float(np.mean(gathered(np.mean(run.losses) if run.losses else math.nan))),
        "train_dice": nan_mean(dice_metric(counts=sum(gathered(run.counts)))) if done else math.nan,
        "samples_per_s": rank_and_size()[1] * samples / seconds,
        "data_wait_percent": 100 * waited / seconds,
        "peak_memory_mb": memory,
    }


def train_step(
    run: Run, network: nn.Module, batch: dict[str, Any], loss_function: nn.Module, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward and update; loss and `overlap_counts` of the batch, still on the device."""
    image = move_image(batch[IMAGE], run.device)
    label = batch[LABEL].to(run.device, non_blocking=True)
    run.optimizer.zero_grad(set_to_none=True)
    with autocast(run.device, run.precision):
        logits = network(image)
    loss = loss_function(logits.float(), label)
    run.scaler.scale(loss).backward()
    if clip:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average:
        run.average.update_parameters(run.model)
    found = predicted_classes(logits.detach()).masked_fill(label[:, 0] == IGNORED, 0)
    counts = list_overlaps(found, label[:, 0], logits.shape[1])
    return loss.detach(), torch.stack([torch.stack(numbers) for numbers in counts], dim=1)


def move_image(image: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Images (B, 1, X, Y, Z) on the device, in the layout that is fastest there."""
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last_3d
    return image.to(device, non_blocking=True, memory_format=layout)


def tell_pace(
    run: Run, marks: list[tuple[int, float]], steps: int, epochs: tuple[int, int]
) -> None:
    """Say once how long an epoch and all of them take, by two times (steps done, seconds)."""
    if run.told or len(marks) < 2 or rank_and_size()[0] > 0:
        return
    run.told = True
    (some, begun), (more, ended) = marks[0], marks[-1]
    epoch = (ended - begun) / (more - some) * steps
    count = epochs[1] - epochs[0] + 1
    whole = epoch * count
    text = f"an epoch takes about {format_seconds(epoch)}, {count} about {format_seconds(whole)}"
    if run.device.type == "cpu" and whole > LONG_SECONDS:
        text += "; the recipe for a CPU is python train.py laptop (docs/recipes.md)"
    tqdm.write(text)


def used_memory_mb(device: torch.device) -> float:
    """Largest memory of tensors so far on a GPU; of the whole process now on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return psutil.Process().memory_info().rss / 1e6


@torch.no_grad()
def validate(run: Run, loader: Any, loss_function: nn.Module) -> dict[str, float]:
    """Mean loss of batches with foreground, and Dice per class, at the network's resolution.

    It chooses best.pt; the figure to report is apply_model.py's, on the scan's own grid.
    Dice: voxels counted per patient, then the mean over patients. NaN for a class that no patient
    has: what the network finds of it says nothing about it.
    """
    run.mix()
    run.kept.eval()
    names, losses = run.class_names, []
    counts: dict[str, Any] = defaultdict(int)
    for batch in show_progress(loader, desc="validation", unit="batch"):
        logits = run.predict(batch[IMAGE])
        label = batch[LABEL].to(logits.device)
        if hide_ignored(label).any():  # the Dice of nothing is nearly always 0: it would drown all
            losses.append(loss_function.to(logits.device)(logits, label).item())
        found = predicted_classes(logits).masked_fill(label[:, 0] == IGNORED, 0)
        for case, predicted, true in zip(batch["case"], found, label[:, 0], strict=True):
            counts[case] += overlap_counts(predicted, true, len(names) + 1)
    loss_function.to(run.device)
    merged: dict[str, Any] = defaultdict(int)  # a patient's sub-volumes may be in other processes
    for part in gathered(dict(counts)):
        for case, count in part.items():
            merged[case] += count
    table = np.array([dice_metric(counts=count) for count in merged.values()])
    dice = np.array([nan_mean(column) for column in table.T])
    dice[sum(merged.values())[2] == 0] = math.nan
    loss = nan_mean([value for part in gathered(losses) for value in part])
    row = {"val_loss": loss, "val_dice": nan_mean(dice)}
    return row | {f"val_dice_{name}": float(d) for name, d in zip(names, dice, strict=True)}


def hide_ignored(label: torch.Tensor) -> torch.Tensor:
    """Class indices with background where nobody judged."""
    return label.masked_fill(label == IGNORED, 0)


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """(B, C, …) logits → (B, …) uint8 class indices."""
    if logits.shape[1] == 2:  # argmax over two classes is 100 times slower than a comparison
        return (logits[:, 1] > logits[:, 0]).to(torch.uint8)
    return logits.argmax(dim=1).to(torch.uint8)


def _write_events(row: dict[str, float], folder: Path) -> None:
    """One epoch as TensorBoard scalars; a file per epoch, so that a crash tears none."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "events"), filename_suffix=f".{row['epoch']}") as writer:
        for key, value in row.items():
            writer.add_scalar(key, value, row["epoch"])


# ---------------------------------------------------------------------------------------
# Picture of a training
# ---------------------------------------------------------------------------------------


@torch.no_grad()
def preview_figure(run: Run, loader: Any) -> Any:
    """The same few validation slices every time: truth and prediction outlined.

    Of each sub-volume the slice with most of its last class, the tumour where there is one.
    """
    from matplotlib.figure import Figure

    run.kept.eval()
    examples = loader.dataset.examples(6)
    columns = math.ceil(len(examples) / math.ceil(len(examples) / 3))
    rows = math.ceil(len(examples) / columns)
    figure = Figure(figsize=(4 * columns, 4.2 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(examples) :]:
        axes.axis("off")
    for axes, item in zip(grid, examples, strict=False):
        logits = run.predict(item[IMAGE][None])
        truth = hide_ignored(item[LABEL][0])
        middle = find_busiest_slice(as_array(truth == max(int(truth.max()), 1)))
        drawn = {**item, LABEL: truth, PRED: predicted_classes(logits)[0]}
        title = f"{item['case']}, slice {item['first_slice'] + middle + 1}"
        show_patient(drawn, middle, axes=axes, names=run.class_names, title=title)
    add_legend(figure, run.class_names, truth=True)
    return figure


History = list[dict[str, float]]


def _validated(history: History) -> History:
    return [row for row in history if math.isfinite(row.get("val_dice", math.nan))]


def best_epoch(history: History) -> int:
    """Epoch of the highest validation Dice (the first one of equals); 0 before any validation."""
    best = max(_validated(history), key=lambda row: row["val_dice"], default={"epoch": 0})
    return int(best["epoch"])


def validations_since_best(history: History) -> int:
    """How many validations gave no better Dice since the best one."""
    best = best_epoch(history)
    return sum(row["epoch"] > best for row in _validated(history))


def describe_epoch(history: History, max_epochs: int) -> str:
    """One line on the last epoch: losses, Dice, and the time that is left."""
    row = history[-1]
    line = f"epoch {row['epoch']}/{max_epochs}: loss {row['train_loss']:.4f}"
    if "val_dice" in row:
        mark = " (best so far)" if best_epoch(history) == row["epoch"] else ""
        line += f", validation loss {row['val_loss']:.4f}, Dice {row['val_dice']:.4f}{mark}"
    line += f", {row['samples_per_s']:.2f} samples/s, {format_seconds(row['epoch_seconds'])}"
    recent = [known["epoch_seconds"] for known in history[-5:] if "epoch_seconds" in known]
    left = (max_epochs - row["epoch"]) * float(np.mean(recent))
    return f"{line}, {format_seconds(left)} left" if left else line


def curves_figure(history: History, class_names: Sequence[str]) -> Any:
    """Loss and Dice over the epochs, the best epoch marked; how long an epoch takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, dice_axes = figure.subplots(1, 2)

    def line(axes: Any, key: str, label: str, colour: str, style: str) -> None:
        points = [(row["epoch"], row[key]) for row in history if key in row]
        if any(math.isfinite(value) for _, value in points):
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)

    line(loss_axes, "train_loss", "training", "#0072B2", "-o")
    line(loss_axes, "val_loss", "validation", "#E69F00", "-s")
    line(dice_axes, "train_dice", "training (augmented)", "0.5", "--")
    for value, name in enumerate(class_names, start=1):
        line(dice_axes, f"val_dice_{name}", name, class_colour(value), "-s")
    best = best_epoch(history)
    if best:
        dice_axes.axvline(best, color="0.6", linestyle=":", label=f"best.pt (epoch {best})")
    seconds = nan_mean([row.get("epoch_seconds", math.nan) for row in history])
    pace = f" ({format_seconds(seconds)} an epoch)" if math.isfinite(seconds) else ""
    loss_axes.set(xlabel=f"epoch{pace}", ylabel="loss", title="Loss")
    dice_axes.set(xlabel="epoch", ylabel="Dice", ylim=(0, 1), title="Dice of validation patients")
    for axes in (loss_axes, dice_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure
