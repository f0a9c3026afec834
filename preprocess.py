"""Step 2: from CT in HU to what the network sees, and back.

    python preprocess.py            # takes train.py's options; shows what they do

One deterministic chain, used by training and by inference, resamples each axial slice in its own
plane and leaves the slice axis alone: 16 slices in, 16 out. So a whole volume can be preprocessed
once and then cut into windows (the same voxels as preprocessing each window), and the way back to
the scan's grid is an interpolation inside each slice. For patches, which are cut from whole volumes
at one spacing in all three axes, the slice axis is resampled as a second step.

Run as a script it writes `preprocess.png` beside the prepared data: sub-volumes before and after
augmentation with the label's outline, and histograms; and prints counts and memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import psutil
import torch
from monai.data import CacheDataset, MetaTensor, PersistentDataset
from monai.transforms import (
    CastToTyped,
    ClassesToIndicesd,
    Compose,
    DeleteItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Lambdad,
    LoadImaged,
    MapTransform,
    Orientationd,
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

from utilities import (
    IMAGE,
    LABEL,
    LABEL_COLOURS,
    ORIENTATION,
    TRUTH_COLOUR,
    InputError,
    command_line,
    draw_plane,
    human_bytes,
    pick_device,
    ranges,
    ras_grid,
    ras_slabs,
    save_figure,
    spacing_mm,
)

if TYPE_CHECKING:
    from train import Config  # the settings' home; never imported when the program runs

SLAB = 32  # slices that are resampled at a time, so that memory does not grow with the scan
SLICE_MM = "slice_mm"  # meta data: distance of slices
PATCH_MARGIN = 1.3  # patches are cut so much wider in plane: rotated, they then have no corners
INDICES = f"{LABEL}_indices"  # where the voxels of each class lie, for balanced patches

# ---------------------------------------------------------------------------------------
# The deterministic chain
# ---------------------------------------------------------------------------------------


class EachKeyd(MapTransform):
    """A dictionary transform that does `one(key, value)` for each of its keys."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: self.one(key, data[key]) for key in self.key_iterator(data)}}


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

    Between slices the image is interpolated linearly, the label is that of the nearest one.
    """

    def __init__(self, keys: Sequence[str], spacing: float, **kwargs: Any):
        super().__init__(keys, **kwargs)
        self.spacing = spacing

    def one(self, key: Hashable, slices: MetaTensor) -> torch.Tensor:
        size, slice_mm, plain = len(slices), slices.meta[SLICE_MM], slices.as_tensor()
        count = round((size - 1) * slice_mm / self.spacing) + 1
        position = np.arange(count) * (self.spacing / slice_mm)
        if key == LABEL:
            return plain[position.round().astype(int).clip(0, size - 1)]
        return torch.einsum("wz,zxy->wxy", interpolation_matrix(position, size).to(plain), plain)


class ValuesToClassesd(EachKeyd):
    """Raw label values → class indices 0, 1, 2, … in the order of `labels` (name → raw values).

    A value that no class names becomes background: an organ that is not asked for.
    """

    def __init__(self, keys: Sequence[str], labels: Mapping[str, Sequence[int]], **kwargs: Any):
        super().__init__(keys, **kwargs)
        self.labels = labels

    def one(self, key: Hashable, raw: torch.Tensor) -> torch.Tensor:
        classes = torch.zeros_like(raw)
        for index, values in enumerate(self.labels.values()):
            for value in values:
                classes[raw == value] = index
        return classes


def divide_by_maximum(slices: torch.Tensor) -> torch.Tensor:
    """(Z, X, Y): negatives to 0, then each slice divided by its own maximum."""
    positive = slices.clamp(min=0)
    return positive / positive.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)


def in_plane_chain(
    *,
    sampling: str,
    spacing: Sequence[float],
    hu_window: Sequence[float] | None,
    input_size: Sequence[int],
    labels: Mapping[str, Sequence[int]],
    device: torch.device | str,
) -> list[Any]:
    """Steps from a loaded volume (1, X, Y, Z), any orientation, to slices (Z, X', Y') in 0..1.

    Args:
        sampling: "subvolumes" resizes each slice to `input_size`; "patches" leaves it at `spacing`.
        spacing: mm per voxel along x and y (and z, of patches).
        hu_window: HU that become 0 and 1, what lies outside is clipped; None: `divide_by_maximum`.
        input_size: voxels of the network's input along x and y (and z, of patches).
        labels: class name → raw label values; the order gives the class index.
        device: where the resampling runs and the result stays.
    """
    keys, both = (IMAGE, LABEL), {"allow_missing_keys": True}
    intensity, resize = Lambdad(IMAGE, divide_by_maximum), []
    if hu_window:
        to_unit = {"a_min": hu_window[0], "a_max": hu_window[1], "b_min": 0.0, "b_max": 1.0}
        intensity = ScaleIntensityRanged(IMAGE, **to_unit, clip=True)
    if sampling == "subvolumes":
        # "nearest" rounds towards the corner and would shift each label by half a pixel;
        # "nearest-exact" keeps pixel centres (liver Dice of the round trip 0.99 instead of 0.98).
        modes = ("bilinear", "nearest-exact")
        resize = [Resized(keys, spatial_size=tuple(input_size), mode=modes, **both)]
    return [
        Orientationd(keys, axcodes=ORIENTATION, labels=None, **both),
        EnsureTyped(keys, device=torch.device(device), dtype=torch.float32, **both),
        SlicesToChannelsd(keys, **both),
        Spacingd(
            keys,
            pixdim=tuple(spacing[:2]),
            mode=("bilinear", "nearest"),
            padding_mode="border",
            dtype=torch.float32,  # MONAI's default float64 is 3.5 times slower
            **both,
        ),
        intensity,
        *resize,
        ValuesToClassesd([LABEL], labels=labels, **both),
    ]


def slice_chain(*, sampling: str, spacing: Sequence[float], **_: Any) -> list[Any]:
    """Steps from all slices of a volume (Z, X', Y') to the network's (1, X', Y', Z')."""
    keys, both = (IMAGE, LABEL), {"allow_missing_keys": True}
    resample = [SliceSpacingd(keys, spacing[2], **both)] if sampling == "patches" else []
    return [*resample, ChannelsToSlicesd(keys, **both)]


def deterministic_chain(**settings: Any) -> Compose:
    """Files of a sub-volume or case → image (1, X, Y, Z) float16 in 0..1, label uint8 indices.

    Takes the settings of `in_plane_chain`. Half precision halves the cache: 1/2048 of the HU
    window at most, far below CT noise.
    """
    keys = (IMAGE, LABEL)
    # LoadImaged builds all its readers and tells of a DICOM decoder that nobody asked for.
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = LoadImaged(keys, reader="NibabelReader", image_only=True)
    return Compose(
        [
            load,
            EnsureChannelFirstd(keys, channel_dim="no_channel"),
            *in_plane_chain(**settings),
            *slice_chain(**settings),
            CastToTyped(keys, dtype=(torch.float16, torch.uint8)),
        ]
    )


# ---------------------------------------------------------------------------------------
# Inference: a whole volume in, the network's answer back on the volume's grid
# ---------------------------------------------------------------------------------------


def preprocess_volume(image: nib.Nifti1Image, **settings: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Bring a whole volume to the network's grid, slab by slab.

    Args:
        image: volume in HU, any orientation.
        settings: those of `in_plane_chain`.

    Returns:
        Tensor (1, X, Y, Z) in 0..1, slices from inferior to superior, and the 4×4 map from
        RAS-ordered source voxel (i, j, k, 1) to network voxel, which has no rotation.
    """
    shape, affine = ras_grid(image)
    chain, slabs = Compose(in_plane_chain(**settings)), {}
    for first, slab in ras_slabs(image, ranges(shape[2], SLAB, reach_back=False)):
        if slab.dtype.kind == "u":  # torch cannot flip unsigned integers wider than a byte
            slab = slab.astype(np.float32)
        volume = MetaTensor(torch.as_tensor(np.array(slab, order="F"))[None], affine=affine)
        slabs[first] = chain({IMAGE: volume})[IMAGE]
    in_plane = slabs[0].affine.cpu().numpy()  # network pixel → mm
    slices = torch.cat([slabs.pop(first) for first in sorted(slabs)])
    x, y, z = spacing_mm(affine)
    step = settings["spacing"][2] if settings["sampling"] == "patches" else z
    to_network = np.diag([1.0, 1.0, z / step, 1.0])
    to_network[np.ix_([0, 1, 3], [0, 1, 3])] = np.linalg.inv(in_plane) @ np.diag([x, y, 1.0])
    return Compose(slice_chain(**settings))({IMAGE: slices})[IMAGE], to_network


