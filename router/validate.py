"""What is wrong with a request can be said before any work is done for it: all violations at once, each with its field's path.

Nothing here needs the model; what does is in resolve.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NoReturn

from octavo.v1 import inference_pb2

from router.template import SPECIAL_TOKENS
from service.errors import FieldViolation, OctavoError, Reason
from service.grammar import size_problem

MAX_STOPS = 32
MAX_STOP_CHARACTERS = 4_096
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256
MAX_LOGIT_BIAS = 1_024
MAX_LOGPROBS = 20
MAX_N = 64
MAX_MESSAGES = 10_000
MAX_CHAT_PARTS = 10_000  # content parts and tool calls of all messages
MAX_TOOLS = 1_024
MAX_STRUCT_BYTES = 1 << 20  # tools, template arguments and arguments of tool calls, together
MAX_DETOKENIZE_IDS = 1 << 20
MAX_KEY_CHARACTERS = 256
MAX_PRIORITY = 100
LEAST_PENALTY, MOST_PENALTY = 9.9999e-7, 1e6  # of repetition; 1e-6 as a float is a little less
MAX_GRACE_MS = 300_000
# Variables of a chat template that are set from elsewhere, and where that is.
SET_ELSEWHERE: Mapping[str, str] = {
    "messages": "it is the conversation itself",
    "tools": "use the field tools",
    "add_generation_prompt": "use the field add_generation_prompt",
    "continue_final_message": "use the field continue_final_message",
    "chat_template": "the model's own is used",
    "documents": "documents are not supported by this server",
    "tokenize": "the prompt is always made of tokens",
    "strftime_now": "the server's clock is used",
    **dict.fromkeys(SPECIAL_TOKENS, "the tokenizer's own is used"),
}
_ROLES = frozenset(("system", "user", "assistant", "tool", "developer"))


class Violations:
    """Collects what is wrong."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """One more."""
        self.found.append(FieldViolation(field, description))

    def require(self, condition: bool, field: str, description: str) -> None:
        """One more, unless the condition holds."""
        if not condition:
            self.add(field, description)

    def raise_if_any(self) -> None:
        """Raises INVALID_ARGUMENT with all of them."""
        if self.found:
            fail(self.found)


def fail(violations: list[FieldViolation]) -> NoReturn:
    """Raises INVALID_ARGUMENT; the message opens with the first violation."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    raise OctavoError(Reason.INVALID_ARGUMENT, f"{first.field}: {first.description}{more}", violations=violations)


def too_long(field: str, wrong: str) -> OctavoError:
    """PROMPT_TOO_LONG that names the field of what does not fit into the model's context."""
    return OctavoError(Reason.PROMPT_TOO_LONG, f"{field}: {wrong}", violations=[FieldViolation(field, wrong)])


def check_request(request: inference_pb2.GenerateRequest) -> None:
    """Raises INVALID_ARGUMENT with all violations, or UNSUPPORTED for what this server doesn't do: nothing is ignored."""
    wrong = Violations()
    _check_input(request, wrong)
    check_sampling(request.sampling, wrong)
    wrong.require(abs(request.priority) <= MAX_PRIORITY, "priority", "must be in [-100, 100]")
    wrong.require(request.resume_grace_ms <= MAX_GRACE_MS, "resume_grace_ms", f"must be in [0, {MAX_GRACE_MS}]")
    wrong.require(
        len(request.idempotency_key) <= MAX_KEY_CHARACTERS, "idempotency_key", "must have at most 256 characters"
    )
    if request.HasField("resume"):
        _check_resume(request, wrong)
    if request.HasField("grammar") and (problem := size_problem(request.grammar)) is not None:
        wrong.add(*problem)
    wrong.raise_if_any()
    if request.adapter:
        raise _unsupported("adapter", "LoRA adapters are not supported by this server")


def check_sampling(params: inference_pb2.SamplingParams, wrong: Violations) -> None:
    """Ranges and counts. NaN fails every comparison, so no range holds it."""
    _range(wrong, params, "temperature", 0.0, math.inf, "must be a number of at least 0")
    wrong.require(0.0 < params.top_p <= 1.0 or not params.HasField("top_p"), "sampling.top_p", "must be in (0, 1]")
    _range(wrong, params, "min_p", 0.0, 1.0, "must be in [0, 1]")
    penalty = params.repetition_penalty
    wrong.require(
        LEAST_PENALTY <= penalty <= MOST_PENALTY or not params.HasField("repetition_penalty"),
        "sampling.repetition_penalty",
        "must be in [1e-6, 1e6]",
    )
    _range(wrong, params, "presence_penalty", -2.0, 2.0, "must be in [-2, 2]")
    _range(wrong, params, "frequency_penalty", -2.0, 2.0, "must be in [-2, 2]")
    wrong.require(params.top_k < 2**31, "sampling.top_k", "must be below 2^31")
    wrong.require(
        params.max_tokens >= 1 or not params.HasField("max_tokens"), "sampling.max_tokens", "must be at least 1"
    )
    wrong.require(
        not params.HasField("max_tokens") or params.min_tokens <= params.max_tokens,
        "sampling.min_tokens",
        "must not exceed max_tokens",
    )
    wrong.require(1 <= params.n <= MAX_N or not params.HasField("n"), "sampling.n", f"must be in [1, {MAX_N}]")
    for name in ("logprobs", "prompt_logprobs"):
        wrong.require(getattr(params, name) <= MAX_LOGPROBS, f"sampling.{name}", f"must be in [0, {MAX_LOGPROBS}]")
    _check_lists(params, wrong)


