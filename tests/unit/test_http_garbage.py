"""Bytes that are hardly HTTP at the door: each connection ends in time, nothing is logged as a defect, neighbours are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from random import Random

import pytest

from router.http.protocol import Limits
from tests.fuzz.values import flip
from tests.unit.http_door import Door, door
from tests.unit.router_calls import TEXT, say_text
from tests.unit.waiting import eventually

_BODY = json.dumps({"prompt": "hello", "max_tokens": 40}).encode()
_REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
    % (len(_BODY), _BODY)
)
_CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n"
    b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY)
)
_OTHERS = (
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /v1/models/%ff%00%zz HTTP/1.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\n\r\n",
    b"GET / HTTP/0.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nlast-event-id: \xff:1\r\ncontent-length: 0\r\n\r\n",
)


async def throw(at: Door, data: bytes, random: Random) -> None:
    """In a few pieces; then wait until the server hangs up, or hang up."""
    connection = await at.connect()
    with contextlib.suppress(ConnectionError):
        at_most = random.choice((1 << 20, 40, 7))
        for start in range(0, len(data), at_most):
            connection.writer.write(data[start : start + at_most])
            await connection.writer.drain()
        if random.random() < 0.7:
            async with asyncio.timeout(10):
                await connection.reader.read()
    await connection.close()


@pytest.mark.parametrize("seed", range(2))
def test_garbage(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        limits = Limits(header_seconds=0.15, body_seconds=0.15, idle_seconds=1, header_bytes=2_000)
        random = Random(seed)
        async with door(say_text, limits=limits) as (_, at):
            for _ in range(6):
                valid = [random.choice((_REQUEST, _CHUNKED, _REQUEST * 2, random.choice(_OTHERS))) for _ in range(15)]
                thrown = [flip(random, data) if random.random() < 0.8 else data for data in valid]
                await asyncio.gather(*(throw(at, data, random) for data in thrown))
                reply = await at.ask("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 40})
                assert reply.json()["choices"][0]["text"] == TEXT
            await eventually(lambda: at.router.session.num_requests == 0 and at.router.gate.num_inside == 0)
            await eventually(lambda: not at.server._state.connections)
            assert at.gateway._bodies._held == 0

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    # Not ours: the fake scheduler's end, and what gRPC's poller says on the next loop of one that an earlier test has closed.
    ours = [
        r
        for r in caplog.records
        if r.levelno >= logging.ERROR
        and not r.name.startswith("grpc")
        and "PollerCompletionQueue" not in r.getMessage()
    ]
    assert ours == []
