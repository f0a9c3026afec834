"""Every command of the README is run, in its order, in an empty folder; links lead somewhere."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from documents import PAGES, commands, find_links, follow

# What makes a command small. The command itself is the README's.
SMALL = {
    "data/make_phantoms.py": "--cases 4 --size 48 --slices 32 40",
    "prepare.py": "--workers 1",
    "preprocess.py": "--input-size 32 32 --spacing 8 8",
    "train.py": "--input-size 32 32 --spacing 8 8 --base-channels 4 --max-epochs 3 "
    "--val-interval 3 --learning-rate 5e-3",
    "apply_model.py": "",
    "visualize_3d.py": "--screenshot view.png --size 160 120",
    "data.check": "",
    "data.evaluate": "",
    "data.seg": "",
}
PROMISED = """
    data/prepared/dataset.json data/prepared/preprocess.png checkpoints/liver/best.pt
    checkpoints/liver/curves.png results/results.csv results/scan/scan_label.nii.gz scan_3d.png
    scan.gif scan.html scan.stl
"""


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files exist, and headings are there."""
    for target in find_links(page):
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)", path.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page}: {target}"


def test_every_page_can_be_reached_from_the_readme():
    reached, pending = set(), ["README.md"]
    while pending:
        page = pending.pop()
        reached.add(page)
        for target in find_links(page):
            path = ((ROOT / page).parent / target.partition("#")[0]).resolve()
            name = path.relative_to(ROOT).as_posix()
            if name in PAGES and name not in reached:
                pending.append(name)
    assert reached == set(PAGES)


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch):
    """The whole path of a user: phantoms, prepare, look, train, apply, see, resume."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints" / "starter.pt", tmp_path / "checkpoints")
    for line in commands():
        words = shlex.split(line)
        if words[0] == "make":
            continue
        if "scan.nii.gz" in words and not (tmp_path / "scan.nii.gz").exists():
            shutil.copy(min(tmp_path.glob("data/raw/imagesTr/*.nii.gz")), tmp_path / "scan.nii.gz")
        shown = [word for word in words if word.startswith("results/ph")]
        script = words[2] if words[1] == "-m" else words[1]
        assert script in SMALL, f"unknown script: {line}"
        if shown:  # the case that this split put into the test set
            line = line.replace(
                shown[0], str(min(path.parent for path in tmp_path.glob("results/*/*")))
            )
        follow(line, choose_small(SMALL[script], words))
    for promised in PROMISED.split():
        assert (tmp_path / promised).exists(), promised


def choose_small(small: str, words: list[str]) -> str:
    """The small values, but where the command needs none of them."""
    if "--resume" in words:  # keeps the settings of its run
        return ""
    if {"--turntable", "--html", "--mesh"} & set(words):  # they open no window
        return "--size 160 120"
    if "laptop" in words:  # patches; one epoch is enough to see it run
        return "--max-epochs 1 --patches-per-case 1 --input-size 32 32 32 --spacing 12 12 12"
    return small
