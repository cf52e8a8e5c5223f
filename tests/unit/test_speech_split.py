"""Content, reasoning and calls in a model's text: found wherever it is cut, and what is no call stays text."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.speech.manner import PLAIN, CallStyle, Manner, Thought
from router.speech.split import CallArguments, CallBegan, Content, Event, Reasoning, Splitter

NAMES = frozenset(("weather", "now"))
HERMES = Manner(CallStyle("<tool_call>\n", "\n</tool_call>", "arguments", "\n"), NAMES)
LLAMA = Manner(CallStyle("", "", "parameters", "; "), NAMES)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome {]\\"", "days": [1, 2]}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
BARE = '{"name": "weather", "parameters": {"city": "Rome"}}'
FIRST = replace(HERMES, exact=True, first=True)
FORM = '{"a": "<tool_call>\\n{ </think>"}'
ARGUMENTS = '{"city": "Rome {]\\"", "days": [1, 2]}'


def told(manner: Manner, *pieces: str) -> dict[str, object]:
    """Everything that the pieces tell, joined."""
    splitter = Splitter(manner)
    events: list[Event] = [event for piece in pieces for event in splitter.feed(piece)] + splitter.finish()
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallBegan):
            assert event.number == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            assert event.number == len(calls) - 1
            calls[-1][1] += event.text
    order = [kind.__name__ for kind, _ in groupby(map(type, events)) if kind is not CallArguments]
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return {"content": content, "reasoning": reasoning, "calls": [tuple(call) for call in calls], "order": order}


def of(content: str = "", reasoning: str = "", *calls: tuple[str, str]) -> dict[str, object]:
    return {"content": content, "reasoning": reasoning, "calls": list(calls)}


WEATHER, TIME = ("weather", ARGUMENTS), ("now", "{}")
CASES = [
    (PLAIN, "a <think>b</think> " + CALL, of("a <think>b</think> " + CALL)),
    (HERMES, "Hello <tool", of("Hello <tool")),
    (HERMES, "Hello  \n", of("Hello  \n")),
    (HERMES, CALL, of("", "", WEATHER)),
    (HERMES, f"\n\n{CALL}\n{NOW}\n", of("", "", WEATHER, TIME)),
    (HERMES, f"I look. \n{CALL}", of("I look.", "", WEATHER)),
    (HERMES, f"{CALL}\nDone <b>", of("\nDone <b>", "", WEATHER)),
    (HERMES, CALL.removesuffix("\n</tool_call>"), of("", "", WEATHER)),
    (HERMES, CALL[:-4], of("", "", WEATHER)),
    (HERMES, CALL[:30], of(CALL[:30])),
    (HERMES, "see <tool_call> here", of("see <tool_call> here")),
    (HERMES, CALL.replace("weather", "nope"), of(CALL.replace("weather", "nope"))),
    (HERMES, CALL.replace("[1, 2]", "[1, }"), of(CALL.replace("[1, 2]", "[1, }"))),
    (HERMES, CALL.replace("[1, 2]", "NaN"), of(CALL.replace("[1, 2]", "NaN"))),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', of("", "", ("now", '{"a": 1}'))),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', of("", "", TIME)),
    (HERMES, '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', of("", "", TIME)),
    (HERMES, '<tool_call>{"name": "now", "arguments": []}x', of('<tool_call>{"name": "now", "arguments": []}x')),
    (HERMES, '<tool_call>{"name": "now", }x', of('<tool_call>{"name": "now", }x')),
    (HERMES, f"a{' ' * 70}{CALL}", of("a" + " " * 70, "", WEATHER)),
    (LLAMA, BARE, of("", "", ("weather", '{"city": "Rome"}'))),
    (LLAMA, f" <|python_tag|>{BARE}; {BARE}\n", of("", "", *[("weather", '{"city": "Rome"}')] * 2)),
    (LLAMA, f"No: {BARE}", of(f"No: {BARE}")),
    (LLAMA, " {7}", of(" {7}")),
    (LLAMA, f"{BARE}; {{7}}", of("; {7}", "", ("weather", '{"city": "Rome"}'))),
    (LLAMA, f"{BARE} and so", of(" and so", "", ("weather", '{"city": "Rome"}'))),
    (LLAMA, "<|python", of("<|python")),
    (replace(HERMES, exact=True), f"{CALL}\n{NOW}", of("", "", WEATHER, TIME)),
    (replace(HERMES, exact=True), CALL[:70], of("", "", ("weather", CALL[CALL.index(ARGUMENTS) : 70]))),
    (replace(HERMES, exact=True), CALL[:30], of()),
    (replace(HERMES, exact=True), "Hello <tool", of("Hello <tool")),
    (replace(HERMES, exact=True), "Hello <tool_call>", of("Hello")),
    (FIRST, CALL[:5], of()),
    (FIRST, CALL[:14], of()),
    (FIRST, CALL[:40], of()),
    (FIRST, CALL[:45], of("", "", ("weather", ""))),
    (FIRST, f"{CALL}\n<tool", of("", "", WEATHER)),
    (FIRST, f"{CALL}\n{NOW}", of("", "", WEATHER, TIME)),
    (FIRST, FORM, of(FORM)),
    (replace(FIRST, thought=Thought.ALLOWED), "<", of()),
    (replace(FIRST, thought=Thought.ALLOWED), f"<think>hm</think>\n\n{FORM}", of(FORM, "hm")),
    (replace(FIRST, thought=Thought.OPEN), f"hm</think>\n\n{CALL}", of("", "hm", WEATHER)),
    (replace(LLAMA, exact=True, first=True), BARE[:20], of()),
    (replace(LLAMA, exact=True, first=True), f"{BARE}; {BARE[:9]}", of("", "", ("weather", '{"city": "Rome"}'))),
    (replace(LLAMA, exact=True), f"{BARE}; {BARE}", of("", "", *[("weather", '{"city": "Rome"}')] * 2)),
    (replace(HERMES, thought=Thought.ALLOWED), f"<think>\nhm </think>\n\n{CALL}", of("", "hm", WEATHER)),
    (replace(HERMES, thought=Thought.ALLOWED), f" {CALL}", of("", "", WEATHER)),
    (HERMES, CALL.replace("\n</tool", "\n" * 65 + "</tool"), of("\n" * 65 + "</tool_call>", "", WEATHER)),
    (
        HERMES,
        '<tool_call>{"name": "now", "arguments": {"a": 1' + "0" * 5_000 + "}}",
        of("", "", ("now", '{"a": 1' + "0" * 5_000 + "}")),
    ),
    (
        replace(HERMES, exact=True),
        '<tool_call>{"name": "\\q", "arguments": {',
        of('<tool_call>{"name": "\\q", "arguments": {'),
    ),
    (
        replace(HERMES, exact=True),
        '<tool_call>{"name": "\n", "arguments": {',
        of('<tool_call>{"name": "\n", "arguments": {'),
    ),
    (replace(LLAMA, exact=True), f"<|python_tag|>{BARE}", of(f"<|python_tag|>{BARE}")),
    (replace(LLAMA, exact=True), f" {BARE}", of(f" {BARE}")),
    (Manner(thought=Thought.ALLOWED), "\n<thin", of("\n<thin")),
    (Manner(thought=Thought.ALLOWED), " a <think>b</think>", of(" a <think>b</think>")),
    (Manner(thought=Thought.ALLOWED), "<think></think>\nyes", of("yes")),
    (Manner(thought=Thought.OPEN), "hm </thin is it\n</think>\n\nyes </think>", of("yes </think>", "hm </thin is it")),
    (Manner(thought=Thought.OPEN), "hm <b", of("", "hm <b")),
]


@pytest.mark.parametrize(("manner", "text", "expected"), CASES)
def test_what_a_text_tells(manner: Manner, text: str, expected: dict[str, object]) -> None:
    whole = told(manner, text)
    assert {key: whole[key] for key in expected} == expected
    assert told(manner, *text) == whole
    for at in range(len(text)):
        assert told(manner, text[:at], text[at:]) == whole


_MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<", "<to", "</th", "; "]
_JSON = [CALL, NOW, BARE, '{"name": "now", "arguments": ', '{"name": "', "{", "}", '"', "\\", "a", "\n", " ", " " * 40]
_PARTS = st.sampled_from([*_MARKS, *_JSON])


@given(
    st.sampled_from([HERMES, LLAMA]),
    st.sampled_from([(False, False), (True, False), (True, True)]),
    st.sampled_from(Thought),
    st.lists(_PARTS, max_size=12),
    st.data(),
)
def test_the_cuts_do_not_matter(
    manner: Manner, held: tuple[bool, bool], thought: Thought, parts: list[str], data: st.DataObject
) -> None:
    exact, first = held
    manner = replace(manner, exact=exact, first=first, thought=thought)
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole = told(manner, text)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert told(manner, *pieces) == whole
    assert told(manner, *text) == whole
    for _, arguments in whole["calls"]:
        if not exact:
            assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("exact", [False, True])
def test_a_long_call_in_single_characters(exact: bool) -> None:
    """Each is looked at once: what grew with the square would take minutes."""
    arguments = '{"a": "' + "x " * 200_000 + '"}'
    text = '<tool_call>\n{"name": "now", "arguments": ' + arguments + "}\n</tool_call>"
    assert told(replace(HERMES, exact=exact), *text)["calls"] == [("now", arguments)]
    assert told(replace(HERMES, thought=Thought.OPEN), *" \n" * 100_000)["content"] == ""


def test_a_value_of_any_depth_is_no_call() -> None:
    deep = '<tool_call>{"name": "now", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}</tool_call>"
    assert told(HERMES, deep)["content"] == deep
