"""What two or more of the scripts share.

Sections, each readable alone: data contract · command line · volumes · networks · metrics ·
training · checkpoints · pictures. This module imports none of the scripts.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
import tyro
from isal import igzip
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------
# Data contract: the words that all scripts agree on
# ---------------------------------------------------------------------------------------

IMAGE, LABEL, PRED = "image", "label", "pred"  # dictionary keys, as in MONAI
ORIENTATION = "RAS"  # axes of a prepared array: indices grow to the Right, Anterior, Superior
AIR_HU = -1024  # what lies outside a scan
SEGMENT_VALUE = "label value {}"  # in a DICOM SEG, whose own numbers must run from 1
LABEL_VALUES = {"background": 0, "liver": 1, "tumour": 2}  # values in a label map (LiTS, Task03)
CLASSES = {"background": (0,), "liver": (1, 2)}  # what is learnt by default: a tumour is liver too
HU_WINDOW = (-200.0, 250.0)  # HU window of every picture for people (training has its own setting)


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, why, and what to do.

    `kind` names the finding of the check that this is, see `data.check`.
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------------------------------
# Command line and files
# ---------------------------------------------------------------------------------------


def command_line(
    main: Callable[[Any], None],
    config_class: type,
    description: str | None,
    recipes: dict[str, tuple[str, Any]] | None = None,
) -> None:
    """Run `main(config)`, config from the command line; a user's fault ends in one line, exit 1.

    `recipes` maps a name, which may be the first word of the command line, to an explanation and
    the config whose values the options then override. The first recipe is the default.
    """
    words, chosen = sys.argv[1:], {}
    if recipes:
        named = bool(words) and not words[0].startswith("-")
        name = words.pop(0) if named else next(iter(recipes))
        if name not in recipes:
            sys.exit(f"error: the recipe must be one of {', '.join(recipes)}, got {name}")
        chosen = {"default": recipes[name][1]}
        lines = [f"    {key:<24}{text}" for key, (text, _) in recipes.items()]
        description = f"{description}\nRecipes (here: {name}):\n\n" + "\n".join(lines)
    flat = [tyro.conf.AvoidSubcommands]
    config = tyro.cli(config_class, args=words, description=description, config=flat, **chosen)
    try:
        main(config)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


Values = tuple[int, ...]


def parse_labels(words: list[str]) -> dict[str, Values]:
    """`["liver=1,2"]` → {"background": (0,), "liver": (1, 2)}."""
    pairs = (word.partition("=") for word in words)
    named = {name: tuple(int(value) for value in values.split(",")) for name, _, values in pairs}
    return {"background": (0,)} | named


Labels = Annotated[  # type of a setting, on the command line: --labels liver=1 tumour=2
    dict[str, Values],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE,…",
        instance_from_str=parse_labels,
        is_instance=lambda labels: isinstance(labels, dict),
        str_from_instance=lambda labels: [f"{n}={','.join(map(str, labels[n]))}" for n in labels],
    ),
]


def read_json(path: Path, what: str = "a JSON object") -> Any:
    """Content of a JSON file, with or without a byte order mark; InputError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be {what}, got {error}; correct it or remove it") from error


def write_json(content: Any, path: Path) -> None:
    """Write JSON whole or not at all; a Path is written as its text."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with these columns, separated by commas, semicolons or tabs (Excel)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    if not rows or not set(columns) <= set(rows[0]):
        raise InputError(f"{path}: must have the columns {','.join(columns)}, got {first!r}")
    return rows


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV, whole or not at all; a column for every key that any row has."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def human_bytes(count: float) -> str:
    """1536 → `1.5 KB`; steps of 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when all went well.

    The temporary name starts with a dot and keeps the suffixes, because writers choose the format
    by suffix.
    """
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "choose a folder that exists, is writable and has free space"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One process per folder."""
    yield


# ---------------------------------------------------------------------------------------
# Volumes: a nibabel image is array + affine (voxel index → patient RAS+ millimetres) + header
# ---------------------------------------------------------------------------------------


NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")


def case_name(path: Path) -> str:
    """`liver_3` for `…/liver_3.nii.gz`; the folder's own name for a DICOM folder."""
    known = [s for s in (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".dcm") if path.name.endswith(s)]
    return path.name.removesuffix(max(known, key=len, default=""))


