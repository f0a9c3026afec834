"""Step 2: from CT in HU to what the network sees, and back.

    python preprocess.py            # takes train.py's options; shows what they do
    python train.py --show          # the same

One deterministic chain, used by training and by inference, resamples each axial slice in its own
plane and leaves the slice axis alone: 16 slices in, 16 out. So a whole volume can be preprocessed
once and then cut into windows (the same voxels as preprocessing each window), and the way back to
the scan's grid is an interpolation inside each slice. For patches, which are cut from whole volumes
at one spacing in all three axes, the slice axis is resampled as a second step.

Run as a script it hands its options to `train.py --show`, the home of the settings' values, which
writes `preprocess.png` beside the prepared data: sub-volumes before and after augmentation with the
label's outline, and histograms; and prints counts and memory.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":  # the values of Chain and Augment have one home, and it is not here
    sys.argv.append("--show")
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
    sys.exit()

import contextlib
import functools
import hashlib
import json
import math
import os
import runpy
import sys
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CastToTyped,
    ClassesToIndicesd,
    Compose,
    DeleteItemsd,
    EnsureTyped,
    Lambdad,
    MapTransform,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Resized,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)
from torch.utils.data import DataLoader, Dataset, Sampler

from data.files import InputError, atomic_write
from data.labels import IGNORED, IMAGE, LABEL, Labels
from data.pictures import draw_inputs, save_figure, spread
from data.scans import stamp_inputs
from data.settings import human_bytes, show_progress
from data.volumes import SLAB, Box, Volume, find_body, find_bounding_box, list_slabs, read_file
from utilities import hide_ignored, rank_and_size

SLICE_MM = "slice_mm"  # meta data: distance of slices
PATCH_MARGIN = 1.3  # patches are cut so much wider in plane: rotated, they then have no corners
CACHE_VERSION = 2  # of the files that --disk-cache keeps
INDICES = f"{LABEL}_indices"  # where the voxels of each class lie, for balanced patches

# ---------------------------------------------------------------------------------------
# Settings, without values: those are train.py's, and the checkpoint carries them
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """Settings of the deterministic chain; the checkpoint's `preprocessing` is `asdict` of one."""

    sampling: str  # "subvolumes": each slice resized to input_size; "patches": left at spacing
    spacing: tuple[float, ...]  # mm per voxel along x and y (and z, of patches)
    hu_window: tuple[float, float] | None  # HU that become 0 and 1; None: `divide_by_maximum`
    input_size: tuple[int, ...]  # voxels of the network's input along x and y (and z, of patches)
    labels: Labels  # class name → raw label values, background first; the order is the class index
    ignore: tuple[int, ...]  # raw values of voxels that nobody judged, as the data have them
    crop_to_body: bool  # each slice of a CT loses the air beside the body before all else


@dataclass(frozen=True)
class Augment:
    """Settings of the random augmentation."""

    sampling: str  # "patches" cuts a random patch of input_size from each volume first
    input_size: tuple[int, ...]  # voxels along x and y (and z, of patches)
    classes: int  # number of classes, background counted
    # Part of the patches that are centred on a voxel of a foreground class, all classes alike,
    # however few voxels they have; the others lie anywhere.
    foreground_sampling: float
    augment_probability: float  # of the affine part, noise, intensity scaling and shift, each
    rotation_degrees: float  # largest rotation about the body axis, either way
    translation: float  # largest shift either way, as a fraction of the picture's side
    scaling: float  # largest change of size either way (0.1 = ±10 %)
    noise_sd: float  # largest standard deviation of Gaussian noise, in units of the 0..1 intensity
    intensity_scaling: float  # largest change of contrast either way, as contrast agent differs
    intensity_shift: float  # largest change of brightness either way, in units of the intensity
    # Left-right mirroring. 0 for a liver: a mirrored abdomen (situs inversus) is 1 in 10,000
    # people, and the side is the best clue against the spleen.
    flip_probability: float


# ---------------------------------------------------------------------------------------
# The deterministic chain
# ---------------------------------------------------------------------------------------


class EachKeyd(MapTransform):
    """A dictionary transform that does `one(key, value)` for each of its keys."""

    one: Callable[[Any, Any], torch.Tensor]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: self.one(key, data[key]) for key in self.key_iterator(data)}}


