"""Ports that stay ours while nobody serves there."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from deploy.ports import reserve

IP_LOCAL_PORT_RANGE = 51  # linux/in.h, since Linux 6.3


@pytest.fixture
def somebody() -> Iterator[tuple[str, int]]:
    """A server that one can connect to."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()


def gets_port(port: int, to: tuple[str, int]) -> bool:
    """Whether an outgoing connection that has no other choice gets this port."""
    with socket.socket() as caller:
        try:
            caller.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
        except OSError:
            pytest.skip("Linux is older than 6.3: a connection can't be told which port to take")
        try:
            caller.connect(to)
        except OSError:
            return False
        return True


def serve_once(address: str) -> None:
    """As our servers do."""
    host, _, port = address.rpartition(":")
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, int(port)))
        server.listen(1)


def test_a_reserved_port_can_be_served_at_and_is_given_to_no_connection(somebody: tuple[str, int]) -> None:
    address, held = reserve("127.0.0.1:0")
    assert held is not None
    port = int(address.rpartition(":")[2])
    for _ in range(2):
        serve_once(address)
        assert not gets_port(port, somebody)
    held.close()
    assert gets_port(port, somebody)


def test_what_has_no_port_and_what_is_taken_stay_as_they_are(somebody: tuple[str, int]) -> None:
    for address in ("unix:/tmp/x", "none", "a:99999", "::1:0", "a" * 64 + ":0", f"127.0.0.1:{somebody[1]}"):
        assert reserve(address) == (address, None)