def read_volume(path: Path) -> nib.Nifti1Image:
    """Read a 3D volume: NIfTI, Analyze pair, .mha, .nrrd, a DICOM folder or one file of a series.

    Of NIfTI the header only; its voxels are read by `voxels` or, in parts, `slices`. Trailing axes
    of length 1 are dropped. Of a DICOM series, `image.extra` has the "files" in the order of the
    slices, and "notes" on what was left out.
    Raises InputError for anything that is not one 3D volume of numbers.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if path.is_dir() or is_dicom(path):
        image = _read_dicom(path)
    else:
        image = _read_itk(path) if path.name.endswith(ITK_SUFFIXES) else _read_nifti(path)
    if len(image.shape) != 3 or 0 in image.shape:
        raise InputError(
            f"{path}: must be one 3D volume, got shape {image.shape}; split or convert it first"
        )
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path}: must hold numbers, got voxels of type {image.get_data_dtype()}; "
            "convert colours or complex values to one number per voxel"
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine)) < 1e-9:
        raise InputError(
            f"{path}: its affine says not where the voxels lie ({image.affine.tolist()}); "
            "export it again with its geometry"
        )
    return image


def read_label(
    path: Path, image: nib.Nifti1Image, known: dict[str, int] = LABEL_VALUES
) -> nib.Nifti1Image:
    """Read the label map of `image`; a DICOM SEG, or the folder of one, is laid on its grid.

    `known` maps label names to values, see `segment_values`; of a SEG, `extra["segments"]` has the
    values of its names.
    """
    if path.is_dir():
        inside = [file for file in path.iterdir() if file.is_file() and is_dicom(file)]
        path = inside[0] if len(inside) == 1 else path
    if path.is_dir() or not is_dicom(path):
        return read_volume(path)
    import highdicom

    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    try:
        file = highdicom.seg.segread(path)
        segments = file.get_volume(combine_segments=True)
        grid = highdicom.VolumeGeometry(
            to_lps @ image.affine, image.shape, "PATIENT", segments.frame_of_reference_uid
        )
        array = segments.match_geometry(grid, tol=1e-2).array
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: not a DICOM SEG on the grid of its scan ({error}); export it again from the "
            "series it belongs to, or as NIfTI"
        ) from error
    values = segment_values(segments_of(file), known)
    table = np.zeros(int(array.max(initial=0)) + 1, np.min_scalar_type(max(values.values())))
    for segment in file.SegmentSequence:
        if segment.SegmentNumber < len(table):
            table[segment.SegmentNumber] = values[str(segment.SegmentLabel)]
    if not np.array_equal(table, np.arange(len(table))):
        array = table[array]
    result = nib.Nifti1Image(np.asfortranarray(array), image.affine, dtype=array.dtype)
    result.extra["segments"] = values
    return result


def segments_of(header: Any) -> dict[str, int]:
    """Name → number of a DICOM SEG's segments.

    Numbers must run from 1; where a label value is another one, the segment's description tells it,
    as `apply_model.py` writes it.
    """
    numbers: dict[str, int] = {}
    for segment in header.SegmentSequence:
        told = re.fullmatch(SEGMENT_VALUE.format(r"(\d+)"), segment.get("SegmentDescription") or "")
        number = int(told[1]) if told else int(segment.SegmentNumber)
        numbers.setdefault(str(segment.SegmentLabel), number)
    return numbers


def segment_values(segments: dict[str, int], known: dict[str, int]) -> dict[str, int]:
    """Label value of each segment: of a known name (in capitals or not) the known one.

    Any other name keeps its number, or gets a value of its own where that number is taken: SEGs of
    one data set may number the same organs differently.
    """
    spelt = {name.lower(): value for name, value in known.items()}
    values = {name: spelt[name.lower()] for name in segments if name.lower() in spelt}
    for name, number in segments.items():
        if name not in values:
            taken = set(values.values())
            values[name] = number if number not in taken else max(taken | set(known.values())) + 1
    return values


def _read_nifti(path: Path) -> nib.Nifti1Image:
    try:
        image = nib.load(path)
    except (
        nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
        OSError, EOFError, ValueError, zlib.error,
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: not a readable NIfTI volume ({error}); download or convert it again"
        ) from error
    data_file = Path(image.file_map["image"].filename or path)
    if not data_file.exists():
        raise InputError(f"{path}: header without voxels, {data_file.name} is missing; get both")
    if len(image.shape) > 3 and set(image.shape[3:]) == {1}:  # still unread after this
        proxy = image.dataobj.reshape(image.shape[:3])
        image = type(image)(proxy, image.affine, image.header, file_map=image.file_map)
    return image


def _read_itk(path: Path) -> nib.Nifti1Image:
    import SimpleITK

    try:
        itk = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{path}: cannot be read ({reason}); download or convert it again"
        ) from error
    array = SimpleITK.GetArrayFromImage(itk).T  # ITK's last axis is x
    if itk.GetDimension() != 3 or array.ndim != 3:
        raise InputError(
            f"{path}: must be one 3D volume, got shape {array.shape}; convert it first"
        )
    columns = np.reshape(itk.GetDirection(), (3, 3)) * itk.GetSpacing()
    lps = nib.affines.from_matvec(columns, itk.GetOrigin())
    return nib.Nifti1Image(array, np.diag([-1, -1, 1, 1]) @ lps, dtype=array.dtype)


def is_dicom(path: Path) -> bool:
    """True for a DICOM file (part 10: `DICM` after 128 bytes), whatever its name."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def dicom_headers(folder: Path) -> dict[Path, Any]:
    """File → header, without pixels, of the DICOM files in `folder` (not below it)."""
    import pydicom

    files = [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path)]
    return {path: pydicom.dcmread(path, stop_before_pixels=True) for path in files}


def _read_dicom(path: Path) -> nib.Nifti1Image:
    """A series in HU, in the order of its positions along the slice normal; see `_series_grid`."""
    headers = dicom_headers(path if path.is_dir() else path.parent)
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
    image = nib.Nifti1Image(_series_voxels(ordered), affine)
    image.extra |= {"notes": notes, "files": ordered}
    return image


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
    return ordered, np.diag([-1, -1, 1, 1]) @ nib.affines.from_matvec(columns, positions[0])


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


@contextlib.contextmanager
def slices(image: nib.Nifti1Image) -> Iterator[Callable[[int, int], np.ndarray]]:
    """Yield `read(first, last)` → voxels (X, Y, first:last) along the last stored axis.

    As stored, or float32 where the header rescales them. A compressed file is decompressed by isal
    (3 times as fast as zlib) as far as it is read, and once only as long as `first` ascends.
    """
    proxy, name = image.dataobj, image.get_filename() or "volume"
    if not nib.is_proxy(proxy):
        native = proxy.astype(proxy.dtype.newbyteorder("="), copy=False)
        yield lambda first, last: native[:, :, first:last]
        return
    data_file = str(proxy.file_like)
    open_file = igzip.open if data_file.endswith(".gz") else io.FileIO
    with open_file(data_file) as stream:
        stored = nib.arrayproxy.ArrayProxy(
            stream, (image.shape, proxy.dtype, proxy.offset), mmap=False
        )

        def read(first: int, last: int) -> np.ndarray:
            try:
                array = stored[:, :, first:last]
                if last == image.shape[2]:
                    stream.read(1)  # past the last voxel: the checksum of a .gz is verified
            except (OSError, EOFError, ValueError, igzip.isal_zlib.error) as error:
                raise InputError(
                    f"{name}: its voxels cannot be read ({error}); the file is cut off or damaged, "
                    "download or convert it again"
                ) from error
            if (proxy.slope, proxy.inter) != (1, 0):
                array = array.astype(np.float32) * np.float32(proxy.slope) + np.float32(proxy.inter)
            return array.astype(array.dtype.newbyteorder("="), copy=False)

        yield read