def interpolation_matrix(position: np.ndarray, size: int) -> torch.Tensor:
    """(len(position), size) weights of linear interpolation among `size` samples, edges held."""
    position = np.clip(position, 0, size - 1)
    lower = np.minimum(position.astype(int), max(size - 2, 0))
    fraction = position - lower
    matrix = np.zeros((len(position), size), np.float32)
    rows = np.arange(len(position))
    matrix[rows, lower] = 1 - fraction
    if size > 1:
        matrix[rows, lower + 1] = fraction
    return torch.from_numpy(matrix)


def source_positions(
    to_network: np.ndarray, axis: int, first: int, last: int, size: int
) -> np.ndarray:
    """Where the source voxels first … last − 1 of an axis lie among `size` network voxels."""
    position = to_network[axis, axis] * np.arange(first, last) + to_network[axis, 3]
    return np.clip(position, 0, size - 1)


def network_slices(
    scores: torch.Tensor, to_network: np.ndarray, first: int, last: int
) -> tuple[torch.Tensor, np.ndarray]:
    """The part of `scores` (…, Z) between which source slices lie, and their positions in it."""
    position = source_positions(to_network, 2, first, last, scores.shape[-1])
    low = int(position[0])
    return scores[..., low : math.ceil(position[-1]) + 1], position - low


