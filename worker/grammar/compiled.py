"""Grammars that were compiled for this worker's tokenizer, kept by their text. Threads of their own compile: what takes long holds up
nobody but the rows that wait for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLTokenizer

from service.grammar import Grammar
from service.guidance import compile_grammar

_KEPT = 128  # half a megabyte each, as a rule
_THREADS = 2


class CompiledGrammars:
    """Matchers at their beginning, to be copied. Any thread may ask."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._found: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="compile-grammar")

    def get(self, grammar: Grammar) -> Future[LLMatcher]:
        """Begins to compile it unless that was done. The future raises GrammarError; it is never cancelled before `close`."""
        with self._lock:
            future = self._found.get(grammar)
            if future is None:
                future = self._found[grammar] = self._executor.submit(compile_grammar, grammar, self._tokenizer)
                # What is still to be compiled stays, or whoever is late would have it compiled again and again.
                done = [kept for kept, found in self._found.items() if found.done()]
                for kept in done[: max(0, len(self._found) - _KEPT)]:
                    del self._found[kept]
            else:
                self._found.move_to_end(grammar)
            return future

    def close(self) -> None:
        """Drop what is not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)
