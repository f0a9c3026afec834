"""Read a DICOM series as a `Volume`, write a `Volume` as a series, list the series among files.

A series is read in these steps: headers, images of one series, slices, order, affine, pixels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import os
import re
import runpy
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff
from tqdm import tqdm

from data.files import InputError, list_below, list_plain_files, one_error
from data.labels import WORD, name_words
from data.volumes import AIR_HU, TO_LPS, Volume

SEGMENT_VALUE = "label value {}"  # in a DICOM SEG, whose own numbers must run from 1
NO_SCANS = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "PR", "SR", "KO", "REG", "DOC", "FID")
FRAME_TOLERANCE = 0.5  # voxels that the corner of a slice may lie beside its place
UNEVEN, UNEVEN_MM = 0.1, 0.1  # largest distance of a slice from its place: of a gap, mm
TOLD_UNEVEN = 0.05  # fraction of a gap from which on a note reports it
TILT = 0.002  # sideways shift per gap; no gantry tilt is smaller
SAME_PLACE_MM = 0.01
TISSUE_HU = 2000  # padding above it is no tissue
SAME = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")
PARTING = (
    "AcquisitionNumber", "ConvolutionKernel", "ImageType", "SeriesNumber", "SeriesDescription",
    "FilterType", "KVP", "EchoTime", "SliceThickness", "TemporalPositionIdentifier",
)  # fmt: skip
# of CT; MR interleaves the slices of one scan in time
TIMES = ("AcquisitionDate", "AcquisitionDateTime", "AcquisitionTime", "TriggerTime")
ALTERNATING = 1.2  # see `refuse_alternating`: of 19 scans 0.5 to 0.83, of 24 mixtures of two 1.3 up
SEVERAL = "must be the series of one scan, got several"
CHOOSE = "name a file of the scan that you mean"
REMEDY = "export the series again from its source, or leave this file out"
# The begin of a file without preamble: a tag of group 2 or 8 with its VR, or a short value.
BARE = re.compile(rb"[\x02\x08]\0[\0-\x20]\0(UL|UI|CS|DA|OB|[\0-\x40]\0\0\0)")
NEAR = 10  # folders before and after that of a series, in which it may go on
SAMPLE = 8  # files of each that are looked at; several series may share their folders
CONTOURS = "convert its contours to DICOM SEG or NIfTI (3D Slicer, dcmrtstruct2nii)"
# pydicom logs doubts about every tag; this module checks each tag that it uses
logging.getLogger("pydicom").setLevel(logging.ERROR)


# Files → series


def is_dicom(path: Path) -> bool:
    """Return whether a path is a DICOM file: `DICM` after 128 bytes, or BARE."""
    start = _read_start(path)
    return start[128:] == b"DICM" or bool(BARE.match(start))


def _read_start(path: Path) -> bytes:
    """Return the first 132 bytes of a file; none of what cannot be read."""
    with contextlib.suppress(OSError):
        if path.is_file():  # opening a pipe would wait for ever
            with path.open("rb") as stream:
                return stream.read(132)
    return b""


def is_dicom_input(path: Path) -> bool:
    """Return whether a path is a DICOM file, or a folder with DICOM files in or below it."""
    return any(map(is_dicom, list_below(path))) if path.is_dir() else is_dicom(path)


@dataclass(frozen=True)
class DicomItem:
    """A series or a SEG, and the path to read it by; or a file or series that is unusable."""

    path: Path  # the folder of a series if it holds no other, else one of its files; a SEG's file
    uid: str  # of the series; of a SEG: of the series that it refers to; "" where there is none
    patient: str = ""  # PatientID, to keep a patient's scans together; never written anywhere
    images: int = 0  # files of a series
    segments: dict[str, int] = field(default_factory=dict)  # name → label value, of a SEG
    files: tuple[Path, ...] = ()
    fault: str = ""  # why it cannot be used
    is_seg: bool = False
    broken: bool = False  # the fault hides a scan, or a part of one


def find_dicom(files: Iterable[Path]) -> list[DicomItem]:
    """Return the series, SEGs and unusable DICOM files among some files; contours and localisers
    are unusable. Other objects (reports, doses) and pictures without a position are left out."""
    series: defaultdict[tuple[str, ...], dict[Path, int]] = defaultdict(dict)
    items: list[DicomItem] = []
    given = set(files)
    found = sorted(filter(is_dicom, given))
    kinds = {(path.parent, path.suffix) for path in found}
    for path in sorted(given - set(found)):  # a lost slice is named as its neighbours are
        beside = (path.parent, path.suffix) in kinds and path.name[0] != "." and not path.is_dir()
        if beside and not _read_start(path)[:128].strip(b"\0"):
            fault = f"{path}: empty or unreadable beside DICOM files; copy it again, or remove it"
            items.append(DicomItem(path, "", files=(path,), fault=fault))
    for path in tqdm(found, desc="DICOM headers", disable=None, delay=1):
        header: Any = {}
        try:
            header = read_header(path)
            uid, patient, *others = (read_text(header, tag) for tag in ("SeriesInstanceUID", *SAME))
            if is_seg_header(header):
                of = (list_items(header, "ReferencedSeriesSequence") or [{}])[0]
                uid = read_text(of, "SeriesInstanceUID")
                names = {name: value for _, name, value in list_segments(header, path)}
                items.append(DicomItem(path, uid, patient, 0, names, (path,), is_seg=True))
            elif (other := name_object(header)).startswith("RTSTRUCT"):
                raise InputError(f"{path}: must be an image or SEG, got {other}; {CONTOURS}")
            elif not other and "Rows" not in header:
                what = f"{path}: its DICOM header ends before Rows"
                raise InputError(f"{what}; the file is cut off or damaged, copy it again")
            elif not other and (number := count_slices(header)) is not None:
                key = (uid, patient, *others, "" if uid else str(path.parent))
                series[key][path] = number
        except InputError as error:  # one bad file never stops the others
            is_seg = is_seg_header(header)
            uid = "" if is_seg else read_text(header, "SeriesInstanceUID")
            broken = CONTOURS not in str(error)
            items.append(DicomItem(path, uid, "", 0, {}, (path,), str(error), is_seg, broken))
    return [*items, *_place_series(series)]


def count_slices(header: Any) -> int | None:
    """Return how many slices an image is: 0 for a localiser, None for a picture or report."""
    sop, kind = name_class(header), read_text(header, "ImageType")
    scan = not sop or any(w in sop for w in ("CT Image", "MR Image", "Positron"))
    groups = list_items(header, "PerFrameFunctionalGroupsSequence")
    frames = read_text(header, "NumberOfFrames")
    if not groups and not read_text(header, "ImagePositionPatient"):
        return None if not scan or "LOCALIZER" in kind or "SCREEN" in kind else 1
    return 0 if "LOCALIZER" in kind else int(frames) if frames.isdecimal() else 1


def _place_series(series: dict[tuple[str, ...], dict[Path, int]]) -> Iterator[DicomItem]:
    """Yield each series: its files wherever they lie, as long as they agree in the tags of SAME.
    The path is their common folder, unless that holds other scans: directly or, where it holds no
    file of this series directly, at any depth."""
    folders = {key: {file.parent for file in slices} for key, slices in series.items()}
    scans = [folders[key] for key, slices in series.items() if sum(slices.values()) > 1]
    direct = Counter(folder for some in scans for folder in some)
    below = Counter(up for some in scans for up in {u for f in some for u in (f, *f.parents)})
    for key, slices in series.items():
        files, some, fault = tuple(slices), sorted(folders[key]), ""
        path = Path(os.path.commonpath(some))
        shared = (direct if path in some else below)[path] > 1
        same = (one for one in series if one[0] == key[0] and folders[one] & folders[key])
        if rivals := [one for one in same if one != key]:
            tags = [t for t, a, b in zip(SAME, key[1:], rivals[0][1:], strict=False) if a != b]
            names = "; ".join(min(one.name for one in some) for some in (files, series[rivals[0]]))
            fault = f"{SEVERAL} ({', '.join(tags)} of {names}); {CHOOSE}"
        elif sum(slices.values()) < 2:
            fault = "one image, or a localiser, is no scan"
        elif shared and len(some) > 1:
            where = ", ".join(map(str, some[:3]))
            fault = f"its series lies in {where}, beside others; move it to a folder of its own"
        path = files[0] if (shared or fault) and not rivals else path
        fault = fault and f"{path}: {fault}"
        broken = bool(fault) and sum(slices.values()) > 1
        yield DicomItem(path, key[0], key[1], len(files), {}, files, fault, broken=broken)


def find_series(path: Path, notes: list[str]) -> DicomItem:
    """Return the series in a folder, or that of a file; InputError where there is not just one.
    `notes` gets the localisers and single images that are left out."""
    items = find_dicom(path.parent.iterdir() if path.is_file() else list_below(path))
    own = [item for item in items if path in (item.path, *item.files) and not item.is_seg]
    if not own:
        asked = [item for item in items if path.is_dir() or path in item.files]
        found = [item.fault or ("SEG " * item.is_seg + str(item.path)) for item in asked]
        what = "must be or hold one DICOM series of images (SeriesInstanceUID)"
        got = "; ".join(found[:5]) or "no images"
        raise InputError(f"{path}: {what}, got {got}; name one slice of the series")
    for item in (item for item in items if item.fault and not item.is_seg):
        chosen = path.is_file() and item.fault.endswith(CHOOSE)
        if own[0].uid.startswith(item.uid) and not chosen:  # cut off, perhaps in its UID
            raise InputError(item.fault)
        if item.images and item is not own[0]:
            notes.append(f"left out: {item.fault}")
    return own[0]


def list_series_files(path: Path) -> list[Path]:
    """Return every file that is read for the path of a series or SEG, and no file beside them."""
    try:
        return sorted(find_series(path, []).files)
    except InputError:  # a SEG, or what reading refuses
        return [path] if path.is_file() else [file for file in list_below(path) if is_dicom(file)]


# Series → volume


def read_series(path: Path) -> Volume:
    """Return the series in a folder, or that of one of its files: HU, slices feet to head. `notes`
    says what was left out or corrected, `files` has the files in the order of the slices. Raises
    InputError, and nothing else, where it cannot be read as one regular grid."""
    notes: list[str] = []
    with one_error(path, "cannot be read as DICOM series"):
        item = find_series(path, notes)
        slices = [one for file in item.files for one in list_slices(file)]
        refuse_part(item, {tuple(one.position) for one in slices})
        ordered = order_slices(path, slices, notes)
        affine = build_affine(path, ordered, notes)
        voxels = _read_voxels(ordered, notes)
        if read_text(ordered[0].header, "Modality") == "CT":
            refuse_alternating(path, ordered, voxels)
    files = tuple(dict.fromkeys(one.file for one in ordered))
    return Volume(voxels, affine, str(path), notes=tuple(notes), files=files)


def refuse_alternating(path: Path, ordered: Sequence[Slice], voxels: np.ndarray) -> None:
    """Raise InputError if the HU differ more from slice to slice than from every second one to the
    next: two scans in turn, which no tag tells apart. Slices are cross-sections of one body."""
    step = max(1, min(voxels.shape[:2]) // 64)
    small = voxels[::step, ::step].astype(np.float32)
    near, far = (np.abs(small[:, :, n:] - small[:, :, :-n]).mean() for n in (1, 2))
    if len(ordered) > 5 and near > ALTERNATING * far:
        names = " and ".join(one.file.name for one in ordered[:2])
        what = f"{path}: every second slice is another scan's by its HU (as {names})"
        raise InputError(f"{what}; move the slices of one scan to its own folder")


def refuse_part(item: DicomItem, positions: set[tuple[float, ...]]) -> None:
    """Raise InputError if the series goes on in one of the NEAR folders before and after its own:
    half a scan is none. A copy of the series has the same `positions` of slices."""
    own = {file.parent for file in item.files}
    near: set[Path] = set()
    for folder in own if item.uid else ():
        for above, name in ((folder.parent, ""), (folder.parent.parent, folder.name)):
            with contextlib.suppress(OSError):  # of a folder that may not be listed
                places = sorted(place / name for place in above.iterdir() if place.is_dir())
                at = places.index(folder)
                near |= {*places[max(at - NEAR, 0) : at + NEAR + 1]}
    for folder in sorted(near - own):
        if any(uid == item.uid and at not in positions for uid, at in _read_some(folder)):
            what = f"{item.path}: its series goes on in {folder}"
            raise InputError(f"{what}; give the folder that holds both, or put all files into one")


@functools.cache
def _read_some(folder: Path) -> list[tuple[str, tuple[float, ...]]]:
    """Return SeriesInstanceUID and position (LPS mm) of about SAMPLE DICOM files in a folder."""
    found = []
    with contextlib.suppress(InputError, OSError):
        files = list_plain_files(folder)
        for file in filter(is_dicom, files[:: math.ceil(len(files) / SAMPLE) or 1]):
            header = read_header(file)
            place = read_numbers(header, file, "ImagePositionPatient", 3)
            found.append((read_text(header, "SeriesInstanceUID"), tuple(place)))
    return found


@dataclass(frozen=True, eq=False)
class Slice:
    """One plane of a series: where it lies (LPS mm) and how its stored numbers become HU."""

    file: Path
    frame: int  # in its file
    header: Any
    size: tuple[int, int]  # columns, rows
    position: np.ndarray  # (3,) centre of the first pixel
    steps: np.ndarray  # (2, 3) mm from pixel to pixel along a row, and down a column
    slope: float
    intercept: float
    rescaled: bool  # whether the header gives slope and intercept
    padding: tuple[tuple[float, float], ...]  # HU from … to that would be brighter than tissue

    @property
    def normal(self) -> np.ndarray:
        """(3,) unit vector to the next slice."""
        normal = np.cross(*self.steps)
        return normal / np.linalg.norm(normal)


def list_slices(file: Path) -> list[Slice]:
    """Return the slice of a file, or those of an enhanced multi-frame one."""
    header = read_header(file)
    own = list_items(header, "PerFrameFunctionalGroupsSequence")
    shared = list_items(header, "SharedFunctionalGroupsSequence")[:1]
    (frames,) = read_numbers(header, file, "NumberOfFrames", default=[1])
    if frames != max(len(own), 1):
        expected = f"{len(own)}, as PerFrameFunctionalGroupsSequence has items"
        raise wrong_tag(file, "NumberOfFrames", expected, frames)
    if list_items(header, "ModalityLUTSequence"):
        raise wrong_tag(file, "ModalityLUTSequence", "replaced by RescaleSlope", "a table")
    (columns,), (rows,) = (read_numbers(header, file, key) for key in ("Columns", "Rows"))
    padding = read_numbers(header, file, "PixelPaddingValue", default=[math.nan])
    padding += read_numbers(header, file, "PixelPaddingRangeLimit", default=padding)
    slices = []
    for index, groups in enumerate([[one, *shared] for one in own] or [[header]]):
        values = find_group(groups, "PixelValueTransformation")
        (slope,) = read_numbers(values, file, "RescaleSlope", default=[1])
        (intercept,) = read_numbers(values, file, "RescaleIntercept", default=[0])
        rescaled = all(read_text(values, f"Rescale{key}") for key in ("Slope", "Intercept"))
        if slope == 0:
            raise wrong_tag(file, "RescaleSlope", "another number than 0", slope)
        # declared as signed or unsigned: the tag's VR is often the other one
        signs = ([slope * (end + turn) + intercept for end in padding] for turn in (0, 65536))
        bright = tuple((min(ends), max(ends)) for ends in signs if min(ends) > TISSUE_HU)
        size, plane = (int(columns), int(rows)), read_plane(file, groups)
        slices.append(Slice(file, index, header, size, *plane, slope, intercept, rescaled, bright))
    return slices


def read_plane(file: Path, groups: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return position (3,) and steps (2, 3) of a plane in LPS mm, see `Slice`."""
    names = ("PlanePosition", "PlaneOrientation", "PixelMeasures")
    place, turn, measures = (find_group(groups, name) for name in names)
    position = np.array(read_numbers(place, file, "ImagePositionPatient", 3))
    axes = np.reshape(read_numbers(turn, file, "ImageOrientationPatient", 6), (2, 3))
    if np.abs(axes @ axes.T - np.eye(2)).max() > 0.02:
        expected = "two perpendicular vectors of length 1"
        raise wrong_tag(file, "ImageOrientationPatient", expected, axes.ravel().tolist())
    down, across = read_numbers(measures, file, "PixelSpacing", 2)
    if min(down, across) <= 0:
        raise wrong_tag(file, "PixelSpacing", "positive", (down, across))
    axes /= np.linalg.norm(axes, axis=1)[:, None]
    return position, axes * [[across], [down]]


