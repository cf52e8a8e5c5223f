"""How one kind of request is answered, whole or in server-sent events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from octavo.v1 import inference_pb2

from router.http.errors import Problem


class View(Protocol):
    """An event is the bytes of one whole server-sent event. `prompt` counts the prompts of a request."""

    def answer(self, answers: list[inference_pb2.CompleteResponse]) -> bytes:
        """The whole answer; one message for each prompt."""
        ...

    def open(self, started: list[inference_pb2.Started]) -> list[bytes]:
        """The first events of a stream."""
        ...

    def delta(self, prompt: int, delta: inference_pb2.Delta) -> bytes:
        """More text, as an event; nothing where there is none to tell."""
        ...

    def finished(self, prompt: int, finished: inference_pb2.Finished) -> bytes:
        """The end of an output, as an event."""
        ...

    def stand_at(self, told: Mapping[int, tuple[str, bool]]) -> None:
        """The client of a stream comes again, with so much text of each output, and its end or not: the next deltas follow on it."""
        ...

    def fail(self, problem: Problem) -> bytes:
        """The last event of a stream that goes wrong."""
        ...

    def close(self) -> list[bytes]:
        """The last events."""
        ...
