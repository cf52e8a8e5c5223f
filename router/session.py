"""The router's side of Attach, sans I/O: which sequence runs where, and that each of its tokens is taken exactly once.

Events and `now` (seconds on any steady clock) come in; `take_actions` gives the messages to send and the streams to
cut, `take_changed` the requests that have something new for their clients. gRPC, sockets and clocks are in attach.py;
the simulation runs this very object.

A stream that ends, is silent beyond its lease (router/links.py) or breaks the protocol makes its sequences homeless; they are
submitted again, here or elsewhere, with the outputs so far. Where that is, router/homes.py decides; which tokens are new,
router/exactly_once.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.v1 import scheduler_pb2

from router import batch, exactly_once
from router.homes import Homes
from router.link import Link
from router.links import Actions, Links
from router.models import checked
from router.request import Request, Sequence
from service.errors import OctavoError, Reason

log = logging.getLogger("octavo.router.session")

_CANCEL_STOP = scheduler_pb2.CANCEL_REASON_STOP_STRING
_CANCEL_DEADLINE = scheduler_pb2.CANCEL_REASON_DEADLINE


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Who the router is and how long it waits. Durations in seconds."""

    incarnation: int
    name: str = ""
    lease: float = 0.25
    # How long an accepted sequence waits for a scheduler before its stream breaks (resumably).
    patience: float = 30.0
    # How long a new one waits for a model whose last worker has just gone.
    linger: float = 5.0
    # After how long a running sequence that gets no token is submitted again. 0: never.
    request_stall: float = 30.0


