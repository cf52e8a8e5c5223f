"""What all streams to schedulers have in common: Hello and Welcome, heartbeats and leases, and the outbox. Sans I/O, a part of the
session.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from octavo.v1 import scheduler_pb2

from router.link import PROTOCOL, Link
from service.errors import OctavoError, Reason


@dataclass(frozen=True, slots=True)
class Actions:
    """What the shell has to do: messages by address, in order; then streams to cut."""

    messages: list[tuple[str, scheduler_pb2.AttachRequest]]
    cut: list[str]


class Links:
    """One link for each open stream, by the scheduler's address. Owned by the session, which says what has happened."""

    def __init__(self, *, incarnation: int, name: str, lease: float) -> None:
        """Who the router is. `lease`: seconds that a scheduler may be silent until its Welcome says how long."""
        self.by_address: dict[str, Link] = {}
        self._hello = scheduler_pb2.RouterHello(incarnation=incarnation, protocol=PROTOCOL, name=name)
        self._lease = lease
        self._messages: list[tuple[str, scheduler_pb2.AttachRequest]] = []
        self._cut: list[str] = []

    @property
    def num_attached(self) -> int:
        """Schedulers that welcomed us."""
        return sum(link.attached for link in self.by_address.values())

    def open(self, address: str, now: float) -> None:
        """A stream is open: Hello is the first message on it."""
        self.by_address[address] = Link(address, opened_at=now, heard_at=now, lease=self._lease)
        self._messages.append((address, scheduler_pb2.AttachRequest(hello=self._hello)))

    def welcome(self, link: Link, epoch: int, message: scheduler_pb2.RouterWelcome) -> None:
        """Take the scheduler's epoch and terms. Raises PROTOCOL_VIOLATION for a Welcome that can't be accepted."""
        if link.attached or message.protocol != PROTOCOL or not epoch:
            raise OctavoError(
                Reason.PROTOCOL_VIOLATION, f"a Welcome that we can't accept (protocol {message.protocol})"
            )
        link.epoch = epoch
        link.incarnation = message.incarnation
        link.heartbeat = max(message.heartbeat_ms, 10) / 1e3
        link.lease = max(message.lease_ms, 30) / 1e3

    def tick(self, now: float, *, stalled: bool) -> Iterator[Link]:
        """Send the heartbeats that are due, and hand out the links that are silent beyond their lease. To be read to its end.

        `stalled`: our own loop stood still, so what they sent meanwhile has not been read yet.
        """
        for link in list(self.by_address.values()):
            if stalled:
                link.heard_at = now
            if now - link.heard_at > link.lease:
                yield link
            elif link.attached and now >= link.beat_at:
                link.beat_at = now + link.heartbeat
                self.send(link, heartbeat=scheduler_pb2.RouterHeartbeat())

    def send(self, link: Link, **message: object) -> None:
        """Put a message into the outbox, under the link's epoch. `message`: one field of an AttachRequest."""
        request = scheduler_pb2.AttachRequest(epoch=link.epoch, **message)  # type: ignore[arg-type]
        self._messages.append((link.address, request))

    def cut(self, link: Link) -> None:
        """Have its stream ended."""
        self._cut.append(link.address)

    def detach(self) -> None:
        """Say goodbye to every scheduler. One that has not welcomed us yet is not waited for."""
        for link in self.by_address.values():
            if link.attached:
                self.send(link, detach=scheduler_pb2.Detach())
            else:
                self.cut(link)

    def take_actions(self) -> Actions:
        """Everything to do since the last call."""
        actions = Actions(self._messages, self._cut)
        self._messages, self._cut = [], []
        return actions
