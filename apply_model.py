"""Step 4: a trained network on new volumes: label map, masked volume and measurements.

    python apply_model.py ct.nii.gz --checkpoint checkpoints/liver/best.pt
    python apply_model.py --split test          # the patients that training never saw

For each case, `results/<case>/` receives the label map and the masked volume on exactly the scan's
grid (shape, affine, qform and sform), a preview picture and the measurements. Everything that
belongs to the network (spacing, HU window, labels, …) comes from the checkpoint.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
import tyro
from monai.inferers import sliding_window_inference
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from tqdm import tqdm

from preprocess import preprocess_volume, read_prepared, to_source_plane
from utilities import (
    AIR_HU,
    IMAGE,
    LABEL,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    InputError,
    atomic_write,
    autocast,
    build_network,
    case_name,
    command_line,
    dice_metric,
    like,
    load_checkpoint,
    mean_dice,
    pick_device,
    pick_precision,
    planes_figure,
    predicted_classes,
    ras_grid,
    read_label,
    read_volume,
    save_figure,
    spacing_mm,
    to_ras,
    voxels,
)


@dataclass
class Config:
    """What is segmented, with which checkpoint, and where the results go."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # CT volumes in HU
    checkpoint: Path = Path("checkpoints/liver/best.pt")  # written by train.py
    destination: Path = Path("results")  # a folder per case is made in it
    split: Literal["training", "validation", "test"] | None = None  # cases of prepared data instead
    data: Path = Path("data/prepared")  # what prepare.py wrote; read with --split only
    truth: tuple[Path, ...] = ()  # reference label maps, one per path, for Dice
    background: int = AIR_HU  # HU outside the organ in the masked volume
    windows: int = 4  # windows per network call; more need more memory
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = (
        "auto"  # auto: what the hardware is fast in
    )


# ---------------------------------------------------------------------------------------
# Model and segmentation: usable from Python
# ---------------------------------------------------------------------------------------


@dataclass
class Model:
    """A network with all that its checkpoint says about using it."""

    network: torch.nn.Module
    preprocessing: dict[str, Any]  # spacing, HU window, input size, labels
    inference: dict[str, Any]  # depth of a window in slices, overlap
    device: torch.device
    precision: torch.dtype

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Class name → raw label values, in channel order."""
        return self.preprocessing["labels"]


def load_model(checkpoint: Path, device: str = "auto", precision: str = "auto") -> Model:
    """Rebuild the network of a checkpoint, ready to predict."""
    where = pick_device(device)
    saved = load_checkpoint(Path(checkpoint), where)
    network = build_network(**saved["network_args"])
    network.load_state_dict(saved["network_state"])
    network.to(where, memory_format=torch.channels_last_3d).eval()
    dtype = pick_precision(precision, where)
    return Model(network, saved["preprocessing"], saved["inference"], where, dtype)


def segment(model: Model, image: nib.Nifti1Image | Path | str, windows: int = 4) -> nib.Nifti1Image:
    """Label map of a CT volume, on exactly its grid.

    Args:
        image: volume in HU, or the path of one; any orientation and spacing.
        windows: windows per network call.

    Returns:
        uint8 image with the raw label values (the first one of each class), the same shape, affine
        and header forms as the input.
    """
    volume = (
        image if isinstance(image, nib.spatialimages.SpatialImage) else read_volume(Path(image))
    )
    tensor, source_to_network = preprocess_volume(
        volume, **model.preprocessing, device=model.device
    )
    logits = predict(model, tensor, windows)
    ras_shape, _ = ras_grid(volume)
    values = torch.tensor([raw[0] for raw in model.labels.values()], dtype=torch.uint8)
    labels = np.empty(ras_shape, np.uint8)
    # Slab by slab, so that memory does not grow with classes × full resolution.
    for start in range(0, labels.shape[2], 16):
        slab = slice(start, start + 16)
        fine = to_source_plane(logits[..., slab], source_to_network, ras_shape[:2])
        labels[..., slab] = values[predicted_classes(fine[None])[0].cpu().long()].numpy()
    return like(volume, from_ras(labels, io_orientation(volume.affine)))


def from_ras(array: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """RAS-ordered array (X, Y, Z) back to the axis order and directions of `orientation`."""
    ras = [[0, 1], [1, 1], [2, 1]]
    return np.ascontiguousarray(apply_orientation(array, ornt_transform(ras, orientation)))


@torch.no_grad()
def predict(model: Model, volume: torch.Tensor, windows: int) -> torch.Tensor:
    """Logits (C, X, Y, Z) of a preprocessed volume (1, X, Y, Z), on the CPU.

    Windows as deep as the training sub-volumes slide along the slices and are blended with a
    Gaussian, because a window knows least about its outer slices. A scan of fewer slices is padded
    with air.
    """

    def network(batch: torch.Tensor) -> torch.Tensor:
        with autocast(model.device, model.precision):
            return model.network(batch.to(memory_format=torch.channels_last_3d)).float()

    return sliding_window_inference(
        volume[None],
        roi_size=(*volume.shape[1:3], model.inference["depth"]),
        sw_batch_size=windows,
        predictor=network,
        overlap=model.inference["overlap"],
        mode="gaussian",
        sw_device=model.device,
        device="cpu",
    )[0]


# ---------------------------------------------------------------------------------------
# What is written for a case
# ---------------------------------------------------------------------------------------


def masked(image: nib.Nifti1Image, label: nib.Nifti1Image, background: int) -> nib.Nifti1Image:
    """The scan where the label is not 0 and `background` HU elsewhere, on the scan's grid."""
    scan = voxels(image)
    dtype = np.result_type(scan.dtype, np.min_scalar_type(background))
    return like(image, np.where(voxels(label) > 0, scan.astype(dtype, copy=False), background))


