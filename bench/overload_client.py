"""One tenant's load in a process of its own, for bench/overload.py: `python -m bench.overload_client`, driven over its pipes.

In: a ClientLoad as one JSON line; "go" follows once all are connected. Out: {"ready"}, then one line for each request after the
run, then {"cpu_seconds", "lags"}. Times are seconds on the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from array import array
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import grpc.aio
from octavo.client.connection import Connection
from octavo.client.errors import decode
from octavo.v1 import inference_pb2 as pb

_LAG_SECONDS = 0.01
_METHOD = "/octavo.v1.InferenceService/Generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoad:
    """What one process sends. Lengths in tokens, times in seconds; output lengths are uniform from a half to one and a half of it."""

    address: str
    key: str
    tenant: str
    model: str = "mock"
    seconds: float
    concurrency: int = 0  # of a closed loop, whose refused requests come again when they are told to
    rate: float = 0.0  # requests a second of an open loop that never comes again: Poisson
    priority: int = 0
    input_len: int = 64
    output_len: int = 200
    drain: float = 60.0  # for what runs when the arrivals end
    seed: int = 0


@dataclass(slots=True)
class Sample:
    """One request."""

    sent: float
    end: float = 0.0
    outcome: str = ""  # "finished", "cut" at the end of the run, or the name of the status
    reason: str = ""  # ErrorInfo.reason
    retry_after: float | None = None  # RetryInfo, seconds
    wanted: int = 0
    stamps: array[float] = field(default_factory=lambda: array("d"))  # of each message with tokens
    counts: array[int] = field(default_factory=lambda: array("L"))  # tokens in it

    def to_line(self) -> str:
        """JSON."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(values | {"stamps": list(self.stamps), "counts": list(self.counts)})


class Generator:
    """Sends one load. Belongs to one event loop."""

    def __init__(self, load: ClientLoad) -> None:
        self._load = load
        self._random = random.Random(f"{load.tenant}/{load.seed}")
        connection = Connection((load.address,), token=load.key)
        self._channel = connection.open_aio(load.address)
        self._metadata = connection.metadata
        self._method: Any = self._channel.unary_stream(_METHOD, response_deserializer=pb.GenerateResponse.FromString)
        self.samples: list[Sample] = []
        self.lags: list[float] = []  # of this process's own loop, seconds: it had the samples later by so much at most

    async def connect(self) -> None:
        """Wait for the router. Raises TimeoutError."""
        async with asyncio.timeout(10):
            await self._channel.channel_ready()

    async def run(self) -> None:
        """Everything, to its end or until `drain` is over."""
        until = time.monotonic() + self._load.seconds
        arrive = self._closed_loop(until) if self._load.concurrency else self._open_loop(until)
        watch = asyncio.create_task(self._watch_own_lag())
        try:
            async with asyncio.timeout(self._load.seconds + self._load.drain):
                await arrive
        except TimeoutError:
            pass  # what still ran was cancelled and says so
        watch.cancel()
        await self._channel.close()

    async def _watch_own_lag(self) -> None:
        while True:
            due = time.monotonic() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self.lags.append(time.monotonic() - due)

    async def _open_loop(self, until: float) -> None:
        due = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while (due := due + self._random.expovariate(self._load.rate)) < until:
                payload = self._payload()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self._stream(*payload))

    async def _closed_loop(self, until: float) -> None:
        async def worker() -> None:
            while time.monotonic() < until:
                sample = await self._stream(*self._payload())
                if sample.retry_after is not None:
                    await asyncio.sleep(sample.retry_after)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.concurrency):
                group.create_task(worker())

    def _payload(self) -> tuple[bytes, int]:
        load = self._load
        wanted = self._random.randint(load.output_len // 2, load.output_len * 3 // 2)
        request = pb.GenerateRequest(
            model=load.model,
            priority=load.priority,
            token_ids=pb.TokenIds(ids=self._random.choices(range(30_000), k=load.input_len)),
            sampling=pb.SamplingParams(max_tokens=wanted, ignore_eos=True, temperature=0.0),
        )
        return request.SerializeToString(), wanted

    async def _stream(self, payload: bytes, wanted: int) -> Sample:
        now = time.monotonic
        sample = Sample(sent=now(), wanted=wanted)
        self.samples.append(sample)
        try:
            async for message in self._method(payload, metadata=self._metadata):
                size = len(message.delta.token_ids)
                if size:
                    sample.stamps.append(now())
                    sample.counts.append(size)
                elif message.HasField("finished"):
                    sample.outcome = "finished"
        except grpc.aio.AioRpcError as error:
            sample.end = now()
            decoded = decode(error)
            sample.outcome = error.code().name
            sample.reason = "" if decoded.reason is None else decoded.reason.name
            sample.retry_after = decoded.retry_after
        except asyncio.CancelledError:
            sample.outcome = "cut"
            raise
        finally:
            sample.end = sample.end or now()
        return sample


async def _serve_pipes() -> None:
    loop = asyncio.get_running_loop()
    generator = Generator(ClientLoad(**json.loads(await loop.run_in_executor(None, sys.stdin.readline))))
    await generator.connect()
    print('{"ready": true}', flush=True)
    if (await loop.run_in_executor(None, sys.stdin.readline)).strip() != "go":
        return  # the parent is gone
    cpu = time.process_time()
    await generator.run()
    cpu = time.process_time() - cpu
    for sample in generator.samples:
        print(sample.to_line())
    print(json.dumps({"cpu_seconds": cpu, "lags": generator.lags}), flush=True)


def first_line(load: ClientLoad) -> str:
    """What starts a process."""
    return json.dumps(asdict(load))


def main() -> None:
    """Entry point of the process."""
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(_serve_pipes())
    else:
        uvloop.run(_serve_pipes())


if __name__ == "__main__":
    main()
