"""Any data set as it lies on disk: the right scan with the right label map, or told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pydicom
import pytest
from PIL import Image

import apply_model
import prepare
from data.datasets import (
    Case,
    DataSet,
    describe_data_set,
    find_pairs,
    find_scans,
    name_scans,
    pair_by_name,
    pair_truths,
)
from data.dicom import write_series
from data.files import InputError
from data.labels import describe_truths
from data.scans import read_label_map, read_scan, stamp_inputs
from data.seg import rename_segments, write_seg
from data.splits import guess_pattern, name_patients, read_patients, read_split
from data.volumes import Volume

SHAPE = (12, 10, 6)
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2, 0, 20], [0, 0, 3, -7], [0, 0, 0, 1]])  # LPS


def scan_of(patient: int) -> np.ndarray:
    return np.random.default_rng(patient).integers(-900, 900, SHAPE).astype(np.int16)


def label_of(patient: int) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2 : 6 + patient % 5, 2:8, 1:5] = 1
    label[3, 3 : 4 + patient % 5, 2:4] = 2
    return label


def save(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = path.with_name(path.name.replace("NII.GZ", "nii.gz"))  # our writer writes no other
    Volume(array, AFFINE).write(small)
    return small.rename(path)


def save_series(array: np.ndarray, folder: Path, affine: np.ndarray = AFFINE) -> list[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_series(Volume(array.astype(np.int16), affine), folder)


def save_pair(root: Path, image: str, label: str, patient: int = 1) -> None:
    save(scan_of(patient), root / image)
    save(label_of(patient), root / label)


def paths(root: Path, *names: str) -> list[Path]:
    return [root / name for name in names]


def read_ras(data: DataSet, case: Case) -> tuple[np.ndarray, np.ndarray]:
    scan = read_scan(case.image)
    label = read_label_map(case.label, scan, data.declared, ignore=data.ignore)
    return scan.ras.data, label.ras.data


def check(data: DataSet, expected: dict[str, int]) -> None:
    assert [case.name for case in data.cases] == list(expected)  # in natural order
    for case, patient in zip(data.cases, expected.values(), strict=True):
        assert case.faults == ()
        scan, label = read_ras(data, case)
        assert np.array_equal(scan, Volume(scan_of(patient), AFFINE).ras.data)
        assert np.array_equal(label, Volume(label_of(patient), AFFINE).ras.data)


# (scan, label map, name of the case) with the number of the patient in it
PAIRS = {
    "decathlon": ("imagesTr/liver_{}.nii.gz", "labelsTr/liver_{}.nii.gz", "liver_{}"),
    "nnU-Net": ("imagesTr/liver_{}_0000.nii.gz", "labelsTr/liver_{}.nii.gz", "liver_{}"),
    "lits": ("Batch {}/volume-{}.nii", "segmentations/segmentation-{}.nii.gz", "volume-{}"),
    "numbers only": ("TrainVolumes/{}.nii.gz", "TrainSegmentation/{}.nii.gz", "{}"),
    "btcv": ("img/img000{}.nii.gz", "label/label000{}.nii.gz", "img000{}"),
    "patient folders": ("patient_{}/ct.nii.gz", "patient_{}/ct_segmentation.nii.gz", "patient_{}"),
    "named after the organ": ("p{}/CT.nii.gz", "p{}/liver_mask.nii.gz", "p{}"),
    "no word at the scan": ("case-{}.nii.gz", "case-{}_label.nii.gz", "case-{}"),
    "glued": ("case{}.nii.gz", "case{}mask.nii.gz", "case{}"),
    "only one of each": ("p{}/portal.nii.gz", "p{}/liver_seg.nii.gz", "p{}_portal"),
    "phase folders": ("p{}/portal/ct.nii.gz", "p{}/portal/label.nii.gz", "p{}_portal"),
    "capitals": ("Images/P{}.NII.GZ", "Labels/P{}.nii.gz", "P{}"),
    "a set called seg": ("seg_set/p{}/ct.nii.gz", "seg_set/p{}/label.nii.gz", "p{}"),
    "ct in both": ("images/ct_{}.nii.gz", "labels/ct_{}.nii.gz", "ct_{}"),
    "spaces": ("My scans/pat {}.nii.gz", "My masks/pat-{}.nii.gz", "pat {}"),
    "ground truth": ("volumes/p{}.nii.gz", "Ground Truth/p{}.nii.gz", "p{}"),
    "CT, GT, mixed packing": ("CT/{}.nii", "GT/{}.nii.gz", "{}"),
    "suffixes": ("all/p{}_CT.nii.gz", "all/p{}_LiverMask.nii", "p{}"),
    "kits": ("case_0000{}/imaging.nii.gz", "case_0000{}/segmentation.nii.gz", "case_0000{}"),
    "the organ alone": ("p{}/scan.nii.gz", "p{}/liver.nii.gz", "p{}"),
    "in German": ("CT/p{}.nii.gz", "Masken/p{}.nii.gz", "p{}"),
}


@pytest.mark.parametrize("layout", PAIRS)
def test_files_are_paired_by_what_remains_of_their_paths(layout, tmp_path):
    names = {}
    for patient in (1, 2, 10):
        *files, name = (text.replace("{}", str(patient)) for text in PAIRS[layout])
        save_pair(tmp_path, *files, patient)
        names[name] = patient
    data = find_pairs(tmp_path)
    check(data, names)
    assert not data.unused


# scan>label map, or scan>name=mask+name=mask; a word without > is a file that is not used
TREES = {
    "equal names in different folders": "A/p/ct>A/p/label B/p/ct>B/p/label",
    "a label map that only another set has": "a/img/x> b/img/x>b/label/x",
    "no partner": "imagesTr/a> imagesTr/b>labelsTr/b >labelsTr/c",
    "neighbours of other names": "B/p1_scan> >B/p3_label A/p2_scan>A/p2_label",
    "scans called after the organ": "p/liver>p/liver_seg q/liver_1>q/liver_1_label "
    "q/liver>q/liver_label q/ct_3>q/ct_3_label",
    "test cases and other channels": "imagesTr/c_0000>labelsTr/c imagesTr/c_0001 imagesTs/c_0000 "
    "test/test-volume-0",
    "channels in one set, numbers from 0000 in another": "a/img/x_0000>a/gt/x a/img/x_0001 "
    "b/img/c_0000>b/gt/c_0000 b/img/c_0001>b/gt/c_0001",
    "a channel's own label map": "img/x_0000>label/x img/x_0001>label/x_0001 img/x_0002",
    "numbers that end like channels": "img/g_0000_0000>label/g_0000 img/g_0001_0000>label/g_0001",
    "a label map is missing of scans with numbers": "img/c_0000>label/c_0000 img/c_0001>",
    "MONAI Label": "x>labels/final/x labels/original/x y>labels/original/y",
    "draft": "p/ct>p/liver_mask p/liver_draft_mask",
    "final in other words": "imagesTr/x_0000>labelsTr_final/x labelsTr/x p/ct>p/Approved/label "
    "p/Draft/label q/ct>q/label_edited q/label",
    "final in the names of scans too": "p_ct>p_label p_final_ct>p_final_label",
    "a whole label map beside masks": "p/ct>p/label p/segs/liver p/segs/hcc",
    "numbers": "p/image>liver=p/liver+livertumor1=p/livertumor1+livertumor2=p/livertumor2",
    "a label word in some names": "images/a>labels/a_label images/b>labels/b",
}


@pytest.mark.parametrize("tree", TREES)
def test_trees_of_files(tree, tmp_path):
    for name in filter(None, re.split(r"[ >+]|\w+=", TREES[tree])):
        save(label_of(1), tmp_path / f"{name}.nii.gz")
    (tmp_path / "._hidden.nii.gz").write_bytes(b"macOS")
    data = find_pairs(tmp_path)

    def shorten(path: Path | tuple | None) -> str:
        if isinstance(path, tuple):
            return "+".join(f"{name}={shorten(mask)}" for name, mask in path)
        return path.relative_to(tmp_path).as_posix().removesuffix(".nii.gz") if path else ""

    assert all(case.faults == () for case in data.cases)
    found = {f"{shorten(case.image)}>{shorten(case.label)}" for case in data.cases}
    assert found == {word for word in TREES[tree].split() if ">" in word}
    told = {shorten(path) for path in data.unused}
    assert told >= {word for word in TREES[tree].split() if ">" not in word}  # nothing vanishes
    assert len({case.name for case in data.cases}) == len(data.cases)


AMBIGUOUS = [
    "p/ct > p/label p/seg", "p/ct > p/label_anna p/label_bert", "p/ct p/scan > p/label",
    "images/x img/x > labels/x", "p/ct > p/label_auto p/label_draft",
    "a/volume-1 b/volume-1 > segmentation-1", "a_b/ct a/b_ct > a/b_label",
]  # fmt: skip


@pytest.mark.parametrize("tree", AMBIGUOUS)
def test_what_is_ambiguous_is_told_with_both_paths(tree, tmp_path):
    scans, labels = (side.split() for side in tree.split(" > "))
    for name in (*scans, *labels, "sound_ct", "sound_label"):
        save(label_of(1), tmp_path / f"{name}.nii.gz")
    data = find_pairs(tmp_path)
    (fault,) = [fault for case in data.cases for fault in case.faults]
    several = len(scans) > 1
    told = "2 scans for one label map" if several else "2 label maps for one scan"
    files = [str(tmp_path / f"{name}.nii.gz") for name in (scans if several else labels)]
    assert all(words in fault for words in (told, *files))
    assert fault in "\n".join(describe_data_set(data))
    (sound,) = [case for case in data.cases if not case.faults]
    assert (sound.name, sound.image) == ("sound", tmp_path / "sound_ct.nii.gz")


def test_what_this_program_wrote_is_no_data_set(raw_phantoms, checkpoint, tmp_path, blank_pictures):
    """Unless results are named as the label maps: then each one's label map counts, as a draft."""
    raw = shutil.copytree(raw_phantoms, tmp_path / "raw")
    cases = [(case.name, case.label) for case in find_pairs(raw).cases]
    prepare.main(prepare.Config(source=raw, destination=raw / "prepared", workers=1))
    scan, results = min((raw / "imagesTr").iterdir()), raw / "results"
    apply_model.main(apply_model.Config(
        paths=(scan,), checkpoint=checkpoint, destination=results, device="cpu", probability=True,
    ))  # fmt: skip
    data = find_pairs(raw)
    assert [(case.name, case.label) for case in data.cases] == cases
    assert any(f"left out: {len(cases) + 1} cases" in line for line in describe_data_set(data))
    data = find_pairs(raw, images=raw / "imagesTr", labels=results)
    name = scan.name.removesuffix(".nii.gz")
    drafts = [case.label for case in data.cases if case.label]
    assert drafts == [results / name / f"{name}_label.nii.gz"]
    assert any("1 label maps are drafts" in line for line in describe_data_set(data))


