"""How llguidance is asked: each kind of grammar, what is refused, and the tokens that end outputs."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from octavo.v1 import common_pb2

from service.grammar import Grammar, GrammarError, eos_token_ids, from_message
from service.guidance import compile_grammar, load_tokenizer
from worker.backends.mock import EOS_TOKEN_ID
from worker.backends.mock_assets import mock_assets
from worker.grammar.load import load_runner, model_eos, vocabulary_of
from worker.grammar.matcher import Ends, RowMatcher, allowed

VOCAB = 700
ASSETS = mock_assets(VOCAB, 160)


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return load_tokenizer(ASSETS["tokenizer.json"], VOCAB, (EOS_TOKEN_ID,))


def accepts(tokenizer: LLTokenizer, grammar: Grammar, text: str) -> bool:
    """Whether the whole text, and it as a whole, is an output."""
    matcher = compile_grammar(grammar, tokenizer)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("regex", r"a/b\d\n?"), ["a/b7", "a/b0\n"], ["a/b", "a/b\u0665", "xa/b1"]),
        (Grammar("choice", json.dumps(['a"b', "a\\", "é\n"])), ['a"b', "a\\", "é\n"], ["a", 'a"bé\n']),
        (Grammar("lark", 'start: "x" INT?\nINT: /[0-9]+/'), ["x", "x12"], ["", "12"]),
        (Grammar("json_schema", '{"type": "integer"}'), ["12", "-3"], ["1.5", '"a"', "01"]),
        (Grammar("json_schema", "{}"), ["null", '{"a": [1, {}]}'], ["nul", "[1,]"]),
        (Grammar("json_schema", "true"), ["1"], ["x"]),
    ],
)
def test_what_each_kind_allows(tokenizer: LLTokenizer, grammar: Grammar, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(tokenizer, grammar, text)] == []
    assert [text for text in bad if accepts(tokenizer, grammar, text)] == []


def test_ranges_of_numbers_hold_at_their_bounds(tokenizer: LLTokenizer) -> None:
    """What llguidance gets wrong is refused; when this finds nothing refused, a newer one may have mended it."""
    bounds = (-10, -2.0, -0.5, 0, 0.5, 2, 2.5, 10)
    texts = ("-10", "-9.5", "-2", "-2.0", "-0.5", "-0", "0", "0.0", "0.5", "2", "2.0", "2.00", "2.25", "2.5", "3", "10")
    wrong, refused = [], 0
    for low, high in itertools.combinations(bounds, 2):
        for low_name, high_name in itertools.product(("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            schema = {"type": "number", low_name: low, high_name: high}
            try:
                start = compile_grammar(Grammar("json_schema", json.dumps(schema)), tokenizer)
            except GrammarError as error:
                refused += "excludes" in str(error)
                continue
            for text in texts:
                matcher = start.deep_copy()
                allowed_here = matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
                if allowed_here and not Draft202012Validator(schema).is_valid(json.loads(text)):
                    wrong.append((schema, text))
    assert wrong == [] and refused == 6


def test_white_space_in_json_is_bounded(tokenizer: LLTokenizer) -> None:
    grammar = Grammar("json_schema", '{"type": "array", "items": {"type": "null"}}')
    for fine in ("[null]", "[ null, null ]", "[\n  null,\n  null\n]", "[\r\n\t\tnull\r\n]", "[\n" + " " * 40 + "null]"):
        assert accepts(tokenizer, grammar, fine)
    for rambling in ("[\n\nnull]", "[     null]", "[\n" + " " * 41 + "null]", "[null] "):
        assert not accepts(tokenizer, grammar, rambling)


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        (Grammar("regex", "a(("), "regex"),
        (Grammar("json_schema", json.dumps({"enum": [f"{i}" * 5 for i in range(200_000)]})), "too big"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("json_schema", "[1"), "no JSON"),
        (Grammar("json_schema", "[" * 100_000), "no JSON"),
        (Grammar("json_schema", "12"), "object"),
        (Grammar("json_schema", "false"), "satisfies"),
        (Grammar("json_schema", '{"uniqueItems": true, "type": "array"}'), "uniqueItems"),
        (Grammar("json_schema", '{"x-guidance": {"lenient": true}, "uniqueItems": true}'), "uniqueItems"),
        (Grammar("json_schema", '{"oneOf": [{"type": "integer"}, {"minimum": 3, "type": "integer"}]}'), "oneOf"),
        (Grammar("json_schema", '{"type": "number", "exclusiveMinimum": 2, "maximum": 2.5}'), "excludes 2"),
        (Grammar("json_schema", '{"anyOf": [{"items": {"minimum": -0.5, "exclusiveMaximum": 0}}]}'), "excludes 0"),
        (Grammar("json_schema", '{"enum": [[-9223372036854775808]]}'), "the number"),
        (Grammar("json_schema", '{"type": "integer", "minimum": -9.2233720368547758e18, "maximum": 0}'), "the number"),
        (Grammar("json_schema", '{"$ref": "https://example.com/s"}'), "example.com"),
    ],
)
def test_what_is_refused_says_why(tokenizer: LLTokenizer, grammar: Grammar, problem: str) -> None:
    with pytest.raises(GrammarError, match=problem):
        compile_grammar(grammar, tokenizer)


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("regex", "a((", "invalid regex: unclosed group"),
        ("regex", "a\n/b[", "invalid regex: unclosed character class"),
        ("regex", "(?=a)b", "invalid regex: look-around, including look-ahead and look-behind, is not supported"),
        ("lark", "start: b\nb: /h((/", "line 2, column 4: invalid regex: unclosed group"),
        ("lark", "start: nothing", 'line 1, column 8: unknown name: "nothing"'),
        ("json_schema", '{"type": "string", "pattern": "(("}', "invalid regex: unclosed group"),
    ],
)
def test_the_reason_stands_alone(tokenizer: LLTokenizer, kind: str, text: str, problem: str) -> None:
    """Without the grammar that llguidance shows with it, which may be our own translation, and the carets under that."""
    with pytest.raises(GrammarError) as caught:
        compile_grammar(Grammar(kind, text), tokenizer)
    assert str(caught.value) == problem


def test_a_tokenizer_that_can_not_be_used_is_refused() -> None:
    with pytest.raises(GrammarError, match="tokenizer"):
        load_tokenizer(b"{}", VOCAB, (EOS_TOKEN_ID,))
    with pytest.raises(GrammarError, match="tokenizer"):
        load_tokenizer(b"\xff", VOCAB, (EOS_TOKEN_ID,))
    with pytest.raises(GrammarError, match="end-of-sequence"):
        load_tokenizer(ASSETS["tokenizer.json"], VOCAB, ())
    without_end = {**ASSETS, "generation_config.json": b"{}", "config.json": b"{}", "tokenizer_config.json": b"{}"}
    assert load_runner(without_end, VOCAB) is None
    assert load_runner({"config.json": b"["}, VOCAB) is None


def test_the_end_tokens_of_a_model() -> None:
    def no_token(text: str) -> int | None:
        return {"</s>": 9}.get(text)

    assert eos_token_ids({"eos_token_id": 1}, {"eos_token_id": [2, 3, 2]}, {}, no_token) == (2, 3)
    assert eos_token_ids({"eos_token_id": 1}, {"eos_token_id": None}, {}, no_token) == (1,)
    assert eos_token_ids({}, {"eos_token_id": [True, -1]}, {"eos_token": {"content": "</s>"}}, no_token) == (9,)
    assert eos_token_ids({}, {}, {"eos_token": "?"}, no_token) == ()
    assert model_eos(ASSETS) == (EOS_TOKEN_ID,)
    assert [
        vocabulary_of(files) for files in (ASSETS, {}, {"config.json": b"["}, {"config.json": b'{"vocab_size": -1}'})
    ] == [
        VOCAB,
        0,
        0,
        0,
    ]
    by_name = {"tokenizer_config.json": b'{"eos_token": "<bos>"}', "tokenizer.json": ASSETS["tokenizer.json"]}
    assert model_eos(by_name) == (256,)


def test_messages_become_values() -> None:
    choice = common_pb2.Grammar(choice=common_pb2.Choices(values=["a", "é"]))
    assert from_message(choice) == Grammar("choice", '["a", "é"]')
    assert from_message(common_pb2.Grammar(lark="start: x")) == Grammar("lark", "start: x")
    assert from_message(common_pb2.Grammar()) is None


def choices(matcher: RowMatcher) -> list[int]:
    bits = np.zeros(-(-VOCAB // 32), np.int32)
    matcher.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    matcher.finish_mask(bits)
    return np.flatnonzero(allowed(bits, VOCAB)).tolist()


A, B = ord("a"), ord("b")


def test_a_row_ends_where_it_may_and_must(tokenizer: LLTokenizer) -> None:
    start = compile_grammar(Grammar("regex", "a*b"), tokenizer)
    plain = RowMatcher(start, Ends(0, (EOS_TOKEN_ID,), ()), [])
    assert choices(plain) == [A, B]
    plain.advance(B)
    assert choices(plain) == [EOS_TOKEN_ID]
    assert choices(RowMatcher(start, Ends(0, (EOS_TOKEN_ID,), ()), [A, B])) == [EOS_TOKEN_ID]


def test_min_tokens_and_ignored_ends_yield_to_a_complete_output(tokenizer: LLTokenizer) -> None:
    start = compile_grammar(Grammar("regex", "a{0,2}"), tokenizer)
    for ends in (Ends(9, (EOS_TOKEN_ID,), ()), Ends(0, (), (EOS_TOKEN_ID,))):
        row = RowMatcher(start, ends, [])
        for _ in range(2):
            assert choices(row) == [A]
            row.advance(A)
        assert choices(row) == [EOS_TOKEN_ID]
    # Before min_tokens a stop token of the request's own waits, too.
    row = RowMatcher(start, Ends(1, (EOS_TOKEN_ID, A), ()), [])
    assert choices(row) == [A, EOS_TOKEN_ID]  # nothing else is allowed
    either = RowMatcher(compile_grammar(Grammar("regex", "[ab]"), tokenizer), Ends(1, (EOS_TOKEN_ID, A), ()), [])
    assert choices(either) == [B]


def test_a_token_that_the_grammar_does_not_allow_leaves_no_choice(tokenizer: LLTokenizer) -> None:
    start = compile_grammar(Grammar("regex", "a*"), tokenizer)
    for row in (RowMatcher(start, Ends(0, (EOS_TOKEN_ID,), ()), [B]), RowMatcher(start, Ends(0, (), ()), [])):
        if not row.problem:
            row.advance(B)
        assert row.problem and choices(row) == []


def test_work_beyond_the_limits_leaves_no_choice_and_no_end(tokenizer: LLTokenizer) -> None:
    """llguidance would allow the end token then, and an output that is cut short would pass for a complete one."""
    text = LLMatcher.grammar_from_regex("[ab]*a[ab]{16}c")  # its automaton has 2^16 states
    start = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(step_lexer_fuel=100))
    row = RowMatcher(start, Ends(0, (EOS_TOKEN_ID,), ()), [])
    rng = np.random.default_rng(0)
    for _ in range(4_000):
        ids = choices(row)
        if row.problem:
            assert ids == []
            return
        row.advance(int(rng.choice(ids)))
    pytest.fail("the limits were never reached")
