"""The door for DICOM: series → `Volume`, SEG ↔ label map, scan → series. After it nobody asks.

As a script it converts:

    python -m data.dicom to-nifti SERIES OUT.nii.gz             a series (folder or a slice of it)
    python -m data.dicom to-series SCAN.nii.gz FOLDER           a scan as CT series, of nobody
    python -m data.dicom to-seg LABEL.nii.gz SERIES OUT.dcm     a label map as SEG of a series
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from data.files import InputError
from data.headers import (
    has_place,
    is_dicom,
    is_picture,
    is_seg_header,
    list_images,
    list_items,
    name_object,
    read_header,
    read_text,
)
from data.labels import BACKGROUND, Labels
from data.seg import choose_segment_values, read_seg, read_segments, write_seg
from data.series import TILT, read_series
from data.settings import run_script
from data.volumes import TO_LPS, Volume, read_file

__all__ = [
    "DicomItem", "choose_segment_values", "find_dicom", "is_dicom", "is_dicom_input",
    "list_series_files", "read_seg", "read_segments", "read_series", "write_seg", "write_series",
]  # fmt: skip


# ---------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------


def is_dicom_input(path: Path) -> bool:
    """Whether a path is a DICOM file, or a folder with DICOM files directly in it."""
    if path.is_dir():
        return any(is_dicom(file) for file in path.iterdir() if file.is_file())
    return path.is_file() and is_dicom(path)


Picture = tuple[Path, str, tuple[Path, str], bool]  # file, patient, series, no place by nature


@dataclass(frozen=True)
class DicomItem:
    """A series or a SEG that was found, and the path to read it by; or a file that is unusable."""

    path: Path  # a series' folder if it holds no other, else one of its files; a SEG's file
    uid: str  # of the series; of a SEG: of the series that it was drawn on, "" where it names none
    patient: str = ""  # PatientID, to keep a patient's scans together; never written anywhere
    images: int = 0  # slices of a series
    segments: dict[str, int] = field(default_factory=dict)  # name → number, of a SEG
    files: tuple[Path, ...] = ()  # all files of it
    fault: str = ""  # why it cannot be used
    is_seg: bool = False


def find_dicom(files: Iterable[Path]) -> list[DicomItem]:
    """The series, SEGs and unusable DICOM files among some files; each is opened once.

    Other objects (contours, reports, DICOMDIR) and pictures without a place are left out.
    """
    series: defaultdict[tuple[Path, str], list[Picture]] = defaultdict(list)
    items: list[DicomItem] = []
    unplaced: list[Picture] = []
    found = [path for path in sorted(set(files)) if path.is_file() and is_dicom(path)]
    for path in tqdm(found, desc="DICOM headers", disable=None):
        try:
            with warnings.catch_warnings(action="ignore"):  # pydicom's, of values that we check
                header = read_header(path)
                if is_seg_header(header):
                    items.append(_describe_seg(path, header))
                elif not name_object(header):
                    key = path.parent, read_text(header, "SeriesInstanceUID")
                    (series[key] if has_place(header) else unplaced).append(
                        (path, read_text(header, "PatientID"), key, is_picture(header))
                    )
        except Exception as error:  # one bad file never stops the others
            items.append(DicomItem(path, "", files=(path,), fault=_explain(path, error)))
    for entry in unplaced:  # slices without their position: reading the series says so
        if not entry[3]:
            series[entry[2]].append(entry)
    in_folder = Counter(folder for folder, _ in series)
    for (folder, uid), slices in series.items():
        path = folder if in_folder[folder] == 1 else slices[0][0]
        paths = tuple(sorted(entry[0] for entry in slices))
        items.append(DicomItem(path, uid, slices[0][1], len(slices), files=paths))
    return items


def _describe_seg(path: Path, header: Any) -> DicomItem:
    referenced = list_items(header, "ReferencedSeriesSequence")
    uid = read_text(referenced[0], "SeriesInstanceUID") if referenced else ""
    patient, segments, fault = read_text(header, "PatientID"), {}, ""
    try:
        segments = read_segments(header, path)
    except Exception as error:
        fault = _explain(path, error)
    return DicomItem(path, uid, patient, 0, segments, (path,), fault, is_seg=True)


def _explain(path: Path, error: Exception) -> str:
    known = isinstance(error, InputError)
    return str(error) if known else f"{path}: cannot be read ({type(error).__name__}: {error})"


def list_series_files(path: Path) -> list[Path]:
    """Every file that is read for the path of a series (or SEG): of no other one beside it."""
    if path.is_file() and (not is_dicom(path) or name_object(read_header(path))):
        return [path]
    try:
        return sorted(list_images(path))
    except InputError:  # several series, or none: reading says so; a SEG's folder comes this way
        folder = path if path.is_dir() else path.parent
        return [file for file in sorted(folder.iterdir()) if file.is_file() and is_dicom(file)]


# ---------------------------------------------------------------------------------------
# Scan → series
# ---------------------------------------------------------------------------------------


def write_series(volume: Volume, folder: Path) -> list[Path]:
    """Write a scan as CT series of nobody ("anonymous"), and read it back; files feet to head.

    Slices are the planes nearest to axial. UIDs come from the content, so that one scan always
    gives the same series. Raises InputError where HU are no whole numbers of 16 bits, the grid is
    sheared (a series cannot say so) or `folder` is in use; then there is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: must be a new folder for the series; name another")
    ras = volume.ras
    stored = _as_int16(ras.data, volume.name)[::-1, ::-1]
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = [stored.shape[0] - 1, stored.shape[1] - 1]
    affine = TO_LPS @ ras.affine @ flip  # voxel (L, P, S) → LPS mm
    _refuse_sheared(volume.name, affine, stored.shape)
    partial = folder.with_name(f".{os.getpid()}.partial.{folder.name}")
    try:
        partial.mkdir(parents=True)
        names = [f"{z + 1:04d}.dcm" for z in range(stored.shape[2])]
        content = hashlib.sha256(np.ascontiguousarray(affine).data).hexdigest()
        content += _hash_array(stored)
        for z, name in enumerate(names):
            header = _build_slice(stored[:, :, z], affine, z, content)
            header.save_as(partial / name, enforce_file_format=True)
        again = read_series(partial)
        same = np.array_equal(again.read(), stored)
        if not same or np.abs(TO_LPS @ again.affine - affine).max() > 1e-3:
            raise InputError(f"{folder}: the scan changed in writing; nothing was kept")
        if folder.exists():
            folder.rmdir()  # empty: see above
        partial.rename(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); choose a folder that is "
            "writable and has free space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def _as_int16(array: np.ndarray, name: str) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    whole = array.dtype.kind != "f" or np.array_equal(array, np.rint(array))
    if not whole or low < -32768 or high > 32767:
        raise InputError(
            f"{name}: a series holds whole HU from -32768 to 32767, got "
            f"{f'{low:g} to {high:g}' if whole else 'fractions'}; round or rescale it first",
            kind="hu",
        )
    return array.astype(np.int16)