def test_folders_can_be_named_are_read_once_and_told_where_unlisted(tmp_path, monkeypatch):
    for patient in (0, 1):
        name = f"anna/study {patient}.nii.gz"
        save_pair(tmp_path, f"a/{name}", f"b/{name}", patient)
    a, b, c = paths(tmp_path, "a", "b", "c")
    check(find_pairs(tmp_path, images=a, labels=b), {"study 0": 0, "study 1": 1})
    for named, told in (
        ({}, "--images FOLDER --labels FOLDER"),
        ({"images": a}, "give both folders"),
        ({"images": a, "labels": c}, "no such folder"),
    ):
        with pytest.raises(InputError, match=told):
            find_pairs(tmp_path, **named)
    save_pair(c, "p/ct.nii.gz", "p/label.nii.gz", 0)
    (c / "p/again").symlink_to(c, target_is_directory=True)
    check(find_pairs(c), {"p": 0})
    refused = PermissionError(13, "Permission denied", str(c))
    monkeypatch.setattr(os, "scandir", Mock(side_effect=refused))
    with pytest.raises(InputError, match="cannot be listed"):
        find_pairs(c)


def test_names_are_safe_and_distinct_whatever_files_are_called_or_not_utf8_is_told(tmp_path):
    names = ("=1+1", "-x", "+y", "@z", "a..b", "w" * 180, "P1", "p1", "p1:", "p1*")
    for name in names:
        save_pair(tmp_path / "safe", f"images/{name}.nii.gz", f"labels/{name}.nii.gz")
    cases = find_pairs(tmp_path / "safe").cases
    assert {"1+1", "x", "y", "z", "a.b"} < {case.name for case in cases}
    assert max(len(case.name) for case in cases) <= 100
    assert len({case.name.casefold() for case in cases}) == len(names)
    assert all(case.image.name == case.label.name for case in cases)
    for name in (b"caf\xe9", b"sound"):
        save_pair(tmp_path / "odd", "images/x.nii.gz", "labels/x.nii.gz")
        for file in paths(tmp_path / "odd", "images/x.nii.gz", "labels/x.nii.gz"):
            file.rename(file.with_name(f"{os.fsdecode(name)}.nii.gz"))
    data = find_pairs(tmp_path / "odd")
    bad, sound = data.cases
    assert "is not UTF-8; rename it" in bad.faults[0]
    assert sound.faults == ()
    "\n".join([*describe_data_set(data), bad.name]).encode()


