"""HTTP/2 by hand (RFC 9113), for peers that no library would let one be."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def headers(path: str) -> bytes:
    """HPACK of a gRPC call without Huffman codes or indexing of our own."""
    fields = [("te", "trailers"), ("content-type", "application/grpc")]
    block = b"\x83\x86" + b"\x04" + _text(path) + b"\x01" + _text("localhost")  # POST, http, :path, :authority
    return block + b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)


def message(data: bytes) -> bytes:
    """gRPC's length prefix."""
    return b"\x00" + struct.pack(">I", len(data)) + data


def _text(value: str) -> bytes:
    raw = value.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, out = len(raw) - 127, bytearray(b"\x7f")
    while rest >= 128:
        out.append(rest % 128 | 128)
        rest //= 128
    return bytes(out) + bytes((rest,)) + raw


class RawConnection:
    """A TCP connection with our half of the preface said, unless told otherwise. Blocking."""

    def __init__(self, address: str, *, preface: bool = True, settings: bytes = b"", timeout: float = 30.0) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=timeout)
        self._received = b""
        self._next_stream = 1
        if preface:
            self.send(PREFACE + frame(SETTINGS, 0, 0, settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """All of it."""
        self.socket.sendall(data)

    def call(self, path: str, data: bytes | None = None, *, end: bool = False) -> int:
        """Begin a call, with a message if there is one; the stream's number."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.send(frame(HEADERS, END_HEADERS, stream, headers(path)))
        if data is not None:
            self.send(frame(DATA, END_STREAM if end else 0, stream, message(data)))
        return stream

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """(kind, flags, stream, payload) of what comes, until the other side closes. Settings and pings are acknowledged.

        Raises TimeoutError where it takes longer than a minute.
        """
        until = time.monotonic() + 60
        while True:
            if time.monotonic() > until:
                raise TimeoutError
            while len(self._received) < 9 or len(self._received) < 9 + int.from_bytes(self._received[:3], "big"):
                try:
                    data = self.socket.recv(1 << 16)
                except ConnectionError:
                    return
                if not data:
                    return
                self._received += data
            length = int.from_bytes(self._received[:3], "big")
            kind, flags = self._received[3], self._received[4]
            stream = int.from_bytes(self._received[5:9], "big")
            payload, self._received = self._received[9 : 9 + length], self._received[9 + length :]
            if kind == SETTINGS and not flags & ACK:
                with contextlib.suppress(OSError):
                    self.send(frame(SETTINGS, ACK, 0))
            if kind == PING and not flags & ACK:
                with contextlib.suppress(OSError):
                    self.send(frame(PING, ACK, 0, payload))
            yield kind, flags, stream, payload

    def closed_within(self, seconds: float) -> bool:
        """Whether the other side ends the connection in that time; reads and drops what comes until then."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                if not self.socket.recv(1 << 16):
                    return True
            except TimeoutError:
                return False
            except ConnectionError:
                return True
        return False

    def close(self) -> None:
        """End it."""
        self.socket.close()
