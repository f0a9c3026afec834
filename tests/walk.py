"""Count what a reader walks through: lines, functions and modules of this project in a call."""

from __future__ import annotations

import ast
import cProfile
from pathlib import Path
from types import CodeType
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
        self.profile = cProfile.Profile()

    def __enter__(self) -> Walk:
        self.profile.enable()
        return self

    def __exit__(self, *_: Any) -> None:
        self.profile.disable()

    @property
    def passed(self) -> set[tuple[str, str, int]]:
        codes = [entry.code for entry in self.profile.getstats()]
        codes = [code for code in codes if isinstance(code, CodeType)]
        keys = {(code.co_filename, code.co_name, code.co_firstlineno) for code in codes}
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
