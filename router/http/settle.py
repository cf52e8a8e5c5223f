"""What a request needs of the model's tokenizer before it can be sent: prompts that are to be cut, or shown."""

from __future__ import annotations

from octavo.v1 import inference_pb2

from router.http.ask import Ask
from router.http.errors import invalid, unsupported
from router.http.messages import EFFORT
from router.inference import Inference

MAX_PROMPT_LOGPROBS = 524_288  # of all prompts of one answer: 12 MB of messages, 20 MB of JSON


async def settle(ask: Ask, inference: Inference) -> None:
    """What needs the model's tokenizer, where the prompts themselves are to be cut or shown. Raises OctavoError and HttpError."""
    if ask.effort:
        first = ask.requests[0]
        _, assets = await inference.texts.model(first.model)
        if not assets.takes(EFFORT, first.chat):
            raise unsupported(ask.effort, "is not supported: the model's chat template does not ask for it")
    if ask.keep_last is not None:
        await _truncate(ask, ask.keep_last, inference)
    if ask.echo:
        ask.echoes = [await _text_of(request, inference) for request in ask.requests]
        if ask.requests[0].sampling.HasField("logprobs"):
            ask.first_tokens = [await _use_token_ids(request, inference) for request in ask.requests]
    # The router bounds those of one prompt. They travel once, and chats show them once; here each of the n outputs does.
    first = ask.requests[0]
    is_chat = first.WhichOneof("input") == "chat"
    if first.sampling.HasField("prompt_logprobs") and len(ask.requests) * ask.n > 1 and not is_chat:
        await _check_prompt_logprobs(ask, inference)


async def _check_prompt_logprobs(ask: Ask, inference: Inference) -> None:
    """Raises a 400 as soon as it is known that all prompts together have too many."""
    each, count = 1 + ask.requests[0].sampling.prompt_logprobs, 0
    for request in ask.requests:
        await _use_token_ids(request, inference)
        count += len(request.token_ids.ids) * ask.n * each
        if count > MAX_PROMPT_LOGPROBS:
            raise invalid(
                "echo" if ask.echo else "prompt_logprobs",
                f"{len(ask.requests)} prompts, with {each} log-probabilities for each token and {ask.n} outputs that show them,"
                f" would have more than {MAX_PROMPT_LOGPROBS} in one answer: ask for fewer prompts at a time",
            )


async def _truncate(ask: Ask, keep_last: int, inference: Inference) -> None:
    """Keep the last tokens of each prompt; -1: as many as the context takes beside the output."""
    for request in ask.requests:
        model, _ = await inference.texts.model(request.model)
        room = model.max_model_len - max(1, request.sampling.max_tokens)
        most = max(1, room if keep_last < 0 else keep_last)
        ids = await _ids_of(request, inference)
        request.token_ids.ids[:] = ids[-most:]


async def _use_token_ids(request: inference_pb2.GenerateRequest, inference: Inference) -> bytes:
    """The prompt as ids from now on. Returns the first one's bytes, which no log-probability tells."""
    ids = await _ids_of(request, inference)
    request.token_ids.ids[:] = ids
    _, assets = await inference.texts.model(request.model)
    return assets.table.token_bytes(ids[0]) if ids else b""


async def _ids_of(request: inference_pb2.GenerateRequest, inference: Inference) -> list[int]:
    if request.WhichOneof("input") == "token_ids":
        return list(request.token_ids.ids)
    asked = inference_pb2.TokenizeRequest(model=request.model)
    if request.WhichOneof("input") == "chat":
        asked.chat.CopyFrom(request.chat)
    else:
        asked.text = request.text
    return list((await inference.texts.tokenize(asked)).token_ids)


async def _text_of(request: inference_pb2.GenerateRequest, inference: Inference) -> str:
    """The prompt as text: as it was given, or what its tokens stand for."""
    if request.WhichOneof("input") == "text":
        return request.text
    asked = inference_pb2.DetokenizeRequest(model=request.model, token_ids=request.token_ids.ids)
    if request.sampling.HasField("skip_special_tokens"):
        asked.skip_special_tokens = request.sampling.skip_special_tokens
    return (await inference.texts.detokenize(asked)).text
