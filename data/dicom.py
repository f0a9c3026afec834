"""Read a DICOM series as a `Volume`, write a `Volume` as a series, list what a folder holds."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from data.files import InputError
from data.labels import WORD, name_words
from data.volumes import TO_LPS, Volume

SEGMENT_VALUE = "label value {}"  # in a DICOM SEG, whose own numbers must run from 1
# What a segment is (SegmentedPropertyTypeCode: SNOMED CT, SNOMED RT) where its label does not say.
CODES = {
    "10200004": "liver", "T-62000": "liver",
    "108369006": "tumour", "4147007": "tumour", "52988006": "tumour", "86049000": "tumour",
    "14799000": "tumour", "25370001": "tumour", "126851005": "tumour", "128462008": "tumour",
    "M-80000": "tumour", "M-80003": "tumour", "M-03000": "tumour", "M-01000": "tumour",
}  # fmt: skip


# ---------------------------------------------------------------------------------------
# Segments
# ---------------------------------------------------------------------------------------


def read_segments(header: Any, file: Path) -> dict[str, int]:
    """Name → number of a DICOM SEG's segments; InputError where it has none.

    Numbers must run from 1; where a label value is another one, the segment's description tells it,
    as `write_seg` writes it.
    """
    numbers: dict[str, int] = {}
    for number, name, value in _list_segments(header, file):
        numbers.setdefault(name, number if value is None else value)
    return numbers


def _list_segments(header: Any, file: Path) -> list[tuple[int, str, int | None]]:
    """(number, name, value told by its description) of each segment."""
    segments = []
    for item in list_items(header, "SegmentSequence"):
        number = read_whole(item, file, "SegmentNumber", range(65536))
        told = re.fullmatch(
            SEGMENT_VALUE.format(r"(\d{1,5})"), read_text(item, "SegmentDescription")
        )
        if number == 0:  # LABELMAP describes its background too
            continue
        segments.append((number, _name_segment(item, number), int(told[1]) if told else None))
    if not segments:
        raise InputError(
            f"{file}: SegmentSequence must describe its segments, got none; the file is cut off or "
            "damaged, export it again"
        )
    return segments


def _name_segment(item: Any, number: int) -> str:
    """Its label, if that says something; else what its code means; `Segment 3` for want of both."""
    from pydicom.sr.codedict import codes

    label = read_text(item, "SegmentLabel")
    code = (list_items(item, "SegmentedPropertyTypeCodeSequence") or [{}])[0]
    meaning = CODES.get(read_text(code, "CodeValue"), "")
    known = set(name_words(label)) & {*WORD.values()} or hasattr(
        codes.SCT, label.title().replace(" ", "")
    )
    return (label if known else meaning or label) or f"Segment {number}"


NO_SCANS = (
    "SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "PR", "SR", "KO", "REG", "DOC", "FID",
)  # fmt: skip
DICOMDIR = b"\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10"  # its SOP class, as files begin
# pydicom logs what it doubts of every tag; here each one that counts is checked and told by name.
logging.getLogger("pydicom").setLevel(logging.ERROR)
REMEDY = "export the series again from its source, or leave this file out"


def is_dicom(path: Path) -> bool:
    """True for a DICOM file (part 10: `DICM` after 128 bytes), whatever its name; no DICOMDIR."""
    try:
        if not path.is_file():  # a pipe would let us wait for ever
            return False
        with path.open("rb") as stream:
            start = stream.read(1024)
    except OSError:
        return False
    return start[128:132] == b"DICM" and DICOMDIR not in start


# ---------------------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------------------


def read_header(file: Path) -> Any:
    """Header of a DICOM file without its pixels. Raises InputError where it is cut or damaged."""
    import pydicom

    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
    except Exception as error:  # pydicom raises whatever damaged bytes lead it to
        raise InputError(
            f"{file}: its DICOM header cannot be read ({error}); the file is cut off or damaged, "
            "copy it again"
        ) from error
    torn = any(is_torn(element) for element in header.values())
    if torn or (not name_object(header) and "Rows" not in header):
        where = "inside a tag" if torn else "before Rows"
        raise InputError(
            f"{file}: its DICOM header ends {where}, expected an image; the file is cut off or "
            "damaged, copy it again or leave it out"
        )
    return header


def is_torn(element: Any) -> bool:
    """Whether an element as pydicom found it has fewer bytes than it says: the file ends there."""
    length, value = getattr(element, "length", None), getattr(element, "value", None)
    return isinstance(length, int) and isinstance(value, bytes) and len(value) < length < 2**32 - 1


def read_text(header: Any, tag: str) -> str:
    """A tag as text, "" where it is missing, empty or malformed: of tags that only describe."""
    try:
        value = header.get(tag)
    except Exception:
        return ""
    return "" if value is None else str(value).strip()


def read_numbers(
    header: Any, file: Path, tag: str, count: int = 1, default: Sequence[float] | None = None
) -> list[float]:
    """The `count` finite numbers of a header's tag, whatever its VR.

    `default` where it is missing or empty, else (and where it holds anything else) InputError.
    """
    try:
        value = header.get(tag)
    except Exception as error:  # of a value that its VR does not allow
        value = f"an unreadable value ({error})"
    many = [] if value is None or value == "" else value
    items = (
        list(many) if isinstance(many, Sequence) and not isinstance(many, str | bytes) else [many]
    )
    if not items and default is not None:
        return [float(number) for number in default]
    try:
        numbers = [float(item) for item in items]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        expected = "a number" if count == 1 else f"{count} numbers"
        found = str(value).replace("\n", " ")[:80] if items else "nothing"
        raise InputError(f"{file}: {tag} must be {expected}, got {found}; {REMEDY}")
    return numbers


def read_whole(
    header: Any, file: Path, tag: str, allowed: Sequence[int], default: int | None = None
) -> int:
    """The whole number of a header's tag, one of `allowed`; InputError for anything else."""
    (number,) = read_numbers(header, file, tag, 1, None if default is None else [default])
    if number not in allowed:
        wanted = allowed if len(allowed) < 9 else f"{allowed[0]} to {allowed[-1]}"
        raise InputError(f"{file}: {tag} must be {wanted}, got {number:g}; {REMEDY}")
    return int(number)


