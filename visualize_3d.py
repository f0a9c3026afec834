"""See the liver: surfaces, ray casting, slices, comparison; every point in patient millimetres.

    python visualize_3d.py results/liver_3     # a window; keys 1-5 change the mode, h shows help
    python visualize_3d.py results             # all cases of a folder; key n opens the next
    python visualize_3d.py ct.nii.gz --label label.nii.gz --mode organs --screenshot liver.png

Volumes are brought to the nearest RAS axes and drawn through their whole affine (oblique and
sheared grids too): x grows to the patient's Right, y to Anterior, z to Superior. Pictures,
turntables, movies, meshes and the HTML page need no display.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from data.settings import Count, Whole, read_settings, run_script

Mode = Literal["surface", "rays", "organs", "slices", "compare"]
View = Literal["anterior", "posterior", "right", "left", "superior"]


@dataclass
class Config:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # results, results/<case>, label map or scan
    mode: Mode = "surface"  # the (first) picture
    projection: Literal["composite", "maximum"] = "composite"  # how rays add the voxels up
    view: View = "anterior"  # side of the patient that the viewer faces
    label: Path | None = None  # label map of the scan in `paths`
    truth: Path | None = None  # reference label map to compare with
    trust_image_grid: bool = False  # lay label maps on the scan voxel by voxel
    screenshot: Path | None = None  # .png to write
    turntable: Path | None = None  # one turn around the patient: .gif, or .mp4 (needs ffmpeg)
    movie: Path | None = None  # axial slices one after the other, outlined: .gif or .mp4
    mesh: Path | None = None  # surface of the organ in mm: .stl .ply .obj .vtp .glb
    mesh_space: Literal["LPS", "RAS"] = "LPS"  # axes of `mesh`; 3D Slicer takes files as LPS
    html: Path | None = None  # one self-contained page that turns in any browser, offline
    smoothing: Whole = 80  # iterations of the windowed sinc filter; 0 = bare marching cubes
    size: tuple[Count, Count] = (1200, 900)  # pixels of the window and of every picture


if __name__ == "__main__":  # help and mistakes are told before anything heavy is loaded
    CONFIG = read_settings(Config, __doc__, libraries=("vedo",))

import functools
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import scipy.ndimage as ndi
import vedo
from nibabel.affines import apply_affine, from_matvec
from PIL import Image
from skimage.measure import find_contours
from vedo import vtkclasses
from vtkmodules.vtkCommonDataModel import vtkMultiBlockDataSet
from vtkmodules.vtkIOGeometry import vtkGLTFWriter

from data.datasets import find_scans
from data.evaluate import measure_nearest
from data.files import InputError, atomic_write, read_json
from data.labels import (
    BACKGROUND,
    IMAGE,
    LABEL,
    PRED,
    USUAL_LABELS,
    Labels,
    group_tumours,
    index_classes,
    is_tumour,
)
from data.pictures import (
    HU_WINDOW,
    PLANES,
    TRUTH_COLOUR,
    add_legend,
    choose_hu_window,
    class_colour,
    find_busiest_slice,
    show_patient,
)
from data.scans import Masks, lay_on_grid, name_label, read_label_map, read_scan, restore_label
from data.settings import show_progress
from data.volumes import AIR_HU, Volume, find_bounding_box, name_case

STAND_IN_HU = {"liver": 100, "tumour": 40}  # taken where there is no scan
SKIN_HU = -300  # between air and fat
MAX_LABELS = 32  # different values in a label map; a CT in uint8 has far more


@functools.lru_cache(maxsize=3)  # a scan, its label map, the reference: each is read once
def open_volume(path: Path) -> Volume:
    """The volume behind a path; its `.ras` is read once and kept."""
    return read_scan(path)


def looks_like_labels(array: np.ndarray) -> bool:
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
        if isinstance(path, Path) and not looks_like_labels(labels.data):
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
        is_label = not path.is_dir() and looks_like_labels(open_volume(path).ras.data)
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
    known = read_result_record(record) if record.exists() else {}
    files = {key: restore_label(known[key]) for key in ("image", "truth") if known.get(key)}
    for key in [key for key, path in files.items() if not is_there(path)]:
        print(f"{record}: its {key} {files.pop(key)} is not there any more; drawn without it")
    image = files.get("image")
    assert not isinstance(image, tuple)  # read_result_record lets no list pass
    case = CaseFiles(name, image, masked if masked.exists() else None, labels[0])
    case.truth, case.trust_grid = files.get("truth"), known.get("trust_image_grid") is True
    case.names = known.get("classes") or case.names
    return case


def read_result_record(path: Path) -> dict[str, Any]:
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


def mask_body(scan: Volume) -> Volume:
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


MOVIE_MARGIN_MM = 15  # of a movie, beyond the first and the last slice of foreground
PAGE_COLOUR, PAGE_INK = "#14181d", "#f2f2f2"

# ---------------------------------------------------------------------------------------
# Movies
# ---------------------------------------------------------------------------------------


def draw_frames(case: CaseFiles, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Axial slices from feet to head, outlined: pictures (height, width, 3) of `size` pixels.

    Those around the foreground, all where there is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scan = case.read_shown()
    maps, names = list_maps(case)
    first, last = find_range(maps.values(), scan.shape[2], MOVIE_MARGIN_MM / scan.spacing_mm[2])
    hu_window = choose_hu_window(scan.data)
    figure = Figure((size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    if maps:
        add_legend(figure, names, LABEL in maps)
    for index in show_progress(range(first, last), desc="movie", unit="slice"):
        axes.clear()
        part = (slice(None), slice(None), slice(index, index + 1))
        data = {IMAGE: replace(scan, data=scan.data[part])} | {k: m[part] for k, m in maps.items()}
        title = f"{case.name} · axial slice {index + 1} of {scan.shape[2]}"
        show_patient(data, 0, axes=axes, names=names, hu_window=hu_window, title=title)
        canvas.draw()
        yield np.array(canvas.buffer_rgba())[..., :3]


def find_range(masks: Iterable[np.ndarray], depth: int, margin: float) -> tuple[int, int]:
    """(first, last) slice of `depth` that hold foreground, `margin` slices added at both ends."""
    filled = np.zeros(depth, bool)
    for mask in masks:
        filled |= mask.any(axis=(0, 1))
    if not filled.any():
        return 0, depth
    low, high = np.flatnonzero(filled)[[0, -1]]
    return max(0, int(low - margin)), min(depth, int(high + margin) + 1)


def list_maps(case: CaseFiles) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reference and prediction as class indices (X, Y, Z) under MONAI's keys; class names."""
    maps, names = {}, []
    for key, labels in ((LABEL, case.reference if case.truth else None), (PRED, case.labels)):
        if labels is not None:
            classes = list_classes(labels, case.names)
            maps[key] = index_classes(labels.data, as_tuples(classes))
            names = list(classes)  # the prediction's, where there are both
    return maps, names


