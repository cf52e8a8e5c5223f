"""What one connection may hold, how long it may take, and how it ends: over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from octavo.v1 import common_pb2
from starlette.types import ASGIApp

from router.http.body import Receive, Scope, Send
from router.http.protocol import HttpProtocol, Limits
from router.http.server import HttpServer
from service.settings import CommonSettings
from tests.unit.http_door import Connection, Door, door
from tests.unit.router_calls import IDS, Message, say_text, stay_silent
from tests.unit.router_fakes import Say, tokens
from tests.unit.waiting import eventually

KEY = "key-of-somebody-0123"
LARGE = 8 << 20
CHUNKED = b"host: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"


async def write(connection: Connection, *pieces: bytes) -> None:
    for piece in pieces:
        connection.writer.write(piece)
        await connection.writer.drain()


def only(at: Door) -> HttpProtocol:
    """The server's end of the only connection."""
    (protocol,) = at.server._state.connections
    assert isinstance(protocol, HttpProtocol)
    return protocol


@pytest.mark.parametrize("trailer", [b"a:b\r\n" * 1_000, b"a" * 5_000])
def test_trailers_are_bounded_and_kept_nowhere(trailer: bytes) -> None:
    """Many of them, and one that does not end; whoever calls without a key sends them too."""

    async def main() -> None:
        async with door(say_text, keys=f"{KEY} team\n") as (_, at):
            connection = await at.connect()
            await write(connection, b"POST /v1/chat/completions HTTP/1.1\r\n" + CHUNKED + b"\r\n0\r\n")
            assert (await connection.head())[0] == 401
            protocol = only(at)
            await write(connection, trailer)
            await eventually(lambda: protocol._header_bytes > 0)
            assert len(protocol.headers) == 3
            for _ in range(100):
                await write(connection, trailer)
            await eventually(lambda: protocol._refused)
            assert len(protocol.headers) == 3
            async with asyncio.timeout(5):
                assert b" 431 " in await connection.reader.read()
            await connection.close()

    asyncio.run(main())


def test_trailers_in_one_read_are_no_headers() -> None:
    async def main() -> None:
        async with door(say_text, keys=f"{KEY} team\n") as (_, at):
            connection = await at.connect()
            get = b"GET /v1/models HTTP/1.1\r\n" + CHUNKED + b"\r\n0\r\n"
            await write(connection, get + f"authorization: Bearer {KEY}\r\n\r\n".encode())
            assert (await connection.reply()).status == 401
            post = b"POST /v1/completions HTTP/1.1\r\n" + CHUNKED + f"authorization: Bearer {KEY}\r\n".encode()
            body = b'{"prompt": "hello", "max_tokens": 40}'
            for trailers in (b"last-event-id: req-x:1\r\n", b"content-encoding: br\r\nexpect: 100-continue\r\n", b""):
                await write(connection, post + b"\r\n%x\r\n%s\r\n0\r\n%s\r\n" % (len(body), body, trailers))
                assert (await connection.reply()).status == 200
            await connection.close()

    asyncio.run(main())


def test_what_stands_around_a_body_is_no_long_header() -> None:
    """Chunks with more bytes around them as in them, and a body beside the next request's head, are no long headers."""

    async def main() -> None:
        async with door(say_text, limits=Limits(header_bytes=4_000)) as (_, at):
            connection = await at.connect()
            body = b'{"prompt": "hello", "max_tokens": 40}'
            chunks = b"".join(b"1\r\n \r\n" for _ in range(3_000)) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            post = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
            await write(connection, post + b"transfer-encoding: chunked\r\n\r\n", *(chunks[:7_001], chunks[7_001:]))
            assert (await connection.reply()).status == 200
            padded = body + b" " * 9_000
            await write(connection, post + b"content-length: %d\r\n\r\n" % len(padded) + padded + b"GET /health HT")
            assert (await connection.reply()).status == 200
            await write(connection, b"TP/1.1\r\n\r\n")
            assert (await connection.reply()).status == 200
            await connection.close()

    asyncio.run(main())


