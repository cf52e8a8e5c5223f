"""The torch backend: the reference, and what runs on a CPU.

Everything happens in the calling thread and in order, so a step that was sampled is finished; `collect` only hands it over.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from service.memory import own_bytes
from worker.backend import BackendError, BackendInfo, KVGroup, Masks, Progress
from worker.backends.torch_memory import available_bytes, check_sequence_fits, choose_num_blocks
from worker.backends.torch_rows import RowState
from worker.checkpoint.config import ModelConfig, load_config
from worker.checkpoint.weights import StoredWeights
from worker.cpu.attention import SPLIT
from worker.model.attention import AttentionPlan, RowSpan
from worker.model.decoder import Decoder, pack
from worker.model.kv_cache import PagedKVCache
from worker.model.linear_int8 import supported_form
from worker.sampling.logprobs import LogprobCollector
from worker.sampling.sampler import sample
from worker.step import NewRow, RowStatus, SamplingParams, Step, StepOutput

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUANTIZATIONS = ("none", "int8")
_PROMPT_LOGITS = 64  # prompt positions whose logits are held at once
_NUMERICS_VERSION = 5  # raise it with every change that can change a bit of the logits


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """How to serve a model. None means: decide from the model and the machine."""

    dtype: str = "auto"  # auto: as stored
    quantization: str = "none"  # int8: all matrices in 8 bits; the KV cache stays in dtype
    max_model_len: int | None = None
    max_rows: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float | None = (
        None  # of the memory available before anything is loaded; None: torch_memory.py says
    )
    promised_bytes: int = 0  # of the memory available that other processes may still take
    threads: int | None = None
    poison: bool = False  # tests: unwritten cache is NaN

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *_DTYPES):
            raise BackendError(f"dtype: {self.dtype!r} is none of auto, {', '.join(_DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            raise BackendError(f"quantization: {self.quantization!r} is none of {', '.join(QUANTIZATIONS)}")
        for name in ("max_model_len", "max_rows", "max_num_batched_tokens", "block_size", "num_blocks", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BackendError(f"{name}: must be at least 1, not {value}")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise BackendError(f"memory_fraction: must be above 0 and at most 1, not {self.memory_fraction}")


class TorchBackend:
    """Implements worker.backend.Backend with torch."""

    def __init__(self, model_dir: Path, settings: TorchSettings) -> None:
        self._model_dir = model_dir
        self._settings = settings
        self._finished: deque[StepOutput] = deque()
        self._last_end = 0

    def load(self, progress: Progress) -> BackendInfo:
        settings = self._settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        config = load_config(self._model_dir)
        dtype = _DTYPES[config.dtype if settings.dtype == "auto" else settings.dtype]
        limit = longest_context(config)
        if settings.max_model_len is not None and settings.max_model_len > limit:
            raise BackendError(
                f"max_model_len: {settings.max_model_len} is more than the {limit} tokens that the model was made for"
            )
        int8 = settings.quantization == "int8"
        if int8:
            supported_form()  # says no before a gigabyte has been read
        available, own = available_bytes(), own_bytes()
        with torch.inference_mode():
            weights = pack(StoredWeights(self._model_dir, config, dtype, progress), config, int8)
            group = self._plan_cache(config, dtype, limit, available, max(0, own_bytes() - own))
            max_model_len = settings.max_model_len or min(limit, group.num_blocks * settings.block_size)
            self._decoder = Decoder(config, weights, max_model_len, settings.block_size, dtype)
            self._cache = PagedKVCache(
                config.num_layers, config.num_kv_heads, config.head_dim, group.num_blocks, settings.block_size, dtype,
                settings.poison,
            )  # fmt: skip
        self._config = config
        self._rows = RowState(settings.max_rows, max_model_len, settings.block_size)
        self._hidden = torch.empty(0)
        self._boundary: dict[int, torch.Tensor] = {}
        return BackendInfo(
            name="torch",
            numerics=numerics(dtype, settings.quantization),
            kv_dtype=str(dtype).removeprefix("torch."),
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            max_rows=settings.max_rows,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_groups=(group,),
        )

    def _plan_cache(self, config: ModelConfig, dtype: torch.dtype, limit: int, available: int, weights: int) -> KVGroup:
        """`available` before the weights took `weights`, both in bytes."""
        settings = self._settings
        bytes_per_block = 2 * config.num_layers * config.kv_size * dtype.itemsize * settings.block_size
        longest = settings.max_model_len or limit
        useful = settings.max_rows * -(-longest // settings.block_size)
        num_blocks = choose_num_blocks(
            settings.num_blocks,
            settings.memory_fraction,
            available,
            bytes_per_block,
            useful,
            weights=weights,
            promised=settings.promised_bytes,
        )
        if settings.max_model_len is not None:
            check_sequence_fits(num_blocks, settings.block_size, settings.max_model_len, bytes_per_block)
        windows = set(config.windows)
        window = windows.pop() if len(windows) == 1 else None
        return KVGroup(0, settings.block_size, num_blocks, bytes_per_block, window)

    def warm_up(self) -> None:
        """One step of two tokens in row 0 and block 0, then all is forgotten; the cache keeps values nobody will read."""
        none = np.zeros(0, np.int32)
        row = np.zeros(1, np.int32)
        tokens = np.zeros(min(2, self._settings.block_size), np.int32)
        new = NewRow(0, tokens, len(tokens), 0, row, 0, SamplingParams(temperature=0.0))
        step = Step(0, none, (new,), none, none, none, none, none, row, np.array([len(tokens)], np.int32), row + 1)
        self.begin(step)
        self.forward(step)
        self.sample(step)
        self.collect()
        self.reset()

    def reset(self) -> None:
        self._rows.reset()
        self._boundary.clear()
        self._finished.clear()

    @torch.inference_mode()
    def begin(self, step: Step) -> None:
        self._began = time.perf_counter_ns()
        for row in (*step.freed_rows.tolist(), *(new.row for new in step.new_rows)):
            self._boundary.pop(row, None)
        self._rows.apply(step)

    @torch.inference_mode()
    def forward(self, step: Step) -> None:
        state = self._rows
        counts = step.num_scheduled.astype(np.int64)
        firsts = np.cumsum(counts) - counts
        starts = state.num_computed[step.rows]
        rows = np.repeat(step.rows.astype(np.int64), counts)
        positions = np.arange(len(rows)) + np.repeat(starts - firsts, counts)
        spans = [
            RowSpan(int(start), int(count), int(first), state.blocks(int(row)))
            for row, start, count, first in zip(step.rows, starts, counts, firsts, strict=True)
        ]
        if not spans:
            self._hidden = torch.empty(0)
            return
        group = self._config.num_heads // self._config.num_kv_heads
        self._hidden = self._decoder.forward(
            torch.from_numpy(state.gather_tokens(rows, positions)),
            torch.from_numpy(positions),
            torch.from_numpy(state.gather_slots(rows, positions)),
            AttentionPlan(spans, group),
            self._cache,
        )
        state.num_computed[step.rows] += counts

    @torch.inference_mode()
    def sample(self, step: Step, masks: Masks | None = None) -> None:
        state = self._rows
        collector = LogprobCollector()
        self._describe_prompts(step, collector)
        sampling = np.flatnonzero(step.num_samples)
        rows = step.rows[sampling].astype(np.int64)
        tokens, status = np.zeros(0, np.int32), np.zeros(0, np.int32)
        if len(rows):
            last = np.cumsum(step.num_scheduled)[sampling] - 1
            logits = self._decoder.logits(self._hidden.index_select(0, torch.from_numpy(last.astype(np.int64))))
            tokens, status = sample(logits, [state.context(row) for row in rows.tolist()], masks)
            for i, row in enumerate(rows.tolist()):
                params = state.params[row]
                if params is not None and params.logprobs is not None and status[i] == RowStatus.OK:
                    collector.add(
                        int(sampling[i]), int(state.num_known[row]), logits[i], int(tokens[i]), params.logprobs
                    )
        good = status == RowStatus.OK
        # A row that failed gets token 0: a plan that is in flight already may still name it, and must not fail the others.
        state.push_sampled(rows, np.where(good, tokens, 0).astype(np.int32))
        self._finish(step, tokens[good], status, collector)

    def _finish(self, step: Step, tokens: np.ndarray, status: np.ndarray, collector: LogprobCollector) -> None:
        end = time.perf_counter_ns()
        gap = self._began - self._last_end if self._last_end else 0
        num_tokens = (status == RowStatus.OK).astype(np.int32)
        columns = collector.columns()
        self._finished.append(
            StepOutput(step.step_id, num_tokens, status, tokens.astype(np.int32), columns, end - self._began, gap)
        )
        self._last_end = end

    def _describe_prompts(self, step: Step, collector: LogprobCollector) -> None:
        """Prompt log-probabilities: the logits at a position describe the token that follows it.

        The token after a chunk's last position may come only with the next chunk; until then its hidden state waits in _boundary.
        """
        state = self._rows
        first = 0
        for owner, (row, count) in enumerate(zip(step.rows.tolist(), step.num_scheduled.tolist(), strict=True)):
            params = state.params[row]
            if params is not None and params.prompt_logprobs is not None:
                start = int(state.num_computed[row]) - count
                hidden = self._hidden[first : first + count]
                waiting = self._boundary.pop(row, None)
                if waiting is not None:
                    hidden, start = torch.cat((waiting, hidden)), start - 1
                known = state.tokens(row)
                end = min(start + len(hidden), int(state.num_prompt[row]) - 1)
                described = min(end, len(known) - 1)
                for begin in range(start, described, _PROMPT_LOGITS):
                    logits = self._decoder.logits(
                        hidden[begin - start : min(begin + _PROMPT_LOGITS, described) - start]
                    )
                    for i, row_logits in enumerate(logits, begin + 1):
                        collector.add(owner, i, row_logits, int(known[i]), params.prompt_logprobs)
                if described < end:
                    self._boundary[row] = hidden[-1:].clone()
            first += count

    def collect(self) -> StepOutput:
        if not self._finished:
            raise BackendError("collect was called, but no step has been sampled")
        return self._finished.popleft()

    def close(self) -> None:
        self.reset()
        del self._decoder, self._cache, self._rows


def longest_context(config: ModelConfig) -> int:
    """The longest sequence in tokens that the model was made for, stretched by its RoPE scaling if it has one."""
    if config.rope.kind in ("linear", "llama3", "yarn"):
        return max(config.max_position_embeddings, int(config.rope.original_max_position * config.rope.factor))
    return config.max_position_embeddings


def numerics(dtype: torch.dtype, quantization: str = "none") -> str:
    """Everything that decides the bits of this backend's logits on this machine."""
    name = str(dtype).removeprefix("torch.")
    if quantization != "none":
        name += f" {quantization}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch-backend {_NUMERICS_VERSION}; {name}; torch {torch.__version__}; {capability}; split {SPLIT}"
