"""Errors in OpenAI's shape, with a status for each reason of the closed list. What went wrong inside is told in general words only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.errors import OctavoError, Reason

_MAX_MESSAGE = 1_000  # characters
_MAX_PARAM = 200
Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What a client is told. `param` names the field of its request that is wrong."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Headers = ()

    def body(self) -> bytes:
        """As JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message, param = _cut(self.message, _MAX_MESSAGE), self.param and _cut(self.param, _MAX_PARAM)
        error = {"message": message, "type": kind, "param": param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode(errors="replace")


def _cut(text: str, most: int) -> str:
    """A client's own text may stand in it."""
    return text if len(text) <= most else text[: most - 1] + "…"


class HttpError(Exception):
    """A request that ends with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def invalid(param: str | None, message: str, code: str | None = None) -> HttpError:
    """A 400 that names the field."""
    text = message if param is None else f"{param}: {message}"
    return HttpError(Problem(400, text, param, code))


def unsupported(param: str, message: str = "is not supported by this server") -> HttpError:
    """A 400 for what this server doesn't do."""
    return invalid(param, message, "unsupported_parameter")


@dataclass(frozen=True, slots=True)
class Rule:
    """How a reason is told. `message` instead of the error's own, which is for the cluster's eyes; `gone`: param of the request."""

    status: int
    code: str | None = None
    param: str | None = None
    message: str | None = None


_OVER = "the request ended with an internal error"
RULES: Mapping[Reason, Rule] = {
    Reason.QUEUE_FULL: Rule(429, "rate_limit_exceeded"),
    Reason.QUOTA: Rule(429, "insufficient_quota"),
    Reason.PROMPT_TOO_LONG: Rule(400, "context_length_exceeded", "input"),
    Reason.NO_WORKER: Rule(503, "no_worker", message="the model has no worker at present"),
    Reason.MODEL_UNKNOWN: Rule(404, "model_not_found", "model"),
    Reason.MODEL_CHANGED: Rule(410, "model_changed", "model"),
    Reason.DRAINING: Rule(503, "draining", message="this server is shutting down; try another one"),
    Reason.DUPLICATE_REQUEST: Rule(409, "duplicate_request", "idempotency_key"),
    Reason.POISON: Rule(500, "poison", message="the request made workers fail and is not tried again"),
    Reason.DEADLINE: Rule(504, "deadline", message="the deadline passed"),
    Reason.GRAMMAR_INVALID: Rule(400, "invalid_grammar", "grammar"),
    Reason.UNSUPPORTED: Rule(400, "unsupported_parameter"),
    Reason.INVALID_ARGUMENT: Rule(400),
    Reason.PROTOCOL_VIOLATION: Rule(500, message=_OVER),
    Reason.PROTOCOL_MISMATCH: Rule(500, message=_OVER),
    Reason.UNAUTHENTICATED: Rule(401, "invalid_api_key"),
    Reason.PERMISSION_DENIED: Rule(403, "permission_denied"),
    Reason.TICKET_INVALID: Rule(400, "ticket_invalid"),
    Reason.SLOW_CONSUMER: Rule(503, "slow_consumer", message="the answer was not read in time"),
    Reason.LOST: Rule(503, "lost", message="the request was lost and may be sent again"),
    Reason.INTERNAL: Rule(500, message=_OVER),
}


@dataclass(frozen=True, slots=True)
class Names:
    """How the contracts' fields are called in a client's request: path prefixes, the first that fits, and its replacement."""

    prefixes: Sequence[tuple[str, str]] = field(default=())

    def param(self, path: str) -> str:
        """`sampling.top_p` as the client wrote it."""
        for prefix, name in self.prefixes:
            if path.startswith(prefix):
                # What kind of grammar it is goes without saying: the member that asked for it has one kind, or names it.
                return name if prefix == "grammar" else name + path[len(prefix) :]
        return path.removeprefix("sampling.")


def problem_of(error: OctavoError, names: Names | None = None) -> Problem:
    """What the client is told of an error, by the names that it knows."""
    names = names or Names()
    rule = RULES[error.reason]
    message, param = rule.message or error.message, rule.param
    if error.violations and rule.message is None:
        first = error.violations[0]
        param = names.param(first.field)
        more = f" (and {len(error.violations) - 1} more)" if len(error.violations) > 1 else ""
        message = f"{param}: {first.description}{more}"
    elif param is not None:
        param = names.param(param)
    return Problem(rule.status, message, param, rule.code, _headers(error, rule.status))


def _headers(error: OctavoError, status: int) -> Headers:
    headers: list[tuple[str, str]] = []
    if error.retry_after_ms or status in (429, 503):
        after_ms = error.retry_after_ms or 1_000
        headers += [("retry-after", str(math.ceil(after_ms / 1e3))), ("retry-after-ms", str(after_ms))]
    if status >= 409:  # what OpenAI's clients would send again, unless they are told
        headers.append(("x-should-retry", "true" if error.rule.retryable else "false"))
    if status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return tuple(headers)
