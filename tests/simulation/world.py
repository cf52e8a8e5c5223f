"""Simulated time and processes: a queue of events, and nodes that can be killed, frozen and started again."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

Event = Callable[[], None]


class World:
    """Time in seconds. Events of one instant run in the order in which they were made, so a seed gives one history."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 100.0  # no process starts at the beginning of time
        self.log: list[str] = []
        self.violations: list[str] = []
        self._events: list[tuple[float, int, Event]] = []
        self._count = 0

    def at(self, when: float, event: Event) -> None:
        """Run `event` at a time, or now if that has passed."""
        self._count += 1
        heapq.heappush(self._events, (max(when, self.now), self._count, event))

    def after(self, delay: float, event: Event) -> None:
        """Run `event` in so many seconds."""
        self.at(self.now + delay, event)

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until

    def note(self, text: str) -> None:
        """For whoever reads the history of a seed."""
        self.log.append(f"{self.now - 100:8.4f}  {text}")

    def violated(self, text: str) -> None:
        """Something that must never be."""
        self.note(f"VIOLATION: {text}")
        self.violations.append(text)


class Node:
    """A process. What it does is wrapped by `guard`: a dead node does nothing, a frozen one does it when it thaws."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = False
        self.frozen = False
        self._life = 0
        self._backlog: list[Event] = []

    def guard(self, event: Event) -> Event:
        """The event as this life of the process sees it."""
        life = self._life

        def run() -> None:
            if not self.alive or life != self._life:
                return
            if self.frozen:
                self._backlog.append(event)
            else:
                event()

        return run

    def every(self, interval: float, event: Event) -> None:
        """A timer, as `await sleep` in a loop: it does not catch up on what it missed."""

        def fire() -> None:
            event()
            self.world.after(interval, self.guard(fire))

        self.world.after(self.world.random.uniform(0, interval), self.guard(fire))

    def start(self) -> None:
        """Begin a new life, unless another one is under way."""
        if self.alive:
            return
        self.alive, self.frozen = True, False
        self._life += 1
        self._backlog.clear()
        self.world.note(f"{self.name} starts")
        self.boot()

    def kill(self) -> None:
        """SIGKILL: the kernel closes its sockets."""
        if self.alive:
            self.world.note(f"{self.name} is killed")
            self.alive = False
            self._backlog.clear()
            self.died()

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.alive and not self.frozen:
            self.world.note(f"{self.name} is frozen")
            self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: everything that waited happens at once."""
        if self.alive and self.frozen:
            self.world.note(f"{self.name} thaws")
            self.frozen = False
            backlog, self._backlog = self._backlog, []
            for event in backlog:
                self.guard(event)()

    def boot(self) -> None:
        """What a new process does."""
        raise NotImplementedError

    def died(self) -> None:
        """What the world sees of a death."""
        raise NotImplementedError
