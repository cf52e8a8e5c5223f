"""The scheduler's session logic, without I/O: messages and `now` in, messages into outboxes.

It stands between the streams (scheduler/service.py, or a simulation) and the core: it gives epochs, fences what carries an old
one, keeps leases, turns messages into calls of the core and the core's events into one TokenBatch for each router and step.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.v1 import scheduler_pb2, step_pb2

from scheduler.assets import AssetStore, Incoming
from scheduler.catalogue import Catalogue
from scheduler.codec import PROTOCOL, decode_hello, decode_result, decode_submit, encode_plan, summarise_plan
from scheduler.core import InvalidField, QueueFull, Scheduler, SchedulerError, Settings
from scheduler.leaving import Leaving
from scheduler.news import News
from scheduler.peers import Peer, RouterPeer, WorkerPeer
from scheduler.run_ahead import RunAhead
from service.errors import OctavoError, Reason
from service.trace import Trace

log = logging.getLogger("octavo.hub")


@dataclass(frozen=True, slots=True)
class HubSettings:
    """How streams are kept, and the core's policy."""

    heartbeat_ms: int = 75
    lease_ms: int = 250
    run_ahead: int = 2
    max_run_ahead: int = 4
    redial_patience_s: float = 5.0
    core: Settings = field(default_factory=Settings)


def _nobody_counts(seconds: float) -> None:
    """No metric."""