def find_group(groups: Sequence[Any], name: str) -> Any:
    """Return a functional group of a frame: its own, else the shared one. The header of a plain
    slice, which has all tags itself, stands for each group."""
    found = (item for group in groups for item in list_items(group, f"{name}Sequence")[:1])
    return next(found, groups[-1])


def order_slices(path: Path, slices: Iterable[Slice], notes: list[str]) -> list[Slice]:
    """Return the slices of one stack in the order of position; `notes` gets what is left out."""
    groups: list[list[Slice]] = []
    for one in slices:
        near = [group for group in groups if _are_parallel(one, group[0])]
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
    main.sort(key=lambda one: float(normal @ one.position))
    ordered = _drop_copies(path, choose_scan(path, main, notes), notes)
    along = np.array([normal @ one.position for one in ordered])
    step = (along[-1] - along[0]) / max(len(along) - 1, 1)
    for one in strays:  # one that is parallel, where no slice lies yet, is a slice of this stack
        away = np.abs(along - normal @ one.position).min()
        if abs(one.normal @ normal) > 0.99 and 0.6 * step < away < 1.5 * step:
            tags = "Rows, Columns, PixelSpacing and ImageOrientationPatient"
            raise wrong_tag(one.file, tags, "those of the other slices", "others")
    if strays:
        notes.append(f"{len(strays)} images of another orientation or size left out")
    return ordered


