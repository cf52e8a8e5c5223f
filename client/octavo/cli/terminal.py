"""Writing streamed text, and what is said about it afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from octavo.client.session import Event
from octavo.v1 import common_pb2
from octavo.v1 import inference_pb2 as pb
from rich.console import Console

# A model may write escape sequences; a terminal would obey them.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"
}

_PIPE_WIDTH = 240


def stderr_console() -> Console:
    """For everything that is not the result itself. Made anew, since tests replace sys.stderr."""
    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """For tables. A pipe or file has no width, and nothing should be cut off there."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def printable(text: str) -> str:
    """The text without control characters, where a terminal shows it; unchanged where a file or a pipe takes it."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


class Answer:
    """One streamed output as it is written: its text, and how fast it came."""

    def __init__(self) -> None:
        self.text = ""
        self._begin = time.monotonic()
        self._first: float | None = None
        self._last = self._begin
        self._tokens = 0
        self._finished: pb.Finished | None = None

    def write(self, events: Iterator[Event]) -> None:
        """Write the text of output 0 to stdout as it comes. What came before an exception stays in `text`."""
        for event in events:
            if isinstance(event, pb.Delta) and event.index == 0:
                self._note(len(event.token_ids))
                self.text += event.text
                sys.stdout.write(printable(event.text))
                sys.stdout.flush()
            elif isinstance(event, pb.Finished) and event.index == 0:
                self._finished = event

    def _note(self, tokens: int) -> None:
        self._last = time.monotonic()
        if self._first is None and tokens:
            self._first = self._last
        self._tokens += tokens

    def summary(self) -> str:
        """For people: tokens, tokens a second, time to the first, and an end that was not the model's own."""
        if self._first is None:
            return "no tokens"
        parts = [f"{self._tokens} token{'' if self._tokens == 1 else 's'}"]
        if self._last > self._first:
            parts.append(f"{(self._tokens - 1) / (self._last - self._first):.1f} tokens/s")
        parts.append(f"first after {1000 * (self._first - self._begin):.0f} ms")
        if self._finished and self._finished.finish_reason != common_pb2.FINISH_REASON_STOP:
            name = common_pb2.FinishReason.Name(self._finished.finish_reason)
            parts.append(f"ended by {name.removeprefix('FINISH_REASON_').lower()}")
        return ", ".join(parts)