def as_seg(slices: list[Path], label: np.ndarray, path: Path, names=("liver", "tumour")) -> None:
    scan = read_scan(slices[0].parent)
    stored = scan.from_ras(Volume(label, AFFINE).ras.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = {"background": (0,)} | {name: (i,) for i, name in enumerate(names, start=1)}
    assert write_seg(stored, scan, classes, path) == []


def set_frame(files: list[Path], uid: str) -> None:
    for file in files:
        header = pydicom.dcmread(file)
        header.FrameOfReferenceUID = uid
        header.save_as(file)


TWO = np.arange(SHAPE[2]) == 2
PARTS = {  # structure → its voxels of a label map
    "label": lambda label: label,
    "liver": lambda label: label > 0,
    "tumour": lambda label: label == 2,
    "tumour in slice 2": lambda label: (label == 2) & TWO,
    "tumour elsewhere": lambda label: (label == 2) & ~TWO,
    "everything": lambda label: label >= 0,
    "nothing else": lambda label: label < 1,
}
SERIES = {  # scan, and a structure for each file or series beside it; what has no ending is DICOM
    "SEG": ("p{}/scan", {"p{}/seg.dcm": "label"}),
    "SEG without reference": ("p{}/scan", {"p{}/seg.dcm": "label"}),
    "NIfTI beside": ("p{}/ct", {"p{}/ct_label.nii.gz": "label"}),
    "NIfTI inside": ("p{}/scan", {"p{}/scan/liver.nii.gz": "label"}),
    "NIfTI elsewhere": ("series/p{}", {"labels/p{}.nii.gz": "label"}),
    "NIfTI with its label map": ("p{}/ct.nii.gz", {"p{}/label.nii.gz": "label", "p{}/DICOM": ""}),
    "labelled series": ("PATIENT_DICOM/p{}", {"LABELLED_DICOM/p{}": "label"}),
    "3D-IRCADb": ("p{}/PATIENT_DICOM", {
        "p{}/MASKS_DICOM/liver": "liver", "p{}/MASKS_DICOM/livertumor01": "tumour in slice 2",
        "p{}/MASKS_DICOM/livertumor02": "tumour elsewhere", "p{}/MASKS_DICOM/skin": "everything",
        "p{}/LABELLED_DICOM": "label",
    }),
    "TotalSegmentator": ("p{}/ct.nii.gz", {
        "p{}/segmentations/liver.nii.gz": "liver", "p{}/segmentations/liver_tumor.nii.gz": "tumour",
        "p{}/segmentations/spleen.nii.gz": "nothing else",
    }),
    "a file per mask": ("p{}/scan.nii.gz", {
        "p{}/liver_mask.nii.gz": "liver", "p{}/lesion_mask.nii.gz": "tumour",
    }),
    "a file per mask, flat": ("p{}_ct.nii.gz", {
        "p{}_liver_seg.nii.gz": "liver", "p{}_liver_tumor_seg.nii.gz": "tumour",
    }),
}  # fmt: skip


def lay(layout: str, root: Path, patient: int) -> None:
    scan, labels = SERIES[layout]
    write = save if scan.endswith(".nii.gz") else save_series
    files = write(scan_of(patient), root / scan.format(patient))
    for name, part in labels.items():
        path = root / name.format(patient)
        array = PARTS[part](label_of(patient)) if part else scan_of(patient + 9)
        if path.suffix == ".dcm":
            as_seg(files, array, path)
        elif path.suffix:
            save(array.astype(np.uint8), path)
        elif "MASKS" in name:
            frame = str(pydicom.dcmread(files[0]).FrameOfReferenceUID)
            set_frame(save_series(255 * array, path), frame)
        else:
            save_series(array * 40 if "IRCADb" in layout else array, path)
    if layout == "SEG without reference":
        seg = pydicom.dcmread(path)
        del seg.ReferencedSeriesSequence
        seg.save_as(path)


@pytest.mark.parametrize("layout", SERIES)
def test_series_and_masks_give_the_right_voxels(layout, tmp_path):
    for patient in (1, 2):
        lay(layout, tmp_path, patient)
    data = find_pairs(tmp_path)
    check(data, {"p1": 1, "p2": 2})
    assert all(stamp_inputs([case.image, case.label]) for case in data.cases)


@pytest.mark.parametrize("greys", [(0, 255), (126, 63)])
def test_a_stack_of_pictures_is_a_label_map_that_fits_the_slices_or_is_refused(greys, tmp_path):
    folder = tmp_path / "Train_Sets/CT/1"
    files = save_series(scan_of(1), folder / "DICOM_anon")
    scan = read_scan(folder / "DICOM_anon")
    liver = scan.from_ras(Volume((label_of(1) > 0).astype(np.uint8), AFFINE).ras.data).data
    path = folder / "Ground/liver_GT_002.png"
    path.parent.mkdir()
    for z, file in enumerate(sorted(files)):
        picture = np.asarray(greys, np.uint8)[liver[:, :, scan.files.index(file)].T]
        Image.fromarray(picture).save(path.with_name(f"liver_GT_{z:03d}.png"))  # as in CHAOS
    data = find_pairs(tmp_path)
    (case,) = data.cases
    assert (case.name, case.image) == ("1", folder / "DICOM_anon")
    assert np.array_equal(read_label_map(case.label, scan, data.declared).read(), liver)
    odd = np.zeros((SHAPE[1], SHAPE[0]), np.uint8)
    odd[0, :3] = 10, 20, 30
    for picture, told in (
        (odd, r"greys \[10, 20, 30, "),
        (odd[:4], r"must have \(12, 10\) pixels .* got \(12, 4\)"),
        (None, "got 5 for 6 files"),
    ):
        path.unlink() if picture is None else Image.fromarray(picture).save(path)
        with pytest.raises(InputError, match=told):
            read_label_map(case.label, scan, data.declared)


def test_other_structures_are_used_when_they_are_named_and_masks_of_another_scan_never(tmp_path):
    lay("TotalSegmentator", tmp_path / "a", 1)
    assert "spleen" in " ".join(find_pairs(tmp_path / "a").notes)
    data = find_pairs(tmp_path / "a", values={"liver": (6,), "spleen": (1,)})
    assert data.declared == {"background": (0,), "liver": (6,), "spleen": (1,)}
    _, label = read_ras(data, *data.cases)
    expected = np.where(label_of(1) > 0, 6, 1).astype(np.uint8)
    assert np.array_equal(label, Volume(expected, AFFINE).ras.data)
    lay("3D-IRCADb", tmp_path / "b", 1)
    (case,) = find_pairs(tmp_path / "b").cases
    set_frame(list((tmp_path / "b/p1/MASKS_DICOM/liver").iterdir()), "1.2.3")
    with pytest.raises(InputError, match="another frame of reference"):
        read_label_map(case.label, read_scan(case.image), {"liver": (1,)})


def test_two_series_of_one_folder_or_of_one_name_keep_their_own_label_maps(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "mixed").mkdir(parents=True)
    for patient, batch in ((1, "A"), (2, "B")):
        slices = save_series(scan_of(patient), one / f"{patient}")
        as_seg(slices, label_of(patient), one / f"segs/{patient}.dcm")
        for file in slices:
            file.rename(one / "mixed" / f"{patient}{file.name}")
        save_series(scan_of(patient), other / f"{batch}/p1")
        save(label_of(patient), other / f"labels/{batch}/p1.nii.gz")
    data = find_pairs(one)  # names by their UIDs
    assert [(case.name[:7], len(case.name)) for case in data.cases] == [("series_", 17)] * 2
    first = Volume(scan_of(1), AFFINE).ras.data
    order = (1, 2) if np.array_equal(read_ras(data, data.cases[0])[0], first) else (2, 1)
    check(data, dict(zip([case.name for case in data.cases], order, strict=True)))
    check(find_pairs(other), {"A_p1": 1, "B_p1": 2})


def test_a_series_that_a_seg_names_is_a_scan_and_two_segs_none_or_torn_files_are_told(tmp_path):
    slices = save_series(scan_of(1), tmp_path / "masks/p1")
    as_seg(slices, label_of(1), tmp_path / "masks/x.dcm")
    save_series(scan_of(2), tmp_path / "p2/scan")
    (tmp_path / "p3").mkdir()
    (tmp_path / "p3/cut.dcm").write_bytes(slices[0].read_bytes()[:400])
    data = find_pairs(tmp_path)
    (case,) = data.cases
    assert (case.name, case.image, case.label) == ("p1", *paths(tmp_path / "masks", "p1", "x.dcm"))
    assert "p2/scan, a series of 6 images without a label map" in " ".join(data.notes)
    assert "cut.dcm" in " ".join(data.notes)
    as_seg(slices, label_of(2), tmp_path / "masks/other.dcm", names=("liver", "cyst"))
    (case,) = find_pairs(tmp_path).cases
    told = ("2 label maps for one scan", "other.dcm", "x.dcm")
    assert all(words in case.faults[0] for words in told)


def test_no_tree_of_files_joins_two_patients(tmp_path):
    rng, pairs = np.random.default_rng(0), 0
    styles = "{w}/{b}/{p}", "{b}/{w}/{p}", "{b}/{p}/{w}", "{b}/{p}_{w}", "{b}/{w}_{p}"
    kinds = (["images", "img", "ct", "volumes"], ["labels", "seg", "mask", "truth"])
    for trial in range(60):
        root = tmp_path / str(trial)
        for index in rng.permutation(4)[:3]:
            batch, patient = rng.choice(["A", "B"]), f"p{index}"
            for words in kinds:
                name = styles[trial % 5].format(w=rng.choice(words), b=batch, p=patient)
                if rng.random() < 0.75:
                    path = root / f"{name}.nii"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(f"{batch} {patient}")
        with contextlib.suppress(InputError):
            for case in find_pairs(root).cases:
                if case.image and case.label and not case.faults:
                    pairs += 1
                    assert case.image.read_text() == case.label.read_text()
    assert pairs > 50


BTCV = {"0": "background", "1": "spleen", "2": "right kidney", "6": "liver"}
WHOLE = {"background": 0, "whole": [1, 2, 3], "liver": [1, 2], "tumour": 2}
DECLARED = {  # labels in dataset.json → values of each class
    "Decathlon": (BTCV, {"spleen": (1,), "right kidney": (2,), "liver": (6,)}),
    "nnU-Net": ({"background": 0, "tumour": 1, "liver": 2}, {"tumour": (1,), "liver": (2,)}),
    "regions": ({"background": 0, "liver": [1, 2], "tumour": [2]}, {"liver": (1,), "tumour": (2,)}),
    "region with a number": (WHOLE, {"whole": (3,), "liver": (1,), "tumour": (2,)}),
    "two values": ({"0": "background", "1": "liver", "2": "liver"}, {"liver": (1, 2)}),
    "no background": ({"liver": 1}, {"liver": (1,)}),
    "a value to ignore": ({"background": 0, "liver": 1, "ignore": 7}, {"liver": (1,)}),
}


@pytest.mark.parametrize("form", DECLARED)
def test_descriptions_name_the_values(form, tmp_path):
    content, declared = DECLARED[form]
    save_pair(tmp_path, "imagesTr/x.nii.gz", "labelsTr/x.nii.gz")
    text = json.dumps({"labels": content, "numTraining": 3})
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8-sig" if "r" in form else "utf-8")
    data = find_pairs(tmp_path)
    assert data.declared == {"background": (0,), **declared}
    assert (data.announced, data.ignore) == (3, (7,) if "ignore" in content else ())
    assert any("announces 3 cases" in line for line in describe_data_set(data))
    assert find_pairs(tmp_path, values={"liver": (1, 2)}).declared["liver"] == (1, 2)


def test_a_description_of_another_form_is_refused_with_the_form(tmp_path):
    save_pair(tmp_path, "imagesTr/x.nii.gz", "labelsTr/x.nii.gz")
    labels = [["background", "liver"], {"liver": "one"}, {"liver": -1}, {"liver": 1.5}]
    labels += [{"liver": 10**9}, {"1": None}, {"background": 0}]
    forms = [{"classes": ["liver"]}, [1, 2], *({"labels": form} for form in labels)]
    twice = {"labels": {"background": 0, "liver": 1, "tumour": 2, "ignore": 2}}
    must = r"dataset\.json.*must have .labels. as Decathlon"
    rows = [(json.dumps(form), must) for form in forms] + [(json.dumps(twice), "ignore=2")]
    rows += [(text, r"dataset\.json: must be a JSON object") for text in ("", "{", "[" * 100000)]
    for text, told in rows:
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=told):
            find_pairs(tmp_path)


