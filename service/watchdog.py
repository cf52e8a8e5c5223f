"""A thread that watches the event loop of its process: a loop that does not turn shows its stacks, is counted, and in the end
ends the process, so that a supervisor starts it anew while its streams go on elsewhere.

The loop beats every 50 ms; how late a beat comes is the loop's lag. The thread judges by its own waits: one that overslept counts
as no longer than it was meant to be. So a process that was stopped (SIGSTOP) and goes on, or that got no processor, is not taken for
stalled. What holds Python's lock stops this thread, too: SIGUSR1 shows the stacks even then (service/lifecycle.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client import Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from service.stacks import all_stacks

log = logging.getLogger("octavo.watchdog")

BEAT_SECONDS = 0.05
_WINDOW_SECONDS = 10.0
_LAST_WORDS_SECONDS = 2.0  # a log that nobody reads must not keep the process
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Stillness:
    """For how long something has made no progress, by the time that its judge was awake."""

    def __init__(self, look_s: float) -> None:
        """`look_s`: seconds between two looks. A look that comes later counts as twice that at most."""
        self._most = 2 * look_s
        self._progress: object = None
        self._looked_at = 0.0
        self._seconds = 0.0

    def look(self, progress: object, now: float) -> float:
        """Seconds without a change of `progress`."""
        passed, self._looked_at = min(now - self._looked_at, self._most), now
        self._seconds = self._seconds + passed if progress == self._progress else 0.0
        self._progress = progress
        return self._seconds


class Lag:
    """How late the loop's beats came, seconds. Written by the loop, read by whoever scrapes."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.histogram = Histogram(
            "octavo_loop_lag_seconds", "How late the event loop turned", buckets=_BUCKETS, registry=None
        )
        self._window_began = time.monotonic()
        self._in_window = self._in_last_window = 0.0

    def note(self, lag: float, now: float) -> None:
        """A beat came so late."""
        self.histogram.observe(lag)
        self.longest = max(self.longest, lag)
        if now - self._window_began >= _WINDOW_SECONDS:
            self._window_began, self._in_last_window, self._in_window = now, self._in_window, 0.0
        self._in_window = max(self._in_window, lag)

    @property
    def recent(self) -> float:
        """The longest of the last ten to twenty seconds."""
        return max(self._in_window, self._in_last_window)


class LoopWatchdog(Collector):
    """Watches one loop from `start` (on that loop) to `stop`; also the collector of its metrics."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stall_s: float,
        exit_s: float,
        leave: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        """`stall_s`: seconds without a turn after which it is a stall; `exit_s`: after which the process ends. 0: never."""
        self.lag = Lag()
        self.stalls = 0
        self._loop = loop
        self._stall_s = stall_s
        self._exit_s = exit_s
        self._leave = leave
        self._beats = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin. To be called on the loop."""
        self._schedule()
        if self._stall_s or self._exit_s:
            self._thread.start()

    def stop(self) -> None:
        """End; the loop may close then."""
        if self._timer is not None:
            self._timer.cancel()
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        overdue = max(0.0, time.monotonic() - self._due)
        yield CounterMetricFamily("octavo_loop_stalls", "Stalls of the event loop", value=self.stalls)
        yield from self.lag.histogram.collect()
        yield GaugeMetricFamily(
            "octavo_loop_lag_longest_seconds", "Longest lag since the start", value=max(overdue, self.lag.longest)
        )
        yield GaugeMetricFamily(
            "octavo_loop_lag_recent_seconds",
            "Longest lag of the last 10 to 20 seconds",
            value=max(overdue, self.lag.recent),
        )
        yield GaugeMetricFamily(
            "octavo_asyncio_tasks", "Tasks of the event loop", value=len(asyncio.all_tasks(self._loop))
        )

    def _beat(self) -> None:
        now = time.monotonic()
        self._beats += 1
        self.lag.note(max(0.0, now - self._due), now)
        self._schedule()

    def _schedule(self) -> None:
        self._due = time.monotonic() + BEAT_SECONDS
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    def _watch(self) -> None:
        look_s = min(limit for limit in (self._stall_s, self._exit_s, 1.0) if limit) / 4
        stillness, told = Stillness(look_s), 0.0
        while not self._stop.wait(look_s):
            still = stillness.look(self._beats, time.monotonic())
            if not still and told:
                _say(f"the event loop turns again, after {told:.1f} s")
                told = 0.0
            if self._stall_s and still >= self._stall_s:
                if not told:
                    self.stalls += 1
                    _say(f"the event loop has not turned for {still:.1f} s\n{all_stacks(self._loop)}")
                told = still
            if self._exit_s and still >= self._exit_s:
                _say(f"the event loop has not turned for {still:.1f} s: leaving\n{all_stacks(self._loop)}")
                self._leave()
                return


def _say(text: str) -> None:
    """Log, without waiting for ever for a lock or a pipe: the loop may stand still in the log itself."""

    def speak() -> None:
        log.critical("%s", text)
        for handler in logging.getLogger().handlers:
            handler.flush()

    speaker = threading.Thread(target=speak, name="last words", daemon=True)
    speaker.start()
    speaker.join(_LAST_WORDS_SECONDS)