def to_source_grid(
    scores: torch.Tensor, to_network: np.ndarray, plane: Sequence[int], first: int, last: int
) -> torch.Tensor:
    """Interpolate scores (C, X, Y, Z) on the network's grid at slices of the source's grid.

    `plane` is the source's size (x, y). Returns (C, *plane, last − first) in RAS order.
    """
    part, z = network_slices(scores, to_network, first, last)
    if not np.array_equal(z, np.arange(part.shape[-1])):
        along_z = interpolation_matrix(z, part.shape[-1]).to(part)
        part = torch.einsum("zw,cuvw->cuvz", along_z, part)
    x, y = (source_positions(to_network, a, 0, plane[a], part.shape[a + 1]) for a in (0, 1))
    along_x = interpolation_matrix(x, part.shape[1]).to(part)
    along_y = interpolation_matrix(y, part.shape[2]).to(part)
    # Two small matrix products per slice: linear interpolation is separable.
    return torch.einsum("xu,cuvz,yv->cxyz", along_x, part, along_y)


# ---------------------------------------------------------------------------------------
# Random augmentation (training only) and cached datasets
# ---------------------------------------------------------------------------------------


def augmentation(
    *,
    sampling: str,
    foreground_sampling: float,
    classes: int,
    probability: float,
    rotation_degrees: float,
    translation: float,
    scaling: float,
    noise_sd: float,
    intensity_scaling: float,
    intensity_shift: float,
    flip_probability: float,
    input_size: Sequence[int],
    device: torch.device | str,
) -> Compose:
    """Random rotation, translation and scaling in ONE in-plane resampling, then intensities.

    Args:
        sampling: "patches" cuts a random patch of `input_size` (x, y, z) from each volume first.
        foreground_sampling: part of the patches that are centred on a voxel of a foreground class,
            all classes alike, however few voxels they have; the others lie anywhere.
        classes: number of classes, background counted.
        probability: of the affine part, the noise, the intensity scaling and the shift, each.
        rotation_degrees: largest rotation about the body axis, either way.
        translation: largest shift either way, as a fraction of the picture's side.
        scaling: largest change of size either way (0.1 = ±10 %).
        noise_sd: largest standard deviation of Gaussian noise, in units of the 0..1 intensity.
        intensity_scaling, intensity_shift: largest change of contrast (fraction) and of brightness
            (in units of the 0..1 intensity) either way, as contrast agent and scanners differ.
        flip_probability: left-right mirroring. Leave it at 0 for a liver: a mirrored abdomen (situs
            inversus) is 1 in 10,000 people, and the side is the best clue against the spleen.
        device: where the resampling runs.
    """
    keys = (IMAGE, LABEL)
    patches = []
    if sampling == "patches":
        foreground = foreground_sampling / max(classes - 1, 1)
        x, y, z = input_size
        cut = (math.ceil(PATCH_MARGIN * x), math.ceil(PATCH_MARGIN * y), z)
        patches = [
            RandCropByLabelClassesd(
                keys,
                label_key=LABEL,
                spatial_size=cut,
                ratios=[1 - foreground_sampling, *[foreground] * (classes - 1)],
                num_classes=classes,
                indices_key=INDICES,
                allow_smaller=True,
                warn=False,  # a case may lack a class
            ),
            DeleteItemsd(INDICES),
            SpatialPadd(keys, spatial_size=cut),  # 0 is air and background
        ]
    return Compose(
        [
            *patches,
            CastToTyped(keys, dtype=(torch.float32, torch.float32)),
            SlicesToChannelsd(keys),
            RandAffined(
                keys,
                spatial_size=tuple(input_size[:2]),
                prob=probability,
                rotate_range=(np.deg2rad(rotation_degrees),),
                translate_range=[translation * size for size in input_size[:2]],
                scale_range=(scaling, scaling),
                mode=("bilinear", "nearest"),
                padding_mode="zeros",  # 0 is air in the image and background in the label
                device=torch.device(device),
            ),
            RandFlipd(keys, prob=flip_probability, spatial_axis=0),
            RandGaussianNoised(IMAGE, prob=probability, std=noise_sd),
            RandScaleIntensityd(IMAGE, factors=intensity_scaling, prob=probability),
            RandShiftIntensityd(IMAGE, offsets=intensity_shift, prob=probability),
            ChannelsToSlicesd(keys),
        ]
    )


