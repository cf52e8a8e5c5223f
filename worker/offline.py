"""The engine without services: prompts in, tokens out.

A tiny driver that builds steps itself. Each request keeps one row and owns a fixed run of blocks from start to end; there is no
queue, no prefix cache and no preemption, which are the scheduler's. Tests, benchmarks and the goldens run on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.grammar import Grammar
from worker.backend import Backend, BackendError, BackendInfo, Progress
from worker.grammar.runner import GrammarRunner
from worker.step import Int32Array, LogprobColumns, NewRow, RowStatus, SamplingParams, Step, StepOutput


@dataclass(frozen=True, slots=True)
class OfflineRequest:
    """One prompt. `output_token_ids` are outputs of an earlier life, as after preemption."""

    prompt_token_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    seed: int = 0
    output_token_ids: Sequence[int] = ()
    grammar: Grammar | None = None  # needs an engine with a grammar runner


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One described position: the token that stands there, its rank, and the best tokens in falling order."""

    position: int
    token_id: int
    logprob: float
    rank: int
    best: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class OfflineResult:
    """What became of a request. `finish_reason` is stop, length or error; `status` says which error."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    status: RowStatus = RowStatus.OK


@dataclass(slots=True)
class _Running:
    index: int
    request: OfflineRequest
    row: int
    blocks: Int32Array
    known: list[int]
    num_computed: int = 0
    num_initial: int = 0  # of the known tokens, those it started with
    started: bool = False


class OfflineEngine:
    """Drives a backend over a list of requests.

    `chunk_size` bounds the tokens that one row computes in a step, `max_rows` the requests that run at once.
    """

    def __init__(
        self,
        backend: Backend,
        progress: Progress = lambda what, done, total: None,
        grammars: Callable[[BackendInfo], GrammarRunner] | None = None,
    ) -> None:
        """`grammars` makes what decodes under grammars, once the model's vocabulary is known; `close` ends it."""
        self._backend = backend
        self.info = backend.load(progress)
        self._step_id = 0
        self._grammars = None if grammars is None else grammars(self.info)
        if self._grammars is not None:
            self._grammars.start(_raise)

    def close(self) -> None:
        """End the grammar thread, if there is one."""
        if self._grammars is not None:
            self._grammars.close()

    def generate(
        self, requests: Sequence[OfflineRequest], chunk_size: int | None = None, max_rows: int | None = None
    ) -> list[OfflineResult]:
        """Run all requests to their end. Raises BackendError for one that can never fit."""
        results = [OfflineResult() for _ in requests]
        waiting = deque(enumerate(requests))
        running: list[_Running] = []
        free_rows = list(range(min(max_rows or self.info.max_rows, self.info.max_rows)))[::-1]
        free_blocks = list(range(self.info.kv_groups[0].num_blocks))[::-1]
        freed: list[int] = []
        while waiting or running:
            while waiting and free_rows:
                index, request = waiting[0]
                blocks = self._blocks_needed(request)
                if blocks > len(free_blocks):
                    break
                waiting.popleft()
                known = [*request.prompt_token_ids, *request.output_token_ids]
                owned = np.array([free_blocks.pop() for _ in range(blocks)], np.int32)
                running.append(_Running(index, request, free_rows.pop(), owned, known))
            step = self._build(running, freed, chunk_size or self.info.max_num_batched_tokens)
            output = self._run(step)
            freed = []
            for done in list(self._apply(step, output, running, results, freed)):
                running.remove(done)
                freed.append(done.row)
                free_rows.append(done.row)
                free_blocks.extend(done.blocks.tolist())
        self._backend.reset()
        if self._grammars is not None:
            self._grammars.reset()
        return results

    def _blocks_needed(self, request: OfflineRequest) -> int:
        group = self.info.kv_groups[0]
        length = len(request.prompt_token_ids) + request.max_tokens
        if not request.prompt_token_ids or length > self.info.max_model_len:
            raise BackendError(
                f"a request of {length} tokens does not fit max_model_len {self.info.max_model_len}, or has no prompt"
            )
        blocks = -(-length // group.block_size)
        if blocks > group.num_blocks:
            raise BackendError(f"a request of {length} tokens needs {blocks} blocks, there are {group.num_blocks}")
        return blocks

    def _build(self, running: list[_Running], freed: list[int], chunk_size: int) -> Step:
        budget = self.info.max_num_batched_tokens
        new: list[NewRow] = []
        chunks: list[tuple[int, list[int]]] = []
        scheduled: list[tuple[int, int, int]] = []
        for item in running:
            count = min(len(item.known) - item.num_computed, chunk_size, budget)
            if count == 0:
                continue
            budget -= count
            end = item.num_computed + count
            if not item.started:
                item.started, item.num_initial = True, len(item.known)
                tokens = np.array(item.known[:end], np.int32)
                request = item.request
                prompt = len(request.prompt_token_ids)
                new.append(
                    NewRow(item.row, tokens, prompt, 0, item.blocks, request.seed, request.sampling, request.grammar)
                )
            elif end <= item.num_initial:
                chunks.append((item.row, item.known[item.num_computed : end]))
            scheduled.append((item.row, count, int(end == len(item.known))))
        none = np.zeros(0, np.int32)
        columns = np.array(scheduled, np.int32).reshape(-1, 3)
        self._step_id += 1
        return Step(
            step_id=self._step_id,
            freed_rows=np.array(freed, np.int32),
            new_rows=tuple(new),
            append_rows=none,
            append_block_ids=none,
            chunk_rows=np.array([row for row, _ in chunks], np.int32),
            chunk_lens=np.array([len(ids) for _, ids in chunks], np.int32),
            chunk_token_ids=np.array([token for _, ids in chunks for token in ids], np.int32),
            rows=columns[:, 0].copy(),
            num_scheduled=columns[:, 1].copy(),
            num_samples=columns[:, 2].copy(),
        )

    def _run(self, step: Step) -> StepOutput:
        if self._grammars is not None:
            self._grammars.settle(step)
        constrained = None if self._grammars is None else self._grammars.begin(step)
        self._backend.begin(step)
        self._backend.forward(step)
        self._backend.sample(step, None if constrained is None else constrained[0])
        output = self._backend.collect()
        if constrained is not None and self._grammars is not None:
            self._grammars.advance(*constrained, output)
        return output

    def _apply(
        self,
        step: Step,
        output: StepOutput,
        running: list[_Running],
        results: list[OfflineResult],
        freed: list[int],
    ) -> Iterator[_Running]:
        """Book the step's results; yields the requests that ended. Rows that must start again are added to `freed`."""
        by_row = {item.row: item for item in running}
        for row, count in zip(step.rows.tolist(), step.num_scheduled.tolist(), strict=True):
            by_row[row].num_computed += count
        if output.logprobs is not None:
            for owner, described in _described(output.logprobs):
                found = results[by_row[int(step.rows[owner])].index].logprobs
                if not found or described.position > found[-1].position:  # whoever starts again has them already
                    found.append(described)
        tokens = iter(output.token_ids.tolist())
        sampling = step.rows[step.num_samples > 0].tolist()
        for row, count, status in zip(sampling, output.num_tokens.tolist(), output.row_status.tolist(), strict=True):
            item = by_row[row]
            result = results[item.index]
            if status == RowStatus.MASK_LATE:
                item.started, item.num_computed = False, 0
                freed.append(item.row)
                continue
            if status != RowStatus.OK:
                result.finish_reason, result.status = "error", RowStatus(status)
                yield item
                continue
            for _ in range(count):
                token = next(tokens)
                item.known.append(token)
                result.token_ids.append(token)
            num_outputs = len(item.known) - len(item.request.prompt_token_ids)
            if item.known[-1] in item.request.sampling.stop_token_ids:
                result.finish_reason = "stop"
                yield item
            elif num_outputs >= item.request.max_tokens:
                result.finish_reason = "length"
                yield item


def _raise(error: BaseException) -> None:
    raise error


def _described(columns: LogprobColumns) -> Iterator[tuple[int, TokenLogprobs]]:
    """The positions of ragged columns one by one, each with its owner."""
    start = 0
    for i, count in enumerate(columns.num_entries.tolist()):
        ids = columns.token_ids[start : start + count].tolist()
        logprobs = columns.logprobs[start : start + count].tolist()
        start += count
        best = tuple(zip(ids[1:], logprobs[1:], strict=True))
        yield (
            int(columns.owner[i]),
            TokenLogprobs(int(columns.position[i]), ids[0], logprobs[0], int(columns.rank[i]), best),
        )