def name_object(header: Any) -> str:
    """What a DICOM object is, if it is no image: "SEG (Segmentation Storage)"; "" for an image."""
    modality, sop = read_text(header, "Modality"), name_class(header)
    if not sop and _class_uid(header) and "Rows" not in header:
        sop = "of a private class"
    other = (sop and "Image Storage" not in sop) or modality in NO_SCANS
    return f"{modality or 'object'} ({sop or 'of an unknown class'})" if other else ""


def is_seg_header(header: Any) -> bool:
    """Whether a header is one of a segmentation: voxels, not contours or surfaces."""
    sop = name_class(header)
    return sop in ("Segmentation Storage", "Label Map Segmentation Storage") or (
        not sop and read_text(header, "Modality") == "SEG"
    )


def name_class(header: Any) -> str:
    """Name of the SOP class, "" where it is missing or no standard one."""
    from pydicom.uid import UID

    sop = _class_uid(header)
    name = UID(sop).name
    return "" if name == sop else name


def _class_uid(header: Any) -> str:
    meta = getattr(header, "file_meta", {})
    return read_text(header, "SOPClassUID") or read_text(meta, "MediaStorageSOPClassUID")


def read_headers(files: Iterable[Path]) -> dict[Path, Any]:
    """File → header of the DICOM files among some."""
    return {file: read_header(file) for file in sorted(files) if file.is_file() and is_dicom(file)}


# ---------------------------------------------------------------------------------------
# Which files belong to a series
# ---------------------------------------------------------------------------------------


