"""See the liver: surfaces, ray casting, slices, comparison; every point in patient millimetres.

    python visualize_3d.py results/liver_3                   # a window; keys 1-5 change the mode
    python visualize_3d.py ct.nii.gz --label label.nii.gz --mode organs --screenshot liver.png

Volumes are brought to the nearest RAS axes and drawn through their whole affine (oblique and
sheared grids too): x grows to the patient's Right, y to Anterior, z to Superior. Pictures,
turntables, meshes and the HTML page need no display.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import scipy.ndimage as ndi
import tyro
import vedo
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from PIL import Image
from scipy.spatial import cKDTree
from skimage.measure import find_contours
from tqdm import tqdm
from vedo import vtkclasses
from vtkmodules.vtkCommonDataModel import vtkMultiBlockDataSet
from vtkmodules.vtkIOGeometry import vtkGLTFWriter

from utilities import (
    AIR_HU,
    CLASSES,
    HU_WINDOW,
    LABEL_COLOURS,
    LABEL_VALUES,
    PLANES,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    InputError,
    atomic_write,
    bounding_box,
    case_name,
    command_line,
    grey_window,
    is_dicom,
    read_label,
    read_volume,
    to_ras,
)

Mode = Literal["surface", "rays", "organs", "slices", "compare"]
View = Literal["anterior", "posterior", "right", "left", "superior"]


@dataclass
class Config:
    paths: tyro.conf.Positional[tuple[Path, ...]]  # results/<case>, label map, masked volume, scan
    mode: Mode = "surface"  # the (first) picture
    projection: Literal["composite", "maximum"] = "composite"  # how rays add the voxels up
    view: View = "anterior"  # side of the patient that the viewer faces
    label: Path | None = None  # label map of the scan in `paths`
    truth: Path | None = None  # reference label map to compare with
    screenshot: Path | None = None  # .png to write
    turntable: Path | None = None  # one turn around the patient: .gif, or .mp4 (needs ffmpeg)
    mesh: Path | None = None  # surface of the organ in mm: .stl .ply .obj .vtp .glb
    mesh_space: Literal["LPS", "RAS"] = "LPS"  # axes of `mesh`; 3D Slicer takes files as LPS
    html: Path | None = None  # one self-contained page that turns in any browser, offline
    smoothing: int = 80  # iterations of the windowed sinc filter; 0 = bare marching cubes
    size: tuple[int, int] = (1200, 900)  # pixels of the window and of every picture


BACKGROUND, INK, BONE = "#14181d", "#e8e8e8", "#e9dcc3"
SKIN_HU = -300  # between air and fat
STAND_IN_HU = (AIR_HU, 100, 40)  # outside, liver, tumour: drawn where there is no scan
PASS_BANDS = (0.002, 0.01, 0.05)  # of the windowed sinc: waves under 100, 45, 20 edges go
TURN_FRAMES, TURN_FPS = 60, 12
HTML_TRIANGLES = 60_000  # per surface: a few MB, and it turns smoothly on a laptop
VIEWS = {  # where the viewer stands, and what is up: RAS vectors
    "anterior": ((0, 1, 0), (0, 0, 1)),
    "posterior": ((0, -1, 0), (0, 0, 1)),
    "right": ((1, 0, 0), (0, 0, 1)),
    "left": ((-1, 0, 0), (0, 0, 1)),
    "superior": ((0, 0, 1), (0, 1, 0)),
}


def main(config: Config) -> None:
    cases = [find_case(path, config) for path in config.paths]
    outputs = chosen_outputs(config)
    for case in cases:
        print(case.name, *case.report(), sep="\n  ")
        for path, write_output in outputs:
            if len(cases) > 1:
                path = path.with_name(f"{path.stem}_{case.name}{path.suffix}")
            write_output(case, config, path)
            print(f"  wrote {path}")
    if not outputs:
        open_windows(cases, config)


# ---------------------------------------------------------------------------------------
# Input: what belongs to a case, read only when a picture needs it
# ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=3)  # a scan, its label map, the reference: each is read once
def read_ras(path: Path) -> nib.Nifti1Image:
    """The volume in memory, axes nearest to RAS, stored dtype."""
    return to_ras(read_volume(path))


def is_label_map(array: np.ndarray) -> bool:
    """Whole numbers from 0 to 255, at most 32 different ones (a CT in uint8 has far more)."""
    if array.min() < 0 or array.max() > 255:
        return False
    small = array.astype(np.uint8, copy=False)
    if array.dtype.kind == "f" and not np.array_equal(small, array):
        return False
    return small.max() < 32 or np.unique(small).size <= 32


def read_labels(path: Path) -> nib.Nifti1Image:
    """A label map as uint8 in RAS; InputError when the file holds anything else."""
    return checked_labels(read_ras(path), path)


def checked_labels(image: nib.Nifti1Image, path: Path) -> nib.Nifti1Image:
    """`image` of `path` as uint8, if it is a label map."""
    array = np.asarray(image.dataobj)
    if not is_label_map(array):
        raise InputError(
            f"{path}: must be a label map (whole numbers from 0, at most 32 different ones), got "
            f"{array.dtype} values {array.min()} to {array.max()}; is this a scan?"
        )
    return nib.Nifti1Image(array.astype(np.uint8, copy=False), image.affine)


@dataclass
class Case:
    """The files of one case, None where there is none; the rest is made when first asked for."""

    name: str
    scan: Path | None = None  # HU everywhere
    masked: Path | None = None  # HU in the organ, one value elsewhere
    label: Path | None = None
    truth: Path | None = None
    names: dict[int, str] = field(default_factory=lambda: {v: n for n, v in LABEL_VALUES.items()})
    smoothing: int = 80

    @functools.cached_property
    def labels(self) -> nib.Nifti1Image | None:
        """Label map on its whole grid, made from the masked volume where there is no other."""
        if self.label:
            return read_labels(self.label)
        if not self.masked:
            return None
        masked = read_ras(self.masked)
        array = np.asarray(masked.dataobj)  # its corner lies outside every organ
        return nib.Nifti1Image((array != array[0, 0, 0]).astype(np.uint8), masked.affine)

    @functools.cached_property
    def reference(self) -> nib.Nifti1Image:
        """The reference label map; a DICOM SEG is laid on the grid of the label map."""
        if self.labels is None or self.truth.is_dir() or not is_dicom(self.truth):
            return self.on_grid(read_labels(self.truth), self.truth)
        known = {name: value for value, name in self.names.items()}
        return checked_labels(read_label(self.truth, self.labels, known), self.truth)

    def on_grid(self, image: nib.Nifti1Image, path: Path) -> nib.Nifti1Image:
        """`image`, once it is known to lie on the label map's grid."""
        grid = image if self.labels is None else self.labels
        if image.shape != grid.shape or not np.allclose(image.affine, grid.affine, atol=1e-2):
            raise InputError(
                f"{path} and {self.label or self.masked} must lie on one grid, got shapes "
                f"{image.shape} and {grid.shape} or other affines; give files of one scan"
            )
        return image

    @functools.cached_property
    def organ(self) -> nib.Nifti1Image:
        """Label map cropped to its foreground: all that follows costs what the organ costs."""
        if self.labels is None:
            raise InputError(
                f"{self.scan}: this mode draws the organ and there is no label map; give one with "
                "--label, or choose --mode surface, rays or slices"
            )
        return crop(self.labels, self.label or self.masked)

    @functools.cached_property
    def organ_hu(self) -> nib.Nifti1Image:
        """HU in the organ's box, AIR_HU outside the organ; STAND_IN_HU where there is no scan."""
        path, labels = self.masked or self.scan, np.asarray(self.organ.dataobj)
        if path is None:
            hu = np.take(np.float32(STAND_IN_HU), labels, mode="clip")
        else:
            box = bounding_box(np.asarray(self.labels.dataobj) > 0)
            image = self.on_grid(read_ras(path), path).slicer[box]
            hu = np.where(labels > 0, image.dataobj, np.float32(AIR_HU))
        return nib.Nifti1Image(hu, self.organ.affine)

    @functools.cached_property
    def meshes(self) -> dict[str, vedo.Mesh]:
        """Class → smooth surface in patient mm, with its `measures`; the organ first."""
        return class_meshes(self.organ, self.names, self.smoothing)

    def report(self) -> list[str]:
        """The measurements as lines of text, for the terminal and for the picture."""
        if self.labels is None or not np.any(self.labels.dataobj):
            return ["no label map" if self.labels is None else "the label map is empty"]
        lines = [line for name, mesh in self.meshes.items() for line in describe(name, mesh)]
        if min(self.organ.shape) < 3:
            lines += [f"only {min(self.organ.shape)} slice(s) of organ: its surface is a slab"]
        if not (self.masked or self.scan):
            lines += ["no scan: liver drawn as {1} HU, tumours as {2} HU".format(*STAND_IN_HU)]
        return lines


