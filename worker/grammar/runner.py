"""The grammar thread: moves matchers on as tokens come back and fills in masks while the model runs.

The launch thread says which rows of a step will want a mask (`begin`), the collect thread what was chosen (`advance`). A row's next
mask needs its last token, so whichever of the two comes later makes it. All masks that can be made at one time are made together,
on a few threads of llguidance's, which needs no lock of Python's for it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from weakref import ref

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from service.grammar import GrammarError
from worker.grammar.compiled import CompiledGrammars, Start
from worker.grammar.masks import StepMasks
from worker.grammar.matcher import RowMatcher
from worker.grammar.rows import ConstrainedRow, ConstrainedRows
from worker.step import RowStatus, Step, StepOutput

log = logging.getLogger("octavo.grammar")

_THREADS = 4


@dataclass(frozen=True, slots=True)
class _Need:
    masks: StepMasks
    rows: list[ConstrainedRow]


@dataclass(frozen=True, slots=True)
class _Tokens:
    rows: list[ConstrainedRow]
    tokens: list[int]  # -1: none


@dataclass(frozen=True, slots=True)
class _Compiled:
    row: ConstrainedRow


@dataclass(frozen=True, slots=True)
class _Void:
    pass


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Job = tuple[ConstrainedRow, StepMasks, int]


class GrammarRunner:
    """Masks for the constrained rows of one engine, from `start` to `close`."""

    def __init__(
        self,
        tokenizer: LLTokenizer,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._compiled = CompiledGrammars(tokenizer, clock)
        self._rows = ConstrainedRows(eos_token_ids)  # the launch thread's
        self._waiting: set[ConstrainedRow] = set()  # the grammar thread's, as all below
        self._void = False
        self._inbox: queue.SimpleQueue[_Need | _Tokens | _Compiled | _Void | _Close] = queue.SimpleQueue()
        self._executor = LLExecutor(min(_THREADS, os.cpu_count() or 1))
        self._thread = threading.Thread(target=self._loop, name="grammar", daemon=True)
        self._on_fatal: Callable[[BaseException], None] = _nobody_cares

    def start(self, on_fatal: Callable[[BaseException], None]) -> None:
        """Start the thread. `on_fatal` is told, on it, if it ends by an error: then no mask will ever come."""
        self._on_fatal = on_fatal
        self._thread.start()

    def expect(self, step: Step) -> None:
        """A step will come: begin to compile its grammars. Any thread; returns at once."""
        for new in step.new_rows:
            if new.grammar is not None:
                self._compiled.get(new.grammar)

    def settle(self, step: Step) -> None:
        """As `expect`, but waits until they are compiled: for a driver to whom a late row would be a lost one."""
        self.expect(step)
        wait([self._compiled.get(new.grammar).compiling for new in step.new_rows if new.grammar is not None])

    def begin(self, step: Step) -> tuple[StepMasks, list[ConstrainedRow]] | None:
        """Launch thread, in the order of the steps: the masks that the step's sampling will wait for; None if it needs none."""
        places, rows = self._rows.apply(step)
        if not rows:
            return None
        masks = StepMasks(places, self._words, self._clock)
        self._inbox.put(_Need(masks, rows))
        return masks, rows

    def sampled(self, masks: StepMasks, rows: list[ConstrainedRow]) -> None:
        """Launch thread, after the step was sampled: who was late gets no mask any more."""
        for row, late in zip(rows, masks.late.tolist(), strict=True):
            row.late = row.late or late

    def advance(self, masks: StepMasks, rows: list[ConstrainedRow], output: StepOutput) -> None:
        """Collect thread, in the order of the steps: what was chosen."""
        masks.mark_late(output)
        tokens = np.full(output.num_tokens.size, -1, np.int64)
        tokens[output.row_status == RowStatus.OK] = output.token_ids
        self._inbox.put(_Tokens(rows, tokens[masks.places].tolist()))

    def void(self) -> None:
        """A step failed: nobody gets a mask until `reset`. Any thread."""
        self._inbox.put(_Void())

    def reset(self) -> None:
        """Launch thread: forget every row. Every step that began has been collected or has failed."""
        self._rows.reset()
        self._inbox.put(_Tokens([], []))

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._compiled.close()
        self._inbox.put(_Close())
        if self._thread.ident is not None:
            self._thread.join()

    # ---- the grammar thread

    def _loop(self) -> None:
        try:
            while True:
                job = self._inbox.get()
                if isinstance(job, _Close):
                    return
                self._fill(self._take(job))
        except BaseException as error:  # noqa: BLE001 - whoever waits for masks would wait for ever
            self._on_fatal(error)

    def _take(self, job: _Need | _Tokens | _Compiled | _Void) -> list[_Job]:
        """Book a message; the masks that can be made now."""
        if isinstance(job, _Void):
            self._give_up_all()
            return []
        if isinstance(job, _Compiled):
            return self._resolve([job.row])
        if isinstance(job, _Tokens):
            if not job.rows:
                self._void = False
            for row, token in zip(job.rows, job.tokens, strict=True):
                row.token_due = False
                if row.matcher is not None and token >= 0:
                    row.matcher.advance(token)
            return self._resolve(job.rows)
        for place, row in enumerate(job.rows):
            row.waiting = (job.masks, place)
            self._waiting.add(row)
        if self._void:
            self._give_up_all()
            return []
        return self._resolve(job.rows)

    def _resolve(self, rows: list[ConstrainedRow]) -> list[_Job]:
        """Of these rows those that wait for a mask and have all it takes."""
        jobs: list[_Job] = []
        for row in rows:
            if row.waiting is None or row.token_due:
                continue
            masks, place = row.waiting
            if row.late:
                self._give_up(row, late=True)
            elif row.matcher is not None or self._make_matcher(row, masks, place):
                jobs.append((row, masks, place))
                row.waiting = None
                self._waiting.discard(row)
        return jobs

    def _make_matcher(self, row: ConstrainedRow, masks: StepMasks, place: int) -> bool:
        """False: it is being compiled, or can't be."""
        start = self._compiled.get(row.grammar)
        if not start.compiling.done():
            with masks.changed:
                masks.compiling(place, start.patience_until)
            self._tell_when_compiled(start, ref(row))
            return False
        try:
            matcher = self._compiled.take(row.grammar, start, row)
        except GrammarError as error:  # a router has compiled it, so this is news
            log.warning("a grammar can't be compiled here: %s", error)
            self._give_up(row, late=False)
            return False
        row.start = start
        row.matcher = RowMatcher(matcher, row.ends, row.outputs)
        with masks.changed:
            masks.compiled(place)
        return True

    def _tell_when_compiled(self, start: Start, waiting: ref[ConstrainedRow]) -> None:
        """A future keeps its callbacks: one that held the row would have the start in use for as long as it is kept."""

        def tell(_: Future[LLMatcher]) -> None:
            row = waiting()
            if row is not None:
                self._inbox.put(_Compiled(row))

        start.compiling.add_done_callback(tell)

    def _fill(self, jobs: list[_Job]) -> None:
        for masks in {id(masks): masks for _, masks, _ in jobs}.values():
            mine = [(row, place) for row, of, place in jobs if of is masks]
            with masks.changed:
                self._fill_one(masks, mine)

    def _fill_one(self, masks: StepMasks, rows: list[tuple[ConstrainedRow, int]]) -> None:
        """All rows of one step at once. Holds `masks.changed`."""
        work: list[tuple[LLMatcher, int]] = []
        for row, place in rows:
            row.token_due = True
            if row.matcher is not None and masks.bits_of(place) is not None:
                work.append((row.matcher.matcher, place))
        bits = masks.bits
        if len(work) == 1:
            matcher, place = work[0]
            matcher.unsafe_compute_mask_ptr(bits[place].ctypes.data, bits[place].nbytes)
        elif work:
            self._executor.unsafe_compute_mask_ptr(work, bits.ctypes.data, bits[0].nbytes, len(bits))
        filled = {place for _, place in work}
        for row, place in rows:
            if place in filled and row.matcher is not None:
                row.matcher.finish_mask(bits[place])
                problem = " ".join(row.matcher.problem.split())[:300]
                if problem and row.start is not None and self._shared_too_much(row, row.start, problem):
                    masks.give_up(place, late=True)
                    continue
                if problem:
                    log.warning("a row can't go on under its grammar: %s", problem)
                masks.filled(place)

    def _shared_too_much(self, row: ConstrainedRow, start: Start, problem: str) -> bool:
        """Whether a row that can't go on might, had others not used up the lexer: it is to start again, with another."""
        if start.num_rows < 2 or not (start.forgotten or start.is_used_up(self._vocab_size)):
            return False
        if not start.forgotten:
            log.info("%d rows have used up a lexer, the next ones get another: %s", start.num_rows, problem)
            self._compiled.forget(row.grammar, start)
        return True

    def _give_up(self, row: ConstrainedRow, *, late: bool) -> None:
        if row.waiting is None:
            return
        masks, place = row.waiting
        row.waiting, row.token_due = None, True
        self._waiting.discard(row)
        with masks.changed:
            masks.give_up(place, late=late)

    def _give_up_all(self) -> None:
        self._void = True
        for row in list(self._waiting):
            self._give_up(row, late=False)


def _nobody_cares(error: BaseException) -> None:
    raise error
