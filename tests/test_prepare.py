"""prepare.py: cases → split by patient, cut into sub-volumes, not a voxel of liver lost."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import run_script
from helpers import call_script, list_differences, ras_arrays, run, save, write_patients
from monai.data import load_decathlon_datalist

import prepare
from data.files import InputError
from data.volumes import Volume
from prepare import Config

SHEARED = np.array([[-5, 0.1, 0.3, 9], [0, -5, 0.8, 7], [0, 0.05, 5, 40], [0, 0, 0, 1.0]])
COLUMNS_FIRST = np.array([[0, 0, 5, 0], [-5, 0, 0, 0], [0, -5, 0, 0], [0, 0, 0, 1.0]])


@pytest.fixture
def raw(tmp_path):
    return write_patients(tmp_path / "raw")


# ---------------------------------------------------------------------------------------
# Cutting
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [False, True], ids=["whole slices", "cropped to the body"])
def test_every_voxel_keeps_its_value_and_its_place_in_the_patient(tmp_path, crop):
    affines = (SHEARED, COLUMNS_FIRST, None, np.diag([5.0, -5, -5, 1]))
    raw = write_patients(tmp_path / "raw", affines=affines)
    dataset = run(raw, accept=("mirrored",), crop_to_body=crop)
    cases = {case["case"]: case for case in dataset["cases"]}
    assert [case["orientation"] for case in cases.values()] == ["LPS", "PIR", "RAS", "RPI"]
    for entry in dataset["subvolumes"]:
        for key in ("image", "label"):
            piece = nib.load(tmp_path / "prepared" / entry[key])
            source = nib.load(cases[entry["case"]][key])
            assert nib.aff2axcodes(piece.affine) == ("R", "A", "S")
            assert piece.shape[2] == 16
            assert piece.get_data_dtype() == source.get_data_dtype()
            there = np.linalg.inv(source.affine) @ piece.affine  # sub-volume → source index
            index = np.stack(np.meshgrid(*map(np.arange, piece.shape), indexing="ij"))
            at = nib.affines.apply_affine(there, index.reshape(3, -1).T)
            assert np.abs(at - at.round()).max() < 1e-3
            expected = np.asanyarray(source.dataobj)[tuple(at.round().astype(int).T)]
            assert np.array_equal(np.asanyarray(piece.dataobj).ravel(), expected)


def test_no_foreground_is_lost_and_subvolumes_without_it_are_dropped(raw):
    dataset = run(raw)
    assert all(entry["voxels_per_label"]["1"] > 0 for entry in dataset["subvolumes"])
    for case in dataset["cases"]:
        label = np.asanyarray(nib.as_closest_canonical(nib.load(case["label"])).dataobj)
        assert case["foreground_voxels"] == np.count_nonzero(label)
        assert case["covered_foreground_voxels"] == case["foreground_voxels"]
        firsts = [e["first_slice"] for e in dataset["subvolumes"] if e["case"] == case["case"]]
        depth = label.shape[2]
        wanted = {min(first, depth - 16) for first in range(0, depth, 16)}
        assert set(firsts) == {f for f in wanted if label[:, :, f : f + 16].any()}


def test_cropped_to_the_body_no_foreground_is_lost(raw):
    """Slices lose air and table; what is outlined beside the body stays inside."""
    path = raw / "labelsTr" / "case_1.nii.gz"
    image = nib.load(path)
    label = np.asanyarray(image.dataobj).copy()
    inside = np.argwhere(label)[0]
    label[0, 0, inside[2]] = 1  # a slip of the pen, in a corner
    nib.save(nib.Nifti1Image(label, image.affine), path)
    dataset = run(raw, crop_to_body=True)
    sizes = {entry["case"]: entry["shape"][:2] for entry in dataset["subvolumes"]}
    assert all(max(sizes[case]) < 48 for case in ("case_0", "case_2"))
    assert sizes["case_1"] > sizes["case_0"]
    for case in dataset["cases"]:
        assert case["covered_foreground_voxels"] == case["foreground_voxels"]
        pieces = [e for e in dataset["subvolumes"] if e["case"] == case["case"]]
        held = {v for e in pieces for v in held_places(raw.parent / "prepared" / e["label"])}
        source = nib.load(case["label"])
        assert held == places(source, np.asanyarray(source.dataobj))


def places(image, array) -> set[tuple[int, ...]]:
    """Where a label map is not 0, in tenths of patient mm."""
    at = nib.affines.apply_affine(image.affine, np.argwhere(array))
    return set(map(tuple, (at * 10).round().astype(int)))


def held_places(path) -> set[tuple[int, ...]]:
    image = nib.load(path)
    return places(image, np.asanyarray(image.dataobj))


@pytest.mark.parametrize("settings", [{"modality": "MR"}, {"subvolume_depth": 0}])
def test_what_has_no_body_to_crop_to_is_refused(raw, settings):
    with pytest.raises(InputError, match=r"--crop-to-body is of sub-volumes of CT"):
        run(raw, crop_to_body=True, **settings)


def test_the_last_subvolume_reaches_back_over_its_neighbour(tmp_path):
    top = int(np.flatnonzero(ras_arrays(0)[1].any(axis=(0, 1)))[-1])
    dataset = run(write_patients(tmp_path / "raw", slices=slice(top - 20, top + 1)))
    case = dataset["cases"][0]
    firsts = [e["first_slice"] for e in dataset["subvolumes"] if e["case"] == case["case"]]
    assert (case["slices"], firsts) == (21, [0, 5])
    assert all(c["covered_foreground_voxels"] == c["foreground_voxels"] for c in dataset["cases"])


def test_a_thin_scan_is_padded_with_air_and_says_so(tmp_path):
    middle = int(ras_arrays(0)[1].sum(axis=(0, 1)).argmax())
    dataset = run(write_patients(tmp_path / "raw", slices=slice(middle - 5, middle + 6)))
    assert [e["padded_slices"] for e in dataset["subvolumes"]] == [5, 5, 5]
    piece = nib.load(tmp_path / "prepared" / dataset["subvolumes"][0]["image"])
    assert piece.shape == (48, 48, 16)
    assert (np.asanyarray(piece.dataobj)[:, :, 11:] == -1024).all()
    assert all("11 slices" in " ".join(case["warnings"]) for case in dataset["cases"])


def test_keep_empty_keeps_the_asked_fraction(raw):
    everything = run(raw, keep_empty=1.0)
    assert len(everything["subvolumes"]) == sum(-(-c["slices"] // 16) for c in everything["cases"])


def test_foreground_can_be_the_tumour_alone(raw):
    dataset = run(raw, foreground=("tumour",))
    for case in dataset["cases"]:
        label = np.asanyarray(nib.load(case["label"]).dataobj)
        assert case["foreground_voxels"] == np.count_nonzero(label == 2)
    assert all(entry["voxels_per_label"]["2"] > 0 for entry in dataset["subvolumes"])


def test_scaled_images_become_float32_in_hu(raw):
    for path in (raw / "imagesTr").iterdir():
        stored = nib.load(path)
        image = nib.Nifti1Image(np.asanyarray(stored.dataobj) * np.int16(2), stored.affine)
        image.header.set_slope_inter(0.5, -1.5)
        image.to_filename(path)
    dataset = run(raw)
    piece = nib.load(raw.parent / "prepared" / dataset["subvolumes"][0]["image"])
    assert piece.get_data_dtype() == np.float32
    assert (piece.dataobj.slope, piece.dataobj.inter) == (1, 0)
    first = dataset["subvolumes"][0]["first_slice"]
    expected = ras_arrays(0)[0][:, :, first : first + 16] - 1.5
    assert np.array_equal(np.asanyarray(piece.dataobj), expected)


def test_monai_reads_dataset_json(raw):
    dataset = run(raw)
    path = raw.parent / "prepared" / "dataset.json"
    for name in prepare.SPLITS:
        items = load_decathlon_datalist(path, data_list_key=name)
        mine = {case["case"] for case in dataset["cases"] if case["split"] == name}
        assert {item["case"] for item in items} == mine
        assert len(items) == sum(e["split"] == name for e in dataset["subvolumes"])
        assert all(Path(item[k]).is_file() for item in items for k in ("image", "label"))


# ---------------------------------------------------------------------------------------
# Splitting
# ---------------------------------------------------------------------------------------


def patients(number: int) -> list[dict]:
    return [{"case": f"case_{i}", "patient": f"p{i}"} for i in range(number)]


@pytest.mark.parametrize(
    ("number", "sizes"),
    [(130, (91, 20, 19)), (131, (92, 20, 19)), (6, (4, 1, 1)), (4, (2, 1, 1)), (3, (1, 1, 1))],
)
def test_split_sizes(number, sizes):
    split = list(prepare.split_patients(patients(number), Config()).values())
    assert tuple(split.count(name) for name in prepare.SPLITS) == sizes


def test_two_patients_are_too_few_for_three_splits_and_enough_for_two():
    with pytest.raises(InputError, match="--test 0"):
        prepare.split_patients(patients(2), Config())
    split = prepare.split_patients(patients(2), Config(training=0.5, validation=0.5, test=0))
    assert sorted(split.values()) == ["training", "validation"]


def test_folds_divide_the_patients_and_leave_no_test_split():
    config = Config(folds=5)
    parts = prepare.divide_patients(patients(13), config)
    assert set(parts) == {f"p{i}" for i in range(13)}
    assert sorted(Counter(parts.values()).values()) == [2, 2, 3, 3, 3]
    split = prepare.split_patients(patients(13), config)  # what other programs read is fold 0
    assert split == {name: "training" if part else "validation" for name, part in parts.items()}
    with pytest.raises(InputError, match="--folds 14: must be 2 to 13"):
        prepare.split_patients(patients(13), Config(folds=14))
    assert prepare.divide_patients(patients(13), Config()) == {}


def test_scans_of_one_patient_stay_together(raw):
    table = raw.parent / "patients.csv"
    table.write_text("case,patient\ncase_0,anna\ncase_1,bert\ncase_2,anna\n")
    halves = {"training": 0.5, "validation": 0.5, "test": 0.0}
    dataset = run(raw, patients=table, **halves)
    split = {case["case"]: case["split"] for case in dataset["cases"]}
    assert split["case_0"] == split["case_2"] != split["case_1"]
    table.write_text("case,patient\ncase_0,anna\n")
    with pytest.raises(InputError, match="no row for case_1, case_2"):
        run(raw, patients=table)


def test_patients_are_read_from_case_names():
    cases = [prepare.Case(name, name, None, None) for name in ("a_scan1", "a_scan2", "b_scan1")]
    prepare.name_patients(cases, Config(patient_pattern=r"(\w)_scan"))
    assert [case.patient for case in cases] == ["a", "a", "b"]
    with pytest.raises(InputError, match="finds no group in a_scan1"):
        prepare.name_patients(cases, Config(patient_pattern=r"x(\d)"))


def test_a_given_split_is_kept_and_must_not_leak(raw):
    given = raw.parent / "split.json"
    lists = {"training": ["case_1"], "validation": ["case_2"], "test": ["case_0"]}
    given.write_text(json.dumps(lists))
    split = {case["case"]: case["split"] for case in run(raw, split=given)["cases"]}
    assert split == {"case_1": "training", "case_2": "validation", "case_0": "test"}
    table = raw.parent / "patients.csv"
    table.write_text("case,patient\ncase_0,anna\ncase_1,bert\ncase_2,anna\n")
    with pytest.raises(InputError, match="anna into two splits"):
        run(raw, split=given, patients=table)
    given.write_text(json.dumps({"training": ["case_1", "case_2"], "test": ["case_1"]}))
    with pytest.raises(InputError, match="two splits"):
        run(raw, split=given)
    given.write_text(json.dumps({"training": ["case_1", "case_2"]}))
    with pytest.raises(InputError, match="does not name case_0"):
        run(raw, split=given)


# ---------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------


def test_lits_as_downloaded(tmp_path, capsys):
    for index, folder in enumerate(("Training Batch 1", "Training Batch 2", "Training Batch 2")):
        scan, label = ras_arrays(index)
        affine = np.diag([-5.0, -5, 5, 1])
        save(scan, affine, tmp_path / "LITS" / folder / f"volume-{index + 9}.nii")
        save(label, affine, tmp_path / "LITS" / "labels" / f"segmentation-{index + 9}.nii.gz")
    dataset = run(tmp_path / "LITS")
    names = [case["case"] for case in dataset["cases"]]
    assert names == ["volume-9", "volume-10", "volume-11"]
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'LITS'}: 3 scans")


def test_decathlon_as_downloaded(raw, capsys):
    shutil.copytree(raw / "imagesTr", raw / "imagesTs")
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder / "._case_0.nii.gz").write_bytes(b"\0\5\26\7 macOS")
    labels = {"0": "background", "1": "liver", "2": "cancer"}
    (raw / "dataset.json").write_text(json.dumps({"labels": labels, "numTraining": 4}))
    shutil.move(raw, raw.parent / "download" / "Task03_Liver")
    dataset = run(raw.parent / "download")
    assert dataset["labels"] == {"background": 0, "liver": 1, "cancer": 2}
    assert len(dataset["cases"]) == 3
    told = capsys.readouterr().out
    assert "not used: 3 other volumes" in told  # imagesTs
    assert "dataset.json announces 4 cases" in told
    with pytest.raises(InputError, match="--foreground spleen"):
        run(raw.parent / "download", foreground=("spleen",))


def test_one_folder_per_patient_with_other_formats(tmp_path):
    import SimpleITK

    affine = np.diag([-5.0, -5, 5, 1])
    for index, suffix in enumerate((".mha", ".nrrd", ".hdr")):
        for name, array in zip(("ct", "ct_segmentation"), ras_arrays(index), strict=True):
            path = tmp_path / "raw" / f"patient_{index}" / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = array[::-1, ::-1]  # LPS, as ITK sees patients
            if suffix == ".hdr":
                nib.save(nib.Nifti1Pair(stored, affine), path)
                continue
            itk = SimpleITK.GetImageFromArray(np.ascontiguousarray(stored.T))
            itk.SetSpacing((5, 5, 5))
            SimpleITK.WriteImage(itk, str(path))
    dataset = run(tmp_path / "raw")
    assert [case["case"] for case in dataset["cases"]] == ["patient_0", "patient_1", "patient_2"]
    for index, case in enumerate(dataset["cases"]):
        assert (case["orientation"], case["spacing_mm"]) == ("LPS", [5, 5, 5])
        entry = next(e for e in dataset["subvolumes"] if e["case"] == case["case"])
        piece = np.asanyarray(nib.load(tmp_path / "prepared" / entry["image"]).dataobj)
        first = entry["first_slice"]
        assert np.array_equal(piece, ras_arrays(index)[0][:, :, first : first + 16])


def test_an_empty_folder_names_what_is_expected(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        result = call_script("prepare.py", folder, "--destination", tmp_path / "prepared")
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert str(folder) in result.stderr
    assert not (tmp_path / "prepared").exists()


# ---------------------------------------------------------------------------------------
# Crash safety
# ---------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
import prepare
import prepare as processes

class Bar(processes.tqdm):
    def __init__(self, *args, **options):
        self.stage = options["desc"]
        super().__init__(*args, **options)

    def update(self, n=1):  # the first case is done, the other worker is at the next one
        if self.stage == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().update(n)

processes.tqdm = Bar
source, destination = map(Path, sys.argv[2:])
prepare.main(prepare.Config(source=source, destination=destination, workers=2))
"""


