"""A short soak of real processes ends where it started; a leak of each kind is seen."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.soak import Sample, Soak, SoakReport, SoakSettings, main

pytestmark = pytest.mark.xdist_group("chaos")

MB = 1 << 20


def test_twenty_seconds_of_everything_leave_nothing_behind() -> None:
    report = asyncio.run(Soak(SoakSettings(seconds=20.0, warm_up=8.0, clients=16)).run())
    print(report.table())
    assert report.problems == []
    kinds = {name.split()[0] for name in report.calls}
    assert kinds == {
        *("whole", "hang_up", "refused", "several", "stop_string", "deadline", "complete", "chat", "text", "inspect")
    }
    assert report.books["end"]["blocks_free"] == 2 * 1_200


def healthy() -> SoakReport:
    report = SoakReport(calls=Counter(whole=3))
    sample = Sample(0.0, 100 * MB, 20, 10, 9)
    report.start, report.end = {"router-1": sample}, {"router-1": replace(sample, memory=103 * MB)}
    report.samples = {"router-1": [replace(sample, at=float(at), memory=(100 + at % 3) * MB) for at in range(100)]}
    report.books = {
        when: {"running": 0, "waiting": 0, "blocks_used": 0, "blocks_free": 64} for when in ("start", "end")
    }
    return report


def test_what_is_where_it_was_passes() -> None:
    report = healthy()
    report.judge()
    assert report.passed
    assert "100.0 ->  103.0" in report.table()


@pytest.mark.parametrize("what", ["files", "threads", "tasks"])
def test_a_leak_is_seen(what: str) -> None:
    report = healthy()
    report.end["router-1"] = replace(report.end["router-1"], **{what: 30})  # type: ignore[arg-type]
    report.judge()
    assert not report.passed
    assert f"router-1: 30 {what} at the end" in report.problems[0]


def test_memory_that_grows_in_the_second_half_is_seen_and_in_the_first_is_not() -> None:
    report = healthy()
    rising = [replace(s, memory=round((100 + s.at / 4) * MB)) for s in report.samples["router-1"]]
    report.samples["router-1"] = rising
    report.judge()
    assert "memory grew by 12." in report.problems[0]
    report = healthy()
    report.samples["router-1"] = [*rising[:50], *(replace(s, memory=112 * MB) for s in rising[50:])]
    report.judge()
    assert report.passed


def test_blocks_that_do_not_come_home_are_seen_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def run(self: Soak) -> SoakReport:
        report = healthy()
        report.books["end"]["blocks_used"] = 3
        report.judge()
        return report

    monkeypatch.setattr(Soak, "run", run)
    out = tmp_path / "soak.json"
    assert main(["--seconds", "5", "--out", str(out)]) == 1
    assert "'blocks_used': 3" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["command"] == f"python -m deploy.soak --seconds 5 --out {out}"
    assert written["passed"] is False
    assert written["settings"]["seconds"] == 5.0
    assert {"machine", "versions", "processes", "calls", "books"} <= set(written)
