"""How far a reader walks: the functions of this project that a call passes."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


class Walk:
    """`with Walk(root) as walk: …`; then `walk.lines` and `walk.changes`."""

    def __init__(self, root: Path):
        self.spans: dict[tuple[str, str, int], range] = {}
        for path in [*root.glob("*.py"), *(root / "data").glob("*.py")]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    span = range(node.lineno, node.end_lineno + 1)
                    for line in {node.lineno, *(d.lineno for d in node.decorator_list)}:
                        self.spans[str(path), node.name, line] = span
        self.passed: list[tuple[str, str, int]] = []
        self.generators: list[FrameType] = []
        self.keys: dict[int, tuple[str, str, int] | None] = {}

    def __enter__(self) -> Walk:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if id(code) not in self.keys:  # looked up once; torch and matplotlib call a million others
            key = (code.co_filename, code.co_name, code.co_firstlineno)
            self.keys[id(code)] = key if key in self.spans else None
        if (key := self.keys[id(code)]) is None:
            return
        if code.co_flags & inspect.CO_GENERATOR:  # resumed for every item, passed once
            if any(frame is known for known in self.generators):
                return
            self.generators.append(frame)
        self.passed.append(key)

    @property
    def lines(self) -> int:
        """Lines of all functions passed, those inside others counted once."""
        return len({(key[0], line) for key in set(self.passed) for line in self.spans[key]})

    @property
    def changes(self) -> int:
        """How often the next function called lies in another module."""
        modules = [key[0] for key in self.passed]
        return sum(a != b for a, b in itertools.pairwise(modules))

    def describe(self) -> str:
        """The functions passed, for the message of a test that fails."""
        names = dict.fromkeys(f"{Path(path).stem}.{name}" for path, name, _ in self.passed)
        return f"{self.lines} lines, {self.changes} changes of module: {', '.join(names)}"


def measure_walk(root: Path, call: Callable[[], Any]) -> Walk:
    """The walk of one call."""
    with Walk(root) as walk:
        call()
    return walk
