"""Transform a scan in HU into the network's input, and the network's output back; augment, cache.

    python preprocess.py            # takes train.py's options and shows what they do
    python train.py --show          # the same

One deterministic chain serves training and inference. It resamples each axial slice in its own
plane and leaves the slice axis alone: 16 slices in, 16 out. So a window of the preprocessed volume
equals the preprocessed window, voxel for voxel, and the way back to the scan's grid is an
interpolation inside each slice. Patches are cut from whole volumes at one spacing in all three
axes; for them the slice axis is resampled in a second step.

As a script it draws `preprocess.png` beside the prepared data: sub-volumes before and after
augmentation with the label's outline, and histograms.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":  # train.py has the options and their values
    sys.argv.append("--show")
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
    sys.exit()

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai import transforms
from monai.data import MetaTensor
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset, default_collate

from data.files import InputError
from data.labels import IGNORED, IMAGE, LABEL, Labels, index_classes
from data.pictures import draw_inputs, save_figure, spread
from data.settings import human_bytes, show_progress
from data.volumes import SLAB, Box, Volume, find_body, find_bounding_box, list_slabs, read_file
from utilities import rank_and_size

KEYS = (IMAGE, LABEL)
PATCH_MARGIN = 1.3  # patches are cut so much wider in plane: rotated, they then have no corners
INDICES = f"{LABEL}_indices"  # where the voxels of each class lie, for balanced patches
# -- Settings: train.py has their values and meaning, the checkpoint carries them ------------------


@dataclass(frozen=True)
class Chain:
    """Settings of the deterministic chain; `preprocessing` of a checkpoint is `asdict` of one."""

    sampling: str
    spacing: tuple[float, ...]  # mm along x, y (and z, of patches)
    hu_window: tuple[float, float] | None
    input_size: tuple[int, ...]  # voxels along x, y (and z, of patches)
    labels: Labels  # class name → raw label values, background first; the order is the class index
    ignore: tuple[int, ...]  # raw values of unannotated voxels
    crop_to_body: bool  # remove the air beside the body from each slice of a CT


@dataclass(frozen=True)
class Augment:
    """Settings of the random augmentation."""

    sampling: str
    input_size: tuple[int, ...]
    classes: int  # background counted
    foreground_sampling: float
    augment_probability: float
    rotation_degrees: float
    translation: float
    scaling: float
    noise_sd: float
    intensity_scaling: float
    intensity_shift: float
    flip_probability: float  # left-right, rare in people (situs inversus: 1 in 10,000)


# -- The deterministic chain -----------------------------------------------------------------------


def preprocess_files(item: dict, chain: Chain, device: torch.device | str) -> dict[str, Any]:
    """Return an item with its files "image" and "label" read and preprocessed on the device.

    The image is (1, X, Y, Z) float16 in 0..1, the label uint8 class indices; of patches also where
    the voxels of each class lie. Half precision halves the cache; its error is at most 1/2048 of
    the HU window, far below the noise of CT.
    """
    made = dict(item)
    for key, kind in zip(KEYS, (torch.float16, torch.uint8), strict=True):
        volume = read_file(Path(item[key])).ras
        in_plane = preprocess_slices(volume.data, volume.spacing_mm, chain, device, key)
        slices = resample_depth(in_plane.as_tensor(), volume.spacing_mm[2], chain, key)
        made[key] = slices.permute(1, 2, 0)[None].contiguous().to(kind)
    if chain.sampling == "patches":  # 20,000 voxels of a class are as good as all of them
        find_indices = transforms.ClassesToIndices(len(chain.labels), max_samples_per_class=20_000)
        made[INDICES] = find_indices(made[LABEL])
    return made


def preprocess_slices(
    array: np.ndarray, spacing_mm: Sequence[float], chain: Chain, device: Any, key: str = IMAGE
) -> MetaTensor:
    """Return slices (Z, X', Y') float32 of a RAS array (X, Y, Z), resampled each in its own plane.

    HU of an image become 0..1; raw values of a label (`key` is LABEL) become class indices. The
    result lies on the device; its affine (3×3) maps a pixel to mm in plane.
    """
    if key == LABEL:
        array = index_classes(array, chain.labels, chain.ignore)
    # slices are channels: MONAI's 2D transforms then resample all of them alike, each in plane
    turned = torch.as_tensor(np.array(array, order="F")).permute(2, 0, 1).contiguous()
    affine = torch.diag(torch.tensor([*spacing_mm[:2], 1.0], dtype=torch.float64))
    slices: Any = MetaTensor(turned.to(device, torch.float32), affine=affine)
    mode = "nearest" if key == LABEL else "bilinear"
    how: dict[str, Any] = {"padding_mode": "border", "dtype": torch.float32}  # float64 is slower
    slices = transforms.Spacing(chain.spacing[:2], mode=mode, **how)(slices)
    if key == IMAGE and chain.hu_window:
        low, high = chain.hu_window
        slices = ((slices - low) / (high - low)).clamp(0, 1)
    elif key == IMAGE:
        slices = slices.clamp(min=0)
        slices = slices / slices.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    if chain.sampling == "subvolumes":
        # "nearest" rounds towards the corner and would shift labels by half a pixel (Dice of the
        # round trip 0.98); "nearest-exact" keeps pixel centres (0.99).
        exact = mode.replace("nearest", "nearest-exact")
        slices = transforms.Resize(chain.input_size, mode=exact)(slices)
    return slices


def resample_depth(
    slices: torch.Tensor, slice_mm: float, chain: Chain, key: str = IMAGE
) -> torch.Tensor:
    """Return slices (Z, X, Y) of patches at `chain.spacing` along z; those of sub-volumes as given.

    The first slice keeps its place. Between slices, images are interpolated linearly. A label is
    that of the nearest slice, or of the nearest annotated one within half a step.
    """
    if chain.sampling == "subvolumes":
        return slices
    size, spacing = len(slices), chain.spacing[2]
    position = np.arange(round((size - 1) * slice_mm / spacing) + 1) * (spacing / slice_mm)
    if key == IMAGE:
        return torch.einsum("wz,zxy->wxy", interpolation_matrix(position, size).to(slices), slices)
    distance = np.abs(position[:, None] - np.arange(size))
    unknown = (slices == IGNORED).flatten(1).all(dim=1).cpu().numpy()
    half = spacing / slice_mm / 2 + 1e-6
    return slices[(distance + half * unknown).argmin(axis=1)]


# -- Inference: a whole volume in, the network's scores back on the volume's grid ------------------


def preprocess_volume(
    volume: Volume, chain: Chain, device: torch.device | str
) -> tuple[torch.Tensor, np.ndarray]:
    """Return a whole volume in HU, of any orientation, on the network's grid.

    Returns:
        Tensor (1, X, Y, Z) in 0..1, slices from inferior to superior, and the 4×4 map from
        RAS-ordered source voxel (i, j, k, 1) to network voxel, which has no rotation.
    """
    ras, place = volume.ras, resampling_device(torch.device(device))
    box = find_body(volume) if chain.crop_to_body else (slice(0, None), slice(0, None))
    for first in range(0, ras.shape[2], SLAB):
        slab = ras.data[(*box, slice(first, first + SLAB))]
        part = preprocess_slices(slab, ras.spacing_mm, chain, place)
        if not first:  # all at once, so that no second copy is needed
            slices = torch.empty((ras.shape[2], *part.shape[1:]), device=place)
        slices[first : first + SLAB] = part.as_tensor()
    x, y, z = ras.spacing_mm
    slices = resample_depth(slices, z, chain)
    step = chain.spacing[2] if chain.sampling == "patches" else z
    to_network = np.diag([1.0, 1.0, z / step, 1.0])
    from_mm = np.linalg.inv(part.affine.cpu().numpy())
    to_network[np.ix_([0, 1, 3], [0, 1, 3])] = from_mm @ np.diag([x, y, 1.0])
    to_network[:2, 3] -= np.diag(to_network)[:2] * [edge.start for edge in box]
    return slices.permute(1, 2, 0)[None].to(device), to_network


def resampling_device(device: torch.device) -> torch.device:
    """Return the device that resamples: the CPU in place of Apple's GPUs, which lack float64."""
    return torch.device("cpu") if device.type == "mps" else device


