"""Workers that leave in peace: drained for good, or sent to another scheduler. Sans I/O, a part of the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from octavo.v1 import scheduler_pb2

from scheduler.core import Scheduler
from scheduler.peers import WorkerPeer

log = logging.getLogger("octavo.hub")


class Leaving:
    """A worker that leaves gets no new requests; it is let go when the running ones have ended, and told where to."""

    def __init__(
        self, core: Scheduler, workers: Mapping[int, WorkerPeer], patience_s: float, tell_models: Callable[[], None]
    ) -> None:
        """`patience_s`: how long the requests of a worker that is wanted elsewhere may take to end."""
        self._core = core
        self._workers = workers
        self._patience_s = patience_s
        self._tell_models = tell_models

    def drain(self, worker: WorkerPeer) -> None:
        """It leaves for good."""
        worker.redial = ""
        self._begin(worker)

    def redial(self, digest: bytes, address: str, now: float) -> None:
        """Send a worker of this digest to another scheduler; no effect while one is still on its way.

        What runs on it may end first; what takes longer goes to the other workers here.
        """
        if any(worker.redial for worker in self._workers.values()):
            return
        able = [w for w in self._workers.values() if w.hello.model_digest == digest and not w.draining]
        if len(able) < 2:
            return
        worker = min(able, key=lambda w: (self._core.num_running(w.peer_id), w.peer_id))
        worker.redial, worker.redial_by = address, now + self._patience_s
        log.info("worker %s goes to the scheduler at %s, which has fewer", worker.name, address)
        self._begin(worker)

    def release_if_done(self, worker: WorkerPeer) -> None:
        """Let it go if it is leaving and nothing runs on it any more."""
        if worker.draining and self._core.num_running(worker.peer_id) == 0:
            self._let_go(worker)

    def tick(self, worker: WorkerPeer, now: float) -> None:
        """Time has passed for a worker that is wanted elsewhere."""
        if worker.redial and now >= worker.redial_by:
            self._let_go(worker)

    def _begin(self, worker: WorkerPeer) -> None:
        worker.draining = True
        self._core.drain_worker(worker.peer_id)
        self._tell_models()
        self.release_if_done(worker)

    def _let_go(self, worker: WorkerPeer) -> None:
        if worker.closing:
            return
        worker.closing = True
        if worker.redial:
            worker.put(scheduler_pb2.EnlistResponse(redial=scheduler_pb2.Redial(address=worker.redial)))
        else:
            worker.put(scheduler_pb2.EnlistResponse(go_away=scheduler_pb2.GoAway()))
