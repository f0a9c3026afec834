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

import copy
import functools
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from monai import transforms
from monai.data import MetaTensor
from torch.nn import functional
from torch.utils.data import Dataset

from data.files import InputError, explain
from data.labels import IGNORED, IMAGE, LABEL, Labels, index_classes
from data.pictures import draw_inputs, save_figure, spread
from data.settings import human_bytes, show_progress
from data.volumes import SLAB, Box, Volume, find_body, find_bounding_box, read_file
from utilities import UNet3D, choose_layout, on_device, pick_precision, rank_and_size

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
    """Return an item with its files "image" and "label" read and preprocessed on the device. The
    image is (1, X, Y, Z) float16 in 0..1 (its error, 1/2048 of the HU window, is far below the
    noise of CT), the label uint8 class indices; of patches also where those of each class lie."""
    made = dict(item)
    for key, kind in zip(KEYS, (torch.float16, torch.uint8), strict=True):
        volume = read_file(Path(item[key])).ras
        in_plane = preprocess_slices(volume.data, volume.spacing_mm, chain, device, key)
        slices = in_plane.as_tensor()
        if chain.sampling == "patches":
            slices = resample_depth(slices, volume.spacing_mm[2], chain, key)
        made[key] = slices.permute(1, 2, 0)[None].contiguous().to(kind)
    if chain.sampling == "patches":  # 20,000 voxels of a class are as good as all of them
        find_indices = transforms.ClassesToIndices(len(chain.labels), max_samples_per_class=20_000)
        voxels = find_indices(made[LABEL])  # they choose patches, on the host
        made[INDICES] = [torch.as_tensor(places).cpu().numpy() for places in voxels]
    return made


def preprocess_slices(
    array: np.ndarray, spacing_mm: Sequence[float], chain: Chain, device: Any, key: str = IMAGE
) -> MetaTensor:
    """Return slices (Z, X', Y') float32 of a RAS array (X, Y, Z), resampled each in its own plane.
    HU of an image become 0..1; raw values of a label (`key` is LABEL) become class indices. The
    result lies on the device; its affine (3×3) maps a pixel to mm in plane."""
    if key == LABEL:
        array = index_classes(array, chain.labels, chain.ignore)
    # slices are channels: MONAI's 2D transforms then resample all of them alike, each in plane
    turned = torch.as_tensor(np.array(array, order="F")).permute(2, 0, 1).contiguous()
    affine = torch.diag(torch.tensor([*spacing_mm[:2], 1.0], dtype=torch.float64))
    slices: Any = MetaTensor(turned.to(device, torch.float32), affine=affine)
    mode = "nearest" if key == LABEL else "bilinear"
    if key == IMAGE:
        slices = average_pixels(slices, np.divide(chain.spacing[:2], spacing_mm[:2]))
    how: dict[str, Any] = {"padding_mode": "border", "dtype": torch.float32}  # float64 is slower
    slices = transforms.Spacing(chain.spacing[:2], mode=mode, **how)(slices)
    if key == IMAGE and chain.hu_window:
        low, high = chain.hu_window
        slices = ((slices - low) / (high - low)).clamp(0, 1)
    elif key == IMAGE:
        slices = slices.clamp(min=0) / slices.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    if chain.sampling == "subvolumes":  # "nearest" would shift labels by half a pixel
        exact = mode.replace("nearest", "nearest-exact")
        slices = transforms.Resize(chain.input_size, mode=exact)(slices)
    return slices


def average_pixels(slices: torch.Tensor, steps: Iterable[float]) -> torch.Tensor:
    """Return slices (Z, X, Y) of means, for a grid `steps` times as coarse along X and Y. Linear
    interpolation takes 2 of `step` pixels; a mean over step − 1 lets it take all: less noise."""
    for axis, step in enumerate(steps, start=1):
        if (left_out := step / 2 - 1) > 0:  # on either side
            half = math.ceil(left_out)
            weights = np.minimum(left_out + 1 - np.abs(np.arange(-half, half + 1)), 1)
            edges = [half * (axis == 2)] * 2 + [half * (axis == 1)] * 2
            size, means = slices.shape[axis], torch.zeros_like(slices)
            for some, mean in zip(slices.split(4), means.split(4), strict=True):  # fit in a cache
                wide = functional.pad(some, edges, mode="replicate")
                for first, weight in enumerate(weights / weights.sum()):
                    mean.add_(wide.narrow(axis, first, size), alpha=weight)
            slices = means
    return slices


