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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tyro

from data import dicom
from data.files import InputError, atomic_write, list_plain_files, one_error
from data.labels import BACKGROUND, Labels, find_label, index_classes, is_tumour, read_description
from data.settings import run_script
from data.volumes import TO_LPS, Volume, read_file

TOLERANCE = 0.2  # voxels that a frame may lie beside the voxels of its scan
TOLD_APART = 0.01  # voxels from which on a note reports it
NEEDED_BY_SEG = (
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID",
)  # fmt: skip
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime",
)  # fmt: skip


def choose_segment_values(segments: Mapping[str, int], declared: Labels) -> dict[str, int]:
    """Return the label value of each segment: the first value of the declared name that it means.
    Others keep their number, or get an own value where it is taken: SEGs may number differently."""
    known = {name: find_label(name, declared) for name in segments}
    values = {name: declared[label][0] for name, label in known.items() if label is not None}
    own = {value for some in declared.values() for value in some}
    for name, number in segments.items():
        if name not in values:
            taken = set(values.values()) | own
            values[name] = number if number not in taken else max(taken) + 1
    return values


def rename_segments(label: Volume, path: Path, declared: Labels) -> Volume:
    """Return a .seg.nrrd with the declared values of the names that its header gives its own."""
    own = read_description(path) if path.suffix.lower() == ".nrrd" else None
    names = {n: v for n, v in own.labels.items() if n != BACKGROUND} if own else {}
    chosen = choose_segment_values({name: values[0] for name, values in names.items()}, declared)
    known = [name for name in names if find_label(name, declared)]
    if all(chosen[name] in names[name] for name in known):
        return label  # as declared, or of names that the user gave values
    array = label.read()
    named = array.astype(np.result_type(array.dtype, np.min_scalar_type(max(chosen.values()))))
    for name, values in names.items():
        named[np.isin(array, values)] = chosen[name]
    return replace(label, data=named, convert=None, classes=chosen)


# SEG → label map


def read_seg(path: Path, scan: Volume, declared: Labels, trust_grid: bool = False) -> Volume:
    """Return a DICOM SEG (a file, or the folder of one) as a label map on the grid of `scan`.
    `classes` of the result has the values (`choose_segment_values`) by the segments' names.
    `trust_grid` takes a SEG of another frame of reference, too. Raises InputError, and nothing
    else, for anything that is no SEG or lies on another grid."""
    import pydicom

    if path.is_dir():
        found = [item.path for item in dicom.find_dicom(list_plain_files(path)) if item.is_seg]
        if len(found) != 1:
            names = ", ".join(map(str, found[:3])) or "none"
            raise InputError(f"{path}: must hold one DICOM SEG, got {names}; name its file")
        path = found[0]
    with one_error(path, "cannot be read as DICOM SEG"):
        header = pydicom.dcmread(path)
        if not dicom.is_seg_header(header):
            other = dicom.name_object(header) or "image"
            raise InputError(f"{path}: must be a DICOM SEG, got {other}; name the SEG's file")
        notes = compare_frames(path, header, scan, trust_grid)
        segments = dicom.list_segments(header, path)
        values = choose_segment_values({name: value for _, name, value in segments}, declared)
        known = {number: name for number, name, _ in segments}
        voxels, apart = _find_voxels(path, header, scan)
    if unknown := sorted(voxels.keys() - known.keys()):
        raise dicom.wrong_tag(path, "SegmentSequence", f"one that describes {unknown}", [*known])
    structures = [(known[n], values[known[n]], flat) for n, flat in voxels.items()]
    array, overlap = lay_structures(structures, scan.shape)
    if overlap:
        notes.append(f"{overlap} voxels are in several segments: tumours, else smaller ones, win")
    if apart > TOLD_APART:
        notes.append(f"scan and label map lie up to {apart:.2g} voxels apart")
    label = scan.like(array)
    return replace(label, name=str(path), notes=tuple(notes), classes=values)


