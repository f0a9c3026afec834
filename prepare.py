"""Step 1: raw CTs with label maps → checked, split by patient, cut into sub-volumes of 16 slices.

    python prepare.py data/raw

The layout of the source is recognised and every case is checked before anything is cut; the table
of findings is worth reading. Writes under `--destination`: `check/<case>.png`, RAS sub-volumes
`subvolumes/<case>/image_<first slice>.nii` and `label_….nii.gz`, every voxel at its own place in
the patient, and last `dataset.json`: where it exists, the folder is complete. Nothing is resampled
and no intensity is changed. Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
import tyro
from tqdm import tqdm

import utilities
from utilities import AIR_HU, IMAGE, LABEL, InputError, ranges, ras_grid, ras_slabs

SCHEMA = 1  # of dataset.json
SPLITS = ("training", "validation", "test")
BODY_HU = -500  # between lung and fat


@dataclass
class Config:
    source: tyro.conf.Positional[Path] = Path("data/raw")  # folder with the scans, as downloaded
    destination: Path = Path("data/prepared")  # folder to write
    subvolume_depth: int = 16  # axial slices per sub-volume; 0 keeps cases whole, for patches
    foreground: tuple[int, ...] = (1, 2)  # label values that must not be lost
    keep_empty: float = 0.0  # fraction of the sub-volumes without foreground that is kept
    training: float = 0.70  # fraction of the patients that the network is fitted to
    validation: float = 0.15  # fraction of the patients that choose the checkpoint
    test: float = 0.15  # fraction of the patients that are looked at once, at the end
    seed: int = 0  # of the split and of keep_empty
    folds: int = 0  # cross-validation: parts to divide the patients into (no test patients)
    fold: int = 0  # which part, from 0, is the validation split
    split: Path | None = None  # JSON with lists of cases: training, validation, test
    patients: Path | None = None  # CSV with columns case,patient, where one patient has many scans
    patient_pattern: str = ""  # or: regular expression whose first group, in a case name, is it
    check_only: bool = False  # stop after the check
    trust_image_grid: bool = False  # lay a label map on its scan's grid if only the shapes agree
    accept: tuple[Literal["mirrored", "outside", "hu"], ...] = ()  # errors to take as warnings
    leave_out: tuple[str, ...] = ()  # cases not to use
    compress: bool = False  # gzip the images too: half the disk, twice the time
    workers: int = 0  # processes; 0 means one per core


def main(config: Config) -> None:
    cases, labels = find_cases(config)
    remove_leftovers(config.destination)
    with open_pool(config, len(cases)) as pool:
        records = run_cases(pool, check_case, cases, config, labels, title="checking")
        notes = compare_cases(records)
        print_check(records, notes, config)
        sound = [record for record in records if not errors(record, config)]
        if not config.check_only and sound:
            split = split_patients(sound, config)
            if not all(finished(record, config) for record in sound):
                (config.destination / "dataset.json").unlink(missing_ok=True)
            cut = run_cases(pool, cut_case, sound, config, labels, title="cutting")
            write_dataset(cut, records, notes, split, labels, config)
    if left_out := len(records) - len(sound):
        elsewhere = f"; the others are in {config.destination}"
        raise InputError(
            f"{left_out} of {len(records)} cases have errors, see above; correct them, or name "
            f"them in --leave-out{elsewhere if sound and not config.check_only else ''}"
        )


# ---------------------------------------------------------------------------------------
# Finding cases: the layouts in which data sets are downloaded
# ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """One scan and its label map; None where one is missing."""

    name: str
    patient: str
    image: Path | None
    label: Path | None


VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", *utilities.ITK_SUFFIXES)
LABEL_WORDS = re.compile(r"label|seg|mask|truth|annot|outline", re.IGNORECASE)


def find_cases(config: Config) -> tuple[list[Case], dict[str, int]]:
    """Cases in the order of their names, and label name → value."""
    source = config.source.absolute()
    if not source.is_dir():
        raise InputError(f"{config.source}: no such folder; give the folder that holds the scans")
    files = files_below(source, config.destination.absolute())
    volumes = [path for path in files if path.name.endswith(VOLUME_SUFFIXES)]
    labels, announced = read_description(files, config.foreground)
    for layout in (decathlon, lits, patient_folders):
        if cases := layout(volumes):
            break
    else:
        layout, (cases, segments) = dicom, dicom(files, volumes)
        labels = name_segments(segments, labels)
    if not cases:
        raise InputError(
            f"{source}: no scans with label maps found among {len(files)} files; expected "
            "imagesTr and labelsTr (Decathlon), volume-N.nii and segmentation-N.nii (LiTS), one "
            "folder per patient with a CT and a file named like label or segmentation, or DICOM "
            "series with DICOM SEG or NIfTI label maps"
        )
    used = {path for case in cases for path in (case.image, case.label)}
    pairs = sum(case.image is not None and case.label is not None for case in cases)
    unused = [path for path in volumes if path not in used]
    print(f"{source}: layout {layout.__name__.replace('_', ' ')}, {pairs} scans with label maps")
    if announced not in (None, pairs):
        print(f"warning: dataset.json announces {announced} cases; download what is missing")
    if unused:
        print(f"not used: {len(unused)} other volumes, such as {unused[0]}")
    repeated = [name for name, n in Counter(case.name for case in cases).items() if n > 1]
    if repeated:
        raise InputError(f"{source}: {', '.join(repeated)} found more than once; keep one of each")
    cases = [case for case in cases if case.name not in config.leave_out]
    name_patients(cases, config)
    return cases, labels


def name_segments(segments: dict[str, int], labels: dict[str, int]) -> dict[str, int]:
    """`labels` with the segments that they do not name; tells which value each segment has."""
    values = utilities.segment_values(segments, labels)
    if values:
        told = ", ".join(f"{name} = {value}" for name, value in values.items())
        print(f"label values of the DICOM SEGs, by segment names: {told}")
    spelt = {name.lower() for name in labels}
    return labels | {n: value for n, value in values.items() if n.lower() not in spelt}


def files_below(source: Path, destination: Path) -> list[Path]:
    """All files, also through links; hidden ones (macOS leaves `._x.nii`) and outputs are not."""
    files = []
    for folder, subfolders, names in os.walk(source, followlinks=True):
        subfolders[:] = sorted(
            n for n in subfolders if not n.startswith(".") and Path(folder, n) != destination
        )
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files


def pair_up(images: dict[str, Path], labels: dict[str, Path]) -> list[Case]:
    """Cases in natural order: liver_2 before liver_10."""

    def natural(name: str) -> list[str | int]:
        return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)]

    names = sorted(images.keys() | labels.keys(), key=natural)
    return [Case(name, name, images.get(name), labels.get(name)) for name in names]


def decathlon(volumes: list[Path]) -> list[Case]:
    """imagesTr/liver_3.nii.gz (nnU-Net: liver_3_0000.nii.gz) and labelsTr/liver_3.nii.gz."""
    folders = defaultdict(dict)
    for path in volumes:
        folders[path.parent.name][utilities.case_name(path)] = path
    images, labels = folders["imagesTr"], folders["labelsTr"]
    images = {n if n in labels else n.removesuffix("_0000"): path for n, path in images.items()}
    return pair_up(images, labels) if images else []


def lits(volumes: list[Path]) -> list[Case]:
    """volume-3.nii and segmentation-3.nii, in any folders below the source."""
    found = {"volume": {}, "segmentation": {}}
    for path in volumes:
        if match := re.fullmatch(r"(volume|segmentation)-(\d+)", utilities.case_name(path)):
            kind, name = match[1], f"volume-{match[2]}"
            if other := found[kind].get(name):
                raise InputError(f"{other} and {path}: two files of one case; keep one of them")
            found[kind][name] = path
    return pair_up(found["volume"], found["segmentation"]) if found["volume"] else []


def patient_folders(volumes: list[Path]) -> list[Case]:
    """A folder per patient with one CT and one label map, known by its name."""
    folders = defaultdict(lambda: ([], []))
    for path in volumes:
        folders[path.parent][bool(LABEL_WORDS.search(path.name))].append(path)
    if not any(images and labels for images, labels in folders.values()):
        return []
    images, labels = {}, {}
    for folder, (scans, outlines) in folders.items():
        if len(scans) > 1 or len(outlines) > 1:
            raise InputError(
                f"{folder}: must hold one CT and one label map, got {len(scans)} and "
                f"{len(outlines)}; give each scan its own folder"
            )
        images.update((folder.name, path) for path in scans)
        labels.update((folder.name, path) for path in outlines)
    return pair_up(images, labels)


def dicom(files: list[Path], volumes: list[Path]) -> tuple[list[Case], dict[str, int]]:
    """Series and their labels, segment name → number. Names are hashes of series UIDs: no patient's
    name, id or date. A label map is a DICOM SEG that names the series, or see `nifti_label`."""
    series, segments, numbers = defaultdict(list), {}, {}
    for folder in tqdm(sorted({path.parent for path in files}), desc="DICOM folders"):
        for path, header in utilities.dicom_headers(folder).items():
            if header.get("Modality") == "SEG":
                other = segments.setdefault(
                    header.ReferencedSeriesSequence[0].SeriesInstanceUID, path
                )
                if other != path:
                    raise InputError(f"{other} and {path}: DICOM SEGs of one series; keep one")
                for name, number in utilities.segments_of(header).items():
                    if name.lower() not in map(str.lower, numbers):
                        numbers[name] = number
            elif "ImagePositionPatient" in header:
                series[folder, header.SeriesInstanceUID].append((path, header.get("PatientID", "")))
    in_folder, cases, first_of = Counter(folder for folder, _ in series), [], {}
    for (folder, uid), slices in series.items():
        label = segments.get(uid) or nifti_label(folder, volumes, in_folder)
        name = "series_" + hashlib.sha256(uid.encode()).hexdigest()[:10]
        patient = first_of.setdefault(slices[0][1] or name, name)  # the id itself is not kept
        if label:
            cases.append(
                Case(name, patient, folder if in_folder[folder] == 1 else slices[0][0], label)
            )
        else:
            print(f"not used: {folder}, a series of {len(slices)} images without a label map")
    return sorted(cases, key=lambda case: case.name), numbers


def nifti_label(folder: Path, volumes: list[Path], series: Iterable[Path]) -> Path | None:
    """The label map of the series in `folder`: in it, beside it, or anywhere of the folder's name.

    `<folder>_label.nii.gz`, as `apply_model.py` writes it, counts as that name. Beside it any other
    name will do where there is one series and one volume.
    """
    beside = [path for path in volumes if path.parent == folder.parent]
    named = [p for p in volumes if utilities.case_name(p).removesuffix("_label") == folder.name]
    only = [other for other in series if other.parent == folder.parent] == [folder]
    groups = [[path for path in volumes if path.parent == folder]]
    groups += [[path for path in beside if path in named], beside if only else [], named]
    for group in groups:
        if len(group) > 1:
            group = [path for path in group if LABEL_WORDS.search(path.name)]
        if len(group) == 1:
            return group[0]
    return None


def read_description(
    files: Sequence[Path], foreground: Sequence[int]
) -> tuple[dict[str, int], int | None]:
    """Label name → value and number of cases, from a Decathlon or nnU-Net `dataset.json`.

    Without one: background, liver, tumour, and a name for every other foreground value.
    """
    path = next((path for path in files if path.name == "dataset.json"), None)
    if path is None:
        labels = utilities.LABEL_VALUES
        return labels | {f"label {v}": v for v in foreground if v not in labels.values()}, None
    content = read_json(path)
    try:
        entries = content["labels"].items()
        by_value = all(key.isdigit() for key, _ in entries)
        labels = {str(n): int(v) for v, n in entries} if by_value else dict(entries)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: must have 'labels' (value → name), got {error!r}; correct it, or remove it "
            "to use background 0, liver 1, tumour 2"
        ) from error
    if not set(foreground) & set(labels.values()):
        raise InputError(f"{path}: declares {labels}, none of --foreground {foreground}; choose")
    return labels, content.get("numTraining")


def name_patients(cases: list[Case], config: Config) -> None:
    """Set the patient of each case from --patients or --patient-pattern."""
    if config.patients:
        with config.patients.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or not {"case", "patient"} <= rows[0].keys():
            raise InputError(f"{config.patients}: must have the columns case,patient")
        table = {row["case"]: row["patient"] for row in rows}
        if missing := [case.name for case in cases if case.name not in table]:
            raise InputError(f"{config.patients}: has no row for {', '.join(missing)}; add them")
        for case in cases:
            case.patient = table[case.name]
    elif config.patient_pattern:
        for case in cases:
            match = re.search(config.patient_pattern, case.name)
            if not match or not match.groups():
                raise InputError(
                    f"--patient-pattern {config.patient_pattern}: finds no group in {case.name}; "
                    r"give a pattern like (patient_\d+) that fits every case"
                )
            case.patient = match[1]


# ---------------------------------------------------------------------------------------
# The check: every case passes through it before anything is cut
# ---------------------------------------------------------------------------------------

Finding = tuple[str, str]  # kind (a key of RULES), what was found

RULES = {  # kind of finding → (level, what to do); an error stops its case, a warning is told
    "orphan": ("error", "add the missing file or remove this one"),
    "unreadable": ("error", "get the file again, or convert it as the message says"),
    "shape": ("error", "export the label map again on the grid of its scan"),
    "grid": ("error", "export the label map again, or lay it on the scan: --trust-image-grid"),
    "values": ("error", "correct the label map, or declare its values in dataset.json"),
    "empty": ("error", "add the outline or remove the case"),
    "nan": ("error", "convert the scan again; every voxel needs a number"),
    "hu": (
        "error",
        "convert to HU (rescale slope and intercept) as int16; for MR: --accept hu",
    ),
    "outside": ("error", "look at the overlay; the label map may be shifted, flipped or another's"),
    "mirrored": ("error", "look at the overlay; flip the label map back"),
    "left_right": ("warning", "correct the header's left-right unless it is situs inversus"),
    "air": ("warning", "look whether HU were clipped; otherwise nothing"),
    "partly_outside": ("warning", "look at the overlay"),
    "no_foreground": ("warning", "nothing, if the organ is not there; it gives no sub-volumes"),
    "tumour_apart": ("warning", "look whether these voxels belong to the liver's tumours"),
    "blank": ("warning", "look whether slices were lost on export"),
    "identity": ("warning", "nothing; but millimetres and sides are not known for this case"),
    "near_grid": ("warning", "nothing; the scan's own geometry is used"),
    "thin": ("warning", "nothing; it is padded with air"),
    "dicom": ("warning", "nothing, if these images are not part of the scan"),
    "spacing": ("warning", "compare with the scanner's protocol"),
    "duplicate": ("warning", "remove one; kept together in one split until then"),
    "mixture": ("warning", "nothing; all sub-volumes are written in RAS"),
}


def level(finding: Finding, config: Config) -> str:
    """An error stops its case, unless it was accepted; a warning is told."""
    return "warning" if finding[0] in config.accept else RULES[finding[0]][0]


def errors(record: dict[str, Any], config: Config) -> list[Finding]:
    """Findings that stop the case."""
    return [finding for finding in record["findings"] if level(finding, config) == "error"]


def check_case(case: Case, config: Config, labels: dict[str, int]) -> dict[str, Any]:
    """Record of a case for `dataset.json` with its findings; draws `check/<case>.png`."""
    paths = {"case": case.name, "patient": case.patient}
    paths |= {IMAGE: str(case.image), LABEL: str(case.label)}
    if case.image is None or case.label is None:
        missing = "scan" if case.image is None else "label map"
        return paths | {"findings": [("orphan", f"{case.image or case.label} has no {missing}")]}
    memory = config.destination / "check" / f"{case.name}.json"
    known = read_json(memory)
    with ThreadPoolExecutor(1) as beside:  # hashing and decompressing let each other run
        mark = beside.submit(fingerprint, (case.image, case.label), config, labels)
        if known and known["fingerprint"] == mark.result():
            return known | paths
        try:
            record = inspect(case, config, labels)
        except InputError as error:
            record = {"findings": [("unreadable", str(error))]}
        record["fingerprint"] = mark.result()
    with utilities.atomic_write(memory) as temporary:
        temporary.write_text(json.dumps(record))
    return record | paths


def inspect(case: Case, config: Config, labels: dict[str, int]) -> dict[str, Any]:
    """Grid, voxel counts, findings and the marks by which a second copy of a scan is known."""
    image, label = read_pair(case.image, case.label, config.trust_image_grid, labels)
    (shape, affine), findings = ras_grid(image), []
    record = {
        "shape": list(image.shape),
        "spacing_mm": [round(s, 6) for s in utilities.spacing_mm(image.affine)],
        "orientation": "".join(nib.aff2axcodes(image.affine)),
        "slices": shape[2],
        "findings": findings,
    }
    findings += judge_grids(image, label, config)
    if any(kind in ("shape", "grid") for kind, _ in findings):
        return record
    outline, counts, odd = read_outline(label, sorted(labels.values()))
    if odd:
        findings.append(("values", f"label map holds {odd}, expected {sorted(labels.values())}"))
        return record
    step = max(1, round(max(shape[:2]) / 128))  # a coarse copy is enough for the statistics
    small = np.asfortranarray(outline[::step, ::step])
    inside = reduce(np.logical_or, [small == value for value in config.foreground])
    inside = np.ascontiguousarray(inside)  # chooses voxels 10 times faster than in Fortran order
    middle = busiest(inside)
    middle = (middle[0] * step, middle[1] * step, middle[2])
    coarse, planes, not_finite = read_coarse(image, step, middle)
    if not_finite:
        findings.append(("nan", f"{not_finite} voxels of the scan are NaN or infinite"))
    findings += judge_intensity(coarse, image.get_data_dtype())
    outline_exists = any(counts[value].any() for value in counts if value)
    findings += judge_outline(coarse, inside, outline_exists)
    if "liver" in labels and inside.any():
        findings += judge_side(coarse, inside, utilities.spacing_mm(affine)[0] * step)
        findings += judge_tumour(outline, counts, labels)
    draw_overlay(case.name, planes, outline, middle, affine, config.destination)
    low, high = np.percentile(coarse[::4, ::4, ::2], [0.5, 99.5])
    voxels = {value: int(number.sum()) for value, number in counts.items()}
    return record | {
        "hu_range": [round(float(low)), round(float(high))],
        "foreground_voxels": sum(voxels.get(value, 0) for value in config.foreground),
        "voxels_per_label": {str(value): voxels[value] for value in labels.values()},
        "marks": scan_marks(coarse),
    }


def read_pair(
    image_path: Path, label_path: Path, trust_image_grid: bool, labels: dict[str, int]
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    image = utilities.read_volume(image_path)
    label = utilities.read_label(label_path, image, labels)
    if trust_image_grid and label.shape == image.shape:
        label = type(label)(label.dataobj, image.affine, file_map=label.file_map)
    return image, label


def judge_grids(image: nib.Nifti1Image, label: nib.Nifti1Image, config: Config) -> list[Finding]:
    """Does the label map lie on the scan? Half a voxel apart, at the worst corner, is an error."""
    (shape, affine), (label_shape, label_affine) = ras_grid(image), ras_grid(label)
    findings = [("dicom", note) for note in image.extra.get("notes", [])]
    if shape != label_shape:
        return [("shape", f"scan is {image.shape}, label map is {label.shape} voxels")]
    corners = np.array(np.meshgrid(*([0, n - 1] for n in shape), [1])).reshape(4, -1)
    apart = float(np.abs(np.linalg.inv(affine) @ (label_affine - affine) @ corners).max())
    if apart > 0.01:
        kind = "grid" if apart > 0.5 else "near_grid"
        findings.append((kind, f"scan and label map lie up to {apart:.2g} voxels apart"))
    if np.allclose(np.abs(affine[:3, :3]), np.eye(3)):
        findings.append(("identity", "the affine holds no spacing and no orientation"))
    if shape[2] < config.subvolume_depth:
        findings.append(("thin", f"{shape[2]} slices, fewer than {config.subvolume_depth}"))
    return findings


def read_outline(
    label: nib.Nifti1Image, allowed: Sequence[int]
) -> tuple[np.ndarray, dict[int, np.ndarray], list[float]]:
    """Label map (X, Y, Z) RAS uint8, see `count_per_slice`, some values that are not allowed."""
    shape, _ = ras_grid(label)
    outline = np.zeros(shape, np.uint8, order="F")  # slabs not written to take no memory
    counts, odd = {value: np.zeros(shape[2], np.int64) for value in allowed}, set()
    counts[0] = np.full(shape[2], shape[0] * shape[1])
    for first, slab in ras_slabs(label, ranges(shape[2], 16, reach_back=False)):
        values, here = unflipped(slab), slice(first, first + slab.shape[2])
        if not values.any():
            continue
        found = count_per_slice(slab, allowed)
        for value, number in found.items():
            counts[value][here] = number
        if sum(n.sum() for value, n in found.items() if value) < np.count_nonzero(values):
            odd |= set(np.unique(values[~np.isin(values, [0, *allowed])])[:5].tolist())
        else:
            outline[:, :, here] = slab
    return outline, counts, sorted(odd)[:5]


def unflipped(array: np.ndarray) -> np.ndarray:
    """The same voxels as they lie in memory: counting in a flipped view is 8 times slower."""
    return array[tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)]


def flipped(array: np.ndarray) -> np.ndarray:
    """The same array, its flips done in memory: by torch, which takes a quarter of numpy's time."""
    axes = [axis for axis, step in enumerate(array.strides) if step < 0]
    if not axes or array.itemsize > 8:
        return array
    bits = unflipped(array).view(f"i{array.itemsize}")  # torch does not flip every type
    with warnings.catch_warnings():  # bytes read from a file may not be written to: nobody does
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(bits.T)
    return tensor.flip([2 - axis for axis in axes]).numpy().T.view(array.dtype)