def resample_depth(
    slices: torch.Tensor, slice_mm: float, chain: Chain, key: str = IMAGE
) -> torch.Tensor:
    """Return slices (Z, X, Y) of patches at `chain.spacing` along z, the first in its place: images
    linearly, or as means of thinner slices; labels of the nearest slice, or the nearest annotated
    one within half a step."""
    size, spacing = len(slices), chain.spacing[2]
    position = np.arange(round((size - 1) * slice_mm / spacing) + 1) * (spacing / slice_mm)
    if key == IMAGE:
        weights = interpolation_matrix(position, size, max(spacing / slice_mm, 1))
        return torch.einsum("wz,zxy->wxy", weights.to(slices), slices)
    distance = np.abs(position[:, None] - np.arange(size))
    unknown = (slices == IGNORED).flatten(1).all(dim=1).cpu().numpy()
    half = spacing / slice_mm / 2 + 1e-6
    return slices[(distance + half * unknown).argmin(axis=1)]


# -- Inference: a whole volume in, the network's scores back on the volume's grid ------------------


def preprocess_volume(
    volume: Volume, chain: Chain, device: torch.device | str
) -> tuple[torch.Tensor, np.ndarray]:
    """Return a volume in HU, of any orientation, on the network's grid: (1, X, Y, Z) RAS in 0..1;
    and the 4×4 map, without rotation, from RAS voxel to network voxel."""
    ras, place = volume.ras, resampling_device(torch.device(device))
    box = find_body(volume) if chain.crop_to_body else (slice(0, None), slice(0, None))
    for first in range(0, ras.shape[2], SLAB):
        slab = ras.data[(*box, slice(first, first + SLAB))]
        part = preprocess_slices(slab, ras.spacing_mm, chain, place)
        if not first:  # all at once, so that no second copy is needed
            slices = torch.empty((ras.shape[2], *part.shape[1:]), device=place)
        slices[first : first + SLAB] = part.as_tensor()
    (x, y, z), to_network = ras.spacing_mm, np.eye(4)
    if chain.sampling == "patches":
        slices, to_network[2, 2] = resample_depth(slices, z, chain), z / chain.spacing[2]
    from_mm = np.linalg.inv(part.affine.cpu().numpy())
    to_network[np.ix_([0, 1, 3], [0, 1, 3])] = from_mm @ np.diag([x, y, 1.0])
    to_network[:2, 3] -= np.diag(to_network)[:2] * [edge.start for edge in box]
    return slices.permute(1, 2, 0)[None].to(device), to_network


def resampling_device(device: torch.device) -> torch.device:
    """Return the device that resamples: the CPU in place of Apple's GPUs, which lack float64."""
    return torch.device("cpu") if device.type == "mps" else device


def interpolation_matrix(position: np.ndarray, size: int, reach: float = 1) -> torch.Tensor:
    """Return weights (len(position), size) of linear interpolation, or of means of what is closer
    than `reach`; edges repeat beyond."""
    distance = np.abs(np.clip(position, 0, size - 1)[:, None] - np.arange(size))
    weights = np.maximum(reach - distance, 0)
    return torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


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
    """Return the box of the source's grid that is less than a voxel from one of the network's."""
    box = []
    for axis, (inside, size) in enumerate(zip(part, shape, strict=True)):
        position = to_network[axis, axis] * np.arange(size) + to_network[axis, 3]
        near = np.flatnonzero((position > inside.start - 1) & (position < inside.stop))
        box.append(slice(int(near[0]), int(near[-1]) + 1) if near.size else slice(0, 0))
    some = all(edge.stop > edge.start for edge in (*part, *box))
    return tuple(box) if some else (slice(0, 0),) * len(box)


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
    for first in range(0, ras_shape[2], SLAB):
        slab = slice(first, min(first + SLAB, ras_shape[2]))
        fine = to_source_grid(scores, source_to_network, (x, y, slab))
        # softmax: 1 − p(background) = sigmoid(log Σ exp(logit − background's logit))
        some = torch.logsumexp(fine, dim=0).sigmoid()
        probability[x, y, slab] = (some * 255).round().to(torch.uint8).numpy()
    return probability


