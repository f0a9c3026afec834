"""Show a segmented liver in 3D in a window; write pictures, films, surfaces and a web page.

    python visualize_3d.py results/liver_3     # a window: keys 1-5 change the mode, h hides help
    python visualize_3d.py results             # all cases of a folder: key n opens the next one
    python visualize_3d.py ct.nii.gz --label label.nii.gz --mode organs --screenshot liver.png

Volumes are turned to the nearest RAS axes and drawn through their complete affine, in patient mm:
x points to the patient's Right, y to Anterior, z to Superior. Files need no display.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))  # Python's safe path leaves it out

from data.settings import Count, Positional, Whole, read_settings, run_script

Mode = Literal["surface", "rays", "organs", "slices", "compare"]
View = Literal["anterior", "posterior", "right", "left", "superior"]


@dataclass
class Config:
    paths: Positional[tuple[Path, ...]] = ()  # results, results/<case>, label map or scan
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
    smoothing: Whole = 80  # iterations of the windowed sinc filter; 0 = bare marching cubes
    size: tuple[Count, Count] = (1200, 900)  # pixels of the window and of every picture


if __name__ == "__main__":  # --help and wrong options end here, before the libraries load
    CONFIG = read_settings(Config, __doc__, libraries=("vedo",))

import functools
import os
import shutil
import sys
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

from data.evaluate import do_each, refuse_failures
from data.files import InputError, atomic_write, read_json
from data.labels import USUAL_LABELS, group_tumours, is_label_map, is_tumour
from data.pictures import PLANES, TRUTH_COLOUR, choose_hu_window, class_colour, find_busiest_slice
from data.scans import name_label, read_label_map, read_scan, restore_label
from data.settings import delayed_interrupt, show_progress
from data.volumes import AIR_HU, BODY_HU, Volume, find_bounding_box, name_case

BACKGROUND_COLOUR, INK, BONE = "#14181d", "#f2f2f2", "#e9dcc3"
DARK_TISSUE = "#b7d7c9"  # darker than the organ, but of no class: no class has this colour
ORGAN_HU = 100  # drawn where there is no scan
PASS_BANDS = (0.002, 0.01, 0.05)  # of the sinc filter: removes waves under 100, 45, 20 edges
TURN_FRAMES, MOVIE_MARGIN_MM = 36, 15  # the margin: beyond the first and the last foreground
PAGE_TRIANGLES = 60_000  # per surface: some MB, which a laptop turns smoothly
SIDES = [(0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1)]  # where the viewer stands: RAS
VIEWS = dict(zip(get_args(View), SIDES, strict=True))
SUFFIXES = {"screenshot": [".png"], "turntable": [".gif"], "movie": [".gif"], "html": [".html"]}
SUFFIXES["mesh"] = [".stl", ".ply", ".obj", ".vtp"]


def main(config: Config) -> None:
    if not config.paths:
        raise InputError("nothing to draw: give results/<case>, results, a label map or a scan")
    outputs = {option: getattr(config, option) for option in SUFFIXES if getattr(config, option)}
    for option, path in outputs.items():
        if path.suffix not in SUFFIXES[option]:
            raise InputError(f"--{option} {path}: must end in {', '.join(SUFFIXES[option])}")
    found = [sorted({file.parent for file in p.glob("*/*_label.nii.gz")}) for p in config.paths]
    paths = [p for path, cases in zip(config.paths, found, strict=True) for p in cases or [path]]
    if not outputs:
        open_window(paths, config)
        return
    if len({name_case(path.absolute()) for path in paths}) < len(paths):
        raise InputError("two cases have the same name; draw them one after the other")

    def write(path: Path) -> None:
        case = find_case(path, config)
        print(case.name, *case.report, sep="\n  ")
        for option, target in outputs.items():
            if len(paths) > 1:
                target = target.with_name(f"{target.stem}_{case.name}{target.suffix}")
            writers = {"mesh": write_mesh, "html": write_html}
            writers.get(option, functools.partial(write_pictures, option))(case, config, target)
            print(f"  wrote {target}")
            if interrupted():
                raise KeyboardInterrupt

    with delayed_interrupt() as interrupted:  # VTK crashes where a signal ends one of its callbacks
        refuse_failures(do_each(paths, str, write), len(paths), "cases")


@dataclass
class Case:
    """One case: scan and label maps in RAS on one grid."""

    name: str
    kind: str  # "image", "masked" or "label", of `shown`: a scan, a masked scan, a label map
    shown: Volume  # what slices show: HU of a CT, or the label map
    labels: Volume  # uint8; zeros where there is no label map
    reference: Volume | None  # uint8
    names: dict[str, int]  # class → value, as far as known
    smoothing: int  # iterations

    @functools.cached_property
    def organ(self) -> Volume:
        """Return the label map cropped to its foreground; InputError where there is none."""
        if not self.labels.data.any():
            what = f"{self.name}: the label map is missing or empty, no organ can be drawn"
            raise InputError(f"{what}; give one with --label, or look at it with --mode slices")
        return self.labels.crop(find_bounding_box(self.labels.data))

    @functools.cached_property
    def hu(self) -> Volume:
        """Return float32 HU in the organ's box, clipped to what pictures show, lowest outside."""
        labels = self.labels.data
        hu = np.where(labels, ORGAN_HU, AIR_HU) if self.kind == "label" else self.shown.data
        low, high = choose_hu_window(hu)
        part = hu[find_bounding_box(labels)].clip(low, high).astype(np.float32)
        return self.organ.like(np.where(self.organ.data, part, np.float32(low)))

    @functools.cached_property
    def meshes(self) -> dict[str, vedo.Mesh]:
        """Return class → smooth surface with its `values`; an organ has its tumours' values too."""
        meshes, found, values = {}, dict(self.names), np.unique(self.organ.data).tolist()
        found |= {f"label_{value}": value for value in values if value not in {0, *found.values()}}
        first = next((name for name in found if not is_tumour(name)), None)
        names = sorted(found, key=lambda name: name != first)
        tumours = group_tumours(names)
        for index, name in enumerate(names, start=1):
            values = [found[names[part - 1]] for part in (index, *tumours.get(index, ()))]
            mask = self.organ.like(np.isin(self.organ.data, values).astype(np.uint8))
            if mask.data.any():
                meshes[name] = make_surface(mask, self.smoothing, class_colour(index))
                meshes[name].values = values
        return meshes

    @functools.cached_property
    def report(self) -> list[str]:
        """Return the measurements as lines of text, for the terminal and for the picture."""
        if not self.labels.data.any():
            return ["the label map is missing or empty"]
        lines = [f"no scan: organs drawn as {ORGAN_HU} HU"] if self.kind == "label" else []
        for name, mesh in self.meshes.items():
            parts, _ = ndi.label(np.isin(self.organ.data, mesh.values), np.ones((3, 3, 3)))
            sizes = sorted(np.bincount(parts.ravel())[1:] * self.organ.voxel_ml, reverse=True)
            lines += [
                f"{name} {sum(sizes):.1f} ml, {mesh.area() / 100:.0f} cm²",
                "  R–L {:.0f} × A–P {:.0f} × I–S {:.0f} mm".format(*np.ptp(mesh.vertices, axis=0)),
                f"  smoothing {mesh.smoothing_percent:+.2f} % of the volume",
            ]
            if is_tumour(name):
                lines += [f"  parts {len(sizes)}: {', '.join(f'{ml:.1f}' for ml in sizes[:5])} ml"]
        return lines