def test_processes_and_killing_do_not_change_a_byte(tmp_path):
    raw = write_patients(tmp_path / "raw", affines=(None,) * 4)
    run(raw, destination=tmp_path / "whole", pictures=True)
    killed = tmp_path / "killed"
    for stage in ("checking", "cutting"):
        result = run_script("-c", KILLED, stage, raw, killed)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert (killed / "check").is_dir() and not (killed / "dataset.json").exists()
    assert (killed / "subvolumes").is_dir()
    run(raw, destination=killed, pictures=True)
    assert list_differences(tmp_path / "whole", killed) == []


def test_finished_cases_are_not_done_again_unless_their_content_changed(raw):
    run(raw)
    prepared = raw.parent / "prepared"
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.nii*")}
    path = raw / "imagesTr" / "case_1.nii.gz"
    os.utime(path)  # a new time is no new content
    run(raw)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*.nii*")} == before
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) + np.int16(1), image.affine), path)
    run(raw)
    after = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.nii*")}
    assert {path.parent.name for path in after if after[path] != before[path]} == {"case_1"}
    shutil.rmtree(prepared / "subvolumes" / "case_2")
    dataset = run(raw)
    assert all((prepared / entry["image"]).is_file() for entry in dataset["subvolumes"])


def test_a_full_disk_stops_with_a_message_and_keeps_finished_cases(raw, monkeypatch):
    real, calls = Volume.write, []

    def full(volume, path, slope=1.0):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        return real(volume, path, slope)

    monkeypatch.setattr(Volume, "write", full)
    with pytest.raises(InputError, match=r"No space left on device.*free space"):
        run(raw)
    prepared = raw.parent / "prepared"
    assert not (prepared / "dataset.json").exists()
    assert not list(prepared.rglob("*partial*"))
    kept = list((prepared / "subvolumes").iterdir())
    assert kept and all((folder / "case.json").is_file() for folder in kept)
    monkeypatch.undo()
    run(raw)


def test_a_destination_that_cannot_be_written_is_named(raw, tmp_path):
    (tmp_path / "file").write_text("")
    result = call_script("prepare.py", raw, "--destination", tmp_path / "file", "--workers", 1)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert str(tmp_path / "file") in result.stderr
