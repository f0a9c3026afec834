"""Count what a reader walks through: lines, functions and modules of this project in a call."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any


class Walk:
    """`with Walk(root) as walk: …`; then `walk.lines`, `walk.functions` and `walk.rooms`."""

    def __init__(self, root: Path):
        self.spans: dict[tuple[str, str, int], range] = {}
        for path in [*root.glob("*.py"), *(root / "data").glob("*.py")]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    span = range(node.lineno, node.end_lineno + 1)
                    for line in {node.lineno, *(d.lineno for d in node.decorator_list)}:
                        self.spans[str(path), node.name, line] = span
        self.codes: set[Any] = set()  # torch and matplotlib call a million others

    def __enter__(self) -> Walk:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self.codes.add(frame.f_code)

    @property
    def passed(self) -> set[tuple[str, str, int]]:
        keys = {(code.co_filename, code.co_name, code.co_firstlineno) for code in self.codes}
        return keys & self.spans.keys()

    @property
    def lines(self) -> int:
        """Lines of all functions passed, those inside others counted once."""
        return len({(key[0], line) for key in self.passed for line in self.spans[key]})

    @property
    def functions(self) -> list[str]:
        return sorted(f"{Path(path).stem}.{name}" for path, name, _ in self.passed)

    @property
    def rooms(self) -> list[str]:
        return sorted({name.partition(".")[0] for name in self.functions})
