"""What several tests share: building inputs from phantoms, small trainings, comparing runs."""

import contextlib
import dataclasses
import filecmp
import gzip
import io
import json
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import highdicom
import make_phantoms
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from conftest import ROOT, SHARED_DATA, run_here, without_pictures
from monai.networks import nets
from pydicom.dataelem import RawDataElement
from pydicom.sr.codedict import codes as known
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import prepare
import preprocess
import train
from data.labels import as_labels, resolve_classes
from data.settings import pick
from data.splits import read_prepared
from data.volumes import Volume
from preprocess import Augment, Chain
from utilities import SliceBySlice, load_checkpoint

LPS = np.diag([-5.0, -5, 5, 1])


def as_volume(array: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    """An array, masks too, with its affine; voxels of 1 mm along R, A, S where none is given."""
    array = array.astype(np.uint8) if array.dtype == bool else array
    return Volume(array, np.eye(4) if affine is None else affine)


class Threshold(torch.nn.Module):
    """A network whose answer is known: an organ is what is brighter than `limit` of the HU window.
    The first `shortages` calls lack memory."""

    def __init__(self, limit: float = 0.5, shortages: int = 0):
        super().__init__()
        self.limit, self.shortages, self.shapes = limit, shortages, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        if len(self.shapes) <= self.shortages:
            raise RuntimeError("MPS backend out of memory")  # cuDNN's is no OutOfMemoryError either
        return torch.cat([self.limit - x, x - self.limit], dim=1)


def build_2d_network(channels: int, classes: int, *_: object) -> torch.nn.Module:
    """In place of resnet34_unet and its 23 million weights."""
    return SliceBySlice(nets.UNet(2, channels, classes, (4, 8), (2,)))


@cache
def phantom(index: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Scan and label of a small patient (48 × 48 × about 40)."""
    pair = make_phantoms.make_phantom(index, make_phantoms.Config(size=48, slices=(36, 44)))
    return tuple(volume.to_nibabel() for volume in pair)


def ras_arrays(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scan and label map of `phantom`, axes R, A, S."""
    return tuple(np.asanyarray(nib.as_closest_canonical(i).dataobj) for i in phantom(index))


@cache
def part_arrays(index: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """`ras_arrays`, of it `depth` slices around its tumours, or its liver where it has none."""
    scan, label = ras_arrays(index)
    held = np.flatnonzero((label == label.max()).any(axis=(0, 1)))
    first = min(max(int(held.mean()) - depth // 2, 0), label.shape[2] - depth)
    return scan[:, :, first : first + depth], label[:, :, first : first + depth]


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write a RAS array in the axes of `affine`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = nib.orientations.ornt_transform(
        nib.io_orientation(np.eye(4)), nib.io_orientation(affine)
    )
    nib.save(nib.Nifti1Image(nib.apply_orientation(array, axes), affine), path)


def save_case(root: Path, name: str, scan: np.ndarray, label: np.ndarray, affine=LPS) -> None:
    """Write two RAS arrays as a case of a Decathlon folder."""
    save(scan, affine, root / "imagesTr" / f"{name}.nii.gz")
    save(label, affine, root / "labelsTr" / f"{name}.nii.gz")


def write_patients(root: Path, slices: slice = slice(None), affines=(None,) * 3) -> Path:
    """Decathlon folder with one phantom per affine (None: its own)."""
    for index, affine in enumerate(affines):
        scan, label = (array[:, :, slices] for array in ras_arrays(index))
        own = nib.as_closest_canonical(phantom(index)[0]).affine if affine is None else affine
        save_case(root, f"case_{index}", scan, label, own)
    return root


def copy_prepared(source: Path, folder: Path, edit: Callable[[dict], object]) -> Path:
    """Prepared data in another folder, whose dataset.json `edit` changes in place."""
    content = read_prepared(source)
    edit(content)
    folder.mkdir()
    (folder / "subvolumes").symlink_to(source / "subvolumes")
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def read_voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def run(source: Path, pictures: bool = False, **settings) -> dict:
    """Prepare `source` beside itself; returns dataset.json."""
    destination = settings.pop("destination", source.parent / "prepared")
    settings = {"workers": 1} | settings
    with contextlib.nullcontext() if pictures else without_pictures():
        prepare.main(prepare.Config(source=source, destination=destination, **settings))
    return json.loads((destination / "dataset.json").read_text())


def call_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` as `run_here` runs it, with what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        ended = run_here(*arguments)
    told = f"{ended}\n" if isinstance(ended, str) else ""
    code = 1 if told else ended
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue() + told)


def list_differences(one: Path, other: Path) -> list[str]:
    """Files that two folders do not share, byte for byte."""
    files = [{str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()} for r in (one, other)]
    changed = (f for f in files[0] & files[1] if not filecmp.cmp(one / f, other / f, shallow=False))
    return sorted({*(files[0] ^ files[1]), *changed})


SECRETS = {"PatientName": "Doe^Jane", "PatientID": "ID-4711", "StudyDate": "19991231"}
SERIES_SPACING = (5.0, 5.0, 5.0)


def build_phantom_series(scan, tilt=0.0, intercept=-1024, signed=False, **changes) -> list:
    """CT slices of a RAS array (X, Y, Z), feet to head; `changes` of tags."""
    kind = np.int16 if signed else np.uint16
    stored = np.rint(scan[::-1, ::-1].astype(float) - intercept).astype(kind)  # LPS
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    slices = []
    for z in range(scan.shape[2]):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
        header.SeriesInstanceUID, header.StudyInstanceUID = series, study
        header.FrameOfReferenceUID, header.Modality, header.InstanceNumber = frame, "CT", int(z)
        header.PatientBirthDate, header.PatientSex, header.StudyTime = "19700101", "F", "120000"
        header.AccessionNumber, header.StudyID, header.Manufacturer = "1", "1", "none"
        header.Rows, header.Columns = stored.shape[1], stored.shape[0]
        header.SliceThickness = 1.25
        header.PixelSpacing = [SERIES_SPACING[1], SERIES_SPACING[0]]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [-100.0, -90.0 + tilt * z, 30.0 + SERIES_SPACING[2] * z]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelRepresentation = int(signed)
        header.RescaleSlope, header.RescaleIntercept = 1, intercept
        header.PixelData = np.ascontiguousarray(stored[:, :, z].T).tobytes()
        for key, value in (SECRETS | changes).items():
            setattr(header, key, value(z) if callable(value) else value)
        slices.append(header)
    return slices


def write_phantom_series(folder: Path, scan: np.ndarray, name="{:03d}", **changes) -> list:
    """The slices of `build_phantom_series` as files, whose names are in random order."""
    folder.mkdir(parents=True, exist_ok=True)
    slices = build_phantom_series(scan, **changes)
    order = np.random.default_rng(0).permutation(len(slices))
    for z, header in enumerate(slices):
        header.save_as(folder / name.format(order[z]), enforce_file_format=True)
    return slices


def build_phantom_seg(
    slices: list[pydicom.Dataset], label: np.ndarray, names=("Liver", "Tumour"), kind="BINARY",
    codes=(), masks=None, **settings,
) -> pydicom.Dataset:  # fmt: skip
    """A DICOM SEG of a RAS label map 1, 2, … (or of boolean `masks`, which may overlap)."""

    def describe(number: int, name: str) -> highdicom.seg.SegmentDescription:
        code = codes[number - 1] if codes else known.SCT.Organ
        return highdicom.seg.SegmentDescription(number, name, known.SCT.Organ, code, "MANUAL")

    masks = [label == i + 1 for i in range(len(names))] if masks is None else masks
    array = np.stack([mask[::-1, ::-1].T for mask in masks], axis=-1)
    array = array.astype(np.float32 if kind == "FRACTIONAL" else np.uint8)
    return highdicom.seg.Segmentation(
        source_images=slices, pixel_array=array, segmentation_type=kind,
        segment_descriptions=[describe(i + 1, name) for i, name in enumerate(names)],
        series_instance_uid=generate_uid(), series_number=2, sop_instance_uid=generate_uid(),
        instance_number=1, manufacturer="none", manufacturer_model_name="none",
        software_versions="1", device_serial_number="1", **settings,
    )  # fmt: skip


def write_phantom_seg(path: Path, slices: list[pydicom.Dataset], label: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    build_phantom_seg(slices, label, **how).save_as(path)
    return path


def put_raw(header: pydicom.Dataset, tag: str, vr: str, value: bytes) -> None:
    """Set a tag to bytes that pydicom would refuse to make."""
    value += b" " * (len(value) % 2)
    header._dict[Tag(tag)] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)


FIELD_CASES = SHARED_DATA / "field_cases"


def build_field_case(name: str, out: Path) -> Path:
    """The inputs of a field case in `out`, as `python make.py OUT` makes them."""
    if not (FIELD_CASES / name).is_dir():
        pytest.skip("the field cases are not here (beside the project)")
    assert (FIELD_CASES / name / "expect.txt").read_text()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["make.py", str(out)])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(gzip, "compress", partial(gzip.compress, compresslevel=1))
        runpy.run_path(str(FIELD_CASES / name / "make.py"), run_name="__main__")
    return out


def field_patient(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU and label map (64, 64, 24) in RAS of a patient of the field cases."""
    return runpy.run_path(str(FIELD_CASES / "base.py"))["abdomen"](seed=seed)


TIMING = {"samples_per_s", "data_wait_percent", "peak_memory_mb", "epoch_seconds"}
SMALL = {
    "base_channels": 4, "input_size": (16, 16), "spacing": (16.0, 16.0), "max_epochs": 2,
    "device": "cpu", "precision": "fp32",
}  # fmt: skip
PATCHES = {"input_size": (32, 32, 16), "spacing": (8.0, 8.0, 5.0), "patches_per_case": 1}


def small_config(prepared, run, **changes) -> train.Config:
    """A training of seconds on sub-volumes of phantoms."""
    return train.Config(**{**SMALL, "data": prepared, "run_folder": run, **changes})


def tiny(name: str, prepared, whole_cases, run, **changes) -> train.Config:
    """A recipe made small, on sub-volumes or whole cases as it needs them."""
    recipe = train.RECIPES[name][1]
    patches = recipe.sampling == "patches"
    small = SMALL | {"max_epochs": 2} | (PATCHES if patches else {})
    if recipe.network == "resnet34_unet":  # five halvings must leave a pixel
        small |= {"input_size": (32, 32), "spacing": (8.0, 8.0)}
    if recipe.pretrained:
        small |= {"pretrained": ROOT / recipe.pretrained, "base_channels": recipe.base_channels}
    places = {"data": whole_cases if patches else prepared, "run_folder": run}
    return dataclasses.replace(recipe, **small | places | changes)


def chain_of(config: train.Config) -> Chain:
    """The deterministic chain of a training, its classes resolved with the data's labels."""
    prepared = read_prepared(config.data)
    labels = resolve_classes(config.labels, as_labels(prepared["labels"]))
    ignore, crop = tuple(prepared.get("ignore", ())), prepared["settings"]["crop_to_body"]
    return pick(Chain, config, labels=labels, ignore=ignore, crop_to_body=crop)


def augment_of(config: train.Config, **changes) -> Augment:
    """The augmentation of a training."""
    return pick(Augment, config, **{"classes": len(config.labels) + 1, **changes})


def cached(config: train.Config, split: str = "training", device: str = "cpu"):
    """The cached sub-volumes of a training."""
    content = read_prepared(config.data)
    return preprocess.cache_split(content, config.data, split, chain_of(config), device)


def comparable(history):
    """Rows without what depends on the machine's speed."""
    return [{key: value for key, value in row.items() if key not in TIMING} for row in history]


def assert_same_run(first, second):
    """Two runs ended with the same history and the same weights, bit for bit."""
    a, b = (load_checkpoint(run / "last.pt") for run in (first, second))
    assert comparable(a["history"]) == comparable(b["history"])
    for name, tensor in a["network_state"].items():
        assert torch.equal(tensor, b["network_state"][name]), name
