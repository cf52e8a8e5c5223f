"""One load-generator process: `python -m octavo.cli.load_process`, driven over its pipes by load_run.

In: a LoadSpec as one JSON line; later the line "go". Out, JSON lines: {"ready"}; {"done": n} while it runs; one {"sample"} for
each request after the run, so that writing costs the measurement nothing; {"end"}. A message of a stream costs a timestamp and
two appends beside gRPC's own work, for at high rates the generator is as busy as the server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import grpc
import grpc.aio
from octavo.cli.load_http import HttpStreams
from octavo.cli.load_spec import LoadSpec
from octavo.client.connection import Connection
from octavo.client.errors import OctavoError, decode
from octavo.v1 import inference_pb2 as pb

_METHOD = "/octavo.v1.InferenceService/Generate"
_CONNECT_SECONDS = 10.0
_REPORT_SECONDS = 0.25


@dataclass(slots=True)
class Sample:
    """One request. Times in seconds on the machine's monotonic clock, which all processes share."""

    due: float  # when it should have been sent; latencies count from here
    index: int = 0  # of the request, over all processes
    sent: float = 0.0
    end: float = 0.0
    outcome: Literal["finished", "abandoned", "failed"] = "failed"
    reason: str = ""  # of a failure
    stamps: array[float] = field(default_factory=lambda: array("d"))  # of each message with tokens
    counts: array[int] = field(default_factory=lambda: array("L"))  # tokens in it
    reported: int | None = None  # tokens by the server's own count, where a message does not tell

    def to_dict(self) -> dict[str, Any]:
        """As it travels: gaps in microseconds instead of times."""
        stamps = self.stamps
        return {
            "index": self.index,
            "due": self.due,
            "sent": self.sent,
            "end": self.end,
            "outcome": self.outcome,
            "reason": self.reason,
            "first": stamps[0] if stamps else None,
            "last": stamps[-1] if stamps else None,
            "tokens": sum(self.counts) if self.reported is None else self.reported,
            "gaps_us": [round((after - before) * 1e6) for before, after in pairwise(stamps)],
        }


