"""Step 4: a trained network on new volumes: label map, masked volume and measurements.

    python apply_model.py ct.nii.gz --checkpoint checkpoints/liver/best.pt
    python apply_model.py folder_of_scans --truth folder_of_labels
    python apply_model.py --split test          # the patients that training never saw

For each case, `results/<case>/` receives the label map and the masked volume on exactly the scan's
grid (shape, affine, qform and sform), a preview picture and the measurements. Everything that
belongs to the network (spacing, HU window, labels, …) comes from the checkpoint. Cases that are
finished are skipped, one that fails is reported at the end, and under torchrun each process takes
its share.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cc3d
import nibabel as nib
import numpy as np
import torch
import tyro
from monai.inferers import sliding_window_inference
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from scipy.spatial import cKDTree
from tqdm import tqdm

from preprocess import (
    SLAB,
    network_slices,
    preprocess_volume,
    read_prepared,
    to_source_grid,
)
from utilities import (
    AIR_HU,
    IMAGE,
    ITK_SUFFIXES,
    LABEL,
    LABEL_VALUES,
    NIFTI_SUFFIXES,
    SEGMENT_VALUE,
    InputError,
    add_legend,
    atomic_write,
    autocast,
    bounding_box,
    build_network,
    case_name,
    class_colour,
    command_line,
    hu_faults,
    is_dicom,
    like,
    load_checkpoint,
    on_device,
    outlines_of,
    overlap_counts,
    pick_device,
    pick_precision,
    planes_figure,
    ranges,
    ras_grid,
    read_label,
    read_volume,
    save_figure,
    spacing_mm,
    voxels,
    write_volume,
)


@dataclass
class Config:
    """What is segmented, with which checkpoint, and where the results go."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # CT in HU: files, DICOM series, folders
    checkpoint: Path = Path("checkpoints/liver/best.pt")  # written by train.py
    folds: tuple[Path, ...] = ()  # more checkpoints, averaged with the first
    destination: Path = Path("results")  # a folder per case is made in it
    split: Literal["training", "validation", "test"] | None = None  # cases of prepared data instead
    data: Path = Path("data/prepared")  # what prepare.py wrote; read with --split only
    truth: tuple[Path, ...] = ()  # reference label maps: one per path, or a folder of equal names
    background: int = AIR_HU  # HU outside the organ in the masked volume
    largest_component: bool = True  # keep the largest piece of an organ; not for paired organs
    fill_holes: bool = True  # close cavities inside an organ
    tumour_inside: bool = True  # drop tumours that touch no kept organ
    mirror: bool = False  # average with the front-back mirror image; twice the time
    probability: bool = False  # also write the probability of foreground, 0..1
    dicom_seg: bool = False  # also write a DICOM SEG of scans that are DICOM series
    force: bool = False  # go on with scans that do not look like CT in HU
    overwrite: bool = False  # do finished cases again
    windows: int = 0  # windows per network call; 0: 4 on a GPU, 1 on the CPU (4 are no faster)
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = (
        "auto"  # auto: what the hardware is fast in
    )


OUTSIDE = -20.0  # score of what the network is not asked about: surely background
TUMOUR_WORDS = ("tumour", "tumor", "lesion", "metasta")  # in the name of a class
PLAUSIBLE_ML = {"liver": (500, 4000)}  # volumes of adults
RIGHT_SIDED = ("liver",)  # organs on the patient's right
NSD_MM = 2.0  # tolerance of the normalised surface Dice
LESION_OVERLAP = 0.1  # a lesion counts as found when this part of it is covered
LESION_SIZES_MM = (10, 20)  # diameters that part small, medium and large lesions
# Figure of merit → which end is the worst. The order is that of the tables.
FIGURES = {
    "dice": "low", "iou": "low", "precision": "low", "recall": "low", "specificity": "low",
    "accuracy": "low", "nsd_2mm": "low", "hd95_mm": "high", "asd_mm": "high",
    "volume_error_ml": "far", "volume_error_percent": "far",
}  # fmt: skip
WORST_SHOWN = 3  # previews in worst.png
PRINTED = ("dice", "nsd_2mm", "hd95_mm", "volume_error_percent")


# ---------------------------------------------------------------------------------------
# Model and segmentation: usable from Python
# ---------------------------------------------------------------------------------------


@dataclass
class Model:
    """A network with all that its checkpoint says about using it."""

    network: torch.nn.Module
    preprocessing: dict[str, Any]  # spacing, HU window, input size, labels
    inference: dict[str, Any]  # window (x, y, z) in voxels of the network's grid, overlap
    device: torch.device
    precision: torch.dtype

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Class name → raw label values, in channel order."""
        return self.preprocessing["labels"]

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
class Stopwatch:
    """Seconds per stage: `lap("read")` books the time since the last call."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


def load_model(
    checkpoint: Path | str | Sequence[Path], device: str = "auto", precision: str = "auto"
) -> Model:
    """Rebuild the network of a checkpoint, ready to predict; several are averaged.

    Raises InputError when several checkpoints differ in preprocessing or windows.
    """
    paths = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    where = pick_device(device)
    loaded = [load_checkpoint(Path(path), where) for path in paths]
    networks = []
    for path, saved in zip(paths, loaded, strict=True):
        for key in ("preprocessing", "inference"):
            if saved[key] != loaded[0][key]:
                raise InputError(
                    f"{path}: {key} must be that of {paths[0]} to be averaged with it, got "
                    f"{saved[key]} and {loaded[0][key]}; train both with the same settings"
                )
        network = build_network(**saved["network_args"])
        network.load_state_dict(saved["network_state"])
        networks.append(on_device(network, where).eval())
    network = networks[0] if len(networks) == 1 else Average(networks).eval()
    dtype = pick_precision(precision, where)
    return Model(network, loaded[0]["preprocessing"], loaded[0]["inference"], where, dtype)