def as_tuples(classes: Mapping[str, int]) -> Labels:
    """Class → value, as a data set declares its labels: background first, values in tuples."""
    return {BACKGROUND: (0,), **{name: (value,) for name, value in classes.items()}}


def write_frames(frames: Iterable[np.ndarray], path: Path, fps: int) -> None:
    """Pictures (height, width, 3) as an endless GIF or as MP4."""
    with atomic_write(path) as temporary:
        if path.suffix == ".gif":
            rare = Image.Quantize.MAXCOVERAGE  # keeps thin outlines' colours beside many greys
            images = (Image.fromarray(frame).quantize(256, rare) for frame in frames)
            timing: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0}
            next(images).save(temporary, save_all=True, append_images=images, **timing)
        else:
            encode_frames(iter(frames), temporary, fps)


def encode_frames(frames: Iterator[np.ndarray], path: Path, fps: int) -> None:
    """Let ffmpeg make a movie of pictures; OSError with its last words when it cannot."""
    frame = next(frames)
    command = "ffmpeg -loglevel error -y -f rawvideo -pix_fmt rgb24"
    command += f" -s {frame.shape[1]}x{frame.shape[0]} -r {fps} -i -"
    command += " -vf crop=trunc(iw/2)*2:trunc(ih/2)*2 -pix_fmt yuv420p"
    with subprocess.Popen(
        [*command.split(), path], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None  # a pipe
        try:
            process.stdin.write(frame.tobytes())
            for frame in frames:
                process.stdin.write(frame.tobytes())
        except BrokenPipeError:
            pass  # ffmpeg has ended; its words say why
        _, words = process.communicate()
    if process.returncode:
        raise OSError(f"ffmpeg: {words.decode(errors='replace').strip()[-200:]}")


# ---------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------


def check_mesh(path: Path, points: int, faces: int) -> None:
    """OSError unless a mesh is whole in its file: VTK's writers say nothing when the disk is full.

    Nothing of VTK reads it: its readers crash at some torn files.
    """
    content = path.read_bytes() if path.exists() else b""
    size = len(content)
    if path.suffix == ".stl":  # a header, and 50 bytes a face
        whole = size == 84 + 50 * faces
    elif path.suffix == ".ply":  # its header names what a point has; a face takes 13 bytes
        header, end, _ = content.partition(b"end_header\n")
        floats, small = (header.count(b"property " + kind) for kind in (b"float", b"uchar"))
        whole = size == len(header + end) + points * (4 * floats + small) + faces * 13
    elif path.suffix == ".glb":  # its third number is its length; indices and points in 4 bytes
        whole = int.from_bytes(content[8:12], "little") == size > 12 * (points + faces)
    elif path.suffix == ".obj":
        whole = content.count(b"\nf ") == faces and content.endswith(b"\n")
    else:
        whole = (
            content.rstrip().endswith(b"</VTKFile>") and b'NumberOfPolys="%d"' % faces in content
        )
    if not whole:
        raise OSError(f"the mesh of {points} points and {faces} faces is torn: {size} bytes")


# ---------------------------------------------------------------------------------------
# A page that turns in any browser
# ---------------------------------------------------------------------------------------

Surface = tuple[
    np.ndarray, np.ndarray, str, float
]  # points (N, 3) mm, faces (M, 3), colour, opacity
Views = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # where the viewer stands, what is up


def write_page(
    surfaces: Mapping[str, Surface],
    texts: tuple[str, Sequence[str]],
    views: Views,
    view: str,
    path: Path,
) -> None:
    """Surfaces with legend, letters, axes, views and `texts` (title, lines), all in one file."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, (points, faces, colour, opacity) in surfaces.items():
        x, y, z = points.round(2).T
        i, j, k = faces.T
        look = {"color": colour, "opacity": opacity, "name": name, "showlegend": True}
        figure.add_mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, **look)
    x, y, z = place_letters(np.concatenate([points for points, *_ in surfaces.values()])).T
    figure.add_scatter3d(
        x=x, y=y, z=z, text=list("LRPAIS"), mode="text", showlegend=False, hoverinfo="skip",
        textfont={"color": PAGE_INK, "size": 20},
    )  # fmt: skip
    figure.update_layout(**lay_out_page(texts, views, view))
    body = figure.to_html(full_html=False, include_plotlyjs=True, default_height="100vh")
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Liver in 3D</title>'
        "<style>html, body {margin: 0; height: 100%; overflow: hidden; "
        f"background: {PAGE_COLOUR}}}</style></head><body>{body}</body></html>"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def place_letters(points: np.ndarray) -> np.ndarray:
    """Where L R P A I S stand: (6, 3) mm, at the middle of each side of the points' box."""
    low, high = points.min(axis=0), points.max(axis=0)
    middle, half = (low + high) / 2, 0.56 * (high - low)
    return np.array([middle + side * half * axis for axis in np.eye(3) for side in (-1, 1)])


def lay_out_page(texts: tuple[str, Sequence[str]], views: Views, view: str) -> dict[str, Any]:
    """Title, axes, measurements and buttons for the views, as plotly wants them."""
    axes = {
        f"{axis}axis": {"title": f"mm to {end}", "color": PAGE_INK, "backgroundcolor": PAGE_COLOUR}
        for axis, end in zip("xyz", ("Right (R)", "Anterior (A)", "Superior (S)"), strict=True)
    }
    cameras = {
        name: {
            "eye": dict(zip("xyz", (1.9 * np.array(place)).tolist(), strict=True)),
            "up": dict(zip("xyz", up, strict=True)),
        }
        for name, (place, up) in views.items()
    }
    buttons = [
        {"label": name, "method": "relayout", "args": [{"scene.camera": camera}]}
        for name, camera in cameras.items()
    ]
    corner = {"xanchor": "left", "x": 0.01}
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "showactive": False}
    menu |= {"y": 0.01, "yanchor": "bottom", "bgcolor": PAGE_INK, "font": {"color": PAGE_COLOUR}}
    note = {
        "text": "<br>".join(texts[1]),
        "align": "left",
        "showarrow": False,
        "font": {"size": 14},
    }
    note |= {"y": 0.99, "yanchor": "top", "xref": "paper", "yref": "paper"}
    return {
        "title": {"text": texts[0], "x": 0.01, "y": 0.985, "yanchor": "top"},
        "margin": {"l": 0, "r": 0, "t": 50, "b": 0},
        "template": "plotly_dark",
        "paper_bgcolor": PAGE_COLOUR,
        "font": {"color": PAGE_INK},
        "legend": {"font": {"size": 16}, "x": 0.99, "xanchor": "right", "y": 0.99},
        "scene": {
            "aspectmode": "data",
            "camera": cameras[view],
            "domain": {"x": (0.15, 1)},
            **axes,
        },
        "updatemenus": [menu | corner],
        "annotations": [note | corner],
    }


