"""Step 3: train the 3D U-Net on prepared sub-volumes.

    python train.py                             # the settings below
    python train.py --learning-rate 3e-4        # any of them from the command line
    python train.py liver-tumour-ce             # one of the RECIPES below, settings for a purpose
    python train.py --resume checkpoints/liver  # go on where a run stopped
    python train.py --show                      # only draw what the network would see
    torchrun --nproc-per-node 4 train.py        # on four GPUs

Edit the settings in place or give them as options; the checkpoint carries them all. Read
`curves.png` and `preview.png` in the run's folder to see how it goes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from monai import losses

from data.labels import LIVER_WITH_TUMOURS, Labels, as_labels, resolve_classes
from preprocess import (
    Augment,
    Chain,
    SubvolumeLoader,
    Subvolumes,
    Tiles,
    augmentation,
    cache_split,
    read_prepared,
    show_inputs,
)
from utilities import (
    IMAGE,
    InputError,
    NetworkName,
    atomic_write,
    build_network,
    command_line,
    load_checkpoint,
    on_device,
    pick,
    pick_device,
    pick_precision,
    process_group,
    rank_and_size,
    train,
)

LossName = Literal[
    "dice", "ce", "weighted_ce", "dice_ce", "weighted_dice_ce", "dice_focal", "tversky"
]
OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "cosine", "poly"]


def parse_classes(words: list[str]) -> dict[str, tuple[str, ...]]:
    """`["liver=liver,tumour"]` → {"liver": ("liver", "tumour")}."""
    pairs = (word.partition("=") for word in words)
    return {name: tuple((values or name).split(",")) for name, _, values in pairs}


Classes = Annotated[  # on the command line: --labels liver=liver,tumour or liver=1 tumour=2
    dict[str, tuple[str, ...]],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=LABEL,…",
        instance_from_str=parse_classes,
        is_instance=lambda classes: isinstance(classes, dict),
        str_from_instance=lambda classes: [
            f"{n}={','.join(map(str, classes[n]))}" for n in classes
        ],
    ),
]


@dataclass
class Config:
    """Every setting of a training; the checkpoint carries them all."""

    # -- where
    data: Path = Path("data/prepared")  # what prepare.py wrote
    run_folder: Path = Path("checkpoints/liver")  # of this run; one that holds a run is refused
    resume: Path | None = None  # folder of a run to go on with; its settings are taken from there
    show: bool = False  # train nothing: draw preprocess.png beside the data, as preprocess.py does

    # -- what is learnt: class name → names (or values) of the data's labels; the order is the
    # channel order, after the background. The default takes tumours as far as the data have them.
    labels: Classes = field(default_factory=LIVER_WITH_TUMOURS.copy)

    # -- what the network sees
    # "subvolumes": as prepare.py cut them; each slice is resampled in its own plane, the slice axis
    # never. "patches": cut at random from whole cases (prepare.py --subvolume-depth 0), at one
    # spacing along all three axes, which small tumours survive.
    sampling: Literal["subvolumes", "patches"] = "subvolumes"
    spacing: tuple[float, ...] = (1.0, 1.0)  # mm per voxel: x y (then resized), or x y z of patches
    input_size: tuple[int, ...] = (256, 256)  # voxels, multiples of 8: x y, or x y z of patches
    hu_window: tuple[float, float] | None = (-200.0, 250.0)  # HU that become 0 and 1; soft tissue.
    # None, for MR: negatives become 0, then each slice is divided by its maximum. Of CT that makes
    # the brightness of a liver depend on the bone beside it.
    patches_per_case: int = 8  # random patches from each case in an epoch
    foreground_sampling: float = 0.67  # part of the patches centred on foreground, classes alike

    # -- augmentation of the training sub-volumes (on few patients, more of it measured better)
    augment_probability: float = 0.8  # of each of: affine change, noise, intensity scaling, shift
    rotation_degrees: float = 15.0  # largest rotation in plane, either way
    translation: float = 0.1  # largest shift either way, fraction of the picture's side
    scaling: float = 0.2  # largest change of size either way
    noise_sd: float = 0.02  # largest noise, in units of the 0..1 intensity (0.02 = 9 HU)
    intensity_scaling: float = 0.15  # largest change of contrast either way (contrast agent)
    intensity_shift: float = 0.1  # largest change of brightness either way (0.1 = 45 HU)
    flip_probability: float = 0.0  # left-right; 0, because a liver is on the right

    # -- network
    # No deep supervision: it has not been measured to help here.
    network: NetworkName = "unet3d"  # unet3d is Çiçek et al. 2016; the others are MONAI's
    base_channels: int = 32  # width; 32 is the paper's 19 M parameters, 8 trains on a laptop
    pretrained: Path | None = None  # a checkpoint whose weights to begin with, of the same network

    # -- optimisation
    loss: LossName = "dice"  # soft Dice of the foreground classes
    optimizer: OptimizerName = "adam"  # adamw and sgd have their usual weight decay and momentum
    learning_rate: float = 3e-4  # at the start
    schedule: ScheduleName = "cosine"  # of the learning rate, by epoch
    batch_size: int = 2  # sub-volumes per step (and per process under torchrun)
    max_epochs: int = 100  # passes over the training sub-volumes
    gradient_clip: float = 12.0  # largest gradient norm; 0 leaves it alone
    ema_decay: float = 0.0  # keep a moving average of the weights; 0.99 steadies a constant rate
    patience: int = 0  # stop after so many validations without a better Dice; 0 = never
    val_interval: int = 1  # epochs between validations

    # -- machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: the fastest one here
    compile: bool = False  # torch.compile: a minute at the start, faster steps on a GPU
    deterministic: bool = False  # repeatable on a GPU as far as torch can, slower; a CPU always is
    sync_batch_norm: bool = False  # under torchrun: statistics over all GPUs, for small batches
    disk_cache: bool = False  # keep preprocessed sub-volumes beside the data for the next run
    tensorboard: bool = False  # also write event files: tensorboard --logdir checkpoints
    seed: int = 0  # of weights, order and augmentation

    # -- inference, carried to apply_model.py
    overlap: float = 0.5  # of neighbouring windows, along each axis they slide on

    def window(self, subvolume_depth: int) -> tuple[int, ...]:
        """Voxels (x, y, z) of the network's input."""
        depth = () if self.sampling == "patches" else (subvolume_depth,)
        return (*self.input_size, *depth)

    def plain(self) -> dict[str, Any]:
        """All settings as plain Python types, for the checkpoint and config.json."""
        settings = dataclasses.asdict(self)
        return {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}


