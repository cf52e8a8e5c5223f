"""Grammars as requests carry them, and the tokens that end a model's outputs. How they are compiled is in service/guidance.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from octavo.v1 import common_pb2

MAX_GRAMMAR_BYTES = 256 << 10
MAX_CHOICES = 4_096
MAX_FUNCTIONS = 128
MAX_CALLS = 64
_BEGIN_JSON = frozenset(("", *'{["-0123456789tfn \t\r\n'))


class GrammarError(Exception):
    """A grammar that can't be compiled, or tokens that it does not allow; the text says why."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """One grammar. `kind` is json_schema, regex, lark, choice or calls; the text of a choice is a JSON list of strings, that of calls
    an object with the members of ToolCalls. With a `closing` it holds after reasoning; with an `opening` too, that may be missing.
    """

    kind: str
    text: str
    opening: str = ""
    closing: str = ""


def from_message(message: common_pb2.Grammar) -> Grammar | None:
    """The value of a message; None where no kind that we know is set."""
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "choice":
        text = json.dumps(list(message.choice.values), ensure_ascii=False)
    elif kind == "calls":
        text = json.dumps(_calls(message.calls), ensure_ascii=False)
    else:
        text = getattr(message, kind)
    return Grammar(kind, text, message.after.opening, message.after.closing)


def _calls(calls: common_pb2.ToolCalls) -> dict[str, object]:
    instead = {"or_json_schema": calls.or_json_schema} if calls.or_json_schema else {}
    return instead | {
        "functions": [[function.name, function.json_schema] for function in calls.functions],
        "opening": calls.opening,
        "closing": calls.closing,
        "separator": calls.separator,
        "arguments": calls.arguments,
        "most": calls.most,
        "free": calls.free,
    }


def size_problem(message: common_pb2.Grammar) -> tuple[str, str] | None:
    """The field that is larger than a grammar may be, or empty, and what is wrong with it. Looks at sizes only."""
    kind = message.WhichOneof("kind")
    if kind is None:
        return "grammar", "must be one of json_schema, regex, lark, choice and calls"
    size = message.ByteSize()
    if size > MAX_GRAMMAR_BYTES:
        return f"grammar.{kind}", f"must have at most {MAX_GRAMMAR_BYTES} bytes, has {size}"
    if message.HasField("after") and not message.after.closing:
        return "grammar.after.closing", "must not be empty"
    if kind == "calls":
        return _calls_problem(message.calls)
    if kind == "choice":
        values = message.choice.values
        if not 1 <= len(values) <= MAX_CHOICES:
            return "grammar.choice.values", f"must have 1 to {MAX_CHOICES} entries, has {len(values)}"
        for index, value in enumerate(values):
            if not value:
                return f"grammar.choice.values[{index}]", "must not be empty"
    elif not getattr(message, kind):
        return f"grammar.{kind}", "must not be empty"
    return None


def _calls_problem(calls: common_pb2.ToolCalls) -> tuple[str, str] | None:
    names = [function.name for function in calls.functions]
    if not 1 <= len(names) <= MAX_FUNCTIONS:
        return "grammar.calls.functions", f"must have 1 to {MAX_FUNCTIONS} entries, has {len(names)}"
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            return f"grammar.calls.functions[{index}].name", "must not be empty, nor that of another one"
    if not calls.arguments:
        return "grammar.calls.arguments", "must not be empty"
    if not 1 <= calls.most <= MAX_CALLS:
        return "grammar.calls.most", f"must be in [1, {MAX_CALLS}]"
    if calls.most > 1 and not (calls.separator or calls.opening):
        return "grammar.calls.separator", "must not be empty where several calls may follow one another without a mark"
    if calls.or_json_schema and (calls.free or calls.opening[:1] in _BEGIN_JSON):
        return "grammar.calls.or_json_schema", "needs calls that begin with a mark as no JSON does, and no free text"
    return None


def eos_token_ids(
    config: Mapping[str, object],
    generation: Mapping[str, object],
    tokenizer_config: Mapping[str, object],
    token_to_id: Callable[[str], int | None],
) -> tuple[int, ...]:
    """The tokens that end a model's outputs. generation_config has the full list; config.json and the tokenizer's eos_token are what
    is left without it.
    """
    for source in (generation, config):
        found = source.get("eos_token_id")
        ids = [found] if isinstance(found, int) else found
        if isinstance(ids, list) and ids and all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
            return tuple(dict.fromkeys(ids))
    text: object = tokenizer_config.get("eos_token")
    if isinstance(text, dict):
        text = text.get("content")
    token_id = token_to_id(text) if isinstance(text, str) and text else None
    return () if token_id is None else (token_id,)