def _are_parallel(one: Slice, other: Slice) -> bool:
    """Return whether two slices would cover each other if their first pixels did."""
    corners = [np.array(s.size)[:, None] * s.steps for s in (one, other)]
    tolerance = FRAME_TOLERANCE * np.linalg.norm(other.steps, axis=1).min()
    return one.size == other.size and np.abs(corners[0] - corners[1]).max() <= tolerance


def choose_scan(path: Path, ordered: list[Slice], notes: list[str]) -> list[Slice]:
    """Return the slices of one scan, that of the file `path` where a series holds several: a tag
    that parts slices into sets over the same range tells of several scans; sets end to end are one
    scan. Sets share a range where each has two slices or more in it."""
    ct = read_text(ordered[0].header, "Modality") in ("CT", "")
    for tag in (*PARTING, *(TIMES if ct else ())):
        sets: defaultdict[str, list[int]] = defaultdict(list)
        for index, one in enumerate(ordered):
            sets[read_text(one.header, tag)].append(index)
        apart = False
        for pair in itertools.combinations((s for s in sets.values() if len(s) > 1), 2):
            low, high = max(some[0] for some in pair), min(some[-1] for some in pair)
            apart |= all(sum(low <= index <= high for index in some) > 1 for some in pair)
        own = [some for some in sets.values() if any(ordered[i].file == path for i in some)]
        if apart and not own:
            found = [f"{ordered[some[0]].file.name}: {value}" for value, some in sets.items()]
            raise InputError(f"{path}: {SEVERAL} ({tag} of {'; '.join(found[:3])}); {CHOOSE}")
        if apart:
            notes.append(f"{len(ordered) - len(own[0])} slices of another {tag} left out")
            ordered = [ordered[index] for index in own[0]]
    return ordered


