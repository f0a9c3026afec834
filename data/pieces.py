"""Sub-volumes as `prepare.py` leaves them: framed, filled up, written, and known again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from scipy import ndimage

from data.boxes import Box, find_bounding_box
from data.destination import read_record, writing
from data.labels import IMAGE, LABEL
from data.volumes import Volume

BODY_HU = -500  # between lung and fat


def frame_body(image: np.ndarray, label: np.ndarray) -> tuple[slice, ...]:
    """In-plane box around what is denser than lung, in HU, and around all foreground."""
    body = np.asarray((image > BODY_HU).any(axis=2) | (label > 0).any(axis=2))
    return find_bounding_box(body) if body.any() else (slice(None), slice(None))


def find_body(scan: Volume) -> Box:
    """In-plane box of the patient in a CT (RAS voxels), without table and air: around the largest
    thing denser than lung, looked at every 3 mm, along z every 5 mm. All where there is none."""
    sizes = scan.ras.spacing_mm
    x, y, z = (max(1, round(mm / size)) for mm, size in zip((3, 3, 5), sizes, strict=True))
    slabs = scan.slabs([(first, first + 1) for first in range(0, scan.ras_shape[2], z)])
    body = np.concatenate([slab[::x, ::y] > BODY_HU for _, slab in slabs], axis=2)
    solid = ndimage.binary_opening(body, np.ones((3, 3, 1)))  # a table is thin, or hangs on thin
    pieces, number = ndimage.label(solid)
    sides = scan.ras_shape[:2]
    if not number:
        return tuple(slice(0, side) for side in sides)
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    box = zip(find_bounding_box(pieces == largest), (x, y), sides, strict=False)  # not along z
    return tuple(
        slice(max(part.start - 1, 0) * step, min((part.stop + 1) * step, side))
        for part, step, side in box
    )


def pad_slices(array: np.ndarray, depth: int, fill: int) -> np.ndarray:
    """`array` (X, Y, ≤ depth) with slices of `fill` above it, as far as its type can hold that."""
    if not (missing := depth - array.shape[2]):
        return array
    if array.dtype.kind in "iu":
        fill = max(fill, np.iinfo(array.dtype).min)
    return np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=fill)


def write_piece(
    piece: Volume, key: str, first: int, folder: Path, compress: bool
) -> dict[str, Any]:
    """Write the image or label map of a sub-volume; its file, size and checksum, and its grid."""
    case = folder.name.partition(".partial.")[2]
    file = f"{key}_{first:04d}{'.nii.gz' if compress or key == LABEL else '.nii'}"
    with writing(folder / file):
        checksum = piece.write(folder / file)
        size = (folder / file).stat().st_size
    return {
        key: f"subvolumes/{case}/{file}",
        f"{key}_bytes": size,
        f"{key}_crc32": f"{checksum:08x}",
        "shape": list(piece.shape),
        "spacing_mm": [round(step, 6) for step in piece.spacing_mm],
    }


def find_written(record: dict[str, Any], destination: Path) -> dict[str, Any]:
    """What an earlier run wrote of this case, if source, settings and files are the same; else
    empty. A file that is newer than its record is read again for its checksum."""
    path = destination / "subvolumes" / record["case"] / "case.json"
    known = read_record(path)
    if not known or known["fingerprint"] != record["fingerprint"]:
        return {}
    try:
        written = path.stat().st_mtime_ns
        for entry in known["subvolumes"]:
            for key in (IMAGE, LABEL):
                file = destination / entry[key]
                state = file.stat()
                if state.st_size != entry[f"{key}_bytes"]:
                    return {}
                if state.st_mtime_ns > written and sum_file(file) != entry[f"{key}_crc32"]:
                    return {}
    except (OSError, KeyError, TypeError, AttributeError):
        return {}
    return known


def sum_file(path: Path) -> str:
    """CRC-32 of a file's bytes, as `write_piece` notes it."""
    return f"{isal_zlib.crc32(path.read_bytes()):08x}"
