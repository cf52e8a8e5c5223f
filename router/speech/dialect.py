"""How a model writes calls and reasoning, read from what its chat template makes of them.

A template says how calls are written where it shows earlier ones. So one conversation with a call is rendered, once for a model, and
what stands around the call is looked at. Two forms are known: that of Hermes and Qwen, `{"name": …, "arguments": …}` between
`<tool_call>` and `</tool_call>`, and that of Llama 3, `{"name": …, "parameters": …}` alone. A template with another form has no calls
here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from router.speech.manner import CallStyle, Thought
from router.template import ChatTemplate, TemplateFailure

THINK, THOUGHT = "<think>", "</think>"
_NAME = "octavo_probe"
_CALL = re.compile(
    r"(?:(?P<opening><tool_call>\s{0,4}))?"
    r'\{"name": "octavo_probe", "(?P<arguments>arguments|parameters)": \{"probe": "found"\}\}'
    r"(?:(?P<closing>\s{0,4}</tool_call>))?"
)
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Nothing.",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}},
    },
}
_CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdef012", "type": "function", "function": {"name": _NAME, "arguments": {"probe": "found"}}}
        ],
    },
]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a model's template shows. `thinks`: whether it marks reasoning; `thought_tokens`: the marks, where each is one token."""

    calls: CallStyle | None = None
    thinks: bool = False
    thought_tokens: tuple[int, int] | None = None

    @property
    def marks(self) -> frozenset[str]:
        """Texts around calls and reasoning. They are part of the output, whatever the tokenizer takes them for."""
        around = () if self.calls is None else (self.calls.opening.strip(), self.calls.closing.strip())
        return frozenset((*around, *((THINK, THOUGHT) if self.thinks else ()))) - {""}


def find_dialect(template: ChatTemplate) -> Dialect:
    """The dialect of a template. Costs one rendering."""
    thinks = THOUGHT in template.source
    try:
        shown = template.render(_CONVERSATION, tools=[_TOOL], add_generation_prompt=False)
    except TemplateFailure:
        return Dialect(None, thinks)
    calls = list(_CALL.finditer(shown))
    if not calls:
        return Dialect(None, thinks)
    found = calls[-1]  # a template may show the form in its instructions, too
    if bool(found["opening"]) != bool(found["closing"]):
        return Dialect(None, thinks)
    if found["opening"]:
        return Dialect(CallStyle(found["opening"], found["closing"], found["arguments"], "\n"), thinks)
    if found["arguments"] != "parameters":  # in a list, or after a mark that is not known
        return Dialect(None, thinks)
    return Dialect(CallStyle("", "", "parameters", "; "), thinks)


def thought_after(prompt: str) -> Thought:
    """Where the output of a model that thinks begins."""
    end = prompt[-64:].rstrip()
    if end.endswith(THINK):
        return Thought.OPEN
    return Thought.NONE if end.endswith(THOUGHT) else Thought.ALLOWED


def thought_within(prompt: str, final: str) -> Thought:
    """Where an output begins that goes on with `final`, the text of the last message, with which the prompt ends: a thought that was
    begun there goes on. It does not begin another one.
    """
    opened, closed = final.rfind(THINK), final.rfind(THOUGHT)
    if opened == closed:  # neither is there; the template may have opened one
        before = prompt[: prompt.rfind(final.strip())]
        return Thought.OPEN if thought_after(before) is Thought.OPEN else Thought.NONE
    return Thought.OPEN if opened > closed else Thought.NONE
