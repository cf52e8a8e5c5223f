"""A device that does not end its steps: shown, counted, told (unready), and in the end the process leaves.

A hung GPU does not heal. Its requests are long elsewhere by then (the scheduler has cut the stream); what is left is to start anew,
which a supervisor does with a process that has ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from service.watchdog import Stillness
from worker.engine import Engine

log = logging.getLogger("octavo.hang")

_LOOK_SECONDS = 0.25


class HangWatch(Collector):
    """Watches one engine. Also the collector of its metrics."""

    def __init__(
        self,
        engine: Engine,
        hang_s: float,
        exit_s: float,
        dump_stacks: Callable[[str], None],
        leave: Callable[[str], None],
    ) -> None:
        """`hang_s`: seconds without progress after which the device hangs; `leave(why)` is called `exit_s` later, unless that is 0."""
        self.hangs = 0
        self.still = 0.0
        self._engine = engine
        self._hang_s = hang_s
        self._exit_s = exit_s
        self._dump_stacks = dump_stacks
        self._leave = leave
        self._look_s = min(_LOOK_SECONDS, hang_s / 4)
        self._stillness = Stillness(self._look_s)
        self._told = False

    @property
    def hung(self) -> bool:
        """Whether a step has been on the device for longer than any step takes."""
        return self.still >= self._hang_s

    async def run(self) -> None:
        """Look four times a second, until cancelled."""
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(self._look_s)

    def look(self, now: float) -> None:
        """Judge, and act."""
        progress = self._engine.progress()
        self.still = self._stillness.look(progress, now) if progress is not None else 0.0
        if not self.hung:
            if self._told:
                log.warning("the device goes on")
            self._told = False
            return
        if not self._told:
            self._told = True
            self.hangs += 1
            self._dump_stacks(f"the device has not ended a step for {self.still:.1f} s")
        if self._exit_s and self.still >= self._hang_s + self._exit_s:
            self._leave(f"the device has hung for {self.still:.1f} s")

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        yield CounterMetricFamily("octavo_worker_hangs", "Steps that stayed on the device too long", value=self.hangs)
        yield GaugeMetricFamily(
            "octavo_worker_device_still_seconds", "Seconds without progress of a busy device", value=self.still
        )
