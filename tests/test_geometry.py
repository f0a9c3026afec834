"""Nothing moves: from any scan to the network's grid and back onto the scan."""

import itertools
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ct_image, random_affine
from helpers import Threshold
from monai import transforms
from nibabel.orientations import apply_orientation, inv_ornt_aff

import apply_model
from apply_model import Model, Options
from data.evaluate import dice_metric
from data.labels import IMAGE, LABEL
from data.scans import read_volume
from data.volumes import Volume, find_body, write_masked
from preprocess import (
    Chain,
    classes_on_grid,
    preprocess_files,
    preprocess_slices,
    preprocess_volume,
)

SETTINGS = Chain(
    sampling="subvolumes", spacing=(1.0, 1.0), hu_window=(-200.0, 250.0), input_size=(96, 96),
    labels={"background": (0,), "liver": (1, 2)}, ignore=(), crop_to_body=False,
)  # fmt: skip
PATCHES = replace(SETTINGS, sampling="patches", spacing=(1.1, 1.1, 1.3), input_size=(32, 24, 16))
WINDOWS = {"subvolumes": (96, 96, 16), "patches": PATCHES.input_size}
CROPPED = replace(SETTINGS, crop_to_body=True)
BOTH = pytest.mark.parametrize(
    "settings", [SETTINGS, PATCHES, CROPPED], ids=["subvolumes", "patches", "cropped"]
)


def known_model(settings=SETTINGS) -> Model:
    """The network whose answer is known: everything above 25 HU is liver."""
    inference = {"window": WINDOWS[settings.sampling], "overlap": 0.5}
    return Model(Threshold(), settings, inference, torch.device("cpu"), torch.float32)


def segment_known(image, settings=SETTINGS) -> Volume:
    """The label map of an image by the network whose answer is known."""
    return apply_model.segment(known_model(settings), open_scan(image)).label


def open_scan(image) -> Volume:
    return Volume(np.asanyarray(image.dataobj), image.affine, "image", image.header)


