"""Scans and label maps are read right, or one `InputError` says why not."""

import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import random_affine
from PIL import Image

import data.scans
from data.dicom import write_series
from data.files import InputError
from data.labels import USUAL_LABELS
from data.scans import lay_on_grid, list_files, read_label_map, read_scan, stamp_inputs
from data.seg import write_seg
from data.volumes import AIR_HU, Volume

SHAPE = (8, 6, 5)
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])  # LPS
HU = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[2:6, 1:4, 1:4], LABEL[3, 2, 2:4] = 1, 2
SCAN = Volume(HU, AFFINE, "scan")


def write_nifti(path: Path, array: np.ndarray, affine=AFFINE, codes=(1, 1)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)
    return path


NAMES = ("a.nii", "A.NII.GZ", "a.hdr", "a.mhd", "a.nrrd")


def write(name: str, folder: Path, array: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.suffix == ".hdr":
        image = nib.Nifti1Pair(array, AFFINE)
        image.set_qform(AFFINE, 1)
        nib.save(image, path)
        return path
    if ".nii" in name.lower():
        return write_nifti(path, array)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing((2.0, 2.0, 3.0))
    SimpleITK.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
def test_every_reader_gives_the_label_map_in_any_type(name, dtype, tmp_path):
    scan = read_scan(write(name, tmp_path / "scan", HU))
    assert np.array_equal(scan.read(), HU)
    label = read_label_map(write(name, tmp_path, LABEL.astype(dtype)), scan, USUAL_LABELS)
    assert np.array_equal(label.read(), LABEL)
    assert label.dtype.kind in "iu"
    assert label.notes == ()
    classes = {"background": (0,), "liver": (1, 2)}
    indices = read_label_map(write(name, tmp_path, LABEL), scan, USUAL_LABELS, classes=classes)
    assert np.array_equal(indices.read(), LABEL > 0) and indices.read().dtype == np.uint8


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("shape", ["frame", "circle", "last slice", "wedge", "between slices"])
def test_padding_of_one_value_is_air(value, shape, tmp_path):
    hu, (x, y, z) = np.arange(1, 961, dtype="i2").reshape(16, 12, 5), np.indices((16, 12, 5))
    hu[7:9, 5:8, 1:3], hu[4, 6, 2] = value, -900  # gas, and a cyst, that no padding touches
    frame = (x < 3) | (y > 8)
    padding = {"frame": frame, "circle": np.hypot(x - 7.5, y - 5.5) > 7, "last slice": z == 4,
               "wedge": x + y + z < 9, "between slices": frame & (z % 4 > 0)}[shape]  # fmt: skip
    scan = read_scan(write("a.nii", tmp_path / "1", np.where(padding, value, hu)))
    assert np.array_equal(scan.read(), np.where(padding, AIR_HU, hu))
    assert scan.notes == (f"{padding.sum()} voxels of padding ({value} HU) are now air",)
    for array in (np.where(padding, -2000, hu), np.where(padding, value, hu.clip(value))):
        kept = read_scan(write("a.nii", tmp_path / "2", array))  # its own air; no CT: without air
        assert np.array_equal(kept.read(), array) and kept.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_voxels_without_a_number_are_refused_by_every_reader(name, tmp_path):
    array = HU.astype(np.float32)
    array[1, 2, 3] = np.nan
    path = write(name, tmp_path, array)
    for read in (read_scan, lambda path: read_label_map(path, SCAN, USUAL_LABELS)):
        with pytest.raises(InputError, match="NaN or infinite") as error:
            read(path).read()
        assert error.value.kind == "nan"


def test_near_whole_label_values_are_rounded_and_reported_and_rescaled_ones_whole(tmp_path):
    path = write_nifti(tmp_path / "a.nii", (LABEL * 0.9999).astype(np.float32))
    label = read_label_map(path, SCAN, USUAL_LABELS)
    assert np.array_equal(label.read(), LABEL)
    assert label.dtype.kind == "u" and "rounded" in label.notes[0]
    image = nib.Nifti1Image(LABEL * np.uint8(2), AFFINE)
    image.header.set_slope_inter(0.5, 0)
    image.to_filename(tmp_path / "a.nii.gz")
    label = read_label_map(tmp_path / "a.nii.gz", SCAN, USUAL_LABELS)
    assert np.array_equal(label.read(), LABEL) and label.read().dtype.kind == "u"


def test_values_that_nobody_declared_are_refused_and_named(tmp_path):
    for label, values in (
        (LABEL * 0.6, r"\[0\.6"), ((LABEL > 0) * 255, r"\[255\]"), (LABEL * 3, r"\[3, 6\]"),
        (-LABEL.astype(float), r"\[-2, -1\]"), (LABEL * 1e12, r"\[1e\+12"),
    ):  # fmt: skip
        path = write_nifti(tmp_path / "a.nii", label.astype(np.float32))
        with pytest.raises(InputError, match=values) as error:
            read_label_map(path, SCAN, USUAL_LABELS)
        assert error.value.kind == "values"
        assert str(path) in str(error.value)
    hu = write_nifti(tmp_path / "b.nii.gz", HU.astype(np.float32))
    for scan, text in ((LABEL, r"are scan and label map swapped\?"), (HU, r"is it a scan\?")):
        with pytest.raises(InputError, match=text):
            read_label_map(hu, Volume(scan, AFFINE, "scan"), USUAL_LABELS).read()


AXES = [
    np.array([*zip(order, signs, strict=True)])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def turn(array: np.ndarray, affine: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels at the same place, stored in other axes."""
    moved = affine @ nib.orientations.inv_ornt_aff(axes, array.shape)
    return nib.apply_orientation(array, axes), moved


def test_a_label_map_in_any_axes_lies_on_its_scan(tmp_path):
    affine = random_affine(3)
    scan = read_scan(write_nifti(tmp_path / "scan.nii.gz", HU, affine))
    for axes in AXES:
        path = write_nifti(tmp_path / "label.nii", *turn(LABEL, affine, axes))
        label = read_label_map(path, scan, USUAL_LABELS)
        assert np.array_equal(scan.from_ras(label.ras.data).data, LABEL)
        assert np.allclose(label.ras_affine, scan.ras_affine, rtol=0, atol=1e-5)
        assert label.notes == ()


@pytest.mark.parametrize(("axes", "axis"), [(AXES[0], 0), (AXES[7], 1), (AXES[20], 2)])
@pytest.mark.parametrize(
    ("voxels", "kind"),
    [(0.005, "same"), (0.45, "told"), (0.55, "grid"), (-0.45, "told"), (-0.55, "grid")],
)
def test_half_a_voxel_is_the_limit(voxels, kind, axis, axes):
    scan = Volume(HU, random_affine(5), "scan")
    array, affine = turn(LABEL, scan.affine, axes)
    affine[:3, 3] += voxels * scan.affine[:3, axis]
    label = Volume(array, affine, "label")
    if kind == "grid":
        with pytest.raises(InputError, match=r"lie up to 0.55 voxels apart.*--trust"):
            lay_on_grid(label, scan)
        return
    laid = lay_on_grid(label, scan)
    assert np.allclose(laid.ras_affine, scan.ras_affine, atol=1e-9)
    assert any("voxels apart" in note for note in laid.notes) == (kind == "told")


def test_other_shapes_and_trust():
    label = Volume(LABEL, np.diag([2.0, 2.0, 3.0, 1.0]), "label")
    with pytest.raises(InputError, match="voxels apart"):
        lay_on_grid(label, SCAN)
    laid = lay_on_grid(label, SCAN, trust=True)
    assert np.array_equal(laid.affine, SCAN.affine) and np.array_equal(laid.read(), LABEL)
    for trust in (False, True):
        with pytest.raises(InputError, match=r"scan is \(8, 6, 5\), label map is \(8, 6, 4\)") as e:
            lay_on_grid(Volume(LABEL[:, :, :4], AFFINE, "label"), SCAN, trust)
        assert e.value.kind == "shape"


@pytest.mark.parametrize("unknown", ["scan", "label"])
def test_an_unknown_orientation_is_not_compared_as_if_it_were_known(unknown, tmp_path):
    scan = write_nifti(tmp_path / "scan.nii", HU, codes=(unknown != "scan",) * 2)
    label = write_nifti(tmp_path / "label.nii", LABEL, codes=(unknown != "label",) * 2)
    with pytest.raises(InputError, match=rf"{unknown}\.nii.*has no orientation") as error:
        read_label_map(label, read_scan(scan), USUAL_LABELS)
    assert error.value.kind == "grid"
    trusted = read_label_map(label, read_scan(scan), USUAL_LABELS, trust_grid=True)
    assert np.array_equal(trusted.read(), LABEL)
    assert np.array_equal(trusted.affine, read_scan(scan).affine)
    for path, array in ((scan, HU), (label, LABEL)):
        write_nifti(path, array, codes=(0, 0))
    found = read_label_map(label, read_scan(scan), USUAL_LABELS)
    assert np.array_equal(found.read(), LABEL)
    assert "neither scan nor label map has an orientation" in found.notes[0]


def test_what_is_not_there_or_no_volume_is_one_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    for name in ("text.nii.gz", "text.mha", "text.nrrd", "text.hdr", "x.mgz"):
        (tmp_path / name).write_text("hello")
    messages = {
        "empty": "holds no DICOM series",
        "link.nii.gz": "a link to a file that is not there",
        "missing.nii": "no such file",
        "x.mgz": "the ending must be one of",
    }
    for name in ("pipe.nii.gz", "pipe", "pipe.mha"):  # nobody waits for what comes out of it
        os.mkfifo(tmp_path / name)
        messages[name] = "no such file"
        with pytest.raises(InputError, match=f"{name}: no such file"):
            stamp_inputs([tmp_path / name])
    for name in [*messages, "text.nii.gz", "text.mha", "text.nrrd", "text.hdr"]:
        for read in (
            read_scan,
            lambda path: read_label_map(path, SCAN, USUAL_LABELS),
            lambda path: read_label_map((("liver", path),), SCAN, USUAL_LABELS),
        ):
            with pytest.raises(InputError, match=messages.get(name, ": ")) as error:
                read(tmp_path / name).read()
            assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("error", [MemoryError("8 TB"), KeyError("y"), PermissionError(13, "no")])
def test_whatever_a_reader_raises_is_an_input_error(error, tmp_path, monkeypatch):
    def fail(path):
        raise error

    monkeypatch.setattr(data.scans, "read_file", fail)
    path = write_nifti(tmp_path / "a.nii", HU)
    for read in (read_scan, lambda p: read_label_map(p, SCAN, USUAL_LABELS)):
        with pytest.raises(InputError, match=r"a\.nii: cannot be read"):
            read(path)


def test_a_scan_in_place_of_a_seg_and_a_seg_in_place_of_a_scan(tmp_path):
    series = tmp_path / "ct"
    write_series(SCAN, series)
    scan = read_scan(series)
    classes = {"background": (0,), "liver": (1,), "tumour": (2,)}
    stored = scan.from_ras(Volume(LABEL, AFFINE).ras.data)
    assert write_seg(stored, scan, classes, tmp_path / "seg.dcm") == []
    label = read_label_map(tmp_path / "seg.dcm", scan, USUAL_LABELS)
    assert np.array_equal(label.read(), stored.data)
    (series / "seg.dcm").write_bytes((tmp_path / "seg.dcm").read_bytes())
    with pytest.raises(InputError, match=r"seg\.dcm: .*SEG"):  # not the CT beside it
        read_scan(series / "seg.dcm")
    with pytest.raises(InputError, match=r"is it a scan\?"):
        read_label_map(next(series.glob("0*.dcm")), scan, USUAL_LABELS).read()


def test_of_overlapping_masks_tumours_win_then_smaller_structures(tmp_path):
    """36 voxels of liver hold 8 of a vessel; 12 of tumour cover half of the vessel."""
    liver, vessel, tumour = np.zeros((3, *SHAPE), np.uint8)
    liver[2:6, 1:4, 1:4], vessel[2:4, 2:4, 2:4], tumour[3:6, 2:4, 2:4] = 255, 1, 1
    drawn = {"tumour": tumour, "vessel": vessel, "liver": liver, "spleen": liver}
    masks = tuple((n, write_nifti(tmp_path / f"{n}.nii", array)) for n, array in drawn.items())
    found = read_label_map(masks, SCAN, {"liver": 1, "tumour": 2, "vessel": 3})
    assert np.bincount(found.read().ravel()).tolist() == [240 - 36, 36 - 12 - 4, 12, 4]
    assert found.classes == {"tumour": 2, "vessel": 3, "liver": 1} and found.name == str(tmp_path)
    with pytest.raises(InputError, match=r"mask of one structure.*\[0, 1, 2\]"):
        read_label_map((("liver", write_nifti(tmp_path / "a.nii", LABEL)),), SCAN, USUAL_LABELS)
    with pytest.raises(InputError, match="none of the masks spleen is one of the labels"):
        read_label_map(masks[3:], SCAN, USUAL_LABELS)


def test_pictures_lie_on_the_files_of_a_series_and_on_no_other_scan(tmp_path):
    write_series(SCAN, tmp_path / "ct")
    series = read_scan(tmp_path / "ct")
    folder, order = tmp_path / "Ground", [2, 0, 1, 4, 3]
    folder.mkdir()
    for z in range(5):
        Image.fromarray(LABEL[:, :, order[z]].T * np.uint8(63)).save(folder / f"{z}.png")
    with pytest.raises(InputError, match="for 0 files of scan; give the label map as NIfTI"):
        read_label_map(folder, SCAN, USUAL_LABELS)
    with pytest.raises(InputError, match=r"got the greys \[63, 126\]"):  # of the tumour
        read_label_map((("gut", folder),), series, {"gut": 1})
    found = read_label_map(folder, series, USUAL_LABELS).read()
    assert np.array_equal(found, (LABEL == 1)[:, :, order])


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_read_is_stamped_and_no_other(name, tmp_path):
    path = write(name, tmp_path, HU)
    files = {file for file in tmp_path.iterdir() if file.is_file()}
    assert set(list_files(path)) == files
    before = stamp_inputs([path, None])
    (tmp_path / "other.nii").write_bytes(b"x")
    assert stamp_inputs([path]) == before
    for file in files:
        os.utime(file, ns=(1, 1))
        assert stamp_inputs([path]) != before
        before = stamp_inputs([path])
    if name == "a.hdr":  # either half of a pair will do
        assert all(set(list_files(file)) == files for file in files)


def test_of_masks_and_of_a_series_exactly_its_files_are_stamped(tmp_path):
    write_series(SCAN, tmp_path / "ct")
    (tmp_path / "ct/notes.txt").write_text("x")
    names = [f"{z + 1:04d}.dcm" for z in range(5)]
    assert [Path(name).name for name, *_ in stamp_inputs([tmp_path / "ct"])] == names
    masks = tuple((name, write_nifti(tmp_path / f"{name}.nii", LABEL)) for name in ("a", "b"))
    assert [Path(name).name for name, *_ in stamp_inputs([masks])] == ["a.nii", "b.nii"]
