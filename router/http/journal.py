"""Which event of a stream told how much: so that a client who says which one it saw last is brought back to exactly there."""

from __future__ import annotations

from array import array

from octavo.v1 import inference_pb2

from router.http.ask import Ask
from router.http.view import View
from router.parking import Mark

_WIDTH = 4  # of an entry: number, output index (-1: none), its tokens so far, and its bytes of text (-1 and less: where it ended)


class Journal:
    """Numbers the events of one stream, from 1. What is sent again gets new numbers, since it may be cut into other events.

    32 bytes an event.
    """

    def __init__(self, request_id: str, ask: Ask, view: View) -> None:
        self.ask = ask
        self.view = view
        self._prefix = b"id: %s:" % request_id.encode()
        self._entries = array("q")
        self._tokens: dict[int, int] = {}  # by output index, also of deltas that gave no event
        self._bytes: dict[int, int] = {}  # of text, likewise
        self._openings: list[bytes] = []
        self._closings: list[bytes] = []
        self._closes_at = 0  # events before the first of them
        self._last = 0

    @property
    def count(self) -> int:
        """Events so far."""
        return len(self._entries) // _WIDTH

    def opening(self, events: list[bytes]) -> bytes:
        """The first events, from where the client stands on."""
        self._openings = self._openings or events
        return b"".join([self._number(event) for event in self._openings[self.count :]])

    def delta(self, delta: inference_pb2.Delta, event: bytes) -> bytes:
        """One with text, or none where `event` is empty."""
        tokens = self._tokens[delta.index] = self._tokens.get(delta.index, 0) + len(delta.token_ids)
        self._bytes[delta.index] = delta.text_bytes
        return self._number(event, delta.index, tokens, delta.text_bytes) if event else b""

    def finished(self, finished: inference_pb2.Finished, event: bytes) -> bytes:
        """The end of an output."""
        index = finished.index
        return self._number(event, index, self._tokens.get(index, 0), -1 - self._bytes.get(index, 0))

    def closing(self, events: list[bytes]) -> bytes:
        """The last events, from where the client stands on."""
        if not self._closings:
            self._closings, self._closes_at = events, self.count
        return b"".join([self._number(event) for event in self._closings[self.count - self._closes_at :]])

    def knows(self, number: int) -> bool:
        """Whether this event was sent, and not in vain: those that came again under other numbers count no more. 0: none yet."""
        return number == 0 or number in self._entries[::_WIDTH]

    def back_to(self, number: int) -> dict[int, Mark]:
        """Forget the events after this one; how far those up to it went, by output index."""
        count = self._entries[::_WIDTH].index(number) + 1 if number else 0
        del self._entries[count * _WIDTH :]
        marks: dict[int, Mark] = {}
        for at in range(0, len(self._entries), _WIDTH):
            _, index, tokens, text_bytes = self._entries[at : at + _WIDTH]
            if index < 0:
                continue
            finished = text_bytes < 0
            marks[index] = Mark(tokens, -1 - text_bytes if finished else text_bytes, finished)
        self._tokens = {index: mark.num_tokens for index, mark in marks.items()}
        self._bytes = {index: mark.text_bytes for index, mark in marks.items()}
        if count < self._closes_at:
            self._closings = []
        return marks

    def _number(self, event: bytes, index: int = -1, tokens: int = 0, text_bytes: int = 0) -> bytes:
        self._last += 1
        self._entries.extend((self._last, index, tokens, text_bytes))
        return self._prefix + b"%d\n" % self._last + event
