"""What a viewer relies on: every picture is there, in the right place, on the right side."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import vedo
from conftest import ROOT, random_affine, run_script
from helpers import call_script
from matplotlib.colors import to_rgb
from nibabel.affines import apply_affine
from PIL import Image

import visualize_3d as exports
import visualize_3d as v
from data.files import InputError
from data.pictures import LABEL_COLOURS, TRUTH_COLOUR
from data.volumes import Volume

SIZE = (480, 360)


def config(*paths: Path, **options) -> v.Config:
    return v.Config(paths, size=SIZE, **options)


def sphere(affine: np.ndarray, radius: float, shape=(64, 64, 40)) -> np.ndarray:
    """Mask of a ball of `radius` mm in the middle of a grid."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    return np.linalg.norm(apply_affine(affine, index) - centre, axis=-1) <= radius


def place(mask: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(mask.astype(np.uint8), affine)


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def share_of(picture: np.ndarray, colour: str, tolerance: float = 0.12) -> float:
    """Part of the pixels with a hue like `colour`, however dark: shading changes brightness."""
    wanted = np.array(to_rgb(colour)) / np.linalg.norm(to_rgb(colour))
    pixels = picture.reshape(-1, 3).astype(float)
    length = np.linalg.norm(pixels, axis=1)
    hue = pixels / np.maximum(length, 1)[:, None]
    return float(np.mean((np.linalg.norm(hue - wanted, axis=1) < tolerance) & (length > 50)))


@pytest.fixture(scope="module")
def results(raw_phantoms, tmp_path_factory) -> Path:
    """A folder as apply_model.py leaves it: the prediction is the truth, moved by two voxels."""
    folder = tmp_path_factory.mktemp("results") / "case"
    folder.mkdir()
    truths = sorted((raw_phantoms / "labelsTr").glob("*.nii.gz"))
    truth = next(path for path in truths if np.max(nib.load(path).dataobj) == 2)
    scan = raw_phantoms / "imagesTr" / truth.name
    hu, label = nib.load(scan), np.roll(np.asarray(nib.load(truth).dataobj), 2, axis=0)
    label = label.astype(np.uint8)
    save(label, hu.affine, folder / "case_label.nii.gz")
    masked = np.where(label > 0, hu.dataobj, -1024).astype(np.int16)
    save(masked, hu.affine, folder / "case_masked.nii.gz")
    record = {"case": "case", "image": str(scan), "truth": str(truth), "liver_volume_ml": 1}
    (folder / "case.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


# --- geometry ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_mesh_lies_where_the_mask_lies(seed):
    """Rotated, sheared, mirrored grids: bounds of the surface = bounds of the voxels' faces."""
    affine = random_affine(seed, shear=0.2)
    mask = np.zeros((20, 16, 12), bool)
    mask[3:11, 5:14, 2:9] = True
    mesh = v.make_surface(place(mask, affine))
    faces = [axis * side / 2 for axis in np.eye(3) for side in (-1, 1)]
    corners = apply_affine(affine, np.concatenate([np.argwhere(mask) + face for face in faces]))
    assert np.allclose(mesh.vertices.min(axis=0), corners.min(axis=0), atol=1e-3)
    assert np.allclose(mesh.vertices.max(axis=0), corners.max(axis=0), atol=1e-3)
    a, b, c = mesh.vertices[np.array(mesh.cells)].transpose(1, 0, 2)
    assert np.einsum("ij,ij->", a - a.mean(axis=0), np.cross(b - a, c - a)) > 0  # faces outwards


def test_some_of_these_grids_are_mirrored():
    signs = {np.sign(np.linalg.det(random_affine(seed, shear=0.2)[:3, :3])) for seed in range(4)}
    assert signs == {-1.0, 1.0}


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 2.5)])
def test_volume_of_a_sphere_within_one_percent(spacing):
    affine = random_affine(5, spacing=spacing, shear=0.1)
    mask = sphere(affine, 20)
    mesh = v.smooth_surface(v.make_surface(place(mask, affine)), 100)
    found = v.measure_class(place(mask, affine), mesh)
    true_ml = 4 / 3 * np.pi * 20**3 / 1000
    assert found["mesh_ml"] == pytest.approx(true_ml, rel=0.01)
    assert found["volume_ml"] == pytest.approx(true_ml, rel=0.01)
    assert found["surface_cm2"] == pytest.approx(4 * np.pi * 20**2 / 100, rel=0.03)
    assert found["extent_mm"] == pytest.approx([40, 40, 40], abs=max(spacing))