def segment(
    model: Model,
    image: nib.Nifti1Image | np.ndarray | Path | str,
    windows: int = 0,
    *,
    affine: np.ndarray | None = None,
    mirror: bool = False,
    largest_component: bool = True,
    fill_holes: bool = True,
    tumour_inside: bool = True,
) -> nib.Nifti1Image:
    """Label map of a CT volume, on exactly its grid.

    Args:
        image: volume in HU, or the path of one; any orientation and spacing. Or an array (X, Y, Z)
            in HU together with its 4×4 `affine`, voxel → patient mm in RAS+ (as nibabel has it).
        windows: windows per network call; 0: 4 on a GPU, 1 on the CPU.
        mirror: average with the prediction of the front-back mirror image.
        largest_component, fill_holes, tumour_inside: see `clean`.

    Returns:
        uint8 image with the raw label values (the first one of each class), the same shape, affine
        and header forms as the input.
    """
    if isinstance(image, np.ndarray):
        if affine is None or image.ndim != 3:
            raise ValueError(f"an array must be 3D and come with its affine, got {image.shape}")
        image = nib.Nifti1Image(image, affine, dtype=image.dtype)
    is_image = isinstance(image, nib.spatialimages.SpatialImage)
    volume = image if is_image else read_volume(Path(image))
    scores, to_network = score_volume(model, volume, windows, mirror)
    classes = classes_on_grid(scores, to_network, ras_grid(volume)[0])
    switches = {"fill_holes": fill_holes, "tumour_inside": tumour_inside}
    classes = clean(classes, model.names, largest_component=largest_component, **switches)
    return label_map(model, classes, volume)


def score_volume(
    model: Model,
    volume: nib.Nifti1Image,
    windows: int,
    mirror: bool,
    watch: Stopwatch | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Scores of `predict` for a scan, and the 4×4 map from its RAS voxel to the network's."""
    tensor, to_network = preprocess_volume(volume, **model.preprocessing, device=model.device)
    if watch:
        watch.lap("preprocess")
    return predict(model, tensor, windows, mirror), to_network


def window_count(size: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """Windows that slide along the axes of a volume of `size` voxels."""
    counts = []
    for voxels_along, width in zip(size, window, strict=True):
        step = max(int(width * (1 - overlap)), 1)
        counts.append(math.ceil(max(voxels_along - width, 0) / step) + 1)
    return math.prod(counts)


@torch.no_grad()
def predict(
    model: Model, volume: torch.Tensor, windows: int = 0, mirror: bool = False
) -> torch.Tensor:
    """How far each class's logit lies above the background's, (C − 1, X, Y, Z), on the CPU.

    Windows of the training's size slide over a preprocessed volume (1, X, Y, Z) and are blended
    with a Gaussian, because a window knows least about its outer slices. Sub-volumes are as wide
    as the volume, so they slide along the slices alone; patches slide along all axes, over the box
    in which there is anything but air, as prepare.py cut it. A smaller volume is padded with air.
    `mirror` averages with the front-back mirror image; never left-right, because the side is the
    best clue against the spleen. Where memory does not suffice, batches get smaller, and at last
    the CPU takes over.
    """
    if model.preprocessing["sampling"] == "subvolumes":
        return slide(model, volume, windows, mirror)
    scores = torch.full((len(model.names), *volume.shape[1:]), OUTSIDE)
    box = (slice(None), *bounding_box((volume[0] > 0).cpu().numpy()))
    if volume[box].numel():
        scores[box] = slide(model, volume[box], windows, mirror)
    return scores


def slide(model: Model, volume: torch.Tensor, windows: int, mirror: bool) -> torch.Tensor:
    """`predict` of all of `volume`, air or not."""

    def above_background(batch: torch.Tensor) -> torch.Tensor:
        with autocast(model.device, model.precision):
            logits = model.network(batch.to(memory_format=torch.channels_last_3d)).float()
        return logits[:, 1:] - logits[:, :1]

    def network(batch: torch.Tensor) -> torch.Tensor:
        scores = above_background(batch)
        if mirror:
            scores = (scores + above_background(batch.flip(3)).flip(3)) / 2
        bar.update(len(batch))
        return scores

    window, overlap = model.inference["window"], model.inference["overlap"]
    windows = windows or (1 if model.device.type == "cpu" else 4)
    while True:
        total = window_count(volume.shape[1:], window, overlap)
        try:
            with tqdm(total=total, unit="window", leave=False, disable=None) as bar:
                return sliding_window_inference(
                    volume[None],
                    roi_size=window,
                    sw_batch_size=windows,
                    predictor=network,
                    overlap=overlap,
                    mode="gaussian",
                    sw_device=model.device,
                    device="cpu",
                )[0]
        except RuntimeError as error:
            # MONAI wraps the one that happens while it makes the blending weights
            full = any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__cause__))
            if not full or (windows == 1 and model.device.type == "cpu"):
                raise
            torch.cuda.empty_cache()
            if windows > 1:
                windows //= 2
                tqdm.write(f"out of memory on {model.device}: going on with {windows} windows each")
            else:
                tqdm.write(f"out of memory on {model.device} with one window: the CPU takes over")
                model.device = torch.device("cpu")
                model.precision = pick_precision("auto", model.device)
                model.network.to(model.device)


def classes_on_grid(
    scores: torch.Tensor, source_to_network: np.ndarray, ras_shape: Sequence[int]
) -> np.ndarray:
    """Class indices (X, Y, Z) uint8 on the scan's RAS grid, of scores on the network's."""
    classes = np.zeros(ras_shape, np.uint8, order="F")
    for first, last in ranges(ras_shape[2], SLAB, reach_back=False):
        # where no score is above 0, no interpolated one is either
        if not (network_slices(scores, source_to_network, first, last)[0] > 0).any():
            continue
        fine = to_source_grid(scores, source_to_network, ras_shape[:2], first, last)
        best, index = fine.max(dim=0)
        found = (index.to(torch.uint8) + 1) * (best > 0)
        classes[..., first:last] = found.numpy()
    return classes


