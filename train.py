"""Step 3: train the 3D U-Net on prepared sub-volumes.

    python train.py                             # the settings below
    python train.py --learning-rate 3e-4        # any of them from the command line
    python train.py liver-tumour-ce             # one of the RECIPES below, settings for a purpose
    python train.py --resume checkpoints/liver  # go on where a run stopped
    python train.py --show                      # only draw what the network would see
    torchrun --nproc-per-node 4 train.py        # on four GPUs

Edit the settings in place or give them as options; the checkpoint carries them all. To see how it
goes, read `curves.png` and `preview.png` in the run's folder. Next: apply_model.py.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).parent))  # Python's safe path leaves it out

from data.labels import LIVER_WITH_TUMOURS
from data.settings import (
    NETWORK_LIBRARIES,
    Amount,
    Classes,
    Count,
    Degrees,
    Device,
    HuWindow,
    Part,
    Positive,
    Seed,
    Share,
    Spacing,
    Whole,
    read_settings,
    run_script,
)  # fmt: skip

NetworkName = Literal[
    "unet3d", "unet", "attention_unet", "segresnet", "vnet", "unetr", "dynunet", "swin_unetr",
    "resnet34_unet",
]  # fmt: skip
LossName = Literal[
    "dice", "ce", "weighted_ce", "dice_ce", "weighted_dice_ce", "dice_focal", "tversky"
]
OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "cosine", "poly"]


@dataclass
class Config:
    """Every setting of a training; the checkpoint carries them all."""

    # -- data and run
    data: Path = Path("data/prepared")  # what prepare.py wrote
    fold: int | Literal["all"] = 0  # of prepare.py --folds: the part that validates; all: none does
    run_folder: Path = Path("checkpoints/liver")  # of this run; one that holds a run is refused
    resume: Path | None = None  # a run (its folder or last.pt) to go on with, with its settings
    show: bool = False  # train nothing: draw preprocess.png beside the data, as preprocess.py does

    # class name → names (or values) of the data's labels; the order is the channel order, after the
    # background. The default takes tumours as far as the data have them.
    labels: Classes = field(default_factory=LIVER_WITH_TUMOURS.copy)

    # -- input

    # "subvolumes": as prepare.py cut them; each slice is resampled in its own plane, the slice axis
    # never. "patches": cut at random from whole cases (prepare.py --subvolume-depth 0), at one
    # spacing along all three axes, which small tumours survive.
    sampling: Literal["subvolumes", "patches"] = "subvolumes"
    # mm: x y (slices are then resized), or x y z of patches; "median": of the training patients
    spacing: tuple[Spacing, ...] | Literal["median"] = (1.0, 1.0)
    input_size: tuple[Count, ...] = (256, 256)  # voxels, multiples of 8 to 32: x y, or x y z
    # HU that become 0 and 1; soft tissue. None, for MR: negatives become 0, then each slice is
    # divided by its maximum. In CT the brightness of a liver would then depend on nearby bone.
    hu_window: HuWindow | None = (-200.0, 250.0)
    patches_per_case: Count = 8  # random patches from each case in an epoch
    # fraction of the patches centred on foreground, classes alike; others on annotated background
    foreground_sampling: Share = 0.67

    # -- augmentation

    # probability of each: affine change, noise, intensity scaling, shift; in training alone. On
    # few patients a higher one measured better.
    augment_probability: Share = 0.8
    rotation_degrees: Degrees = 15.0  # largest rotation in plane, either way
    translation: Share = 0.1  # largest shift either way, fraction of the picture's side
    scaling: Part = 0.2  # largest change of size either way
    noise_sd: Amount = 0.02  # largest noise, in units of the 0..1 intensity (0.02 = 9 HU)
    intensity_scaling: Amount = 0.15  # largest change of contrast either way (contrast agent)
    intensity_shift: Amount = 0.1  # largest change of brightness either way (0.1 = 45 HU)
    flip_probability: Share = 0.0  # left-right; 0, because a liver is on the right

    # -- network
    network: NetworkName = "unet3d"  # unet3d is Çiçek et al. 2016; the others are MONAI's
    base_channels: Count = 32  # width; 32 is the paper's 19 M parameters, 8 trains on a laptop
    pretrained: Path | None = None  # a checkpoint of the same network, whose weights to begin with
    # interpolation of the saved weights: 0 is trained, 1 is pretrained. On few patients 0.5 keeps
    # what they would forget.
    pretrained_share: Part = 0.0
    encoder_weights: Path | None = None  # ResNet-34 of ImageNet (torchvision, smp): resnet34_unet
    dropout: Part = 0.0  # part of the features that training leaves out, where the network has it

    # -- optimisation
    loss: LossName = "dice"  # Dice, cross-entropy (ce), both, focal or Tversky; weighted: by class
    optimizer: OptimizerName = "adam"  # adamw decays weights; sgd has Nesterov momentum 0.99
    weight_decay: Amount | None = None  # None: the optimizer's usual, adamw 0.01, sgd 3e-5, adam 0
    amsgrad: bool = False  # of adam and adamw: steps by the largest second moment so far
    learning_rate: Positive = 3e-4  # at the start
    schedule: ScheduleName = "cosine"  # of the learning rate, by epoch
    batch_size: Count = 2  # sub-volumes per step (and per process under torchrun)
    max_epochs: Count = 100  # passes over the training sub-volumes
    gradient_clip: Amount = 12.0  # largest gradient norm; 0 leaves it alone
    patience: Whole = 0  # stop after so many validations without a better Dice; 0 = never
    val_interval: Count = 1  # epochs between validations

    # -- machine
    device: Device = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: the fastest one here
    compile: bool = False  # torch.compile: a minute at the start, faster steps on a GPU
    deterministic: bool = False  # repeatable on a GPU as far as torch can, slower; a CPU always is
    sync_batch_norm: bool = False  # under torchrun: statistics over all GPUs, for small batches
    tensorboard: bool = False  # also write event files: tensorboard --logdir checkpoints
    seed: Seed = 0  # of weights, order and augmentation

    # -- inference
    overlap: Part = 0.5  # of neighbouring windows, along each axis they slide on; apply_model.py's

    # Names of the options that were given by hand; None: those that differ from the defaults.
    given: ClassVar[frozenset[str] | None] = None

    @property
    def axes(self) -> str:
        """Axes along which spacing and input size are given."""
        return "x y z" if self.sampling == "patches" else "x y"

    @property
    def grain(self) -> int:
        """Voxels of which the input must be a multiple along the axes that the network halves."""
        return GRAINS.get(self.network, 8)

    def window(self, subvolume_depth: int) -> tuple[int, ...]:
        """Voxels (x, y, z) of the network's input."""
        depth = () if self.sampling == "patches" else (subvolume_depth,)
        return (*self.input_size, *depth)

    def list_given(self) -> set[str]:
        """Names of the settings that were given by hand."""
        if self.given is not None:
            return set(self.given)
        mine, defaults = self.plain(), Config().plain()
        return {name for name in mine if mine[name] != defaults[name]}

    def plain(self) -> dict[str, Any]:
        """All settings as plain Python types, for the checkpoint and config.json."""
        settings = dataclasses.asdict(self)
        return {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}


