"""One case as it lies on disk: scan, masked volume, label map, reference and their names.

What apply_model.py wrote into `results/<case>/` is read here, for whoever shows or compares it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage as ndi
from nibabel.affines import apply_affine
from skimage.measure import find_contours

from data.boxes import find_bounding_box
from data.cases import find_scans, lay_on_grid, name_case, read_label_map, read_scan
from data.files import InputError, read_json
from data.labels import BACKGROUND, USUAL_LABELS, Labels, group_tumours, is_tumour
from data.masks import Masks, name_label, restore_label
from data.metrics import measure_nearest
from data.pictures import HU_WINDOW, TRUTH_COLOUR, choose_hu_window, class_colour
from data.volumes import AIR_HU, Volume

STAND_IN_HU = {"liver": 100, "tumour": 40}  # taken where there is no scan
SKIN_HU = -300  # between air and fat
MAX_LABELS = 32  # different values in a label map; a CT in uint8 has far more


@functools.lru_cache(maxsize=3)  # a scan, its label map, the reference: each is read once
def open_volume(path: Path) -> Volume:
    """The volume behind a path; its `.ras` is read once and kept."""
    return read_scan(path)


def is_label_map(array: np.ndarray) -> bool:
    """Whole numbers from 0 to 255, at most MAX_LABELS different ones."""
    if array.min() < 0 or array.max() > 255:
        return False
    small = array.astype(np.uint8, copy=False)
    if array.dtype.kind == "f" and not np.array_equal(small, array):
        return False
    return small.max() < MAX_LABELS or np.unique(small).size <= MAX_LABELS


@dataclass
class CaseFiles:
    """The files of one case, None where there is none; the rest is made when first asked for."""

    name: str
    scan: Path | None = None  # HU everywhere
    masked: Path | None = None  # HU in the organ, one value elsewhere
    label: Path | None = None
    truth: Path | Masks | None = None
    names: dict[str, int] = field(default_factory=lambda: name_usual_values())
    trust_grid: bool = False

    @property
    def grid(self) -> Volume:
        """The volume on whose grid all others of the case must lie."""
        return open_volume(self.masked or self.scan or self.label)

    @functools.cached_property
    def labels(self) -> Volume | None:
        """Label map (X, Y, Z) uint8 in RAS, from the masked volume where there is no other."""
        if self.label:
            return self.read_labels(self.label)
        if not self.masked:
            return None
        array = open_volume(self.masked).ras.data  # its corner lies outside every organ
        return open_volume(self.masked).ras.like((array != array[0, 0, 0]).astype(np.uint8))

    @functools.cached_property
    def reference(self) -> Volume:
        """The reference label map, uint8 in RAS, on the case's grid."""
        assert self.truth is not None  # only then is it asked for
        return self.read_labels(self.truth)

    def read_labels(self, path: Path | Masks) -> Volume:
        """A label map on the case's grid; of values without a name, only their number is asked."""
        named = {value: name for name, value in self.names.items()}
        declared: Labels = {named.get(value, f"label_{value}"): (value,) for value in range(1, 256)}
        try:
            grid = self.grid if self.masked or self.scan or self.label else open_volume(path)
            labels = read_label_map(
                path, grid, {BACKGROUND: (0,), **declared}, trust_grid=self.trust_grid
            ).ras
        except InputError as error:
            if error.kind != "values" or isinstance(path, tuple):
                raise
            raise refuse_scan(path, open_volume(path).ras.data) from error
        if isinstance(path, Path) and not is_label_map(labels.data):
            raise refuse_scan(path, labels.data)
        return labels.like(labels.data.astype(np.uint8, copy=False))

    def read_grey(self, path: Path) -> Volume:
        """A scan in RAS, once it is known to lie on the case's grid."""
        return lay_on_grid(open_volume(path).ras, self.grid, self.trust_grid)

    def read_shown(self) -> Volume:
        """What slices show: the scan, or the nearest to it that the case has."""
        path = self.scan or self.masked or self.label
        assert path is not None  # a case has one of them
        return self.read_grey(path)

    @functools.cached_property
    def classes(self) -> dict[str, int]:
        """Class → value, organs before their tumours; what has no name is called `label_N`."""
        return list_classes(self.labels, self.names)

    @functools.cached_property
    def members(self) -> dict[str, tuple[int, ...]]:
        """Class → values that belong to it: to an organ, those of its tumours too."""
        names, tumours = list(self.classes), group_tumours(list(self.classes))
        inside = {names[i - 1]: [names[t - 1] for t in some] for i, some in tumours.items()}
        return {
            name: tuple(self.classes[part] for part in (name, *inside.get(name, [])))
            for name in names
        }

    @functools.cached_property
    def colours(self) -> dict[str, str]:
        return {name: class_colour(index) for index, name in enumerate(self.classes, start=1)}

    @functools.cached_property
    def organ(self) -> Volume:
        """Label map cropped to its foreground: all that follows costs what the organ costs."""
        if self.labels is None:
            raise InputError(
                f"{self.scan}: this mode draws the organ and there is no label map; give one with "
                "--label, or choose --mode surface, rays or slices"
            )
        return crop_to_foreground(self.labels, self.label or self.masked)

    @functools.cached_property
    def organ_hu(self) -> Volume:
        """HU in the organ's box, AIR_HU outside the organ; STAND_IN_HU where there is no scan."""
        path, labels = self.masked or self.scan, self.organ.data
        assert self.labels is not None  # the organ was cut out of them
        if path is None:
            tumours = [value for name, value in self.classes.items() if is_tumour(name)]
            hu = np.where(np.isin(labels, tumours), STAND_IN_HU["tumour"], STAND_IN_HU["liver"])
        else:
            hu = self.read_grey(path).data[find_bounding_box(self.labels.data > 0)]
        return self.organ.like(np.where(labels > 0, hu, AIR_HU).astype(np.float32))


