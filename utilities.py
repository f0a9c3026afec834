"""What two or more of the scripts share.

Sections, each readable alone: data contract · command line · volumes · networks · metrics ·
training · checkpoints · pictures. This module imports none of the scripts.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

# ---------------------------------------------------------------------------------------
# Data contract: the words that all scripts agree on
# ---------------------------------------------------------------------------------------

IMAGE, LABEL, PRED = "image", "label", "pred"  # dictionary keys, as in MONAI
ORIENTATION = "RAS"  # axes of a prepared array: indices grow to the Right, Anterior, Superior
AIR_HU = -1024  # what lies outside a scan
LABEL_VALUES = {"background": 0, "liver": 1, "tumour": 2}  # values in a label map (LiTS, Task03)
CLASSES = {"background": (0,), "liver": (1, 2)}  # what is learnt by default: a tumour is liver too
HU_WINDOW = (-200.0, 250.0)  # HU window of every picture for people (training has its own setting)


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, why, and what to do."""


# ---------------------------------------------------------------------------------------
# Command line and files
# ---------------------------------------------------------------------------------------


def command_line(main: Callable[[Any], None], config_class: type, description: str | None) -> None:
    """Run `main(config)`, config from the command line; a user's fault ends in one line, exit 1."""
    import tyro

    config = tyro.cli(config_class, description=description)
    try:
        main(config)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when all went well.

    The temporary name starts with a dot and keeps the suffixes, because writers choose the format
    by suffix.
    """
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "choose a folder that exists, is writable and has free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------
# Volumes: a nibabel image is array + affine (voxel index → patient RAS+ millimetres) + header
# ---------------------------------------------------------------------------------------


def case_name(path: Path) -> str:
    """`liver_3` for `…/liver_3.nii.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def read_volume(path: Path) -> nib.Nifti1Image:
    """Read the header of a 3D volume; its voxels are read by `voxels`.

    Trailing axes of length 1 are dropped. Raises InputError for anything that is not one 3D volume.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    try:
        image = nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable NIfTI volume ({error}); download or convert it again"
        ) from error
    if len(image.shape) > 3:
        image = nib.funcs.squeeze_image(image)
    if len(image.shape) != 3:
        raise InputError(
            f"{path}: must be one 3D volume, got shape {image.shape}; split or convert it first"
        )
    return image


def voxels(image: nib.Nifti1Image, path: Path | str = "volume") -> np.ndarray:
    """All voxels (X, Y, Z), in the stored dtype, or float32 where the header rescales them."""
    proxy = image.dataobj
    try:
        scaled = not isinstance(proxy, np.ndarray) and (proxy.slope, proxy.inter) != (1, 0)
        array = proxy.get_scaled(np.float32) if scaled else np.asanyarray(proxy)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(
            f"{path}: its voxels cannot be read ({error}); the file is cut off or damaged, "
            "download or convert it again"
        ) from error
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def like(image: nib.Nifti1Image, array: np.ndarray) -> nib.Nifti1Image:
    """`array` (X, Y, Z) on exactly the grid of `image`: shape, affine, qform and sform codes."""
    if array.shape != image.shape:
        raise ValueError(f"array must have the shape of the grid {image.shape}, got {array.shape}")
    is_nifti = isinstance(image.header, nib.Nifti1Header)
    header = nib.Nifti1Header.from_header(image.header) if is_nifti else None
    result = nib.Nifti1Image(array, image.affine, header, dtype=array.dtype)
    result.header.set_slope_inter(1, 0)
    result.header["cal_min"] = result.header["cal_max"] = 0
    return result


def write_volume(image: nib.Nifti1Image, path: Path) -> None:
    """Write under a temporary name, then move into place: never half a file under `path`."""
    with atomic_write(path) as temporary:
        nib.save(image, temporary)


def to_ras(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Permute and flip the axes to the nearest RAS; every voxel keeps its place in the patient."""
    return nib.as_closest_canonical(image)


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Length of each voxel axis in mm, in the order of the array's axes."""
    x, y, z = (float(length) for length in nib.affines.voxel_sizes(affine))
    return x, y, z


# ---------------------------------------------------------------------------------------
# Pictures: radiological view (the patient's right on the picture's left), colour-blind safe
# ---------------------------------------------------------------------------------------

# Okabe & Ito's palette. Reference and prediction must be told apart by everyone, on grey.
TRUTH_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#E69F00"
LABEL_COLOURS = {1: "#E69F00", 2: "#CC79A7", 3: "#009E73", 4: "#F0E442", 5: "#0072B2"}
PLANES = {  # plane → (axis that is cut, letters at the picture's left, right, top, bottom)
    "axial": (2, "RLAP"),
    "coronal": (1, "RLSI"),
    "sagittal": (0, "APSI"),
}


def draw_plane(
    axes: Any,
    image: np.ndarray,
    plane: str,
    index: int,
    spacing: tuple[float, float, float],
    outlines: dict[str, np.ndarray] | None = None,
    window: tuple[float, float] = HU_WINDOW,
) -> None:
    """Draw one slice of a RAS array (X, Y, Z) with outlines of masks, to scale, with its letters.

    `outlines` maps a colour to a boolean mask (X, Y, Z); `spacing` is in mm per voxel.
    """
    cut, (left, right, top, bottom) = PLANES[plane]
    across, up = (step for axis, step in enumerate(spacing) if axis != cut)

    def picture(array: np.ndarray) -> np.ndarray:  # first axis runs leftwards, second one up
        return np.take(array, index, axis=cut)[::-1, ::-1].T

    grey = picture(image)
    axes.imshow(grey, cmap="gray", vmin=window[0], vmax=window[1], aspect=up / across)
    for colour, mask in (outlines or {}).items():
        flat = picture(mask)
        if flat.any() and not flat.all():
            axes.contour(flat, levels=[0.5], colors=[colour], linewidths=1.2)
    marks = {left: (0.02, 0.5), right: (0.98, 0.5), top: (0.5, 0.97), bottom: (0.5, 0.03)}
    for letter, (x, y) in marks.items():
        axes.text(
            x, y, letter, transform=axes.transAxes, color="white", fontsize=9, weight="bold",
            ha={0.02: "left", 0.98: "right"}.get(x, "center"),
            va={0.97: "top", 0.03: "bottom"}.get(y, "center"),
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])


def planes_figure(
    title: str,
    image: np.ndarray,
    spacing: tuple[float, float, float],
    outlines: dict[str, np.ndarray],
    window: tuple[float, float] = HU_WINDOW,
) -> Any:
    """Figure of the axial, coronal and sagittal slice with most foreground, RAS array in HU.

    `outlines` maps a colour to a boolean mask (X, Y, Z); the first one chooses the slices. Returns
    a matplotlib Figure for `save_figure`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    guide = next(iter(outlines.values()))
    for axes, (plane, (cut, _)) in zip(figure.subplots(1, 3), PLANES.items(), strict=True):
        counts = np.count_nonzero(guide, axis=tuple(axis for axis in range(3) if axis != cut))
        index = int(counts.argmax()) if counts.any() else image.shape[cut] // 2
        draw_plane(axes, image, plane, index, spacing, outlines, window)
        axes.set_title(f"{plane}, slice {index + 1} of {image.shape[cut]}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, facecolor="white")
