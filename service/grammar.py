"""Grammars as requests carry them, and the tokens that end a model's outputs. How they are compiled is in service/guidance.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from octavo.v1 import common_pb2

MAX_GRAMMAR_BYTES = 256 << 10
MAX_CHOICES = 4_096


class GrammarError(Exception):
    """A grammar that can't be compiled, or tokens that it does not allow; the text says why."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """One grammar. `kind` is json_schema, regex, lark or choice; the text of a choice is a JSON list of strings."""

    kind: str
    text: str


def from_message(message: common_pb2.Grammar) -> Grammar | None:
    """The value of a message; None where no kind that we know is set."""
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "choice":
        return Grammar(kind, json.dumps(list(message.choice.values), ensure_ascii=False))
    return Grammar(kind, getattr(message, kind))


def size_problem(message: common_pb2.Grammar) -> tuple[str, str] | None:
    """The field that is larger than a grammar may be, or empty, and what is wrong with it. Looks at sizes only."""
    kind = message.WhichOneof("kind")
    if kind is None:
        return "grammar", "must be one of json_schema, regex, lark and choice"
    size = message.ByteSize()
    if size > MAX_GRAMMAR_BYTES:
        return f"grammar.{kind}", f"must have at most {MAX_GRAMMAR_BYTES} bytes, has {size}"
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