# Named settings, each for a purpose: `python train.py NAME`, any of them still to be overridden.
# The first one is `python train.py` alone. Add your own.
RECIPES: dict[str, tuple[str, Config]] = {
    "liver-unet3d": (
        "liver with its tumours; 19 M 3D U-Net on 16-slice sub-volumes, Dice",
        Config(),
    ),
    "liver-monai": (
        "the same with MONAI's residual U-Net on patches, Dice + weighted cross-entropy",
        Config(
            data=Path("data/whole"),  # prepare.py … --subvolume-depth 0 --destination data/whole
            run_folder=Path("checkpoints/liver-monai"),
            sampling="patches",
            spacing=(1.5, 1.5, 1.0),
            input_size=(128, 128, 64),
            hu_window=(-200.0, 200.0),
            network="unet",
            loss="weighted_dice_ce",
            learning_rate=1e-3,
        ),
    ),
    "liver-slices-resnet34": (
        "the same slice by slice; 2D U-Net with a ResNet-34 encoder",
        Config(
            run_folder=Path("checkpoints/liver-slices-resnet34"),
            network="resnet34_unet",
            loss="dice_ce",
            learning_rate=1e-3,
            overlap=0.0,  # windows know nothing of each other: a slice is the same in each
        ),
    ),
    "liver-tumour-ce": (
        "liver and tumour apart; 3D U-Net on patches, cross-entropy (try weighted_ce, dice_ce)",
        Config(
            data=Path("data/whole"),
            run_folder=Path("checkpoints/liver-tumour-ce"),
            labels={"liver": ("liver",), "tumour": ("tumour",)},
            sampling="patches",
            spacing=(1.0, 1.0, 1.0),
            input_size=(128, 128, 64),
            loss="ce",
        ),
    ),
}


class CrossEntropy(torch.nn.CrossEntropyLoss):
    """Cross-entropy of logits (B, C, X, Y, Z) and class indices (B, 1, X, Y, Z)."""

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return super().forward(logits, label[:, 0].long())


# Dice is of the foreground alone. batch=True pools the voxels of a batch: a sub-volume with a
# sliver of liver then does not swing the gradient as much as one that is full of it.
DICE = {"softmax": True, "to_onehot_y": True, "include_background": False, "batch": True}