def interpolation_matrix(position: np.ndarray, size: int) -> torch.Tensor:
    """Return weights (len(position), size) of linear interpolation; samples at the edges go on."""
    distance = np.abs(np.clip(position, 0, size - 1)[:, None] - np.arange(size))
    return torch.from_numpy(np.maximum(1 - distance, 0).astype(np.float32))


def to_source_grid(scores: torch.Tensor, to_network: np.ndarray, box: Box) -> torch.Tensor:
    """Return scores (C, X, Y, Z) on the network's grid, interpolated at a box of the source's RAS
    grid: (C, *box). Linear interpolation is separable: two small matrix products per slice."""
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
    """Return the box of the source's grid (`shape`) that is less than a network voxel from a box
    of the network's grid; an empty one if nothing is."""
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
    """Return class indices (X, Y, Z) uint8 on the scan's RAS grid, of scores on the network's."""
    classes = np.zeros(ras_shape, np.uint8, order="F")
    positive = find_bounding_box((scores > 0).any(dim=0).numpy())  # between others none is either
    x, y, z = find_source_box(positive, source_to_network, ras_shape)
    for first in range(z.start, z.stop, SLAB):
        slab = slice(first, min(first + SLAB, z.stop))
        fine = to_source_grid(scores, source_to_network, (x, y, slab))
        best, index = fine.max(dim=0) if len(fine) > 1 else (fine[0], 0)  # 100 times faster
        classes[x, y, slab] = ((best > 0).to(torch.uint8) * (index + 1)).to(torch.uint8).numpy()
    return classes


