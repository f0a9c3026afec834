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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import scipy.ndimage as ndi
import tyro
import vedo
from vedo import vtkclasses

from utilities import (
    AIR_HU,
    CLASSES,
    HU_WINDOW,
    LABEL_COLOURS,
    LABEL_VALUES,
    InputError,
    atomic_write,
    case_name,
    command_line,
    read_volume,
    to_ras,
)


@dataclass
class Config:
    """What is shown, from which side, and what is written; with nothing to write a window opens."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # results/<case>, label map, masked volume, scan
    mode: Literal["surface", "rays", "organs"] = "surface"  # first picture
    projection: Literal["composite", "maximum"] = "composite"  # how rays add voxels up
    view: Literal["anterior", "posterior", "right", "left", "superior"] = "anterior"  # seen from
    label: Path | None = None  # label map of the scan in `paths`
    truth: Path | None = None  # reference label map to compare with
    screenshot: Path | None = None  # PNG to write
    smoothing: int = 100  # iterations of the windowed sinc filter; 0 = bare marching cubes
    size: tuple[int, int] = (1200, 900)  # pixels of the window and of every picture


SUFFIXES = {
    "screenshot": (".png",),
}
BACKGROUND, INK, BONE = "#14181d", "#e8e8e8", "#e9dcc3"
SKIN_HU = -300  # between air and fat
PASS_BANDS = (0.002, 0.01, 0.05)  # of the windowed sinc: waves under 100, 45, 20 edges go


def main(config: Config) -> None:
    check_outputs(config)
    cases = [find_case(path, config) for path in config.paths]
    for case in cases:
        print(case.name, *case.report(), sep="\n  ")
        for name, write in WRITERS.items():
            target = getattr(config, name)
            if target is not None:
                if len(cases) > 1:
                    target = target.with_name(f"{target.stem}_{case.name}{target.suffix}")
                write(case, config, target)
    if not any(getattr(config, name) for name in WRITERS):
        for case in cases:
            draw(case, config, offscreen=False).show(resetcam=False).close()


# ---------------------------------------------------------------------------------------
# Input: what belongs to a case, read only when a picture needs it
# ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=3)  # a scan, its label map and the reference: read once
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
    return sum(np.any(small == value) for value in range(small.max() + 1)) <= 32


def read_labels(path: Path) -> nib.Nifti1Image:
    """A label map as uint8 in RAS; InputError when the file holds anything else."""
    image = read_ras(path)
    array = np.asarray(image.dataobj)
    if not is_label_map(array):
        raise InputError(
            f"{path}: must be a label map (whole numbers from 0, at most 32 different ones), got "
            f"{array.dtype} values {array.min()} to {array.max()}; is this the scan?"
        )
    return nib.Nifti1Image(array.astype(np.uint8, copy=False), image.affine)


def same_grid(image: nib.Nifti1Image, other: nib.Nifti1Image, path: Path, other_path: Path) -> None:
    if image.shape != other.shape or not np.allclose(image.affine, other.affine, atol=1e-2):
        raise InputError(
            f"{path} and {other_path} must lie on the same grid, got shapes {image.shape} and "
            f"{other.shape}, origins {image.affine[:3, 3].round(1)} and "
            f"{other.affine[:3, 3].round(1)} mm; give the scan that the label map was made from"
        )


@dataclass
class Case:
    """The files of one case; None where there is none."""

    name: str
    scan: Path | None = None  # HU everywhere
    masked: Path | None = None  # HU in the organ, AIR_HU elsewhere
    label: Path | None = None
    truth: Path | None = None
    smoothing: int = 100

    @functools.cached_property
    def labels(self) -> nib.Nifti1Image | None:
        """Label map on its whole grid, from the masked volume where there is no other."""
        if self.label:
            return read_labels(self.label)
        if not self.masked:
            return None
        masked = read_ras(self.masked)
        organ = np.asarray(masked.dataobj) > AIR_HU
        return nib.Nifti1Image(organ.astype(np.uint8), masked.affine)

    @functools.cached_property
    def organ(self) -> nib.Nifti1Image:
        """Label map cropped to its foreground."""
        if self.labels is None:
            raise InputError(
                f"{self.scan}: this mode draws the organ and there is no label map; give one with "
                "--label, or choose --mode surface or rays"
            )
        return crop(self.labels, self.label or self.masked)

    @functools.cached_property
    def reference(self) -> nib.Nifti1Image:
        """Reference label map cropped to its foreground."""
        if self.truth is None:
            raise InputError(
                f"{self.name}: comparing needs the reference label map; give it with --truth"
            )
        truth = read_labels(self.truth)
        if self.labels is not None:
            same_grid(truth, self.labels, self.truth, self.label or self.masked)
        return crop(truth, self.truth)

    @functools.cached_property
    def organ_hu(self) -> nib.Nifti1Image | None:
        """HU cropped to the organ, AIR_HU outside it; None where only a label map is known."""
        path = self.masked or self.scan
        if path is None:
            return None
        image = read_ras(path)
        same_grid(image, self.labels, path, self.label or self.masked)
        box = foreground_box(np.asarray(self.labels.dataobj))
        hu = np.asarray(image.slicer[box].dataobj).astype(np.float32)
        hu[np.asarray(self.organ.dataobj) == 0] = AIR_HU
        return nib.Nifti1Image(hu, self.organ.affine)

    @functools.cached_property
    def meshes(self) -> dict[str, vedo.Mesh]:
        """Smoothed surface of every class, patient mm."""
        return class_meshes(self.organ, self.smoothing)

    @functools.cached_property
    def measures(self) -> dict[str, dict]:
        return {
            name: measure(mask, self.organ.affine, self.meshes[name])
            for name, mask in class_masks(self.organ).items()
        }

    def report(self) -> list[str]:
        """Lines of text, for the terminal and for the picture."""
        if self.labels is None:
            return [f"scan {self.scan}, no label map"]
        lines = []
        for name, found in self.measures.items():
            lines += [
                f"{name} {found['volume_ml']:.1f} ml, surface {found['surface_cm2']:.0f} cm²",
                "  extent {:.0f} × {:.0f} × {:.0f} mm (R–L × A–P × I–S)".format(
                    *found["extent_mm"]
                ),
                f"  smooth mesh {found['mesh_ml']:.1f} ml ({found['change_percent']:+.2f} %)",
            ]
            if name == "tumour":
                volumes = ", ".join(f"{ml:.1f}" for ml in found["parts_ml"][:6])
                more = " …" if len(found["parts_ml"]) > 6 else ""
                lines[-3] = f"tumours {len(found['parts_ml'])}: {volumes}{more} ml"
        return lines


def find_case(path: Path, config: Config) -> Case:
    """The case that `path` stands for: a folder of apply_model.py, DICOM slices, or one file."""
    case = result_case(path) if path.is_dir() else None
    if case is None and path.name.endswith("_masked.nii.gz"):
        case = Case(case_name(path), masked=path)
    if case is None:
        labelled = not path.is_dir() and is_label_map(np.asarray(read_ras(path).dataobj))
        case = Case(case_name(path), **{"label" if labelled else "scan": path})
    if config.label is not None:
        if case.scan is None or len(config.paths) != 1:
            raise InputError(f"--label {config.label}: belongs to one scan, got {path}")
        case.label = config.label
    case.truth = config.truth or case.truth
    case.smoothing = config.smoothing
    return case


def result_case(folder: Path) -> Case | None:
    """The case that apply_model.py wrote into `folder`; None when it holds something else."""
    labels = sorted(folder.glob("*_label.nii.gz"))
    if not labels:
        return None
    if len(labels) > 1:
        raise InputError(f"{folder}: must hold one case, got {len(labels)} label maps; name one")
    name = labels[0].name.removesuffix("_label.nii.gz")
    masked, record = folder / f"{name}_masked.nii.gz", folder / f"{name}.json"
    known = json.loads(record.read_text()) if record.exists() else {}

    def existing(key: str) -> Path | None:  # results may have been copied to another machine
        path = Path(known[key]) if known.get(key) else None
        if path is not None and not path.exists():
            print(f"{record}: its {key} {path} is no longer there; drawn without it")
            return None
        return path

    return Case(
        name, existing("image"), masked if masked.exists() else None, labels[0], existing("truth")
    )


# ---------------------------------------------------------------------------------------
# Geometry: masks and affines in, surfaces and numbers in patient millimetres (RAS) out
# ---------------------------------------------------------------------------------------


class PatientVolume(vedo.Volume):
    """A volume that is drawn, and gives surfaces, where its affine puts it in the patient.

    vedo knows an origin and a spacing only. array: (X, Y, Z); affine: 4×4, voxel index → RAS mm.
    One voxel of `outside` is laid around it, so that surfaces close at the border.
    """

    smoothing = 0  # iterations that every surface is smoothed with

    def __init__(self, array: np.ndarray, affine: np.ndarray, outside: float = 0) -> None:
        super().__init__(np.pad(array, 1, constant_values=outside))
        self.affine = affine @ nib.affines.from_matvec(np.eye(3), [-1, -1, -1])
        self.actor.SetUserMatrix(vtk_matrix(self.affine))

    def isosurface(self, value: float | None = None, flying_edges: bool = True) -> vedo.Mesh:
        """Marching cubes (VTK's flying edges) in patient mm, faces turned outwards."""
        mesh = super().isosurface(value, flying_edges=True).apply_transform(self.affine)
        if np.linalg.det(self.affine[:3, :3]) < 0:
            mesh.reverse()
        return smooth(mesh, self.smoothing)


def vtk_matrix(affine: np.ndarray) -> vtkclasses.vtkMatrix4x4:
    matrix = vtkclasses.vtkMatrix4x4()
    matrix.DeepCopy(affine.ravel().tolist())
    return matrix


def foreground_box(labels: np.ndarray) -> tuple[slice, slice, slice]:
    """Smallest box that holds all labels above 0; labels: (X, Y, Z) with at least one."""
    foreground = labels > 0
    seen = [np.flatnonzero(foreground.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    x, y, z = (slice(int(index[0]), int(index[-1]) + 1) for index in seen)
    return x, y, z


def crop(labels: nib.Nifti1Image, path: Path) -> nib.Nifti1Image:
    """`labels` around its foreground; InputError when there is none."""
    array = np.asarray(labels.dataobj)
    if not array.any():
        raise InputError(
            f"{path}: the label map is empty (no voxel above 0), so there is no organ to draw"
        )
    return labels.slicer[foreground_box(array)]


def class_masks(labels: nib.Nifti1Image) -> dict[str, np.ndarray]:
    """Class → boolean mask (X, Y, Z); a tumour belongs to the liver as well, as in CLASSES."""
    array = np.asarray(labels.dataobj)
    names = {value: name for name, value in LABEL_VALUES.items()}
    masks = {}
    for value in range(1, int(array.max()) + 1):
        name = names.get(value, f"label {value}")
        mask = np.isin(array, CLASSES.get(name, (value,)))
        if mask.any():
            masks[name] = mask
    return masks


def colour_of(name: str) -> str:
    value = LABEL_VALUES.get(name) or int(name.split()[-1])
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS) + 1]


def surface_mm(mask: np.ndarray, affine: np.ndarray) -> vedo.Mesh:
    """Closed surface of a boolean mask (X, Y, Z), half a voxel around its outer voxel centres."""
    return PatientVolume(mask.astype(np.uint8), affine).isosurface(0.5)


def smooth(mesh: vedo.Mesh, iterations: int) -> vedo.Mesh:
    """Windowed sinc filter (Taubin et al. 1996): takes the slice steps away, not the volume.

    Of the pass bands the smoothest is used that keeps the volume within 1 %, else none: a lesion
    of a few voxels is all step.
    """
    for name in list(mesh.pointdata.keys()):  # normals of the steps would shade the smooth surface
        mesh.pointdata.remove(name)
    for pass_band in PASS_BANDS if iterations and mesh.npoints else ():
        smoothed = mesh.clone().smooth(iterations, pass_band, feature_angle=180)
        if abs(smoothed.volume() / mesh.volume() - 1) < 0.01:
            mesh = smoothed
            break
    return mesh.compute_normals(cells=False, consistency=False)


def class_meshes(labels: nib.Nifti1Image, smoothing: int) -> dict[str, vedo.Mesh]:
    return {
        name: smooth(surface_mm(mask, labels.affine), smoothing).color(colour_of(name))
        for name, mask in class_masks(labels).items()
    }


def measure(mask: np.ndarray, affine: np.ndarray, mesh: vedo.Mesh) -> dict:
    """Volumes in ml (by voxels, by mesh, of connected parts), surface in cm², extent in mm."""
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    volume_ml = float(np.count_nonzero(mask) * voxel_ml)
    parts, _ = ndi.label(mask, np.ones((3, 3, 3)))
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    return {
        "volume_ml": volume_ml,
        "mesh_ml": mesh.volume() / 1000,
        "change_percent": 100 * (mesh.volume() / 1000 / volume_ml - 1),
        "surface_cm2": mesh.area() / 100,
        "extent_mm": (high - low).tolist(),
        "parts_ml": sorted((np.bincount(parts.ravel())[1:] * voxel_ml).tolist(), reverse=True),
    }


def direction_letters(direction: np.ndarray) -> str:
    """Where a RAS vector points, strongest axis first: "R", "SA"; parts below 22.5° left out."""
    names = [
        pair[0] if part > 0 else pair[1]
        for pair, part in zip(("RL", "AP", "SI"), direction, strict=True)
    ]
    strong = np.abs(direction) > np.sin(np.pi / 8) * np.linalg.norm(direction)
    return "".join(names[i] for i in np.argsort(-np.abs(direction)) if strong[i])


def darkness(hu: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """How much darker than the organ's median (X, Y, Z) in HU, noise averaged away; 0 at its rim.

    The mean is taken over the organ's inner voxels only (normalised convolution, 1.5 mm), because
    the outermost ones hold some fat, and a dark rim would hide the tumours.
    """
    inner = ndi.binary_erosion(mask, iterations=2)
    sigma = 1.5 / np.array(nib.affines.voxel_sizes(affine))
    weight = ndi.gaussian_filter(inner.astype(np.float32), sigma, truncate=2)
    darker = np.where(inner, np.median(hu[mask]) - hu, 0).astype(np.float32)
    total = ndi.gaussian_filter(darker, sigma, truncate=2)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0.05)


# ---------------------------------------------------------------------------------------
# Scenes: one function per mode returns a plotter, in a window or off screen
# ---------------------------------------------------------------------------------------

VIEWS = {  # where the viewer stands, and what is up, as RAS vectors
    "anterior": ((0, 1, 0), (0, 0, 1)),
    "posterior": ((0, -1, 0), (0, 0, 1)),
    "right": ((1, 0, 0), (0, 0, 1)),
    "left": ((-1, 0, 0), (0, 0, 1)),
    "superior": ((0, 0, 1), (0, 1, 0)),
}


def scalars(case: Case) -> tuple[np.ndarray, np.ndarray, float]:
    """What surface and rays draw: array (X, Y, Z) of HU or label values, affine, value outside.

    HU are clipped to whole tens: IsosurfaceBrowser keeps its surfaces under two digits of the
    isovalue, and with other steps than of 10 HU different isovalues would share one surface.
    """
    if case.labels is None:  # a bare scan: every second voxel where it is large
        scan = read_ras(case.scan)
        image = scan.slicer[tuple(slice(None, None, -(-n // 256)) for n in scan.shape)]
        low, high = -500.0, 1000.0
    elif case.organ_hu is None:
        return np.asarray(case.organ.dataobj).astype(np.float32), case.organ.affine, 0.0
    else:
        image, (low, high) = case.organ_hu, HU_WINDOW
    array = np.asarray(image.dataobj)
    high = max(10 * (min(high, array.max()) // 10), low + 10)
    return array.clip(low, high).astype(np.float32), image.affine, low


def window(config: Config, offscreen: bool) -> dict:
    return {"size": config.size, "bg": BACKGROUND, "offscreen": offscreen, "title": "Liver in 3D"}


def surface_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """Marching cubes with a slider for the isovalue."""
    array, affine, low = scalars(case)
    volume = PatientVolume(array, affine, low)
    volume.smoothing = config.smoothing
    if case.labels is None:
        first, step, unit, colour = 200.0, 10, "HU", BONE
    elif case.organ_hu is None:
        first, step, unit, colour = 0.5, 0.1, "label", LABEL_COLOURS[1]
    else:  # half-way between the air around the organ and the organ
        half = (low + np.median(array[array > low])) / 2
        first, step, unit, colour = float(10 * (half // 10)), 10, "HU", LABEL_COLOURS[1]
    steps = round((float(array.max()) - low) / step) + 1
    plotter = vedo.applications.IsosurfaceBrowser(
        volume, first, c=colour, res=steps, delayed=True, **window(config, offscreen)
    )
    plotter.slider.representation.SetTitleText(f"surface at {unit}")
    return plotter


class RayVolume(PatientVolume):
    """A volume for ray casting that brings the opacities of each projection.

    Composite adds opacity up per mm, a maximum projection uses it once per ray.
    """

    def transfer(self, colours: list, composite: list, maximum: list) -> RayVolume:
        self.colours, self.opacities = colours, (composite, maximum)
        return self.mode(0)

    def mode(self, mode: int | None = None) -> RayVolume | int:
        if mode is None:
            return super().mode()
        self.color(self.colours).alpha(self.opacities[mode]).shade(False)
        return super().mode(mode)


def rays_volume(case: Case) -> RayVolume:
    """Volume and transfer function in which tumours show inside the liver.

    With HU the scalar is how much darker a voxel is than the organ's median: tumours stand out in
    both projections, and the border to the outside passes through the range of bright vessels,
    which hardly shows, and not through that of tumours.
    """
    if case.labels is not None and case.organ_hu is not None:
        hu, mask = np.asarray(case.organ_hu.dataobj), np.asarray(case.organ.dataobj) > 0
        darker = darkness(hu, mask, case.organ.affine).clip(-150, 150)
        darker[~mask] = -150
        volume = RayVolume(darker, case.organ.affine, -150)
        liver, tumour = LABEL_COLOURS[1], LABEL_COLOURS[2]
        return volume.transfer(
            [(-80, "white"), (-20, liver), (15, liver), (30, tumour), (80, tumour)],
            [(-150, 0), (-80, 0.004), (-20, 0.004), (15, 0.004), (30, 0.1), (80, 0.2)],
            [(-150, 0), (-20, 0.2), (15, 0.3), (30, 0.6), (60, 0.95)],
        )
    array, affine, low = scalars(case)
    volume = RayVolume(array, affine, low)
    if case.labels is None:
        return volume.transfer(
            [(-200, "#b5651d"), (100, "#c0504d"), (250, BONE), (600, "white")],
            [(-500, 0), (100, 0), (180, 0.02), (300, 0.2), (600, 0.5)],
            [(-500, 0), (0, 0), (100, 0.2), (600, 1)],
        )
    values = range(1, int(array.max()) + 1)
    colours = [(value, LABEL_COLOURS[(value - 1) % 5 + 1]) for value in values]
    haze = [(0, 0), (0.5, 0), (1, 0.01)]
    return volume.transfer(colours, [*haze, (2, 0.2)], [(0, 0), (0.5, 0), (1, 0.3), (2, 0.95)])


def rays_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """Ray casting. vedo's window for it cannot be made without a display; a plain one can."""
    volume = rays_volume(case).mode(config.projection == "maximum")
    if offscreen:
        return vedo.Plotter(**window(config, True)).add(volume)
    plotter = vedo.applications.RayCastPlotter(volume, **window(config, False))
    volume.mode(volume.mode())  # the window has put its own opacities in
    return plotter


def organs_scene(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    """Every class as a smooth surface: the liver translucent, tumours solid, the skin faint."""
    plotter = vedo.Plotter(**window(config, offscreen))
    for name, mesh in case.meshes.items():
        plotter.add(lit(mesh.clone()).alpha(0.4 if name == "liver" else 1))
    return plotter


def lit(mesh):
    return mesh.lighting(ambient=0.4, diffuse=0.65, specular=0.1, specular_power=15)


SCENES = {"surface": surface_scene, "rays": rays_scene, "organs": organs_scene}


def draw(case: Case, config: Config, offscreen: bool) -> vedo.Plotter:
    vedo.settings.use_depth_peeling = True  # translucent surfaces in the right order …
    vedo.settings.multi_samples, vedo.settings.use_fxaa = 0, True  # … for which VTK wants these
    plotter = SCENES[config.mode](case, config, offscreen)
    look_from(plotter, config.view)
    annotate(plotter, case, config)
    return plotter


def look_from(plotter: vedo.Plotter, view: str) -> None:
    """Face the patient from one side, everything in the picture."""
    place, up = VIEWS[view]
    camera = plotter.camera
    camera.SetFocalPoint(0, 0, 0)
    camera.SetPosition(place)
    camera.SetViewUp(up)
    plotter.renderer.ResetCamera()
    camera.Zoom(1.4)


def mark_directions(renderer: vtkclasses.vtkRenderer) -> None:
    """Letters R L A P S I at the picture's edges, right again before every rendering."""
    places = {"left": (0.02, 0.5), "right": (0.98, 0.5), "top": (0.5, 0.97), "bottom": (0.5, 0.03)}
    texts = {}
    for side, place in places.items():
        texts[side] = vedo.Text2D("", place, 1.3, c=INK, justify="center", font="Calco")
        renderer.AddActor(texts[side].actor)

    def update(*_) -> None:
        camera = renderer.GetActiveCamera()
        up = np.array(camera.GetViewUp())
        right = np.cross(camera.GetDirectionOfProjection(), up)
        up = np.cross(right, camera.GetDirectionOfProjection())
        for side, direction in zip(places, (-right, right, up, -up), strict=True):
            texts[side].text(direction_letters(direction))

    renderer.AddObserver("StartEvent", update)


def annotate(plotter: vedo.Plotter, case: Case, config: Config) -> None:
    """Measurements, legend and mode."""
    mode = config.mode + (f", {config.projection}" if config.mode == "rays" else "")
    lines = [f"{case.name} · {mode}", *case.report()]
    plotter.add(vedo.Text2D("\n".join(lines), "top-left", 0.75, c=INK, font="Calco"))
    for renderer in plotter.renderers:
        mark_directions(renderer)


def write_screenshot(case: Case, config: Config, path: Path) -> None:
    plotter = draw(case, config, offscreen=True)
    with atomic_write(path) as temporary:
        plotter.screenshot(str(temporary))
    plotter.close()


def check_outputs(config: Config) -> None:
    for name, suffixes in SUFFIXES.items():
        path = getattr(config, name)
        if path is not None and path.suffix not in suffixes:
            raise InputError(f"--{name} {path}: must end in {' '.join(suffixes)}")


WRITERS = {"screenshot": write_screenshot}


if __name__ == "__main__":
    command_line(main, Config, __doc__)
