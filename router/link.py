"""One attachment to one scheduler, as the session keeps it: epoch, lease, models, handles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from octavo.v1 import scheduler_pb2

from router.request import Sequence

PROTOCOL = 1
# A scheduler that has no room is asked again after this at the latest, seconds: its queue may have been cancelled meanwhile.
_LONGEST_REFUSAL = 1.0
_MAX_FULL = 256  # kinds of requests that are noted before those that are over are swept out


@dataclass(frozen=True, slots=True)
class _Full:
    """Requests of `size` bytes and more are refused `until` then, and sent away for `retry_after` seconds."""

    until: float
    retry_after: float
    size: int


@dataclass(slots=True, eq=False)
class Link:
    """A stream from Hello to its end. A new stream is a new link: nothing of an old one survives. Times in seconds."""

    address: str
    opened_at: float
    epoch: int = 0
    incarnation: int = 0
    heartbeat: float = 0.1
    lease: float = 0.3
    heard_at: float = 0.0
    beat_at: float = 0.0
    draining: bool = False
    models: tuple[scheduler_pb2.ServedModel, ...] = ()
    load: scheduler_pb2.Load = field(default_factory=scheduler_pb2.Load)
    running: dict[int, Sequence] = field(default_factory=dict)
    # Cancelled, not acknowledged yet: these handles must not be used.
    cancelling: set[int] = field(default_factory=set)
    # By tenant and priority: which new requests are refused here unasked.
    full: dict[tuple[str, int], _Full] = field(default_factory=dict)
    _handles: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def attached(self) -> bool:
        """Whether Welcome has come."""
        return self.epoch != 0

    def serves(self, digest: bytes) -> int:
        """Workers there that take new requests of this model digest, under whatever name."""
        return sum(model.workers for model in self.models if model.digest == digest)

    def holds(self, digest: bytes) -> bool:
        """Whether a worker there holds it, be it one that is leaving."""
        return any(model.digest == digest for model in self.models)

    def note_full(self, tenant: str, priority: int, size: int, retry_after: float, now: float) -> None:
        """The scheduler has no room for a request of this kind and size in bytes. `retry_after` is what it says, in seconds."""
        if len(self.full) >= _MAX_FULL:
            self.full = {kind: full for kind, full in self.full.items() if full.until > now}
        known = self.full.get((tenant, priority))
        if known is not None and now < known.until:
            size = min(size, known.size)
        self.full[tenant, priority] = _Full(now + min(retry_after, _LONGEST_REFUSAL), retry_after, size)

    def full_for(self, tenant: str, priority: int, size: int, now: float) -> float:
        """Seconds after which a new request of this kind and size should come again; 0.0 if the scheduler may be asked now.

        Counted from now, not from when the scheduler said it: or all that came meanwhile would come again at the same moment.
        """
        full = self.full.get((tenant, priority))
        if full is None:
            return 0.0
        if now >= full.until:
            del self.full[tenant, priority]
            return 0.0
        # A queue that is full of long prompts may still have room for a short one.
        return full.retry_after if size >= full.size else 0.0

    def new_handle(self) -> int:
        """A handle that nobody uses on this stream."""
        while True:
            handle = next(self._handles) & 0xFFFFFFFF
            if handle not in self.running and handle not in self.cancelling:
                return handle
