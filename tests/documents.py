"""README.md and docs/*.md, and the commands in them."""

from __future__ import annotations

import re
import shlex

from conftest import ROOT, run_here

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip


def commands(page: str = "README.md") -> list[str]:
    """The commands of a page in order: the lines of its bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def follow(line: str, small: str = "") -> None:
    """Run a command of a page in this process and folder, with those options of `small` that it
    does not give itself; it must end well."""
    program, *words = shlex.split(line)
    assert program == "python", line
    added = [f"--{group}".split() for group in small.split("--")[1:]]
    more = [word for group in added if group[0] not in words for word in group]
    ended = run_here(*words, *more)
    assert ended == 0, f"{line} {' '.join(more)}: {ended}"


def first_block(page: str, language: str) -> str:
    """The first code block of a page in some language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)
    assert found, f"{page} has no block in {language}"
    return found[1]


def find_links(page: str) -> list[str]:
    """Targets of the links and pictures of a page, without those on the web."""
    targets = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    return [target for target in targets if "://" not in target]