def _check_lists(params: inference_pb2.SamplingParams, wrong: Violations) -> None:
    if len(params.stop) > MAX_STOPS:
        wrong.add("sampling.stop", f"must have at most {MAX_STOPS} entries, has {len(params.stop)}")
    else:
        _check_texts(params.stop, "sampling.stop", MAX_STOP_CHARACTERS, wrong)
    if len(params.bad_words) > MAX_BAD_WORDS:
        wrong.add("sampling.bad_words", f"must have at most {MAX_BAD_WORDS} entries, has {len(params.bad_words)}")
    else:
        _check_texts(params.bad_words, "sampling.bad_words", MAX_BAD_WORD_CHARACTERS, wrong)
    wrong.require(
        len(params.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        "sampling.stop_token_ids",
        f"must have at most {MAX_STOP_TOKEN_IDS} entries, has {len(params.stop_token_ids)}",
    )
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        wrong.add("sampling.logit_bias", f"must have at most {MAX_LOGIT_BIAS} entries, has {len(params.logit_bias)}")
        return
    for token_id, value in params.logit_bias.items():
        if not -100.0 <= value <= 100.0:
            wrong.add(f"sampling.logit_bias[{token_id}]", "must be in [-100, 100]")


def _check_texts(texts: Iterable[str], field: str, most: int, wrong: Violations) -> None:
    for index, text in enumerate(texts):
        wrong.require(text != "", f"{field}[{index}]", "must not be empty")
        wrong.require(len(text) <= most, f"{field}[{index}]", f"must have at most {most} characters")


def _range(
    wrong: Violations, params: inference_pb2.SamplingParams, name: str, low: float, high: float, description: str
) -> None:
    value = getattr(params, name)
    fits = low <= value <= high and math.isfinite(value)
    wrong.require(fits or not params.HasField(name), f"sampling.{name}", description)


def _check_input(request: inference_pb2.GenerateRequest, wrong: Violations) -> None:
    kind = request.WhichOneof("input")
    if kind is None:
        wrong.add("input", "one of text, chat and token_ids must be set")
    elif kind == "chat":
        check_chat(request.chat, wrong)
    elif kind == "token_ids":
        wrong.require(len(request.token_ids.ids) > 0, "token_ids.ids", "must not be empty")


def check_chat(chat: inference_pb2.Chat, wrong: Violations) -> None:
    """Roles and counts, and that the template's variables are set once; what the turns hold is the template's business."""
    wrong.require(len(chat.messages) > 0, "chat.messages", "must not be empty")
    if len(chat.messages) > MAX_MESSAGES:
        wrong.add("chat.messages", f"must have at most {MAX_MESSAGES} entries, has {len(chat.messages)}")
        return
    if not _check_chat_size(chat, wrong):
        return
    for index, message in enumerate(chat.messages):
        path = f"chat.messages[{index}]"
        wrong.require(message.role in _ROLES, f"{path}.role", f"must be one of {', '.join(sorted(_ROLES))}")
        for number, part in enumerate(message.content):
            wrong.require(part.WhichOneof("part") is not None, f"{path}.content[{number}]", "must be of a known kind")
    for name, instead in SET_ELSEWHERE.items():
        if name in chat.template_args.fields:
            wrong.add(f"chat.template_args.{name}", f"can't be set here: {instead}")
    if chat.continue_final_message and chat.add_generation_prompt:
        wrong.add("chat.continue_final_message", "can't be combined with add_generation_prompt")


def _check_chat_size(chat: inference_pb2.Chat, wrong: Violations) -> bool:
    """What is converted piece by piece has a bound of its own: a message of 16 MiB holds millions of pieces."""
    parts = sum(len(message.content) + len(message.tool_calls) for message in chat.messages)
    if parts > MAX_CHAT_PARTS:
        wrong.add("chat.messages", f"must have at most {MAX_CHAT_PARTS} parts and tool calls, have {parts}")
        return False
    if len(chat.tools) > MAX_TOOLS:
        wrong.add("chat.tools", f"must have at most {MAX_TOOLS} entries, has {len(chat.tools)}")
        return False
    if len(chat.template_args.fields) > MAX_TOOLS:
        wrong.add("chat.template_args", f"must have at most {MAX_TOOLS} entries, has {len(chat.template_args.fields)}")
        return False
    size = chat.template_args.ByteSize() + sum(tool.ByteSize() for tool in chat.tools)
    size += sum(call.arguments.ByteSize() for message in chat.messages for call in message.tool_calls)
    if size > MAX_STRUCT_BYTES:
        wrong.add("chat", f"tools and arguments must have at most {MAX_STRUCT_BYTES} bytes, have {size}")
        return False
    return True


def _check_resume(request: inference_pb2.GenerateRequest, wrong: Violations) -> None:
    resume = request.resume
    n = request.sampling.n if request.sampling.HasField("n") else 1
    wrong.require(bool(resume.ticket), "resume.ticket", "must not be empty")
    wrong.require(len(resume.outputs) <= n, "resume.outputs", "must have at most one entry for each output")
    seen: set[int] = set()
    for position, state in enumerate(list(resume.outputs)[:MAX_N]):
        path = f"resume.outputs[{position}].index"
        wrong.require(state.index < n, path, f"must be below n = {n}")
        wrong.require(state.index not in seen, path, "must not be repeated")
        seen.add(state.index)


def _unsupported(field: str, description: str) -> OctavoError:
    return OctavoError(Reason.UNSUPPORTED, f"{field}: {description}", violations=[FieldViolation(field, description)])