BACKGROUND_COLOUR, INK, BONE = "#14181d", "#f2f2f2", "#e9dcc3"
DARK_TISSUE = "#b7d7c9"  # what is darker than the organ and nobody named: no class has this colour
PASS_BANDS = (0.002, 0.01, 0.05)  # of the windowed sinc: waves under 100, 45, 20 edges go
TURN_FRAMES, TURN_FPS, MOVIE_FPS = 60, 12, 8
HTML_TRIANGLES = 60_000  # per surface: a few MB, and it turns smoothly on a laptop
HELP_BAND = 0.09  # of the window's height, below the panels, while help is shown
VIEWS: dict[str, tuple[Any, Any]] = {  # where the viewer stands, and what is up: RAS vectors
    "anterior": ((0, 1, 0), (0, 0, 1)),
    "posterior": ((0, -1, 0), (0, 0, 1)),
    "right": ((1, 0, 0), (0, 0, 1)),
    "left": ((-1, 0, 0), (0, 0, 1)),
    "superior": ((0, 0, 1), (0, 1, 0)),
}


def main(config: Config) -> None:
    outputs = list_outputs(config)
    paths = [case for path in config.paths for case in list_cases(path, len(config.paths) > 1)]
    if not outputs:
        open_window(paths, config)
        return
    names = Counter(name_case(Path(os.path.abspath(path))) for path in paths)  # noqa: PTH100
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"two cases are called {twice[0]}: draw them one after the other")
    failed = []
    for path in paths:
        try:
            write_outputs(path, config, outputs, several=len(paths) > 1)
        except Exception as error:  # whatever it is: the other cases are drawn
            if len(paths) == 1:
                raise
            failed.append(path)
            print(f"error: {path}: {str(error) or type(error).__name__}", file=sys.stderr)
    if failed:
        told = ", ".join(map(str, failed))
        raise InputError(f"{len(failed)} of {len(paths)} cases failed: {told}")


def write_outputs(
    path: Path, config: Config, outputs: list[tuple[Path, Callable]], several: bool
) -> None:
    """Every file that is asked for of one case; of several, its name goes into the files' names."""
    case = find_case(path, config)
    print(case.name, *case.report(), sep="\n  ")
    for target, write_output in outputs:
        if several:
            target = target.with_name(f"{target.stem}_{case.name}{target.suffix}")
        write_output(case, config, target)
        print(f"  wrote {target}")


def list_outputs(config: Config) -> list[tuple[Path, Callable]]:
    """(path, function) of every output that is asked for; InputError before anything is read."""
    if not config.paths:
        raise InputError(
            "nothing to draw: give results/<case> or results (of apply_model.py), a label map, a "
            "masked volume, a scan or a DICOM folder"
        )
    chosen = []
    for option, (writer, suffixes) in OUTPUTS.items():
        path = getattr(config, option)
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise InputError(f"--{option} {path}: must end in {', '.join(suffixes)}")
        if path.suffix == ".mp4" and not shutil.which("ffmpeg"):
            raise InputError(f"--{option} {path}: needs ffmpeg; install it, or write a .gif")
        chosen.append((path, writer))
    return chosen


# ---------------------------------------------------------------------------------------
# Input: what belongs to a case, read only when a picture needs it
# ---------------------------------------------------------------------------------------


@dataclass
class Case(CaseFiles):
    """One case with its surfaces, which are made when first asked for."""

    smoothing: int = 80

    @functools.cached_property
    def meshes(self) -> dict[str, vedo.Mesh]:
        """Class → smooth surface in patient mm, with its `measures`; an organ first."""
        meshes = {}
        for name, values in self.members.items():
            mask = self.organ.like(np.isin(self.organ.data, values).astype(np.uint8))
            if mask.data.any():
                mesh = smooth_surface(make_surface(mask), self.smoothing)
                mesh.measures = measure_class(mask, mesh)
                meshes[name] = mesh.color(self.colours[name])
        return meshes

    def report(self) -> list[str]:
        """The measurements as lines of text, for the terminal and for the picture."""
        if self.labels is None or not self.labels.data.any():
            return ["no label map" if self.labels is None else "the label map is empty"]
        lines = [line for name, mesh in self.meshes.items() for line in describe(name, mesh)]
        if min(self.organ.shape) < 3:
            lines += [f"only {min(self.organ.shape)} slice(s) of organ: its surface is a slab"]
        if not (self.masked or self.scan):
            words = "no scan: liver drawn as {liver} HU, tumours as {tumour} HU"
            lines += [words.format(**STAND_IN_HU)]
        return lines


def find_case(path: Path, config: Config) -> Case:
    """The case that `path` stands for, with what the settings add to it."""
    case = Case(**vars(find_files(path)), smoothing=config.smoothing)
    if config.label is not None:
        if case.scan is None or len(config.paths) != 1:
            raise InputError(f"--label {config.label}: needs one scan beside it, got {path}")
        case.label = config.label
    case.truth = config.truth or case.truth
    case.trust_grid = case.trust_grid or config.trust_image_grid
    return case


# ---------------------------------------------------------------------------------------
# Geometry: volumes in, surfaces and numbers in patient millimetres (RAS) out
# ---------------------------------------------------------------------------------------


