"""Rows on the device: token ids, block table and sampling fields in one int32 arena, and what of them the host must know.

The host keeps counts (known, computed, blocks) and block tables: enough to lay out a step, to see what rows share, and to refuse
a step that makes no sense. Token ids that the model chose never come back to be sent again. All changes of a step travel as one
buffer (kernels/row_state.cu).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.ops import KernelOps
from kernels.row_layout import PENALTIES, PROCESS, ROW_FIELDS, ROW_WORDS, TRUNCATE
from worker.backend import BackendError
from worker.step import Int32Array, NewRow, SamplingParams, Step


@dataclass(frozen=True, slots=True)
class _Segment:
    to: int  # word of the arena
    words: Int32Array


class DeviceRows:
    """State of all rows. Device tensors are written only on the backend's stream."""

    def __init__(
        self, ops: KernelOps, max_rows: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self._ops = ops
        self.block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self.max_model_len = max_model_len
        self.max_blocks = -(-max_model_len // block_size)
        sizes = (max_rows * ROW_WORDS, max_rows * max_model_len, max_rows * self.max_blocks)
        if sum(sizes) >= 2**31:
            raise BackendError(
                f"max_rows {max_rows} x max_model_len {max_model_len}: row state would exceed 2^31 words"
            )
        self._arena = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.fields = self._arena[: sizes[0]].view(max_rows, ROW_WORDS)
        self.tokens = self._arena[sizes[0] : sizes[0] + sizes[1]].view(max_rows, max_model_len)
        self.block_table = self._arena[sizes[0] + sizes[1] :].view(max_rows, self.max_blocks)
        self.counts = torch.zeros((max_rows, vocab_size), dtype=torch.int32, device=device)
        self._tokens_at, self._blocks_at = sizes[0], sizes[0] + sizes[1]
        self.known = np.zeros(max_rows, np.int64)
        self.computed = np.zeros(max_rows, np.int64)
        self.num_prompt = np.zeros(max_rows, np.int64)
        self.num_blocks = np.zeros(max_rows, np.int64)
        # The host's copy of block_table; beyond num_blocks stands what older rows left.
        self.blocks = np.zeros((max_rows, self.max_blocks), np.int32)
        self.flags = np.zeros(max_rows, np.uint32)
        self.params: list[SamplingParams | None] = [None] * max_rows
        self._extras: dict[int, list[torch.Tensor]] = {}
        # What rows under a grammar may choose in this step; their `allowed` points here.
        self._masks = torch.zeros((max_rows, -(-vocab_size // 32)), dtype=torch.int32, device=device)
        self._allowed: dict[int, Int32Array] = {}  # of rows under a grammar that have allowed_token_ids as well
        self.describing: set[int] = set()  # rows that want log-probabilities of any kind

    @staticmethod
    def device_bytes(max_rows: int, max_model_len: int, block_size: int, vocab_size: int) -> int:
        """What the tensors of such a table take."""
        words = ROW_WORDS + max_model_len + -(-max_model_len // block_size) + vocab_size + -(-vocab_size // 32)
        return 4 * max_rows * words

    def reset(self) -> None:
        """Forget every row."""
        for row in range(len(self.params)):
            self._free(row)

    def apply(self, step: Step) -> None:
        """Enqueue the step's changes of row state. Raises BackendError for a step that makes no sense."""
        for row in step.freed_rows.tolist():
            self._free(row)
        segments: list[_Segment] = []
        counted: list[tuple[int, int, int, int]] = []  # row, first, length, clear
        for new in step.new_rows:
            self._start(new, segments)
            if self.flags[new.row] & PENALTIES:
                counted.append((new.row, 0, len(new.token_ids), 1))
        for row, block in zip(step.append_rows.tolist(), step.append_block_ids.tolist(), strict=True):
            self._append_blocks(row, np.array([block], np.int32), segments)
        first = 0
        for row, length in zip(step.chunk_rows.tolist(), step.chunk_lens.tolist(), strict=True):
            if self.flags[row] & PENALTIES:
                counted.append((row, int(self.known[row]), length, 0))
            self._append_tokens(row, step.chunk_token_ids[first : first + length], segments)
            first += length
        self._check_scheduled(step)
        self._upload(segments)
        if counted:
            jobs = upload(np.array(counted, np.int32), self._device)
            self._ops.count_tokens(jobs, self.fields, self.tokens, self.counts)

    def set_masks(self, rows: Int32Array, bits: Int32Array) -> None:
        """Enqueue what rows under a grammar may choose next: rows int32 [C], bits int32 [C, vocab / 32], the lowest bit first."""
        for at, row in enumerate(rows.tolist()):
            if row in self._allowed:
                bits[at] &= self._allowed[row]
        self._masks.index_copy_(0, upload(rows, self._device).long(), upload(bits, self._device))

    def _upload(self, segments: list[_Segment]) -> None:
        if not segments:
            return
        lengths = np.array([len(segment.words) for segment in segments], np.int32)
        sources = np.cumsum(lengths, dtype=np.int32) - lengths
        table = np.stack((np.array([segment.to for segment in segments], np.int32), sources, lengths), axis=1)
        plan = upload(np.concatenate([*(segment.words for segment in segments), table.reshape(-1)]), self._device)
        self._ops.apply_plan(self._arena, plan, int(lengths.sum()), len(segments))

    def _free(self, row: int) -> None:
        self.known[row] = self.computed[row] = self.num_prompt[row] = self.num_blocks[row] = 0
        self.flags[row] = 0
        self.params[row] = None
        self._extras.pop(row, None)
        self._allowed.pop(row, None)
        self.describing.discard(row)

    def _start(self, new: NewRow, segments: list[_Segment]) -> None:
        row, params = new.row, new.sampling_after_mask
        self._free(row)
        self.params[row] = params
        self.num_prompt[row] = new.num_prompt_tokens
        self.computed[row] = new.num_computed
        self.flags[row] = sampling_flags(params) | (PROCESS if new.grammar is not None else 0)
        if params.logprobs is not None or params.prompt_logprobs is not None:
            self.describing.add(row)
        segments.append(_Segment(row * ROW_WORDS, self._pack_fields(new)))
        self._append_tokens(row, new.token_ids, segments)
        self._append_blocks(row, new.block_ids, segments)

    def _pack_fields(self, new: NewRow) -> Int32Array:
        params = new.sampling_after_mask
        fields = np.zeros(1, ROW_FIELDS)
        greedy = params.temperature == 0
        for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"):
            fields[name] = getattr(params, name)
        fields["num_computed"], fields["num_prompt"] = new.num_computed, new.num_prompt_tokens
        fields["seed_low"], fields["seed_high"] = new.seed & 0xFFFFFFFF, new.seed >> 32 & 0xFFFFFFFF
        fields["top_k"], fields["top_p"], fields["min_p"] = (
            (0, 1, 0) if greedy else (params.top_k, params.top_p, params.min_p)
        )
        fields["flags"] = self.flags[new.row]
        stops = params.stop_token_ids if params.min_tokens > 0 else ()
        words = [word for word in params.bad_words if word]
        fields["num_bias"], fields["num_stop"], fields["num_bad_words"] = len(params.logit_bias), len(stops), len(words)
        lists = [
            np.array(list(params.logit_bias), np.int32),
            np.array(list(params.logit_bias.values()), np.float32).view(np.int32),
        ]
        lists += [np.array(stops, np.int32), *(np.array((len(word), *word), np.int32) for word in words)]
        flat = np.concatenate(lists)
        kept: list[torch.Tensor] = []
        if flat.size:
            kept.append(upload(flat, self._device))
            fields["extras"] = kept[-1].data_ptr()
        if new.grammar is not None:
            fields["allowed"] = self._masks[new.row].data_ptr()
            if params.allowed_token_ids:
                self._allowed[new.row] = allowed_bits(params.allowed_token_ids, self._vocab_size)
        elif params.allowed_token_ids:
            kept.append(upload(allowed_bits(params.allowed_token_ids, self._vocab_size), self._device))
            fields["allowed"] = kept[-1].data_ptr()
        self._extras[new.row] = kept
        return fields.view(np.int32)

    def _append_tokens(self, row: int, token_ids: Int32Array, segments: list[_Segment]) -> None:
        start, end = int(self.known[row]), int(self.known[row]) + len(token_ids)
        if end > self.max_model_len:
            raise BackendError(f"row {row}: {end} tokens exceed max_model_len {self.max_model_len}")
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self._vocab_size:
            raise BackendError(f"row {row}: a token id lies outside the vocabulary of {self._vocab_size}")
        segments.append(_Segment(self._tokens_at + row * self.max_model_len + start, token_ids))
        self.known[row] = end

    def _append_blocks(self, row: int, block_ids: Int32Array, segments: list[_Segment]) -> None:
        start, end = int(self.num_blocks[row]), int(self.num_blocks[row]) + len(block_ids)
        if end > self.max_blocks:
            raise BackendError(f"row {row}: {end} blocks exceed its block table of {self.max_blocks}")
        segments.append(_Segment(self._blocks_at + row * self.max_blocks + start, block_ids))
        self.blocks[row, start:end] = block_ids
        self.num_blocks[row] = end

    def _check_scheduled(self, step: Step) -> None:
        """A row computes only tokens that it knows, into blocks that it has."""
        ends = self.computed[step.rows] + step.num_scheduled
        unknown = ends > self.known[step.rows]
        if unknown.any():
            raise BackendError(f"row {int(step.rows[unknown.argmax()])}: more tokens are scheduled than the row knows")
        outside = ends > self.num_blocks[step.rows] * self.block_size
        if outside.any():
            raise BackendError(f"row {int(step.rows[outside.argmax()])}: its blocks do not hold the scheduled tokens")


def sampling_flags(params: SamplingParams) -> int:
    """What the sampling kernels must do for a row."""
    penalties = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    masks = (
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or (params.min_tokens > 0 and params.stop_token_ids)
    )
    truncates = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    return (PROCESS if penalties or masks else 0) | (TRUNCATE if truncates else 0) | (PENALTIES if penalties else 0)


def allowed_bits(token_ids: tuple[int, ...], vocab_size: int) -> Int32Array:
    """One bit a token, int32 [vocab / 32], the lowest bit first."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    allowed[list(token_ids)] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy int32 values to the device without waiting.

    The pinned buffer comes from torch's host allocator, which gives it out again only when the copy has ended.
    """
    pinned = torch.empty(values.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    pinned.numpy()[...] = values
    return pinned.to(device, non_blocking=True)