def probability_on_grid(
    scores: torch.Tensor, source_to_network: np.ndarray, ras_shape: Sequence[int]
) -> np.ndarray:
    """Probability that a voxel is not background, as uint8 in steps of 1/255, RAS (X, Y, Z)."""
    probability = np.empty(ras_shape, np.uint8, order="F")
    for first, last in ranges(ras_shape[2], SLAB, reach_back=False):
        fine = to_source_grid(scores, source_to_network, ras_shape[:2], first, last)
        # softmax: 1 − p(background) = sigmoid(log Σ exp(logit − background's logit))
        some = torch.logsumexp(fine, dim=0).sigmoid()
        probability[..., first:last] = (some * 255).round().to(torch.uint8).numpy()
    return probability


def label_map(model: Model, classes: np.ndarray, volume: nib.Nifti1Image) -> nib.Nifti1Image:
    """Class indices in RAS order → raw label values on the volume's own grid."""
    values = np.array([raw[0] for raw in model.labels.values()], np.uint8)
    return like(volume, from_ras(values[classes], io_orientation(volume.affine)))


def from_ras(array: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """RAS-ordered array (X, Y, Z) back to the axis order and directions of `orientation`."""
    ras = [[0, 1], [1, 1], [2, 1]]
    return np.asfortranarray(apply_orientation(array, ornt_transform(ras, orientation)))


# ---------------------------------------------------------------------------------------
# Post-processing and plausibility: class indices (X, Y, Z) in RAS order
# ---------------------------------------------------------------------------------------


def is_tumour(name: str) -> bool:
    """Whether a class is a tumour by its name: many pieces, inside the organ named before it."""
    return any(word in name.lower() for word in TUMOUR_WORDS)


def organs_of(names: Sequence[str]) -> dict[int, list[int]]:
    """Class index of each organ → those of the tumours in it, which follow it in `names`."""
    organs: dict[int, list[int]] = {}
    for index, name in enumerate(names, start=1):
        if is_tumour(name) and organs:
            organs[max(organs)].append(index)
        elif not is_tumour(name):
            organs[index] = []
    return organs


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
        classes: class indices (X, Y, Z); `names` are those of the classes 1, 2, …
        largest_component: of an organ's voxels only those in its largest body stay.
        fill_holes: background that an organ encloses on all sides becomes organ.
        tumour_inside: tumours that touch no kept organ are dropped; of those that do all stay.
    """
    result, box = classes.copy(order="K"), bounding_box(classes > 0)
    part = result[box]  # a view
    for organ, tumours in organs_of(names).items():
        in_organ, in_tumour = part == organ, np.isin(part, tumours) if tumours else None
        body = in_organ if in_tumour is None else in_organ | in_tumour
        if not body.any():
            continue
        if largest_component or tumours:
            pieces = cc3d.connected_components(body, connectivity=26)
            sizes = cc3d.statistics(pieces, no_slice_conversion=True)["voxel_counts"].astype(int)
            sizes[0] = 0
            if tumours:  # a piece without organ is no candidate
                sizes[np.bincount(pieces[in_organ], minlength=len(sizes)) == 0] = 0
            good = sizes > 0
            if largest_component and good.any():
                good = np.arange(len(sizes)) == sizes.argmax()
            outside = ~good[pieces]
            part[in_organ & outside] = 0
            if tumours and tumour_inside:
                part[in_tumour & outside] = 0
        if fill_holes:
            _fill(part, organ, [organ, *tumours])
    return result


def _fill(part: np.ndarray, organ: int, body: Sequence[int]) -> None:
    """Give to `organ` the background that the classes of `body` enclose; in place."""
    box = bounding_box(np.isin(part, body))
    closed = np.pad(np.isin(part[box], body), 1)
    spaces = cc3d.connected_components(~closed, connectivity=6)
    holes = (~closed & (spaces != spaces[0, 0, 0]))[1:-1, 1:-1, 1:-1]
    part[box][holes & (part[box] == 0)] = organ


def doubts(
    classes: np.ndarray, scan: np.ndarray, affine: np.ndarray, names: Sequence[str]
) -> list[str]:
    """What is implausible about a segmentation; all arrays in RAS order, `scan` in HU."""
    found = []
    for organ, tumours in organs_of(names).items():
        name, body = names[organ - 1], classes == organ
        for tumour in tumours:
            body |= classes == tumour
        box = bounding_box(body)
        if box[0].stop == 0:
            found.append(f"no {name} found")
            continue
        low, high = PLAUSIBLE_ML.get(name, (0, math.inf))
        if not low <= (ml := volume_ml(body[box], affine)) <= high:
            found.append(f"{name} of {ml:.0f} ml, expected {low} to {high}")
        sides = (("left", "right"), ("back", "front"), ("lower", "upper"))
        for part, size, (first, last) in zip(box, body.shape, sides, strict=True):
            touched = [first] * (part.start == 0) + [last] * (part.stop == size)
            found += [f"{name} reaches the {end} end of the scan: cut off?" for end in touched]
        if name in RIGHT_SIDED:
            patient = scan[:, ::4, box[2]][:, :, ::4] > -300
            columns = np.arange(body.shape[0])
            centre, own = (
                float(columns @ count) / max(int(count.sum()), 1)
                for count in (patient.sum(axis=(1, 2)), body.sum(axis=(1, 2)))
            )
            if own < centre:
                found.append(f"{name} on the patient's left: are the scan's sides right?")
    return found


# ---------------------------------------------------------------------------------------
# Measurements and evaluation: class indices (X, Y, Z) and their affine
# ---------------------------------------------------------------------------------------


def volume_ml(mask: np.ndarray, affine: np.ndarray) -> float:
    """Volume in ml: voxels × |determinant of the affine|, which holds for sheared grids too."""
    return float(np.count_nonzero(mask)) * voxel_ml(affine)


def voxel_ml(affine: np.ndarray) -> float:
    """Volume of one voxel in ml."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def measure(
    classes: np.ndarray, scan: np.ndarray, affine: np.ndarray, names: Sequence[str]
) -> dict[str, float | None]:
    """Volume in ml, mean and SD of HU, and extent in mm along x, y, z of each class, RAS order."""
    row: dict[str, float | None] = {}
    for index, name in enumerate(names, start=1):
        mask = classes == index
        box = bounding_box(mask)
        values = scan[box][mask[box]]
        row[f"{name}_volume_ml"] = round(volume_ml(mask[box], affine), 2)
        row[f"{name}_hu_mean"] = round(float(values.mean()), 1) if values.size else None
        row[f"{name}_hu_sd"] = round(float(values.std()), 1) if values.size else None
        for axis, part, step in zip("xyz", box, spacing_mm(affine), strict=True):
            row[f"{name}_extent_{axis}_mm"] = round((part.stop - part.start) * step, 1)
    return row


