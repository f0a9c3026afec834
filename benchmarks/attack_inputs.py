"""Bad scans and label maps among good ones, through every script that reads them.

Each bad one is named with what is wrong, or done as what it is; the good ones are done; the exit
code is 1 where one was refused. All of them lie in one folder and meet each script once.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from attack_bytes import write_series
from attack_scripts import Step, fork_step, wait_for
from attempts import REFUSED, SOUND, Attempt, Config, Demo, Outcome, build_demo

import apply_model
import prepare
import visualize_3d
from data import evaluate
from data.files import make_safe, read_csv

Pair = tuple[nib.Nifti1Image, nib.Nifti1Image]


def change_array(which: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Pair], Pair]:
    """The pair with changed voxels of its scan (0) or label map (1)."""

    def make(pair: Pair) -> Pair:
        images = list(pair)
        array = change(np.asanyarray(images[which].dataobj).copy())
        images[which] = nib.Nifti1Image(array, images[which].affine)
        return images[0], images[1]

    return make


def change_affine(which: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Pair], Pair]:
    def make(pair: Pair) -> Pair:
        images = list(pair)
        affine = change(images[which].affine.copy())
        images[which] = nib.Nifti1Image(np.asanyarray(images[which].dataobj), None)
        images[which].header.set_sform(affine, 1)
        images[which].header["qform_code"] = 0
        return images[0], images[1]

    return make


def put(array: np.ndarray, value: float) -> np.ndarray:
    array = array.astype(np.float32)
    array[tuple(np.array(array.shape) // 2)] = value
    return array


def set_row(affine: np.ndarray, row: int, values: object) -> np.ndarray:
    affine[row] = values
    return affine


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
VOXELS: dict[str, Callable[[Pair], Pair]] = {  # what is wrong → the pair with it
    "air alone": change_array(0, lambda a: np.full_like(a, -1024)),
    "all zero": change_array(0, np.zeros_like),
    "nan": change_array(0, lambda a: put(a, np.nan)),
    "infinite": change_array(0, lambda a: put(a, np.inf)),
    "huge numbers": change_array(0, lambda a: put(a, 1e38)),
    "bytes": change_array(0, lambda a: np.clip(a / 8 + 64, 0, 255).astype(np.uint8)),
    "one slice": change_array(0, lambda a: a[:, :, :1]),
    "two dimensions": change_array(0, lambda a: a[:, :, 0]),
    "four dimensions": change_array(0, lambda a: np.stack([a, a], axis=-1)),
    "no voxels": change_array(0, lambda a: a[:0]),
    "one voxel": change_array(0, lambda a: a[:1, :1, :1]),
    "complex": change_array(0, lambda a: a.astype(np.complex64)),
    "colour": change_array(0, lambda a: np.zeros(a.shape, RGB)),
    "empty label": change_array(1, np.zeros_like),
    "full label": change_array(1, np.ones_like),
    "negative label": change_array(1, lambda a: put(a, -1).astype(np.int16)),
    "foreign label": change_array(1, lambda a: put(a, 77).astype(np.int16)),
    "fraction of a label": change_array(1, lambda a: put(a, 0.5)),
    "label without a number": change_array(1, lambda a: put(a, np.nan)),
    "label of a slice less": change_array(1, lambda a: a[:, :, :-1]),
    "label of four dimensions": change_array(1, lambda a: np.stack([a, a], axis=-1)),
    "mirrored label": change_array(1, lambda a: a[::-1]),
    "label far away": change_affine(1, lambda m: set_row(m, 0, m[0] + [0, 0, 0, 500])),
    "label of other spacing": change_affine(1, lambda m: m @ np.diag([2, 1, 1, 1])),
    "flat grid": change_affine(0, lambda m: set_row(m, 2, [0, 0, 0, 1])),
    "grid without numbers": change_affine(0, lambda m: set_row(m, 1, [np.nan] * 4)),
    "huge spacing": change_affine(0, lambda m: m @ np.diag([1e6, 1, 1, 1])),
    "tiny spacing": change_affine(0, lambda m: m @ np.diag([1e-6, 1, 1, 1])),
    "two equal axes": change_affine(0, lambda m: set_row(m, 0, m[1])),
    "swapped": lambda pair: (pair[1], pair[0]),
}  # fmt: skip
LOOK_INTO_FOLDERS = ("apply_model.py", "visualize_3d.py")  # an empty one holds no case to name
HUGE = (30000, 30000, 30000)


def huge_header(content: bytes) -> bytes:
    head = bytearray(gzip.decompress(content))
    head[42:48] = np.array(HUGE, "<i2").tobytes()
    return gzip.compress(bytes(head))


BYTES: dict[str, Callable[[bytes], bytes]] = {  # what is wrong → the .nii.gz of the scan with it
    "empty file": lambda content: b"",
    "text": lambda content: b"this is no scan\n" * 100,
    "cut": lambda content: content[: len(content) // 2],
    "cut header": lambda content: gzip.compress(gzip.decompress(content)[:200]),
    "no gzip": gzip.decompress,
    "rubbish behind": lambda content: content + b"rubbish" * 50,
    "flipped": lambda content: content[:-400] + bytes(b ^ 1 for b in content[-400:]),
    "huge header": huge_header,
    "web page": lambda content: b"<!DOCTYPE html><html><body>please log in</body></html>",
    "pointer to it": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
}
NAMES = {  # what is odd about it → the name of a good case
    "no UTF-8": os.fsdecode(b"bad\xff_name"), "new line": "bad\nname", "formula": "=1+1",
    "long": "n" * 240, "blank": "a b  c", "quote": "a'b\"c", "option": "--case", "dots": "a..b",
}  # fmt: skip


def make_inputs(demo: Demo, folder: Path) -> dict[str, str]:
    """Decathlon folder of bad cases with three good ones; name of the case → what is wrong."""
    scans = sorted((demo.raw / "imagesTr").glob("*.nii.gz"))
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    places: dict[str, str] = {}

    def place(name: str) -> tuple[Path, Path]:
        return folder / "imagesTr" / f"{name}.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"

    files = [(scan, demo.raw / "labelsTr" / scan.name) for scan in scans]
    for number, source in enumerate(files[:3]):
        for one, other in zip(source, place(f"good_{number}"), strict=True):
            shutil.copy(one, other)
    pair = tuple(nib.load(path) for path in files[3])
    for number, (what, make) in enumerate(VOXELS.items()):
        name = f"voxels_{number:02d}"
        places[name] = what
        for image, path in zip(make(pair), place(name), strict=True):
            nib.save(image, path)
    for number, (what, make) in enumerate(BYTES.items()):
        name = f"bytes_{number:02d}"
        places[name] = what
        path, label = place(name)
        path.write_bytes(make(files[4][0].read_bytes()))
        shutil.copy(files[4][1], label)
    for what, name in NAMES.items():
        places[name] = what
        for one, path in zip(files[5], place(name), strict=True):
            shutil.copy(one, path)
    odd = {"a_folder": Path.mkdir, "a_loop": lambda path: path.symlink_to(path)}
    odd |= {"a_dead_link": lambda path: path.symlink_to("gone"), "a_pipe": os.mkfifo}
    for name, make_odd in odd.items():
        make_odd(place(name)[0])
        shutil.copy(files[4][1], place(name)[1])
    return places | {name: "no file" for name in odd}


def list_doors(demo: Demo, folder: Path, work: Path) -> Iterator[Step]:
    """Scripts that read them."""
    scans, labels = folder / "imagesTr", folder / "labelsTr"

    def cut(out: Path) -> None:
        prepare.main(prepare.Config(source=folder, destination=out, workers=1))

    def segment(out: Path) -> None:
        given = {"checkpoint": demo.run / "best.pt", "destination": out, "device": "cpu"}
        apply_model.main(apply_model.Config(paths=(scans,), truth=(labels,), **given))

    def measure(out: Path) -> None:
        evaluate.main(evaluate.Config(labels, labels, destination=out))

    def view(out: Path) -> None:
        out.mkdir()
        paths = tuple(path for path in sorted(scans.iterdir()) if not path.is_dir())
        config = {"paths": paths, "screenshot": out / "a.png", "size": (64, 64)}
        visualize_3d.main(visualize_3d.Config(**config))

    doors = {"prepare.py": cut, "apply_model.py": segment, "data.evaluate": measure}
    doors["visualize_3d.py"] = view
    for name, call in doors.items():
        yield Step(name, call, 0)


def is_done(out: Path, case: str) -> bool:
    """Whether a script wrote what it writes for a case, by the safe name that it has."""
    name, table = make_safe(case), out / "results.csv"
    files = [out / "subvolumes" / name / "case.json", out / name / f"{name}.json"]
    if any(file.is_file() for file in files) or any(name in p.stem for p in out.glob("*.png")):
        return True
    return table.is_file() and any(row["case"] == name for row in read_csv(table, ["case"]))


def attack_inputs(work: Path, config: Config) -> Iterator[Attempt]:
    """Every bad case through every script."""
    demo = build_demo(config)
    os.environ["TQDM_DISABLE"] = "1"
    places = make_inputs(demo, work / "raw")
    write_series(work / "series", np.zeros((12, 11, 10), np.int16))
    for step in list_doors(demo, work / "raw", work):
        out = work / "out" / step.name
        out.parent.mkdir(exist_ok=True)
        code, told = wait_for(*fork_step(step, out))
        for name, what in places.items():
            if name == "a_folder" and step.name in LOOK_INTO_FOLDERS:
                continue
            outcome, detail = judge(name, told, is_done(out, name))
            yield Attempt(f"inputs: {step.name}", outcome, f"{name} ({what}): {detail}")
        goods = [name for name in ("good_0", "good_1", "good_2") if not is_done(out, name)]
        fine = not goods and code == 1 and "Traceback" not in told
        told = f"exit code {code}, not done {goods}: {told[-1500:]}"
        yield Attempt(f"inputs: {step.name}", SOUND if fine else "wrong end", "" if fine else told)


def judge(name: str, told: str, done: bool) -> Outcome:
    """Done, or named in a line of what was said; one that tells an unexpected error is a fault."""
    part = max(re.findall(r"[a-z0-9_ ]+", name), key=len)[:60]  # names are told in safe signs
    lines = [line for line in told.splitlines() if part in line]
    strange = [line for line in lines if "Error: " in line]
    if strange:
        return "other exception", strange[0][:300]
    if done:
        return SOUND, ""
    return (REFUSED, lines[-1][:300]) if lines else ("not named", "neither done nor named")