# Named settings, each for a purpose: `python train.py NAME`, any of them still to be overridden.
# The first one is `python train.py` alone. Add your own.
RECIPES: dict[str, tuple[str, Config]] = {
    "liver-unet3d": (
        "liver with its tumours; 19 M 3D U-Net on 16-slice sub-volumes, Dice", Config(),
    ),
    "laptop": (
        "the same in a CPU's minutes: whole cases at 2 mm, from the starter weights", Config(
            # prepare.py … --subvolume-depth 0 --destination data/whole
            data=Path("data/whole"), run_folder=Path("checkpoints/laptop"),
            sampling="patches", spacing=(2.0, 2.0, 2.0), input_size=(96, 96, 64),
            # stronger augmentation than usual: few patients, few minutes
            rotation_degrees=25.0, scaling=0.35, noise_sd=0.05, intensity_scaling=0.3,
            intensity_shift=0.2, network="unet", base_channels=16,
            pretrained=Path("checkpoints/starter.pt"), pretrained_share=0.5,
            loss="dice_ce", learning_rate=1e-3, max_epochs=18,
        ),
    ),
    "liver-monai": (
        "the same with MONAI's residual U-Net on patches, Dice + weighted cross-entropy", Config(
            data=Path("data/whole"), run_folder=Path("checkpoints/liver-monai"),
            sampling="patches", spacing=(1.5, 1.5, 1.0), input_size=(128, 128, 64),
            hu_window=(-200.0, 200.0), network="unet", loss="weighted_dice_ce", learning_rate=1e-3,
        ),
    ),
    "liver-slices-resnet34": (
        "the same slice by slice; 2D U-Net with a ResNet-34 encoder", Config(
            run_folder=Path("checkpoints/liver-slices-resnet34"), network="resnet34_unet",
            loss="dice_ce", learning_rate=1e-3, overlap=0.0,  # a slice is the same in each window
        ),
    ),
    "liver-tumour-ce": (
        "liver and tumour apart; 3D U-Net on patches, cross-entropy (try weighted_ce, dice_ce)",
        Config(
            data=Path("data/whole"), run_folder=Path("checkpoints/liver-tumour-ce"),
            labels={"liver": ("liver",), "tumour": ("tumour",)}, sampling="patches",
            spacing=(1.0, 1.0, 1.0), input_size=(128, 128, 64), loss="ce",
        ),
    ),
}  # fmt: skip


