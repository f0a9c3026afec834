"""Step 2: from CT in HU to what the network sees, and back.

    python preprocess.py            # takes train.py's options; shows what they do

One deterministic chain, used by training and by inference, resamples each axial slice in its own
plane and leaves the slice axis alone: 16 slices in, 16 out. So a whole volume can be preprocessed
once and then cut into windows (the same voxels as preprocessing each window), and the way back to
the scan's grid is an interpolation inside each slice.

Run as a script it writes `preprocess.png` beside the prepared data: sub-volumes before and after
augmentation with the label's outline, and histograms; and prints counts and memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    MapTransform,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Resized,
    ScaleIntensityRanged,
    Spacingd,
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
    ras_grid,
    save_figure,
    spacing_mm,
    voxels,
)

if TYPE_CHECKING:
    from train import Config  # the settings' home; never imported when the program runs

# ---------------------------------------------------------------------------------------
# The deterministic chain
# ---------------------------------------------------------------------------------------


class SlicesToChannelsd(MapTransform):
    """(1, X, Y, Z) → (Z, X, Y): MONAI's 2D transforms then treat all slices alike, each in plane.

    A 3D interpolation would mix slices by rounding, and would straighten a sheared grid. The affine
    becomes the 3×3 map from pixel to in-plane millimetres.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            volume = result[key]
            has_affine = isinstance(volume, MetaTensor)
            plain = volume.as_tensor() if has_affine else volume
            slices = plain[0].permute(2, 0, 1).contiguous()
            if has_affine:
                columns = volume.affine[:3, :2].norm(dim=0)  # mm per voxel along x and y
                slices = MetaTensor(
                    slices, affine=torch.diag(torch.cat([columns, columns.new_ones(1)]))
                )
            result[key] = slices
        return result


class ChannelsToSlicesd(MapTransform):
    """(Z, X, Y) → (1, X, Y, Z), the way back; a plain tensor without affine."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            slices = result[key]
            slices = slices.as_tensor() if isinstance(slices, MetaTensor) else slices
            result[key] = slices.permute(1, 2, 0)[None].contiguous()
        return result


class ValuesToClassesd(MapTransform):
    """Raw label values → class indices 0, 1, 2, … in the order of `labels` (name → raw values).

    A value that no class names becomes background: an organ that is not asked for.
    """

    def __init__(self, keys: Sequence[str], labels: Mapping[str, Sequence[int]], **kwargs: Any):
        super().__init__(keys, **kwargs)
        self.labels = labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            raw = result[key]
            classes = torch.zeros_like(raw)
            for index, values in enumerate(self.labels.values()):
                for value in values:
                    classes[raw == value] = index
            result[key] = classes
        return result


def in_plane_chain(
    *,
    spacing: Sequence[float],
    hu_window: Sequence[float],
    input_size: Sequence[int],
    labels: Mapping[str, Sequence[int]],
    device: torch.device | str,
) -> list[Any]:
    """Steps from a loaded volume (1, X, Y, Z), any orientation, to slices (Z, *input_size) in 0..1.

    Args:
        spacing: mm per pixel in plane (x, y), before the resize to `input_size`.
        hu_window: HU that become 0 and 1; what lies outside is clipped.
        input_size: pixels of the network's input in plane (x, y).
        labels: class name → raw label values; the order gives the class index.
        device: where the resampling runs and the result stays.
    """
    keys, both = (IMAGE, LABEL), {"allow_missing_keys": True}
    return [
        Orientationd(keys, axcodes=ORIENTATION, labels=None, **both),
        EnsureTyped(keys, device=torch.device(device), dtype=torch.float32, **both),
        SlicesToChannelsd(keys, **both),
        Spacingd(
            keys,
            pixdim=tuple(spacing),
            mode=("bilinear", "nearest"),
            padding_mode="border",
            dtype=torch.float32,  # MONAI's default float64 is 3.5 times slower
            **both,
        ),
        ScaleIntensityRanged(
            IMAGE, a_min=hu_window[0], a_max=hu_window[1], b_min=0.0, b_max=1.0, clip=True
        ),
        # "nearest" rounds towards the corner and would shift each label by half a pixel;
        # "nearest-exact" keeps pixel centres (liver Dice of the round trip 0.99 instead of 0.98).
        Resized(keys, spatial_size=tuple(input_size), mode=("bilinear", "nearest-exact"), **both),
        ValuesToClassesd([LABEL], labels=labels, **both),
    ]


def deterministic_chain(**settings: Any) -> Compose:
    """Files of a sub-volume → image (1, X, Y, Z) float16 in 0..1 and label uint8 class indices.

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
            ChannelsToSlicesd(keys),
            CastToTyped(keys, dtype=(torch.float16, torch.uint8)),
        ]
    )


# ---------------------------------------------------------------------------------------
# Inference: a whole volume in, the network's answer back on the volume's grid
# ---------------------------------------------------------------------------------------


