"""What several tests build their inputs with: phantoms as arrays and files, preparing them."""

from __future__ import annotations

import filecmp
import json
from functools import cache
from pathlib import Path

import make_phantoms
import nibabel as nib
import numpy as np

import prepare


@cache
def phantom(index: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Scan and label of a small patient (48 × 48 × about 40)."""
    return make_phantoms.make_phantom(index, make_phantoms.Config(size=48, slices=(36, 44)))


def ras_arrays(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scan and label map of `phantom`, axes R, A, S."""
    return tuple(np.asanyarray(nib.as_closest_canonical(i).dataobj) for i in phantom(index))


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write a RAS array in the axes of `affine`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = nib.orientations.ornt_transform(
        nib.io_orientation(np.eye(4)), nib.io_orientation(affine)
    )
    nib.save(nib.Nifti1Image(nib.apply_orientation(array, axes), affine), path)


def write_patients(root: Path, slices: slice = slice(None), affines=(None,) * 3) -> Path:
    """Decathlon folder with one phantom per affine (None: its own)."""
    for index, affine in enumerate(affines):
        scan, label = (array[:, :, slices] for array in ras_arrays(index))
        own = nib.as_closest_canonical(phantom(index)[0]).affine if affine is None else affine
        save(scan, own, root / "imagesTr" / f"case_{index}.nii.gz")
        save(label, own, root / "labelsTr" / f"case_{index}.nii.gz")
    return root


def run(source: Path, **settings) -> dict:
    """Prepare `source` beside itself; returns dataset.json."""
    destination = settings.pop("destination", source.parent / "prepared")
    settings = {"workers": 1} | settings
    prepare.main(prepare.Config(source=source, destination=destination, **settings))
    return json.loads((destination / "dataset.json").read_text())


def same_tree(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    files = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in (one, other)]
    return files[0] == files[1] and all(
        filecmp.cmp(one / file, other / file, shallow=False) for file in files[0]
    )
