"""What is served, and text to tokens and back: /v1/models as OpenAI has it, /tokenize and /detokenize as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.v1 import inference_pb2

from router.http.errors import HttpError, Names, invalid, problem_of
from router.http.fields import Fields
from router.http.jsontext import dumps, dumps_long
from router.http.messages import take_chat
from router.http.tools import take_tools
from router.inference import Inference
from router.models import unknown_model
from service.errors import OctavoError

_OF_CHATS = Names((("chat.template_args", "chat_template_kwargs"), ("chat.", ""), ("input", "messages")))
_OF_TEXTS = Names((("text", "prompt"), ("input", "prompt"), ("token_ids", "tokens")))
_ID_BYTES = 6  # of a token id in an answer
_SHOWN_BYTES = 40  # of one with its text, in time


def model_list(inference: Inference) -> dict[str, Any]:
    """All of them; a model of several versions once."""
    found = {model.name: _shown(model) for model in inference.texts.list_models().models}
    return {"object": "list", "data": list(found.values())}


def one_model(inference: Inference, name: str) -> dict[str, Any]:
    """The model of this name. Raises MODEL_UNKNOWN."""
    models = inference.texts.list_models().models
    for model in models:
        if model.name == name:
            return _shown(model)
    raise unknown_model(name, (model.name for model in models))


@dataclass(frozen=True, slots=True)
class TokenizeAsk:
    """A prompt or a conversation to be made token ids. `shown`: with the text of each."""

    request: inference_pb2.TokenizeRequest
    shown: bool

    @classmethod
    def read(cls, body: dict[str, Any]) -> TokenizeAsk:
        """Raises HttpError for what is wrong with it."""
        fields = Fields(body)
        request = inference_pb2.TokenizeRequest(model=fields.text("model") or "")
        prompt = fields.text("prompt")
        if prompt is not None:
            request.text = prompt
            if (special := fields.flag("add_special_tokens")) is not None:
                request.add_special_tokens = special
        else:
            if "messages" not in body:
                raise invalid("prompt", "one of prompt and messages must be set")
            take_tools(fields, request.chat, take_chat(fields, request.chat))
        shown = bool(fields.flag("return_token_strs"))
        fields.finish()
        return cls(request, shown)


async def tokenize(ask: TokenizeAsk, inference: Inference) -> tuple[int, Callable[[], bytes]]:
    """About how many bytes the answer has, and what writes it as JSON. Raises HttpError."""
    try:
        answer = await inference.texts.tokenize(ask.request)
        table = (await inference.texts.model(ask.request.model))[1].table if ask.shown else None
    except OctavoError as error:
        names = _OF_CHATS if ask.request.WhichOneof("input") == "chat" else _OF_TEXTS
        raise HttpError(problem_of(error, names)) from None

    def write() -> bytes:
        ids = list(answer.token_ids)
        texts = None if table is None else [table.token_bytes(one).decode(errors="replace") for one in ids]
        whole = {"count": len(ids), "max_model_len": answer.max_model_len, "tokens": ids, "token_strs": texts}
        return dumps_long(whole, levels=1)

    return len(answer.token_ids) * (_SHOWN_BYTES if ask.shown else _ID_BYTES), write


def read_detokenize(body: dict[str, Any]) -> inference_pb2.DetokenizeRequest:
    """Token ids to be made text, special tokens included. Raises HttpError for what is wrong with it."""
    fields = Fields(body)
    request = inference_pb2.DetokenizeRequest(model=fields.text("model") or "", skip_special_tokens=False)
    ids = fields.integers("tokens")
    if ids is None:
        raise invalid(fields.path("tokens"), "is missing")
    request.token_ids.extend(ids)
    if (skip := fields.flag("skip_special_tokens")) is not None:
        request.skip_special_tokens = skip
    fields.finish()
    return request


async def detokenize(request: inference_pb2.DetokenizeRequest, inference: Inference) -> tuple[int, Callable[[], bytes]]:
    """How many bytes the answer has, and what writes it as JSON. Raises HttpError."""
    try:
        answer = await inference.texts.detokenize(request)
    except OctavoError as error:
        raise HttpError(problem_of(error, _OF_TEXTS)) from None
    return answer.ByteSize(), lambda: dumps({"prompt": answer.text}).encode()


def _shown(model: inference_pb2.Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,  # nobody knows
        "owned_by": "octavo",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
        "digest": model.digest,
    }
