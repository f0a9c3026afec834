"""Nothing moves: from any scan to the network's grid and back onto the scan."""

import itertools
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ct_image, random_affine
from monai import transforms
from monai.data import MetaTensor
from nibabel.orientations import apply_orientation, inv_ornt_aff

import apply_model
import data.volumes
from apply_model import Model, Options
from data.evaluate import dice_metric
from data.files import InputError
from data.labels import IMAGE, LABEL
from data.scans import read_volume
from data.volumes import Volume, find_body, mask_scan, name_case
from preprocess import (
    Chain,
    classes_on_grid,
    deterministic_chain,
    in_plane_chain,
    preprocess_volume,
    slice_chain,
)

SETTINGS = Chain(
    sampling="subvolumes",
    spacing=(1.0, 1.0),
    hu_window=(-200.0, 250.0),
    input_size=(96, 96),
    labels={"background": (0,), "liver": (1, 2)},
    ignore=(),
    crop_to_body=False,
)
PATCHES = replace(SETTINGS, sampling="patches", spacing=(1.1, 1.1, 1.3), input_size=(32, 24, 16))
WINDOWS = {"subvolumes": (96, 96, 16), "patches": PATCHES.input_size}
CROPPED = replace(SETTINGS, crop_to_body=True)
BOTH = pytest.mark.parametrize(
    "settings", [SETTINGS, PATCHES, CROPPED], ids=["subvolumes", "patches", "cropped"]
)


class Threshold(torch.nn.Module):
    """A network whose answer is known: everything above 25 HU (0.5 of the window) is liver."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 - x, x - 0.5], dim=1)


def known_model(settings=SETTINGS) -> Model:
    inference = {"window": WINDOWS[settings.sampling], "overlap": 0.5}
    return Model(Threshold(), settings, inference, torch.device("cpu"), torch.float32)


def open_scan(image) -> Volume:
    return Volume(np.asanyarray(image.dataobj), image.affine, "image", image.header)


def segment(model: Model, scan) -> Volume:
    """The label map of a scan: a path, a volume or an image."""
    scan = open_scan(scan) if isinstance(scan, nib.Nifti1Image) else scan
    return apply_model.segment(model, scan).label


def blob(shape, seed=0) -> np.ndarray:
    """Fat of −100 HU around an ellipsoid of 150 HU, off centre and different along each axis."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in shape), indexing="ij")
    centre, radii = rng.uniform(-0.2, 0.2, 3), rng.uniform(0.4, 0.6, 3)
    inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1
    return np.where(inside, 150, -100)


def all_orientations():
    for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        for signs in np.ndindex(2, 2, 2):
            yield np.array([[axis, 1 - 2 * sign] for axis, sign in zip(axes, signs, strict=True)])


@BOTH
def test_every_orientation_gives_the_same_segmentation(settings):
    """The same patient stored differently gets the same voxels marked, in place: all 48, and of
    patches, whose way back is the same, some."""
    image = ct_image(blob((40, 44, 20)), random_affine(0))
    expected = segment(known_model(settings), image).ras.data
    assert expected.any()
    for orientation in itertools.islice(
        all_orientations(), 0, 48, 1 if settings is SETTINGS else 7
    ):
        array = np.ascontiguousarray(apply_orientation(np.asarray(image.dataobj), orientation))
        affine = image.affine @ inv_ornt_aff(orientation, image.shape)
        label = segment(known_model(settings), ct_image(array, affine))
        assert label.shape == array.shape
        assert np.allclose(label.affine, affine)
        assert np.array_equal(label.ras.data, expected)


@BOTH
@pytest.mark.parametrize("shear", [0.0, 0.2])
@pytest.mark.parametrize("slices", [1, 15, 16, 17, 40])
def test_segmentation_lies_on_the_organ(tmp_path, slices, shear, settings):
    # Nearly RAS, so that the last axis is the one that is cut into windows.
    image = ct_image(blob((80, 72, slices)), random_affine(3, shear=shear, shuffle=False))
    label = segment(known_model(settings), image)
    truth = np.asarray(image.dataobj) > 0
    assert dice_metric(label.read(), truth) > 0.97
    label.write_checked(tmp_path / "a_label.nii.gz")
    written = read_volume(tmp_path / "a_label.nii.gz")
    assert written.dtype == np.uint8
    assert np.allclose(written.affine, image.affine, atol=1e-4)