def busiest(mask: np.ndarray) -> tuple[int, int, int]:
    """Index of the sagittal, coronal and axial slice with most voxels; the middle if none has."""
    if not mask.any():
        return tuple(n // 2 for n in mask.shape)
    return tuple(int(mask.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2), (0, 1)))


def read_coarse(
    image: nib.Nifti1Image, step: int, middle: tuple[int, int, int]
) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """Every `step`-th voxel in-plane, three planes through `middle`, number of non-finite voxels.

    One pass over the scan, one slab at a time.
    """
    (x, y, z), (shape, _) = middle, ras_grid(image)
    coarse, planes, not_finite = None, {}, 0
    for first, slab in ras_slabs(image, ranges(shape[2], 16, reach_back=False)):
        if slab.dtype.kind == "f" and not (finite := np.isfinite(slab)).all():
            not_finite += int(np.count_nonzero(~finite))
            slab = np.where(finite, slab, AIR_HU)
        if coarse is None:  # Fortran order: a slice lies in one piece
            small = slab[::step, ::step].shape[:2]
            coarse = np.empty((*small, shape[2]), slab.dtype, order="F")
            sizes = {"axial": (*shape[:2], 1), "coronal": (shape[0], 1, shape[2])}
            sizes["sagittal"] = (1, *shape[1:])
            planes = {plane: np.empty(n, slab.dtype, order="F") for plane, n in sizes.items()}
        here = slice(first, first + slab.shape[2])
        coarse[:, :, here] = slab[::step, ::step]
        planes["sagittal"][:, :, here] = slab[x : x + 1]
        planes["coronal"][:, :, here] = slab[:, y : y + 1]
        if first <= z < here.stop:
            planes["axial"][:, :, 0] = slab[:, :, z - first]
    return coarse, planes, not_finite


