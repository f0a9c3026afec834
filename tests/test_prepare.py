"""prepare.py: cases → split by patient, cut into sub-volumes, not a voxel of liver lost."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

import prepare
from prepare import Config
from utilities import InputError

SHEARED = np.array([[0.8, 0.1, 0.2, -90], [0, 0.9, 0.3, -120], [0, 0.05, 2.5, 40], [0, 0, 0, 1.0]])
LPS = np.diag([-0.8, -0.9, 2.5, 1.0])
COLUMNS_FIRST = np.array([[0, 0, 0.8, 0], [-0.9, 0, 0, 0], [0, -2.5, 0, 0], [0, 0, 0, 1.0]])


def write_case(
    root: Path, name: str, shape=(24, 20, 40), affine=LPS, dtype=np.int16, liver=(9, 24)
):
    """A box of soft tissue in air; liver with a tumour in its right half, in slices `liver` (RAS)."""
    random = np.random.default_rng(len(name) + shape[2])
    orientation, (x, y, z) = nib.io_orientation(affine), shape
    image, label = np.full((x, y, z), -1000.0), np.zeros((x, y, z), np.uint8)
    image[2:-2, 2:-2] = 40 + random.normal(0, 10, (x - 4, y - 4, z))
    label[x // 2 : -4, 5:-5, liver[0] : liver[1]] = 1
    label[x // 2 + 2 : x // 2 + 4, 8:10, liver[0] + 2 : liver[0] + 5] = 2
    back = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), orientation)
    for folder, array in (("imagesTr", image.round().astype(dtype)), ("labelsTr", label)):
        path = root / folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(nib.apply_orientation(array, back), affine), path)


def run(source: Path, **settings) -> dict:
    """Prepare `source` beside itself; returns dataset.json."""
    destination = source.parent / "prepared"
    prepare.main(Config(source=source, destination=destination, workers=1, **settings))
    return json.loads((destination / "dataset.json").read_text())


@pytest.fixture
def raw(tmp_path):
    for index, affine in enumerate([LPS, SHEARED, COLUMNS_FIRST, LPS, LPS, LPS]):
        write_case(tmp_path / "raw", f"case_{index}", affine=affine)
    return tmp_path / "raw"


def test_every_voxel_keeps_its_value_and_its_place_in_the_patient(raw):
    dataset = run(raw)
    for entry in dataset["subvolumes"]:
        case = next(c for c in dataset["cases"] if c["case"] == entry["case"])
        for key in ("image", "label"):
            piece = nib.load(raw.parent / "prepared" / entry[key])
            source = nib.load(case[key])
            assert nib.aff2axcodes(piece.affine) == ("R", "A", "S")
            assert piece.shape[2] == 16
            assert piece.get_data_dtype() == source.get_data_dtype()
            there = np.linalg.inv(source.affine) @ piece.affine  # sub-volume index → source index
            index = np.stack(np.meshgrid(*map(np.arange, piece.shape), indexing="ij")).reshape(
                3, -1
            )
            at = nib.affines.apply_affine(there, index.T)
            assert np.abs(at - at.round()).max() < 1e-3
            expected = np.asanyarray(source.dataobj)[tuple(at.round().astype(int).T)]
            assert np.array_equal(np.asanyarray(piece.dataobj).ravel(), expected)


def test_no_foreground_is_lost_and_the_last_subvolume_reaches_back(raw):
    dataset = run(raw)
    firsts = {c["case"]: [] for c in dataset["cases"]}
    for entry in dataset["subvolumes"]:
        firsts[entry["case"]].append(entry["first_slice"])
        assert entry["voxels_per_label"]["1"] > 0
    for case in dataset["cases"]:
        source = np.asanyarray(nib.load(case["label"]).dataobj)
        assert case["foreground_voxels"] == np.count_nonzero(source)
        assert case["covered_foreground_voxels"] == case["foreground_voxels"]
        ras_depth = case["slices"]
        assert all(first % 16 == 0 or first == ras_depth - 16 for first in firsts[case["case"]])
    assert firsts["case_0"] == [0, 16]  # 40 slices, liver in 9 … 23: the third one holds none


def test_liver_in_the_last_slices_is_covered_by_reaching_back(tmp_path):
    for index in range(3):
        write_case(tmp_path / "raw", f"case_{index}", shape=(24, 20, 37), liver=(30, 37))
    dataset = run(tmp_path / "raw")
    assert {e["first_slice"] for e in dataset["subvolumes"]} == {16, 21}
    assert all(c["covered_foreground_voxels"] == c["foreground_voxels"] for c in dataset["cases"])


def test_a_thin_scan_is_padded_with_air_and_says_so(tmp_path):
    for index in range(3):
        write_case(tmp_path / "raw", f"case_{index}", shape=(24, 20, 11), liver=(2, 9))
    dataset = run(tmp_path / "raw")
    assert [e["padded_slices"] for e in dataset["subvolumes"]] == [5, 5, 5]
    piece = nib.load(tmp_path / "prepared" / dataset["subvolumes"][0]["image"])
    assert piece.shape == (24, 20, 16)
    assert (np.asanyarray(piece.dataobj)[:, :, 11:] == -1024).all()


@pytest.mark.parametrize(
    ("patients", "sizes"),
    [(130, (91, 20, 19)), (131, (92, 20, 19)), (6, (4, 1, 1)), (4, (2, 1, 1)), (3, (1, 1, 1))],
)
def test_split_sizes(patients, sizes):
    split = list(prepare.split_patients([f"p{i}" for i in range(patients)], Config()).values())
    assert tuple(split.count(name) for name in prepare.SPLITS) == sizes


def test_two_patients_are_too_few_for_three_splits_and_enough_for_two():
    with pytest.raises(InputError, match="--test 0"):
        prepare.split_patients(["a", "b"], Config())
    assert sorted(prepare.split_patients(["a", "b"], Config(test=0)).values()) == [
        "training",
        "validation",
    ]


def test_monai_reads_dataset_json(raw):
    dataset = run(raw)
    path = raw.parent / "prepared" / "dataset.json"
    for name in prepare.SPLITS:
        items = load_decathlon_datalist(path, data_list_key=name)
        assert len(items) == sum(e["split"] == name for e in dataset["subvolumes"])
        assert all(
            Path(item["image"]).is_file() and Path(item["label"]).is_file() for item in items
        )
        assert {i["case"] for i in items} == {
            c["case"] for c in dataset["cases"] if c["split"] == name
        }


def test_keep_empty_keeps_the_asked_fraction(raw):
    without, everything = run(raw), run(raw, keep_empty=1.0)
    assert all(sum(e["voxels_per_label"][k] for k in "12") for e in without["subvolumes"])
    assert len(everything["subvolumes"]) == 3 * 6


def test_scaled_images_become_float32_in_hu(tmp_path):
    for index in range(3):
        write_case(tmp_path / "raw", f"case_{index}")
        path = tmp_path / "raw" / "imagesTr" / f"case_{index}.nii.gz"
        image = nib.Nifti1Image(np.asanyarray(nib.load(path).dataobj) + np.int16(1024), LPS)
        image.header.set_slope_inter(0.5, -512)
        image.to_filename(path)
        expected = nib.load(path).get_fdata()
    dataset = run(tmp_path / "raw")
    piece = nib.load(tmp_path / "prepared" / dataset["subvolumes"][0]["image"])
    assert piece.get_data_dtype() == np.float32
    assert (piece.dataobj.slope, piece.dataobj.inter) == (1, 0)
    assert np.abs(piece.get_fdata() - expected[::-1, ::-1, :16]).max() < 1e-3