def list_images(path: Path) -> dict[Path, Any]:
    """File → header of the images of the one series in a folder, or of that of one of its files.

    Raises InputError where there is none or more than one, or `path` is another object.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not is_dicom(path):
        raise InputError(f"{path}: must be a DICOM file, got another (no DICM at byte 128)")
    asked = read_header(path) if path.is_file() else None
    if asked is not None and (other := name_object(asked)):
        raise InputError(
            f"{path}: must be an image of a scan, got a DICOM {other}; give the folder of the scan"
        )
    headers = read_headers(folder.iterdir())
    others = sorted({name for h in headers.values() if (name := name_object(h))})
    series: defaultdict[str, dict[Path, Any]] = defaultdict(dict)
    for file, header in headers.items():
        if not name_object(header):
            series[read_text(header, "SeriesInstanceUID")][file] = header
    if asked is not None:
        return series[read_text(asked, "SeriesInstanceUID")]
    placed = [uid for uid, images in series.items() if any(map(has_place, images.values()))]
    uids = placed or list(series)
    if len(uids) != 1:
        found = [f"{len(series[uid])} images like {next(iter(series[uid])).name}" for uid in uids]
        raise InputError(
            f"{path}: must hold one DICOM series of images (SeriesInstanceUID), got {len(uids)}"
            f" ({'; '.join(found or others) or 'no DICOM files'}); give the path of one slice of "
            "the series you mean, or convert it to NIfTI"
        )
    return series[uids[0]]


def has_place(header: Any) -> bool:
    """Whether an image says where it lies in the patient, rightly or wrongly."""
    return bool(
        "PerFrameFunctionalGroupsSequence" in header or read_text(header, "ImagePositionPatient")
    )


def is_picture(header: Any) -> bool:
    """Whether an image needs no place in the patient: screenshots, reports, overviews."""
    sop, kind = name_class(header), read_text(header, "ImageType")
    volume = not sop or any(word in sop for word in ("CT Image", "MR Image", "Positron"))
    return not has_place(header) and (not volume or "LOCALIZER" in kind or "SCREEN" in kind)


# ---------------------------------------------------------------------------------------
# Planes
# ---------------------------------------------------------------------------------------


def list_items(header: Any, tag: str) -> list[Any]:
    """Items of a sequence; none where it is missing, empty or malformed."""
    from pydicom import Sequence as Items

    try:
        value = header.get(tag)
    except Exception:
        return []
    return list(value) if isinstance(value, Items) else []


def find_group(groups: Sequence[Any], name: str) -> Any:
    """A functional group of a frame: its own, else the shared one; empty where there is none."""
    import pydicom

    found = [item for group in groups for item in list_items(group, name)[:1]]
    return found[0] if found else pydicom.Dataset()


def read_plane(
    file: Path, place: Any, turn: Any, measures: Any
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Position (3,), axes (2, 3) and spacing of a plane from the datasets that hold their tags."""
    position = np.array(read_numbers(place, file, "ImagePositionPatient", 3))
    axes = np.reshape(read_numbers(turn, file, "ImageOrientationPatient", 6), (2, 3))
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(axes[0] @ axes[1]) > 0.01:
        raise InputError(
            f"{file}: ImageOrientationPatient must be two perpendicular vectors of length 1, got "
            f"{axes.ravel().tolist()}; {REMEDY}"
        )
    down, across = read_numbers(measures, file, "PixelSpacing", 2)
    if min(down, across) <= 0:
        found = f"{down:g}, {across:g}"
        raise InputError(f"{file}: PixelSpacing must be positive, got {found}; {REMEDY}")
    return position, axes / lengths[:, None], (across, down)


FRAME_TOLERANCE = 0.5  # voxels that the corner of a slice may lie beside its place
UNEVEN, UNEVEN_MM = 0.1, 0.1  # that a slice may lie before or behind its place: of a gap, mm
TOLD_UNEVEN = 0.05  # of a gap, from which on it is told
TILT = 0.002  # sideways shift from slice to slice, of the gap: no gantry tilt is smaller
SAME_PLACE_MM = 0.01
AIR_HU, TISSUE_HU = -1024, 2000  # padding above the second is no tissue