def judge_intensity(coarse: np.ndarray, dtype: np.dtype) -> list[Finding]:
    """Are these Hounsfield units of a CT, and is there something on every slice?"""
    blank = int(np.sum(coarse.min(axis=(0, 1)) == coarse.max(axis=(0, 1))))
    findings = utilities.hu_faults(coarse, dtype)
    if 0 < blank < coarse.shape[2]:
        findings.append(("blank", f"{blank} of {coarse.shape[2]} slices hold no data"))
    return findings


def judge_outline(coarse: np.ndarray, inside: np.ndarray, any_label: bool) -> list[Finding]:
    """Is there an outline, and does it lie in the body? `inside`: foreground on `coarse`."""
    if not any_label:
        return [("empty", "the label map is empty")]
    if not inside.any():
        return [("no_foreground", "the label map holds none of the foreground values")]
    in_air = float(np.mean(coarse[inside] < -300))
    kind = "outside" if in_air > 0.3 else "partly_outside"
    return [(kind, f"{in_air:.0%} of the foreground lies in air or lung")] * (in_air > 0.05)


def judge_side(coarse: np.ndarray, inside: np.ndarray, x_mm: float) -> list[Finding]:
    """The liver lies on the patient's right, and is more even in HU than what lies on the left."""
    rows = inside.any(axis=(0, 1))
    body, liver = (np.sum(a[:, :, rows], axis=(1, 2)) for a in (coarse > -300, inside))
    columns = np.arange(len(body))
    centre, liver_x = (float(columns @ c / max(c.sum(), 1)) for c in (body, liver))
    flipped = np.round(2 * centre - columns).astype(int)
    usable = (flipped >= 0) & (flipped < len(body))
    mirror = np.zeros_like(inside)
    mirror[columns[usable]] = inside[flipped[usable]]
    own, other = (np.subtract(*np.percentile(coarse[m], [75, 25])) for m in (inside, mirror))
    offset = (liver_x - centre) * x_mm
    if own > 2 * other:
        text = f"HU spread over {own:.0f} in the label and {other:.0f} in its mirror image"
        return [("mirrored", text)]
    if offset < -10:
        text = f"scan and label show the liver {-offset:.0f} mm on the patient's left"
        return [("left_right", text)]
    return []


