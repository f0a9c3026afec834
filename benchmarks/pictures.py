"""Remake the pictures of README and docs: `make pictures`, after `make demo`.

Everything is drawn from phantoms; no picture of a patient is in this repository. Most are of a
finer phantom than the demo's (1.6 mm, with tumours), its prediction that of the starter weights,
which never saw a phantom. The curves are of a training from nothing on the demo's phantoms.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from machine import ROOT
from matplotlib.figure import Figure
from PIL import Image

from data.labels import IMAGE, LABEL, PRED, USUAL_LABELS
from data.pictures import PLANES, add_legend, find_busiest_slice, save_figure, show_patient
from data.scans import read_label_map, read_scan

DEMO, PICTURES = ROOT / "data" / "demo", ROOT / "docs" / "pictures"
FINE, FOUND = DEMO / "fine", DEMO / "fine_results"
PHANTOM = "--cases 1 --first 4 --size 256 --slices 112 112 --tumours 3 3 --seed 5"
SCRATCH = "--base-channels 8 --batch-size 4 --learning-rate 2e-3 --max-epochs 12"


def make_fine_phantom() -> tuple[Path, Path, Path]:
    """Scan, label map and the starter's prediction of one fine phantom."""
    if not (FINE / "dataset.json").exists():
        run("data/make_phantoms.py", "--destination", FINE, *PHANTOM.split())
    scan, label = (next((FINE / kind).iterdir()) for kind in ("imagesTr", "labelsTr"))
    starter = ROOT / "checkpoints" / "starter.pt"
    run("apply_model.py", scan, "--truth", label, "--checkpoint", starter, "--destination", FOUND)
    name = scan.name.removesuffix(".nii.gz")
    return scan, label, FOUND / name / f"{name}_label.nii.gz"


def run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def render(scan: Path, label: Path) -> np.ndarray:
    """Return the 3D view of the organs as a picture."""
    run("visualize_3d.py", scan, "--label", label, "--mode", "organs", "--size", 1300, 1150,
        "--screenshot", DEMO / "organs.png")  # fmt: skip
    return np.asarray(Image.open(DEMO / "organs.png"))


def overview(scan_path: Path, label_path: Path, found_path: Path) -> Figure:
    """The organ in 3D, and beside it two planes of the scan with truth and prediction."""
    scan = read_scan(scan_path)
    truth = read_label_map(label_path, scan, USUAL_LABELS)
    liver = {"background": (0,), "liver": (1, 2)}
    known, found = (
        read_label_map(path, scan, USUAL_LABELS, classes=liver) for path in (label_path, found_path)
    )
    figure = Figure(figsize=(11.5, 6.2))
    parts = figure.add_gridspec(
        2, 2, width_ratios=(1.8, 1), height_ratios=(1.25, 1), left=0, right=0.995, bottom=0.06,
        top=0.95, wspace=0.01, hspace=0.12,
    )  # fmt: skip
    space = figure.add_subplot(parts[:, 0])
    space.imshow(render(scan_path, label_path))
    space.axis("off")
    for row, plane in enumerate(("axial", "coronal")):
        axes = figure.add_subplot(parts[row, 1])
        at = find_busiest_slice(truth.ras.data == 2, PLANES[plane][0])
        drawn = {IMAGE: scan, LABEL: known, PRED: found}
        show_patient(drawn, at, axes=axes, plane=plane, title=f"{plane} slice of the CT")
    add_legend(figure, ["liver"], truth=True)
    return figure


def train_from_nothing() -> None:
    """12 epochs of a small 3D U-Net on 16-slice sub-volumes of the demo's phantoms."""
    data, small = DEMO / "subvolumes", ("--spacing", 4, 4, "--input-size", 64, 64)
    if not (DEMO / "scratch" / "last.pt").exists():
        run("prepare.py", DEMO / "raw", "--destination", data)
        run("preprocess.py", "--data", data, *small)
        run("train.py", "--data", data, "--run-folder", DEMO / "scratch", *small, *SCRATCH.split())


def shrink(path: Path, colours: int = 256) -> None:
    """A PNG of few colours: a third of the bytes, which nobody sees."""
    small = Image.open(path).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> None:
    save_figure(overview(*make_fine_phantom()), PICTURES / "overview.png")
    run("-m", "data.check", FINE, "--destination", DEMO / "fine_check")
    train_from_nothing()
    made = ("scratch/curves.png", "scratch/preview.png", "subvolumes/preprocess.png")
    sources = {Path(name).name: DEMO / name for name in made}
    sources["check.png"] = next((DEMO / "fine_check/check").glob("*.png"))
    sources["result.png"] = next(FOUND.glob("*/*_preview.png"))
    for name, source in sources.items():
        shutil.copyfile(source, PICTURES / name)
        shrink(PICTURES / name)


if __name__ == "__main__":
    main()
