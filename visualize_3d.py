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

from data.settings import read_settings, run_script

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
    smoothing: int = 80  # iterations of the windowed sinc filter; 0 = bare marching cubes
    size: tuple[int, int] = (1200, 900)  # pixels of the window and of every picture


if __name__ == "__main__":  # help and mistakes are told before anything heavy is loaded
    CONFIG = read_settings(Config, __doc__, libraries=("vedo",))

import functools
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import vedo
from nibabel.affines import from_matvec
from PIL import Image
from vedo import vtkclasses
from vtkmodules.vtkCommonDataModel import vtkMultiBlockDataSet
from vtkmodules.vtkIOGeometry import vtkGLTFWriter

from data.cases import name_case
from data.exports import check_mesh, draw_frames, write_frames, write_page
from data.files import InputError, atomic_write
from data.labels import is_tumour
from data.masks import name_label
from data.pictures import PLANES, TRUTH_COLOUR, class_colour, find_busiest_slice
from data.results import (
    STAND_IN_HU,
    CaseFiles,
    Outline,
    crop_to_foreground,
    cut_slice,
    describe,
    find_body,
    find_darkness,
    find_files,
    find_hu_range,
    list_cases,
    list_outlines,
    measure_class,
    measure_distance,
    name_direction,
    open_volume,
)
from data.settings import show_progress
from data.volumes import Volume

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
    return smooth_surface(make_surface(find_body(scan)), 50).color(BONE)


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
