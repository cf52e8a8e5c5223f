"""What tool_choice asks for: the manner, the grammar that llguidance then holds outputs to, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import json_format
from llguidance import LLTokenizer
from octavo.v1 import common_pb2
from octavo.v1 import inference_pb2 as pb

from router.speech.choice import grammar_of, manner_of
from router.speech.dialect import Dialect
from router.speech.manner import PLAIN, CallStyle, Manner, Thought
from router.ticket import grammar_hash
from service.errors import OctavoError, Reason
from service.grammar import GrammarError, from_message, size_problem
from service.guidance import compile_grammar, load_tokenizer
from worker.backends.mock import EOS_TOKEN_ID
from worker.backends.mock_assets import mock_assets

TAGGED = Dialect(CallStyle("<tool_call>\n", "\n</tool_call>", "arguments", "\n"))
THINKING = Dialect(TAGGED.calls, True)
BARE = Dialect(CallStyle("", "", "parameters", "; "))
AUTO, NONE = pb.ToolChoice.MODE_UNSPECIFIED, pb.ToolChoice.MODE_NONE
REQUIRED, NAMED, KNOWN = pb.ToolChoice.MODE_REQUIRED, pb.ToolChoice.MODE_NAMED, pb.ToolChoice.MODE_AUTO
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "parameters": CITY}
CLOCK = {"name": "clock"}
ROME, BAD = '{"name": "weather", "arguments": {"city": "Rome"}}', '{"name": "weather", "arguments": {"city": "Bonn"}}'
NOON = '{"name": "clock", "arguments": {"at": 12}}'
VOCAB = 700


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return load_tokenizer(mock_assets(VOCAB, 160)["tokenizer.json"], VOCAB, (EOS_TOKEN_ID,))


def chat(*functions: Any, mode: int = AUTO, name: str = "", **fields: Any) -> pb.Chat:
    made = pb.Chat(messages=[pb.ChatMessage(role="user")], tool_choice=pb.ToolChoice(mode=mode, name=name), **fields)
    for function in functions:
        json_format.ParseDict({"type": "function", "function": function}, made.tools.add())
    return made


def held(
    tokenizer: LLTokenizer,
    asked: pb.Chat,
    dialect: Dialect,
    text: str,
    prompt: str = "assistant\n",
    given: common_pb2.Grammar | None = None,
) -> bool:
    grammar, _ = grammar_of(asked, manner_of(asked, dialect, prompt, given), given)
    assert grammar is not None and size_problem(grammar) is None
    value = from_message(grammar)
    assert value is not None
    matcher = compile_grammar(value, tokenizer)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def test_required_calls_are_right_or_refused(tokenizer: LLTokenizer) -> None:
    asked = chat(WEATHER, CLOCK, mode=REQUIRED)
    for good in (tagged(ROME), tagged(NOON), tagged(ROME, NOON), tagged(*[ROME] * 16)):
        assert held(tokenizer, asked, TAGGED, good), good
    other = ROME.replace("weather", "whether")
    unclosed = tagged(ROME).removesuffix("</tool_call>")
    for bad in ("", "Hello", tagged(BAD), tagged(other), unclosed, tagged(ROME) + "x", tagged(*[ROME] * 17)):
        assert not held(tokenizer, asked, TAGGED, bad), bad


def test_one_call_where_no_more_may_be_made(tokenizer: LLTokenizer) -> None:
    alone = chat(WEATHER, CLOCK, mode=REQUIRED, parallel_tool_calls=False)
    named = chat(WEATHER, CLOCK, mode=NAMED, name="clock")
    assert held(tokenizer, alone, TAGGED, tagged(ROME)) and not held(tokenizer, alone, TAGGED, tagged(ROME, NOON))
    assert held(tokenizer, named, TAGGED, tagged(NOON))
    assert not held(tokenizer, named, TAGGED, tagged(ROME)) and not held(tokenizer, named, TAGGED, tagged(NOON, NOON))


def test_calls_without_marks(tokenizer: LLTokenizer) -> None:
    asked, call = chat(WEATHER, mode=REQUIRED), ROME.replace("arguments", "parameters")
    assert held(tokenizer, asked, BARE, call) and held(tokenizer, asked, BARE, f"{call}; {call}")
    assert not held(tokenizer, asked, BARE, ROME) and not held(tokenizer, asked, BARE, call[:-1])


def test_strict_tools_hold_calls_and_leave_text_free(tokenizer: LLTokenizer) -> None:
    asked = chat(WEATHER | {"strict": True}, CLOCK)
    for good in ("", "Hello", "Well: " + tagged(ROME), tagged(NOON), "a < b"):
        assert held(tokenizer, asked, TAGGED, good), good
    for bad in (tagged(BAD), "Well: " + tagged(BAD), tagged(ROME) + tagged(BAD), "<tool_call>\nno"):
        assert not held(tokenizer, asked, TAGGED, bad), bad
    call = ROME.replace("arguments", "parameters")
    assert held(tokenizer, asked, BARE, call) and held(tokenizer, asked, BARE, "Hello {")
    assert not held(tokenizer, asked, BARE, BAD.replace("arguments", "parameters"))


def test_calls_come_after_reasoning(tokenizer: LLTokenizer) -> None:
    asked, call = chat(WEATHER, mode=REQUIRED), tagged(ROME)
    for good in (call, f"<think>\n{BAD}\n</think>\n\n{call}"):
        assert held(tokenizer, asked, THINKING, good), good
    assert not held(tokenizer, asked, THINKING, f"<think>hm{call}")
    inside = "assistant\n<think>\n"
    assert held(tokenizer, asked, THINKING, f"hm</think>{call}", inside)
    assert not held(tokenizer, asked, THINKING, call, inside)
    switched_off = "assistant\n<think>\n\n</think>\n\n"
    assert held(tokenizer, asked, THINKING, call, switched_off)
    assert not held(tokenizer, asked, THINKING, f"<think>hm</think>{call}", switched_off)


def test_a_grammar_of_the_request_holds_after_reasoning(tokenizer: LLTokenizer) -> None:
    given = common_pb2.Grammar(json_schema='{"type": "integer"}')
    grammar, path = grammar_of(pb.Chat(), Manner(thought=Thought.OPEN), given)
    assert grammar is not None and path == "grammar" and not given.HasField("after")
    value = from_message(grammar)
    assert value is not None
    for text, good in (("so</think>\n\n12", True), ("so</think>\n\nx", False), ("12", False)):
        matcher = compile_grammar(value, tokenizer)
        assert bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()) is good, text


def test_what_looks_for_no_calls() -> None:
    unknown = Dialect()
    assert manner_of(chat(WEATHER, mode=NONE), TAGGED, "") == PLAIN
    assert manner_of(chat(WEATHER), unknown, "") == PLAIN
    assert manner_of(chat({"name": "no good name"}), unknown, "") == PLAIN
    loose = manner_of(chat(WEATHER), TAGGED, "")
    assert loose == Manner(TAGGED.calls, frozenset({"weather"})) and grammar_of(chat(WEATHER), loose, None) == (
        None,
        "",
    )


@pytest.mark.parametrize(
    ("asked", "dialect", "reason", "field"),
    [
        (chat(WEATHER, mode=REQUIRED), Dialect(), Reason.UNSUPPORTED, "chat.tools"),
        (chat(WEATHER, mode=KNOWN), Dialect(), Reason.UNSUPPORTED, "chat.tools"),
        (chat(mode=REQUIRED), TAGGED, Reason.INVALID_ARGUMENT, "chat.tool_choice"),
        (chat(WEATHER, mode=NAMED, name="clock"), TAGGED, Reason.INVALID_ARGUMENT, "chat.tool_choice.name"),
        (chat(WEATHER, mode=9), TAGGED, Reason.INVALID_ARGUMENT, "chat.tool_choice.mode"),
        (chat(WEATHER, WEATHER, mode=KNOWN), TAGGED, Reason.INVALID_ARGUMENT, "chat.tools[1].function.name"),
        (chat({"name": "a b"}, mode=KNOWN), TAGGED, Reason.INVALID_ARGUMENT, "chat.tools[0].function.name"),
        (chat({"name": "a" * 65}, mode=KNOWN), TAGGED, Reason.INVALID_ARGUMENT, "chat.tools[0].function.name"),
        (
            chat({"name": "a", "parameters": 1}, mode=KNOWN),
            TAGGED,
            Reason.INVALID_ARGUMENT,
            "chat.tools[0].function.parameters",
        ),
    ],
)
def test_what_is_refused(asked: pb.Chat, dialect: Dialect, reason: Reason, field: str) -> None:
    with pytest.raises(OctavoError) as caught:
        manner_of(asked, dialect, "")
    assert caught.value.reason is reason and [v.field for v in caught.value.violations] == [field]


FORM = common_pb2.Grammar(
    json_schema='{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'
)
NEST = '{"name": "<tool_call>\\n{"}'


@pytest.mark.parametrize(("mode", "strict"), [(KNOWN, False), (KNOWN, True), (AUTO, True)])
def test_where_the_model_chooses_the_output_is_calls_or_has_the_form(
    tokenizer: LLTokenizer, mode: int, strict: bool
) -> None:
    asked = chat(WEATHER | {"strict": strict}, CLOCK, mode=mode)
    loosely = [] if strict else [tagged(BAD)]
    for good in (tagged(ROME), tagged(NOON, ROME), '{"name": "x", "b": 1}', NEST, ROME, *loosely):
        assert held(tokenizer, asked, TAGGED, good, given=FORM), good
    for bad in (
        "",
        "Hello",
        "{}",
        f"Well: {tagged(ROME)}",
        tagged(ROME) + '{"name": "x"}',
        '{"name": "x"}' + tagged(ROME),
    ):
        assert not held(tokenizer, asked, TAGGED, bad, given=FORM), bad
    assert not strict or not held(tokenizer, asked, TAGGED, tagged(BAD), given=FORM)
    for good in ('<think>{"name": 1}</think>\n\n{"name": "x"}', f"<think>hm</think>{tagged(ROME)}", '{"name": "x"}'):
        assert held(tokenizer, asked, THINKING, good, given=FORM), good
    assert not held(tokenizer, asked, THINKING, "<think>hm</think>so", given=FORM)


def test_a_form_has_nothing_to_say_of_calls_that_are_asked_for_and_all_where_none_is(tokenizer: LLTokenizer) -> None:
    for asked in (chat(WEATHER, mode=REQUIRED), chat(WEATHER, mode=NAMED, name="weather")):
        for dialect, call in ((TAGGED, tagged(ROME)), (BARE, ROME.replace("arguments", "parameters"))):
            assert held(tokenizer, asked, dialect, call, given=FORM)
            assert not held(tokenizer, asked, dialect, '{"name": "x"}', given=FORM)
    none = chat(WEATHER, mode=NONE)
    assert held(tokenizer, none, TAGGED, '{"name": "x"}', given=FORM)
    assert not held(tokenizer, none, TAGGED, tagged(ROME), given=FORM)


@pytest.mark.parametrize(
    ("dialect", "given"),
    [(BARE, FORM), (TAGGED, common_pb2.Grammar(regex=".*")), (TAGGED, common_pb2.Grammar(lark="start: /.*/"))],
)
def test_what_could_not_be_told_from_calls_is_refused_beside_them(dialect: Dialect, given: common_pb2.Grammar) -> None:
    asked = chat(WEATHER, mode=KNOWN)
    with pytest.raises(OctavoError) as caught:
        grammar_of(asked, manner_of(asked, dialect, "", given), given)
    assert caught.value.reason is Reason.INVALID_ARGUMENT and caught.value.violations[0].field == "grammar"


def test_a_form_beside_calls_needs_a_mark_that_no_json_begins_with() -> None:
    calls = common_pb2.ToolCalls(
        functions=[common_pb2.ToolFunction(name="f")],
        opening="<t>",
        arguments="a",
        most=1,
        or_json_schema="{}",
    )
    assert size_problem(common_pb2.Grammar(calls=calls)) is None
    for opening, free in (("", False), ("[", False), (" <t>", False), ("<t>", True)):
        calls.opening, calls.free = opening, free
        problem = size_problem(common_pb2.Grammar(calls=calls))
        assert problem is not None and problem[0] == "grammar.calls.or_json_schema"


def test_a_schema_that_cannot_be_held_to_names_its_function(tokenizer: LLTokenizer) -> None:
    asked = chat({"name": "odd", "parameters": {"type": "array"}}, mode=REQUIRED)
    with pytest.raises(GrammarError, match="function odd"):
        held(tokenizer, asked, TAGGED, "")


def test_the_grammar_is_the_same_at_every_router() -> None:
    """A resume is told by the hash of the grammar, and the keys of a Struct have no order."""
    asked = chat(WEATHER, CLOCK, mode=REQUIRED)
    again = chat(WEATHER | {"parameters": dict(reversed(list(CITY.items())))}, CLOCK, mode=REQUIRED)
    other = chat(CLOCK, mode=REQUIRED)
    hashes = [grammar_hash(grammar_of(c, manner_of(c, TAGGED, ""), None)[0]) for c in (asked, again, other)]
    assert hashes[0] == hashes[1] != hashes[2] and json.dumps(CITY) != json.dumps(dict(reversed(list(CITY.items()))))