def test_a_description_reaches_no_neighbouring_set(tmp_path):
    save_pair(tmp_path / "lits", "volume-1.nii", "segmentation-1.nii")
    save_pair(tmp_path / "btcv", "img/1.nii", "label/1.nii")
    assert any("no dataset.json describes" in note for note in find_pairs(tmp_path).notes)
    (tmp_path / "btcv/dataset.json").write_text(json.dumps({"labels": BTCV}))
    with pytest.raises(InputError, match=r"btcv/dataset.json says .*spleen.*lits/segmentation-1.*"):
        find_pairs(tmp_path)
    assert find_pairs(tmp_path, values={"liver": (1,)}).declared["liver"] == (1,)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"liver": 1, "tumour": 2}}))
    with pytest.raises(InputError, match=r"btcv/dataset.json says .*/dataset.json says .*--values"):
        find_pairs(tmp_path)  # the nearest counts
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": BTCV}))  # above the source
    assert find_pairs(tmp_path / "lits").declared["liver"] == (1,)
    (tmp_path / "dataset.json").unlink()
    same = {"labels": {"liver": 1, "cancer": 2}}  # the usual values by another name
    (tmp_path / "btcv/dataset.json").write_text(json.dumps(same))
    assert find_pairs(tmp_path).declared == {"background": (0,), "liver": (1,), "cancer": (2,)}


