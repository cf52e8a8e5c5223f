"""Requests whose bytes are no message. gRPC's asyncio server answers UNKNOWN and logs a traceback; here they are refused by name.

Streams read their messages themselves: a read raises DecodeError, which their handlers answer.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.errors import OctavoError, Reason, abort


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
    return make(wrapped, _or_none(handler.request_deserializer), handler.response_serializer)


def _or_none(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def safe(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return None

    return safe


def _awaited(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def run(request: Any, context: Any) -> Any:
        if request is None:
            await abort(context, undecodable())
        answer = behaviour(request, context)
        del request  # an error that ends the call keeps this frame (service/errors.py, answers_errors)
        return await answer

    return run


def _generating(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def run(request: Any, context: Any) -> AsyncIterator[Any]:
        if request is None:
            await abort(context, undecodable())
        answer = behaviour(request, context)
        del request  # as above
        async with aclosing(answer) as messages:
            async for message in messages:
                yield message

    return run


def undecodable() -> OctavoError:
    """What such bytes are answered with."""
    return OctavoError(Reason.INVALID_ARGUMENT, "the request is no message of this method")