def lying_body(shape, seed=0) -> np.ndarray:
    """`blob` in a body of −50 HU with lungs, off centre in air; a table that touches nothing."""
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    body = ((x - 0.6 * shape[0]) / (0.3 * shape[0])) ** 2 + (
        (y - 0.55 * shape[1]) / (0.25 * shape[1])
    ) ** 2 < 1
    array = np.where(body, -50, -1000)
    array[body & (z > 0.8 * shape[2]) & (x > 0.6 * shape[0])] = -800
    organ = blob(shape, seed) > 0
    array[organ & body] = 150
    array[:, : max(2, shape[1] // 40)] = 60
    return array


@pytest.mark.parametrize("spacing", [(0.9, 0.8, 2.0), (2.5, 3.0, 5.0), (4.0, 4.0, 0.7)])
def test_a_scan_cropped_to_the_body_is_segmented_in_place(spacing):
    """Table and air are cut off, the organ stays where it is, whichever way the scan is stored."""
    image = ct_image(lying_body((120, 100, 24)), np.diag([*spacing, 1.0]))
    box = find_body(open_scan(image))
    assert [box[0].start > 10, box[0].stop > 105, box[1].start > 10, box[1].stop < 95] == [True] * 4
    truth = np.asarray(image.dataobj) == 150
    cropped = segment(known_model(CROPPED), image)
    assert dice_metric(cropped.read(), truth)[0] > 0.97
    for orientation in itertools.islice(all_orientations(), 0, 48, 5):
        array = np.ascontiguousarray(apply_orientation(np.asarray(image.dataobj), orientation))
        turned = ct_image(array, image.affine @ inv_ornt_aff(orientation, image.shape))
        assert np.array_equal(segment(known_model(CROPPED), turned).ras.data, cropped.ras.data)


def test_beside_the_crop_nothing_is_found_and_nothing_likely():
    """Also where the organ reaches the edge of what the network saw."""
    array = np.full((90, 80, 16), -1000)
    array[30:60, 20:60] = 150  # all of the body is liver
    scan = Volume(array, np.diag([2.0, 2.0, 3.0, 1.0]))
    found = apply_model.segment(known_model(CROPPED), scan, Options(probability=True))
    assert np.count_nonzero(found.label.read()) == pytest.approx(30 * 40 * 16, rel=0.1)
    assert found.probability.read()[:20].max() == found.probability.read()[70:].max() == 0


def test_an_array_with_its_affine_is_segmented_as_the_image_is():
    image = ct_image(blob((40, 44, 20)), random_affine(0))
    array = np.asarray(image.dataobj).astype(np.int64)
    found = segment(known_model(), Volume(array, image.affine))
    assert np.array_equal(found.read(), segment(known_model(), image).read())
    assert np.array_equal(found.affine, image.affine)


@BOTH
def test_landmark_keeps_its_millimetres(settings):
    """The centre of mass of a small bright ball, in patient mm, before and after; sub-voxel."""
    for seed in range(3):
        affine = random_affine(seed, spacing=(0.9, 0.8, 2.0))
        grid = np.stack(np.meshgrid(*map(np.arange, (64, 60, 48)), indexing="ij"), axis=-1)
        points = nib.affines.apply_affine(affine, grid)
        centre = nib.affines.apply_affine(affine, [41, 20, 17])
        inside = np.linalg.norm(points - centre, axis=-1) < 12
        image = ct_image(np.where(inside, 150, -100), affine)
        found = segment(known_model(settings), image).read() > 0
        assert np.linalg.norm(points[found].mean(axis=0) - centre) < 0.25
        assert np.count_nonzero(found) * Volume(found * 1, affine).voxel_ml == pytest.approx(
            4 / 3 * np.pi * 12**3 / 1000, rel=0.06
        )


def test_window_of_the_preprocessed_volume_is_the_preprocessed_window(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(-300, 400, (70, 61, 40))
    image = open_scan(ct_image(array, random_affine(5, shear=0.1))).ras
    label = Volume(rng.integers(0, 3, image.shape).astype(np.uint8), image.affine)
    whole, _ = preprocess_volume(image, SETTINGS, "cpu")
    chain = deterministic_chain(SETTINGS, "cpu")
    for start in (0, 11, image.shape[2] - 16):
        files = {}
        for key, volume in ((IMAGE, image), (LABEL, label)):
            files[key] = tmp_path / f"{key}.nii"
            volume.crop((slice(None), slice(None), slice(start, start + 16))).write(files[key])
        item = chain(files)
        assert item[IMAGE].dtype == torch.float16
        assert torch.equal(item[IMAGE], whole[..., start : start + 16].half())
        assert item[LABEL].dtype == torch.uint8
        assert set(item[LABEL].unique().tolist()) <= {0, 1}


def test_the_chain_equals_monais_own_3d_transforms(tmp_path):
    """Slices as channels change the speed, not the voxels: 1e-3 of the intensity range at most."""
    rng = np.random.default_rng(1)
    affine = np.diag([-0.71, 0.83, 2.5, 1.0])  # no pixel falls half-way between two
    files, keys = {}, [IMAGE, LABEL]
    for key, array in (
        (IMAGE, rng.integers(-300, 400, (90, 80, 16)).astype(np.int16)),
        (LABEL, rng.integers(0, 2, (90, 80, 16)).astype(np.uint8)),
    ):
        files[key] = tmp_path / f"{key}.nii"
        nib.save(nib.Nifti1Image(array, affine), files[key])
    low, high = SETTINGS.hu_window
    usual = transforms.Compose(
        [
            transforms.LoadImaged(keys, reader="NibabelReader"),
            transforms.EnsureChannelFirstd(keys),
            transforms.Orientationd(keys, axcodes="RAS"),
            transforms.Spacingd(keys, pixdim=(1.0, 1.0, -1.0), mode=("bilinear", "nearest")),
            transforms.ScaleIntensityRanged(IMAGE, low, high, 0.0, 1.0, clip=True),
            transforms.Resized(keys, (96, 96, -1), mode=("trilinear", "nearest-exact")),
        ]
    )(files)
    ours = deterministic_chain(SETTINGS, "cpu")(files)
    difference = (ours[IMAGE].float() - usual[IMAGE].as_tensor()).abs()
    assert difference.max() < 1e-3
    assert (ours[LABEL] == usual[LABEL].as_tensor()).float().mean() > 0.9999


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (1, 4), (0, 0)])
def test_header_forms_survive(tmp_path, codes):
    affine = random_affine(1)
    image = nib.Nifti1Image(blob((30, 28, 18)).astype(np.int16), affine)
    image.set_qform(affine if codes[0] else None, code=codes[0])
    image.set_sform(affine if codes[1] else None, code=codes[1])
    path = tmp_path / "scan.nii.gz"
    nib.save(image, path)
    scan = read_volume(path)
    assert name_case(path) == "scan"
    segment(known_model(), scan).write_checked(tmp_path / "out.nii.gz")
    written = nib.load(tmp_path / "out.nii.gz")
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == codes
    assert np.allclose(written.affine, scan.affine, atol=1e-4)


def test_scaled_and_unsigned_scans_keep_their_hu(tmp_path):
    hounsfield = blob((40, 40, 16)) + 0.0
    image = nib.Nifti1Image(hounsfield, random_affine(2))
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, tmp_path / "scaled.nii.gz")
    scan = read_volume(tmp_path / "scaled.nii.gz")
    assert (scan.data.slope, scan.data.inter) == (0.5, -1024)
    label = segment(known_model(), scan)
    outside = mask_scan(scan.read(), label.read(), -1024)
    inside = label.read() > 0
    assert np.array_equal(outside[inside], hounsfield[inside].astype(np.float32))
    assert (outside[~inside] == -1024).all()
    stored, empty = np.full((8, 8, 8), 200, np.uint16), np.zeros((8, 8, 8), np.uint8)
    assert (mask_scan(stored, empty, -1024) == -1024).all()


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">i2"]
)
def test_any_number_type_is_read(dtype):
    array = ((blob((30, 28, 18)) > 0) * 100).astype(dtype)
    image = nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0]), dtype=array.dtype)
    assert dice_metric(segment(known_model(), image).read(), array > 0) > 0.95


