"""DICOM SEG ↔ label map on the grid of its scan. Segments are known by name, else by their code.

As a script it converts:

    python -m data.seg to-nifti SERIES OUT.nii.gz             a series (folder or a slice of it)
    python -m data.seg to-series SCAN.nii.gz FOLDER           a scan as CT series, of nobody
    python -m data.seg to-seg LABEL.nii.gz SERIES OUT.dcm     a label map as SEG of a series
"""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tyro

from data.dicom import (
    SEGMENT_VALUE,
    _list_segments,
    find_group,
    is_dicom,
    is_seg_header,
    list_items,
    name_object,
    read_numbers,
    read_plane,
    read_segments,
    read_series,
    read_text,
    read_whole,
    write_series,
)
from data.files import InputError, atomic_write
from data.labels import BACKGROUND, Labels, find_label, index_classes, is_tumour
from data.pictures import class_colour
from data.settings import run_script
from data.volumes import TO_LPS, Volume, read_file

TOLERANCE = 0.2  # voxels that a frame may lie beside the voxels of its scan: no shift by a half
TOLD_APART = 0.01  # voxels from which on it is told that a frame lies beside its slice


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


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------


def read_seg(path: Path, scan: Volume, declared: Labels) -> Volume:
    """A DICOM SEG (its file, or the folder of one) as a label map on the grid of `scan`.

    Values: see `choose_segment_values`; `classes` of the result has them by the segments' names.
    Where segments overlap a tumour wins, else the smaller one, and it is told. Raises InputError,
    and nothing else, for what is no SEG or lies on another grid or in another frame of reference.
    """
    import pydicom

    try:
        path = find_seg(path) if path.is_dir() else path
        with warnings.catch_warnings(action="ignore"):
            header = pydicom.dcmread(path)
            if not is_seg_header(header):
                found = name_object(header) or "image"
                raise InputError(f"{path}: must be a DICOM SEG, got {found}; name the SEG's file")
            _refuse_other_scan(path, header, scan)
            return _lay_segments(path, header, scan, declared)
    except InputError:
        raise
    except Exception as error:  # a header or a decoder met what it was not made for
        raise InputError(
            f"{path}: cannot be read as DICOM SEG ({type(error).__name__}: {error}); the file is "
            "cut off or damaged, export it again, or as NIfTI"
        ) from error


def find_seg(folder: Path) -> Path:
    """The one DICOM SEG directly in a folder."""
    import pydicom

    found = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and is_dicom(file):
            tags = ["Modality", "SOPClassUID"]
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
            found += [file] * is_seg_header(header)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:3])
        raise InputError(f"{folder}: must hold one DICOM SEG, got {names or 'none'}; name its file")
    return found[0]


def _refuse_other_scan(path: Path, header: Any, scan: Volume) -> None:
    """A SEG says in which frame of reference it was drawn; so does a scan that was DICOM."""
    import pydicom

    if scan.files:
        tags = ["FrameOfReferenceUID"]
        of_scan = pydicom.dcmread(scan.files[0], stop_before_pixels=True, specific_tags=tags)
        uids = {read_text(one, tags[0]) for one in (header, of_scan)} - {""}
        if len(uids) > 1:
            raise InputError(
                f"{path}: not a DICOM SEG on the grid of its scan (its FrameOfReferenceUID is not "
                f"that of {scan.name}); use the SEG of this scan",
                kind="grid",
            )


@dataclass(frozen=True, eq=False)
class Frame:
    """One plane of a SEG: voxel of its first pixel, and steps along a row and down a column."""

    segment: int  # 0 where the pixels hold the numbers of segments (LABELMAP)
    first: np.ndarray  # (3, 1) voxel of the scan
    across: np.ndarray  # (3, 1)
    down: np.ndarray  # (3, 1)
    apart: float  # voxels that its corner lies beside the scan's voxels

    def find_voxels(self, mask: np.ndarray) -> np.ndarray:
        """(3, n): the scan's voxels on which the pixels of a mask (rows, columns) lie."""
        rows, columns = np.nonzero(mask)
        return self.first + self.across * columns + self.down * rows


def _list_frames(path: Path, header: Any, scan: Volume) -> list[Frame]:
    """Every frame on the scan's voxels. InputError where it lies between them."""
    rows, columns = (read_whole(header, path, key, range(1, 65536)) for key in ("Rows", "Columns"))
    to_voxel = np.linalg.inv(TO_LPS @ scan.affine)
    shared = list_items(header, "SharedFunctionalGroupsSequence")[:1]
    frames = []
    for own in list_items(header, "PerFrameFunctionalGroupsSequence"):
        groups = [own, *shared]
        names = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "SegmentIdentification")
        *place, what = (find_group(groups, f"{name}Sequence") for name in names)
        position, axes, spacing = read_plane(path, *place)
        first = nib.affines.apply_affine(to_voxel, position)
        steps = to_voxel[:3, :3] @ (axes.T * spacing)
        whole, there = np.rint(steps), np.rint(first)
        off = np.abs(first - there) + np.abs(steps - whole) @ [columns - 1, rows - 1]
        if off.max() > TOLERANCE or not np.array_equal(whole.T @ whole, np.eye(2)):
            raise _wrong_grid(path, scan, f"frames lie up to {off.max():.2g} voxels beside it")
        number = read_numbers(what, path, "ReferencedSegmentNumber", default=[0])[0]
        across, down = whole.astype(int).T[:, :, None]
        frames.append(Frame(int(number), there.astype(int)[:, None], across, down, off.max()))
    if not frames:
        raise InputError(f"{path}: PerFrameFunctionalGroupsSequence lacks; export the SEG again")
    return frames


