"""Stop strings over a growing text: found at once, and text held back only while a stop string may be forming.

Aho and Corasick, "Efficient string matching" (CACM 18:6, 1975): a trie of the stop strings with failure links. The
depth of the current state is the length of the longest suffix of the text that begins some stop string, which is
exactly what must be held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """A stop string that ends at `end` (an index into the text given to `feed`)."""

    text: str
    end: int


class StopStrings:
    """The automaton of a request's stop strings, shared by its sequences. None may be empty."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not stops or not all(stops):
            raise ValueError("stop strings must not be empty")
        self.children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.failure = [0]
        # The longest stop string that ends in each state, or "".
        self.ends = [""]
        for stop in stops:
            self._insert(stop)
        self._link()
        self.first_characters = frozenset(self.children[0])

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self.children[state].get(character)
            if following is None:
                following = len(self.children)
                self.children[state][character] = following
                self.children.append({})
                self.depth.append(self.depth[state] + 1)
                self.failure.append(0)
                self.ends.append("")
            state = following
        self.ends[state] = stop

    def _link(self) -> None:
        waiting = deque(self.children[0].values())
        while waiting:
            state = waiting.popleft()
            self.ends[state] = self.ends[state] or self.ends[self.failure[state]]
            for character, child in self.children[state].items():
                self.failure[child] = self.step(self.failure[state], character)
                waiting.append(child)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        children = self.children
        while state and character not in children[state]:
            state = self.failure[state]
        return children[state].get(character, 0)


class StopMatcher:
    """Where one output stands among the stop strings."""

    __slots__ = ("_state", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        return self._stops.depth[self._state]

    def feed(self, text: str, allowed: bool) -> Match | None:
        """Append text. Returns the stop string that ends first (of several, the longest), if `allowed`; nothing is read after it."""
        stops = self._stops
        state = self._state
        if state == 0 and stops.first_characters.isdisjoint(text):
            return None
        for index, character in enumerate(text):
            state = stops.step(state, character)
            if allowed and stops.ends[state]:
                self._state = state
                return Match(stops.ends[state], index + 1)
        self._state = state
        return None
