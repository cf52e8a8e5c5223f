"""`make up` when another program takes a port between the look at it and the bind."""

from __future__ import annotations

from typing import Any

import pytest

from deploy import local
from deploy.readiness import ClusterError
from deploy.wanted import Wanted

TAKEN = "scheduler-1 does not stay up; the end of its log:\nError in bind for address: Address already in use"


class FakeSupervisor:
    def __init__(self, directory: Any) -> None:
        self.log: list[str] = LOG

    def is_running(self) -> bool:
        return False

    def launch(self, commands: Any) -> None:
        self.log.append("launch")

    def shutdown(self) -> None:
        self.log.append("shutdown")


LOG: list[str] = []


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[ClusterError | None]:
    """What each start ends in."""
    ends: list[ClusterError | None] = []

    def wait(*arguments: Any) -> None:
        end = ends.pop(0)
        if end is not None:
            raise end

    LOG.clear()
    monkeypatch.setattr(local, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(local, "resolve", lambda *a, **k: None)
    monkeypatch.setattr(local, "plan", lambda *a: [])
    monkeypatch.setattr(local, "describe", lambda *a: None)
    monkeypatch.setattr(local.show, "wait", wait)
    monkeypatch.setattr(local.show, "summary", lambda *a: None)
    for name in ("read", "forget"):
        monkeypatch.setattr(local.state, name, lambda: None)
    monkeypatch.setattr(local.state, "write", lambda cluster: LOG.append("up"))
    return ends


def test_other_ports_are_tried(outcomes: list[ClusterError | None]) -> None:
    outcomes += [ClusterError(TAKEN), ClusterError(TAKEN), None]
    assert local.up(Wanted(model="mock"), 1.0) == 0
    assert LOG == ["launch", "shutdown", "launch", "shutdown", "launch", "up"]


@pytest.mark.parametrize("ends", [[TAKEN] * 3, ["no weights here"]])
def test_other_failures_and_the_last_are_told(outcomes: list[ClusterError | None], ends: list[str]) -> None:
    outcomes += [ClusterError(end) for end in ends]
    with pytest.raises(ClusterError, match=ends[-1][:10]):
        local.up(Wanted(model="mock"), 1.0)
    assert ["launch", "shutdown"] * len(ends) == LOG