def write_checked(result: nib.Nifti1Image, source: nib.Nifti1Image, path: Path) -> None:
    """Write, read back, and make sure that the file lies on exactly the source's grid."""
    with atomic_write(path) as temporary:
        nib.save(result, temporary)
        written = nib.load(temporary)
        same = {
            "shape": written.shape == source.shape,
            "affine": np.allclose(written.affine, source.affine, rtol=0, atol=1e-4),
            "qform and sform codes": _form_codes(written) == _form_codes(source),
            "voxels": np.array_equal(voxels(written), voxels(result)),
        }
        wrong = [name for name, equal in same.items() if not equal]
        if wrong:
            raise InputError(f"{path}: {', '.join(wrong)} changed in writing; nothing was kept")


def _form_codes(image: nib.Nifti1Image) -> tuple[int, int]:
    return int(image.header["qform_code"]), int(image.header["sform_code"])


def volume_ml(mask: np.ndarray, affine: np.ndarray) -> float:
    """Volume in ml: voxels × |determinant of the affine|, which holds for sheared grids too."""
    return float(np.count_nonzero(mask)) * abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def class_indices(array: np.ndarray, labels: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Raw label values → class indices, as training saw them."""
    classes = np.zeros(array.shape, np.uint8)
    for index, values in enumerate(labels.values()):
        classes[np.isin(array, values)] = index
    return classes


def preview(case: str, image: Any, label: Any, truth: Any, note: str) -> Any:
    """Figure with the outlines of prediction and truth on three planes of the scan."""
    ras = to_ras(image)
    outlines = {PREDICTION_COLOUR: voxels(to_ras(label)) > 0}
    title = f"{case} · prediction in orange"
    if truth is not None:
        outlines = {TRUTH_COLOUR: voxels(to_ras(truth)) > 0, **outlines}
        title += ", truth in blue"
    return planes_figure(f"{title} · {note}", voxels(ras), spacing_mm(ras.affine), outlines)


def read_truth(path: Path, image: nib.Nifti1Image) -> nib.Nifti1Image:
    """A reference label map, which must lie on the scan's grid."""
    truth = read_label(path, image)
    if truth.shape != image.shape or not np.allclose(truth.affine, image.affine, atol=1e-2):
        raise InputError(
            f"{path}: the label map must lie on the scan's grid {image.shape}, got {truth.shape} "
            "or another affine; use the label map that belongs to this scan"
        )
    return truth


def apply_to_case(model: Model, case: dict[str, Any], config: Config) -> dict[str, Any]:
    """Segment one scan, write its results, return its row of measurements."""
    start = time.perf_counter()
    name, folder = case["case"], config.destination / case["case"]
    image = read_volume(case[IMAGE])
    truth = read_truth(case[LABEL], image) if case[LABEL] else None
    label = segment(model, image, config.windows)
    write_checked(label, image, folder / f"{name}_label.nii.gz")
    outside = masked(image, label, config.background)
    write_checked(outside, image, folder / f"{name}_masked.nii.gz")
    predicted = class_indices(voxels(label), model.labels)
    classes = list(model.labels)[1:]
    row: dict[str, Any] = {"case": name}
    for index, organ in enumerate(classes, start=1):
        row[f"{organ}_volume_ml"] = round(volume_ml(predicted == index, image.affine), 2)
    if truth is not None:
        dice = dice_metric(predicted, class_indices(voxels(truth), model.labels), len(model.labels))
        row |= {f"{organ}_dice": float(d) for organ, d in zip(classes, dice, strict=True)}
    row["seconds"] = round(time.perf_counter() - start, 2)
    note = ", ".join(
        f"{organ} {row[f'{organ}_volume_ml']:.0f} ml"
        + (f", Dice {row[f'{organ}_dice']:.4f}" if truth is not None else "")
        for organ in classes
    )
    save_figure(preview(name, image, label, truth, note), folder / f"{name}_preview.png")
    sources = {"image": str(case[IMAGE].resolve()), "checkpoint": str(config.checkpoint)}
    sources["truth"] = str(case[LABEL].resolve()) if case[LABEL] else None
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({**row, **sources}, indent=2))
    tqdm.write(f"{name}: {note}")
    return row


