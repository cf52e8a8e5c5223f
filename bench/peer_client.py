"""One load client for any server of OpenAI's /v1/completions, ours or another, so that both are measured by the same hand.

    python -m bench.peer_client --url http://127.0.0.1:50080 [URL …] --model NAME --n 512 --plen 128 --olen 128 \\
        [--rate 32|inf] [--concurrency 256] [--procs 4] [--vocab 128000] [--seed 0] [--out FILE.jsonl] [--label X]

Each request streams `olen` tokens, at temperature 0 and whatever the model would end with, for `plen` random token ids. The requests
are split over processes, so that it is not this client's Python that is measured, and the processes over the URLs. Arrivals at a
finite rate are Poisson's, always the same.
A token's time is when its server-sent event was read; an event of several tokens counts once for `itl`, and tokens are counted by the
server's own usage. `ttft` is from the moment a request is sent: one that waits for `--concurrency` is not sent yet. `max_late_s` says
how long one waited for that at most. Prints one line of JSON, times in ms; the exit code is 1 where a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_START_S = 1.0  # until all processes run
_READ_LIMIT = 1 << 20  # bytes of a line


@dataclass(frozen=True, slots=True)
class Result:
    """Of one request, in seconds of CLOCK_MONOTONIC, one clock for all processes. `error`: empty where it was answered."""

    due: float
    sent: float
    times: tuple[float, ...]
    tokens: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """What one process sends: bodies of requests, and when each is due after `start`."""

    host: str
    port: int
    concurrency: int
    start: float
    requests: tuple[tuple[float, bytes], ...]


class Sender:
    """The requests of one process, over connections that are used again."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._slots = asyncio.Semaphore(share.concurrency)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self) -> list[Result]:
        """All of them, in order."""
        async with asyncio.TaskGroup() as group:
            tasks = []
            for offset, body in self._share.requests:
                due = self._share.start + offset
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(group.create_task(self._send(due, body)))
        for _, writer in self._idle:
            writer.close()
        return [task.result() for task in tasks]

    async def _send(self, due: float, body: bytes) -> Result:
        async with self._slots:
            sent = time.perf_counter()
            times: list[float] = []
            writer = None
            try:
                reader, writer = self._idle.pop() if self._idle else await self._connect()
                head = (
                    f"POST /v1/completions HTTP/1.1\r\nHost: {self._share.host}\r\nContent-Type: application/json\r\n"
                )
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                tokens = await self._read(reader, times)
            except (OSError, EOFError, ValueError) as error:
                if writer is not None:
                    writer.close()
                return Result(due, sent, tuple(times), 0, f"{type(error).__name__}: {error}")
            self._idle.append((reader, writer))
            return Result(due, sent, tuple(times), tokens)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._share.host, self._share.port, limit=_READ_LIMIT)

    async def _read(self, reader: asyncio.StreamReader, times: list[float]) -> int:
        """Tokens by the server's usage; `times` gets a moment for each event with a choice. Raises ValueError for any other answer."""
        status = await reader.readline()
        if status.split()[1:2] != [b"200"]:
            raise ValueError(
                f"{status.decode(errors='replace').strip()} {(await reader.read(600)).decode(errors='replace')}"
            )
        while (await reader.readline()).strip():
            pass
        tokens, done, rest = None, False, b""
        while size := int((await reader.readline()).split(b";")[0], 16):
            data = await reader.readexactly(size + 2)
            now = time.perf_counter()
            *lines, rest = (rest + data[:-2]).split(b"\n")  # a chunk need not end where an event does
            for line in lines:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(f"the stream broke: {event['error']}")
                    if event.get("choices"):
                        times.append(now)
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                done = done or line.strip() == b"data: [DONE]"
        await reader.readline()
        if tokens is None or not done or not times:
            raise ValueError("the stream ended without its usage or its end")
        return int(tokens)


def send(share: Share) -> list[Result]:
    """The requests of one process, in that process."""
    return asyncio.run(Sender(share).run())