def find_case(path: Path, config: Config) -> Case:
    """Read the case of a folder of apply_model.py, a DICOM folder or one file."""
    if path.is_dir() and any(path.glob("*_label.nii.gz")):
        found = read_result(path)
    elif path.name.endswith(("_masked.nii.gz", "_masked.nii")):
        found = {"masked": path}
    else:
        is_label = not path.is_dir() and is_label_map(read_scan(path).read())
        found = {"label" if is_label else "image": path}
    if config.label and ("image" not in found or len(config.paths) != 1):
        raise InputError(f"--label {config.label}: needs one scan beside it, got {path}")
    kind = next(kind for kind in ("image", "masked", "label") if kind in found)
    grid = read_scan(found[kind])
    names = found.get("classes") or {name: value for name, (value,) in USUAL_LABELS.items()}
    trust = config.trust_image_grid or bool(found.get("trust_image_grid"))
    labels, reference = (  # values without a name are drawn too
        read_label_map(file, grid, names, trust_grid=trust, ignore=range(256)).ras if file else None
        for file in (config.label or found.get("label"), config.truth or found.get("truth"))
    )
    if labels is None:  # the corner of a masked scan lies outside every organ
        outside = grid.ras.data[0, 0, 0] if kind == "masked" else grid.ras.data
        labels = grid.ras.like((grid.ras.data != outside).astype(np.uint8))
    names = {name: value for name, value in names.items() if value}
    name = found.get("case", name_case(path))
    return Case(name, kind, grid.ras, labels, reference, names, config.smoothing)


