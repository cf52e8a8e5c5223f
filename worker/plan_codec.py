"""StepPlan to `Step`, checked; `StepOutput` to StepResult.

The columns come from the wire and end as indices into device memory: this is the boundary where every one of them is checked
against what the rows hold. `RowBooks` is the host's copy of what each row knows, kept in step with the plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from octavo.v1 import common_pb2, step_pb2

from service.columns import check_range, pack, unpack, violation
from service.grammar import Grammar, from_message, size_problem
from service.sampling import BadSampling, check_sampling
from worker.backend import BackendInfo
from worker.step import Int32Array, LogprobColumns, NewRow, SamplingParams, Step, StepOutput

_NONE: Int32Array = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """A plan in which each row computes and samples one token: its columns, as they came and as they are."""

    wire: tuple[bytes, bytes, bytes]
    rows: Int32Array
    num_scheduled: Int32Array
    num_samples: Int32Array


class RowBooks:
    """What each row holds after the newest plan: known tokens, computed tokens, blocks. Raises PROTOCOL_VIOLATION on a lie."""

    def __init__(self, info: BackendInfo, *, grammars: bool = False) -> None:
        """`grammars`: whether rows may decode under one."""
        self._info = info
        self._takes_grammars = grammars
        group = info.kv_groups[0]
        self._block_size = group.block_size
        self._num_blocks = group.num_blocks
        self._max_row_blocks = -(-info.max_model_len // group.block_size)
        self._active: npt.NDArray[np.bool_] = np.zeros(info.max_rows, np.bool_)
        self._known: Int32Array = np.zeros(info.max_rows, np.int32)
        self._computed: Int32Array = np.zeros(info.max_rows, np.int32)
        self._blocks: Int32Array = np.zeros(info.max_rows, np.int32)
        # The last plan, where it was one of decodes: the next one is most often the same, and most of it need not be checked again.
        self._last: _Decodes | None = None

    def reset(self) -> None:
        """Forget every row."""
        self._active[:] = False
        self._last = None

    def decode(self, plan: step_pb2.StepPlan) -> Step:
        """The step of a plan, with every column checked. The books then show the state after it."""
        last, brings = self._last, plan.freed_rows or plan.new_rows or plan.chunk_rows or plan.chunk_token_ids
        wire = plan.rows, plan.num_scheduled, plan.num_samples
        if last is not None and not brings and wire == last.wire and not plan.chunk_lens:
            return self._decode_again(plan, last)
        step = self._decode_anew(plan)
        ones = step.num_scheduled.size and (step.num_scheduled == 1).all() and (step.num_samples == 1).all()
        self._last = _Decodes(wire, step.rows, step.num_scheduled, step.num_samples) if ones and not brings else None
        return step

    def _decode_again(self, plan: step_pb2.StepPlan, last: _Decodes) -> Step:
        """One more token of the same rows: in range, distinct and active as before, and each has computed all that it knew."""
        self._refuse_unclaimed(plan)
        append_rows, append_ids = self._append_blocks(plan)
        after = self._computed[last.rows] + 1
        if (after > self._blocks[last.rows] * self._block_size).any():
            raise violation("num_scheduled", "a row would write behind its last block")
        if int(after.max()) >= self._info.max_model_len:
            raise violation("num_samples", "a row would sample beyond the model's context")
        self._computed[last.rows] = after
        self._known[last.rows] = after + 1
        return Step(
            step_id=plan.step_id,
            freed_rows=_NONE,
            new_rows=(),
            append_rows=append_rows,
            append_block_ids=append_ids,
            chunk_rows=_NONE,
            chunk_lens=_NONE,
            chunk_token_ids=_NONE,
            rows=last.rows,
            num_scheduled=last.num_scheduled,
            num_samples=last.num_samples,
        )

    def _decode_anew(self, plan: step_pb2.StepPlan) -> Step:
        info = self._info
        freed = self._column("freed_rows", plan.freed_rows)
        check_range("freed_rows", freed, 0, info.max_rows)
        self._active[freed] = False
        new_rows = tuple(self._start_row(new) for new in plan.new_rows)
        append_rows, append_ids = self._append_blocks(plan)
        chunk_rows, chunk_lens, chunk_ids = self._decode_chunks(plan)
        rows, num_scheduled, num_samples = self._decode_work(plan)
        return Step(
            step_id=plan.step_id,
            freed_rows=freed,
            new_rows=new_rows,
            append_rows=append_rows,
            append_block_ids=append_ids,
            chunk_rows=chunk_rows,
            chunk_lens=chunk_lens,
            chunk_token_ids=chunk_ids,
            rows=rows,
            num_scheduled=num_scheduled,
            num_samples=num_samples,
        )

    def _append_blocks(self, plan: step_pb2.StepPlan) -> tuple[Int32Array, Int32Array]:
        if not (plan.append_rows or plan.append_block_ids or plan.append_kv_groups):
            return _NONE, _NONE
        append_rows = self._column("append_rows", plan.append_rows)
        append_ids = self._column("append_block_ids", plan.append_block_ids, append_rows.size)
        if plan.append_kv_groups:
            groups = unpack("append_kv_groups", plan.append_kv_groups, np.uint8, append_rows.size)
            check_range("append_kv_groups", groups, 0, len(self._info.kv_groups))
        self._check_rows("append_rows", append_rows, active=True)
        check_range("append_block_ids", append_ids, 0, self._num_blocks)
        np.add.at(self._blocks, append_rows, 1)
        if (self._blocks[append_rows] > self._max_row_blocks).any():
            raise violation("append_rows", "a block table longer than the model's context")
        return append_rows, append_ids

    def _start_row(self, new: step_pb2.NewRow) -> NewRow:
        info = self._info
        if not 0 <= new.row < info.max_rows or self._active[new.row]:
            raise violation("new_rows.row", f"row {new.row} is out of range or in use")
        token_ids = self._column("new_rows.token_ids", new.token_ids)
        block_ids = self._column("new_rows.block_ids", new.block_ids)
        if not new.num_computed < token_ids.size <= info.max_model_len:
            raise violation("new_rows.token_ids", f"{token_ids.size} tokens, {new.num_computed} of them computed")
        if not 0 < new.num_prompt_tokens <= info.max_model_len:
            raise violation("new_rows.num_prompt_tokens", f"{new.num_prompt_tokens} is out of range")
        check_range("new_rows.token_ids", token_ids, 0, info.vocab_size)
        check_range("new_rows.block_ids", block_ids, 0, self._num_blocks)
        if block_ids.size > self._max_row_blocks:
            raise violation("new_rows.block_ids", "a block table longer than the model's context")
        if new.more_block_tables:
            raise violation("new_rows", "further kv_groups were not claimed in Hello")
        grammar = self._grammar(new) if new.HasField("grammar") else None
        self._active[new.row] = True
        self._known[new.row] = token_ids.size
        self._computed[new.row] = new.num_computed
        self._blocks[new.row] = block_ids.size
        sampling = decode_sampling(new.sampling, info.vocab_size)
        return NewRow(
            new.row, token_ids, new.num_prompt_tokens, new.num_computed, block_ids, new.seed, sampling, grammar
        )

    def _grammar(self, new: step_pb2.NewRow) -> Grammar | None:
        if not self._takes_grammars:
            raise violation("new_rows.grammar", "was not claimed in Hello")
        problem = size_problem(new.grammar)
        if problem is not None:
            raise violation(f"new_rows.{problem[0]}", problem[1])
        return from_message(new.grammar)

    def _decode_chunks(self, plan: step_pb2.StepPlan) -> tuple[Int32Array, Int32Array, Int32Array]:
        rows = self._column("chunk_rows", plan.chunk_rows)
        lens = self._column("chunk_lens", plan.chunk_lens, rows.size)
        self._check_rows("chunk_rows", rows, active=True)
        self._check_distinct("chunk_rows", rows)
        check_range("chunk_lens", lens, 1, self._info.max_model_len + 1)
        ids = self._column("chunk_token_ids", plan.chunk_token_ids, int(lens.sum(dtype=np.int64)))
        check_range("chunk_token_ids", ids, 0, self._info.vocab_size)
        self._known[rows] += lens
        if (self._known[rows] > self._info.max_model_len).any():
            raise violation("chunk_lens", "a row would know more tokens than the model's context")
        return rows, lens, ids

    def _decode_work(self, plan: step_pb2.StepPlan) -> tuple[Int32Array, Int32Array, Int32Array]:
        info = self._info
        rows = self._column("rows", plan.rows)
        num_scheduled = self._column("num_scheduled", plan.num_scheduled, rows.size)
        num_samples = unpack("num_samples", plan.num_samples, np.uint8, rows.size).astype(np.int32)
        self._check_rows("rows", rows, active=True)
        self._check_distinct("rows", rows)
        check_range("num_scheduled", num_scheduled, 1, info.max_num_batched_tokens + 1)
        check_range("num_samples", num_samples, 0, 2)
        if int(num_scheduled.sum(dtype=np.int64)) > info.max_num_batched_tokens:
            raise violation("num_scheduled", f"more than the budget of {info.max_num_batched_tokens} tokens")
        self._computed[rows] += num_scheduled
        after = self._computed[rows]
        if (after > self._known[rows]).any():
            raise violation("num_scheduled", "a row would compute tokens that it does not know")
        if (after > self._blocks[rows] * self._block_size).any():
            raise violation("num_scheduled", "a row would write behind its last block")
        if ((num_samples > 0) & (after != self._known[rows])).any():
            raise violation("num_samples", "a row would sample before its last known token")
        self._known[rows] += num_samples
        if (self._known[rows] > info.max_model_len).any():
            raise violation("num_samples", "a row would sample beyond the model's context")
        self._refuse_unclaimed(plan)
        return rows, num_scheduled, num_samples

    def _refuse_unclaimed(self, plan: step_pb2.StepPlan) -> None:
        if plan.num_draft_tokens or plan.draft_token_ids or plan.adapter_slots:
            raise violation("num_draft_tokens", "speculation and adapters were not claimed in Hello")

    def _column(self, name: str, data: bytes, length: int | None = None) -> Int32Array:
        return unpack(name, data, np.int32, length)

    def _check_rows(self, name: str, rows: Int32Array, *, active: bool) -> None:
        check_range(name, rows, 0, self._info.max_rows)
        if rows.size and (self._active[rows] != active).any():
            raise violation(name, "a row that holds no request")

    def _check_distinct(self, name: str, rows: Int32Array) -> None:
        if rows.size > 1 and np.bincount(rows).max() > 1:
            raise violation(name, "a row twice")


def decode_sampling(spec: common_pb2.SamplingSpec, vocab_size: int) -> SamplingParams:
    """SamplingParams of the wire's SamplingSpec, checked against their ranges and the vocabulary. Raises PROTOCOL_VIOLATION."""
    try:
        ids = check_sampling(spec, vocab_size)
    except BadSampling as error:
        raise violation(error.field, error.problem) from None
    return SamplingParams(
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
        repetition_penalty=spec.repetition_penalty,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        min_tokens=spec.min_tokens,
        stop_token_ids=tuple(ids.stop.tolist()),
        logit_bias=dict(spec.logit_bias),
        allowed_token_ids=tuple(ids.allowed.tolist()),
        bad_words=tuple(tuple(word.tolist()) for word in ids.bad_words),
        logprobs=spec.logprobs if spec.HasField("logprobs") else None,
        prompt_logprobs=spec.prompt_logprobs if spec.HasField("prompt_logprobs") else None,
    )


def encode_output(epoch: int, output: StepOutput) -> step_pb2.StepResult:
    """The StepResult of a step that went well."""
    result = step_pb2.StepResult(
        epoch=epoch,
        step_id=output.step_id,
        status=step_pb2.STEP_STATUS_OK,
        num_tokens=pack(output.num_tokens, np.uint8),
        token_ids=pack(output.token_ids, np.int32),
        device_ns=output.device_ns,
        gap_ns=output.gap_ns,
    )
    if output.row_status.any():
        result.row_status = pack(output.row_status, np.uint8)
    if output.logprobs is not None:
        result.logprobs.CopyFrom(_encode_logprobs(output.logprobs))
    return result


def _encode_logprobs(columns: LogprobColumns) -> common_pb2.LogprobColumns:
    return common_pb2.LogprobColumns(
        owner=pack(columns.owner, np.int32),
        position=pack(columns.position, np.int32),
        rank=pack(columns.rank, np.int32),
        num_entries=pack(columns.num_entries, np.int32),
        token_ids=pack(columns.token_ids, np.int32),
        logprobs=pack(columns.logprobs, np.float32),
    )
