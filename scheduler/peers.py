"""The streams that the hub knows: one object for each router and each worker, with its epoch, its outbox and its lease."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.v1 import scheduler_pb2

from scheduler.assets import Incoming
from scheduler.outbox import Outbox, Overflow, RouterOutbox, Tokens
from scheduler.run_ahead import RunAhead
from service.errors import OctavoError, Reason

_MAX_ROUTER_MESSAGES = 65_536
_MAX_ROUTER_TOKENS = 1 << 20
_MAX_WORKER_MESSAGES = 64


def _nobody() -> None:
    """Nobody listens yet."""


@dataclass(slots=True, eq=False)
class Peer:
    """What routers and workers have in common. `notify` is the shell's: something waits to be sent, or the stream is cut."""

    peer_id: int
    epoch: int
    heard_at: float
    spoke_at: float
    name: str = ""
    cut: OctavoError | None = None
    closing: bool = False
    notify: Callable[[], None] = field(default=_nobody)

    def cut_off(self, error: OctavoError) -> None:
        """End the stream with an error. The first reason stays."""
        if self.cut is None:
            self.cut = error
        self.notify()


@dataclass(slots=True, eq=False)
class RouterPeer(Peer):
    """One router's stream."""

    outbox: RouterOutbox = field(default_factory=lambda: RouterOutbox(_MAX_ROUTER_MESSAGES, _MAX_ROUTER_TOKENS))
    told_load_at: float = 0.0

    def put(self, message: scheduler_pb2.AttachResponse) -> None:
        """Send, or cut a stream that does not read."""
        message.epoch = self.epoch
        try:
            self.outbox.put(message)
        except Overflow as error:
            self.cut_off(OctavoError(Reason.SLOW_CONSUMER, str(error)))
        self.notify()

    def put_tokens(self, tokens: Tokens) -> None:
        """Send a step's entries, or cut a stream that does not read."""
        try:
            self.outbox.put_tokens(tokens)
        except Overflow as error:
            self.cut_off(OctavoError(Reason.SLOW_CONSUMER, str(error)))
        self.notify()

    def take(self, now: float) -> scheduler_pb2.AttachResponse | None:
        """The next message to write."""
        message = self.outbox.take(self.epoch)
        if message is not None:
            self.spoke_at = now
        return message


class Pace:
    """How long a worker's steps take, to notice one that never ends. A step is predicted as a fixed part (the slowest of late) plus
    its tokens at the best rate seen of late; both forget slowly, so that one outlier does not rule for ever.
    """

    _FLOOR_S = 2.0
    _FACTOR = 10.0
    _FIRST_STEPS = 3
    _FIRST_STEPS_S = 60.0  # while nothing is known: a cold device compiles and touches its memory

    def __init__(self) -> None:
        self._planned: dict[int, tuple[float, int]] = {}
        self._step_s = 0.0
        self._token_s = float("inf")
        self._steps = 0
        self._returned_at = 0.0

    @property
    def in_flight(self) -> int:
        """Plans that were sent and have not come back."""
        return len(self._planned)

    def planned(self, step_id: int, num_tokens: int, now: float) -> None:
        """A plan was sent."""
        self._planned[step_id] = (now, max(1, num_tokens))

    def returned(self, step_id: int, now: float) -> tuple[float, float]:
        """Its result came. Seconds since its plan was sent, and since the result before it."""
        then, num_tokens = self._planned.pop(step_id)
        elapsed = now - then
        self._step_s = max(elapsed if num_tokens < 32 else 0.0, 0.95 * self._step_s)
        self._token_s = min(elapsed / num_tokens, 1.05 * self._token_s)
        self._steps += 1
        apart, self._returned_at = now - self._returned_at, now
        return elapsed, apart

    def overdue(self, now: float) -> float:
        """Seconds that the oldest plan has waited beyond reason; 0 if all is well."""
        if not self._planned:
            return 0.0
        waited = now - min(then for then, _ in self._planned.values())
        if self._steps < self._FIRST_STEPS:
            return waited if waited > self._FIRST_STEPS_S else 0.0
        tokens = sum(num_tokens for _, num_tokens in self._planned.values())
        predicted = self._step_s * len(self._planned) + self._token_s * tokens
        return waited if waited > max(self._FLOOR_S, self._FACTOR * predicted) else 0.0


@dataclass(slots=True, eq=False)
class WorkerPeer(Peer):
    """One worker's stream."""

    hello: scheduler_pb2.WorkerHello = field(default_factory=scheduler_pb2.WorkerHello)
    outbox: Outbox[scheduler_pb2.EnlistResponse] = field(default_factory=lambda: Outbox(_MAX_WORKER_MESSAGES))
    incoming: Incoming | None = None
    draining: bool = False
    redial: str = ""  # where it is sent once its requests have ended, or at `redial_by` if they have not
    redial_by: float = 0.0
    last_plan: scheduler_pb2.PlanSummary = field(default_factory=scheduler_pb2.PlanSummary)
    last_step: int = 0
    pace: Pace = field(default_factory=lambda: Pace())
    ahead: RunAhead = field(default_factory=lambda: RunAhead(1, 1))

    def put(self, message: scheduler_pb2.EnlistResponse) -> None:
        """Send, or cut a stream that does not read."""
        message.epoch = self.epoch
        try:
            self.outbox.put(message)
        except Overflow as error:
            self.cut_off(OctavoError(Reason.SLOW_CONSUMER, str(error)))
        self.notify()

    def take(self, now: float) -> scheduler_pb2.EnlistResponse | None:
        """The next message to write."""
        message = self.outbox.take()
        if message is not None:
            self.spoke_at = now
        return message
