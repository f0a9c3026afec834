"""Remake the README's pictures from what `make demo` left: `make pictures`.

Everything is drawn from phantoms; no picture of a patient is in this repository.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.pictures import PREDICTION_COLOUR, TRUTH_COLOUR, draw_plane, save_figure  # noqa: E402
from utilities import read_volume, spacing_mm, to_ras, voxels  # noqa: E402

DEMO, PICTURES = ROOT / "data" / "demo", ROOT / "benchmarks" / "pictures"


def overview(case: str, render: Path) -> Figure:
    """Scan, label maps and 3D view side by side."""
    scan, truth = (
        to_ras(read_volume(DEMO / "raw" / folder / f"{case}.nii.gz"))
        for folder in ("imagesTr", "labelsTr")
    )
    predicted = voxels(to_ras(read_volume(DEMO / "results" / case / f"{case}_label.nii.gz"))) > 0
    true, spacing = voxels(truth) > 0, spacing_mm(scan.affine)
    middle = int(true.sum(axis=(0, 1)).argmax())
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, centre, right = figure.subplots(1, 3, width_ratios=(1, 1, 4 / 3))
    draw_plane(left, voxels(scan), "axial", middle, spacing)
    outlines = {TRUTH_COLOUR: true, PREDICTION_COLOUR: predicted}
    draw_plane(centre, voxels(scan), "axial", middle, spacing, outlines)
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