LOSSES: dict[str, Callable[[torch.Tensor], torch.nn.Module]] = {  # class weights → loss
    "dice": lambda weights: losses.DiceLoss(**DICE),
    "ce": lambda weights: CrossEntropy(),
    "weighted_ce": lambda weights: CrossEntropy(weight=weights),
    "dice_ce": lambda weights: losses.DiceCELoss(**DICE),
    "weighted_dice_ce": lambda weights: losses.DiceCELoss(**DICE, weight=weights),
    "dice_focal": lambda weights: losses.DiceFocalLoss(**DICE),
    # β > α: a missed voxel costs more than a false one, because organs are small beside the body
    "tversky": lambda weights: losses.TverskyLoss(**DICE, alpha=0.3, beta=0.7),
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, rate, fused=True),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, rate, fused=True),
    "sgd": lambda parameters, rate: torch.optim.SGD(
        parameters, rate, momentum=0.99, nesterov=True, weight_decay=3e-5, fused=True
    ),
}

SCHEDULES: dict[str, Callable[[float], float]] = {  # progress 0..1 → factor of learning_rate
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "poly": lambda progress: (1 - progress) ** 0.9,
}


def check(config: Config, prepared: dict[str, Any]) -> None:
    """Refuse settings that cannot work, before hours are spent on them."""
    patches, depth = config.sampling == "patches", prepared["subvolume_depth"]
    if patches == bool(depth):
        found = f"sub-volumes of {depth} slices" if depth else "whole cases"
        raise InputError(
            f"{config.data}: holds {found}, but --sampling is {config.sampling}; prepare it again "
            f"into another --destination with --subvolume-depth {0 if patches else 16}, and name "
            "that folder in --data"
        )
    axes = "x y z" if patches else "x y"
    for name in ("spacing", "input_size"):
        if len(given := getattr(config, name)) != len(axes.split()):
            raise InputError(
                f"--{name.replace('_', '-')} of {config.sampling} must be {axes}, got {given}"
            )
    window = config.window(depth)
    if any(size % 8 for size in window):
        raise InputError(
            "the network's input must be a multiple of 8 along each axis (three poolings), got "
            f"{window} voxels; change --input-size, or prepare.py's --subvolume-depth"
        )
    if config.resume is None and (config.run_folder / "last.pt").exists():
        raise InputError(
            f"{config.run_folder}: holds a run already; give another --run-folder, or go on with "
            f"--resume {config.run_folder}"
        )


def resumed(config: Config, saved: dict[str, Any]) -> Config:
    """The saved run's settings; only where it runs and how long may be given anew."""
    free = {"run_folder": config.resume, "resume": config.resume, "data": Path(saved["data"])}
    free |= {"device": config.device}
    if config.max_epochs != Config().max_epochs:
        free["max_epochs"] = config.max_epochs
    result = dataclasses.replace(Config(**{**saved, "resume": None}), **free)
    given, defaults, kept = config.plain(), Config().plain(), result.plain()
    changed = [key for key in given if given[key] != defaults[key] and given[key] != kept[key]]
    if changed:
        raise InputError(
            f"{config.resume}: a resumed run keeps its settings, but {', '.join(changed)} differ; "
            "leave them out, or start another --run-folder"
        )
    return result


def class_weights(prepared: dict[str, Any], labels: Labels) -> torch.Tensor:
    """One weight per class from its voxels in the training data; their mean is 1.

    Inverse to the square root of the count. Inverse to the count itself, a tumour voxel weighs a
    thousand times as much as one of the background: on six real CTs a network trained with that
    invented more than a litre of tumour per patient.
    """
    counts = torch.zeros(len(labels), dtype=torch.float64)
    for record in prepared["subvolumes"]:
        if record["split"] == "training":
            for raw, voxels in record["voxels_per_label"].items():
                classes = [i for i, values in enumerate(labels.values()) if int(raw) in values]
                counts[classes[0] if classes else 0] += voxels
    inverse = 1 / counts.clamp(min=1).sqrt()
    return (inverse / inverse.mean()).float()


def begin_with(network: torch.nn.Module, path: Path) -> None:
    """Load the weights of a checkpoint; raises InputError where it holds another network."""
    saved, own = load_checkpoint(path), network.state_dict()
    given = saved["network_state"]
    other = [
        name for name in {**own, **given}
        if name not in given or name not in own or given[name].shape != own[name].shape
    ]  # fmt: skip
    if other:
        raise InputError(
            f"{path}: --pretrained must be the same network, but {len(other)} of its weights "
            f"differ, such as {other[0]}; it was trained with {saved['network_args']} for "
            f"{', '.join(saved['labels'])}: give the same --network, --base-channels and as many "
            "--labels"
        )
    network.load_state_dict(given)


