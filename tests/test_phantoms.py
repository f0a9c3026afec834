"""What a user relies on in the synthetic CTs that everything else is tried on."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from make_phantoms import Config, main

SMALL = Config(size=64, slices=(28, 36))


def test_a_case_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    main(replace(SMALL, cases=2, destination=tmp_path / "a"))
    main(replace(SMALL, cases=1, first=1, destination=tmp_path / "b"))
    main(replace(SMALL, cases=1, first=1, seed=1, destination=tmp_path / "c"))
    for folder in ("imagesTr", "labelsTr"):
        name = Path(folder, "phantom_001.nii.gz")
        a, b, c = ((tmp_path / letter / name).read_bytes() for letter in "abc")
        assert a == b != c


def test_dataset_json_lists_what_is_on_disk_and_batches_add_up(tmp_path: Path) -> None:
    main(replace(SMALL, cases=1, destination=tmp_path))
    main(replace(SMALL, cases=2, first=1, destination=tmp_path))
    record = json.loads((tmp_path / "dataset.json").read_text())
    assert record["labels"] == {"0": "background", "1": "liver", "2": "tumour"}
    assert record["numTraining"] == len(record["training"]) == 3
    for pair in record["training"]:
        image, label = nib.load(tmp_path / pair["image"]), nib.load(tmp_path / pair["label"])
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