def test_empty_lines_are_no_request_and_keep_no_connection() -> None:
    async def main() -> None:
        async with door(say_text, limits=Limits(idle_seconds=0.2)) as (_, at):
            connection = await at.connect()
            await connection.send("GET", "/health")
            assert (await connection.reply()).status == 200
            protocol = only(at)
            await write(connection, b"\r\n")
            await eventually(lambda: protocol._header_bytes > 0)
            async with asyncio.timeout(5):
                assert await connection.reader.read() == b""
            await connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    "rest",
    [
        b"POST / HTTP/1.1\r\nx: ",
        b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",
    ],
)
def test_a_request_that_does_not_come_waits_for_the_answer_before_it_and_no_longer(rest: bytes, streamed: bool) -> None:
    """The answer takes longer than the next request may, which neither ends the answer nor is forgotten."""
    handles: list[tuple[Say, int]] = []

    async def script(message: Message, say: Say) -> None:
        if message.HasField("submit"):
            handles.append((say, message.submit.handle))

    async def main() -> None:
        async with door(script, limits=Limits(header_seconds=0.1, body_seconds=0.1)) as (_, at):
            connection = await at.connect()
            await connection.send("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 9, "stream": streamed})
            await write(connection, rest)
            await eventually(lambda: bool(handles))
            protocol, first = only(at), None
            await eventually(lambda: protocol._timer is not None)
            first = protocol._timer
            await eventually(lambda: protocol._timer is not first)  # it was looked at, and set again
            (say, handle) = handles[0]
            await say(tokens(0, (handle, 0, IDS[:1], common_pb2.FINISH_REASON_LENGTH)))
            async with asyncio.timeout(5):
                assert (await connection.reply()).status == 200
                assert (await connection.reply()).status == 408
                assert await connection.reader.read() == b""
            await connection.close()

    asyncio.run(main())


def test_a_request_that_began_during_an_answer_has_no_idle_time() -> None:
    """The answer before it ends while it is on its way, which sets the timer for idle connections."""

    async def main() -> None:
        async with door(stay_silent, limits=Limits(idle_seconds=60)) as (_, at):
            connection = await at.connect()
            await connection.send("GET", "/health")
            await write(connection, b"POST /v1/completions HT")
            assert (await connection.reply()).status == 200
            protocol = only(at)
            body = b'{"prompt": "hello", "max_tokens": 40}'
            await write(
                connection,
                b"TP/1.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body),
            )
            await eventually(lambda: protocol._running is protocol.cycle and not protocol.cycle.response_complete)
            assert protocol.timeout_keep_alive_task is None and protocol._timer is None
            await connection.close()

    asyncio.run(main())


@asynccontextmanager
async def serving(app: ASGIApp, limits: Limits | None = None) -> AsyncIterator[tuple[HttpServer, Connection]]:
    """An application behind the door, and a connection whose buffers are small."""
    server = HttpServer(app, CommonSettings(), "127.0.0.1:0", limits)
    await server.start()
    host, _, port = server.address.rpartition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    connection = Connection(*await asyncio.open_connection(sock=sock, limit=1 << 14))
    try:
        yield server, connection
    finally:
        await connection.close()
        await server.stop(0)


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    """8 MiB at once."""
    headers = [(b"content-length", b"%d" % LARGE)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * LARGE})


def test_an_answer_that_is_still_in_the_buffers_arrives_before_the_server_stops() -> None:
    async def main() -> None:
        async with serving(large) as (server, connection):
            await connection.send("GET", "/")
            assert (await connection.head())[0] == 200
            await eventually(lambda: not server._state.tasks)  # for the application it has ended
            stopping = asyncio.create_task(server.stop(30))
            await eventually(lambda: all(one.transport.is_closing() for one in server._state.connections))
            async with asyncio.timeout(30):
                assert len(await connection.reader.readexactly(LARGE)) == LARGE
                await stopping

    asyncio.run(main())


def test_a_server_that_stops_hangs_up_on_who_reads_nothing() -> None:
    async def main() -> None:
        async with serving(large) as (server, connection):
            await connection.send("GET", "/")
            assert (await connection.head())[0] == 200
            async with asyncio.timeout(20):
                await server.stop(0.1)
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await connection.reader.readexactly(LARGE)

    asyncio.run(main())


def test_a_client_that_reads_slowly_is_waited_for_and_one_that_does_not_read_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits, looks = Limits(write_seconds=1.0), 0
    look = HttpProtocol._look_at_writing

    def counted(protocol: HttpProtocol, before: int) -> None:
        nonlocal looks
        looks += 1
        look(protocol, before)

    monkeypatch.setattr(HttpProtocol, "_look_at_writing", counted)

    async def main() -> None:
        async with serving(large, limits) as (_, connection):
            await connection.send("GET", "/")
            assert (await connection.head())[0] == 200
            taken = 0
            async with asyncio.timeout(50):
                while taken < LARGE:
                    data = await connection.reader.read(1 << 16)
                    assert data
                    taken += len(data)
                    if looks < 2:
                        await asyncio.sleep(0.03)  # that is what is slow about it
            assert looks >= 2
        async with serving(large, limits) as (server, connection):
            await connection.send("GET", "/")
            await eventually(lambda: bool(server._state.connections))
            await eventually(lambda: not server._state.connections)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await connection.reader.readexactly(LARGE)

    asyncio.run(main())
