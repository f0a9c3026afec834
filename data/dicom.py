"""The door for DICOM: series → `Volume`, SEG ↔ label map. After it nobody asks for DICOM."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from data.labels import Labels, find_label, index_classes, is_tumour
from data.volumes import TO_LPS, Volume
from utilities import InputError, atomic_write, class_colour

SEGMENT_VALUE = "label value {}"  # in a DICOM SEG, whose own numbers must run from 1


def is_dicom(path: Path) -> bool:
    """True for a DICOM file (part 10: `DICM` after 128 bytes), whatever its name."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def is_dicom_input(path: Path) -> bool:
    """Whether a path is a DICOM file or a folder with DICOM files in it."""
    return path.is_dir() or (path.is_file() and is_dicom(path))


def read_headers(folder: Path) -> dict[Path, Any]:
    """File → header, without pixels, of the DICOM files in `folder` (not below it)."""
    import pydicom

    files = [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path)]
    return {path: pydicom.dcmread(path, stop_before_pixels=True) for path in files}


# ---------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DicomItem:
    """A series or a SEG that was found, and the path to read it by."""

    path: (
        Path  # the series' folder if it holds no other series, else one of its files; a SEG's file
    )
    uid: str  # of the series; of a SEG: of the series that it was drawn on, "" where it names none
    patient: str = ""  # PatientID, to keep a patient's scans together; never written anywhere
    images: int = 0  # slices of a series
    segments: dict[str, int] = field(default_factory=dict)  # name → number, of a SEG

    @property
    def is_seg(self) -> bool:
        return bool(self.segments)


def find_dicom(files: Iterable[Path]) -> list[DicomItem]:
    """The series and SEGs among some files, each series once, with its folder."""
    series, items = defaultdict(list), []
    for folder in tqdm(sorted({path.parent for path in files}), desc="DICOM folders", disable=None):
        for path, header in read_headers(folder).items():
            if header.get("Modality") == "SEG":
                uid = header.ReferencedSeriesSequence[0].SeriesInstanceUID
                items.append(DicomItem(path, str(uid), segments=read_segments(header)))
            elif "ImagePositionPatient" in header:
                patient = str(header.get("PatientID", ""))
                series[folder, str(header.SeriesInstanceUID)].append((path, patient))
    in_folder = Counter(folder for folder, _ in series)
    for (folder, uid), slices in series.items():
        path = folder if in_folder[folder] == 1 else slices[0][0]
        items.append(DicomItem(path, uid, slices[0][1], len(slices)))
    return items


# ---------------------------------------------------------------------------------------
# Series
# ---------------------------------------------------------------------------------------


def read_series(path: Path) -> Volume:
    """The series in a folder, or that of one of its files, in HU, slices in the order of position.

    `notes` says what was left out, `files` has the files in the order of the slices. Raises
    InputError where there is no or more than one series, or no regular grid.
    """
    headers = read_headers(path if path.is_dir() else path.parent)
    slices = {file: h for file, h in headers.items() if "ImagePositionPatient" in h}
    if path.is_file() and path in slices:
        uid = slices[path].SeriesInstanceUID
        slices = {file: h for file, h in slices.items() if h.SeriesInstanceUID == uid}
    series = {h.SeriesInstanceUID for h in slices.values()}
    if len(series) != 1:
        raise InputError(
            f"{path}: must hold one DICOM series of single slices, got {len(series)}; give the "
            "path of one slice of the series you mean, or convert it to NIfTI"
        )
    copies = {str(h.file_meta.MediaStorageSOPInstanceUID): file for file, h in slices.items()}
    notes = [f"{len(slices) - len(copies)} copies of slices left out"] * (len(slices) > len(copies))
    ordered, affine = _series_grid(path, {f: slices[f] for f in copies.values()}, notes)
    voxels = _series_voxels(ordered)
    return Volume(voxels, affine, str(path), notes=tuple(notes), files=tuple(ordered))