class Generator:
    """Opens the streams of one process and times what they bring. Belongs to one event loop."""

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._http = HttpStreams(spec) if spec.openai else None
        self._channels: list[grpc.aio.Channel] = []
        self._methods: list[Any] = []
        self._metadata: Any = None
        if not spec.openai:
            ca = None if spec.tls_ca is None else spec.tls_ca.encode()
            connection = Connection(spec.addresses, token=spec.token, tls=spec.tls, tls_ca=ca)
            self._metadata = connection.metadata
            self._channels = [connection.open_aio(address) for address in spec.addresses]
            # Requests are serialised before the clock starts, so they go out as they are.
            self._methods = [
                channel.unary_stream(_METHOD, response_deserializer=pb.GenerateResponse.FromString)
                for channel in self._channels
            ]
        self.samples: list[Sample] = []
        self.cpu_seconds = 0.0  # of this process while the load ran
        self.done = 0

    async def connect(self) -> None:
        """Wait for the servers. Raises TimeoutError and OSError."""
        async with asyncio.timeout(_CONNECT_SECONDS):
            if self._http is not None:
                await self._http.connect()
            for channel in self._channels:
                await channel.channel_ready()

    async def warm_up(self) -> None:
        """Requests that are not counted, at the load's concurrency. Raises OctavoError for the first that fails."""
        payloads = ((index, self._spec.request(-1 - index)) for index in range(self._spec.warmup))
        samples = await self._closed_loop(payloads, abandon_after=None)
        failed = [sample.reason for sample in samples if sample.outcome == "failed"]
        if failed:
            raise OctavoError(None, f"warm-up failed: {failed[0]}")

    async def run(self, payloads: list[bytes], go: Callable[[], Awaitable[None]]) -> None:
        """Waits for `go`, then sends everything and fills `samples`."""
        spec = self._spec
        arrivals = None if spec.rate is None else spec.arrivals()
        await go()
        cpu = time.process_time()
        if arrivals is None:
            self.samples = await self._closed_loop(enumerate(payloads), spec.abandon_after)
        else:
            self.samples = await self._open_loop(payloads, arrivals)
        self.cpu_seconds = time.process_time() - cpu

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()
        if self._http is not None:
            await self._http.close()

    async def _closed_loop(self, payloads: Iterator[tuple[int, bytes]], abandon_after: int | None) -> list[Sample]:
        samples: list[Sample] = []

        async def worker() -> None:
            # The workers share one iterator: each takes the next request when its last is over.
            for index, payload in payloads:
                sample = Sample(due=time.monotonic(), index=self._spec.first_request + index)
                samples.append(sample)
                await self._stream(index, payload, sample, abandon_after)

        await asyncio.gather(*(worker() for _ in range(max(1, self._spec.concurrency))))
        return samples

    async def _open_loop(self, payloads: list[bytes], arrivals: list[float]) -> list[Sample]:
        begin = time.monotonic()
        first = self._spec.first_request
        samples = [Sample(due=begin + due, index=first + index) for index, due in enumerate(arrivals)]
        async with asyncio.TaskGroup() as group:
            for index, (payload, sample) in enumerate(zip(payloads, samples, strict=True)):
                # Late or not, none is left out: a slow server must not slow its own arrivals.
                await asyncio.sleep(max(0.0, sample.due - time.monotonic()))
                group.create_task(self._stream(index, payload, sample, self._spec.abandon_after))
        return samples

    async def _stream_http(self, http: HttpStreams, payload: bytes, sample: Sample, abandon_after: int | None) -> None:
        stamp, count, now = sample.stamps.append, sample.counts.append, time.monotonic

        def on_tokens(size: int) -> bool:
            stamp(now())
            count(size)
            if abandon_after is not None and len(sample.stamps) >= abandon_after:
                sample.outcome = "abandoned"
                return False
            return True

        sample.sent = now()
        sample.reason, sample.reported = await http.stream(payload, on_tokens)
        sample.end = now()
        if not sample.reason and sample.outcome != "abandoned":
            sample.outcome = "finished"
        self.done += 1

    async def _stream(self, index: int, payload: bytes, sample: Sample, abandon_after: int | None) -> None:
        if self._http is not None:
            await self._stream_http(self._http, payload, sample, abandon_after)
            return
        method = self._methods[index % len(self._methods)]
        stamp, count, now = sample.stamps.append, sample.counts.append, time.monotonic
        tokens = 0
        sample.sent = now()
        call = method(payload, timeout=self._spec.timeout, metadata=self._metadata)
        try:
            async for response in call:
                size = len(response.delta.token_ids)
                if size:
                    stamp(now())
                    count(size)
                    tokens += size
                    if abandon_after is not None and tokens >= abandon_after:
                        call.cancel()
                        sample.outcome = "abandoned"
                        break
                elif response.HasField("finished"):
                    sample.outcome = "finished"
        except grpc.RpcError as error:
            decoded = decode(error)
            sample.outcome = "failed"
            sample.reason = str(decoded)
        sample.end = now()
        if sample.outcome == "failed" and not sample.reason:
            sample.reason = "LOST: the stream ended before its end"
        self.done += 1


async def _serve_pipes() -> None:
    loop = asyncio.get_running_loop()
    spec = LoadSpec.from_json(await loop.run_in_executor(None, sys.stdin.readline))
    try:
        generator = Generator(spec)
        await generator.connect()
        await generator.warm_up()
    except TimeoutError:
        _say({"problem": f"no connection to {', '.join(spec.addresses)} within {_CONNECT_SECONDS:.0f} s"})
        return
    except (OSError, ValueError) as error:
        _say({"problem": f"no connection to {', '.join(spec.addresses)}: {error}"})
        return
    except OctavoError as error:
        _say({"problem": error.message})
        return
    payloads = [spec.request(spec.first_request + index) for index in range(spec.requests)]

    async def go() -> None:
        _say({"ready": True})
        if (await loop.run_in_executor(None, sys.stdin.readline)).strip() != "go":
            raise SystemExit(1)  # the parent is gone

    async def report() -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            _say({"done": generator.done})

    reporter = asyncio.create_task(report())
    await generator.run(payloads, go)
    reporter.cancel()
    for sample in generator.samples:
        _say({"sample": sample.to_dict()})
    _say({"end": True, "cpu_seconds": generator.cpu_seconds})
    await generator.close()


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point of the process."""
    try:
        _runner()(_serve_pipes())
    except KeyboardInterrupt:
        sys.exit(130)  # the parent got it, too, and says what there is to say


def _runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run  # somewhat slower, and no dependency of the wheel
    return uvloop.run


if __name__ == "__main__":
    main()