def refuse_scan(path: Path, array: np.ndarray) -> InputError:
    return InputError(
        f"{path}: must be a label map (whole numbers from 0 to 255, at most {MAX_LABELS} different "
        f"ones), got {array.dtype} values {array.min()} to {array.max()}; is this a scan?",
        kind="values",
    )


def name_usual_values() -> dict[str, int]:
    """Class → value where nothing describes a label map."""
    return {name: value for name, (value,) in USUAL_LABELS.items() if value}


def list_classes(labels: Volume | None, names: Mapping[str, int]) -> dict[str, int]:
    """Class → value of `names` and of what else a label map holds, organs before their tumours."""
    found = dict(names)
    if labels is not None:
        part = labels.data[find_bounding_box(labels.data > 0)]
        unnamed = sorted(set(np.unique(part).tolist()) - {0, *names.values()})
        found |= {f"label_{value}": value for value in unnamed}
    organs = [name for name in found if not is_tumour(name)]
    leading = list(found)[: list(found).index(organs[0])] if organs else []
    rest = [name for name in found if name not in (*leading, *organs[:1])]
    return {name: found[name] for name in (*organs[:1], *leading, *rest)}


def list_cases(path: Path, one_of_several: bool = False) -> list[Path]:
    """The cases that a path stands for: itself, or those in a folder of results or of scans.

    Raises InputError for a folder without any, unless it is `one_of_several` paths: then it is
    named when its turn comes.
    """
    if not path.is_dir() or any(path.glob("*_label.nii.gz")):
        return [path]
    if cases := sorted({file.parent for file in path.glob("*/*_label.nii.gz")}):
        return cases
    try:
        return find_scans(path)
    except InputError as error:
        if one_of_several:
            return [path]
        raise InputError(
            f"{error}, or the results of apply_model.py (<case>_label.nii.gz)"
        ) from error


def find_files(path: Path) -> CaseFiles:
    """The case that `path` stands for: a folder of apply_model.py, DICOM slices, or one file."""
    case = find_result(path) if path.is_dir() else None
    if case is None and path.name.endswith(("_masked.nii.gz", "_masked.nii")):
        case = CaseFiles(name_case(path), masked=path)
    if case is None:
        is_label = not path.is_dir() and is_label_map(open_volume(path).ras.data)
        files: dict[str, Any] = {"label" if is_label else "scan": path}
        case = CaseFiles(name_case(path), **files)
    return case


