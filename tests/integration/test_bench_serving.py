"""The measurement of the standard workloads runs: a real cluster on the mock backend, tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import profile, serving_workloads
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


def test_a_step_from_plan_to_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    rows = ["--rows", "1", "3", "--tokens", "40", "--processes", "1", "--worker", "mock-step-ms=2"]
    profile.main(["mock", *rows, "--out", str(out), "--trace", str(trace)])
    one, three = json.loads(out.read_text())["profiles"]
    assert (one["rows"], three["rows"]) == (1, 3)
    for found in (one, three):
        assert found["steps"] > 10
        assert found["stages_us"]["device: computes"]["p50"] == pytest.approx(2_000, abs=1)
        assert all(stage["p50"] >= 0 for stage in found["stages_us"].values())
        assert 0 < found["inside_router_us"]["p50"] < found["scheduler_to_client_us"]["p50"]
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"plan", "encode", "launch", "device", "apply", "receive tokens", "detokenize", "send"} <= names
    assert "3 rows: step" in capsys.readouterr().out
