"""How a model writes calls, found in what its template makes of one."""

from __future__ import annotations

import pytest

from router.speech.dialect import Dialect, find_dialect, thought_after
from router.speech.manner import CallStyle, Thought
from router.template import ChatTemplate
from tests.unit.test_router_fakes import CHATML
from tests.unit.tool_templates import LLAMA_3, MISTRAL, QWEN_2, QWEN_3, REASONER

HERMES = CallStyle("<tool_call>\n", "\n</tool_call>", "arguments", "\n")


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        (QWEN_2, Dialect(HERMES)),
        (QWEN_3, Dialect(HERMES, thinks=True)),
        (REASONER, Dialect(HERMES, thinks=True)),
        (LLAMA_3, Dialect(CallStyle("", "", "parameters", "; "))),
        (MISTRAL, Dialect()),
        (CHATML, Dialect()),
        ("{{ raise_exception('no') }}</think>", Dialect(thinks=True)),
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", Dialect()),
        ("{{ messages[1].tool_calls[0].function | tojson }}</tool_call>", Dialect()),
    ],
)
def test_what_a_template_shows(template: str, dialect: Dialect) -> None:
    assert find_dialect(ChatTemplate(template, {"bos_token": "<s>"})) == dialect


@pytest.mark.parametrize(
    ("prompt", "thought"),
    [
        ("a<think>\n", Thought.OPEN),
        ("a<think>\n\n</think>\n\n", Thought.NONE),
        ("<think>b</think> assistant\n", Thought.ALLOWED),
        ("", Thought.ALLOWED),
    ],
)
def test_where_the_output_begins(prompt: str, thought: Thought) -> None:
    assert thought_after(prompt) is thought
