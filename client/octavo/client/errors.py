"""What a failed call means: a reason from the contracts' closed list, and whether to try again.

The services have the same table in service/errors.py, which the wheel does not hold; a test keeps the two equal.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from octavo.v1 import common_pb2

DOMAIN = "octavo"


class Reason(enum.IntEnum):
    """ErrorReason of the contracts, by its short name. Its comments there say what each means."""

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


# The same request, sent again, may succeed.
RETRYABLE = frozenset(
    {Reason.QUEUE_FULL, Reason.NO_WORKER, Reason.DRAINING, Reason.QUOTA, Reason.LOST, Reason.INTERNAL}
)
# A stream that broke with it can go on with its ticket.
RESUMABLE = frozenset({Reason.NO_WORKER, Reason.DRAINING, Reason.SLOW_CONSUMER, Reason.LOST})

# Statuses that gRPC itself makes, without our details.
_REASON_OF_CODE = {
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE,
    grpc.StatusCode.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Reason.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.UNSUPPORTED,
}
# How a peer's death shows: the connection went, or the HTTP/2 stream was reset under the call.
_BROKEN_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
_BROKEN_TEXTS = ("Stream removed", "Received RST_STREAM", "Socket closed")
# What gRPC says of a message that it does not send.
_TOO_LARGE = re.compile(r".*Sent message larger than max \((\d+) vs\. (\d+)\)")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong: its path (`sampling.top_p`) and what it should be."""

    field: str
    description: str


class OctavoError(Exception):
    """A call that failed. `reason` is None where the peer gave none: a broken connection, or another kind of server."""

    def __init__(
        self,
        reason: Reason | None,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
        broken: bool = False,
    ) -> None:
        """`retry_after` is in seconds; `broken` says that the connection failed and not the request."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.code = code
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.broken = broken

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        return self.broken if self.reason is None else self.reason in RETRYABLE

    @property
    def resumable(self) -> bool:
        """Whether a stream that ended with this can go on where it stopped."""
        return self.broken if self.reason is None else self.reason in RESUMABLE

    def __str__(self) -> str:
        name = self.reason.name if self.reason else self.code.name if self.code else "ERROR"
        return f"{name}: {self.sentence()}"

    def sentence(self) -> str:
        """The message with its field violations, on one line."""
        # Often the message says already what is wrong, and the violation only adds where.
        fields = "; ".join(
            v.field if v.description in self.message else f"{v.field}: {v.description}"
            for v in self.violations
            if v.field not in self.message
        )
        text = f"{self.message} ({fields})" if fields else self.message
        return " ".join(text.split())


def decode(error: grpc.RpcError) -> OctavoError:
    """The failed call as an OctavoError, with what the details say or, without details, what the code says."""
    code: grpc.StatusCode = error.code()
    text = error.details() or code.name
    status = _status(error)
    decoded = None if status is None else _from_details(status, code)
    if decoded is not None:
        return decoded
    if (found := _TOO_LARGE.match(text)) is not None:
        size, most = found.groups()
        large = f"the prompt is too large: the request has {size} bytes, and may have {most}"
        return OctavoError(Reason.PROMPT_TOO_LONG, large, code=code)
    broken = code in _BROKEN_CODES or text.startswith(_BROKEN_TEXTS)
    return OctavoError(_REASON_OF_CODE.get(code), text, code=code, broken=broken)


def _status(error: grpc.RpcError) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        # The details contradict the status they came with, so they are no better than none.
        return None


def _from_details(status: status_pb2.Status, code: grpc.StatusCode) -> OctavoError | None:
    reason: Reason | None = None
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            if info.domain == DOMAIN and info.reason in Reason.__members__:
                reason = Reason[info.reason]
        elif detail.Unpack(bad):
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    if reason is None:
        return None
    return OctavoError(reason, status.message, code=code, violations=violations, retry_after=retry_after)
