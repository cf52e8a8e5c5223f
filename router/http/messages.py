"""A conversation in OpenAI's shape as the contracts' Chat."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format, struct_pb2
from octavo.v1 import inference_pb2

from router.http.errors import invalid, unsupported
from router.http.fields import Fields
from router.validate import MAX_CHAT_PARTS, MAX_MESSAGES, MAX_STRUCT_BYTES, MAX_TOOLS

_VALUE_BYTES = 4  # of the smallest Value in its list or map
_NUMBER_BYTES = 11
EFFORT = "reasoning_effort"
"""The variable by which chat templates know how much to think."""
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


class Room:
    """What one conversation may still hold of that which is converted piece by piece: told before it is converted, and never less
    than router/validate.py allows.
    """

    def __init__(self) -> None:
        self._parts = MAX_CHAT_PARTS
        self._struct_bytes = MAX_STRUCT_BYTES

    def take_parts(self, count: int, path: str) -> None:
        """Content parts or tool calls. Raises a 400."""
        self._parts -= count
        if self._parts < 0:
            raise invalid(path, f"the messages must have at most {MAX_CHAT_PARTS} parts and tool calls")

    def take_struct(self, value: dict[str, Any], path: str) -> None:
        """An object that becomes a Struct, at its least size. Raises a 400."""
        waiting: list[Any] = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, dict):
                waiting.extend(one.values())
                self._struct_bytes -= sum(map(len, one))
            elif isinstance(one, list):
                waiting.extend(one)
            elif isinstance(one, str):
                self._struct_bytes -= len(one)
            elif isinstance(one, int | float) and not isinstance(one, bool):
                self._struct_bytes -= _NUMBER_BYTES - _VALUE_BYTES
            self._struct_bytes -= _VALUE_BYTES
            if self._struct_bytes < -_VALUE_BYTES:  # the outermost is no Value
                raise invalid(path, f"tools and arguments must have at most {MAX_STRUCT_BYTES} bytes")
        self._struct_bytes += _VALUE_BYTES


def take_chat(fields: Fields, chat: inference_pb2.Chat) -> Room:
    """messages, and how the template is rendered. Returns the room that is left."""
    messages = fields.take("messages")
    if not isinstance(messages, list):
        raise invalid(fields.path("messages"), "must be a list of messages")
    if not messages:
        raise invalid(fields.path("messages"), "must have at least one entry")
    if len(messages) > MAX_MESSAGES:
        raise invalid(fields.path("messages"), f"must have at most {MAX_MESSAGES} entries, has {len(messages)}")
    room = Room()
    for index, message in enumerate(messages):
        take_message(Fields(message, f"{fields.path('messages')}[{index}]"), chat, room)
    take_template(fields, chat, room)
    return room


def take_template(fields: Fields, chat: inference_pb2.Chat, room: Room) -> None:
    """How the template is rendered."""
    if (opened := fields.flag("add_generation_prompt")) is not None:
        chat.add_generation_prompt = opened
    if fields.flag("continue_final_message"):
        chat.continue_final_message = True
    if (args := fields.take("chat_template_kwargs")) is not None:
        path = fields.path("chat_template_kwargs")
        if isinstance(args, dict) and len(args) > MAX_TOOLS:
            raise invalid(path, f"must have at most {MAX_TOOLS} entries, has {len(args)}")
        struct(args, path, chat.template_args, room)
    fields.only("add_special_tokens", False)  # the template writes them
    fields.refuse(("chat_template", "documents", "response_role"))


def take_effort(fields: Fields, name: str, chat: inference_pb2.Chat) -> str:
    """How much to think, from the member `name`: the template's business. Returns that member's path, "" where it says nothing."""
    effort, path = fields.text(name), fields.path(name)
    if effort is None:
        return ""
    if effort not in _EFFORTS:
        raise invalid(path, f"must be one of {', '.join(_EFFORTS)}")
    args = chat.template_args
    if EFFORT in args.fields and args.fields[EFFORT].string_value != effort:
        raise invalid(path, "must not differ from that of chat_template_kwargs")
    args[EFFORT] = effort
    return path


def take_message(fields: Fields, chat: inference_pb2.Chat, room: Room) -> None:
    """One turn. A client may send back what it got, so what is null or empty in an answer is none of its fields."""
    message = chat.messages.add(role=fields.text("role") or "", name=fields.text("name") or "")
    message.tool_call_id = fields.text("tool_call_id") or ""
    fields.take("provider_specific_fields")  # litellm keeps there what OpenAI's messages lack, and sends it back
    content = fields.take("content")
    if isinstance(content, str):
        room.take_parts(1, fields.path("content"))
        message.content.add(text=content)
    elif isinstance(content, list):
        room.take_parts(len(content), fields.path("content"))
        for index, part in enumerate(content):
            message.content.add(text=_text_of(part, f"{fields.path('content')}[{index}]"))
    elif content is not None:
        raise invalid(fields.path("content"), "must be a string or a list of parts")
    calls = fields.take("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise invalid(fields.path("tool_calls"), "must be a list")
    room.take_parts(len(calls or ()), fields.path("tool_calls"))
    for index, call in enumerate(calls or ()):
        _take_call(Fields(call, f"{fields.path('tool_calls')}[{index}]"), message, room)
    fields.only("annotations", [])
    fields.only("refusal", "")
    reasoning = fields.text("reasoning_content")
    message.reasoning = fields.text("reasoning") or reasoning or ""
    fields.refuse(("audio", "function_call", "partial", "prefix"))
    fields.finish()
    # A model's own turn may be calls or thoughts alone.
    if not message.content and not (message.role == "assistant" and (message.tool_calls or message.reasoning)):
        raise invalid(fields.path("content"), "is missing")


def _text_of(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    fields = Fields(part, path)
    kind = fields.text("type")
    if kind not in ("text", "input_text", "output_text", None):
        raise unsupported(fields.path("type"), f"content of type {kind[:40]!r} is not supported: only text is")
    text = fields.text("text")
    if text is None:
        raise invalid(fields.path("text"), "must be a string")
    fields.only("annotations", [])
    fields.only("logprobs", [])
    fields.finish()
    return text


def _take_call(fields: Fields, message: inference_pb2.ChatMessage, room: Room) -> None:
    fields.only("type", "function")
    fields.take("index")
    call = message.tool_calls.add(id=fields.text("id") or "")
    function = fields.object("function")
    if function is None:
        raise invalid(fields.path("function"), "must be an object")
    call.name = function.text("name") or ""
    arguments = function.take("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise invalid(function.path("arguments"), "must be an object in JSON") from None
    if arguments is not None:
        struct(arguments, function.path("arguments"), call.arguments, room)
    function.finish()
    fields.finish()


def struct(value: Any, path: str, into: struct_pb2.Struct, room: Room) -> None:
    """A JSON object as a Struct."""
    if not isinstance(value, dict):
        raise invalid(path, "must be an object")
    room.take_struct(value, path)
    try:
        json_format.ParseDict(value, into)
    except (json_format.ParseError, ValueError, OverflowError, RecursionError):
        raise invalid(path, "holds what can't be passed on: a number beyond a double, or too deep a nesting") from None
