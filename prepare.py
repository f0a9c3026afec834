"""Raw CTs with label maps → checked, split by patient, cut into sub-volumes of 16 axial slices.

    python prepare.py data/raw

Writes `<destination>/subvolumes/<case>/image_<first slice>.nii` and `label_….nii.gz` in RAS, every
voxel at its own place in the patient, and last `<destination>/dataset.json`, which the next step
reads: where it exists, the folder is complete. Nothing is resampled and no intensity is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tyro
from tqdm import tqdm

import utilities
from utilities import AIR_HU, IMAGE, LABEL, InputError, read_volume, voxels, write_volume

SCHEMA = 1  # of dataset.json
SPLITS = ("training", "validation", "test")


@dataclass
class Config:
    source: tyro.conf.Positional[Path] = Path("data/raw")  # folder with the scans, as downloaded
    destination: Path = Path("data/prepared")  # folder to write
    subvolume_depth: int = 16  # axial slices per sub-volume
    training: float = 0.70  # fraction of the patients that the network is fitted to
    validation: float = 0.15  # fraction of the patients that choose the checkpoint
    test: float = 0.15  # fraction of the patients that are looked at once, at the end
    seed: int = 0  # of the split and of keep_empty
    foreground: tuple[int, ...] = (1, 2)  # label values that must not be lost
    keep_empty: float = 0.0  # fraction of the sub-volumes without foreground that is kept
    compress: bool = False  # gzip the images too: half the disk, 3 times the time
    workers: int = 0  # processes; 0 means one per core


def main(config: Config) -> None:
    cases, labels = find_cases(config.source, config.foreground)
    records = in_parallel(check_case, cases, config, labels, title="checking")
    faults = print_findings(records)
    sound = [record for record in records if not errors(record)]
    split = split_patients([record["patient"] for record in sound], config)
    with_cuts = in_parallel(cut_case, sound, config, labels, title="cutting")
    write_dataset(with_cuts, split, labels, config)
    if faults:
        raise InputError(
            f"{faults} of {len(records)} cases were left out, see the errors above; "
            f"the others are ready in {config.destination}"
        )


# ---------------------------------------------------------------------------------------
# Finding cases
# ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """One scan and its label map; None where one is missing."""

    name: str
    patient: str
    image: Path | None
    label: Path | None


VOLUME_SUFFIXES = (".nii", ".nii.gz")


def find_cases(source: Path, foreground: Sequence[int]) -> tuple[list[Case], dict[str, int]]:
    """Cases in the order of their names, and label name → value."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give the folder that holds the scans")
    roots = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    root = next((path for path in roots if (path / "imagesTr").is_dir()), None)
    if root is None:
        raise InputError(
            f"{source}: no scans found; expected imagesTr and labelsTr (Medical Decathlon layout)"
        )
    images, labels = volumes_in(root / "imagesTr"), volumes_in(root / "labelsTr")
    names = sorted(images.keys() | labels.keys())
    if not names:
        raise InputError(f"{root}: imagesTr and labelsTr hold no .nii or .nii.gz files")
    print(f"{root}: Decathlon layout, {len(images)} images and {len(labels)} labels")
    cases = [Case(name, name, images.get(name), labels.get(name)) for name in names]
    return cases, label_values(root / "dataset.json", foreground)


def volumes_in(folder: Path) -> dict[str, Path]:
    """Case name → absolute path; names that start with a dot (macOS leaves `._x.nii`) are not."""
    if not folder.is_dir():
        return {}
    return {
        utilities.case_name(path): path.resolve()
        for path in sorted(folder.iterdir())
        if path.name.endswith(VOLUME_SUFFIXES) and not path.name.startswith(".")
    }


def label_values(description: Path, foreground: Sequence[int]) -> dict[str, int]:
    """Label name → value from a Decathlon or nnU-Net `dataset.json`, else liver and tumour."""
    labels = dict(utilities.LABEL_VALUES)
    if description.is_file():
        try:
            entries = json.loads(description.read_text())["labels"].items()
            digits_first = all(key.isdigit() for key, _ in entries)
            labels = {n: int(v) for v, n in entries} if digits_first else dict(entries)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"{description}: must be JSON with 'labels' (value → name), got {error!r}; "
                "correct it, or remove it to use background 0, liver 1, tumour 2"
            ) from error
    return labels | {f"label {v}": v for v in foreground if v not in labels.values()}