def judge_tumour(
    outline: np.ndarray, counts: dict[int, np.ndarray], labels: dict[str, int]
) -> list[Finding]:
    """Tumour voxels in parts that touch no liver."""
    import cc3d

    tumour = next((labels[n] for n in ("tumour", "tumor", "cancer", "lesion") if n in labels), None)
    if tumour is None or not counts[tumour].any():
        return []
    rows = np.flatnonzero(counts[tumour])
    box = outline[:, :, max(rows[0] - 1, 0) : rows[-1] + 2]
    shadow = (box == tumour).any(axis=2)
    sides = [np.flatnonzero(shadow.any(axis=axis)) for axis in (1, 0)]
    box = box[tuple(slice(max(side[0] - 1, 0), side[-1] + 2) for side in sides)]
    parts = cc3d.connected_components((box == labels["liver"]) | (box == tumour))
    with_liver = np.bincount(parts[box == labels["liver"]], minlength=parts.max() + 1) > 0
    apart = int(np.count_nonzero(~with_liver[parts[box == tumour]]))
    return [("tumour_apart", f"{apart} tumour voxels touch no liver")] * (apart > 0)


def scan_marks(coarse: np.ndarray) -> dict[str, list[int]]:
    """What a copy of the scan shares: checksums of its slices, and a 16×16×16 picture of it."""
    whole = np.clip(coarse, -3000, 3000).round().astype(np.int16)
    full = [z for z in range(whole.shape[2]) if whole[:, :, z].min() < whole[:, :, z].max()]
    soft = torch.from_numpy(np.clip(whole[::2, ::2], -200, 250).astype(np.float32))
    picture = torch.nn.functional.adaptive_avg_pool3d(soft[None, None], 16).numpy()
    return {
        "slices": [zlib.crc32(np.ascontiguousarray(whole[:, :, z])) for z in full],
        "picture": np.rint(picture.ravel()).astype(int).tolist(),
    }


