"""Bodies for training without a real scan: repeatable, plausible, and different from each other."""

import make_bodies
import numpy as np
import organs
import pytest

COARSE = make_bodies.Config(spacing=(8.0, 8.0, 8.0))


@pytest.fixture(scope="module")
def bodies():
    """(image, label) of six coarse bodies, as arrays (X, Y, Z)."""
    pairs = (make_bodies.make_body(index, COARSE) for index in range(6))
    return [tuple(np.asanyarray(volume.dataobj) for volume in pair) for pair in pairs]


def test_a_body_depends_on_seed_and_index_alone(bodies):
    again = make_bodies.make_body(3, COARSE)
    for volume, known in zip(again, bodies[3], strict=True):
        assert np.array_equal(np.asanyarray(volume.dataobj), known)
    other = make_bodies.make_body(3, make_bodies.Config(spacing=COARSE.spacing, seed=1))
    assert other[0].shape != bodies[3][0].shape or not np.array_equal(
        np.asanyarray(other[0].dataobj), bodies[3][0]
    )


def test_image_and_label_share_a_grid_in_ras(bodies):
    image, label = make_bodies.make_body(0, COARSE)
    assert image.shape == label.shape
    assert np.array_equal(image.affine, label.affine)
    assert np.allclose(np.diag(image.affine)[:3], COARSE.spacing)
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)


def test_the_liver_is_on_the_right_and_of_a_plausible_size(bodies):
    for image, label in bodies:
        liver = np.argwhere(label > 0) / np.array(label.shape)
        ml = len(liver) * np.prod(COARSE.spacing) / 1000
        assert 150 < ml < 4500  # a scan may begin or end within it
        assert liver[:, 0].mean() > 0.5  # in RAS, x grows to the right
        assert -30 < np.median(image[label == 1]) < 200


def test_bodies_differ_in_size_reach_and_contrast(bodies):
    assert len({image.shape for image, _ in bodies}) == len(bodies)
    contrast = [np.median(image[label == 1]) for image, label in bodies]
    assert np.ptp(contrast) > 30


def test_tissues_keep_the_order_of_their_hu():
    for seed in range(40):
        hu = make_bodies.draw_hu(np.random.default_rng(seed))
        assert set(hu) >= {"liver", "spleen", "heart", "cortex", "aorta", "vein", "fat", "lung"}
        assert hu["lung"] < hu["fat"] < hu["muscle"] < hu["bone"]


def test_the_command_writes_a_decathlon_folder(tmp_path):
    make_bodies.main(make_bodies.Config(tmp_path, cases=2, spacing=(12.0, 12.0, 12.0)))
    names = ["body_0000.nii.gz", "body_0001.nii.gz"]
    for folder in ("imagesTr", "labelsTr"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    assert (tmp_path / "dataset.json").is_file()


@pytest.mark.parametrize("liver_hu", [-25.0, 0.0, 60.0, 140.0])
def test_tumours_in_livers_of_any_hu(liver_hu):
    inside = np.zeros((10, 3))
    for seed in range(40):
        layers = organs.draw_tumours(np.random.default_rng(seed), inside, liver_hu)
        assert all(name == "tumour" and np.isfinite(hu) for name, _, hu in layers)