class Hub:
    """All streams of one scheduler process. One thread."""

    def __init__(self, settings: HubSettings, incarnation: int, first_epoch: int = 1) -> None:
        """`first_epoch` should be random, so that no epoch of an earlier process comes again."""
        self.core = Scheduler(settings.core)
        self.assets = AssetStore()
        self.routers: dict[int, RouterPeer] = {}
        self.workers: dict[int, WorkerPeer] = {}
        self.draining = False
        self.on_recovery: Callable[[float], None] = _nobody_counts
        """Told, for a metric, how many seconds a request waited from the loss of its worker until it was planned again."""
        self.trace: Trace | None = None
        """Gets the spans of plans and results: the only clock here, and nothing is decided by it."""
        self._settings = settings
        self._max_run_ahead = max(settings.run_ahead, settings.max_run_ahead)
        self._incarnation = incarnation
        self._epoch = first_epoch
        self._next_peer = 1
        self._ticked_at = 0.0
        self._catalogue = Catalogue(self.core, self.assets, self.workers)
        self._news = News(self.core, self.routers)
        self._leaving = Leaving(self.core, self.workers, settings.redial_patience_s, self._tell_models)

    # Routers -------------------------------------------------------------------------------------------------------------

    def attach(self, hello: scheduler_pb2.RouterHello, now: float) -> RouterPeer:
        """A router's stream is open. Raises PROTOCOL_MISMATCH or DRAINING."""
        if hello.protocol != PROTOCOL:
            raise OctavoError(Reason.PROTOCOL_MISMATCH, f"protocol {hello.protocol}; this scheduler speaks {PROTOCOL}")
        if self.draining:
            raise OctavoError(Reason.DRAINING, "this scheduler is leaving")
        router = RouterPeer(*self._identify(), heard_at=now, spoke_at=now, name=hello.name)
        self.routers[router.peer_id] = router
        welcome = scheduler_pb2.RouterWelcome(
            incarnation=self._incarnation,
            protocol=PROTOCOL,
            heartbeat_ms=self._settings.heartbeat_ms,
            lease_ms=self._settings.lease_ms,
            models=self._catalogue.served(),
        )
        router.put(scheduler_pb2.AttachResponse(welcome=welcome))
        return router

    def on_router(self, router: RouterPeer, message: scheduler_pb2.AttachRequest, now: float) -> None:
        """One message of a router. Raises PROTOCOL_VIOLATION: then the stream is to be cut."""
        router.heard_at = now
        kind = message.WhichOneof("message")
        if message.epoch != router.epoch:
            raise OctavoError(
                Reason.PROTOCOL_VIOLATION, f"{kind} of epoch {message.epoch}; this stream is {router.epoch}"
            )
        if kind == "submit":
            self._submit(router, message.submit, now)
        elif kind == "cancel":
            self.core.cancel((router.peer_id, message.cancel.handle), now)
            cancelled = scheduler_pb2.Cancelled(handle=message.cancel.handle)
            router.put(scheduler_pb2.AttachResponse(cancelled=cancelled))
        elif kind == "detach":
            router.closing = True
            router.notify()
        elif kind != "heartbeat":
            raise OctavoError(Reason.PROTOCOL_VIOLATION, f"a router does not send {kind} here")

    def router_gone(self, router: RouterPeer, now: float) -> None:
        """The stream has ended: everything that it submitted is cancelled; the router holds all it needs to come again."""
        if self.routers.pop(router.peer_id, None) is not None:
            dropped = self.core.detach_router(router.peer_id, now)
            again = ": whoever serves their clients now submits them again where they stood" if dropped else ""
            log.info("router %s left; %d requests stop here%s", router.name, dropped, again)

    # Workers -------------------------------------------------------------------------------------------------------------

    def enlist(self, hello: scheduler_pb2.WorkerHello, now: float) -> WorkerPeer:
        """A worker's stream is open. Raises what decode_hello raises, MODEL_CHANGED for a digest that was not admitted, DRAINING."""
        if self.draining:
            raise OctavoError(Reason.DRAINING, "this scheduler is leaving")
        try:
            spec = decode_hello(hello, self._max_run_ahead)
        except InvalidField as error:
            raise OctavoError(Reason.INVALID_ARGUMENT, f"Hello: {error}") from None
        self._catalogue.check(hello)
        self._replace_earlier_stream(hello.incarnation, now)
        ahead = RunAhead(self._settings.run_ahead, self._max_run_ahead)
        worker = WorkerPeer(*self._identify(), heard_at=now, spoke_at=now, name=hello.name, hello=hello, ahead=ahead)
        try:
            self.core.add_worker(worker.peer_id, spec, hello.incarnation)
        except InvalidField as error:
            raise OctavoError(Reason.INVALID_ARGUMENT, f"Hello: {error}") from None
        self.workers[worker.peer_id] = worker
        self._catalogue.note(hello)
        welcome = scheduler_pb2.WorkerWelcome(
            incarnation=self._incarnation,
            protocol=PROTOCOL,
            run_ahead=self._max_run_ahead,
            heartbeat_ms=self._settings.heartbeat_ms,
            lease_ms=self._settings.lease_ms,
        )
        worker.put(scheduler_pb2.EnlistResponse(welcome=welcome))
        if hello.model_digest not in self.assets:
            worker.incoming = Incoming()
            worker.put(scheduler_pb2.EnlistResponse(send_assets=scheduler_pb2.SendAssets(digest=hello.model_digest)))
        self._tell_models()
        log.info("worker %s enlisted: %s, %d rows, %d blocks", hello.name, hello.model, spec.max_rows, spec.num_blocks)
        return worker

    def on_worker(self, worker: WorkerPeer, message: scheduler_pb2.EnlistRequest, now: float) -> None:
        """One message of a worker. Raises PROTOCOL_VIOLATION: then the stream is to be cut."""
        worker.heard_at = now
        kind = message.WhichOneof("message")
        if message.epoch != worker.epoch:
            raise OctavoError(
                Reason.PROTOCOL_VIOLATION, f"{kind} of epoch {message.epoch}; this stream is {worker.epoch}"
            )
        if kind == "result":
            self._result(worker, message.result, now)
        elif kind == "draining":
            self.drain_worker(worker)
        elif kind == "asset" and worker.incoming is not None:
            worker.incoming.add(message.asset)
        elif kind == "assets_end" and worker.incoming is not None:
            self.assets.put(worker.hello.model_digest, worker.incoming.files())
            self.assets.forget_unserved({peer.hello.model_digest for peer in self.workers.values()})
            worker.incoming = None
            self._tell_models()
        elif kind != "heartbeat":
            raise OctavoError(Reason.PROTOCOL_VIOLATION, f"a worker does not send {kind} here")

    def worker_gone(self, worker: WorkerPeer, now: float) -> None:
        """The stream has ended: the worker's requests go back to the head of the queue."""
        if self.workers.pop(worker.peer_id, None) is None:
            return
        running = self.core.num_running(worker.peer_id)
        # One that leaves in peace says nothing against its requests.
        self.core.remove_worker(worker.peer_id, now, died=not (worker.draining or self.draining))
        self._news.tell_lost()
        self._tell_models()
        log.info("worker %s left; %d requests go back to the queue", worker.name, running)

    def drain_worker(self, worker: WorkerPeer) -> None:
        """No new requests for it; it is let go for good when the running ones have ended."""
        self._leaving.drain(worker)

    def count_workers(self) -> Counter[bytes]:
        """Workers by model digest, those that are leaving not counted."""
        return Counter(worker.hello.model_digest for worker in self.workers.values() if not worker.draining)

    def redial(self, digest: bytes, address: str, now: float) -> None:
        """Send a worker of this digest to another scheduler; no effect while one is still on its way.

        What runs on it may end first; what takes longer goes to the other workers here.
        """
        self._leaving.redial(digest, address, now)

    # Steps ---------------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> bool:
        """Compose and send a plan for each worker that can take one. Call after messages, once for all that came together.

        True: some worker can take another. Call again, but let these leave first: a device that has nothing to do waits for the
        first plan of several, and for no other.
        """
        trace = self.trace
        more = False
        for worker_id in self.core.workers_to_plan():
            worker = self.workers[worker_id]
            if worker.pace.in_flight >= worker.ahead.depth:
                continue
            began = trace.now() if trace is not None else 0
            plan = self.core.plan(worker_id, now)
            if plan is None:
                continue
            if trace is not None:
                began = trace.add("plan", plan.step_id, began)
            worker.last_plan = summarise_plan(plan)
            worker.pace.planned(plan.step_id, worker.last_plan.num_tokens, now)
            worker.put(scheduler_pb2.EnlistResponse(plan=encode_plan(plan, worker.epoch)))
            if trace is not None:
                trace.add("encode", plan.step_id, began)
            more = more or worker.pace.in_flight < worker.ahead.depth
        self._news.tell_placed()
        self._note_recoveries()
        self._news.tell_lost()
        return more

    # Time ----------------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Called a few times in each heartbeat interval: speak where nothing was said, cut off who is silent or hangs, expire
        deadlines.
        """
        interval, lease = self._settings.heartbeat_ms / 1e3, self._settings.lease_ms / 1e3
        late = now - self._ticked_at > lease / 2
        self._ticked_at = now
        for worker in list(self.workers.values()):
            if now - worker.spoke_at >= interval * 0.9:
                worker.put(scheduler_pb2.EnlistResponse(heartbeat=scheduler_pb2.SchedulerHeartbeat()))
            # After our own loop stalled the inbound streams are read first; the next tick judges.
            if not late:
                self._judge(worker, now, lease)
                self._judge_steps(worker, now)
            self._leaving.tick(worker, now)
        load = self.load()
        for router in list(self.routers.values()):
            # Whatever else was said: routers act on it.
            if now - router.told_load_at >= interval * 0.9:
                router.told_load_at = now
                router.put(scheduler_pb2.AttachResponse(load=load))
            if not late:
                self._judge(router, now, lease)
        deadline = self.core.next_deadline()
        if deadline is not None and deadline <= now:
            self.core.expire(now)
            self._news.tell_lost()

    def begin_drain(self, remaining_ms: int) -> None:
        """This scheduler leaves: nothing new is accepted, and everyone is told."""
        self.draining = True
        go_away = scheduler_pb2.GoAway(remaining_ms=remaining_ms)
        self._news.tell_all(lambda: scheduler_pb2.AttachResponse(go_away=go_away))

    def dismiss(self) -> None:
        """End all streams in peace."""
        for peer in [*self.routers.values(), *self.workers.values()]:
            peer.closing = True
            peer.notify()

    # Views ---------------------------------------------------------------------------------------------------------------

    def load(self) -> scheduler_pb2.Load:
        """For routers that choose between schedulers."""
        load = self.core.load()
        return scheduler_pb2.Load(
            waiting=load.waiting, running=load.running, workers=load.workers, kv_used=load.kv_used
        )

    def served_models(self) -> list[scheduler_pb2.ServedModel]:
        """The models whose workers are here and whose assets have come; with 0 workers where all of them are leaving."""
        return self._catalogue.served()

    def admit_digest(self, model: str, digest: bytes) -> None:
        """Allow a further digest under a model name."""
        self._catalogue.admit(model, digest)

    # Inside --------------------------------------------------------------------------------------------------------------

    def _identify(self) -> tuple[int, int]:
        self._next_peer += 1
        self._epoch += 1
        return self._next_peer, self._epoch

    def _submit(self, router: RouterPeer, submit: scheduler_pb2.Submit, now: float) -> None:
        try:
            if self.draining:
                raise OctavoError(Reason.DRAINING, "this scheduler is leaving")
            accepted = submit.accepted or bool(submit.output_token_ids)
            digest = self.core.digest_for(submit.model, submit.digest, accepted=accepted)
            vocab_size = self._catalogue.vocab_size(digest)
            self.core.submit(decode_submit(submit, router.peer_id, vocab_size, now), now)
        except OctavoError as error:
            self._news.refuse(router, submit.handle, error.reason, error.message, error.retry_after_ms)
        except QueueFull as error:
            self._news.refuse(
                router, submit.handle, Reason.QUEUE_FULL, str(error), max(1, int(error.retry_after * 1e3))
            )
        except SchedulerError as error:
            self._news.refuse(router, submit.handle, Reason[error.reason.name], str(error))

    def _result(self, worker: WorkerPeer, result: step_pb2.StepResult, now: float) -> None:
        if result.epoch != worker.epoch:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, f"a result of epoch {result.epoch}")
        began = self.trace.now() if self.trace is not None else 0
        try:
            decoded, logprobs = decode_result(result, worker.hello.vocab_size)
            events = self.core.apply(worker.peer_id, decoded, now)
        except SchedulerError as error:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, str(error)) from None
        if result.status != step_pb2.STEP_STATUS_OK:
            log.error("worker %s: step %d failed: %s", worker.name, result.step_id, result.message)
            # Its rows are void and so is its epoch: it gets nothing more until it enlists again.
            self.core.drain_worker(worker.peer_id)
            worker.cut_off(OctavoError(Reason.LOST, f"step {result.step_id} failed; enlist again"))
        worker.last_step = result.step_id
        elapsed, apart = worker.pace.returned(result.step_id, now)
        worker.ahead.returned(elapsed, result.device_ns / 1e9, apart)
        for columns in events:
            self._news.tell_tokens(columns, logprobs)
        if self.trace is not None:
            self.trace.add("apply", result.step_id, began)
        self._news.tell_lost()
        self._leaving.release_if_done(worker)

    def _note_recoveries(self) -> None:
        recoveries = self.core.take_recoveries()
        for seconds in recoveries:
            self.on_recovery(seconds)
        if recoveries:
            first, count = min(recoveries) * 1e3, len(recoveries)
            log.info("%d requests that had lost their worker are planned again, the first after %.1f ms", count, first)

    def _tell_models(self) -> None:
        models = scheduler_pb2.ModelList(models=self._catalogue.served())
        self._news.tell_all(lambda: scheduler_pb2.AttachResponse(models=models))

    def _replace_earlier_stream(self, incarnation: int, now: float) -> None:
        """The same process comes again before its old stream was seen to end: the old one is fenced off now."""
        for worker in list(self.workers.values()):
            if worker.hello.incarnation == incarnation:
                worker.cut_off(OctavoError(Reason.PROTOCOL_VIOLATION, "the worker enlisted again"))
                self.worker_gone(worker, now)

    def _judge(self, peer: Peer, now: float, lease: float) -> None:
        if now - peer.heard_at > lease:
            peer.cut_off(OctavoError(Reason.LOST, f"silent for {now - peer.heard_at:.2f} s"))

    def _judge_steps(self, worker: WorkerPeer, now: float) -> None:
        """A worker whose heartbeats come but whose steps do not has a hung device."""
        overdue = worker.pace.overdue(now)
        if overdue:
            worker.cut_off(OctavoError(Reason.LOST, f"no step came back for {overdue:.1f} s"))
