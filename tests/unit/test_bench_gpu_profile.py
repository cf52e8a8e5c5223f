"""A step's time is charged to its kernels, of steps in which all rows decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="the GPU's Python packages are not here")

from bench.gpu_profile import STEPS, charges


def trace(path: Path, prompts: int, ends: int) -> Path:
    """Steps of 100 µs: `prompts` with a prompt in them, STEPS + 8 of decode, and `ends` shorter ones whose rows have ended."""
    events, at = [], 0.0
    for step in range(prompts + STEPS + 8 + ends):
        decode = 60.0 if step < prompts + STEPS + 8 else 20.0
        kernels = [("prepare_tokens", 10.0), ("decode_attention", decode), ("nvjet", 30.0)]
        if step < prompts:
            kernels.insert(1, ("prefill_wgmma", 500.0))
        for name, length in kernels:
            # Each starts early and waits for the one before.
            events.append({"cat": "kernel", "name": name, "ts": at - 5, "dur": length + 5})
            at += length
    path.write_text(json.dumps({"traceEvents": events}))
    return path


@pytest.mark.parametrize("prompts", [1, 16])
def test_steps_with_prompts_or_with_rows_that_have_ended_do_not_count(prompts: int, tmp_path: Path) -> None:
    found = charges(trace(tmp_path / "trace.json", prompts, ends=40), rows=256)
    assert (found["steps"], found["step_us"]) == (STEPS, 100.0)
    assert found["kernels"] == [
        {"name": "decode_attention", "launches": 1.0, "us": 60.0},
        {"name": "nvjet", "launches": 1.0, "us": 30.0},
        {"name": "prepare_tokens", "launches": 1.0, "us": 10.0},
    ]