def find_result(folder: Path) -> CaseFiles | None:
    """The case that apply_model.py wrote into `folder`; None when it holds something else."""
    labels = sorted(folder.glob("*_label.nii.gz"))
    if not labels:
        return None
    if len(labels) > 1:
        raise InputError(f"{folder}: must hold one case, got {len(labels)} label maps; name a file")
    name = labels[0].name.removesuffix("_label.nii.gz")
    masked, record = folder / f"{name}_masked.nii.gz", folder / f"{name}.json"
    known = read_record(record) if record.exists() else {}
    files = {key: restore_label(known[key]) for key in ("image", "truth") if known.get(key)}
    for key in [key for key, path in files.items() if not is_there(path)]:
        print(f"{record}: its {key} {files.pop(key)} is not there any more; drawn without it")
    image = files.get("image")
    assert not isinstance(image, tuple)  # read_record lets no list pass
    case = CaseFiles(name, image, masked if masked.exists() else None, labels[0])
    case.truth, case.trust_grid = files.get("truth"), known.get("trust_image_grid") is True
    case.names = known.get("classes") or case.names
    return case


def read_record(path: Path) -> dict[str, Any]:
    """What apply_model.py noted about a case; what cannot be used is told and left out."""
    try:
        record = read_json(path, "the record that apply_model.py wrote")
        if not isinstance(record, dict):
            raise InputError(f"{path}: must be an object, got {type(record).__name__}")
    except InputError as error:
        print(f"{error}; drawn without it")
        return {}
    classes = record.get("classes") or {}
    truth = record.get("truth") or ""
    values = list(classes.values()) if isinstance(classes, dict) else [None]
    sound = {
        "image": isinstance(record.get("image") or "", str),
        "truth": isinstance(truth, str)
        or (isinstance(truth, list) and all(is_mask(part) for part in truth)),
        "classes": all(type(value) is int and 0 <= value <= 255 for value in values)
        and len(set(values)) == len(values),
    }
    for key in [key for key, good in sound.items() if not good]:
        print(f"{path}: its {key} cannot be used ({str(record.pop(key))[:60]}); drawn without it")
    if record.get("classes"):
        record["classes"] = {name: value for name, value in classes.items() if value}
    return record


def is_there(path: Path | Masks) -> bool:
    """Whether a file of a record, or each of its masks, still exists."""
    parts = [part for _, part in path] if isinstance(path, tuple) else [path]
    return all(os.path.exists(part) for part in parts)  # noqa: PTH110


def is_mask(part: Any) -> bool:
    """Whether a part of a truth in a record is the name and the path of a mask."""
    return isinstance(part, list) and [type(text) for text in part] == [str, str]


def crop_to_foreground(labels: Volume, path: Path | Masks | None) -> Volume:
    """`labels` around its foreground; InputError when there is none."""
    if not labels.data.any():
        raise InputError(
            f"{name_label(path)}: the label map is empty (no voxel above 0), so there is no organ "
            "to draw; look at the scan with --mode slices"
        )
    return labels.crop(find_bounding_box(labels.data > 0))


@dataclass(frozen=True)
class Outline:
    """What is outlined on slices: the voxels of a label map that have one of some values."""

    name: str
    colour: str
    labels: Volume
    values: tuple[int, ...]

    def find(self, axis: int, index: int) -> np.ndarray:
        flat = np.moveaxis(self.labels.data, axis, 0)[index]
        return np.isin(flat, self.values)


def list_outlines(case: CaseFiles) -> list[Outline]:
    """The reference in one colour, the predicted classes each in its own."""
    outlines = []
    if case.truth:
        values = tuple(list_classes(case.reference, {}).values())
        for some in (values, *((value,) for value in sorted(values)[1:])):
            outlines.append(Outline("reference", TRUTH_COLOUR, case.reference, some))
    if case.labels is not None:
        for name, values in case.members.items():
            outlines.append(Outline(name, case.colours[name], case.labels, values))
    return outlines


def measure_distance(points: np.ndarray, mask: Volume, surface: np.ndarray) -> np.ndarray:
    """Distance in mm of points (N, 3) to the nearest vertex of a mask's surface, < 0 inside it."""
    distance = measure_nearest(points, surface)
    index = apply_affine(np.linalg.inv(mask.affine), points).T
    inside = ndi.map_coordinates(mask.data.astype(np.float32), index, order=1) > 0.5
    return np.where(inside, -distance, distance)


