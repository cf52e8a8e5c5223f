"""Free ports: the wanted one, or the next above it that nobody holds; and ports that stay ours while nobody serves there."""

from __future__ import annotations

import socket

from deploy.readiness import ClusterError
from service.settings import SettingsError, split_address


class NoFreePort(ClusterError):
    """No port near the wanted one can be bound."""


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    try:
        with _bind(host, port) as probe:
            probe.listen(1)
    except OSError:
        return False
    return True


def free_address(wanted: str, taken: set[str], tries: int = 200) -> str:
    """`wanted` (HOST:PORT) or the next port above it that is free and not in `taken`; the result is added to `taken`.

    Someone may bind it before its owner does: the owner then fails and says so. Raises NoFreePort.
    """
    host, _, first = wanted.rpartition(":")
    for port in range(int(first), min(int(first) + tries, 65536)):
        address = f"{host}:{port}"
        if address not in taken and is_free(host.strip("[]"), port):
            taken.add(address)
            return address
    raise NoFreePort(f"no free port among the {tries} from {wanted}")


def reserve(address: str) -> tuple[str, socket.socket | None]:
    """HOST:PORT with a port of its own where it was 0, and what keeps it until closed; None for another form, or a port that is taken.

    A server that sets SO_REUSEADDR, as all of ours do, can serve there, end and serve there again. Between, Linux gives the port to no
    outgoing connection: not to another program's, nor to one that dials this very port and would reach itself.
    """
    try:
        host, port = split_address(address)
        held = _bind(host, port)
    except (SettingsError, OSError):
        return address, None
    return f"{address.rpartition(':')[0]}:{held.getsockname()[1]}", held


def _bind(host: str, port: int) -> socket.socket:
    """As servers do: connections that wait for their end do not hold a port. Raises OSError."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