if __name__ == "__main__":  # help and mistakes are told before anything heavy is loaded
    CONFIG = read_settings(Config, __doc__, RECIPES, libraries=NETWORK_LIBRARIES)

import contextlib
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from monai import losses
from monai.networks.utils import one_hot

import preprocess
import utilities
from data import pictures, splits
from data.files import InputError, explain, find_checkpoint, lock_folder, write_json
from data.labels import IGNORED, as_labels, resolve_classes
from data.settings import check_settings, format_seconds, is_first_process, pick, read_saved
from data.trust import learn_volumes
from data.volumes import read_file
from preprocess import KEYS, Augment, Chain, SubvolumeLoader, Subvolumes, cache_split


class AnnotatedLoss(torch.nn.Module):
    """A loss over annotated voxels alone. The others stay as certain background, so that the host
    waits for no GPU: they add nothing to a Dice without background; means leave them out."""

    def __init__(self, loss: torch.nn.Module):
        super().__init__()
        self.loss: Any = loss
        if isinstance(loss, losses.DiceCELoss):
            loss.cross_entropy.ignore_index = IGNORED

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        known, loss, classes = label != IGNORED, self.loss, logits.shape[1]
        sure = logits.new_full((1, classes, 1, 1, 1), -1e4)
        sure[:, 0] = 0
        shown, true = torch.where(known, logits, sure), label * known
        if isinstance(loss, losses.DiceCELoss):
            entropy = loss.ce(logits, label)
            value = loss.lambda_dice * loss.dice(shown, true) + loss.lambda_ce * entropy
        elif isinstance(loss, losses.DiceFocalLoss):
            given, share = (shown, one_hot(true, classes)), known.float().mean().clamp(min=1e-9)
            focal = loss.focal(*given) / share
            value = loss.lambda_dice * loss.dice(*given) + loss.lambda_focal * focal
        else:
            value = loss(shown, true)
        return torch.where(known.any(), value, 0 * logits.sum())


# Dice of the foreground. batch=True pools the voxels of a batch: a sub-volume with a sliver of
# liver then weighs less than one that is full of it.
DICE: dict[str, Any] = dict(softmax=True, to_onehot_y=True, include_background=False, batch=True)
LOSSES: dict[str, Callable[[torch.Tensor], torch.nn.Module]] = {  # class weights → loss
    "dice": lambda weights: losses.DiceLoss(**DICE),
    "ce": lambda weights: losses.DiceCELoss(**DICE, lambda_dice=0.0),
    "weighted_ce": lambda weights: losses.DiceCELoss(**DICE, weight=weights, lambda_dice=0.0),
    "dice_ce": lambda weights: losses.DiceCELoss(**DICE),
    "weighted_dice_ce": lambda weights: losses.DiceCELoss(**DICE, weight=weights),
    "dice_focal": lambda weights: losses.DiceFocalLoss(**DICE),
    # β > α: a missed voxel costs more than a false one, because organs are small beside the body
    "tversky": lambda weights: losses.TverskyLoss(**DICE, alpha=0.3, beta=0.7),
}

