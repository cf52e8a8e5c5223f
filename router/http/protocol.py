"""uvicorn's HTTP protocol with the bounds it lacks: on headers, on how long a request takes to come, on clients that read nothing."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.http.errors import Problem

_LINGER_SECONDS = 1.0
_MAX_PIPELINED = 8
_OFFER = (b"connection", b"upgrade", b"http2-settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one connection; times in seconds."""

    header_bytes: int = 32 << 10
    header_seconds: float = 10.0  # from the connection, or a request's first byte, to the end of its headers
    body_seconds: float = 60.0
    idle_seconds: float = 75.0  # between requests
    write_seconds: float = 30.0  # in which a client that is waited for has to take anything at all
    max_connections: int = 4_096


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self.timeout_keep_alive = limits.idle_seconds  # type: ignore[assignment]  # a float will do
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._header_bytes = 0  # and those of trailers and chunk heads: of all that is no body
        self._uncounted = 0
        self._refusal: Problem | None = None
        self._refused = False
        self._running: RequestResponseCycle | None = None
        self.gone: asyncio.Future[None] = self.loop.create_future()  # when the connection is

    # ---- the connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(
                Problem(503, "this server has as many connections as it takes", headers=(("retry-after", "1"),))
            )
            return
        _find_dead_peers(transport.get_extra_info("socket"))
        self._arm(self._limits.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        if self._write_timer is not None:
            self._write_timer.cancel()
        self.pipeline.clear()
        if (
            self._running is not None and not self._running.response_complete
        ):  # uvicorn tells the last one that came, not this
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        if not self.gone.done():
            self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._uncounted = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self.send_400_response("")
        self._header_bytes += self._uncounted
        if self._header_bytes > self._limits.header_bytes:
            self._refuse(_headers_too_large(self._limits))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch_writing(self._unacknowledged())

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _watch_writing(self, before: int) -> None:
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self._look_at_writing, before)

    def _look_at_writing(self, before: int) -> None:
        """Nothing is written while it is paused, so what a slow client has taken shows."""
        left = self._unacknowledged()
        if left < before:
            self._watch_writing(left)
        else:
            self.transport.abort()

    def _unacknowledged(self) -> int:
        """Bytes that the client has yet to take. The kernel's are looked at too: it takes ours in lumps, of which each may last a slow
        client longer than `write_seconds`.
        """
        size = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0 or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return size
        return size + int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    # ---- a request

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()  # and not for empty lines, which the parser skips
        self.scope["extensions"] = {"octavo.abort": self.transport.abort}  # type: ignore[dict-item]
        self._in_headers = True
        self._header_bytes = 0
        if self._timer is None:
            self._arm(self._limits.header_seconds, self._too_slow)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)
        # else a trailer: nobody reads one, and as a header it would come after all that was decided by the headers

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._start_counting()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.header_bytes:
            self._refusal = _headers_too_large(self._limits)
            raise ValueError  # the parser passes it on as a bad request
        if self.parser.should_upgrade():
            return
        self._arm(self._limits.body_seconds, self._too_slow)
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= _MAX_PIPELINED:
            self.flow.resume_reading()  # or nobody would see the client hang up

    def on_chunk_header(self) -> None:
        """The parser's: a chunk's size was read. After the last one, trailers may follow."""
        self._start_counting()

    def on_body(self, body: bytes) -> None:
        self._uncounted = max(0, self._uncounted - len(body))
        super().on_body(body)

    def _start_counting(self) -> None:
        """From the next read on: where in this one we are is not known, and it is bounded anyway."""
        self._header_bytes = self._uncounted = 0

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._disarm()
        super().on_message_complete()

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """A client may offer another protocol, as Java's does, and we decline. The parser has taken the offer and left the body
        unread, so another one gets the request without it.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(Problem(405, "this is no proxy"))
            return
        lines = [method + b" " + self.url + b" HTTP/1.1"]
        lines += [name + b": " + value for name, value in self.headers if name not in _OFFER]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        self._unset_keepalive_if_required()  # set when an answer ended while this request was on its way
        if cycle is self.cycle and cycle.more_body:  # it may have waited, and its body with it
            self._arm(self._limits.body_seconds, self._too_slow)
        super()._start_asgi_task(cycle, app)

    # ---- refusals

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or Problem(400, "this is no valid HTTP request"))

    def _too_slow(self) -> None:
        running = self._running
        if (
            running is not None
            and not running.response_complete
            and (running.response_started or not running.more_body)
        ):
            # Its answer did not wait for the body, or it is the next request that does not come: the answer goes before.
            self._arm(self._limits.header_seconds if self._in_headers else self._limits.body_seconds, self._too_slow)
            return
        self._timer = None
        self._refuse(Problem(408, "the request did not come in time"))

    def _refuse(self, problem: Problem) -> None:
        """Answer past the application, which hears that the client is gone, and hang up."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        running = self._running  # of several requests that came together the one that is answered
        if running is None or running.response_complete or not running.response_started:
            body = problem.body()
            head = [STATUS_LINE[problem.status], b"content-type: application/json\r\nconnection: close\r\n"]
            head += [f"{name}: {value}\r\n".encode() for name, value in problem.headers]
            self.transport.write(b"".join(head) + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.pipeline.clear()
        if running is not None and not running.response_complete:
            running.waiting_for_100_continue = False
            running.disconnected = True
            running.message_event.set()
        if (
            self.transport.can_write_eof()
        ):  # closed at once, what the client still sends would destroy the answer on its way
            self.transport.write_eof()
            self._arm(_LINGER_SECONDS, self.transport.abort)
        else:
            self._disarm()
            self.transport.close()

    def _arm(self, seconds: float, callback: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, callback)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _headers_too_large(limits: Limits) -> Problem:
    return Problem(431, f"the headers may have {limits.header_bytes} bytes at most")


def _find_dead_peers(sock: Any) -> None:
    """As gRPC's keepalive does: a peer that vanished is found after some 20 s."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)
