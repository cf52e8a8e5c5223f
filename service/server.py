"""A gRPC server as all our services run it: limits, keepalive, health, reflection, tokens, TLS; and channels to others."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from service.auth import AuthInterceptor, check_binding, read_token
from service.binding import not_bound, patiently
from service.decoding import DecodeInterceptor
from service.keys import ApiKeys, Authenticator
from service.settings import CommonSettings, SettingsError, split_address

PUBLIC_MESSAGE_BYTES = 16 << 20
INTERNAL_MESSAGE_BYTES = 64 << 20

KEEPALIVE_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 10_000
HANDSHAKE_MS = 10_000
MAX_CONNECTIONS = 4_096
MAX_STREAMS = 4_096  # of one connection; a client's further calls wait for the end of others

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """One gRPC server with health (NOT_SERVING until told) and reflection. Owned by the event loop that starts it."""

    def __init__(
        self,
        settings: CommonSettings,
        services: Sequence[str],
        max_message_bytes: int,
        keys: ApiKeys | None = None,
    ) -> None:
        """`services` are full service names for health and reflection. Raises SettingsError for an unsafe binding."""
        token = read_token(settings.cluster_token_file)
        check_binding(settings, token, has_keys=keys is not None)
        self.authenticator = Authenticator(token, keys)
        self._settings = settings
        self._services = tuple(services)
        self._health = HealthServicer()
        self.grpc = grpc.aio.server(
            interceptors=[
                *([] if self.authenticator.is_open else [AuthInterceptor(self.authenticator)]),
                DecodeInterceptor(),
            ],
            options=_server_options(max_message_bytes),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            [
                *self._services,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ],
            self.grpc,
        )
        self.address = ""

    async def start(self, stopping: asyncio.Event | None = None) -> str:
        """Bind and serve; health stays NOT_SERVING. Returns the address that others can dial. Raises SettingsError.

        `stopping`: a taken address is waited for no longer.
        """
        await self.set_serving(False)
        listen = self._settings.listen

        async def bind() -> int:
            await asyncio.to_thread(_check_free, listen)  # it may have to resolve a name
            try:
                return self._bind(listen)
            except RuntimeError:  # gRPC says no more than that
                raise _not_bound(listen) from None

        port = await patiently(bind, stopping)
        await self.grpc.start()
        if self._settings.advertise:
            self.address = self._settings.advertise
        elif listen.startswith("unix:"):
            self.address = listen
        else:
            self.address = f"{listen.rpartition(':')[0]}:{port}"
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """Tell health checkers, for the process ("") and for each service."""
        for service in ("", *self._services):
            await self._health.set(service, _SERVING if serving else _NOT_SERVING)

    async def stop(self, grace: float | None) -> None:
        """Close the listener, let calls run for `grace` seconds, then cancel them. Call set_serving(False) well before."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace)

    async def close(self) -> None:
        """Stop at once, whether it was started or not: gRPC's server must not outlive its event loop. Harmless after `stop`."""
        await self.grpc.stop(None)

    def _bind(self, listen: str) -> int:
        settings = self._settings
        if not listen.startswith("unix:"):
            split_address(listen)
        if settings.tls_cert is None or settings.tls_key is None:
            return self.grpc.add_insecure_port(listen)
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        return self.grpc.add_secure_port(listen, grpc.ssl_server_credentials([pair]))


def open_channel(settings: CommonSettings, address: str, window_bytes: int | None = None) -> grpc.aio.Channel:
    """A channel to another process of the cluster. Authenticate calls with `auth.credentials`.

    `window_bytes`: about as much of a stream may be under way towards us; else gRPC lets it grow to megabytes where we read slowly.
    """
    options = [
        ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
        # Dial again soon: a restarted peer must not wait for gRPC's two minutes of backoff.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 2_000),  # also the time that a connection may take to stand
        ("grpc.max_reconnect_backoff_ms", 500),
        # Each channel owns its connection; the global pool would share one between a dead and a new stream.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if window_bytes is not None:
        options += [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", window_bytes)]
    if settings.tls_ca is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(settings.tls_ca.read_bytes()), options=options)


def _check_free(listen: str) -> None:
    """Raises SettingsError where HOST:PORT can't be bound, AddressTaken where somebody has it.

    gRPC writes such a failure to stderr in words of its own and does not tell its caller why.
    """
    if listen.startswith("unix:"):
        return
    host, port = split_address(listen)
    problem: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                    return  # one is enough for gRPC, too
                except OSError as error:
                    problem = error
    except OSError as error:
        problem = error
    if problem is not None:
        raise not_bound("--listen", listen, problem)


def _not_bound(listen: str) -> SettingsError:
    if listen.startswith("unix:"):
        folder = "its folder must exist and be writable, and its path be shorter than 108 bytes"
        return SettingsError(f"--listen {listen}: no socket can be made there: {folder}")
    return not_bound("--listen", listen, OSError(errno.EADDRINUSE, ""))  # it was free a moment ago


def _server_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
        # Two processes must never share a port by accident.
        ("grpc.so_reuseport", 0),
        # Clients may ping every 10 s; more often is answered by GOAWAY too_many_pings.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A peer that vanished without a word, or whose socket takes nothing any more, is found after a ping and its timeout.
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # One that connects and says nothing, one that has had nothing to say for long (clients dial again when they have), and many.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", 600_000),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
    ]
