"""Small functions that several tests share; fixtures stand in conftest.py."""

from __future__ import annotations

import numpy as np

from data.volumes import Volume


def as_volume(array: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    """An array, masks too, with its affine; voxels of 1 mm along R, A, S where none is given."""
    array = array.astype(np.uint8) if array.dtype == bool else array
    return Volume(array, np.eye(4) if affine is None else affine)