class PatientVolume(vedo.Volume):
    """A volume that is drawn, and gives surfaces, where its affine puts it in the patient.

    vedo knows an origin and a spacing only. One voxel of `outside` is laid around the voxels, so
    that surfaces close at the border.
    """

    transfer: tuple | None = None  # colours, opacities per mm (composite) and per ray (maximum)
    strength = 1.0  # that opacities are multiplied with

    def __init__(self, volume: Volume, outside: float = 0) -> None:
        size = volume.spacing_mm  # as spacing, so that opacities count per mm
        super().__init__(np.pad(volume.data, 1, constant_values=outside), spacing=size)
        self.to_patient = volume.affine @ from_matvec(np.diag(1 / np.array(size)), [-1, -1, -1])
        matrix = vtkclasses.vtkMatrix4x4()
        matrix.DeepCopy(self.to_patient.ravel().tolist())
        self.actor.SetUserMatrix(matrix)

    def isosurface(self, value: float | None = None, flying_edges: bool = True) -> vedo.Mesh:
        """Marching cubes (VTK's flying edges) in patient mm, faces turned outwards."""
        mesh = super().isosurface(value, flying_edges=True).apply_transform(self.to_patient)
        if np.linalg.det(self.to_patient[:3, :3]) < 0:
            mesh.reverse()
        return mesh

    def mode(self, mode: int | None = None) -> PatientVolume | int:
        """0 composite, 1 maximum projection: each with the opacities that suit it."""
        if mode is not None and self.transfer:
            self.color(self.transfer[0]).shade(False)
            opacity = self.properties.GetScalarOpacity()
            opacity.RemoveAllPoints()  # vedo's alpha() would give the last value to the data's end
            for value, alpha in self.transfer[1 + mode]:
                opacity.AddPoint(value, min(1.0, alpha * self.strength))
        return super().mode(mode)


def make_surface(mask: Volume) -> vedo.Mesh:
    """Closed surface of a mask (0 and 1), half a voxel beyond its outer voxel centres."""
    return PatientVolume(mask).isosurface(0.5)


def smooth_surface(mesh: vedo.Mesh, iterations: int) -> vedo.Mesh:
    """Windowed sinc filter (Taubin et al. 1996): takes the slice steps away, not the volume.

    Of the pass bands the smoothest is taken that keeps the volume within 1 %, else none: a lesion
    of a few voxels is all step. The change is left in `mesh.smoothing_percent`.
    """
    for name in list(mesh.pointdata.keys()):  # normals of the steps would shade the smooth surface
        mesh.pointdata.remove(name)
    change, bare_mm3 = 0.0, mesh.volume()
    for pass_band in PASS_BANDS if iterations and mesh.npoints else ():
        smoothed = mesh.clone().smooth(iterations, pass_band, feature_angle=180)
        percent = 100 * (smoothed.volume() / bare_mm3 - 1)
        if abs(percent) < 1:
            mesh, change = smoothed, percent
            break
    mesh.lighting(ambient=0.35, diffuse=0.75, specular=0.1, specular_power=15)
    mesh.compute_normals(cells=False, consistency=False).smoothing_percent = change
    return mesh


def make_skin(scan: Volume) -> vedo.Mesh:
    """The body's outside, smooth."""
    return smooth_surface(make_surface(mask_body(scan)), 50).color(BONE)


# ---------------------------------------------------------------------------------------
# Scenes: one function per mode makes the panels, which a window or a picture then shows
# ---------------------------------------------------------------------------------------

WHOLE = (0, 0, 1, 1)  # left, bottom, right, top of a panel, in parts of the window
UPRIGHT = ((0.93, 0.62), (0.93, 0.92))  # ends of a slider, above the letter at the right edge


@dataclass
class Slider:
    """A number that the viewer may change."""

    title: str  # with its unit
    low: float
    high: float
    value: float
    ends: tuple[tuple[float, float], tuple[float, float]]  # in parts of the window
    change: Callable[[float], None]
    delayed: bool = False  # change only once it is let go
    text: str = "%.0f"  # how the value is written


@dataclass
class Scene:
    """What one mode shows: panels, whose actors stay as they are while another mode is shown."""

    panels: list[Any]  # vtkRenderer each
    legend: dict[str, str]  # what is shown → its colour
    boxes: tuple[tuple[float, float, float, float], ...] = (WHOLE,)
    space: int = 0  # the panel in 3D: views turn it, and the words stand in it
    sliders: list[Slider] = field(default_factory=list)
    brief: bool = True  # room for few words only


def make_panel(*objects: vedo.CommonVisual, peel: bool = True) -> Any:
    """A renderer of vedo's objects; `peel`: translucent surfaces are put in the right order."""
    panel = vtkclasses.vtkRenderer()
    panel.SetBackground(vedo.get_color(BACKGROUND_COLOUR))
    panel.SetUseDepthPeeling(peel)
    panel.SetUseFXAA(True)
    for shown in objects:
        panel.AddViewProp(shown.actor)
    return panel


