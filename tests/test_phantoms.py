"""What a user relies on in the synthetic CTs that everything else is tried on."""

import json
from dataclasses import replace
from pathlib import Path

import make_phantoms
import nibabel as nib
import numpy as np
import pytest
from helpers import call_script
from make_phantoms import ORIENTATIONS, Config, main, make_phantom

ROOT = Path(__file__).parents[1]
REAL_MASK = ROOT.parent / "shared" / "data" / "lits_labels" / "liver_000.nii.gz"
SMALL = Config(size=64, slices=(28, 36))


def arrays(index: int, config: Config = SMALL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU and label (X, Y, Z) in RAS, and the affine of that grid."""
    image, label = (part.ras for part in make_phantom(index, config))
    return image.data, label.data, image.affine


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_seed_same_bytes_whatever_the_number_of_cases_and_workers(tmp_path: Path) -> None:
    main(replace(SMALL, cases=3, destination=tmp_path / "a"))
    main(replace(SMALL, cases=2, first=1, workers=2, destination=tmp_path / "b"))
    main(replace(SMALL, cases=1, seed=1, destination=tmp_path / "c"))
    a, b, c = (files(tmp_path / name) for name in "abc")
    for name in ("imagesTr/phantom_001.nii.gz", "labelsTr/phantom_002.nii.gz"):
        assert a[name] == b[name]
    assert a["imagesTr/phantom_000.nii.gz"] != c["imagesTr/phantom_000.nii.gz"]
    assert a["imagesTr/phantom_000.nii.gz"] != a["imagesTr/phantom_001.nii.gz"]
    assert not [name for name in a if name.endswith(".part")]


def test_dataset_json_lists_what_is_on_disk_and_batches_add_up(tmp_path: Path) -> None:
    main(replace(SMALL, cases=1, destination=tmp_path))
    main(replace(SMALL, cases=2, first=1, destination=tmp_path))
    record = json.loads((tmp_path / "dataset.json").read_text())
    assert record["labels"] == {"0": "background", "1": "liver", "2": "tumour"}
    assert record["numTraining"] == len(record["training"]) == 3
    for pair in record["training"]:
        image, label = nib.load(tmp_path / pair["image"]), nib.load(tmp_path / pair["label"])
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1


def test_orientation_spacing_and_extent_vary_and_stay_plausible() -> None:
    affines, codes = [], set()
    for index in range(8):
        image, _ = make_phantom(index, replace(SMALL, slices=(40, 60)))
        spacing = image.spacing_mm
        assert 1 <= spacing[2] <= 5.5
        assert 319 <= spacing[0] * image.shape[0] <= 481
        codes.add("".join(nib.aff2axcodes(image.affine)))
        affines.append(image.affine[:3, :3] / spacing)
    assert {"RAS", "LAS", "LPS"} <= codes
    slanted = [np.abs(np.abs(a).max(0) - 1).max() > 1e-3 for a in affines]
    assert slanted == [name == "oblique" for name in ORIENTATIONS] * 2
    assert len({image.shape[2] for image, _ in (make_phantom(i, SMALL) for i in range(6))}) > 2


@pytest.mark.parametrize("index", range(8))
def test_anatomy_in_patient_coordinates(index: int) -> None:
    hu, label, affine = arrays(index)
    assert hu.min() >= -1024
    assert set(np.unique(label)) <= {0, 1, 2}
    body = nib.affines.apply_affine(affine, np.argwhere(hu > -300))
    liver = nib.affines.apply_affine(affine, np.argwhere(label > 0))
    bone = nib.affines.apply_affine(affine, np.argwhere(hu > 260))
    lung = nib.affines.apply_affine(affine, np.argwhere((hu < -700) & (hu > -890)))
    right, front, head = liver.mean(0) - body.mean(0)
    assert right > 20, "the liver must lie on the patient's right"
    assert bone[:, 1].mean() < body[:, 1].mean() - 15, "the spine must lie behind"
    assert lung[:, 2].mean() > liver[:, 2].mean() + 30, "the lungs must lie above"
    assert abs(front) < 60
    assert abs(head) < 60
    volume_ml = len(liver) * abs(np.linalg.det(affine[:3, :3])) / 1000
    assert 700 < volume_ml < 3500
    slices = (label > 0).any((0, 1))
    assert not slices[0]
    assert not slices[-1]
    assert (hu[:, :, slices][label[:, :, slices] > 0] > -200).mean() > 0.97, "no liver in the air"


def test_tissues_have_their_hounsfield_units() -> None:
    spleens = []
    for index in range(6):
        hu, label, _ = arrays(index)
        assert -1030 < np.median(hu[:3, :3]) < -970  # air beside the body
        assert 80 < np.median(hu[label == 1]) < 130
        soft, counts = np.unique(hu[(hu > -150) & (hu < 80)] // 10 * 10, return_counts=True)
        assert -115 <= soft[counts.argmax()] <= -85  # fat is the commonest soft tissue
        assert 40 <= soft[soft > 0][counts[soft > 0].argmax()] <= 60  # then muscle
        assert ((hu > -900) & (hu < -800)).mean() > 0.02  # lung
        assert (hu > 250).any()  # bone
        spleen_hu, spleen, _ = arrays(index, replace(SMALL, organ="spleen"))
        assert np.array_equal(spleen_hu, hu)
        assert not (spleen & (label > 0)).any()
        spleens.append(np.median(hu[spleen == 1]) - np.median(hu[label == 1]))
    assert np.abs(spleens).max() < 20, "HU alone must not tell the spleen from the liver"


def test_spleen_lies_on_the_left() -> None:
    for index in range(4):
        hu, spleen, affine = arrays(index, replace(SMALL, organ="spleen"))
        assert set(np.unique(spleen)) == {0, 1}
        middle = np.argwhere(hu > -300).mean(0)
        assert (affine[:3, :3] @ (np.argwhere(spleen).mean(0) - middle))[0] < -50


def test_tumours_are_dark_inside_the_liver_and_as_many_as_asked_for() -> None:
    for index in range(6):
        hu, label, _ = arrays(index, replace(SMALL, tumours=(2, 2), size=96))
        tumour = label == 2
        assert tumour.any()
        assert hu[tumour].mean() < hu[label == 1].mean() - 15
        near = np.zeros_like(tumour)
        for axis in range(3):
            for step in (-1, 1):
                near |= np.roll(tumour, step, axis)
        rim = near & ~tumour
        assert (label[rim] == 1).mean() > 0.6, "tumours must lie in the liver"
        assert not (arrays(index, replace(SMALL, tumours=(0, 0)))[1] == 2).any()


# ---------------------------------------------------------------------------------------------
# a body around given livers
# ---------------------------------------------------------------------------------------------


def write_mask(folder: Path, letters: str, shape=(72, 64, 21)) -> Path:
    """A lopsided blob in patient mm, bulky on the right, on a grid of the given orientation."""
    signs = np.array([-1 if letter in "LPI" else 1 for letter in letters])
    affine = np.diag([*(signs * (5.0, 5.5, 8.0)), 1])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2) + (17, -40, 900)
    x, y, z = np.moveaxis(
        nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0
    )
    right = ((x - 87) / 70) ** 2 + ((y + 40) / 85) ** 2 + ((z - 900) / 60) ** 2 < 1
    left = ((x - 17) / 80) ** 2 + ((y + 0) / 40) ** 2 + ((z - 920) / 30) ** 2 < 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"liver_{letters}.nii.gz"
    nib.save(nib.Nifti1Image((right | left).astype(np.uint8), affine), path)
    return path


@pytest.mark.parametrize("letters", ["RAS", "LAS", "LPS"])
def test_given_liver_keeps_every_voxel_and_its_grid(tmp_path: Path, letters: str) -> None:
    path = write_mask(tmp_path / "masks", letters)
    out = tmp_path / "raw"
    main(Config(destination=out, livers=path.parent, tumours=(2, 2)))
    mask, image, label = (
        nib.load(p) for p in (path, out / "imagesTr" / path.name, out / "labelsTr" / path.name)
    )
    for part in (image, label):
        assert part.shape == mask.shape
        assert np.array_equal(part.affine, mask.affine)
        for code in ("qform_code", "sform_code"):
            assert part.header[code] == mask.header[code]
    found = np.asanyarray(label.dataobj)
    assert np.array_equal(found > 0, np.asanyarray(mask.dataobj) > 0)
    assert set(np.unique(found)) == {0, 1, 2}
    image, label = nib.as_closest_canonical(image), nib.as_closest_canonical(label)
    hu, found = np.asanyarray(image.dataobj), np.asanyarray(label.dataobj)
    assert 80 < np.median(hu[found == 1]) < 130
    assert hu[found == 2].mean() < hu[found == 1].mean() - 15
    body, bone = np.argwhere(hu > -300).mean(0), np.argwhere(hu > 260).mean(0)
    assert np.argwhere(found).mean(0)[0] > body[0], "the liver must lie on the patient's right"
    assert bone[1] < body[1], "the spine must lie behind"


def test_given_liver_with_a_mirrored_header_gets_a_mirrored_body(tmp_path: Path) -> None:
    path = write_mask(tmp_path, "RAS")
    mask = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(mask.dataobj)[::-1], mask.affine), path)
    hu, label, _ = arrays(0, Config(livers=tmp_path))
    assert np.argwhere(label).mean(0)[0] < np.argwhere(hu > -300).mean(0)[0]


def test_real_liver_at_reduced_size_keeps_every_voxel(tmp_path: Path) -> None:
    if not REAL_MASK.exists():
        pytest.skip("needs the real liver masks in ../shared/data/lits_labels")
    (tmp_path / REAL_MASK.name).symlink_to(REAL_MASK)
    config = Config(livers=tmp_path, size=128)
    image, label = make_phantom(0, config)
    mask = make_phantoms.read_mask(tmp_path / REAL_MASK.name, 128)
    whole = nib.load(REAL_MASK)
    assert image.shape == (128, 128, whole.shape[2])
    assert np.array_equal(image.affine, mask.affine)
    assert np.array_equal(label.data > 0, mask.data > 0)
    corners = np.array([[-0.5] * 3, np.array(image.shape) - 0.5])  # the same box in the patient
    whole_corners = np.array([[-0.5] * 3, np.array(whole.shape) - 0.5])
    assert np.allclose(
        nib.affines.apply_affine(image.affine, corners),
        nib.affines.apply_affine(whole.affine, whole_corners),
        atol=1e-3,
    )


# ---------------------------------------------------------------------------------------------
# bad input: one message, exit code not 0, nothing half-written
# ---------------------------------------------------------------------------------------------


def refused(*words: object) -> str:
    done = call_script("data/make_phantoms.py", *words)
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_missing_folder_of_livers_is_named(tmp_path: Path) -> None:
    message = refused("--livers", tmp_path / "nowhere", "--destination", tmp_path / "raw")
    assert str(tmp_path / "nowhere") in message
    assert not (tmp_path / "raw").exists()


def test_a_destination_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused("--destination", tmp_path / "file" / "raw", "--size", 32)
    assert str(tmp_path / "file") in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(slices=(40, 20)), "--slices must be 8 <= fewest <= most, got 40 20"),
        (Config(tumours=(-1, 2)), "--tumours must be"),
        (Config(size=4), "--size must be at least 16"),
        (Config(cases=0), "--cases 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(
    tmp_path: Path, config: Config, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        main(replace(config, destination=tmp_path / "raw"))
    assert not (tmp_path / "raw").exists()


def test_a_broken_mask_is_named(tmp_path: Path) -> None:
    whole = write_mask(tmp_path / "masks", "RAS")
    whole.write_bytes(whole.read_bytes()[:-400])
    message = refused("--livers", whole.parent, "--destination", tmp_path / "raw")
    assert str(whole) in message
    assert not files(tmp_path / "raw")


def test_an_empty_mask_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "masks" / "liver_7.nii.gz"
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 20), np.uint8), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"liver_7\.nii\.gz.*no voxel above 0"):
        main(Config(destination=tmp_path / "raw", livers=path.parent))
    assert not files(tmp_path / "raw")
