"""Who may call what: deny by default.

Without a cluster token a service binds loopback only and trusts every caller there. With one, every call but health checks must
carry it. TLS alone encrypts; it lets a service bind elsewhere only together with the token, unless the operator sets neither.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from service.errors import OctavoError, Reason, abort
from service.settings import CommonSettings, SettingsError, is_loopback

_OPEN_PREFIXES = ("/grpc.health.v1.Health/",)


def read_token(path: Path | None) -> str | None:
    """The cluster token, or None where there is none. Raises SettingsError."""
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--cluster-token-file {path}: {error}") from None
    if len(token) < 16:
        raise SettingsError(f"--cluster-token-file {path}: a token of at least 16 characters belongs there")
    return token


def check_binding(settings: CommonSettings, token: str | None) -> None:
    """Refuse to serve strangers: off loopback a cluster token is needed. Raises SettingsError."""
    if token is None and settings.tls_cert is None and not is_loopback(settings.listen):
        raise SettingsError(
            f"--listen {settings.listen} is reachable from other machines: set --cluster-token-file or TLS, or bind 127.0.0.1"
        )
    if token is None and not is_loopback(settings.listen):
        raise SettingsError(f"--listen {settings.listen} with TLS but no --cluster-token-file would let anyone in")


def credentials(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata that proves membership of the cluster."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls through that carry the cluster token, and health checks."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_PREFIXES):
            return handler
        for key, value in handler_call_details.invocation_metadata or ():
            raw = value.encode() if isinstance(value, str) else value
            if key == "authorization" and hmac.compare_digest(raw, self._expected):
                return handler
        return _refuse(handler)


def _refuse(handler: Any) -> Any:
    error = OctavoError(Reason.UNAUTHENTICATED, "this method needs the cluster token (authorization: Bearer …)")

    async def answer(request: Any, context: Any) -> Any:
        await abort(context, error)

    async def stream(request: Any, context: Any) -> Any:
        await abort(context, error)
        yield b""  # pragma: no cover - makes this an async generator

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, answer),
        (False, True): (grpc.unary_stream_rpc_method_handler, stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, answer),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream),
    }
    make, function = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(function, handler.request_deserializer, handler.response_serializer)