def write_segnrrd(path: Path, **segments: int) -> None:
    """The header of a .seg.nrrd of 3D Slicer; who pairs files reads no voxels."""
    lines = ["NRRD0004", "type: unsigned char", "dimension: 3"]
    for number, (name, value) in enumerate(segments.items()):
        lines += [f"Segment{number}_LabelValue:={value}", f"Segment{number}_Name:={name}"]
    path.write_bytes("\n".join(lines).encode() + b"\n\nvoxels")


def test_segments_of_slicer_label_info_of_monai_label_and_segs_name_the_values(tmp_path):
    slicer, monai, segs = paths(tmp_path, "slicer", "monai", "segs")
    for patient, segments in (("a", {"tumour": 1, "liver": 2}), ("b", {"Liver": 2})):
        save(scan_of(1), slicer / patient / "ct.nii.gz")
        write_segnrrd(slicer / patient / "Segmentation.seg.nrrd", **segments)
    save_pair(monai, "x.nii.gz", "labels/final/x.nii.gz")
    info = {"params": {"label_info": [{"name": "tumour", "idx": 1}, {"name": "liver", "idx": 2}]}}
    store = {"objects": {"x": {"labels": {"final": {"info": info}}}}}
    (monai / "datastore_v2.json").write_text(json.dumps(store))
    for root in (slicer, monai):
        assert find_pairs(root).declared == {"background": (0,), "tumour": (1,), "liver": (2,)}
    described = describe_truths(slicer / "b/Segmentation.seg.nrrd")
    assert described.labels == {"background": (0,), "Liver": (2,)}  # of their own file
    write_segnrrd(file := slicer / "b/Segmentation.seg.nrrd", liver=1, cyst=2)
    declared = find_pairs(slicer).declared  # by names: values may differ from file to file
    assert declared == {"background": (0,), "tumour": (1,), "liver": (2,), "cyst": (3,)}
    named = rename_segments(Volume(np.arange(3).reshape(1, 1, 3), AFFINE), file, declared)
    assert named.data.tolist() == [[[0, 2, 3]]]
    slices = save_series(scan_of(1), segs / "p1/scan")
    for names, declared in (
        (("Segment_1", "Segment_2"), {"Segment_1", "Segment_2"}),
        (("Whole liver", "tumour"), {"liver", "tumour"}),
        (("liver", "Cyst"), {"liver", "Cyst"}),
    ):
        as_seg(slices, label_of(1), segs / "p1/seg.dcm", names=names)
        data = find_pairs(segs)
        assert {*data.declared} == {"background", *declared}
        _, label = read_ras(data, data.cases[0])
        assert np.count_nonzero(label) == np.count_nonzero(label_of(1))


