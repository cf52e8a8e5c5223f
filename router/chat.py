"""A Chat message of the contracts as the plain values that chat templates expect (the shapes of the OpenAI API, as on the Hub)."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format, struct_pb2
from octavo.v1 import inference_pb2

from service.errors import OctavoError, Reason

# How tool descriptions are written in the data that models were trained on; other keys follow by name.
_KEY_ORDER = ("type", "function", "name", "description", "parameters", "properties", "enum", "items", "required")


def messages(chat: inference_pb2.Chat) -> list[dict[str, Any]]:
    """The turns. Text parts are joined; a turn without content has the empty text."""
    return [_message(message) for message in chat.messages]


def tools(chat: inference_pb2.Chat) -> list[dict[str, Any]]:
    """The tool descriptions, as they were given; none where none is to be called."""
    if chat.tool_choice.mode == inference_pb2.ToolChoice.MODE_NONE:
        return []
    return [plain(tool) for tool in chat.tools]


def template_args(chat: inference_pb2.Chat) -> dict[str, Any]:
    """The further variables, as they were given."""
    return plain(chat.template_args)


def plain(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A Struct as dicts and lists.

    Its only number is the double: whole ones become integers again, as JSON writes them. Its keys have no order, so they
    get one: the prompt must be the same at every router, for the prefix cache and for resumes.
    Raises INVALID_ARGUMENT for infinity and NaN, which JSON has not.
    """
    try:
        value: dict[str, Any] = _canonical(json_format.MessageToDict(struct))
    except (ValueError, json_format.Error) as error:
        raise OctavoError(Reason.INVALID_ARGUMENT, f"chat: a value that JSON can't hold: {error}") from None
    return value


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": "".join(part.text for part in message.content)}
    if message.name:
        shown["name"] = message.name
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        shown["reasoning_content"] = message.reasoning
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": plain(call.arguments)}}
            for call in message.tool_calls
        ]
    return shown


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical(value[key]) for key in sorted(value, key=_key_order)}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return value


def _key_order(key: str) -> tuple[int, str]:
    return (_KEY_ORDER.index(key) if key in _KEY_ORDER else len(_KEY_ORDER), key)
