"""One attachment to one scheduler, as the session keeps it: epoch, lease, models, handles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from octavo.v1 import scheduler_pb2

from router.request import Sequence

PROTOCOL = 1


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

    def new_handle(self) -> int:
        """A handle that nobody uses on this stream."""
        while True:
            handle = next(self._handles) & 0xFFFFFFFF
            if handle not in self.running and handle not in self.cancelling:
                return handle
