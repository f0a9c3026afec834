"""Show a segmented liver in 3D in a window; write pictures, films, surfaces and a web page.

    python visualize_3d.py results/liver_3     # a window: keys 1-5 change the mode, h hides help
    python visualize_3d.py results             # all cases of a folder: key n opens the next one
    python visualize_3d.py ct.nii.gz --label label.nii.gz --mode organs --screenshot liver.png

Volumes are turned to the nearest RAS axes and drawn through their complete affine, in patient mm:
x points to the patient's Right, y to Anterior, z to Superior. Files need no display.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from data.settings import read_settings, run_script

Mode = Literal["surface", "rays", "organs", "slices", "compare"]
View = Literal["anterior", "posterior", "right", "left", "superior"]


@dataclass
class Config:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # results, results/<case>, label map or scan
    mode: Mode = "surface"  # the (first) picture
    projection: Literal["composite", "maximum"] = "composite"  # how ray casting combines voxels
    view: View = "anterior"  # side of the patient that the viewer faces
    label: Path | None = None  # label map of the scan in `paths`
    truth: Path | None = None  # reference label map to compare with
    trust_image_grid: bool = False  # lay label maps on the scan voxel by voxel
    screenshot: Path | None = None  # .png to write
    turntable: Path | None = None  # one turn around the patient: .gif
    movie: Path | None = None  # axial slices one after the other, outlined: .gif
    mesh: Path | None = None  # surface of the organ in mm: .stl .ply .obj .vtp
    mesh_space: Literal["LPS", "RAS"] = "LPS"  # axes of `mesh`; 3D Slicer takes files as LPS
    html: Path | None = None  # one self-contained page that turns in any browser, offline
    smoothing: int = 80  # iterations of the windowed sinc filter; 0 = bare marching cubes
    size: tuple[int, int] = (1200, 900)  # pixels of the window and of every picture


if __name__ == "__main__":  # --help and wrong options end here, before the libraries load
    CONFIG = read_settings(Config, __doc__, libraries=("vedo",))

import functools
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import scipy.ndimage as ndi
import vedo
from nibabel.affines import apply_affine, from_matvec
from PIL import Image
from scipy.spatial import cKDTree
from skimage.measure import find_contours
from vedo import vtkclasses

from data.check import is_label_map
from data.datasets import find_scans
from data.evaluate import do_each, refuse_failures
from data.files import InputError, atomic_write, read_json
from data.labels import BACKGROUND, USUAL_LABELS, group_tumours, is_tumour
from data.pictures import PLANES, TRUTH_COLOUR, choose_hu_window, class_colour, find_busiest_slice
from data.scans import name_label, read_label_map, read_scan, restore_label
from data.settings import show_progress
from data.volumes import AIR_HU, BODY_HU, Volume, find_bounding_box, name_case

BACKGROUND_COLOUR, INK, BONE = "#14181d", "#f2f2f2", "#e9dcc3"
DARK_TISSUE = "#b7d7c9"  # darker than the organ, but of no class: no class has this colour
ORGAN_HU = 100  # drawn where there is no scan
PASS_BANDS = (0.002, 0.01, 0.05)  # of the sinc filter: removes waves under 100, 45, 20 edges
TURN_FRAMES, MOVIE_MARGIN_MM = 60, 15  # the margin: beyond the first and the last foreground
PAGE_TRIANGLES = 60_000  # per surface: some MB, which a laptop turns smoothly
VIEWS = dict(  # where the viewer stands: RAS vectors
    zip(get_args(View), [(0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1)], strict=True)
)


def main(config: Config) -> None:
    if not config.paths:
        raise InputError("nothing to draw: give results/<case>, results, a label map or a scan")
    outputs = {option: getattr(config, option) for option in OUTPUTS if getattr(config, option)}
    for option, path in outputs.items():
        if path.suffix not in OUTPUTS[option][1]:
            raise InputError(f"--{option} {path}: must end in {', '.join(OUTPUTS[option][1])}")
    paths = [case for path in config.paths for case in list_cases(path)]
    if not outputs:
        open_window(paths, config)
        return
    names = sorted(name_case(path.absolute()) for path in paths)
    if twice := [name for name in set(names) if names.count(name) > 1]:
        raise InputError(f"two cases are called {twice[0]}: draw them one after the other")
    failed = do_each(paths, str, lambda path: write_outputs(path, config, outputs, len(paths) > 1))
    refuse_failures(failed, len(paths), "cases")


def list_cases(path: Path) -> list[Path]:
    """Return the cases that a path stands for: those in a folder of results or scans, or itself."""
    if not path.is_dir() or any(path.glob("*_label.nii.gz")):
        return [path]
    results = sorted({file.parent for file in path.glob("*/*_label.nii.gz")})
    try:
        return results or find_scans(path)
    except InputError:  # the path is opened as a case, which names the fault
        return [path]


def write_outputs(path: Path, config: Config, outputs: dict[str, Path], several: bool) -> None:
    """Write the files asked for of one case; of several cases, its name goes into their names."""
    case = find_case(path, config)
    print(case.name, *case.report, sep="\n  ")
    for option, target in outputs.items():
        if several:
            target = target.with_name(f"{target.stem}_{case.name}{target.suffix}")
        OUTPUTS[option][0](case, config, target)
        print(f"  wrote {target}")


# ---------------------------------------------------------------------------------------
# A case and its surfaces, in patient millimetres (RAS)
# ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """One case: scan and label maps in RAS on one grid, None where there is none."""

    name: str
    scan: Volume | None  # HU of a CT
    masked: bool  # whether the scan holds the organ alone
    labels: Volume | None  # uint8
    reference: Volume | None  # uint8
    names: dict[str, int]  # class → value, as far as known
    smoothing: int  # iterations

    @property
    def shown(self) -> Volume:
        """Return what slices show: the scan, or the label map where there is none."""
        return self.scan or self.labels

    @property
    def guide(self) -> np.ndarray:
        """Return the label map (X, Y, Z) that chooses slices; zeros where there is none."""
        labels = self.labels or self.reference
        return labels.data if labels else np.zeros(self.shown.shape, np.uint8)

    @functools.cached_property
    def organ(self) -> Volume:
        """Return the label map cropped to its foreground; InputError where there is none."""
        return crop_to_foreground(self.labels, self.name)

    @functools.cached_property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """Return class → values, an organ first; an organ has the values of its tumours too."""
        found, values = dict(self.names), np.unique(self.organ.data).tolist()
        found |= {f"label_{value}": value for value in values if value not in {0, *found.values()}}
        first = next((name for name in found if not is_tumour(name)), None)
        names = sorted(found, key=lambda name: name != first)
        inside = {names[organ - 1]: tumours for organ, tumours in group_tumours(names).items()}
        return {
            name: (found[name], *(found[names[index - 1]] for index in inside.get(name, ())))
            for name in names
        }

    @functools.cached_property
    def meshes(self) -> dict[str, vedo.Mesh]:
        """Return class → smooth surface, an organ first."""
        meshes = {}
        for index, (name, values) in enumerate(self.classes.items(), start=1):
            mask = self.organ.like(np.isin(self.organ.data, values).astype(np.uint8))
            if mask.data.any():
                meshes[name] = make_surface(mask, self.smoothing, class_colour(index))
        return meshes

    @functools.cached_property
    def report(self) -> list[str]:
        """Return the measurements as lines of text, for the terminal and for the picture."""
        if self.labels is None or not self.labels.data.any():
            return ["no label map" if self.labels is None else "the label map is empty"]
        lines = [] if self.scan else [f"no scan: organs drawn as {ORGAN_HU} HU"]
        for name, mesh in self.meshes.items():
            mask = np.isin(self.organ.data, self.classes[name])
            parts, _ = ndi.label(mask, np.ones((3, 3, 3)))
            sizes = sorted(np.bincount(parts.ravel())[1:] * self.organ.voxel_ml, reverse=True)
            lines += [
                f"{name} {sum(sizes):.1f} ml, surface {mesh.area() / 100:.0f} cm²",
                "  R–L {:.0f} × A–P {:.0f} × I–S {:.0f} mm".format(*np.ptp(mesh.vertices, axis=0)),
                f"  smoothing changed the volume by {mesh.smoothing_percent:+.2f} %",
            ]
            if is_tumour(name):
                told = ", ".join(f"{ml:.1f}" for ml in sizes[:5]) + ", …" * (len(sizes) > 5)
                lines += [f"  parts {len(sizes)}: {told} ml"]
        return lines


def find_case(path: Path, config: Config) -> Case:
    """Read the case of a folder of apply_model.py, a DICOM folder or one file.

    Raises InputError where `--label` has no scan, a label map lies on another grid than the scan or
    holds other values than 0 to 255, or a file cannot be read.
    """
    found: dict[str, Any] = {}
    if path.is_dir() and any(path.glob("*_label.nii.gz")):
        found = read_result(path)
    elif path.name.endswith(("_masked.nii.gz", "_masked.nii")):
        found["masked"] = path
    else:
        is_label = not path.is_dir() and is_label_map(read_scan(path).read())
        found["label" if is_label else "image"] = path
    if config.label and ("image" not in found or len(config.paths) != 1):
        raise InputError(f"--label {config.label}: needs one scan beside it, got {path}")
    image, maps = found.get("image") or found.get("masked"), []
    grid = read_scan(image or found["label"])
    names = found.get("classes") or {name: v for name, (v,) in USUAL_LABELS.items()}
    options = {"trust_grid": config.trust_image_grid or bool(found.get("trust_image_grid"))}
    for file in config.label or found.get("label"), config.truth or found.get("truth"):
        label = None
        if file:  # values without a name are drawn too
            label = read_label_map(file, grid, names, ignore=range(256), **options).ras
            label = label.like(label.data.astype(np.uint8, copy=False))
        elif image == found.get("masked") and not maps:  # its corner lies outside every organ
            label = grid.ras.like((grid.ras.data != grid.ras.data[0, 0, 0]).astype(np.uint8))
        maps.append(label)
    scan, names = grid.ras if image else None, {name: v for name, v in names.items() if v}
    name, masked = found.get("case", name_case(path)), "image" not in found
    return Case(name, scan, masked, *maps, names, config.smoothing)


def read_result(folder: Path) -> dict[str, Any]:
    """Return what apply_model.py wrote and recorded of a case; files that are gone are left out."""
    labels = sorted(folder.glob("*_label.nii.gz"))
    if len(labels) > 1:
        raise InputError(f"{folder}: must hold one case, got {len(labels)} label maps; name a file")
    name = labels[0].name.removesuffix("_label.nii.gz")
    record, masked = folder / f"{name}.json", folder / f"{name}_masked.nii.gz"
    found = {"case": name, **(read_json(record) if record.exists() else {}), "label": labels[0]}
    for key in [key for key in ("image", "truth") if found.get(key)]:
        path = found[key] = restore_label(found[key])
        parts = [part for _, part in path] if isinstance(path, tuple) else [path]
        if not all(part.exists() for part in parts):
            print(f"{record}: its {key} {name_label(found.pop(key))} is gone; drawn without it")
    return found | ({"masked": masked} if masked.exists() else {})


def crop_to_foreground(labels: Volume | None, name: str) -> Volume:
    """Return `labels` around its foreground; InputError where there is none."""
    if labels is None or not labels.data.any():
        raise InputError(
            f"{name}: no organ to draw, got {'an empty' if labels else 'no'} label map; give one "
            "with --label, or look at the scan with --mode slices"
        )
    return labels.crop(find_bounding_box(labels.data))


def make_surface(
    volume: Volume, iterations: int, colour: str, value: float = 0.5, outside: float = 0
) -> vedo.Mesh:
    """Return the isosurface of a volume in patient mm without slice steps, faces outwards.

    One voxel of `outside` around the volume closes it. Of the windowed sinc filters (Taubin et al.
    1996) the smoothest is taken that changes the volume by less than 1 %, else none: a lesion of a
    few voxels is all step. The change is in `mesh.smoothing_percent`.
    """
    padded = vedo.Volume(np.pad(volume.data, 1, constant_values=outside))
    to_patient = volume.affine @ from_matvec(np.eye(3), [-1, -1, -1])  # vedo knows no affine
    mesh = padded.isosurface(value, flying_edges=True).apply_transform(to_patient)
    if np.linalg.det(to_patient[:3, :3]) < 0:
        mesh.reverse()
    for name in list(mesh.pointdata.keys()):  # normals of the steps would shade the smooth surface
        mesh.pointdata.remove(name)
    change, bare_mm3 = 0.0, mesh.volume()
    for pass_band in PASS_BANDS if iterations and mesh.npoints else ():
        smoothed = mesh.clone().smooth(iterations, pass_band, feature_angle=180)
        percent = 100 * (smoothed.volume() / bare_mm3 - 1)
        if abs(percent) < 1:
            mesh, change = smoothed, percent
            break
    mesh.color(colour).lighting(ambient=0.35, diffuse=0.75, specular=0.1, specular_power=15)
    mesh.compute_normals(cells=False, consistency=False)
    mesh.colour, mesh.smoothing_percent = colour, change
    return mesh


def measure_distance(points: np.ndarray, mask: Volume, surface: np.ndarray) -> np.ndarray:
    """Return the distance (mm) of points (N, 3) from a mask's surface (M, 3), negative inside."""
    distance = cKDTree(surface).query(points)[0]
    index = apply_affine(np.linalg.inv(mask.affine), points).T
    inside = ndi.map_coordinates(mask.data.astype(np.float32), index, order=1) > 0.5
    return np.where(inside, -distance, distance)


