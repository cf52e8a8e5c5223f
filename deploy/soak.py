"""A soak: mixed load for a long time, after which memory, open files, threads, tasks, rows and blocks are where they started.

    python -m deploy.soak [--seconds 1200] [--seed 1] [--clients 24] [--workers 2] [--out FILE]

A cluster of its own, real processes on the mock model. Load warms it up, it idles, the start is noted; then load again for the time
given, sampled every few seconds; it idles, and the end is compared with the start. Memory is judged by the slope of a line through the
samples of the second half: what it grows by in that half must stay below `MEMORY_BYTES` and a share of `MEMORY_SHARE`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from octavo.cli.load_report import machine, versions
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster
from deploy.commands import Flag, redis_binary
from deploy.readiness import ClusterError
from deploy.soak_load import Load

MEMORY_BYTES = 6 << 20
MEMORY_SHARE = 0.02
# A thread of a pool that was not needed before, a socket that is about to close.
FILES, THREADS, TASKS = 3, 2, 2
_IDLE_SECONDS = 30.0
_SERVICES = ("scheduler", "router", "worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakSettings:
    """Size and length of a run, seconds. `sample`: 0 takes two hundred samples, but one a second at most."""

    seconds: float = 1200.0
    seed: int = 1
    clients: int = 24
    workers: int = 2
    step_ms: float = 4.0
    warm_up: float = 30.0
    sample: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one time. `at` in seconds since the load began; `memory` is its resident set, bytes."""

    at: float
    memory: int
    files: int
    threads: int
    tasks: int