def blob(shape, seed=0) -> np.ndarray:
    """Fat of −100 HU around an ellipsoid of 150 HU, off centre and different along each axis."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in shape), indexing="ij")
    centre, radii = rng.uniform(-0.2, 0.2, 3), rng.uniform(0.4, 0.6, 3)
    inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1
    return np.where(inside, 150, -100)


def turn_all(image, step):
    """Yield every `step`-th of the 48 ways to store a scan, each voxel in its place."""
    orders = itertools.permutations(range(3))
    cases = itertools.product(orders, itertools.product((1, -1), repeat=3))
    for axes, signs in itertools.islice(cases, 0, 48, step):
        turn = np.array(list(zip(axes, signs, strict=True)))
        array = np.ascontiguousarray(apply_orientation(np.asarray(image.dataobj), turn))
        yield ct_image(array, image.affine @ inv_ornt_aff(turn, image.shape))


@BOTH
def test_every_orientation_gives_the_same_segmentation(settings):
    image = ct_image(blob((40, 44, 20)), random_affine(0))
    expected = segment_known(image, settings).ras.data
    for turned in turn_all(image, 5):
        label = segment_known(turned, settings)
        assert label.shape == turned.shape
        assert np.allclose(label.affine, turned.affine)
        assert np.array_equal(label.ras.data, expected)


@BOTH
@pytest.mark.parametrize("shear", [0.0, 0.2])
@pytest.mark.parametrize("slices", [1, 15, 16, 17, 40])
def test_segmentation_lies_on_the_organ_whatever_the_number_of_slices(slices, shear, settings):
    # nearly RAS, so that the last axis is the one that is split into windows
    image = ct_image(blob((80, 72, slices)), random_affine(3, shear=shear, shuffle=False))
    label = segment_known(image, settings)
    assert dice_metric(label.read(), np.asarray(image.dataobj) > 0) > 0.97


def lying_body(shape, seed=0) -> np.ndarray:
    """`blob` in a body of −50 HU with lungs, off centre in air; a table that touches nothing."""
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    across, along = (x / shape[0] - 0.6) / 0.3, (y / shape[1] - 0.55) / 0.25
    body = across**2 + along**2 < 1
    array = np.where(body, -50, -1000)
    array[body & (z > 0.8 * shape[2]) & (x > 0.6 * shape[0])] = -800
    array[(blob(shape, seed) > 0) & body] = 150
    array[:, : max(2, shape[1] // 40)] = 60
    return array


@pytest.mark.parametrize("spacing", [(0.9, 0.8, 2.0), (2.5, 3.0, 5.0), (4.0, 4.0, 0.7)])
def test_a_scan_cropped_to_the_body_is_segmented_in_place(spacing):
    """Table and air are cut off, the organ stays where it is, whichever way the scan is stored."""
    image = ct_image(lying_body((120, 100, 24)), np.diag([*spacing, 1.0]))
    box = find_body(open_scan(image))
    assert box[0].start > 10 and box[0].stop > 105 and box[1].start > 10 and box[1].stop < 95
    cropped = segment_known(image, CROPPED)
    assert dice_metric(cropped.read(), np.asarray(image.dataobj) == 150)[0] > 0.97
    for turned in turn_all(image, 5):
        assert np.array_equal(segment_known(turned, CROPPED).ras.data, cropped.ras.data)


def test_beside_the_crop_nothing_is_found():
    """Also where the organ reaches the edge of what the network saw."""
    array = np.full((90, 80, 16), -1000)
    array[30:60, 20:60] = 150  # all of the body is liver
    scan = Volume(array, np.diag([2.0, 2.0, 3.0, 1.0]))
    found = apply_model.segment(known_model(CROPPED), scan, Options(probability=True))
    assert np.count_nonzero(found.label.read()) == pytest.approx(30 * 40 * 16, rel=0.1)
    assert found.probability.read()[:20].max() == found.probability.read()[70:].max() == 0


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
        found = segment_known(image, settings).read() > 0
        assert np.linalg.norm(points[found].mean(axis=0) - centre) < 0.25
        assert np.count_nonzero(found) * Volume(found * 1, affine).voxel_ml == pytest.approx(
            4 / 3 * np.pi * 12**3 / 1000, rel=0.06
        )


def random_files(folder: Path, affine: np.ndarray, slices: slice) -> dict[str, Path]:
    """Slices of a random scan and label map (90 × 80 × 40), as files."""
    files, rng = {}, np.random.default_rng(0)
    for key, low, high, kind in ((IMAGE, -300, 400, np.int16), (LABEL, 0, 2, np.uint8)):
        files[key] = folder / f"{key}.nii"
        volume = Volume(rng.integers(low, high, (90, 80, 40)).astype(kind), affine)
        volume.crop((slice(None), slice(None), slices)).write(files[key])
    return files


def test_window_of_the_preprocessed_volume_is_the_preprocessed_window(tmp_path):
    affine = random_affine(5, shear=0.1, shuffle=False)
    scan = read_volume(random_files(tmp_path, affine, slice(None))[IMAGE])
    whole, _ = preprocess_volume(scan, SETTINGS, "cpu")
    for start in (0, 11, 24):
        files = random_files(tmp_path, affine, slice(start, start + 16))
        item = preprocess_files(files, SETTINGS, "cpu")
        assert torch.equal(item[IMAGE], whole[..., start : start + 16].half())
        assert set(item[LABEL].unique().tolist()) == {0, 1}


def test_the_chain_equals_monais_own_3d_transforms(tmp_path):
    """Slices as channels change the speed, not the voxels: 1e-3 of the intensity range at most."""
    affine = np.diag([-0.71, 0.83, 2.5, 1.0])  # no pixel falls half-way between two
    files, keys = random_files(tmp_path, affine, slice(16)), [IMAGE, LABEL]
    usual = transforms.Compose(
        [
            transforms.LoadImaged(keys, reader="NibabelReader"),
            transforms.EnsureChannelFirstd(keys),
            transforms.Orientationd(keys, axcodes="RAS"),
            transforms.Spacingd(keys, pixdim=(1.0, 1.0, -1.0), mode=("bilinear", "nearest")),
            transforms.ScaleIntensityRanged(IMAGE, *SETTINGS.hu_window, 0.0, 1.0, clip=True),
            transforms.Resized(keys, (96, 96, -1), mode=("trilinear", "nearest-exact")),
        ]
    )(files)
    ours = preprocess_files(files, SETTINGS, "cpu")
    assert (ours[IMAGE].float() - usual[IMAGE].as_tensor()).abs().max() < 1e-3
    assert (ours[LABEL] == usual[LABEL].as_tensor()).float().mean() > 0.9999


def test_a_coarse_grid_takes_means_of_images_and_nearest_labels():
    """Stripes of 0, 0, 90 HU along x and y, 1 mm each, at 3 mm: of a pixel of 0 and those beside it
    (weights ½, 1, ½) the mean is 22.5, of both axes less 10 it is 35. At 4 mm the weights are 1:
    30 + 30 − 10. Slices of 0 and 60 HU by turns, at 2 mm: half of its own and of both beside."""
    stripes = np.add.outer([0, 0, 90] * 10, [0, 0, 90] * 10)[..., None] + np.zeros(6) - 10
    chain = replace(PATCHES, spacing=(3.0, 3.0, 2.0), hu_window=(0.0, 100.0))
    for mm, mean in ((3.0, 0.35), (4.0, 0.5), (2.0, None)):
        coarse = replace(chain, spacing=(mm, mm, 2.0))
        image = preprocess_volume(Volume(stripes.astype(np.int16), np.eye(4)), coarse, "cpu")[0]
        assert mean is None or torch.allclose(image[0, 1:-1, 1:-1], torch.tensor(mean))
    assert torch.allclose(image[0, 0, :3, 0], torch.tensor([0.0, 0.8, 0.0]))  # all are taken
    turns = np.zeros((30, 30, 7)) + [0, 60, 0, 60, 0, 60, 0]
    image = preprocess_volume(Volume(turns.astype(np.int16), np.eye(4)), chain, "cpu")[0]
    assert torch.allclose(image[0, 5, 5, 1:-1], torch.tensor(0.3))
    label = (stripes > 100).astype(np.uint8)  # at pixels 2, 5, …; the grid has 0, 3, 6, …
    assert not preprocess_slices(label, (1, 1, 1), chain, "cpu", LABEL)[:, :-1, :-1].any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_speck_between_the_voxels_of_a_coarse_scan_is_none_of_them(axis):
    """Scan voxels 4 mm apart, network voxels 2 mm: of a speck at (4, 4, 4) or one step from it, the
    first lies on a scan voxel, (2, 2, 2); the other between two, and reaches neither."""
    to_network = np.diag([2.0, 2, 2, 1])
    for step, expected in ((0, [[2, 2, 2]]), (1, [])):
        scores, at = torch.full((1, 8, 8, 8), -1.0), [4, 4, 4]
        at[axis] += step
        scores[(0, *at)] = 1
        assert np.argwhere(classes_on_grid(scores, to_network, (4, 4, 4))).tolist() == expected


def test_scaled_and_unsigned_scans_keep_their_hu_in_the_masked_volume(tmp_path):
    path, hounsfield = tmp_path / "a.nii.gz", blob((40, 40, 16))
    image = ct_image((hounsfield + 1024) * 2, random_affine(2))
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, path)
    scan = read_volume(path)
    label = scan.like((hounsfield > 0).astype(np.uint8))
    write_masked(scan, label, -1024, path)
    assert np.array_equal(read_volume(path).read(), np.where(hounsfield > 0, 150, -1024))
    unsigned = label.like(np.full(label.shape, 200, np.uint16))
    write_masked(unsigned, label, -1024, path)
    assert np.array_equal(read_volume(path).read(), np.where(hounsfield > 0, 200, -1024))


def test_round_trip_of_real_livers(real_ct: Path):
    """A perfect network loses only in-plane resolution: Dice ≥ 0.985, though its label is hard."""
    label = read_volume(real_ct / "labelsTr" / "tace_0697.nii.gz").ras
    settings = replace(SETTINGS, input_size=(256, 256), hu_window=(0.0, 1.0))
    taught, to_network = preprocess_volume(label, settings, "cpu")
    found = classes_on_grid(2 * (taught >= 0.5).float() - 1, to_network, label.shape)
    assert dice_metric(found > 0, label.read() > 0) >= 0.985