def read_result(folder: Path) -> dict[str, Any]:
    """Return what apply_model.py wrote and recorded of a case; files that are gone are left out."""
    labels = sorted(folder.glob("*_label.nii.gz"))
    if len(labels) > 1:
        raise InputError(f"{folder}: must hold one case, got {len(labels)} label maps; name a file")
    name = labels[0].name.removesuffix("_label.nii.gz")
    record, masked = folder / f"{name}.json", folder / f"{name}_masked.nii.gz"
    found = {**(read_json(record) if record.exists() else {}), "case": name, "label": labels[0]}
    for key in [key for key in ("image", "truth") if found.get(key)]:
        path = found[key] = restore_label(found[key])
        parts = [part for _, part in path] if isinstance(path, tuple) else [path]
        if not all(part.exists() for part in parts):
            print(f"{record}: its {key} {name_label(found.pop(key))} is gone; drawn without it")
    return found | ({"masked": masked} if masked.exists() else {})


def make_surface(
    volume: Volume, iterations: int, colour: str, value: float = 0.5, outside: float = 0
) -> vedo.Mesh:
    """Return the isosurface of a volume in patient mm without slice steps, faces outwards. One
    voxel of `outside` around the volume closes it. Of the windowed sinc filters (Taubin et al.
    1996) the smoothest is taken that changes the volume by less than 1 %, else none: a lesion of a
    few voxels is all step. The change is in `mesh.smoothing_percent`."""
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
    mesh.shade, mesh.smoothing_percent = colour, change
    return mesh


# Scenes: one function per mode makes the panels that a window or a picture shows
UPRIGHT = ((0.93, 0.62), (0.93, 0.92))  # ends of a slider, above the letter at the right edge
WHOLE = (0, 0, 1, 1)  # left, bottom, right, top of a panel, as fractions of the window
PANELS = {"axial": (0, 0.5, 0.5, 1), "coronal": (0.5, 0.5, 1, 1), "sagittal": (0.5, 0, 1, 0.5)}
SEEN_FROM = {"axial": -1, "coronal": 1, "sagittal": -1}  # from below, the front, the left


@dataclass
class Scene:
    """What one mode shows: panels, whose actors stay while another mode is shown."""

    panels: list[Any]  # a vtkRenderer each; views turn the last one, and words stand in it
    legend: dict[str, str]  # name → colour
    sliders: Sequence[vedo.addons.Slider2D] = ()


