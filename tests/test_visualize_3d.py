"""What a viewer relies on: every picture is there, in the right place, on the right side."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import vedo
from conftest import ROOT, random_affine, run_script
from matplotlib.colors import to_rgb
from nibabel.affines import apply_affine
from PIL import Image

import visualize_3d as v
from utilities import LABEL_COLOURS, TRUTH_COLOUR, InputError

SIZE = (480, 360)


def config(*paths: Path, **options) -> v.Config:
    return v.Config(paths, size=SIZE, **options)


def sphere(affine: np.ndarray, radius: float, shape=(64, 64, 40)) -> np.ndarray:
    """Mask of a ball of `radius` mm in the middle of a grid."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    return np.linalg.norm(apply_affine(affine, index) - centre, axis=-1) <= radius


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
    mesh = v.surface_mm(mask, affine)
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
    mesh = v.smooth(v.surface_mm(mask, affine), 100)
    found = v.measure(mask, affine, mesh)
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
    bare = v.surface_mm(sphere(affine, 22, (64, 64, 14)), affine)
    before = roughness(bare)
    mesh = v.smooth(bare, 100)
    assert roughness(mesh) < before / 2
    assert abs(mesh.smoothing_percent) < 1
    shading = mesh.pointdata["Normals"]  # of the smooth surface, not of the steps
    outwards = mesh.vertices - mesh.vertices.mean(axis=0)
    outwards /= np.linalg.norm(outwards, axis=1)[:, None]
    assert np.mean(np.einsum("ij,ij->i", shading, outwards)) > 0.96


def test_a_lesion_of_one_voxel_is_not_smoothed_away():
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2] = True
    mesh = v.smooth(v.surface_mm(mask, np.eye(4)), 100)
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
    truth = v.smooth(v.surface_mm(mask, affine), 100)
    for radius in (15, 21):
        other = v.smooth(v.surface_mm(sphere(affine, radius), affine), 100)
        distance = v.signed_distance(other.vertices, mask, affine, truth.vertices)
        assert np.median(distance) == pytest.approx(radius - 18, abs=0.5)


@pytest.mark.parametrize(
    ("direction", "letters"),
    [((1, 0, 0), "R"), ((0, -1, 0), "P"), ((0.1, 0.2, -1), "I"), ((-1, 0.9, 0), "LA")],
)
def test_letters_name_the_direction(direction, letters):
    assert v.direction_letters(np.array(direction)) == letters


def test_darkness_finds_a_dark_lesion_and_no_dark_rim():
    rng = np.random.default_rng(0)
    affine = np.diag([1, 1, 2, 1])
    mask = sphere(affine, 25, (60, 60, 30))
    lesion = sphere(affine, 6, (60, 60, 30))
    hu = np.where(mask, 100 - 50 * lesion, 0) + rng.normal(0, 15, mask.shape)
    rim = mask & ~sphere(affine, 23, (60, 60, 30))
    hu[rim] -= 60  # voxels that hold some fat
    darker = v.darkness(hu, mask, affine)
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


def test_tumours_show_inside_the_liver_by_their_hu_alone(results, tmp_path, no_display):
    """Rays of the masked volume: nobody tells it where the tumours are."""
    masked = results / "case_masked.nii.gz"
    shares = []
    for projection in ("composite", "maximum"):
        path = tmp_path / f"{projection}.png"
        v.main(config(masked, mode="rays", projection=projection, screenshot=path))
        shares.append(share_of(np.array(Image.open(path).convert("RGB")), LABEL_COLOURS[2], 0.2))
    assert min(shares) > 0.002


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


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR"])
@pytest.mark.parametrize(
    ("mode", "view", "side"), [("organs", "anterior", 0), ("rays", "posterior", 1)]
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
    """IsosurfaceBrowser caches by two digits; steps of whole tens keep every surface apart."""
    volume, _, steps, _ = v.hu_volume(v.find_case(results, config(results)))
    values = np.linspace(*volume.scalar_range(), steps)
    keys = {vedo.utils.precision(value, 2) for value in values}
    assert len(keys) == steps > 20


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


@pytest.mark.parametrize("suffix", v.OUTPUTS["mesh"][1])
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


def until(condition, seconds: float):
    """Wait for a condition; returns its last value."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.3)
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


def test_windows_open_and_keys_change_them(screen, results):
    command = [sys.executable, ROOT / "visualize_3d.py", results, "--size", *map(str, SIZE)]
    environment = {**os.environ, "DISPLAY": screen}
    viewer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        seen = []

        def changed() -> bool:
            picture = window_pixels(screen)
            if share_of(picture, LABEL_COLOURS[1], 0.3) < 0.002:
                return False
            if any(np.abs(picture.astype(int) - old).mean() < 1 for old in seen):
                return False
            seen.append(picture.astype(int))
            return True

        for key in (None, "2", "3", "4", "5", "p"):
            if key:
                time.sleep(1)
                subprocess.run(["xdotool", "mousemove", "200", "150", "key", key], env=environment)
            assert until(changed, 30), f"nothing new after key {key}"
        time.sleep(1)
        subprocess.run(["xdotool", "key", "q"], env=environment)
        assert viewer.wait(timeout=20) == 0
    finally:
        viewer.kill()


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
    with pytest.raises(InputError, match="must lie on one grid"):
        v.draw(case, config(results, mode="compare"), offscreen=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--screenshot", "view.jpg"], "must end in .png"),
        (["--mesh", "liver.step"], "must end in .stl, .ply, .obj, .vtp, .glb"),
        ([], "no display to open a window on; give --screenshot"),
    ],
)
def test_faults_end_in_one_line(options, words, results):
    done = run_script("visualize_3d.py", results, *options)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_compare_needs_a_reference(results, tmp_path):
    label = results / "case_label.nii.gz"
    with pytest.raises(InputError, match="give the reference label map with --truth"):
        v.main(config(label, mode="compare", screenshot=tmp_path / "view.png"))
