"""What trimming by HU gains, and what it takes from tumours: real CTs, bodies, lesions at the edge.

    python benchmarks/bodies.py --destination data/bodies --cases 30 --seed 3 --spacing 4 4 4
    python benchmarks/trimming.py --bodies data/bodies

FAT_HU was chosen on the bodies and on lesions of 0 to 50 HU painted at the edge of the real CTs'
livers; the CTs as they are chose nothing. Writes benchmarks/results/trimming.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from machine import DATA, RESULTS, ROOT, machine, name_command
from scipy import ndimage

import apply_model
from data.evaluate import dice_metric
from data.files import write_json
from data.scans import lay_on_grid, read_scan, read_volume
from data.volumes import Volume, find_bounding_box

RADIUS_MM, LESION_HU, NOISE_HU = (7, 20), (0, 50), 10


@dataclass
class Config:
    """What is segmented."""

    source: Path = DATA / "ct"  # real CTs with labels: imagesTr, labelsTr
    bodies: Path = Path("data/bodies")  # of benchmarks/bodies.py
    checkpoint: Path = ROOT / "checkpoints" / "starter.pt"
    lesions: int = 5  # painted one by one into each real CT
    seed: int = 7  # of the lesions


def paint_lesion(scan: Volume, liver: np.ndarray, rng: np.random.Generator) -> Any:
    """A scan with a ball in the liver whose centre is nearer to the surface than its radius."""
    box, radius, step = find_bounding_box(liver), rng.uniform(*RADIUS_MM), scan.spacing_mm
    depth = ndimage.distance_transform_edt(liver[box], sampling=step)
    near = np.argwhere(np.abs(depth - rng.uniform(0.3, 0.8) * radius) < max(step) * 0.7)
    centre = near[rng.integers(len(near))] + [part.start for part in box]
    axes = zip(np.ogrid[tuple(map(slice, liver.shape))], centre, step, strict=True)
    lesion = (sum(((at - c) * mm) ** 2 for at, c, mm in axes) < radius**2) & liver
    hu = scan.data.astype(np.int16)
    noise = rng.normal(0, NOISE_HU, int(lesion.sum()))
    hu[lesion] = (rng.uniform(*LESION_HU) + noise).astype(np.int16)
    return replace(scan, data=hu), lesion


def measure(model: apply_model.Model, scan: Volume, liver: np.ndarray, lesion: np.ndarray) -> Any:
    """Dice of the liver and ml of the lesion inside it, each without and with trimming."""
    row = {}
    for name, trim in (("plain", False), ("trimmed", True)):
        found = apply_model.segment(model, scan, apply_model.Options(trim_by_hu=trim))
        mask = found.classes.data > 0
        inside = float(np.count_nonzero(lesion & mask)) * scan.voxel_ml
        row[name] = [float(dice_metric(mask, liver)[0]), inside]
    return row


def main(config: Config) -> None:
    model, rng, rows = (
        apply_model.load_model(config.checkpoint),
        np.random.default_rng(config.seed),
        {},
    )
    for kind, folder in (("real", config.source), ("bodies", config.bodies)):
        for path in sorted((folder / "imagesTr").glob("[!.]*.nii.gz")):
            scan = read_scan(path).ras
            truth = lay_on_grid(read_volume(folder / "labelsTr" / path.name), scan).ras.data
            rows[f"{kind} {path.name}"] = measure(model, scan, truth > 0, truth == 2)
            for number in range(config.lesions if kind == "real" else 0):
                painted, lesion = paint_lesion(scan, truth > 0, rng)
                rows[f"painted {number} {path.name}"] = measure(model, painted, truth > 0, lesion)
    summary = {}
    for kind in ("real", "painted", "bodies"):
        values = np.array(
            [list(row.values()) for name, row in rows.items() if name.startswith(kind)]
        )
        gain, (plain, trimmed) = np.diff(values[..., 0].mean(0))[0], values[..., 1].sum(0)
        summary[kind] = {"n": len(values), "dice_plain": round(values[:, 0, 0].mean(), 4),
                         "dice_gain": round(gain, 4), "lesion_ml": round(plain, 1),
                         "lesion_lost_percent": round(100 * (1 - trimmed / plain), 2)}  # fmt: skip
    result = {"command": name_command(), "chosen_on": "painted and bodies", "summary": summary}
    write_json(result | {"machine": machine(), "rows": rows}, RESULTS / "trimming.json")
    print(summary)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
