"""Remake the README's pictures from what `make demo` left: `make pictures`.

Everything is drawn from phantoms; no picture of a patient is in this repository.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from machine import ROOT
from matplotlib.figure import Figure
from matplotlib.image import imread

from data.cases import read_label_map, read_scan
from data.labels import IMAGE, LABEL, PRED, USUAL_LABELS
from data.pictures import find_busiest_slice, save_figure, show_patient

DEMO, PICTURES = ROOT / "data" / "demo", ROOT / "docs" / "pictures"
ONE_CLASS = {"background": (0,), "liver": (1, 2)}


def overview(case: str, render: Path) -> Figure:
    """Scan, label maps and 3D view side by side."""
    scan = read_scan(DEMO / "raw" / "imagesTr" / f"{case}.nii.gz")
    truth, predicted = (
        read_label_map(path, scan, USUAL_LABELS, classes=ONE_CLASS)
        for path in (
            DEMO / "raw" / "labelsTr" / f"{case}.nii.gz",
            DEMO / "results" / case / f"{case}_label.nii.gz",
        )
    )
    middle = find_busiest_slice(truth.ras.data)
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, centre, right = figure.subplots(1, 3, width_ratios=(1, 1, 4 / 3))
    show_patient({IMAGE: scan}, middle, axes=left)
    show_patient({IMAGE: scan, LABEL: truth, PRED: predicted}, middle, axes=centre)
    right.imshow(imread(render))
    right.axis("off")
    left.set_title("in: a CT scan")
    centre.set_title("out: its label map (truth blue, prediction orange)")
    right.set_title("and the organ in 3D")
    return figure


def main() -> None:
    case = min(path.name for path in (DEMO / "results").iterdir() if path.is_dir())
    render = DEMO / "overview_3d.png"
    command = [sys.executable, ROOT / "visualize_3d.py", DEMO / "results" / case]
    subprocess.run([*command, "--mode", "organs", "--screenshot", render], check=True)
    save_figure(overview(case, render), PICTURES / "overview.png")
    for source, name in (
        (DEMO / "run" / "curves.png", "curves.png"),
        (DEMO / "run" / "preview.png", "preview.png"),
        (DEMO / "prepared" / "preprocess.png", "preprocess.png"),
        (DEMO / "prepared" / "check" / f"{case}.png", "check.png"),
        (DEMO / "results" / case / f"{case}_preview.png", "result.png"),
    ):
        shutil.copyfile(source, PICTURES / name)


if __name__ == "__main__":
    main()