ANEW = {"data", "device", "max_epochs", "patience"}  # settings that a resumed run takes anew
EXAMPLES = 8  # sub-volumes whose HU are shown
SLOW = 3600  # seconds of training from which on it is reported
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda weights, rate, **given: torch.optim.Adam(weights, rate, fused=True, **given),
    "adamw": lambda weights, rate, **given: torch.optim.AdamW(weights, rate, fused=True, **given),
    "sgd": lambda weights, rate, weight_decay=3e-5: torch.optim.SGD(
        weights, rate, momentum=0.99, nesterov=True, weight_decay=weight_decay, fused=True
    ),
}
SCHEDULES: dict[str, Callable[[float], float]] = {  # progress 0..1 → factor of learning_rate
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "poly": lambda progress: (1 - progress) ** 0.9,
}


# Of what a network's input must be a multiple; 8 where it is not named.
GRAINS = dict.fromkeys(("unet", "attention_unet", "vnet", "dynunet", "unetr"), 16)
GRAINS |= {"swin_unetr": 32, "resnet34_unet": 32}  # these take any number of slices
Rule = tuple[Callable[[Config, int], Any], str]  # settings and depth of sub-volumes → wrong?
CONTRADICTIONS: list[Rule] = [
    (lambda c, depth: (c.sampling == "patches") == bool(depth),
     "{c.data}: holds {held}, but --sampling is {c.sampling}; {usual}"),
    (lambda c, _: len(c.spacing) != len(c.axes.split()),
     "--spacing of {c.sampling} must be {c.axes}, got {c.spacing}"),
    (lambda c, _: len(c.input_size) != len(c.axes.split()),
     "--input-size of {c.sampling} must be {c.axes}, got {c.input_size}"),
    (lambda c, depth: any(n % c.grain for n in c.window(depth)[: 2 if c.grain == 32 else 3]),
     "{window} voxels: the input of {c.network} must be a multiple of {c.grain} along each axis "
     "that it halves; change --input-size, or prepare.py's --subvolume-depth"),
    (lambda c, depth: count_deepest(c, depth) < 2,
     "{window} voxels are a single one after the poolings of {c.network}, and normalisation "
     "needs two; give --input-size of more than {c.grain} along an axis"),
    (lambda c, _: c.encoder_weights and c.network != "resnet34_unet",
     "--encoder-weights: only --network resnet34_unet has that encoder"),
    (lambda c, _: c.pretrained_share and not c.pretrained,
     "--pretrained-share keeps a share of --pretrained; give it, or share 0"),
    (lambda c, _: c.optimizer == "sgd" and c.amsgrad,
     "--amsgrad is of adam and adamw, got --optimizer sgd; leave it out"),
    (lambda c, _: not c.resume and not c.show and (c.run_folder / "last.pt").exists(),
     "{c.run_folder}: holds a run already; give another --run-folder, or go on with --resume "
     "{c.run_folder}"),
]  # fmt: skip


def check(config: Config, depth: int) -> None:
    """Raise InputError for settings that cannot work on `depth` slices (0: of whole cases)."""
    for is_wrong, message in CONTRADICTIONS:
        if is_wrong(config, depth):
            held, usual = "whole cases", "take a recipe of patches, such as laptop, or prepare"
            usual += " with --subvolume-depth 16"
            if depth:
                held = f"sub-volumes of {depth} slices"
                usual = "prepare.py with --subvolume-depth 0 makes whole cases"
            words = {"held": held, "usual": usual, "window": config.window(depth)}
            raise InputError(message.format(c=config, **words))