# ---------------------------------------------------------------------------------------
# The check: nothing is written before all cases have passed through it
# ---------------------------------------------------------------------------------------

RULES = {  # finding → (level, what to do); an error stops its case, a warning is told
    "orphan": ("error", "add the missing file or remove this one"),
    "unreadable": ("error", "download or convert it again"),
    "shape": ("error", "export the label map again on the grid of its scan"),
    "grid": ("error", "export the label map again on the grid of its scan"),
    "values": ("error", "declare the values in dataset.json or with --foreground, or correct them"),
    "empty": ("error", "add the outline or remove the case"),
}


def errors(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [finding for finding in record["findings"] if RULES[finding[0]][0] == "error"]


def print_findings(records: list[dict[str, Any]]) -> int:
    """Tell every finding with its remedy; returns the number of cases with an error."""
    for record in records:
        for kind, found in record["findings"]:
            level, remedy = RULES[kind]
            print(f"{level}: {record['case']}: {found}; {remedy}")
    faults = sum(bool(errors(record)) for record in records)
    if faults == len(records):
        raise InputError(f"none of the {faults} cases can be used; see the errors above")
    return faults


def check_case(case: Case, config: Config, labels: dict[str, int]) -> dict[str, Any]:
    """Record of a case for `dataset.json`, with its findings."""
    record = {
        "case": case.name,
        "patient": case.patient,
        IMAGE: str(case.image),
        LABEL: str(case.label),
        "findings": [],
    }
    if case.image is None or case.label is None:
        missing = IMAGE if case.image is None else LABEL
        record["findings"].append(("orphan", f"{case.image or case.label} has no {missing}"))
        return record
    try:
        image, label = read_volume(case.image), read_volume(case.label)
        record |= {
            "shape": list(image.shape),
            "spacing_mm": [round(s, 6) for s in utilities.spacing_mm(image.affine)],
            "orientation": "".join(nib.aff2axcodes(image.affine)),
            "slices": ras_grid(image)[0][2],
        }
        record["findings"] += compare_grids(image, label)
        if not record["findings"]:
            record |= count_label(label, config, labels, record["findings"])
    except InputError as error:
        record["findings"].append(("unreadable", str(error)))
    return record


def compare_grids(image: nib.Nifti1Image, label: nib.Nifti1Image) -> list[tuple[str, str]]:
    """Findings where the label map does not lie on the scan: shape, or more than half a voxel."""
    (shape, affine), (label_shape, label_affine) = ras_grid(image), ras_grid(label)
    if shape != label_shape:
        return [("shape", f"image is {image.shape}, label is {label.shape}")]
    corners = np.array(np.meshgrid(*([0, n - 1] for n in shape), [1])).reshape(4, -1)
    apart = np.linalg.inv(affine) @ (label_affine - affine) @ corners  # in voxels of the image
    distance = float(np.abs(apart).max())
    return [("grid", f"image and label lie {distance:.2f} voxels apart")] if distance > 0.5 else []


def count_label(
    label: nib.Nifti1Image, config: Config, labels: dict[str, int], findings: list[tuple[str, str]]
) -> dict[str, Any]:
    """Voxels per label value, counted over the whole label map in one pass."""
    depth, total = ras_grid(label)[0][2], np.zeros(256, np.int64)
    for _, slab in ras_slabs(label, ranges(depth, config.subvolume_depth, reach_back=False)):
        whole = slab.astype(np.uint8)
        if not np.array_equal(whole, slab):
            odd = slab[whole != slab][0]
            findings.append(("values", f"label holds {odd}, expected {sorted(labels.values())}"))
            return {}
        if whole.any():
            total += np.bincount(whole.ravel(order="K"), minlength=256)
        else:
            total[0] += whole.size
    odd = sorted(set(np.flatnonzero(total).tolist()) - set(labels.values()))
    if odd:
        findings.append(("values", f"label holds {odd}, expected {sorted(labels.values())}"))
    foreground = int(total[list(config.foreground)].sum())
    if not total[1:].any():
        findings.append(("empty", "label map is empty"))
    counts = {str(value): int(total[value]) for value in labels.values()}
    return {"foreground_voxels": foreground, "voxels_per_label": counts}


# ---------------------------------------------------------------------------------------
# Splitting by patient
# ---------------------------------------------------------------------------------------


def split_patients(patients: Sequence[str], config: Config) -> dict[str, str]:
    """Patient → "training", "validation" or "test".

    The order is drawn from the seed and each patient's name alone. Rounding: largest remainder, in
    a tie the earlier split; a split with a fraction above 0 gets at least one patient. So 130
    patients at 70/15/15 give 91 / 20 / 19.
    """
    fractions = np.array([config.training, config.validation, config.test])
    drawn = sorted(set(patients), key=lambda patient: seeded(config.seed, patient))
    if (fractions < 0).any() or fractions[0] + fractions[1] <= 0:
        raise InputError(
            f"split fractions must be ≥ 0 and leave something to learn from, got {fractions}"
        )
    if len(drawn) < np.count_nonzero(fractions):
        raise InputError(
            f"{len(drawn)} patients cannot fill {np.count_nonzero(fractions)} splits; add patients "
            "or set a fraction to 0 (for one with two patients: --test 0)"
        )
    exact = fractions / fractions.sum() * len(drawn)
    sizes = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(sizes - exact, kind="stable")[: len(drawn) - sizes.sum()]:
        sizes[index] += 1
    while (short := (sizes == 0) & (fractions > 0)).any():
        sizes[sizes.argmax()] -= 1
        sizes[short.argmax()] += 1
    names = np.repeat(SPLITS, sizes)
    return dict(zip(drawn, names.tolist(), strict=True))


def seeded(seed: int, name: str) -> float:
    """Number in [0, 1) that depends on seed and name alone: the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---------------------------------------------------------------------------------------
# Cutting
# ---------------------------------------------------------------------------------------


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
    with utilities.slices(image) as read:
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


def cut_case(record: dict[str, Any], config: Config, labels: dict[str, int]) -> dict[str, Any]:
    """Write the sub-volumes of a case; returns its record with `subvolumes` and the proof."""
    folder = config.destination / "subvolumes" / record["case"]
    image, label = read_volume(Path(record[IMAGE])), read_volume(Path(record[LABEL]))
    subvolumes, covered = [], np.zeros(record["slices"], np.int64)
    with whole_folder(folder) as temporary:
        kept = wanted_labels(label, record["case"], config)
        _, affine = ras_grid(image)
        for first, slab in ras_slabs(image, [(f, f + a.shape[2]) for f, a in kept.items()]):
            outline, depth = kept.pop(first), slab.shape[2]
            covered[first : first + depth] = foreground_per_slice(outline, config.foreground)
            counts = {str(v): int(np.count_nonzero(outline == v)) for v in labels.values()}
            entry = {"case": record["case"], "first_slice": first}
            for key, array, air in ((IMAGE, slab, AIR_HU), (LABEL, outline, 0)):
                suffix = ".nii.gz" if config.compress or key == LABEL else ".nii"
                name = f"{key}_{first:04d}{suffix}"
                piece = subvolume(image, affine, array, first, config.subvolume_depth, air)
                write_volume(piece, temporary / name)
                entry[key] = f"subvolumes/{record['case']}/{name}"
            padded = config.subvolume_depth - depth
            subvolumes.append(entry | {"padded_slices": padded, "voxels_per_label": counts})
    subvolumes.sort(key=lambda entry: entry["first_slice"])
    covered_voxels = int(covered.sum())
    if covered_voxels != record["foreground_voxels"]:
        raise RuntimeError(
            f"{record['case']}: {record['foreground_voxels']} foreground voxels went in, "
            f"{covered_voxels} are covered; this is a fault of prepare.py, please report it"
        )
    return record | {"covered_foreground_voxels": covered_voxels, "subvolumes": subvolumes}


def wanted_labels(label: nib.Nifti1Image, case: str, config: Config) -> dict[int, np.ndarray]:
    """First slice → label map (X, Y, Z) uint8 of the sub-volumes that are kept."""
    depth, kept = ras_grid(label)[0][2], {}
    for first, slab in ras_slabs(label, ranges(depth, config.subvolume_depth)):
        chosen = seeded(config.seed, f"{case}:{first}") < config.keep_empty
        if chosen or (slab.any() and foreground_per_slice(slab, config.foreground).any()):
            kept[first] = slab.astype(np.uint8)
    return kept


def foreground_per_slice(label: np.ndarray, foreground: Sequence[int]) -> np.ndarray:
    """Voxels of the label values `foreground` in each slice of (X, Y, Z)."""
    counts = [
        [np.count_nonzero(label[:, :, z] == value) for z in range(label.shape[2])]
        for value in foreground
    ]
    return np.sum(counts, axis=0)


def subvolume(
    image: nib.Nifti1Image, affine: np.ndarray, array: np.ndarray, first: int, depth: int, air: int
) -> nib.Nifti1Image:
    """`array` (X, Y, ≤ depth) at slice `first` of the RAS grid; padded above with `air`."""
    if np.issubdtype(array.dtype, np.integer):
        air = max(air, np.iinfo(array.dtype).min)
    if missing := depth - array.shape[2]:
        array = np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=air)
    moved = affine @ nib.affines.from_matvec(np.eye(3), [0, 0, first])
    piece = nib.Nifti1Image(array, moved, dtype=array.dtype)
    piece.header.set_xyzt_units("mm")
    return piece


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
            f"{folder}: cannot be written ({error.strerror or error}); "
            "choose a folder that is writable and has free space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------------------------------
# All cases
# ---------------------------------------------------------------------------------------


def in_parallel(
    work: Callable[..., dict[str, Any]],
    jobs: Sequence[Any],
    config: Config,
    *arguments: Any,
    title: str,
) -> list[dict[str, Any]]:
    """`work(job, config, *arguments)` for each job, in processes, under one bar; in job order."""
    workers = min(config.workers or os.cpu_count() or 1, len(jobs))
    results, slices = {}, 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(jobs), desc=title, unit="case"))
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, context))
            futures = {pool.submit(work, job, config, *arguments): i for i, job in enumerate(jobs)}
            finished = ((futures[future], future.result()) for future in as_completed(futures))
        else:
            finished = ((i, work(job, config, *arguments)) for i, job in enumerate(jobs))
        for index, result in finished:
            results[index] = result
            slices += result.get("slices", 0)
            bar.set_postfix_str(f"{slices / (bar.format_dict['elapsed'] + 1e-9):.0f} slices/s")
            bar.update()
    return [results[index] for index in range(len(jobs))]


def write_dataset(
    records: list[dict[str, Any]], split: dict[str, str], labels: dict[str, int], config: Config
) -> None:
    """Write `dataset.json` last: it says that the folder is complete, and proves it."""
    settings = asdict(config)
    for where in ("source", "destination", "workers"):  # they do not change the content
        del settings[where]
    cases = [record | {"split": split[record["patient"]]} for record in records]
    subvolumes = [
        entry | {"split": case["split"]} for case in cases for entry in case.pop("subvolumes")
    ]
    for case in cases:
        case["warnings"] = [found for _, found in case.pop("findings")]
    dataset = {
        "schema": SCHEMA,
        "settings": settings,
        "subvolume_depth": config.subvolume_depth,
        "foreground": list(config.foreground),
        "labels": labels,
        "cases": cases,
        "subvolumes": subvolumes,
    }
    for name in SPLITS:
        dataset[name] = [
            {key: entry[key] for key in (IMAGE, LABEL, "case")}
            for entry in subvolumes
            if entry["split"] == name
        ]
    with utilities.atomic_write(config.destination / "dataset.json") as temporary:
        temporary.write_text(json.dumps(dataset, indent=1))
    voxels_in = sum(case["foreground_voxels"] for case in cases)
    covered = sum(case["covered_foreground_voxels"] for case in cases)
    patients = " / ".join(f"{sum(s == name for s in split.values())} {name}" for name in SPLITS)
    print(
        f"{config.destination}: {len(cases)} cases, {len(subvolumes)} sub-volumes; "
        f"patients {patients}\nforeground voxels: {voxels_in} in, {covered} covered"
    )


if __name__ == "__main__":
    utilities.command_line(main, Config, __doc__)
