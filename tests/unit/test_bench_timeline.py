"""Spans of processes become steps without holes, and a picture and a trace of them."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

from bench import profile
from bench.timeline import Span, find_steps, read_kernels, read_spans
from service.trace import Trace

STEPS, PERIOD = 6, 1_000_000
SEEDS = (7, 8)


def _spans() -> list[Span]:
    """Steps of 1 ms, each stage of which takes a known time; two streams, the second served 20 µs after the first."""
    spans = []
    for step in range(1, STEPS + 1):
        at = step * PERIOD
        for process, what, begin, end in (
            ("scheduler", "plan", 0, 40),
            ("scheduler", "encode", 40, 60),
            ("scheduler", "send plan", 70, 90),
            ("worker", "receive plan", 160, 200),
            ("worker", "launch", 210, 260),
            ("worker", "device", 300, 1_290),
            ("worker", "report", 1_300, 1_310),
            ("worker", "send result", 1_320, 1_330),
            ("scheduler", "apply", 1_400, 1_450),
        ):
            spans.append(Span(process, what, step, at + 1_000 * begin, at + 1_000 * end, "MainThread"))
        for process, what, begin, end in (
            ("scheduler", "encode tokens", 1_455, 1_460),
            ("scheduler", "send tokens", 1_460, 1_470),
            ("router", "receive tokens", 1_500, 1_520),
        ):
            spans.append(Span(process, what, 0, at + 1_000 * begin, at + 1_000 * end, "MainThread"))
        for number, seed in enumerate(SEEDS):
            begin = at + 1_000 * (1_530 + 20 * number)
            spans.append(Span("router", "detokenize", seed, begin, begin + 5_000, "MainThread"))
            spans.append(Span("router", "send", seed, begin + 5_000, begin + 15_000, "MainThread"))
    return spans


def _arrivals() -> dict[int, list[int]]:
    return {
        seed: [step * PERIOD + 1_000 * (1_600 + 20 * number) for step in range(1, STEPS + 1)]
        for number, seed in enumerate(SEEDS)
    }


def test_a_step_is_followed_from_its_plan_to_the_client() -> None:
    steps = find_steps(_spans(), _arrivals())
    # The streams begin with the first: which of its messages was theirs is not known.
    assert [step.step_id for step in steps] == [2, 3, 4, 5, 6]
    step = steps[1]
    assert step.total_us == 1_620.0
    assert step.idle_us == 10.0
    assert [stage.us for stage in step.stages] == [
        40, 20, 100, 40, 10, 50, 40, 990, 10, 10, 90, 50, 5, 5, 40, 20, 30, 5, 65,
    ]  # fmt: skip
    assert all(one.end == other.begin for one, other in zip(step.stages, step.stages[1:], strict=False))


def test_a_device_that_begins_while_its_step_is_launched_waits_for_nothing() -> None:
    spans = [replace(s, begin=s.end - 1_060_000) if s.what == "device" else s for s in _spans()]
    stages = {stage.what: stage for stage in find_steps(spans, _arrivals())[0].stages}
    assert (stages["launch"].us, stages["waits its turn"].us, stages["computes"].us) == (20, 0, 1_060)
    assert stages["launch"].end == stages["computes"].begin


def test_a_batch_of_two_steps_and_a_message_of_two_tokens_belong_to_both() -> None:
    late = STEPS - 1
    dropped = {("encode tokens", late), ("send tokens", late), ("receive tokens", late)}
    spans = []
    for span in _spans():
        step = span.begin // PERIOD - (
            1 if span.what not in ("plan", "encode", "send plan", "receive plan", "launch") else 0
        )
        if (span.what, step) in dropped or (span.what in ("detokenize", "send") and step == late):
            continue
        spans.append(span)
    arrivals = {seed: times[: late - 1] + times[late:] for seed, times in _arrivals().items()}
    steps = {step.step_id: step for step in find_steps(spans, arrivals)}
    assert steps[late].stages[-1].end == steps[late + 1].stages[-1].end
    assert steps[late].total_us == 2_620.0


def test_the_picture_and_the_trace_show_every_stage(tmp_path: Path) -> None:
    steps = find_steps(_spans(), _arrivals())
    kernels = [("prepare_tokens", 0, 5_000), ("attention", 4_000, 40_000)]
    found = {"rows": 2, "steps": steps, "spans": _spans(), "arrivals": _arrivals(), "itl_ms": None}
    lines = profile.text(2, steps, kernels).splitlines()
    assert "1,620 µs from plan to client" in lines[0]
    assert len(lines) == 2 + len(steps[0].stages) + len(kernels)
    assert lines[-1].split() == ["device", "attention", "5.0", "+", "35.0"]
    trace = profile.chrome_trace(found, kernels)
    events = json.loads(json.dumps(trace))["traceEvents"]
    named = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named == {"scheduler", "worker", "device", "router", "clients"}
    assert {"plan", "apply", "send", "attention", "tokens"} <= {event["name"] for event in events}
    figures = profile.summary(found)
    assert figures["inside_router_us"]["p50"] == 55.0
    assert figures["scheduler_to_client_us"]["p50"] == 160.0


def test_kernels_of_a_profilers_trace(tmp_path: Path) -> None:
    events = [{"cat": "cpu_op", "name": "x", "ts": 0, "dur": 5}]
    for step in range(4):
        events += [
            {"cat": "kernel", "name": "attention", "ts": 100 * step + 8.5, "dur": 20},
            {"cat": "kernel", "name": "prepare_tokens", "ts": 100 * step, "dur": 10},
        ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert read_kernels(path) == [("prepare_tokens", 0, 10_000), ("attention", 8_500, 28_500)]
    path.write_text(json.dumps({"traceEvents": events[:3]}))
    assert read_kernels(path) == []


def test_a_trace_is_a_ring_that_any_thread_may_fill_and_that_is_written_whole(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "new", "worker-1")
    began = trace.now()
    ended = trace.add("plan", 3, began)
    thread = threading.Thread(target=trace.add, args=("device", 3, began, began + 5), name="collect")
    thread.start()
    thread.join()
    trace.write()
    assert json.loads(trace.path.read_text().splitlines()[0]) == {"name": "worker-1", "pid": os.getpid()}
    assert read_spans(tmp_path / "new") == [
        Span("worker-1", "plan", 3, began, ended, threading.current_thread().name),
        Span("worker-1", "device", 3, began, began + 5, "collect"),
    ]
    assert ended >= began
    for number in range(200_000):
        trace.add("x", number, 1, 2)
    trace.write()
    spans = read_spans(tmp_path / "new")
    assert (len(spans), spans[-1].key) == (1 << 17, 199_999)


def test_a_directory_that_cannot_be_written_is_logged(tmp_path: Path, caplog: object) -> None:
    (tmp_path / "file").write_text("")
    Trace(tmp_path / "file", "x").write()
    assert "can't be written" in caplog.text  # type: ignore[attr-defined]


def test_streams_that_come_and_go_count_while_they_run() -> None:
    late, gone = {"detokenize": 9, "send": 9}, 3
    spans = _spans()
    for step in (5, 6):  # a third stream, of the last steps only
        begin = step * PERIOD + 1_600_000
        spans += [Span("router", what, seed, begin, begin + 5_000, "MainThread") for what, seed in late.items()]
    spans = [s for s in spans if s.key != SEEDS[1] or s.what not in late or s.begin // PERIOD - 1 <= gone]
    arrivals = _arrivals() | {9: [step * PERIOD + 1_700_000 for step in (5, 6)]}
    arrivals[SEEDS[1]] = arrivals[SEEDS[1]][:gone]
    # In 4 and 5 one of three runs of which anything is known.
    assert [step.step_id for step in find_steps(spans, arrivals)] == [2, 3, 6]
