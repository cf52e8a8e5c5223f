"""Chaos: a cluster of real processes under load, faults by seed, and each stream compared with its undisturbed run, token by token.

    python -m deploy.chaos [--model mock|smollm2|DIRECTORY] [--seconds 60] [--seed 1] [--streams 64] [--workers 3] [--schedulers 2]
                           [--routers 2] [--out FILE]

Faults come one after the other: kill, stop (SIGSTOP), partition and restart (SIGTERM) of a worker, a scheduler and a router, kill and
stop of Redis, in an order drawn from the seed, each as often as the time allows. On the mock model, whose outputs are exact, a stream
must equal its undisturbed run. On a real model it may part where two tokens are as good as each other: then it is checked from there.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from octavo.cli.load_report import machine, versions
from octavo.client import AsyncClient, OctavoError
from octavo.v1 import inference_pb2 as pb

from deploy import model as models
from deploy.chaos_cluster import ChaosCluster
from deploy.chaos_report import ChaosReport, Watched, difference
from deploy.commands import Flag, is_mock
from deploy.readiness import ClusterError

KINDS = ("kill", "stop", "partition", "restart")
ROLES = ("worker", "scheduler", "router")
FAULTS = tuple((kind, role) for kind in KINDS for role in ROLES)
REDIS_FAULTS = (("kill", "redis"), ("stop", "redis"))
PROMPTS = 24
# Log-probabilities by which two tokens may differ and yet change places, as in tests/gpu: what bfloat16 leaves open.
_NEAR_TIE = 0.09
_HALF_SECONDS = 10.0  # until a fault comes though fewer than half of the streams are in their middle
_GRAMMAR = r"([a-f]{2}|\[[0-9]{1,3}\])+"  # never complete, so that an output has all its tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosSettings:
    """Size and length of a run. `seconds` is how long faults come; `fault_seconds` how long a stop or a partition lasts."""

    model: str = "mock"
    seconds: float = 120.0
    seed: int = 1
    streams: int = 64
    workers: int = 3
    schedulers: int = 2
    routers: int = 2
    tokens: int = 200
    step_ms: float = 15.0
    fault_seconds: float = 1.0
    lease_ms: int | None = None  # the services' own if None

    @classmethod
    def of(cls, model: str, **given: float | int) -> ChaosSettings:
        """What suits a model: a real one on a CPU is slow, and shares it with everything else, so it gets longer leases."""
        if is_mock(model):
            return cls(model=model, **given)  # type: ignore[arg-type]
        slow = {"streams": 8, "workers": 2, "tokens": 48, "fault_seconds": 5.0, "lease_ms": 2_000}
        return cls(model=model, **{**slow, **given})  # type: ignore[arg-type]


class Chaos:
    """One run. Everything here belongs to one event loop."""

    def __init__(self, settings: ChaosSettings) -> None:
        self._settings = settings
        self._exact = is_mock(settings.model)
        self._random = random.Random(settings.seed)
        self._live: set[Watched] = set()
        self._expected: list[list[int]] = []
        self._worker_faults: list[tuple[str, str, float]] = []
        self._over = False
        self.report = ChaosReport()

    async def run(self) -> ChaosReport:
        """Start, measure the undisturbed run, let faults happen, compare, stop."""
        settings = self._settings
        chosen = await asyncio.to_thread(models.resolve, settings.model)
        cluster = ChaosCluster(
            model=chosen.argument,
            backend=chosen.backend or "torch",
            flags=self._flags(chosen.name),
            timeout=60.0 if self._exact else 300.0,
        )
        self._model = chosen.name
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)  # as Ctrl-C: no process is left behind
        try:
            await cluster.start(schedulers=settings.schedulers, workers=settings.workers, routers=settings.routers)
            await self._undisturbed(cluster.front)
            async with asyncio.TaskGroup() as tasks:
                for number in range(settings.streams):
                    tasks.create_task(self._client(number, cluster.front))
                await asyncio.sleep(1.5 if self._exact else 10.0)
                await self._faults(cluster)
                self._over = True
            self.report.read_schedulers(cluster.logs("scheduler"), self._worker_faults, settings.fault_seconds)
            return self.report
        finally:
            await cluster.stop()
            loop.remove_signal_handler(signal.SIGTERM)

    def _flags(self, name: str) -> dict[str, Mapping[str, Flag]]:
        settings = self._settings
        lease: dict[str, Flag] = {} if settings.lease_ms is None else {"lease-ms": settings.lease_ms}
        worker: dict[str, Flag] = {"max-rows": max(settings.streams, PROMPTS), "served-name": name}
        if self._exact:
            worker["mock-step-ms"] = settings.step_ms
        else:
            worker |= {"threads": 1, "max-model-len": 1024, "num-blocks": 512}
        return {"worker": lease | worker, "scheduler": lease, "router": lease | {"drain-timeout": 5}}

    # Load ----------------------------------------------------------------------------------------------------------------

    def _request(self, prompt: int, key: str = "") -> pb.GenerateRequest:
        ids = [258 + (prompt * 131 + i * 17) % 30_000 for i in range(8 + 5 * prompt)]
        sampling = pb.SamplingParams(max_tokens=self._settings.tokens, ignore_eos=True, seed=prompt, temperature=0.0)
        if prompt % 2 and self._exact:
            sampling.temperature = 1.0
        elif prompt % 2:  # these count prompt and output tokens apart, before and after a loss
            sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty = 1.2, 0.5, 0.3
        request = pb.GenerateRequest(
            model=self._model, token_ids=pb.TokenIds(ids=ids), sampling=sampling, idempotency_key=key
        )
        if (
            prompt % 3 == 1 and self._exact
        ):  # elsewhere a stream may part, and be gone on with from there as a new prompt
            request.grammar.regex = _GRAMMAR
        return request

    async def _undisturbed(self, front: Sequence[str]) -> None:
        async with AsyncClient(front) as client:
            results = await asyncio.gather(
                *(client.stream(self._request(n), timeout=600).result() for n in range(PROMPTS))
            )
        self._expected = [list(result.outputs[0].token_ids) for result in results]

    async def _client(self, number: int, front: Sequence[str]) -> None:
        """One request after the other until the run is over."""
        random_ = random.Random(f"{self._settings.seed} {number}")
        await asyncio.sleep(random_.uniform(0, 1.0))
        first = number % len(front)
        async with AsyncClient([*front[first:], *front[:first]]) as client:
            while not self._over:
                prompt = random_.randrange(PROMPTS)
                await self._one(client, prompt, key=f"{number} {random_.getrandbits(64)}")

    async def _one(self, client: AsyncClient, prompt: int, key: str) -> None:
        stream, report = Watched(), self.report
        self._live.add(stream)
        try:
            async with client.stream(self._request(prompt, key), timeout=120 if self._exact else 600) as events:
                async for event in events:
                    stream.note(time.monotonic())
                    if isinstance(event, pb.Delta):
                        stream.tokens += event.token_ids
                    elif isinstance(event, pb.Finished):
                        report.migrations += event.timing.migrations
            await self._compare(client, prompt, stream.tokens)
        except OctavoError as error:
            report.errors.append(f"prompt {prompt} after {len(stream.tokens)} tokens: {error}")
        finally:
            self._live.discard(stream)
            report.streams += 1
            report.tokens += len(stream.tokens)
            self._book(stream)

    async def _compare(self, client: AsyncClient, prompt: int, got: list[int]) -> None:
        expected = self._expected[prompt]
        while (at := difference(got, expected)) is not None:
            if (
                self._exact
                or len(got) != len(expected)
                or (gap := await self._gap(client, prompt, got, expected, at)) > _NEAR_TIE
            ):
                why = "" if self._exact or len(got) != len(expected) else f", by {gap:.3f}"
                self.report.wrong.append(
                    f"prompt {prompt}: {len(got)} tokens, {len(expected)} expected, the first difference at {at}{why}"
                )
                return
            self.report.near_ties += 1
            expected = got[: at + 1] + await self._go_on(client, prompt, got[: at + 1])

    async def _gap(self, client: AsyncClient, prompt: int, got: list[int], expected: list[int], at: int) -> float:
        """By how much the model, given the tokens before, prefers one of the two tokens to the other; infinity under penalties."""
        request = self._request(prompt)
        if request.sampling.HasField("repetition_penalty"):  # what is reported are the logits before them
            return float("inf")
        request.token_ids.ids.extend(got[:at])
        request.sampling.max_tokens = 1
        request.sampling.logprobs = 20
        answer = await client.stream(request, timeout=600).result()
        values = {top.token_id: top.logprob for top in answer.outputs[0].logprobs[0].top}
        if not {got[at], expected[at]} <= values.keys():
            return float("inf")
        return abs(values[got[at]] - values[expected[at]])

    async def _go_on(self, client: AsyncClient, prompt: int, got: list[int]) -> list[int]:
        if len(got) == self._settings.tokens:
            return []
        request = self._request(prompt)
        request.token_ids.ids.extend(got)
        request.sampling.max_tokens = self._settings.tokens - len(got)
        answer = await client.stream(request, timeout=600).result()
        return list(answer.outputs[0].token_ids)

    def _book(self, stream: Watched) -> None:
        if stream.fault and stream.pause:
            self.report.pauses.setdefault(stream.fault, []).append(1e3 * stream.pause)

    # Faults --------------------------------------------------------------------------------------------------------------

    async def _faults(self, cluster: ChaosCluster) -> None:
        until = time.monotonic() + self._settings.seconds
        waiting: list[tuple[str, str]] = []
        while time.monotonic() < until:
            if not waiting:
                waiting = [*FAULTS, *(REDIS_FAULTS if cluster.names("redis") else ())]
                self._random.shuffle(waiting)
            await self._happen(cluster, *waiting.pop())
            await asyncio.sleep(self._random.uniform(0.5, 2.0))

    async def _middle(self) -> list[Watched]:
        """The streams in the middle of their output, at a moment when half of them or more are: they began together, so that they
        also end together, and a fault between would hit nobody."""
        until = time.monotonic() + _HALF_SECONDS
        while True:
            middle = [stream for stream in self._live if 0 < len(stream.tokens) < self._settings.tokens]
            if 2 * len(middle) >= self._settings.streams or time.monotonic() > until:
                return middle
            await asyncio.sleep(0.02)

    async def _happen(self, cluster: ChaosCluster, kind: str, role: str) -> None:
        name = self._random.choice(cluster.names(role))
        middle = await self._middle()
        self.report.mid_output.append(len(middle))
        self.report.faults[f"{kind} {role}"] += 1
        for stream in middle:
            self._book(stream)
            stream.hit(f"{kind} {role}", time.monotonic())
        if role == "worker" and kind != "restart":
            self._worker_faults.append((f"{kind} {role}", name, time.time()))
        await cluster.harm(kind, name, self._settings.fault_seconds)


def as_document(settings: ChaosSettings, report: ChaosReport) -> dict[str, Any]:
    """For a file: where and how it was run, and what became of it."""
    command = f"octavo chaos --model {settings.model} --seconds {settings.seconds:g} --seed {settings.seed}"
    return {
        "command": command,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": dataclasses.asdict(settings),
        **report.as_json(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a stream failed or differs."""
    parser = argparse.ArgumentParser(prog="python -m deploy.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mock", help="mock, a name to pull, or a directory [mock]")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults come [60]")
    for name in ("seed", "streams", "workers", "schedulers", "routers"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--out", type=Path)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    out: Path | None = given.pop("out", None)
    settings = ChaosSettings.of(**given)
    try:
        report = asyncio.run(Chaos(settings).run())
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped", file=sys.stderr)
        return 130
    text = json.dumps(as_document(settings, report), indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    return 0 if report.survived else 1


if __name__ == "__main__":
    sys.exit(main())
