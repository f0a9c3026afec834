"""What damaged files, full disks, kills and rivals do to what is read and written: one table.

    python benchmarks/reliability.py --quick

Each attack is tried in a process forked from this warm one, with a limit of time and memory, and
ends in one outcome. `sound` (the input's own grid and voxels, or the whole file) and `refused` (one
InputError that names the file) are right; every other outcome is a fault, and the exit code is 1.
Writes benchmarks/results/reliability.json. A new kind of attack is a function (work, config) →
attempts, entered in ATTACKS.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

import utilities  # noqa: E402
from data import cases, dicom, volumes  # noqa: E402
from data.files import InputError, read_json, write_json  # noqa: E402
from data.volumes import TO_LPS, Volume  # noqa: E402

SOUND, REFUSED = "sound", "refused"
FAULTS = (
    "other exception", "crash", "hang", "wrong grid", "wrong voxels", "file not named", "torn file",
    "left behind", "socket opened", "identifier",
)  # fmt: skip
SHAPE = (12, 11, 10)
LABELS = {"background": (0,), "liver": (1,), "tumour": (2,)}
SECONDS = 20  # that one attempt may take
MEMORY = 2**30  # bytes that one attempt may allocate beyond what the warm process has
SECRET = "DOE^JANE"


@dataclass
class Config:
    quick: bool = False  # a few hundred attempts of each kind, < 4 minutes
    attacks: tuple[str, ...] = ()  # names of the kinds to try; none: all
    formats: tuple[str, ...] = ()  # first letters of the formats whose bytes are changed; none: all
    seed: int = 0  # of the mutations: same seed, same bytes
    work: Path = Path("/tmp/reliability_benchmark")  # folder that is made and removed
    results: Path = ROOT / "benchmarks/results/reliability.json"  # JSON to write


@dataclass(frozen=True)
class Attempt:
    """One attack and how it ended; `detail` helps to repeat it."""

    row: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Found:
    """What a reader gave: voxels, affine, and whether it said a word about them."""

    array: Any
    affine: Any = None
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------
# Trying in a forked process
# ---------------------------------------------------------------------------------------


def try_forked(
    row: str, count: int, attempt: Callable[[int], tuple[str, str]], batch: int = 100
) -> Iterator[Attempt]:
    """Attempts 0 … count − 1, `batch` of them in each child; a child that dies is counted."""
    done = 0
    while done < count:
        last = min(done + batch, count)
        lines, status = _in_child(lambda write, a=done, b=last: _try_some(a, b, attempt, write))
        for outcome, detail in lines:
            yield Attempt(row, outcome, detail)
        done += len(lines)
        if done < last:
            killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            yield Attempt(row, "hang" if killed == signal.SIGALRM else "crash", f"number {done}")
            done += 1


def _in_child(work: Callable[[Callable[[Any], None]], None]) -> tuple[list[Any], int]:
    """What `work(write)` writes in a forked child, object by object, and how the child ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            os.close(reading)
            stream = os.fdopen(writing, "wb", buffering=0)
            work(lambda item: stream.write(pickle.dumps(item)))
        os._exit(0)
    os.close(writing)
    items = []
    with os.fdopen(reading, "rb") as stream, contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            items.append(pickle.load(stream))
    return items, os.waitpid(child, 0)[1]


def _try_some(first: int, last: int, attempt: Callable, write: Callable[[Any], None]) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for index in range(first, last):
        signal.alarm(SECONDS)
        try:
            result = attempt(index)
        except BaseException as error:
            result = "other exception", f"number {index}: {type(error).__name__}: {error}"[:300]
        signal.alarm(0)
        write(result)


