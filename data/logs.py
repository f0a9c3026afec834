"""The log of a run: what the terminal was told, as text that stays."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours, cursors, bells


class Copied:
    """A stream whose whole lines are written into a log too, as they stand in the end: of a
    progress bar, which goes back to the line's beginning for each picture, nothing."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self.stream, self.log, self.rest = stream, log, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.stream.write(text)
        *lines, rest = (self.rest + text).split("\n")
        self.rest = rest[rest.rfind("\r") + 1 :]
        with contextlib.suppress(OSError, ValueError):  # a full disk: the checkpoints will tell
            for line in lines:
                shown = line.rstrip("\r").rpartition("\r")[2]
                self.log.write(CONTROL.sub("", shown).rstrip() + "\n")
        return len(text)


@contextlib.contextmanager
def keep_log(path: Path) -> Iterator[None]:
    """Append to a text file what the terminal is told: the command, each line, the last error.

    A log that is alone in its folder is removed: nothing was begun.
    """
    before = sys.stdout, sys.stderr
    try:
        with path.open("a", encoding="utf-8", buffering=1) as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} python {shlex.join(sys.argv)}\n")
            sys.stdout, sys.stderr = (Copied(stream, log) for stream in before)  # type: ignore[assignment]  # all that print and bars need
            try:
                yield
            except BaseException as error:
                log.write(f"{type(error).__name__}: {error}\n")
                raise
            finally:
                sys.stdout, sys.stderr = before
    finally:
        with contextlib.suppress(OSError):
            if [one for one in path.parent.iterdir() if one.name[0] != "."] == [path]:
                path.unlink()