def _drop_copies(path: Path, ordered: list[Slice], notes: list[str]) -> list[Slice]:
    """Return the slices without copies (same position, equal voxels), whatever their UIDs say."""
    kept = ordered[:1]
    for one in ordered[1:]:
        if np.abs(one.position - kept[-1].position).max() >= SAME_PLACE_MM:
            kept.append(one)
        elif np.ptp(np.stack([*read_planes([kept[-1], one])]), axis=0).any():
            what = f"{path}: slices share a position: several acquisitions, as {kept[-1].file.name}"
            raise InputError(f"{what} and {one.file.name}; move one acquisition to its own folder")
    if len(kept) < len(ordered):
        notes.append(f"{len(ordered) - len(kept)} copies of slices left out")
    return kept


def build_affine(path: Path, ordered: Sequence[Slice], notes: list[str]) -> np.ndarray:
    """Return the affine (RAS mm) of a stack; InputError says why it is not one regular grid."""
    first, normal, count = ordered[0], ordered[0].normal, len(ordered)
    positions = np.array([one.position for one in ordered])
    step = (positions[-1] - positions[0]) / max(count - 1, 1)
    spacing, gaps = float(step @ normal), np.diff(positions @ normal)
    off = positions - positions[0] - step * np.arange(count)[:, None]
    ahead = np.abs(off @ normal)
    aside = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1)
    sideways = float(np.linalg.norm(step - spacing * normal))
    rounding = 2 * UNEVEN_MM / max(count - 1, 1)  # of the first and the last position
    if (
        count < 2
        or gaps.min() < SAME_PLACE_MM
        or ahead.max() > max(UNEVEN * spacing, UNEVEN_MM + 1e-6)
        or aside.max() > FRAME_TOLERANCE * np.linalg.norm(first.steps, axis=1).min()
        or sideways > max(TILT * spacing, rounding)
    ):
        odd = ordered[int(np.argmax(ahead + aside))].file.name
        raise InputError(
            f"{path}: must be one regular grid (ImagePositionPatient), got {count} slices, gaps of "
            f"{gaps.min(initial=1e9):.2f} to {gaps.max(initial=0):.2f} mm, up to "
            f"{aside.max():.2f} mm beside the stack ({odd}), gantry tilt of "
            f"{np.degrees(np.arctan2(sideways, spacing)):.1f}°; split it or resample it first "
            "(dcm2niix does)"
        )
    if (most := float(ahead.max() / spacing)) > TOLD_UNEVEN:
        notes.append(f"slices lie up to {most:.2g} of a gap beside even positions")
    return TO_LPS @ nib.affines.from_matvec(np.stack([*first.steps, step], axis=1), positions[0])