def measure(
    urls: Sequence[str],
    model: str,
    n: int,
    plen: int,
    olen: int,
    rate: float,
    concurrency: int,
    procs: int,
    vocab: int,
    seed: int,
) -> list[Result]:
    """Sends `n` requests at `rate` a second from `procs` processes, with `concurrency` at once in all; token ids are below `vocab`."""
    places = [urlsplit(url) for url in urls]
    prompts, arrivals = random.Random(seed), random.Random(0)
    common = {"model": model, "max_tokens": olen, "temperature": 0, "ignore_eos": True, "stream": True}
    common["stream_options"] = {"include_usage": True}
    requests: list[tuple[float, bytes]] = []
    due = 0.0
    for _ in range(n):
        ids = [prompts.randrange(vocab) for _ in range(plen)]
        requests.append((due, json.dumps({**common, "prompt": ids}).encode()))
        due += 0.0 if math.isinf(rate) else arrivals.expovariate(rate)
    start = time.perf_counter() + _START_S
    shares = [
        Share(
            places[rank % len(places)].hostname or "127.0.0.1",
            places[rank % len(places)].port or 80,
            max(1, concurrency // procs),
            start,
            tuple(requests[rank::procs]),
        )
        for rank in range(procs)
    ]
    with ProcessPoolExecutor(procs, multiprocessing.get_context("spawn")) as pool:
        return [result for results in pool.map(send, shares) for result in results]


def summary(results: Sequence[Result], olen: int) -> dict[str, Any]:
    """The figures; only the counts where every request failed."""
    good = [result for result in results if not result.error]
    counts = {"n": len(good), "failed": len(results) - len(good)}
    if not good:
        return counts
    tokens = sum(result.tokens for result in good)
    wall = max(result.times[-1] for result in good) - min(result.due for result in results)
    ttft = [1e3 * (result.times[0] - result.sent) for result in good]
    itl = [1e3 * (b - a) for result in good for a, b in zip(result.times, result.times[1:], strict=False)]
    tpot = [1e3 * (result.times[-1] - result.times[0]) / max(1, result.tokens - 1) for result in good]
    return {
        **counts,
        "wall_s": round(wall, 3),
        "out_tokens": tokens,
        "right_lengths": all(result.tokens == olen for result in good),
        "chunks": sum(len(result.times) for result in good),
        "out_tok_s": round(tokens / wall, 1),
        "ttft_p50": round(_percentile(ttft, 50), 2),
        "ttft_p99": round(_percentile(ttft, 99), 2),
        "itl_p50": round(_percentile(itl, 50), 3),
        "itl_p99": round(_percentile(itl, 99), 3),
        "tpot_p50": round(_percentile(tpot, 50), 3),
        "max_late_s": round(max(result.sent - result.due for result in good), 3),
    }


def _percentile(values: list[float], percent: float) -> float:
    """0 where there are none, as of gaps where every answer was one event."""
    values = sorted(values)
    return values[min(len(values) - 1, int(percent / 100 * len(values)))] if values else 0.0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", nargs="+", default=["http://127.0.0.1:50080"])
    parser.add_argument("--model", required=True)
    counts = {"n": 512, "plen": 128, "olen": 128, "concurrency": 256, "procs": 4, "vocab": 128_000, "seed": 0}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=math.inf, help="requests a second, or inf")
    parser.add_argument("--out", type=Path, help="a file that gets the line too")
    parser.add_argument("--label", default="")
    given = parser.parse_args()
    shape = (given.n, given.plen, given.olen, given.rate, given.concurrency, given.procs, given.vocab, given.seed)
    results = measure(given.url, given.model, *shape)
    rate = "inf" if math.isinf(given.rate) else given.rate
    named = {"label": given.label, "rate": rate, "concurrency": given.concurrency}
    line = json.dumps(named | summary(results, given.olen))
    print(line, flush=True)
    if given.out:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    errors = [result.error for result in results if result.error]
    if errors:
        print("first error:", errors[0][:500], file=sys.stderr)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