def _series_grid(
    path: Path, slices: dict[Path, Any], notes: list[str]
) -> tuple[list[Path], np.ndarray]:
    """Files in order and affine (RAS) of a series, or the reason why it is not one regular grid.

    Position along the normal decides (DICOM PS3.3 C.7.6.2.1.1), never file name or SliceThickness.
    """

    def frame(header: Any) -> tuple[float, ...]:
        axes = np.round(np.array(header.ImageOrientationPatient, float), 3) + 0.0
        return (*axes, header.Rows, header.Columns, *map(float, header.PixelSpacing))

    frames = Counter(frame(header) for header in slices.values())
    (main, count), *others = frames.most_common()
    strays = sum(number for _, number in others)
    if strays * 4 > count or count < 2:
        raise InputError(
            f"{path}: must be one stack of parallel slices, got {len(frames)} orientations, sizes "
            f"with {sorted(frames.values(), reverse=True)} slices; move one stack to its own folder"
        )
    if strays:
        notes.append(f"{strays} images of another orientation or size left out")
    kept = {file: header for file, header in slices.items() if frame(header) == main}
    first = next(iter(kept.values()))
    across, down = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(across, down)
    along = {f: normal @ np.array(h.ImagePositionPatient, float) for f, h in kept.items()}
    ordered = sorted(kept, key=along.__getitem__)
    positions = np.array([kept[file].ImagePositionPatient for file in ordered], float)
    step = (positions[-1] - positions[0]) / (count - 1)
    _refuse_irregular(path, positions @ normal, step, normal)
    down_mm, across_mm = map(float, first.PixelSpacing)
    columns = np.stack([across * across_mm, down * down_mm, step], axis=1)
    return ordered, TO_LPS @ nib.affines.from_matvec(columns, positions[0])


def _refuse_irregular(path: Path, along: np.ndarray, step: np.ndarray, normal: np.ndarray) -> None:
    """Raise InputError for slices (sorted positions in mm) that one affine cannot describe."""
    gaps, spacing, reasons = np.diff(along), float(step @ normal), []
    if (gaps < 0.01).any():
        reasons.append(f"{(gaps < 0.01).sum()} slices share a position: several acquisitions")
    elif np.abs(along - along[0] - spacing * np.arange(len(along))).max() > 0.05 * spacing:
        reasons.append(f"uneven gaps of {gaps.min():.2f} to {gaps.max():.2f} mm between slices")
    sideways = np.linalg.norm(step - spacing * normal) / max(spacing, 1e-6)
    if sideways > 0.002 and spacing > 0.01:
        reasons.append(f"gantry tilt of {np.degrees(np.arctan(sideways)):.1f}°")
    if reasons:
        raise InputError(
            f"{path}: the series is not one regular grid ({'; '.join(reasons)}); split it or "
            "resample it first (dcm2niix does)"
        )


def _series_voxels(files: Sequence[Path]) -> np.ndarray:
    """HU (X, Y, Z) of slices: stored value × RescaleSlope + RescaleIntercept; int16 if it fits."""
    import pydicom

    array = None
    for index, file in enumerate(files):
        header = pydicom.dcmread(file)
        slope, intercept = header.get("RescaleSlope", 1), header.get("RescaleIntercept", 0)
        slope, intercept = float(slope), float(intercept)
        try:
            plane = header.pixel_array.T
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{file}: its pixels cannot be decoded ({error}); convert the series to NIfTI first"
            ) from error
        whole = slope.is_integer() and intercept.is_integer()
        plane = plane.astype(np.int32 if whole else np.float32)
        plane = plane * plane.dtype.type(slope) + plane.dtype.type(intercept)
        if array is None:
            array = np.empty((*plane.shape, len(files)), np.int16, order="F")
        if array.dtype == np.int16 and (
            not whole or not -32768 <= plane.min() <= plane.max() <= 32767
        ):
            array = array.astype(np.float32)
        array[:, :, index] = plane
    return array


# ---------------------------------------------------------------------------------------
# Segmentations
# ---------------------------------------------------------------------------------------


def read_seg(path: Path, scan: Volume, declared: Labels) -> Volume:
    """A DICOM SEG (its file, or the folder of one) as a label map on the grid of `scan`.

    Values: see `choose_segment_values`; `classes` of the result has them by the segments' names.
    """
    import highdicom

    try:
        file = highdicom.seg.segread(path)
        segments = file.get_volume(combine_segments=True)
        grid = highdicom.VolumeGeometry(
            TO_LPS @ scan.affine, scan.shape, "PATIENT", segments.frame_of_reference_uid
        )
        array = segments.match_geometry(grid, tol=1e-2).array
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: not a DICOM SEG on the grid of its scan ({error}); export it again from the "
            "series it belongs to, or as NIfTI"
        ) from error
    values = choose_segment_values(read_segments(file), declared)
    table = np.zeros(int(array.max(initial=0)) + 1, np.min_scalar_type(max(values.values())))
    for segment in file.SegmentSequence:
        if segment.SegmentNumber < len(table):
            table[segment.SegmentNumber] = values[str(segment.SegmentLabel)]
    if not np.array_equal(table, np.arange(len(table))):
        array = table[array]
    label = Volume(np.asfortranarray(array), scan.affine, str(path), classes=values)
    return replace(label, header=scan.header, oriented=scan.oriented)


