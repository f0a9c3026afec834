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
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch.nn import functional
from tqdm import tqdm

from data.anatomy import clean, find_doubts, trim_by_hu
from data.boxes import Box, find_bounding_box
from data.bundles import write_configuration
from data.cases import hash_files, read_label_map, read_scan
from data.descriptions import Description
from data.dicom import write_seg
from data.evaluate import describe_truths, evaluate, measure
from data.files import atomic_write, lock_folder
from data.jobs import Case, find_cases, fingerprint
from data.judges import judge_hu
from data.labels import IMAGE, LABEL, PRED, USUAL_LABELS, Labels, translate_classes
from data.locate import Look, shift
from data.masks import describe_label, mark_undrawn, resolve_label
from data.pictures import draw_planes, save_figure
from data.settings import check_settings, show_progress
from data.summary import do_each, is_finished, refuse_failures, report_all, tell_row, write_record
from data.trust import Evidence, draw_doubt, judge_trust, weigh_scores
from data.volumes import AIR_HU, SLAB, Volume, write_masked
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
        trace.evidence = weigh_scores(scores.numpy(), to_network, scan.ras_shape[2], model.names)
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
    figure = draw_planes(drawn, model.names, f"{case.name} · {note}")
    save_figure(figure, place.with_name(f"{case.name}_preview.png"))
    draw_doubt(drawn, trust, place.with_name(f"{case.name}_doubt.png"))
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
    if not config.overwrite and is_finished(record, mark):
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
        "fingerprint": mark,
    }
    write_record(row, record)


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


if __name__ == "__main__":
    run_script(main, CONFIG)
