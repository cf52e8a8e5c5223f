"""What a chaos run has seen: faults, streams, tokens compared, and how long each fault was felt, by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

_AFTERMATH_SECONDS = 2.0  # a gap that begins later is not the fault's
_LEFT = re.compile(r"^(\S+ \S+) .* worker (\S+) left;", re.MULTILINE)
_AGAIN = re.compile(r"had lost their worker are planned again, the first after ([\d.]+) ms")


@dataclass(slots=True)
class ChaosReport:
    """What was done, survived and measured. Durations in milliseconds."""

    faults: Counter[str] = field(default_factory=Counter)
    mid_output: list[int] = field(default_factory=list)  # streams in the middle of their output, at each fault
    streams: int = 0
    tokens: int = 0
    near_ties: int = (
        0  # streams that parted from the undisturbed run where two tokens were as good, and were checked from there
    )
    migrations: int = 0  # as the streams' own Finished.timing says
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    pauses: dict[str, list[float]] = field(default_factory=dict)  # longest gap of each stream that a fault interrupted
    detection: dict[str, list[float]] = field(
        default_factory=dict
    )  # from the fault until a scheduler lets the worker go
    first_plan: list[float] = field(default_factory=list)  # from there until the first of its requests is planned again

    @property
    def survived(self) -> bool:
        """No stream failed or differs."""
        return not self.wrong and not self.errors

    def read_schedulers(
        self, logs: Sequence[str], worker_faults: Sequence[tuple[str, str, float]], within: float
    ) -> None:
        """Find in the schedulers' logs when workers were given up: at most `within` seconds after the fault, or it was another one.

        `worker_faults`: kind, name of the worker, Unix time.
        """
        left = [(name, _seconds(stamp)) for log in logs for stamp, name in _LEFT.findall(log)]
        for kind, worker, at in worker_faults:
            after = [when - at for name, when in left if name == worker and at - 0.001 <= when < at + within]
            if after:
                self.detection.setdefault(kind, []).append(1e3 * max(0.0, min(after)))
        for log in logs:
            first = True  # of those that follow a loss: a plan has room for so many prompts, and the rest are in the next ones
            for line in log.splitlines():
                if _LEFT.match(line):
                    first = True
                elif first and (again := _AGAIN.search(line)):
                    self.first_plan.append(float(again[1]))
                    first = False

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "faults": dict(self.faults),
            "streams_mid_output_at_a_fault": _summary(self.mid_output) | {"min": min(self.mid_output, default=0)},
            "streams": self.streams,
            "tokens_compared": self.tokens,
            "parted_at_near_ties": self.near_ties,
            "migrations": self.migrations,
            "wrong": self.wrong,
            "errors": self.errors,
            "pause_ms": {name: _summary(gaps) for name, gaps in sorted(self.pauses.items())},
            "detection_ms": {name: _summary(found) for name, found in sorted(self.detection.items())},
            "first_plan_after_detection_ms": _summary(self.first_plan),
        }


@dataclass(slots=True, eq=False)
class Watched:
    """A stream of the run: its tokens, and the longest gap since the last fault that came in its middle."""

    tokens: list[int] = field(default_factory=list)
    fault: str = ""
    pause: float = 0.0
    _fault_at: float = 0.0
    _last: float = 0.0

    def hit(self, fault: str, now: float) -> None:
        """A fault has come in its middle."""
        self.fault, self._fault_at, self.pause = fault, now, 0.0

    def note(self, now: float) -> None:
        """A message has come."""
        if self._last and self._last < self._fault_at + _AFTERMATH_SECONDS:
            self.pause = max(self.pause, now - self._last)
        self._last = now


def difference(got: Sequence[int], expected: Sequence[int]) -> int | None:
    """Where two outputs part, or None where they are the same."""
    if list(got) == list(expected):
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
    )


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)

    def quantile(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0

    return {"p50": quantile(0.5), "p99": quantile(0.99), "max": quantile(1.0), "n": len(ordered)}


def _seconds(stamp: str) -> float:
    """Unix time of a log line's beginning."""
    return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp()  # logs are in local time
