"""DICOM headers: what a file is, and its tags, read so that nothing malformed gets past."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import InputError

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
