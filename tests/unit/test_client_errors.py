"""The client's table of reasons, and how failed calls are read."""

from __future__ import annotations

import grpc
import pytest
from octavo.client import OctavoError, Reason
from octavo.client import errors as client_errors

from service import errors as service_errors


def test_the_table_is_that_of_the_services() -> None:
    assert {reason.name: reason.value for reason in Reason} == {
        reason.name: reason.value for reason in service_errors.Reason
    }
    assert service_errors.DOMAIN == client_errors.DOMAIN
    for reason, rule in service_errors.RULES.items():
        error = OctavoError(Reason(reason.value), "")
        assert (error.retryable, error.resumable) == (rule.retryable, rule.resumable), reason


class _Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...] = ()) -> None:
        super().__init__()
        self._values = (code, details, trailing)

    def code(self) -> grpc.StatusCode:
        return self._values[0]

    def details(self) -> str:
        return self._values[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._values[2]


def _failed(error: service_errors.OctavoError, code: grpc.StatusCode | None = None) -> _Failed:
    status = error.to_status()
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    return _Failed(code or error.rule.code, status.message, trailing)


def test_details_become_fields() -> None:
    violation = service_errors.FieldViolation("sampling.top_p", "in (0, 1]")
    sent = service_errors.OctavoError(
        service_errors.Reason.INVALID_ARGUMENT, "a field is wrong", violations=[violation], retry_after_ms=1500
    )
    read = client_errors.decode(_failed(sent))
    assert read.reason is Reason.INVALID_ARGUMENT
    assert read.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [(v.field, v.description) for v in read.violations] == [("sampling.top_p", "in (0, 1]")]
    assert read.retry_after == 1.5
    assert str(read) == "INVALID_ARGUMENT: a field is wrong (sampling.top_p: in (0, 1])"


def test_details_that_contradict_the_status_are_not_believed() -> None:
    sent = service_errors.OctavoError(service_errors.Reason.QUEUE_FULL, "full")
    read = client_errors.decode(_failed(sent, grpc.StatusCode.INTERNAL))
    assert read.reason is None
    assert not read.retryable


@pytest.mark.parametrize(
    ("code", "text", "reason", "repeatable"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Connection refused", None, True),
        (grpc.StatusCode.CANCELLED, "CANCELLED", None, True),
        (grpc.StatusCode.UNKNOWN, "Stream removed (x)", None, True),
        (grpc.StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>", None, False),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", None, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Sent message larger than max", None, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Reason.DEADLINE, False),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", Reason.UNSUPPORTED, False),
    ],
)
def test_statuses_without_details(code: grpc.StatusCode, text: str, reason: Reason | None, repeatable: bool) -> None:
    read = client_errors.decode(_Failed(code, text))
    assert (read.reason, read.retryable, read.resumable) == (reason, repeatable, repeatable)


def test_a_violation_does_not_repeat_the_message() -> None:
    violation = client_errors.FieldViolation("resume.ticket", "it is forged")
    error = OctavoError(Reason.TICKET_INVALID, "it is forged", violations=[violation])
    assert str(error) == "TICKET_INVALID: it is forged (resume.ticket)"


def test_a_message_of_many_lines_is_one_sentence() -> None:
    assert str(OctavoError(Reason.LOST, "one\ntwo")) == "LOST: one two"