# ---------------------------------------------------------------------------------------
# Slices
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Slice:
    """One plane of a series: where it lies (LPS mm) and how its stored numbers become HU."""

    file: Path
    frame: int | None  # of an enhanced multi-frame file
    position: np.ndarray  # (3,) centre of the first pixel
    axes: np.ndarray  # (2, 3) unit vectors along a row and down a column
    spacing: tuple[float, float]  # mm along a row and down a column
    size: tuple[int, int]  # columns, rows
    slope: float
    intercept: float
    rescaled: bool  # whether the header gives slope and intercept
    padding: tuple[float, float] | None  # stored values from … to, which are no tissue

    @property
    def normal(self) -> np.ndarray:
        """(3,) unit vector to the next slice."""
        return np.cross(*self.axes)


def list_slices(file: Path, header: Any) -> list[Slice]:
    """The slice of a file, or those of an enhanced multi-frame one. InputError names what lacks."""
    frames = list_items(header, "PerFrameFunctionalGroupsSequence")
    if not frames:
        return [_read_slice(file, None, header, [header])]
    shared = list_items(header, "SharedFunctionalGroupsSequence")[:1]
    return [_read_slice(file, i, header, [own, *shared]) for i, own in enumerate(frames)]


def _read_slice(file: Path, frame: int | None, header: Any, groups: Sequence[Any]) -> Slice:
    if frame is None:
        place = turn = measures = values = header
    else:
        names = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")
        place, turn, measures, values = (find_group(groups, f"{name}Sequence") for name in names)
    position, axes, spacing = read_plane(file, place, turn, measures)
    rows, columns = (read_whole(header, file, k, range(1, 65536)) for k in ("Rows", "Columns"))
    (slope,) = read_numbers(values, file, "RescaleSlope", default=[1])
    (intercept,) = read_numbers(values, file, "RescaleIntercept", default=[0])
    if slope == 0:
        raise InputError(f"{file}: RescaleSlope must not be 0; {REMEDY}")
    given = [read_text(values, tag) != "" for tag in ("RescaleSlope", "RescaleIntercept")]
    padding = read_numbers(header, file, "PixelPaddingValue", default=[math.nan])
    limit = read_numbers(header, file, "PixelPaddingRangeLimit", default=padding)
    span = None if math.isnan(padding[0]) else (min(padding + limit), max(padding + limit))
    size = (columns, rows)
    return Slice(file, frame, position, axes, spacing, size, slope, intercept, all(given), span)


# ---------------------------------------------------------------------------------------
# One stack
# ---------------------------------------------------------------------------------------


def order_slices(path: Path, notes: list[str]) -> list[Slice]:
    """The slices of a series in the order of position; `notes` gets what was left out.

    Raises InputError for what is not one stack of parallel slices.
    """
    images = list_images(path)
    pictures = [file for file, header in images.items() if is_picture(header)]
    if 0 < len(pictures) < len(images):
        notes.append(f"{len(pictures)} images without a position left out")
        images = {file: header for file, header in images.items() if file not in pictures}
    groups: list[list[Slice]] = []
    for one in (one for file, header in images.items() for one in list_slices(file, header)):
        near = [g for g in groups if measure_apart(one, g[0]) <= FRAME_TOLERANCE]
        near[0].append(one) if near else groups.append([one])
    groups.sort(key=len, reverse=True)
    main, strays = groups[0], [one for group in groups[1:] for one in group]
    if len(strays) * 4 > len(main) or len(main) < 2:
        raise InputError(
            f"{path}: must be one stack of parallel slices, got {len(groups)} orientations, sizes "
            f"with {[len(group) for group in groups]} slices (see {groups[-1][0].file.name}); move "
            "one stack to its own folder"
        )
    normal = main[0].normal
    ordered = _drop_copies(path, sorted(main, key=lambda one: normal @ one.position), notes)
    if strays:
        _refuse_lost_slices(ordered, strays)
        notes.append(f"{len(strays)} images of another orientation or size left out")
    return ordered