# ---------------------------------------------------------------------------------------
# Scenes: one function per mode makes the panels that a window or a picture shows
# ---------------------------------------------------------------------------------------

WHOLE = (0, 0, 1, 1)  # left, bottom, right, top of a panel, as fractions of the window
PANELS = {"axial": (0, 0.5, 0.5, 1), "coronal": (0.5, 0.5, 1, 1), "sagittal": (0.5, 0, 1, 0.5)}
SIDES = {"axial": -1, "coronal": 1, "sagittal": -1}  # slices seen from below, the front, the left


@dataclass
class Scene:
    """What one mode shows: panels, whose actors stay while another mode is shown."""

    panels: list[Any]  # a vtkRenderer each; views turn the last one, and words stand in it
    legend: dict[str, str]  # name → colour
    sliders: Sequence[vedo.addons.Slider2D] = ()


def read_hu(case: Case) -> tuple[Volume, int, int]:
    """Return HU (X, Y, Z) float32 in the organ's box, clipped: lowest outside the organ; range."""
    inside, labels = case.organ.data > 0, case.labels.data
    hu = case.scan.data if case.scan else np.where(labels, ORGAN_HU, AIR_HU)
    low, high = map(int, choose_hu_window(hu))
    part = hu[find_bounding_box(labels)].clip(low, high).astype(np.float32)
    return case.organ.like(np.where(inside, part, low)), low, max(high, low + 10)