def roughness(mesh: vedo.Mesh) -> float:
    """Mean angle between the faces' own normals and the direction from the centre, degrees."""
    a, b, c = mesh.vertices[np.array(mesh.cells)].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    outwards = (a + b + c) / 3 - mesh.vertices.mean(axis=0)
    cosine = np.einsum("ij,ij->i", normals, outwards)
    cosine /= np.linalg.norm(normals, axis=1) * np.linalg.norm(outwards, axis=1) + 1e-12
    return float(np.degrees(np.arccos(cosine.clip(-1, 1))).mean())


def test_smoothing_takes_the_steps_and_not_the_volume():
    affine = np.diag([0.8, 0.8, 5, 1])
    bare = v.make_surface(place(sphere(affine, 22, (64, 64, 14)), affine))
    before = roughness(bare)
    mesh = v.smooth_surface(bare, 100)
    assert roughness(mesh) < before / 2
    assert abs(mesh.smoothing_percent) < 1
    shading = mesh.pointdata["Normals"]  # of the smooth surface, not of the steps
    outwards = mesh.vertices - mesh.vertices.mean(axis=0)
    outwards /= np.linalg.norm(outwards, axis=1)[:, None]
    assert np.mean(np.einsum("ij,ij->i", shading, outwards)) > 0.96


def test_a_lesion_of_one_voxel_is_not_smoothed_away():
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2] = True
    mesh = v.smooth_surface(v.make_surface(place(mask, np.eye(4))), 100)
    assert abs(mesh.smoothing_percent) < 1
    assert mesh.volume() > 0


def test_measures_count_the_tumours(tmp_path):
    labels = np.zeros((40, 40, 20), np.uint8)
    labels[5:35, 5:35, 3:17] = 1
    labels[8:12, 8:12, 5:9] = 2
    labels[20:26, 20:26, 8:12] = 2
    path = save(labels, np.diag([2, 2, 5, 1]), tmp_path / "map.nii.gz")
    case = v.find_case(path, config(path))
    assert case.meshes["liver"].measures["volume_ml"] == pytest.approx(30 * 30 * 14 * 0.02)
    assert case.meshes["tumour"].measures["parts_ml"] == pytest.approx([2.88, 1.28])
    assert "parts 2: 2.9, 1.3 ml" in "\n".join(case.report())


def test_signed_distance_is_positive_outside():
    affine = random_affine(2, spacing=(1, 1, 1.5))
    mask = sphere(affine, 18)
    truth = v.smooth_surface(v.make_surface(place(mask, affine)), 100)
    for radius in (15, 21):
        other = v.smooth_surface(v.make_surface(place(sphere(affine, radius), affine)), 100)
        distance = v.measure_distance(other.vertices, place(mask, affine), truth.vertices)
        assert np.median(distance) == pytest.approx(radius - 18, abs=0.5)


@pytest.mark.parametrize(
    ("direction", "letters"),
    [((1, 0, 0), "R"), ((0, -1, 0), "P"), ((0.1, 0.2, -1), "I"), ((-1, 0.9, 0), "LA")],
)
def test_letters_name_the_direction(direction, letters):
    assert v.name_direction(np.array(direction)) == letters


def test_darkness_finds_a_dark_lesion_and_no_dark_rim():
    rng = np.random.default_rng(0)
    affine = np.diag([1, 1, 2, 1])
    mask = sphere(affine, 25, (60, 60, 30))
    lesion = sphere(affine, 6, (60, 60, 30))
    hu = np.where(mask, 100 - 50 * lesion, 0) + rng.normal(0, 15, mask.shape)
    rim = mask & ~sphere(affine, 23, (60, 60, 30))
    hu[rim] -= 60  # voxels that hold some fat
    darker = v.find_darkness(Volume(hu, affine), mask)
    assert np.median(darker[lesion]) > 25
    assert np.median(np.abs(darker[rim])) < 15


# --- pictures without a display ---------------------------------------------------------