# ---------------------------------------------------------------------------------------
# Cases and the table
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
    if config.truth and len(config.truth) != len(config.paths):
        raise InputError(
            f"--truth must give one label map per volume, got {len(config.truth)} for "
            f"{len(config.paths)}"
        )
    truths = config.truth or (None,) * len(config.paths)
    cases = [
        {"case": case_name(path), IMAGE: path, LABEL: truth}
        for path, truth in zip(config.paths, truths, strict=True)
    ]
    names = [case["case"] for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two volumes are called {', '.join(twice)}; rename one of each pair")
    return cases


def write_table(destination: Path) -> None:
    """results.csv: one row for each case in the folder, those of earlier calls too."""
    rows = [json.loads(path.read_text()) for path in sorted(destination.glob("*/*.json"))]
    with (
        atomic_write(destination / "results.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def print_mean_dice(organ: str, values: list[float]) -> None:
    """One line with mean and n, and how many patients (no organ, no prediction) were left out."""
    if not values:
        return
    (mean,), (counted,) = mean_dice([[value] for value in values])
    print(f"{organ}: mean whole-volume Dice {mean:.4f}, n = {counted} patients", end="")
    print(f" ({len(values) - counted} without {organ} left out)" if counted < len(values) else "")


def main(config: Config) -> None:
    cases = find_cases(config)
    model = load_model(config.checkpoint, config.device, config.precision)
    rows = [apply_to_case(model, case, config) for case in tqdm(cases, unit="scan")]
    write_table(config.destination)
    for organ in list(model.labels)[1:]:
        print_mean_dice(organ, [row[f"{organ}_dice"] for row in rows if f"{organ}_dice" in row])
    print(f"look at {config.destination}/<case>/<case>_preview.png; 3D: python visualize_3d.py")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