def draw_overlay(
    name: str,
    planes: dict[str, np.ndarray],
    outline: np.ndarray,
    middle: tuple[int, int, int],
    affine: np.ndarray,
    destination: Path,
) -> None:
    """Write `check/<case>.png`: three planes through the foreground with each label's outline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6))  # no layout engine: it would draw everything twice
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.87, wspace=0.02)
    window = utilities.grey_window(planes["axial"])
    for axes, (plane, picture) in zip(figure.subplots(1, 3), planes.items(), strict=True):
        cut, _ = utilities.PLANES[plane]
        at, steps = middle[cut], [-(-n // 512) for n in picture.shape]  # more cannot be seen
        coarser = [slice(None, None, step) for step in steps]
        outlined = coarser[:cut] + [slice(at, at + 1)] + coarser[cut + 1 :]
        flat = outline[tuple(outlined)]
        outlines = {colour: flat == v for v, colour in utilities.LABEL_COLOURS.items()}
        spacing = utilities.spacing_mm(affine @ np.diag([*steps, 1]))
        utilities.draw_plane(axes, picture[tuple(coarser)], plane, 0, spacing, outlines, window)
        axes.set_title(f"{plane}, slice {at + 1} of {outline.shape[cut]}", fontsize=10)
    figure.suptitle(name, fontsize=11)
    utilities.save_figure(figure, destination / "check" / f"{name}.png")


def same_scan(one: dict[str, list[int]], other: dict[str, list[int]]) -> str:
    """Why two scans are one; empty if they are not. Finds crops by slices, other copies by look."""
    shared = len(set(one["slices"]) & set(other["slices"]))
    if shared > 1 and shared >= 0.1 * min(len(one["slices"]), len(other["slices"])):
        return f"{shared} slices are identical"
    alike = float(np.corrcoef(one["picture"], other["picture"])[0, 1])
    return f"correlation {alike:.4f}" if alike > 0.985 else ""


def compare_cases(records: list[dict[str, Any]]) -> list[Finding]:
    """Findings between cases, those of the whole set returned; copies become one patient."""
    readable = [record for record in records if "marks" in record]
    for one, other in combinations(readable, 2):
        if how := same_scan(one["marks"], other["marks"]):
            for a, b in ((one, other), (other, one)):
                a["findings"].append(("duplicate", f"the same scan as {b['case']}: {how}"))
            for record in records:
                if record["patient"] == other["patient"]:
                    record["patient"] = one["patient"]
    usual = np.median([sorted(r["spacing_mm"]) for r in readable] or [[1, 1, 1]], axis=0)
    for record in readable:
        ratio = np.sort(record["spacing_mm"]) / usual
        if np.abs(np.log2(ratio)).max() > 3 or max(record["spacing_mm"]) > 10:
            text = " × ".join(f"{s:g}" for s in record["spacing_mm"])
            found = f"spacing {text} mm is far from the other scans'"
            record["findings"].append(("spacing", found))
    mixture = Counter(record["orientation"] for record in readable)
    text = ", ".join(f"{number} {axes}" for axes, number in mixture.most_common())
    return [("mixture", f"orientations are mixed: {text}")] * (len(mixture) > 1)


def print_check(records: list[dict[str, Any]], notes: list[Finding], config: Config) -> None:
    """The table: one line per case, and below it every finding with what to do."""
    print(
        f"{'case':<20} {'shape':>13} {'spacing mm':>15} {'axes':>4} {'HU':>11} {'foreground':>10}"
    )
    for r in records:
        shape = "×".join(map(str, r.get("shape", [])))
        spacing = "×".join(f"{s:.3g}" for s in r.get("spacing_mm", []))
        hu = "…".join(map(str, r.get("hu_range", [])))
        levels = Counter(level(finding, config) for finding in r["findings"])
        verdict = ", ".join(f"{n} {name}s" for name, n in sorted(levels.items())) or "ok"
        print(
            f"{r['case']:<20} {shape:>13} {spacing:>15} {r.get('orientation', ''):>4} {hu:>11} "
            f"{r.get('foreground_voxels', ''):>10} {verdict}"
        )
    for r in records:
        for kind, found in r["findings"]:
            print(f"{level((kind, found), config)}: {r['case']}: {found}; {RULES[kind][1]}")
    for kind, found in notes:
        print(f"warning: {found}; {RULES[kind][1]}")


# ---------------------------------------------------------------------------------------
# Splitting by patient
# ---------------------------------------------------------------------------------------


def split_patients(records: Sequence[dict[str, Any]], config: Config) -> dict[str, str]:
    """Patient → "training", "validation" or "test"; drawn from seed and names alone.

    Rounding: largest remainder, in a tie the earlier split; a split with a fraction above 0 gets at
    least one patient. So 130 patients at 70/15/15 give 91 / 20 / 19.
    """
    if config.split:
        return given_split(records, config.split)
    names = {record["patient"] for record in records}
    patients = sorted(names, key=lambda name: seeded(config.seed, name))
    if config.folds:
        if not (2 <= config.folds <= len(patients) and 0 <= config.fold < config.folds):
            raise InputError(
                f"--folds {config.folds} --fold {config.fold}: must be 2 to {len(patients)} folds "
                "(one patient each at least), and a fold from 0"
            )
        held_out = set(patients[config.fold :: config.folds])
        return {name: SPLITS[name in held_out] for name in patients}
    fractions = np.array([config.training, config.validation, config.test])
    if (fractions < 0).any() or not np.isclose(fractions.sum(), 1) or fractions[0] == 0:
        raise InputError(
            f"--training, --validation and --test must be ≥ 0 and add up to 1, got {fractions}"
        )
    wanted = np.count_nonzero(fractions)
    if len(patients) < wanted:
        raise InputError(
            f"{len(patients)} patients cannot fill {wanted} splits; add patients or set a fraction "
            "to 0 (two patients: --training 0.5 --validation 0.5 --test 0)"
        )
    exact = fractions * len(patients)
    sizes = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(sizes - exact, kind="stable")[: len(patients) - sizes.sum()]:
        sizes[index] += 1
    while (short := (sizes == 0) & (fractions > 0)).any():
        sizes[sizes.argmax()] -= 1
        sizes[short.argmax()] += 1
    return dict(zip(patients, np.repeat(SPLITS, sizes).tolist(), strict=True))


def given_split(records: Sequence[dict[str, Any]], path: Path) -> dict[str, str]:
    """Split from JSON: "training", "validation" and "test", each a list of cases or patients."""
    lists = read_json(path)
    split = {}
    if not lists or not set(lists) <= set(SPLITS):
        raise InputError(f"{path}: must be JSON with lists of cases under {', '.join(SPLITS)}")
    where = {name: split_name for split_name in lists for name in lists[split_name]}
    if sum(map(len, lists.values())) > len(where):
        raise InputError(f"{path}: names a case in two splits; a case belongs to one")
    for record in records:
        name = where.get(record["case"], where.get(record["patient"]))
        if name is None:
            raise InputError(f"{path}: does not name {record['case']}; add it, or --leave-out it")
        if split.setdefault(record["patient"], name) != name:
            raise InputError(
                f"{path}: puts scans of patient {record['patient']} into two splits, which leaks; "
                "keep them together"
            )
    return split


def seeded(seed: int, name: str) -> float:
    """Number in [0, 1) that depends on seed and name alone: the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---------------------------------------------------------------------------------------
