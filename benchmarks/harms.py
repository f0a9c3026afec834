"""What can be wrong with a scan, applied to one at will: for the benchmarks that need bad scans.

Each harm takes a RAS `Volume` in HU, its label map (array of one shape) and a strength, and gives
both back on one grid, in RAS order but for `reorient`. Where the grid changes (thicker slices, a
smaller field of view), the label map is that of the new grid: the truth is what can be seen in the
harmed scan.
"""

from __future__ import annotations

from collections.abc import Callable

import machine  # noqa: F401  # puts the project on Python's path
import numpy as np
from nibabel.affines import from_matvec
from scipy.ndimage import gaussian_filter, gaussian_filter1d, rotate

from data.volumes import Volume, find_bounding_box

AIR = -1000.0

Pair = tuple[Volume, np.ndarray]


def keep_all(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    return scan, label


def add_noise(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """White noise with a standard deviation of `strength` HU in each voxel."""
    return scan.like(scan.data + rng.normal(0, strength, scan.shape).astype(np.float32)), label


def shift_hu(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """All HU but those of air `strength` higher."""
    return scan.like(scan.data + np.float32(strength) * (scan.data > -500)), label


def stretch_hu(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Contrast of soft tissue about 40 HU multiplied by `strength`."""
    soft = (scan.data > -200) & (scan.data < 400)
    stretched = (scan.data - 40) * np.float32(strength) + 40
    return scan.like(np.where(soft, stretched, scan.data)), label


def shift_liver(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """The liver and what is in it `strength` HU higher, softly at its edge."""
    inside = gaussian_filter((label > 0).astype(np.float32), 0.5)
    return scan.like(scan.data + np.float32(strength) * inside), label


def thicken(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """`strength` slices averaged into one; what is liver in half of them is liver."""
    many = round(strength)
    count = scan.shape[2] // many

    def mean(array: np.ndarray) -> np.ndarray:
        parts = array[:, :, : count * many].reshape(*array.shape[:2], count, many)
        return parts.mean(axis=3, dtype=np.float32)

    thick = mean(label > 0) >= 0.5
    coarse = from_matvec(np.diag([1, 1, many]), [0, 0, (many - 1) / 2])
    return Volume(mean(scan.data), scan.affine @ coarse), thick.astype(np.uint8)


def crop(scan: Volume, label: np.ndarray, box: tuple[slice, ...]) -> Pair:
    """Both inside a box of voxels."""
    return scan.crop(box), label[box]


def crop_z(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Only a part `strength` of the liver's slices stays, its lower or its upper end."""
    z = find_bounding_box(label > 0)[2]
    cut = round((z.stop - z.start) * (1 - strength))
    upper = rng.random() < 0.5
    kept = slice(z.start + cut, None) if upper else slice(0, max(z.stop - cut, z.start + 1))
    return crop(scan, label, (slice(None), slice(None), kept))


def crop_view(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """The field of view in plane is `strength` of what it was, about its own centre."""
    box = []
    for size in scan.shape[:2]:
        cut = round(size * (1 - strength) / 2)
        box.append(slice(cut, size - cut))
    return crop(scan, label, (*box, slice(None)))


def leave_liver(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Only slices without liver stay, those on the side of it where there are more."""
    z, size = find_bounding_box(label > 0)[2], scan.shape[2]
    below = z.start >= size - z.stop
    kept = slice(0, max(z.start, 8)) if below else slice(min(z.stop, size - 8), size)
    return crop(scan, label, (slice(None), slice(None), kept))


def turn(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """The patient turned by `strength` degrees about the body's axis."""
    turned = [
        rotate(array, strength, axes=(0, 1), reshape=False, order=order, cval=fill)
        for array, order, fill in ((scan.data, 1, AIR), (label, 0, 0))
    ]
    return scan.like(turned[0]), turned[1]


def mirror(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Left is right, which the header does not say: wrong sides, or situs inversus."""
    return scan.like(scan.data[::-1]), label[::-1]


def upend(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """The slices in wrong order: feet where the head should be."""
    return scan.like(scan.data[:, :, ::-1]), label[:, :, ::-1]


def blur(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Gaussian blur with a standard deviation of `strength` mm."""
    sigma = [strength / step for step in scan.spacing_mm]
    return scan.like(gaussian_filter(scan.data, sigma)), label


def streak(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Horizontal streaks of `strength` HU (SD) across the body, as of arms that lie beside it."""
    _, ny, nz = scan.shape
    dy, dz = scan.spacing_mm[1:]
    lines = gaussian_filter1d(rng.normal(size=(ny, nz)), 3 / dy, axis=0)
    lines = gaussian_filter1d(lines, 2 / dz, axis=1)
    body = np.flatnonzero((scan.data > -300).any(axis=(0, 2)))
    height = (np.arange(ny) - body.mean()) / max(np.ptp(body) / 4, 1)
    lines *= strength / max(lines.std(), 1e-6) * np.exp(-0.5 * height**2)[:, None]
    return scan.like(scan.data + lines[None].astype(np.float32) * (scan.data > -500)), label


def reorient(scan: Volume, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """The same voxels stored along other axes (S, L, A), which the affine says: nothing is lost."""
    turned = np.zeros((4, 4))
    turned[[2, 0, 1, 3], [0, 1, 2, 3]] = 1, -1, 1, 1
    turned[0, 3] = scan.shape[0] - 1
    place = scan.affine @ turned  # stored voxel → RAS voxel → mm
    data, truth = (np.transpose(array[::-1], (2, 0, 1)) for array in (scan.data, label))
    return Volume(data, place), truth


HARMS: dict[str, Callable[[Volume, np.ndarray, float, np.random.Generator], Pair]] = {
    "as it is": keep_all,
    "noise": add_noise,
    "HU shifted": shift_hu,
    "contrast": stretch_hu,
    "liver's HU": shift_liver,
    "thick slices": thicken,
    "cropped z": crop_z,
    "cropped view": crop_view,
    "without liver": leave_liver,
    "turned": turn,
    "mirrored": mirror,
    "upside down": upend,
    "blur": blur,
    "streaks": streak,
    "other orientation": reorient,
}


def harm(
    scan: Volume, label: np.ndarray, name: str, strength: float, rng: np.random.Generator
) -> Pair:
    """A RAS scan (HU as float32) and its label map with one thing wrong with them."""
    harmed, truth = HARMS[name](scan.ras, label, strength, rng)
    return harmed, np.ascontiguousarray(truth)
