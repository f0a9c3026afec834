"""What damaged files, wrong settings, full disks, kills and rivals do: one table.

    python benchmarks/reliability.py --quick

A row has a maker of an input, a command that meets it in a process forked from this warm one, and
a verdict. `sound` and `refused` (one line that names the file or the option) are right; every other
outcome is a fault, and the exit code is 1. No command may open a connection.
Writes benchmarks/results/reliability.json; with --kinds the other kinds keep there what they had.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
import torch
import tyro
from machine import RESULTS, ROOT, machine
from PIL import Image

import apply_model  # noqa: F401  # loaded once, for all that are forked
import prepare  # noqa: F401
import train  # noqa: F401
import visualize_3d  # noqa: F401
from data.files import InputError, read_json, write_json
from data.scans import read_volume
from utilities import load_checkpoint

sys.path.append(str(ROOT / "tests"))
from children import write_blank
from conftest import run_here
from matplotlib.figure import Figure

SOUND, REFUSED = "sound", "refused"
WAITING = 300  # seconds after which a command hangs
TINY = "--input-size 32 32 --spacing 12 12 --base-channels 4 --device cpu --precision fp32"
STEPS = {  # script → its command; {out} is the folder that it writes
    "prepare.py": "prepare.py {demo}/raw --destination {out} --workers 1",
    "train.py": f"train.py --data {{demo}}/prepared --run-folder {{out}} --max-epochs 2 {TINY}",
    "apply_model.py": "apply_model.py {demo}/raw/imagesTr --truth {demo}/raw/labelsTr "
    "--checkpoint {demo}/run --destination {out} --accept seen --device cpu",
    "data.evaluate": "-m data.evaluate {demo}/results {demo}/raw/labelsTr --destination {out}",
    "visualize_3d.py": "visualize_3d.py {scan} --label {truth} --screenshot {out}/a.png "
    "--mesh {out}/a.stl --html {out}/a.html --size 200 150",
}
TIMES = {"SIGKILL": 30, "SIGTERM": 30, "full disk": 60, "two at once": 20}  # of each step
GO_ON = {"train.py": "train.py --resume {out} --device cpu"}  # where the same command is refused


@dataclass
class Config:
    quick: bool = False  # few attempts of each row, minutes
    kinds: tuple[str, ...] = ()  # names in KINDS; none: all
    seed: int = 0  # of the mutations: same seed, same bytes
    work: Path = Path("/tmp/reliability_benchmark")  # folder that is made and removed
    results: Path = RESULTS / "reliability.json"  # JSON to write


@dataclass(frozen=True)
class End:
    """How a command ended: its exit code, negative for a signal, and what it printed."""

    code: int
    told: str

    def judge(self, *names: str) -> tuple[str, str]:
        """Return sound, refused (naming one of `names`), or the fault; and the last words."""
        last = self.told.strip()[-300:]
        if "SOCKET" in self.told:
            return "socket opened", last
        if self.code < 0:
            return ("hang" if -self.code in (signal.SIGALRM, signal.SIGPROF) else "crash"), last
        if "Traceback" in self.told or "LIVER_DEBUG" in self.told:
            return "other exception", last
        if self.code == 0:
            return SOUND, last
        return (REFUSED if any(name in self.told for name in names) else "not named"), last


def start(command: str | Callable[[], Any], limit: int | None = None) -> tuple[int, int]:
    """Fork a process that runs a command; return its number and the pipe of what it prints. No file
    may have more than `limit` bytes, as on a full disk."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    code: Any = 1
    try:
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        sys.addaudithook(lambda event, given: print("SOCKET", given) if event == "socket.connect"
                         and isinstance(given[1], tuple) else None)  # fmt: skip
        Figure.savefig = write_blank
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code = run_here(*command.split()) if isinstance(command, str) else command()
        if isinstance(code, str):
            print(code)
            code = 1
    except BaseException as error:
        print(error) if isinstance(error, InputError) else traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def run(command: str | Callable[[], Any], limit: int | None = None) -> End:
    return wait_for(*start(command, limit))


def wait_for(child: int, reading: int) -> End:
    with os.fdopen(reading, errors="replace") as stream:
        told = stream.read()
    return End(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told)


