"""A name in a header reaches no file that is written, and no script opens a connection."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from attack_bytes import write_series
from attack_scripts import VIEWS, Step, fork_step, wait_for
from attempts import (
    SECRET,
    SOUND,
    TINY,
    WAITING,
    Attempt,
    Config,
    Demo,
    Outcome,
    build_demo,
    environment,
)
from machine import ROOT

import apply_model
import prepare
import visualize_3d

TEXTS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")  # fields of a NIfTI header


def attack_identifiers(work: Path, config: Config) -> Iterator[Attempt]:
    """A name planted in every text of a header is in no file that any script writes from it."""
    demo, keys = build_demo(config), [*TEXTS, "extension"]
    for kind in ("imagesTr", "labelsTr"):
        (work / "raw" / kind).mkdir(parents=True)
    for number, key in enumerate(keys):
        for one in (demo.scan, demo.truth):
            source = one.with_name(f"phantom_{number % 6:03d}.nii.gz")
            image = plant(nib.load(source), key)
            nib.save(image, work / "raw" / one.parent.name / f"{key}.nii.gz")
    write_series(work / "series", np.asanyarray(nib.load(demo.scan).dataobj).astype(np.int16))
    scans, truth = work / "raw" / "imagesTr", work / "raw" / "labelsTr"

    def cut(out: Path) -> None:
        prepare.main(prepare.Config(source=work / "raw", destination=out, workers=1))

    def segment(out: Path, scan: Path = scans) -> None:
        given = {"checkpoint": demo.run / "best.pt", "destination": out, "device": "cpu"}
        apply_model.main(apply_model.Config(paths=(scan,), probability=True, force=True, **given))

    def view(out: Path) -> None:
        files = {kind: out / f"a.{end}" for kind, end in VIEWS.items()}
        scan = scans / "descrip.nii.gz"
        config = {"paths": (scan,), "label": truth / scan.name, "size": (200, 150)}
        visualize_3d.main(visualize_3d.Config(**config, **files))

    steps = {"prepare.py": cut, "apply_model.py": segment, "visualize_3d.py": view}
    steps["apply_model.py, DICOM"] = lambda out: segment(out, work / "series")
    for name, call in steps.items():
        out = work / "out" / name
        code, told = wait_for(*fork_step(Step(name, call, 0), out))
        files = [path for path in out.rglob("*") if path.is_file()]
        leaks = [str(path) for path in files if SECRET.encode() in read_plain(path)]
        outcome = "identifier" if leaks or SECRET in told else SOUND
        if code or not files:
            outcome = "wrong end"
        for key in keys if "DICOM" not in name else ["PatientName"]:
            leaked = [leak for leak in leaks if key in leak] or leaks
            detail = f"{len(files)} files, code {code} {leaked[:3]} {told[-200:] * bool(code)}"
            yield Attempt(f"identifiers: {name}", outcome, f"{key}: {detail}")


def plant(image: nib.Nifti1Image, key: str) -> nib.Nifti1Image:
    """A secret in a field of the header, or in an extension of it."""
    if key == "extension":
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET.encode()))
    else:
        image.header[key] = SECRET.encode()
    return image


def read_plain(path: Path) -> bytes:
    """Content of a file and its name, decompressed where it is packed."""
    content = path.read_bytes()
    return path.name.encode() + (gzip.decompress(content) if path.suffix == ".gz" else content)


WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[-1] if event != "socket.getaddrinfo" else arguments[0]
        if not isinstance(address, (str, bytes)) or event == "socket.getaddrinfo":
            print("SOCKET", event, address, file=sys.stderr)
            raise OSError("no connection is allowed here")
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def attack_sockets(work: Path, config: Config) -> Iterator[Attempt]:
    """Every script from phantoms to a picture in 3D, where no connection can be opened."""
    demo = Demo(work)
    steps = [
        f"data/make_phantoms.py --destination {demo.raw} --cases 6 --size 32",
        f"prepare.py {demo.raw} --destination {demo.prepared} --workers 1",
        f"preprocess.py --data {demo.prepared} --input-size 32 32 --spacing 12 12",
        f"train.py --data {demo.prepared} --run-folder {demo.run} --max-epochs 1 {TINY}",
        f"apply_model.py {demo.scan} --device cpu --checkpoint {demo.run / 'best.pt'} "
        f"--destination {demo.results}",
        f"visualize_3d.py {demo.scan} --label {demo.truth} --screenshot {work / 'view.png'} "
        f"--html {work / 'view.html'}",
        f"-m data.evaluate {demo.truth} {demo.truth} --destination {work / 'evaluation'}",
    ]
    for step in steps:
        outcome, detail = run_watched(step)
        yield Attempt(f"sockets: {step.removeprefix('-m ').split()[0]}", outcome, detail)


def run_watched(step: str) -> Outcome:
    """How a script ends that is told of every connection it would open."""
    script, *arguments = step.split()
    command = [sys.executable, "-c", WATCHED, script, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            text=True,
            capture_output=True,
            timeout=2 * WAITING,
        )
    except subprocess.TimeoutExpired:
        return "hang", script
    outcome = "other exception" if done.returncode else SOUND
    if "SOCKET" in done.stderr:
        outcome = "socket opened"
    return outcome, f"{script} {done.stderr[-300:] if outcome != SOUND else ''}"