def measure_apart(one: Slice, other: Slice) -> float:
    """Voxels that the last corner of two slices would lie apart if the first lay on the first."""
    if one.size != other.size:
        return math.inf
    sides = [
        slice_.axes * np.array(slice_.spacing)[:, None] * (np.array(slice_.size)[:, None] - 1)
        for slice_ in (one, other)
    ]
    return float(np.linalg.norm(sides[0] - sides[1], axis=1).sum() / min(other.spacing))


def _are_equal(one: Slice, other: Slice) -> bool:
    (_, plane), (_, known) = read_planes([one, other])
    return np.array_equal(plane, known)


def _drop_copies(path: Path, ordered: list[Slice], notes: list[str]) -> list[Slice]:
    """Without the second of two slices of one place and equal voxels, whatever their UIDs say."""
    kept = ordered[:1]
    for one in ordered[1:]:
        before = kept[-1]
        if np.abs(one.position - before.position).max() >= SAME_PLACE_MM:
            kept.append(one)
        elif not _are_equal(before, one):
            gaps = np.diff([kept[0].normal @ each.position for each in ordered])
            raise InputError(
                f"{path}: the series is not one regular grid ({(gaps < SAME_PLACE_MM).sum()} "
                f"slices share a position: several acquisitions, as {before.file.name} and "
                f"{one.file.name}); split it or resample it first (dcm2niix does)"
            )
    if len(kept) < len(ordered):
        notes.append(f"{len(ordered) - len(kept)} copies of slices left out")
    return kept


def _refuse_lost_slices(ordered: Sequence[Slice], strays: Iterable[Slice]) -> None:
    """Raise InputError for a stray that is a slice of this stack: parallel, where none is yet."""
    first, normal = ordered[0], ordered[0].normal
    along = np.array([normal @ one.position for one in ordered])
    step = (along[-1] - along[0]) / max(len(along) - 1, 1)
    for one in strays:
        away = np.abs(along - normal @ one.position).min()
        if abs(one.normal @ normal) > 0.99 and 0.6 * step < away < 1.5 * step:
            raise InputError(
                f"{one.file}: a slice of the stack, but its Rows, Columns, PixelSpacing or "
                f"ImageOrientationPatient ({_describe_frame(one)}) differ from the others' "
                f"({_describe_frame(first)}); correct it, or move it elsewhere to leave it out"
            )


def _describe_frame(one: Slice) -> str:
    columns, rows = one.size
    across, down = one.spacing
    axes = ", ".join(f"{number:.6g}" for number in one.axes.ravel())
    return f"{rows}, {columns}; {down:.7g}, {across:.7g} mm; {axes}"


def build_affine(path: Path, ordered: Sequence[Slice], notes: list[str]) -> np.ndarray:
    """Affine (RAS) of a stack, or the reason why it is not one regular grid."""
    first, normal = ordered[0], ordered[0].normal
    positions = np.array([one.position for one in ordered])
    step = (positions[-1] - positions[0]) / max(len(ordered) - 1, 1)
    off = _refuse_irregular(path, positions, step, ordered)
    if off > TOLD_UNEVEN:
        notes.append(f"slices lie up to {off:.2g} of a gap beside even positions")
    columns = np.stack(
        [first.axes[0] * first.spacing[0], first.axes[1] * first.spacing[1], step], axis=1
    )
    if normal @ step <= 0:
        raise InputError(f"{path}: slices have no distance; convert the series to NIfTI first")
    return TO_LPS @ nib.affines.from_matvec(columns, positions[0])