class ReadVolumed(EachKeyd):
    """Path → (1, X, Y, Z) with its axes R, A, S: training reads files as every script does."""

    def one(self, key: Hashable, path: str) -> torch.Tensor:
        volume = read_file(Path(path)).ras
        return to_tensor(volume.data, volume)


class SlicesToChannelsd(EachKeyd):
    """(1, X, Y, Z) → (Z, X, Y): MONAI's 2D transforms then treat all slices alike, each in plane.

    A 3D interpolation would mix slices by rounding, and would straighten a sheared grid. The affine
    becomes the 3×3 map from pixel to in-plane millimetres; the meta data keep the third spacing.
    """

    def one(self, key: Hashable, volume: torch.Tensor) -> torch.Tensor:
        if not isinstance(volume, MetaTensor):
            return volume[0].permute(2, 0, 1).contiguous()
        x, y, z = volume.affine[:3, :3].norm(dim=0).tolist()  # mm per voxel
        in_plane = torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))
        slices = volume.as_tensor()[0].permute(2, 0, 1).contiguous()
        return MetaTensor(slices, affine=in_plane, meta={SLICE_MM: z})


class ChannelsToSlicesd(EachKeyd):
    """(Z, X, Y) → (1, X, Y, Z), the way back; a plain tensor without affine."""

    def one(self, key: Hashable, slices: torch.Tensor) -> torch.Tensor:
        plain = slices.as_tensor() if isinstance(slices, MetaTensor) else slices
        return plain.permute(1, 2, 0)[None].contiguous()


class SliceSpacingd(EachKeyd):
    """Resample (Z, X, Y) along the slices to `spacing` in mm, from the centre of the first slice.

    Between slices the image is interpolated linearly, the label is that of the nearest one; of
    those that somebody judged, if one of them is within half a step.
    """

    def __init__(self, keys: Sequence[str], spacing: float, **kwargs: Any):
        super().__init__(keys, **kwargs)
        self.spacing = spacing

    def one(self, key: Hashable, slices: MetaTensor) -> torch.Tensor:
        size, slice_mm, plain = len(slices), slices.meta[SLICE_MM], slices.as_tensor()
        count = round((size - 1) * slice_mm / self.spacing) + 1
        position = np.arange(count) * (self.spacing / slice_mm)
        if key == LABEL:
            distance = np.abs(position[:, None] - np.arange(size))
            unknown = (plain == IGNORED).flatten(1).all(dim=1).cpu().numpy()
            half = self.spacing / slice_mm / 2 + 1e-6
            return plain[(distance + half * unknown).argmin(axis=1)]
        return torch.einsum("wz,zxy->wxy", interpolation_matrix(position, size).to(plain), plain)


class ValuesToClassesd(EachKeyd):
    """Raw label values → class indices 0, 1, 2, … in the order of `labels` (name → raw values).

    A value that no class names becomes background: an organ that is not asked for. What nobody
    judged becomes IGNORED, which no loss and no metric counts.
    """

    def __init__(self, keys: Sequence[str], chain: Chain, **kwargs: Any):
        super().__init__(keys, **kwargs)
        self.index = {value: i for i, vs in enumerate(chain.labels.values()) for value in vs}
        self.index |= dict.fromkeys(chain.ignore, IGNORED)

    def one(self, key: Hashable, raw: torch.Tensor) -> torch.Tensor:
        classes = torch.zeros_like(raw)
        for value, index in self.index.items():
            classes[raw == value] = index
        return classes


def to_tensor(array: np.ndarray, volume: Volume) -> MetaTensor:
    """RAS array (X, Y, Z) of a volume → (1, X, Y, Z) with the volume's RAS affine."""
    if array.dtype.kind == "u":  # torch hardly knows unsigned integers wider than a byte
        array = array.astype(np.float32)
    tensor = torch.as_tensor(np.array(array, order="F"))[None]
    return MetaTensor(tensor, affine=torch.as_tensor(volume.ras_affine))


