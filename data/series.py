"""DICOM series → `Volume`; nothing that a header says is taken unchecked.

Rules, each stated once:
- position along the normal orders slices (DICOM PS3.3 C.7.6.2.1.1), never file name or
  SliceThickness;
- slices are one stack while their corners lie FRAME_TOLERANCE voxels apart or less, and regular
  while each lies UNEVEN of a gap (or UNEVEN_MM) or less from its place;
- RescaleSlope and RescaleIntercept that are missing or empty are 1 and 0, told of a CT;
- padding that would be brighter than any tissue becomes air (−1024 HU) and is told. Padding below
  −1024 HU stays: every HU window clips it to air.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data.files import InputError
from data.headers import (
    REMEDY,
    find_group,
    is_picture,
    list_images,
    list_items,
    read_numbers,
    read_plane,
    read_text,
    read_whole,
)
from data.volumes import TO_LPS, Volume

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