def _read_voxels(ordered: Sequence[Slice], notes: list[str]) -> np.ndarray:
    """Return HU (X, Y, Z) of slices: int16 if they fit, else float32; bright padding is air."""
    without = [one.file for one in ordered if not one.rescaled]
    if 0 < len(without) < len(ordered):
        expected = "numbers as in the other slices"
        raise wrong_tag(without[0], "RescaleSlope and RescaleIntercept", expected, "nothing")
    ct = read_text(ordered[0].header, "Modality") == "CT"
    array = np.empty((*ordered[0].size, len(ordered)), np.int16, order="F")
    padded = 0
    for index, plane in enumerate(read_planes(ordered)):
        for low, high in ordered[index].padding if ct else ():
            mask = (plane >= low) & (plane <= high)
            plane[mask] = AIR_HU
            padded += int(mask.sum())
        if array.dtype == np.int16 and not np.array_equal(plane.astype(np.int16), plane):
            array = array.astype(np.float32)
        array[:, :, index] = plane
    if without and ct:
        notes.append("no RescaleSlope and RescaleIntercept: stored numbers are taken as HU")
    if padded:
        notes.append(f"{padded} voxels of padding (PixelPaddingValue) are now air")
    return array


def read_planes(slices: Iterable[Slice]) -> Iterator[np.ndarray]:
    """Yield the HU (X, Y), float32, of slices; a file is decoded once in a row."""
    file, stored = Path(), np.empty(0)
    for one in slices:
        if one.file != file:
            file, stored = one.file, _decode(one.file)
        if stored.shape[-2:] != one.size[::-1]:
            raise wrong_tag(file, "PixelData", f"of Columns × Rows = {one.size}", stored.shape)
        plane = stored.reshape(-1, *one.size[::-1])[one.frame].T.astype(np.float32)
        yield plane * np.float32(one.slope) + np.float32(one.intercept)