def compare_frames(path: Path, header: Any, scan: Volume, trust: bool) -> list[str]:
    """Return a note where the frame of reference is not the scan's; InputError without `trust`."""
    headers = (header, dicom.read_header(scan.files[0])) if scan.files else (header,)
    if len({dicom.read_text(one, "FrameOfReferenceUID") for one in headers} - {""}) < 2:
        return []
    reason = "another frame of reference: FrameOfReferenceUID"
    if not trust:
        raise wrong_grid(path, scan, reason)
    return [f"scan and label map have {reason}"]


def wrong_grid(path: Path | str, scan: Volume, reason: str, trust: bool = True) -> InputError:
    """Return the error of a label map that does not lie on its scan; `trust`: it may help."""
    remedy = "use the label map of this scan" + trust * ", or, if it is: --trust-image-grid"
    return InputError(f"{path}: not on the grid of {scan.name} ({reason}); {remedy}", kind="grid")


def _find_voxels(path: Path, header: Any, scan: Volume) -> tuple[dict[int, np.ndarray], float]:
    """Return segment number → voxels of `scan` (flat, first axis fastest), for `lay_structures`;
    and how many voxels the frames lie beside those of the scan at most."""
    from pydicom.pixels import iter_pixels

    to_voxel = np.linalg.inv(TO_LPS @ scan.affine)
    shared = dicom.list_items(header, "SharedFunctionalGroupsSequence")[:1]
    own = dicom.list_items(header, "PerFrameFunctionalGroupsSequence")
    kind, half, worst = dicom.read_text(header, "SegmentationType"), 0.5, 0.0
    if kind == "FRACTIONAL":
        half *= dicom.read_numbers(header, path, "MaximumFractionalValue", default=[255])[0]
    voxels: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    for frame, plane in zip(own, iter_pixels(header), strict=True):
        position, steps = dicom.read_plane(path, [frame, *shared])
        first, turn = nib.affines.apply_affine(to_voxel, position), to_voxel[:3, :3] @ steps.T
        whole, there = np.rint(turn).astype(int), np.rint(first).astype(int)
        off = np.abs(first - there) + np.abs(turn - whole) @ (np.array(plane.shape[::-1]) - 1)
        worst = max(worst, float(off.max()))
        if worst > TOLERANCE or not np.array_equal(whole.T @ whole, np.eye(2)):
            raise wrong_grid(path, scan, f"frames lie up to {worst:.2g} voxels beside it", False)
        what = dicom.find_group([frame, *shared], "SegmentIdentification")
        number = int(dicom.read_numbers(what, path, "ReferencedSegmentNumber", default=[0])[0])
        numbers = np.unique(plane[plane > 0]).tolist() if kind == "LABELMAP" else [number]
        for number in numbers:
            rows, columns = np.nonzero(plane == number if kind == "LABELMAP" else plane >= half)
            inside = there[:, None] + whole @ (columns, rows)
            if (inside < 0).any() or (inside >= np.reshape(scan.shape, (3, 1))).any():
                raise wrong_grid(path, scan, f"segment {number} reaches out of it", False)
            voxels[number].append(np.ravel_multi_index(tuple(inside), scan.shape, order="F"))
    return {n: np.concatenate(some) for n, some in voxels.items() if any(map(len, some))}, worst


def lay_structures(
    structures: Iterable[tuple[str, int, np.ndarray]], shape: Sequence[int]
) -> tuple[np.ndarray, int]:
    """Return one label map (X, Y, Z) of (name, value, flat voxels), and how many voxels overlap.
    The rule: a tumour wins over anything else, a smaller structure over a larger one."""
    ordered = sorted(structures, key=lambda one: (is_tumour(one[0]), -one[2].size))
    largest = max((value for _, value, _ in ordered), default=0)
    array = np.zeros(int(np.prod(shape)), np.min_scalar_type(largest))
    covered = np.zeros(array.size, bool)
    overlap = 0
    for _, value, voxels in ordered:
        overlap += int(np.count_nonzero(covered[voxels]))
        covered[voxels] = True
        array[voxels] = value
    return array.reshape(shape, order="F"), overlap