@dataclass(slots=True)
class SoakReport:
    """What was done, seen and concluded."""

    calls: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    start: dict[str, Sample] = field(default_factory=dict)
    end: dict[str, Sample] = field(default_factory=dict)
    books: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # rows, blocks and queue, at the start and at the end
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """All is where it started, and no call had an answer that it should not have."""
        return not self.problems

    def growth(self, name: str) -> tuple[float, float]:
        """Bytes by which a process grew in the second half, by the slope of its samples; and how many it may."""
        second = self.samples[name][len(self.samples[name]) // 2 :]
        slope = _slope([sample.at for sample in second], [float(sample.memory) for sample in second])
        mean = sum(sample.memory for sample in second) / len(second)
        return slope * (second[-1].at - second[0].at), MEMORY_BYTES + MEMORY_SHARE * mean

    def judge(self) -> None:
        """Add what is not as it was to the problems."""
        for name, start in self.start.items():
            end = self.end[name]
            for what, most in (("files", FILES), ("threads", THREADS), ("tasks", TASKS)):
                before, after = getattr(start, what), getattr(end, what)
                if after > before + most:
                    self.problems.append(f"{name}: {after} {what} at the end, {before} at the start")
            grown, allowed = self.growth(name)
            if grown > allowed:
                self.problems.append(
                    f"{name}: memory grew by {grown / 2**20:.1f} MiB in the second half, {allowed / 2**20:.1f} are allowed"
                )
        if self.books["end"] != self.books["start"]:
            self.problems.append(
                f"the scheduler's books: {self.books['end']} at the end, {self.books['start']} at the start"
            )

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        processes = {
            name: {
                "start": asdict(self.start[name]),
                "end": asdict(self.end[name]),
                "memory_growth_second_half_bytes": round(self.growth(name)[0]),
                "memory_growth_allowed_bytes": round(self.growth(name)[1]),
                "memory_samples": [[round(sample.at, 1), sample.memory] for sample in samples],
            }
            for name, samples in self.samples.items()
        }
        return {
            "passed": self.passed,
            "problems": self.problems[:50],
            "calls": dict(self.calls.most_common()),
            "books": self.books,
            "processes": processes,
        }

    def table(self) -> str:
        """For people."""
        lines = [
            f"{'':12} {'memory MiB':>16} {'2nd half, MiB (may)':>20} {'files':>9} {'threads':>9} {'tasks':>9}",
        ]
        for name, start in self.start.items():
            end, (grown, allowed) = self.end[name], self.growth(name)
            lines.append(
                f"{name:12} {start.memory / 2**20:6.1f} -> {end.memory / 2**20:6.1f} {grown / 2**20:+12.2f} ({allowed / 2**20:4.1f})  "
                f"{start.files:3d} -> {end.files:3d} {start.threads:2d} -> {end.threads:2d} {start.tasks:3d} -> {end.tasks:3d}"
            )
        calls = ", ".join(f"{count} {name}" for name, count in self.calls.most_common())
        return "\n".join([*lines, f"{self.calls.total()} calls: {calls}", *self.problems[:20]])


class Soak:
    """One run."""

    def __init__(self, settings: SoakSettings) -> None:
        self._settings = settings
        self.report = SoakReport()

    async def run(self) -> SoakReport:
        """Start, warm up, load, idle, judge, stop."""
        flags: dict[str, dict[str, Flag]] = {
            # One machine runs all this and the load: leases are about leaks here, not about detection.
            "scheduler": {"lease-ms": 2000},
            "router": {"lease-ms": 2000},
            # Few blocks, so that the prefix cache is full, and evicts, before the start is noted.
            "worker": {"lease-ms": 2000, "mock-step-ms": self._settings.step_ms, "max-rows": 32, "num-blocks": 1_200},
        }
        cluster = LocalCluster(redis=redis_binary() is not None, workers=self._settings.workers, flags=flags)
        try:
            await asyncio.to_thread(cluster.start)
            await self._load(cluster, self._settings.warm_up, "warm-up", sampled=False)
            self.report.start, self.report.books["start"] = await self._idle(cluster)
            await self._load(cluster, self._settings.seconds, "load", sampled=True)
            self.report.end, self.report.books["end"] = await self._idle(cluster)
            self.report.judge()
            return self.report
        finally:
            await asyncio.to_thread(cluster.stop)

    async def _load(self, cluster: LocalCluster, seconds: float, name: str, *, sampled: bool) -> None:
        over = asyncio.Event()
        loads = [
            Load(cluster.routers, cluster.schedulers, f"{self._settings.seed} {name} {number}")
            for number in range(self._settings.clients)
        ]
        began = time.monotonic()
        period = self._settings.sample or max(1.0, seconds / 200)
        async with asyncio.TaskGroup() as tasks:
            for load in loads:
                tasks.create_task(load.run(over))
            while (at := time.monotonic() - began) < seconds:
                if sampled:
                    for member, sample in (await self._sample(cluster, at)).items():
                        self.report.samples.setdefault(member, []).append(sample)
                await asyncio.sleep(min(period, max(0.0, seconds - at)))
            over.set()
        for load in loads:
            if sampled:
                self.report.calls += load.done
            self.report.problems += load.problems

    async def _sample(self, cluster: LocalCluster, at: float) -> dict[str, Sample]:
        members = {m.name: m for m in cluster.members.values() if m.command.service in _SERVICES}
        return {
            name: await asyncio.to_thread(_look_at, member.pid, member.ready.metrics, at)
            for name, member in members.items()
        }

    async def _idle(self, cluster: LocalCluster) -> tuple[dict[str, Sample], dict[str, int]]:
        """Wait until nothing changes any more, then look: two looks that agree in all but memory, and no work left."""
        until = time.monotonic() + _IDLE_SECONDS
        last: tuple[object, ...] = ()
        while True:
            await asyncio.sleep(1.0)
            samples, books = await self._sample(cluster, 0.0), await _books(cluster.schedulers)
            now = (*((s.files, s.threads, s.tasks) for s in samples.values()), *books.values())
            quiet = books["running"] == books["waiting"] == books["blocks_used"] == 0
            if (quiet and now == last) or time.monotonic() > until:
                return samples, books
            last = now


def _look_at(pid: int, metrics: str, at: float) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    tasks = next(float(line.split()[1]) for line in lines if line.startswith("octavo_asyncio_tasks "))
    memory = int(status["VmRSS"].split()[0]) << 10
    return Sample(at, memory, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), int(status["Threads"]), int(tasks))


async def _books(schedulers: Sequence[str]) -> dict[str, int]:
    books: Counter[str] = Counter(running=0, waiting=0, blocks_used=0, blocks_free=0)
    for address in schedulers:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            call = stub.Inspect(scheduler_pb2.InspectRequest(once=True, rows=True), timeout=30)
            view = await call.read()
            assert isinstance(view, scheduler_pb2.InspectResponse)
        books["waiting"] += view.queue.waiting
        for worker in view.workers:
            books["running"] += worker.status.running
            books["blocks_used"] += worker.status.blocks_used
            books["blocks_free"] += worker.status.blocks_total - worker.status.blocks_used
    return dict(books)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where something is not where it started."""
    parser = argparse.ArgumentParser(prog="python -m deploy.soak", description=__doc__.partition("\n")[0])
    defaults = SoakSettings()
    for name in ("seconds", "seed", "clients", "workers", "warm_up", "sample"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args(argv))
    out: Path | None = given.pop("out")
    try:
        report = asyncio.run(Soak(SoakSettings(**given)).run())
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(report.table())
    if out is not None:
        command = shlex.join(["python", "-m", "deploy.soak", *(sys.argv[1:] if argv is None else argv)])
        at = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"command": command, "at": at, "machine": machine(), "versions": versions(), "settings": given}
        out.write_text(json.dumps({**about, **report.as_json()}, indent=1) + "\n")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
