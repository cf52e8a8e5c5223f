"""When a router that says nothing is taken for dead. No I/O; `now` is in seconds on the caller's monotonic clock.

A broken connection is found at once, a frozen process or a parted network only by silence. The router tells its terms (Heartbeat):
how often it will say something, and after what silence to go elsewhere. After a silence the next one has to be twice as long, and
whenever a stream has flowed for a while half as long again: clients of an overloaded cluster must not make it worse by resuming at
every turn.
"""

from __future__ import annotations

from octavo.v1 import inference_pb2 as pb

# A check that comes so much later than it was due, in seconds, says that this process stood still, not the router.
_OWN_STALL = 0.15
# Leases that a stream has to flow before its router is trusted twice as much.
_TRUSTED_AFTER = 4


class Silence:
    """The silence of one request's streams, one after the other."""

    def __init__(self, first_word: float) -> None:
        """`first_word`: seconds until a router that was dialled has to have said anything."""
        self._first_word = first_word
        self._lease = first_word
        self._patience = 1.0
        self._since = self._flows_since = 0.0

    def dialled(self, now: float) -> None:
        """A new stream is opened."""
        self._lease = self._first_word
        self._since = self._flows_since = now

    def agreed(self, terms: pb.Heartbeat) -> None:
        """The router has told its terms."""
        if terms.lease_ms:
            self._lease = terms.lease_ms / 1e3

    def listening(self, now: float) -> None:
        """The caller begins to wait for the next message, or has got one. What it left unread before was no silence."""
        self._since = now
        if self._patience > 1.0 and now - self._flows_since > _TRUSTED_AFTER * self._lease:
            self._patience /= 2
            self._flows_since = now

    @property
    def due_at(self) -> float:
        """When to ask `over`."""
        return self._since + self._lease * self._patience

    def over(self, now: float) -> bool:
        """Whether the router is to be taken for dead. Ask at `due_at`; after a False ask at the new one."""
        late = now - self.due_at
        if late < 0:
            return False
        if late > _OWN_STALL:
            self._since = now - self._lease * self._patience / 2  # hear first what came while we stood still
            return False
        self._patience *= 2
        return True