def find_case(path: Path, config: Config) -> Case:
    """The case that `path` stands for: a folder of apply_model.py, DICOM slices, or one file."""
    case = result_case(path) if path.is_dir() else None
    if case is None and path.name.endswith(("_masked.nii.gz", "_masked.nii")):
        case = Case(case_name(path), masked=path)
    if case is None:
        is_label = path.is_file() and is_label_map(np.asarray(read_ras(path).dataobj))
        case = Case(case_name(path), **{"label" if is_label else "scan": path})
    if config.label is not None:
        if case.scan is None or len(config.paths) != 1:
            raise InputError(f"--label {config.label}: needs one scan beside it, got {path}")
        case.label = config.label
    case.truth, case.smoothing = config.truth or case.truth, config.smoothing
    return case


def result_case(folder: Path) -> Case | None:
    """The case that apply_model.py wrote into `folder`; None when it holds something else."""
    labels = sorted(folder.glob("*_label.nii.gz"))
    if not labels:
        return None
    if len(labels) > 1:
        raise InputError(f"{folder}: must hold one case, got {len(labels)} label maps; name a file")
    name = labels[0].name.removesuffix("_label.nii.gz")
    masked, record = folder / f"{name}_masked.nii.gz", folder / f"{name}.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    files = {key: Path(known[key]) for key in ("image", "truth") if known.get(key)}
    for key in [key for key, path in files.items() if not path.exists()]:
        print(f"{record}: its {key} {files.pop(key)} is not there any more; drawn without it")
    case = Case(name, files.get("image"), masked if masked.exists() else None, labels[0])
    case.truth = files.get("truth")
    organs = [key.removesuffix("_volume_ml") for key in known if key.endswith("_volume_ml")]
    if organs and organs[0] not in LABEL_VALUES:  # another organ than the liver was learnt
        case.names = dict(enumerate(organs, start=1))
    return case


