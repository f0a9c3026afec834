"""The house rules that a reader relies on: where things are, how long, how far one walks through
them, and that arrows run down."""

import ast
import contextlib
import io
from functools import cache
from pathlib import Path

import pytest
from children import import_alone, run_child, tell, write_blank
from conftest import ROOT
from matplotlib.figure import Figure
from mutations import read_mutations
from walk import Walk

import apply_model
import prepare
import train
import visualize_3d

SCRIPTS = ("prepare", "preprocess", "utilities", "train", "apply_model", "visualize_3d")
FLOORS = (  # imports run down only; within the store-room in the order of its own floors
    ("data.files",),
    ("data.settings", "data.labels", "data.volumes"),
    ("data.pictures", "data.dicom", "data.make_phantoms"),
    ("data.trust", "data.seg"),
    ("data.scans",),
    ("data.datasets",),
    ("data.splits",),
    ("data.check", "data.evaluate"),
    ("utilities",),
    ("prepare", "preprocess", "visualize_3d"),
    ("train", "apply_model"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SIX = [ROOT / f"{name}.py" for name in SCRIPTS]
STORE = sorted((ROOT / "data").glob("*.py"))
SOURCES = [*SIX, *STORE]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_module(path: Path) -> str:
    return f"data.{path.stem}" if path.parent.name == "data" else path.stem


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]


def test_only_the_six_modules_and_the_store_room():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("[a-z]*/*.py")}
    assert folders <= {"data", "tests", "benchmarks"}


@pytest.mark.parametrize("path", SOURCES, ids=name_module)
def test_imports_run_down_only(path):
    """No circle and no exception: each module imports modules of lower floors alone."""
    if path.stem == "__init__":
        assert imported_modules(path) == {"importlib.util", "sys"}  # it says what is missing
        return
    mine, imported = FLOOR[name_module(path)], imported_modules(path) & set(FLOOR)
    assert all(FLOOR[other] < mine for other in imported), imported
    assert "vedo" not in imported_modules(path) or path.stem == "visualize_3d"


def test_importing_does_no_work(tmp_path):
    """Each module alone: no print, no file, no device picked; torch's CUDA is not touched."""
    modules, log = [name_module(path) for path in SOURCES if path.stem[0] != "_"], tmp_path / "log"
    (tmp_path / "empty").mkdir()
    assert run_child(tell, log, import_alone, tmp_path / "empty", modules) == 0
    assert log.read_text() == ""


def count_lines(*paths: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def count_own_names(path: Path) -> int:
    """Names that a file imports from this project's own files."""
    own = {name_module(other) for other in SOURCES} | {"data"}
    imports = (node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom))
    return sum(len(node.names) for node in imports if node.module in own)


def test_the_house_stays_small():
    """The sums of what a reader has to know; a limit per file would only part files."""
    rooms = [path for path in SOURCES if path.stem != "__init__"]
    assert count_lines(*rooms) <= 9600
    assert len(rooms) <= 26
    assert max(map(count_lines, rooms)) <= 750
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert sum(isinstance(n, defined) for path in rooms for n in ast.walk(parse(path))) <= 620
    names = {path.name: count_own_names(path) for path in rooms}
    assert max(names.values()) <= 40, names
    assert count_lines(*(ROOT / "tests").rglob("*.py")) <= 9000
    assert count_lines(*(ROOT / "benchmarks").rglob("*.py")) <= 3500


def test_each_mutation_is_of_a_text_and_a_test_that_are_there():
    assert len(read_mutations()) >= 60


def test_functions_stay_short():
    nodes = [(path.name, node) for path in SOURCES for node in functions_of(path)]
    lengths = {f"{file}:{n.name}": n.end_lineno - n.lineno + 1 for file, n in nodes}
    long = {name: length for name, length in lengths.items() if length > 40}
    assert len(long) <= 0.02 * len(lengths), long
    assert max(lengths.values()) <= 60, long


def test_segmenting_a_scan_is_a_short_walk(checkpoint, raw_phantoms):
    model = apply_model.load_model(checkpoint, "cpu", "fp32")
    scan = min((raw_phantoms / "imagesTr").iterdir())
    with Walk(ROOT) as walk:
        apply_model.segment(model, scan)
    assert walk.lines <= 450, walk.functions
    assert len(walk.rooms) <= 9, walk.rooms
    assert len(walk.functions) <= 45, walk.functions


def test_the_five_steps_are_a_bounded_walk(raw, checkpoint, tmp_path, monkeypatch):
    """Figures are laid out, but not painted: that is matplotlib's, and takes longer than all."""
    monkeypatch.setattr(Figure, "savefig", write_blank)
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
        view = {"screenshot": tmp_path / "view.png", "size": (160, 120)}
        visualize_3d.main(visualize_3d.Config(paths=(case,), **view))
    assert walk.lines <= 4000