def count_deepest(config: Config, depth: int) -> int:
    """Return the voxels normalised together after the last pooling, in 2D those of all slices."""
    grains = [config.grain, config.grain, 1 if config.network == "resnet34_unet" else config.grain]
    return math.prod(max(n // g, 1) for n, g in zip(config.window(depth), grains, strict=True))


def choose_spacing(config: Config, prepared: dict[str, Any]) -> Config:
    """Return the settings with the median spacing (mm) of the training patients."""
    known = prepared["subvolumes"]
    steps = {item["case"]: item["spacing_mm"] for item in known if item["split"] == "training"}
    middle = [round(statistics.median(along), 4) for along in zip(*steps.values(), strict=True)]
    spacing = tuple(middle[: 3 if config.sampling == "patches" else 2])
    if is_first_process():
        print(f"--spacing median: {' × '.join(map(str, spacing))} mm ({len(steps)} training scans)")
    return dataclasses.replace(config, spacing=spacing)


def drop_hu_window(config: Config) -> Config:
    """Return the settings for MR: without a HU window, unless one was given."""
    if config.hu_window is None or "hu_window" in config.list_given():
        return config
    if is_first_process():
        print("the data are MR: --hu-window None is used (each slice divided by its maximum)")
    return dataclasses.replace(config, hu_window=None)


def resume_run(config: Config, path: Path) -> tuple[Config, dict[str, Any]]:
    """Return the settings of a run that goes on, and its last.pt."""
    saved = utilities.load_checkpoint(find_checkpoint(path, ["last.pt"]))
    config = resume_settings(config, path if path.is_dir() else path.parent, saved)
    check_settings(config)
    return config, saved


def resume_settings(config: Config, folder: Path, saved: dict[str, Any]) -> Config:
    """Return the saved run's settings, those of ANEW as they are given now or in config.json; raise
    InputError that names every other setting that differs."""
    names, given = {item.name for item in dataclasses.fields(Config)}, config.list_given()
    if unknown := sorted(saved["config"].keys() - names):
        what = f"a run with settings that are unknown here ({', '.join(unknown)})"
        raise InputError(f"{folder}: {what}; update this program, or train again")
    old = saved["config"] | {"data": find_data(saved["config"], folder), "run_folder": folder}
    edited, path = dict[str, Any](), folder / "config.json"
    if path.is_file():
        written = read_saved(path, Config)
        before = check_settings(saved["config"], f"{path}: ", Config)
        same = ("data", "run_folder", "resume", *given)
        edited = {n: v for n, v in written.items() if n not in same and v != before.get(n)}
    anew = {n: edited[n] for n in edited.keys() & ANEW}
    anew |= {name: getattr(config, name) for name in given & ANEW}
    result = Config(**old | {"resume": folder, "device": config.device} | anew)
    mine, kept = config.plain(), result.plain()
    if changed := {n for n in given - {"resume"} if mine[n] != kept[n]} | (edited.keys() - ANEW):
        what = f"a resumed run keeps its settings, but {', '.join(sorted(changed))} differ"
        remedy = "leave them out, also of config.json, or start another --run-folder"
        raise InputError(f"{folder}: {what}; {remedy}")
    if is_first_process():
        report_differences(saved, {n: v for n, v in anew.items() if v != saved["config"].get(n)})
    return result


def find_data(settings: dict[str, Any], folder: Path) -> Path:
    """Return where a run's data lie: seen from here, or from where the run was begun."""
    data, run = Path(settings["data"]), Path(settings["run_folder"])
    if data.is_absolute() or run.is_absolute() or data.exists():
        return data
    parents = folder.resolve().parents
    base = parents[min(len(run.parts), len(parents)) - 1] if run.parts else folder
    return base / data if (base / data).exists() else data


def report_differences(saved: dict[str, Any], used: dict[str, Any]) -> None:
    """Print what differs between now and the beginning of a run, and whether it is used."""
    begun, lines = saved["begun"], [f"used: {n} {v}" for n, v in used.items()]
    now = {name: str(value) for name, value in Config().plain().items()}
    changed = [n for n in now if now[n] != begun["defaults"].get(n)]
    lines += [f"not used: train.py now has {n} {now[n]}" for n in changed]
    was = saved["versions"] | {"processes": begun.get("processes")}
    used = {"processes": int(os.environ.get("WORLD_SIZE", 1))} | utilities.read_versions()
    for name, mine in used.items():
        if was.get(name) not in (None, mine):
            lines.append(f"{name} {was[name]}, now {mine}: not bit for bit the unbroken run")
    for line in lines:
        print(f"resumed run, {line}")


def choose_precision(config: Config, device: torch.device, window: Sequence[int]) -> torch.dtype:
    """Return the precision of convolutions: float32 where "auto" would meet a fault of torch."""
    # On a CPU torch 2.13 leaves gradients of bfloat16 convolutions partly unwritten (NaN) where
    # feature maps shrink to 2 × 2 pixels, or where a single slice is halved.
    tiny = min(window[:2]) < 64 or window[2] < 16
    on_cpu = config.precision == "auto" and device.type == "cpu"
    return utilities.pick_precision("fp32" if on_cpu and tiny else config.precision, device)


def begin_with(
    network: torch.nn.Module, network_args: dict[str, Any], path: Path
) -> tuple[list[str], list[dict[str, str]]]:
    """Load a checkpoint's weights, but not the head's of another number of classes; return the
    names of the head's, and the patients of the checkpoint. InputError for another network."""
    saved, own = utilities.load_checkpoint(path), network.state_dict()
    given, old = saved["network_state"], saved["network_args"]
    shapes = [{name: value.shape for name, value in state.items()} for state in (own, given)]
    other = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    fixed = network_args["name"] in utilities.FIXED_SIZE  # others' weights fit any size
    aside = dict.fromkeys(("out_channels", "dropout", "projections"), 0)
    aside |= {} if fixed else {"input_size": 0}
    heads_differ = old.get("out_channels") != network_args["out_channels"]
    if other and not (heads_differ and {**old, **aside} == {**network_args, **aside}):
        raise InputError(
            f"{path}: --pretrained must be the same network, but {len(other)} of its weights "
            f"differ, such as {other[0]}; give the --network and --base-channels of {old}"
        )
    network.load_state_dict({n: v for n, v in given.items() if n not in other}, strict=False)
    if other and is_first_process():
        print(f"{path}: {old.get('out_channels')} classes; begins anew: {', '.join(other)}")
    return other, saved["patients"]


def begin_with_encoder(network: Any, path: Path) -> None:
    """Load a ResNet-34 of torchvision or segmentation_models_pytorch into resnet34_unet, its first
    filters added over the colours. Raise InputError where the file holds none."""
    encoder = network.network.encoder
    own, remedy = encoder.state_dict(), "give a ResNet-34 as torch.save wrote its state_dict"
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        given = given.get("state_dict", given)
        inside = [name for name in given if name.startswith("encoder.")]
        taken = {n.removeprefix("encoder."): given[n] for n in inside or given}
        first = taken["conv1.weight"]
        taken["conv1.weight"] = first.sum(dim=1, keepdim=True).expand_as(own["conv1.weight"])
        found = {name: taken[name] for name in own if name in taken or "num_batches" not in name}
        if wrong := next((n for n in found if found[n].shape != own[n].shape), ""):
            raise ValueError(f"{wrong} is {tuple(found[wrong].shape)}")
        utilities.refuse_odd_weights(found, path)
    except Exception as error:  # a foreign file may lead to anything
        raise InputError(
            f"{path}: --encoder-weights: no ResNet-34 ({explain(error):.100}); {remedy}"
        ) from error
    encoder.load_state_dict(found, strict=False)
    if is_first_process():
        left = sorted(name for name in given if name.removeprefix("encoder.") not in found)
        print(f"{path}: {len(found)} weights of the encoder; left out: {', '.join(left) or 'none'}")


def main(config: Config) -> None:
    check_settings(config)
    saved, (_, processes) = None, utilities.read_rank()
    if config.resume:
        config, saved = resume_run(config, config.resume)
        stopped = config.patience and pictures.find_best(saved["history"])[1] >= config.patience
        if stopped or saved["epoch"] >= config.max_epochs:
            done = f"{config.run_folder}: finished after {saved['epoch']} epochs"
            more = "a higher --patience" if stopped else "more --max-epochs"
            print(f"{done}; train on with {more}, or start another with --pretrained")
            return
    device = preprocess.pick_device(config.device, config.precision)
    prepared = splits.choose_fold(splits.read_prepared(config.data), config.fold, config.data)
    config = drop_hu_window(config) if prepared["settings"].get("modality") == "MR" else config
    config = choose_spacing(config, prepared) if config.spacing == "median" else config
    check(config, prepared["subvolume_depth"])
    labels = resolve_classes(config.labels, as_labels(prepared["labels"]))
    ignore, crop = tuple(prepared.get("ignore", ())), prepared["settings"].get("crop_to_body")
    chain = pick(Chain, config, labels=labels, ignore=ignore, crop_to_body=bool(crop))
    if config.show:  # a training leaves some sub-volumes as they are; a picture should not
        augment = pick(Augment, config, classes=len(labels), augment_probability=1.0)
        picture = preprocess.show_inputs(config.data, prepared, chain, augment, device)
        words = shlex.join(word for word in sys.argv[1:] if word != "--show")
        print(f"look at {picture}: is the outline on the organ? Then: python train.py {words}")
        return
    with contextlib.ExitStack() as stack:
        if processes > 1:
            stack.enter_context(utilities.process_group(device))
        if is_first_process():
            stack.enter_context(lock_folder(config.run_folder))
        try:
            fit(config, prepared, chain, device, saved)
        except RuntimeError as error:
            if not utilities.is_memory_short(error):
                raise
            size = " ".join(map(str, config.input_size))
            raise InputError(
                f"out of memory on {device} with --batch-size {config.batch_size}, --input-size "
                f"{size} and --base-channels {config.base_channels}; lower one, or train.py laptop"
            ) from error


def fit(config: Config, prepared: dict, chain: Chain, device: torch.device, saved: Any) -> None:
    """Load the data, build the network, train: in one process of possibly several."""
    torch.manual_seed(config.seed)
    if config.deterministic:  # 3D max pooling has no such algorithm on a GPU: warned, not refused
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    rank, size = utilities.rank_and_size()
    if saved is not None:
        splits.refuse_other_data(saved["content"], prepared, config.data)
        if saved["preprocessing"] != dataclasses.asdict(chain):
            what = f"{config.data / 'dataset.json'}: labels, modality or crop are not the run's"
            raise InputError(f"{what}; prepare the data again, or start another --run-folder")
    splits.refuse_damaged(prepared, config.data, rank, size)
    if is_first_process() and chain.hu_window:
        report_hu(prepared, config.data, chain)
    run = build_run(config, prepared, chain, device, saved)
    loss_function = LOSSES[config.loss](class_weights(prepared, chain.labels)).to(device)
    loss_function = AnnotatedLoss(loss_function) if chain.ignore else loss_function
    window = run.carried["inference"]["window"]
    step_bytes = 0
    if device.type == "cuda":
        step_bytes = utilities.measure_step(run, loss_function, (config.batch_size, 1, *window))
    train_loader, val_loader = load_data(config, prepared, chain, device, step_bytes)
    if is_first_process():
        count = sum(parameter.numel() for parameter in run.model.parameters())
        where = f"{run.precision} on {size} × {device}"
        print(f"{config.network}: {count:,} parameters, {where}")
        if device.type == "cpu":
            report_hours(run, config, len(train_loader))
        write_json(config.plain() | {"resume": None}, config.run_folder / "config.json")
    utilities.train(
        run, train_loader, val_loader, loss_function, max_epochs=config.max_epochs,
        val_interval=config.val_interval, gradient_clip=config.gradient_clip,
        patience=config.patience,
    )  # fmt: skip
    if is_first_process():
        there = {record["split"] for record in prepared["cases"]}
        held_out = [s for s in ("test", "validation") if s in there]
        scans = f"--split {held_out[0]} --data {config.data}" if held_out else "SCAN"
        apply = f"apply_model.py {scans} --checkpoint {find_checkpoint(config.run_folder)}"
        print(f"{pictures.judge_learning(run.history)}\ndone: look at the pictures in "
              f"{config.run_folder}, then: python {apply}")  # fmt: skip


def report_hu(prepared: dict[str, Any], folder: Path, chain: Chain) -> None:
    """Print the HU of each class in up to EXAMPLES training sub-volumes, beside the HU window."""
    assert chain.hu_window
    low, high = chain.hu_window
    known = [record for record in prepared["subvolumes"] if record["split"] == "training"]
    for name, values in [*chain.labels.items()][1:]:
        held = [r for r in known if any(r["voxels_per_label"].get(str(v)) for v in values)]
        found = []
        for index in pictures.spread(len(held), EXAMPLES):
            scan, label = (read_file(folder / held[index][key]).ras.data for key in KEYS)
            found.append(scan[np.isin(label, values)])
        if found:
            least, middle, most = np.percentile(np.concatenate(found), [5, 50, 95])
            told = f"{name}: median {middle:.0f} HU (5 to 95 %: {least:.0f} to {most:.0f})"
            print(f"{told}, --hu-window {low:g} {high:g}")
            if not low < middle < high:
                shade = "black" if middle <= low else "white"
                print(f"warning: this window paints {name} {shade}; choose one around its HU")


def report_hours(run: utilities.Run, config: Config, steps: int) -> None:
    """Print how long a training takes on this CPU if it is an hour or more: a step takes about
    three forward passes, one of which is measured."""
    window = tuple(run.carried["inference"]["window"])
    left = max(config.max_epochs - len(run.history), 0) * steps * 3 * config.batch_size
    if (seconds := left * utilities.time_forward(run, window)) >= SLOW:
        whole = "prepare.py SOURCE --subvolume-depth 0 --destination data/whole, train.py laptop"
        told = f"about {format_seconds(seconds)} on this CPU; the laptop recipe takes minutes"
        print(f"{told}: {whole}", flush=True)


def load_data(
    config: Config, prepared: dict, chain: Chain, device: torch.device, step_bytes: int = 0
) -> tuple:
    """Return loaders of training data, augmented, and of validation data (None without any); on a
    GPU `step_bytes` are left for a training step."""
    validated = splits.check_splits(prepared, chain.labels, config.data)
    given = (chain, device, step_bytes)
    training = cache_split(prepared, config.data, "training", *given)
    augment = pick(Augment, config, classes=len(chain.labels))
    patches = config.sampling == "patches"
    repeats = config.patches_per_case if patches else 1
    augmented = Subvolumes(training, augment, config.seed, repeats, device)
    train_loader = SubvolumeLoader(augmented, config.batch_size, shuffle=True, seed=config.seed)
    if not validated:
        return train_loader, None
    cached = cache_split(prepared, config.data, "validation", *given)
    # whole cases differ in size, and stay where they lie
    known = Subvolumes(cached, device=None if patches else device)
    size = 1 if patches else config.batch_size
    return train_loader, SubvolumeLoader(known, size, shuffle=False, seed=config.seed)


def build_run(
    config: Config, prepared: dict, chain: Chain, device: torch.device, saved: Any
) -> utilities.Run:
    """Return network, optimizer and schedule, as they begin or as `saved` has them."""
    window = config.window(prepared["subvolume_depth"])
    network_args: dict[str, Any] = {
        "name": config.network, "in_channels": 1, "out_channels": len(chain.labels),
        "base_channels": config.base_channels, "input_size": window, "dropout": config.dropout,
        "projections": bool(config.encoder_weights),
    }  # fmt: skip
    model = utilities.on_device(utilities.build_network(**network_args), device)
    patients: list[Any] = saved["patients"] if saved else splits.list_patients(prepared)
    anew: list[str] = saved["begun"]["anew"] if saved else []
    if saved is None and config.pretrained:
        anew, made_it = begin_with(model, network_args, config.pretrained)
        if (seen := splits.find_seen(prepared, "validation", made_it)) and is_first_process():
            what = f"{config.pretrained} was trained on {len(seen)} validation cases"
            print(f"warning: {what} ({', '.join([*seen][:3])}): their Dice is too high")
        patients += made_it
    if saved is None and config.encoder_weights:
        begin_with_encoder(model, config.encoder_weights)
    if config.sync_batch_norm and utilities.rank_and_size()[1] > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    given = {"weight_decay": config.weight_decay, "amsgrad": config.amsgrad or None}
    options = {name: value for name, value in given.items() if value is not None}
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config.learning_rate, **options)
    factor, epochs = SCHEDULES[config.schedule], config.max_epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: factor(n / epochs))
    carried = {
        "network_args": network_args,
        "preprocessing": dataclasses.asdict(chain),
        "inference": {"window": window, "overlap": config.overlap},
        "declared": as_labels(prepared["labels"]),
        "modality": prepared["settings"].get("modality", "CT"),
        "expected": learn_volumes(prepared, chain.labels),
        "config": config.plain(),
        "patients": patients,
        "content": splits.describe_content(prepared),
        "begun": {
            "anew": anew, "processes": utilities.rank_and_size()[1],
            "defaults": {name: str(value) for name, value in Config().plain().items()},
        },
    }  # fmt: skip
    kind = choose_precision(config, device, window)
    how = (config.pretrained_share, config.compile, config.tensorboard, anew)
    run = utilities.Run(model, optimizer, scheduler, config.run_folder, device, kind, carried, *how)
    if saved is not None:
        run.restore(saved)
    return run


def class_weights(prepared: dict[str, Any], labels: dict) -> torch.Tensor:
    """Return one weight per class, inverse to the root of its training voxels, mean 1."""
    # weights inverse to the count led to a litre of false tumour per patient on six real CTs
    inverse = splits.count_voxels(prepared, labels, "training").clip(1) ** -0.5
    return torch.tensor(inverse / inverse.mean(), dtype=torch.float32)


if __name__ == "__main__":
    run_script(main, CONFIG)
