"""A checked request against its model: every default filled in, every token id and length within the model's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from octavo.v1 import common_pb2, inference_pb2

from router.assets import ModelAssets
from router.output import FinishRules
from router.stop import StopStrings
from router.validate import LEAST_PENALTY, MOST_PENALTY, Violations, fail, too_long
from service.columns import pack
from service.errors import FieldViolation

_GREEDY_BELOW = 9.9999e-7  # temperature; 1e-6 as a float is a little less
MAX_PROMPT_LOGPROBS = 131_072  # of all positions together: about 4 MiB of the one message that holds them
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request must fit into."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """How a request samples and ends. `sampling` travels to the worker; the rest is the router's own work."""

    sampling: common_pb2.SamplingSpec
    rules: FinishRules
    n: int
    skip_special_tokens: bool


def check_prompt(prompt_token_ids: Sequence[int], limits: ModelLimits, *, given: bool, field: str = "text") -> None:
    """Raises PROMPT_TOO_LONG, or INVALID_ARGUMENT for an empty prompt, both of which are `field`'s, and for `given` ids that the model
    doesn't have.
    """
    if not prompt_token_ids:
        fail([FieldViolation(field, "the prompt has no tokens")])
    if len(prompt_token_ids) >= limits.max_model_len:
        wrong = f"{len(prompt_token_ids)} prompt tokens and an output exceed the model's context of {limits.max_model_len} tokens"
        raise too_long(field, wrong)
    if not given:
        return
    check_vocabulary("token_ids.ids", prompt_token_ids, limits.vocab_size)


def check_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises INVALID_ARGUMENT that names the place of an id that the model doesn't have."""
    highest = max(token_ids, default=0)
    if highest >= vocab_size:
        wrong = Violations()
        index = list(token_ids).index(highest)
        wrong.add(f"{field}[{index}]", f"must be below the vocabulary size {vocab_size}")
        wrong.raise_if_any()


def _check_max_tokens(num_prompt_tokens: int, max_tokens: int, limits: ModelLimits) -> None:
    """Raises PROMPT_TOO_LONG unless so much output fits the context beside the prompt, which does."""
    if num_prompt_tokens + max_tokens > limits.max_model_len:
        raise too_long(
            "sampling.max_tokens",
            f"{num_prompt_tokens} prompt tokens and {max_tokens} output tokens exceed the model's context of "
            f"{limits.max_model_len} tokens: at most {limits.max_model_len - num_prompt_tokens} fit",
        )


def resolve(
    params: inference_pb2.SamplingParams,
    assets: ModelAssets,
    limits: ModelLimits,
    num_prompt_tokens: int,
    *,
    under_grammar: bool = False,
) -> Resolved:
    """Defaults: the request's own values, then the model's generation_config, then the contracts' defaults.

    Raises INVALID_ARGUMENT for token ids outside the vocabulary and more than MAX_PROMPT_LOGPROBS, and PROMPT_TOO_LONG.
    """
    _check_token_ids(params, limits)
    _check_prompt_logprobs(params, num_prompt_tokens)
    max_tokens = params.max_tokens if params.HasField("max_tokens") else limits.max_model_len - num_prompt_tokens
    _check_max_tokens(num_prompt_tokens, max_tokens, limits)
    if params.min_tokens > max_tokens:
        wrong = Violations()
        wrong.add("sampling.min_tokens", f"must not exceed the {max_tokens} tokens that the context leaves")
        wrong.raise_if_any()
    eos = tuple(i for i in assets.eos_token_ids if i < limits.vocab_size)
    stop_token_ids = tuple(dict.fromkeys((*(() if params.ignore_eos else eos), *params.stop_token_ids)))
    sampling = _sampling(params, assets.generation_config)
    sampling.max_tokens = max_tokens
    sampling.min_tokens = params.min_tokens
    sampling.stop_token_ids = pack(stop_token_ids, np.int32)
    sampling.allowed_token_ids = pack(tuple(dict.fromkeys(params.allowed_token_ids)), np.int32)
    sampling.bad_words.extend(_bad_words(params.bad_words, assets))
    rules = FinishRules(
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        # Under a grammar an ignored EOS comes where nothing else is allowed: then the output is complete.
        stop_token_ids=frozenset((*stop_token_ids, *eos) if under_grammar else stop_token_ids),
        stops=StopStrings(tuple(dict.fromkeys(params.stop))) if params.stop else None,
        include_stop=params.include_stop_str_in_output,
        under_grammar=under_grammar,
    )
    return Resolved(
        sampling=sampling,
        rules=rules,
        n=params.n if params.HasField("n") else 1,
        skip_special_tokens=params.skip_special_tokens if params.HasField("skip_special_tokens") else True,
    )