def voxels(image: nib.Nifti1Image) -> np.ndarray:
    """All voxels (X, Y, Z), in the stored dtype, or float32 where the header rescales them."""
    depth = image.shape[2]
    with slices(image) as read:
        part = read(0, min(16, depth))
        array = np.empty(image.shape, part.dtype, order="F")
        array[:, :, : part.shape[2]] = part
        for first in range(16, depth, 16):
            array[:, :, first : first + 16] = read(first, min(first + 16, depth))
    return array


def ras_grid(image: nib.Nifti1Image) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine that the volume has once its axes run R, A, S."""
    orientation = nib.io_orientation(image.affine)
    shape = tuple(int(image.shape[axis]) for axis in np.argsort(orientation[:, 0]))
    return shape, image.affine @ nib.orientations.inv_ornt_aff(orientation, image.shape)


def ras_slabs(
    image: nib.Nifti1Image, wanted: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first, RAS array (X, Y, last − first)) for slice ranges, each slice read once.

    The ranges come in the order in which the file stores them, so that a compressed axial file is
    decompressed once while only one slab is in memory; other files are read whole.
    """
    orientation, depth = nib.io_orientation(image.affine), image.shape[2]
    if orientation[2, 0] != 2:  # the last stored axis does not run feet to head
        array = nib.orientations.apply_orientation(voxels(image), orientation)
        yield from ((first, array[:, :, first:last]) for first, last in wanted)
        return
    flipped = orientation[2, 1] < 0
    stored = sorted((depth - b, depth - a) if flipped else (a, b) for a, b in wanted)
    with slices(image) as read:
        slab, end = None, 0
        for first, last in stored:
            fresh = read(max(first, end), last)
            kept = end - first  # slices shared with the slab before
            slab = np.concatenate([slab[:, :, -kept:], fresh], axis=2) if kept > 0 else fresh
            end = last
            turned = nib.orientations.apply_orientation(slab, orientation)
            yield (depth - last if flipped else first), turned


def ranges(depth: int, step: int, reach_back: bool = True) -> list[tuple[int, int]]:
    """(first, last) of consecutive slabs; the last one reaches back over its neighbour to be full.

    A scan of fewer than `step` slices is one range.
    """
    firsts = range(0, depth, step)
    if reach_back:
        return [(max(0, min(first, depth - step)), min(first + step, depth)) for first in firsts]
    return [(first, min(first + step, depth)) for first in firsts]


def like(image: nib.Nifti1Image, array: np.ndarray) -> nib.Nifti1Image:
    """`array` (X, Y, Z) on exactly the grid of `image`: shape, affine, qform and sform codes."""
    if array.shape != image.shape:
        raise ValueError(f"array must have the shape of the grid {image.shape}, got {array.shape}")
    is_nifti = isinstance(image.header, nib.Nifti1Header)
    header = nib.Nifti1Header.from_header(image.header, check=False) if is_nifti else None
    if is_nifti:
        header["sizeof_hdr"] = header.sizeof_hdr  # a NIfTI-2 header brings its own
    result = nib.Nifti1Image(array, image.affine, header, dtype=array.dtype)
    result.header.set_slope_inter(1, 0)
    result.header["cal_min"] = result.header["cal_max"] = 0
    return result


def write_volume(image: nib.Nifti1Image, path: Path) -> None:
    """Write `.nii` or `.nii.gz` (isal, fast level) whole or not at all; same voxels, same bytes."""
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        if path.suffix == ".gz":  # no name and no time in the file
            with igzip.IGzipFile("", "wb", 1, stream, mtime=0) as compressed:
                image.to_stream(compressed)
        else:
            image.to_stream(stream)