# -- Random augmentation, of training alone --------------------------------------------------------


def draw_patch(item: dict[str, Any], augment: Augment, rng: np.random.Generator) -> dict[str, Any]:
    """Return an item with one random patch of its volume, wider in plane by PATCH_MARGIN. A
    fraction `foreground_sampling` is centred on a voxel of a foreground class, all classes alike;
    the others on a voxel of background. Beyond the volume lies 0: air and background."""
    x, y, z = augment.input_size
    size = (math.ceil(PATCH_MARGIN * x), math.ceil(PATCH_MARGIN * y), z)
    centred, foreground = augment.foreground_sampling, augment.classes - 1
    weights = np.array([1 - centred, *[centred / max(foreground, 1)] * foreground])
    # a case may lack a class; 1e-9: it may have no other
    weights = (weights + 1e-9) * [len(voxels) > 0 for voxels in item[INDICES]]
    chosen = rng.choice(len(weights), p=weights / weights.sum())
    shape = item[IMAGE].shape[1:]
    box = find_window(np.unravel_index(rng.choice(item[INDICES][chosen]), shape), size, shape)
    missing = [max(width - full, 0) for width, full in zip(size, shape, strict=True)]
    sides = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
    cut = {key: functional.pad(item[key][(slice(None), *box)], sides) for key in KEYS}
    return item | cut