def test_a_write_that_would_change_the_grid_is_refused(tmp_path, monkeypatch):
    image = open_scan(ct_image(blob((20, 20, 16)), random_affine(0)))
    moved = Volume(image.read(), image.affine + np.eye(4, k=3) * 0.01)
    make_header = data.volumes.make_header
    monkeypatch.setattr(data.volumes, "make_header", lambda _, *how: make_header(moved, *how))
    with pytest.raises(InputError, match="affine"):
        image.write_checked(tmp_path / "out.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_round_trip_of_real_livers(real_ct: Path):
    """A perfect network loses only in-plane resolution: Dice ≥ 0.985, though its label is hard."""
    label = read_volume(real_ct / "labelsTr" / "tace_0697.nii.gz").ras
    settings = replace(SETTINGS, input_size=(256, 256))
    raw = MetaTensor(torch.from_numpy(label.read().astype(np.float32))[None], affine=label.affine)
    chain = transforms.Compose([*in_plane_chain(settings, "cpu"), *slice_chain(settings)])
    taught = chain({IMAGE: raw, LABEL: raw})[LABEL]
    _, to_network = preprocess_volume(label, settings, "cpu")
    found = classes_on_grid(2 * taught.float() - 1, to_network, label.shape)
    assert dice_metric(found > 0, label.read() > 0) >= 0.985
