"""Grammars that were compiled for this worker's tokenizer, kept by their text. Threads of their own compile: what takes long holds up
nobody but the rows that wait for it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from weakref import WeakSet

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from service.grammar import Grammar
from service.guidance import compile_grammar

_KEPT = 128
_KEPT_BYTES = 256 << 20  # as `estimate_bytes` has it
_ROWS = 256  # each may have found states of the lexer, up to 35 MB in all
_THREADS = 2
_WANTED = 10.0  # seconds: who is late asks again each second at the latest, unless all rows are taken

PATIENCE = 0.005
"""Seconds that steps wait for a grammar that is being compiled, from when it was first asked for."""


def estimate_bytes(grammar: Grammar) -> int:
    """What a compiled grammar holds before its lexer has grown, in bytes.

    llguidance does not tell. Measured with 49,152 tokens: 0.1 to 0.8 MB up to 3 KB of text, and 29 (regex) to 123 bytes (a schema's
    properties) for each byte of larger ones, 23 MB for 211 KB of schema.
    """
    return (512 << 10) + 128 * len(grammar.text.encode())


@dataclass(slots=True, eq=False)
class Start:
    """A matcher at its grammar's beginning, of which each row gets a copy.

    llguidance's copies share one lexer, whose states are made as they are met and count against one limit: where that is reached all
    copies fail, whoever has used it up.
    """

    compiling: Future[LLMatcher]
    patience_until: float
    """On the clock of `CompiledGrammars`: from then on nobody waits for it any more."""
    asked: float
    """When somebody last asked for it."""
    num_bytes: int
    """An estimate."""
    rows: WeakSet[object] = field(default_factory=WeakSet)
    """Who has a copy and lives: dropping this would free nothing, and have the next row compile another."""
    num_rows: int = 0
    """Copies that were taken: see `CompiledGrammars.take`."""
    forgotten: bool = False
    """Its lexer is used up."""

    def is_used_up(self, vocab_size: int) -> bool:
        """Whether a new row would fail at its first mask. Only once it is compiled; takes as long as a mask."""
        row = self.compiling.result().deep_copy()
        bits = np.zeros(-(-vocab_size // 32), np.int32)
        row.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return row.is_error()


class CompiledGrammars:
    """Starts by their grammar. Any thread may ask.

    Those that no row uses are bounded in number and in bytes, the oldest go first; what is over the bounds in use goes when somebody
    next asks for any after its rows have ended.

    One serves so many rows and is then compiled again, so that what its lexer has grown to is given back. Of a grammar whose lexer
    was used up it serves half as many the next time, down to one: then each row has a lexer of its own.
    """

    def __init__(self, tokenizer: LLTokenizer, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokenizer = tokenizer
        self._clock = clock
        self._lock = threading.Lock()
        self._found: OrderedDict[Grammar, Start] = OrderedDict()
        self._num_bytes = 0  # of all found
        self._max_rows: OrderedDict[Grammar, int] = OrderedDict()  # where it is less than _ROWS
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="compile-grammar")

    def get(self, grammar: Grammar) -> Start:
        """Begins to compile it unless that was done.

        The future raises GrammarError. It is cancelled by `close`, and if it waits for a thread and nobody has asked for a while.
        """
        now = self._clock()
        with self._lock:
            start = self._found.get(grammar)
            if start is None:
                self._cancel_unwanted(now)
                compiling = self._executor.submit(compile_grammar, grammar, self._tokenizer)
                start = self._found[grammar] = Start(compiling, now + PATIENCE, now, estimate_bytes(grammar))
                self._num_bytes += start.num_bytes
            else:
                start.asked = now
                self._found.move_to_end(grammar)
            self._evict(start)
            return start

    def take(self, grammar: Grammar, start: Start, row: object) -> LLMatcher:
        """What a row is to copy, from a start that is compiled. Raises GrammarError if it can't be compiled.

        The row uses it as long as `row`, its object, lives.
        """
        matcher = start.compiling.result()
        with self._lock:
            start.num_rows += 1
            start.rows.add(row)
            if start.num_rows >= self._max_rows.get(grammar, _ROWS):
                self._drop(grammar, start)
        return matcher

    def forget(self, grammar: Grammar, start: Start) -> None:
        """Its lexer is used up: who comes now gets another. Idempotent."""
        with self._lock:
            start.forgotten = True
            self._drop(grammar, start)
            self._max_rows[grammar] = min(self._max_rows.get(grammar, _ROWS), max(1, start.num_rows // 2))
            self._max_rows.move_to_end(grammar)
            if len(self._max_rows) > _KEPT:
                self._max_rows.popitem(last=False)

    def _cancel_unwanted(self, now: float) -> None:
        for grammar, start in list(self._found.items()):
            if now - start.asked > _WANTED and not start.compiling.done() and start.compiling.cancel():
                self._drop(grammar, start)

    def _evict(self, asked: Start) -> None:
        """Down to the bounds, if that can be: not the one just asked for."""
        if len(self._found) <= _KEPT and self._num_bytes <= _KEPT_BYTES:
            return
        for grammar, start in list(self._found.items()):
            # What is still to be compiled stays, or whoever is late would have it compiled again and again.
            if start is not asked and start.compiling.done() and not start.rows:
                self._drop(grammar, start)
                if len(self._found) <= _KEPT and self._num_bytes <= _KEPT_BYTES:
                    return

    def _drop(self, grammar: Grammar, start: Start) -> None:
        if self._found.get(grammar) is start:
            del self._found[grammar]
            self._num_bytes -= start.num_bytes

    def close(self) -> None:
        """Drop what is not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)
