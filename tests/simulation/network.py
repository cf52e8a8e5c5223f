"""Streams between nodes: ordered, delayed, breakable. Messages are serialised, as on a wire.

A stream that breaks loses what was under way; each end learns of it in its own time, or, behind a partition, not at all until its
lease runs out. A partition delivers nothing and loses nothing: that is what TCP does to those who wait long enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.simulation.world import Node, World


class Network:
    """Delays, and who can't reach whom."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.streams: list[Stream] = []
        self._parted: dict[frozenset[str], int] = {}

    def reachable(self, one: Node, other: Node) -> bool:
        """Whether messages pass between two nodes."""
        return not self._parted.get(frozenset((one.name, other.name)))

    def part(self, one: Node, other: Node, seconds: float) -> None:
        """No message passes between two nodes for a while."""
        pair = frozenset((one.name, other.name))
        self._parted[pair] = self._parted.get(pair, 0) + 1
        self.world.note(f"{one.name} and {other.name} are parted for {seconds:.2f} s")

        def heal() -> None:
            self._parted[pair] -= 1
            if not self._parted[pair]:
                self.world.note(f"{one.name} and {other.name} meet again")
                for stream in list(self.streams):
                    stream.pump()

        self.world.after(seconds, heal)

    def between(self, one: Node, other: Node | None = None) -> list[Stream]:
        """The open streams of a node, or of two."""
        return [s for s in self.streams if one in s.ends and (other is None or other in s.ends)]

    def break_all(self, node: Node) -> None:
        """The process has died: whoever it talked with hears of it."""
        for stream in self.between(node):
            stream.close(node, abrupt=True)


class _Direction:
    """One way of a stream: what is under way to `to`."""

    def __init__(self, sender: Node, to: Node) -> None:
        self.sender = sender
        self.to = to
        self.wire: deque[tuple[float, Any]] = deque()  # (due, message); None: the end
        self.on_message: Callable[[Any], None] = lambda message: None
        self.on_end: Callable[[], None] = lambda: None
        self.on_ghost: Callable[[Any], None] = lambda message: None
        self.said: deque[tuple[float, Any]] = deque(maxlen=8)  # the last that arrived
        self.ended = False  # the receiver has heard the end, or has left
        self.closed = False  # the sender says nothing more
        self.last_due = 0.0


class Stream:
    """One bidirectional stream of `client` to `server`. Each end sets its handlers before it returns to the world."""

    def __init__(self, network: Network, client: Node, server: Node) -> None:
        self.network = network
        self.ends = (client, server)
        self._ways = {client: _Direction(client, server), server: _Direction(server, client)}
        network.streams.append(self)

    def listen(
        self,
        node: Node,
        on_message: Callable[[Any], None],
        on_end: Callable[[], None],
        on_ghost: Callable[[Any], None] = lambda message: None,
    ) -> None:
        """What `node` does with what comes. `on_ghost`: with what comes late, after this stream's end."""
        way = self._into(node)
        way.on_message, way.on_end, way.on_ghost = on_message, on_end, on_ghost

    def send(self, node: Node, message: Any) -> None:
        """From `node` to the other end; nothing happens once either side has closed."""
        way = self._ways[node]
        if not way.closed and not way.ended:
            self._put(way, type(message).FromString(message.SerializeToString()))

    def close(self, node: Node, abrupt: bool = False) -> None:
        """`node` leaves. The other end hears it after what is under way, or `abrupt`, which loses some of that."""
        way, back = self._ways[node], self._into(node)
        if way.closed:
            return
        way.closed = back.ended = True
        if abrupt and way.wire:
            kept = self.network.world.random.randint(0, len(way.wire))
            while len(way.wire) > kept:
                way.wire.pop()
        back.wire.clear()
        self._put(way, None)
        self._forget()

    def cut(self) -> None:
        """The network breaks the connection: both ends hear it, each in its own time.

        What was under way is lost, or worse, comes to the client later, when it may have a new stream to the same server.
        """
        world = self.network.world
        for node in self.ends:
            way = self._into(node)
            if not way.ended and not way.closed:
                way.closed = True
                if node is self.ends[0] and world.random.random() < 0.9:
                    for _, message in [*way.said, *way.wire]:
                        if message is not None:
                            ghost = node.guard(lambda message=message, way=way: self._haunt(way, message))  # type: ignore[misc]
                            world.after(world.random.uniform(0.0, 0.8), ghost)
                way.wire.clear()
                self._put(way, None)

    def _haunt(self, way: _Direction, message: Any) -> None:
        if way.ended:  # never into the stream that it belonged to
            way.on_ghost(message)

    def pump(self) -> None:
        """After a partition: what waited arrives."""
        for way in self._ways.values():
            self._deliver(way)

    def _into(self, node: Node) -> _Direction:
        client, server = self.ends
        return self._ways[server if node is client else client]

    def _put(self, way: _Direction, message: Any) -> None:
        world = self.network.world
        slow = world.random.random() < 0.02
        way.last_due = max(way.last_due, world.now + world.random.uniform(0.0001, 0.05 if slow else 0.002))
        way.wire.append((way.last_due, message))
        world.at(way.last_due, lambda: self._deliver(way))

    def _deliver(self, way: _Direction) -> None:
        network = self.network
        while way.wire and way.wire[0][0] <= network.world.now and network.reachable(*self.ends):
            _, message = way.wire.popleft()
            way.to.guard(lambda message=message: self._receive(way, message))()  # type: ignore[misc]

    def _receive(self, way: _Direction, message: Any) -> None:
        if way.ended:
            return
        if message is None:
            way.ended = True
            self._forget()
            way.on_end()
        else:
            way.said.append((self.network.world.now, message))
            way.on_message(message)

    def _forget(self) -> None:
        if all(way.ended or not way.to.alive for way in self._ways.values()) and self in self.network.streams:
            self.network.streams.remove(self)
