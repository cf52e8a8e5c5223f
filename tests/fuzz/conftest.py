"""Prints the figures of each target after the tests, also where pytest-xdist ran them elsewhere."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    figures = [
        text
        for report in terminalreporter.stats.get("passed", [])
        for name, text in report.user_properties
        if name == "fuzz"
    ]
    if figures:
        terminalreporter.write_sep("-", "fuzzing")
        for text in figures:
            terminalreporter.write_line(text)