def preprocess_volume(image: nib.Nifti1Image, **settings: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Bring a whole volume to the network's grid.

    Args:
        image: volume in HU, any orientation.
        settings: those of `in_plane_chain`.

    Returns:
        Tensor (1, *input_size, slices) in 0..1, slices from inferior to superior, and the 3×3 map
        from RAS-ordered source pixel (i, j, 1) to network pixel.
    """
    array = voxels(image)
    if array.dtype.kind == "u":  # torch cannot flip unsigned integers wider than a byte
        array = array.astype(np.float32)
    volume = MetaTensor(torch.as_tensor(array)[None], affine=image.affine)
    slices = Compose(in_plane_chain(**settings))({IMAGE: volume})[IMAGE]
    _, ras_affine = ras_grid(image)
    source_to_mm = np.diag([*spacing_mm(ras_affine)[:2], 1.0])
    source_to_network = np.linalg.inv(slices.affine.cpu().numpy()) @ source_to_mm
    return ChannelsToSlicesd([IMAGE])({IMAGE: slices})[IMAGE], source_to_network


def interpolation_matrix(scale: float, offset: float, source: int, network: int) -> torch.Tensor:
    """(source, network) weights of linear interpolation at `scale * i + offset`, edges held."""
    position = np.clip(scale * np.arange(source) + offset, 0, network - 1)
    lower = np.minimum(position.astype(int), max(network - 2, 0))
    fraction = position - lower
    matrix = np.zeros((source, network), np.float32)
    matrix[np.arange(source), lower] = 1 - fraction
    if network > 1:
        matrix[np.arange(source), lower + 1] = fraction
    return torch.from_numpy(matrix)


def to_source_plane(
    logits: torch.Tensor, source_to_network: np.ndarray, source_size: Sequence[int]
) -> torch.Tensor:
    """Interpolate logits (C, *input_size, Z) in each slice to (C, *source_size, Z), RAS order."""
    (a, _, b), (_, c, d) = source_to_network[:2]
    along_x = interpolation_matrix(a, b, source_size[0], logits.shape[1]).to(logits)
    along_y = interpolation_matrix(c, d, source_size[1], logits.shape[2]).to(logits)
    # Two small matrix products per slice: linear interpolation is separable.
    return torch.einsum("xu,cuvz,yv->cxyz", along_x, logits, along_y)


# ---------------------------------------------------------------------------------------
# Random augmentation (training only) and cached datasets
# ---------------------------------------------------------------------------------------


def augmentation(
    *,
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
    return Compose(
        [
            CastToTyped(keys, dtype=(torch.float32, torch.float32)),
            SlicesToChannelsd(keys),
            RandAffined(
                keys,
                prob=probability,
                rotate_range=(np.deg2rad(rotation_degrees),),
                translate_range=[translation * size for size in input_size],
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
    """Cached sub-volumes, augmented on the way out.

    The random numbers of a sample depend on (seed, epoch, sample) alone: not on the order, the
    number of processes, or where a run was interrupted. Items: image (1, X, Y, Z) float32 in 0..1,
    label (1, X, Y, Z) class indices, and the names of case and sub-volume.
    """

    def __init__(self, cached: Dataset, augment: Compose | None = None, seed: int = 0):
        self.cached, self.augment, self.seed, self.epoch = cached, augment, seed, 0

    def __len__(self) -> int:
        return len(self.cached)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.cached[index]
        if self.augment is None:
            return {**item, IMAGE: item[IMAGE].float()}
        state = np.random.SeedSequence([self.seed, self.epoch, item["index"]]).generate_state(1)
        self.augment.set_random_state(seed=int(state[0]))
        return self.augment(item)


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
    x, y = settings["input_size"]
    bytes_each = x * y * prepared["subvolume_depth"] * 3  # image float16, label uint8
    place, rate = cache_place(bytes_each * len(items), torch.device(device))
    size = human_bytes(bytes_each * len(items))
    print(
        f"cache: {len(items)} {split} sub-volumes × {human_bytes(bytes_each)} = {size} on {place}"
    )
    chain = deterministic_chain(device=place, **settings)
    options = {"num_workers": min(os.cpu_count() or 1, 8), "copy_cache": False, "cache_rate": rate}
    if not disk_cache:
        return CacheDataset(items, chain, **options)

    def key(item: dict[str, Any]) -> bytes:
        content = json.dumps([item, settings], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest().encode()

    stored = PersistentDataset(items, chain, cache_dir=folder / "cache", hash_func=key)
    return CacheDataset(stored, EnsureTyped([IMAGE, LABEL], device=place), **options)


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
            image, label = item[IMAGE][0].cpu().numpy(), item[LABEL][0].cpu().numpy() > 0
            middle = int(label.sum(axis=(0, 1)).argmax())
            draw_plane(
                axes, image, "axial", middle, (1.0, 1.0, 1.0), {TRUTH_COLOUR: label}, window=(0, 1)
            )
            axes.set_title(f"{titles[index]}, {name}", fontsize=10)
            for values, what in ((image.ravel(), "all"), (image[label], "organ")):
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

    command_line(main, train.Config, __doc__)
