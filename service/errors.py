"""The one table of errors: reason, gRPC code, whether to retry, whether a stream can be resumed.

A reason is an `ErrorReason` of the contracts. Over gRPC it travels as a status with `google.rpc` details (ErrorInfo, and BadRequest or
RetryInfo where they help); inside multiplexed streams as the enum itself.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from octavo.v1 import common_pb2

S = TypeVar("S")
Q = TypeVar("Q")
R = TypeVar("R")

DOMAIN = "octavo"
# A status travels in trailing metadata, of which gRPC takes 8 KiB: the message twice, in percents and in base64.
_MAX_MESSAGE_BYTES = 512
_MAX_VIOLATIONS = 8
_MAX_FIELD_BYTES = 96
_MAX_DESCRIPTION_BYTES = 192
_WRITE_FAILED = "Internal error from Core"  # gRPC's client says no more of a write into a stream that has ended


class Reason(enum.IntEnum):
    """ErrorReason of the contracts, by its short name."""

    QUEUE_FULL = common_pb2.ERROR_REASON_QUEUE_FULL
    PROMPT_TOO_LONG = common_pb2.ERROR_REASON_PROMPT_TOO_LONG
    NO_WORKER = common_pb2.ERROR_REASON_NO_WORKER
    MODEL_UNKNOWN = common_pb2.ERROR_REASON_MODEL_UNKNOWN
    MODEL_CHANGED = common_pb2.ERROR_REASON_MODEL_CHANGED
    DRAINING = common_pb2.ERROR_REASON_DRAINING
    DUPLICATE_REQUEST = common_pb2.ERROR_REASON_DUPLICATE_REQUEST
    POISON = common_pb2.ERROR_REASON_POISON
    DEADLINE = common_pb2.ERROR_REASON_DEADLINE
    GRAMMAR_INVALID = common_pb2.ERROR_REASON_GRAMMAR_INVALID
    QUOTA = common_pb2.ERROR_REASON_QUOTA
    UNSUPPORTED = common_pb2.ERROR_REASON_UNSUPPORTED
    INVALID_ARGUMENT = common_pb2.ERROR_REASON_INVALID_ARGUMENT
    PROTOCOL_VIOLATION = common_pb2.ERROR_REASON_PROTOCOL_VIOLATION
    PROTOCOL_MISMATCH = common_pb2.ERROR_REASON_PROTOCOL_MISMATCH
    UNAUTHENTICATED = common_pb2.ERROR_REASON_UNAUTHENTICATED
    PERMISSION_DENIED = common_pb2.ERROR_REASON_PERMISSION_DENIED
    TICKET_INVALID = common_pb2.ERROR_REASON_TICKET_INVALID
    SLOW_CONSUMER = common_pb2.ERROR_REASON_SLOW_CONSUMER
    LOST = common_pb2.ERROR_REASON_LOST
    INTERNAL = common_pb2.ERROR_REASON_INTERNAL


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """What a reason means to a client."""

    code: grpc.StatusCode
    retryable: bool  # the same request, sent again, may succeed
    resumable: bool  # a stream that broke with it can be resumed with its ticket


def _rule(code: grpc.StatusCode, *, retry: bool = False, resume: bool = False) -> ErrorRule:
    return ErrorRule(code, retry, resume)


RULES: dict[Reason, ErrorRule] = {
    Reason.QUEUE_FULL: _rule(grpc.StatusCode.RESOURCE_EXHAUSTED, retry=True),
    Reason.PROMPT_TOO_LONG: _rule(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.NO_WORKER: _rule(grpc.StatusCode.UNAVAILABLE, retry=True, resume=True),
    Reason.MODEL_UNKNOWN: _rule(grpc.StatusCode.NOT_FOUND),
    Reason.MODEL_CHANGED: _rule(grpc.StatusCode.FAILED_PRECONDITION),
    Reason.DRAINING: _rule(grpc.StatusCode.UNAVAILABLE, retry=True, resume=True),
    Reason.DUPLICATE_REQUEST: _rule(grpc.StatusCode.ALREADY_EXISTS),
    Reason.POISON: _rule(grpc.StatusCode.ABORTED),
    Reason.DEADLINE: _rule(grpc.StatusCode.DEADLINE_EXCEEDED),
    Reason.GRAMMAR_INVALID: _rule(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.QUOTA: _rule(grpc.StatusCode.RESOURCE_EXHAUSTED, retry=True),
    Reason.UNSUPPORTED: _rule(grpc.StatusCode.UNIMPLEMENTED),
    Reason.INVALID_ARGUMENT: _rule(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.PROTOCOL_VIOLATION: _rule(grpc.StatusCode.FAILED_PRECONDITION),
    Reason.PROTOCOL_MISMATCH: _rule(grpc.StatusCode.FAILED_PRECONDITION),
    Reason.UNAUTHENTICATED: _rule(grpc.StatusCode.UNAUTHENTICATED),
    Reason.PERMISSION_DENIED: _rule(grpc.StatusCode.PERMISSION_DENIED),
    Reason.TICKET_INVALID: _rule(grpc.StatusCode.INVALID_ARGUMENT),
    Reason.SLOW_CONSUMER: _rule(grpc.StatusCode.RESOURCE_EXHAUSTED, resume=True),
    Reason.LOST: _rule(grpc.StatusCode.UNAVAILABLE, retry=True, resume=True),
    Reason.INTERNAL: _rule(grpc.StatusCode.INTERNAL, retry=True),
}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong: its path (`sampling.top_p`) and what it should be."""

    field: str
    description: str


