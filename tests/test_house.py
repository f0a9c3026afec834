"""The house rules that a reader relies on: where things are, and that importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ("prepare", "preprocess", "utilities", "train", "apply_model", "visualize_3d")
ALLOWED = {
    "utilities": set(),
    "prepare": {"utilities"},
    "preprocess": {"utilities"},
    "train": {"utilities", "preprocess"},
    "apply_model": {"utilities", "preprocess"},
    "visualize_3d": {"utilities"},
}


def imported_scripts(path: Path) -> set[str]:
    """Sibling scripts that a module imports, except where it runs as a script or only for types."""
    tree = ast.parse(path.read_text())
    guarded = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in GUARDS
        for child in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


GUARDS = ("__name__ == '__main__'", "TYPE_CHECKING")


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_run_one_way(script):
    imported = imported_scripts(ROOT / f"{script}.py")
    assert imported & set(SCRIPTS) <= ALLOWED[script]
    assert "vedo" not in imported or script == "visualize_3d"


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_does_no_work(script, tmp_path):
    """No print, no file, no device picked; torch's CUDA is not touched."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script}\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_only_the_six_modules():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