def evaluate(
    predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Figures of merit of one patient, per class, on the grid that is given.

    Args:
        predicted, truth: class indices (X, Y, Z); `names` are those of the classes 1, 2, …
        affine: of the grid, in mm.

    Returns:
        `{name}_{figure}` of every class and `FIGURES`, `{name}_empty` ("", "truth", "prediction" or
        "both"), lesion counts of tumours, and over all classes, background counted, `accuracy` and
        `mean_iou`. None where a figure is not defined: a ratio without denominator, a distance to
        nothing. A false alarm or a missed organ has Dice and surface Dice 0.
    """
    total = predicted.size
    box = bounding_box((predicted | truth) > 0)
    predicted, truth = predicted[box], truth[box]  # outside there is background in both
    counts = overlap_counts(predicted, truth, len(names) + 1)
    some_p, some_t = np.count_nonzero(predicted), np.count_nonzero(truth)
    neither = total - np.count_nonzero((predicted | truth) > 0)
    row: dict[str, Any] = {"accuracy": (neither + int(counts[0].sum())) / total}
    ious = [_ratio(neither, 2 * total - some_p - some_t - neither)]
    for index, name in enumerate(names, start=1):
        both, found, true = map(int, counts[:, index - 1])
        scores = overlap_figures(both, found, true, total)
        ious.append(scores["iou"])
        error = found - true
        scores["volume_error_ml"] = error * voxel_ml(affine)
        scores["volume_error_percent"] = _ratio(100 * error, true)
        scores |= surface_figures(predicted == index, truth == index, affine)
        row |= {f"{name}_{figure}": scores[figure] for figure in FIGURES}
        empty = {(True, True): "both", (True, False): "prediction", (False, True): "truth"}
        row[f"{name}_empty"] = empty.get((found == 0, true == 0), "")
        if is_tumour(name):
            lesions = lesion_figures(predicted == index, truth == index, affine)
            row |= {f"{name}_{key}": value for key, value in lesions.items()}
    known = [iou for iou in ious if iou is not None]
    return {"mean_iou": _ratio(sum(known), len(known)), **row}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def overlap_figures(both: int, found: int, true: int, total: int) -> dict[str, float | None]:
    """Figures of one class from voxel counts: in both, predicted, true, in the whole scan."""
    neither = total - found - true + both
    return {
        "dice": _ratio(2 * both, found + true),
        "iou": _ratio(both, found + true - both),
        "precision": _ratio(both, found),
        "recall": _ratio(both, true),
        "specificity": _ratio(neither, total - true),
        "accuracy": _ratio(both + neither, total),
    }


def surface_voxels(mask: np.ndarray) -> np.ndarray:
    """(n, 3) indices of the voxels of `mask` with a face to its outside or to the scan's end."""
    inner = mask.copy(order="K")
    for axis in range(3):
        along, inside = np.moveaxis(mask, axis, 0), np.moveaxis(inner, axis, 0)
        inside[1:] &= along[:-1]
        inside[:-1] &= along[1:]
        inside[:1] = inside[-1:] = False
    return np.stack(np.nonzero(mask & ~inner), axis=1)


def surface_figures(
    predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray
) -> dict[str, float | None]:
    """HD95, mean symmetric surface distance, and surface Dice at 2 mm, of two masks.

    Between voxel centres of the surfaces in patient mm. HD95 is the larger of both directions' 95th
    percentiles. Surface Dice: Nikolov et al. 2018 (arXiv:1809.04430), counted in surface voxels.
    """
    boxed = bounding_box(predicted | truth)
    points = [surface_voxels(mask[boxed]) @ affine[:3, :3].T for mask in (predicted, truth)]
    if not (len(points[0]) and len(points[1])):
        none = None if len(points[0]) == len(points[1]) else 0.0
        return {"hd95_mm": None, "asd_mm": None, "nsd_2mm": none}
    trees = [cKDTree(cloud, balanced_tree=False, compact_nodes=False) for cloud in points]
    there, back = trees[1].query(points[0], workers=-1)[0], trees[0].query(points[1], workers=-1)[0]
    every = np.concatenate([there, back])
    return {
        "hd95_mm": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "asd_mm": float(every.mean()),
        "nsd_2mm": float(np.mean(every <= NSD_MM + 1e-6)),  # 2 mm that rounding made longer
    }


def lesion_figures(
    predicted: np.ndarray, truth: np.ndarray, affine: np.ndarray
) -> dict[str, float | int | None]:
    """How many lesions (connected pieces) were found, how many findings are right, by size.

    A true lesion is found, and a predicted one is right, when a tenth of it is covered by the other
    mask. Its size is the diameter of the ball of equal volume.
    """

    def pieces(mask: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Voxels of each piece of `mask`, and whether enough of it is covered by `other`."""
        labels, count = cc3d.connected_components(mask, connectivity=26, return_N=True)
        sizes, covered = (np.bincount(labels[m], minlength=count + 1)[1:] for m in (mask, other))
        return sizes, covered >= LESION_OVERLAP * sizes

    (sizes, found), (_, right) = pieces(truth, predicted), pieces(predicted, truth)
    row: dict[str, float | int | None] = {
        "lesions": len(found), "lesions_found": int(found.sum()),
        "lesion_recall": _ratio(int(found.sum()), len(found)),
        "lesions_predicted": len(right), "lesions_right": int(right.sum()),
        "lesion_precision": _ratio(int(right.sum()), len(right)),
    }  # fmt: skip
    diameters = np.cbrt(6 / np.pi * 1000 * sizes * voxel_ml(affine))
    edges = (0, *LESION_SIZES_MM, math.inf)
    for low, high in itertools.pairwise(edges):
        group = f"{low}_to_{high}_mm" if high < math.inf else f"from_{low}_mm"
        inside = (diameters >= low) & (diameters < high)
        row[f"lesions_{group}"] = int(inside.sum())
        row[f"lesions_found_{group}"] = int(found[inside].sum())
    return row


def class_indices(array: np.ndarray, labels: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Raw label values → class indices, as training saw them."""
    classes = np.zeros(array.shape, np.uint8, order="F")
    for index, values in enumerate(labels.values()):
        for value in values if index else ():
            np.copyto(classes, np.uint8(index), where=array == value)
    return classes


# ---------------------------------------------------------------------------------------
# What is written for a case
# ---------------------------------------------------------------------------------------


def masked(image: nib.Nifti1Image, label: nib.Nifti1Image, background: int) -> nib.Nifti1Image:
    """The scan where the label is not 0 and `background` HU elsewhere, on the scan's grid."""
    scan = voxels(image)
    dtype = np.result_type(scan.dtype, np.min_scalar_type(background))
    scan = scan.astype(dtype, copy=False)
    np.copyto(scan, dtype.type(background), where=voxels(label) == 0)
    return like(image, scan)


def write_checked(result: nib.Nifti1Image, source: nib.Nifti1Image, path: Path) -> None:
    """Write, read back, and make sure that the file lies on exactly the source's grid."""
    with atomic_write(path) as temporary:
        write_volume(result, temporary)
        written = nib.load(temporary)
        expected, (slope, _) = voxels(result), result.header.get_slope_inter()
        expected = expected if slope == 1 else expected * np.float32(slope)
        same = {
            "shape": written.shape == source.shape,
            "affine": np.allclose(written.affine, source.affine, rtol=0, atol=1e-4),
            "qform and sform codes": _form_codes(written) == _form_codes(source),
            "voxels": np.array_equal(
                voxels(written), expected, equal_nan=expected.dtype.kind == "f"
            ),
        }
        wrong = [name for name, equal in same.items() if not equal]
        if wrong:
            raise InputError(f"{path}: {', '.join(wrong)} changed in writing; nothing was kept")


def _form_codes(image: nib.Nifti1Image) -> tuple[int, int]:
    return int(image.header["qform_code"]), int(image.header["sform_code"])


NEEDED_BY_SEG = (
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID",
)  # fmt: skip
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime",
)  # fmt: skip


def write_dicom_seg(
    label: nib.Nifti1Image, image: nib.Nifti1Image, labels: dict[str, tuple[int, ...]], path: Path
) -> list[str]:
    """Write a label map as DICOM SEG of the series that `image` was read from, and read it back.

    Returns why there is none, if so: the scan is no series, or not one that can be referred to.
    """
    import warnings

    import highdicom
    import pydicom

    files = image.extra.get("files")
    if not files:
        return ["no DICOM SEG: the scan is no DICOM series"]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    if lacking := [key for key in NEEDED_BY_SEG if not headers[0].get(key)]:
        return [f"no DICOM SEG: the series has no {', '.join(lacking)} to refer to"]
    for header, key in itertools.product(headers, MAY_BE_EMPTY):
        header.setdefault(key, None)
    array = class_indices(voxels(label), labels)
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that are no person's
            result = highdicom.seg.Segmentation(
                headers,
                array.T,  # (frames, rows, columns): as the slices are stored
                "BINARY",  # what most viewers read
                [segment_of(i, *item) for i, item in enumerate(labels.items()) if i],
                series_instance_uid=highdicom.UID(),
                series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
                series_description="segmentation",
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="apply_model.py",
                manufacturer_model_name="apply_model.py",
                software_versions=torch.__version__,
                device_serial_number="none",
                omit_empty_frames=bool(array.any()),  # a SEG must have a frame
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"no DICOM SEG: the headers of the series are not sound ({error})"]
    with atomic_write(path) as temporary:
        result.save_as(temporary)
        written = read_label(temporary, image, {name: raw[0] for name, raw in labels.items()})
        if not np.array_equal(voxels(written), voxels(label)):
            raise InputError(f"{path}: voxels changed in writing; nothing was kept")
    return []


def segment_of(number: int, name: str, values: Sequence[int]) -> Any:
    """A class as a segment of a DICOM SEG, with its SNOMED code; `Organ` where none is known."""
    import highdicom
    from matplotlib.colors import to_rgb
    from pydicom.sr.codedict import codes

    rgb = to_rgb(class_colour(number))
    kind, what = codes.SCT.AnatomicalStructure, name.title().replace(" ", "")
    what = getattr(codes.SCT, what, codes.SCT.Organ)
    if is_tumour(name):
        kind, what = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm
    segment = highdicom.seg.SegmentDescription(
        number,
        name,
        kind,
        what,
        "AUTOMATIC",
        highdicom.AlgorithmIdentificationSequence(
            "apply_model.py", codes.DCM.ArtificialIntelligence, torch.__version__
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*(255 * c for c in rgb)),
    )
    segment.SegmentDescription = SEGMENT_VALUE.format(values[0])
    return segment


def read_truth(
    path: Path, image: nib.Nifti1Image, labels: dict[str, tuple[int, ...]]
) -> nib.Nifti1Image:
    """A reference label map, which must lie on the scan's grid; `labels` are the network's."""
    own = {f"{name} {value}": value for name, raw in labels.items() for value in raw}
    truth = read_label(path, image, LABEL_VALUES | own | {n: raw[0] for n, raw in labels.items()})
    if truth.shape != image.shape or not np.allclose(truth.affine, image.affine, atol=1e-2):
        raise InputError(
            f"{path}: the label map must lie on the scan's grid {image.shape}, got {truth.shape} "
            "or another affine; use the label map that belongs to this scan"
        )
    return truth


def read_scan(path: Path, force: bool) -> tuple[nib.Nifti1Image, list[str]]:
    """A scan in memory, and what is unusual about it; refuses what cannot be CT in HU."""
    stored = read_volume(path)
    array = voxels(stored)
    faults = hu_faults(array[::2, ::2], array.dtype)
    for kind, fault in faults:
        if kind == "hu" and not force:
            raise InputError(
                f"{path}: does not look like CT in HU ({fault}); convert it with its rescale slope "
                "and intercept as int16, or go on with --force"
            )
    image = like(stored, array)
    image.extra |= stored.extra
    return image, [*stored.extra.get("notes", ()), *(fault for _, fault in faults)]


def apply_to_case(model: Model, case: dict[str, Any], config: Config) -> dict[str, Any]:
    """Segment one scan, write its results, return its row of measurements."""
    watch, name = Stopwatch(), case["case"]
    place = config.destination / name / name
    image, warnings = read_scan(case[IMAGE], config.force)
    truth = read_truth(case[LABEL], image, model.labels) if case[LABEL] else None
    turn = io_orientation(image.affine)
    shape, affine = ras_grid(image)
    scan = apply_orientation(np.asanyarray(image.dataobj), turn)  # a view, in RAS order
    watch.lap("read")
    scores, to_network = score_volume(model, image, config.windows, config.mirror, watch)
    watch.lap("network")
    classes = classes_on_grid(scores, to_network, shape)
    watch.lap("project")
    classes = clean(
        classes,
        model.names,
        largest_component=config.largest_component,
        fill_holes=config.fill_holes,
        tumour_inside=config.tumour_inside,
    )
    watch.lap("clean")
    row: dict[str, Any] = {"case": name, **measure(classes, scan, affine, model.names)}
    warnings += doubts(classes, scan, affine, model.names)
    watch.lap("measure")
    known = None  # the truth as class indices in RAS order
    if truth is not None:
        known = apply_orientation(class_indices(voxels(truth), model.labels), turn)
        row |= evaluate(classes, known, affine, model.names)
        watch.lap("evaluate")
    label = label_map(model, classes, image)
    write_checked(label, image, place.with_name(f"{name}_label.nii.gz"))
    outside = masked(image, label, config.background)
    write_checked(outside, image, place.with_name(f"{name}_masked.nii.gz"))
    if config.dicom_seg:
        warnings += write_dicom_seg(
            label, image, model.labels, place.with_name(f"{name}_label.dcm")
        )
    if config.probability:
        likely = from_ras(probability_on_grid(scores, to_network, shape), turn)
        likely = like(image, likely)
        likely.header.set_slope_inter(1 / 255, 0)  # readers see 0..1
        write_checked(likely, image, place.with_name(f"{name}_probability.nii.gz"))
    watch.lap("write")
    note = ", ".join(
        f"{organ} {row[f'{organ}_volume_ml']:.0f} ml" + _dice_text(row.get(f"{organ}_dice"))
        for organ in model.names
    )
    figure = preview(name, scan, affine, classes, known, model.names, note)
    save_figure(figure, place.with_name(f"{name}_preview.png"))
    watch.lap("preview")
    row |= {f"seconds_{stage}": round(spent, 2) for stage, spent in watch.seconds.items()}
    row["seconds"] = round(sum(watch.seconds.values()), 2)
    asked = bounding_box((scores[0] != OUTSIDE).numpy())
    windows = window_count([axis.stop - axis.start for axis in asked], **model.inference)
    row["network_windows"] = windows * (1 + config.mirror) * (1 + len(config.folds))
    row["warnings"] = "; ".join(warnings)
    tqdm.write(f"{name}: {note}" + "".join(f"\n  look: {text}" for text in warnings))
    return row


def _dice_text(dice: float | None) -> str:
    return "" if dice is None else f", Dice {dice:.4f}"


def preview(
    case: str,
    scan: np.ndarray,
    affine: np.ndarray,
    classes: np.ndarray,
    truth: np.ndarray | None,
    names: Sequence[str],
    note: str,
) -> Any:
    """Figure with the outlines of prediction and truth on three planes and six axial slices."""
    figure = planes_figure(
        f"{case} · {note}", scan, spacing_mm(affine), outlines_of(truth, classes, len(names) + 1),
        axial_slices=6,
    )  # fmt: skip
    add_legend(figure, names, truth is not None)
    return figure


# ---------------------------------------------------------------------------------------
# Cases: which there are, and which are finished
# ---------------------------------------------------------------------------------------


def find_cases(config: Config) -> list[dict[str, Any]]:
    """{"case", "image", "label"} of everything that was asked for."""
    if config.split:
        records = read_prepared(config.data)["cases"]
        return [
            {"case": record["case"], IMAGE: Path(record[IMAGE]), LABEL: Path(record[LABEL])}
            for record in records
            if record["split"] == config.split
        ]
    if not config.paths:
        raise InputError("nothing to segment: give CT volumes, or --split test")
    scans = [scan for path in config.paths for scan in scans_in(path)]
    names = [case_name(scan.resolve()) for scan in scans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two volumes are called {', '.join(twice)}; rename one of each pair")
    truths = truth_of(names, config.truth)
    return [
        {"case": name, IMAGE: scan, LABEL: truth}
        for name, scan, truth in zip(names, scans, truths, strict=True)
    ]


def scans_in(path: Path) -> list[Path]:
    """The scans that a path stands for: a file, a DICOM series, or a folder of several."""
    if not path.is_dir():
        return [path]
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    files = [entry for entry in entries if entry.is_file()]
    if any(is_dicom(file) for file in files):
        return [path]
    headers = {file.name.replace(".img", ".hdr") for file in files if ".img" in file.suffixes}
    volumes = [
        file
        for file in files
        if file.name.endswith((*NIFTI_SUFFIXES, *ITK_SUFFIXES)) and file.name not in headers
    ]
    series = [
        folder
        for folder in entries
        if folder.is_dir() and any(is_dicom(file) for file in folder.iterdir() if file.is_file())
    ]
    if not volumes + series:
        raise InputError(
            f"{path}: holds no scan; expected {', '.join(NIFTI_SUFFIXES[:2])}, "
            f"{', '.join(ITK_SUFFIXES)} files or DICOM series"
        )
    return volumes + series


def truth_of(names: Sequence[str], truth: Sequence[Path]) -> list[Path | None]:
    """A label map for each case: from a folder the one of equal name, else one by one."""
    if (
        len(truth) == 1
        and truth[0].is_dir()
        and (len(names) > 1 or scans_in(truth[0]) != [truth[0]])
    ):
        known = {case_name(path): path for path in scans_in(truth[0])}
        missing = [name for name in names if name not in known]
        if missing:
            print(f"{truth[0]}: no label map for {', '.join(missing)}; not evaluated")
        return [known.get(name) for name in names]
    if truth and len(truth) != len(names):
        raise InputError(
            f"--truth must give one label map per volume, got {len(truth)} for {len(names)}"
        )
    return list(truth) or [None] * len(names)


def is_series(path: Path) -> bool:
    """Whether a scan is a DICOM series: its folder, or one of its files."""
    return path.is_dir() or (path.exists() and is_dicom(path))


def files_of(path: Path) -> list[Path]:
    """All files that belong to a scan: a series, or a header and its data."""
    if not path.exists():
        return []
    if is_series(path):
        folder = path if path.is_dir() else path.parent
        return [file for file in sorted(folder.iterdir()) if file.is_file()]
    return [file for file in sorted(path.parent.iterdir()) if case_name(file) == case_name(path)]


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the content of some files."""
    together = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            together.update(hashlib.file_digest(stream, "sha256").digest())
    return together.hexdigest()


def fingerprint(case: dict[str, Any], weights: str, config: Config) -> str:
    """Changes whenever the scan, its truth, the networks or a setting of the result change."""
    settings = [config.background, config.largest_component, config.fill_holes]
    settings += [config.tumour_inside, config.mirror, config.probability, config.precision]
    settings += [config.dicom_seg]
    inputs = [digest(files_of(case[key])) if case[key] else None for key in (IMAGE, LABEL)]
    return hashlib.sha256(json.dumps([inputs, weights, settings]).encode()).hexdigest()


def do_case(model: Model, case: dict[str, Any], weights: str, config: Config) -> None:
    """Everything for a case, unless it is finished; its record, written last, says that it is."""
    record = config.destination / case["case"] / f"{case['case']}.json"
    mark = fingerprint(case, weights, config)
    known = json.loads(record.read_text()) if record.exists() else {}
    if known.get("fingerprint") == mark and not config.overwrite:
        tqdm.write(f"{case['case']}: finished before; --overwrite does it again")
        return
    for leftover in record.parent.glob(".*.partial.*"):  # of a run that was killed
        leftover.unlink()
    row = apply_to_case(model, case, config)
    row |= {
        "image": str(case[IMAGE].resolve()),
        "truth": str(case[LABEL].resolve()) if case[LABEL] else None,
        "checkpoint": ", ".join(map(str, (config.checkpoint, *config.folds))),
        "weights": weights[:12],
        "fingerprint": mark,
    }
    write_json(row, record)


# ---------------------------------------------------------------------------------------
# The table, the summary and its picture
# ---------------------------------------------------------------------------------------


def write_table(destination: Path) -> list[dict[str, Any]]:
    """results.csv and results.json: a row for each case in the folder, of earlier calls too."""
    records = [folder / f"{folder.name}.json" for folder in sorted(destination.iterdir())]
    rows = [json.loads(path.read_text()) for path in records if path.is_file()]
    with (
        atomic_write(destination / "results.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    write_json(rows, destination / "results.json")
    return rows


def write_json(content: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))


def statistics(values: dict[str, float], worst: str) -> dict[str, Any]:
    """Mean, SD (n − 1), median, the worst and whose it is, n; of case → value."""
    if not values:
        return {"n": 0}
    badness = {"low": lambda v: -v, "high": lambda v: v, "far": abs}[worst]
    array, case = np.array(list(values.values())), max(values, key=lambda c: badness(values[c]))
    spread = float(array.std(ddof=1)) if len(array) > 1 else None
    middle = {"mean": float(array.mean()), "sd": spread, "median": float(np.median(array))}
    return {**middle, "worst": values[case], "worst_case": case, "n": len(array)}


def summarise(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Per class and figure the `statistics` over evaluated patients; undefined ones left out of n.

    `empty` counts patients without the class in truth, prediction or both; `lesions` are pooled.
    """
    summary: dict[str, Any] = {"patients": len(rows)}
    for key in ("mean_iou", "accuracy"):
        known = {row["case"]: row[key] for row in rows if row[key] is not None}
        summary[key] = statistics(known, "low")
    for name in names:
        part: dict[str, Any] = {}
        for figure, worst in FIGURES.items():
            key = f"{name}_{figure}"
            known = {row["case"]: row[key] for row in rows if row[key] is not None}
            part[figure] = statistics(known, worst)
        empty = [row[f"{name}_empty"] for row in rows]
        part["empty"] = {which: empty.count(which) for which in ("truth", "prediction", "both")}
        if is_tumour(name):
            counts = [key for key in rows[0] if key.startswith(f"{name}_lesions")]
            pooled = {key.removeprefix(f"{name}_"): sum(row[key] for row in rows) for key in counts}
            pooled["lesion_recall"] = _ratio(pooled["lesions_found"], pooled["lesions"])
            pooled["lesion_precision"] = _ratio(
                pooled["lesions_right"], pooled["lesions_predicted"]
            )
            part["lesions"] = pooled
        summary[name] = part
    return summary


def figures_figure(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    """Box plots over patients, a dot for each, of what is a ratio, in mm, and in percent."""
    from matplotlib.figure import Figure

    panels = {
        "ratio (1 is best)": ("dice", "iou", "precision", "recall", "nsd_2mm"),
        "distance in mm (0 is best)": ("hd95_mm", "asd_mm"),
        "volume error in % (0 is best)": ("volume_error_percent",),
    }
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, (unit, keys) in zip(
        figure.subplots(1, 3, width_ratios=[5, 3, 2]), panels.items(), strict=True
    ):
        for index, name in enumerate(names, start=1):
            colour = class_colour(index)
            for place, key in enumerate(keys):
                values = [row[f"{name}_{key}"] for row in rows]
                values = [value for value in values if value is not None]
                at = place + (index - (len(names) + 1) / 2) * 0.8 / len(names)
                axes.boxplot(
                    [values], positions=[at], widths=0.5 / len(names), showfliers=False,
                    medianprops={"color": "black"}, boxprops={"color": colour},
                )  # fmt: skip
                axes.plot([at] * len(values), values, "o", color=colour, alpha=0.6, markersize=4)
            axes.plot([], [], "o", color=colour, label=name)
        labels = [key.removesuffix("_mm").replace("_", " ") for key in keys]
        axes.set_xticks(range(len(keys)), [label.replace("2mm", "2 mm") for label in labels])
        axes.set(ylabel=unit, xlim=(-0.6, len(keys) - 0.4))
        axes.grid(axis="y", alpha=0.3)
        if unit.startswith("ratio"):
            axes.set_ylim(-0.02, 1.02)
            axes.legend()
    figure.suptitle(f"whole volumes on their own grid, n = {len(rows)} patients")
    return figure


def print_summary(summary: dict[str, Any], names: Sequence[str]) -> None:
    """The figures that are reported most."""
    print(f"{'':<30}{'mean ± SD':>17}{'median':>9}{'worst':>9}{'n':>5}   worst case")
    for name in names:
        for figure in PRINTED:
            got = summary[name][figure]
            if got["n"]:
                mean = f"{got['mean']:.3f} ± {got['sd'] or 0:.3f}"
                line = f"{mean:>17}{got['median']:>9.3f}{got['worst']:>9.3f}{got['n']:>5}"
                print(f"{name + ' ' + figure:<30}{line}   {got['worst_case']}")
        if any(summary[name]["empty"].values()):
            empty = summary[name]["empty"]
            print(
                f"{name}: absent in {empty['both']} and falsely found in {empty['truth']}, "
                f"missed in {empty['prediction']} patients; undefined figures are left out of n"
            )
        if "lesions" in summary[name]:
            got = summary[name]["lesions"]
            print(
                f"{name}: {got['lesions_found']} of {got['lesions']} lesions found, "
                f"{got['lesions_right']} of {got['lesions_predicted']} findings right"
            )


def show_worst(rows: Sequence[dict[str, Any]], name: str, destination: Path) -> None:
    """worst.png: the previews of the cases of lowest Dice, the worst on top."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    dice = {row["case"]: row[f"{name}_dice"] for row in rows if row[f"{name}_dice"] is not None}
    worst = {
        case: destination / case / f"{case}_preview.png" for case in sorted(dice, key=dice.get)
    }
    shown = [case for case, path in worst.items() if path.exists()][:WORST_SHOWN]
    if not shown:
        return
    figure = Figure(figsize=(13, 7.2 * len(shown)))
    figure.subplots_adjust(0, 0, 1, 1, hspace=0)
    for axes, case in zip(figure.subplots(len(shown), squeeze=False).flat, shown, strict=True):
        axes.imshow(imread(worst[case]), interpolation="none")
        axes.axis("off")
    save_figure(figure, destination / "worst.png")
    told = ", ".join(f"{case} (Dice {dice[case]:.4f})" for case in shown)
    print(f"look first at {destination / 'worst.png'}: {told}")


def report(destination: Path, names: Sequence[str], weights: str) -> None:
    """Write the table of all cases, and the summary of those evaluated with these networks."""
    rows = write_table(destination)
    rows = [row for row in rows if row.get("truth") and row.get("weights") == weights[:12]]
    if rows:
        summary = summarise(rows, names)
        write_json({**summary, "weights": weights[:12]}, destination / "summary.json")
        save_figure(figures_figure(rows, names), destination / "summary.png")
        print_summary(summary, names)
        show_worst(rows, names[0], destination)


def main(config: Config) -> None:
    cases = find_cases(config)
    if config.dicom_seg and not any(is_series(case[IMAGE]) for case in cases):
        raise InputError(
            "--dicom-seg: none of the scans is a DICOM series, to which a DICOM SEG must refer; "
            "give the series themselves, or leave the option out"
        )
    # Under torchrun every process takes its share; nobody waits, the last one's table is complete.
    rank, processes = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    mine = cases[rank::processes]
    checkpoints = (config.checkpoint, *config.folds)
    model = load_model(checkpoints, config.device, config.precision)
    weights, failed = digest(checkpoints), []
    for case in tqdm(mine, unit="scan"):
        try:
            do_case(model, case, weights, config)
        except (InputError, OSError, RuntimeError, MemoryError) as error:
            failed.append(str(error) or type(error).__name__)
            tqdm.write(f"{case['case']}: failed, the others go on")
    if len(failed) < len(mine):
        report(config.destination, model.names, weights)
    if failed:
        raise InputError(f"{len(failed)} of {len(mine)} scans failed:\n" + "\n".join(failed))
    print(f"look at {config.destination}/<case>/<case>_preview.png; 3D: python visualize_3d.py")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