# ---------------------------------------------------------------------------------------
# Bytes: every format that is read
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A sound file, how it is read, and what may come out once its bytes are changed."""

    name: str
    path: Path  # that is read
    file: Path  # whose bytes are changed
    read: Callable[[Path], Found]
    theirs: Callable[[Target], Found | None] | None = None  # an independent reader; None: no other
    judged: bool = True  # False: only how the reading ends counts


def mutate(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One change of some bytes, half of them in the head, and its description."""
    reach = len(content) if rng.random() < 0.5 else min(len(content), 600)
    at, few = rng.randrange(reach), rng.randint(1, 16)
    kind = rng.choice(
        ["bit", "byte", "zeros", "ones", "cut", "delete", "insert", "repeat", "digit"]
    )
    head, tail = content[:at], content[at:]
    changed = {
        "bit": lambda: head + bytes([tail[0] ^ 1 << rng.randrange(8)]) + tail[1:],
        "byte": lambda: head + rng.randbytes(1) + tail[1:],
        "zeros": lambda: head + bytes(len(tail[:few])) + tail[few:],
        "ones": lambda: head + b"\xff" * len(tail[:few]) + tail[few:],
        "cut": lambda: head,
        "delete": lambda: head + tail[few:],
        "insert": lambda: head + rng.randbytes(few) + tail,
        "repeat": lambda: head + tail[:few] + tail,
        "digit": lambda: head + rng.choice([b"9", b"-", b"e", b".", b"0", b" ", b"\n"]) + tail[1:],
    }[kind]()
    return changed, f"{kind} at {at}, {few}"


def attack_bytes(work: Path, config: Config) -> Iterator[Attempt]:
    """Changed bytes of every format."""
    count = 100 if config.quick else 1200
    for target in make_targets(work):
        if config.formats and not target.name.startswith(config.formats):
            continue
        content, sound = target.file.read_bytes(), target.read(target.path)

        def attempt(index: int, target=target, content=content, sound=sound) -> tuple[str, str]:
            rng = random.Random(f"{config.seed} {target.name} {index}")
            changed, what = mutate(content, rng)
            target.file.write_bytes(changed)
            outcome, detail = judge(target, sound)
            return outcome, f"number {index} ({what}) {detail}"

        yield from try_forked(target.name, count, attempt)
        target.file.write_bytes(content)


def judge(target: Target, sound: Found) -> tuple[str, str]:
    """Read once and compare with the sound file, else with what an independent reader finds."""
    try:
        found = target.read(target.path)
    except InputError as error:
        named = target.path.name in str(error) or target.file.name in str(error)
        return (REFUSED if named else "file not named"), str(error)[:300]
    if not target.judged:
        return SOUND, ""
    fault = compare(found, sound)
    if fault and target.theirs and (other := target.theirs(target)) is not None:
        fault = compare(found, other)
    return fault or SOUND, ""


def compare(found: Found, expected: Found) -> str:
    """What is wrong, "" if nothing; a grid that differs with a word of warning is not."""
    if isinstance(expected.array, np.ndarray):
        told = bool(found.notes)
        if found.array.shape != expected.array.shape or not (
            told or np.allclose(found.affine, expected.affine, rtol=1e-5, atol=1e-3)
        ):
            return "wrong grid"
        return "" if np.array_equal(found.array, expected.array) else "wrong voxels"
    return "" if same_content(found.array, expected.array) else "wrong voxels"


def same_content(a: Any, b: Any) -> bool:
    """Whether nested plain content, of a checkpoint, is the same."""
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and torch.equal(a, b)
    if isinstance(b, dict):
        return (
            isinstance(a, dict)
            and a.keys() == b.keys()
            and all(same_content(a[key], b[key]) for key in b)
        )
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_content, a, b))
    return type(a) is type(b) and a == b


# -- sound files of every format


def make_targets(work: Path) -> list[Target]:
    """A sound file of each format in `work`, and how it is read."""
    array = np.asfortranarray(np.arange(1, np.prod(SHAPE) + 1).reshape(SHAPE), dtype=np.int16)
    affine = np.diag([1.5, 1.5, 2.5, 1.0])
    affine[:3, 3] = 11, -22, 33
    targets = []
    for name in ("a.nii", "b.nii.gz"):
        image = nib.Nifti1Image(array, affine)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        nib.save(image, work / name)
        theirs = ask_nibabel if name == "a.nii" else None
        targets.append(Target(name[1:], work / name, work / name, read_volume, theirs))
    return [*targets, *_itk_targets(work, array, affine), *_dicom_targets(work, array),
            *_own_targets(work)]  # fmt: skip


