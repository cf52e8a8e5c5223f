"""A backend without a model: the next token is a hash of the row's tokens, read back through the block table.

Simulation, chaos, overload and router benchmarks run on it, because its answers are exact and its time is scripted. It is honest
about paging: each slot of its KV cache holds the hash of the prefix that ends there and that prefix's length. A block owned
twice, a stale prefix hit or a wrong table entry therefore changes the tokens, or is found at once. Needs no torch.

The hash of a prefix is the sum (modulo 2^64) of a mix of each token with its position, so a whole chunk is one cumulative sum.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.backend import BackendError, BackendInfo, KVGroup, Masks, Progress
from worker.grammar.matcher import allowed
from worker.step import Float32Array, Int32Array, LogprobColumns, NewRow, RowStatus, SamplingParams, Step, StepOutput

EOS_TOKEN_ID = 257

_UInt64Array = npt.NDArray[np.uint64]
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class MockSettings:
    """Size and script of a mock device."""

    vocab_size: int = 32_000
    max_model_len: int = 8_192
    max_rows: int = 256
    max_num_batched_tokens: int = 8_192
    block_size: int = 16
    num_blocks: int = 4_096
    window: int | None = None
    step_ms: float = 0.0  # device time of a step
    token_us: float = 0.0  # and of each scheduled token
    eos_every: int = 0  # one token in so many is EOS; 0: never
    die_at_step: int = 0  # the process ends without a word; 0: never
    hang_at_step: int = 0  # that step's result never comes
    fail_at_step: int = 0  # that step fails


class MockBackend:
    """See the module's text. `reset` forgets rows but keeps the cache's content, as a real device would."""

    def __init__(self, settings: MockSettings) -> None:
        self._settings = settings
        self._block_size = settings.block_size
        slots = settings.num_blocks * settings.block_size
        self._slot_hash: _UInt64Array = np.zeros(slots, np.uint64)
        self._slot_len: Int32Array = np.full(slots, -1, np.int32)
        max_blocks = -(-settings.max_model_len // settings.block_size)
        self._block_table: Int32Array = np.zeros((settings.max_rows, max_blocks), np.int32)
        self._tokens: Int32Array = np.empty((settings.max_rows, settings.max_model_len), np.int32)
        self._num_blocks: Int32Array = np.zeros(settings.max_rows, np.int32)
        self._known: Int32Array = np.zeros(settings.max_rows, np.int32)
        self._computed: Int32Array = np.zeros(settings.max_rows, np.int32)
        self._prompt_len: Int32Array = np.zeros(settings.max_rows, np.int32)
        self._seed: _UInt64Array = np.zeros(settings.max_rows, np.uint64)
        self._sampling: list[SamplingParams] = [SamplingParams()] * settings.max_rows
        self._wants_logprobs: set[int] = set()
        self._last_hash: _UInt64Array = np.zeros(0, np.uint64)
        self._prompt_logprobs: list[tuple[int, int, Int32Array]] = []
        self._done: deque[tuple[StepOutput, float]] = deque()
        self._device_free_at = 0.0
        self._steps = 0

    def load(self, progress: Progress) -> BackendInfo:
        """Nothing to load."""
        settings = self._settings
        progress("weights", 1, 1)
        group = KVGroup(0, settings.block_size, settings.num_blocks, 12 * settings.block_size, settings.window)
        return BackendInfo(
            name="mock",
            numerics=f"mock-1 vocab={settings.vocab_size} eos_every={settings.eos_every}",
            kv_dtype="uint64",
            vocab_size=settings.vocab_size,
            max_model_len=settings.max_model_len,
            max_rows=settings.max_rows,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_groups=(group,),
        )

    def warm_up(self) -> None:
        """Nothing to warm."""

    def reset(self) -> None:
        """Forget every row."""
        self._known[:] = 0
        self._computed[:] = 0
        self._num_blocks[:] = 0
        self._wants_logprobs.clear()
        self._done.clear()

    def begin(self, step: Step) -> None:
        """Apply the step's changes to row state."""
        for row in step.freed_rows:
            self._known[row] = self._computed[row] = self._num_blocks[row] = 0
            self._wants_logprobs.discard(int(row))
        for new in step.new_rows:
            self._start_row(new)
        for row, block_id in zip(step.append_rows.tolist(), step.append_block_ids.tolist(), strict=True):
            self._block_table[row, self._num_blocks[row]] = block_id
            self._num_blocks[row] += 1
        start = 0
        for row, length in zip(step.chunk_rows.tolist(), step.chunk_lens.tolist(), strict=True):
            known = self._known[row]
            self._tokens[row, known : known + length] = step.chunk_token_ids[start : start + length]
            self._known[row] += length
            start += length

    def forward(self, step: Step) -> None:
        """Write the prefix hash of every scheduled token into its slot."""
        self._steps += 1
        self._play_script()
        if step.rows.size == 0:
            self._last_hash = np.zeros(0, np.uint64)
            return
        rows, counts = step.rows, step.num_scheduled
        before = self._computed[rows]
        prefix = np.where(before > 0, self._read(rows, before - 1), np.uint64(0))
        # One flat array over all scheduled tokens: which row, and which position in it.
        owner = np.repeat(np.arange(rows.size), counts)
        first = np.cumsum(counts) - counts
        position = (np.arange(owner.size) - first[owner] + before[owner]).astype(np.int32)
        terms = _mix(self._tokens[rows[owner], position].astype(np.uint64), position.astype(np.uint64))
        running = np.cumsum(terms, dtype=np.uint64)
        base = prefix - np.where(first > 0, running[first - 1], np.uint64(0))
        values = running + base[owner]
        slots = self._slot(rows[owner], position)
        self._slot_hash[slots] = values
        self._slot_len[slots] = position + 1
        self._computed[rows] = before + counts
        self._last_hash = values[first + counts - 1]
        self._note_prompt_logprobs(rows, before, counts)

    def sample(self, step: Step, masks: Masks | None = None) -> None:
        """Choose the tokens, append them to their rows, and put the output where `collect` finds it."""
        sampling = step.num_samples > 0
        rows = step.rows[sampling]
        hashes = self._last_hash[sampling]
        index = self._known[rows] - self._prompt_len[rows]
        tokens = self._choose(rows, hashes, index)
        status = np.zeros(rows.size, np.int32)
        if masks is not None:
            for place, bits in zip(masks.places.tolist(), masks.wait(), strict=True):
                token = masked_choice(self._mixed(rows, hashes, index)[place], allowed(bits, self._settings.vocab_size))
                tokens[place], status[place] = (token, RowStatus.OK) if token >= 0 else (0, RowStatus.MASK_EMPTY)
        fine = status == RowStatus.OK
        self._tokens[rows, self._known[rows]] = tokens
        logprobs = self._logprobs(step, rows, tokens) if self._wants_logprobs or self._prompt_logprobs else None
        self._known[rows] += 1
        device_s = self._settings.step_ms / 1e3 + self._settings.token_us * int(step.num_scheduled.sum()) / 1e6
        now = time.monotonic()
        started = max(now, self._device_free_at)
        gap_ns = int(max(0.0, now - self._device_free_at) * 1e9) if self._device_free_at else 0
        self._device_free_at = started + device_s
        output = StepOutput(
            step_id=step.step_id,
            num_tokens=fine.astype(np.int32),
            row_status=status,
            token_ids=tokens[fine],
            logprobs=logprobs,
            device_ns=int(device_s * 1e9),
            gap_ns=gap_ns,
        )
        self._done.append((output, self._device_free_at))

    def collect(self) -> StepOutput:
        """The oldest output, no sooner than its device time has passed."""
        output, ready_at = self._done[0]
        if ready_at == math.inf:  # no sleep takes so long
            threading.Event().wait()
        wait = ready_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        self._done.popleft()
        return output

    def close(self) -> None:
        """Nothing to release."""

    def _start_row(self, new: NewRow) -> None:
        row, length, blocks = new.row, new.token_ids.size, new.block_ids.size
        self._tokens[row, :length] = new.token_ids
        self._known[row] = length
        self._computed[row] = new.num_computed
        self._prompt_len[row] = new.num_prompt_tokens
        self._block_table[row, :blocks] = new.block_ids
        self._num_blocks[row] = blocks
        self._seed[row] = np.uint64(new.seed if new.sampling.temperature > 0 else 0)
        self._sampling[row] = new.sampling_after_mask
        if new.sampling.logprobs is not None or new.sampling.prompt_logprobs is not None:
            self._wants_logprobs.add(row)

    def _slot(self, rows: npt.NDArray[np.integer], position: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        block = self._block_table[rows, position // self._block_size].astype(np.int64)
        return np.asarray(block * self._block_size + position % self._block_size, np.int64)

    def _read(self, rows: Int32Array, position: Int32Array) -> _UInt64Array:
        """The prefix hash at a position of each row; -1 reads nothing."""
        slots = self._slot(rows, np.maximum(position, 0))
        wrong = (self._slot_len[slots] != position + 1) & (position >= 0)
        if wrong.any():
            row = int(rows[np.argmax(wrong)])
            raise BackendError(f"mock: the block table of row {row} leads to a slot that holds another position")
        return self._slot_hash[slots]

    def _choose(self, rows: Int32Array, hashes: _UInt64Array, index: Int32Array) -> Int32Array:
        mixed = self._mixed(rows, hashes, index)
        # Ids from 258 on are words; the ids below are bytes, BOS and EOS.
        tokens = (mixed % np.uint64(self._settings.vocab_size - 258)).astype(np.int32) + 258
        if self._settings.eos_every:
            chance = (mixed >> np.uint64(32)) % np.uint64(self._settings.eos_every)
            for at in np.flatnonzero(chance == 0):
                if index[at] >= self._sampling[rows[at]].min_tokens:
                    tokens[at] = EOS_TOKEN_ID
        return tokens

    def _mixed(self, rows: Int32Array, hashes: _UInt64Array, index: Int32Array) -> _UInt64Array:
        return _mix(hashes ^ self._seed[rows], index.astype(np.uint64))

    def _note_prompt_logprobs(self, rows: Int32Array, before: Int32Array, counts: Int32Array) -> None:
        self._prompt_logprobs = []
        if not self._wants_logprobs:
            return
        for at, row in enumerate(rows.tolist()):
            if row in self._wants_logprobs and self._sampling[row].prompt_logprobs is not None:
                # The logits before a token describe it, so the first of a chunk is described by those of the chunk before; the
                # token after a chunk is not known yet.
                low, end = max(1, int(before[at])), min(int(before[at] + counts[at]), int(self._prompt_len[row]))
                if low < end:
                    self._prompt_logprobs.append((at, row, np.arange(low, end, dtype=np.int32)))

    def _logprobs(self, step: Step, rows: Int32Array, tokens: Int32Array) -> LogprobColumns | None:
        owner: list[int] = []
        position: list[int] = []
        entries: list[tuple[Int32Array, Float32Array]] = []

        def describe(at: int, row: int, where: int, token: int, best: int) -> None:
            owner.append(at)
            position.append(where)
            ids = np.array([token, *((token + 1 + i) % self._settings.vocab_size for i in range(best))], np.int32)
            entries.append((ids, -(np.arange(1, best + 2, dtype=np.float32))))

        for at, row, positions in self._prompt_logprobs:
            for where in positions:
                wanted = self._sampling[row].prompt_logprobs or 0
                describe(at, row, int(where), int(self._tokens[row, where]), wanted)
        sampling_at = np.flatnonzero(step.num_samples > 0)
        for at, row, token in zip(sampling_at.tolist(), rows.tolist(), tokens.tolist(), strict=True):
            wanted_best = self._sampling[row].logprobs
            if wanted_best is not None:
                describe(at, row, int(self._known[row]), token, wanted_best)
        if not owner:
            return None
        return LogprobColumns(
            owner=np.array(owner, np.int32),
            position=np.array(position, np.int32),
            rank=np.ones(len(owner), np.int32),
            num_entries=np.array([ids.size for ids, _ in entries], np.int32),
            token_ids=np.concatenate([ids for ids, _ in entries]),
            logprobs=np.concatenate([values for _, values in entries]),
        )

    def _play_script(self) -> None:
        settings = self._settings
        if settings.die_at_step == self._steps:
            os._exit(1)
        if settings.hang_at_step == self._steps:
            self._device_free_at = math.inf
        if settings.fail_at_step == self._steps:
            raise BackendError("mock: this step was scripted to fail")


def masked_choice(mixed: np.uint64, mask: npt.NDArray[np.bool_]) -> int:
    """The token of a row under a grammar, given its hash and what is allowed, bool [vocab]; -1 where nothing is.

    It likes to end, one time in four where it may, and bytes better than words: else its outputs would have no end.
    """
    ids = np.flatnonzero(mask)
    if not ids.size:
        return -1
    if mask[EOS_TOKEN_ID] and (ids.size == 1 or int(mixed >> np.uint64(40)) % 4 == 0):
        return EOS_TOKEN_ID
    ids = ids[ids != EOS_TOKEN_ID]
    octets = ids[ids < 256]
    ids = octets if octets.size else ids
    return int(ids[int(mixed % np.uint64(ids.size))])


def _mix(value: _UInt64Array, salt: _UInt64Array) -> _UInt64Array:
    """SplitMix64's finaliser over value and salt."""
    with np.errstate(over="ignore"):
        mixed = (value + _MIX[0]) * _MIX[1] ^ (salt + np.uint64(1)) * _MIX[2]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[1]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[2]
        return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)
