"""What a check found, for people and machines, and how a check asks other programs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol


class State(StrEnum):
    """How things stand: fine, worth knowing, or in the way."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `remedy` says what to do, with the exact command; a problem always has one."""

    check: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Findings about one thing, in the order of the report."""

    title: str
    findings: tuple[Finding, ...]


def ok(check: str, found: str) -> Finding:
    """As it should be."""
    return Finding(check, State.OK, found)


def note(check: str, found: str, remedy: str = "") -> Finding:
    """Nothing is broken, but it explains what may surprise, or was left out."""
    return Finding(check, State.NOTE, found, remedy)


def problem(check: str, found: str, remedy: str) -> Finding:
    """Something will not work until the remedy is applied."""
    return Finding(check, State.PROBLEM, found, remedy)


def count(sections: Iterable[Section], state: State) -> int:
    """How many findings are in this state."""
    return sum(finding.state is state for section in sections for finding in section.findings)


def size_of(n_bytes: float) -> str:
    """Bytes for people."""
    if n_bytes >= 2**29:
        return f"{n_bytes / 2**30:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended. `code` is None where it could not be started or did not end in time; `error` then says so."""

    code: int | None
    out: str = ""
    error: str = ""

    @property
    def last_words(self) -> str:
        """The last line that it wrote, which in most programs is the error."""
        lines = (self.error.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else f"exit code {self.code}"


class Run(Protocol):
    """Runs a program for at most `timeout` seconds, in `directory` if one is given."""

    def __call__(self, argv: Sequence[str], timeout: float, directory: Path | None = None) -> Ran: ...


def run(argv: Sequence[str], timeout: float, directory: Path | None = None) -> Ran:
    """The real one: without a shell, and with nothing on its standard input."""
    try:
        ended = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
            cwd=directory,
        )
    except subprocess.TimeoutExpired:
        return Ran(None, error=f"{argv[0]} did not end within {timeout:.0f} s")
    except OSError as error:
        return Ran(None, error=f"{argv[0]}: {error.strerror or error}")
    return Ran(ended.returncode, ended.stdout, ended.stderr)
