"""Requests whose bytes are no message. gRPC's asyncio server answers UNKNOWN and logs a traceback; here they are refused by name.
So are those whose parsing would keep the event loop from everyone else.

Streams read their messages themselves: a read raises DecodeError, which their handlers answer. An answer may be bytes:
then its handler has encoded it, and not in one go.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.errors import FieldViolation, OctavoError, Reason, abort
from service.wire import find_excess

# A message up to this size is parsed whatever it holds: some milliseconds.
_SMALL_BYTES = 256 << 10
# 10,000 messages of a chat with a role and a part have 50,000.
_MAX_FIELDS = 1 << 16


class DecodeInterceptor(grpc.aio.ServerInterceptor):
    """For methods that take one request."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any]] = {}  # by method: its handler, and what was made of it

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The method's handler, made to refuse what can't be decoded."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        made = self._made.get(handler_call_details.method)
        if made is None or made[0] is not handler:
            made = self._made[handler_call_details.method] = (handler, _refusing(handler))
        return made[1]


def _refusing(handler: Any) -> Any:
    if handler.request_streaming or handler.request_deserializer is None:
        return handler
    behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    if inspect.isasyncgenfunction(behaviour):
        wrapped: Any = _generating(behaviour)
    elif inspect.iscoroutinefunction(behaviour):
        wrapped = _awaited(behaviour)
    else:
        return handler
    return make(wrapped, _or_error(handler.request_deserializer), _unless_bytes(handler.response_serializer))


def _or_error(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`decode` is FromString of a message class. An error is returned: gRPC would hide one that is raised."""
    descriptor = decode.__self__.DESCRIPTOR  # type: ignore[attr-defined]

    def safe(data: bytes) -> Any:
        excess = find_excess(_MAX_FIELDS, data, descriptor) if len(data) > _SMALL_BYTES else ""
        if excess:
            why = f"the request has more than {_MAX_FIELDS:,} fields and entries, and was not read beyond these"
            violations = [FieldViolation(excess, why)]
            return OctavoError(Reason.INVALID_ARGUMENT, f"{excess}: {why}", violations=violations)
        try:
            return decode(data)
        except DecodeError:
            return undecodable()

    return safe


def _unless_bytes(encode: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    return lambda answer: answer if encode is None or isinstance(answer, bytes) else encode(answer)


def _awaited(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def run(request: Any, context: Any) -> Any:
        if isinstance(request, OctavoError):
            await abort(context, request)
        answer = behaviour(request, context)
        del request  # an error that ends the call keeps this frame (service/errors.py, answers_errors)
        return await answer

    return run


def _generating(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def run(request: Any, context: Any) -> AsyncIterator[Any]:
        if isinstance(request, OctavoError):
            await abort(context, request)
        answer = behaviour(request, context)
        del request  # as above
        async with aclosing(answer) as messages:
            async for message in messages:
                yield message

    return run


def undecodable() -> OctavoError:
    """What such bytes are answered with."""
    return OctavoError(Reason.INVALID_ARGUMENT, "the request is no message of this method")