# ---------------------------------------------------------------------------------------
# Geometry: masks and affines in, surfaces and numbers in patient millimetres (RAS) out
# ---------------------------------------------------------------------------------------


class PatientVolume(vedo.Volume):
    """A volume that is drawn, and gives surfaces, where its affine puts it in the patient.

    vedo knows an origin and a spacing only. array: (X, Y, Z); affine: 4×4, voxel index → RAS mm.
    One voxel of `outside` is laid around it, so that surfaces close at the border.
    """

    smoothing = 0  # iterations that its surfaces are smoothed with
    transfer: tuple | None = None  # colours, opacities per mm (composite) and per ray (maximum)

    def __init__(self, array: np.ndarray, affine: np.ndarray, outside: float = 0) -> None:
        size = voxel_sizes(affine)  # as spacing, so that opacities count per mm
        super().__init__(np.pad(array, 1, constant_values=outside), spacing=size)
        self.to_patient = affine @ from_matvec(np.diag(1 / size), [-1, -1, -1])
        matrix = vtkclasses.vtkMatrix4x4()
        matrix.DeepCopy(self.to_patient.ravel().tolist())
        self.actor.SetUserMatrix(matrix)

    def isosurface(self, value: float | None = None, flying_edges: bool = True) -> vedo.Mesh:
        """Marching cubes (VTK's flying edges) in patient mm, faces turned outwards."""
        mesh = super().isosurface(value, flying_edges=True).apply_transform(self.to_patient)
        if np.linalg.det(self.to_patient[:3, :3]) < 0:
            mesh.reverse()
        return smooth(mesh, self.smoothing)

    def mode(self, mode: int | None = None) -> PatientVolume | int:
        """0 composite, 1 maximum projection: each with the opacities that suit it."""
        if mode is not None and self.transfer:
            self.color(self.transfer[0]).shade(False)
            opacity = self.properties.GetScalarOpacity()
            opacity.RemoveAllPoints()  # vedo's alpha() would give the last value to the data's end
            for point in self.transfer[1 + mode]:
                opacity.AddPoint(*point)
        return super().mode(mode)


def crop(labels: nib.Nifti1Image, path: Path) -> nib.Nifti1Image:
    """`labels` around its foreground; InputError when there is none."""
    array = np.asarray(labels.dataobj)
    if not array.any():
        raise InputError(
            f"{path}: the label map is empty (no voxel above 0), so there is no organ to draw; "
            "look at the scan with --mode slices"
        )
    return labels.slicer[bounding_box(array > 0)]


def class_meshes(
    labels: nib.Nifti1Image, names: dict[int, str], smoothing: int
) -> dict[str, vedo.Mesh]:
    """Class → smooth coloured surface; a tumour belongs to the liver too, as CLASSES says."""
    array = np.asarray(labels.dataobj)
    meshes = {}
    for value in range(1, int(array.max()) + 1):
        name = names.get(value, f"label_{value}")
        mask = np.isin(array, CLASSES.get(name, value))
        if mask.any():
            mesh = smooth(surface_mm(mask, labels.affine), smoothing)
            mesh.measures = measure(mask, labels.affine, mesh)
            meshes[name] = mesh.color(label_colour(value))
    return meshes


def label_colour(value: int) -> str:
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS) + 1]


def surface_mm(mask: np.ndarray, affine: np.ndarray) -> vedo.Mesh:
    """Closed surface of a boolean mask (X, Y, Z), half a voxel beyond its outer voxel centres."""
    return PatientVolume(mask.astype(np.uint8), affine).isosurface(0.5)