def make_surface_scene(case: Case, config: Config) -> Scene:
    """Return marching cubes of the organ with a slider for the isovalue."""
    panel, shown, colour = make_panel(config), list[Any](), class_colour(1)
    low, high = int(case.hu.data.min()), int(case.hu.data.max())

    def change(value: float) -> None:
        new = make_surface(case.hu, config.smoothing, colour, round(value), low)
        swap_actors([panel], shown, [new])

    values = (low + 1, low + max(2, (high - low) // 3), max(high - 1, low + 3))  # of CT first -50
    slider = make_slider(change, values, "isovalue (HU in CT)", delayed=True)
    return Scene([panel], {"organ above the slider's value": colour}, [slider])


def make_rays_scene(case: Case, config: Config) -> Scene:
    """Return the ray casting of the organ, with tumours visible inside. Values say by how many HU a
    voxel is darker than the organ's median, noise averaged; the edge, which holds some fat, counts
    as 0. Where the label map has tumours, they alone are dark."""
    hu, inside = case.hu, case.organ.data > 0
    inner = ndi.binary_erosion(inside, iterations=2)
    darker = np.where(inner, np.median(hu.data[inside]) - hu.data, 0)
    size = hu.spacing_mm  # as vedo's spacing too, so that opacities count per mm
    darker = ndi.gaussian_filter(darker, 1.5 / np.array(size), truncate=2)
    organ, dark, told = class_colour(1), DARK_TISSUE, "over 30 HU darker than it"
    if tumours := [name for name in case.meshes if is_tumour(name)]:
        values = [value for name in tumours for value in case.meshes[name].values]
        darker = np.where(np.isin(case.organ.data, values), 150, darker.clip(max=15))
        dark, told = case.meshes[tumours[0]].shade, ", ".join(tumours)
    padded = np.pad(np.where(inside, darker.clip(-150, 150), -150), 1, constant_values=-150)
    volume = vedo.Volume(padded.astype(np.float32), spacing=size)
    volume.color([(-80, "white"), (-20, organ), (15, organ), (30, dark)]).shade(False)
    volume.mode(int(config.projection == "maximum"))
    matrix = vedo.vtkclasses.vtkMatrix4x4()
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
    legend = {next(iter(case.meshes)): organ, told: dark}
    return Scene([make_panel(config, volume)], legend, [slider])


def make_organs_scene(case: Case, config: Config) -> Scene:
    """Return every class as a smooth surface: organ translucent, tumours solid, skin faint."""
    shown = [mesh.clone() for mesh in case.meshes.values()]
    legend = {name: mesh.shade for name, mesh in case.meshes.items()}
    if not is_tumour(next(iter(legend))):
        shown[0].alpha(0.35)
    if case.kind == "image":  # skin from a 3 mm grid, without table, lungs and bowel gas
        thin = [slice(None, None, max(1, round(3 / mm))) for mm in case.shown.spacing_mm]
        coarse = case.shown.crop(thin)
        parts, count = ndi.label(ndi.binary_opening(coarse.data > BODY_HU))
        largest = np.bincount(parts.ravel())[1:].argmax() + 1 if count else -1
        body = [ndi.binary_fill_holes(level) for level in np.moveaxis(parts == largest, 2, 0)]
        skin = coarse.like(np.stack(body, axis=2).astype(np.uint8))
        shown.append(make_surface(skin, 50, BONE).alpha(0.1))
        legend["skin"] = BONE
    return Scene([make_panel(config, *shown)], legend)


def make_slices_scene(case: Case, config: Config) -> Scene:
    """Return axial, coronal and sagittal slice in radiological view with sliders, and all in 3D."""
    meshes = case.meshes if case.labels.data.any() else {}
    outlines = [(mesh.shade, case.labels.data, mesh.values) for mesh in meshes.values()]
    legend = {name: mesh.shade for name, mesh in meshes.items()}
    if case.reference:
        labels, legend["reference"] = case.reference.data, TRUTH_COLOUR
        values = [value for value in np.unique(labels[find_bounding_box(labels)]) if value]
        parts = [values, *([value] for value in values[1:])]  # liver with its tumours, tumours
        outlines += [(TRUTH_COLOUR, labels, part) for part in parts]
    space = make_panel(config, *meshes.values(), box=(0, 0, 0.5, 0.5))
    made = [make_slice_panel(case, outlines, plane, config, space) for plane in PANELS]
    panels, sliders = zip(*made, strict=True)
    return Scene([*panels, space], legend, sliders)


def make_slice_panel(case: Case, outlines: list, plane: str, config: Config, space: Any) -> tuple:
    """Return a panel with one slice of a plane, which is shown in `space` too, and its slider. Of
    each outline, `outlines` has colour, label map (X, Y, Z) and the values inside."""
    scan, axis, box, side = case.shown, PLANES[plane][0], PANELS[plane], SEEN_FROM[plane]
    title, shown = make_text(config, "", (0.99, 0.99), "top-right"), list[Any]()
    panel = make_panel(config, title, box=box)
    low, high = choose_hu_window(scan.data)

    def change(value: float) -> None:
        index = round(value) - 1
        array = np.moveaxis(scan.data, axis, 0)[index]
        grey = ((array.T.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
        ends = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
        corners = np.insert(ends * array.shape - 0.5, axis, index, axis=1)
        sheet = vedo.Mesh([apply_affine(scan.affine, corners), [[0, 1, 2, 3]]])
        new = [sheet.lighting("off").color("white").texture(vedo.Image(grey), tcoords=ends)]
        for colour, labels, inside in outlines:  # half a voxel in front of the slice
            mask = np.isin(np.moveaxis(labels, axis, 0)[index], inside)
            for line in find_contours(np.pad(mask, 1).astype(float), 0.5):
                points = apply_affine(
                    scan.affine, np.insert(line - 1, axis, index + side / 2, axis=1)
                )
                new.append(vedo.Line(points, c=colour, lw=2))
        swap_actors([panel, space], shown, new)
        title.text(f"{plane} slice {index + 1} of {scan.shape[axis]}")

    values = (1, find_busiest_slice(case.labels.data, axis) + 1, scan.shape[axis])
    ends = ((box[0] + 0.04, box[1] + 0.06), (box[0] + 0.16, box[1] + 0.06))
    slider = make_slider(change, values, f"steps of {scan.spacing_mm[axis]:.3g} mm", ends)
    steps = scan.affine[:3, :3]  # a row of the inverse is at right angles to the other two steps
    panel.GetActiveCamera().SetParallelProjection(True)
    place_camera(panel, side * np.linalg.inv(steps)[axis], np.delete(steps, axis, axis=1)[:, 1])
    return panel, slider


def make_compare_scene(case: Case, config: Config) -> Scene:
    """Return reference and prediction, each coloured by where they differ: missed, or too much."""
    if case.reference is None:
        raise InputError(f"{case.name}: to compare, give the reference label map with --truth")
    name, mesh = next((name, mesh.clone()) for name, mesh in case.meshes.items())
    mask = case.reference.data > 0  # where there is one organ only, all that is foreground
    if sum(not is_tumour(other) for other in case.meshes) > 1:
        mask = np.isin(case.reference.data, case.meshes[name].values)
    if not mask.any():
        what = f"holds no {name} to compare with; give its label map with --truth"
        raise InputError(f"{case.reference.name}: {what}")
    truth = case.reference.like(mask.astype(np.uint8)).crop(find_bounding_box(mask))
    reference = make_surface(truth, config.smoothing, TRUTH_COLOUR)
    found = case.organ.like(np.isin(case.organ.data, case.meshes[name].values).astype(np.uint8))
    far, missed = measure_apart(mesh, reference, truth), measure_apart(reference, mesh, found)
    limit = max(1.0, float(np.ceil(np.percentile(np.abs([*far, *missed]), 99))))
    reference.cmap("PuOr_r", -missed, vmin=-limit, vmax=limit)
    mesh.cmap("PuOr_r", far, vmin=-limit, vmax=limit).add_scalarbar(
        "mm missed (-) or too much (+)", ((0.15, 0.08), (0.85, 0.17)),
        horizontal=True, font_size=round(config.size[0] / 70), c=INK,
    )  # fmt: skip
    figures = [np.abs(far).mean(), np.percentile(np.abs(far), 95), np.abs(far).max()]
    told = "mm apart: mean {:.1f}, 95 % under {:.1f}, largest {:.1f}".format(*figures)
    legend = {f"{name} too much": "#f1a340", f"{name} missed": "#b2abd2", told: INK}
    titles = [make_text(config, f"{text} {name}", (0.5, 0.22), "center")
              for text in ("reference", "predicted")]  # fmt: skip
    left = make_panel(config, reference, titles[0], box=(0, 0, 0.5, 1))
    right = make_panel(config, mesh, titles[1], box=(0.5, 0, 1, 1))
    right.AddViewProp(mesh.scalarbar)
    right.SetActiveCamera(left.GetActiveCamera())
    return Scene([right, left], legend)


def measure_apart(mesh: vedo.Mesh, other: vedo.Mesh, inside: Volume) -> np.ndarray:
    """Return the mm of each vertex to another surface's nearest, negative inside that volume."""
    far = cKDTree(other.vertices).query(mesh.vertices)[0]
    index = apply_affine(np.linalg.inv(inside.affine), mesh.vertices).T
    return np.where(
        ndi.map_coordinates(inside.data.astype(np.float32), index, order=1) > 0.5, -far, far
    )


SCENES: dict[Mode, Callable[[Case, Config], Scene]] = {
    "surface": make_surface_scene,
    "rays": make_rays_scene,
    "organs": make_organs_scene,
    "slices": make_slices_scene,
    "compare": make_compare_scene,
}


def make_panel(config: Config, *shown: Any, box: Sequence[float] = WHOLE) -> Any:
    """Return a renderer of vedo's objects, with letters R L A P S I at the edges of its `box`."""
    panel = vedo.vtkclasses.vtkRenderer()
    panel.SetBackground(vedo.get_color(BACKGROUND_COLOUR))
    panel.SetViewport(*box)
    panel.SetUseDepthPeeling(True)  # orders translucent surfaces
    panel.SetUseFXAA(True)
    places = (0.03, 0.5), (0.97, 0.5), (0.5, 0.965), (0.5, 0.035)
    letters = [make_text(config, "", place, "center", size=1.1) for place in places]
    swap_actors([panel], [], [*shown, *letters])

    def update(*_: Any) -> None:  # before every rendering
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


def make_slider(change: Any, values: tuple, title: str, ends: Any = UPRIGHT, **options: Any) -> Any:
    """Call `change` with the first of (lowest, first, highest) values; return a slider for them."""
    low, first, high = values
    change(first)
    call = lambda slider, _: change(slider.value)  # noqa: E731
    look = {"tformat": "%.0f", "c": INK, "title_size": 0.8} | options
    return vedo.addons.Slider2D(call, low, high, first, ends, title, **look)


def place_camera(panel: Any, side: Any, up: Any) -> None:
    """Put the camera on one side of everything that a panel shows."""
    camera, place = panel.GetActiveCamera(), {"pos": side, "focal_point": (0, 0, 0), "viewup": up}
    vedo.utils.camera_from_dict({**place, "view_angle": 30}, modify_inplace=camera)
    panel.ResetCamera()  # shows the sphere around everything; a liver is flatter
    camera.Zoom(1.3)


def make_text(
    config: Config, text: str, place: tuple, justify: str, colour: str = INK, size: float = 0.85
) -> vedo.Text2D:
    """Return text at a place (0..1) of a panel, its size in proportion to the window's."""
    size *= config.size[0] / 1200
    look = {"c": colour, "bg": BACKGROUND_COLOUR, "alpha": 0.6, "font": "Calco"}
    return vedo.Text2D(text, place, size, justify=justify, **look)


# The window, and files
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
    logger = vedo.vtkclasses.get_class("Logger")
    logger.SetStderrVerbosity(logger.VERBOSITY_ERROR)  # no display is no reason to warn
    look = {"bg": BACKGROUND_COLOUR, "title": "Liver in 3D"}
    return vedo.Plotter(size=config.size, offscreen=offscreen, **look)


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
    title = f"{case.name} · {config.mode}" + f" {config.projection}" * (config.mode == "rays")
    rows = [("\n".join([title, *case.report]), INK)]
    for number, (name, colour) in enumerate(scene.legend.items(), start=len(case.report) + 1):
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
        self.scenes: dict[str, Scene] = {}
        self.scene: Scene | None = None
        self.plotter = make_plotter(config, offscreen=False)
        self.overlay, self.plotter.renderers = self.plotter.renderer, []
        self.plotter.window.SetNumberOfLayers(2)
        self.overlay.SetLayer(1)  # above the panels: sliders, help and messages
        self.overlay.InteractiveOff()  # the mouse turns the panels
        self.text = make_text(config, HELP, (0.5, 0.06), "bottom-center", size=0.7)
        self.overlay.AddViewProp(self.text.actor)

    def show(self, config: Config) -> None:
        """Show one mode of the case; its scene is made on its first use."""
        key = config.mode + f" {config.projection}" * (config.mode == "rays")
        if key not in self.scenes:
            self.text.text(f"loading {config.mode} …")
            self.plotter.render()
            self.scenes[key] = draw(self.case, config, self.plotter)
        for slider in self.scene.sliders if self.scene else ():
            slider.off()
        self.config, self.scene = config, self.scenes[key]
        put_scene(self.plotter, self.scene)
        for slider in self.scene.sliders:
            slider.interactor, slider.renderer = self.plotter.interactor, self.overlay
            slider.on()
        print(f"{self.case.name}: {key}", flush=True)

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
                maximum = self.config.projection == "maximum"
                rays = replace(self.config, projection="composite" if maximum else "maximum")
                self.show(replace(rays, mode="rays"))
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
            text = text.replace("; ", ";\n")
        self.text.text(text)
        self.plotter.render()


def open_window(paths: list[Path], config: Config) -> None:
    """Show all modes and cases in one window until it is closed."""
    if missing := [path for path in paths if not path.exists()]:
        raise InputError(f"{missing[0]}: no such file or folder; check the path")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise InputError("no display to open a window on; give --screenshot, --turntable or --html")
    window = Window(paths, config)
    plotter = window.plotter
    plotter.initialize_interactor()
    plotter.window.SetWindowName("Liver in 3D")
    press = lambda event: window.press(event.keypress)  # noqa: E731
    plotter.add_callback("KeyPress", press, enable_picking=False)
    try:
        window.press("n")
        plotter.interactive()
    finally:
        plotter._interactive = False  # it has ended; close() would end it again and crash VTK
        plotter.close()


def write_pictures(option: str, case: Case, config: Config, path: Path) -> None:
    """Write a screenshot, or as an endless GIF a turn of the camera or the slices, feet first."""
    plotter = make_plotter(config, offscreen=True)
    scene = draw(case, replace(config, mode="slices") if option == "movie" else config, plotter)
    used, depth = find_bounding_box(case.labels.data)[2], case.shown.shape[2]
    margin = int(MOVIE_MARGIN_MM / case.shown.spacing_mm[2])
    levels = range(depth)[max(0, used.start - margin) : (used.stop or depth) + margin]
    steps = {"screenshot": range(1), "turntable": range(TURN_FRAMES), "movie": levels}[option]
    pictures: list[Image.Image] = []
    for step in show_progress(steps, unit="picture"):
        if option == "movie":
            scene.sliders[0].value = step + 1
            scene.sliders[0].InvokeEvent("InteractionEvent")
        elif option == "turntable":
            plotter.camera.Azimuth(360 / TURN_FRAMES)
        pictures.append(Image.fromarray(plotter.screenshot(asarray=True)))
        if option != "screenshot":  # MAXCOVERAGE keeps thin outlines' colours beside many greys
            pictures[-1] = pictures[-1].quantize(256, Image.Quantize.MAXCOVERAGE)
    plotter.close()
    options: dict[str, Any] = {"append_images": pictures[1:], "duration": 100, "loop": 0}
    with atomic_write(path) as temporary:  # not by VTK, whose writer is silent on a full disk
        pictures[0].save(temporary, save_all=len(pictures) > 1, **options)


def write_mesh(case: Case, config: Config, path: Path) -> None:
    """Write the organ to `path` and each further class to `<name>_<class>` beside it, in mm."""
    for number, (name, mesh) in enumerate(case.meshes.items()):
        target = path.with_name(f"{path.stem}_{name}{path.suffix}") if number else path
        mesh = mesh.clone()
        if config.mesh_space == "LPS":
            mesh.vertices = mesh.vertices * (-1, -1, 1)
        with atomic_write(target) as temporary:
            if shutil.disk_usage(temporary.parent).free < 100 * mesh.ncells:  # VTK is silent then
                raise OSError("no space left on the disk")
            mesh.write(str(temporary))


def write_html(case: Case, config: Config, path: Path) -> None:
    """Write surfaces, legend and measurements on one page that turns, with plotly inside it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (name, mesh) in enumerate(case.meshes.items()):
        small = mesh.clone().decimate(min(1, PAGE_TRIANGLES / mesh.ncells))
        (x, y, z), (i, j, k) = small.vertices.round(2).T, np.array(small.cells).T
        look = {"color": mesh.shade, "name": name, "showlegend": True}
        look["opacity"] = 1 if number or is_tumour(name) else 0.35
        figure.add_mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, **look)
    ends = zip("xyz", ("Right", "Anterior", "Superior"), strict=True)
    axes = {f"{axis}axis_title": f"mm to {end}" for axis, end in ends}
    eye = dict(zip("xyz", 1.8 * np.array(VIEWS[config.view]), strict=True))
    scene, title = {"aspectmode": "data", "camera": {"eye": eye}} | axes, [case.name, *case.report]
    figure.update_layout(template="plotly_dark", title="<br>".join(title), scene=scene)
    with atomic_write(path) as temporary:
        figure.write_html(temporary, include_plotlyjs=True, default_height="100vh")


if __name__ == "__main__":
    run_script(main, CONFIG)
