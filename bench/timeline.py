"""From the spans of a cluster's processes to the life of its steps: which piece of work followed which, and for how long.

Spans come from service/trace.py, one file a process. Scheduler and worker name the step in theirs. A router does not know of steps:
the batches of tokens that it receives are those that the scheduler sent, in order, and what it sends to a client is the next message
of that stream, which is known by its request's seed.
"""

from __future__ import annotations

import bisect
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work. Times in nanoseconds on the host's monotonic clock."""

    process: str
    what: str
    key: int  # step id, or seed of the request
    begin: int
    end: int
    thread: str


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a step's way, with work or waiting in it."""

    where: str
    what: str
    begin: int
    end: int

    @property
    def us(self) -> float:
        """Its length in microseconds."""
        return (self.end - self.begin) / 1e3


@dataclass(frozen=True, slots=True)
class Step:
    """One step from its plan to the client, in order of time. Where streams differ, the stages are those of the median one."""

    step_id: int
    stages: tuple[Stage, ...]
    idle_us: float
    """Of the device, between the step before and this one."""

    @property
    def total_us(self) -> float:
        """From the beginning of its plan until its tokens are at the client."""
        return (self.stages[-1].end - self.stages[0].begin) / 1e3


def read_spans(directory: Path) -> list[Span]:
    """All spans of the trace files in a directory."""
    spans = []
    for path in sorted(directory.glob("*.json")):
        with path.open(encoding="utf-8") as file:
            process = json.loads(next(file))["name"]
            spans += [Span(process, *json.loads(line)) for line in file]
    return spans


def find_steps(spans: Iterable[Span], arrivals: Mapping[int, Sequence[int]]) -> list[Step]:
    """Steps of one scheduler, worker and router in which at least half of the streams of `arrivals` ran, in order.

    `arrivals`: when each message with tokens reached the client, nanoseconds, by the seed of its request.
    """
    by_step: dict[int, dict[str, Span]] = defaultdict(dict)
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.what in _OF_A_STEP:
            by_step[span.key][span.what] = span
        else:
            by_name[span.what].append(span)
    for group in by_name.values():
        group.sort(key=lambda span: span.begin)
    batches = _Batches(by_name)
    deliveries = [
        _Deliveries(
            [s for s in by_name["detokenize"] if s.key == seed], [s for s in by_name["send"] if s.key == seed], at
        )
        for seed, at in arrivals.items()
    ]
    steps = []
    for step_id, of_step in sorted(by_step.items()):
        before = by_step.get(step_id - 1, {}).get("device")
        if len(of_step) < len(_OF_A_STEP) or before is None:
            continue
        batch = batches.after(of_step["apply"])
        delivered = [] if batch is None else [d.after(batch[2]) for d in deliveries]
        known = sorted((d for d in delivered if d is not None), key=lambda delivery: delivery[2])
        if batch is None or 2 * len(known) < len(deliveries):
            continue
        stages = _stages(of_step, batch, known[len(known) // 2])
        steps.append(Step(step_id, stages, (of_step["device"].begin - before.end) / 1e3))
    return steps


_OF_A_STEP = ("plan", "encode", "send plan", "receive plan", "launch", "device", "report", "send result", "apply")
_Batch = tuple[Span, Span, Span]
_Delivery = tuple[Span, Span, int]


class _Batches:
    """Token batches from a scheduler to its router."""

    def __init__(self, by_name: Mapping[str, list[Span]]) -> None:
        self._encoded, self._sent, received = (
            by_name.get(what, []) for what in ("encode tokens", "send tokens", "receive tokens")
        )
        # In order, one for one: each is received after it began to be sent.
        self._received: list[Span | None] = []
        at = 0
        for sent in self._sent:
            while at < len(received) and received[at].begin < sent.begin:
                at += 1
            self._received.append(received[at] if at < len(received) else None)
            at += 1
        self._ends = [span.end for span in self._encoded]

    def after(self, apply: Span) -> _Batch | None:
        """The batch that carries the tokens which this booked."""
        at = bisect.bisect_left(self._ends, apply.end)
        received = self._received[at] if at < len(self._received) else None
        return None if received is None else (self._encoded[at], self._sent[at], received)


class _Deliveries:
    """Messages with tokens of one stream: made, sent, arrived."""

    def __init__(self, made: list[Span], sent: list[Span], arrivals: Sequence[int]) -> None:
        count = min(len(made), len(sent), len(arrivals))
        # Of a ring that has forgotten the oldest, the last ones belong together.
        self._made, self._sent, self._arrivals = made[-count:], sent[-count:], arrivals[-count:]
        self._begins = [span.begin for span in self._made]

    def after(self, received: Span) -> _Delivery | None:
        """The first that was made since this batch came; None where the stream began with it, or had ended before."""
        at = bisect.bisect_left(self._begins, received.begin)
        return (self._made[at], self._sent[at], self._arrivals[at]) if 0 < at < len(self._made) else None


def _stages(of_step: Mapping[str, Span], batch: _Batch, delivery: _Delivery) -> tuple[Stage, ...]:
    """One after the other, without holes: what stands between two pieces of work is waiting."""
    encoded, sent, received = batch
    made, message, arrival = delivery
    launch, device = of_step["launch"], of_step["device"]
    # The device may begin while its step is still being launched; then it waits for nothing.
    computes = max(device.begin, launch.begin)
    marks = [
        ("scheduler", "plan", of_step["plan"].begin),
        ("scheduler", "encode", of_step["encode"].begin),
        ("wire", "plan to worker", of_step["encode"].end),
        ("worker", "decode", of_step["receive plan"].begin),
        ("worker", "to the launch thread", of_step["receive plan"].end),
        ("worker", "launch", launch.begin),
        ("device", "waits its turn", min(launch.end, computes)),
        ("device", "computes", computes),
        ("worker", "to the event loop", device.end),
        ("worker", "encode result", of_step["report"].begin),
        ("wire", "result to scheduler", of_step["report"].end),
        ("scheduler", "apply", of_step["apply"].begin),
        ("scheduler", "to the writer", of_step["apply"].end),
        ("scheduler", "encode tokens", encoded.begin),
        ("wire", "tokens to router", sent.begin),
        ("router", "receive", received.begin),
        ("router", "until it may flush", received.end),
        ("router", "detokenize", made.begin),
        ("wire", "message to client", message.begin),
    ]
    ends = [begin for _, _, begin in marks[1:]] + [arrival]
    return tuple(
        Stage(where, what, begin, max(begin, end)) for (where, what, begin), end in zip(marks, ends, strict=True)
    )


def read_kernels(path: Path, first_kernel: str = "prepare_tokens") -> list[tuple[str, int, int]]:
    """Name, begin and end in nanoseconds from the step's begin, of the kernels of a middle step in the profiler's Chrome trace."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    device = sorted(
        (e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: float(e["ts"])
    )
    starts = [number for number, event in enumerate(device) if event["name"] == first_kernel]
    if len(starts) < 2:
        return []
    middle = len(starts) // 2 - 1
    step = device[starts[middle] : starts[middle + 1]]
    origin = float(step[0]["ts"])
    return [
        (
            str(e["name"]),
            round(1e3 * (float(e["ts"]) - origin)),
            round(1e3 * (float(e["ts"]) - origin + float(e["dur"]))),
        )
        for e in step
    ]