class OctavoError(Exception):
    """An error with a reason from the closed list; the text is for the caller's eyes."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.retry_after_ms = retry_after_ms

    @property
    def rule(self) -> ErrorRule:
        return RULES[self.reason]

    def to_status(self) -> status_pb2.Status:
        """The error as google.rpc.Status with its details, cut to what trailing metadata holds: a client's text may stand in it."""
        details = [error_details_pb2.ErrorInfo(reason=self.reason.name, domain=DOMAIN)]
        message = _cut(self.message, _MAX_MESSAGE_BYTES)
        status = status_pb2.Status(code=_code_number(self.rule.code), message=message)
        for detail in [*details, *self._bad_request(), *self._retry_info()]:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status

    def _bad_request(self) -> list[error_details_pb2.BadRequest]:
        if not self.violations:
            return []
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(v.field, _MAX_FIELD_BYTES), description=_cut(v.description, _MAX_DESCRIPTION_BYTES)
            )
            for v in self.violations[:_MAX_VIOLATIONS]
        ]
        return [error_details_pb2.BadRequest(field_violations=violations)]

    def _retry_info(self) -> list[error_details_pb2.RetryInfo]:
        if not self.retry_after_ms:
            return []
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(self.retry_after_ms)
        return [info]


async def abort(context: Any, error: OctavoError) -> NoReturn:
    """End the call with this error. Never returns."""
    await context.abort_with_status(rpc_status.to_status(error.to_status()))
    raise AssertionError("abort returned")


def how_it_ended(error: grpc.aio.AioRpcError) -> str:
    """What a stream's error says to its caller's log."""
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _WRITE_FAILED:
        return "the other side ended the stream while we wrote: it died, or cut us off for our silence, as its log would say"
    return error.details() or error.code().name


def answers_errors(handler: Callable[[S, Q, Any], Awaitable[R]]) -> Callable[[S, Q, Any], Coroutine[Any, Any, R]]:
    """A handler `(self, request, context)` whose OctavoErrors become the call's status.

    gRPC keeps the exception that ends a call in the call itself, and an exception keeps every frame that it passed: a cycle, which
    stays until the collector of cycles comes. So neither the request nor a frame that saw it may be in there: ten refused requests
    of 10 MB were a gigabyte.
    """

    @functools.wraps(handler)
    async def answer(self: S, request: Q, context: Any) -> R:
        try:
            return await handler(self, request, context)
        except OctavoError as caught:
            error = caught
        del request
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return await abort(context, error)

    return answer


def from_rpc_error(error: grpc.RpcError) -> OctavoError | None:
    """The OctavoError inside a failed call, or None where the peer sent none (a broken connection, another server)."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    if status is None:
        return None
    reason: Reason | None = None
    violations: list[FieldViolation] = []
    retry_after_ms = 0
    for detail in status.details:
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            reason = Reason[info.reason]
        elif detail.Unpack(bad):
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    if reason is None:
        return None
    return OctavoError(reason, status.message, violations=violations, retry_after_ms=retry_after_ms)


def _cut(text: str, most: int) -> str:
    """Its beginning, in at most so many bytes of UTF-8."""
    raw = text[:most].encode(errors="replace")
    if len(raw) <= most and len(text) <= most:
        return raw.decode()
    return raw[: most - 3].decode(errors="ignore") + "…"


def _code_number(code: grpc.StatusCode) -> int:
    return int(code_pb2.Code.Value(code.name))
