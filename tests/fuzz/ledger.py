"""What every step must satisfy before a device may see it, kept apart from the code that checks it (worker/plan_codec.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from worker.backend import BackendInfo
from worker.step import SamplingParams, Step


@dataclass(slots=True)
class _Row:
    known: int
    computed: int
    blocks: int


class Ledger:
    """Rows as the steps so far have made them. Plain Python, no numpy: a second opinion."""

    def __init__(self, info: BackendInfo) -> None:
        self._info = info
        self._rows: dict[int, _Row] = {}

    def reset(self) -> None:
        """A new epoch."""
        self._rows.clear()

    def check(self, step: Step) -> None:
        """Raises AssertionError for a step that would index outside of anything."""
        info, group = self._info, self._info.kv_groups[0]
        rows = self._rows
        for row in step.freed_rows.tolist():
            assert 0 <= row < info.max_rows
            rows.pop(row, None)
        for new in step.new_rows:
            assert 0 <= new.row < info.max_rows and new.row not in rows
            _ids(new.token_ids.tolist(), info.vocab_size)
            _ids(new.block_ids.tolist(), group.num_blocks)
            assert 0 <= new.num_computed < new.token_ids.size
            assert 0 < new.num_prompt_tokens <= info.max_model_len
            assert 0 <= new.seed < 1 << 64
            check_sampling(new.sampling, info.vocab_size)
            rows[new.row] = _Row(new.token_ids.size, new.num_computed, new.block_ids.size)
        assert step.append_rows.size == step.append_block_ids.size
        _ids(step.append_block_ids.tolist(), group.num_blocks)
        for row in step.append_rows.tolist():
            rows[row].blocks += 1
        assert step.chunk_token_ids.size == sum(step.chunk_lens.tolist())
        _ids(step.chunk_token_ids.tolist(), info.vocab_size)
        assert len(set(step.chunk_rows.tolist())) == step.chunk_rows.size == step.chunk_lens.size
        for row, length in zip(step.chunk_rows.tolist(), step.chunk_lens.tolist(), strict=True):
            assert length > 0
            rows[row].known += length
        self._check_work(step)
        for state in rows.values():
            assert state.computed <= state.known <= info.max_model_len, state
            assert state.blocks <= -(-info.max_model_len // group.block_size), state

    def _check_work(self, step: Step) -> None:
        info, group = self._info, self._info.kv_groups[0]
        assert len(set(step.rows.tolist())) == step.rows.size
        assert sum(step.num_scheduled.tolist()) <= info.max_num_batched_tokens
        columns = (step.rows.tolist(), step.num_scheduled.tolist(), step.num_samples.tolist())
        for row, count, samples in zip(*columns, strict=True):
            state = self._rows[row]
            assert count > 0 and samples in (0, 1)
            state.computed += count
            assert state.computed <= state.known
            assert state.computed <= state.blocks * group.block_size
            assert not samples or state.computed == state.known
            state.known += samples


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Every number finite and in its range, every id in the vocabulary, every list of a bounded length."""
    floats = (
        params.temperature, params.top_p, params.min_p, params.repetition_penalty, params.presence_penalty,
        params.frequency_penalty, *params.logit_bias.values(),
    )  # fmt: skip
    assert all(math.isfinite(value) for value in floats)
    assert (
        params.temperature >= 0 and 0 < params.top_p <= 1 and 0 <= params.min_p <= 1 and params.repetition_penalty > 0
    )
    assert abs(params.presence_penalty) <= 2 and abs(params.frequency_penalty) <= 2
    assert 0 <= params.top_k < 1 << 31 and 0 <= params.min_tokens < 1 << 31
    assert all(abs(value) <= 100 for value in params.logit_bias.values())
    assert (
        len(params.logit_bias) <= 1 << 12 and len(params.stop_token_ids) <= 1 << 12 and len(params.bad_words) <= 1 << 12
    )
    for ids in (params.stop_token_ids, params.allowed_token_ids, tuple(params.logit_bias), *params.bad_words):
        _ids(list(ids), vocab_size)
    assert all(params.bad_words)
    assert all(k is None or k <= 20 for k in (params.logprobs, params.prompt_logprobs))


def _ids(ids: list[int], end: int) -> None:
    assert not ids or (min(ids) >= 0 and max(ids) < end)