TWO_CASES, LAST = ["liver_0", "liver_1"], ["liver_2"]
FOLDS = [{"image": rf"C:\data\imagesTr\liver_{i}.nii.gz", "fold": int(i < 2)} for i in range(3)]
SPLIT_FILES = {
    "ours": {"training": TWO_CASES, "validation": LAST, "test": []},
    "nnU-Net": [{"train": TWO_CASES, "val": LAST}, {"train": LAST, "val": TWO_CASES}],
    "monai": {
        "name": "liver",
        "training": [{"image": f"imagesTr/{name}.nii.gz", "label": "x"} for name in TWO_CASES],
        "validation": [{"image": ["./imagesTr/liver_2_0000.nii.gz"]}],
        "test": ["./imagesTs/liver_9.nii.gz"],
    },
    "monai folds": {"training": FOLDS},
}


def test_splits_of_other_programs_are_read_and_other_forms_or_two_meanings_refused(tmp_path):
    path, form = tmp_path / "split.json", "must be JSON with lists of cases under training"
    split = {"liver_0": "training", "liver_1": "training", "liver_2": "validation"}
    for kind, content in SPLIT_FILES.items():
        path.write_text(json.dumps(content), encoding="utf-8-sig")
        assert read_split(path, list(split)) == split, kind
    rows = [(content, form) for content in ([], {}, 3, "x", [1], {"training": [[]]})]
    rows += [({"train_cases": ["a"]}, form), ({"training": [1]}, form)]
    rows += [({"training": ["a"], "test": ["a"]}, "two splits")]
    rows += [({"training": ["imagesTr/3.nii.gz"]}, "may be img3 or volume-3")]
    for content, message in rows:
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            read_split(path, ["a", "img3", "volume-3"])


