"""Python packages: what a list of requirements asks for, against what is installed."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.doctor.findings import Finding, note, ok, problem

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*([^;#]*)(?:;([^#]*))?")
_SPECIFIER = re.compile(r"(==|>=|<=|<|>|!=|~=)\s*([^,\s]+)")
_SHOWN = 6

# These never cancel an abandoned server stream (grpc/grpc#43462).
_LEAKING_GRPC = ((1, 83), (1, 85, 1))


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package and the versions that will do. `conditional`: only under a marker, so its absence means nothing."""

    name: str
    specifiers: tuple[tuple[str, str], ...]
    conditional: bool = False

    @property
    def shown(self) -> str:
        """As pip takes it."""
        return self.name + ",".join(operator + version for operator, version in self.specifiers)


Installed = Callable[[str], str | None]
"""The installed version of a package, None where it is not there."""


def installed_version(name: str) -> str | None:
    """Of a package of this environment."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_requirement(line: str) -> Requirement | None:
    """One line of a requirements file or of a package's metadata; None for comments, options and what asks for nothing."""
    match = _REQUIREMENT.match(line.strip())
    if match is None:
        return None
    name, specifiers, marker = match.groups()
    return Requirement(name, tuple(_SPECIFIER.findall(specifiers)), conditional=marker is not None)


def read_requirements(path: Path, follow: str = "-r") -> list[Requirement]:
    """The requirements of a file and of those that it names by `follow`, once each. Raises OSError."""
    found: dict[str, Requirement] = {}
    waiting, seen = [path], {path}
    while waiting:
        file = waiting.pop(0)
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if len(words) == 2 and words[0] == follow:
                other = file.parent / words[1]
                waiting += [] if other in seen else [other]
                seen.add(other)
            elif (requirement := parse_requirement(line)) is not None:
                found.setdefault(requirement.name.lower(), requirement)
    return list(found.values())


def satisfies(version: str, requirement: Requirement) -> bool:
    """Whether a version will do. Local parts (`+cpu`) do not count; an operator that is not understood forbids nothing."""
    public = version.partition("+")[0]
    have = _release(public)
    for operator, wanted in requirement.specifiers:
        if operator == "==" and public != wanted:
            return False
        bound = _release(wanted)
        if (operator == ">=" and have < bound) or (operator == "<" and have >= bound):
            return False
        if (operator == "<=" and have > bound) or (operator == ">" and have <= bound):
            return False
    return True


def check_packages(
    check: str, wanted: Iterable[Requirement], installed: Installed, remedy: str, *, exact: bool = True
) -> list[Finding]:
    """What is missing is a problem; another version is one, too, unless not `exact`: then it is only noted."""
    missing, other, fine = [], [], 0
    for requirement in wanted:
        version = installed(requirement.name)
        if version is None:
            missing += [] if requirement.conditional else [requirement.shown]
        elif not satisfies(version, requirement):
            other.append(f"{requirement.name} {version} instead of {requirement.shown}")
        else:
            fine += 1
    findings = []
    if missing:
        findings.append(problem(check, f"Missing: {_some(missing)}.", remedy))
    if other:
        make = problem if exact else note
        findings.append(make(check, f"Other versions than those tested: {_some(other)}.", remedy))
    return findings or [ok(check, f"all {fine} are here, in the versions asked for")]


def check_client(requires: Sequence[str] | None, installed: Installed) -> list[Finding]:
    """The client's own package. `requires`: its metadata, None where it is not installed (a checkout on the path)."""
    own = installed("octavo")
    findings = [
        ok("octavo", f"version {own}")
        if own
        else note("octavo", "Not installed as a package; it runs from a checkout.")
    ]
    if requires:
        asked = [found for line in requires if (found := parse_requirement(line)) is not None]
        remedy = "Install them again: pip install --upgrade octavo"
        findings += check_packages(
            "client packages", [item for item in asked if not item.conditional], installed, remedy
        )
    grpc = installed("grpcio")
    if grpc is not None and _LEAKING_GRPC[0] <= _release(grpc) <= _LEAKING_GRPC[1]:
        leaks = f"grpcio {grpc} never cancels an abandoned server stream."
        findings.append(problem("grpcio", leaks, "pip install grpcio==1.82.3"))
    return findings


def requires_of(name: str) -> Sequence[str] | None:
    """What an installed package says it needs, or None."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without the zeros at its end, so that 1.83 and 1.83.0 are equal."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match.group().split(".")] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _some(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
