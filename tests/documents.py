"""README.md and the pages in docs/: blocks and links; running a block."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

from conftest import ROOT, run_here

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
USER_PAGES = [page for page in PAGES if page.count("/") == 1]
EVIDENCE = [page for page in PAGES if page.startswith("docs/evidence/")]
FENCE = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Programs that a block calls: each hands its words to the test and ends with the test's answer.
STAND_IN = """#!/bin/bash
printf '%s\\0' "$PWD" "${0##*/}" "$@" > "$ASK"
read -r code < "$ANSWER"; exit $code
"""
# sbatch runs the script for the first and the last index of its array.
SBATCH = """#!/bin/bash
array=$(sed -n 's/.*--array=\\([0-9]*\\)-\\([0-9]*\\).*/\\1 \\2/p' "$1")
for index in $array; do SLURM_ARRAY_TASK_ID=$index bash -e "$1" || exit; done
"""
TORCHRUN = {"--standalone": 1, "--nproc-per-node": 2}  # its options, and the words they take


def list_blocks(page: str) -> list[tuple[str, str, str]]:
    """The fenced blocks of a page in order: reason why it is not run, language, content."""
    return FENCE.findall(PAGES[page])


def list_commands(page: str) -> list[str]:
    """The bash blocks of a page that are run, in order."""
    return [text for reason, kind, text in list_blocks(page) if kind == "bash" and not reason]


def run_block(block: str, folder: Path) -> list[list[str]]:
    """Run a bash block as it stands, its Python programs in this process; return their words.
    Starting Python and loading torch for each command would take longer than the work."""
    programs, ask, answer = folder / ".programs", folder / ".ask", folder / ".answer"
    programs.mkdir()
    for name, text in {"python": STAND_IN, "torchrun": STAND_IN, "sbatch": SBATCH}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for pipe in (ask, answer):
        os.mkfifo(pipe)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    end = f"trap 'printf \"%s\\0\" end $? > {ask}' EXIT\n"
    shell = subprocess.Popen(
        ["bash", "-ec", end + block], cwd=folder,
        env={**os.environ, "PATH": path, "ASK": str(ask), "ANSWER": str(answer)},
    )  # fmt: skip
    done = []
    try:
        while (words := ask.read_text().split("\0")[:-1])[0] != "end":
            code = run_program(words[1:], Path(words[0]))
            done.append(words[1:])
            answer.write_text("0\n" if code == 0 else "1\n")
            assert code == 0, f"{' '.join(words[1:])}: {code}"
        shell.wait()
    finally:
        shell.kill()
    assert words[1] == "0", block
    for path in (*programs.iterdir(), ask, answer):
        path.unlink()
    programs.rmdir()
    return done


def run_program(words: list[str], folder: Path) -> int | str:
    """Run `python` or `torchrun` with these words; of several processes there is one here."""
    program, *rest = words
    while program == "torchrun" and rest[0] in TORCHRUN:
        rest = rest[TORCHRUN[rest[0]] :]
    with contextlib.chdir(folder):
        return run_here(*rest)


def find_links(page: str) -> list[str]:
    """Targets of the links and pictures of a page, without those on the web."""
    targets = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    return [target for target in targets if "://" not in target]
