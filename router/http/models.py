"""What is served, and text to tokens and back: /v1/models as OpenAI has it, /tokenize and /detokenize as vLLM has them."""

from __future__ import annotations

from typing import Any

from octavo.v1 import inference_pb2

from router.http.errors import HttpError, Names, invalid, problem_of
from router.http.fields import Fields
from router.http.messages import take_chat
from router.inference import Inference
from service.errors import OctavoError, Reason

_NAMES = Names(
    (("chat.template_args", "chat_template_kwargs"), ("chat.", ""), ("text", "prompt"), ("token_ids", "tokens"))
)


def model_list(inference: Inference) -> dict[str, Any]:
    """All of them; a model of several versions once."""
    found = {model.name: _shown(model) for model in inference.texts.list_models().models}
    return {"object": "list", "data": list(found.values())}


def one_model(inference: Inference, name: str) -> dict[str, Any]:
    """The model of this name. Raises MODEL_UNKNOWN."""
    for model in inference.texts.list_models().models:
        if model.name == name:
            return _shown(model)
    raise OctavoError(Reason.MODEL_UNKNOWN, f"no model named {name[:200]!r}")


async def tokenize(body: dict[str, Any], inference: Inference) -> dict[str, Any]:
    """A prompt or a conversation to token ids."""
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
        take_chat(fields, request.chat)
    shown = fields.flag("return_token_strs")
    fields.finish()
    try:
        answer = await inference.texts.tokenize(request)
        texts = await _token_texts(inference, request.model, answer.token_ids) if shown else None
    except OctavoError as error:
        raise HttpError(problem_of(error, _NAMES)) from None
    ids = list(answer.token_ids)
    return {"count": len(ids), "max_model_len": answer.max_model_len, "tokens": ids, "token_strs": texts}


async def detokenize(body: dict[str, Any], inference: Inference) -> dict[str, Any]:
    """Token ids to text, special tokens included."""
    fields = Fields(body)
    request = inference_pb2.DetokenizeRequest(model=fields.text("model") or "", skip_special_tokens=False)
    request.token_ids.extend(fields.integers("tokens") or ())
    if (skip := fields.flag("skip_special_tokens")) is not None:
        request.skip_special_tokens = skip
    fields.finish()
    try:
        answer = await inference.texts.detokenize(request)
    except OctavoError as error:
        raise HttpError(problem_of(error, _NAMES)) from None
    return {"prompt": answer.text}


async def _token_texts(inference: Inference, name: str, token_ids: Any) -> list[str]:
    _, assets = await inference.texts.model(name)
    return [assets.table.token_bytes(token_id).decode(errors="replace") for token_id in token_ids]


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
