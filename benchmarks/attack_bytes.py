"""Changed bytes of every format that is read: sound as before, or refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from attempts import REFUSED, SECRET, SOUND, Attempt, Config, Outcome, in_child, try_forked

import train
import utilities
from data import dicom, volumes
from data import scans as cases
from data.files import InputError
from data.labels import IMAGE, LABEL, USUAL_LABELS
from data.settings import pick
from data.volumes import TO_LPS, Volume
from preprocess import Chain, deterministic_chain, read_or_make

SHAPE = (12, 11, 10)


@dataclass(frozen=True)
class Found:
    """What a reader gave: voxels, affine, and whether it said a word about them."""

    array: Any
    affine: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A sound file, how it is read, and what may come out once its bytes are changed."""

    name: str
    path: Path  # that is read
    file: Path  # whose bytes are changed
    read: Callable[[Path], Found]
    theirs: Callable[[Target], Found | None] | None = None  # an independent reader; None: no other
    judged: bool = True  # False: only how the reading ends counts


def mutate(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One change of some bytes, half of them in the head, and its description."""
    reach = len(content) if rng.random() < 0.5 else min(len(content), 600)
    at, few = rng.randrange(reach), rng.randint(1, 16)
    kind = rng.choice(
        ["bit", "byte", "zeros", "ones", "cut", "delete", "insert", "repeat", "digit"]
    )
    head, tail = content[:at], content[at:]
    changed = {
        "bit": lambda: head + bytes([tail[0] ^ 1 << rng.randrange(8)]) + tail[1:],
        "byte": lambda: head + rng.randbytes(1) + tail[1:],
        "zeros": lambda: head + bytes(len(tail[:few])) + tail[few:],
        "ones": lambda: head + b"\xff" * len(tail[:few]) + tail[few:],
        "cut": lambda: head,
        "delete": lambda: head + tail[few:],
        "insert": lambda: head + rng.randbytes(few) + tail,
        "repeat": lambda: head + tail[:few] + tail,
        "digit": lambda: head + rng.choice([b"9", b"-", b"e", b".", b"0", b" ", b"\n"]) + tail[1:],
    }[kind]()
    return changed, f"{kind} at {at}, {few}"


def attack_bytes(work: Path, config: Config) -> Iterator[Attempt]:
    """Changed bytes of every format."""
    count = 60 if config.quick else 600
    for target in make_targets(work):
        if config.formats and not target.name.startswith(config.formats):
            continue
        content, sound = target.file.read_bytes(), target.read(target.path)

        def attempt(index: int, target=target, content=content, sound=sound) -> Outcome:
            rng = random.Random(f"{config.seed} {target.name} {index}")
            changed, what = mutate(content, rng)
            target.file.write_bytes(changed)
            outcome, detail = judge(target, sound)
            return outcome, f"number {index} ({what}) {detail}"

        yield from try_forked(target.name, count, attempt)
        target.file.write_bytes(content)


def judge(target: Target, sound: Found) -> Outcome:
    """Read once and compare with the sound file, else with what an independent reader finds."""
    try:
        found = target.read(target.path)
    except InputError as error:
        named = target.path.name in str(error) or target.file.name in str(error)
        return (REFUSED if named else "not named"), str(error)[:300]
    if not target.judged:
        return SOUND, ""
    fault = compare(found, sound)
    if fault and target.theirs and (other := target.theirs(target)) is not None:
        fault = compare(found, other)
    return fault or SOUND, ""


def compare(found: Found, expected: Found) -> str:
    """What is wrong, "" if nothing; a grid that differs with a word of warning is not."""
    if isinstance(expected.array, np.ndarray):
        told = bool(found.notes)
        if found.array.shape != expected.array.shape or not (
            told or np.allclose(found.affine, expected.affine, rtol=1e-5, atol=1e-3)
        ):
            return "wrong grid"
        near = np.allclose if found.array.dtype == np.float32 else np.array_equal  # it rounds
        return "" if near(found.array, expected.array) else "wrong voxels"
    return "" if same_content(found.array, expected.array) else "wrong voxels"


def same_content(a: Any, b: Any) -> bool:
    """Whether nested plain content, of a checkpoint, is the same."""
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and torch.equal(a, b)
    if isinstance(b, dict):
        return (
            isinstance(a, dict)
            and a.keys() == b.keys()
            and all(same_content(a[key], b[key]) for key in b)
        )
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_content, a, b))
    return type(a) is type(b) and a == b


# -- sound files of every format


def make_targets(work: Path) -> list[Target]:
    """A sound file of each format in `work`, and how it is read."""
    array = np.asfortranarray(np.arange(1, np.prod(SHAPE) + 1).reshape(SHAPE), dtype=np.int16)
    affine = np.diag([1.5, 1.5, 2.5, 1.0])
    affine[:3, 3] = 11, -22, 33
    targets = []
    for name in ("a.nii", "b.nii.gz"):
        image = nib.Nifti1Image(array, affine)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        nib.save(image, work / name)
        theirs = ask_nibabel if name == "a.nii" else None
        targets.append(Target(name[1:], work / name, work / name, read_volume, theirs))
    return [*targets, *_itk_targets(work, array, affine), *_dicom_targets(work, array),
            *_own_targets(work)]  # fmt: skip


def _itk_targets(work: Path, array: np.ndarray, affine: np.ndarray) -> Iterator[Target]:
    import SimpleITK

    lps = TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(array.T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    for name in ("c.mha", "d.mhd", "e.nrrd", "f.nhdr"):
        for packed in (False, True):
            path = work / f"{'packed' if packed else 'raw'}_{name}"
            SimpleITK.WriteImage(image, str(path), useCompression=packed)
            row = f".{name[2:]} {'compressed' if packed else 'raw'}"
            yield Target(row, path, path, read_volume, ask_itk)
            for file in volumes.list_data_files(path)[1:]:
                yield Target(f"{row}, its voxels", path, file, read_volume, ask_itk)


def _dicom_targets(work: Path, array: np.ndarray) -> Iterator[Target]:
    folder = work / "series"
    write_series(folder, array)
    one = sorted(folder.iterdir())[1]
    yield Target("DICOM slice", folder, one, read_volume, judged=False)
    scan, seg = dicom.read_series(folder), work / "seg.dcm"
    label = scan.like((scan.read() > 600).astype(np.uint8))
    dicom.write_seg(label, scan, USUAL_LABELS, seg)

    def read_seg(path: Path) -> Found:
        found = cases.read_label_map(path, scan, USUAL_LABELS)
        return Found(found.read(), found.affine, found.notes)

    yield Target("DICOM SEG", seg, seg, read_seg, judged=False)


def _own_targets(work: Path) -> Iterator[Target]:
    path = work / "best.pt"
    write_checkpoint(path)
    yield Target("checkpoint", path, path, lambda p: Found(utilities.load_checkpoint(p)))
    yield _cache_target(work / "cached")


def _cache_target(folder: Path) -> Target:
    """A file of --disk-cache: a damaged one is made again."""
    rng = np.random.default_rng(0)
    scan = Volume(rng.integers(-200, 250, (16, 16, 8)).astype(np.int16), np.diag([2, 2, 2, 1]))
    scan.write(folder / "image.nii")
    scan.like((scan.read() > 100).astype(np.uint8)).write(folder / "label.nii")
    chain = pick(
        Chain, train.Config(input_size=(16, 16)), labels=USUAL_LABELS, ignore=(), crop_to_body=False
    )
    item = {IMAGE: str(folder / "image.nii"), LABEL: str(folder / "label.nii"), "content": "x"}
    item["index"] = 0
    cpu = torch.device("cpu")

    def read(_: Path) -> Found:
        made = read_or_make(deterministic_chain(chain, cpu), chain, folder / "cache", cpu, item)
        return Found({key: made[key] for key in (IMAGE, LABEL)})

    read(folder)
    (path,) = (folder / "cache").iterdir()
    return Target("disk cache", path, path, read)


def write_checkpoint(path: Path) -> None:
    """A small sound checkpoint."""
    state = {"weight": torch.arange(600.0), "bias": torch.zeros(8)}
    utilities.save_checkpoint(
        path,
        network_args={"name": "unet3d"},
        network_state=state,
        preprocessing={"labels": USUAL_LABELS},
        inference={"window": (8, 8, 8), "overlap": 0.5},
        declared=USUAL_LABELS,
        modality="CT",
        config={},
        epoch=1,
        val_dice=0.5,
        history=[{"epoch": 1.0}],
    )


def write_series(folder: Path, array: np.ndarray) -> None:
    """A CT series of int16 (X, Y, Z), a file per slice, with a patient's name in it."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for z in range(array.shape[2]):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
        header.SeriesInstanceUID, header.StudyInstanceUID = series, study
        header.FrameOfReferenceUID, header.Modality, header.InstanceNumber = frame, "CT", z
        header.PatientName, header.PatientID, header.SeriesNumber = SECRET, SECRET, 1
        header.SliceThickness, header.Manufacturer = 2.5, "none"
        header.Rows, header.Columns = array.shape[1], array.shape[0]
        header.PixelSpacing, header.ImageOrientationPatient = [1.5, 1.5], [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [0.0, 0.0, 2.5 * z]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelRepresentation, header.RescaleSlope, header.RescaleIntercept = 1, 1, 0
        header.PixelData = np.ascontiguousarray(array[:, :, z].T).tobytes()
        header.save_as(folder / f"{z:03d}.dcm", enforce_file_format=True)


# -- readers: ours by the door, and independent ones


def read_volume(path: Path) -> Found:
    """By the door, as every script reads."""
    volume = cases.read_volume(path)
    return Found(volume.read(), volume.affine, volume.notes)


def ask_nibabel(target: Target) -> Found | None:
    """What nibabel makes of a NIfTI file whose header has no checksum."""
    try:
        image = nib.load(target.path)
        array = np.asanyarray(image.dataobj)
        return Found(array.reshape(array.shape[:3]), image.affine)
    except Exception:
        return None


def ask_itk(target: Target) -> Found | None:
    """What SimpleITK makes of a file, in a child of its own: it dies of some headers."""

    def read(write: Callable[[Any], None]) -> None:
        import SimpleITK

        image = SimpleITK.ReadImage(str(target.path))
        columns = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine = TO_LPS @ nib.affines.from_matvec(columns, image.GetOrigin())
        write(Found(SimpleITK.GetArrayFromImage(image).T, affine))

    items, _ = in_child(read)
    return items[0] if items else None
