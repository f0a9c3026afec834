"""What a viewer relies on: every picture is there, in the right place, on the right side."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import vedo
from conftest import ROOT, random_affine
from matplotlib.colors import to_rgb
from nibabel.affines import apply_affine
from PIL import Image, ImageSequence

import visualize_3d as v
from data.files import InputError
from data.pictures import LABEL_COLOURS
from data.volumes import Volume

SIZE = (480, 360)


def config(*paths: Path, **options) -> v.Config:
    return v.Config(paths, size=SIZE, **options)


def open_case(path: Path, **options) -> v.Case:
    return v.find_case(path, config(path, **options))


def sphere(affine: np.ndarray, radius: float, shape=(64, 64, 40)) -> np.ndarray:
    """Mask of a ball of `radius` mm in the middle of a grid."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    return np.linalg.norm(apply_affine(affine, index) - centre, axis=-1) <= radius


def surface_of(mask: np.ndarray, affine: np.ndarray, smoothing: int = 100) -> vedo.Mesh:
    return v.make_surface(Volume(mask.astype(np.uint8), affine), smoothing, "red")


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def draw(path: Path, **options) -> np.ndarray:
    """The picture (height, width, 3) of a case, off screen."""
    settings = config(path, **options)
    plotter = v.make_plotter(settings, offscreen=True)
    v.draw(v.find_case(path, settings), settings, plotter)
    picture = plotter.screenshot(asarray=True)
    plotter.close()
    return picture


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
    hu, label = nib.load(scan), np.roll(np.uint8(nib.load(truth).dataobj), 2, axis=0)
    save(label, hu.affine, folder / "case_label.nii.gz")
    masked = np.where(label > 0, hu.dataobj, -1024).astype(np.int16)
    save(masked, hu.affine, folder / "case_masked.nii.gz")
    record = {"case": "case", "image": str(scan), "truth": str(truth), "liver_volume_ml": 1}
    (folder / "case.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("seed", range(4))
def test_mesh_lies_where_the_mask_lies(seed):
    """Rotated, sheared, (two of them) mirrored: the surface ends at the faces of the voxels."""
    affine = random_affine(seed, shear=0.2)
    mask = np.zeros((20, 16, 12), bool)
    mask[3:11, 5:14, 2:9] = True
    mesh = surface_of(mask, affine, smoothing=0)
    faces = [axis * side / 2 for axis in np.eye(3) for side in (-1, 1)]
    corners = apply_affine(affine, np.concatenate([np.argwhere(mask) + face for face in faces]))
    assert np.allclose(mesh.vertices.min(axis=0), corners.min(axis=0), atol=1e-3)
    assert np.allclose(mesh.vertices.max(axis=0), corners.max(axis=0), atol=1e-3)
    a, b, c = mesh.vertices[np.array(mesh.cells)].transpose(1, 0, 2)
    assert np.einsum("ij,ij->", a - a.mean(axis=0), np.cross(b - a, c - a)) > 0  # faces outwards


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 4)])
def test_a_sphere_has_its_volume_surface_and_extent(spacing):
    """The steps of thick slices alone would add half to the surface."""
    affine = random_affine(5, spacing=spacing, shear=0.1)
    mesh = surface_of(sphere(affine, 20), affine)
    assert mesh.volume() == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.01)
    assert mesh.area() == pytest.approx(4 * np.pi * 20**2, rel=0.03)
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx([40, 40, 40], abs=max(spacing))
    lesion = surface_of(np.pad(np.ones((1, 1, 1), bool), 2), np.eye(4))
    assert lesion.volume() > 0 and abs(lesion.smoothing_percent) < 1  # not smoothed away


def test_letters_say_what_lies_at_each_edge():
    views = {"RLSI": ((0, 1, 0), (0, 0, 1)), "LRAP": ((0, 0, 1), (0, 1, 0))}
    for letters, (side, up) in views.items():
        panel = v.make_panel(config())
        v.place_camera(panel, side, up)
        panel.InvokeEvent("StartEvent")
        found = [actor.GetMapper().GetInput() for actor in panel.GetActors2D()]
        assert "".join(found) == letters
    assert v.name_direction(np.array((-1, 0.9, 0.1))) == "LA"


