"""Pieces of JSON that are written token by token. Text is written as it is: only quotes, backslashes and controls are escaped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as quoted
from typing import Any

from octavo.v1 import common_pb2, inference_pb2

from router.http.offsets import text_offsets

FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORT: "abort",
    common_pb2.FINISH_REASON_ERROR: "error",
}

_BATCH = 256  # values that are encoded at once
_ENTRIES = 32  # and log-probabilities of so many tokens: 20 of each are two milliseconds

__all__ = [
    "FINISH_REASONS",
    "chat_logprobs",
    "completion_logprobs",
    "dumps",
    "dumps_long",
    "long_chat_logprobs",
    "long_completion_logprobs",
    "prompt_logprobs",
    "quoted",
    "stop_reason",
    "usage",
]


@dataclass(frozen=True, slots=True)
class Each:
    """A list that `dumps_long` makes of its items as it writes them: as objects, log-probabilities are ten times their text, and take
    long to be freed.
    """

    items: Sequence[Any]
    make: Callable[[Any], Any]


def dumps(value: Any) -> str:
    """Compact."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def dumps_long(value: Any, levels: int = 4) -> bytes:
    """The same for what may be megabytes, in steps between which other threads run: json encodes in one, with Python's lock.

    `levels`: of nesting that are taken apart; below them a list is encoded piece by piece, and whatever else it holds is small.
    """
    return b"".join(_pieces(value, levels))


def _pieces(value: Any, levels: int) -> Iterator[bytes]:
    if isinstance(value, Each):
        items, make = value.items, value.make
        batches = ([make(one) for one in items[at : at + _ENTRIES]] for at in range(0, len(items), _ENTRIES))
        yield from _in_batches(batches)
    elif levels and isinstance(value, dict):
        before = "{"
        for key, one in value.items():
            yield f"{before}{dumps(key)}:".encode()
            yield from _pieces(one, levels - 1)
            before = ","
        yield b"}" if value else b"{}"
    elif levels and isinstance(value, list):
        yield b"["
        for index, one in enumerate(value):
            if index:
                yield b","
            yield from _pieces(one, levels - 1)
        yield b"]"
    elif isinstance(value, list):
        yield from _in_batches(value[at : at + _BATCH] for at in range(0, len(value), _BATCH))
    else:
        yield dumps(value).encode()


def _in_batches(batches: Iterable[list[Any]]) -> Iterator[bytes]:
    before = "["
    for batch in batches:
        yield (before + dumps(batch)[1:-1]).encode()
        before = ","
    yield b"[]" if before == "[" else b"]"


def stop_reason(finished: inference_pb2.Finished | inference_pb2.Output) -> str | int | None:
    """The stop string or token id that ended the output, as vLLM tells it."""
    if not finished.HasField("stop_match"):
        return None
    match = finished.stop_match
    return match.text if match.HasField("text") else match.token_id


def usage(
    answers: Iterable[inference_pb2.Usage],
    firsts: Iterable[inference_pb2.Usage],
    thoughts: Iterable[int | None] = (None,),
) -> dict[str, Any]:
    """`answers`: of all outputs; `firsts`: of the first output of each prompt, since n outputs share one; `thoughts`: tokens of
    reasoning of each output, left out where one of them is not known.
    """
    completion = sum(one.completion_tokens for one in answers)
    prompt = cached = 0
    for one in firsts:
        prompt += one.prompt_tokens
        cached += one.cached_tokens
    whole: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    reasoning = 0
    for count in thoughts:
        if count is None:
            return whole
        reasoning += count
    return whole | {"completion_tokens_details": {"reasoning_tokens": reasoning}}


def chat_logprobs(entries: Sequence[inference_pb2.TokenLogprobs]) -> dict[str, Any]:
    """Of chat completions."""
    return {
        "content": [_chat_entry(entry) for entry in entries],
        "refusal": None,
    }


def long_chat_logprobs(entries: Sequence[inference_pb2.TokenLogprobs]) -> dict[str, Any]:
    """The same for `dumps_long`."""
    return {"content": Each(entries, _chat_entry), "refusal": None}


def completion_logprobs(
    entries: Sequence[inference_pb2.TokenLogprobs], text: str, first_offset: int = 0
) -> dict[str, Any]:
    """Of completions. `text`: what the tokens made, `first_offset` characters after the beginning."""
    shown = long_completion_logprobs(entries, text, first_offset)
    return shown | {"top_logprobs": [_top(entry) for entry in entries]}


def long_completion_logprobs(
    entries: Sequence[inference_pb2.TokenLogprobs], text: str, first_offset: int = 0
) -> dict[str, Any]:
    """The same for `dumps_long`."""
    # The first token of a prompt has no probability: nothing stands before it.
    values = [entry.token.logprob if entry.token.rank else None for entry in entries]
    tokens = [entry.token.text for entry in entries]
    places = text_offsets(((entry.token.text, entry.token.bytes) for entry in entries), text)
    offsets = [first_offset + place for place in places]
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": Each(entries, _top)}


def _top(entry: inference_pb2.TokenLogprobs) -> dict[str, float] | None:
    return _by_text(entry.token, *entry.top) if entry.token.rank else None


def _by_text(*tokens: inference_pb2.TokenLogprob) -> dict[str, float]:
    """The likeliest of those with the same text, as pieces of characters have: the best must not hide behind the chosen one."""
    found: dict[str, float] = {}
    for one in sorted(tokens, key=lambda token: token.logprob):
        found[one.text] = one.logprob
    return found


def prompt_logprobs(entries: Sequence[inference_pb2.TokenLogprobs]) -> Each:
    """Of each prompt token, as vLLM tells them, for `dumps_long`; null for the first."""
    return Each(entries, _prompt_entry)


def _prompt_entry(entry: inference_pb2.TokenLogprobs) -> dict[str, Any] | None:
    if not entry.token.rank:
        return None
    return {
        str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
        for one in (entry.token, *entry.top)
    }


def _chat_entry(entry: inference_pb2.TokenLogprobs) -> dict[str, Any]:
    return {**_chat_token(entry.token), "top_logprobs": [_chat_token(token) for token in entry.top]}


def _chat_token(token: inference_pb2.TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}
