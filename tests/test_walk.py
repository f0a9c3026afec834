"""How far a reader walks from a scan to its label map, and through the five steps."""

import contextlib
import io

from conftest import ROOT
from walk import Walk

import apply_model
import prepare
import train
import visualize_3d


def test_segmenting_a_scan_is_a_short_walk(checkpoint, raw_phantoms):
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    scan = min((raw_phantoms / "imagesTr").iterdir())
    with Walk(ROOT) as walk:
        apply_model.segment(model, scan)
    assert walk.lines <= 450, walk.functions
    assert len(walk.rooms) <= 9, walk.rooms
    assert len(walk.functions) <= 45, walk.functions


def test_the_five_steps_are_a_bounded_walk(raw, checkpoint, tmp_path):
    data, run, results = (tmp_path / name for name in ("prepared", "run", "results"))
    small = {"input_size": (16, 16), "spacing": (16.0, 16.0)}
    with Walk(ROOT) as walk, contextlib.redirect_stdout(io.StringIO()):
        prepare.main(prepare.Config(source=raw, destination=data, workers=1))
        train.main(train.Config(data=data, show=True, **small, device="cpu"))
        train.main(train.Config(
            data=data, run_folder=run, **small, base_channels=4, max_epochs=1,
            pretrained=checkpoint, device="cpu", precision="fp32",
        ))  # fmt: skip
        apply_model.main(apply_model.Config(
            split="test", data=data, checkpoint=run / "best.pt", destination=results, device="cpu",
        ))  # fmt: skip
        case = next(path for path in results.iterdir() if path.is_dir())
        visualize_3d.main(visualize_3d.Config(paths=(case,), screenshot=tmp_path / "view.png"))
    assert walk.lines <= 4000