def build_demo(folder: Path) -> dict[str, Path]:
    """Six small phantoms on their way, from scans to label maps; return the places in commands."""
    scan = folder / "raw/imagesTr/phantom_000.nii.gz"
    places = {"demo": folder, "scan": scan, "truth": folder / "raw/labelsTr" / scan.name}
    making = "data/make_phantoms.py --destination {out} --cases 6 --size 32"
    commands = [making, *list(STEPS.values())[:3]]
    for command, name in zip(commands, ("raw", "prepared", "run", "results"), strict=True):
        if (end := run(command.format(**places, out=folder / name))).code:
            raise RuntimeError(f"nothing to attack: {end.told[-2000:]}")
    return places


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one change, half of the time in the head."""
    at = rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 600))
    few, head, tail = rng.randint(1, 16), content[:at], content[at:]
    flipped = bytes([tail[0] ^ 1 << rng.randrange(8)]) + tail[1:]
    digit = rng.choice([b"9", b"-", b"e", b".", b" "]) + tail[1:]
    return head + rng.choice([flipped, digit, b"", tail[few:], rng.randbytes(few) + tail])


def attack_bytes(work: Path, places: dict[str, Path], config: Config) -> Iterator[tuple]:
    array = np.arange(1, 1321, dtype=np.int16).reshape(12, 11, 10)
    image = SimpleITK.GetImageFromArray(array)
    files = {"scan.nii": False, "scan.nii.gz": True}  # whether every byte has a checksum
    for name in files:
        nib.save(nib.Nifti1Image(array.T, np.diag([1.5, 1.5, 2.5, 1])), work / name)
    for name, packed in itertools.product(("scan.mha", "scan.nrrd"), (False, True)):
        files[f"{'packed' if packed else 'raw'}_{name}"] = False
        SimpleITK.WriteImage(image, str(work / [*files][-1]), useCompression=packed)
    shutil.copy(places["demo"] / "run" / "best.pt", work)
    for name, summed in {**files, "best.pt": True}.items():
        path = work / name
        content, rng = path.read_bytes(), random.Random(f"{config.seed} {name}")

        def read(path=path, summed=summed) -> int:
            found = load_checkpoint(path) if path.suffix == ".pt" else read_volume(path).read()
            if summed and path.suffix != ".pt" and not np.array_equal(found, array.T):
                raise AssertionError("wrong voxels")
            return 0

        for _ in range(30 if config.quick else 1430):
            path.write_bytes(mutate(content, rng))
            yield f"bytes: {name}", *run(read).judge(name)


def put(array: np.ndarray, value: float) -> np.ndarray:
    array = array.astype(np.float32)
    array[tuple(np.array(array.shape) // 2)] = value
    return array


CHANGES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {  # of image or label
    "nan": ("image", lambda a: put(a, np.nan)),
    "air alone": ("image", lambda a: np.full_like(a, -1024)),
    "bytes": ("image", lambda a: np.clip(a / 8 + 64, 0, 255).astype(np.uint8)),
    "four dimensions": ("image", lambda a: np.stack([a, a], axis=-1)),
    "one slice": ("image", lambda a: a[:, :, :1]),
    "unknown value": ("label", lambda a: put(a, 77).astype(np.uint8)),
    "label of another shape": ("label", lambda a: a[:-1]),
}
READERS = {  # commands that meet the bad pair
    "apply_model.py": "apply_model.py {image} --truth {label} --checkpoint {demo}/run "
    "--destination {out} --device cpu",
    "data.check": "-m data.check {bad} --destination {out}",
}
MISTAKES = """
    prepare.py {demo}/raw --destination {out} --training 0.9 | add up
    prepare.py {demo}/raw --destination {out} --values liver=x | values
    prepare.py {demo}/raw --destination {out} --foreground kidney | kidney
    prepare.py {demo}/raw --destinaton {out} | destinaton
    train.py --data {demo}/raw --run-folder {out} | dataset.json
    train.py --data {demo}/prepared --run-folder {demo}/run | run
    train.py --data {demo}/prepared --run-folder {out} --hu-window 250 -200 | hu-window
    train.py --data {demo}/prepared --run-folder {out} --pretrained {demo}/no.pt | no.pt
    apply_model.py --checkpoint {demo}/run | nothing to segment
    apply_model.py {scan} {scan} --checkpoint {demo}/run --destination {out} | twice
    apply_model.py {scan} --checkpoint {demo}/run --locate {demo}/no.pt | no.pt
    apply_model.py {truth} --checkpoint {demo}/run --destination {out} | HU
    visualize_3d.py {demo}/results --mesh {out}/a.xyz | mesh