def _refuse_sheared(name: str, affine: np.ndarray, shape: tuple[int, ...]) -> None:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > TILT or shape[2] < 2:
        found = f"axes that are {shear:.2g} off a right angle (cosine)"
        raise InputError(
            f"{name}: a series needs 2 slices or more and perpendicular axes, got {shape[2]} and "
            f"{found}; resample it to a straight grid first",
            kind="grid",
        )


def _hash_array(array: np.ndarray) -> str:
    digest = hashlib.sha256(str(array.shape).encode())
    for z in range(array.shape[2]):
        digest.update(np.ascontiguousarray(array[:, :, z]).data)
    return digest.hexdigest()


def _build_slice(plane: np.ndarray, affine: np.ndarray, z: int, content: str) -> Any:
    """One CT image of a plane (columns, rows) of HU; `content` is what its UIDs are made of."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    from pydicom.valuerep import format_number_as_ds as ds

    columns, rows = plane.shape
    across, down, _ = np.linalg.norm(affine[:3, :3], axis=0)
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    uid = generate_uid(entropy_srcs=[content, f"slice {z}"])
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = uid
    for name in ("Study", "Series"):
        setattr(header, f"{name}InstanceUID", generate_uid(entropy_srcs=[content, name]))
    header.FrameOfReferenceUID = generate_uid(entropy_srcs=[content, "frame"])
    header.PatientName = header.PatientID = "anonymous"
    for key in (
        "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID",
        "ReferringPhysicianName", "Manufacturer", "PositionReferenceIndicator", "KVP",
        "AcquisitionNumber",
    ):  # fmt: skip
        setattr(header, key, None)
    header.Modality, header.SeriesNumber, header.InstanceNumber = "CT", 1, z + 1
    header.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    header.Rows, header.Columns = rows, columns
    header.PixelSpacing = [ds(float(down)), ds(float(across))]
    header.SliceThickness = ds(float(np.linalg.norm(affine[:3, 2])))
    axes = [*(affine[:3, 0] / across), *(affine[:3, 1] / down)]
    header.ImageOrientationPatient = [ds(float(number)) for number in axes]
    position = affine[:3, 3] + z * affine[:3, 2]
    header.ImagePositionPatient = [ds(float(number)) for number in position]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = 1
    header.RescaleIntercept, header.RescaleSlope, header.RescaleType = 0, 1, "HU"
    header.PixelData = np.ascontiguousarray(plane.T).astype("<i2").tobytes()
    return header


# ---------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------


def convert_to_nifti(series: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> None:
    """A series as NIfTI, HU as stored.

    Args:
        series: folder of the series, or one of its slices.
        out: .nii.gz or .nii to write.
    """
    if not out.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{out}: must end in .nii.gz or .nii, got {out.suffix or 'no ending'}")
    volume = read_series(series)
    volume.write_checked(out)
    print("\n".join([*volume.notes, f"{out}: {volume.shape} voxels"]))
    print(f"next: python apply_model.py {out} --checkpoint checkpoints/starter.pt")


def convert_to_series(scan: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path]) -> None:
    """A scan as CT series with its own UIDs, of a patient named anonymous.

    Args:
        scan: .nii.gz, .mha, .nrrd: HU in whole numbers.
        folder: new folder for the slices.
    """
    volume = read_file(scan)
    files = write_series(volume, folder)
    if not volume.oriented:
        print(f"{scan}: does not say how its axes lie (form codes 0); check left and right")
    print(f"{folder}: {len(files)} slices")
    print(f"next: python apply_model.py {folder} --checkpoint checkpoints/starter.pt --dicom-seg")


def convert_to_seg(
    label: tyro.conf.Positional[Path],
    series: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    labels: dict[str, int] = {"liver": 1, "tumour": 2},  # noqa: B006 (tyro shows it)
) -> None:
    """A label map as DICOM SEG that refers to a series.

    Args:
        label: .nii.gz of the grid of the series.
        series: folder of the series, or one of its slices.
        out: .dcm to write.
        labels: name and value of each class: liver 1 tumour 2.
    """
    scan, label_map = read_series(series), read_file(label)
    turned = _turn_like(label_map, scan)
    classes: Labels = {BACKGROUND: (0,), **{name: (value,) for name, value in labels.items()}}
    if odd := sorted(set(np.unique(turned.read()).tolist()) - {0, *labels.values()}):
        raise InputError(f"{label}: holds {odd[:5]}, expected {labels}; name them by --labels")
    turned = turned.like(turned.read().astype(np.uint16))  # of a file that holds 1.0, too
    if reasons := write_seg(turned, scan, classes, out):
        raise InputError(f"{out}: {'; '.join(reasons)}")
    print(f"{out}: {len(labels)} segments of {series}")
    print(f"next: load {series} and {out} together in your viewer, 3D Slicer for one")


def _turn_like(label: Volume, scan: Volume) -> Volume:
    """A label map of exactly the grid of `scan`, in the scan's axes."""
    same = label.ras_shape == scan.ras_shape and np.allclose(
        label.ras_affine, scan.ras_affine, rtol=0, atol=0.01 * min(scan.spacing_mm)
    )
    if not same:
        raise InputError(
            f"{label.name}: lies not on the grid of {scan.name} ({label.ras_shape} and "
            f"{scan.ras_shape} voxels); use the label map of this series",
            kind="grid",
        )
    return scan.from_ras(label.ras.data)


def main() -> None:
    """Run the command that was asked for; a user's fault ends in one line, exit code 1."""
    commands: dict[str, Callable[..., None]] = {
        "to-nifti": convert_to_nifti,
        "to-series": convert_to_series,
        "to-seg": convert_to_seg,
    }
    run_script(
        lambda about: tyro.extras.subcommand_cli_from_dict(commands, description=about), __doc__
    )


if __name__ == "__main__":
    main()