# Cutting
# ---------------------------------------------------------------------------------------


def cut_case(record: dict[str, Any], config: Config, labels: dict[str, int]) -> dict[str, Any]:
    """Write the sub-volumes of a case; returns them with the proof that no foreground is lost."""
    if known := finished(record, config):
        return known
    name, depth = record["case"], config.subvolume_depth or record["slices"]
    paths = Path(record[IMAGE]), Path(record[LABEL])
    image, label = read_pair(*paths, config.trust_image_grid, labels)
    _, affine = ras_grid(image)
    spacing = [round(step, 6) for step in utilities.spacing_mm(affine)]
    entries, covered = [], np.zeros(record["slices"], np.int64)
    with whole_folder(config.destination / "subvolumes" / name) as folder:
        outlines = wanted_outlines(label, name, config, sorted(labels.values()))
        wanted = [(first, first + outline.shape[2]) for first, (outline, _) in outlines.items()]
        for first, slab in ras_slabs(image, wanted):
            outline, counts = outlines.pop(first)
            covered[first : first + depth] = sum(counts.get(v, 0) for v in config.foreground)
            box = (slice(None), slice(None)) if config.subvolume_depth else body_box(slab, outline)
            corner = [box[0].start or 0, box[1].start or 0, first]
            entry = {"case": name, "first_slice": first, "padded_slices": depth - slab.shape[2]}
            entry |= {"shape": [*slab[box].shape[:2], depth], "spacing_mm": spacing}
            for key, array, air in ((IMAGE, slab, AIR_HU), (LABEL, outline, 0)):
                suffix = ".nii.gz" if config.compress or key == LABEL else ".nii"
                file = f"{key}_{first:04d}{suffix}"
                piece = subvolume(flipped(array[box]), affine, corner, depth, air)
                utilities.write_volume(piece, folder / file)
                entry[key] = f"subvolumes/{name}/{file}"
            entry["voxels_per_label"] = {str(value): int(n.sum()) for value, n in counts.items()}
            entries.append(entry)
        entries.sort(key=lambda entry: entry["first_slice"])
        result = {
            "fingerprint": record["fingerprint"],
            "slices": record["slices"],
            "covered_foreground_voxels": int(covered.sum()),
            "subvolumes": entries,
        }
        (folder / "case.json").write_text(json.dumps(result))
    return result


