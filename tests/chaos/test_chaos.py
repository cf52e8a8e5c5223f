"""Two minutes of kills, stops and partitions under 64 streams; each stream equals its undisturbed run."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.chaos import FAULTS, REDIS_FAULTS, Chaos, ChaosReport, ChaosSettings
from deploy.environment import ROOT

pytestmark = pytest.mark.xdist_group("chaos")


def test_no_stream_notices_more_than_a_pause() -> None:
    report = asyncio.run(Chaos(ChaosSettings(seconds=120.0)).run())
    print(json.dumps(report.as_json(), indent=2))
    assert report.wrong == []
    assert report.errors == []
    assert set(report.faults) == {f"{kind} {role}" for kind, role in (*FAULTS, *REDIS_FAULTS)}
    assert set(report.detection) == {"kill worker", "stop worker", "partition worker"} and report.first_plan
    assert min(report.mid_output) >= 32
    assert report.streams > 64 and report.tokens > 64 * 200


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = Chaos._undisturbed

    async def forged(self: Chaos, front: list[str]) -> None:
        await undisturbed(self, front)
        for tokens in self._expected:
            tokens[100] += 1

    monkeypatch.setattr(Chaos, "_undisturbed", forged)
    settings = ChaosSettings(seconds=1.0, streams=4, workers=1, schedulers=1, routers=1)
    report: ChaosReport = asyncio.run(Chaos(settings).run())
    assert report.wrong and "first difference at 100" in report.wrong[0]
    assert not report.survived


def test_sigterm_leaves_no_process(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "deploy.chaos", "--seconds", "60", "--streams", "2", "--workers", "1"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 30
        while not list(tmp_path.glob("octavo-*/ready/router-1.json")):
            assert time.monotonic() < until
            time.sleep(0.02)
        pids = [json.loads(path.read_text())["pid"] for path in tmp_path.glob("octavo-*/ready/*.json")]
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said.strip().splitlines()[-1]) == (130, "stopped")
    assert len(pids) >= 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
