"""Runs pip for people: one line that says what it fetches and how far it is, the whole output in a log file.

Imports the standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

# pip says so while it downloads, given --progress-bar raw.
_BYTES = re.compile(r"Progress (\d+) of (\d+)")
_FETCHED = re.compile(r"(?:Downloading|Using cached|Processing|Collecting) (\S+)")
_BUILDING = "Installing collected packages"
_TAIL_LINES = 30


class _Line:
    """The line on a terminal, overwritten; elsewhere one line for each thing that takes long."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._fetching = ""
        self._packages = 0

    def take(self, text: str) -> None:
        """One line of pip's output."""
        if (progress := _BYTES.fullmatch(text)) is not None:
            done, total = int(progress[1]), int(progress[2])
            if total and self._terminal:
                self._show(f"{self._fetching} {done / 1e6:.1f} of {total / 1e6:.1f} MB ({100 * done // total} %)")
        elif (fetched := _FETCHED.match(text)) is not None:
            self._packages += text.startswith("Collecting")
            self._fetching = fetched[1].rpartition("/")[2]
            if self._terminal:
                self._show(f"{self._packages} packages: {self._fetching}")
            elif text.startswith("Downloading") and text.endswith(("MB)", "GB)")):
                self._out.write(f"  {text}\n")
        elif text.startswith(_BUILDING):
            self._show(f"unpacking {text.count(',') + 1} packages", keep=True)
        self._out.flush()

    def _show(self, text: str, keep: bool = False) -> None:
        if self._terminal:
            self._out.write(f"\r\033[K  {text[:76]}")
        elif keep:
            self._out.write(f"  {text}\n")

    def end(self) -> None:
        """Clear the line."""
        if self._terminal:
            self._out.write("\r\033[K")
            self._out.flush()


def install(pip: Sequence[str], arguments: Sequence[str], log: Path, out: TextIO = sys.stdout) -> None:
    """`pip install ARGUMENTS`, its output in `log`. Raises CalledProcessError after the end of the output was shown."""
    command = [*pip, "install", "--disable-pip-version-check", "--progress-bar", "raw", *arguments]
    line = _Line(out)
    with (
        log.open("w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for text in process.stdout:
                if not _BYTES.match(text):
                    kept.write(text)
                line.take(text.strip())
        except BaseException:  # also Ctrl-C, which pip gets as well
            process.terminate()
            raise
        finally:
            line.end()
    if process.returncode != 0:
        tail = log.read_text().splitlines()[-_TAIL_LINES:]
        out.write("\n".join(["pip failed; its last words (all of them in " + str(log) + "):", *tail, ""]))
        raise subprocess.CalledProcessError(process.returncode, command)
