"""A conversation in OpenAI's shape as the contracts' Chat."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format, struct_pb2
from octavo.v1 import inference_pb2

from router.http.errors import invalid, unsupported
from router.http.fields import Fields
from router.validate import MAX_CHAT_PARTS, MAX_MESSAGES


def take_chat(fields: Fields, chat: inference_pb2.Chat) -> None:
    """messages, and how the template is rendered."""
    messages = fields.take("messages")
    if not isinstance(messages, list):
        raise invalid(fields.path("messages"), "must be a list of messages")
    if len(messages) > MAX_MESSAGES:
        raise invalid(fields.path("messages"), f"must have at most {MAX_MESSAGES} entries, has {len(messages)}")
    for index, message in enumerate(messages):
        take_message(Fields(message, f"{fields.path('messages')}[{index}]"), chat)
    take_template(fields, chat)


def take_template(fields: Fields, chat: inference_pb2.Chat) -> None:
    """How the template is rendered."""
    if (opened := fields.flag("add_generation_prompt")) is not None:
        chat.add_generation_prompt = opened
    if fields.flag("continue_final_message"):
        chat.continue_final_message = True
    if (args := fields.take("chat_template_kwargs")) is not None:
        struct(args, fields.path("chat_template_kwargs"), chat.template_args)
    fields.only("add_special_tokens", False)  # the template writes them
    fields.refuse(("chat_template", "documents", "response_role"))


def take_message(fields: Fields, chat: inference_pb2.Chat) -> None:
    """One turn. A client may send back what it got, so what is null or empty in an answer is none of its fields."""
    message = chat.messages.add(role=fields.text("role") or "", name=fields.text("name") or "")
    message.tool_call_id = fields.text("tool_call_id") or ""
    content = fields.take("content")
    if isinstance(content, str):
        message.content.add(text=content)
    elif isinstance(content, list):
        if len(content) > MAX_CHAT_PARTS:
            raise invalid(fields.path("content"), f"must have at most {MAX_CHAT_PARTS} parts")
        for index, part in enumerate(content):
            message.content.add(text=_text_of(part, f"{fields.path('content')}[{index}]"))
    elif content is not None:
        raise invalid(fields.path("content"), "must be a string or a list of parts")
    calls = fields.take("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise invalid(fields.path("tool_calls"), "must be a list")
    for index, call in enumerate(calls or ()):
        _take_call(Fields(call, f"{fields.path('tool_calls')}[{index}]"), message)
    fields.only("annotations", [])
    fields.only("refusal", "")
    fields.refuse(("audio", "function_call", "reasoning", "reasoning_content", "partial", "prefix"))
    fields.finish()


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


def _take_call(fields: Fields, message: inference_pb2.ChatMessage) -> None:
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
        struct(arguments, function.path("arguments"), call.arguments)
    function.finish()
    fields.finish()


def struct(value: Any, path: str, into: struct_pb2.Struct) -> None:
    """A JSON object as a Struct."""
    if not isinstance(value, dict):
        raise invalid(path, "must be an object")
    try:
        json_format.ParseDict(value, into)
    except (json_format.ParseError, ValueError, OverflowError, RecursionError):
        raise invalid(path, "holds what can't be passed on: a number beyond a double, or too deep a nesting") from None
