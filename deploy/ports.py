"""Free ports: the wanted one, or the next above it that nobody holds."""

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