def probability_on_grid(
    scores: torch.Tensor, source_to_network: np.ndarray, ras_shape: Sequence[int]
) -> np.ndarray:
    """Return the probability of foreground, uint8 in steps of 1/255, RAS (X, Y, Z)."""
    probability = np.zeros(ras_shape, np.uint8, order="F")
    seen = tuple(slice(0, size) for size in scores.shape[1:])
    x, y, _ = find_source_box(seen, source_to_network, ras_shape)
    for first, last in list_slabs(ras_shape[2], SLAB):
        fine = to_source_grid(scores, source_to_network, (x, y, slice(first, last)))
        # softmax: 1 − p(background) = sigmoid(log Σ exp(logit − background's logit))
        some = torch.logsumexp(fine, dim=0).sigmoid()
        probability[x, y, first:last] = (some * 255).round().to(torch.uint8).numpy()
    return probability


# -- Random augmentation, of training alone --------------------------------------------------------


def augmentation(augment: Augment, device: torch.device | str) -> transforms.Compose:
    """Return random steps: a patch, one in-plane resampling (rotate, shift, scale), intensities.

    `device` is where the batches go; the resampling runs there, if it can.
    """
    often, in_plane, scaling = augment.augment_probability, augment.input_size[:2], augment.scaling
    affine = transforms.RandAffined(
        KEYS,
        spatial_size=in_plane,
        prob=often,
        rotate_range=(np.deg2rad(augment.rotation_degrees),),
        translate_range=[augment.translation * size for size in in_plane],
        scale_range=(scaling, scaling),
        mode=("bilinear", "nearest"),
        padding_mode="zeros",  # 0 is air in the image and background in the label
        device=resampling_device(torch.device(device)),
    )
    return transforms.Compose(
        [
            *(crop_patches(augment) if augment.sampling == "patches" else []),
            put_slices_first,
            affine,
            transforms.RandFlipd(KEYS, prob=augment.flip_probability, spatial_axis=0),
            transforms.RandGaussianNoised(IMAGE, prob=often, std=augment.noise_sd),
            transforms.RandScaleIntensityd(IMAGE, factors=augment.intensity_scaling, prob=often),
            transforms.RandShiftIntensityd(IMAGE, offsets=augment.intensity_shift, prob=often),
            put_slices_last,
        ]
    )


def crop_patches(augment: Augment) -> list[Any]:
    """Return steps from a cached volume to one random patch of it, wider in plane by PATCH_MARGIN.

    A fraction `foreground_sampling` is centred on a voxel of a foreground class, all classes alike,
    however few voxels they have; the others lie anywhere.
    """
    x, y, z = augment.input_size
    size = (math.ceil(PATCH_MARGIN * x), math.ceil(PATCH_MARGIN * y), z)
    centred, foreground = augment.foreground_sampling, augment.classes - 1
    crop = transforms.RandCropByLabelClassesd(
        KEYS,
        label_key=LABEL,
        spatial_size=size,
        ratios=[1 - centred, *[centred / max(foreground, 1)] * foreground],
        num_classes=augment.classes,
        indices_key=INDICES,
        allow_smaller=True,
        warn=False,  # a case may lack a class
    )
    return [crop, transforms.SpatialPadd(KEYS, spatial_size=size)]  # 0 is air and background