def write_seg(label: Volume, scan: Volume, classes: Labels, path: Path) -> list[str]:
    """Write a label map as DICOM SEG of the series that `scan` was read from, and read it back.
    `label` has the scan's axes; `classes` names its values, background first. Returns why not."""
    import pydicom

    if not scan.files:
        return ["no DICOM SEG: the scan is no DICOM series"]
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in scan.files]
    if "PerFrameFunctionalGroupsSequence" in headers[0]:
        return ["no DICOM SEG: the series is one enhanced file; export it as single slices"]
    if lacking := [key for key in NEEDED_BY_SEG if not dicom.read_text(headers[0], key)]:
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
    """Return the DICOM SEG of class indices (X, Y, Z) that refers to the slices of a series."""
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
    """Return a class as a segment, with its SNOMED code; `Organ` where none is known."""
    import highdicom
    import torch
    from pydicom.sr.codedict import codes

    kind, what = codes.SCT.AnatomicalStructure, name.title().replace(" ", "")
    what = getattr(codes.SCT, what, codes.SCT.Organ)
    if is_tumour(name):
        kind, what = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm
    program = highdicom.AlgorithmIdentificationSequence(
        "apply_model.py", codes.DCM.ArtificialIntelligence, torch.__version__
    )
    segment = highdicom.seg.SegmentDescription(number, name, kind, what, "AUTOMATIC", program)
    segment.SegmentDescription = dicom.SEGMENT_VALUE.format(values[0])
    return segment


# Command line


def convert_to_nifti(series: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> None:
    """A series (a folder, or one of its slices) as .nii.gz or .nii, HU as stored."""
    if not out.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{out}: must end in .nii.gz or .nii, got {out.suffix or 'no ending'}")
    volume = dicom.read_series(series)
    volume.write(out, check=True)
    print("\n".join([*volume.notes, f"{out}: {volume.shape} voxels"]))
    print(f"next: python apply_model.py {out} --checkpoint checkpoints/starter.pt")


def convert_to_series(scan: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path]) -> None:
    """A scan in whole HU (.nii.gz, .mha, .nrrd) as CT series, in a new folder, of "anonymous"."""
    volume = read_file(scan)
    files = dicom.write_series(volume, folder)
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
    """A label map on the grid of a series as DICOM SEG (.dcm) that refers to the series.

    Args:
        labels: name and value of each class: liver 1 tumour 2.
    """
    scan, drawn = dicom.read_series(series), read_file(label)
    near = 0.01 * min(scan.spacing_mm)
    if drawn.ras_shape != scan.ras_shape or np.abs(drawn.ras_affine - scan.ras_affine).max() > near:
        raise wrong_grid(label, scan, f"{drawn.ras_shape} and {scan.ras_shape} voxels")
    array = scan.from_ras(drawn.ras.data).read()
    if odd := sorted(set(np.unique(array).tolist()) - {0, *labels.values()}):
        raise InputError(f"{label}: holds {odd[:5]}, expected {labels}; name them by --labels")
    classes: Labels = {BACKGROUND: (0,), **{name: (value,) for name, value in labels.items()}}
    if reasons := write_seg(scan.like(array.astype(np.uint16)), scan, classes, out):
        raise InputError(f"{out}: {'; '.join(reasons)}")
    print(f"{out}: {len(labels)} segments of {series}")
    print(f"next: load {series} and {out} together in your viewer, 3D Slicer for one")


def main() -> None:
    """Run the command that was asked for; a user's fault ends in one line, exit code 1."""
    commands: dict[str, Any] = {"to-nifti": convert_to_nifti, "to-seg": convert_to_seg}
    commands["to-series"] = convert_to_series
    run_script(
        lambda about: tyro.extras.subcommand_cli_from_dict(commands, description=about), __doc__
    )


if __name__ == "__main__":
    main()