def resampling_device(device: torch.device) -> torch.device:
    """Where volumes are resampled: there, but for Apple's GPUs, which lack float64, on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def divide_by_maximum(slices: torch.Tensor) -> torch.Tensor:
    """(Z, X, Y): negatives to 0, then each slice divided by its own maximum."""
    positive = slices.clamp(min=0)
    return positive / positive.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)


def in_plane_chain(chain: Chain, device: torch.device | str) -> list[Any]:
    """Steps from a RAS volume (1, X, Y, Z) to slices (Z, X', Y') in 0..1.

    `device` is where the resampling runs and the result stays.
    """
    keys, resize, both = (IMAGE, LABEL), [], dict[str, Any](allow_missing_keys=True)
    intensity: MapTransform = Lambdad(IMAGE, divide_by_maximum)
    if chain.hu_window:
        low, high = chain.hu_window
        intensity = ScaleIntensityRanged(IMAGE, low, high, b_min=0.0, b_max=1.0, clip=True)
    if chain.sampling == "subvolumes":
        # "nearest" rounds towards the corner and would shift each label by half a pixel;
        # "nearest-exact" keeps pixel centres (liver Dice of the round trip 0.99 instead of 0.98).
        modes = ("bilinear", "nearest-exact")
        resize = [Resized(keys, spatial_size=chain.input_size, mode=modes, **both)]
    return [
        SlicesToChannelsd(keys, **both),  # first: 16-bit numbers turn 4 times as fast
        EnsureTyped(keys, device=torch.device(device), dtype=torch.float32, **both),
        Spacingd(
            keys,
            pixdim=chain.spacing[:2],
            mode=("bilinear", "nearest"),
            padding_mode="border",
            dtype=torch.float32,  # type: ignore[arg-type]  # MONAI's float64 is 3.5 times slower
            **both,
        ),
        intensity,
        *resize,
        ValuesToClassesd([LABEL], chain, **both),
    ]


def slice_chain(chain: Chain) -> list[Any]:
    """Steps from all slices of a volume (Z, X', Y') to the network's (1, X', Y', Z')."""
    keys, both = (IMAGE, LABEL), {"allow_missing_keys": True}
    steps: list[Any] = [ChannelsToSlicesd(keys, **both)]
    if chain.sampling == "patches":
        steps.insert(0, SliceSpacingd(keys, chain.spacing[2], **both))
    return steps


def deterministic_chain(chain: Chain, device: torch.device | str) -> Compose:
    """Files of a sub-volume or case → image (1, X, Y, Z) float16 in 0..1, label uint8 indices.

    Half precision halves the cache: 1/2048 of the HU window at most, far below CT noise.
    """
    keys = (IMAGE, LABEL)
    return Compose(
        [
            ReadVolumed(keys),
            *in_plane_chain(chain, device),
            *slice_chain(chain),
            CastToTyped(keys, dtype=(torch.float16, torch.uint8)),
        ]
    )


# ---------------------------------------------------------------------------------------
# Inference: a whole volume in, the network's answer back on the volume's grid
# ---------------------------------------------------------------------------------------


def preprocess_volume(
    volume: Volume, chain: Chain, device: torch.device | str
) -> tuple[torch.Tensor, np.ndarray]:
    """Bring a whole volume in HU, in any orientation, to the network's grid, slab by slab.

    Returns:
        Tensor (1, X, Y, Z) in 0..1, slices from inferior to superior, and the 4×4 map from
        RAS-ordered source voxel (i, j, k, 1) to network voxel, which has no rotation.
    """
    box = find_body(volume) if chain.crop_to_body else (slice(0, None), slice(0, None))
    steps = Compose(in_plane_chain(chain, resampling_device(torch.device(device))))
    slices = torch.empty(0)
    for first, slab in volume.slabs(list_slabs(volume.ras_shape[2], SLAB)):
        part = steps({IMAGE: to_tensor(slab[box], volume)})[IMAGE]
        if not len(slices):  # all at once, so that no second copy is needed
            slices = torch.empty((volume.ras_shape[2], *part.shape[1:]), device=part.device)
        slices[first : first + len(part)] = part.as_tensor()
    in_plane = part.affine.cpu().numpy()  # network pixel → mm
    x, y, z = np.linalg.norm(volume.ras_affine[:3, :3], axis=0)
    step = chain.spacing[2] if chain.sampling == "patches" else z
    to_network = np.diag([1.0, 1.0, z / step, 1.0])
    to_network[np.ix_([0, 1, 3], [0, 1, 3])] = np.linalg.inv(in_plane) @ np.diag([x, y, 1.0])
    to_network[:2, 3] -= np.diag(to_network)[:2] * [edge.start for edge in box]
    for turn in slice_chain(chain)[:-1]:
        slices = turn({IMAGE: MetaTensor(slices, meta=part.meta)})[IMAGE]
    return slices.permute(1, 2, 0)[None].to(device), to_network  # a view: windows are turned


def interpolation_matrix(position: np.ndarray, size: int) -> torch.Tensor:
    """(len(position), size) weights of linear interpolation among `size` samples, edges held."""
    distance = np.abs(np.clip(position, 0, size - 1)[:, None] - np.arange(size))
    return torch.from_numpy(np.maximum(1 - distance, 0).astype(np.float32))


def to_source_grid(scores: torch.Tensor, to_network: np.ndarray, box: Box) -> torch.Tensor:
    """Scores (C, X, Y, Z) on the network's grid, interpolated at a box of the source's RAS grid:
    (C, *box). Linear interpolation is separable: two small matrix products per slice."""
    weights = []
    for axis, part in enumerate(box):
        position = to_network[axis, axis] * np.arange(part.start, part.stop) + to_network[axis, 3]
        position = np.clip(position, 0, scores.shape[axis + 1] - 1)
        low, high = int(position[0]), math.ceil(position[-1]) + 1
        scores = scores.narrow(axis + 1, low, high - low)
        weights.append(interpolation_matrix(position - low, high - low).to(scores))
    along_x, along_y, along_z = weights
    if not torch.equal(along_z, torch.eye(*along_z.shape).to(along_z)):
        scores = torch.einsum("zw,cuvw->cuvz", along_z, scores)
    return torch.einsum("xu,cuvz,yv->cxyz", along_x, scores, along_y)


def find_source_box(part: Box, to_network: np.ndarray, shape: Sequence[int]) -> Box:
    """The part of the source's grid (`shape`) less than a network voxel from a box of the network's
    grid; empty if nothing is."""
    box = []
    for axis, (inside, size) in enumerate(zip(part, shape, strict=True)):
        position = to_network[axis, axis] * np.arange(size) + to_network[axis, 3]
        near = np.flatnonzero((position > inside.start - 1) & (position < inside.stop))
        some = inside.stop > inside.start and near.size > 0
        box.append(slice(int(near[0]), int(near[-1]) + 1) if some else slice(0, 0))
    return tuple(box)


def classes_on_grid(
    scores: torch.Tensor, source_to_network: np.ndarray, ras_shape: Sequence[int]
) -> np.ndarray:
    """Class indices (X, Y, Z) uint8 on the scan's RAS grid, of scores on the network's."""
    classes = np.zeros(ras_shape, np.uint8, order="F")
    positive = find_bounding_box((scores > 0).any(dim=0).numpy())  # between others none is either
    x, y, z = find_source_box(positive, source_to_network, ras_shape)
    for first in range(z.start, z.stop, SLAB):
        slab = slice(first, min(first + SLAB, z.stop))
        fine = to_source_grid(scores, source_to_network, (x, y, slab))
        best, index = fine.max(dim=0) if len(fine) > 1 else (fine[0], 0)
        found = (best > 0).to(torch.uint8) * (torch.as_tensor(index) + 1).to(torch.uint8)
        classes[x, y, slab] = found.numpy()
    return classes


def probability_on_grid(
    scores: torch.Tensor, source_to_network: np.ndarray, ras_shape: Sequence[int]
) -> np.ndarray:
    """Probability that a voxel is not background, as uint8 in steps of 1/255, RAS (X, Y, Z)."""
    probability = np.zeros(ras_shape, np.uint8, order="F")
    seen = tuple(slice(0, size) for size in scores.shape[1:])
    x, y, _ = find_source_box(seen, source_to_network, ras_shape)
    for first, last in list_slabs(ras_shape[2], SLAB):
        fine = to_source_grid(scores, source_to_network, (x, y, slice(first, last)))
        # softmax: 1 − p(background) = sigmoid(log Σ exp(logit − background's logit))
        some = torch.logsumexp(fine, dim=0).sigmoid()
        probability[x, y, first:last] = (some * 255).round().to(torch.uint8).numpy()
    return probability


# ---------------------------------------------------------------------------------------
# Random augmentation (training only) and cached datasets
# ---------------------------------------------------------------------------------------


def augmentation(augment: Augment, device: torch.device | str) -> Compose:
    """Random rotation, translation and scaling in ONE in-plane resampling, then intensities.

    `device` is where the batches go; the resampling runs there, if it can.
    """
    keys, often = (IMAGE, LABEL), augment.augment_probability
    in_plane, scaling = augment.input_size[:2], augment.scaling
    return Compose(
        [
            *(random_patch(augment) if augment.sampling == "patches" else []),
            CastToTyped(keys, dtype=(torch.float32, torch.float32)),
            SlicesToChannelsd(keys),
            RandAffined(
                keys,
                spatial_size=in_plane,
                prob=often,
                rotate_range=(np.deg2rad(augment.rotation_degrees),),
                translate_range=[augment.translation * size for size in in_plane],
                scale_range=(scaling, scaling),
                mode=("bilinear", "nearest"),
                padding_mode="zeros",  # 0 is air in the image and background in the label
                device=resampling_device(torch.device(device)),
            ),
            RandFlipd(keys, prob=augment.flip_probability, spatial_axis=0),
            RandGaussianNoised(IMAGE, prob=often, std=augment.noise_sd),
            RandScaleIntensityd(IMAGE, factors=augment.intensity_scaling, prob=often),
            RandShiftIntensityd(IMAGE, offsets=augment.intensity_shift, prob=often),
            ChannelsToSlicesd(keys),
        ]
    )


def random_patch(augment: Augment) -> list[Any]:
    """Steps from a cached volume to one random patch of it, wider in plane by PATCH_MARGIN."""
    keys, centred = (IMAGE, LABEL), augment.foreground_sampling
    foreground = augment.classes - 1
    x, y, z = augment.input_size
    cut = (math.ceil(PATCH_MARGIN * x), math.ceil(PATCH_MARGIN * y), z)
    return [
        RandCropByLabelClassesd(
            keys,
            label_key=LABEL,
            spatial_size=cut,
            ratios=[1 - centred, *[centred / max(foreground, 1)] * foreground],
            num_classes=augment.classes,
            indices_key=INDICES,
            allow_smaller=True,
            warn=False,  # a case may lack a class
        ),
        DeleteItemsd(INDICES),
        SpatialPadd(keys, spatial_size=cut),  # 0 is air and background
    ]


class Subvolumes(Dataset):
    """Cached sub-volumes, augmented on the way out; or random patches of cached volumes.

    The random numbers of a sample depend on (seed, epoch, sample) alone: not on the order, the
    number of processes, or where a run was interrupted. Items: image (1, X, Y, Z) float32 in 0..1,
    label (1, X, Y, Z) class indices, and the names of case and sub-volume. In an epoch each cached
    item is used `repeats` times.
    """

    def __init__(
        self, cached: CachedVolumes, augment: Compose | None = None, seed: int = 0, repeats: int = 1
    ):
        self.cached, self.augment, self.seed, self.epoch = cached, augment, seed, 0
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.cached) * self.repeats

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, place = divmod(index, len(self.cached))
        item = self.cached[place]
        if self.augment is None:
            return {**item, IMAGE: item[IMAGE].float()}
        entropy = [self.seed, self.epoch, item["index"], turn]
        self.augment.set_random_state(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        return single(self.augment(item))

    def examples(self, count: int) -> list[dict[str, Any]]:
        """Some samples for a preview, the same every time."""
        return [self[index] for index in spread(len(self), count)]


def single(sample: Any) -> dict[str, Any]:
    """MONAI's random crops return a list of samples, of one here."""
    return sample[0] if isinstance(sample, list) else sample


