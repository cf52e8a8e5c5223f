"""Chaos: a cluster of real processes under load, faults by seed, and each stream compared with its undisturbed run, token by token.

    python -m deploy.chaos [--seconds 120] [--seed 1] [--streams 64] [--workers 3] [--schedulers 2] [--routers 2] [--out FILE]

Every process reaches every scheduler through a relay of its own (deploy/gate.py), and clients reach routers through one: a partition
holds the relays of one process. Faults come one after the other: kill, stop (SIGSTOP) and partition of a worker, a scheduler and a
router, in an order drawn from the seed, each as often as the time allows. Runs on the mock model, whose outputs are exact.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from octavo.client import AsyncClient, OctavoError
from octavo.v1 import inference_pb2 as pb

from deploy.cluster import LocalCluster
from deploy.commands import Flag
from deploy.gate import Gate

T = TypeVar("T")

KINDS = ("kill", "stop", "partition")
ROLES = ("worker", "scheduler", "router")
PROMPTS = 24
_AFTERMATH_SECONDS = 2.0  # a gap that begins later is not the fault's
MODEL = "mock"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosSettings:
    """Size and length of a run. `seconds` is how long faults come; `fault_seconds` how long a stop or a partition lasts."""

    seconds: float = 120.0
    seed: int = 1
    streams: int = 64
    workers: int = 3
    schedulers: int = 2
    routers: int = 2
    tokens: int = 200
    step_ms: float = 15.0
    fault_seconds: float = 1.0


@dataclass(slots=True)
class ChaosReport:
    """What was done, survived and measured."""

    faults: Counter[str] = field(default_factory=Counter)
    mid_output: list[int] = field(default_factory=list)  # streams in the middle of their output, at each fault
    streams: int = 0
    tokens: int = 0
    migrations: int = 0  # as the streams' own Finished.timing says
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    pauses_ms: dict[str, list[float]] = field(
        default_factory=dict
    )  # longest gap of each stream that a fault interrupted

    @property
    def survived(self) -> bool:
        """No stream failed or differs."""
        return not self.wrong and not self.errors

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "faults": dict(self.faults),
            "streams_mid_output_at_a_fault": {"min": min(self.mid_output, default=0), "all": self.mid_output},
            "streams": self.streams,
            "tokens_compared": self.tokens,
            "migrations": self.migrations,
            "wrong": self.wrong,
            "errors": self.errors,
            "pause_ms": {
                name: {"p50": _quantile(gaps, 0.5), "p99": _quantile(gaps, 0.99), "streams": len(gaps)}
                for name, gaps in sorted(self.pauses_ms.items())
            },
        }


@dataclass(slots=True, eq=False)
class _Stream:
    tokens: list[int] = field(default_factory=list)
    last: float = 0.0
    fault: str = ""  # the last one that came in its middle, when, and the longest gap between messages since
    fault_at: float = 0.0
    pause: float = 0.0

    def hit(self, fault: str, now: float) -> None:
        self.fault, self.fault_at, self.pause = fault, now, 0.0

    def note(self, now: float) -> None:
        """A message has come."""
        if self.last and self.last < self.fault_at + _AFTERMATH_SECONDS:
            self.pause = max(self.pause, now - self.last)
        self.last = now


class Chaos:
    """One run. Everything here belongs to one event loop; what blocks (starting processes) runs in a thread, one at a time."""

    def __init__(self, settings: ChaosSettings) -> None:
        self._settings = settings
        self._random = random.Random(settings.seed)
        self._gates: dict[str, list[Gate]] = {}  # by process: the relays through which it talks
        self._front: list[str] = []
        self._live: set[_Stream] = set()
        self._expected: list[list[int]] = []
        self._over = False
        self._blocking: asyncio.Future[Any] | None = None
        self.report = ChaosReport()

    async def run(self) -> ChaosReport:
        """Start, measure the undisturbed run, let faults happen, compare, stop."""
        settings = self._settings
        flags: dict[str, dict[str, Flag]] = {
            "worker": {"mock-step-ms": settings.step_ms, "max-rows": max(settings.streams, PROMPTS)},
            "router": {"drain-timeout": 5},
        }
        cluster = LocalCluster(redis=False, schedulers=settings.schedulers, workers=0, routers=0, flags=flags)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)  # as Ctrl-C: no process is left behind
        try:
            await self._in_thread(cluster.start)
            await self._connect(cluster)
            await self._undisturbed()
            async with asyncio.TaskGroup() as tasks:
                for number in range(settings.streams):
                    tasks.create_task(self._client(number))
                await asyncio.sleep(1.5)
                await self._faults(cluster)
                self._over = True
            return self.report
        finally:
            for gate in [gate for gates in self._gates.values() for gate in gates]:
                gate.release()
            if self._blocking is not None:  # an interrupted restart: the cluster is for one thread at a time
                await asyncio.wait([self._blocking])
            await self._in_thread(cluster.stop)
            loop.remove_signal_handler(signal.SIGTERM)
            for gate in {gate for gates in self._gates.values() for gate in gates}:
                await gate.close()

    async def _in_thread(self, function: Callable[..., T], *arguments: Any, **flags: Any) -> T:
        """Run what blocks. It goes on to its end when we are cancelled, and is waited for before the cluster is stopped."""
        running = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **flags))
        self._blocking = running
        return await asyncio.shield(running)

    async def _connect(self, cluster: LocalCluster) -> None:
        schedulers = [m for m in cluster.members.values() if m.command.service == "scheduler"]
        for service, count in (("worker", self._settings.workers), ("router", self._settings.routers)):
            for _ in range(count):
                gates = [Gate(scheduler.address) for scheduler in schedulers]
                for gate, scheduler in zip(gates, schedulers, strict=True):
                    await gate.start()
                    self._gates.setdefault(scheduler.name, []).append(gate)
                member = await self._in_thread(cluster.add, service, scheduler=[gate.address for gate in gates])
                self._gates.setdefault(member.name, []).extend(gates)
                if service == "router":
                    front = Gate(member.address)
                    await front.start()
                    self._gates[member.name].append(front)
                    self._front.append(front.address)

    # Load ----------------------------------------------------------------------------------------------------------------

    def _request(self, prompt: int) -> pb.GenerateRequest:
        ids = [258 + (prompt * 131 + i * 17) % 30_000 for i in range(8 + 5 * prompt)]
        sampling = pb.SamplingParams(
            max_tokens=self._settings.tokens, ignore_eos=True, seed=prompt, temperature=float(prompt % 2)
        )
        return pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=ids), sampling=sampling)

    async def _undisturbed(self) -> None:
        async with AsyncClient(self._front) as client:
            results = await asyncio.gather(
                *(client.stream(self._request(n), timeout=60).result() for n in range(PROMPTS))
            )
        self._expected = [list(result.outputs[0].token_ids) for result in results]

    async def _client(self, number: int) -> None:
        """One request after the other until the run is over."""
        random_ = random.Random(f"{self._settings.seed} {number}")
        await asyncio.sleep(random_.uniform(0, 1.0))
        first = number % len(self._front)
        async with AsyncClient(self._front[first:] + self._front[:first]) as client:
            while not self._over:
                await self._one(client, random_.randrange(PROMPTS))

    async def _one(self, client: AsyncClient, prompt: int) -> None:
        stream, report = _Stream(), self.report
        self._live.add(stream)
        try:
            async with client.stream(self._request(prompt), timeout=120) as events:
                async for event in events:
                    stream.note(time.monotonic())
                    if isinstance(event, pb.Delta):
                        stream.tokens += event.token_ids
                    elif isinstance(event, pb.Finished):
                        report.migrations += event.timing.migrations
        except OctavoError as error:
            report.errors.append(f"prompt {prompt} after {len(stream.tokens)} tokens: {error}")
        else:
            if stream.tokens != self._expected[prompt]:
                report.wrong.append(_difference(prompt, stream.tokens, self._expected[prompt]))
        finally:
            self._live.discard(stream)
            report.streams += 1
            report.tokens += len(stream.tokens)
            self._book(stream)

    def _book(self, stream: _Stream) -> None:
        if stream.fault and stream.pause:
            self.report.pauses_ms.setdefault(stream.fault, []).append(1e3 * stream.pause)

    # Faults --------------------------------------------------------------------------------------------------------------

    async def _faults(self, cluster: LocalCluster) -> None:
        until = time.monotonic() + self._settings.seconds
        waiting: list[tuple[str, str]] = []
        while time.monotonic() < until:
            if not waiting:
                waiting = [(kind, role) for kind in KINDS for role in ROLES]
                self._random.shuffle(waiting)
            await self._happen(cluster, *waiting.pop())
            await asyncio.sleep(self._random.uniform(0.5, 2.0))

    async def _happen(self, cluster: LocalCluster, kind: str, role: str) -> None:
        names = [name for name, member in cluster.members.items() if member.command.service == role]
        name = self._random.choice(names)
        member = cluster.members[name]
        middle = [stream for stream in self._live if 0 < len(stream.tokens) < self._settings.tokens]
        self.report.mid_output.append(len(middle))
        self.report.faults[f"{kind} {role}"] += 1
        for stream in middle:
            self._book(stream)
            stream.hit(f"{kind} {role}", time.monotonic())
        if kind == "kill":
            await self._in_thread(member.kill)
            await self._in_thread(cluster.restart, name)
        elif kind == "stop":
            member.suspend()
            await asyncio.sleep(self._settings.fault_seconds)
            member.resume()
        else:
            for gate in self._gates[name]:
                gate.hold()
            await asyncio.sleep(self._settings.fault_seconds)
            for gate in self._gates[name]:
                gate.release()


def _difference(prompt: int, got: list[int], expected: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
    return f"prompt {prompt}: {len(got)} tokens, {len(expected)} expected, the first difference at {at}"


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a stream failed or differs."""
    parser = argparse.ArgumentParser(prog="python -m deploy.chaos", description=__doc__.partition("\n")[0])
    defaults = ChaosSettings()
    for name in ("seconds", "seed", "streams", "workers", "schedulers", "routers"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args(argv))
    out: Path | None = given.pop("out")
    try:
        report = asyncio.run(Chaos(ChaosSettings(**given)).run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped", file=sys.stderr)
        return 130
    text = json.dumps({"command": "python -m deploy.chaos", "settings": given, **report.as_json()}, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    return 0 if report.survived else 1


if __name__ == "__main__":
    sys.exit(main())
