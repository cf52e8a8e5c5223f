"""Where the routers are and how to reach them: addresses, TLS, token, channel options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

MESSAGE_BYTES = 16 << 20
CLUSTER_FILE = Path(".run") / "cluster.json"

_DEFAULTS = {"router": "127.0.0.1:50051", "scheduler": "127.0.0.1:50061"}
_VARIABLES = {"router": "OCTAVO_ADDRESS", "scheduler": "OCTAVO_SCHEDULER"}

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Finds a router that is there but answers no more. Our servers permit a ping every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Dial a restarted router soon, not after gRPC's two minutes of backoff; but give a connection time to come up.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
)


class ConnectionProblem(Exception):
    """Settings of a connection that can't be used; one sentence."""


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach one kind of service. Frozen; channels are opened from it and owned by whoever opens them."""

    addresses: tuple[str, ...]
    token: str | None = None
    tls: bool = False
    tls_ca: bytes | None = None  # PEM; the system's certificates if None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What proves to the service who calls."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def open_aio(self, address: str) -> grpc.aio.Channel:
        """A channel for asyncio, dialled on first use."""
        if not self.tls:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(self.tls_ca), options=_OPTIONS)

    def open_sync(self, address: str) -> grpc.Channel:
        """A channel for threads, dialled on first use."""
        if not self.tls:
            return grpc.insecure_channel(address, options=_OPTIONS)
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(self.tls_ca), options=_OPTIONS)


def connect_to(
    address: str | Sequence[str] | None = None,
    *,
    service: str = "router",
    token: str | None = None,
    token_file: Path | None = None,
    tls: bool = False,
    tls_ca: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Connection:
    """Settings from arguments, then from OCTAVO_* variables, then from the cluster file of `make up`, then defaults.

    `service` is "router" or "scheduler"; several addresses are given as a sequence or separated by commas. `token` is the cluster
    token or, for a router, an API key; their variables are OCTAVO_CLUSTER_TOKEN_FILE and OCTAVO_API_KEY, of which the latter
    goes first and is not sent to schedulers. Raises ConnectionProblem.
    """
    env = os.environ if environ is None else environ
    return Connection(
        addresses=_find_addresses(address, service, env),
        token=token if token is not None else _find_token(token_file, service, env),
        tls=tls or tls_ca is not None,
        tls_ca=None if tls_ca is None else _read(tls_ca),
    )


def _find_addresses(given: str | Sequence[str] | None, service: str, env: Mapping[str, str]) -> tuple[str, ...]:
    if given is None:
        given = env.get(_VARIABLES[service]) or _from_cluster_file(service) or _DEFAULTS[service]
    parts = given.split(",") if isinstance(given, str) else given
    addresses = tuple(part.strip() for part in parts if part.strip())
    if not addresses:
        raise ConnectionProblem(f"no address of a {service} given")
    return addresses


def _from_cluster_file(service: str) -> Sequence[str] | None:
    if not CLUSTER_FILE.is_file():
        return None
    try:
        addresses = json.loads(CLUSTER_FILE.read_text()).get(service)
    except (OSError, ValueError, AttributeError) as error:
        raise ConnectionProblem(f"{CLUSTER_FILE}: {error}; name the address yourself") from None
    if not addresses:
        return None
    if not isinstance(addresses, list) or not all(isinstance(item, str) for item in addresses):
        raise ConnectionProblem(f"{CLUSTER_FILE}: {service!r} is not a list of addresses")
    return addresses


def _find_token(path: Path | None, service: str, env: Mapping[str, str]) -> str | None:
    """An API key opens routers only: schedulers know the cluster token and nothing else."""
    key, variable = env.get("OCTAVO_API_KEY"), env.get("OCTAVO_CLUSTER_TOKEN_FILE")
    if path is None and key and service == "router":
        return _checked("OCTAVO_API_KEY", key.strip())
    path = path or (Path(variable) if variable else None)
    if path is None:
        return None
    try:
        return _checked(str(path), _read(path).decode().strip())
    except UnicodeDecodeError as error:
        raise ConnectionProblem(f"{path}: {error}") from None


def _checked(where: str, token: str) -> str:
    """gRPC would refuse anything else as metadata, and not say why."""
    if not token.isascii() or not token.isprintable():
        raise ConnectionProblem(f"{where}: a token is one line of ASCII characters")
    return token


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConnectionProblem(f"{path}: {error.strerror or error}") from None