def make_surface_scene(case: Case, config: Config) -> Scene:
    """Return marching cubes of the organ with a slider for the isovalue."""
    volume, low, high = read_hu(case)
    panel, shown, colour = make_panel(config), [], class_colour(1)

    def change(value: float) -> None:
        new = make_surface(volume, config.smoothing, colour, round(value), low)
        swap_actors([panel], shown, [new])

    values = (low + 1, low + (high - low) // 3, high - 1)  # of CT, first -50 HU
    slider = make_slider(change, values, "isovalue (HU in CT)", delayed=True)
    return Scene([panel], {"organ above the slider's value": colour}, [slider])


def make_rays_scene(case: Case, config: Config) -> Scene:
    """Return the ray casting of the organ, with tumours visible inside.

    A value is by how many HU a voxel is darker than the organ's median, so that the organ's edge
    leads through the values of bright vessels, which hardly show. Noise is averaged; the outermost
    voxels count as 0, because they hold some fat. Tumours of the label map are dark alone.
    """
    hu, inside = read_hu(case)[0], case.organ.data > 0
    inner = ndi.binary_erosion(inside, iterations=2)
    darker = np.where(inner, np.median(hu.data[inside]) - hu.data, 0)
    size = hu.spacing_mm  # as vedo's spacing too, so that opacities count per mm
    darker = ndi.gaussian_filter(darker, 1.5 / np.array(size), truncate=2)
    organ, dark, told = class_colour(1), DARK_TISSUE, "over 30 HU darker than it"
    if tumours := [name for name in case.meshes if is_tumour(name)]:
        values = [case.classes[name][0] for name in tumours]
        darker = np.where(np.isin(case.organ.data, values), 150, darker.clip(max=15))
        dark, told = case.meshes[tumours[0]].colour, ", ".join(tumours)
    padded = np.pad(np.where(inside, darker.clip(-150, 150), -150), 1, constant_values=-150)
    volume = vedo.Volume(padded.astype(np.float32), spacing=size)
    volume.color([(-80, "white"), (-20, organ), (15, organ), (30, dark)]).shade(False)
    volume.mode(int(config.projection == "maximum"))
    matrix = vtkclasses.vtkMatrix4x4()
    matrix.DeepCopy((hu.affine @ from_matvec(np.diag(1 / np.array(size)), [-1, -1, -1])).ravel())
    volume.actor.SetUserMatrix(matrix)
    if sys.platform != "darwin" and not os.environ.get("DISPLAY"):
        volume.mapper.SetRequestedRenderModeToRayCast()  # 2.5 times as fast as OpenGL on a CPU

    def change(strength: float) -> None:
        strength *= 20 if config.projection == "maximum" else 1  # one voxel stands for its ray
        opacity = volume.properties.GetScalarOpacity()
        opacity.RemoveAllPoints()  # vedo's alpha() would give the last value to the data's end
        for value, per_mm in (-150, 0), (-80, 0.01), (15, 0.01), (30, 0.1), (80, 0.2):
            opacity.AddPoint(value, min(1.0, per_mm * strength))

    slider = make_slider(change, (0.2, 1, 4), "opacity ×", tformat="%.1f")
    legend = {next(iter(case.classes)): organ, told: dark}
    return Scene([make_panel(config, volume, peel=False)], legend, [slider])


def make_organs_scene(case: Case, config: Config) -> Scene:
    """Return every class as a smooth surface: organ translucent, tumours solid, skin faint.

    The skin comes from a 3 mm grid, without table, lungs and bowel gas.
    """
    shown = [mesh.clone() for mesh in case.meshes.values()]
    legend = {name: mesh.colour for name, mesh in case.meshes.items()}
    if not is_tumour(next(iter(legend))):
        shown[0].alpha(0.35)
    if case.scan and not case.masked:
        thin = [slice(None, None, max(1, round(3 / mm))) for mm in case.scan.spacing_mm]
        coarse = case.scan.crop(thin)
        parts, count = ndi.label(ndi.binary_opening(coarse.data > BODY_HU))
        largest = np.bincount(parts.ravel())[1:].argmax() + 1 if count else -1
        body = [ndi.binary_fill_holes(level) for level in np.moveaxis(parts == largest, 2, 0)]
        skin = coarse.like(np.stack(body, axis=2).astype(np.uint8))
        shown.append(make_surface(skin, 50, BONE).alpha(0.1))
        legend["skin"] = BONE
    return Scene([make_panel(config, *shown)], legend)


Outline = tuple[str, str, np.ndarray, Sequence[int]]  # name, colour, label map, its values inside


def list_outlines(case: Case) -> list[Outline]:
    """Return the outlines of the reference, in blue, and of the predicted classes."""
    outlines: list[Outline] = []
    if case.reference:
        labels = case.reference.data
        values = np.unique(labels[find_bounding_box(labels)])
        values = values[values > 0]
        parts = [values, *([value] for value in values[1:])]  # liver with its tumours, tumours
        outlines += [("reference", TRUTH_COLOUR, labels, part) for part in parts]
    if case.labels and case.labels.data.any():
        for name, mesh in case.meshes.items():
            outlines.append((name, mesh.colour, case.labels.data, case.classes[name]))
    return outlines


def draw_slice(scan: Volume, outlines: list[Outline], plane: str, index: int) -> list[Any]:
    """Return one slice of a RAS scan as a grey rectangle with outlines, in patient mm.

    The outlines lie half a voxel in front of the slice, on the side from which it is seen.
    """
    axis = PLANES[plane][0]
    array = np.moveaxis(scan.data, axis, 0)[index]
    low, high = choose_hu_window(scan.data)
    grey = ((array.T.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    ends = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    corners = np.insert(ends * array.shape - 0.5, axis, index, axis=1)
    sheet = vedo.Mesh([apply_affine(scan.affine, corners), [[0, 1, 2, 3]]])
    sheet.lighting("off").color("white").texture(vedo.Image(grey), tcoords=ends)
    lines = []
    for _, colour, labels, values in outlines:
        mask = np.isin(np.moveaxis(labels, axis, 0)[index], values)
        for line in find_contours(np.pad(mask, 1).astype(float), 0.5):
            points = np.insert(line - 1, axis, index + SIDES[plane] / 2, axis=1)
            lines.append(vedo.Line(apply_affine(scan.affine, points), c=colour, lw=2))
    return [sheet, *lines]


def make_slices_scene(case: Case, config: Config) -> Scene:
    """Return axial, coronal and sagittal slice in radiological view with sliders, and all in 3D."""
    meshes = case.meshes.values() if case.labels and case.labels.data.any() else ()
    space = make_panel(config, *meshes, box=(0, 0, 0.5, 0.5))
    panels, sliders = zip(*(make_slice_panel(case, plane, config, space) for plane in PANELS))
    return Scene([*panels, space], {name: c for name, c, *_ in list_outlines(case)}, sliders)


def make_slice_panel(case: Case, plane: str, config: Config, space: Any) -> tuple[Any, Any]:
    """Return a panel with one slice of a plane, which is shown in `space` too, and its slider."""
    outlines, axis, box = list_outlines(case), PLANES[plane][0], PANELS[plane]
    title, shown = make_text(config, "", (0.99, 0.99), "top-right"), []
    panel, scan = make_panel(config, title, box=box), case.shown

    def change(value: float) -> None:
        new = draw_slice(scan, outlines, plane, round(value) - 1)
        swap_actors([panel, space], shown, new)
        title.text(f"{plane} slice {value:.0f} of {scan.shape[axis]}")

    values = (1, find_busiest_slice(case.guide, axis) + 1, scan.shape[axis])
    ends = ((box[0] + 0.04, box[1] + 0.06), (box[0] + 0.16, box[1] + 0.06))
    slider = make_slider(change, values, f"steps of {scan.spacing_mm[axis]:.3g} mm", ends)
    steps = scan.affine[:3, :3]  # a row of the inverse is at right angles to the other two steps
    up = np.delete(steps, axis, axis=1)[:, 1]
    place_camera(panel, SIDES[plane] * np.linalg.inv(steps)[axis], up)
    panel.GetActiveCamera().SetParallelProjection(True)
    return panel, slider


def make_compare_scene(case: Case, config: Config) -> Scene:
    """Return the reference, and the prediction coloured by its distance from the reference."""
    if case.reference is None:
        raise InputError(f"{case.name}: to compare, give the reference label map with --truth")
    truth = crop_to_foreground(case.reference, "--truth")
    name, mesh = next((name, mesh.clone()) for name, mesh in case.meshes.items())
    mask = truth.data > 0  # where there is one organ only, all that is foreground
    if sum(not is_tumour(other) for other in case.classes) > 1:
        mask = np.isin(truth.data, case.classes[name])
    if not mask.any():
        raise InputError(f"{truth.name}: holds no {name} to compare with; give its label map")
    truth = truth.like(mask.astype(np.uint8))
    reference = make_surface(truth, config.smoothing, TRUTH_COLOUR)
    distance = measure_distance(mesh.vertices, truth, reference.vertices)
    far = np.abs(distance)
    limit = max(1.0, float(np.ceil(np.percentile(far, 99))))
    mesh.cmap("PuOr_r", distance, vmin=-limit, vmax=limit).add_scalarbar(
        "mm outside (+) or inside (-) the reference", ((0.15, 0.08), (0.85, 0.17)),
        horizontal=True, font_size=round(config.size[0] / 70), c=INK,
    )  # fmt: skip
    figures = (
        f"mean {far.mean():.1f}, 95 % under {np.percentile(far, 95):.1f}, largest {far.max():.1f}"
    )
    legend = {f"reference {name}": TRUTH_COLOUR, f"predicted {name}, outside it": "#f1a340"}
    legend |= {f"predicted {name}, inside it": "#b2abd2", f"mm from it: {figures}": INK}
    left = make_panel(config, reference, box=(0, 0, 0.5, 1))
    right = make_panel(config, mesh, box=(0.5, 0, 1, 1))
    right.AddViewProp(mesh.scalarbar)
    right.SetActiveCamera(left.GetActiveCamera())
    return Scene([right, left], legend)


SCENES: dict[Mode, Callable[[Case, Config], Scene]] = {
    "surface": make_surface_scene,
    "rays": make_rays_scene,
    "organs": make_organs_scene,
    "slices": make_slices_scene,
    "compare": make_compare_scene,
}


def make_panel(config: Config, *shown: Any, box: Sequence[float] = WHOLE, peel: bool = True) -> Any:
    """Return a renderer of vedo's objects, with letters R L A P S I at the edges of its `box`.

    `peel` orders translucent surfaces by depth. Letters are corrected before every rendering.
    """
    panel = vtkclasses.vtkRenderer()
    panel.SetBackground(vedo.get_color(BACKGROUND_COLOUR))
    panel.SetViewport(*box)
    panel.SetUseDepthPeeling(peel)
    panel.SetUseFXAA(True)
    places = (0.03, 0.5), (0.97, 0.5), (0.5, 0.965), (0.5, 0.035)
    letters = [make_text(config, "", place, "center", size=1.1) for place in places]
    swap_actors([panel], [], [*shown, *letters])

    def update(*_: Any) -> None:
        camera = panel.GetActiveCamera()
        forward = np.array(camera.GetDirectionOfProjection())
        right = np.cross(forward, camera.GetViewUp())
        up = np.cross(right, forward)
        for letter, direction in zip(letters, (-right, right, up, -up), strict=True):
            letter.text(name_direction(direction))
        panel.ResetCameraClippingRange()

    panel.AddObserver("StartEvent", update)
    return panel


def name_direction(direction: np.ndarray) -> str:
    """Return where a RAS vector points, strongest axis first ("R", "SA"), without parts < 22.5°."""
    letters = np.where(np.asarray(direction) > 0, list("RAS"), list("LPI"))
    strong = np.abs(direction) > np.sin(np.pi / 8) * np.linalg.norm(direction)
    return "".join(letters[axis] for axis in np.argsort(-np.abs(direction)) if strong[axis])


def swap_actors(panels: Sequence[Any], old: list[Any], new: Sequence[Any]) -> None:
    """Show the objects `new` in place of those in the list `old`, which then holds the new ones."""
    for panel in panels:
        for shown in old:
            panel.RemoveViewProp(shown.actor)
        for shown in new:
            panel.AddViewProp(shown.actor)
    old[:] = new


def make_slider(
    change: Callable[[float], None], values: Sequence[float], title: str,
    ends: Any = ((0.93, 0.62), (0.93, 0.92)), **options: Any,
) -> vedo.addons.Slider2D:  # fmt: skip
    """Call `change` with the first of (lowest, first, highest) values; return a slider for them."""
    low, first, high = values
    change(first)
    options = {"tformat": "%.0f", "c": INK, "title_size": 0.8} | options
    call = lambda slider, _: change(slider.value)  # noqa: E731
    return vedo.addons.Slider2D(call, low, high, first, ends, title, **options)


def place_camera(panel: Any, side: Sequence[float], up: Sequence[float]) -> None:
    """Put the camera on one side of everything that a panel shows."""
    place = {"pos": side, "focal_point": (0, 0, 0), "viewup": up}
    vedo.utils.camera_from_dict(place, modify_inplace=panel.GetActiveCamera())
    panel.ResetCamera()  # shows the sphere around everything; a liver is flatter
    panel.GetActiveCamera().Zoom(1.3)


def make_text(
    config: Config, text: str, place: tuple, justify: str, colour: str = INK, size: float = 0.85
) -> vedo.Text2D:
    """Return text at a place (0..1) of a panel, its size in proportion to the window's."""
    size *= config.size[0] / 1200
    look = {"c": colour, "bg": BACKGROUND_COLOUR, "alpha": 0.6, "font": "Calco"}
    return vedo.Text2D(text, place, size, justify=justify, **look)


# ---------------------------------------------------------------------------------------
# The window, and files
# ---------------------------------------------------------------------------------------

MODE_KEYS: dict[str, Mode] = {str(number): mode for number, mode in enumerate(SCENES, start=1)}
VIEW_KEYS: dict[str, View] = {view[0]: view for view in VIEWS}
HELP = " · ".join(f"{key} {mode}" for key, mode in MODE_KEYS.items())
HELP += " · m projection of rays · h hide or show this\n"
HELP += " · ".join(f"{key} {view}" for key, view in VIEW_KEYS.items())
HELP += " · mouse: turn, zoom · n next case · q quit"


def make_plotter(config: Config, offscreen: bool) -> vedo.Plotter:
    """Return an empty window, or an empty picture where `offscreen`."""
    vedo.settings.enable_default_keyboard_callbacks = False  # ours are shown on screen
    vedo.settings.multi_samples = 0  # as depth peeling needs it
    logger = vtkclasses.get_class("Logger")
    logger.SetStderrVerbosity(logger.VERBOSITY_ERROR)  # no display is no reason to warn
    options = {"size": config.size, "bg": BACKGROUND_COLOUR, "title": "Liver in 3D"}
    return vedo.Plotter(offscreen=offscreen, **options)


def put_scene(plotter: vedo.Plotter, scene: Scene) -> None:
    """Show a scene in place of the one before."""
    for panel in plotter.renderers:
        plotter.window.RemoveRenderer(panel)
    for panel in scene.panels:
        plotter.window.AddRenderer(panel)
    plotter.renderers, plotter.renderer = list(scene.panels), scene.panels[-1]


def draw(case: Case, config: Config, plotter: vedo.Plotter) -> Scene:
    """Make and show the scene of `config.mode` with words at the top left; not rendered yet."""
    scene = SCENES[config.mode](case, config)
    lines = [line for line in case.report if not line.startswith("  smoothing")]
    if len(scene.panels) > 1:  # room for few words
        lines = [line.partition(",")[0] for line in lines if not line.startswith(" ")]
    mode = config.mode + (f", {config.projection}" if config.mode == "rays" else "")
    rows = [("\n".join([f"{case.name} · {mode}", *lines]), INK)]
    for number, (name, colour) in enumerate(scene.legend.items(), start=len(lines) + 1):
        rows.append(("\n" * number + f"— {name}", colour))
    for text, colour in rows:
        words = make_text(config, text, (0.01, 0.99), "top-left", colour).background(None)
        swap_actors(scene.panels[-1:], [], [words])
    put_scene(plotter, scene)
    turn_view(scene, config)
    return scene


def turn_view(scene: Scene, config: Config) -> None:
    """Show the side of the patient that `config.view` names, in the panel in 3D."""
    up = (0, 1, 0) if config.view == "superior" else (0, 0, 1)
    place_camera(scene.panels[-1], VIEWS[config.view], up)
    if config.mode == "slices":  # seen exactly from one side, two of the slices would be lines
        scene.panels[-1].GetActiveCamera().Azimuth(25)
        scene.panels[-1].GetActiveCamera().Elevation(25)


class Window:
    """The window: keys change what it shows; a case's scenes are kept until the next case opens."""

    def __init__(self, paths: list[Path], config: Config) -> None:
        self.paths, self.config, self.number = paths, config, -1
        self.scenes: dict[tuple[str, str], Scene] = {}
        self.scene: Scene | None = None
        self.plotter = make_plotter(config, offscreen=False)
        self.plotter.window.SetNumberOfLayers(2)
        overlay, self.plotter.renderers = self.plotter.renderer, []
        overlay.SetLayer(1)  # above the panels: help and messages
        overlay.InteractiveOff()  # the mouse turns the panels
        self.text = make_text(config, HELP, (0.5, 0.01), "bottom-center", size=0.7)
        overlay.AddViewProp(self.text.actor)

    def show(self, config: Config) -> None:
        """Show one mode of the case; its scene is made on its first use."""
        key = config.mode, config.projection
        if key not in self.scenes:
            self.write(f"loading {config.mode} …")
            self.scenes[key] = draw(self.case, config, self.plotter)
        self.hide_sliders()
        self.config, self.scene = config, self.scenes[key]
        put_scene(self.plotter, self.scene)
        for slider, panel in zip(self.scene.sliders, self.scene.panels, strict=False):
            slider.interactor, slider.renderer = self.plotter.interactor, panel
            slider.on()
        print(f"{self.case.name}: {config.mode} {config.projection}", flush=True)

    def hide_sliders(self) -> None:
        for slider in self.scene.sliders if self.scene else ():
            slider.off()

    def write(self, text: str) -> None:
        """Write a message at the window's lower edge and render."""
        self.text.text(text)
        self.plotter.render()

    def press(self, key: str) -> None:
        """Do what a key says; a mode or case that cannot be shown says why and changes nothing."""
        text = HELP if self.text.text() == HELP else ""
        try:
            if key in MODE_KEYS:
                self.show(replace(self.config, mode=MODE_KEYS[key]))
            elif key in VIEW_KEYS and self.scene:
                self.config = replace(self.config, view=VIEW_KEYS[key])
                turn_view(self.scene, self.config)
            elif key == "m":
                other = "composite" if self.config.projection == "maximum" else "maximum"
                self.show(replace(self.config, mode="rays", projection=other))
            elif key == "h":
                text = "" if text else HELP
            elif key == "n":
                self.number = (self.number + 1) % len(self.paths)
                self.case, self.scenes = find_case(self.paths[self.number], self.config), {}
                self.show(self.config)
            elif key in ("q", "Escape"):
                self.plotter.break_interaction()
                return
        except Exception as error:  # VTK would print a traceback and lose the message
            if self.scene is None and len(self.paths) == 1:
                raise
            text = f"{self.paths[self.number]}: {str(error) or type(error).__name__}"
            print(f"error: {text}", file=sys.stderr, flush=True)
            text = textwrap.fill(text, 110)
        self.write(text)


def open_window(paths: list[Path], config: Config) -> None:
    """Show all modes and cases in one window until it is closed."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise InputError("no display to open a window on; give --screenshot, --turntable or --html")
    window = Window(paths, config)
    plotter = window.plotter
    plotter.initialize_interactor()
    plotter.window.SetWindowName("Liver in 3D")
    try:
        window.press("n")
        press = lambda event: window.press(event.keypress)  # noqa: E731
        plotter.add_callback("KeyPress", press, enable_picking=False)
        plotter.interactive()
    finally:
        window.hide_sliders()
        plotter._interactive = False  # it has ended; close() would end it again and crash VTK
        plotter.close()


def write_pictures(option: str, case: Case, config: Config, path: Path) -> None:
    """Write a screenshot; or, as an endless GIF, a turn of the camera or the slices feet first.

    The axial slice moves over the foreground, or over all where there is none.
    """
    plotter, scan = make_plotter(config, offscreen=True), case.shown
    scene = draw(case, replace(config, mode="slices") if option == "movie" else config, plotter)
    margin, used = int(MOVIE_MARGIN_MM / scan.spacing_mm[2]), find_bounding_box(case.guide)[2]
    first, last = (max(0, used.start - margin), used.stop + margin) if used.stop else (0, 10**6)
    levels = range(scan.shape[2])[first:last]
    steps = {"screenshot": range(1), "turntable": range(TURN_FRAMES), "movie": levels}[option]

    def take(step: int) -> Image.Image:
        if option == "movie":
            scene.sliders[0].value = step + 1
            scene.sliders[0].InvokeEvent("InteractionEvent")
        picture = Image.fromarray(plotter.screenshot(asarray=True))
        if option == "turntable":
            plotter.camera.Azimuth(360 / TURN_FRAMES)
        # MAXCOVERAGE keeps thin outlines' colours beside many greys
        return picture if option == "screenshot" else picture.quantize(256, Image.Quantize(1))

    pictures = map(take, show_progress(steps, unit="picture"))
    options = {"save_all": True, "append_images": pictures, "duration": 100, "loop": 0}
    with atomic_write(path) as temporary:  # not by VTK, whose writer is silent on a full disk
        next(pictures).save(temporary, **({} if option == "screenshot" else options))
    plotter.close()


def write_mesh(case: Case, config: Config, path: Path) -> None:
    """Write the organ to `path` and each further class to `<name>_<class>` beside it, in mm."""
    for number, (name, mesh) in enumerate(case.meshes.items()):
        target = path.with_name(f"{path.stem}_{name}{path.suffix}") if number else path
        mesh = mesh.clone()
        if config.mesh_space == "LPS":
            mesh.vertices = mesh.vertices * (-1, -1, 1)
        with atomic_write(target) as temporary:
            # VTK's writers are silent on a full disk; no format takes more bytes per triangle
            if shutil.disk_usage(temporary.parent).free < 100 * mesh.ncells:
                raise OSError("no space left on the disk")
            mesh.write(str(temporary))


def write_html(case: Case, config: Config, path: Path) -> None:
    """Write surfaces, legend and measurements on one page that turns, with plotly inside it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (name, mesh) in enumerate(case.meshes.items()):
        small = mesh.clone().decimate(min(1, PAGE_TRIANGLES / mesh.ncells))
        (x, y, z), (i, j, k) = small.vertices.round(2).T, np.array(small.cells).T
        look = {"color": mesh.colour, "name": name, "showlegend": True, "opacity": 1}
        look["opacity"] = 0.35 if not number and len(case.meshes) > 1 else 1
        figure.add_mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, **look)
    ends = np.array([mesh.bounds() for mesh in case.meshes.values()])
    low, high = ends.min(axis=0)[::2], ends.max(axis=0)[1::2]
    middle, half = (low + high) / 2, 0.56 * (high - low)
    x, y, z = np.array([middle + sign * half * axis for axis in np.eye(3) for sign in (-1, 1)]).T
    figure.add_scatter3d(x=x, y=y, z=z, text=list("LRPAIS"), mode="text", showlegend=False)
    eye = dict(zip("xyz", VIEWS[config.view], strict=True))
    figure.update_layout(
        template="plotly_dark", title="<br>".join([case.name, *case.report]),
        scene={"aspectmode": "data", "camera": {"eye": eye}},
    )  # fmt: skip
    with atomic_write(path) as temporary:
        figure.write_html(temporary, include_plotlyjs=True, default_height="100vh")


OUTPUTS: dict[str, tuple[Callable[[Case, Config, Path], None], tuple[str, ...]]] = {
    "screenshot": (functools.partial(write_pictures, "screenshot"), (".png",)),
    "turntable": (functools.partial(write_pictures, "turntable"), (".gif",)),
    "movie": (functools.partial(write_pictures, "movie"), (".gif",)),
    "mesh": (write_mesh, (".stl", ".ply", ".obj", ".vtp")),
    "html": (write_html, (".html",)),
}


if __name__ == "__main__":
    run_script(main, CONFIG)
