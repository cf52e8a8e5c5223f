"""Who may call what: deny by default.

Without a cluster token and API keys a service binds loopback only and trusts every caller there. With either, every call but health
checks must carry one of them: the cluster token opens everything, a key what clients need, and the methods of admins only if it is
an admin's. TLS alone encrypts; it lets a service bind elsewhere only together with the token or keys.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from service.errors import OctavoError, Reason, abort
from service.keys import Authenticator, Caller, Role
from service.settings import CommonSettings, SettingsError, is_loopback, unreadable

_OPEN_PREFIXES = ("/grpc.health.v1.Health/",)
# What a client's key opens; everything else is for admins, also what is added later and forgotten here.
_CLIENT_PREFIXES = ("/octavo.v1.InferenceService/", "/grpc.reflection.")

Metadata = Iterable[tuple[str, str | bytes]]


def read_token(path: Path | None) -> str | None:
    """The cluster token, or None where there is none. Raises SettingsError."""
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise unreadable("--cluster-token-file", path, error) from None
    if len(token) < 16:
        raise SettingsError(f"--cluster-token-file {path}: a token of at least 16 characters belongs there")
    return token


def check_binding(
    settings: CommonSettings,
    token: str | None,
    *,
    has_keys: bool = False,
    flag: str = "--listen",
    listen: str | None = None,
) -> None:
    """Refuse to serve strangers: off loopback a cluster token or API keys are needed. Raises SettingsError.

    `flag` with its value `listen`: of a further door; the process's own --listen if absent.
    """
    listen = settings.listen if listen is None else listen
    if token is not None or has_keys or is_loopback(listen):
        return
    needed = "--cluster-token-file, or at a router --api-keys or OCTAVO_API_KEY_LIST"
    if settings.tls_cert is None:
        raise SettingsError(f"{flag} {listen} is reachable from other machines: set {needed}; or bind 127.0.0.1")
    raise SettingsError(f"{flag} {listen} with TLS alone would let anyone in: set {needed}")


def credentials(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata that proves membership of the cluster."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def caller_of(authenticator: Authenticator, metadata: Metadata | None) -> Caller | None:
    """Who calls, by the metadata of the call."""
    return authenticator.identify(_authorization(metadata))


def _authorization(metadata: Metadata | None) -> str | None:
    value = next((value for key, value in metadata or () if key == "authorization"), None)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def may_call(role: Role, method: str) -> bool:
    """Whether callers of this role may call /SERVICE/METHOD."""
    return role is Role.ADMIN or method.startswith(_CLIENT_PREFIXES)


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls through whose caller is known and may make them, and health checks."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN_PREFIXES):
            return handler
        authorization = _authorization(handler_call_details.invocation_metadata)
        caller = self._authenticator.identify(authorization)
        if caller is None:
            why = self._authenticator.refusal(authorization)
            return _refuse(handler, OctavoError(Reason.UNAUTHENTICATED, why))
        if not may_call(caller.role, method):
            return _refuse(handler, OctavoError(Reason.PERMISSION_DENIED, "this method is for admins"))
        return handler


def _refuse(handler: Any, error: OctavoError) -> Any:
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
    # A stranger's bytes are not even parsed.
    return make(function, None, handler.response_serializer)
