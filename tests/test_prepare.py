"""Tests of prepare.py: split by patient, sub-volumes that lose no voxel of liver, crash safety."""

import signal
import zlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import run_script
from helpers import list_differences, ras_arrays, read_voxels, run, write_patients
from monai.data import load_decathlon_datalist

import prepare
from data.files import InputError
from data.volumes import Volume
from prepare import Config

SHEARED = np.array([[-5, 0.1, 0.3, 9], [0, -5, 0.8, 7], [0, 0.05, 5, 40], [0, 0, 0, 1.0]])
COLUMNS_FIRST = np.array([[0, 0, 5, 0], [-5, 0, 0, 0], [0, -5, 0, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("crop", [False, True], ids=["whole slices", "cropped to the body"])
def test_every_voxel_keeps_its_value_and_its_place_in_the_patient(tmp_path, crop):
    affines = (SHEARED, COLUMNS_FIRST, None, np.diag([5.0, -5, -5, 1]))
    raw = write_patients(tmp_path / "raw", affines=affines)
    dataset = run(raw, accept=("outline",), crop_to_body=crop)
    cases = {case["case"]: case for case in dataset["cases"]}
    assert [case["orientation"] for case in cases.values()] == ["LPS", "PIR", "RAS", "RPI"]
    for entry in dataset["subvolumes"]:
        for key in ("image", "label"):
            piece = nib.load(tmp_path / "prepared" / entry[key])
            source = nib.load(cases[entry["case"]][key])
            assert (nib.aff2axcodes(piece.affine), piece.shape[2]) == (("R", "A", "S"), 16)
            assert piece.get_data_dtype() == source.get_data_dtype()
            there = np.linalg.inv(source.affine) @ piece.affine  # sub-volume → source index
            index = np.stack(np.meshgrid(*map(np.arange, piece.shape), indexing="ij"))
            at = nib.affines.apply_affine(there, index.reshape(3, -1).T)
            assert np.abs(at - at.round()).max() < 1e-3
            expected = np.asanyarray(source.dataobj)[tuple(at.round().astype(int).T)]
            assert np.array_equal(np.asanyarray(piece.dataobj).ravel(), expected)


@pytest.mark.parametrize(
    ("names", "values", "keep"),
    [(("liver", "tumour"), (1, 2), 0.0), (("tumour",), (2,), 0.0), (("tumour",), (2,), 1.0)],
)
def test_no_foreground_is_lost_and_subvolumes_without_it_are_dropped(names, values, keep, raw):
    dataset = run(raw, foreground=names, keep_empty=keep)
    for case in dataset["cases"]:
        label = nib.as_closest_canonical(nib.load(case["label"]))
        inside = np.isin(np.asanyarray(label.dataobj), values)
        assert case["covered_foreground_voxels"] == case["foreground_voxels"] == inside.sum()
        firsts = [e["first_slice"] for e in dataset["subvolumes"] if e["case"] == case["case"]]
        depth = inside.shape[2]
        wanted = [min(first, depth - 16) for first in range(0, depth, 16)]
        assert firsts == [z for z in wanted if keep or inside[:, :, z : z + 16].any()]


def test_cropped_to_the_body_no_foreground_is_lost(raw):
    """Slices lose air and table; what is outlined beside the body stays inside."""
    path = raw / "labelsTr" / "case_1.nii.gz"
    image = nib.load(path)
    label = np.asanyarray(image.dataobj).copy()
    label[0, 0, np.argwhere(label)[0, 2]] = 1  # a slip of the pen, in a corner
    nib.save(nib.Nifti1Image(label, image.affine), path)
    dataset = run(raw, crop_to_body=True)
    sizes = {entry["case"]: entry["shape"][:2] for entry in dataset["subvolumes"]}
    assert all(max(sizes[case]) < 48 for case in ("case_0", "case_2"))
    assert sizes["case_1"] > sizes["case_0"]
    for case in dataset["cases"]:
        inside, held = np.count_nonzero(read_voxels(case["label"])), {}
        assert case["covered_foreground_voxels"] == case["foreground_voxels"] == inside
        for entry in (e for e in dataset["subvolumes"] if e["case"] == case["case"]):
            piece = read_voxels(raw.parent / "prepared" / entry["label"]) > 0
            held |= dict(enumerate(piece.sum(axis=(0, 1)), start=entry["first_slice"]))
        assert sum(held.values()) == inside, "in the files, too"


def test_the_last_subvolume_reaches_back_and_a_thin_scan_is_padded_with_air(tmp_path):
    top = int(np.flatnonzero(ras_arrays(0)[1].any(axis=(0, 1)))[-1])
    dataset = run(write_patients(tmp_path / "raw", slices=slice(top - 20, top + 1)))
    firsts = [e["first_slice"] for e in dataset["subvolumes"] if e["case"] == "case_0"]
    assert (dataset["cases"][0]["slices"], firsts) == (21, [0, 5])
    middle = int(ras_arrays(0)[1].sum(axis=(0, 1)).argmax())
    thin = write_patients(tmp_path / "thin/raw", slices=slice(middle - 5, middle + 6))
    dataset = run(thin)
    assert [e["padded_slices"] for e in dataset["subvolumes"]] == [5, 5, 5]
    piece = read_voxels(tmp_path / "thin/prepared" / dataset["subvolumes"][0]["image"])
    assert piece.shape == (48, 48, 16) and (piece[:, :, 11:] == -1024).all()
    assert all("11 slices" in " ".join(case["warnings"]) for case in dataset["cases"])


def test_scaled_images_become_float32_in_hu(raw):
    for path in (raw / "imagesTr").iterdir():
        stored = nib.load(path)
        image = nib.Nifti1Image(np.asanyarray(stored.dataobj) * np.int16(2), stored.affine)
        image.header.set_slope_inter(0.5, -1.5)
        image.to_filename(path)
    dataset = run(raw)
    piece = nib.load(raw.parent / "prepared" / dataset["subvolumes"][0]["image"])
    assert (piece.get_data_dtype(), piece.dataobj.slope) == (np.float32, 1)
    first = dataset["subvolumes"][0]["first_slice"]
    expected = ras_arrays(0)[0][:, :, first : first + 16] - 1.5
    assert np.array_equal(np.asanyarray(piece.dataobj), expected)


def test_monai_reads_dataset_json(raw):
    dataset = run(raw)
    for name in prepare.splits.SPLITS:
        items = load_decathlon_datalist(raw.parent / "prepared/dataset.json", data_list_key=name)
        mine = {case["case"] for case in dataset["cases"] if case["split"] == name}
        assert {item["case"] for item in items} == mine
        assert len(items) == sum(e["split"] == name for e in dataset["subvolumes"])
        assert all(Path(item[k]).is_file() for item in items for k in ("image", "label"))


def patients(number: int) -> list[dict]:
    return [{"case": f"case_{i}", "patient": f"p{i}"} for i in range(number)]


def test_split_sizes():
    for number, sizes in ((131, (92, 20, 19)), (6, (4, 1, 1)), (4, (2, 1, 1)), (3, (1, 1, 1))):
        split = list(prepare.splits.split_patients(patients(number), Config()).values())
        assert tuple(split.count(name) for name in prepare.splits.SPLITS) == sizes
    one, other = (prepare.splits.split_patients(patients(13), Config(seed=s)) for s in (0, 1))
    assert one != other


def test_folds_divide_the_patients_and_leave_no_test_split():
    config = Config(folds=5)
    parts = prepare.splits.divide_patients(patients(13), config)
    assert sorted(Counter(parts.values()).values()) == [2, 2, 3, 3, 3]
    split = prepare.splits.split_patients(patients(13), config)
    assert split == {name: "training" if part else "validation" for name, part in parts.items()}
    for number, settings, text in ((13, {"folds": 14}, "--folds 14: must"), (2, {}, "--test 0")):
        with pytest.raises(InputError, match=text):
            prepare.splits.split_patients(patients(number), Config(**settings))


def test_scans_of_one_patient_stay_together(raw):
    table = raw.parent / "patients.csv"
    table.write_text("case,patient\ncase_0,anna\ncase_1,bert\ncase_2,anna\n")
    cases = run(raw, patients=table, training=0.5, validation=0.5, test=0.0)["cases"]
    split = {case["case"]: case["split"] for case in cases}
    assert split["case_0"] == split["case_2"] != split["case_1"]
    table.write_text("case,patient\ncase_0,anna\n")
    with pytest.raises(InputError, match="no row for case_1, case_2"):
        run(raw, patients=table)


def test_a_given_split_is_kept_and_must_not_leak(raw):
    given, table = raw.parent / "split.json", raw.parent / "patients.csv"
    given.write_text('{"training": ["case_1"], "validation": ["case_2"], "test": ["case_0"]}')
    split = {case["case"]: case["split"] for case in run(raw, split=given)["cases"]}
    assert split == {"case_1": "training", "case_2": "validation", "case_0": "test"}
    table.write_text("case,patient\ncase_0,anna\ncase_1,bert\ncase_2,anna\n")
    with pytest.raises(InputError, match="anna into two splits"):
        run(raw, split=given, patients=table)
    for content, text in (
        ('{"training": ["case_1", "case_2"]}', "does not name case_0"),
        ('{"training": ["case_0", "case_1"], "test": ["case_2"]}', "no patient into validation"),
    ):
        given.write_text(content)
        with pytest.raises(InputError, match=text):
            run(raw, split=given)


KILLED = """
import os, signal, sys
from pathlib import Path
import prepare

def show(results, desc, **_):  # the first case is done, the other worker is at the next one
    for result in results:
        if desc == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield result

prepare.show_progress = show
source, destination = map(Path, sys.argv[2:])
prepare.main(prepare.Config(source=source, destination=destination, workers=2))
"""


def test_processes_and_killing_do_not_change_a_byte(tmp_path):
    raw = write_patients(tmp_path / "raw")
    run(raw, destination=tmp_path / "whole", pictures=True)
    killed = tmp_path / "killed"
    for stage, folder in (("checking", "check"), ("cutting", "subvolumes")):
        result = run_script("-c", KILLED, stage, raw, killed)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert (killed / folder).is_dir() and not (killed / "dataset.json").exists()
    run(raw, destination=killed, pictures=True)
    assert list_differences(tmp_path / "whole", killed) == []


def test_finished_cases_are_not_done_again_unless_their_file_changed(raw):
    prepared = raw.parent / "prepared"
    entry = run(raw)["subvolumes"][0]
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.nii*")}
    run(raw)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    path = raw / "imagesTr" / "case_1.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) + np.int16(1), image.affine), path)
    run(raw)
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert {path.parent.name for path in changed} == {"case_1"}
    for harm in (lambda file: file.unlink(), lambda file: file.write_bytes(b"")):
        harm(prepared / entry["label"])
        run(raw)
        content = (prepared / entry["label"]).read_bytes()
        assert len(content) == entry["label_bytes"]
        assert zlib.crc32(content) == int(entry["label_crc32"], 16)
    for name in ("check/case_1.json", "subvolumes/case_1/case.json"):
        (prepared / name).write_text('{"mark": 1')
    assert len(run(raw)["cases"]) == 3


def test_a_full_disk_stops_with_a_message_and_keeps_finished_cases(raw, monkeypatch):
    real, calls = Volume.write, []

    def full(volume, path, slope=1.0):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        return real(volume, path, slope)

    run(raw, compress=True)
    monkeypatch.setattr(Volume, "write", full)
    with pytest.raises(InputError, match=r"No space left on device.*free space"):
        run(raw)
    assert not (raw.parent / "prepared/dataset.json").exists()
    assert list(raw.parent.glob("prepared/subvolumes/case_0/image_*.nii"))
    monkeypatch.undo()
    run(raw)
