"""Runs a load in several processes and gathers their samples."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from octavo.cli.load_spec import LoadSpec
from octavo.cli.problem import CommandProblem

# A line holds all gaps of one request: 7 characters for each token at most, mostly.
_LINE_BYTES = 64 << 20

Progress = Callable[[int], None]  # gets the number of requests that are over


@dataclass(slots=True)
class LoadResult:
    """What all processes measured. A sample is what `load_process.Sample.to_dict` makes."""

    processes: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    cpu_seconds: float = 0.0  # of all generator processes while the load ran


def run_load(spec: LoadSpec, processes: int, progress: Progress) -> LoadResult:
    """Start the processes, let them warm up, start the clock in all of them, and wait. Raises CommandProblem."""
    return asyncio.run(_run(spec, processes, progress))


async def _run(spec: LoadSpec, processes: int, progress: Progress) -> LoadResult:
    shares = spec.split(processes)
    result = LoadResult(processes=len(shares))
    children = [_Child(share) for share in shares]
    try:
        await _all(*(child.start() for child in children))
        for child in children:
            await child.send("go")
        await _all(*(child.collect(result, lambda: progress(sum(c.done for c in children))) for child in children))
    finally:
        for child in children:
            await child.stop()
    result.samples.sort(key=lambda sample: float(sample["due"]))
    return result


async def _all(*jobs: Any) -> None:
    """Wait for all; the first problem cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)
    except ExceptionGroup as group:  # not except*: until Python 3.11.4 what is raised in one comes in a group again
        problems, others = group.split(CommandProblem)
        if problems is None or others is not None:
            raise
        raise problems.exceptions[0] from None


class _Child:
    """One generator process; owned by the coroutine that started it."""

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None
        self._ended = False
        self.done = 0

    async def start(self) -> None:
        """Spawn it and wait until it is connected and warm."""
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # gRPC's older I/O path: 41 instead of 71 µs of this process's time for a message (grpcio 1.82.3, two cores).
        environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "octavo.cli.load_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environ,
            limit=_LINE_BYTES,
        )
        await self.send(self._spec.to_json())
        await self._read()

    async def send(self, line: str) -> None:
        """Write a line to it."""
        process = self._running()
        if process.stdin is None:
            raise CommandProblem("a load-generator process has no input pipe")
        try:
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
        except ConnectionError:
            raise CommandProblem("a load-generator process ended early") from None

    async def collect(self, result: LoadResult, progressed: Callable[[], None]) -> None:
        """Read until it has told everything."""
        while True:
            message = await self._read()
            if "sample" in message:
                result.samples.append(message["sample"])
            elif "done" in message:
                self.done = message["done"]
                progressed()
            elif "end" in message:
                result.cpu_seconds += message["cpu_seconds"]
                self.done = self._spec.requests
                self._ended = True
                progressed()
                return

    async def stop(self) -> None:
        """End it if it still runs, and reap it."""
        if self._process is None:
            return
        # Nothing of a run that was given up is wanted any more.
        if not self._ended and self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def _read(self) -> dict[str, Any]:
        stdout = self._running().stdout
        line = await stdout.readline() if stdout is not None else b""
        if not line:
            raise CommandProblem("a load-generator process ended early")
        message: dict[str, Any] = json.loads(line)
        if "problem" in message:
            raise CommandProblem(str(message["problem"]))
        return message

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise CommandProblem("a load-generator process was not started")
        return self._process