@pytest.mark.parametrize("radius", [15, 21])
def test_the_comparison_tells_how_far_outside_or_inside_the_prediction_lies(radius, tmp_path):
    affine = random_affine(2, spacing=(1, 1, 1.5))
    truth = save(sphere(affine, 18).astype(np.uint8), affine, tmp_path / "truth.nii.gz")
    path = save(sphere(affine, radius).astype(np.uint8), affine, tmp_path / "map.nii.gz")
    settings = config(path, truth=truth, mode="compare")
    scene = v.make_compare_scene(v.find_case(path, settings), settings)
    (mean,) = [name for name in scene.legend if name.startswith("mm apart: mean ")]
    assert float(mean.split()[3].strip(",")) == pytest.approx(3, abs=0.5)
    picture = draw(path, truth=truth, mode="compare")[150:250]
    for half in (picture[:, SIZE[0] // 4 : SIZE[0] // 2], picture[:, 3 * SIZE[0] // 4 :]):
        orange, purple = (share_of(half, colour, 0.25) for colour in ("#b35806", "#542788"))
        assert orange > 0.1 > purple if radius > 18 else purple > 0.1 > orange


@pytest.mark.parametrize("mode", v.SCENES)
def test_every_mode_gives_a_picture_without_a_display(mode, results, tmp_path):
    path = tmp_path / "view.png"
    v.main(config(results, mode=mode, screenshot=path))
    picture = np.array(Image.open(path).convert("RGB"))
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    colour = "#f7f7f7" if mode == "compare" else LABEL_COLOURS[1]  # where both agree
    assert share_of(picture, colour, 0.2) > 0.005
    assert [file.name for file in tmp_path.iterdir()] == ["view.png"]


@pytest.mark.parametrize("projection", ["composite", "maximum"])
def test_tumours_show_inside_the_liver_by_their_hu_alone(projection, results):
    """Rays of the masked volume, where nobody tells where the tumours are: they are seen, and not
    in the colour of a tumour; where the label map tells it, they have that colour."""
    rays = {"mode": "rays", "projection": projection}
    told, masked = (
        draw(path, **rays)[90:-40, 30:-30] for path in (results, results / "case_masked.nii.gz")
    )
    assert share_of(told, LABEL_COLOURS[2], 0.2) > 0.002
    assert share_of(masked, LABEL_COLOURS[2]) == 0
    assert share_of(masked, v.DARK_TISSUE, 0.2) > 0.002


@pytest.mark.parametrize(
    ("codes", "mode", "view"),
    [("PIR", "organs", "anterior"), ("LPS", "rays", "posterior"), ("LAS", "organs", "posterior")],
)
def test_the_patients_right_is_on_the_right_side(codes, mode, view, tmp_path):
    labels = np.zeros((60, 40, 30), np.uint8)  # RAS: first axis grows to the right
    labels[34:56, 10:30, 5:25] = 1
    labels[4:34, 17:23, 13:17] = 1
    image = nib.Nifti1Image(labels, np.diag([3, 3, 4, 1]))
    ends = nib.orientations.axcodes2ornt(codes)
    axes = nib.orientations.ornt_transform(nib.io_orientation(image.affine), ends)
    nib.save(image.as_reoriented(axes), tmp_path / "map.nii.gz")
    picture = draw(tmp_path / "map.nii.gz", mode=mode, view=view)
    halves = np.array_split(picture[60:-40, 30:-30], 2, axis=1)  # without letters and text
    left, right = (share_of(half, LABEL_COLOURS[1], 0.3) for half in halves)
    assert left > 1.5 * right if view == "anterior" else right > 1.5 * left


def test_rays_and_surface_cover_the_same_place_on_a_sheared_grid(tmp_path):
    affine = random_affine(3, spacing=(1, 1, 3), shear=0.4)
    labels = np.zeros((50, 40, 20), np.uint8)
    labels[8:40, 10:30, 4:15] = 1
    path = save(labels, affine, tmp_path / "map.nii.gz")
    shown = []
    for mode in ("organs", "rays"):
        picture = draw(path, mode=mode, view="right", projection="maximum", smoothing=0)
        picture = picture[90:-40, 30:-30].astype(int)
        shown.append(np.abs(picture - picture[0, -1]).sum(axis=2) > 30)
    both, either = shown[0] & shown[1], shown[0] | shown[1]
    assert both.sum() / either.sum() > 0.9


def test_slices_are_radiological(tmp_path):
    """Axial slice: the patient's right on the left, anterior on top; a bright corner tells."""
    scan = np.full((40, 40, 20), -200, np.int16)
    scan[25:38, 25:38] = 250  # right and anterior in RAS
    path = save(scan, np.diag([2, 2, 4, 1]), tmp_path / "scan.nii.gz")
    panel = draw(path, mode="slices").mean(axis=2)[: SIZE[1] // 2, : SIZE[0] // 2]
    rows, columns = np.nonzero(panel[:, : SIZE[0] // 4 + 40] > 240)
    assert np.median(rows) < panel.shape[0] / 2
    assert np.median(columns) < panel.shape[1] / 2


def test_a_film_goes_over_the_foreground_and_15_mm(tmp_path):
    labels = np.zeros((20, 20, 30), np.uint8)
    labels[4:16, 4:16, 8:12] = 1
    path = save(labels, np.diag([5, 5, 5, 1]), tmp_path / "map.nii.gz")
    v.main(config(path, movie=tmp_path / "film.gif"))
    with Image.open(tmp_path / "film.gif") as film:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == 10
    axial = [frame[60 : SIZE[1] // 2 - 60, 40 : SIZE[0] // 2 - 40] for frame in frames]
    drawn = [share_of(part, LABEL_COLOURS[1]) > 0.002 for part in axial]
    assert drawn == [False] * 3 + [True] * 4 + [False] * 3


@pytest.mark.parametrize("space", ["LPS", "RAS"])
def test_mesh_in_millimetres_and_in_the_space_asked_for(space, results, tmp_path):
    meshes = open_case(results).meshes
    sign = np.array([-1, -1, 1] if space == "LPS" else [1, 1, 1])
    for suffix in v.SUFFIXES["mesh"]:
        path = tmp_path / f"liver{suffix}"
        v.main(config(results, mesh=path, **({} if space == "LPS" else {"mesh_space": "RAS"})))
        for name, file in (("liver", path), ("tumour", tmp_path / f"liver_tumour{suffix}")):
            expected, found = meshes[name].vertices * sign, vedo.load(str(file)).vertices
            for end in (np.min, np.max):
                assert np.allclose(end(found, axis=0), end(expected, axis=0), atol=0.01)


@pytest.fixture
def screen():
    """A virtual screen; skips where it cannot be made."""
    if not (shutil.which("Xvfb") and shutil.which("xdotool")):
        pytest.skip("windows need Xvfb and xdotool (apt-get install xvfb xdotool)")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "640x480x24"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as pipe:
        number = pipe.readline().strip()
    yield f":{number}"
    server.terminate()
    server.wait()


def test_views_turn_the_last_panel_and_every_slider_moves(results, monkeypatch):
    make = v.make_plotter
    monkeypatch.setattr(v, "make_plotter", lambda options, offscreen: make(options, True))
    window = v.Window([results], replace(config(results), size=(160, 120)))
    window.press("n")
    first = window.scene
    for key in "12345h1":
        window.press(key)
        for slider in window.scene.sliders:
            for value in slider.range:
                slider.value = value
                slider.InvokeEvent("InteractionEvent")
        camera = window.scene.panels[-1].GetActiveCamera()
        seen = {window.press(view) or camera.GetDirectionOfProjection() for view in v.VIEW_KEYS}
        assert len(seen) == 5
    assert window.scene is first
    assert window.text.text() == ""  # h hid the help
    window.plotter.close()


def test_one_window_in_which_keys_change_the_mode_and_n_the_case(screen, results, tmp_path):
    for name in ("a", "c"):
        shutil.copytree(results, tmp_path / "all" / name)
        for file in (tmp_path / "all" / name).iterdir():
            file.rename(file.with_name(file.name.replace("case", name)))
    (tmp_path / "all/c/c.json").unlink()
    (tmp_path / "all/b").mkdir()
    (tmp_path / "all/b/b_label.nii.gz").write_bytes(b"no volume")
    environment = {**os.environ, "DISPLAY": screen, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, ROOT / "visualize_3d.py", tmp_path / "all", "--size", "480", "360"]
    log = tmp_path / "log"
    with log.open("w") as stream:
        viewer = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    for key, words in (
        ("", "a: surface"), ("2", "a: rays composite"), ("3", "a: organs"), ("4", "a: slices"),
        ("5", "a: compare"), ("m", "a: rays maximum"), ("n", "b_label.nii.gz: "),
        ("n", "c: rays maximum"), ("5", "give the reference label map with --truth"), ("q", ""),
    ):  # fmt: skip
        if key:
            pressed = ["xdotool", "mousemove", "200", "150", "key", key]
            subprocess.run(pressed, env=environment, check=True)
        end = time.monotonic() + 300  # only a hang takes five minutes
        while words not in log.read_text() and viewer.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        assert words in log.read_text(), log.read_text()
    assert viewer.wait(timeout=300) == 0


def test_an_empty_label_map_is_named_and_one_slice_is_drawn(tmp_path):
    labels = np.zeros((20, 20, 2), np.uint8)
    empty = save(labels, np.eye(4), tmp_path / "empty.nii.gz")
    labels[5:15, 5:15, 0] = 1
    one = save(labels, np.diag([2, 2, 5, 1]), tmp_path / "one.nii.gz")
    for mode in ("surface", "rays", "organs"):
        with pytest.raises(InputError, match=r"empty: the label map is missing or empty"):
            draw(empty, mode=mode)
        assert draw(one, mode=mode).std() > 5
    assert draw(empty, mode="slices").any()


def test_what_is_no_label_map_of_the_scan_is_refused(results, raw_phantoms, tmp_path):
    scan = next((raw_phantoms / "imagesTr").glob("*.nii.gz"))
    with pytest.raises(InputError, match=r"the label map holds \[-1024"):
        open_case(scan, label=scan)
    with pytest.raises(InputError, match="give one with --label"):
        draw(scan, mode="organs")
    other = save(np.ones((8, 8, 8), np.uint8), np.eye(4), tmp_path / "other.nii.gz")
    with pytest.raises(InputError, match=r"other\.nii\.gz: scan is .* label map is \(8, 8, 8\)"):
        open_case(results, truth=other)


def test_faults_of_the_command_are_told_before_anything_is_read(tmp_path):
    for options, words in (
        ({"screenshot": Path("view.jpg")}, r"must end in \.png"),
        ({"mesh": Path("liver.step")}, r"must end in \.stl, \.ply, \.obj, \.vtp"),
        ({}, "no display to open a window on; give --screenshot"),
    ):
        with pytest.raises(InputError, match=words):
            v.main(config(tmp_path, **options))


def test_of_several_cases_the_sound_ones_are_drawn(results, tmp_path):
    shutil.copytree(results, tmp_path / "results" / "b")
    (tmp_path / "results/a").mkdir()
    (tmp_path / "results/a/a_label.nii.gz").write_bytes(b"no volume")
    (tmp_path / "empty").mkdir()
    paths = (tmp_path / "results", tmp_path / "empty", tmp_path / "none.nii.gz")
    with pytest.raises(InputError, match="3 of 4 cases failed") as error:
        v.main(config(*paths, mode="organs", screenshot=tmp_path / "pictures" / "x.png"))
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["x_case.png"]
    for words in ("a_label.nii.gz", "empty: ", "none.nii.gz: no such file"):
        assert words in str(error.value)
    with pytest.raises(InputError, match="two cases have the same name"):  # one would be lost
        v.main(config(results, results, screenshot=tmp_path / "x.png"))


def test_a_case_is_drawn_without_the_files_that_are_gone(results, tmp_path, capsys):
    folder = tmp_path / "case"
    shutil.copytree(results, folder)
    record = {"image": str(tmp_path / "gone.nii.gz"), "truth": [["liver", str(tmp_path / "gone")]]}
    (folder / "case.json").write_text(json.dumps(record))
    case = open_case(folder)
    assert "its image" in (told := capsys.readouterr().out) and "its truth" in told
    assert (case.kind, case.reference) == ("masked", None)
    assert case.shown.data.min() == -1024


def test_classes_have_the_names_and_values_of_the_record(tmp_path):
    """Liver: 16 × 16 × 12 voxels of 27 mm³, lesions of 4 × 4 × 4 and 2 × 4 × 4 among them."""
    labels = np.zeros((30, 30, 20), np.uint8)
    labels[4:20, 4:20, 4:16] = 6
    labels[8:12, 8:12, 6:10] = labels[15:17, 8:12, 6:10] = 2
    labels[22:28, 22:28, 4:16] = 9
    labels[22:28, 4:10, 4:16] = 11
    save(labels, np.diag([3, 3, 3, 1]), tmp_path / "x_label.nii.gz")
    classes = {"background": 0, "lesion": 2, "liver": 6, "pancreas": 9, "spleen": 12}
    (tmp_path / "x.json").write_text(json.dumps({"classes": classes, "pancreas_volume_ml": 3}))
    case = open_case(tmp_path, smoothing=0)
    assert list(case.meshes) == ["liver", "lesion", "pancreas", "label_11"]
    volumes = {line.split()[0]: line.split()[1] for line in case.report if line[0] != " "}
    assert (volumes["liver"], volumes["lesion"]) == ("82.9", "2.6")
    assert "  R–L 48 × A–P 48 × I–S 36 mm" in case.report
    assert "  parts 2: 1.7, 0.9 ml" in case.report
    assert "no scan: organs drawn as 100 HU" in case.report