def read_segments(header: Any) -> dict[str, int]:
    """Name → number of a DICOM SEG's segments.

    Numbers must run from 1; where a label value is another one, the segment's description tells it,
    as `write_seg` writes it.
    """
    numbers: dict[str, int] = {}
    for segment in header.SegmentSequence:
        told = re.fullmatch(SEGMENT_VALUE.format(r"(\d+)"), segment.get("SegmentDescription") or "")
        number = int(told[1]) if told else int(segment.SegmentNumber)
        numbers.setdefault(str(segment.SegmentLabel), number)
    return numbers


def choose_segment_values(segments: Mapping[str, int], declared: Labels) -> dict[str, int]:
    """Label value of each segment: of a declared name, or a synonym of one, its first value.

    Any other name keeps its number, or gets a value of its own where that number is taken: SEGs of
    one data set may number the same organs differently.
    """
    known = {name: find_label(name, declared) for name in segments}
    values = {name: declared[label][0] for name, label in known.items() if label is not None}
    own = {value for some in declared.values() for value in some}
    for name, number in segments.items():
        if name not in values:
            taken = set(values.values()) | own
            values[name] = number if number not in taken else max(taken) + 1
    return values


NEEDED_BY_SEG = (
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID",
)  # fmt: skip
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime",
)  # fmt: skip


def write_seg(label: Volume, scan: Volume, classes: Labels, path: Path) -> list[str]:
    """Write a label map as DICOM SEG of the series that `scan` was read from, and read it back.

    Returns why there is none, if so: the scan is no series, or not one that can be referred to.
    """
    import highdicom
    import pydicom
    import torch

    files = scan.files
    if not files:
        return ["no DICOM SEG: the scan is no DICOM series"]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    if lacking := [key for key in NEEDED_BY_SEG if not headers[0].get(key)]:
        return [f"no DICOM SEG: the series has no {', '.join(lacking)} to refer to"]
    for header, key in itertools.product(headers, MAY_BE_EMPTY):
        header.setdefault(key, None)
    array = index_classes(label.read(), classes)
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that are no person's
            result = highdicom.seg.Segmentation(
                headers,
                array.T,  # (frames, rows, columns): as the slices are stored
                "BINARY",  # what most viewers read
                [_describe_segment(i, *item) for i, item in enumerate(classes.items()) if i],
                series_instance_uid=highdicom.UID(),
                series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
                series_description="segmentation",
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="apply_model.py",
                manufacturer_model_name="apply_model.py",
                software_versions=torch.__version__,
                device_serial_number="none",
                omit_empty_frames=bool(array.any()),  # a SEG must have a frame
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"no DICOM SEG: the headers of the series are not sound ({error})"]
    with atomic_write(path) as temporary:
        result.save_as(temporary)
        written = read_seg(temporary, scan, {name: raw[:1] for name, raw in classes.items()})
        if not np.array_equal(written.read(), label.read()):
            raise InputError(f"{path}: voxels changed in writing; nothing was kept")
    return []


def _describe_segment(number: int, name: str, values: Sequence[int]) -> Any:
    """A class as a segment of a DICOM SEG, with its SNOMED code; `Organ` where none is known."""
    import highdicom
    import torch
    from matplotlib.colors import to_rgb
    from pydicom.sr.codedict import codes

    rgb = to_rgb(class_colour(number))
    kind, what = codes.SCT.AnatomicalStructure, name.title().replace(" ", "")
    what = getattr(codes.SCT, what, codes.SCT.Organ)
    if is_tumour(name):
        kind, what = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm
    segment = highdicom.seg.SegmentDescription(
        number,
        name,
        kind,
        what,
        "AUTOMATIC",
        highdicom.AlgorithmIdentificationSequence(
            "apply_model.py", codes.DCM.ArtificialIntelligence, torch.__version__
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*(255 * c for c in rgb)),
    )
    segment.SegmentDescription = SEGMENT_VALUE.format(values[0])
    return segment