def put_slices_first(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item whose volumes (1, X, Y, Z) are slices (Z, X, Y) float32, for 2D transforms."""
    volumes = {key: convert_to_tensor(item[key][0], torch.float32) for key in KEYS}
    return item | {key: volumes[key].permute(2, 0, 1).contiguous() for key in KEYS}


def put_slices_last(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item whose slices (Z, X, Y) are volumes (1, X, Y, Z)."""
    slices = {key: convert_to_tensor(item[key]) for key in KEYS}  # plain, without meta data
    return item | {key: slices[key].permute(1, 2, 0)[None].contiguous() for key in KEYS}


# -- Cached data sets ------------------------------------------------------------------------------


class Subvolumes(Dataset):
    """Cached sub-volumes, augmented when they are taken; or random patches of cached volumes.

    The random numbers of a sample depend on (seed, epoch, sample) alone: not on the order, the
    number of processes, or where a run was interrupted. Items: image (1, X, Y, Z) float32 in 0..1,
    label (1, X, Y, Z) class indices, and the names of case and sub-volume. In an epoch each cached
    item is used `repeats` times.
    """

    def __init__(self, cached: list, augment: Any = None, seed: int = 0, repeats: int = 1):
        self.cached, self.augment, self.seed, self.repeats = cached, augment, seed, repeats
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.cached) * self.repeats

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, place = divmod(index, len(self.cached))
        item = self.cached[place]
        item = item() if callable(item) else item  # what did not fit into memory is made anew
        if self.augment is None:
            return item | {IMAGE: item[IMAGE].float()}
        entropy = [self.seed, self.epoch, item["index"], turn]
        self.augment.set_random_state(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        made = self.augment(item)
        return made[0] if isinstance(made, list) else made  # MONAI's crops return a list

    def examples(self, count: int, window: Sequence[int]) -> list[dict[str, Any]]:
        """Return some samples for a preview, the same every time.

        Of larger volumes it is the window (x, y, z) around their last class: the tumour, if any.
        """
        found = []
        for item in (self[index] for index in spread(len(self), count)):
            label = item[LABEL][0].masked_fill(item[LABEL][0] == IGNORED, 0)
            centre = torch.nonzero(label == max(int(label.max()), 1)).float().mean(dim=0)
            at = centre.nan_to_num().int().tolist()
            sizes = zip(at, window, label.shape, strict=True)
            starts = [max(0, min(a - width // 2, size - width)) for a, width, size in sizes]
            box = [slice(start, start + width) for start, width in zip(starts, window, strict=True)]
            cut = {key: item[key][(slice(None), *box)] for key in KEYS}
            found.append(item | cut | {"first_slice": item["first_slice"] + starts[2]})
        return found


class SubvolumeLoader:
    """Batches of a data set; a thread prepares the next one while the network works.

    A thread and not processes, because those cannot share a cache on the GPU. Not MONAI's
    ThreadDataLoader, because it ends an epoch early, without a word, when a sample fails.
    `pin` puts batches in the host's memory where the GPU fetches them fastest.
    """

    def __init__(self, dataset: Any, batch_size: int, shuffle: bool, seed: int, pin: bool = False):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.seed, self.pin, self.epoch, self.first_batch = seed, pin, 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of an epoch, and the batch to begin with."""
        self.epoch = self.dataset.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        return max(math.ceil(len(self.dataset) / self.batch_size) - self.first_batch, 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        coming: list[Future[dict[str, Any]]] = []
        with ThreadPoolExecutor(max_workers=1) as thread:
            for first in range(self.first_batch * self.batch_size, len(order), self.batch_size):
                indices = order[first : first + self.batch_size].tolist()
                coming.append(thread.submit(self.make_batch, indices))
                if len(coming) > 1:
                    yield coming.pop(0).result()
            for batch in coming:
                yield batch.result()

    def make_batch(self, indices: list[int]) -> dict[str, Any]:
        """Return some samples as one, their tensors stacked."""
        samples = [self.dataset[index] for index in indices]
        kept = [{key: sample[key] for key in ("case", *KEYS)} for sample in samples]
        batch = default_collate(kept)
        pinned = [key for key in KEYS if self.pin and not batch[key].is_cuda]
        return batch | {key: batch[key].pin_memory() for key in pinned}


def cache_split(prepared: dict, folder: Path, split: str, chain: Chain, device: Any) -> list:
    """Run the deterministic chain over the sub-volumes of a split, once; return the results.

    `prepared` is the content of `folder`/dataset.json. The chain runs on the device, and the
    results stay there if they fit. Each process of torchrun caches its own share.
    """
    items = subvolume_items(prepared, folder, split)
    items = share_of_process(items, *rank_and_size(), even=split == "training")
    if chain.sampling == "subvolumes":
        voxels = [math.prod(chain.input_size) * item["shape"][2] for item in items]
    else:
        sizes = [math.prod(item["shape"]) * math.prod(item["spacing_mm"]) for item in items]
        voxels = [math.ceil(size / math.prod(chain.spacing)) for size in sizes]
    needed = 3 * sum(voxels)  # bytes: image float16, label uint8
    place, rate = cache_place(needed, torch.device(device))
    each = human_bytes(needed / max(len(items), 1))
    print(f"cache: {len(items)} {split} volumes × {each} = {human_bytes(needed)} on {place}")
    prepare = functools.partial(preprocess_files, chain=chain, device=place)
    return cache_items(items, prepare, rate, f"{split}, reading")


def cache_items(
    items: Sequence[Any], prepare: Callable[[Any], Any], rate: float = 1.0, title: str = ""
) -> list[Any]:
    """Return `prepare(item)` of each item, of all but the fraction `rate` still to be called."""
    count = round(rate * len(items))
    # An interrupt drops the items that have not begun, and waits for the others.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        made = pool.map(prepare, items[:count])
        kept = list(show_progress(made, total=count, desc=title, unit="file"))
    return [*kept, *(functools.partial(prepare, item) for item in items[count:])]


def subvolume_items(prepared: dict[str, Any], folder: Path, split: str) -> list[dict[str, Any]]:
    """Return files, case, first slice, shape and spacing (mm) of each sub-volume of a split."""
    records = [record for record in prepared["subvolumes"] if record["split"] == split]
    if not records:
        raise InputError(
            f"{folder / 'dataset.json'}: no sub-volume in the {split} split; prepare more patients "
            "(three at least)"
        )
    kept = ("case", "first_slice", "shape", "spacing_mm")
    items = [{key: record[key] for key in kept} for record in records]
    for index, (item, record) in enumerate(zip(items, records, strict=True)):
        item |= {"index": index} | {key: str(folder / record[key]) for key in KEYS}
    return items


def share_of_process(items: list[Any], rank: int, processes: int, even: bool) -> list[Any]:
    """Return this process's part; `even` repeats a few, so that all have as many (training)."""
    count = -(-len(items) // processes) * processes if even else len(items)
    return [items[place % len(items)] for place in range(rank, count, processes)]


def cache_place(needed: int, device: torch.device) -> tuple[torch.device, float]:
    """Return where a cache of `needed` bytes fits, and the fraction of it that is kept.

    On the device if it takes no more than 60 % of the free memory (the network needs the rest),
    else in the host's memory, else as much of it as fits there.
    """
    device = resampling_device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed <= 0.6 * free:
            return device, 1.0
        what = f"cache: {human_bytes(needed)} do not fit beside the network on {device}"
        print(f"{what} ({human_bytes(free)} free); it stays in the host's memory")
    free = read_free_memory()
    rate = min(0.6 * free / max(needed, 1), 1.0)
    if rate < 1:
        print(
            f"cache: {human_bytes(needed)} do not fit in memory ({human_bytes(free)} free); "
            f"{rate:.0%} is cached, the rest is read anew each epoch (slower)"
        )
    return torch.device("cpu"), rate


def read_free_memory() -> int:
    """Return the bytes of memory that programs may still take; all where no file says so."""
    try:
        known = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:  # macOS, Windows
        return sys.maxsize
    return 1024 * int(re.findall(r"MemAvailable:\s*(\d+)", known)[0])


# -- Run as a script: show what the network will see -----------------------------------------------


def show_inputs(
    folder: Path, prepared: dict[str, Any], chain: Chain, augment: Augment, device: torch.device
) -> Path:
    """Draw what the network will see of a prepared folder; return the picture's path."""
    picture = folder / "preprocess.png"
    splits = {record["split"] for record in prepared["subvolumes"]}
    for split in sorted(splits & {"training", "validation"}):
        cached = cache_split(prepared, folder, split, chain, device)
        plain = Subvolumes(cached)
        print(f"{split}: {len(cached)} sub-volumes of {tuple(plain[0][IMAGE].shape)}")
        if split == "training":
            augmented, names = Subvolumes(cached, augmentation(augment, device)), list(chain.labels)
            save_figure(draw_inputs(plain, augmented, names[1:]), picture)
    return picture