def _itk_targets(work: Path, array: np.ndarray, affine: np.ndarray) -> Iterator[Target]:
    import SimpleITK

    lps = TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(array.T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    for name in ("c.mha", "d.mhd", "e.nrrd", "f.nhdr"):
        for packed in (False, True):
            path = work / f"{'packed' if packed else 'raw'}_{name}"
            SimpleITK.WriteImage(image, str(path), useCompression=packed)
            row = f".{name[2:]} {'compressed' if packed else 'raw'}"
            yield Target(row, path, path, read_volume, ask_itk)
            for file in volumes.list_data_files(path)[1:]:
                yield Target(f"{row}, its voxels", path, file, read_volume, ask_itk)


def _dicom_targets(work: Path, array: np.ndarray) -> Iterator[Target]:
    folder = work / "series"
    write_series(folder, array)
    one = sorted(folder.iterdir())[1]
    yield Target("DICOM slice", folder, one, read_volume, judged=False)
    scan, seg = dicom.read_series(folder), work / "seg.dcm"
    label = scan.like((scan.read() > 600).astype(np.uint8))
    dicom.write_seg(label, scan, LABELS, seg)

    def read_seg(path: Path) -> Found:
        found = cases.read_label_map(path, scan, LABELS)
        return Found(found.read(), found.affine, found.notes)

    yield Target("DICOM SEG", seg, seg, read_seg, judged=False)


def _own_targets(work: Path) -> Iterator[Target]:
    from preprocess import read_prepared

    prepared = {"schema": 1, "labels": {"liver": 1}, "foreground": [1], "settings": {}, "cases": [],
                "subvolumes": [], "training": [], "validation": [], "test": []}  # fmt: skip
    path = work / "dataset.json"
    path.write_text(json.dumps(prepared))
    yield Target(path.name, path, path, lambda p: Found(read_prepared(p.parent)), judged=False)
    path = work / "case.json"
    path.write_text(json.dumps({"fingerprint": "0", "slices": 3, "subvolumes": []}))
    read_record = read_json
    with contextlib.suppress(ImportError):
        read_record = importlib.import_module("data.destination").read_record
    yield Target(path.name, path, path, lambda p: Found(read_record(p)), judged=False)
    path = work / "best.pt"
    write_checkpoint(path)
    yield Target("checkpoint", path, path, lambda p: Found(utilities.load_checkpoint(p)))


def write_checkpoint(path: Path) -> None:
    """A small sound checkpoint; what the signature asks for beyond it is empty."""
    import inspect

    names = inspect.signature(utilities.save_checkpoint).parameters
    state = {"weight": torch.arange(600.0), "bias": torch.zeros(8)}
    given = {
        "network_state": state, "epoch": 1, "val_dice": 0.5, "history": [{"epoch": 1.0}],
        "modality": "CT", "declared": LABELS,
    }  # fmt: skip
    needed = [n for n, p in names.items() if p.default is p.empty and n != "path"]
    utilities.save_checkpoint(path, **{name: given.get(name, {}) for name in needed})


def write_series(folder: Path, array: np.ndarray) -> None:
    """A CT series of int16 (X, Y, Z), a file per slice, with a patient's name in it."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for z in range(array.shape[2]):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
        header.SeriesInstanceUID, header.StudyInstanceUID = series, study
        header.FrameOfReferenceUID, header.Modality, header.InstanceNumber = frame, "CT", z
        header.PatientName, header.PatientID, header.SeriesNumber = SECRET, SECRET, 1
        header.SliceThickness, header.Manufacturer = 2.5, "none"
        header.Rows, header.Columns = array.shape[1], array.shape[0]
        header.PixelSpacing, header.ImageOrientationPatient = [1.5, 1.5], [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [0.0, 0.0, 2.5 * z]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelRepresentation, header.RescaleSlope, header.RescaleIntercept = 1, 1, 0
        header.PixelData = np.ascontiguousarray(array[:, :, z].T).tobytes()
        header.save_as(folder / f"{z:03d}.dcm", enforce_file_format=True)


# -- readers: ours by the door, and independent ones


def read_volume(path: Path) -> Found:
    """By the door, as every script reads."""
    volume = cases.read_volume(path)
    return Found(volume.read(), volume.affine, volume.notes)


def ask_nibabel(target: Target) -> Found | None:
    """What nibabel makes of a NIfTI file whose header has no checksum."""
    try:
        image = nib.load(target.path)
        array = np.asanyarray(image.dataobj)
        return Found(array.reshape(array.shape[:3]), image.affine)
    except Exception:
        return None


def ask_itk(target: Target) -> Found | None:
    """What SimpleITK makes of a file, in a child of its own: it dies of some headers."""

    def read(write: Callable[[Any], None]) -> None:
        import SimpleITK

        image = SimpleITK.ReadImage(str(target.path))
        columns = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine = TO_LPS @ nib.affines.from_matvec(columns, image.GetOrigin())
        write(Found(SimpleITK.GetArrayFromImage(image).T, affine))

    items, _ = _in_child(read)
    return items[0] if items else None


# ---------------------------------------------------------------------------------------
# Writing: full disks, kills, two at once
# ---------------------------------------------------------------------------------------


def make_writers(work: Path) -> dict[str, Callable[[Path], None]]:
    """Name of a file → what writes it, every way in which this project writes one."""
    rng = np.random.default_rng(0)
    volume = Volume(rng.integers(-1000, 1000, (40, 40, 40)).astype(np.int16), np.diag([2, 2, 2, 1]))
    record = {"numbers": rng.random(2000).tolist()}

    def write_slabs(path: Path) -> None:
        slabs = (slab for _, slab in volume.stored_slabs(8))
        volumes.write_slabs(path, volume, volume.dtype, slabs)

    return {
        "volume.nii": volume.write,
        "checked.nii.gz": volume.write_checked,
        "slabs.nii.gz": write_slabs,
        "record.json": lambda path: write_json(record, path),
        "best.pt": write_checkpoint,
    }


def attack_full_disk(work: Path, config: Config) -> Iterator[Attempt]:
    """A disk that is full after so many bytes: the old file stays, or the new one is whole."""
    for name, write in make_writers(work).items():
        folder = work / f"full_{name}"
        folder.mkdir()
        path = folder / name
        write(path)
        whole = path.read_bytes()
        rng = random.Random(config.seed)
        limits = [0, 1, len(whole) // 2, len(whole) - 1, len(whole)]
        limits += [rng.randrange(len(whole)) for _ in range(5 if config.quick else 60)]

        def attempt(index: int, path=path, write=write, whole=whole, limits=limits):
            path.write_bytes(b"old")
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[index], hard))
            try:
                write(path)
                outcome, detail = SOUND, ""
            except InputError as error:
                outcome = REFUSED if str(path) in str(error) else "file not named"
                detail = str(error)[:300]
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            return look_at(path, whole if outcome == SOUND else b"old", outcome), detail

        yield from try_forked(f"full disk: {name}", len(limits), attempt)


def look_at(path: Path, expected: bytes, outcome: str, strict: bool = True) -> str:
    """The outcome, or a fault where a file is not as it must be or another one lies beside it."""
    if path.read_bytes() != expected and not (path.suffix == ".pt" and expected != b"old"):
        return "torn file"
    return "left behind" if strict and len(list(path.parent.iterdir())) > 1 else outcome


def attack_kills(work: Path, config: Config) -> Iterator[Attempt]:
    """SIGKILL while a file is written: under its name lies the old one or the new one, whole."""
    for name, write in make_writers(work).items():
        folder = work / f"kill_{name}"
        folder.mkdir()
        path, rng = folder / name, random.Random(config.seed)
        write(path)
        whole, start = path.read_bytes(), time.perf_counter()
        write(path)
        duration = time.perf_counter() - start
        for number in range(8 if config.quick else 60):
            path.write_bytes(b"old")
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    write(path)
                os._exit(0)
            time.sleep(rng.random() * duration * 1.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            content = path.read_bytes()
            fine = content in (b"old", whole) or (path.suffix == ".pt" and is_loaded(path))
            yield Attempt(f"kill: {name}", SOUND if fine else "torn file", f"number {number}")
            for left in folder.glob(".*"):
                left.unlink()


def attack_trainings(work: Path, config: Config) -> Iterator[Attempt]:
    """SIGKILL anywhere in a training, and --resume: the unbroken run's bits at last."""
    import prepare
    import train
    from data import make_phantoms

    make_phantoms.main(make_phantoms.Config(work / "raw", cases=4, size=48, slices=(20, 24)))
    prepare.main(prepare.Config(work / "raw", work / "data", workers=1))

    def train_for(run: Path, seconds: float) -> bool:
        """Begin, or go on, and die after some seconds; whether it came to the end."""
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                small = {"input_size": (16, 16), "spacing": (16.0, 16.0), "base_channels": 4}
                small |= {"data": work / "data", "run_folder": run, "max_epochs": 3}
                resumed = {"resume": run} if (run / "last.pt").exists() else small
                train.main(train.Config(**resumed, device="cpu"))
                os._exit(0)
            os._exit(1)
        end = time.perf_counter() + seconds
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.perf_counter() > end:
                os.kill(child, signal.SIGKILL)
                return os.waitpid(child, 0)[1] == 0
            time.sleep(0.01)
        return ended[1] == 0

    def read_weights(run: Path) -> dict[str, bytes]:
        state = utilities.load_checkpoint(run / "last.pt")["network_state"]
        return {key: value.numpy().tobytes() for key, value in state.items()}

    rng, start = random.Random(config.seed), time.perf_counter()
    train_for(work / "unbroken", 3600)
    duration, expected = time.perf_counter() - start, read_weights(work / "unbroken")
    for number in range(5 if config.quick else 20):
        run, kills = work / f"broken_{number}", 0
        while not train_for(run, rng.random() * duration if kills < 20 else 3600):
            kills += 1
        same = read_weights(run) == expected
        told = f"number {number}, {kills} kills"
        yield Attempt("kill: training", SOUND if same else "wrong voxels", told)


def is_loaded(path: Path) -> bool:
    with contextlib.suppress(InputError):
        return bool(utilities.load_checkpoint(path))
    return False


def attack_pairs(work: Path, config: Config) -> Iterator[Attempt]:
    """Two processes write one file at the same time: it is whole, and nothing else is left."""
    for name, write in make_writers(work).items():
        folder = work / f"pair_{name}"
        folder.mkdir()
        path = folder / name
        write(path)
        whole = path.read_bytes()
        for number in range(4 if config.quick else 20):
            children = []
            for _ in range(2):
                children.append(os.fork())
                if children[-1] == 0:
                    try:
                        write(path)
                    finally:
                        os._exit(0)
            for child in children:
                os.waitpid(child, 0)
            yield Attempt(f"two at once: {name}", look_at(path, whole, SOUND), f"number {number}")


# ---------------------------------------------------------------------------------------
# Identifiers and sockets
# ---------------------------------------------------------------------------------------


def attack_identifiers(work: Path, config: Config) -> Iterator[Attempt]:
    """A name planted in every text of a header is in no file that is written from it."""
    array = np.ones(SHAPE, np.int16)
    folder = work / "identifiers"
    folder.mkdir()
    for key in ("descrip", "aux_file", "intent_name", "db_name", "data_type", "extension"):
        image = nib.Nifti1Image(array, np.diag([2, 2, 2, 1]))
        if key == "extension":
            extension = nib.nifti1.Nifti1Extension("comment", SECRET.encode())
            image.header.extensions.append(extension)
        else:
            image.header[key] = SECRET.encode()
        nib.save(image, folder / "in.nii")
        scan = volumes.read_file(folder / "in.nii")
        for name, volume in (("like", scan.like(array)), ("ras", scan.ras), ("same", scan)):
            volume.write(folder / "out.nii")
            leaked = SECRET.encode() in (folder / "out.nii").read_bytes()
            yield Attempt(f"identifier: {key}", "identifier" if leaked else SOUND, name)


WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[-1] if event != "socket.getaddrinfo" else arguments[0]
        if not isinstance(address, (str, bytes)) or event == "socket.getaddrinfo":
            print("SOCKET", event, address, file=sys.stderr)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def attack_sockets(work: Path, config: Config) -> Iterator[Attempt]:
    """No script opens a connection: from phantoms to a label map, each watched."""
    raw, prepared, run = work / "raw", work / "prepared", work / "run"
    steps = [
        f"data/make_phantoms.py --destination {raw} --cases 6 --size 32",
        f"prepare.py {raw} --destination {prepared}",
        f"train.py --data {prepared} --run-folder {run} --input-size 32 32 --spacing 12 12 "
        "--base-channels 4 --max-epochs 1 --device cpu --precision fp32",
        f"apply_model.py {raw / 'imagesTr'} --checkpoint {run / 'best.pt'} "
        f"--destination {work / 'results'} --device cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    for step in steps:
        script, *arguments = step.split()
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, script, *arguments],
            cwd=ROOT, env=environment, text=True, capture_output=True, check=False,
        )  # fmt: skip
        outcome = "other exception" if done.returncode else SOUND
        if "SOCKET" in done.stderr:
            outcome = "socket opened"
        yield Attempt(f"sockets: {script}", outcome, done.stderr[-300:] if outcome != SOUND else "")


