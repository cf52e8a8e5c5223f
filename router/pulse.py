"""Heartbeats to clients: which streams have said nothing for so long that their clients may take the router for dead.

A stream that waits for its first token beats slowly, since thousands may wait; from its first token on it beats briskly, so that
a client finds a dead router before a reader notices. Pure: `now` in seconds comes in.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client is promised: something each `interval`, and that `lease` of silence means death. Seconds."""

    interval: float
    lease: float


CALM = Terms(1.0, 3.0)
"""While a stream waits for its first token."""
BRISK = Terms(0.075, 0.25)
"""From then on, unless the router's settings say otherwise."""


class Pulse(Generic[K]):
    """The streams that asked for heartbeats, each in the order in which it spoke last: a tick costs what is due."""

    def __init__(self, brisk: Terms) -> None:
        """`brisk`: from the first token on; not CALM."""
        self._brisk = brisk
        self._spoke: dict[Terms, dict[K, float]] = {CALM: {}, brisk: {}}
        self._terms: dict[K, Terms] = {}

    def join(self, key: K, now: float) -> None:
        """A stream begins, calmly."""
        self._terms[key] = CALM
        self._spoke[CALM][key] = now

    def leave(self, key: K) -> None:
        """It has ended. Without effect on one that never joined."""
        terms = self._terms.pop(key, None)
        if terms is not None:
            del self._spoke[terms][key]

    def spoke(self, key: K, now: float) -> None:
        """Something was written."""
        terms = self._terms.get(key)
        if terms is not None:
            spoke = self._spoke[terms]
            del spoke[key]  # so that it goes to the end
            spoke[key] = now

    def hasten(self, key: K, now: float) -> Terms | None:
        """Its first token is about to be written: the terms to tell before it, or None if they hold already."""
        terms = self._terms.get(key)
        if terms is None or terms is self._brisk:
            return None
        del self._spoke[terms][key]
        self._terms[key] = self._brisk
        self._spoke[self._brisk][key] = now
        return self._brisk

    def due(self, now: float) -> list[tuple[K, Terms]]:
        """Streams that have to say something now. They count as having spoken."""
        due: list[tuple[K, Terms]] = []
        for terms, spoke in self._spoke.items():
            late: list[K] = []
            for key, at in spoke.items():
                if now - at < terms.interval:
                    break
                late.append(key)
            for key in late:
                self.spoke(key, now)
            due += [(key, terms) for key in late]
        return due
