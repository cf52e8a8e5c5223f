"""Which lines of some modules ran: sys.settrace, limited to their files, and only while it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


class LineCoverage:
    """Lines of `modules` that ran inside `measure()`. For one thread."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._lines: dict[str, set[int]] = {}
        self._seen: dict[str, set[int]] = {}
        for name in modules:
            file = importlib.import_module(name).__file__
            assert file is not None
            # Bodies of functions only: definitions ran with the import.
            module = compile(Path(file).read_text(), file, "exec")
            self._lines[file] = {line for code in _codes(module) if code.co_name != "<module>" for line in _lines(code)}
            self._seen[file] = set()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Notice what runs inside."""
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        seen = self._seen.get(frame.f_code.co_filename)
        if seen is None:
            return None

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            seen.add(frame.f_lineno)
            return on_line

        seen.add(frame.f_lineno)
        return on_line

    def counts(self) -> tuple[int, int]:
        """(lines that ran, lines that there are)."""
        return sum(len(self._lines[f] & self._seen[f]) for f in self._lines), sum(map(len, self._lines.values()))

    def missed(self) -> list[str]:
        """ "file:line" of those that did not run."""
        return [f"{file}:{line}" for file, lines in self._lines.items() for line in sorted(lines - self._seen[file])]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _lines(code: CodeType) -> Iterator[int]:
    # A class body also ran with the import; its code starts by loading __name__.
    if "__qualname__" in code.co_names and "__module__" in code.co_names:
        return
    for _, _, line in code.co_lines():
        if line is not None and line != code.co_firstlineno:
            yield line