def find_window(centre: Sequence[Any], size: Sequence[int], shape: Sequence[int]) -> Box:
    """Return the box of `size` voxels around a voxel, moved into a volume of a shape."""
    axes = list(zip(centre, size, shape, strict=True))
    starts = [max(0, min(int(c) - width // 2, full - width)) for c, width, full in axes]
    return tuple(slice(first, first + width) for first, width in zip(starts, size, strict=True))


def draw_affine(augment: Augment, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Return a random 2×3 map from the output's plane to that of slices of a shape (X, Y), as
    `torch.nn.functional.affine_grid` wants it: axes y, x, from -1 to 1 between the edges."""
    size = np.array(augment.input_size[:2])
    often = float(rng.random() < augment.augment_probability)
    turned, *change = often * rng.uniform(-1, 1, 5)
    angle = turned * np.deg2rad(augment.rotation_degrees)
    scale = 1 + augment.scaling * np.array(change[:2])
    scale[0] *= -1 if rng.random() < augment.flip_probability else 1
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = turn @ (augment.translation * size * change[2:])
    pixels = np.column_stack([turn * scale * size / 2, shift])
    return (pixels / np.reshape(shape, (2, 1)) * 2)[::-1, [1, 0, 2]]


def augment_batch(
    image: torch.Tensor, label: torch.Tensor, augment: Augment, rngs: Sequence[np.random.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images float32 and labels (B, 1, X', Y', Z) of (B, 1, X, Y, Z), changed at random.
    Each sample has a random generator of its own. One resampling in plane rotates, shifts, scales
    and mirrors; noise is drawn on the device, so that the host neither waits nor copies it."""
    affines = [draw_affine(augment, image.shape[2:4], rng) for rng in rngs]
    theta = move(torch.tensor(np.array(affines), dtype=torch.float32), image.device)
    grid = functional.affine_grid(theta, [len(rngs), 1, *augment.input_size[:2]], False)
    made = []
    for volume, mode in ((image, "bilinear"), (label, "nearest")):
        slices = volume[:, 0].permute(0, 3, 1, 2)  # as channels, all resampled alike
        slices = slices.to(torch.float32, memory_format=torch.contiguous_format)
        # outside is 0: air in the image and background in the label
        made.append(functional.grid_sample(slices, grid, mode, "zeros", align_corners=False))
    for slices, rng in zip(made[0], rngs, strict=True):
        noise, gain, shift = rng.random(3) < augment.augment_probability
        if noise:
            generator = torch.Generator(slices.device).manual_seed(int(rng.integers(2**62)))
            sd = augment.noise_sd * rng.random()
            slices += torch.empty_like(slices).normal_(0, sd, generator=generator)
        slices *= 1 + gain * augment.intensity_scaling * rng.uniform(-1, 1)
        slices += shift * augment.intensity_shift * rng.uniform(-1, 1)
    picture, drawing = (slices.permute(0, 2, 3, 1)[:, None].contiguous() for slices in made)
    return picture, drawing.to(label.dtype)


# -- Cached data sets ------------------------------------------------------------------------------


class Subvolumes(Dataset):
    """Cached sub-volumes, augmented when they are taken; or random patches of cached volumes. The
    random numbers of a sample depend on (seed, epoch, sample) alone: not on the order, the number
    of processes, or where a run was interrupted. Items: image (1, X, Y, Z) float32 in 0..1, label
    (1, X, Y, Z) class indices, and the names of case and sub-volume. In an epoch each cached item
    is used `repeats` times. Samples are augmented on `device`; None: where the items lie."""

    def __init__(
        self, cached: list, augment: Augment | None = None, seed: int = 0, repeats: int = 1,
        device: torch.device | str | None = None,
    ):  # fmt: skip
        self.cached, self.augment, self.seed, self.repeats = cached, augment, seed, repeats
        self.device = resampling_device(torch.device(device)) if device else None
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.cached) * self.repeats

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[0] for key, values in self.make_batch([index]).items()}

    def make_batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return some samples as one: image and label (B, 1, X, Y, Z), all else as lists."""
        turns, places = zip(*(divmod(index, len(self.cached)) for index in indices), strict=True)
        items = [self.cached[place] for place in places]
        items = [item() if callable(item) else item for item in items]  # what did not fit
        seeds = [[self.seed, self.epoch, i["index"], t] for i, t in zip(items, turns, strict=True)]
        rngs = [np.random.default_rng(seed) for seed in seeds]
        if self.augment and self.augment.sampling == "patches":
            pairs = zip(items, rngs, strict=True)
            items = [draw_patch(item, self.augment, rng) for item, rng in pairs]
        others = [key for key in items[0] if key not in (*KEYS, INDICES)]
        batch: dict[str, Any] = {key: [item[key] for item in items] for key in others}
        image, label = (move(torch.stack([i[key] for i in items]), self.device) for key in KEYS)
        image = image.float()
        if self.augment:
            image, label = augment_batch(image, label, self.augment, rngs)
        return batch | {IMAGE: image, LABEL: label}

    def examples(self, count: int, window: Sequence[int]) -> list[dict[str, Any]]:
        """Return some samples for a preview, the same every time. Of larger volumes it is the
        window (x, y, z) around their last class: the tumour, if any."""
        found = []
        for item in (self[index] for index in spread(len(self), count)):
            label = item[LABEL][0].masked_fill(item[LABEL][0] == IGNORED, 0)
            centre = torch.nonzero(label == max(int(label.max()), 1)).float().mean(dim=0)
            box = find_window(centre.nan_to_num().tolist(), window, label.shape)
            cut = {key: item[key][(slice(None), *box)] for key in KEYS}
            found.append(item | cut | {"first_slice": item["first_slice"] + box[2].start})
        return found


def move(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Return a tensor on a device (None: where it lies); by pinned memory, nobody waits for it."""
    if device is None or tensor.device.type == device.type:
        return tensor
    on_gpu = device.type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


class SubvolumeLoader:
    """Batches of a data set; a thread prepares the next one while the network works. A thread and
    not processes, because those cannot share a cache on the GPU. There it has a stream of its own:
    in the network's, its work would wait for the step. Not MONAI's ThreadDataLoader, because it
    ends an epoch early, without a word, when a sample fails."""

    def __init__(self, dataset: Subvolumes, batch_size: int, shuffle: bool, seed: int):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.seed, self.epoch, self.first_batch = seed, 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of an epoch, and the batch to begin with."""
        self.epoch = self.dataset.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        return max(math.ceil(len(self.dataset) / self.batch_size) - self.first_batch, 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order, device = np.arange(len(self.dataset)), self.dataset.device
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        on_gpu = device is not None and device.type == "cuda"
        stream = torch.cuda.Stream(device) if on_gpu else None
        coming: list[Future[tuple[dict[str, Any], Any]]] = []
        with ThreadPoolExecutor(max_workers=1) as thread:
            for first in range(self.first_batch * self.batch_size, len(order), self.batch_size):
                indices = order[first : first + self.batch_size].tolist()
                used = torch.cuda.current_stream(device).record_event() if on_gpu else None
                coming.append(thread.submit(self.make_batch, indices, stream, used))
                if len(coming) > 1:
                    yield self.take(coming.pop(0))
            for batch in coming:
                yield self.take(batch)

    def make_batch(self, indices: list[int], stream: Any, used: Any) -> tuple[dict[str, Any], Any]:
        """Return a batch and the event of its completion, made in a stream. It begins after the
        event `used`: memory of the batch before last may then be used again."""
        if stream is None:
            return self.dataset.make_batch(indices), None
        with torch.cuda.stream(stream):
            stream.wait_event(used)
            return self.dataset.make_batch(indices), stream.record_event()

    def take(self, coming: Future[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
        """Return a batch; the GPU, not the host, waits for its completion."""
        batch, made = coming.result()
        if made is not None:
            torch.cuda.current_stream(self.dataset.device).wait_event(made)
        return batch


def cache_split(
    prepared: dict, folder: Path, split: str, chain: Chain, device: Any, step_bytes: int = 0
) -> list:
    """Run the deterministic chain over this process's sub-volumes of a split, once, on the device;
    return the results, which stay there if they fit beside a training step of `step_bytes` and the
    logits of the largest volume. `prepared` is the content of `folder`/dataset.json."""
    items = subvolume_items(prepared, folder, split)
    items = share_of_process(items, *rank_and_size(), even=split == "training")
    if chain.sampling == "subvolumes":
        voxels = [math.prod(chain.input_size) * item["shape"][2] for item in items]
    else:
        sizes = [math.prod(item["shape"]) * math.prod(item["spacing_mm"]) for item in items]
        voxels = [math.ceil(size / math.prod(chain.spacing)) for size in sizes]
    needed = 3 * sum(voxels)  # bytes: image float16, label uint8
    reserved = step_bytes + 4 * (len(chain.labels) + 1) * max(voxels, default=0)
    place, rate = cache_place(needed, torch.device(device), reserved)
    each = human_bytes(needed / max(len(items), 1))
    print(f"cache: {len(items)} {split} volumes × {each} = {human_bytes(needed)} on {place}")
    prepare = functools.partial(preprocess_files, chain=chain, device=place)
    return cache_items(items, prepare, rate, f"{split}, reading")


def cache_items(
    items: Sequence[Any], prepare: Callable[[Any], Any], rate: float = 1.0, title: str = ""
) -> list[Any]:
    """Return `prepare(item)` of a fraction `rate` of the items, of the others a call for it."""
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
        what = f"{folder / 'dataset.json'}: no sub-volume in the {split} split"
        raise InputError(f"{what}; prepare more patients (three at least)")
    kept = ("case", "first_slice", "shape", "spacing_mm")
    items = [{key: record[key] for key in kept} for record in records]
    for index, (item, record) in enumerate(zip(items, records, strict=True)):
        item |= {"index": index} | {key: str(folder / record[key]) for key in KEYS}
    return items


def share_of_process(items: list[Any], rank: int, processes: int, even: bool) -> list[Any]:
    """Return this process's part; `even` repeats a few, so that all get equally many (training)."""
    count = -(-len(items) // processes) * processes if even else len(items)
    return [items[place % len(items)] for place in range(rank, count, processes)]


def pick_device(name: str, precision: str = "auto") -> torch.device:
    """Return the device of a setting; `auto` is an NVIDIA GPU or else the CPU, never Apple's, where
    torch's 3D layers may be wrong. Raises InputError for a named GPU that is missing or fails."""
    if name == "cpu":
        return torch.device("cpu")
    if name != "auto" or torch.cuda.device_count():
        return pick_gpu(name, precision)
    if shutil.which("nvidia-smi"):
        print(f"torch {torch.__version__} sees no GPU: its build or the driver is not for it")
    return torch.device("cpu")


def pick_gpu(name: str, precision: str) -> torch.device:
    """Return a GPU (of torchrun's process its own) that trains a small network as the CPU does;
    for `auto` without torchrun the CPU where it does not."""
    count, launched = torch.cuda.device_count(), "LOCAL_RANK" in os.environ
    kind, _, number = name.replace("auto", "cuda").partition(":")
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if not (torch.backends.mps.is_available() if kind == "mps" else index < count):
        many = f" of process {index} of torchrun" if launched and not number else ""
        remedy = "start fewer processes" if many and count else "use --device cpu"
        what = f"torch sees no such GPU ({count} of NVIDIA)"
        raise InputError(f"--device {kind}:{index}{many}: {what}; {remedy}")
    device = torch.device(f"cuda:{index}" if kind == "cuda" else kind)
    if reason := find_fault(device, precision):
        if name != "auto" or launched:
            raise InputError(f"--device {device}: {reason}; use --device cpu")
        return torch.device("cpu")
    return device


@functools.cache
def find_fault(device: torch.device, precision: str) -> str:
    """Return why a GPU does not train a small network in a precision, or ""; print it once."""
    if device.type == "mps":  # it may end the process that asks
        call = f"preprocess.try_device(preprocess.torch.device('mps'), {precision!r})"
        command = [sys.executable, "-c", f"import preprocess; print({call})"]
        how: dict[str, Any] = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **how)
        ended = f"a small step ended its process ({done.returncode})"
        reason = ended if done.returncode else done.stdout.strip()
    else:
        reason = try_device(device, precision)
    if reason:
        print(f"{device} is not used: {reason}")
    return reason


def try_device(device: torch.device, precision: str) -> str:
    """Return how a small training step on a device fails, or differs from the CPU's; else ""."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, image = UNet3D(base_channels=4), torch.randn(2, 1, 16, 16, 16)
        found = []
        for where, kind in ((torch.device("cpu"), "fp32"), (device, precision)):
            dtype, model = pick_precision(kind, where), on_device(copy.deepcopy(network), where)
            with torch.autocast(where.type, dtype, dtype != torch.float32):
                logits = model(image.to(where, memory_format=choose_layout(where))).float()
            logits.square().sum().backward()
            weights = model.state_dict(keep_vars=True)
            first = cast(torch.Tensor, weights["encoders.0.0.weight"].grad)
            found.append([tensor.detach().float().cpu() for tensor in (logits, first)])
        pairs = zip(*found, strict=True)
        apart = max(float((mine - its).norm() / mine.norm()) for mine, its in pairs)
    except Exception as error:  # a device may fail in any way
        return explain(error)
    # bfloat16 on a CPU differs by 0.14; NaN is not below 0.3 either
    return "" if apart < 0.3 else f"a small 3D step differs from the CPU's by {apart:.0%}"


def cache_place(needed: int, device: torch.device, reserved: int = 0) -> tuple[torch.device, float]:
    """Return where a cache of `needed` bytes fits, and the fraction of it that is kept: the device
    if that leaves `reserved` bytes and a tenth of its free memory, else the host's memory."""
    if device.type == "cuda":
        if needed <= 0.9 * (free := torch.cuda.mem_get_info(device)[0]) - reserved:
            return device, 1.0
        what = f"cache: {human_bytes(needed)} do not fit on {device} beside the network's"
        print(f"{what} {human_bytes(reserved)} ({human_bytes(free)} free): in the host's memory")
    free = read_free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rate = min(0.6 * free / max(needed, 1), 1.0)
    if rate < 1:
        what = f"cache: {human_bytes(needed)} do not fit in memory ({human_bytes(free)} free)"
        print(f"{what}; {rate:.0%} is cached, the rest is read anew each epoch (slower)")
    return torch.device("cpu"), rate


def read_free_memory() -> int:
    """Return the bytes of memory that programs may still take; all where no file says so."""
    file = Path("/proc/meminfo")  # not on macOS and Windows
    known = file.read_text(encoding="ascii") if file.is_file() else ""
    found = re.search(r"MemAvailable:\s*(\d+)", known)
    return 1024 * int(found[1]) if found else sys.maxsize


# -- Run as a script: show what the network will see -----------------------------------------------


def show_inputs(
    folder: Path, prepared: dict[str, Any], chain: Chain, augment: Augment, device: torch.device
) -> Path:
    """Draw what the network will see of a prepared folder; return the picture's path."""
    picture = folder / "preprocess.png"
    cached = cache_split(prepared, folder, "training", chain, device)
    plain, augmented = Subvolumes(cached), Subvolumes(cached, augment)
    print(f"training: {len(cached)} sub-volumes of {tuple(plain[0][IMAGE].shape)}")
    save_figure(draw_inputs(plain, augmented, list(chain.labels)[1:]), picture)
    return picture
