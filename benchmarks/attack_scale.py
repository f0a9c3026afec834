"""Large data sets: the time of a case must not grow with their number."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from attempts import SOUND, Attempt, Config

from data.check import find_duplicates
from data.datasets import find_pairs
from data.volumes import Volume

COUNTS = (500, 5000)  # in the long form; in the quick one a fifth of the first and of the last
GROWTH = 2.0  # of the time of a case, from the first count to the last, that is told as a fault


def make_cases(folder: Path, count: int) -> None:
    """Tiny cases in Decathlon layout; all of them links to one scan and one label map."""
    scan = Volume(np.full((8, 8, 4), 40, np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
    for name, volume in (("imagesTr", scan), ("labelsTr", scan.like(np.ones((8, 8, 4), np.uint8)))):
        volume.write(folder / name / "case_0000.nii.gz")
        for index in range(1, count):
            os.link(folder / name / "case_0000.nii.gz", folder / name / f"case_{index:04d}.nii.gz")


def make_marks(count: int) -> list[dict[str, list[int]]]:
    """What the check keeps of scans that are all different, as smooth as bodies are."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(-200, 250, (count, 4, 1, 4, 1, 4, 1))
    pictures = np.broadcast_to(blocks, (count, 4, 4, 4, 4, 4, 4)).reshape(count, -1)
    slices = rng.integers(0, 2**32, (count, 100))
    return [
        {"slices": some.tolist(), "picture": picture.tolist()}
        for some, picture in zip(slices, pictures, strict=True)
    ]


def attack_scale(work: Path, config: Config) -> Iterator[Attempt]:
    """Milliseconds of CPU for a case: pairing files, and looking for copies among scans."""
    spent: dict[str, list[float]] = {"find_pairs": [], "find_duplicates": []}
    for count in (count // 5 if config.quick else count for count in COUNTS):
        make_cases(work / str(count), count)
        marks, start = make_marks(count), time.process_time()
        found = len(find_pairs(work / str(count)).cases)
        middle = time.process_time()
        pairs = find_duplicates(marks)
        for name, seconds in (
            ("find_pairs", middle - start),
            ("find_duplicates", time.process_time() - middle),
        ):
            spent[name].append(1000 * seconds / count)
            wrong = found != count or pairs
            told = f"{spent[name][-1]:.2f} ms for each case"
            yield Attempt(f"{count} cases: {name}", "wrong end" if wrong else SOUND, told)
    for name, (first, *_, last) in spent.items():
        told = f"{name}: {first:.2f} ms a case became {last:.2f}"
        yield Attempt("growth", "slow" if last > GROWTH * first + 0.2 else SOUND, told)