EXPECTED = {  # mode → a colour that must be seen
    "surface": LABEL_COLOURS[1],
    "rays": LABEL_COLOURS[1],
    "organs": LABEL_COLOURS[1],
    "slices": LABEL_COLOURS[1],
    "compare": TRUTH_COLOUR,
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_every_mode_gives_a_picture_without_a_display(mode, results, tmp_path, no_display):
    path = tmp_path / "view.png"
    v.main(config(results, mode=mode, screenshot=path))
    picture = np.array(Image.open(path).convert("RGB"))
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    assert picture.std() > 10
    assert share_of(picture, EXPECTED[mode], 0.2) > 0.005
    assert [file.name for file in tmp_path.iterdir()] == ["view.png"]


@pytest.mark.parametrize("projection", ["composite", "maximum"])
def test_tumours_show_inside_the_liver_by_their_hu_alone(projection, results, tmp_path, no_display):
    """Rays of the masked volume, where nobody tells where the tumours are: they are seen, and not
    in the colour of a tumour; where the label map tells it, they have that colour."""
    masked = results / "case_masked.nii.gz"
    pictures = {}
    for name, path in (("masked", masked), ("label map", results)):
        picture = tmp_path / f"{name}.png"
        v.main(config(path, mode="rays", projection=projection, screenshot=picture))
        pictures[name] = np.array(Image.open(picture).convert("RGB"))[90:-40, 30:-30]
    assert share_of(pictures["label map"], LABEL_COLOURS[2], 0.2) > 0.002
    assert share_of(pictures["masked"], LABEL_COLOURS[2]) == 0
    assert share_of(pictures["masked"], v.DARK_TISSUE, 0.2) > 0.002


@pytest.mark.parametrize("projection", ["composite", "maximum"])
def test_no_tumour_is_shown_where_there_is_none(projection, tmp_path, no_display):
    mask = sphere(np.diag([2, 2, 3, 1]), 50)
    path = save(mask.astype(np.uint8), np.diag([2, 2, 3, 1]), tmp_path / "map.nii.gz")
    options = config(path, mode="rays", projection=projection)
    plotter = v.draw(v.find_case(path, options), options, offscreen=True)
    picture = plotter.screenshot(asarray=True)
    assert share_of(picture, LABEL_COLOURS[1], 0.3) > 0.02
    assert share_of(picture, LABEL_COLOURS[2]) == 0
    centre = picture[SIZE[1] // 2, SIZE[0] // 2] / 255
    assert centre.max() < 0.8  # translucent


@pytest.mark.parametrize(
    ("codes", "mode", "view", "side"),
    [
        ("RAS", "organs", "anterior", 0),
        ("PIR", "organs", "anterior", 0),
        ("LPS", "rays", "posterior", 1),
        ("LAS", "rays", "posterior", 1),
    ],
)
def test_the_patients_right_is_on_the_right_side(codes, mode, view, side, tmp_path, no_display):
    """A liver with a long tail to the patient's left, stored in any orientation."""
    labels = np.zeros((60, 40, 30), np.uint8)  # RAS: first axis grows to the right
    labels[34:56, 10:30, 5:25] = 1
    labels[4:34, 17:23, 13:17] = 1
    image = nib.Nifti1Image(labels, np.diag([3, 3, 4, 1]))
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    path = tmp_path / "map.nii.gz"
    nib.save(image.as_reoriented(turn), path)
    plotter = v.draw(v.find_case(path, config(path)), config(path, mode=mode, view=view), True)
    picture = plotter.screenshot(asarray=True)
    plotter.close()
    picture = picture[60:-40, 30:-30]  # without letters and text
    halves = np.array_split(picture, 2, axis=1)
    shares = [share_of(half, LABEL_COLOURS[1], 0.3) for half in halves]
    assert shares[side] > 1.5 * shares[1 - side]


def test_rays_and_surface_cover_the_same_place_on_a_sheared_grid(tmp_path, no_display):
    affine = random_affine(3, spacing=(1, 1, 3), shear=0.4)
    labels = np.zeros((50, 40, 20), np.uint8)
    labels[8:40, 10:30, 4:15] = 1
    path = save(labels, affine, tmp_path / "map.nii.gz")
    shown = []
    for mode in ("organs", "rays"):
        options = config(path, mode=mode, view="right", projection="maximum", smoothing=0)
        plotter = v.draw(v.find_case(path, options), options, offscreen=True)
        picture = plotter.screenshot(asarray=True)[60:-40, 30:-30].astype(int)
        shown.append(np.abs(picture - picture[0, 0]).sum(axis=2) > 30)
        plotter.close()
    both, either = shown[0] & shown[1], shown[0] | shown[1]
    assert both.sum() / either.sum() > 0.9


def test_slices_are_radiological(tmp_path, no_display):
    """Axial slice: the patient's right on the left, anterior on top; a bright corner tells."""
    scan = np.full((40, 40, 20), -200, np.int16)
    scan[25:38, 25:38] = 250  # right and anterior in RAS
    path = save(scan, np.diag([-2, -2, 4, 1]) @ np.diag([-1, -1, 1, 1]), tmp_path / "scan.nii.gz")
    plotter = v.draw(v.find_case(path, config(path)), config(path, mode="slices"), True)
    picture = plotter.screenshot(asarray=True).mean(axis=2)
    panel = picture[: SIZE[1] // 2, : SIZE[0] // 2]
    rows, columns = np.nonzero(panel > 230)
    assert np.median(rows) < panel.shape[0] / 2
    assert np.median(columns) < panel.shape[1] / 2


def test_surfaces_of_different_isovalues_are_different(results):
    """Each whole isovalue has its own surface, and the same one when it comes again."""
    volume, _, (low, high), _ = v.make_hu_volume(v.find_case(results, config(results)))
    surfaces = v.Isosurfaces(volume, "red", 0)
    values = np.linspace(low + 1, high - 1, 24).round()
    meshes = {id(surfaces.make(value)): surfaces.make(value) for value in values}
    assert len(meshes) == len(surfaces.made) == len(values) > 20
    sizes = {round(mesh.volume()) for mesh in meshes.values()}
    assert len(sizes) > 20


def test_a_bare_scan_shows_bones(raw_phantoms, tmp_path, no_display):
    scan = next((raw_phantoms / "imagesTr").glob("*.nii.gz"))
    v.main(config(scan, mode="surface", screenshot=tmp_path / "bones.png"))
    assert share_of(np.array(Image.open(tmp_path / "bones.png").convert("RGB")), v.BONE) > 0.02


def test_several_cases_get_a_file_each(results, tmp_path, no_display):
    label = results / "case_label.nii.gz"
    v.main(config(results, label, mode="organs", screenshot=tmp_path / "view.png"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["view_case.png", "view_case_label.png"]


# --- turntable, mesh, page --------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_turntable(suffix, results, tmp_path, no_display, monkeypatch):
    if suffix == ".mp4" and not shutil.which("ffmpeg"):
        pytest.skip("ffmpeg is not installed")
    monkeypatch.setattr(v, "TURN_FRAMES", 6)
    path = tmp_path / f"turn{suffix}"
    v.main(config(results, mode="organs", turntable=path))
    if suffix == ".gif":
        with Image.open(path) as movie:
            frames = []
            for number in range(movie.n_frames):
                movie.seek(number)
                frames.append(np.array(movie.convert("RGB")).astype(int))
        assert len(frames) == 6
        assert np.abs(frames[0] - frames[3]).mean() > 2
    else:
        assert path.stat().st_size > 2000


def read_vertices(path: Path) -> np.ndarray:
    if path.suffix != ".glb":
        return vedo.load(str(path)).vertices
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[12:16])
    content = json.loads(data[20 : 20 + length])
    view = content["bufferViews"][content["accessors"][0]["bufferView"]]
    start = 28 + length + view.get("byteOffset", 0)
    return np.frombuffer(data[start : start + view["byteLength"]], "<f4").reshape(-1, 3)


MESHES = v.OUTPUTS["mesh"][1]


@pytest.mark.parametrize("suffix", MESHES)
@pytest.mark.parametrize("space", ["LPS", "RAS"])
def test_mesh_in_millimetres_and_in_the_space_asked_for(suffix, space, results, tmp_path):
    path = tmp_path / f"liver{suffix}"
    options = config(results, mesh=path, mesh_space=space)
    v.main(options)
    meshes = v.find_case(results, options).meshes
    sign = np.array([-1, -1, 1] if space == "LPS" else [1, 1, 1])
    for name, file in (("liver", path), ("tumour", tmp_path / f"liver_tumour{suffix}")):
        expected, found = meshes[name].vertices * sign, read_vertices(file)
        assert np.allclose(found.min(axis=0), expected.min(axis=0), atol=0.01)
        assert np.allclose(found.max(axis=0), expected.max(axis=0), atol=0.01)


def test_meshes_are_left_handed_by_default_as_slicer_reads_them():
    assert v.Config(()).mesh_space == "LPS"


def test_html_page_turns_in_a_browser_offline(results, tmp_path, no_display):
    page = tmp_path / "view.html"
    v.main(config(results, html=page))
    text = page.read_text()
    assert "<script src" not in text
    assert "liver" in text
    assert "tumour" in text
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("the page is written; no chromium here to open it")
    picture = tmp_path / "page.png"
    command = [browser, "--headless=new", "--no-sandbox", "--use-angle=swiftshader"]
    command += ["--enable-unsafe-swiftshader", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=900,700"]
    command += ["--virtual-time-budget=10000", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.array(Image.open(picture).convert("RGB"))
    assert share_of(pixels, LABEL_COLOURS[1], 0.3) > 0.01


# --- windows ----------------------------------------------------------------------------


def window_pixels(display: str) -> np.ndarray:
    raw = subprocess.run(
        ["xwd", "-root", "-silent", "-display", display], check=True, capture_output=True
    ).stdout
    header = struct.unpack(">25I", raw[:100])
    width, height, line, colours = header[4], header[5], header[12], header[19]
    start = header[0] + colours * 12
    rows = np.frombuffer(raw[start : start + line * height], np.uint8).reshape(height, line)
    return rows[:, : 4 * width].reshape(height, width, 4)[..., 2::-1]


def until(condition, seconds: float = 300):
    """Wait for a condition, as long as only a hang would take; returns its last value."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return value


@pytest.fixture
def screen():
    """A virtual screen; skips where it cannot be made."""
    missing = [tool for tool in ("Xvfb", "xdotool", "xwd") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"windows need {', '.join(missing)} (apt-get install xvfb xdotool x11-apps)")
    read, write = os.pipe()
    # -noreset: otherwise the screen starts anew whenever its only client, xwd, has left
    command = ["Xvfb", "-displayfd", str(write), "-noreset", "-screen", "0", "640x480x24"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as pipe:
        number = pipe.readline().strip()
    yield f":{number}"
    server.terminate()
    server.wait()


@pytest.fixture
def browser(results, monkeypatch):
    """The window's logic, drawn off screen."""
    stage = v.Stage
    monkeypatch.setattr(v, "Stage", lambda options, offscreen: stage(options, offscreen=True))
    browser = v.Browser([results], config(results))
    browser.open_case(0)
    yield browser
    browser.stage.plotter.close()


def test_loading_is_shown_while_a_scene_is_made_and_scenes_are_kept(browser, monkeypatch):
    made, make = [], v.make_scene

    def watch(case, options):
        made.append(browser.stage.texts["loading"].text())
        return make(case, options)

    monkeypatch.setattr(v, "make_scene", watch)
    plotter, first = browser.stage.plotter, browser.stage.scene
    for key in "2345123m45":
        browser.press(types.SimpleNamespace(keypress=key))
        assert "loading" not in browser.stage.texts
    words = ("rays", "organs", "slices", "compare", "rays")
    assert made == [f"loading {word} …" for word in words]
    browser.press(types.SimpleNamespace(keypress="1"))
    assert browser.stage.scene is first
    assert browser.stage.plotter is plotter


def test_keys_of_views_turn_no_slice(browser):
    browser.press(types.SimpleNamespace(keypress="4"))
    scene = browser.stage.scene
    cameras = [panel.GetActiveCamera() for panel in scene.panels]
    for key in v.VIEW_KEYS:
        before = [camera.GetDirectionOfProjection() for camera in cameras]
        browser.press(types.SimpleNamespace(keypress=key))
        after = [camera.GetDirectionOfProjection() for camera in cameras]
        changed = [old != new for old, new in zip(before, after, strict=True)]
        assert not any(changed[: scene.space])
    assert before[scene.space] != after[scene.space]


def test_sliders_say_their_unit_and_every_scene_has_a_legend(browser):
    for key in v.MODE_KEYS:
        browser.press(types.SimpleNamespace(keypress=key))
        scene = browser.stage.scene
        assert scene.legend
        assert all(any(u in s.title for u in ("HU", "mm", "×")) for s in scene.sliders)
        for slider in scene.sliders:
            slider.change(slider.low)
            slider.change(slider.high)


def test_help_hides_and_what_failed_is_told_in_the_window(browser, monkeypatch, capsys):
    browser.stage.write("help", v.HELP)
    panel = browser.stage.scene.panels[0]
    assert panel.GetViewport()[1] == v.HELP_BAND  # nothing lies under the help
    browser.press(types.SimpleNamespace(keypress="h"))
    assert panel.GetViewport()[1] == 0
    monkeypatch.setitem(v.SCENES, "organs", lambda *_: 1 / 0)
    browser.press(types.SimpleNamespace(keypress="3"))
    assert "division" in browser.stage.texts["note"].text()
    assert browser.stage.scene.panels[0] is panel
    browser.press(types.SimpleNamespace(keypress="1"))
    assert "note" not in browser.stage.texts


class Viewer:
    """visualize_3d.py in a window on a virtual screen, and what it has printed so far."""

    def __init__(self, screen: str, *arguments: object) -> None:
        command = [sys.executable, ROOT / "visualize_3d.py", *map(str, arguments)]
        command += ["--size", *map(str, SIZE)]
        self.environment = {**os.environ, "DISPLAY": screen, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.lines, self.screen = [], screen
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()

    def press(self, key: str) -> None:
        command = ["xdotool", "mousemove", "200", "150", "key", key]
        subprocess.run(command, env=self.environment, check=True)

    def said(self, words: str) -> bool:
        """Whether a line with these words comes while the viewer lives."""
        until(lambda: words in "".join(self.lines) or self.process.poll() is not None)
        return words in "".join(self.lines)

    def picture(self) -> np.ndarray:
        return window_pixels(self.screen).astype(int)

    def windows(self) -> list[str]:
        command = ["xdotool", "search", "--onlyvisible", "--name", "Liver in 3D"]
        return subprocess.run(
            command, env=self.environment, text=True, capture_output=True
        ).stdout.split()

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


def test_one_window_in_which_keys_change_the_mode(screen, results):
    modes = {"1": "surface", "2": "rays composite", "3": "organs", "4": "slices", "5": "compare"}
    with Viewer(screen, results) as viewer:
        seen, windows = [], []

        def changed(number: int) -> bool:
            """The picture is unlike each of the last `number` ones."""
            picture = viewer.picture()
            if any(np.abs(picture - old).mean() < 0.3 for old in seen[len(seen) - number :]):
                return False
            seen.append(picture)
            return True

        for number, (key, words) in enumerate(modes.items()):
            if number:
                viewer.press(key)
            assert viewer.said(f"case: {words}\n"), viewer.lines
            assert until(lambda number=number: changed(number)), f"nothing new after key {key}"
            assert share_of(seen[-1], LABEL_COLOURS[1], 0.3) > 0.002
            windows += viewer.windows()
        assert len(set(windows)) == 1  # the same one throughout
        for key in ("p", "h", "1", "m"):
            viewer.press(key)
            assert until(lambda: changed(1)), f"nothing new after key {key}"
        assert viewer.said("case: rays maximum\n")
        viewer.press("q")
        assert viewer.process.wait(timeout=300) == 0


def test_a_mode_that_cannot_be_shown_says_why_and_the_window_stays(screen, results):
    label = results / "case_label.nii.gz"
    with Viewer(screen, label, "--mode", "organs") as viewer:
        assert viewer.said("case_label: organs\n"), viewer.lines
        viewer.press("5")
        assert viewer.said("give the reference label map with --truth")
        viewer.press("4")
        assert viewer.said("case_label: slices\n")
        viewer.press("q")
        assert viewer.process.wait(timeout=300) == 0


def test_a_folder_of_results_opens_its_cases(screen, results, tmp_path):
    for name in ("a", "c"):
        shutil.copytree(results, tmp_path / name)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b_label.nii.gz").write_bytes(b"no volume")
    for name in ("a", "c"):
        (tmp_path / name / "case_label.nii.gz").rename(tmp_path / name / f"{name}_label.nii.gz")
    with Viewer(screen, tmp_path, "--mode", "organs") as viewer:
        assert viewer.said("a: organs\n"), viewer.lines
        viewer.press("n")
        assert viewer.said("b_label.nii.gz: ")  # named, and left out
        assert viewer.said("c: organs\n")
        viewer.press("q")
        assert viewer.process.wait(timeout=300) == 1


# --- faults -----------------------------------------------------------------------------


def test_empty_one_slice_and_two_slices(tmp_path, no_display):
    labels = np.zeros((20, 20, 2), np.uint8)
    empty = save(labels, np.eye(4), tmp_path / "empty.nii.gz")
    for mode in ("surface", "rays", "organs"):
        with pytest.raises(InputError, match=r"empty\.nii\.gz: the label map is empty"):
            v.main(config(empty, mode=mode, screenshot=tmp_path / "no.png"))
    v.main(config(empty, mode="slices", screenshot=tmp_path / "slices.png"))
    labels[5:15, 5:15, 0] = 1
    one = save(labels, np.diag([2, 2, 5, 1]), tmp_path / "one.nii.gz")
    assert any("only 1 slice" in line for line in v.find_case(one, config(one)).report())
    for mode in ("surface", "rays", "organs"):
        v.main(config(one, mode=mode, screenshot=tmp_path / f"{mode}.png"))
        picture = np.array(Image.open(tmp_path / f"{mode}.png").convert("RGB"))
        if mode != "rays":  # 20 mm of translucent liver are there, and faint
            assert share_of(picture, LABEL_COLOURS[1]) > 0.002
    assert not (tmp_path / "no.png").exists()


def test_what_is_not_a_label_map_is_refused(raw_phantoms, tmp_path):
    scan = next((raw_phantoms / "imagesTr").glob("*.nii.gz"))
    case = v.find_case(scan, config(scan, label=scan))
    with pytest.raises(InputError, match=r"must be a label map .* got int16 values -"):
        case.labels.shape  # noqa: B018
    with pytest.raises(InputError, match="--label"):
        v.find_case(scan, config(scan)).organ.shape  # noqa: B018


def test_a_label_map_of_another_scan_is_refused(results, tmp_path):
    other = save(np.ones((8, 8, 8), np.uint8), np.eye(4), tmp_path / "other.nii.gz")
    case = v.find_case(results, config(results, truth=other))
    with pytest.raises(InputError, match=r"other\.nii\.gz: scan is .* label map is \(8, 8, 8\)"):
        v.draw(case, config(results, mode="compare"), offscreen=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--screenshot", "view.jpg"], "must end in .png"),
        (["--mesh", "liver.step"], "must end in .stl, .ply, .obj, .vtp, .glb"),
        (["--movie", "view.avi"], "must end in .gif, .mp4"),
        ([], "no display to open a window on; give --screenshot"),
    ],
)
def test_faults_end_in_one_line(options, words, results):
    done = call_script("visualize_3d.py", results, *options)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_compare_needs_a_reference(results, tmp_path):
    label = results / "case_label.nii.gz"
    with pytest.raises(InputError, match="give the reference label map with --truth"):
        v.main(config(label, mode="compare", screenshot=tmp_path / "view.png"))


def test_nothing_to_draw_is_an_error_before_anything_is_read(tmp_path):
    done = call_script("visualize_3d.py", "--screenshot", tmp_path / "x.png")
    assert done.returncode == 1
    assert "nothing to draw: give results/<case>" in done.stderr


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match=r"holds no scan; expected .*<case>_label\.nii\.gz"):
        v.main(config(tmp_path, screenshot=tmp_path / "x.png"))


def test_of_several_cases_the_sound_ones_are_drawn(results, tmp_path, no_display, capsys):
    folder, pictures = tmp_path / "results", tmp_path / "pictures"
    shutil.copytree(results, folder / "b")
    for name, content in (("a", b""), ("c", b"no volume")):
        (folder / name).mkdir()
        (folder / name / f"{name}_label.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match="2 of 3 cases failed"):
        v.main(config(folder, mode="organs", screenshot=pictures / "x.png"))
    assert [path.name for path in pictures.iterdir()] == ["x_case.png"]
    told = capsys.readouterr().err
    assert "a_label.nii.gz" in told
    assert "c_label.nii.gz" in told


def test_two_cases_of_one_name_do_not_overwrite_each_other(results, tmp_path, no_display):
    shutil.copytree(results, tmp_path / results.name)
    with pytest.raises(InputError, match="two cases are called case"):
        v.main(config(results, tmp_path / results.name, screenshot=tmp_path / "x.png"))


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "no json", "3", '{"image": 7}', '{"image": "a\\u0000b"}', '{"truth": ["x"]}',
        '{"image": "' + "x" * 5000 + '"}', '{"classes": [1]}', '{"classes": {"liver": "1"}}',
        '{"classes": {"liver": -1}}', '{"classes": {"liver": 1, "spleen": 1}}',
        '{"classes": {"liver": true}}',
    ],
)  # fmt: skip
def test_a_foreign_record_is_told_and_the_case_is_drawn(content, results, tmp_path, capsys):
    folder = tmp_path / "case"
    shutil.copytree(results, folder)
    (folder / "case.json").write_text(content)
    case = v.find_case(folder, config(folder))
    assert "drawn without it" in capsys.readouterr().out
    assert list(case.classes) == ["liver", "tumour"]


def test_classes_have_the_names_and_values_of_the_record(tmp_path, no_display):
    labels = np.zeros((30, 30, 20), np.uint8)
    labels[4:20, 4:20, 4:16] = 6
    labels[8:12, 8:12, 6:10] = 2
    labels[22:28, 22:28, 4:16] = 9
    save(labels, np.diag([3, 3, 3, 1]), tmp_path / "x_label.nii.gz")
    classes = {"lesion": 2, "liver": 6, "liver_volume_ml": 9, "spleen": 12}
    (tmp_path / "x.json").write_text(json.dumps({"classes": classes, "pancreas_volume_ml": 3}))
    meshes = v.find_case(tmp_path, config(tmp_path)).meshes
    assert list(meshes) == ["liver", "lesion", "liver_volume_ml"]
    assert meshes["liver"].measures["volume_ml"] == pytest.approx(16 * 16 * 12 * 0.027)
    assert meshes["lesion"].measures["volume_ml"] == pytest.approx(64 * 0.027)


@pytest.mark.parametrize("mode", EXPECTED)
def test_nan_in_a_scan_is_one_error(mode, results, tmp_path, no_display):
    hu = nib.load(results / "case_masked.nii.gz")
    array = np.asarray(hu.dataobj).astype(np.float32)
    array[3, 4, 5] = np.nan
    scan = save(array, hu.affine, tmp_path / "scan.nii.gz")
    with pytest.raises(InputError, match=r"scan\.nii\.gz: .* NaN"):
        v.main(config(scan, mode=mode, screenshot=tmp_path / "x.png"))


@pytest.mark.parametrize("value", [-1, 300, 0.4, np.nan])
def test_odd_values_of_a_label_map_are_one_error(value, results, tmp_path, no_display):
    label = nib.load(results / "case_label.nii.gz")
    array = np.asarray(label.dataobj).astype(np.float32)
    array[3, 4, 5] = value
    truth = save(array, label.affine, tmp_path / "truth.nii.gz")
    with pytest.raises(InputError, match=r"truth\.nii\.gz: "):
        v.main(config(results, truth=truth, mode="compare", screenshot=tmp_path / "x.png"))


def test_a_label_map_in_other_axes_is_laid_on_its_scan(results, tmp_path):
    label = nib.load(results / "case_label.nii.gz")
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(label.affine), nib.orientations.axcodes2ornt("PIR")
    )
    nib.save(label.as_reoriented(turn), tmp_path / "truth.nii.gz")
    case = v.find_case(results, config(results, truth=tmp_path / "truth.nii.gz"))
    assert np.array_equal(case.reference.data, case.labels.data)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_nothing_behind(results, tmp_path):
    """A file that may not grow past 4 kB is what a full disk is to a writer."""
    code = """
import resource, signal, sys
from pathlib import Path
import visualize_3d as v
import visualize_3d as exports
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
v.HTML_TRIANGLES = 2000
exports.find_range = lambda *_: (20, 23)
suffixes = {name: some for name, (_, some) in v.OUTPUTS.items() if name != "turntable"}
for option, suffix in [(option, suffix) for option, some in suffixes.items() for suffix in some]:
    if suffix == ".mp4":
        continue
    path = Path(sys.argv[2]) / f"{option}{suffix}"
    try:
        v.main(v.Config((Path(sys.argv[1]),), size=(200, 150), smoothing=0, **{option: path}))
        print("no error:", path.name)
    except v.InputError as error:
        print("error:", error)
"""
    done = run_script("-c", code, results, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for name in ("screenshot.png", "movie.gif", "html.html", *(f"mesh{s}" for s in MESHES)):
        assert f"{name}: cannot be written" in done.stdout
    assert "no error" not in done.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_a_movie_goes_over_the_foreground_and_a_margin():
    masks = np.zeros((2, 4, 4, 30), bool)
    masks[0, 1, 1, 8:12] = masks[1, 2, 2, 10:20] = True
    assert exports.find_range(masks, 30, 3.0) == (5, 23)
    assert exports.find_range(masks, 30, 15.0) == (0, 30)
    assert exports.find_range(masks[:, :0], 30, 3.0) == (0, 30)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_movie_shows_reference_and_prediction_slice_by_slice(
    suffix, results, tmp_path, no_display, monkeypatch
):
    if suffix == ".mp4" and not shutil.which("ffmpeg"):
        pytest.skip("ffmpeg is not installed")
    label = nib.load(results / "case_label.nii.gz")
    upright = np.asarray(nib.as_closest_canonical(label).dataobj)
    middle = sum(exports.find_range([upright], upright.shape[2], 0)) // 2
    monkeypatch.setattr(exports, "find_range", lambda *_: (middle - 2, middle + 3))
    path = tmp_path / f"slices{suffix}"
    v.main(config(results, movie=path))
    if suffix == ".mp4":
        assert path.stat().st_size > 2000
        return
    with Image.open(path) as movie:
        shares = []
        for number in range(movie.n_frames):
            movie.seek(number)
            picture = np.array(movie.convert("RGB"))
            assert picture.shape == (SIZE[1], SIZE[0], 3)
            shares.append(
                [share_of(picture, colour) for colour in (TRUTH_COLOUR, LABEL_COLOURS[1])]
            )
    assert len(shares) > 3
    assert np.max(shares, axis=0).min() > 0.002


def test_views_and_letters_stand_where_the_space_is(results, tmp_path, no_display):
    """In `slices` a view turns the panel in 3D; the slices stay as they are."""
    pictures = []
    for view in v.VIEWS:
        path = tmp_path / f"{view}.png"
        v.main(config(results, mode="slices", view=view, screenshot=path))
        picture = np.array(Image.open(path).convert("RGB")).astype(int)
        pictures.append(picture)
    height, width = SIZE[1] // 2, SIZE[0] // 2
    for other in pictures[1:]:
        changed = np.abs(other - pictures[0]).max(axis=2) > 0
        assert changed[height:, :width].any()
        assert not changed[:height].any()
        assert not changed[:, width:].any()


def test_a_bad_path_among_several_is_named_and_the_others_are_drawn(results, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    paths = (tmp_path / "empty", tmp_path / "none.nii.gz", results)
    with pytest.raises(InputError, match="2 of 3 cases failed"):
        v.main(config(*paths, mode="organs", screenshot=tmp_path / "x.png"))
    assert (tmp_path / "x_case.png").exists()
    told = capsys.readouterr().err
    assert "empty: " in told
    assert "none.nii.gz: no such file" in told


def test_a_window_of_a_broken_case_ends_in_one_line(screen, tmp_path):
    (tmp_path / "x_label.nii.gz").write_bytes(b"no volume")
    with Viewer(screen, tmp_path) as viewer:
        assert viewer.process.wait(timeout=300) == 1
        assert viewer.said("error: ")
        assert "Traceback" not in "".join(viewer.lines)
