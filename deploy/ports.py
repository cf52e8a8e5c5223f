"""Free ports: the wanted one, or the next above it that nobody holds; and ports that stay ours while nobody serves there."""

from __future__ import annotations

import socket

from deploy.readiness import ClusterError


class NoFreePort(ClusterError):
    """No port near the wanted one can be bound."""


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections that wait for their end do not hold a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
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
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return address, None
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host.strip("[]"), int(port)))
    except OSError:
        held.close()
        return address, None
    return f"{host}:{held.getsockname()[1]}", held
