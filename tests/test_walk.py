"""How far a reader walks from a scan to its label map, and through the five steps.

The readers that trust no header make a third of the first walk. The limits are there so that it
grows no further; make it shorter.
"""

import contextlib
import io

from conftest import ROOT
from walk import Walk, measure_walk

import apply_model
import prepare
import train
import visualize_3d


def test_segmenting_a_scan_is_a_short_walk(checkpoint, raw_phantoms):
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    scan = min((raw_phantoms / "imagesTr").iterdir())
    apply_model.segment(model, scan)  # what is made once is made
    walk = measure_walk(ROOT, lambda: apply_model.segment(model, scan))
    assert walk.lines <= 870, walk.describe()
    assert walk.changes <= 62, walk.describe()


def test_the_five_steps_are_a_bounded_walk(raw_phantoms, tmp_path):
    data, run, results = (tmp_path / name for name in ("prepared", "run", "results"))
    small = {"input_size": (32, 32), "spacing": (8.0, 8.0)}
    with Walk(ROOT) as walk, contextlib.redirect_stdout(io.StringIO()):
        prepare.main(prepare.Config(source=raw_phantoms, destination=data, workers=1))
        train.main(train.Config(data=data, show=True, **small, device="cpu"))
        train.main(train.Config(
            data=data, run_folder=run, **small, base_channels=4, max_epochs=1,
            learning_rate=5e-3, device="cpu", precision="fp32",
        ))  # fmt: skip
        apply_model.main(apply_model.Config(
            split="test", data=data, checkpoint=run / "best.pt", destination=results, device="cpu",
        ))  # fmt: skip
        case = next(path for path in results.iterdir() if path.is_dir())
        visualize_3d.main(visualize_3d.Config(paths=(case,), screenshot=tmp_path / "view.png"))
    assert walk.lines <= 5820, walk.describe()