def finished(record: dict[str, Any], config: Config) -> dict[str, Any]:
    """What an earlier run wrote of this case, if source and settings are the same; else empty."""
    known = read_json(config.destination / "subvolumes" / record["case"] / "case.json")
    files = [entry[key] for entry in known.get("subvolumes", []) for key in (IMAGE, LABEL)]
    same = known.get("fingerprint") == record["fingerprint"]
    return known if same and all((config.destination / file).is_file() for file in files) else {}


def wanted_outlines(
    label: nib.Nifti1Image, case: str, config: Config, values: Sequence[int]
) -> dict[int, tuple[np.ndarray, dict[int, np.ndarray]]]:
    """First slice → label map (X, Y, Z) uint8 and counts per slice, of the sub-volumes to keep."""
    depth, kept = ras_grid(label)[0][2], {}
    for first, slab in ras_slabs(label, ranges(depth, config.subvolume_depth or depth)):
        chosen = seeded(config.seed, f"{case}:{first}") < config.keep_empty
        if chosen or unflipped(slab).any():
            counts = count_per_slice(slab, values)
            if chosen or any(np.any(counts.get(v, 0)) for v in config.foreground):
                kept[first] = slab.astype(np.uint8, copy=False), counts
    return kept


def count_per_slice(label: np.ndarray, values: Sequence[int]) -> dict[int, np.ndarray]:
    """Value → voxels with it in each slice of (X, Y, Z); background is what remains."""
    planes = [unflipped(label[:, :, z]) for z in range(label.shape[2])]
    counts = {v: np.array([np.count_nonzero(p == v) for p in planes]) for v in values if v}
    return {0: planes[0].size - sum(counts.values())} | counts


def body_box(image: np.ndarray, label: np.ndarray) -> tuple[slice, slice]:
    """In-plane box around what is denser than lung, in HU, and around all foreground."""
    body = (image > BODY_HU).any(axis=2) | (label > 0).any(axis=2)
    return utilities.bounding_box(body) if body.any() else (slice(None), slice(None))


def subvolume(
    array: np.ndarray, affine: np.ndarray, corner: Sequence[int], depth: int, air: int
) -> nib.Nifti1Image:
    """`array` (X, Y, ≤ depth) from voxel `corner` of a RAS grid on; padded above with `air`."""
    if array.dtype.kind in "iu":
        air = max(air, np.iinfo(array.dtype).min)
    if missing := depth - array.shape[2]:
        array = np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=air)
    moved = affine @ nib.affines.from_matvec(np.eye(3), corner)
    piece = nib.Nifti1Image(array, moved, dtype=array.dtype)
    piece.header.set_xyzt_units("mm")
    return piece


