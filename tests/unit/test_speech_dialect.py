"""How models write calls and reasoning, found in abridged templates that show calls as those of Qwen, Hermes and Llama do."""

from __future__ import annotations

import pytest

from router.speech.dialect import Dialect, find_dialect, thought_after, thought_within
from router.speech.manner import CallStyle, Thought
from router.template import ChatTemplate
from tests.unit.tool_templates import LLAMA_3, MISTRAL, QWEN_2, REASONER

TAGGED = CallStyle("<tool_call>\n", "\n</tool_call>", "arguments", "\n")
BARE = CallStyle("", "", "parameters", "; ")

# The instructions show the form too, without a name: that must not be taken for a call.
QWEN = """{% if tools %}<|im_start|>system
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}{% for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls %}{% set call = call.function %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
LLAMA = """{% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{ '}<|eot_id|>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"""
NO_THINKING = QWEN.replace("<think>", "").replace("</think>", "")


@pytest.mark.parametrize(
    ("source", "dialect"),
    [
        (NO_THINKING, Dialect(TAGGED, False)),
        (QWEN, Dialect(TAGGED, True)),
        (LLAMA, Dialect(BARE, False)),
        (LLAMA.replace("}<|eot_id|>", "}\n</tool_call>"), Dialect(None, False)),  # closed, never opened
        (QWEN.replace('{"name": "', '[TOOL_CALLS]{"fn": "'), Dialect(None, True)),
        (MISTRAL, Dialect(None, False)),  # a list after a mark that is not known
        (QWEN_2, Dialect(TAGGED, False)),
        (REASONER, Dialect(TAGGED, True)),
        (LLAMA_3, Dialect(BARE, False)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", Dialect(None, False)),
        ("{{ raise_exception('no tools here') }}", Dialect(None, False)),
        ("{% for i in range(100000000) %}{{ i }}{% endfor %}</think>", Dialect(None, True)),
    ],
)
def test_what_a_template_shows(source: str, dialect: Dialect) -> None:
    assert find_dialect(ChatTemplate(source, {"bos_token": "<s>"})) == dialect


@pytest.mark.parametrize(
    ("prompt", "thought"),
    [
        ("<|im_start|>assistant\n<think>\n", Thought.OPEN),
        ("<|im_start|>assistant\n<think>", Thought.OPEN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Thought.NONE),
        ("<|im_start|>assistant\n", Thought.ALLOWED),
        ("what is <think>?<|im_start|>assistant\n", Thought.ALLOWED),
    ],
)
def test_where_the_output_begins(prompt: str, thought: Thought) -> None:
    assert thought_after(prompt) is thought


@pytest.mark.parametrize(
    ("prompt", "final", "thought"),
    [
        ("user\n<think>\nassistant\nso", "so", Thought.NONE),
        ("assistant\n<think>\nso", " so ", Thought.OPEN),  # opened by the template
        ("assistant\n<think>\n\n</think>\n\n<think>so", "<think>so", Thought.OPEN),
        ("assistant\n<think>so</think>", "<think>so</think>", Thought.NONE),
        ("assistant\nso</think>then", "so</think>then", Thought.NONE),
        ("assistant\n</think><think>", "</think><think>", Thought.OPEN),
    ],
)
def test_where_an_output_begins_that_goes_on_with_the_last_message(prompt: str, final: str, thought: Thought) -> None:
    assert thought_within(prompt, final) is thought


def test_thinking_can_be_switched_off_by_the_template() -> None:
    template = ChatTemplate(QWEN, {})
    turns = [{"role": "user", "content": "Hello"}]
    assert thought_after(template.render(turns)) is Thought.ALLOWED
    assert thought_after(template.render(turns, template_args={"enable_thinking": False})) is Thought.NONE