def smooth(mesh: vedo.Mesh, iterations: int) -> vedo.Mesh:
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
    mesh.lighting(ambient=0.3, diffuse=0.7, specular=0.1, specular_power=15)
    mesh.compute_normals(cells=False, consistency=False).smoothing_percent = change
    return mesh


def skin_surface(scan: nib.Nifti1Image) -> vedo.Mesh:
    """The body's outside on a grid of about 3 mm, lungs and bowel filled, the table left out."""
    steps = tuple(slice(None, None, max(1, round(3 / mm))) for mm in voxel_sizes(scan.affine))
    coarse = scan.slicer[steps]
    parts, count = ndi.label(ndi.binary_opening(np.asarray(coarse.dataobj) > SKIN_HU))
    body = parts == np.bincount(parts.ravel())[1:].argmax() + 1 if count else parts > 0
    body = np.stack([ndi.binary_fill_holes(level) for level in np.moveaxis(body, 2, 0)], axis=2)
    return smooth(surface_mm(body, coarse.affine), 50).color(BONE)


def measure(mask: np.ndarray, affine: np.ndarray, mesh: vedo.Mesh) -> dict:
    """Volume by voxels and by mesh, of connected parts (ml), surface (cm²), extent (mm)."""
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    parts, _ = ndi.label(mask, np.ones((3, 3, 3)))
    return {
        "volume_ml": float(np.count_nonzero(mask) * voxel_ml),
        "mesh_ml": mesh.volume() / 1000,
        "surface_cm2": mesh.area() / 100,
        "extent_mm": np.ptp(mesh.vertices, axis=0).tolist(),
        "parts_ml": sorted((np.bincount(parts.ravel())[1:] * voxel_ml).tolist(), reverse=True),
    }


def describe(name: str, mesh: vedo.Mesh) -> list[str]:
    """Lines of text with the measures of one class."""
    found = mesh.measures
    parts = found["parts_ml"]
    sizes = ", ".join(f"{ml:.1f}" for ml in parts[:5]) + (", …" if len(parts) > 5 else "")
    return [
        f"{name} {found['volume_ml']:.1f} ml, surface {found['surface_cm2']:.0f} cm²",
        "  R–L {:.0f} × A–P {:.0f} × I–S {:.0f} mm".format(*found["extent_mm"]),
        f"  mesh {found['mesh_ml']:.1f} ml, smoothing {mesh.smoothing_percent:+.2f} %",
    ] + ([f"  parts {len(parts)}: {sizes} ml"] if name != "liver" else [])


def signed_distance(
    points: np.ndarray, mask: np.ndarray, affine: np.ndarray, surface: np.ndarray
) -> np.ndarray:
    """Distance in mm of points (N, 3) to the nearest vertex of a mask's surface, < 0 inside it."""
    distance, _ = cKDTree(surface).query(points, workers=-1)
    index = apply_affine(np.linalg.inv(affine), points).T
    inside = ndi.map_coordinates(mask.astype(np.float32), index, order=1) > 0.5
    return np.where(inside, -distance, distance)


def direction_letters(direction: np.ndarray) -> str:
    """Where a RAS vector points, strongest axis first: "R", "SA"; parts under 22.5° left out."""
    letters = np.where(np.asarray(direction) > 0, list("RAS"), list("LPI"))
    strong = np.abs(direction) > np.sin(np.pi / 8) * np.linalg.norm(direction)
    return "".join(letters[axis] for axis in np.argsort(-np.abs(direction)) if strong[axis])


def darkness(hu: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """How much darker than the organ's median (X, Y, Z) in HU, noise averaged away; 0 at its rim.

    The mean is taken over the organ's inner voxels only (normalised convolution, 1.5 mm), because
    the outermost ones hold some fat, and a dark rim would hide the tumours.
    """
    inner = ndi.binary_erosion(mask, iterations=2)
    sigma = 1.5 / np.array(voxel_sizes(affine))
    weight = ndi.gaussian_filter(inner.astype(np.float32), sigma, truncate=2)
    darker = np.where(inner, np.median(hu[mask]) - hu, 0).astype(np.float32)
    total = ndi.gaussian_filter(darker, sigma, truncate=2)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0.05)


# ---------------------------------------------------------------------------------------
# Scenes: one function per mode gives a plotter, in a window or off screen
# ---------------------------------------------------------------------------------------


def window(config: Config, offscreen: bool) -> dict:
    return {"size": config.size, "bg": BACKGROUND, "offscreen": offscreen, "title": "Liver in 3D"}