def _refuse_irregular(
    path: Path, positions: np.ndarray, step: np.ndarray, ordered: Sequence[Slice]
) -> float:
    """Raise InputError for slices that one affine cannot describe; else how uneven, in gaps."""
    first, count = ordered[0], len(ordered)
    normal, reasons = first.normal, []
    along, spacing = positions @ normal, float(step @ normal)
    gaps = np.diff(along)
    beside = positions - positions[0] - step * np.arange(count)[:, None]
    ahead = np.abs(beside @ normal)
    beside = np.linalg.norm(beside - np.outer(beside @ normal, normal), axis=1)
    worst = ordered[int(np.argmax(gaps)) + 1].file.name
    if count < 2 or (gaps < SAME_PLACE_MM).any():
        reasons.append(f"{(gaps < SAME_PLACE_MM).sum()} slices share a position: several stacks")
    elif ahead.max() > max(UNEVEN * spacing, UNEVEN_MM + 1e-6):
        gap = f"{gaps.min():.2f} to {gaps.max():.2f} mm"
        reasons.append(f"uneven gaps of {gap} between slices, the widest before {worst}")
    elif beside.max() > FRAME_TOLERANCE * min(first.spacing):
        odd = ordered[int(np.argmax(beside))].file.name
        reasons.append(f"{odd} lies {beside.max():.2f} mm beside the stack (ImagePositionPatient)")
    sideways = float(np.linalg.norm(step - spacing * normal))
    rounding = 2 * UNEVEN_MM / max(count - 1, 1)  # of the first and the last position
    if sideways > max(TILT * spacing, rounding) and spacing > SAME_PLACE_MM:
        reasons.append(f"gantry tilt of {np.degrees(np.arctan(sideways / spacing)):.1f}°")
    if reasons:
        raise InputError(
            f"{path}: the series is not one regular grid ({'; '.join(reasons)}); split it or "
            "resample it first (dcm2niix does)"
        )
    return float(ahead.max() / spacing)


# ---------------------------------------------------------------------------------------
# Voxels
# ---------------------------------------------------------------------------------------


def read_series(path: Path) -> Volume:
    """The series in a folder, or that of one of its files, in HU, slices in the order of position.

    `notes` says what was left out or corrected, `files` has the files in the order of the slices.
    Raises InputError, and nothing else, where it cannot be read as one regular grid.
    """
    notes: list[str] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # pydicom's, of values that we check
            ordered = order_slices(path, notes)
            affine = build_affine(path, ordered, notes)
            voxels = _read_voxels(ordered, notes)
    except InputError:
        raise
    except Exception as error:  # a header that nobody thought of
        raise InputError(
            f"{path}: cannot be read as DICOM series ({type(error).__name__}: {error}); convert it "
            "to NIfTI first"
        ) from error
    files = tuple(dict.fromkeys(one.file for one in ordered))
    return Volume(voxels, affine, str(path), notes=tuple(notes), files=files)


def _read_voxels(ordered: Sequence[Slice], notes: list[str]) -> np.ndarray:
    """HU (X, Y, Z) of slices; int16 if they fit, else float32."""
    without = [one for one in ordered if not one.rescaled]
    if 0 < len(without) < len(ordered):
        raise InputError(
            f"{without[0].file}: RescaleSlope and RescaleIntercept must be numbers as in the other "
            f"slices, got nothing; {REMEDY}"
        )
    array: np.ndarray | None = None
    bright: list[tuple[int, float]] = []
    modality = ""
    for index, (header, plane) in enumerate(read_planes(ordered)):
        modality = read_text(header, "Modality")
        plane = _clear_padding(ordered[index], plane, modality, bright)
        if array is None:
            array = np.empty((*plane.shape, len(ordered)), np.int16, order="F")
        whole = plane.dtype.kind == "i"
        if array.dtype == np.int16 and (
            not whole or not -32768 <= plane.min() <= plane.max() <= 32767
        ):
            array = array.astype(np.float32)
        array[:, :, index] = plane
    if without and modality == "CT":
        notes.append("no RescaleSlope and RescaleIntercept: stored numbers are taken as HU")
    if bright:
        count, padding = sum(number for number, _ in bright), bright[0][1]
        notes.append(f"{count} voxels of padding (PixelPaddingValue, {padding:g} HU) are now air")
    assert array is not None  # a series has slices
    return array


