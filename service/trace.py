"""Where the time of a step goes: spans of work, kept in a ring and written to a file when asked. Off unless --trace-dir is given.

Whoever does a piece of work holds a `Trace` or None and adds a span when the piece is done. Times are CLOCK_MONOTONIC in
nanoseconds, which all processes of a host share, so that `python -m bench.profile` can lay the files of a cluster over one another.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path

log = logging.getLogger("octavo.trace")

_MAX_SPANS = 1 << 17


class Trace:
    """The last spans of one process. `add` may be called by any thread."""

    def __init__(self, directory: Path, name: str) -> None:
        """Will be written as `directory`/`name`.json."""
        self.path = directory / f"{name}.json"
        self._name = name
        self._spans: deque[tuple[str, int, int, int, str]] = deque(maxlen=_MAX_SPANS)

    @staticmethod
    def now() -> int:
        """Nanoseconds, to begin a span with."""
        return time.monotonic_ns()

    def add(self, what: str, key: int, began: int, ended: int = 0) -> int:
        """A span that ended now, or then. `key` says of which step or stream. Returns its end: where the next may begin."""
        ended = ended or time.monotonic_ns()
        self._spans.append((what, key, began, ended, threading.current_thread().name))
        return ended

    def write(self) -> None:
        """Write all spans, oldest first, in place of an earlier file. A file that can't be written is logged."""
        spans = list(self._spans)  # at once: others go on adding
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"name": self._name, "pid": os.getpid()}) + "\n")
                for span in spans:  # one by one: other threads get their turns
                    file.write(json.dumps(span) + "\n")
            partial.replace(self.path)
        except OSError as error:
            log.error("the trace can't be written: %s", error)
