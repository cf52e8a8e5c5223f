"""How to sample and when to stop: the members of a request that all of its kinds share, as the messages of the contracts."""

from __future__ import annotations

from typing import Any

from octavo.v1 import inference_pb2

from router.http.errors import invalid
from router.http.fields import Fields, integer

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_TOKEN_IDS = ("stop_token_ids", "allowed_token_ids")

# Of OpenAI and vLLM, and not done here.
REFUSED = (
    "functions",
    "function_call",
    "audio",
    "prediction",
    "web_search_options",
    "reasoning_effort",
    "reasoning",
    "verbosity",
    "moderation",
    "logits_processors",
    "truncation_side",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "structural_tag",
    "thinking_token_budget",
    "mm_processor_kwargs",
    "kv_transfer_params",
    "vllm_xargs",
    "cache_salt",
    "request_id",
    "logprob_token_ids",
    "prompt_embeds",
    "resume",
    "ticket",
)


# The values of others with which they ask for nothing: clients send them as they stand in their settings.
_OFF: dict[str, tuple[Any, ...]] = {
    "metadata": ({},),
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "early_stopping": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
}


def take_sampling(fields: Fields, params: inference_pb2.SamplingParams) -> None:
    """Everything but max_tokens and logprobs, whose names differ."""
    for name in _NUMBERS:
        if (number := fields.number(name)) is not None:
            setattr(params, name, number)
    for name in _FLAGS:
        if (flag := fields.flag(name)) is not None:
            setattr(params, name, flag)
    for name in _TOKEN_IDS:
        getattr(params, name).extend(fields.integers(name) or ())
    top_k = fields.integer("top_k", -1)
    if top_k is not None:
        params.top_k = max(top_k, 0)  # vLLM's -1 keeps all, as 0 does
    if (seed := fields.integer("seed", -(2**63), 2**64 - 1)) is not None:
        params.seed = seed % 2**64
    if (min_tokens := fields.integer("min_tokens")) is not None:
        params.min_tokens = min_tokens
    if (n := fields.integer("n")) is not None:
        params.n = n
    if (prompt_logprobs := fields.integer("prompt_logprobs")) is not None:
        params.prompt_logprobs = prompt_logprobs
    params.bad_words.extend(fields.texts("bad_words") or ())
    _take_stop(fields, params)
    _take_logit_bias(fields, params)
    fields.only("spaces_between_special_tokens", True)
    fields.only("detokenize", True)


def take_request(fields: Fields, request: inference_pb2.GenerateRequest) -> None:
    """What is neither input nor sampling."""
    request.model = fields.text("model") or ""
    if (priority := fields.integer("priority", -(2**31), 2**31 - 1)) is not None:
        request.priority = priority
    if (grace := fields.integer("resume_grace_ms")) is not None:
        request.resume_grace_ms = grace
    request.idempotency_key = fields.text("idempotency_key") or ""
    request.attempt = fields.integer("attempt") or 0
    request.adapter = fields.text("adapter") or ""
    # They say who asks, for OpenAI's own purposes, and change no answer.
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        fields.text(name)
    fields.only("service_tier", "auto", "default")
    fields.only("prompt_cache_retention", "in_memory", "in-memory")
    fields.only("parallel_tool_calls", True, False)
    fields.only("tool_choice", "none", "auto")
    fields.only("store", False)
    fields.only("modalities", ["text"])
    fields.only("tools", [])
    for name, values in _OFF.items():
        fields.only(name, *values)
    fields.refuse(REFUSED)


def _take_stop(fields: Fields, params: inference_pb2.SamplingParams) -> None:
    stop = fields.take("stop")
    if isinstance(stop, str):
        stop = [stop]
    if stop is None:
        return
    if not isinstance(stop, list) or not all(isinstance(item, str) for item in stop):
        raise invalid(fields.path("stop"), "must be a string or a list of strings")
    params.stop.extend(stop)


def _take_logit_bias(fields: Fields, params: inference_pb2.SamplingParams) -> None:
    bias = fields.take("logit_bias")
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise invalid(fields.path("logit_bias"), "must be an object of token ids and numbers")
    for key, value in bias.items():
        path = fields.path(f"logit_bias.{key[:20]}")
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(path, "the key must be a token id")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(path, "must be a number")
        # The range is checked with the others; beyond a double it can't be in it.
        params.logit_bias[integer(int(key), path)] = float(max(-1e9, min(1e9, value)))
