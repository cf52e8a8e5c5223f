"""A backend driven without services: first come, first served, run-ahead of two steps. For benchmarks and GPU tests.

It is the smallest scheduler that exercises a backend as the real one does: chunks and decodes mix, blocks are handed out
when they are needed, and a step is enqueued before the last one's tokens are known.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from worker.backend import Backend, BackendInfo
from worker.step import Int32Array, LogprobColumns, NewRow, SamplingParams, Step

GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True, eq=False)
class Request:
    """One sequence, and what became of it."""

    prompt: list[int]
    num_outputs: int
    sampling: SamplingParams = GREEDY
    seed: int = 0
    outputs: list[int] = field(default_factory=list)
    status: int = 0
    first_token_s: float = 0.0  # since the run began
    promised: int = 0  # tokens that enqueued steps sample
    computed: int = 0  # at first: tokens whose keys and values stand in `blocks` already
    blocks: list[int] = field(default_factory=list)
    shared: int = 0  # of the blocks, those that are not this request's to give back
    row: int = -1


@dataclass(slots=True)
class Run:
    """What a run took."""

    seconds: float = 0.0
    steps: int = 0
    output_tokens: int = 0
    device_s: float = 0.0
    device_steps: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between one step's end and the next one's start on the device
    arrivals: list[int] = field(default_factory=list)  # new rows of the step after each gap
    logprobs: list[tuple[list[Request], LogprobColumns]] = field(default_factory=list)


class OfflineEngine:
    """Runs batches of requests to their end on a loaded backend. All that run at once must fit in the KV cache."""

    def __init__(self, backend: Backend, info: BackendInfo, run_ahead: int = 2) -> None:
        self.backend = backend
        self._info = info
        self._run_ahead = run_ahead

    def run(self, requests: list[Request], chunk: int | None = None, order: list[int] | None = None) -> Run:
        """All outputs of all requests. `chunk`: tokens of a row and step at most; `order`: block ids as they are handed out."""
        group = self._info.kv_groups[0]
        batch = _Batch(
            self._info, deque(requests), deque(order if order is not None else range(group.num_blocks)), chunk
        )
        flying: deque[tuple[list[Request], list[Request], int]] = deque()
        run = Run()
        began = time.perf_counter()
        while batch.waiting or batch.running or flying:
            planned = batch.plan(run.steps)
            if planned is not None:
                step, rows, sampled = planned
                self.backend.begin(step)
                self.backend.forward(step)
                self.backend.sample(step)
                flying.append((rows, sampled, len(step.new_rows)))
                run.steps += 1
            while flying and (planned is None or len(flying) >= self._run_ahead):
                self._collect(*flying.popleft(), run, began)
        run.seconds = time.perf_counter() - began
        self._free_all(batch)
        return run

    def num_blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self._info.kv_groups[0].block_size)

    def _collect(self, rows: list[Request], sampled: list[Request], arrivals: int, run: Run, began: float) -> None:
        output = self.backend.collect()
        now = time.perf_counter() - began
        run.device_s += output.device_ns / 1e9
        if run.device_steps:  # before the first step the device waited for the run to begin
            run.gaps_s.append(output.gap_ns / 1e9)
            run.arrivals.append(arrivals)
        run.device_steps += 1
        tokens = iter(output.token_ids.tolist())
        for request, count, status in zip(sampled, output.num_tokens.tolist(), output.row_status.tolist(), strict=True):
            request.status = status
            if count:
                request.first_token_s = request.first_token_s or now
                request.outputs.append(next(tokens))
                run.output_tokens += 1
        if output.logprobs is not None:
            run.logprobs.append((rows, output.logprobs))

    def _free_all(self, batch: _Batch) -> None:
        if batch.freed:
            none = np.zeros(0, np.int32)
            step = Step(0, np.array(batch.freed, np.int32), (), none, none, none, none, none, none, none, none)
            self.backend.begin(step)
            self.backend.forward(step)
            self.backend.sample(step)
            self.backend.collect()


class _Batch:
    """Waiting and running requests, free rows and blocks."""

    def __init__(self, info: BackendInfo, waiting: deque[Request], free_blocks: deque[int], chunk: int | None) -> None:
        self._budget = info.max_num_batched_tokens
        self._block_size = info.kv_groups[0].block_size
        self._chunk = chunk or self._budget
        self.waiting = waiting
        self.running: list[Request] = []
        self.freed: list[int] = []
        self._free_blocks = free_blocks
        self._free_rows = list(range(info.max_rows))[::-1]

    def plan(self, step_id: int) -> tuple[Step, list[Request], list[Request]] | None:
        """The next step with its requests and those that sample, or None where nothing can be scheduled."""
        self._finish()
        left = self._budget
        rows: list[tuple[Request, int]] = []
        new: list[NewRow] = []
        appended: list[tuple[int, int]] = []
        chunks: list[tuple[int, list[int]]] = []
        for request in self.running:
            count = min(max(1, len(request.prompt) - request.computed), self._chunk, left)
            if count == 0:
                break
            ids = request.prompt[request.computed : request.computed + count]
            if ids:
                chunks.append((request.row, ids))
            appended += [(request.row, block) for block in self._grow(request, count)]
            rows.append((request, count))
            left -= count
        while self.waiting and self._free_rows and left:
            request = self.waiting.popleft()
            count = min(len(request.prompt) - request.computed, self._chunk, left)
            request.row = self._free_rows.pop()
            self._grow(request, count)
            computed = request.computed
            ids32, blocks32 = _ints(request.prompt[: computed + count]), _ints(request.blocks)
            new.append(
                NewRow(request.row, ids32, len(request.prompt), computed, blocks32, request.seed, request.sampling)
            )
            self.running.append(request)
            rows.append((request, count))
            left -= count
        if not rows:
            return None
        samples = []
        for request, count in rows:
            request.computed += count
            samples.append(int(request.computed >= len(request.prompt)))
            request.promised += samples[-1]
        step = Step(
            step_id=step_id,
            freed_rows=_ints(self.freed),
            new_rows=tuple(new),
            append_rows=_ints([row for row, _ in appended]),
            append_block_ids=_ints([block for _, block in appended]),
            chunk_rows=_ints([row for row, _ in chunks]),
            chunk_lens=_ints([len(ids) for _, ids in chunks]),
            chunk_token_ids=_ints([token for _, ids in chunks for token in ids]),
            rows=_ints([request.row for request, _ in rows]),
            num_scheduled=_ints([count for _, count in rows]),
            num_samples=_ints(samples),
        )
        self.freed = []
        sampled = [request for (request, _), sample in zip(rows, samples, strict=True) if sample]
        return step, [request for request, _ in rows], sampled

    def _finish(self) -> None:
        for request in [request for request in self.running if request.promised >= request.num_outputs]:
            self.running.remove(request)
            self.freed.append(request.row)
            self._free_rows.append(request.row)
            self._free_blocks.extend(request.blocks[request.shared :])

    def _grow(self, request: Request, count: int) -> list[int]:
        needed = -(-(request.computed + count) // self._block_size) - len(request.blocks)
        blocks = [self._free_blocks.popleft() for _ in range(needed)]
        request.blocks += blocks
        return blocks


def _ints(values: list[int]) -> Int32Array:
    return np.array(values, np.int32)