def to_ras(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Permute and flip the axes to the nearest RAS; every voxel keeps its place in the patient."""
    return nib.as_closest_canonical(like(image, voxels(image)))


def hu_faults(array: np.ndarray, stored: np.dtype) -> list[tuple[str, str]]:
    """What speaks against Hounsfield units of a CT, from every 8th voxel of an array (X, Y, Z).

    ("hu", why they cannot be) or ("air", what is only unusual); `stored` is the file's data type.
    """
    sample = np.asfortranarray(array[::2, ::2, ::2]).ravel("K")
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return [("hu", "no finite values")]
    low, high = float(sample.min()), float(sample.max())
    span = f"values from {low:.0f} to {high:.0f}"
    if stored.itemsize == 1:
        return [("hu", f"{span} in {stored}: 8 bits cannot hold HU")]
    if low == high:
        return [("hu", f"every voxel is {low:.0f}")]
    if high - low < 300:
        return [("hu", f"{span}: too narrow for HU")]
    if np.mean(sample[sample > -1500] < -30) < 0.01:  # −1500: padding outside the scan's circle
        return [("hu", f"{span}, no fat or air below 0: intercept not applied, or no CT")]
    if np.mean((sample > -1100) & (sample < -900)) < 0.001:
        return [("air", f"{span}: no air near −1000")]
    return []


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Length of each voxel axis in mm, in the order of the array's axes."""
    x, y, z = (float(length) for length in nib.affines.voxel_sizes(affine))
    return x, y, z


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box around what is True; of no voxels where nothing is."""
    box = [slice(0, size) for size in mask.shape]
    for axis in reversed(range(mask.ndim)):  # each axis looks at what the ones before left
        others = tuple(other for other in range(mask.ndim) if other != axis)
        used = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box[axis] = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
    return tuple(box)


# ---------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------


def _double_convolution(channels_in: int, middle: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((channels_in, middle), (middle, channels_out)):
        # No bias: batch norm subtracts the mean, so a bias would be learnt in vain.
        layers += [
            nn.Conv3d(before, after, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm3d(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet3D(nn.Module):
    """The 3D U-Net of Çiçek et al. 2016 (doi:10.1007/978-3-319-46723-8_49), with padding.

    Channels double before each pooling, so that no bottleneck throws information away; batch norm
    stands before each ReLU. Input (B, in_channels, X, Y, Z) → logits (B, out_channels, X, Y, Z);
    X, Y and Z must be multiples of 8.

    The paper counts 19,069,955 parameters for 3 channels in and 3 labels out: all convolution
    weights, one bias per 3×3×3 filter and output label, batch-norm scales left out. Here the
    batch norm's shift takes the place of that bias, so the count is all parameters (19,072,291)
    less the 2,336 batch-norm scales.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 2, base_channels: int = 32):
        super().__init__()
        c1, c2, c3, c4, c5 = (base_channels * 2**level for level in range(5))
        self.encoders = nn.ModuleList(
            [
                _double_convolution(in_channels, c1, c2),
                _double_convolution(c2, c2, c3),
                _double_convolution(c3, c3, c4),
            ]
        )
        self.bottom = _double_convolution(c4, c4, c5)
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose3d(c, c, kernel_size=2, stride=2, bias=False) for c in (c5, c4, c3)
        )
        self.decoders = nn.ModuleList(
            _double_convolution(deep + skip, skip, skip)
            for deep, skip in ((c5, c4), (c4, c3), (c3, c2))
        )
        self.head = nn.Conv3d(c2, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = functional.max_pool3d(x, kernel_size=2)
        x = self.bottom(x)
        for upsample, decoder in zip(self.upsamplers, self.decoders, strict=True):
            x = decoder(torch.cat([upsample(x), skips.pop()], dim=1))
        return self.head(x)


class SliceBySlice(nn.Module):
    """A 2D network on volumes (B, C, X, Y, Z): slices are folded into the batch and back."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slices = x.movedim(-1, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.network(slices).unflatten(0, (x.shape[0], x.shape[-1])).movedim(1, -1)


class PaddedSlices(nn.Module):
    """A network whose slice count must be a multiple of `multiple`: pads with air, crops back."""

    def __init__(self, network: nn.Module, multiple: int):
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slices = x.shape[-1]
        return self.network(functional.pad(x, (0, -slices % self.multiple)))[..., :slices]


NetworkName = Literal[
    "unet3d", "unet", "attention_unet", "segresnet", "vnet", "unetr", "dynunet", "swin_unetr",
    "resnet34_unet",
]  # fmt: skip


def build_network(
    name: str,
    *,
    in_channels: int,
    out_channels: int,
    base_channels: int,
    input_size: Sequence[int],
) -> nn.Module:
    """Network by name; its keyword arguments are `network_args` of the checkpoint.

    `base_channels` scales the width: 32 is the paper's for unet3d and about MONAI's default for the
    others. `input_size` is (X, Y, Z), which only transformers need. Raises InputError for an
    unknown name.
    """
    from monai.networks import nets

    i, o, c = in_channels, out_channels, base_channels
    half = max(c // 2, 1)
    widths = [half * 2**level for level in range(5)]
    factories: dict[str, Callable[[], nn.Module]] = {
        "unet3d": lambda: UNet3D(i, o, c),
        "unet": lambda: nets.UNet(3, i, o, widths, (2, 2, 2, 2), num_res_units=2, norm="batch"),
        "attention_unet": lambda: nets.AttentionUnet(3, i, o, widths, (2, 2, 2, 2)),
        "segresnet": lambda: nets.SegResNet(3, max(half, 8), i, o),  # norm groups: 8 channels
        "vnet": lambda: nets.VNet(3, i, o),  # of one width
        "unetr": lambda: nets.UNETR(i, o, tuple(input_size), feature_size=half),
        "dynunet": lambda: nets.DynUNet(
            3, i, o, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=[c, 2 * c, 4 * c, 8 * c, 10 * c]
        ),
        "swin_unetr": lambda: PaddedSlices(
            nets.SwinUNETR(i, o, feature_size=12 * max(c // 16, 1)), multiple=32
        ),
        "resnet34_unet": lambda: SliceBySlice(nets.FlexibleUNet(i, o, "resnet34", spatial_dims=2)),
    }
    if name not in factories:
        raise InputError(f"network must be one of {', '.join(factories)}, got {name!r}")
    return factories[name]()


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network; channels last in its weights is the fastest layout in half precision."""
    flat = isinstance(network, SliceBySlice)
    layout = torch.channels_last if flat else torch.channels_last_3d
    return network.to(device, memory_format=layout)


# ---------------------------------------------------------------------------------------
# Metrics: hard, per patient, background excluded
# ---------------------------------------------------------------------------------------


def overlap_counts(prediction: Any, label: Any, num_classes: int) -> np.ndarray:
    """(3, num_classes − 1) voxel counts: in both, in the prediction, in the label; class 1 first.

    `prediction` and `label` are class-index arrays or tensors of one shape.
    """
    if tuple(prediction.shape) != tuple(label.shape):
        raise ValueError(f"shapes must be equal, got {prediction.shape} and {label.shape}")
    counts = []
    for value in range(1, num_classes):
        predicted, true = prediction == value, label == value
        counts.append([int((predicted & true).sum()), int(predicted.sum()), int(true.sum())])
    return np.array(counts, dtype=np.int64).reshape(-1, 3).T


def dice_of_counts(counts: np.ndarray) -> np.ndarray:
    """Dice = 2·|both| / (|prediction| + |label|) per class; NaN where both are empty.

    A prediction on an empty label gives 0: a false alarm must not vanish from the mean.
    """
    both, predicted, true = counts.astype(float)
    with np.errstate(invalid="ignore"):
        return 2 * both / (predicted + true)


def dice_metric(prediction: Any, label: Any, num_classes: int = 2) -> np.ndarray:
    """Hard Dice of one patient for the foreground classes 1 … num_classes − 1, background excluded.

    Args:
        prediction, label: class indices, arrays or tensors of one shape (any number of axes), on
            the scan's own grid if the figure is to be reported.

    Returns:
        (num_classes − 1,) Dice in 0..1; NaN where a class is in neither (`mean_dice` skips it).
    """
    return dice_of_counts(overlap_counts(prediction, label, num_classes))


def mean_dice(per_patient: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over patients of (patients, classes) Dice, NaN left out, and how many counted."""
    table = np.asarray(per_patient, dtype=float)
    counted = np.isfinite(table).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.nansum(table, axis=0) / counted, counted


# ---------------------------------------------------------------------------------------
# Checkpoints: plain Python types and tensors, so that loading cannot run code
# ---------------------------------------------------------------------------------------

SCHEMA = 1


def save_checkpoint(
    path: Path,
    *,
    network_args: dict[str, Any],
    network_state: dict[str, torch.Tensor],
    preprocessing: dict[str, Any],
    inference: dict[str, Any],
    labels: dict[str, Sequence[int]],
    config: dict[str, Any],
    epoch: int,
    val_dice: float,
    history: list[dict[str, float]],
    step_losses: list[float] | None = None,
    averaging_state: dict[str, Any] | None = None,
    optimizer_state: dict[str, Any] | None = None,
    scheduler_state: dict[str, Any] | None = None,
    scaler_state: dict[str, Any] | None = None,
    rng_state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint whole or not at all. These keywords are its schema (see the README)."""
    content = {key: value for key, value in locals().items() if key != "path"}
    versions = {"torch": str(torch.__version__), "monai": version("monai"), "schema": SCHEMA}
    with atomic_write(path) as temporary:
        torch.save({"schema": SCHEMA, **content, "versions": versions}, temporary)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; refuses anything else with a message."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train one first, or check --checkpoint")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable checkpoint of this project ({str(error).splitlines()[0]}); "
            "the file is damaged or foreign, use another one"
        ) from error
    found = checkpoint.get("schema") if isinstance(checkpoint, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: checkpoint schema must be {SCHEMA}, got {found}; train it again")
    return checkpoint


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one (under torchrun: this process's own), else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but torch sees no GPU; use --device cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float16 on older GPUs, else float32."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Context in which convolutions run in `precision`; does nothing for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all processes under torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes when torchrun started this one; otherwise do nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's collectives use the current one
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    values = [value] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only raises a flag, so that the batch under way is finished; yields its reader.

    Under torchrun, and outside the main thread, Ctrl-C keeps its usual meaning.
    """
    if dist.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    max_epochs: int,
    folder: Path,
    device: torch.device,
    checkpoint: dict[str, Any],
    val_interval: int = 1,
    precision: str = "auto",
    gradient_clip: float = 0.0,
    ema_decay: float = 0.0,
    patience: int = 0,
    compile_network: bool = False,
    tensorboard: bool = False,
    resume: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Fit `model`; leave best.pt, last.pt, metrics.csv, curves.png and preview.png in `folder`.

    Args:
        model: on `device`; under torchrun each process brings its own copy.
        train_loader, val_loader: batches of {"image" (B, C, X, Y, Z), "label" (B, 1, X, Y, Z) class
            indices, "case" names}; `train_loader.set_epoch(epoch, step)` starts an epoch at a step.
        loss_function: (logits, label) → scalar.
        scheduler: stepped once an epoch.
        checkpoint: what every checkpoint carries along: network_args, preprocessing, inference,
            labels (name → raw values) and config.
        val_interval: validate every so many epochs, and after the last one.
        gradient_clip: largest norm of the gradient; 0 leaves it alone.
        ema_decay: validate and keep, as best.pt, an exponential moving average of the weights, with
            this decay per step; 0 uses the weights as they are.
        patience: stop after so many validations without a better Dice; 0 never stops early.
        compile_network: run the network through torch.compile.
        tensorboard: also write the history as TensorBoard event files.
        resume: content of a last.pt, to go on exactly where it was written.

    Returns:
        The history: one row of numbers per epoch, as in metrics.csv.

    Ctrl-C finishes the batch under way, writes last.pt and raises KeyboardInterrupt.

    Validation Dice is counted per patient over its sub-volumes at the network's resolution. It
    chooses best.pt; the figure to report is apply_model.py's, on the scan's own grid.
    """
    names = list(checkpoint["labels"])[1:]
    dtype = pick_precision(precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = None
    if ema_decay:
        moving = get_ema_multi_avg_fn(ema_decay)
        average = AveragedModel(model, multi_avg_fn=moving, use_buffers=True)
    kept = average.module if average else model  # what is validated, saved and applied later
    history: list[dict[str, float]] = []
    losses: list[float] = []
    if resume is not None:
        history, losses = _restore(resume, model, average, optimizer, scheduler, scaler)
    network = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    network = torch.compile(network) if compile_network else network
    context = {"loss_function": loss_function, "device": device, "precision": dtype}

    def after_step() -> None:
        if average:
            average.update_parameters(model)

    def state() -> dict[str, Any]:
        return {
            **checkpoint,
            "network_state": kept.state_dict(),
            "epoch": len(history),
            "val_dice": history[-1].get("val_dice", math.nan) if history else math.nan,
            "history": history,
        }

    def resumable() -> dict[str, Any]:
        return {
            **state(),
            "step_losses": losses,
            "averaging_state": average
            and {"weights": model.state_dict(), "steps": int(average.n_averaged)},
            "optimizer_state": optimizer.state_dict(),
            "scheduler_state": scheduler.state_dict(),
            "scaler_state": scaler.state_dict(),
            "rng_state": {"cpu": torch.get_rng_state()},
        }

    first_process = rank_and_size()[0] == 0
    with delayed_interrupt() as interrupted:
        for epoch in range(len(history) + 1, max_epochs + 1):
            row = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
            train_loader.set_epoch(epoch, len(losses))
            row |= train_one_epoch(
                network, train_loader, optimizer, scaler, losses, interrupted, after_step,
                **context, clip=gradient_clip, title=f"epoch {epoch}/{max_epochs}",
            )  # fmt: skip
            if interrupted():
                save_checkpoint(folder / "last.pt", **resumable())
                print(f"stopped in epoch {epoch}; go on with: train.py --resume {folder}")
                raise KeyboardInterrupt
            losses = []
            scheduler.step()
            if epoch % val_interval == 0 or epoch == max_epochs:
                row |= validate(kept, val_loader, **context, class_names=names)
            history.append(row)
            if first_process:
                if _best_epoch(history) == epoch:
                    save_checkpoint(folder / "best.pt", **state())
                save_checkpoint(folder / "last.pt", **resumable())
                _report(history, names, folder)
                if tensorboard:
                    _write_events(row, folder)
                if "val_dice" in row:
                    figure = preview_figure(kept, val_loader, device, dtype, names)
                    save_figure(figure, folder / "preview.png")
            if patience and _validations_since_best(history) >= patience:
                print(f"no better Dice in {patience} validations: stopped after epoch {epoch}")
                break
    return history


def _restore(
    saved: dict[str, Any],
    model: nn.Module,
    average: AveragedModel | None,
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
) -> tuple[list[dict[str, float]], list[float]]:
    """Put everything back as it was; returns the history and the losses of a begun epoch."""
    if saved["optimizer_state"] is None:
        raise InputError("a best.pt holds no optimizer state; resume from the run's last.pt")
    model.load_state_dict(saved["network_state"])
    if average:
        average.module.load_state_dict(saved["network_state"])
        average.n_averaged.fill_(saved["averaging_state"]["steps"])
        model.load_state_dict(saved["averaging_state"]["weights"])
    optimizer.load_state_dict(saved["optimizer_state"])
    scheduler.load_state_dict(saved["scheduler_state"])
    scaler.load_state_dict(saved["scaler_state"])
    torch.set_rng_state(saved["rng_state"]["cpu"].cpu())
    return list(saved["history"]), list(saved["step_losses"])


def train_one_epoch(
    network: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    losses: list[float],
    interrupted: Callable[[], bool],
    after_step: Callable[[], None],
    *,
    loss_function: nn.Module,
    device: torch.device,
    precision: torch.dtype,
    clip: float,
    title: str,
) -> dict[str, float]:
    """One pass over the training sub-volumes, or the rest of one; appends to `losses`.

    The loss is fetched from the GPU only when the bar is redrawn, so that the GPU never waits; a
    loss that is not finite stops the run there, with the names of its cases. Returns mean loss and
    speed.
    """
    network.train()
    pending: list[tuple[list[str], torch.Tensor]] = []
    start = redrawn = time.perf_counter()
    waited, count, steps = 0.0, 0, len(losses) + len(loader)
    rank, processes = rank_and_size()
    bar = tqdm(total=steps, initial=len(losses), desc=title, unit="batch", leave=False)
    bar.disable = rank > 0
    batches = iter(loader)
    with bar:
        while len(losses) + len(pending) < steps and not interrupted():
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            image = batch[IMAGE].to(device, non_blocking=True, memory_format=torch.channels_last_3d)
            label = batch[LABEL].to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, precision):
                logits = network(image)
            loss = loss_function(logits.float(), label)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            after_step()
            count += len(image)
            pending.append((list(batch["case"]), loss.detach()))
            bar.update()
            if len(losses) + len(pending) == steps or time.perf_counter() - redrawn > 0.5:
                _fetch_losses(pending, losses)
                redrawn = time.perf_counter()
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
    batches.close()
    _fetch_losses(pending, losses)
    seconds = time.perf_counter() - start
    return {
        "train_loss": float(np.mean(gathered(np.mean(losses) if losses else math.nan))),
        "samples_per_s": processes * count / seconds,
        "data_wait_percent": 100 * waited / seconds,
        "peak_memory_mb": _peak_memory_mb(device),
    }


def _fetch_losses(pending: list[tuple[list[str], torch.Tensor]], losses: list[float]) -> None:
    """Move the losses that still wait on the device to `losses`."""
    values = torch.stack([loss for _, loss in pending]).tolist() if pending else []
    for (cases, _), value in zip(pending, values, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"the loss became {value} in a batch of {', '.join(cases)}; look at these cases "
                "(preprocess.png), lower --learning-rate, or use --precision fp32"
            )
    losses += values
    pending.clear()


def _peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: Any,
    *,
    loss_function: nn.Module,
    device: torch.device,
    precision: torch.dtype,
    class_names: Sequence[str],
) -> dict[str, float]:
    """Mean loss of batches with foreground, and Dice per class.

    Dice: voxels counted per patient, then the mean over patients.
    """
    model.eval()
    losses: list[float] = []
    counts: dict[str, np.ndarray] = {}
    for batch in tqdm(loader, desc="validation", unit="batch", leave=False):
        label = batch[LABEL].to(device)
        with autocast(device, precision):
            logits = model(batch[IMAGE].to(device, memory_format=torch.channels_last_3d))
        if label.any():  # the Dice of nothing is nearly always 0, and would drown the others
            losses.append(loss_function(logits.float(), label).item())
        prediction = predicted_classes(logits)
        for case, predicted, true in zip(batch["case"], prediction, label[:, 0], strict=True):
            new = overlap_counts(predicted, true, len(class_names) + 1)
            counts[case] = counts.get(case, 0) + new
    merged: dict[str, np.ndarray] = {}  # a patient's sub-volumes may lie in several processes
    for part in gathered(counts):
        for case, count in part.items():
            merged[case] = merged.get(case, 0) + count
    dice, _ = mean_dice([dice_of_counts(count) for count in merged.values()])
    loss = float(np.mean([value for part in gathered(losses) for value in part] or [math.nan]))
    row = {"val_loss": loss, "val_dice": float(np.nanmean(dice))}
    return row | {f"val_dice_{name}": float(d) for name, d in zip(class_names, dice, strict=True)}


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """(B, C, …) logits → (B, …) uint8 class indices."""
    if logits.shape[1] == 2:  # argmax over two classes is 100 times slower than a comparison
        return (logits[:, 1] > logits[:, 0]).to(torch.uint8)
    return logits.argmax(dim=1).to(torch.uint8)


def _validated(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row for row in history if math.isfinite(row.get("val_dice", math.nan))]


def _best_epoch(history: list[dict[str, float]]) -> int:
    """Epoch of the highest validation Dice (the first one of equals); 0 before any validation."""
    best = max(_validated(history), key=lambda row: row["val_dice"], default={"epoch": 0})
    return int(best["epoch"])


def _validations_since_best(history: list[dict[str, float]]) -> int:
    best = _best_epoch(history)
    return sum(row["epoch"] > best for row in _validated(history))


def _write_events(row: dict[str, float], folder: Path) -> None:
    """One epoch as TensorBoard scalars; a file per epoch, so that a crash tears none."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "events"), filename_suffix=f".{row['epoch']}") as writer:
        for key, value in row.items():
            writer.add_scalar(key, value, row["epoch"])


def _report(history: list[dict[str, float]], names: Sequence[str], folder: Path) -> None:
    """metrics.csv, curves.png and one line on the terminal."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with (
        atomic_write(folder / "metrics.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
    save_figure(curves_figure(history, names), folder / "curves.png")
    row = history[-1]
    line = f"epoch {row['epoch']}: loss {row['train_loss']:.4f}"
    if "val_dice" in row:
        mark = " (best so far)" if _best_epoch(history) == row["epoch"] else ""
        line += f", validation loss {row['val_loss']:.4f}, Dice {row['val_dice']:.4f}{mark}"
    print(f"{line}, {row['samples_per_s']:.2f} samples/s")


# ---------------------------------------------------------------------------------------
# Pictures: radiological view (the patient's right on the picture's left), colour-blind safe
# ---------------------------------------------------------------------------------------

# Okabe & Ito's palette. Reference and prediction must be told apart by everyone, on grey.
TRUTH_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#E69F00"
LABEL_COLOURS = {1: "#E69F00", 2: "#CC79A7", 3: "#009E73", 4: "#F0E442", 5: "#0072B2"}
PLANES = {  # plane → (axis that is cut, letters at the picture's left, right, top, bottom)
    "axial": (2, "RLAP"),
    "coronal": (1, "RLSI"),
    "sagittal": (0, "APSI"),
}


def grey_window(scan: np.ndarray) -> tuple[float, float]:
    """Values shown as black and white: HU_WINDOW, or of an array that is no CT (MR) its own range.

    CT in HU has fat and air below 0.
    """
    sample = scan[tuple(slice(None, None, max(1, size // 64)) for size in scan.shape)]
    if np.mean(sample < -30) >= 0.01:
        return HU_WINDOW
    low, high = np.percentile(sample, [1, 99])
    return float(low), float(max(high, low + 1))


def draw_plane(
    axes: Any,
    image: np.ndarray,
    plane: str,
    index: int,
    spacing: tuple[float, float, float],
    outlines: dict[str, np.ndarray] | None = None,
    window: tuple[float, float] = HU_WINDOW,
) -> None:
    """Draw one slice of a RAS array (X, Y, Z) with outlines of masks, to scale, with its letters.

    `outlines` maps a colour to a mask (X, Y, Z), or to class indices, between which lines are drawn
    too; `spacing` is in mm per voxel.
    """
    cut, (left, right, top, bottom) = PLANES[plane]
    across, up = (step for axis, step in enumerate(spacing) if axis != cut)

    def picture(array: np.ndarray) -> np.ndarray:  # first axis runs leftwards, second one up
        # np.take would copy a whole volume that is stored in Fortran order
        return np.moveaxis(array, cut, 0)[index][::-1, ::-1].T

    grey = picture(image)
    axes.imshow(grey, cmap="gray", vmin=window[0], vmax=window[1], aspect=up / across)
    for colour, mask in (outlines or {}).items():
        flat = picture(mask)
        if flat.any() and not flat.all():
            levels = np.arange(0.5, int(flat.max()))
            axes.contour(flat, levels=levels, colors=[colour] * len(levels), linewidths=1.2)
    marks = {left: (0.02, 0.5), right: (0.98, 0.5), top: (0.5, 0.97), bottom: (0.5, 0.03)}
    for letter, (x, y) in marks.items():
        axes.text(
            x, y, letter, transform=axes.transAxes, color="white", fontsize=9, weight="bold",
            ha={0.02: "left", 0.98: "right"}.get(x, "center"),
            va={0.97: "top", 0.03: "bottom"}.get(y, "center"),
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])


def outlines_of(
    truth: np.ndarray | None, prediction: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """Class indices → colour and mask for `draw_plane`: truth in blue, each class in its colour."""
    known = {} if truth is None else {TRUTH_COLOUR: truth}
    classes = range(1, num_classes)
    return known | {class_colour(value): prediction == value for value in classes}


def class_colour(value: int) -> str:
    """Colour of class 1, 2, …; after five they come again."""
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS) + 1]


def add_legend(figure: Any, class_names: Sequence[str], truth: bool) -> None:
    """Say below a figure which colour is what."""
    from matplotlib.lines import Line2D

    lines = {"truth": TRUTH_COLOUR} if truth else {}
    for value, name in enumerate(class_names, start=1):
        lines[f"predicted {name}"] = class_colour(value)
    handles = [Line2D([], [], color=colour, label=text) for text, colour in lines.items()]
    columns = max(1, min(len(handles), int(figure.get_figwidth() // 2)))  # an entry takes 2 inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def planes_figure(
    title: str,
    image: np.ndarray,
    spacing: tuple[float, float, float],
    outlines: dict[str, np.ndarray],
    window: tuple[float, float] | None = None,
    axial_slices: int = 0,
) -> Any:
    """Figure of the axial, coronal and sagittal slice with most foreground, RAS array in HU.

    `outlines`: see `draw_plane`; the first one chooses the slices. `window`: as `grey_window`. With
    `axial_slices` a second row shows so many, from the lowest to the highest with an outline.
    Returns a matplotlib Figure for `save_figure`.
    """
    from matplotlib.figure import Figure

    window = window or grey_window(image)
    figure = Figure(figsize=(13, 4.6 + 2.6 * bool(axial_slices)), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=(4.6, 2.6)) if axial_slices else [figure]
    guide = next(iter(outlines.values()))
    for axes, (plane, (cut, _)) in zip(rows[0].subplots(1, 3), PLANES.items(), strict=True):
        counts = np.count_nonzero(guide, axis=tuple(axis for axis in range(3) if axis != cut))
        index = int(counts.argmax()) if counts.any() else image.shape[cut] // 2
        draw_plane(axes, image, plane, index, spacing, outlines, window)
        axes.set_title(f"{plane}, slice {index + 1} of {image.shape[cut]}", fontsize=10)
    if axial_slices:
        used = [np.flatnonzero(mask.any(axis=(0, 1))) for mask in outlines.values()]
        used = np.concatenate(used) if sum(map(len, used)) else np.array([0, image.shape[2] - 1])
        chosen = np.linspace(used.min(), used.max(), axial_slices).round().astype(int)
        for axes, index in zip(rows[1].subplots(1, axial_slices), chosen, strict=True):
            draw_plane(axes, image, "axial", int(index), spacing, outlines, window)
            axes.set_title(f"slice {index + 1}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, facecolor="white")


def curves_figure(history: list[dict[str, float]], class_names: Sequence[str]) -> Any:
    """Loss and Dice over the epochs, the best epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, dice_axes = figure.subplots(1, 2)

    def line(axes: Any, key: str, label: str, colour: str, style: str) -> None:
        points = [(row["epoch"], row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)

    line(loss_axes, "train_loss", "training", "#0072B2", "-o")
    line(loss_axes, "val_loss", "validation", "#E69F00", "-s")
    for value, name in enumerate(class_names, start=1):
        line(dice_axes, f"val_dice_{name}", name, class_colour(value), "-s")
    best = _best_epoch(history)
    if best:
        dice_axes.axvline(best, color="0.6", linestyle=":", label=f"best.pt (epoch {best})")
    loss_axes.set(xlabel="epoch", ylabel="loss", title="Loss")
    dice_axes.set(xlabel="epoch", ylabel="Dice", ylim=(0, 1), title="Dice of validation patients")
    for axes in (loss_axes, dice_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


@torch.no_grad()
def preview_figure(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    precision: torch.dtype,
    class_names: Sequence[str],
) -> Any:
    """The same few validation slices every time: truth and prediction outlined.

    Of each sub-volume the slice with most of its last class, the tumour where there is one.
    """
    from matplotlib.figure import Figure

    model.eval()
    examples = loader.dataset.examples(6)
    columns = math.ceil(len(examples) / math.ceil(len(examples) / 3))
    rows = math.ceil(len(examples) / columns)
    figure = Figure(figsize=(4 * columns, 4.2 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(examples) :]:
        axes.axis("off")
    for axes, item in zip(grid, examples, strict=False):
        with autocast(device, precision):
            logits = model(item[IMAGE][None].to(device))
        truth = item[LABEL][0].cpu().numpy().astype(np.uint8)
        found = predicted_classes(logits)[0].cpu().numpy()
        masks = outlines_of(truth, found, len(class_names) + 1)
        middle = int((truth == max(truth.max(), 1)).sum(axis=(0, 1)).argmax())
        image = item[IMAGE][0].float().cpu().numpy()
        draw_plane(axes, image, "axial", middle, (1.0, 1.0, 1.0), masks, window=(0.0, 1.0))
        axes.set_title(f"{item['case']}, slice {item['first_slice'] + middle + 1}", fontsize=10)
    add_legend(figure, class_names, truth=True)
    return figure


def show_patient(
    data: dict[str, Any], slice_index: int | None = None, path: Path | None = None
) -> Any:
    """Show one axial slice of a sub-volume or volume: image, label outline, prediction outline.

    Args:
        data: "image" and, when known, "label" and "pred": (1, X, Y, Z) or (X, Y, Z) RAS arrays or
            tensors; an image in 0..1 or in HU.
        slice_index: along the last axis; the slice with most label when left out.
        path: write a PNG there; without it, draw into the notebook or open a window.

    Returns:
        The matplotlib Figure.
    """
    arrays = {
        key: np.asarray(torch.as_tensor(data[key]).detach().float().cpu()).reshape(
            tuple(data[key].shape)[-3:]
        )
        for key in (IMAGE, LABEL, PRED)
        if key in data
    }
    colours = {LABEL: TRUTH_COLOUR, PRED: PREDICTION_COLOUR}
    masks = {colours[key]: arrays[key].astype(np.uint8) for key in (LABEL, PRED) if key in arrays}
    image = arrays[IMAGE]
    if slice_index is None:
        guide = next(iter(masks.values()), image > image.mean())
        slice_index = int((guide > 0).sum(axis=(0, 1)).argmax())
    window = (0.0, 1.0) if image.min() >= 0 and image.max() <= 1 else HU_WINDOW
    if path is None:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(6, 6), layout="constrained")
    else:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    draw_plane(axes, image, "axial", slice_index, (1.0, 1.0, 1.0), masks, window)
    shown = " · ".join(
        {LABEL: "label in blue", PRED: "prediction in orange"}[k] for k in arrays if k != IMAGE
    )
    axes.set_title(
        f"slice {slice_index + 1} of {image.shape[2]}" + (f" · {shown}" if shown else "")
    )
    if path is None:
        pyplot.show()
    else:
        save_figure(figure, path)
    return figure
