"""What a conversation asks of the model's calls, as the manner to read its outputs in and the grammar that holds them to it."""

from __future__ import annotations

import json
import re
from typing import Any

from octavo.v1 import common_pb2, inference_pb2

from router import chat as chats
from router.speech.dialect import THINK, THOUGHT, Dialect, thought_after, thought_within
from router.speech.manner import PLAIN, CallStyle, Manner, Thought
from service.errors import FieldViolation, OctavoError, Reason
from service.grammar import MAX_FUNCTIONS, size_problem

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}\Z")
_MOST_CALLS = 16
_Choice = inference_pb2.ToolChoice


def manner_of(
    chat: inference_pb2.Chat,
    dialect: Dialect,
    prompt: str,
    given: common_pb2.Grammar | None = None,
    model: str = "",
) -> Manner:
    """How the answer to `chat`, rendered as `prompt`, is to be read; `given`: the grammar of the request; `model`: its name, for the
    error. Raises INVALID_ARGUMENT and UNSUPPORTED.
    """
    thought = _thought(chat, prompt) if dialect.thinks else Thought.NONE
    mode = chat.tool_choice.mode
    if mode not in _Choice.Mode.values():
        raise _invalid("chat.tool_choice.mode", "is none that this server knows")
    enforced = mode in (_Choice.MODE_REQUIRED, _Choice.MODE_NAMED)
    if enforced and not chat.tools:
        raise _invalid("chat.tool_choice", "needs tools")
    plain = PLAIN if thought is Thought.NONE else Manner(thought=thought, thought_tokens=dialect.thought_tokens)
    if not chat.tools or mode == _Choice.MODE_NONE or (dialect.calls is None and mode == _Choice.MODE_UNSPECIFIED):
        return plain
    if dialect.calls is None:
        name = f"model {model[:64]}" if model else "model"
        description = f"the {name} cannot call tools: its chat template shows no calls in a form that this server knows"
        raise OctavoError(
            Reason.UNSUPPORTED,
            f"chat.tools: {description}",
            violations=[FieldViolation("chat.tools", description)],
        )
    try:
        functions = _functions(chat)
    except OctavoError:
        if mode == _Choice.MODE_UNSPECIFIED:  # tools of another kind are for the template alone
            return plain
        raise
    if mode == _Choice.MODE_NAMED and chat.tool_choice.name not in functions:
        raise _invalid("chat.tool_choice.name", "must be the name of one of the tools")
    strict = any(function.get("strict") is True for function in functions.values())
    held = strict or not _several(chat)
    first = enforced or (given is not None and (held or mode == _Choice.MODE_AUTO))
    return Manner(dialect.calls, frozenset(functions), held or first, thought, first, dialect.thought_tokens)


def grammar_of(
    chat: inference_pb2.Chat, manner: Manner, given: common_pb2.Grammar | None
) -> tuple[common_pb2.Grammar | None, str]:
    """The grammar of the answer, and the field that asked for it. `given`: that of the request, which has nothing to say of calls that
    are enforced. Raises INVALID_ARGUMENT.
    """
    grammar, path = None, ""
    if manner.calls is not None and manner.exact:
        calls = _calls(chat, manner.calls)
        if manner.first and calls.free:
            assert given is not None
            calls.free, calls.or_json_schema = False, _schema_beside(manner.calls, given)
        grammar, path = common_pb2.Grammar(calls=calls), "chat.tools"
        if (problem := size_problem(grammar)) is not None:
            raise _invalid(path, problem[1])
    elif given is not None:
        grammar, path = common_pb2.Grammar(), "grammar"
        grammar.CopyFrom(given)  # a part of a message keeps all of it in memory, the prompt's text too
    if grammar is not None and manner.thought is not Thought.NONE and not grammar.HasField("after"):
        grammar.after.closing = THOUGHT
        grammar.after.opening = "" if manner.thought is Thought.OPEN else THINK
    return grammar, path


def _thought(chat: inference_pb2.Chat, prompt: str) -> Thought:
    if not chat.continue_final_message:
        return thought_after(prompt)
    return thought_within(prompt, "".join(part.text for part in chat.messages[-1].content))


def _schema_beside(style: CallStyle, given: common_pb2.Grammar) -> str:
    """What may stand instead of calls. The first character has to tell which it is (service/guidance.py). Raises INVALID_ARGUMENT."""
    if not given.json_schema:
        raise _invalid(
            "grammar", "can't be combined with tools that the model may call or not, unless it is a JSON schema"
        )
    if given.HasField("after"):
        raise _invalid("grammar.after", "can't be combined with tools")
    if not style.opening.strip():
        raise _invalid(
            "grammar",
            "can't be combined with tools that the model may call or not: this model's calls begin as JSON does."
            " With a tool_choice of none, required or a function it can",
        )
    return given.json_schema


def _calls(chat: inference_pb2.Chat, style: CallStyle) -> common_pb2.ToolCalls:
    choice, functions = chat.tool_choice, _functions(chat)
    named = choice.mode == _Choice.MODE_NAMED
    several = not named and _several(chat)
    calls = common_pb2.ToolCalls(
        opening=style.opening,
        closing=style.closing,
        separator=style.separator,
        arguments=style.arguments,
        most=_MOST_CALLS if several else 1,
        free=choice.mode not in (_Choice.MODE_REQUIRED, _Choice.MODE_NAMED),
    )
    for name, function in functions.items():
        if named and name != choice.name:
            continue
        held = not calls.free or function.get("strict") is True
        schema = function.get("parameters") if held else None
        calls.functions.add(name=name, json_schema="" if schema is None else json.dumps(schema, ensure_ascii=False))
    return calls


def _several(chat: inference_pb2.Chat) -> bool:
    return chat.parallel_tool_calls or not chat.HasField("parallel_tool_calls")


def _functions(chat: inference_pb2.Chat) -> dict[str, dict[str, Any]]:
    """The functions of the tools by name. Raises INVALID_ARGUMENT."""
    if len(chat.tools) > MAX_FUNCTIONS:
        raise _invalid("chat.tools", f"must have at most {MAX_FUNCTIONS} entries, has {len(chat.tools)}")
    functions: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(chats.tools(chat)):
        path = f"chat.tools[{index}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise _invalid(path, 'must be {"type": "function", "function": {…}}')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.match(name):
            raise _invalid(f"{path}.function.name", "must be 1 to 64 of a-z, A-Z, 0-9, _, . and -")
        if name in functions:
            raise _invalid(f"{path}.function.name", "must not be that of another one")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise _invalid(f"{path}.function.parameters", "must be a JSON schema")
        functions[name] = function
    return functions


def _invalid(path: str, description: str) -> OctavoError:
    violation = FieldViolation(path, description)
    return OctavoError(Reason.INVALID_ARGUMENT, f"{path}: {description}", violations=[violation])
