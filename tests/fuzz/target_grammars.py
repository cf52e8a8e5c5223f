"""Grammars from elsewhere: schemas, regular expressions, Lark and choices, mutated; compiled, and followed for some tokens.

The same calls as in the router's helper and the worker's grammar thread: whatever is wrong is a GrammarError or a row that ends alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from random import Random

import numpy as np
from llguidance import LLTokenizer
from octavo.v1 import common_pb2

from service.grammar import Grammar, GrammarError, from_message, size_problem
from service.guidance import compile_grammar, load_tokenizer
from tests.fuzz import documents, values
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.peers import MAX_MODEL_LEN, VOCAB
from tests.grammar.schemas import made
from worker.backends.mock import EOS_TOKEN_ID
from worker.backends.mock_assets import mock_assets
from worker.grammar.matcher import Ends, RowMatcher, allowed

_STEPS = 12
_REGEXES = (
    "(a|b)*c{2,4}", "[^\\x00-\\x1f\"]{0,90}", "\\d{4}-\\d{2}", "(?i)yes|no", "(.*a){3}.{0,200}", "\\p{Greek}+x?", "^a$",
    "((a{0,9}){0,9}){0,9}",
)  # fmt: skip
_LARKS = (
    'start: "a" b*\nb: /[0-9]{1,3}/ | "(" start ")"',
    'start: e\ne: e "+" e | NUM\nNUM: /[0-9]+/\n%ignore / +/',
    'start: <eos> | %json {"type": "integer"}',
    'start: x[capture, max_tokens=3] "end"\nx: /.*/',
)
_WORDS = (
    "$ref", "#/$defs/chain", "#", "allOf", "anyOf", "oneOf", "not", "format", "date-time", "uuid", "multipleOf", 0.1, "minItems",
    10**9, "maxLength", "pattern", "(a+)+$", "x-guidance", {"lenient": True}, "patternProperties", "enum", [], "type",
    ["object", "null"],
    "exclusiveMinimum", -0.0, 1e308, "minProperties", "contentEncoding", "const", "$id", "http://x/y", "$schema",
)  # fmt: skip


@functools.cache
def _tokenizer() -> LLTokenizer:
    return load_tokenizer(mock_assets(VOCAB, MAX_MODEL_LEN)["tokenizer.json"], VOCAB, (EOS_TOKEN_ID,))


def _message(random: Random) -> tuple[common_pb2.Grammar, bool]:
    """A grammar, and whether it was mutated from a valid one. A third of them hold after reasoning."""
    message, mutated = _of_a_kind(random)
    if random.random() < 0.3:
        message.after.closing = random.choice(("</think>", "</think>", "a", "", values.text(random)))
        message.after.opening = random.choice(("", "<think>", values.text(random)))
    return message, mutated


def _calls(random: Random) -> common_pb2.ToolCalls:
    """Calls in the two forms of models, and in forms that nobody has."""
    tagged = random.random() < 0.6
    calls = common_pb2.ToolCalls(
        opening="<tool_call>\n" if tagged else "",
        closing="\n</tool_call>" if tagged else "",
        separator="\n" if tagged else "; ",
        arguments="arguments" if tagged else "parameters",
        most=random.choice((1, 2, 16, 64)),
        free=random.random() < 0.5,
    )
    for index in range(random.randint(1, 3)):
        schema = {"type": "object", "properties": {"a": made(random.randrange(1 << 20))}}
        data = documents.mutated_json(random, schema, _WORDS) if random.random() < 0.5 else json.dumps(schema).encode()
        text = random.choice(("", data.decode(errors="replace")))
        calls.functions.add(name=f"f{index}" if random.random() < 0.9 else values.text(random), json_schema=text)
    if random.random() < 0.3:
        name = random.choice(("opening", "closing", "separator", "arguments"))
        setattr(calls, name, values.text(random))
    if random.random() < 0.3:
        schema = made(random.randrange(1 << 20))
        calls.or_json_schema = documents.mutated_json(random, schema, _WORDS).decode(errors="replace")
        calls.free = random.random() < 0.1
    if random.random() < 0.1:
        calls.most = random.choice((0, 65, 2**32 - 1))
    return calls


def _of_a_kind(random: Random) -> tuple[common_pb2.Grammar, bool]:
    kind = random.choice(("json_schema", "json_schema", "regex", "lark", "choice", "calls"))
    if kind == "calls":
        return common_pb2.Grammar(calls=_calls(random)), True
    if kind == "json_schema":
        schema = made(random.randrange(1 << 20))
        data = documents.mutated_json(random, schema, _WORDS) if random.random() < 0.8 else json.dumps(schema).encode()
        return common_pb2.Grammar(json_schema=data.decode(errors="replace")), True
    if kind == "choice":
        return common_pb2.Grammar(choice=common_pb2.Choices(values=[values.text(random) for _ in range(3)])), True
    text = random.choice(_REGEXES if kind == "regex" else _LARKS)
    if random.random() < 0.1:
        return common_pb2.Grammar(**{kind: values.text(random)}), False
    for _ in range(random.randrange(4)):
        at = random.randrange(len(text) + 1)
        piece = random.choice(
            (*_REGEXES, "(", ")", "{1000}", "*", "|", "[", "\\", "\n", "start", '"', "/", ":", "é", "\x00")
        )
        text = text[:at] + piece + text[at + random.randrange(3) :]
    return common_pb2.Grammar(**{kind: text}), True


def _attack(random: Random) -> Verdict:
    message, mutated = _message(random)
    problem = size_problem(message)
    if problem is not None:
        assert all(problem)
        return Verdict(mutated, False)
    grammar = from_message(message)
    assert grammar is not None
    try:
        start = compile_grammar(grammar, _tokenizer())
    except GrammarError as error:
        assert 0 < len(str(error)) <= 501
        return Verdict(mutated, False)
    _follow(random, grammar, RowMatcher(start, Ends(0, (EOS_TOKEN_ID,), ()), ()))
    return Verdict(mutated, True)


def _follow(random: Random, grammar: Grammar, row: RowMatcher) -> None:
    """Each token that the mask allows is one that the grammar takes, and there is one, or the row has a problem."""
    bits = np.zeros(-(-VOCAB // 32), np.int32)
    for _ in range(_STEPS):
        row.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        row.finish_mask(bits)
        ids = np.flatnonzero(allowed(bits, VOCAB)).tolist()
        if row.problem:
            assert not ids
            return
        if not ids:  # a dead end: the row ends with an error
            return
        token_id = random.choice(ids)
        if token_id == EOS_TOKEN_ID:
            assert row.matcher.is_accepting() or "<eos>" in grammar.text, (
                grammar
            )  # a Lark grammar may ask for it by name
            return
        row.advance(token_id)
        assert not row.problem or "limit" in row.problem or "too" in row.problem, (grammar, row.problem)


def _episode(random: Random) -> Iterator[Verdict]:
    for _ in range(EPISODE):
        yield _attack(random)


TARGET = Target("grammars", _episode, ("service.grammar", "service.guidance", "worker.grammar.matcher"))
