"""Step 4: a trained network on new volumes: label map, masked volume and measurements.

    python apply_model.py ct.nii.gz --checkpoint checkpoints/liver/best.pt
    python apply_model.py folder_of_scans --truth folder_of_labels
    python apply_model.py --split test          # the patients that training never saw

For each case, `results/<case>/` receives the label map and the masked volume on exactly the scan's
grid (shape, affine, qform and sform), a preview picture and the measurements. Everything that
belongs to the network (spacing, HU window, labels, …) comes from the checkpoint. Cases that are
finished, and whose results are whole, are skipped; one that fails is reported at the end; under
torchrun each process takes its share. Next: visualize_3d.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from data.files import InputError, find_checkpoint
from data.settings import NETWORK_LIBRARIES, read_settings, run_script


@dataclass
class Options:
    """How a scan is segmented, beside what the checkpoint says."""

    windows: int = 0  # windows per network call; 0: up to 4, on the CPU only of small ones
    mirror: bool = False  # average with the front-back mirror image; twice the time
    trim_by_hu: bool = True  # of a liver in CT: drop an edge that is far darker than its inside
    largest_component: bool = True  # keep the largest piece of an organ; not for paired organs
    fill_holes: bool = True  # close cavities inside an organ
    tumour_inside: bool = True  # drop tumours that touch no kept organ
    probability: bool = False  # also the probability of foreground, 0..1
    locate: bool = False  # find the organ with every n-th window, then segment its box


@dataclass
class Config(Options):
    """What is segmented, with which checkpoint, and where the results go."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # scans: files, DICOM series, folders
    checkpoint: Path = Path("checkpoints/liver/best.pt")  # of train.py, or the run's folder
    folds: tuple[Path, ...] = ()  # more checkpoints, averaged with the first
    destination: Path = Path("results")  # a folder per case is made in it
    export_bundle: Path | None = None  # segment nothing: write the network there, as MONAI bundle
    split: Literal["training", "validation", "test"] | None = None  # cases of prepared data instead
    data: Path = Path("data/prepared")  # what prepare.py wrote; read with --split only
    truth: tuple[Path, ...] = ()  # reference label maps: one per path, or a folder of equal names
    overlap: float | None = None  # of neighbouring windows, 0 to below 1; None: the checkpoint's
    background: int | None = None  # outside the organ in the masked volume; None: air (CT), 0 (MR)
    dicom_seg: bool = False  # also write a DICOM SEG of scans that are DICOM series
    force: bool = False  # go on with scans that do not look like CT in HU
    overwrite: bool = False  # do finished cases again
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: what is fast here


def refuse_missing(config: Config) -> None:
    """Raise InputError where a checkpoint, or every scan, is missing."""
    if config.paths and not any(path.exists() for path in config.paths):
        raise InputError(f"{config.paths[0]}: no such file or folder; check the path")
    for path in (config.checkpoint, *config.folds):
        find_checkpoint(path)


if __name__ == "__main__":  # help and mistakes are told before anything heavy is loaded
    CONFIG = read_settings(Config, __doc__, check=refuse_missing, libraries=NETWORK_LIBRARIES)

import contextlib
import functools
import hashlib
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cc3d
import nibabel as nib
import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch.nn import functional
from tqdm import tqdm

from data.check import judge_hu
from data.datasets import describe_truths, find_scans, name_scans, pair_truths
from data.evaluate import (
    do_each,
    evaluate,
    measure,
    refuse_failures,
    report_all,
    tell_row,
)
from data.files import atomic_write, lock_folder, make_safe, read_record, write_json
from data.labels import (
    IMAGE,
    LABEL,
    PRED,
    USUAL_LABELS,
    Description,
    Labels,
    as_labels,
    group_tumours,
    translate_classes,
)
from data.pictures import draw_planes, save_figure
from data.scans import (
    Masks,
    describe_label,
    hash_files,
    hash_inputs,
    mark_undrawn,
    read_label_map,
    read_scan,
    resolve_label,
    restore_label,
)
from data.seg import write_seg
from data.settings import check_settings, show_progress
from data.splits import choose_fold, read_prepared
from data.trust import Evidence, judge_trust, weigh_scores
from data.volumes import (
    AIR_HU,
    SLAB,
    Box,
    Volume,
    enclose,
    find_bounding_box,
    name_case,
    write_masked,
)
from preprocess import Chain, classes_on_grid, preprocess_volume, probability_on_grid
from utilities import (
    GRAINS,
    autocast,
    build_network,
    load_checkpoint,
    on_device,
    pick_device,
    pick_precision,
)

RUN_BUNDLE = "python -m monai.bundle run --config_file configs/inference.json"
Answer = tuple[Box, torch.Tensor]  # a window, or part of one, and its scores (C − 1, x, y, z)
OUTSIDE = -20.0  # score of what the network is not asked about: surely background
AT_ONCE = 1_200_000  # voxels for a CPU; torch takes 4 times as long for a small window alone


# ---------------------------------------------------------------------------------------
# Model and segmentation: usable from Python
# ---------------------------------------------------------------------------------------


@dataclass
class Model:
    """A network with all that its checkpoint says about using it."""

    network: torch.nn.Module
    chain: Chain  # from a scan to the network's input; its labels are the classes
    inference: dict[str, Any]  # window (x, y, z) in voxels of the network's grid, overlap
    device: torch.device
    precision: torch.dtype
    declared: Labels = field(default_factory=USUAL_LABELS.copy)  # all that a truth may hold
    modality: str = "CT"  # or MR, which has no HU
    expected: dict[str, Any] | None = None  # what it learnt from, see `data.trust`
    grain: int = 0  # pictures of multiples of so many voxels will do; 0: only the training's size
    windows: int = 0  # seen by its networks since `segment` asked, mirrored ones too

    @property
    def labels(self) -> Labels:
        """Class name → raw label values, in channel order."""
        return self.chain.labels

    @property
    def names(self) -> list[str]:
        """Names of the foreground classes: class index 1 first."""
        return list(self.labels)[1:]


