"""Two minutes of kills, stops and partitions under 64 streams; each stream equals its undisturbed run."""

from __future__ import annotations

import asyncio
import json

import pytest

from deploy.chaos import KINDS, ROLES, Chaos, ChaosReport, ChaosSettings

pytestmark = pytest.mark.xdist_group("chaos")


def test_no_stream_notices_more_than_a_pause() -> None:
    report = asyncio.run(Chaos(ChaosSettings(seconds=120.0)).run())
    print(json.dumps(report.as_json(), indent=2))
    assert report.wrong == []
    assert report.errors == []
    assert set(report.faults) == {f"{kind} {role}" for kind in KINDS for role in ROLES}
    assert min(report.mid_output) >= 32
    assert report.streams > 64 and report.tokens > 64 * 200


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = Chaos._undisturbed

    async def forged(self: Chaos) -> None:
        await undisturbed(self)
        for tokens in self._expected:
            tokens[100] += 1

    monkeypatch.setattr(Chaos, "_undisturbed", forged)
    settings = ChaosSettings(seconds=1.0, streams=4, workers=1, schedulers=1, routers=1)
    report: ChaosReport = asyncio.run(Chaos(settings).run())
    assert report.wrong and "first difference at 100" in report.wrong[0]
    assert not report.survived