def _wrong_grid(path: Path, scan: Volume, reason: str) -> InputError:
    return InputError(
        f"{path}: not a DICOM SEG on the grid of its scan {scan.name} ({reason}); export it again "
        "from the series it belongs to, or as NIfTI",
        kind="grid",
    )


def _list_masks(
    path: Path, header: Any, frames: Sequence[Frame]
) -> Iterator[tuple[Frame, int, np.ndarray]]:
    """Yield frame, segment number and mask (rows, columns) of every segment in every frame."""
    from pydicom.pixels import iter_pixels

    kind = read_text(header, "SegmentationType")
    half = 0.5
    if kind == "FRACTIONAL":
        (highest,) = read_numbers(header, path, "MaximumFractionalValue", default=[255])
        half = 0.5 * highest
    for frame, plane in zip(frames, iter_pixels(header), strict=True):
        if kind == "LABELMAP":
            for number in np.unique(plane[plane > 0]):
                yield frame, int(number), plane == number
        else:
            yield frame, frame.segment, plane >= half


def _lay_segments(path: Path, header: Any, scan: Volume, declared: Labels) -> Volume:
    """The segments on the scan: two rounds, the first to know which of two is the smaller."""
    names = {number: name for number, name, _ in _list_segments(header, path)}
    values = choose_segment_values(read_segments(header, path), declared)
    frames = _list_frames(path, header, scan)
    sizes: dict[int, int] = defaultdict(int)
    for _, number, mask in _list_masks(path, header, frames):
        sizes[number] += int(np.count_nonzero(mask))
    if unknown := [number for number, size in sizes.items() if size and number not in names]:
        raise InputError(
            f"{path}: SegmentSequence must describe every segment, not so {unknown}; export it anew"
        )
    order = sorted(names, key=lambda n: (is_tumour(names[n]), -sizes[n], n))
    rank = {number: place for place, number in enumerate(order, start=1)}  # the higher wins
    array = np.zeros(scan.shape, np.min_scalar_type(len(rank)), order="F")
    overlap = 0
    for frame, number, mask in _list_masks(path, header, frames):
        there = frame.find_voxels(mask)
        if (there < 0).any() or (there >= np.reshape(scan.shape, (3, 1))).any():
            raise _wrong_grid(path, scan, f"the segment {names[number]} reaches out of it")
        voxels, place = tuple(there), rank.get(number, 0)
        overlap += int(np.count_nonzero(array[voxels]))
        array[voxels] = np.maximum(array[voxels], place)
    table = np.array([0, *(values[names[number]] for number in order)])
    array = table.astype(np.min_scalar_type(int(table.max())))[array]
    notes = [f"{overlap} voxels are in several segments: there tumours, else smaller ones, win"]
    notes *= overlap > 0
    if (apart := max(frame.apart for frame in frames)) > TOLD_APART:
        notes.append(f"scan and label map lie up to {apart:.2g} voxels apart")
    label = Volume(np.asfortranarray(array), scan.affine, str(path), notes=tuple(notes))
    return replace(label, classes=values, header=scan.header, oriented=scan.oriented)


# ---------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------


NEEDED_BY_SEG = (
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID",
)  # fmt: skip
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime",
)  # fmt: skip


def write_seg(label: Volume, scan: Volume, classes: Labels, path: Path) -> list[str]:
    """Write a label map as DICOM SEG of the series that `scan` was read from, and read it back.

    `label` has the scan's own axes and raw values; `classes` says which are which, background
    first. Returns why there is none, if so: the scan is no series, or not one to refer to.
    """
    import pydicom

    if not scan.files:
        return ["no DICOM SEG: the scan is no DICOM series"]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in scan.files]
    if "PerFrameFunctionalGroupsSequence" in headers[0]:
        return ["no DICOM SEG: the series is one enhanced file; export it as single slices"]
    if lacking := [key for key in NEEDED_BY_SEG if not read_text(headers[0], key)]:
        return [f"no DICOM SEG: the series has no {', '.join(lacking)} to refer to"]
    array = index_classes(label.read(), classes)
    try:
        for header, key in itertools.product(headers, MAY_BE_EMPTY):
            header.setdefault(key, None)
        with warnings.catch_warnings(action="ignore"):  # of names that are no person's
            seg = _build_seg(headers, array, classes)
    except Exception as error:  # highdicom raises whatever the series' headers lead it to
        return [f"no DICOM SEG: the headers of the series are not sound ({error})"]
    with atomic_write(path) as temporary:
        seg.save_as(temporary)
        written = read_seg(temporary, scan, {name: (i,) for i, name in enumerate(classes)})
        if not np.array_equal(written.read(), array):
            raise InputError(f"{path}: voxels changed in writing; nothing was kept")
    return []


def _build_seg(headers: list[Any], array: np.ndarray, classes: Labels) -> Any:
    """DICOM SEG of class indices (X, Y, Z) that refers to the slices of a series."""
    import highdicom
    import torch

    return highdicom.seg.Segmentation(
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