class Average(torch.nn.Module):
    """Mean of the logits of several networks."""

    def __init__(self, networks: Iterable[torch.nn.Module]):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(network(x).float() for network in self.networks) / len(self.networks)


@dataclass
class Trace:
    """What `segment` leaves beside its label map."""

    seconds: dict[str, float] = field(default_factory=dict)  # per stage
    last: float = field(default_factory=time.perf_counter)
    windows: int = 0  # that the network has seen, mirrored ones too
    classes: Volume | None = None  # class indices, RAS
    located: dict[str, Any] = field(default_factory=dict)  # what `Look.describe` says, if asked for
    evidence: list[Evidence] = field(default_factory=list)  # how sure each organ is
    probability: Volume | None = None  # uint8 in steps of 1/255, on the scan's grid, if asked for

    def lap(self, stage: str) -> None:
        """Book the time since the last call for a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


def load_model(
    checkpoint: Path | str | Sequence[Path],
    device: str = "auto",
    precision: str = "auto",
    overlap: float | None = None,
) -> Model:
    """Rebuild the network of a checkpoint, ready to predict; several are averaged.

    `overlap` of neighbouring windows (0 to below 1) takes the place of the checkpoint's. Raises
    InputError for a checkpoint that is foreign or damaged, or when several differ in preprocessing
    or windows.
    """
    paths = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    where = pick_device(device)
    loaded = [load_checkpoint(Path(path), where) for path in paths]
    first = loaded[0]
    for saved in loaded:
        saved["preprocessing"].setdefault("crop_to_body", False)  # older ones lack it
    for path, saved in zip(paths, loaded, strict=True):
        for key in ("preprocessing", "inference"):
            if saved[key] != first[key]:
                raise InputError(
                    f"{path}: {key} must be that of {paths[0]} to be averaged with it, got "
                    f"{saved[key]} and {first[key]}; train both with the same settings"
                )
    networks = [restore_network(Path(p), s, where) for p, s in zip(paths, loaded, strict=True)]
    network = networks[0] if len(networks) == 1 else Average(networks).eval()
    inference = dict(first["inference"])
    if overlap is not None:
        check_settings({"overlap": overlap}, "--")
        inference["overlap"] = overlap
    try:
        chain = Chain(**first["preprocessing"])
    except TypeError as error:
        raise InputError(f"{paths[0]}: preprocessing: {error}; train it again") from error
    dtype = pick_precision(precision, where)
    about = (first["declared"], first["modality"], first.get("expected"))
    grain = GRAINS.get(first["network_args"]["name"], 0)
    return Model(network, chain, inference, where, dtype, *about, grain=grain)


def restore_network(path: Path, saved: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """The network of a checkpoint with its weights, ready to predict."""
    try:
        network = build_network(**saved["network_args"])
        network.load_state_dict(saved["network_state"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its weights do not fit its network ({error}); the checkpoint is foreign or "
            "damaged, use another one"
        ) from error
    return on_device(network, device).eval()


def segment(
    model: Model,
    scan: Volume | nib.spatialimages.SpatialImage | Path | str,
    options: Options | None = None,
    trace: Trace | None = None,
) -> Volume:
    """Label map of a scan, on exactly its grid: what apply_model.py does with each.

    Args:
        scan: volume in HU, or the path of one; any orientation and spacing. An array (X, Y, Z)
            comes as `Volume(array, affine)`, affine 4×4 from voxel to patient mm in RAS+.
        options: post-processing and more; None: the defaults.
        trace: is filled with classes, seconds, how sure it is and, if asked for, the probability.

    Returns:
        Raw label values (the first one of each class), the same shape, affine and header forms as
        the scan.
    """
    options, asked, trace = options or Options(), trace is not None, trace or Trace()
    scan = open_scan(scan)
    tensor, to_network = preprocess_volume(scan, model.chain, model.device)
    trace.lap("preprocess")
    look = open_look(model, scan, to_network) if options.locate else None
    scores = predict(model, tensor, options.windows, options.mirror, look)
    trace.lap("network")
    if options.trim_by_hu and model.chain.hu_window and model.modality == "CT":
        low, high = model.chain.hu_window  # are 0 and 1 of the network's input
        trim_by_hu(scores.numpy(), tensor[0].cpu().numpy(), model.names, high - low)
    del tensor  # as large as the scores; what follows needs the room
    trace.windows, model.windows = model.windows, 0
    trace.located = look.describe(to_network, scan.ras_shape) if look else {}
    trace.lap("trim")
    if asked:
        trace.evidence = weigh_scores(scores.numpy(), to_network, scan.ras_shape, model.names)
    trace.lap("trust")
    classes = classes_on_grid(scores, to_network, scan.ras_shape)
    if options.probability:
        likely = probability_on_grid(scores, to_network, scan.ras_shape)
        trace.probability = scan.from_ras(likely)
    del scores
    trace.lap("project")
    classes = clean(
        classes,
        model.names,
        largest_component=options.largest_component,
        fill_holes=options.fill_holes,
        tumour_inside=options.tumour_inside,
    )
    trace.lap("clean")
    trace.classes = Volume(classes, scan.ras_affine)
    first = {name: raw[0] for name, raw in model.labels.items()}
    values = np.array(list(first.values()), np.min_scalar_type(max(first.values())))
    if list(values) != list(range(len(values))):
        classes = values[classes]
    return replace(scan.from_ras(classes), classes=first)


def open_look(model: Model, scan: Volume, to_network: np.ndarray) -> Look:
    """For `predict`: the network's grid in mm, and which parts of a window its network takes."""
    x, y, z = np.linalg.norm(scan.ras_affine[:3, :3], axis=0) / np.diag(to_network)[:3]
    whole = model.chain.sampling == "patches"
    return Look((float(x), float(y), float(z)), 0 if whole else model.grain)


