"""Thousands of seeds of faults; each accepted request ends once, with the tokens of the undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from deploy.environment import ROOT
from tests.simulation.mutants import FORGETS_ROWS, MUTANTS
from tests.simulation.plan import KINDS
from tests.simulation.run import STALLED, run

SEEDS = 2000
_PART = 100
_ENOUGH = 200  # seeds within which a sown defect must show


@pytest.mark.parametrize("first", range(0, SEEDS, _PART))
def test_seeds(first: int) -> None:
    failed = []
    ends: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for seed in range(first, first + _PART):
        report = run(seed)
        ends += report.ends
        faults += report.faults
        if report.violations:
            failed.append(f"seed {seed}: {report.violations[0]}\n    python -m tests.simulation {seed}")
    assert not failed, "\n".join(failed)
    # The runs are about something: most requests get to their end, and every kind of fault happens.
    assert ends["finished"] > 0.7 * sum(ends.values()), ends
    assert {name.split()[0] for name in faults} == set(KINDS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_defect_is_found(name: str) -> None:
    with MUTANTS[name]():
        assert any(_goes_wrong(seed) for seed in range(_ENOUGH)), f"{_ENOUGH} seeds pass with {name}"


def test_a_forgotten_row_costs_its_client_a_pause_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router submits again what runs and gets nothing: no token is missing or wrong."""
    monkeypatch.setattr("tests.simulation.nodes.REQUEST_STALL", 1.0)  # a few times in the life of a run
    stalled = 0
    with MUTANTS[FORGETS_ROWS]():
        for seed in range(_PART):
            report = run(seed)
            assert all(STALLED in violation for violation in report.violations), (seed, report.violations)
            stalled += len(report.violations)
    assert stalled > _PART / 4


def _goes_wrong(seed: int) -> bool:
    try:
        return bool(run(seed).violations)
    except Exception:  # noqa: BLE001 - a sown defect may well crash a session
        return True


def test_a_seed_replays_exactly() -> None:
    said = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "tests.simulation", "12"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout[-2000:]
        said.append(done.stdout)
    assert said[0] == said[1]
    assert "is finished" in said[0]