def sequence_seed(seed: int, index: int) -> int:
    """The seed of output `index`: the request's own for index 0, else SplitMix64 of (seed + index · golden ratio), modulo 2^64.

    SplitMix64's finisher (Steele, Lea, Flood, OOPSLA 2014) is a bijection: outputs 1, 2, … of a request never share a seed.
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _sampling(params: inference_pb2.SamplingParams, defaults: Any) -> common_pb2.SamplingSpec:
    temperature = _choose(params, "temperature", defaults, 1.0, 0.0, 1e6)
    spec = common_pb2.SamplingSpec(
        # Below, a logit over it may be beyond float32, and which token is the best would be lost.
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=_choose(params, "top_p", defaults, 1.0, 1e-6, 1.0),
        top_k=int(_choose(params, "top_k", defaults, 0, 0, 2**31 - 1)),
        min_p=_choose(params, "min_p", defaults, 0.0, 0.0, 1.0),
        repetition_penalty=_choose(params, "repetition_penalty", defaults, 1.0, LEAST_PENALTY, MOST_PENALTY),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
    )
    if params.HasField("logprobs"):
        spec.logprobs = params.logprobs
    if params.HasField("prompt_logprobs"):
        spec.prompt_logprobs = params.prompt_logprobs
    return spec


def _choose(params: Any, name: str, defaults: Any, default: float, low: float, high: float) -> float:
    """The request's value; else the model's, where it is a number that makes sense; else the default."""
    if params.HasField(name):
        return float(getattr(params, name))
    found = defaults.get(name)
    if isinstance(found, int | float) and not isinstance(found, bool) and low <= found <= high:
        return float(found)
    return default


def _check_token_ids(params: inference_pb2.SamplingParams, limits: ModelLimits) -> None:
    wrong = Violations()
    for name in ("stop_token_ids", "allowed_token_ids"):
        token_ids = getattr(params, name)
        if len(token_ids) > limits.vocab_size:
            wrong.add(f"sampling.{name}", f"must have at most {limits.vocab_size} entries, has {len(token_ids)}")
            continue
        for index, token_id in enumerate(token_ids):
            if token_id >= limits.vocab_size:
                wrong.add(f"sampling.{name}[{index}]", f"must be below the vocabulary size {limits.vocab_size}")
                break
    for token_id in params.logit_bias:
        if token_id >= limits.vocab_size:
            wrong.add(
                f"sampling.logit_bias[{token_id}]", f"the id must be below the vocabulary size {limits.vocab_size}"
            )
    wrong.raise_if_any()


def _check_prompt_logprobs(params: inference_pb2.SamplingParams, num_prompt_tokens: int) -> None:
    each = 1 + params.prompt_logprobs
    if not params.HasField("prompt_logprobs") or num_prompt_tokens * each <= MAX_PROMPT_LOGPROBS:
        return
    wrong = Violations()
    text = f"{num_prompt_tokens} prompt tokens with {each} each are more than {MAX_PROMPT_LOGPROBS} log-probabilities"
    wrong.add("sampling.prompt_logprobs", text)
    wrong.raise_if_any()


def _bad_words(words: Sequence[str], assets: ModelAssets) -> list[common_pb2.TokenSequence]:
    """Each word as it stands and after a space: the two ways in which a text writes it (vLLM's rule)."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = tuple(assets.encode_text(text, add_special_tokens=False))
            if ids:
                sequences[ids] = None
    return [common_pb2.TokenSequence(token_ids=pack(ids, np.int32)) for ids in sequences]