# ---------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------

ATTACKS: dict[str, Callable[[Path, Config], Iterator[Attempt]]] = {
    "bytes": attack_bytes,
    "full-disk": attack_full_disk,
    "kills": attack_kills,
    "trainings": attack_trainings,
    "pairs": attack_pairs,
    "identifiers": attack_identifiers,
    "sockets": attack_sockets,
}


@dataclass
class Row:
    """How the attempts of one row of the table ended."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # the first few, to repeat them

    def add(self, attempt: Attempt) -> None:
        self.counts[attempt.outcome] += 1
        if attempt.outcome in FAULTS and len(self.faults) < 5:
            self.faults.append(f"{attempt.outcome}: {attempt.detail}")

    @property
    def wrong(self) -> int:
        return sum(self.counts[fault] for fault in FAULTS)


def print_table(rows: dict[str, Row]) -> None:
    """One line per row, only the faults that occurred."""
    print(f"{'attack':38} {'tried':>6} {SOUND:>6} {REFUSED:>8}  faults")
    for name, row in rows.items():
        faults = ", ".join(f"{row.counts[fault]} {fault}" for fault in FAULTS if row.counts[fault])
        counts = row.counts
        print(
            f"{name:38} {counts.total():6} {counts[SOUND]:6} {counts[REFUSED]:8}  {faults or '-'}"
        )


def main(config: Config) -> None:
    torch.set_num_threads(1)  # a process with torch's threads cannot be forked safely
    rows: dict[str, Row] = defaultdict(Row)
    seconds = {}
    for name in config.attacks or ATTACKS:
        work = config.work / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        start = time.perf_counter()
        for attempt in ATTACKS[name](work, config):
            rows[attempt.row].add(attempt)
        seconds[name] = round(time.perf_counter() - start, 1)
    shutil.rmtree(config.work, ignore_errors=True)
    print_table(rows)
    wrong, tried = sum(r.wrong for r in rows.values()), sum(r.counts.total() for r in rows.values())
    print(f"{tried} attempts, {wrong} faults, {sum(seconds.values()):.0f} s")
    record = {
        "command": "python benchmarks/reliability.py" + " --quick" * config.quick,
        "tried": tried,
        "faults": wrong,
        "seconds": seconds,
        "rows": {name: {"counts": dict(r.counts), "faults": r.faults} for name, r in rows.items()},
    }
    write_json(record, config.results)
    if wrong:
        for name, row in rows.items():
            for fault in row.faults:
                print(f"{name}: {fault}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
