"""What 131, 1,000 and 10,000 CTs cost on 1, 8 and 64 GPUs, projected; the projection checked below.

    python benchmarks/scale.py

Measured here, in CPU seconds of one thread: what a case costs beside its voxels (pairing files,
looking for copies, reading and signing a record, the tables), of 500 and of 5,000 tiny cases: is
5,000 what 500 foretell? Taken from the other benchmarks' results: what a scan costs (prepare_lits,
apply). Assumed, and said so: a GPU's speed. Writes benchmarks/results/scale.json and the table of
docs/scale.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from attack_scale import make_cases, make_marks
from machine import RESULTS, ROOT, machine, name_command

from data.check import find_duplicates
from data.datasets import find_pairs
from data.evaluate import report_all
from data.files import read_json, read_record, write_json

COUNTS = (500, 5000)
CTS, GPUS = (131, 1000, 10_000), (1, 8, 64)
SLICES = 448  # of a scan: the mean of the 131 of LiTS
SUBVOLUMES = 10  # with liver, of a scan: 16 slices each
VOXEL_BYTES = 3  # of the cache: image in 16 bits, label in 8
ASSUMED_TFLOPS = 400.0  # of a GPU in 16 bits, in training and applying; not measured
STEP_TFLOP, WINDOW_TFLOP, WINDOWS = 5.86, 1.954, 56  # of the 19 M network at 256 × 256 × 16


@dataclass
class Config:
    work: Path = Path("/tmp/scale_benchmark")  # folder for the tiny cases; removed afterwards
    results: Path = RESULTS / "scale.json"  # JSON to write
    page: Path = ROOT / "docs" / "scale.md"  # its table is remade


def spend(work: Callable[[], Any]) -> float:
    """CPU seconds of a call, whose output is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.process_time()
        work()
        return time.process_time() - start


def write_results(folder: Path, count: int) -> None:
    """Records of finished cases, as apply_model.py leaves them; one signed file each."""
    for index in range(count):
        name = f"case_{index:04d}"
        place = folder / name / f"{name}.json"
        place.parent.mkdir(parents=True)
        (place.parent / f"{name}_label.nii.gz").write_bytes(b"voxels")
        row = {f"figure_{number}": number / 7 for number in range(40)}
        write_json(
            {"case": name, "mark": "mark", "expected_dice": 1, "trust": "good", **row}, place
        )


def measure(work: Path, count: int) -> dict[str, float]:
    """Milliseconds of CPU for a case, among `count`."""
    make_cases(work / "raw", count)
    marks, records = make_marks(count), work / "results"
    spent = {
        "pairing files": spend(lambda: find_pairs(work / "raw")),
        "looking for copies": spend(lambda: find_duplicates(marks)),
        "writing a record": spend(lambda: write_results(records, count)),
        "asking whether it is finished": spend(
            lambda: [read_record(path, "mark") for path in records.glob("*/*.json")]
        ),
        "tables of all results": spend(lambda: report_all(records, ["liver"], "weights")),
    }
    shutil.rmtree(work)
    return {name: round(1000 * seconds / count, 3) for name, seconds in spent.items()}


def project(found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each number of CTs and GPUs; a process per GPU, one CPU core each."""
    lits, apply = (read_json(RESULTS / f"{name}.json") for name in ("prepare_lits", "apply"))
    prepare_s = lits["check_s_per_case"] + lits["cut_s_per_case"]
    rest_s = apply["figures"]["all_but_network_and_evaluation_s"]["now"]
    own = found[str(COUNTS[-1])]
    each_ms = own["pairing files"] + own["looking for copies"]
    rows = []
    for cts in CTS:
        subvolumes = cts * SUBVOLUMES
        cache_gb = subvolumes * 256 * 256 * 16 * VOXEL_BYTES / 1e9
        for gpus in GPUS:
            network_s = WINDOWS * WINDOW_TFLOP / ASSUMED_TFLOPS
            rows.append({
                "CTs": cts,
                "GPUs": gpus,
                "prepare_minutes_16_cores": round(cts * (prepare_s + each_ms / 1000) / 16 / 60, 1),
                "prepared_gb": round(subvolumes * 512 * 512 * 16 * VOXEL_BYTES / 2.2 / 1e9, 1),
                "cache_gb_per_process": round(cache_gb / gpus, 2),
                "epoch_minutes": round(subvolumes * STEP_TFLOP / ASSUMED_TFLOPS / gpus / 60, 2),
                "apply_minutes": round(cts * (rest_s + network_s) / gpus / 60, 1),
                "tables_s": round(cts * own["tables of all results"] / 1000, 1),
            })  # fmt: skip
    return rows


def write_page(rows: list[dict[str, Any]], page: Path) -> None:
    """The projection into the page's table, between its two marks."""
    heads = [key.replace("_", " ") for key in rows[0]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(f"{value:,}" for value in row.values()) + " |" for row in rows]
    text = page.read_text(encoding="utf-8")
    table = "<!-- projection -->\n" + "\n".join(lines) + "\n<!-- end -->"
    text = re.sub(r"<!-- projection -->.*<!-- end -->", table, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def main(config: Config) -> None:
    found = {str(count): measure(config.work / str(count), count) for count in COUNTS}
    first, last = (found[str(count)] for count in COUNTS)
    result = {
        "command": name_command(),
        "machine": machine(),
        "ms_of_cpu_for_a_case": found,
        "5000_over_500": {name: round(last[name] / max(first[name], 1e-3), 2) for name in first},
        "assumed": {"tflop_per_s_of_a_gpu": ASSUMED_TFLOPS, "slices": SLICES,
                    "subvolumes_with_liver": SUBVOLUMES, "compression": 2.2},
        "projection": project(found),
    }  # fmt: skip
    write_json(result, config.results)
    write_page(result["projection"], config.page)
    print(json.dumps(result["ms_of_cpu_for_a_case"], indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
