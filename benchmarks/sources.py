"""The patients of a comparison, changed: cropped to the body, or joined by painted ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from scipy import ndimage

from data.boxes import find_bounding_box
from data.cases import read_volume

PAINTED = "painted_"  # before the names of bodies that are no patients
BODY_HU = -300  # what is denser is body, or table


def find_body(ct: np.ndarray) -> tuple[slice, ...]:
    """The box of the largest thing in a CT (HU), all slices of it; a table is thin and apart."""
    pieces, _ = ndimage.label(ndimage.binary_opening(ct > BODY_HU, iterations=2))
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    return (*find_bounding_box(pieces == largest)[:2], slice(None))


def crop_to_body(source: Path, destination: Path) -> Path:
    """Copies of all cases, scan and label map, without the air beside the body."""
    for image in sorted((source / "imagesTr").glob("[!.]*.nii.gz")):
        scan, label = read_volume(image), read_volume(source / "labelsTr" / image.name)
        box = find_body(scan.read())
        for part, volume in (("imagesTr", scan), ("labelsTr", label)):
            path = destination / part / image.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                volume.crop(box).write(path)
    return destination


def join_painted(source: Path, painted: Path, number: int, destination: Path) -> Path:
    """All cases of `source`, and `number` of the painted ones under names of their own."""
    bodies = sorted((painted / "imagesTr").glob("[!.]*.nii.gz"))[:number]
    for part in ("imagesTr", "labelsTr"):
        (destination / part).mkdir(parents=True, exist_ok=True)
        for path in (source / part).glob("[!.]*.nii.gz"):
            shutil.copyfile(path, destination / part / path.name)
        for path in bodies:
            other = painted / part / path.name
            shutil.copyfile(other, destination / part / f"{PAINTED}{path.name}")
    return destination