def _decode(file: Path) -> np.ndarray:
    """Return the stored numbers, (rows, columns) or (frames, rows, columns), of a file."""
    import pydicom

    with one_error(file, "its PixelData cannot be decoded"):
        header = pydicom.dcmread(file, force=True)
        if not header.file_meta.get("TransferSyntaxUID"):
            little = pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian
            header.file_meta.TransferSyntaxUID = little[not header.original_encoding[0]]
        kind = read_text(header, "PhotometricInterpretation") or "MONOCHROME2"
        if kind not in ("MONOCHROME1", "MONOCHROME2"):
            raise wrong_tag(file, "PhotometricInterpretation", "MONOCHROME2", kind)
        header.PhotometricInterpretation = kind
        header.setdefault("SamplesPerPixel", 1)
        stored = header.pixel_array
        size, row = len(header.get("PixelData", b"")), stored.nbytes // stored.shape[-2]
        compressed = header.file_meta.TransferSyntaxUID.is_compressed
        if not compressed and size >= stored.nbytes + max(row, 2):  # the picture would be askew
            expected = f"{stored.nbytes} bytes (Rows, Columns, BitsAllocated, NumberOfFrames)"
            raise wrong_tag(file, "PixelData", expected, size)
    return stored


# Volume → series


def write_series(volume: Volume, folder: Path) -> list[Path]:
    """Write a scan as CT series of nobody ("anonymous"), read it back; return files feet to head.
    Slices are the planes nearest to axial. UIDs come from the content, so that one scan always
    gives the same series. After an InputError there is no folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: must be a new folder for the series; name another")
    ras = volume.ras
    stored = np.clip(ras.data, -32768, 32767).astype(np.int16)[::-1, ::-1]
    if not np.array_equal(stored, ras.data[::-1, ::-1]):
        what = f"{volume.name}: a series holds whole HU from -32768 to 32767, got others"
        raise InputError(f"{what}; round or rescale it first", kind="hu")
    axes = ras.affine[:3, :3] / ras.spacing_mm
    if np.abs(axes.T @ axes - np.eye(3)).max() > TILT or stored.shape[2] < 2:
        what = f"{volume.name}: a series needs 2 slices or more and perpendicular axes"
        raise InputError(f"{what}; resample it to a straight grid first", kind="grid")
    affine = TO_LPS @ ras.affine @ inv_ornt_aff([[0, -1], [1, -1], [2, 1]], stored.shape)
    content = hashlib.sha256(affine.tobytes() + stored.tobytes("F")).hexdigest()
    names = [f"{z + 1:04d}.dcm" for z in range(stored.shape[2])]
    partial = folder.with_name(f".{os.getpid()}.partial.{folder.name}")
    try:
        partial.mkdir(parents=True)
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
        what = f"{folder}: cannot be written ({error.strerror or error})"
        raise InputError(f"{what}; choose a folder that is writable, with free space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def _build_slice(plane: np.ndarray, affine: np.ndarray, z: int, content: str) -> Any:
    """Return the CT image of a plane (columns, rows) of HU; its UIDs are made from `content`."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    from pydicom.valuerep import format_number_as_ds as ds

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    image, study, series, frame = (
        generate_uid(entropy_srcs=[content, name]) for name in (str(z), "study", "series", "frame")
    )
    empty = (
        "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID",
        "ReferringPhysicianName", "Manufacturer", "PositionReferenceIndicator", "KVP",
        "AcquisitionNumber",
    )  # fmt: skip
    tags = dict.fromkeys(empty) | {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": image, "StudyInstanceUID": study,
        "SeriesInstanceUID": series, "FrameOfReferenceUID": frame, "PatientName": "anonymous",
        "PatientID": "anonymous", "Modality": "CT", "SeriesNumber": 1, "InstanceNumber": z + 1,
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL"], "Rows": plane.shape[1],
        "Columns": plane.shape[0], "PixelSpacing": [*map(ds, lengths[[1, 0]].tolist())],
        "SliceThickness": ds(float(lengths[2])),
        "ImageOrientationPatient": [*map(ds, (affine[:3, :2] / lengths[:2]).T.ravel().tolist())],
        "ImagePositionPatient": [*map(ds, (affine[:3, 3] + z * affine[:3, 2]).tolist())],
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16,
        "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1,
        "RescaleIntercept": 0, "RescaleSlope": 1, "RescaleType": "HU",
        "PixelData": np.ascontiguousarray(plane.T).astype("<i2").tobytes(),
    }  # fmt: skip
    header = pydicom.Dataset()
    for tag, value in tags.items():
        setattr(header, tag, value)
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = image
    return header