"""


def attack_inputs(work: Path, places: dict[str, Path], config: Config) -> Iterator[tuple]:
    rng, rounds = random.Random(config.seed), range(1 if config.quick else 36)
    for _, (change, (which, make)) in itertools.product(rounds, CHANGES.items()):
        bad, part = work / "bad", np.s_[rng.randrange(6) :, : -1 - rng.randrange(6)]
        shutil.rmtree(bad, ignore_errors=True)
        files = {"image": bad / "imagesTr/bad_1.nii.gz", "label": bad / "labelsTr/bad_1.nii.gz"}
        for (key, path), source in zip(files.items(), ("scan", "truth"), strict=True):
            loaded = nib.load(places[source])
            array = np.asanyarray(loaded.dataobj)[part].copy()
            path.parent.mkdir(parents=True)
            nib.save(nib.Nifti1Image(make(array) if key == which else array, loaded.affine), path)
        for name, command in READERS.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            end = run(command.format(**places, **files, bad=bad, out=work / "out"))
            yield f"{change}: {name}", *end.judge("bad_1")


def attack_settings(work: Path, places: dict[str, Path], config: Config) -> Iterator[tuple]:
    for line in MISTAKES.strip().splitlines():
        command, _, expected = line.strip().rpartition(" | ")
        outcome, told = run(command.format(**places, out=work / "out")).judge(expected)
        row = f"settings: {command.split()[0]}"
        yield row, "accepted" if outcome == SOUND else outcome, f"{command}: {told}"


# Kills, signals, full disks, rivals: what lies there is whole, and the same command goes on


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return name → content, without seconds, of all files but unfinished ones and locks."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    kept = (path for path in files if ".partial" not in str(path) and path.name != ".lock")
    seconds = re.compile(rb'"(\w*seconds\w*|mark)": [^,]*')
    return {str(p.relative_to(folder)): seconds.sub(b"", p.read_bytes()) for p in kept}


def is_whole(path: Path) -> bool:
    """Return whether a file can be read to its end by what reads its format."""
    readers = {".json": read_json, ".png": lambda p: Image.open(p).load()}
    if path.suffix == ".pt":  # by a child: torch's threads, begun here, would not outlive a fork
        return run(lambda: int(not load_checkpoint(path))).code == 0
    readers |= dict.fromkeys((".nii", ".gz"), lambda p: read_volume(p).read())
    try:
        readers.get(path.suffix, Path.read_bytes)(path)
        return path.stat().st_size > 0
    except (InputError, OSError):
        return False


def attack_steps(work: Path, places: dict[str, Path], config: Config) -> Iterator[tuple]:
    for name, words in STEPS.items():
        out = work / name / "out"
        places["out"], trees, begin = out, [], time.perf_counter()
        for _ in range(2):
            shutil.rmtree(out, ignore_errors=True)
            if (end := run(words.format(**places))).code:
                raise RuntimeError(f"{name} alone ends with {end.code}: {end.told[-2000:]}")
            trees.append(read_tree(out))
        seconds, rng = (time.perf_counter() - begin) / 2, random.Random(f"{config.seed} {name}")
        varying = {key for key in trees[0] if trees[0][key] != trees[1].get(key)}
        for kind in TIMES:
            for _ in range(2 if config.quick else TIMES[kind]):
                shutil.rmtree(out, ignore_errors=True)
                outcome, told = disturb(kind, words.format(**places), out, seconds, trees[0], rng)
                torn = [key for key in read_tree(out) if not is_whole(out / key)]
                resumed = name in GO_ON and (out / "last.pt").exists()
                again = run((GO_ON[name] if resumed else words).format(**places))
                left = read_tree(out)
                if torn:
                    outcome, told = "torn file", torn[0]
                elif again.code:
                    outcome, told = "wrong end", again.told[-300:]
                elif odd := [k for k in left if k not in varying and left[k] != trees[0].get(k)]:
                    outcome, told = "other files", ", ".join(odd)
                yield f"{kind}: {name}", outcome, told


def disturb(
    kind: str, command: str, out: Path, seconds: float, files: dict[str, bytes], rng: random.Random
) -> tuple[str, str]:
    """Run a command under a disturbance; return how it ended."""
    if kind == "full disk":
        limit = max(0, len(rng.choice([*files.values()])) - 1)
        return run(command, limit).judge(str(out))
    child = start(command)
    if kind == "two at once":
        ends = [wait_for(*start(command)).judge(str(out)), wait_for(*child).judge(str(out))]
        return max(ends, key=lambda judged: judged[0] != SOUND)
    time.sleep(rng.random() * seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child[0], getattr(signal, kind))
    end = wait_for(*child)
    expected = {"SIGKILL": (0, -signal.SIGKILL), "SIGTERM": (0, 130)}[kind]
    sound = end.code in expected and "Traceback" not in end.told
    told = end.told.replace("RuntimeWarning", "").count("\n") > 1
    sound |= end.code == -signal.SIGTERM and not told  # it came before the script's first line
    return (SOUND if sound else "wrong end"), f"{end.code}: {end.told[-300:]}"


KINDS: dict[str, Callable[[Path, dict[str, Path], Config], Iterator[tuple]]] = {
    "bytes": attack_bytes, "inputs": attack_inputs, "settings": attack_settings,
    "steps": attack_steps,
}  # fmt: skip


def main(config: Config) -> None:
    torch.set_num_threads(1)  # a process with torch's threads cannot be forked safely
    os.environ |= {"TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    shutil.rmtree(config.work, ignore_errors=True)
    places = build_demo(config.work / "demo")
    kinds = read_json(config.results)["kinds"] if config.kinds and config.results.is_file() else {}
    for kind in config.kinds or KINDS:
        work, rows, faults = config.work / kind, defaultdict(Counter), []
        work.mkdir()
        for row, outcome, told in KINDS[kind](work, places, config):
            rows[row][outcome] += 1
            if outcome not in (SOUND, REFUSED):
                faults.append(f"{row}: {outcome}: {told}".replace(str(config.work), "WORK"))
        for row, counts in rows.items():
            print(f"{row:44} " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
        kinds[kind] = {"rows": {row: dict(n) for row, n in rows.items()}, "faults": faults}
        write_json({"machine": machine(), "quick": config.quick, "kinds": kinds}, config.results)
    shutil.rmtree(config.work)
    faults = [fault for kind in kinds.values() for fault in kind["faults"]]
    print(*faults, f"{len(faults)} faults", sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