class RouterSession:
    """All links and all requests of one router process."""

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        self._links = Links(incarnation=settings.incarnation, name=settings.name, lease=settings.lease)
        self._homes = Homes(
            self._links,
            patience=settings.patience,
            linger=settings.linger,
            request_stall=settings.request_stall,
            fail=self._fail,
        )
        self.models = self._homes.models
        self._requests: dict[Request, None] = {}
        self._changed: dict[Request, None] = {}
        self._ticked_at: float | None = None
        self.dropped_tokens = 0  # came twice

    # ---- what the shell asks

    @property
    def num_requests(self) -> int:
        """Requests that are not done."""
        return len(self._requests)

    @property
    def num_attached(self) -> int:
        """Schedulers that welcomed us."""
        return self._links.num_attached

    @property
    def stalls(self) -> int:
        """Sequences that ran and got nothing for too long, so far."""
        return self._homes.stalls

    def requests(self) -> list[Request]:
        """Requests that are not done."""
        return list(self._requests)

    def take_actions(self) -> Actions:
        """Everything to do since the last call."""
        return self._links.take_actions()

    def take_changed(self) -> Iterable[Request]:
        """Requests with something new: tokens, an end, an admission or an error."""
        changed, self._changed = self._changed, {}
        return changed

    # ---- streams

    def link_opened(self, address: str, now: float) -> None:
        """A new stream to this scheduler is open."""
        if address in self._links.by_address:
            self.link_closed(address, now)
        self._links.open(address, now)

    def link_closed(self, address: str, now: float) -> None:
        """The stream to this scheduler has ended. Its sequences go on elsewhere, or here once it is back."""
        link = self._links.by_address.pop(address, None)
        if link is None:
            return
        self._homes.update_models(now)
        for sequence in list(link.running.values()):
            if sequence.accepted:  # who had no room for a newcomer takes it now
                sequence.refused_by.clear()
            self._homes.lose(sequence, now)
        self._homes.place_homeless(now)

    def receive(self, address: str, message: scheduler_pb2.AttachResponse, now: float) -> None:
        """A message of this scheduler's stream. One that breaks the protocol costs it the stream."""
        link = self._links.by_address.get(address)
        if link is None:
            return
        link.heard_at = now
        kind = message.WhichOneof("message")
        if kind == "welcome":
            self._welcome(link, message, now)
            return
        if not link.attached or message.epoch != link.epoch:
            return
        if kind == "tokens":
            try:
                entries = batch.parse(message.tokens)
            except OctavoError as error:
                self._cut_link(link, str(error), now)
                return
            for entry in entries:
                self._entry(link, entry, now)
        elif kind == "admitted":
            self._admitted(link, message.admitted, now)
        elif kind == "migrated":
            self._migrated(link, message.migrated, now)
        elif kind == "preempted":
            self._preempted(link, message.preempted, now)
        elif kind == "failed":
            self._failed(link, message.failed, now)
        elif kind == "cancelled":
            link.cancelling.discard(message.cancelled.handle)
        elif kind == "load":
            link.load = message.load
            if not message.load.waiting:  # whoever it had no room for may come
                link.full.clear()
        elif kind == "models":
            self._models(link, message.models.models, now)
        elif kind == "go_away":
            self._go_away(link, now)
        else:
            self._cut_link(link, "a message of an unknown kind", now)

    # ---- requests

    def check_room(self, model: str, tenant: str, priority: int, size: int, now: float) -> None:
        """Raises QUEUE_FULL where every scheduler of the model has just refused such a request and wants none yet.

        `size`: bytes of the client's message.
        """
        self._homes.check_room(model, tenant, priority, size, now)

    def submit(self, request: Request, now: float) -> None:
        """Start a request.

        Raises MODEL_CHANGED or NO_WORKER where nobody serves its digest, nor did until just now, and it was not accepted before.
        """
        self._homes.check_served(request)
        self._requests[request] = None
        for sequence in request.sequences:
            if sequence.output.finish_reason:  # a resume of what had ended
                self._done(sequence, now)
            else:
                sequence.homeless_since = now
                self._homes.place(sequence, now)

    def cancel(self, request: Request, reason: scheduler_pb2.CancelReason, now: float) -> None:
        """Give up what still runs of a request. Without effect on one that is done."""
        self._requests.pop(request, None)
        for sequence in request.sequences:
            if not sequence.done:
                self._homes.leave(sequence, reason)
                sequence.done = True
                sequence.finished_at = now

    def fail(self, request: Request, error: OctavoError, reason: scheduler_pb2.CancelReason, now: float) -> None:
        """End a request with an error."""
        if request.done:
            return
        self.cancel(request, reason, now)
        request.error = error
        self._changed[request] = None

    # ---- time

    def tick(self, now: float) -> None:
        """Heartbeats, leases, deadlines, sequences that wait. To be called a few times in each heartbeat interval."""
        stalled = self._ticked_at is not None and now - self._ticked_at > self._settings.lease / 2
        self._ticked_at = now
        for link in self._links.tick(now, stalled=stalled):
            self._cut_link(link, f"silent for {now - link.heard_at:.1f} s", now)
        for request in [r for r in self._requests if r.spec.deadline is not None and now >= r.spec.deadline]:
            self.fail(request, OctavoError(Reason.DEADLINE, "the deadline passed"), _CANCEL_DEADLINE, now)
        self._homes.tick(now, stalled=stalled)

    def detach(self) -> None:
        """Say goodbye to every scheduler; nothing may run any more. One that has not welcomed us yet is not waited for."""
        self._links.detach()

    # ---- messages of a scheduler

    def _welcome(self, link: Link, message: scheduler_pb2.AttachResponse, now: float) -> None:
        try:
            self._links.welcome(link, message.epoch, message.welcome)
        except OctavoError as error:
            self._cut_link(link, error.message, now)
            return
        self._models(link, message.welcome.models, now)

    def _models(self, link: Link, served: Iterable[scheduler_pb2.ServedModel], now: float) -> None:
        try:
            link.models = checked(served)
        except OctavoError as error:
            self._cut_link(link, error.message, now)
            return
        self._homes.models_changed(now)

    def _admitted(self, link: Link, message: scheduler_pb2.Admitted, now: float) -> None:
        sequence = link.running.get(message.handle)
        if sequence is None:
            return
        sequence.planned, sequence.progress_at = True, now
        if sequence.admitted:
            return
        sequence.admitted = True
        sequence.cached_tokens = message.cached_tokens
        sequence.queue_ms = float(message.queue_ms)
        self._changed[sequence.request] = None

    def _preempted(self, link: Link, message: scheduler_pb2.Preempted, now: float) -> None:
        sequence = link.running.get(message.handle)
        if sequence is not None:
            sequence.waits_again(now)

    def _migrated(self, link: Link, message: scheduler_pb2.Migrated, now: float) -> None:
        sequence = link.running.get(message.handle)
        if sequence is not None:
            sequence.waits_again(now)
            sequence.migrations += 1
            sequence.suspect_group, sequence.failures_alone = message.suspect_group, message.failures_alone

    def _entry(self, link: Link, entry: batch.Entry, now: float) -> None:
        sequence = link.running.get(entry.handle)
        if sequence is None:  # cancelled, or resubmitted elsewhere
            return
        dropped, belongs = exactly_once.take(sequence, entry, now)
        self.dropped_tokens += dropped
        if not belongs:
            self._resubmit_after_gap(link, sequence, entry, now)
            return
        if sequence.output.finish_reason:
            if entry.finish_reason:
                self._homes.release(link, sequence)
            self._done(sequence, now)
        self._changed[sequence.request] = None

    def _failed(self, link: Link, message: scheduler_pb2.Failed, now: float) -> None:
        sequence = link.running.get(message.handle)
        if sequence is None:
            link.cancelling.discard(message.handle)
            return
        reason = _reason(message.reason)
        error = OctavoError(reason, message.message or reason.name, retry_after_ms=message.retry_after_ms)
        self._homes.refused(link, sequence, error, now)

    def _go_away(self, link: Link, now: float) -> None:
        """Move everything that another scheduler can take now; the rest stays until the stream ends."""
        link.draining = True
        self._homes.move(link.running.values(), now)

    def _resubmit_after_gap(self, link: Link, sequence: Sequence, entry: batch.Entry, now: float) -> None:
        log.warning(
            "%s: tokens from %d on came where %d belong; submitting it again",
            sequence.request.spec.request_id,
            entry.first_output_index,
            len(sequence.output.token_ids),
        )
        if entry.finish_reason:
            self._homes.release(link, sequence)
        self._homes.start_again(sequence, now)

    # ---- ends

    def _done(self, sequence: Sequence, now: float) -> None:
        """It has its finish reason. Where the scheduler does not know yet, tell it."""
        self._homes.leave(sequence, _CANCEL_STOP)
        sequence.done = True
        sequence.finished_at = now
        request = sequence.request
        self._changed[request] = None
        if request.done:
            self._requests.pop(request, None)

    def _fail(self, request: Request, error: OctavoError, now: float) -> None:
        self.fail(request, error, scheduler_pb2.CANCEL_REASON_UNSPECIFIED, now)

    def _cut_link(self, link: Link, why: str, now: float) -> None:
        log.warning("leaving the scheduler at %s: %s", link.address, why)
        self._links.cut(link)
        self.link_closed(link.address, now)


def _reason(number: int) -> Reason:
    """A reason of a newer scheduler that we don't know is a defect as far as the client is concerned."""
    try:
        return Reason(number)
    except ValueError:
        return Reason.INTERNAL