def find_darkness(hu: Volume, mask: np.ndarray) -> np.ndarray:
    """How much darker than the organ's median (X, Y, Z) in HU, noise averaged away; 0 at its rim.

    The mean is taken over the organ's inner voxels only (normalised convolution, 1.5 mm), because
    the outermost ones hold some fat, and a dark rim would hide the tumours.
    """
    inner = ndi.binary_erosion(mask, iterations=2)
    sigma = 1.5 / np.array(hu.spacing_mm)
    weight = ndi.gaussian_filter(inner.astype(np.float32), sigma, truncate=2)
    darker = np.where(inner, np.median(hu.data[mask]) - hu.data, 0).astype(np.float32)
    total = ndi.gaussian_filter(darker, sigma, truncate=2)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0.05)


def find_hu_range(case: CaseFiles) -> tuple[tuple[float, float], str]:
    """Values that matter in the case's scan, and their unit: not every scan is a CT."""
    path = case.masked or case.scan
    if path is None:
        return HU_WINDOW, "HU"
    window = choose_hu_window(open_volume(path).ras.data)
    return window, "HU" if window == HU_WINDOW else "intensity"


def find_body(scan: Volume) -> Volume:
    """Mask of the body on a grid of about 3 mm, lungs and bowel filled, the table left out."""
    coarse = scan.crop([slice(None, None, max(1, round(3 / mm))) for mm in scan.spacing_mm])
    parts, count = ndi.label(ndi.binary_opening(coarse.data > SKIN_HU))
    body = parts == np.bincount(parts.ravel())[1:].argmax() + 1 if count else parts > 0
    body = np.stack([ndi.binary_fill_holes(level) for level in np.moveaxis(body, 2, 0)], axis=2)
    return coarse.like(body.astype(np.uint8))


def measure_class(mask: Volume, mesh: Any) -> dict:
    """Volume by voxels and by mesh, of connected parts (ml), surface (cm²), extent (mm)."""
    parts, _ = ndi.label(mask.data, np.ones((3, 3, 3)))
    sizes_ml = np.bincount(parts.ravel())[1:] * mask.voxel_ml
    return {
        "volume_ml": float(np.count_nonzero(mask.data) * mask.voxel_ml),
        "mesh_ml": mesh.volume() / 1000,
        "surface_cm2": mesh.area() / 100,
        "extent_mm": np.ptp(mesh.vertices, axis=0).tolist(),
        "parts_ml": sorted(sizes_ml.tolist(), reverse=True),
    }


def describe(name: str, mesh: Any) -> list[str]:
    """Lines of text with the measures of one class."""
    found = mesh.measures
    parts = found["parts_ml"]
    sizes = ", ".join(f"{ml:.1f}" for ml in parts[:5]) + (", …" if len(parts) > 5 else "")
    return [
        f"{name} {found['volume_ml']:.1f} ml, surface {found['surface_cm2']:.0f} cm²",
        "  R–L {:.0f} × A–P {:.0f} × I–S {:.0f} mm".format(*found["extent_mm"]),
        f"  mesh {found['mesh_ml']:.1f} ml, smoothing {mesh.smoothing_percent:+.2f} %",
    ] + ([f"  parts {len(parts)}: {sizes} ml"] if is_tumour(name) else [])


def name_direction(direction: np.ndarray) -> str:
    """Where a RAS vector points, strongest axis first: "R", "SA"; parts under 22.5° left out."""
    letters = np.where(np.asarray(direction) > 0, list("RAS"), list("LPI"))
    strong = np.abs(direction) > np.sin(np.pi / 8) * np.linalg.norm(direction)
    return "".join(letters[axis] for axis in np.argsort(-np.abs(direction)) if strong[axis])


def cut_slice(
    scan: Volume, outlines: list[Outline], axis: int, index: int, side: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, str]]]:
    """A slice as grey uint8 (rows, columns), its four corners, outlines with colours; RAS mm.

    Outlines lie half a voxel before the slice, on the `side` (1 or -1) from which it is seen.
    """
    array = np.moveaxis(scan.data, axis, 0)[index]
    across, up = array.shape

    def to_patient(points: np.ndarray, height: float) -> np.ndarray:
        return apply_affine(scan.affine, np.insert(points, axis, height, axis=1))

    low, high = choose_hu_window(scan.data)
    grey = ((array.T.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    corners = np.array([(0, 0), (across, 0), (across, up), (0, up)]) - 0.5
    lines = [
        (to_patient(line - 1, index + side / 2), outline.colour)
        for outline in outlines
        for line in find_contours(np.pad(outline.find(axis, index), 1).astype(float), 0.5)
    ]
    return grey, to_patient(corners, index), lines
