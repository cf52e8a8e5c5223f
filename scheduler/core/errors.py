"""Why the scheduler refuses or gives up a request. Names are those of the contract's `ErrorReason`."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Name of an `octavo.v1.ErrorReason` without its prefix."""

    QUEUE_FULL = "QUEUE_FULL"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    NO_WORKER = "NO_WORKER"
    MODEL_UNKNOWN = "MODEL_UNKNOWN"
    MODEL_CHANGED = "MODEL_CHANGED"
    DUPLICATE_REQUEST = "DUPLICATE_REQUEST"
    POISON = "POISON"
    DEADLINE = "DEADLINE"
    UNSUPPORTED = "UNSUPPORTED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"


class SchedulerError(Exception):
    """Base of all errors that the core raises on purpose. Nothing was changed when one is raised."""

    reason: Reason = Reason.INVALID_ARGUMENT


class InvalidField(SchedulerError):
    """A value that can't be right. `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class QueueFull(SchedulerError):
    """The waiting queue has no room; `retry_after` is in seconds."""

    reason = Reason.QUEUE_FULL

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the waiting queue is full, retry after {retry_after:.2f} s")
        self.retry_after = retry_after


class Unplaceable(SchedulerError):
    """No worker of the model can ever hold the request: its context or its KV cache is too small."""

    reason = Reason.PROMPT_TOO_LONG


class Unsupported(SchedulerError):
    """No worker of the model has what the request asks for."""

    reason = Reason.UNSUPPORTED


class NoWorker(SchedulerError):
    """The model is known, but no worker holds it at present."""

    reason = Reason.NO_WORKER


class ModelUnknown(SchedulerError):
    """No worker has ever held a model of this name."""

    reason = Reason.MODEL_UNKNOWN


class ModelChanged(SchedulerError):
    """The model of this name has another digest than the one the request is pinned to."""

    reason = Reason.MODEL_CHANGED


class DuplicateRequest(SchedulerError):
    """The handle is in use."""

    reason = Reason.DUPLICATE_REQUEST


class UnknownWorker(SchedulerError):
    """No worker has this id."""

    reason = Reason.PROTOCOL_VIOLATION


class InvalidResult(SchedulerError):
    """A StepResult that doesn't answer the oldest plan in flight; its sender must be cut off."""

    reason = Reason.PROTOCOL_VIOLATION
