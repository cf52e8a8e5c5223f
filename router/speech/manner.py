"""How the outputs of one request are to be read: what in their text is reasoning, and what a call of a tool."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a model writes calls, as its chat template shows them: `{"name": …, "<arguments>": {…}}` between the marks."""

    opening: str  # "<tool_call>" of Hermes and Qwen; "" where the JSON stands alone, as with Llama 3
    closing: str  # "</tool_call>"; "" likewise
    arguments: str  # the member that holds them: "arguments", or "parameters" with Llama 3
    separator: str  # between two calls: "\n", or "; " with Llama 3


class Thought(Enum):
    """Where the reasoning stands."""

    NONE = "none"  # the template marks none
    ALLOWED = "allowed"  # the output may begin with <think>
    OPEN = "open"  # the prompt ends with <think>, so the output begins inside


@dataclass(frozen=True, slots=True)
class Manner:
    """`functions`: names that may be called. `exact`: a grammar holds the calls to their schemas, so that their arguments can be told
    as they are written; without one a call is told once it is whole and known to be one, and what is none is text. `first`: the
    grammar has calls at the beginning of the answer or nowhere. Where another form may stand instead, their marks may well be in it.
    """

    calls: CallStyle | None = None
    functions: frozenset[str] = frozenset()
    exact: bool = False
    thought: Thought = Thought.NONE
    first: bool = False
    thought_tokens: tuple[int, int] | None = None  # <think> and </think>, where each is one token


PLAIN = Manner()