# Headers


def wrong_tag(file: Path, tag: str, expected: str, found: object) -> InputError:
    """Return the error of a tag that cannot be used."""
    return InputError(f"{file}: {tag} must be {expected}, got {str(found)[:80]}; {REMEDY}")


def read_header(file: Path) -> Any:
    """Return the header of a DICOM file without its pixels."""
    import pydicom

    with one_error(file, "its DICOM header cannot be read"):
        return pydicom.dcmread(file, stop_before_pixels=True, force=True)


def read_text(header: Any, tag: str) -> str:
    """Return a tag as text, "" where it is missing, empty or malformed."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        return "" if (value := header.get(tag)) is None else str(value).strip()
    return ""


def read_numbers(
    header: Any, file: Path, tag: str, count: int = 1, default: Sequence[float] | None = None
) -> list[float]:
    """Return the `count` finite numbers of a tag, whatever its VR; `default` where it is empty."""
    numbers, value = [], None
    with contextlib.suppress(Exception):  # of a value that its VR does not allow
        value = header.get(tag)
        numbers = [] if value is None or value == "" else [float(n) for n in np.atleast_1d(value)]
    if default is not None and not read_text(header, tag):
        return [float(number) for number in default]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise wrong_tag(file, tag, "a number" if count == 1 else f"{count} numbers", value)
    return numbers


def list_items(header: Any, tag: str) -> list[Any]:
    """Return the items of a sequence; none where it is missing, empty or malformed."""
    from pydicom import Sequence as Items

    with contextlib.suppress(Exception):
        return list(value) if isinstance(value := header.get(tag), Items) else []
    return []


def name_object(header: Any) -> str:
    """Return what no image is: "SEG (Segmentation Storage)"; "" for an image."""
    modality, sop = read_text(header, "Modality"), name_class(header)
    other = modality in NO_SCANS or (sop and "Image Storage" not in sop)
    return f"{modality or 'object'} ({sop})" if other else ""


def is_seg_header(header: Any) -> bool:
    """Return whether a header is one of a segmentation by voxels, not by contours or surfaces."""
    sop = name_class(header) or read_text(header, "Modality")
    return sop in ("SEG", "Segmentation Storage", "Label Map Segmentation Storage")


def name_class(header: Any) -> str:
    """Return the name of the SOP class, "" where it is missing or no standard one."""
    from pydicom.uid import UID

    meta = getattr(header, "file_meta", {})
    uid = read_text(header, "SOPClassUID") or read_text(meta, "MediaStorageSOPClassUID")
    name = UID(uid).name
    return "" if name == uid else name


def list_segments(header: Any, file: Path) -> list[tuple[int, str, int]]:
    """Return (number, name, label value) of each segment. The name is the segment's label if it is
    a known one, else what its code means. The numbers run from 1; where the label value is another,
    the description says it (`write_seg`). Of segments with one name the first value counts."""
    from pydicom.sr.codedict import codes

    segments, values = [], dict[str, int]()
    for item in list_items(header, "SegmentSequence"):
        number = int(read_numbers(item, file, "SegmentNumber")[0])
        label, description = (read_text(item, f"Segment{k}") for k in ("Label", "Description"))
        code = (list_items(item, "SegmentedPropertyTypeCodeSequence") or [{}])[0]
        known = not {*WORD.values()}.isdisjoint(name_words(label))
        known = known or hasattr(codes.SCT, label.title().replace(" ", ""))
        meant = [w for w in ("tumour", "liver") if w in name_words(read_text(code, "CodeMeaning"))]
        name = label if known else [*meant, label or f"Segment {number}"][0]
        told = re.fullmatch(SEGMENT_VALUE.format(r"(\d{1,5})"), description)
        if number > 0:  # LABELMAP describes its background, too
            value = values.setdefault(name, int(told[1]) if told else number)
            segments.append((number, name, value))
    if not segments:
        raise wrong_tag(file, "SegmentSequence", "a description of the segments", "nothing")
    return segments


if __name__ == "__main__":  # the commands on series and label maps
    runpy.run_module("data.seg", run_name="__main__", alter_sys=True)