def hu_volume(case: Case) -> tuple[PatientVolume, float, int, str]:
    """HU of the organ, or of a bare scan; a first isovalue, number of isovalues, colour.

    HU are clipped to whole tens: IsosurfaceBrowser keeps its surfaces under two digits of the
    isovalue, and with other steps than of 10 HU different isovalues would share one surface.
    """
    if case.labels is None:  # every second voxel where the scan is large
        scan = read_ras(case.scan)
        image = scan.slicer[tuple(slice(None, None, -(-n // 256)) for n in scan.shape)]
        (low, high), colour = (-500, 1000), BONE
    else:
        image, (low, high), colour = case.organ_hu, HU_WINDOW, LABEL_COLOURS[1]
    array = np.asarray(image.dataobj)
    high = max(10 * (min(high, int(array.max())) // 10), low + 10)
    array = array.clip(low, high).astype(np.float32)  # below: bone, or half-way into the organ
    first = 200 if case.labels is None else 10 * ((low + np.median(array[array > low])) // 20)
    volume = PatientVolume(array, image.affine, low)
    return volume, float(first), int(high - low) // 10 + 1, colour


def surface_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """Marching cubes with a slider for the isovalue."""
    volume, first, steps, colour = hu_volume(case)
    volume.smoothing = config.smoothing
    plotter = vedo.applications.IsosurfaceBrowser(
        volume,
        first,
        c=colour,
        res=steps,
        delayed=True,
        sliderpos=[(0.93, 0.2), (0.93, 0.7)],
        **window(config, offscreen),
    )
    plotter.slider.representation.SetTitleText("surface at HU")
    return plotter


def rays_volume(case: Case) -> PatientVolume:
    """Volume and transfer function in which tumours show inside the liver.

    The scalar is how much darker a voxel is than the organ's median: so tumours stand out in both
    projections, and the way from the organ to the outside leads through the values of bright
    vessels, which hardly show, and not through those of tumours. A bare scan shows its bones.
    """
    if case.labels is None:
        volume = hu_volume(case)[0]
        volume.transfer = (
            [(-200, "#b5651d"), (100, "#c0504d"), (250, BONE), (600, "white")],
            [(-500, 0), (100, 0), (180, 0.02), (300, 0.2), (600, 0.5)],
            [(-500, 0), (0, 0), (100, 0.2), (600, 1)],
        )
        return volume
    hu, mask = np.asarray(case.organ_hu.dataobj), np.asarray(case.organ.dataobj) > 0
    darker = np.where(mask, darkness(hu, mask, case.organ.affine).clip(-150, 150), -150)
    volume = PatientVolume(darker, case.organ.affine, -150)
    liver, tumour = LABEL_COLOURS[1], LABEL_COLOURS[2]
    volume.transfer = (
        [(-80, "white"), (-20, liver), (15, liver), (30, tumour), (80, tumour)],
        [(-150, 0), (-80, 0.006), (-20, 0.006), (15, 0.006), (30, 0.1), (80, 0.2)],
        [(-150, 0), (-20, 0.2), (15, 0.3), (30, 0.6), (60, 0.95)],
    )
    return volume


def rays_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """Ray casting. vedo's window for it cannot be made without a display; a plain one can."""
    volume = rays_volume(case).mode(int(config.projection == "maximum"))
    if offscreen:  # on the CPU: 2.5 times as fast there as OpenGL without a graphics card
        volume.mapper.SetRequestedRenderModeToRayCast()
        return vedo.Plotter(**window(config, True)).add(volume)
    plotter = vedo.applications.RayCastPlotter(volume, **window(config, False))
    volume.mode(volume.mode())  # the window has put its own opacities in
    return plotter


def organs_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """Every class as a smooth surface: the liver translucent, tumours solid, the skin faint."""
    plotter = vedo.Plotter(**window(config, offscreen))
    for mesh, alpha in scene_meshes(case).values():
        plotter.add(mesh.clone().alpha(alpha))
    return plotter


def scene_meshes(case: Case) -> dict[str, tuple[vedo.Mesh, float]]:
    """Name → surface and its opacity."""
    meshes = {name: (mesh, 1.0) for name, mesh in case.meshes.items()}
    organ = next(iter(meshes))
    meshes[organ] = meshes[organ][0], 0.45
    if case.scan:
        meshes["skin"] = skin_surface(read_ras(case.scan)), 0.1
    return meshes


PANELS, SPACE_PANEL = {"axial": 0, "coronal": 1, "sagittal": 3}, 2  # where a 2×2 window shows what
SLICE_SIDES = {"axial": -1, "coronal": 1, "sagittal": -1}  # seen from below, the front, the left


def slice_objects(
    scan: nib.Nifti1Image, labels: dict[str, nib.Nifti1Image], plane: str, index: int
) -> list:
    """One CT slice as a grey rectangle with the outlines of label maps (colour → map), in mm."""
    axis, side = PLANES[plane][0], SLICE_SIDES[plane]
    array, affine = np.moveaxis(np.asarray(scan.dataobj), axis, 0)[index], scan.affine
    across, up = array.shape

    def place(points: np.ndarray, height: float) -> np.ndarray:
        return apply_affine(affine, np.insert(points, axis, height, axis=1))

    low, high = grey_window(np.asarray(scan.dataobj))
    grey = ((array.T.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    corners = np.array([(0, 0), (across, 0), (across, up), (0, up)]) - 0.5
    sheet = vedo.Mesh([place(corners, index), [[0, 1, 2, 3]]]).lighting("off").color("white")
    objects = [sheet.texture(vedo.Image(grey), tcoords=[(0, 0), (1, 0), (1, 1), (0, 1)])]
    for colour, label in labels.items():
        flat = np.moveaxis(np.asarray(label.dataobj), axis, 0)[index]
        for value in range(1, int(flat.max(initial=0)) + 1):
            shade = colour if value == 1 else label_colour(value)
            mask = flat > 0 if value == 1 else flat == value
            for line in find_contours(np.pad(mask, 1).astype(float), 0.5):
                objects.append(vedo.Line(place(line - 1, index + side / 2), c=shade, lw=2))
    return objects


def slices_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """Axial, coronal and sagittal CT slice in radiological view with sliders, and all in 3D."""
    path = case.scan or case.masked or case.label
    scan, labels = case.on_grid(read_ras(path), path), {}
    if case.truth:
        labels[TRUTH_COLOUR] = case.reference
    if case.labels is not None:
        labels[PREDICTION_COLOUR] = case.labels
    plotter = vedo.Plotter(shape=(2, 2), sharecam=False, **window(config, offscreen))
    shown: dict[str, list] = {plane: [] for plane in PLANES}

    def show(plane: str, index: int) -> None:
        old, shown[plane] = shown[plane], slice_objects(scan, labels, plane, index)
        for panel in (PANELS[plane], SPACE_PANEL):
            plotter.at(panel).remove(old).add(shown[plane])

    foreground = [np.asarray(label.dataobj) > 0 for label in labels.values()]
    filled = any(mask.any() for mask in foreground)
    for plane, (axis, _) in PLANES.items():
        others = tuple({0, 1, 2} - {axis})
        counts = sum(np.count_nonzero(mask, axis=others) for mask in foreground)
        index = int(np.argmax(counts)) if filled else scan.shape[axis] // 2
        show(plane, index)
        face_slice(plotter.at(PANELS[plane]), scan, plane)
        if not offscreen:  # all in the panel at the window's origin, the only one VTK places well
            place = [(0.02, 0.14 + 0.06 * axis), (0.14, 0.14 + 0.06 * axis)]
            plotter.at(SPACE_PANEL).add_slider(
                lambda slider, _, plane=plane: show(plane, round(slider.value)),
                0, scan.shape[axis] - 1, index, place, f"{plane} slice", tformat="%.0f",
            )  # fmt: skip
    if filled:
        plotter.at(SPACE_PANEL).add(*case.meshes.values())
    return plotter.at(SPACE_PANEL)


def face_slice(plotter: vedo.Plotter, scan: nib.Nifti1Image, plane: str) -> None:
    """Camera at right angles to the slices of a plane, which fill the picture."""
    axis = PLANES[plane][0]
    across, up = np.delete(scan.affine[:3, :3], axis, axis=1).T
    width, height = (
        np.linalg.norm(step) * count
        for step, count in zip((across, up), np.delete(scan.shape, axis), strict=True)
    )
    normal = np.cross(across, up)
    side = SLICE_SIDES[plane] * np.sign(normal @ scan.affine[:3, axis])
    stand(plotter, side * normal / np.linalg.norm(normal), up)
    wide, high = plotter.window.GetSize()
    plotter.camera.SetParallelProjection(True)
    plotter.camera.SetParallelScale(0.55 * max(height, width * high / wide))


def compare_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """The reference, and beside it the prediction coloured by its distance from the reference."""
    if case.truth is None:
        raise InputError(f"{case.name}: to compare, give the reference label map with --truth")
    truth = crop(case.reference, case.truth)
    mask = np.asarray(truth.dataobj) > 0
    reference = smooth(surface_mm(mask, truth.affine), config.smoothing).color(TRUTH_COLOUR)
    mesh = next(iter(case.meshes.values())).clone()
    distance = signed_distance(mesh.vertices, mask, truth.affine, reference.vertices)
    far = np.abs(distance)
    limit = max(1.0, float(np.ceil(np.percentile(far, 99))))
    mesh.cmap("PuOr_r", distance, vmin=-limit, vmax=limit)
    mesh.add_scalarbar("mm outside (> 0) or inside (< 0)", horizontal=True, font_size=16)
    plotter = vedo.Plotter(shape=(1, 2), **window(config, offscreen))
    numbers = far.mean(), np.percentile(far, 95), far.max()
    text = "prediction, mm from the reference:\nmean {:.1f}, 95 % under {:.1f}, largest {:.1f}"
    for at, shown, colour, words in (
        (0, reference, TRUTH_COLOUR, "reference"),
        (1, mesh, PREDICTION_COLOUR, text.format(*numbers)),
    ):
        plotter.at(at).add(shown, write(plotter, words, (0.5, 0.2), colour, "center"))
        plotter.renderer.SetActiveCamera(plotter.renderers[0].GetActiveCamera())
    return plotter


SCENES = {
    "surface": surface_scene,
    "rays": rays_scene,
    "organs": organs_scene,
    "slices": slices_scene,
    "compare": compare_scene,
}


def draw(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """The scene of `config.mode`, with directions and measurements; not rendered yet."""
    vedo.settings.enable_default_keyboard_callbacks = False  # ours are shown on screen
    vedo.settings.use_depth_peeling = config.mode != "rays"  # translucent surfaces in right order …
    vedo.settings.multi_samples, vedo.settings.use_fxaa = 0, True  # … for which VTK wants these
    logger = vtkclasses.get_class("Logger")
    logger.SetStderrVerbosity(logger.VERBOSITY_ERROR)  # no display is no reason to warn
    plotter = SCENES[config.mode](case, config, offscreen)
    stand(plotter, *VIEWS[config.view])
    if config.mode == "slices":  # seen exactly from one side, two of the slices would be lines
        plotter.camera.Azimuth(25)
        plotter.camera.Elevation(25)
    mode = config.mode + (f", {config.projection}" if config.mode == "rays" else "")
    lines = "\n".join([f"{case.name} · {mode}", *case.report()])
    plotter.add(write(plotter, lines, (0.01, 0.99), INK, "top-left"))
    for renderer in plotter.renderers:
        mark_directions(plotter, renderer)
    return plotter


def write(
    plotter: vedo.Plotter, text: str, place: tuple, colour: str, justify: str, size: float = 0.7
) -> vedo.Text2D:
    """Text at a place (0..1) of a panel, its size going with the window's."""
    size *= plotter.window.GetSize()[0] / 1200
    return vedo.Text2D(
        text, place, size, BACKGROUND, c=colour, alpha=0.6, justify=justify, font="Calco"
    )


def stand(plotter: vedo.Plotter, place: np.ndarray, up: np.ndarray) -> None:
    """Put the camera on one side of what is drawn, all of it in the picture."""
    plotter.camera.SetFocalPoint(0, 0, 0)
    plotter.camera.SetPosition(place)
    plotter.camera.SetViewUp(up)
    plotter.renderer.ResetCamera()  # makes room for a sphere; a liver is flatter
    width, height = plotter.renderer.GetSize()
    plotter.camera.Zoom(1.4 if width > height else 1.2)


def mark_directions(plotter: vedo.Plotter, renderer: vtkclasses.vtkRenderer) -> None:
    """Letters R L A P S I at the picture's edges, right again before every rendering."""
    places = (0.02, 0.5), (0.98, 0.5), (0.5, 0.97), (0.5, 0.03)
    texts = [write(plotter, "", place, INK, "center", 1.3) for place in places]
    for text in texts:
        renderer.AddActor(text.actor)

    def update(*_) -> None:
        forward = np.array(renderer.GetActiveCamera().GetDirectionOfProjection())
        right = np.cross(forward, renderer.GetActiveCamera().GetViewUp())
        up = np.cross(right, forward)
        for text, direction in zip(texts, (-right, right, up, -up), strict=True):
            text.text(direction_letters(direction))

    renderer.AddObserver("StartEvent", update)


# ---------------------------------------------------------------------------------------
# Output: a window, or files
# ---------------------------------------------------------------------------------------


MODE_KEYS = {str(number): mode for number, mode in enumerate(SCENES, start=1)}
VIEW_KEYS = {view[0]: view for view in VIEWS}
HELP = " · ".join(f"{key} {mode}" for key, mode in MODE_KEYS.items())
HELP += "\na p r l s: side seen · m: projection of rays · n: next case · q: quit"


def open_windows(cases: list[Case], config: Config) -> None:
    """One window after the other, until one is closed without asking for the next."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise InputError("no display to open a window on; give --screenshot, --turntable or --html")
    shown, number, note, last = config, 0, HELP, config
    while shown:
        try:
            plotter = draw(cases[number], shown, offscreen=False)
        except InputError as error:  # a mode that this case has no files for
            if shown is config:
                raise
            shown, note = last, str(error)
            continue
        last = shown
        shown, step = browse(plotter, shown, note)
        number, note = (number + step) % len(cases), HELP


def browse(plotter: vedo.Plotter, config: Config, note: str) -> tuple[Config | None, int]:
    """Show a window until it is left; what to show next (None: nothing) and the step in cases."""
    answer: list = [None, 0]

    def choose(step: int = 0, **changes: str) -> None:
        answer[:] = replace(config, **changes), step
        plotter.break_interaction()

    def press(event) -> None:
        if event.keypress in MODE_KEYS:
            choose(mode=MODE_KEYS[event.keypress])
        elif event.keypress in VIEW_KEYS:
            stand(plotter, *VIEWS[VIEW_KEYS[event.keypress]])
            plotter.render()
        elif event.keypress == "n":
            choose(1)
        elif event.keypress == "m":
            other = "composite" if config.projection == "maximum" else "maximum"
            choose(mode="rays", projection=other)
        elif event.keypress in ("q", "Escape"):
            plotter.break_interaction()

    plotter.add_callback("KeyPress", press, enable_picking=False)
    plotter.add(write(plotter, note, (0.5, 0.07), INK, "center"))
    plotter.show(resetcam=False, interactive=True)
    plotter._interactive = False  # it has ended; close() would end it again and crash VTK
    plotter.close()
    return answer[0], answer[1]


def write_screenshot(case: Case, config: Config, path: Path) -> None:
    plotter = draw(case, config, offscreen=True)
    with atomic_write(path) as temporary:
        plotter.screenshot(str(temporary))
    plotter.close()


def write_turntable(case: Case, config: Config, path: Path) -> None:
    """One turn of the camera around the patient, as an endless GIF or as MP4."""
    plotter, frames = draw(case, config, offscreen=True), []
    for _ in tqdm(range(TURN_FRAMES), desc="turntable", unit="frame"):
        frames.append(plotter.screenshot(asarray=True))
        plotter.camera.Azimuth(360 / TURN_FRAMES)
    plotter.close()
    with atomic_write(path) as temporary:
        if path.suffix == ".gif":
            images = [Image.fromarray(frame).quantize(128) for frame in frames]
            options = {"duration": round(1000 / TURN_FPS), "loop": 0, "append_images": images[1:]}
            images[0].save(temporary, save_all=True, **options)
            return
        height, width, _ = frames[0].shape
        command = f"ffmpeg -loglevel error -y -f rawvideo -pix_fmt rgb24 -s {width}x{height}"
        command += f" -r {TURN_FPS} -i - -vf crop=trunc(iw/2)*2:trunc(ih/2)*2 -pix_fmt yuv420p"
        subprocess.run([*command.split(), temporary], input=np.stack(frames).tobytes(), check=True)


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
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, (mesh, opacity) in scene_meshes(case).items():
        small = mesh.clone().decimate(min(1, HTML_TRIANGLES / mesh.ncells))
        x, y, z = small.vertices.round(2).T
        i, j, k = np.array(small.cells).T
        look = {"color": vedo.colors.rgb2hex(mesh.color()), "opacity": opacity}
        figure.add_mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, name=name, showlegend=True, **look)
    axes = {
        f"{axis}axis": {"title": f"mm to {end}", "color": INK, "backgroundcolor": BACKGROUND}
        for axis, end in zip("xyz", ("Right", "Anterior", "Superior"), strict=True)
    }
    cameras = {
        view: {
            "eye": dict(zip("xyz", 1.6 * np.array(place), strict=True)),
            "up": dict(zip("xyz", up, strict=True)),
        }
        for view, (place, up) in VIEWS.items()
    }
    buttons = [
        {"label": view, "method": "relayout", "args": [{"scene.camera": camera}]}
        for view, camera in cameras.items()
    ]
    note = {"text": "<br>".join(case.report()), "align": "left", "showarrow": False}
    figure.update_layout(
        title=case.name,
        template="plotly_dark",
        paper_bgcolor=BACKGROUND,
        scene={"aspectmode": "data", "camera": cameras[config.view], **axes},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "buttons": buttons,
                "showactive": False,
                "x": 0,
                "y": 0,
                "xanchor": "left",
            }
        ],
        annotations=[note | {"x": 0, "y": 1, "xanchor": "left", "xref": "paper", "yref": "paper"}],
    )
    with atomic_write(path) as temporary:
        figure.write_html(temporary, include_plotlyjs=True, default_height="100vh")


OUTPUTS = {  # option → how, and which endings it can write
    "screenshot": (write_screenshot, (".png",)),
    "turntable": (write_turntable, (".gif", ".mp4")),
    "mesh": (write_mesh, (".stl", ".ply", ".obj", ".vtp", ".glb")),
    "html": (write_html, (".html",)),
}


def chosen_outputs(config: Config) -> list[tuple[Path, Callable]]:
    """(path, function) of every output that is asked for; InputError for one that cannot be."""
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


if __name__ == "__main__":
    command_line(main, Config, __doc__)