def safe_precision(config: Config, device: torch.device, window: Sequence[int]) -> str:
    """`config.precision`, but float32 where "auto" would meet a fault of torch on the CPU.

    Gradients of bfloat16 convolutions are partly never written (torch 2.13, seen as NaN and as runs
    that differ) where feature maps shrink to 2 × 2 pixels, or where a single slice is halved.
    """
    tiny = min(window[:2]) < 64 or window[2] < 16
    on_cpu = config.precision == "auto" and device.type == "cpu"
    return "fp32" if on_cpu and tiny else config.precision


def main(config: Config) -> None:
    resume = load_checkpoint(config.resume / "last.pt") if config.resume else None
    if resume is not None:
        config = resumed(config, resume["config"])
    device = pick_device(config.device)
    prepared = read_prepared(config.data)
    check(config, prepared)
    chain = pick(
        Chain, config, labels=resolve_classes(config.labels, as_labels(prepared["labels"]))
    )
    if config.show:
        # training leaves some sub-volumes alone; a picture should not
        augment = pick(Augment, config, classes=len(chain.labels), augment_probability=1.0)
        picture = show_inputs(config.data, prepared, chain, augment, device)
        print(f"look at {picture}: does the outline lie on the organ?")
        return
    with process_group(device):
        run(config, prepared, chain, device, resume)


def run(
    config: Config,
    prepared: dict[str, Any],
    chain: Chain,
    device: torch.device,
    resume: dict[str, Any] | None,
) -> None:
    """Data, network, optimizer, loop: one process of possibly several."""
    rank, processes = rank_and_size()
    torch.manual_seed(config.seed)
    if config.deterministic:  # 3D max pooling has no such algorithm on a GPU: warned, not refused
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not config.deterministic  # all batches have one shape

    # data
    cache = (chain, device, config.disk_cache)
    training = cache_split(prepared, config.data, "training", *cache)
    validation = cache_split(prepared, config.data, "validation", *cache)
    augment = augmentation(pick(Augment, config, classes=len(chain.labels)), device)
    patches, window = config.sampling == "patches", config.window(prepared["subvolume_depth"])
    repeats = config.patches_per_case if patches else 1
    augmented = Subvolumes(training, augment, config.seed, repeats)
    known = Tiles(validation, window) if patches else Subvolumes(validation)
    loading = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "pin": device.type == "cuda" and not training[0][IMAGE].is_cuda,
    }
    train_loader = SubvolumeLoader(augmented, shuffle=True, **loading)
    val_loader = SubvolumeLoader(known, shuffle=False, **loading)

    # network, loss, optimizer
    network_args = {
        "name": config.network,
        "in_channels": 1,
        "out_channels": len(chain.labels),
        "base_channels": config.base_channels,
        "input_size": window,
    }
    model = on_device(build_network(**network_args), device)
    if config.pretrained and resume is None:
        begin_with(model, config.pretrained)
    if config.sync_batch_norm and processes > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    loss_function = LOSSES[config.loss](class_weights(prepared, chain.labels)).to(device)
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config.learning_rate)
    factor = SCHEDULES[config.schedule]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: factor(epoch / config.max_epochs)
    )

    # loop
    precision = safe_precision(config, device, window)
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        used = str(pick_precision(precision, device)).removeprefix("torch.")
        print(f"{config.network}: {parameters:,} parameters, {used} on {processes} × {device}")
        with atomic_write(config.run_folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config.plain(), indent=2))
    train(
        model,
        train_loader,
        val_loader,
        loss_function,
        optimizer,
        scheduler,
        max_epochs=config.max_epochs,
        folder=config.run_folder,
        device=device,
        checkpoint={
            "network_args": network_args,
            "preprocessing": asdict(chain),
            "inference": {"window": window, "overlap": config.overlap},
            "labels": chain.labels,
            "config": config.plain(),
        },
        val_interval=config.val_interval,
        precision=precision,
        gradient_clip=config.gradient_clip,
        ema_decay=config.ema_decay,
        patience=config.patience,
        compile_network=config.compile,
        tensorboard=config.tensorboard,
        resume=resume,
    )
    if rank == 0:
        print(
            f"done: {config.run_folder / 'best.pt'}; look at curves.png and preview.png beside it"
        )


if __name__ == "__main__":
    command_line(main, Config, __doc__, RECIPES)