def open_scan(scan: Volume | nib.spatialimages.SpatialImage | Path | str) -> Volume:
    """What `segment` is given, as a Volume."""
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, str | Path):
        return read_scan(Path(scan))
    if isinstance(scan, np.ndarray):
        raise ValueError("an array must come with its affine: Volume(array, affine)")
    header = scan.header if isinstance(scan.header, nib.Nifti1Header) else None
    return Volume(np.asanyarray(scan.dataobj), scan.affine, "image", header)


@torch.no_grad()
def predict(
    model: Model,
    volume: torch.Tensor,
    windows: int = 0,
    mirror: bool = False,
    look: Look | None = None,
) -> torch.Tensor:
    """How far each class's logit lies above the background's, (C − 1, X, Y, Z), on the CPU.

    Windows of the training's size slide over a preprocessed volume (1, X, Y, Z) and are blended
    with a Gaussian, because a window knows least about its outer slices. Sub-volumes are as wide
    as the volume, so they slide along the slices alone; patches slide along all axes, over the box
    in which there is anything but air, as prepare.py cut it. A smaller volume is padded with air.
    `mirror` averages with the front-back mirror image; never left-right, because the side is the
    best clue against the spleen. With `look` the organ is located first, and only its box is
    segmented: what lies outside is background.
    """
    if model.chain.sampling == "subvolumes":
        return slide(model, volume, windows, mirror, look)
    scores = torch.full((len(model.names), *volume.shape[1:]), OUTSIDE)
    box = find_bounding_box((volume[0] > 0).cpu().numpy())
    part = volume[(slice(None), *box)]
    if part.numel():
        scores[(slice(None), *box)] = slide(model, part, windows, mirror, look)
        if look and look.box:
            look.box = shift(look.box, [edge.start for edge in box])
    return scores


