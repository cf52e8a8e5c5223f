"""What a client asked for: the messages of the contracts that its request stands for, and how it wants to be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.v1 import inference_pb2

from router.http.body import Scope, header
from router.http.errors import HttpError, Names, invalid
from router.http.fields import Fields
from router.speech.manner import PLAIN, Manner

_MAX_TIMEOUT_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What stands in the headers: none of it is OpenAI's, so that their clients can give it as extra headers."""

    idempotency_key: str = ""
    attempt: int = 0
    resume_grace_ms: int = 0
    timeout: float | None = None  # seconds

    @classmethod
    def read(cls, scope: Scope) -> Options:
        """Raises a 400 that names the header."""
        timeout_ms = _number(scope, "x-octavo-timeout-ms", _MAX_TIMEOUT_MS)
        return cls(
            idempotency_key=header(scope, b"idempotency-key") or "",
            # OpenAI's clients count their retries in a header of their own.
            attempt=_number(scope, "x-octavo-attempt") or _number(scope, "x-stainless-retry-count") or 0,
            resume_grace_ms=_number(scope, "x-octavo-resume-grace-ms") or 0,
            timeout=None if timeout_ms is None else timeout_ms / 1e3,
        )

    def apply(self, request: inference_pb2.GenerateRequest) -> None:
        """Where the body says nothing of it."""
        if self.idempotency_key and not request.idempotency_key:
            request.idempotency_key = self.idempotency_key
        if request.idempotency_key and not request.attempt:
            request.attempt = self.attempt
        request.resume_grace_ms = request.resume_grace_ms or self.resume_grace_ms


@dataclass(slots=True, kw_only=True)
class Ask:
    """`requests`: one for each prompt. `names`: how its fields were called. `timeout`: seconds until nobody wants it."""

    requests: list[inference_pb2.GenerateRequest]
    names: Names
    stream: bool = False
    include_usage: bool = False
    usage_in_chunks: bool = False  # and in all chunks, as far as it goes
    timeout: float | None = None
    echoes: Sequence[str] = field(default=())  # of each prompt: what the output begins with
    first_tokens: Sequence[bytes] = field(
        default=()
    )  # of each prompt that is echoed with log-probabilities: its first token's bytes
    echo: bool = False
    keep_last: int | None = None  # tokens of each prompt; -1: as many as there is room for
    include_reasoning: bool = True
    effort: str = ""  # the member that says how much to think, which the chat template has to know
    manner: Manner = PLAIN  # how the outputs are to be read, once they are prepared
    prompt_only: bool = False  # no output is wanted, and one token made because nothing less can be

    @property
    def wants_named_call(self) -> bool:
        """Whether the outputs are calls of the function that was named."""
        return self.requests[0].chat.tool_choice.mode == inference_pb2.ToolChoice.MODE_NAMED

    def forget_prompts(self) -> None:
        """They are on their way, and may be megabytes; the answer takes its time."""
        for request in self.requests:
            for kind in ("text", "chat", "token_ids"):
                request.ClearField(kind)

    @property
    def n(self) -> int:
        """Outputs of each prompt."""
        sampling = self.requests[0].sampling
        return sampling.n if sampling.HasField("n") else 1


@dataclass(frozen=True, slots=True)
class Streaming:
    """Whether to stream, whether with a last chunk of usage, and whether with a usage in every chunk."""

    stream: bool
    include_usage: bool = False
    usage_in_chunks: bool = False

    @classmethod
    def take(cls, fields: Fields) -> Streaming:
        """stream and stream_options."""
        stream = bool(fields.flag("stream"))
        options = fields.object("stream_options")
        if options is None:
            return cls(stream)
        if not stream:
            raise invalid(fields.path("stream_options"), "is for streams only")
        include_usage = bool(options.flag("include_usage"))
        usage_in_chunks = bool(options.flag("continuous_usage_stats"))
        options.only("include_obfuscation", False)
        options.finish()
        return cls(
            stream, include_usage, include_usage and usage_in_chunks
        )  # vLLM's rule: nothing without include_usage


def take_keep_last(fields: Fields) -> int | None:
    """Tokens of the prompt that are kept; -1: as many as there is room for."""
    keep_last = fields.integer("truncate_prompt_tokens", -1)
    if keep_last == 0:
        raise invalid(fields.path("truncate_prompt_tokens"), "must be -1 or at least 1")
    return keep_last


def check_grace(request: inference_pb2.GenerateRequest, streaming: Streaming) -> None:
    """Raises a 400 where the request could not be gone on with."""
    if request.resume_grace_ms and not streaming.stream:
        raise invalid("resume_grace_ms", "is for streams only")
    if request.resume_grace_ms and streaming.usage_in_chunks:
        raise invalid("resume_grace_ms", "can't be combined with stream_options.continuous_usage_stats")
    if request.resume_grace_ms and request.sampling.HasField("logprobs"):
        raise invalid("resume_grace_ms", "can't be combined with logprobs: those that were told are not kept")


def check_text(error: UnicodeEncodeError) -> HttpError:
    """A lone surrogate, which JSON can write and UTF-8 can't."""
    return invalid(
        None, f"the body holds half a surrogate pair: \\u{ord(error.object[error.start]):04x}", "invalid_json"
    )


def _number(scope: Scope, name: str, most: int = 2**32 - 1) -> int | None:
    text = header(scope, name.encode())
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
        raise invalid(name, f"must be an integer in [0, {most}]")
    return int(text)
