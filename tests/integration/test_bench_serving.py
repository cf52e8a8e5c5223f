"""The measurement of the standard workloads runs: a real cluster on the mock backend, tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import serving_workloads
from bench.workloads import NAMES

pytestmark = pytest.mark.xdist_group("cluster")


def test_every_workload_through_two_routers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "w.json"
    arguments = ["mock", "--shrink", "128", "--repeats", "1", "--processes", "2", "--routers", "2", "--out", str(out)]
    serving_workloads.main(arguments)
    report = json.loads(out.read_text())
    assert list(report["workloads"]) == list(NAMES)
    assert report["command"].startswith("python -m bench.serving_workloads mock --shrink 128")
    assert report["device"] == "none" or report["device"]
    for key in ("commit", "machine", "versions", "at"):
        assert report[key]
    one = report["workloads"]["w6-256"]["best"]
    assert set(one["cpu_share"]) == {"scheduler-1", "worker-1", "router-1", "router-2"}
    assert one["ttft_p50_ms"] > 0 and one["tokens_per_s"] > 0
    assert report["workloads"]["w4-8192"]["best"]["itl_p50_ms"] is None  # one token has no gap
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in NAMES)
