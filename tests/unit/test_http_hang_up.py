"""Clients that hang up, send nothing, too much or garbage, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc

import pytest
from octavo.v1 import scheduler_pb2

from router.http.protocol import Limits
from tests.unit.http_door import Door, door
from tests.unit.http_requests import CHAT, HELLO, one_token, stream
from tests.unit.router_calls import TEXT, say_text
from tests.unit.waiting import eventually


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_hangs_up_cancels_at_once(streamed: bool) -> None:
    async def main() -> None:
        async with door(one_token) as (scheduler, at):
            connections = [await stream(at, stream=streamed, n=2) for _ in range(10)]
            await eventually(lambda: len(scheduler.submits()) == 20)
            if streamed:
                for connection in connections:
                    await connection.head()
            for connection in connections:
                connection.writer.transport.abort()
            await eventually(lambda: len(scheduler.cancels()) == 20, seconds=2)
            assert {c.reason for c in scheduler.cancels()} == {scheduler_pb2.CANCEL_REASON_CLIENT}
            assert at.router.session.num_requests == 0 and at.router.gate.num_inside == 0

    asyncio.run(main())


def test_a_hang_up_is_seen_though_another_request_waits_behind() -> None:
    async def main() -> None:
        async with door(one_token) as (scheduler, at):
            connection = await at.connect()
            for _ in range(2):
                await connection.send("POST", CHAT, {"messages": HELLO})
            await eventually(lambda: len(scheduler.submits()) == 1)
            await asyncio.sleep(0.05)  # the second one has come, too
            connection.writer.transport.abort()
            await eventually(lambda: len(scheduler.cancels()) == 1, seconds=2)
            assert len(scheduler.submits()) == 1 and at.router.gate.num_inside == 0

    asyncio.run(main())


def test_garbage_behind_a_stream_does_not_get_into_it() -> None:
    async def main() -> None:
        async with door(one_token) as (_, at):
            connection = await stream(at)
            await connection.head()
            await connection.send("GET", "/health")  # waits for its turn
            connection.writer.write(b"no http\r\n\r\n")
            async with asyncio.timeout(5):
                rest = await connection.reader.read()
            assert b"HTTP/1.1 400" not in rest
            await eventually(lambda: at.router.session.num_requests == 0)

    asyncio.run(main())


def test_a_request_that_does_not_come_is_hung_up_on() -> None:
    limits = Limits(header_seconds=0.2, body_seconds=0.3, idle_seconds=1, header_bytes=4_000, max_connections=3)

    async def answer(at: Door, *pieces: bytes) -> bytes:
        connection = await at.connect()
        for piece in pieces:
            connection.writer.write(piece)
            await connection.writer.drain()
        async with asyncio.timeout(5):
            data = await connection.reader.read()
        await connection.close()
        return data

    async def main() -> None:
        async with door(say_text, limits=limits) as (_, at):
            assert b" 408 " in await answer(at, b"")
            assert b" 408 " in await answer(at, b"POST / HTTP/1.1\r\nx: ")
            post = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
            assert b" 408 " in await answer(at, post + b"content-length: 10\r\n\r\n{")
            assert b" 408 " in await answer(at, post + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
            assert b" 431 " in await answer(at, b"GET / HTTP/1.1\r\nx: " + b"x" * 5_000)
            assert b" 431 " in await answer(at, b"GET / HTTP/1.1\r\nx: " + b"x" * 9_000 + b"\r\n\r\n")
            assert b" 431 " in await answer(at, b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n")
            assert b" 400 " in await answer(at, b"\x16\x03\x01 no http\r\n\r\n")
            assert b" 400 " in await answer(at, b"GET http://[ HTTP/1.1\r\n\r\n")
            idle = await at.connect()
            await idle.send("GET", "/health")
            assert (await idle.reply()).status == 200
            async with asyncio.timeout(5):
                assert await idle.reader.read() == b""  # after its second
            held = [await at.connect() for _ in range(3)]
            assert b" 503 " in await answer(at, b"")
            for connection in held:
                await connection.close()

    asyncio.run(main())


def test_an_offer_of_another_protocol_is_declined_and_the_body_is_read() -> None:
    """As Java's client does: HTTP/2 on every first request, with a body."""

    async def main() -> None:
        async with door(say_text) as (_, at):
            connection = await at.connect()
            offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAABk"}
            for _ in range(2):
                await connection.send("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 40}, **offer)
                assert (await connection.reply()).json()["choices"][0]["text"] == TEXT
            head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
            body = b'{"prompt": "hello", "max_tokens": 40}'
            for piece in (head, b"content-length: %d\r\n\r\n" % len(body), body[:5], body[5:]):
                connection.writer.write(piece)
                await connection.writer.drain()
                await asyncio.sleep(0.01)
            assert (await connection.reply()).json()["choices"][0]["text"] == TEXT
            await connection.close()
            assert (await at.ask("CONNECT", "x:443")).status == 405

    asyncio.run(main())


def test_bodies_that_are_read_at_once_have_a_bound() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            at.gateway._bodies._max_bytes = 100_000
            held = await at.connect()
            held.writer.write(
                b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 90000\r\n\r\n"
            )
            held.writer.write(b" " * 80_000)
            await eventually(lambda: at.gateway._bodies._held >= 80_000)
            reply = await at.ask("POST", CHAT, {"messages": HELLO, "user": "x" * 30_000})
            assert reply.status == 429
            await held.close()
            await eventually(lambda: at.gateway._bodies._held == 0)
            assert (await at.ask("POST", CHAT, {"messages": HELLO, "user": "x" * 30_000})).status == 200

    asyncio.run(main())


def test_one_connection_serves_many_requests() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            connection = await at.connect()
            for _ in range(3):
                await connection.send("POST", CHAT, {"messages": HELLO})
                assert (await connection.reply()).json()["choices"][0]["message"]["content"] == TEXT
            for _ in range(2):  # pipelined
                await connection.send("GET", "/health")
            for _ in range(2):
                assert (await connection.reply()).status == 200
            await connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_refused_request_is_freed_at_once(streamed: bool) -> None:
    """Not when the collector of cycles comes: an exception keeps every frame that it passed, and those keep the request."""

    async def main() -> None:
        async with door(say_text) as (_, at):
            big = json.dumps({"prompt": "x" * 10_000_000, "stream": streamed}).encode()
            assert (await at.ask("POST", "/v1/completions", big)).status == 400
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                for _ in range(4):
                    assert (await at.ask("POST", "/v1/completions", big)).status == 400
                assert tracemalloc.get_traced_memory()[0] < 15_000_000
            finally:
                tracemalloc.stop()
                gc.enable()

    asyncio.run(main())