def test_patients_are_read_from_spreadsheets_and_an_id_of_nobody_joins_no_scans(tmp_path, capsys):
    for ids, patients, printed in (
        ([None, None], "ab", ""),
        (["1", "2", "1"], "aba", ""),
        (["Anonymous", "Anonymous", "7"], "abc", '2 series have "Anonymous"'),
        (["secret", "secret"], "ab", "2 series have the same as PatientID"),
        (["", ""], "ab", "--patients or --patient-pattern"),
    ):
        cases = [Case(name, name, patient_id=one) for name, one in zip("abc", ids, strict=False)]
        name_patients(cases, SimpleNamespace(patients=None, patient_pattern=""))
        assert [case.patient for case in cases] == list(patients)
        out = capsys.readouterr().out
        assert printed in out and bool(out) == bool(printed) and "secret" not in out
        name_patients(cases, SimpleNamespace(patients=None, patient_pattern="(.)"))
        assert capsys.readouterr().out == ""
        with pytest.raises(InputError, match="finds no group in a"):
            name_patients(cases, SimpleNamespace(patients=None, patient_pattern=r"x(\d)"))
    path = tmp_path / "patients.csv"
    for separator in ",;\t":
        text = "case,patient\r\na,anna\r\nb,bert".replace(",", separator)
        path.write_text(text, encoding="utf-8-sig")
        assert read_patients(path) == {"a": "anna", "b": "bert"}
    for rows, told in (("a,anna\na,bert", "two patients"), ("a,", "lacks case or patient")):
        path.write_text(f"case,patient\n{rows}\n")
        with pytest.raises(InputError, match=told):
            read_patients(path)


def test_names_of_several_scans_are_noticed():
    for names, patients in (
        ("P01_t1 P01_t2 P02_t1 P02_t2", "P01 P02"),
        ("g_0000 g_0001 g_0100 g_0101 g_0102", "g_00 g_01"),
        ("P1_2020-01-31 P1_2021-02-01 P2_20200301 P2_20210401", "P1 P2"),
        ("P1a P1b P2a P2b", "P1 P2"),
        ("P01T1 P01T2 P02T1 P02T2", "P01 P02"),
        ("X_01.02.2020 X_03.04.2021 Y_01.02.2020 Y_05.05.2021", "X Y"),
        ("p1_portal p1_venous p2_portal p2_venous", "p1 p2"),
        ("volume-0 volume-1 volume-2 volume-10", ""),
        ("p1_portal p2_portal p3_portal", ""),
        ("case_0000 case_0001 case_0002 case_0003 case_0004", ""),
        ("img0001 img0002 img0010 img0021 img0022 img0031", ""),
    ):
        pattern = guess_pattern(names.split())
        found = {re.search(pattern, name)[1] for name in names.split()} if pattern else set()
        assert bool(pattern) == bool(patients) and found == set(patients.split()), names


