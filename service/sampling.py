"""What a SamplingSpec may hold: checked by the scheduler, so that a bad one fails alone, and by a worker before it reaches a device.

A router has checked the client's request before (router/validate.py), by the same ranges and in the client's words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from octavo.v1 import common_pb2

from service.columns import unpack

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1_024
MAX_STOP_TOKEN_IDS = 512  # a request's own and the model's
MAX_BAD_WORDS = 1_024
MAX_BAD_WORD_TOKENS = 4_096

Ids = npt.NDArray[np.int32]


class BadSampling(Exception):
    """A field of a SamplingSpec that no worker could act on."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class SamplingIds:
    """The token ids of a SamplingSpec, unpacked. Each int32 [n], all within the vocabulary."""

    stop: Ids
    allowed: Ids
    bad_words: tuple[Ids, ...]


def check_sampling(spec: common_pb2.SamplingSpec, vocab_size: int) -> SamplingIds:
    """Raises BadSampling, and PROTOCOL_VIOLATION for columns of a wrong length. max_tokens is the scheduler's own business."""
    _check_numbers(spec)
    if len(spec.bad_words) > MAX_BAD_WORDS:
        raise BadSampling("bad_words", f"{len(spec.bad_words)} of them, {MAX_BAD_WORDS} may be")
    ids = SamplingIds(
        stop=_ids("stop_token_ids", spec.stop_token_ids, vocab_size, MAX_STOP_TOKEN_IDS),
        allowed=_ids("allowed_token_ids", spec.allowed_token_ids, vocab_size, vocab_size),
        bad_words=tuple(_ids("bad_words", w.token_ids, vocab_size, MAX_BAD_WORD_TOKENS) for w in spec.bad_words),
    )
    if not all(word.size for word in ids.bad_words):
        raise BadSampling("bad_words", "one is empty")
    if len(spec.logit_bias) > MAX_LOGIT_BIAS:
        raise BadSampling("logit_bias", f"{len(spec.logit_bias)} of them, {MAX_LOGIT_BIAS} may be")
    for token_id, value in spec.logit_bias.items():
        if token_id >= vocab_size:
            raise BadSampling("logit_bias", f"a token outside the vocabulary of {vocab_size}")
        _require(-100.0 <= value <= 100.0, "logit_bias", "must be in [-100, 100]")
    return ids


def _check_numbers(spec: common_pb2.SamplingSpec) -> None:
    """NaN fails every comparison."""
    _require(0.0 <= spec.temperature < math.inf, "temperature", "must be a number of at least 0")
    _require(0.0 < spec.top_p <= 1.0, "top_p", "must be in (0, 1]")
    _require(0.0 <= spec.min_p <= 1.0, "min_p", "must be in [0, 1]")
    _require(0.0 < spec.repetition_penalty < math.inf, "repetition_penalty", "must be a number above 0")
    _require(-2.0 <= spec.presence_penalty <= 2.0, "presence_penalty", "must be in [-2, 2]")
    _require(-2.0 <= spec.frequency_penalty <= 2.0, "frequency_penalty", "must be in [-2, 2]")
    for name in ("top_k", "min_tokens"):  # int32 on the device
        _require(getattr(spec, name) < 2**31, name, "must be below 2^31")
    for name in ("logprobs", "prompt_logprobs"):
        _require(getattr(spec, name) <= MAX_LOGPROBS, name, f"must be in [0, {MAX_LOGPROBS}]")


def _ids(name: str, data: bytes, vocab_size: int, most: int) -> Ids:
    ids = unpack(name, data, np.int32)
    if ids.size > most:
        raise BadSampling(name, f"{ids.size} ids, {most} may be")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise BadSampling(name, f"a token outside the vocabulary of {vocab_size}")
    return ids


def _require(holds: bool, field: str, problem: str) -> None:
    if not holds:
        raise BadSampling(field, problem)