def slide(
    model: Model, volume: torch.Tensor, windows: int, mirror: bool, look: Look | None = None
) -> torch.Tensor:
    """`predict` of all of `volume`, air or not."""
    window, size = model.inference["window"], volume.shape[1:]
    gaps = [max(width - along, 0) for width, along in zip(window, size, strict=True)]
    pads = [(gap // 2, gap - gap // 2) for gap in gaps]
    if any(gaps):
        volume = functional.pad(volume, [n for pair in reversed(pads) for n in pair])
    steps = [max(int(width * (1 - model.inference["overlap"])), 1) for width in window]
    boxes = dense_patch_slices(volume.shape[1:], window, steps)
    with show_progress(total=len(boxes), unit="window") as bar:
        ask = functools.partial(ask_network, model, volume, (windows, mirror), bar)
        answers = locate(look, volume, boxes, ask) if look else ask(boxes)
        scores = blend(answers, window, volume.shape[1:])
    if look and look.box:
        look.box = shift(look.box, [-low for low, _ in pads])
    parts = [slice(low, low + along) for (low, _), along in zip(pads, size, strict=True)]
    return scores[(slice(None), *parts)]


def locate(
    look: Look, volume: torch.Tensor, boxes: Sequence[Box], ask: Callable[..., Iterable[Answer]]
) -> Iterator[Answer]:
    """Answers of the windows that are looked at first, and of those that the organ's box needs."""
    body, asked = find_bounding_box((volume[0] > 0).cpu().numpy()), 0
    todo = {number: look.cut(boxes[number], body) for number in look.choose_first(boxes)}
    answers: dict[int, Answer] = {}
    while todo:
        answers |= dict(zip(todo, ask(list(todo.values())), strict=True))
        asked += sum(answers[number][1][0].numel() for number in todo)
        todo = look.choose_next(boxes, answers, body)
    look.share = asked / sum(volume[0][box].numel() for box in boxes)
    yield from (answers[number] for number in sorted(answers))


def blend(answers: Iterable[Answer], window: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """Mean of the windows' answers, weighed by a Gaussian around each window's middle; OUTSIDE
    where there is none. An answer may be of part of a window."""
    gaussian = compute_importance_map(tuple(window), mode="gaussian")
    total, known = torch.empty(0), []
    for box, scores in answers:
        if not len(total):
            total = torch.from_numpy(np.zeros((len(scores), *size), np.float32))  # in large pages
        ranges = zip(box, window, strict=True)  # a part: of a window that begins where volume does
        weight = gaussian[tuple(p if p.stop - p.start < n else slice(None) for p, n in ranges)]
        total[(slice(None), *box)] += scores * weight
        known.append((box, weight))
    for number, part in enumerate(total.split(SLAB, dim=1)):  # all weights at once take much room
        weights, first = torch.zeros(part.shape[1:]), number * SLAB
        for (x, y, z), weight in known:
            if (low := max(x.start, first)) < (high := min(x.stop, first + SLAB)):
                weights[low - first : high - first, y, z] += weight[low - x.start : high - x.start]
        part /= weights
        part.masked_fill_(weights == 0, OUTSIDE)
    return total


def ask_network(
    model: Model, volume: torch.Tensor, how: tuple[int, bool], bar: tqdm, boxes: Sequence[Box]
) -> Iterator[Answer]:
    """Yield each box and what the network finds in it; `how`: windows at a time, mirrored too."""

    def above_background(batch: torch.Tensor) -> torch.Tensor:
        with autocast(model.device, model.precision):
            logits = model.network(batch.to(memory_format=torch.channels_last_3d)).float()
        model.windows += len(batch) * len(getattr(model.network, "networks", [0]))
        return logits[:, 1:] - logits[:, :1]

    most = AT_ONCE // math.prod(model.inference["window"]) if model.device.type == "cpu" else 4
    windows, done = how[0] or min(max(most, 1), 4), 0
    while left := len(boxes) - done:
        some = boxes[done : done + math.ceil(left / math.ceil(left / windows))]  # none left alone
        try:
            batch = torch.stack([volume[(slice(None), *box)] for box in some]).to(model.device)
            scores = above_background(batch)
            if how[1]:
                scores = (scores + above_background(batch.flip(3)).flip(3)) / 2
        except torch.OutOfMemoryError:
            if windows == 1 and model.device.type == "cpu":
                raise
            windows = make_room(model, windows)
            continue
        yield from zip(some, scores.cpu(), strict=True)
        done += len(some)
        bar.update(len(some))


def make_room(model: Model, windows: int) -> int:
    """How many windows to try after `windows` did not fit into the memory of the device."""
    torch.cuda.empty_cache()
    if windows > 1:
        tqdm.write(f"out of memory on {model.device}: going on with {windows // 2} windows each")
        return windows // 2
    tqdm.write(f"out of memory on {model.device} with one window: the CPU takes over")
    model.device = torch.device("cpu")
    model.precision = pick_precision("auto", model.device)
    model.network.to(model.device)
    return 1


# ---------------------------------------------------------------------------------------
# What is written for a case
# ---------------------------------------------------------------------------------------


def read_case(model: Model, case: Case, config: Config) -> tuple[Volume, Volume | None, list[str]]:
    """A scan in memory, its truth as RAS class indices, and what is unusual about them."""
    scan = read_scan(case.image)
    array = scan.read()
    scan, told = replace(scan, data=array, convert=None), list(scan.notes)
    if "MR" not in (model.modality, case.modality):
        for kind, fault in judge_hu(array[::2, ::2], array.dtype):
            if kind == "hu" and not config.force and "hu" not in case.accepted:
                raise InputError(
                    f"{case.image}: does not look like CT in HU ({fault}); convert it with its "
                    "rescale slope and intercept as int16, or go on with --force",
                    kind="hu",
                )
            told.append(fault)
    if config.dicom_seg and case.alone and not scan.files:
        raise InputError(
            f"--dicom-seg: none of the scans is a DICOM series, to which a DICOM SEG must refer; "
            f"give the series of {case.image}, or leave the option out"
        )
    if case.label is None:
        return scan, None, told + [f"prepare.py: {text}" for text in case.warnings]
    meant = case.described or describe_truths(case.label) or Description(model.declared)
    truth = read_label_map(
        case.label,
        scan,
        meant.labels,
        classes=translate_classes(model.labels, model.declared, meant.labels),
        trust_grid=case.trust_grid,
        ignore=meant.ignore,
    )
    told += [note for note in truth.notes if note not in told]
    truth = truth.ras.like(mark_undrawn(truth.ras.data, 0, *case.drawn))
    return scan, truth, told + [f"prepare.py: {text}" for text in case.warnings]


def apply_to_case(model: Model, case: Case, config: Config) -> dict[str, Any]:
    """Segment one scan, write its results, return its row of measurements."""
    trace = Trace()
    scan, truth, told = read_case(model, case, config)
    trace.lap("read")
    label = segment(model, scan, config, trace)
    assert trace.classes is not None  # `segment` leaves them
    row: dict[str, Any] = {"case": case.name, **measure(trace.classes, scan, model.names)}
    told += find_doubts(trace.classes, scan, model.names)
    trace.lap("measure")
    if truth is not None:
        row |= evaluate(trace.classes, truth, model.names)
        trace.lap("evaluate")
    trust = judge_trust(trace.evidence, row, model.expected)
    row |= trust.row
    note, place = tell_row(row, model.names), config.destination / case.name / case.name
    told += write_results(model, scan, label, trace, config, place)
    trace.lap("write")
    drawn = {IMAGE: scan, PRED: trace.classes} | ({} if truth is None else {LABEL: truth})
    figure = draw_planes(drawn, model.names, f"{case.name} · {note}", doubt=trust)
    save_figure(figure, place.with_name(f"{case.name}_preview.png"))
    trace.lap("preview")
    row |= trace.located | {f"seconds_{key}": round(s, 2) for key, s in trace.seconds.items()}
    row["seconds"] = round(sum(trace.seconds.values()), 2)
    row["network_windows"] = trace.windows
    row["classes"], row["trust_image_grid"] = label.classes, case.trust_grid
    row["warnings"] = "; ".join(told)
    tqdm.write(f"{case.name}: {note}" + "".join(f"\n  look: {text}" for text in told))
    return row


def write_results(
    model: Model, scan: Volume, label: Volume, trace: Trace, config: Config, place: Path
) -> list[str]:
    """Write what `config` asks for as `<place>_label.nii.gz` and so on; returns what is missing."""
    told, background = [], config.background
    if background is None:
        background = 0 if model.modality == "MR" else AIR_HU
    label.write_checked(place.with_name(f"{place.name}_label.nii.gz"))
    write_masked(scan, label, background, place.with_name(f"{place.name}_masked.nii.gz"))
    if config.dicom_seg:
        told = write_seg(label, scan, model.labels, place.with_name(f"{place.name}_label.dcm"))
    if trace.probability is not None:  # readers see 0..1
        path = place.with_name(f"{place.name}_probability.nii.gz")
        trace.probability.write_checked(path, slope=1 / 255)
    return told


# ---------------------------------------------------------------------------------------
# All cases
# ---------------------------------------------------------------------------------------


def do_case(model: Model, case: Case, weights: str, config: Config) -> None:
    """Everything for a case, unless it is finished; its record, written last, says that it is."""
    record = config.destination / case.name / f"{case.name}.json"
    mark = fingerprint(case, weights, config)
    known = None if config.overwrite else read_record(record, mark)
    if known and all((record.parent / name).is_file() for name in known["files"]):
        tqdm.write(f"{case.name}: finished before; --overwrite does it again")
        return
    for leftover in record.parent.glob(".*.partial.*"):  # of a run that was killed
        leftover.unlink()
    row = apply_to_case(model, case, config)
    row |= {
        "image": str(case.image.resolve()),
        "truth": None if case.label is None else describe_label(resolve_label(case.label)),
        "checkpoint": ", ".join(map(str, (config.checkpoint, *config.folds))),
        "weights": weights[:12],
        "mark": mark,
    }
    files = sorted(p.name for p in record.parent.glob(f"{case.name}_*") if p.is_file())
    write_json(row | {"files": files}, record)


def export_bundle(model: Model, folder: Path) -> None:
    """Write a network (on the CPU) as a MONAI bundle, which needs no code of this project.

    It is TorchScript, which torch calls deprecated: of what bundles may hold, only it brings
    networks along that MONAI does not have. Raises InputError for a network of cropped slices.
    """
    if model.chain.crop_to_body:
        raise InputError(
            "--export-bundle: the network was trained with prepare.py --crop-to-body, which no "
            "transform of MONAI's repeats; train one without it for a bundle"
        )
    (folder / "models").mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "models" / "model.ts") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        window = torch.zeros(1, 1, *model.inference["window"])
        torch.jit.trace(model.network, window).save(str(temporary))
    write_configuration(folder, asdict(model.chain), model.inference, model.modality)


def read_fold(checkpoint: Path) -> int:
    """The fold that a training left out."""
    return load_checkpoint(checkpoint)["config"].get("fold", 0)


def main(config: Config) -> None:
    checkpoints = (config.checkpoint, *config.folds)
    if config.export_bundle:
        model = load_model(checkpoints, "cpu", overlap=config.overlap)
        export_bundle(model, config.export_bundle)
        print(f"{config.export_bundle}: a MONAI bundle; its input/ is segmented by: {RUN_BUNDLE}")
        return
    cases = find_cases(config, read_fold)
    # Under torchrun every process takes its share; nobody waits, the last one's table is complete.
    rank, processes = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    mine = cases[rank::processes]
    model = load_model(checkpoints, config.device, config.precision, config.overlap)
    weights = hash_files(find_checkpoint(path) for path in checkpoints)
    lock = contextlib.nullcontext() if "RANK" in os.environ else lock_folder(config.destination)
    with lock:
        failed = do_each(
            mine, lambda case: case.name, lambda case: do_case(model, case, weights, config)
        )
        if len(failed) < len(mine):
            report_all(config.destination, model.names, weights)
    with contextlib.suppress(OSError):
        config.destination.rmdir()  # only if nothing came to stand in it
    refuse_failures(failed, len(mine), "scans")
    if mine:
        place = config.destination / mine[0].name
        print(f"look at {place / mine[0].name}_preview.png\n3D: python visualize_3d.py {place}")


CHANGING = (  # settings that change a result
    "background", "trim_by_hu", "largest_component", "fill_holes", "tumour_inside", "mirror",
    "probability", "precision", "dicom_seg", "overlap", "locate",
)  # fmt: skip


@dataclass
class Case:
    """A scan to segment, its truth, and what its data set says about both."""

    name: str
    image: Path
    label: Path | Masks | None = None
    described: Description | None = None  # what the truth's values mean, if its data say so
    trust_grid: bool = False  # prepare.py laid the truth voxel on voxel
    modality: str = ""
    warnings: tuple[str, ...] = ()  # what prepare.py told of it, accepted findings too
    accepted: tuple[str, ...] = ()  # kinds of findings that prepare.py was told to accept
    drawn: tuple[int, int] = (0, 1)  # a slice (RAS) of the truth that was drawn; every n-th was
    alone: bool = True  # no other case beside it


def find_cases(config: Any, read_fold: Callable[[Path], int]) -> list[Case]:
    """Everything that was asked for, each under a name of its own.

    `read_fold` tells of a checkpoint which fold its training left out.
    """
    if config.split:
        return find_prepared(config, read_fold)
    if not config.paths:
        raise InputError("nothing to segment: give CT volumes, or --split test")
    scans = [scan for path in config.paths for scan in find_scans(path)]
    if twice := [scan for scan, n in Counter(map(os.path.realpath, scans)).items() if n > 1]:
        name = name_case(Path(twice[0]))
        raise InputError(f"two volumes are called {name}: {twice[0]} is given twice")
    names = name_scans(scans, config.paths[0] if len(config.paths) == 1 else None)
    cases = zip(names, scans, pair_truths(scans, config.truth), strict=True)
    return [Case(*case, alone=len(scans) == 1) for case in cases]


def find_prepared(config: Any, read_fold: Callable[[Path], int]) -> list[Case]:
    """The cases of one split of prepared data, with what prepare.py was told about them."""
    prepared, path = read_prepared(config.data), config.data / "dataset.json"
    if (settings := prepared["settings"]).get("folds"):  # the network knows which it has not seen
        prepared = choose_fold(prepared, read_fold(config.checkpoint), config.data)
    try:
        described = Description(as_labels(prepared["labels"]), tuple(prepared.get("ignore", ())))
        chosen = [record for record in prepared["cases"] if record["split"] == config.split]
        cases = [
            Case(
                record["case"], Path(record[IMAGE]), restore_label(record[LABEL]), described,
                bool(record.get("trust_image_grid")), settings.get("modality") or "",
                tuple(record.get("warnings", ())),
                tuple(record.get("accepted", settings.get("accept") or ())),
                (int(record.get("drawn_slice", 0)), int(settings.get("label_every") or 1)),
                len(chosen) == 1,
            )
            for record in chosen
        ]  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: must be as prepare.py writes it, got {error!r}; prepare the data again"
        ) from error
    if not cases:
        raise InputError(f"{path}: no case in the {config.split} split; choose another split")
    if odd := [case.name for case in cases if make_safe(case.name) != case.name]:
        raise InputError(f"{path}: {odd[0]!r} is no case name; prepare the data again")
    return cases


def fingerprint(case: Case, weights: str, config: Any) -> str:
    """Changes whenever the scan, its truth, the networks or a setting of the result change."""
    settings = [getattr(config, key) for key in CHANGING]
    settings += [case.trust_grid, case.accepted, case.drawn]
    meant = case.described or (case.label and describe_truths(case.label))
    settings.append(meant and [meant.labels, meant.ignore])
    inputs = [hash_inputs([path]) if path else None for path in (case.image, case.label)]
    return hashlib.sha256(json.dumps([inputs, weights, settings]).encode()).hexdigest()


GAP_MM = 40.0  # between the windows of the first look: an organ is longer
MARGIN_MM = (45.0, 45.0, 10.0)  # around what is found, along x, y, z: what the network needs to see
SPECK_ML = 0.5  # a window in which less is found does not widen the box,
SPECK_PART = 0.05  # nor one with less of each class than this part of its fullest window


@dataclass
class Look:
    """How a preprocessed volume is searched, and what came of it."""

    spacing_mm: tuple[float, float, float]  # of the network's grid
    grain: int  # pictures of multiples of so many voxels are taken in plane; 0: only whole windows
    box: Box | None = None  # that was segmented, in voxels of the network's grid; None: everything
    share: float = 1.0  # of the voxels that all windows have: what the network was asked

    def choose_first(self, windows: Sequence[Box]) -> list[int]:
        """Numbers of the windows that are looked at first: every n-th, and the last, by axis."""
        chosen = []
        for axis, mm in enumerate(self.spacing_mm):
            starts = sorted({window[axis].start for window in windows})
            step = starts[1] - starts[0] if len(starts) > 1 else 1
            width = windows[0][axis].stop - windows[0][axis].start
            every = max(int((width + GAP_MM / mm) / step), 1)
            chosen.append({*starts[::every], starts[-1]})
        return [
            number
            for number, window in enumerate(windows)
            if all(part.start in some for part, some in zip(window, chosen, strict=True))
        ]

    def choose_next(
        self, windows: Sequence[Box], answers: Mapping[int, tuple[Box, Any]], body: Box
    ) -> dict[int, Box]:
        """Number and box of each window that is still to be asked, by the `answers` so far.

        `answers`: number of a window → its box and its scores (C, x, y, z), above 0 where an organ
        is. Where nothing was found all windows follow, cut to the `body`. A window is asked again
        only where less than half of the margin is left around what was found.
        """
        found, speck = [], 1000 * SPECK_ML / math.prod(self.spacing_mm)
        counts = [[np.count_nonzero(one > 0) for one in scores] for _, scores in answers.values()]
        least = np.maximum(SPECK_PART * np.max(counts, axis=0), speck)  # of each class
        for (box, scores), own in zip(answers.values(), counts, strict=True):
            if (own >= least).any():
                inner = find_bounding_box(np.any(np.asarray(scores) > 0, axis=0))
                found.append(shift(inner, [part.start for part in box]))
        self.box = self.grow(enclose(*found), windows) if found else None
        near, wanted = self.box or body, {}
        enough = self.grow(enclose(*found), windows, 0.5) if found else body
        for number, window in enumerate(windows):
            if self.box is None or is_overlapping(window, near):
                asked, needed = answers.get(number, (None, None))[0], self.cut(window, enough)
                if asked is None or enclose(needed, asked) != asked:
                    wanted[number] = self.cut(window, near)
        return wanted

    def grow(self, box: Box, windows: Sequence[Box], part_of_margin: float = 1.0) -> Box:
        """A box with (a part of) the margin around it, within the volume."""
        grown = []
        for part, size, margin, mm in zip(
            box, enclose(*windows), MARGIN_MM, self.spacing_mm, strict=True
        ):
            reach = math.ceil(part_of_margin * margin / mm)
            grown.append(slice(max(part.start - reach, 0), min(part.stop + reach, size.stop)))
        return tuple(grown)

    def cut(self, window: Box, near: Box) -> Box:
        """The part of a window, in plane, that holds `near`: its corners on the network's grain, so
        that pooling takes the same voxels together."""
        parts = list(window)
        for axis in (0, 1) if self.grain else ():
            part = window[axis]
            if (part.stop - part.start) % self.grain == 0 and near[axis].stop > near[axis].start:
                low, high = near[axis].start - part.start, near[axis].stop - part.start
                first, last = low // self.grain, -(-high // self.grain)
                start, stop = part.start + first * self.grain, part.start + last * self.grain
                parts[axis] = slice(max(start, part.start), min(stop, part.stop))
        return tuple(parts)

    def describe(self, to_network: np.ndarray, shape: Sequence[int]) -> dict[str, Any]:
        """For a case's record: the box in voxels of the scan in RAS order (`shape`), counted from
        1, what part of the scan lies outside, and what part of all windows' voxels was asked."""
        row: dict[str, Any] = {"located_box": "nothing found at first look: the whole scan"}
        inside, told = 1.0, []
        for axis, size in enumerate(shape) if self.box else ():
            part = self.box[axis]  # type: ignore[index]  # it is there
            scale, offset = to_network[axis, axis], to_network[axis, 3]
            first = max(math.ceil((part.start - offset) / scale), 0)
            last = min(math.floor((part.stop - 1 - offset) / scale) + 1, size)
            inside *= (last - first) / size
            told.append(f"{'xyz'[axis]} {first + 1}-{last} of {size}")
        if told:
            row["located_box"] = ", ".join(told)
        return row | {
            "outside_box_percent": round(100 * (1 - inside), 1),
            "network_share": round(self.share, 3),
        }


def shift(box: Box, by: Sequence[int]) -> Box:
    """A box moved by so many voxels along each axis."""
    return tuple(slice(p.start + n, p.stop + n) for p, n in zip(box, by, strict=True))


def is_overlapping(one: Box, other: Box) -> bool:
    """Whether two boxes share a voxel."""
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


PLAUSIBLE_ML = {"liver": (500, 4000)}  # volumes of adults
RIGHT_SIDED = ("liver",)  # organs on the patient's right
# How much darker than its inside an organ's edge may be, in HU, of organs of one brightness: fat,
# bile and bowel are darker still. A voxel half of which is fat is 100 darker than a liver of 100.
DARKER_HU = {"liver": 80.0}
NOISE = 3.0  # times the noise's SD, where that is more: noise is no edge


def trim_by_hu(
    scores: np.ndarray, image: np.ndarray, names: Sequence[str], hu_per_unit: float = 1.0
) -> None:
    """Take from an organ the edge that is far darker than its inside; in place.

    The inside is the half that the network is surer of. It stays, as does what the rest encloses
    in its slice: tumours, cysts.

    Args:
        scores: (C − 1, X, Y, Z) logits of the classes `names` above the background's.
        image: (X, Y, Z) of a CT on the same grid, in units of so many HU.
    """
    for every, name in zip(scores, names, strict=True):
        if name not in DARKER_HU or not (every > 0).any():
            continue
        box = find_bounding_box(every > 0)
        score = every[box]
        found = score > 0
        known, hu = score[found], image[box][found]
        inside = known >= np.median(known)
        below = np.median(hu[inside]) - hu
        noise = 1.4826 * np.median(np.abs(below[inside]))  # SD, if it is a normal one
        dark = np.zeros_like(found)
        dark[found] = (below > max(DARKER_HU[name] / hu_per_unit, NOISE * noise)) & ~inside
        left = found & ~dark
        for number in np.flatnonzero(dark.any(axis=(0, 1))):
            dark[:, :, number] &= ~find_holes(left[:, :, number])
        np.negative(score, out=score, where=dark)  # as surely not: the edge lies in the middle


def clean(
    classes: np.ndarray,
    names: Sequence[str],
    *,
    largest_component: bool = True,
    fill_holes: bool = True,
    tumour_inside: bool = True,
) -> np.ndarray:
    """Remove what anatomy excludes. An organ and the tumours in it are one body.

    Args:
        classes: class indices (X, Y, Z), which stay; `names` are those of the classes 1, 2, …
        largest_component: of an organ's voxels only those in its largest body stay.
        fill_holes: background that an organ encloses on all sides becomes organ.
        tumour_inside: tumours that touch no kept organ are dropped; of those that do all stay.
    """
    box = find_bounding_box(classes)
    part = classes[box].copy(order="K")
    for organ, tumours in group_tumours(names).items():
        in_organ, in_tumour = part == organ, np.isin(part, tumours) if tumours else None
        body = in_organ if in_tumour is None else in_organ | in_tumour
        if not body.any():
            continue
        if largest_component or tumours:
            good, pieces = _judge_pieces(body, in_organ if tumours else body, largest_component)
            outside = ~good[pieces]
            part[in_organ & outside] = 0
            if in_tumour is not None and tumour_inside:
                part[in_tumour & outside] = 0
        if fill_holes:
            _fill(part, organ, [organ, *tumours])
    result = np.zeros_like(classes)  # memory that nobody writes to is not taken
    result[box] = part
    return result


def _judge_pieces(body: np.ndarray, organ: np.ndarray, largest: bool) -> tuple[Any, Any]:
    """Which connected pieces of `body` stay, by their number, and the number of each voxel's."""
    pieces, count = cc3d.connected_components(body, connectivity=26, return_N=True)
    sizes = np.bincount(pieces.ravel("K"), minlength=count + 1)
    sizes[0] = 0
    if organ is not body:  # a piece without organ is no candidate
        sizes[np.bincount(pieces[organ], minlength=len(sizes)) == 0] = 0
    good = sizes > 0
    if largest and good.any():
        good = np.arange(len(sizes)) == sizes.argmax()
    return good, pieces


def _fill(part: np.ndarray, organ: int, body: Sequence[int]) -> None:
    """Give to `organ` the background that the classes of `body` enclose; in place."""
    inside = part == body[0] if len(body) == 1 else np.isin(part, body)
    box = find_bounding_box(inside)
    part[box][find_holes(inside[box]) & (part[box] == 0)] = organ


def find_holes(mask: np.ndarray) -> np.ndarray:
    """What a mask of two or three axes encloses on all sides, corners not counted."""
    around = np.pad(~mask, 1, constant_values=True)
    sides: Literal[4, 6] = 4 if mask.ndim == 2 else 6
    spaces, count = cc3d.connected_components(around, connectivity=sides, return_N=True)
    inner = (slice(1, -1),) * mask.ndim
    return (around & (spaces != spaces.flat[0]))[inner] if count > 1 else np.zeros_like(mask)


def find_doubts(classes: Volume, scan: Volume, names: Sequence[str]) -> list[str]:
    """What is implausible about a segmentation: class indices and HU on one grid."""
    found, hu, size = [], scan.ras.data, classes.ras_shape
    outer = find_bounding_box(classes.ras.data)
    indices = classes.ras.data[outer]
    for organ, tumours in group_tumours(names).items():
        name, body = names[organ - 1], indices == organ
        for tumour in tumours:
            body |= indices == tumour
        inner = find_bounding_box(body)
        if inner[0].stop == 0:
            found.append(f"no {name} found")
            continue
        low, high = PLAUSIBLE_ML.get(name, (0, math.inf))
        if not low <= (ml := np.count_nonzero(body) * scan.voxel_ml) <= high:
            found.append(f"{name} of {ml:.0f} ml, expected {low} to {high}")
        sides = (("left", "right"), ("back", "front"), ("lower", "upper"))
        box = [
            slice(a.start + b.start, a.start + b.stop) for a, b in zip(outer, inner, strict=True)
        ]
        for part, length, (first, last) in zip(box, size, sides, strict=True):
            touched = [first] * (part.start == 0) + [last] * (part.stop == length)
            found += [f"{name} reaches the {end} end of the scan: cut off?" for end in touched]
        if name in RIGHT_SIDED:
            patient = hu[:, ::4, box[2]][:, :, ::4] > -300
            counts = ((0, patient.sum(axis=(1, 2))), (outer[0].start, body.sum(axis=(1, 2))))
            centre, own = (
                float(np.arange(begin, begin + len(count)) @ count) / max(int(count.sum()), 1)
                for begin, count in counts
            )
            if own < centre:
                found.append(f"{name} on the patient's left: are the scan's sides right?")
    return found


TASK = "Segmentation of the liver in CT"
SCAN = "scan"  # key of the image as it was read
ANYTHING = "$lambda x: x > 1e-6"  # but air: resampling leaves less of it than that
BY_MAXIMUM = "$lambda s: torch.clamp(s, min=0) / torch.clamp(s.amax((1, 2), True), min=1e-6)"


def write_configuration(
    folder: Path, preprocessing: Mapping[str, Any], inference: Mapping[str, Any], modality: str
) -> None:
    """Write configs/inference.json and configs/metadata.json of a bundle.

    Args:
        preprocessing, inference: as a checkpoint has them: the settings of `Chain`, and window and
            overlap.
    """
    names = list(preprocessing["labels"])
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    configuration = describe_inference(preprocessing, inference)
    write_json(configuration, folder / "configs" / "inference.json")
    metadata = describe_network(names, inference["window"], modality)
    write_json(metadata, folder / "configs" / "metadata.json")


def describe_inference(
    preprocessing: Mapping[str, Any], inference: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of inference.json: from files in `datalist` to label maps in `output_dir`."""
    infer = "$torch.no_grad()(lambda image: @inferer(image[None].to(@device), @network)[0].cpu())"
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location='cpu')",
        "network": "$@network_def.to(@device).eval()",
        "preprocessing": compose(list_steps(preprocessing)),
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(inference["window"]),
            "sw_batch_size": 1,
            "overlap": inference["overlap"],
            "mode": "gaussian",
        },
        "postprocessing": compose(list_steps_back(preprocessing)),
        "save": {
            "_target_": "SaveImaged",
            "keys": PRED,
            "output_dir": "@output_dir",
            "output_postfix": "label",
            "output_dtype": "$torch.uint8",
            "resample": False,
        },
        "infer": infer,
        "predict": f"$lambda item: @postprocessing(item | {{'{PRED}': @infer(item['{IMAGE}'])}})",
        "segment": f"$lambda path: @predict(@preprocessing({{'{IMAGE}': path}}))",
        "run": ["$[@save(@segment(path)) for path in @datalist]"],
    }


def compose(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """MONAI's Compose of some steps."""
    return {"_target_": "Compose", "transforms": list(steps)}


def list_steps(preprocessing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From a file to the network's grid: what `preprocess.py` does, in three dimensions at once."""
    patches, of_image = preprocessing["sampling"] == "patches", {"keys": IMAGE}
    x, y, *z = preprocessing["spacing"]
    resampled = {"_target_": "Spacingd", **of_image, "mode": "bilinear", "padding_mode": "border"}
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", **of_image, "ensure_channel_first": True},
        {"_target_": "CopyItemsd", **of_image, "names": SCAN},  # its grid, to come back to
        {"_target_": "Orientationd", **of_image, "axcodes": "RAS", "labels": None},
        {**resampled, "pixdim": [x, y, -1.0]},  # −1: the slices stay where they are
    ]
    if preprocessing["hu_window"]:
        low, high = preprocessing["hu_window"]
        scaled = {"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True}
        steps.append({"_target_": "ScaleIntensityRanged", **of_image, **scaled})
    else:  # each slice by its maximum
        steps.append({"_target_": "Lambdad", **of_image, "func": BY_MAXIMUM})
    if patches:  # windows slide over what is not air
        steps.append({**resampled, "pixdim": [-1.0, -1.0, *z]})  # of what the HU window left
        cropped = {"source_key": IMAGE, "allow_smaller": True, "select_fn": ANYTHING}
        steps.append({"_target_": "CropForegroundd", **of_image, **cropped})
    else:
        size = [*preprocessing["input_size"], -1]
        resized = {"spatial_size": size, "mode": "trilinear"}
        steps.append({"_target_": "Resized", **of_image, **resized})
    return steps


def list_steps_back(preprocessing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From the network's scores to raw label values on the scan's grid, cleaned."""
    labels: Labels = preprocessing["labels"]
    names, of_result = list(labels)[1:], {"keys": PRED}
    patches = preprocessing["sampling"] == "patches"
    # One interpolation straight to the scan's grid, as ours; Invertd would do several. Outside of
    # the windows all scores are 0, of which argmax takes the background.
    grid = {"key_dst": SCAN, "mode": "bilinear", "padding_mode": "zeros" if patches else "border"}
    steps: list[dict[str, Any]] = [
        {"_target_": "ResampleToMatchd", **of_result, **grid},
        {"_target_": "AsDiscreted", **of_result, "argmax": True},
    ]
    for organ, tumours in group_tumours(names).items():
        body = {"applied_labels": [organ, *tumours], "independent": False}
        steps.append({"_target_": "KeepLargestConnectedComponentd", **of_result, **body})
        steps.append({"_target_": "FillHolesd", **of_result, "applied_labels": [organ]})
    values = [raw[0] for raw in labels.values()]
    if values != list(range(len(values))):
        mapped = {"orig_labels": list(range(len(values))), "target_labels": values}
        steps.append({"_target_": "MapLabelValued", **of_result, **mapped})
    return steps


def describe_network(names: Sequence[str], window: Sequence[int], modality: str) -> dict[str, Any]:
    """The content of metadata.json: what goes into the network and what comes out."""
    shared = {"spatial_shape": list(window), "dtype": "float32", "is_patch_data": True}
    channels = dict(enumerate(names))
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/"
        "0.8.1/meta_schema_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel")},
        "task": TASK,
        "description": f"{', '.join(names[1:])} in {modality}; a research tool, no medical device",
        "authors": "",
        "copyright": "",
        "network_data_format": {
            "inputs": {
                IMAGE: {
                    "type": "image", "format": "hounsfield" if modality == "CT" else "magnitude",
                    "modality": modality, "num_channels": 1, "value_range": [0, 1],
                    "channel_def": {"0": "image"}, **shared,
                }
            },
            "outputs": {
                PRED: {
                    "type": "image", "format": "segmentation", "num_channels": len(names),
                    "value_range": [], "channel_def": channels, **shared,
                }
            },
        },
    }  # fmt: skip


if __name__ == "__main__":
    run_script(main, CONFIG)
