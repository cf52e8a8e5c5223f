"""Requests from keyword arguments. Ranges are the router's to check; here only types are, with the field named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

from google.protobuf import struct_pb2
from octavo.client.errors import FieldViolation, OctavoError, Reason
from octavo.v1 import inference_pb2 as pb

# A turn: {"role": "user", "content": "…"}, a (role, content) pair, or the message of the contracts.
Message = Mapping[str, str] | tuple[str, str] | pb.ChatMessage


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of every generating call. The meaning and default of each field is in inference.proto."""

    model: str
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    n: int
    logprobs: int
    prompt_logprobs: int
    json_schema: str | Mapping[str, Any]
    regex: str
    lark: str
    choice: Sequence[str]
    priority: int
    idempotency_key: str
    resume_grace_ms: int
    adapter: str


_SAMPLING = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_GRAMMAR = frozenset({"json_schema", "regex", "lark", "choice"})
_REQUEST = frozenset({"model", "priority", "idempotency_key", "resume_grace_ms", "adapter"})


def prompt_request(prompt: str | Sequence[int], options: GenerateOptions) -> pb.GenerateRequest:
    """A request for raw text or token ids. Raises OctavoError (INVALID_ARGUMENT), TypeError for unknown options."""
    request = _request(options)
    if isinstance(prompt, str):
        with _field("text"):
            request.text = prompt
    else:
        with _field("token_ids.ids"):
            request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()  # an empty list too is an input; the router says what is wrong with it
    return request


def chat_request(
    messages: Sequence[Message], options: GenerateOptions, *, tools: Sequence[Mapping[str, Any]] = ()
) -> pb.GenerateRequest:
    """A request for a conversation, rendered by the model's template. Raises like `prompt_request`."""
    request = _request(options)
    request.chat.CopyFrom(to_chat(messages, tools))
    return request


def complete_request(
    prompt: str | Sequence[int] | None, messages: Sequence[Message] | None, options: GenerateOptions
) -> pb.CompleteRequest:
    """What Complete is asked. Raises TypeError unless exactly one of prompt and messages is given."""
    if prompt is not None and messages is None:
        return pb.CompleteRequest(request=prompt_request(prompt, options))
    if messages is not None and prompt is None:
        return pb.CompleteRequest(request=chat_request(messages, options))
    raise TypeError("give either a prompt or messages")


def tokenize_request(
    text: str | None, messages: Sequence[Message] | None, model: str, add_special_tokens: bool | None
) -> pb.TokenizeRequest:
    """What Tokenize is asked. Raises TypeError unless exactly one of text and messages is given."""
    if (text is None) == (messages is None):
        raise TypeError("give either a text or messages")
    request = pb.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
    if text is not None:
        request.text = text
    else:
        request.chat.CopyFrom(to_chat(messages or ()))
    return request


def to_chat(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> pb.Chat:
    """A conversation as the contracts have it. Raises OctavoError (INVALID_ARGUMENT)."""
    chat = pb.Chat(messages=[_message(message, index) for index, message in enumerate(messages)])
    for index, tool in enumerate(tools):
        struct = struct_pb2.Struct()
        with _field(f"chat.tools[{index}]"):
            struct.update(tool)
        chat.tools.append(struct)
    return chat


def _message(message: Message, index: int) -> pb.ChatMessage:
    if isinstance(message, pb.ChatMessage):
        return message
    path = f"chat.messages[{index}]"
    with _field(path):
        turn = dict(zip(("role", "content"), message, strict=True)) if isinstance(message, tuple) else dict(message)
    unknown = turn.keys() - {"role", "content", "name", "tool_call_id"}
    if unknown or not {"role", "content"} <= turn.keys():
        raise _wrong(path, "a message has role and content, and may have name and tool_call_id")
    content = turn.pop("content")
    result = pb.ChatMessage()
    with _field(f"{path}.content"):
        result.content.append(pb.ContentPart(text=content))
    for name, value in turn.items():
        with _field(f"{path}.{name}"):
            setattr(result, name, value)
    return result


def _request(options: GenerateOptions) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    grammars = sorted(given.keys() & _GRAMMAR)
    if len(grammars) > 1:
        raise _wrong("grammar", f"at most one kind, not {' and '.join(grammars)}")
    for name, value in given.items():
        if name in _SAMPLING:
            with _field(f"sampling.{name}"):
                _assign(request.sampling, name, value)
        elif name == "choice":
            with _field("grammar.choice"):
                _assign(request.grammar.choice, "values", value)
        elif name == "json_schema" and not isinstance(value, str):
            with _field("grammar.json_schema"):
                request.grammar.json_schema = json.dumps(value)
        elif name in _GRAMMAR:
            with _field(f"grammar.{name}"):
                setattr(request.grammar, name, value)
        elif name in _REQUEST:
            with _field(name):
                setattr(request, name, value)
        else:
            raise TypeError(f"unknown option {name!r}")
    return request


def _assign(target: Any, name: str, value: Any) -> None:
    if name == "logit_bias":
        target.logit_bias.update(value)
    elif target.DESCRIPTOR.fields_by_name[name].is_repeated:
        # One string is meant as a list of one, not as a list of its letters.
        getattr(target, name).extend([value] if isinstance(value, str) else value)
    else:
        setattr(target, name, value)


@contextmanager
def _field(path: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise _wrong(path, str(error)) from None


def _wrong(path: str, description: str) -> OctavoError:
    violation = FieldViolation(path, description)
    return OctavoError(Reason.INVALID_ARGUMENT, f"{path}: {description}", violations=[violation])
