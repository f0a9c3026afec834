"""Every fault that can be made in the files that come through a door, and how each one ends.

    python benchmarks/doors.py

Headers of nonsense, cut and flipped files, wrong tags of DICOM series and SEGs: each must end
right, told in a note, or refused with one error that names the file. A fault that ends otherwise
stops its sweep and is shown, and the exit code is 1. The tests try a sample of the same.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from machine import ROOT

sys.path += [str(ROOT / "data"), str(ROOT / "tests")]

import sweeps


def list_sweeps() -> dict[str, Callable[[Path], Counter]]:
    """Name → the sweep, which is given an empty folder."""
    made: dict[str, Callable[[Path], Counter]] = {}
    for base in sweeps.NIFTI_KINDS:
        name, kind, codes, endian = base
        title = f"header of {name}, {kind.__name__}, forms {codes}, {endian}"
        made[title] = lambda folder, base=base: sweeps.sweep_nifti_header(folder, base)
    for name in sweeps.WHOLE_FILES:
        made[f"{name} cut"] = lambda folder, name=name: sweeps.sweep_cuts(folder, name)
    for name in sweeps.PACKED_FILES:
        made[f"{name} with a flipped bit"] = lambda f, name=name: sweeps.sweep_flips(f, name)
    made["tags of a DICOM series"] = sweeps.sweep_series
    made["tags of a DICOM SEG"] = sweeps.sweep_seg
    return made


def main() -> int:
    """Run all sweeps; the number of those in which something ended otherwise."""
    faults, total, start = 0, Counter(), time.perf_counter()
    for name, sweep in list_sweeps().items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                counts = sweep(Path(folder))
            except Exception:
                faults += 1
                traceback.print_exc()
                continue
        total += counts
        told = ", ".join(f"{number} {ending}" for ending, number in sorted(counts.items()))
        print(f"{name}: {told}", flush=True)
    told = ", ".join(f"{number} {ending}" for ending, number in sorted(total.items()))
    print(f"{total.total()} faults in {time.perf_counter() - start:.0f} s: {told}")
    print("every one right, told or refused" if not faults else f"{faults} sweeps failed")
    return faults


if __name__ == "__main__":
    sys.exit(min(main(), 1))