class Subvolumes(Dataset):
    """Cached sub-volumes, augmented on the way out; or random patches of cached volumes.

    The random numbers of a sample depend on (seed, epoch, sample) alone: not on the order, the
    number of processes, or where a run was interrupted. Items: image (1, X, Y, Z) float32 in 0..1,
    label (1, X, Y, Z) class indices, and the names of case and sub-volume. In an epoch each cached
    item is used `repeats` times.
    """

    def __init__(
        self, cached: Dataset, augment: Compose | None = None, seed: int = 0, repeats: int = 1
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


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly over `length`."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def single(sample: Any) -> dict[str, Any]:
    """MONAI's random crops return a list of samples, of one here."""
    return sample[0] if isinstance(sample, list) else sample


class Tiles(Dataset):
    """Whole cached volumes as tiles of `window` (x, y, z) voxels that do not overlap.

    Every voxel is in one tile, so that validation counts it once; the last tiles are filled up with
    air. Items as those of `Subvolumes`.
    """

    def __init__(self, cached: Dataset, window: Sequence[int]):
        self.cached, self.window = cached, tuple(window)
        self.places = [
            (index, corner)
            for index, item in enumerate(cached)
            for corner in itertools.product(
                *(range(0, n, step) for n, step in zip(item[IMAGE].shape[1:], window, strict=True))
            )
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.cut(*self.places[index])

    def cut(self, place: int, corner: Sequence[int]) -> dict[str, Any]:
        """The tile of case number `place` that begins at voxel `corner`."""
        item = {key: value for key, value in self.cached[place].items() if key != INDICES}
        item["first_slice"] = corner[2]  # of the resampled volume
        box = tuple(slice(a, a + n) for a, n in zip(corner, self.window, strict=True))
        for key in (IMAGE, LABEL):
            tile = item[key][(slice(None), *box)]
            fill = [(0, n - m) for m, n in zip(tile.shape[1:], self.window, strict=True)]
            item[key] = torch.nn.functional.pad(tile, [*fill[2], *fill[1], *fill[0]])
        return {**item, IMAGE: item[IMAGE].float()}

    def examples(self, count: int) -> list[dict[str, Any]]:
        """Of some cases the tile around their last class, the tumour where there is one."""
        found = []
        for place in spread(len(self.cached), count):
            label = self.cached[place][LABEL][0]
            middle = torch.nonzero(label == max(int(label.max()), 1)).float().mean(dim=0)
            middle = middle.nan_to_num().int().tolist()
            corner = [
                max(0, min(at - width // 2, size - width))
                for at, width, size in zip(middle, self.window, label.shape, strict=True)
            ]
            found.append(self.cut(place, corner))
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
        self, dataset: Subvolumes, batch_size: int, shuffle: bool, seed: int, pin: bool = False
    ):
        order = EpochOrder(len(dataset), batch_size, shuffle, seed)
        super().__init__(dataset, batch_size=batch_size, sampler=order, pin_memory=pin)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of an epoch, and the batch to begin with."""
        self.sampler.epoch, self.sampler.first_batch = epoch, first_batch
        self.dataset.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(max_workers=1) as thread:
            batches = super().__iter__()
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch


def read_prepared(folder: Path) -> dict[str, Any]:
    """`dataset.json` of a folder that prepare.py has completed."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"{path}: not found; it is written last by prepare.py, so {folder} is not (completely) "
            "prepared; run `python prepare.py SOURCE` with this folder as --destination"
        )
    prepared = json.loads(path.read_text())
    if prepared.get("schema") != 1:
        raise InputError(
            f"{path}: schema must be 1, got {prepared.get('schema')}; prepare it again"
        )
    return prepared


def subvolume_items(prepared: dict[str, Any], folder: Path, split: str) -> list[dict[str, Any]]:
    """What the chain loads: files, names, and what identifies the content of each sub-volume."""
    source = {record["case"]: record for record in prepared["cases"]}
    records = [record for record in prepared["subvolumes"] if record["split"] == split]
    if not records:
        raise InputError(
            f"{folder / 'dataset.json'}: no sub-volume in the {split} split; prepare more patients "
            "(three at least)"
        )
    return [
        {
            IMAGE: str(folder / record[IMAGE]),
            LABEL: str(folder / record[LABEL]),
            "case": record["case"],
            "first_slice": record["first_slice"],
            "index": index,
            "shape": record["shape"],
            "spacing_mm": record["spacing_mm"],
            "fingerprint": str(source[record["case"]].get("fingerprint")),
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
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    sampling: str,
    spacing: Sequence[float],
    input_size: Sequence[int],
    **_: Any,
) -> tuple[float, ...]:
    """About the size that a volume of RAS `shape` has after the deterministic chain."""
    if sampling == "subvolumes":
        return (*input_size, shape[2])
    return tuple(n * mm / step for n, mm, step in zip(shape, spacing_mm, spacing, strict=True))


def balanced_indices(classes: int) -> ClassesToIndicesd:
    """Remember where voxels of each class lie; 20,000 of each tell as much as all of them."""
    postfix = INDICES.removeprefix(LABEL)
    return ClassesToIndicesd(LABEL, postfix, num_classes=classes, max_samples_per_class=20_000)


def cache_place(needed: int, device: torch.device) -> tuple[torch.device, float]:
    """Where a cache of `needed` bytes fits, and the part of it that is kept.

    On the device if it takes no more than 60 % of the free memory (the network needs the rest),
    else in the host's memory, else as much of it as fits there.
    """
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
    *,
    device: torch.device,
    disk_cache: bool = False,
    rank: int = 0,
    processes: int = 1,
    **settings: Any,
) -> CacheDataset:
    """Run the deterministic chain over the sub-volumes of a split, once, and keep the results.

    Args:
        prepared, folder: content of dataset.json, and where it lies.
        split: "training", "validation" or "test".
        device: where the chain runs and, memory permitting, the cache stays.
        disk_cache: also keep the results in `folder/cache`, so that the next run starts in seconds.
        rank, processes: under torchrun each process caches its own share.
        settings: the other arguments of `in_plane_chain`.
    """
    items = subvolume_items(prepared, folder, split)
    items = share_of_process(items, rank, processes, even=split == "training")
    patches = settings["sampling"] == "patches"
    needed = sum(
        math.ceil(math.prod(network_shape(item["shape"], item["spacing_mm"], **settings)))
        * 3  # image float16, label uint8
        for item in items
    )
    place, rate = cache_place(needed, torch.device(device))
    what = "whole cases" if patches else "sub-volumes"
    mean = human_bytes(needed / len(items))
    print(f"cache: {len(items)} {split} {what} × {mean} = {human_bytes(needed)} on {place}")
    chain = deterministic_chain(device=place, **settings)
    if patches:
        chain = Compose([*chain.transforms, balanced_indices(len(settings["labels"]))])
    options = {"num_workers": min(os.cpu_count() or 1, 8), "copy_cache": False, "cache_rate": rate}
    if not disk_cache:
        return CacheDataset(items, chain, **options)

    def key(item: dict[str, Any]) -> bytes:
        content = json.dumps([item, settings], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest().encode()

    stored = PersistentDataset(items, chain, cache_dir=folder / "cache", hash_func=key)
    return CacheDataset(
        stored, EnsureTyped([IMAGE, LABEL], device=place, track_meta=False), **options
    )


# ---------------------------------------------------------------------------------------
# Run as a script: show what the network will see
# ---------------------------------------------------------------------------------------


def montage(before: Subvolumes, after: Subvolumes, titles: Sequence[str]) -> Any:
    """Figure: a slice of some sub-volumes before and after augmentation, and histograms."""
    from matplotlib.figure import Figure

    chosen = np.linspace(0, len(before) - 1, min(4, len(before))).astype(int)
    figure = Figure(figsize=(11, 3.6 * len(chosen)), layout="constrained")
    for row, index in zip(figure.subplots(len(chosen), 3, squeeze=False), chosen, strict=True):
        for axes, dataset, name in zip(
            row, (before, after), ("as cached", "augmented"), strict=False
        ):
            item = dataset[int(index)]
            image, label = (
                item[IMAGE][0].cpu().numpy(),
                item[LABEL][0].cpu().numpy().astype(np.uint8),
            )
            middle = int((label > 0).sum(axis=(0, 1)).argmax())
            draw_plane(
                axes, image, "axial", middle, (1.0, 1.0, 1.0), {TRUTH_COLOUR: label}, window=(0, 1)
            )
            axes.set_title(f"{titles[index]}, {name}", fontsize=10)
            for values, what in ((image.ravel(), "all"), (image[label > 0], "organ")):
                style = "-" if dataset is before else "--"
                colour = "0.4" if what == "all" else LABEL_COLOURS[1]
                row[2].hist(values, 60, (0, 1), histtype="step", color=colour, linestyle=style,
                            label=f"{what}, {name}")  # fmt: skip
        row[2].set(xlabel="network input (0..1 over the HU window)", ylabel="voxels", yscale="log")
        row[2].legend(fontsize=8)
    return figure


def main(config: Config) -> None:
    device = pick_device(config.device)
    prepared = read_prepared(config.data)
    settings = config.preprocessing()
    for split in ("training", "validation"):
        cached = cache_split(prepared, config.data, split, device=device, **settings)
        print(f"{split}: {len(cached)} sub-volumes of {tuple(cached[0][IMAGE].shape)}")
        if split == "training":
            always = {**config.augmentation(), "probability": 1.0}  # training leaves some alone
            augmented = Subvolumes(cached, augmentation(**always, device=device), config.seed)
            titles = [f"{item['case']} from slice {item['first_slice']}" for item in cached]
            figure = montage(Subvolumes(cached), augmented, titles)
            save_figure(figure, config.data / "preprocess.png")
    print(f"look at {config.data / 'preprocess.png'}: does the outline lie on the organ?")


if __name__ == "__main__":
    import train  # only to show what its settings do: as a module, preprocess never needs it

    command_line(main, train.Config, __doc__, train.RECIPES)
