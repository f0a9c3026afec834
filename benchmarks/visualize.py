"""Time and memory to the first picture of a 512×512×300 case with a liver, per mode.

    python benchmarks/visualize.py

Each mode is a fresh process: `python visualize_3d.py <case> --mode <mode> --screenshot x.png`, from
the command to the written picture, off screen, imports included. Median of `repeats`.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from machine import RESULTS, ROOT, machine
from scipy.ndimage import gaussian_filter, zoom

from data.files import write_json
from data.volumes import Volume, read_file

MODES = ("surface", "rays", "organs", "slices", "compare")
MEASURED = (  # runs the command and reports the peak memory of that process alone
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
    "stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


@dataclass
class Config:
    repeats: int = 3  # runs per mode
    shape: tuple[int, int, int] = (512, 512, 300)  # voxels, 0.75 × 0.75 × 1 mm
    destination: Path = RESULTS / "visualize.json"  # file to write


def make_case(folder: Path, shape: tuple[int, int, int]) -> Path:
    """A body with a lumpy liver of about 1.6 l and two tumours, as apply_model.py leaves it."""
    rng = np.random.default_rng(0)
    size = np.array([0.75, 0.75, 1.0])
    x, y, z = (np.arange(n, dtype=np.float32) * mm for n, mm in zip(shape, size, strict=True))
    x, y, z = x[:, None, None], y[None, :, None], z[None, None, :]
    waves = gaussian_filter(rng.normal(size=(16, 16, 12)), 1)
    waves = zoom(waves, np.array(shape) / (16, 16, 12), order=1)
    lumpy = 1 + 1.2 * waves.astype(np.float32)
    middle = np.array(shape) * size / 2
    body = ((x - middle[0]) / 170) ** 2 + ((y - middle[1]) / 120) ** 2 < 1
    liver = ((x - middle[0] - 60) / 85) ** 2 + ((y - middle[1]) / 75) ** 2
    label = ((liver + ((z - middle[2]) / 65) ** 2 < lumpy) & body).astype(np.uint8)
    for shift in (30, 85):
        ball = (x - middle[0] - shift) ** 2 + (y - middle[1]) ** 2 + (z - middle[2]) ** 2 < 18**2
        label[ball & (label > 0)] = 2
    hu = np.where(body, 20, -1000) + 85 * (label == 1) + 35 * (label == 2)
    hu = (hu + rng.normal(0, 12, shape).astype(np.float32)).astype(np.int16)
    affine = np.diag([*size, 1])
    folder.mkdir()
    moved = np.roll(label, 2, axis=0)
    masked = np.where(moved > 0, hu, -1024).astype(np.int16)
    arrays = {"image": hu, "truth": label, "case_label": moved, "case_masked": masked}
    for name, array in arrays.items():
        Volume(array, affine).write(folder / f"{name}.nii.gz")
    sources = {"image": str(folder / "image.nii.gz"), "truth": str(folder / "truth.nii.gz")}
    write_json({"case": "case", **sources}, folder / "case.json")
    return folder


def first_picture(case: Path, mode: str) -> tuple[float, float]:
    """Seconds and peak MiB of one run."""
    command = [sys.executable, ROOT / "visualize_3d.py", case, "--mode", mode]
    command += ["--screenshot", case / f"{mode}.png"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - start, int(done.stdout) / 1024


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(Path(folder) / "case", config.shape)
        label = read_file(case / "case_label.nii.gz").read()
        modes = {}
        for mode in MODES:
            runs = [first_picture(case, mode) for _ in range(config.repeats)]
            seconds = statistics.median(run[0] for run in runs)
            mebibytes = max(run[1] for run in runs)
            modes[mode] = {"seconds": round(seconds, 2), "peak_mib": round(mebibytes)}
            print(f"{mode}: {seconds:.1f} s, {mebibytes:.0f} MiB")
    result = {
        "command": "python benchmarks/visualize.py",
        "data": f"synthetic case {config.shape}, {np.count_nonzero(label)} organ voxels",
        "n": config.repeats, "modes": modes, "machine": machine(),
    }  # fmt: skip
    write_json(result, config.destination)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
