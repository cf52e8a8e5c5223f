"""Where each sequence runs: choosing a scheduler for it, waiting for one, being refused by one, leaving one. Sans I/O, a part of the
session.

A sequence is always in one of three places: running under a handle on one link, homeless (waiting for a scheduler that serves its
digest), or done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from octavo.v1 import scheduler_pb2

from router.link import Link
from router.links import Links
from router.models import ModelDirectory
from router.placement import Candidate, affinity, choose
from router.request import Request, Sequence
from router.stall import StallWatch
from service.errors import OctavoError, Reason

log = logging.getLogger("octavo.router.session")

_MAX_TRIES = 20
_MAX_BACKOFF = 1.0
_MIN_RETRY_MS = 100
_MOVED = scheduler_pb2.CANCEL_REASON_UNSPECIFIED


class Homes:
    """Which sequence runs over which link. Owned by the session, which says what has happened."""

    def __init__(
        self,
        links: Links,
        *,
        patience: float,
        linger: float,
        request_stall: float,
        fail: Callable[[Request, OctavoError, float], None],
    ) -> None:
        """Durations in seconds, as in SessionSettings. `links` and `fail(request, error, now)` are the session's."""
        self.models = ModelDirectory()
        self.stalls = 0  # sequences that ran and got nothing
        self._links = links.by_address
        self._patience = patience
        self._linger = linger
        self._send = links.send
        self._fail = fail
        self._homeless: dict[Sequence, None] = {}
        self._watch = StallWatch(request_stall)

    # ---- who can take a request

    def check_room(self, model: str, tenant: str, priority: int, size: int, now: float) -> None:
        """Raises QUEUE_FULL where every scheduler of the model has just refused such a request, no larger than this one in bytes,
        and wants none yet.

        That costs microseconds; to ask costs tokenizing, two threads and a round trip, at a time when all are busy.
        """
        if not any(link.full for link in self._links.values()):
            return
        digest = self.models.find(model).digest
        links = [link for link in self._links.values() if link.attached and not link.draining and link.serves(digest)]
        waits = [link.full_for(tenant, priority, size, now) for link in links]
        if waits and all(waits):
            raise OctavoError(
                Reason.QUEUE_FULL,
                f"the waiting queue is full, retry after {min(waits):.2f} s",
                retry_after_ms=max(_MIN_RETRY_MS, round(min(waits) * 1e3)),
            )

    def check_served(self, request: Request) -> None:
        """Raises MODEL_CHANGED or NO_WORKER where nobody serves its digest, nor did until just now, and it was not accepted before."""
        may_wait = request.spec.resumed or self.comes_again(request)
        if not may_wait and not self.candidates(request.sequences[0]):
            raise self._nobody(request)

    def candidates(self, sequence: Sequence) -> list[Candidate]:
        """The schedulers that serve its digest and have not refused it."""
        digest = sequence.request.spec.digest
        return [
            Candidate(link.address, link.serves(digest), len(link.running))
            for link in self._links.values()
            if link.attached and not link.draining and link.serves(digest) and link.address not in sequence.refused_by
        ]

    def comes_again(self, request: Request) -> bool:
        """Whether its model was served until just now, or is by a scheduler that is leaving: either may be an upgrade."""
        digest = request.spec.digest
        leaving = any(link.attached and link.draining and link.serves(digest) for link in self._links.values())
        return leaving or self.models.lingers(digest)

    def _nobody(self, request: Request) -> OctavoError:
        spec = request.spec
        if any(model.name == spec.model for model in self.models.all()) and not self.models.by_digest(spec.digest):
            return OctavoError(
                Reason.MODEL_CHANGED, f"the version of {spec.model} that the request is pinned to is gone"
            )
        return OctavoError(Reason.NO_WORKER, f"no worker serves {spec.model} at present", retry_after_ms=1_000)

    # ---- finding a home

    def place(self, sequence: Sequence, now: float, avoid: str = "") -> None:
        """Submit a sequence that runs nowhere, or let it wait. `avoid`: an address to take only if there is no other."""
        candidates = self.candidates(sequence) if now >= sequence.not_before else []
        candidates = [candidate for candidate in candidates if candidate.address != avoid] or candidates
        if not candidates:
            self._homeless[sequence] = None
            patient = sequence.accepted or sequence.tries or self.comes_again(sequence.request)
            if now - sequence.homeless_since > (self._patience if patient else self._linger):
                self._fail(sequence.request, self._nobody(sequence.request), now)
            return
        self._homeless.pop(sequence, None)
        spec = sequence.request.spec
        link = self._links[choose(candidates, affinity(spec.cache_salt, spec.prompt_column))]
        sequence.link, sequence.handle = link.address, link.new_handle()
        sequence.tries += 1
        self._watch.add(sequence, now)
        link.running[sequence.handle] = sequence
        self._send(link, submit=sequence.request.submission(sequence, now))

    def place_homeless(self, now: float) -> None:
        """Whoever waits, if somebody can take it now."""
        for sequence in list(self._homeless):
            if sequence in self._homeless:
                self.place(sequence, now)

    def tick(self, now: float, *, stalled: bool) -> None:
        """Time has passed. `stalled`: our own loop stood still meanwhile."""
        if stalled:
            self._watch.excuse(now)
        self.models.forget_gone(now - self._linger)
        for sequence in self._watch.take_due(now):
            self._judge(sequence, now)
        self.place_homeless(now)

    # ---- losing one

    def lose(self, sequence: Sequence, now: float) -> None:
        """Its stream or its submission is lost: the next one is another attempt, later each time nothing came of it."""
        self._forget(sequence)
        if sequence.done:  # failed together with another of its request
            return
        sequence.attempt += 1
        sequence.homeless_since = now
        backoff = 0.0 if sequence.tries <= 1 else min(_MAX_BACKOFF, 0.025 * 2**sequence.tries)
        sequence.not_before = now + backoff
        self._homeless[sequence] = None
        if sequence.tries >= _MAX_TRIES:
            error = OctavoError(Reason.LOST, f"lost {sequence.tries} times without a new token")
            self._fail(sequence.request, error, now)

    def refused(self, link: Link, sequence: Sequence, error: OctavoError, now: float) -> None:
        """Its scheduler has failed it for this reason: it is submitted again where that may help, else its request fails."""
        self.release(link, sequence)
        reason, spec = error.reason, sequence.request.spec
        sequence.refused_by.add(link.address)
        if reason is Reason.QUEUE_FULL:
            link.note_full(spec.tenant, spec.priority, spec.message_size, error.retry_after_ms / 1e3, now)
        elsewhere = bool(self.candidates(sequence))
        # Whoever was accepted is never refused for want of room: its scheduler was lost, and this one is full of others.
        may_go_on = error.rule.resumable or reason is Reason.QUEUE_FULL
        go_on = may_go_on and sequence.accepted and reason is not Reason.SLOW_CONSUMER
        go_on |= reason in (Reason.NO_WORKER, Reason.DRAINING) and self.comes_again(sequence.request)
        once_more = reason is Reason.INTERNAL and sequence.attempt == 0
        if (go_on or once_more or (error.rule.retryable and elsewhere)) and sequence.tries < _MAX_TRIES:
            if go_on or once_more:
                sequence.refused_by.clear()
            self.lose(sequence, now)
            if elsewhere and not once_more:
                sequence.not_before = now
            self.place(sequence, now)
        else:
            self._fail(sequence.request, error, now)

    def start_again(self, sequence: Sequence, now: float, avoid: str = "") -> None:
        """Leave where it runs, if it does, and submit it again with what it has."""
        self.leave(sequence, _MOVED)
        self.lose(sequence, now)
        if not sequence.done:
            self.place(sequence, now, avoid)

    def move(self, sequences: Iterable[Sequence], now: float) -> None:
        """Submit elsewhere what another scheduler can take now."""
        for sequence in list(sequences):
            if self.candidates(sequence):
                self.leave(sequence, _MOVED)
                self.lose(sequence, now)
                sequence.not_before = now
                if not sequence.done:
                    self.place(sequence, now)

    def models_changed(self, now: float) -> None:
        """Find room for who waits: for the homeless, and for those whose scheduler has lost its last worker of their model.

        What runs on a worker that is leaving may end there.
        """
        self.update_models(now)
        for link in self._links.values():
            digests = {sequence.request.spec.digest for sequence in link.running.values()}
            lost = {digest for digest in digests if not link.serves(digest)}
            held = {digest for digest in lost if link.holds(digest)}
            if lost:
                stranded = [s for s in link.running.values() if s.request.spec.digest in lost]
                self.move([s for s in stranded if not (s.admitted and s.request.spec.digest in held)], now)
        self.place_homeless(now)

    def update_models(self, now: float) -> None:
        """The directory follows the links."""
        self.models.update((model for link in self._links.values() for model in link.models), now)

    def _judge(self, sequence: Sequence, now: float) -> None:
        """A sequence that runs and gets nothing is submitted again, elsewhere if somebody else serves its model."""
        link = self._links[sequence.link]
        quiet = self._watch.quiet_too_long(sequence, link.load.waiting, now)
        if not quiet:
            return
        self.stalls += 1
        log.error(
            "%s: output %d has got nothing for %.1f s; submitting it again. Handle %d at %s, %s, attempt %d, %d tries; %d of at most "
            "%d tokens have come; there %d run and %d wait",
            sequence.request.spec.request_id,
            sequence.output.index,
            quiet,
            sequence.handle,
            link.address,
            "planned" if sequence.planned else "not planned",
            sequence.attempt,
            sequence.tries,
            len(sequence.output.token_ids),
            sequence.request.spec.sampling.max_tokens,
            link.load.running,
            link.load.waiting,
        )
        sequence.stalls += 1
        self.start_again(sequence, now, avoid=link.address)

    # ---- handles

    def leave(self, sequence: Sequence, reason: scheduler_pb2.CancelReason) -> None:
        """Free its row and forget its handle until the scheduler acknowledges. No effect on one that runs nowhere."""
        link = self._links.get(sequence.link)
        handle = sequence.handle
        self._forget(sequence)
        if link is None or handle < 0:
            return
        link.cancelling.add(handle)
        count = len(sequence.output.token_ids)
        self._send(link, cancel=scheduler_pb2.Cancel(handle=handle, reason=reason, num_output_tokens=count))

    def release(self, link: Link, sequence: Sequence) -> None:
        """A terminal entry came: the handle is free."""
        self._watch.discard(sequence)
        link.running.pop(sequence.handle, None)
        sequence.handle, sequence.link = -1, ""

    def _forget(self, sequence: Sequence) -> None:
        link = self._links.get(sequence.link)
        if link is not None:
            self.release(link, sequence)
        self._watch.discard(sequence)
        sequence.handle, sequence.link = -1, ""
        self._homeless.pop(sequence, None)