def make_hu_volume(case: Case) -> tuple[PatientVolume, int, tuple[int, int], str]:
    """HU of the organ, or of a bare scan; a first isovalue, the range of isovalues, a unit."""
    (low, high), unit = find_hu_range(case)
    if case.labels is None:  # every second voxel where the scan is large
        scan = open_volume(case.scan).ras
        volume = scan.crop([slice(None, None, -(-n // 256)) for n in scan.shape])
        low, high = (-500, 1000) if unit == "HU" else (low, high)
    else:
        volume = case.organ_hu
    low = int(low)
    high = max(int(min(high, volume.data.max())), low + 10)
    array = volume.data.clip(low, high).astype(np.float32)
    if case.labels is None and unit == "HU":
        first = 200  # bone
    else:  # half-way into the organ
        first = (low + np.median(array[array > low])) / 2 if (array > low).any() else low + 5
    drawn = PatientVolume(volume.like(array), low)
    return drawn, int(min(max(first, low + 1), high - 1)), (low, high), unit


class Isosurfaces:
    """Surfaces of one volume at whole isovalues, each made once."""

    def __init__(self, volume: PatientVolume, colour: str, smoothing: int) -> None:
        self.volume, self.colour, self.smoothing = volume, colour, smoothing
        self.made: dict[int, vedo.Mesh] = {}

    def make(self, value: float) -> vedo.Mesh:
        value = round(value)
        if value not in self.made:
            mesh = smooth_surface(self.volume.isosurface(value), self.smoothing)
            self.made[value] = mesh.color(self.colour)
        return self.made[value]


def make_surface_scene(case: Case, config: Config) -> Scene:
    """Marching cubes with a slider for the isovalue."""
    volume, first, (low, high), unit = make_hu_volume(case)
    bare = case.labels is None
    colour = BONE if bare else class_colour(1)
    surfaces = Isosurfaces(volume, colour, config.smoothing)
    panel, shown = make_panel(surfaces.make(first)), [surfaces.make(first)]

    def change(value: float) -> None:
        panel.RemoveViewProp(shown[0].actor)
        shown[0] = surfaces.make(value)
        panel.AddViewProp(shown[0].actor)

    legend = {f"{'bone and vessels' if bare else 'organ'} above the slider's value": colour}
    slider = Slider(f"surface at {unit}", low + 1, high - 1, first, UPRIGHT, change, True)
    return Scene([panel], legend, sliders=[slider], brief=False)


def make_rays_volume(case: Case) -> tuple[PatientVolume, dict[str, str]]:
    """Volume and transfer function in which tumours show inside the organ, and their legend.

    The scalar is how much darker a voxel is than the organ's median: the way from the organ to the
    outside leads through the values of bright vessels, which hardly show. Only voxels that the
    label map calls a tumour have the tumour's colour; they lie above all others, at 300. Without
    any, what is dark shows in a colour of no class. A bare scan shows its bones.
    """
    if case.labels is None:
        volume = make_hu_volume(case)[0]
        volume.transfer = (
            [(-200, "#b5651d"), (100, "#c0504d"), (250, BONE), (600, "white")],
            [(-500, 0), (100, 0), (180, 0.02), (300, 0.2), (600, 0.5)],
            [(-500, 0), (0, 0), (100, 0.2), (600, 1)],
        )
        return volume, {"bone, over 250 HU": BONE, "vessels and organs, 100 to 250 HU": "#c0504d"}
    hu, labels = case.organ_hu, case.organ.data
    darker = np.where(labels > 0, find_darkness(hu, labels > 0).clip(-150, 150), -150)
    organ = next((name for name in case.classes if not is_tumour(name)), "organ")
    liver, legend = class_colour(1), {organ: class_colour(1)}
    tumours = {n: v for n, v in case.classes.items() if is_tumour(n) and np.any(labels == v)}
    if tumours:
        legend |= {name: case.colours[name] for name in tumours}
        dark = case.colours[next(iter(tumours))]
        darker[np.isin(labels, list(tumours.values()))] = 300
        steps, opacities = (160, 220), [(150, 0.01), (200, 0.03), (300, 0.2)]
        projected = [(15, 0.3), (150, 0.3), (300, 0.95)]
    else:
        dark, legend = DARK_TISSUE, legend | {"over 30 HU darker than it": DARK_TISSUE}
        steps, opacities = (15, 30), [(15, 0.01), (30, 0.1), (80, 0.2)]
        projected = [(15, 0.3), (30, 0.6), (60, 0.95)]
    volume = PatientVolume(hu.like(darker.astype(np.float32)), -150)
    volume.transfer = (
        [(-80, "white"), (-20, liver), (steps[0], liver), (steps[1], dark), (300, dark)],
        [(-150, 0), (-80, 0.01), (-20, 0.01), *opacities],
        [(-150, 0), (-20, 0.2), *projected],
    )
    return volume, legend


def make_rays_scene(case: Case, config: Config) -> Scene:
    """Ray casting of the volume."""
    volume, legend = make_rays_volume(case)
    projection = int(config.projection == "maximum")
    if sys.platform != "darwin" and not os.environ.get("DISPLAY"):
        volume.mapper.SetRequestedRenderModeToRayCast()  # 2.5 times as fast as OpenGL on a CPU

    def change(value: float) -> None:
        volume.strength = value
        volume.mode(projection)

    slider = Slider("opacity ×", 0.2, 4, 1, UPRIGHT, change, text="%.1f")
    panel = make_panel(volume.mode(projection), peel=False)
    return Scene([panel], legend, sliders=[slider], brief=False)


def make_organs_scene(case: Case, config: Config) -> Scene:
    """Every class as a smooth surface: organs translucent, tumours solid, the skin faint."""
    meshes = list_scene_meshes(case)
    panel = make_panel(*(mesh.clone().alpha(alpha) for mesh, alpha in meshes.values()))
    colours = {name: vedo.colors.rgb2hex(mesh.color()) for name, (mesh, _) in meshes.items()}
    return Scene([panel], colours, brief=False)


def list_scene_meshes(case: Case) -> dict[str, tuple[vedo.Mesh, float]]:
    """Name → surface and its opacity."""
    first = next(iter(case.meshes))
    meshes = {
        name: (mesh, 0.35 if name == first and not is_tumour(name) else 1.0)
        for name, mesh in case.meshes.items()
    }
    if case.scan:
        meshes["skin"] = make_skin(case.read_grey(case.scan)), 0.1
    return meshes


PANELS = {"axial": (0, 0.5, 0.5, 1), "coronal": (0.5, 0.5, 1, 1), "sagittal": (0.5, 0, 1, 0.5)}
SPACE_BOX = (0, 0, 0.5, 0.5)
SLICE_SIDES = {"axial": -1, "coronal": 1, "sagittal": -1}  # seen from below, the front, the left


def draw_slice(scan: Volume, outlines: list[Outline], plane: str, index: int) -> list:
    """One CT slice as a grey rectangle with outlines, in patient mm."""
    grey, corners, lines = cut_slice(scan, outlines, PLANES[plane][0], index, SLICE_SIDES[plane])
    sheet = vedo.Mesh([corners, [[0, 1, 2, 3]]]).lighting("off").color("white")
    sheet.texture(vedo.Image(grey), tcoords=[(0, 0), (1, 0), (1, 1), (0, 1)])
    return [sheet, *(vedo.Line(points, c=colour, lw=2) for points, colour in lines)]


def make_slices_scene(case: Case, config: Config) -> Scene:
    """Axial, coronal and sagittal CT slice in radiological view with sliders, and all in 3D."""
    scan = case.read_shown()
    outlines = list_outlines(case)
    foreground = np.zeros(scan.shape, bool)
    for labels in {id(outline.labels): outline.labels for outline in outlines}.values():
        foreground |= labels.data > 0
    space = make_panel(
        *(case.meshes.values() if case.labels is not None and foreground.any() else ())
    )
    panels, sliders = {plane: make_panel() for plane in PANELS}, []
    shown: dict[str, list] = {plane: [] for plane in PANELS}

    def show(plane: str, index: int) -> None:
        for panel in (panels[plane], space):
            for old in shown[plane]:
                panel.RemoveViewProp(old.actor)
        shown[plane] = draw_slice(scan, outlines, plane, index)
        for panel in (panels[plane], space):
            for new in shown[plane]:
                panel.AddViewProp(new.actor)

    for plane, (axis, _) in PLANES.items():
        index = find_busiest_slice(foreground, axis)
        show(plane, index)
        face_slice(panels[plane], scan, plane, config.size)
        left, bottom = PANELS[plane][:2]
        height = HELP_BAND + 0.06 + bottom * (1 - HELP_BAND)
        sliders.append(
            Slider(
                f"{plane} slice, {scan.spacing_mm[axis]:.3g} mm", 1, scan.shape[axis], index + 1,
                ((left + 0.04, height), (left + 0.16, height)),
                lambda value, plane=plane: show(plane, round(value) - 1),  # type: ignore[misc]  # mypy types no lambda with a default
            )
        )  # fmt: skip
    legend = {outline.name: outline.colour for outline in outlines}
    boxes = (*PANELS.values(), SPACE_BOX)
    return Scene([*panels.values(), space], legend, boxes, 3, sliders)


def face_slice(panel: Any, scan: Volume, plane: str, size: tuple[int, int]) -> None:
    """Camera at right angles to the slices of a plane, which fill a panel of `size`'s shape."""
    axis = PLANES[plane][0]
    across, up = np.delete(scan.affine[:3, :3], axis, axis=1).T
    width, height = (
        np.linalg.norm(step) * count
        for step, count in zip((across, up), np.delete(scan.shape, axis), strict=True)
    )
    normal = np.cross(across, up)
    side = SLICE_SIDES[plane] * np.sign(normal @ scan.affine[:3, axis])
    place_camera(panel, side * normal / np.linalg.norm(normal), up)
    camera = panel.GetActiveCamera()
    camera.SetParallelProjection(True)
    camera.SetParallelScale(0.55 * max(height, width * size[1] / size[0]))


def make_compare_scene(case: Case, config: Config) -> Scene:
    """The reference, and beside it the prediction coloured by its distance from the reference."""
    if case.truth is None:
        raise InputError(f"{case.name}: to compare, give the reference label map with --truth")
    truth = crop_to_foreground(case.reference, case.truth)
    name, mesh = next((name, mesh.clone()) for name, mesh in case.meshes.items())
    several = sum(not is_tumour(other) for other in case.classes) > 1
    # the same organ of both; where there is one organ only, all that is foreground
    mask = np.isin(truth.data, case.members[name]) if several else truth.data > 0
    truth = truth.like(mask.astype(np.uint8))
    if not mask.any():
        told = name_label(case.truth)
        raise InputError(f"{told}: holds no {name} to compare with; give its label map")
    reference = smooth_surface(make_surface(truth), config.smoothing).color(TRUTH_COLOUR)
    distance = measure_distance(mesh.vertices, truth, reference.vertices)
    far = np.abs(distance)
    limit = max(1.0, float(np.ceil(np.percentile(far, 99))))
    mesh.cmap("PuOr_r", distance, vmin=-limit, vmax=limit)
    mesh.add_scalarbar(
        "mm outside (+) or inside (-) the reference", ((0.15, 0.15), (0.85, 0.24)),
        horizontal=True, font_size=round(config.size[0] / 70), c=INK,
    )  # fmt: skip
    panels = [make_panel(reference), make_panel(mesh)]
    panels[1].AddViewProp(mesh.scalarbar)
    panels[1].SetActiveCamera(panels[0].GetActiveCamera())
    text = "{}, mm from the reference:\nmean {:.1f}, 95 % under {:.1f}, largest {:.1f}"
    caption = text.format(f"predicted {name}", far.mean(), np.percentile(far, 95), far.max())
    for panel, words in zip(panels, (f"reference {name}", caption), strict=True):
        panel.AddViewProp(make_text(config, words, (0.5, 0.125), INK, "top-center").actor)
    legend = {"reference": TRUTH_COLOUR, "predicted, outside the reference": "#f1a340"}
    legend["predicted, inside the reference"] = "#b2abd2"
    return Scene(panels, legend, ((0, 0, 0.5, 1), (0.5, 0, 1, 1)))


SCENES: dict[Mode, Callable[[Case, Config], Scene]] = {
    "surface": make_surface_scene,
    "rays": make_rays_scene,
    "organs": make_organs_scene,
    "slices": make_slices_scene,
    "compare": make_compare_scene,
}


def make_scene(case: Case, config: Config) -> Scene:
    """The scene of `config.mode`, with its view, directions and measurements; not rendered yet."""
    scene = SCENES[config.mode](case, config)
    turn_view(scene, config)
    mode = config.mode + (f", {config.projection}" if config.mode == "rays" else "")
    report = [line for line in case.report() if not line.startswith("  mesh")]
    if scene.brief:
        report = [line.partition(",")[0] for line in report if not line.startswith(" ")]
    write_words(scene, config, [f"{case.name} · {mode}", *report])
    for panel in scene.panels:
        mark_directions(panel, config, 1.3 if len(scene.panels) < 3 else 1.0)
    return scene


def turn_view(scene: Scene, config: Config) -> None:
    """Show the side of the patient that `config.view` names, in the panel in 3D."""
    left, bottom, right, top = scene.boxes[scene.space]
    aspect = (right - left) * config.size[0] / ((top - bottom) * config.size[1])
    panel = scene.panels[scene.space]
    place_camera(panel, *VIEWS[config.view], aspect)
    if config.mode == "slices":  # seen exactly from one side, two of the slices would be lines
        panel.GetActiveCamera().Azimuth(25)
        panel.GetActiveCamera().Elevation(25)
    panel.ResetCameraClippingRange()


def place_camera(panel: Any, side: np.ndarray, up: np.ndarray, aspect: float = 1.0) -> None:
    """Put the camera on one side of what a panel of width / height `aspect` shows: all of it."""
    low, high = np.reshape(panel.ComputeVisiblePropBounds(), (3, 2)).T
    camera, middle = panel.GetActiveCamera(), (low + high) / 2
    radius = np.linalg.norm(high - low) / 2  # of a sphere around it; a liver is flatter
    distance = radius / np.sin(np.radians(15)) / 1.3 / min(1, aspect)
    camera.SetViewAngle(30)
    camera.SetFocalPoint(*middle)
    camera.SetPosition(*(middle + distance * np.array(side)))
    camera.SetViewUp(*up)
    panel.ResetCameraClippingRange()


def make_text(
    config: Config, text: str, place: tuple, colour: str, justify: str, size: float = 0.85
) -> vedo.Text2D:
    """Text at a place (0..1) of a panel, its size going with the window's."""
    size *= config.size[0] / 1200
    return vedo.Text2D(
        text, place, size, BACKGROUND_COLOUR, c=colour, alpha=0.6, justify=justify, font="Calco"
    )


def write_words(scene: Scene, config: Config, lines: list[str]) -> None:
    """Title, measurements and legend at the top left of the panel in 3D, one below the other."""
    legend = [f"— {name}" for name in scene.legend]
    width = max(map(len, [*lines, *legend]))
    blocks = [("\n".join([*lines, *(" " * width for _ in legend)]), INK)]
    for number, (line, colour) in enumerate(zip(legend, scene.legend.values(), strict=True)):
        blocks.append(("\n" * (len(lines) + number) + line, colour))
    for number, (text, colour) in enumerate(blocks):
        words = make_text(config, text, (0.01, 0.99), colour, "top-left")
        if number:
            words.background(None)
        scene.panels[scene.space].AddViewProp(words.actor)


def mark_directions(panel: Any, config: Config, size: float) -> None:
    """Letters R L A P S I at a panel's edges, right again before every rendering."""
    places = (0.03, 0.5), (0.97, 0.5), (0.5, 0.965), (0.5, 0.035)
    texts = [make_text(config, "", place, INK, "center", size) for place in places]
    for text in texts:
        panel.AddViewProp(text.actor)

    def update(*_) -> None:
        camera = panel.GetActiveCamera()
        forward = np.array(camera.GetDirectionOfProjection())
        right = np.cross(forward, camera.GetViewUp())
        up = np.cross(right, forward)
        for text, direction in zip(texts, (-right, right, up, -up), strict=True):
            text.text(name_direction(direction))

    panel.AddObserver("StartEvent", update)


# ---------------------------------------------------------------------------------------
# The window, and pictures of it
# ---------------------------------------------------------------------------------------


def view_options(config: Config, offscreen: bool) -> dict:
    """What vedo needs to know of a window or a picture."""
    options = {"size": config.size, "bg": BACKGROUND_COLOUR, "title": "Liver in 3D"}
    return options | {"offscreen": offscreen}


class Stage:
    """One window (or picture): panels of one scene below, help and sliders in a layer above."""

    def __init__(self, config: Config, offscreen: bool) -> None:
        vedo.settings.enable_default_keyboard_callbacks = False  # ours are shown on screen
        vedo.settings.multi_samples = 0  # as depth peeling wants it
        logger = vtkclasses.get_class("Logger")
        logger.SetStderrVerbosity(logger.VERBOSITY_ERROR)  # no display is no reason to warn
        self.config, self.offscreen = config, offscreen
        self.plotter = vedo.Plotter(**view_options(config, offscreen))
        self.overlay = self.plotter.renderer
        self.plotter.window.SetNumberOfLayers(2)
        self.overlay.SetLayer(1)
        self.overlay.InteractiveOff()  # the mouse turns the panels below
        self.scene: Scene | None = None
        ground = make_panel()  # behind the help, where there is no panel
        ground.InteractiveOff()
        self.plotter.window.AddRenderer(ground)
        self.widgets: list[vedo.addons.Slider2D] = []
        self.texts: dict[str, Any] = {}

    def show(self, scene: Scene) -> None:
        """Put a scene in the place of the one before; neither is made again."""
        self.hide_sliders()
        for panel in self.scene.panels if self.scene else ():
            self.plotter.window.RemoveRenderer(panel)
        self.scene = scene
        for panel in scene.panels:
            self.plotter.window.AddRenderer(panel)
        self.plotter.renderers = list(scene.panels)
        self.plotter.renderer = scene.panels[scene.space]
        self.place_panels(scene)
        if not self.offscreen:
            self.widgets = [self.make_slider(slider) for slider in scene.sliders]

    def place_panels(self, scene: Scene) -> None:
        """Panels fill the window, above the band of help where that is shown."""
        floor = HELP_BAND if "help" in self.texts else 0
        for panel, (left, bottom, right, top) in zip(scene.panels, scene.boxes, strict=True):
            panel.SetViewport(left, floor + bottom * (1 - floor), right, floor + top * (1 - floor))

    def make_slider(self, slider: Slider) -> vedo.addons.Slider2D:
        def change(widget: vedo.addons.Slider2D, _event: str) -> None:
            slider.value = widget.value
            slider.change(widget.value)

        widget = vedo.addons.Slider2D(
            change, slider.low, slider.high, slider.value, slider.ends, slider.title,
            c=INK, delayed=slider.delayed, tformat=slider.text, title_size=0.8,
        )  # fmt: skip
        widget.interactor = self.plotter.interactor
        widget.renderer = self.overlay
        return widget.on()

    def hide_sliders(self) -> None:
        for widget in self.widgets:
            widget.off()
        self.widgets = []

    def write(self, key: str, text: str, place: tuple = (0.5, 0.045), size: float = 0.7) -> None:
        """Words in the layer above; in place of those of the same key, none for no text."""
        if old := self.texts.pop(key, None):
            self.overlay.RemoveViewProp(old.actor)
        if text:
            self.texts[key] = make_text(self.config, text, place, INK, "center", size)
            self.overlay.AddViewProp(self.texts[key].actor)
        if self.scene:
            self.place_panels(self.scene)


def draw(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """The picture of `config.mode`; not rendered yet."""
    stage = Stage(config, offscreen)
    stage.show(make_scene(case, config))
    return stage.plotter


MODE_KEYS: dict[str, Mode] = {str(number): mode for number, mode in enumerate(SCENES, start=1)}
VIEW_KEYS: dict[str, View] = {view[0]: view for view in get_args(View)}
HELP = " · ".join(f"{key} {mode}" for key, mode in MODE_KEYS.items())
HELP += " · m projection of rays · h hide or show this\n"
HELP += " · ".join(f"{key} {view}" for key, view in VIEW_KEYS.items())
HELP += " · mouse: turn, zoom · n next case · q quit"


class Browser:
    """The window: keys change what it shows; scenes once made are kept while their case is."""

    def __init__(self, paths: list[Path], config: Config) -> None:
        self.paths, self.config, self.number = paths, config, 0
        self.scenes: dict[tuple[str, str], Scene] = {}
        self.failed: list[Path] = []
        self.stage = Stage(config, offscreen=False)
        self.case: Case | None = None

    def open_case(self, step: int) -> None:
        """Show the next case that can be; what is wrong with those left out is told."""
        for _ in self.paths:
            self.number = (self.number + step) % len(self.paths)
            step, path = 1, self.paths[self.number]
            kept = self.case, self.scenes
            try:
                self.case, self.scenes = find_case(path, self.config), {}
                self.show(self.config)
                return
            except Exception as error:  # whatever it is: the other cases are shown
                self.case, self.scenes = kept
                if len(self.paths) == 1:
                    raise
                self.failed.append(path)
                print(f"error: {path}: {str(error) or type(error).__name__}", file=sys.stderr)
        raise InputError(f"none of the {len(self.paths)} cases can be shown")

    def show(self, config: Config) -> None:
        """Show one mode of the case, made now where it was not before."""
        assert self.case is not None  # open_case has chosen one
        key = config.mode, config.projection if config.mode == "rays" else ""
        if key not in self.scenes:
            self.stage.write("loading", f"loading {config.mode} …", (0.5, 0.5), 1.3)
            self.stage.plotter.render()
            try:
                self.scenes[key] = make_scene(self.case, config)
            finally:
                self.stage.write("loading", "")
        self.config = config
        self.stage.show(self.scenes[key])
        self.render()
        print(f"{self.case.name}: {' '.join(key).strip()}", flush=True)

    def press(self, event: Any) -> None:
        """What a key does; a mode that cannot be shown says why and changes nothing."""
        key = event.keypress
        self.stage.write("note", "")
        try:
            if key in MODE_KEYS:
                self.show(replace(self.config, mode=MODE_KEYS[key]))
            elif key in VIEW_KEYS and self.stage.scene:
                self.config = replace(self.config, view=VIEW_KEYS[key])
                turn_view(self.stage.scene, self.config)
            elif key == "m":
                highest = self.config.projection == "maximum"
                rays = replace(self.config, projection="composite" if highest else "maximum")
                self.show(replace(rays, mode="rays"))
            elif key == "h":
                self.stage.write("help", "" if "help" in self.stage.texts else HELP)
            elif key == "n" and len(self.paths) > 1:
                self.open_case(1)
            elif key in ("q", "Escape"):
                self.stage.plotter.break_interaction()
                return
        except Exception as error:  # VTK would print a traceback and lose the message
            note = str(error) or type(error).__name__
            print(f"error: {note}", file=sys.stderr, flush=True)
            self.stage.write("note", textwrap.fill(note, 80), (0.5, 0.5))
        self.render()

    def render(self) -> None:
        if scene := self.stage.scene:
            scene.panels[scene.space].ResetCameraClippingRange()
        self.stage.plotter.render()


def open_window(paths: list[Path], config: Config) -> None:
    """One window for all modes and cases, until it is closed."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise InputError("no display to open a window on; give --screenshot, --turntable or --html")
    browser = Browser(paths, config)
    plotter = browser.stage.plotter
    plotter.initialize_interactor()
    plotter.window.SetWindowName("Liver in 3D")
    browser.stage.write("help", HELP)
    try:
        browser.open_case(0)
        plotter.add_callback("KeyPress", browser.press, enable_picking=False)
        plotter.interactive()
    finally:
        browser.stage.hide_sliders()
        plotter._interactive = False  # it has ended; close() would end it again and crash VTK
        plotter.close()
    if browser.failed:
        raise InputError(f"cases not shown: {', '.join(map(str, dict.fromkeys(browser.failed)))}")


# ---------------------------------------------------------------------------------------
# Output: files
# ---------------------------------------------------------------------------------------


def write_screenshot(case: Case, config: Config, path: Path) -> None:
    plotter = draw(case, config, offscreen=True)
    picture = Image.fromarray(plotter.screenshot(asarray=True))
    plotter.close()
    with atomic_write(path) as temporary:  # not by VTK, whose writer is silent on a full disk
        picture.save(temporary)


def write_turntable(case: Case, config: Config, path: Path) -> None:
    """One turn of the camera around the patient, as an endless GIF or as MP4."""
    plotter = draw(case, config, offscreen=True)

    def list_frames() -> Iterator[np.ndarray]:
        for _ in show_progress(range(TURN_FRAMES), desc="turntable", unit="frame"):
            yield plotter.screenshot(asarray=True)
            plotter.camera.Azimuth(360 / TURN_FRAMES)

    write_frames(list_frames(), path, TURN_FPS)
    plotter.close()


def write_movie(case: Case, config: Config, path: Path) -> None:
    """Axial slices from feet to head with the outlines of prediction and reference."""
    write_frames(draw_frames(case, config.size), path, MOVIE_FPS)


def write_mesh(case: Case, config: Config, path: Path) -> None:
    """The organ into `path`, each further class (tumour, …) into `<name>_<class>` beside it."""
    for number, (name, mesh) in enumerate(case.meshes.items()):
        target = path.with_name(f"{path.stem}_{name}{path.suffix}") if number else path
        mesh = mesh.clone()
        if config.mesh_space == "LPS":
            mesh.vertices = mesh.vertices * (-1, -1, 1)
        with atomic_write(target) as temporary:
            if path.suffix == ".glb":
                write_glb(mesh, temporary)
            else:
                mesh.write(str(temporary))
            check_mesh(temporary, mesh.npoints, mesh.ncells)


def write_glb(mesh: vedo.Mesh, path: Path) -> None:
    """glTF 2.0 binary, which VTK writes and vedo does not."""
    scene, node = vtkMultiBlockDataSet(), vtkMultiBlockDataSet()
    node.SetBlock(0, mesh.dataset)
    scene.SetBlock(0, node)
    writer = vtkGLTFWriter()
    writer.SetFileName(str(path))
    writer.SetInputData(scene)
    writer.Write()


def write_html(case: Case, config: Config, path: Path) -> None:
    """Surfaces, legend, measurements and views on one page, the plotting library inside it."""
    surfaces = {}
    for name, (mesh, opacity) in list_scene_meshes(case).items():
        small = mesh.clone().decimate(min(1, HTML_TRIANGLES / mesh.ncells))
        colour = vedo.colors.rgb2hex(mesh.color())
        surfaces[name] = small.vertices, np.array(small.cells), colour, opacity
    write_page(surfaces, (f"{case.name} · organs", case.report()), VIEWS, config.view, path)


OUTPUTS = {  # option → how, and which endings it can write
    "screenshot": (write_screenshot, (".png",)),
    "turntable": (write_turntable, (".gif", ".mp4")),
    "movie": (write_movie, (".gif", ".mp4")),
    "mesh": (write_mesh, (".stl", ".ply", ".obj", ".vtp", ".glb")),
    "html": (write_html, (".html",)),
}


if __name__ == "__main__":
    run_script(main, CONFIG)