def read_planes(slices: Iterable[Slice]) -> Iterable[tuple[Any, np.ndarray]]:
    """Yield header and HU (X, Y) of slices: stored × RescaleSlope + RescaleIntercept.

    int32 where slope and intercept are whole, else float32. A file is decoded once in a row.
    """
    file: Path | None = None
    header: Any = None
    stored: np.ndarray = np.empty(0)
    for one in slices:
        if one.file != file:
            file, (header, stored) = one.file, _decode(one.file)
        plane = stored if one.frame is None else stored[one.frame]
        if plane.shape[::-1] != one.size:
            raise InputError(
                f"{file}: PixelData must hold Columns × Rows = {one.size} pixels, got "
                f"{plane.shape[::-1]}; {REMEDY}"
            )
        whole = one.slope.is_integer() and one.intercept.is_integer() and plane.dtype.kind != "f"
        highest = 65536.0 if plane.itemsize < 4 else max(-float(plane.min()), float(plane.max()))
        fits = highest * abs(one.slope) + abs(one.intercept) < 2**31
        kind = np.int32 if whole and fits else np.float32
        yield header, plane.T.astype(kind) * kind(one.slope) + kind(one.intercept)


def _decode(file: Path) -> tuple[Any, np.ndarray]:
    """Header and stored numbers of a file: (rows, columns), or (frames, rows, columns)."""
    import pydicom

    try:
        header = pydicom.dcmread(file)
        bits = read_whole(header, file, "BitsAllocated", (8, 16, 32))
        checked = {
            "BitsAllocated": bits,
            "BitsStored": read_whole(header, file, "BitsStored", range(1, bits + 1)),
            "PixelRepresentation": read_whole(header, file, "PixelRepresentation", (0, 1)),
            "SamplesPerPixel": read_whole(header, file, "SamplesPerPixel", (1,), 1),
            "Rows": read_whole(header, file, "Rows", range(1, 65536)),
            "Columns": read_whole(header, file, "Columns", range(1, 65536)),
            "NumberOfFrames": read_whole(header, file, "NumberOfFrames", range(1, 100_000), 1),
        }
        if (kind := read_text(header, "PhotometricInterpretation")) not in (
            "MONOCHROME1", "MONOCHROME2", "",
        ):  # fmt: skip
            raise InputError(
                f"{file}: PhotometricInterpretation must be MONOCHROME2, got {kind[:40]}; {REMEDY}"
            )
        for tag, value in (*checked.items(), ("PhotometricInterpretation", kind or "MONOCHROME2")):
            if tag in header:
                del header[tag]
            setattr(header, tag, value)
        _refuse_surplus(file, header)
        return header, header.pixel_array
    except InputError:
        raise
    except Exception as error:  # a decoder met what it was not made for
        raise InputError(
            f"{file}: its PixelData cannot be decoded ({error}); the file is cut off or "
            "damaged, copy it again, or convert the series to NIfTI first"
        ) from error


def _refuse_surplus(file: Path, header: Any) -> None:
    """More pixels than Rows and Columns tell: one of them is wrong, and the picture askew."""
    if not header.file_meta.TransferSyntaxUID.is_compressed and "PixelData" in header:
        row = header.Columns * header.BitsAllocated // 8
        needed = row * header.Rows * header.NumberOfFrames
        if len(header.PixelData) >= needed + max(row, 2):
            raise InputError(
                f"{file}: PixelData must have {needed} bytes (Rows, Columns, BitsAllocated, "
                f"NumberOfFrames), got {len(header.PixelData)}; {REMEDY}"
            )


def _clear_padding(
    one: Slice, plane: np.ndarray, modality: str, bright: list[tuple[int, float]]
) -> np.ndarray:
    """HU with padding that would be brighter than tissue as air; `bright` gets how many, what HU.

    Declared as signed or unsigned: the header's VR of the padding is often the other one.
    """
    if one.padding is None or modality != "CT":
        return plane
    for turn in (0, 65536):
        low, high = (end + turn for end in one.padding)
        ends = sorted((low * one.slope + one.intercept, high * one.slope + one.intercept))
        mask = (plane >= ends[0]) & (plane <= ends[1]) if ends[0] > TISSUE_HU else np.False_
        if mask.any():
            bright.append((int(mask.sum()), ends[0]))
            plane = np.where(mask, plane.dtype.type(AIR_HU), plane)
    return plane


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
