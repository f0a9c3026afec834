"""Step 4: segment scans with a trained network; write label maps, masked volumes, measurements.

    python apply_model.py ct.nii.gz --checkpoint checkpoints/liver/best.pt
    python apply_model.py folder_of_scans --truth folder_of_labels
    python apply_model.py --split test          # the patients that training never saw

For each case, `results/<case>/` receives the label map and the masked volume on exactly the scan's
grid (shape, affine, qform and sform), a preview picture and the measurements. Everything that
belongs to the network (spacing, HU window, labels, …) comes from the checkpoint. Finished cases are
skipped, and failed ones reported at the end. torchrun shares the cases. Next: visualize_3d.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))  # Python's safe path leaves it out

from data.files import InputError, find_checkpoint
from data.settings import (
    NETWORK_LIBRARIES,
    Device,
    Int16,
    Part,
    Positional,
    Whole,
    read_settings,
    run_script,
)  # fmt: skip


@dataclass
class Options:
    """How a scan is segmented, beside what the checkpoint says."""

    windows: Whole = 0  # windows per network call; 0: up to 4, on the CPU only of small ones
    largest_component: bool = True  # keep the largest component of an organ; not for paired organs
    fill_holes: bool = True  # close cavities inside an organ
    tumour_inside: bool = True  # drop tumours that touch no kept organ
    sure_tumours: bool = True  # count tumours whose probability nowhere exceeds 0.8 as organ
    probability: bool = False  # also the probability of foreground, 0..1


@dataclass
class Config(Options):
    """What is segmented, with which checkpoint, and where the results go."""

    paths: Positional[tuple[Path, ...]] = ()  # scans: files, DICOM series, folders
    checkpoint: Path = Path("checkpoints/liver/best.pt")  # of train.py, or the run's folder
    folds: tuple[Path, ...] = ()  # more checkpoints (not a number), averaged as an ensemble
    locate: Path | None = None  # checkpoint of a fast network: segment only around what it finds
    destination: Path = Path("results")  # folder that receives a folder per case
    split: Literal["training", "validation", "test"] | None = None  # cases of prepared data instead
    data: Path = Path("data/prepared")  # what prepare.py wrote; read with --split only
    truth: tuple[Path, ...] = ()  # reference label maps: one per path, or a folder of equal names
    overlap: Part | None = None  # of neighbouring windows, 0 to below 1; None: the checkpoint's
    background: Int16 | None = None  # fill value of masked volumes; None: air (CT), 0 (MR)
    dicom_seg: bool = False  # also write a DICOM SEG of scans that are DICOM series
    force: bool = False  # go on with scans that do not look like CT in HU
    accept: tuple[Literal["seen"], ...] = ()  # seen: evaluate patients that made the checkpoint too
    overwrite: bool = False  # do finished cases again
    device: Device = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: what is fast here


def refuse_missing(config: Config) -> None:
    """Raise InputError where a checkpoint, or every scan, is missing."""
    if config.paths and not any(path.exists() for path in config.paths):
        raise InputError(f"{config.paths[0]}: no such file or folder; check the path")
    for path in filter(None, (config.checkpoint, *config.folds, config.locate)):
        find_checkpoint(path)


if __name__ == "__main__":  # help and mistakes are reported before anything heavy is loaded
    CONFIG = read_settings(Config, __doc__, check=refuse_missing, libraries=NETWORK_LIBRARIES)

import functools
import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import cc3d  # of 26 neighbours takes uint8 alone: with bool it fails on lines of voxels
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch.nn import functional
from tqdm import tqdm

import preprocess
import utilities
from data import check, datasets, evaluate, scans, splits, trust
from data.evaluate import measure
from data.files import lock_folder, read_record, write_json
from data.labels import as_plain, describe_truths, group_tumours, translate_classes
from data.pictures import draw_planes, save_figure
from data.seg import write_seg
from data.volumes import AIR_HU, Volume, find_bounding_box, write_masked
from preprocess import Chain, classes_on_grid, preprocess_volume, probability_on_grid
from utilities import load_network, pick_precision

WRITTEN = ("label.nii.gz", "masked.nii.gz", "probability.nii.gz", "label.dcm", "preview.png")
OUTSIDE = -20.0  # logit where no window was: surely background
AT_ONCE = 1_200_000  # voxels per call on a CPU; larger calls are no faster there
LOCATE_MM = 25.0  # around the organ that --locate finds
SURE = 0.8  # probability that a tumour reaches somewhere; chosen in docs/evidence/starter.md
FAINT = "most of the tumour is nowhere sure and counts as organ; --no-sure-tumours keeps it"
MUCH, MUCH_ML = 0.05, 20.0  # of an organ: cleaning that changes more than either is told


@dataclass
class Model:
    """Networks with everything that their checkpoint says about using them."""

    network: torch.nn.Module
    chain: Chain  # from a scan to the network's input; its labels are the classes
    inference: Mapping[str, Any]  # window (x, y, z) in voxels of the network's grid, overlap
    device: torch.device
    precision: torch.dtype
    declared: dict[str, tuple[int, ...]] = field(default_factory=dict)  # labels of a truth
    modality: str = "CT"  # or MR, which has no HU
    expected: dict[str, Any] | None = None  # volumes of the training patients, see `data.trust`
    fold: int | str = 0  # part of the prepared data that the training left out
    others: Sequence[torch.nn.Module] = ()  # networks that are averaged with the first
    patients: Sequence[dict[str, str]] = ()  # that made them, from `list_patients`
    finder: Model | None = None  # segments first, to find the box that is segmented then

    @property
    def names(self) -> list[str]:
        """Return the foreground classes: the name of class index 1 first."""
        return list(self.chain.labels)[1:]


@dataclass(frozen=True)
class Segmentation:
    """What `segment` knows about a scan."""

    label: Volume  # raw label values on exactly the scan's grid; `label.classes` names them
    classes: Volume  # class indices 0, 1, 2, …; axes R, A, S
    scores: torch.Tensor  # (C − 1, …) logits above the background's, on the network's grid
    to_network: np.ndarray  # 4×4, RAS voxel of the scan → voxel of that grid, without rotation
    probability: Volume | None  # of foreground, uint8 in steps of 1/255, if asked for
    notes: list[str]  # what cleaning changed by much, and the option that prevents it
    network_seconds: float


def load_model(
    checkpoint: Path | str | Sequence[Path],
    device: str = "auto",
    precision: str = "auto",
    overlap: float | None = None,
) -> Model:
    """Return the network of a checkpoint, ready to predict; several are averaged. `overlap` of
    neighbouring windows (0 to below 1) replaces theirs. Raises InputError for a foreign or damaged
    checkpoint, and when several differ in preprocessing or windows."""
    paths = [checkpoint] if isinstance(checkpoint, str | Path) else checkpoint
    where = preprocess.pick_device(device, precision)
    networks, loaded = zip(*(load_network(Path(path), where) for path in paths), strict=True)
    first = loaded[0]
    for path, saved in zip(paths, loaded, strict=True):
        for key in ("preprocessing", "inference"):
            if saved[key] != first[key]:
                told = f"got {saved[key]}, expected {first[key]}; train both with the same settings"
                raise InputError(f"{path}: {key} must be that of {paths[0]} to be averaged, {told}")
    try:
        chain = Chain(**first["preprocessing"])
    except TypeError as error:
        raise InputError(f"{paths[0]}: preprocessing: {error}; train it again") from error
    inference = first["inference"] | ({} if overlap is None else {"overlap": overlap})
    return Model(
        networks[0], chain, inference, where, pick_precision(precision, where), first["declared"],
        first["modality"], first.get("expected"), first["config"].get("fold", 0), networks[1:],
        [record for saved in loaded for record in saved["patients"]],
    )  # fmt: skip


def segment(
    model: Model, scan: Volume | Path | str, options: Options | None = None
) -> Segmentation:
    """Segment a scan in HU (a path or a Volume, of any orientation), on exactly its grid."""
    given = scan if isinstance(scan, Volume) else scans.read_volume(Path(scan))
    options, scan = options or Options(), scans.clear_padding(given)
    try:
        tensor, to_network = preprocess_volume(scan, model.chain, model.device)
    except RuntimeError as error:
        if not utilities.is_memory_short(error):
            raise
        tensor, to_network = preprocess_volume(scan, model.chain, "cpu")
    begin, near = time.perf_counter(), (model, scan, tensor, to_network, options)
    scores = predict_near(*near) if model.finder else predict(model, tensor, options)
    seconds = time.perf_counter() - begin
    del tensor  # as large as the scores; what follows needs the room
    some = model.names[1:] and options.sure_tumours
    notes = demote_faint_tumours(scores, model.names) if some else []
    classes, likely = classes_on_grid(scores, to_network, scan.ras_shape), None
    if options.probability:
        likely = scan.from_ras(probability_on_grid(scores, to_network, scan.ras_shape))
    found, classes = classes, clean(classes, model.names, options)
    notes += report_cleaning(found, classes, model.names, scan.voxel_ml)
    values = {name: raw[0] for name, raw in model.chain.labels.items()}
    table = np.array(list(values.values()), np.min_scalar_type(max(values.values())))
    raw = classes if table.tolist() == [*range(len(table))] else table[classes]
    label, indices = replace(scan.from_ras(raw), classes=values), Volume(classes, scan.ras_affine)
    return Segmentation(label, indices, scores, to_network, likely, notes, seconds)


def predict_near(
    model: Model, scan: Volume, tensor: torch.Tensor, to_network: np.ndarray, options: Options
) -> torch.Tensor:
    """Return `predict` of the box around what `model.finder` finds, of sub-volumes whole slices;
    of the whole scan where it finds nothing, or where the box cuts an organ off."""
    assert model.finder
    found = find_bounding_box(segment(model.finder, scan).classes.data)
    shape, window = tensor.shape[1:], model.inference["window"]
    box = [slice(0, size) for size in shape]
    for axis in (0, 1, 2) if model.chain.sampling == "patches" else (2,):
        margin = LOCATE_MM / float(np.linalg.norm(scan.ras_affine[:3, axis]))
        ends = np.array([found[axis].start - margin, found[axis].stop - 1 + margin])
        low, high = to_network[axis, axis] * ends + to_network[axis, 3]
        start = max(min(math.floor(low), shape[axis] - window[axis]), 0)
        stop = max(math.ceil(high) + 1, start + window[axis])  # real neighbours, not padding
        box[axis] = slice(start, min(stop, shape[axis]))
    if found[0].stop:
        scores = predict(model, tensor, options, tuple(box))
        used = find_bounding_box((scores > 0).any(dim=0).numpy())
        sides = zip(used, box, shape, strict=True)
        if not any(u.start == b.start > 0 or u.stop == b.stop < size for u, b, size in sides):
            return scores
    return predict(model, tensor, options)


@torch.no_grad()
def predict(
    model: Model, volume: torch.Tensor, options: Options, box: tuple[slice, ...] = ()
) -> torch.Tensor:
    """Return how far each class's logit lies above the background's, (C − 1, X, Y, Z), on the CPU.
    Windows, blended by a Gaussian, slide over a preprocessed volume (1, X, Y, Z) or a `box` of it,
    patches where there is anything but air. Short of memory, they go one by one, or on the CPU."""
    if not box and model.chain.sampling == "patches":
        box = find_bounding_box((volume[0] > 0).cpu().numpy())
    part, window = volume[(slice(None), *box)], model.inference["window"]
    scores = torch.full((len(model.names), *volume.shape[1:]), OUTSIDE)
    most = AT_ONCE // math.prod(window) if model.device.type == "cpu" else 4
    at_once, cpu = options.windows or min(max(most, 1), 4), torch.device("cpu")
    ways = list(dict.fromkeys([(model.device, at_once), (model.device, 1), (cpu, 1)]))
    for device, count in ways if part.numel() else ():
        predictor = functools.partial(ask, model, device)
        try:
            scores[(slice(None), *box)] = sliding_window_inference(
                part[None], window, count, predictor, model.inference["overlap"], "gaussian",
                sw_device=device, device=cpu, progress=os.isatty(2),
            )[0]  # fmt: skip
            break
        except RuntimeError as error:
            if (device, count) == ways[-1] or not utilities.is_memory_short(error):
                raise
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory on {device} with {count} windows per call; trying with less")
    return scores


def ask(model: Model, device: torch.device, batch: torch.Tensor) -> torch.Tensor:
    """Return how far each class's logit lies above the background's, (B, C − 1, X, Y, Z)."""
    precision = model.precision if device == model.device else pick_precision("auto", device)
    batch = batch.to(memory_format=utilities.choose_layout(device))
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        logits = sum(some.to(device)(batch).float() for some in (model.network, *model.others))
    return (logits[:, 1:] - logits[:, :1]) / (1 + len(model.others))


# Cleaning, and what is doubtful
def demote_faint_tumours(scores: torch.Tensor, names: Sequence[str]) -> list[str]:
    """Exchange, in place, the scores (C − 1, X, Y, Z) of tumour and organ in those components of a
    tumour whose probability nowhere exceeds SURE: they become organ. Return a note if most do."""
    notes = list[str]()
    for index, organ in [(t, o) for o, some in group_tumours(names).items() for t in some]:
        found = ((scores[index - 1] > 0) & (scores[index - 1] >= scores.amax(dim=0))).numpy()
        pieces = cc3d.connected_components(found.view(np.uint8), connectivity=26)
        likely = functional.pad(scores[:, found], (0, 0, 1, 0)).softmax(dim=0)[index]
        faint = found & ~np.isin(pieces, pieces[found][likely.numpy() > SURE])
        one, other = scores[organ - 1], scores[index - 1]
        one[faint], other[faint] = other[faint], one[faint]
        notes += [FAINT] * bool(2 * faint.sum() > found.sum())
    return notes


def clean(classes: np.ndarray, names: Sequence[str], options: Options | None = None) -> np.ndarray:
    """Return class indices (X, Y, Z) without what anatomy excludes; `names` are those of 1, 2, … An
    organ with its tumours is one body. Its largest component stays, with those of at least a tenth
    that the same end of the scan cuts. What it encloses is filled; tumours apart from it go."""
    options, box = options or Options(), find_bounding_box(classes)
    part = classes[box].T.copy()  # as volumes are stored: five times faster
    for organ, tumours in group_tumours(names).items() if part.size else ():
        body = np.isin(part, [organ, *tumours])
        pieces = cc3d.connected_components(body.view(np.uint8), connectivity=26)
        sizes = np.bincount(pieces.ravel())
        kept = np.bincount(pieces[part == organ], minlength=len(sizes)) > 0
        if options.largest_component and kept.any():
            most = np.argmax(sizes * kept)
            cut = [0] * (box[2].start == 0) + [-1] * (box[2].stop == classes.shape[2])
            same = np.unique([end for end in pieces[cut] if most in end])  # one beyond the scan?
            kept &= np.isin(np.arange(len(sizes)), [most, *same]) & (10 * sizes >= sizes[most])
        part[~kept[pieces] & (body if options.tumour_inside else part == organ)] = 0
        if options.fill_holes:
            around = np.pad(~np.isin(part, [organ, *tumours]), 1, constant_values=True)
            spaces = cc3d.connected_components(around, connectivity=6)  # corners do not close
            part[((spaces != spaces.flat[0]) & around)[1:-1, 1:-1, 1:-1] & (part == 0)] = organ
    result = np.zeros_like(classes)  # memory that nobody writes to is not taken
    result[box] = part.T
    return result


def report_cleaning(
    before: np.ndarray, after: np.ndarray, names: Sequence[str], voxel_ml: float
) -> list[str]:
    """Return what `clean` changed by more than MUCH of an organ or MUCH_ML, with the remedy."""
    notes, box = list[str](), find_bounding_box(before)
    old, new = before[box].T, after[box].T  # as volumes are stored
    old, new = old[changed := old != new], new[changed]
    for organ, tumours in group_tumours(names).items():
        kept = sum(np.count_nonzero(after == index) for index in (organ, *tumours))
        name, much = names[organ - 1], MUCH * kept * voxel_ml
        beside, outside = (old == organ) & (new == 0), np.isin(old, tumours) & (new == 0)
        for ml, what, option in (
            (beside.sum() * voxel_ml, f"of {name} beside its largest part removed",
             "largest-component"),
            (outside.sum() * voxel_ml, f"of tumour outside {name} removed", "tumour-inside"),
            (((old == 0) & (new == organ)).sum() * voxel_ml, f"of holes in {name} filled",
             "fill-holes"),
        ):  # fmt: skip
            if ml > min(much, MUCH_ML):
                notes.append(f"{ml:.0f} ml {what}; --no-{option} prevents it")
    return notes


def find_doubts(classes: Volume, scan: Volume, names: Sequence[str]) -> list[str]:
    """Return what is implausible about a segmentation: class indices and HU on one grid."""
    found, outer = list[str](), find_bounding_box(classes.ras.data)
    step = check.choose_step(classes.ras_shape)
    coarse, hu = classes.ras.data[::step, ::step], scan.ras.data[::step, ::step]
    x_mm, y_mm, z_mm = np.multiply(scan.ras.spacing_mm, (step, step, 1)).tolist()
    for organ, tumours in group_tumours(names).items():
        name, body = names[organ - 1], np.isin(classes.ras.data[outer].T, [organ, *tumours]).T
        if not body.any():
            found.append(f"no {name} found")
            continue
        masks = coarse == organ, np.isin(coarse, tumours)
        found += [text for _, text in check.doubt_organ(name, *masks, hu, (x_mm, y_mm, z_mm))]
        pairs = zip(outer, find_bounding_box(body), strict=True)
        box, touched = [slice(a.start + b.start, a.start + b.stop) for a, b in pairs], list[str]()
        sides = (("left", "right"), ("back", "front"), ("lower", "upper"))
        for part, size, (first, last) in zip(box, classes.ras_shape, sides, strict=True):
            touched += [first] * (part.start == 0) + [last] * (part.stop == size)
        if touched:
            found.append(f"{name} reaches the {', '.join(touched)} end of the scan: cut off?")
    return found


# Cases
def read_case(
    model: Model, case: datasets.Case, config: Config
) -> tuple[Volume, Volume | None, list[str]]:
    """Return a scan in memory, its truth as RAS class indices, and what is unusual about them."""
    assert case.image
    scan = scans.read_scan(case.image)
    notes, found = list(scan.notes), list[check.Finding]()
    if "MR" not in (model.modality, case.modality):
        found = check.judge_hu(scan.data[::2, ::2], scan.dtype) + check.judge_geometry(scan)
    for fault in [text for kind, text in found if kind == "hu"]:
        if not config.force and "hu" not in case.accepted:
            remedy = "convert it with its rescale slope and intercept, or go on with --force"
            what = f"{case.image}: does not look like CT in HU ({fault})"
            raise InputError(f"{what}; {remedy}", kind="hu")
    notes += [fault for _, fault in found]
    if config.dicom_seg and case.alone and not scan.files:
        raise InputError(f"{case.image}: is no DICOM series; --dicom-seg needs one")
    notes += [f"prepare.py: {text}" for text in case.warnings]
    if case.label is None:
        return scan, None, notes
    declared = case.described.labels if case.described else model.declared
    label = scans.read_label_map(
        case.label, scan, declared, trust_grid=case.trust_grid,
        classes=translate_classes(model.chain.labels, model.declared, declared),
        ignore=case.described.ignore if case.described else (),
    )  # fmt: skip
    truth = label.ras.like(scans.mark_undrawn(label.ras.data, *case.drawn))
    return scan, truth, list(dict.fromkeys([*notes, *label.notes]))


def judge_seen(model: Model, scan: Volume, path: Path, accepted: bool) -> str:
    """Return "seen in training", or validation, of a scan that made the checkpoint, or nothing;
    raise InputError unless that is accepted, because its Dice says nothing about new patients."""
    content = check.identify_scan(scan) if model.patients else ""
    parts = {record["split"] for record in model.patients if record["content"] == content != ""}
    where = min(parts, key=splits.SPLITS.index, default="test")
    if where != "test" and not accepted:
        what = f"its voxels are those of a patient in the {where} of the checkpoint"
        raise InputError(f"{path}: {what}; leave --truth out, or go on with --accept seen")
    return "" if where == "test" else f"seen in {where}"


def refuse_seen(seen: Mapping[str, str], config: Config) -> None:
    """Raise InputError that names cases of a split which made the checkpoint."""
    shown = ", ".join([f"{name} ({how})" for name, how in seen.items()][: evaluate.WORST_SHOWN])
    what = f"{len(seen)} cases of the {config.split} split made this checkpoint: {shown}"
    remedy = "train on this split, or go on with --accept seen"
    raise InputError(f"{config.data}: {what}; {remedy}")


def apply_to_case(model: Model, case: datasets.Case, config: Config, seen: str) -> dict[str, Any]:
    """Segment one scan, write its results, and return its row of measurements."""
    begin = time.perf_counter()
    scan, truth, notes = read_case(model, case, config)
    if truth is not None and not config.split:
        assert case.image
        seen = judge_seen(model, scan, case.image, bool(config.accept))
    found = segment(model, scan, config)
    row: dict[str, Any] = {"case": case.name, **measure(found.classes, scan, model.names)}
    row["seen"] = seen
    if truth is not None:
        row |= evaluate.evaluate(found.classes, truth, model.names)
    known = trust.weigh_scores(found.scores.numpy(), found.to_network, scan, model.names)
    doubt = trust.judge_trust(known, row, model.expected)
    row["lesion_list"] = evaluate.list_lesions(found.classes, model.names)
    outside = any("of tumour outside" in note for note in found.notes)
    doubts = find_doubts(found.classes, scan, model.names)
    if doubt.word == "good" and any("cut off?" not in text for text in doubts):
        doubt.word = "look"
    row |= doubt.row | trust.judge_tumours(model.names, row, outside)
    notes += found.notes + doubts
    summary, folder = evaluate.tell_row(row, model.names), config.destination / case.name
    label, masked, likely, seg, preview = (folder / f"{case.name}_{end}" for end in WRITTEN)
    air = 0 if model.modality == "MR" else AIR_HU
    found.label.write(label, check=True)
    write_masked(scan, found.label, air if config.background is None else config.background, masked)
    if found.probability:
        found.probability.write(likely, slope=1 / 255, check=True)  # readers see 0..1
    if config.dicom_seg:
        notes += write_seg(found.label, scan, model.chain.labels, seg)
    drawn = {"image": scan, "pred": found.classes} | ({} if truth is None else {"label": truth})
    save_figure(draw_planes(drawn, model.names, f"{case.name} · {summary}", doubt), preview)
    tqdm.write(f"{case.name}: {summary}" + "".join(f"\n  look: {text}" for text in notes))
    return row | {
        "seconds": round(time.perf_counter() - begin, 2),
        "seconds_network": round(found.network_seconds, 2),
        "classes": found.label.classes,
        "labels": as_plain(model.chain.labels),
        "declared": as_plain(model.declared),
        "trust_image_grid": case.trust_grid,
        "warnings": "; ".join(notes),
    }


def do_case(
    model: Model, weights: str, config: Config, seen: Mapping[str, str], case: datasets.Case
) -> None:
    """Segment a case and write its record last, unless a record says that this was done."""
    folder = config.destination / case.name
    settings = [getattr(config, one.name) for one in fields(Options)]
    settings += [config.background, config.dicom_seg, config.overlap, config.precision]
    settings += [config.accept, seen.get(case.name)]
    settings += [case.described, case.trust_grid, case.accepted, case.drawn]
    inputs = scans.stamp_inputs([case.image, case.label])
    mark = hashlib.sha256(repr([inputs, weights, settings]).encode()).hexdigest()
    record, names = folder / f"{case.name}.json", [f"{case.name}_{end}" for end in WRITTEN]
    known = None if config.overwrite else read_record(record, mark)
    if known and all((folder / name).is_file() for name in known["files"]):
        tqdm.write(f"{case.name}: finished before; --overwrite does it again")
        return
    for leftover in folder.glob(".*.partial.*"):  # of a run that was killed
        leftover.unlink()
    row = apply_to_case(model, case, config, seen.get(case.name, ""))
    row |= {
        "image": str(case.image and case.image.resolve()),
        "truth": case.label and scans.describe_label(case.label),
        "checkpoint": ", ".join(map(str, (config.checkpoint, *config.folds))),
        "weights": weights,
        "mark": mark,
        "files": [name for name in names if (folder / name).is_file()],
    }
    write_json(row, record)


def list_cases(paths: Sequence[Path], truth: Sequence[Path]) -> list[datasets.Case]:
    """Return the scans that some paths stand for, each under a name of its own, with their truths;
    raise InputError for no path, a scan that is given twice, or truths that do not fit."""
    if not paths:
        raise InputError("nothing to segment: give CT volumes, or --split test")
    found = datasets.find_scans(*paths)
    if twice := [scan for scan, n in Counter(map(os.path.realpath, found)).items() if n > 1]:
        raise InputError(f"{twice[0]}: is given twice; give each scan once")
    names = datasets.name_scans(found, paths[0] if len(paths) == 1 else None)
    return [
        datasets.Case(
            name, name, scan, label, alone=len(found) == 1,
            described=describe_truths(label) if label else None,
        )
        for name, scan, label in zip(names, found, datasets.pair_truths(found, truth), strict=True)
    ]  # fmt: skip


def main(config: Config) -> None:
    rank, processes = utilities.read_rank()
    checkpoints = (config.checkpoint, *config.folds)
    model = load_model(checkpoints, config.device, config.precision, config.overlap)
    if config.locate:
        model.finder = load_model(config.locate, config.device, config.precision)
        model.patients = [*model.patients, *model.finder.patients]
    files = map(find_checkpoint, filter(None, (*checkpoints, config.locate)))
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    if config.split:
        cases = splits.read_cases(config.data, config.split, model.fold)
        prepared = splits.read_fold(config.data, model.fold)
        seen = splits.find_seen(prepared, config.split, model.patients)
        if seen and config.split != "training" and not config.accept:
            refuse_seen(seen, config)
    else:
        seen = {}
        cases = list_cases(config.paths, config.truth)
    # Under torchrun every process takes its share; nobody waits, the last one's table is complete.
    mine = cases[rank::processes]
    with nullcontext() if "RANK" in os.environ else lock_folder(config.destination):
        do = functools.partial(do_case, model, weights, config, seen)
        failed = evaluate.do_each(mine, lambda case: case.name, do)
        if len(failed) < len(mine):
            evaluate.report_all(config.destination, model.names, weights)
    evaluate.refuse_failures(failed, len(mine), "scans")
    if mine:
        place = config.destination / mine[0].name
        print(f"look at {place / mine[0].name}_preview.png\n3D: python visualize_3d.py {place}")


if __name__ == "__main__":
    run_script(main, CONFIG)