class WholeCases(Subvolumes):
    """Cached whole cases, as validation takes them; a preview shows `window` (x, y, z) of them."""

    def __init__(self, cached: CachedVolumes, window: Sequence[int]):
        super().__init__(cached)
        self.window = tuple(window)

    def examples(self, count: int) -> list[dict[str, Any]]:
        """Of some cases the window around their last class, the tumour where there is one."""
        found = []
        for item in super().examples(count):
            label = hide_ignored(item[LABEL][0])
            centre = torch.nonzero(label == max(int(label.max()), 1)).float().mean(dim=0)
            box = []
            for at, width, size in zip(
                centre.nan_to_num().int().tolist(), self.window, label.shape, strict=True
            ):
                start = max(0, min(at - width // 2, size - width))
                box.append(slice(start, start + width))
            cut = {key: item[key][(slice(None), *box)] for key in (IMAGE, LABEL)}
            found.append({**item, **cut, "first_slice": box[2].start})  # of the resampled volume
        return found


class EpochOrder(Sampler[int]):
    """The order of an epoch, shuffled by (seed, epoch), from a given batch on."""

    def __init__(self, length: int, batch_size: int, shuffle: bool, seed: int):
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.epoch = self.first_batch = 0

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        return iter(order[self.first_batch * self.batch_size :].tolist())

    def __len__(self) -> int:
        return max(self.length - self.first_batch * self.batch_size, 0)


class SubvolumeLoader(DataLoader):
    """Batches of `Subvolumes`; a thread prepares the next one while the network works.

    A thread and not processes, because those cannot share a cache on the GPU. Not MONAI's
    ThreadDataLoader, because it ends an epoch early, without a word, when a sample fails.
    `pin` puts batches of a cache in the host's memory where the GPU fetches them fastest.
    """

    def __init__(
        self, data: Subvolumes, batch_size: int, shuffle: bool, seed: int, pin: bool = False
    ):
        self.order = EpochOrder(len(data), batch_size, shuffle, seed)
        super().__init__(data, batch_size=batch_size, sampler=self.order, pin_memory=pin)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of an epoch, and the batch to begin with."""
        self.order.epoch, self.order.first_batch = epoch, first_batch
        cast(Any, self.dataset).epoch = epoch  # its type is lost in DataLoader

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch wants its own class
        with ThreadPoolExecutor(max_workers=1) as thread:
            batches = super().__iter__()
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch


def subvolume_items(prepared: dict[str, Any], folder: Path, split: str) -> list[dict[str, Any]]:
    """What the chain loads: files, names, and what identifies the content of each sub-volume."""
    records = [record for record in prepared["subvolumes"] if record["split"] == split]
    if not records:
        raise InputError(
            f"{folder / 'dataset.json'}: no sub-volume in the {split} split; prepare more patients "
            "(three at least)"
        )
    kept = ("case", "first_slice", "shape", "spacing_mm")
    return [
        {
            IMAGE: str(folder / record[IMAGE]),
            LABEL: str(folder / record[LABEL]),
            "index": index,
            "content": " ".join(str(record[k]) for k in record if k.endswith(("crc32", "sha256"))),
            **{key: record[key] for key in kept},
        }
        for index, record in enumerate(records)
    ]


def share_of_process(items: list[Any], rank: int, processes: int, even: bool) -> list[Any]:
    """This process's part; `even` repeats a few so that all have as many batches (training)."""
    if not even:
        return items[rank::processes]
    count = -(-len(items) // processes)
    return [items[(rank + step * processes) % len(items)] for step in range(count)]


def network_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], chain: Chain
) -> tuple[float, ...]:
    """About the size that a volume of RAS `shape` has after the deterministic chain."""
    if chain.sampling == "subvolumes":
        return (*chain.input_size, shape[2])
    steps = zip(shape, spacing_mm, chain.spacing, strict=True)
    return tuple(size * mm / step for size, mm, step in steps)


def balanced_indices(classes: int) -> ClassesToIndicesd:
    """Remember where voxels of each class lie; 20,000 of each tell as much as all of them."""
    postfix = INDICES.removeprefix(LABEL)
    return ClassesToIndicesd(LABEL, postfix, num_classes=classes, max_samples_per_class=20_000)


def cache_place(needed: int, device: torch.device) -> tuple[torch.device, float]:
    """Where a cache of `needed` bytes fits, and the part of it that is kept.

    On the device if it takes no more than 60 % of the free memory (the network needs the rest),
    else in the host's memory, else as much of it as fits there.
    """
    device = resampling_device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed <= 0.6 * free:
            return device, 1.0
        print(f"cache: {human_bytes(needed)} do not fit beside the network on {device}", end="")
        print(f" ({human_bytes(free)} free); it stays in the host's memory")
    free = psutil.virtual_memory().available
    if needed <= 0.6 * free:
        return torch.device("cpu"), 1.0
    rate = 0.6 * free / needed
    print(f"cache: {human_bytes(needed)} do not fit in memory ({human_bytes(free)} free); ", end="")
    print(f"{rate:.0%} is cached, the rest is read anew each epoch (slower)")
    return torch.device("cpu"), rate


def cache_split(
    prepared: dict[str, Any],
    folder: Path,
    split: str,
    chain: Chain,
    device: torch.device | str,
    disk_cache: bool = False,
) -> CachedVolumes:
    """Run the deterministic chain over the sub-volumes of a split, once, and keep the results.

    Under torchrun each process caches its own share.

    Args:
        prepared, folder: content of dataset.json, and where it lies.
        split: "training", "validation" or "test".
        device: where the chain runs and, memory permitting, the cache stays.
        disk_cache: also keep the results in `folder/cache`, so that the next run starts in seconds.
    """
    items = subvolume_items(prepared, folder, split)
    items = share_of_process(items, *rank_and_size(), even=split == "training")
    patches = chain.sampling == "patches"
    shapes = (network_shape(item["shape"], item["spacing_mm"], chain) for item in items)
    needed = sum(math.ceil(math.prod(shape)) * 3 for shape in shapes)  # image float16, label uint8
    place, rate = cache_place(needed, torch.device(device))
    what = "whole cases" if patches else "sub-volumes"
    mean = human_bytes(needed / max(len(items), 1))
    print(f"cache: {len(items)} {split} {what} × {mean} = {human_bytes(needed)} on {place}")
    steps = deterministic_chain(chain, place)
    if patches:
        steps = Compose([*steps.transforms, balanced_indices(len(chain.labels))])
    prepare: Callable[..., Any] = steps
    if disk_cache:
        prepare = functools.partial(read_or_make, steps, chain, folder / "cache", place)
    return CachedVolumes(items, prepare, rate, f"{split}, reading")


class CachedVolumes(Dataset):
    """What `prepare` makes of some items, in memory: of all of them, or of the part `rate`."""

    def __init__(
        self,
        items: Sequence[dict[str, Any]],
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        rate: float = 1.0,
        title: str = "",
    ):
        self.items, self.prepare = items, prepare
        kept = items[: round(rate * len(items))]
        # An interrupt drops what has not begun, and waits for what has.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            made = pool.map(prepare, kept)
            self.kept = list(show_progress(made, total=len(kept), desc=title, unit="file"))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.kept[index] if index < len(self.kept) else self.prepare(self.items[index])


def read_or_make(
    steps: Compose, chain: Chain, cache: Path, place: torch.device, item: dict[str, Any]
) -> dict[str, Any]:
    """`steps(item)`, kept in a file of `cache` whose name is a hash of settings and content.

    A file that is torn or damaged is made again.
    """
    content = item["content"] or stamp_inputs(Path(item[key]) for key in (IMAGE, LABEL))
    where = {key: value for key, value in item.items() if key not in (IMAGE, LABEL, "index")}
    key = json.dumps([CACHE_VERSION, where, content, asdict(chain)], sort_keys=True)
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.pt"
    if path.is_file():
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # torch.load does not compare the checksums
                return torch.load(path, place, weights_only=True) | {"index": item["index"]}
    made = steps(item)
    with atomic_write(path) as temporary:
        torch.save(made, temporary)
    return made


# ---------------------------------------------------------------------------------------
# Run as a script: show what the network will see
# ---------------------------------------------------------------------------------------


def show_inputs(
    folder: Path, prepared: dict[str, Any], chain: Chain, augment: Augment, device: torch.device
) -> Path:
    """Draw what the network will see of a prepared folder; returns the picture's path."""
    picture = folder / "preprocess.png"
    splits = {record["split"] for record in prepared["subvolumes"]}
    for split in sorted(splits & {"training", "validation"}):
        cached = cache_split(prepared, folder, split, chain, device)
        print(f"{split}: {len(cached)} sub-volumes of {tuple(cached[0][IMAGE].shape)}")
        if split == "training":
            augmented = Subvolumes(cached, augmentation(augment, device))
            names = list(chain.labels)[1:]
            save_figure(draw_inputs(Subvolumes(cached), augmented, names), picture)
    return picture