def fingerprint(paths: Iterable[Path], config: Config, labels: dict[str, int]) -> str:
    """SHA-256 of the bytes of a case's files and of the settings that its sub-volumes depend on."""
    settings = [SCHEMA, labels, config.subvolume_depth, config.foreground, config.compress]
    settings += [config.trust_image_grid, config.keep_empty, config.keep_empty and config.seed]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in (file for path in paths for file in source_files(path)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def source_files(path: Path) -> list[Path]:
    """The files behind a path: a header's pair, a DICOM folder, or the folder of a DICOM file."""
    if path.is_dir() or utilities.is_dicom(path):
        folder = path if path.is_dir() else path.parent
        return sorted(file for file in folder.iterdir() if file.is_file())
    stem, header, _ = path.name.partition(".hdr")
    return [path, *(sorted(path.parent.glob(f"{stem}.img*")) if header else [])]


# ---------------------------------------------------------------------------------------
# Files: whole or not there
# ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if there is none."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); correct it or remove it") from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it takes that name once it is complete."""
    temporary = folder.with_name(f".{os.getpid()}.partial.{folder.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); choose a folder that is "
            "writable and has free space, then run the same command again: finished cases are kept"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(destination: Path) -> None:
    """Remove the temporary files of a run that was killed."""
    for folder in (destination, destination / "check", destination / "subvolumes"):
        for path in folder.glob(".*.partial.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_dataset(
    cut: list[dict[str, Any]],
    records: list[dict[str, Any]],
    notes: list[Finding],
    split: dict[str, str],
    labels: dict[str, int],
    config: Config,
) -> None:
    """Write `dataset.json` last, in one step, with the proof that no foreground is lost."""
    results, cases, subvolumes, left_out = iter(cut), [], [], []
    for record in records:
        kept = {k: v for k, v in record.items() if k not in ("marks", "findings", "fingerprint")}
        kept["warnings"] = [found for _, found in record["findings"]]
        if errors(record, config):
            left_out.append(kept)
            continue
        done = next(results)
        kept["split"] = split[record["patient"]]
        kept["covered_foreground_voxels"] = done["covered_foreground_voxels"]
        cases.append(kept)
        subvolumes += [entry | {"split": kept["split"]} for entry in done["subvolumes"]]
    inside = sum(case["foreground_voxels"] for case in cases)
    covered = sum(case["covered_foreground_voxels"] for case in cases)
    if inside != covered:
        raise RuntimeError(f"{inside} foreground voxels, {covered} covered: a fault of prepare.py")
    aside = ("source", "destination", "workers", "check_only")  # the content is the same
    dataset = {
        "schema": SCHEMA,
        "settings": {key: value for key, value in asdict(config).items() if key not in aside},
        "subvolume_depth": config.subvolume_depth,
        "foreground": list(config.foreground),
        "labels": labels,
        "notes": [found for _, found in notes],
        "cases": cases,
        "left_out": left_out,
        "subvolumes": subvolumes,
    }
    for name in SPLITS:
        chosen = [entry for entry in subvolumes if entry["split"] == name]
        dataset[name] = [{key: entry[key] for key in (IMAGE, LABEL, "case")} for entry in chosen]
    with utilities.atomic_write(config.destination / "dataset.json") as temporary:
        temporary.write_text(json.dumps(dataset, indent=1, default=str))  # a Path is its text
    patients = " / ".join(f"{sum(s == name for s in split.values())} {name}" for name in SPLITS)
    print(
        f"{config.destination}: {len(cases)} cases, {len(subvolumes)} sub-volumes; patients "
        f"{patients}\nforeground voxels: {inside} in, {covered} covered"
    )


# ---------------------------------------------------------------------------------------
# All cases, in processes
# ---------------------------------------------------------------------------------------


def open_pool(config: Config, cases: int) -> contextlib.AbstractContextManager:
    """Processes for `run_cases`, one core each; None for one worker.

    Forked from a clean server, which loads the libraries once: forking after threads can hang.
    """
    workers = min(config.workers or os.cpu_count() or 1, cases)
    if workers <= 1:
        return one_core()
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
    context = multiprocessing.get_context("forkserver" if forkserver else None)
    if forkserver:
        context.set_forkserver_preload(["utilities"])
    return ProcessPoolExecutor(workers, context, initializer=end_with_parent)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """torch's threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing; it keeps to one core."""
    torch.set_num_threads(1)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cases(
    pool: ProcessPoolExecutor | None,
    work: Callable[..., dict[str, Any]],
    jobs: Sequence[Any],
    *arguments: Any,
    title: str,
) -> list[dict[str, Any]]:
    """`work(job, *arguments)` for each job, under one bar; results in the order of the jobs."""
    results, slices = {}, 0
    with tqdm(total=len(jobs), desc=title, unit="case") as bar:
        if pool is None:
            done = ((index, work(job, *arguments)) for index, job in enumerate(jobs))
        else:
            futures = {pool.submit(work, job, *arguments): i for i, job in enumerate(jobs)}
            done = ((futures[future], future.result()) for future in as_completed(futures))
        try:
            for index, result in done:
                results[index] = result
                slices += result.get("slices", 0)
                bar.set_postfix_str(f"{slices / (bar.format_dict['elapsed'] + 1e-9):.0f} slices/s")
                bar.update()
        except BrokenProcessPool as error:
            raise InputError(
                f"{title}: a worker process was ended by the system, most likely for memory; run "
                "the same command again with fewer --workers, finished cases are kept"
            ) from error
        except InputError:
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[index] for index in range(len(jobs))]


if __name__ == "__main__":
    utilities.command_line(main, Config, __doc__)