BY_NAME = {  # scans, label maps, and for each scan which of them is its own
    "same": ("x y", "y x", [1, 0]),
    "nnU-Net": ("x_0000 y_0000", "x y", [0, 1]),
    "our results": ("x y", "x/x_label y/y_label", [0, 1]),
    "lits": ("volume-1 volume-2", "segmentation-2 segmentation-3", [None, 0]),
    "folders": ("A/p B/p", "B/p_seg A/p_seg", [1, 0]),
    "none": ("", "", []),
    "no fit": ("x", "z", "none of 1 label maps"),
    "two label maps": ("x", "A/x B/x", "2 label maps for one scan"),
    "two scans": ("A/x B/x", "x", "2 scans for one label map"),
}


@pytest.mark.parametrize("kind", BY_NAME)
def test_label_maps_are_found_by_name_or_it_is_told(kind, tmp_path):
    scans, truths, expected = BY_NAME[kind]
    scans = [tmp_path / f"scans/{name}.nii.gz" for name in scans.split()]
    truths = [tmp_path / f"truths/{name}.nii.gz" for name in truths.split()]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            pair_by_name(scans, truths)
    else:
        found = pair_by_name(scans, truths)
        assert found == [None if index is None else truths[index] for index in expected]


def test_what_is_no_scan_in_a_folder_is_left_out_and_told(tmp_path, capsys):
    lits = tmp_path / "lits"
    for patient in (1, 2):
        save_pair(lits, f"volume-{patient}.nii", f"segmentation-{patient}.nii", patient)
    save_series(scan_of(3), tmp_path / "series")
    save(label_of(3), tmp_path / "series/liver.nii.gz")
    assert find_scans(lits) == paths(lits, "volume-1.nii", "volume-2.nii")
    assert "left out: 2 label maps" in capsys.readouterr().out
    assert find_scans(tmp_path / "series") == [tmp_path / "series"]
    assert "liver.nii.gz" in capsys.readouterr().out
    truths = pair_truths(find_scans(lits), [lits])
    assert truths == paths(lits, "segmentation-1.nii", "segmentation-2.nii")
    (tmp_path / "only").mkdir()
    with pytest.raises(InputError, match="holds no scan; expected"):
        find_scans(tmp_path / "only")
    lay("SEG", tmp_path, 1)
    (tmp_path / "p1/seg.dcm").rename(tmp_path / "only/seg.dcm")
    with pytest.raises(InputError, match="holds only DICOM SEGs"):
        find_scans(tmp_path / "only")


def test_scans_are_found_at_any_depth_and_named_by_last_names_or_whole_paths(tmp_path):
    series = tmp_path / "a/b/c/series"
    slices, volume = save_series(scan_of(1), series), save(scan_of(2), tmp_path / "X.NII.GZ")
    assert {*find_scans(tmp_path)} == {volume, series}
    assert find_scans(series) == [series]
    assert find_scans(*slices, volume) == [series, volume]
    assert find_scans(slices[3]) == [slices[3]]  # one slice names its series
    others = [f.rename(series / f"x{f.name}") for f in save_series(scan_of(2), tmp_path / "b")]
    assert find_scans(slices[3], others[3]) == [slices[3], others[3]]  # so does one of each
    assert len(find_scans(*slices, *others)) == 2
    names = ("A/x.nii.gz", "B/x.NII.GZ", "y.mha", "..z.nii")
    assert name_scans(paths(tmp_path, *names), tmp_path) == ["A_x", "B_x", "y", "z"]
    assert name_scans(paths(tmp_path, "A/x.nii")) == ["x"]
    words = paths(tmp_path, "1/ct.nii.gz", "2/ct.nii.gz", "2/scan.nii.gz", "3/image")
    assert name_scans(words, tmp_path) == ["1", "ct", "scan", "3"]
    assert name_scans(words[:1], words[0]) == name_scans(words[:1]) == ["ct"]


def test_truths_may_be_segs_or_masks(tmp_path):
    for patient in (1, 2):
        slices = save_series(scan_of(patient), tmp_path / f"ct/p{patient}")
        as_seg(slices, label_of(patient), tmp_path / f"segs/{3 - patient}.dcm")  # no names tell
        for name in ("liver", "tumour"):
            save(label_of(patient), tmp_path / f"masks/p{patient}/{name}.nii.gz")
    scans = find_scans(tmp_path / "ct")
    assert pair_truths(scans, [tmp_path / "segs"]) == paths(tmp_path / "segs", "2.dcm", "1.dcm")
    assert pair_truths(scans, [tmp_path / "masks"]) == [
        tuple((n, tmp_path / f"masks/p{p}/{n}.nii.gz") for n in ("liver", "tumour")) for p in (1, 2)
    ]
