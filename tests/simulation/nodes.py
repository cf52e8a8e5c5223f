"""The three services around their real session objects, as service.py, enlist.py and attach.py have them around gRPC."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from octavo.v1 import scheduler_pb2

from router.request import Request
from router.session import RouterSession, SessionSettings
from scheduler.core import Settings
from scheduler.hub import Hub, HubSettings
from scheduler.peers import RouterPeer, WorkerPeer
from scheduler.spread import choose_move
from service.errors import OctavoError
from tests.simulation.grammars import Grammars
from tests.simulation.network import Network, Stream
from tests.simulation.plan import MAX_MODEL_LEN, VOCABULARY, Plan
from tests.simulation.reference import EOS_EVERY
from tests.simulation.world import Node
from worker.backend import BackendError
from worker.backends.mock import MockBackend, MockSettings
from worker.backends.mock_assets import mock_assets
from worker.backends.select import Selection, identity_of
from worker.session import Action, Execute, Leave, WorkerSession
from worker.step import Step, StepOutput

DIGEST = bytes(range(32))
MODEL = "mock"
POISON_TOKEN = 7  # a worker that computes it dies
REQUEST_STALL = 12.0
_TICK = 0.1


class SchedulerNode(Node):
    """One scheduler process."""

    def __init__(self, network: Network, name: str, plan: Plan) -> None:
        super().__init__(network.world, name)
        self.network = network
        self._core = Settings(prefix_caching=plan.prefix_caching, max_shared_tokens=plan.max_shared_tokens)
        self._plan_due = False
        self.peers: list[SchedulerNode] = []
        self.hub: Hub

    def boot(self) -> None:
        rng = self.world.random
        self.hub = Hub(
            HubSettings(heartbeat_ms=100, lease_ms=300, core=self._core), rng.getrandbits(60), rng.getrandbits(40)
        )
        self._plan_due = False
        self.every(_TICK, self._tick)
        self.every(rng.uniform(0.8, 1.2), self._spread)

    def died(self) -> None:
        self.network.break_all(self)

    def accept(self, stream: Stream) -> None:
        """A peer has dialled; its first message is a Hello."""
        peers: list[RouterPeer | WorkerPeer] = []

        def on_message(message: Any) -> None:
            if not peers:
                self._admit(stream, message, peers)
                return
            try:
                if isinstance(peers[0], RouterPeer):
                    self.hub.on_router(peers[0], message, self.world.now)
                else:
                    self.hub.on_worker(peers[0], message, self.world.now)
            except OctavoError as error:
                self.world.violated(f"{self.name} finds that {peers[0].name} broke the protocol: {error}")
                self._end(stream, peers[0])
            self._plan_soon()

        stream.listen(self, on_message, lambda: self._end(stream, peers[0]) if peers else None)

    def _admit(self, stream: Stream, message: Any, peers: list[RouterPeer | WorkerPeer]) -> None:
        try:
            peer = (
                self.hub.attach(message.hello, self.world.now)
                if isinstance(message, scheduler_pb2.AttachRequest)
                else self.hub.enlist(message.hello, self.world.now)
            )
        except OctavoError as error:
            self.world.note(f"{self.name} refuses a stream: {error}")
            stream.close(self)
            return
        peers.append(peer)
        due = [False]

        def flush() -> None:
            due[0] = False
            while (waiting := peer.take(self.world.now)) is not None:
                stream.send(self, waiting)
            if peer.cut is not None:
                self.world.note(f"{self.name} cuts off {peer.name}: {peer.cut.message}")
            if peer.cut is not None or peer.closing:
                self._end(stream, peer)

        def notify() -> None:
            if not due[0]:
                due[0] = True
                self.world.after(0, self.guard(flush))

        peer.notify = notify
        notify()
        self._plan_soon()

    def _end(self, stream: Stream, peer: RouterPeer | WorkerPeer) -> None:
        stream.close(self)
        if isinstance(peer, RouterPeer):
            self.hub.router_gone(peer, self.world.now)
        else:
            self.hub.worker_gone(peer, self.world.now)
        self._plan_soon()

    def _tick(self) -> None:
        self.hub.tick(self.world.now)
        self._plan_soon()

    def _spread(self) -> None:
        """As scheduler/spread.py, with answers at once."""
        others = [s for s in self.peers if s is not self and s.alive and not s.frozen]
        move = choose_move(self.hub.count_workers(), {s.name: s.hub.count_workers() for s in others})
        if move is not None:
            self.world.note(f"{self.name} sends a worker to {move[1]}")
            self.hub.redial(*move, self.world.now)

    def _plan_soon(self) -> None:
        if not self._plan_due:
            self._plan_due = True
            self.world.after(0, self.guard(self._plan))

    def _plan(self) -> None:
        self._plan_due = False
        if self.hub.plan(self.world.now):
            self._plan_soon()


class WorkerNode(Node):
    """One worker process with a mock device."""

    def __init__(self, network: Network, name: str, plan: Plan, schedulers: list[SchedulerNode]) -> None:
        super().__init__(network.world, name)
        self.network = network
        self._plan = plan
        self._schedulers = schedulers
        self.fail_next = self.hang_next = False
        self.stall_next = 0.0

    def boot(self) -> None:
        plan, rng = self._plan, self.world.random
        self._backend = MockBackend(
            MockSettings(
                vocab_size=VOCABULARY,
                max_model_len=MAX_MODEL_LEN,
                max_rows=plan.max_rows,
                max_num_batched_tokens=24,
                block_size=4,
                num_blocks=plan.num_blocks,
                eos_every=EOS_EVERY,
            )
        )
        info = self._backend.load(lambda what, done, total: None)
        assets = mock_assets(VOCABULARY, MAX_MODEL_LEN)
        selection = Selection(self._backend, "mock", MODEL, assets, DIGEST)
        self.session = WorkerSession(identity_of(selection, info, rng.getrandbits(60), self.name, grammars=True))
        self._grammars = Grammars(random.Random(rng.getrandbits(60)))
        self._stream: Stream | None = None
        self._device_free_at = 0.0
        self._poisoned: set[int] = set()
        self._hung = self._broken = False
        self._redial_to = ""
        self.fail_next = self.hang_next = False
        self.stall_next = 0.0
        self.every(_TICK, self._tick)
        self._dial()

    def died(self) -> None:
        self.network.break_all(self)

    def _dial(self) -> None:
        """Unlike worker/enlist.py it does not wait for steps of an earlier stream, which makes fencing harder; but as there, who hangs
        does not come again."""
        if self._hung:
            return
        open_to = [s for s in self._schedulers if s.alive and not s.frozen and self.network.reachable(self, s)]
        if not open_to:
            self.world.after(0.2, self.guard(self._dial))
            return
        chosen = min(open_to, key=lambda s: (s.name != self._redial_to, len(s.hub.workers), s.name))
        stream = self._stream = Stream(self.network, self, chosen)
        chosen.accept(stream)
        stream.listen(self, self._on_message, self._on_end, self._on_ghost)
        self._backend.reset()
        self._grammars.reset()
        self._poisoned.clear()
        self._broken = False
        stream.send(self, self.session.connected(self.world.now))

    def _on_message(self, message: scheduler_pb2.EnlistResponse) -> None:
        try:
            self._perform(self.session.on_message(message, self.world.now))
        except OctavoError as error:
            self.world.violated(f"{self.name} finds that its scheduler broke the protocol: {error}")
            self._leave(Leave(str(error)))

    def _on_ghost(self, message: scheduler_pb2.EnlistResponse) -> None:
        """A message of an earlier stream: harmless, whatever it is, once a Welcome has told the epochs apart."""
        if self.session.epoch and message.WhichOneof("message") in ("plan", "heartbeat"):
            self._on_message(message)

    def _on_end(self) -> None:
        self._leave(Leave("the stream ended"))

    def _tick(self) -> None:
        self._perform(self.session.tick(self.world.now))

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Execute):
                self._execute(action.epoch, action.step)
            elif isinstance(action, Leave):
                self._leave(action)
            elif self._stream is not None:
                self._stream.send(self, action)

    def _leave(self, leave: Leave) -> None:
        if self._stream is None:
            return
        self.world.note(f"{self.name} leaves: {leave.reason}")
        self._stream.close(self)
        self._stream = None
        self.session.disconnected()
        self._redial_to = leave.address
        self.world.after(0.2, self.guard(self._dial))

    def _execute(self, epoch: int, step: Step) -> None:
        """As worker/engine.py: steps of an epoch in order; after a failed one the others of its epoch are dropped."""
        if self._broken:
            return
        self._poisoned.difference_update(step.freed_rows.tolist())
        self._poisoned.update(new.row for new in step.new_rows if POISON_TOKEN in new.token_ids)
        if self._poisoned.intersection(step.rows.tolist()):
            self._broken = True  # steps that come in the meantime would read what this one has not written
            self.world.after(0.001, self.guard(self._die_of_it))
            return
        duration = self._plan.step_seconds * self.world.random.uniform(0.8, 1.3)
        self._device_free_at = max(self.world.now, self._device_free_at) + duration + self.stall_next
        self.stall_next = 0.0
        try:
            if self.fail_next:
                self.fail_next = False
                raise BackendError("scripted")
            masks = self._grammars.begin(step)
            self._backend.begin(step)
            self._backend.forward(step)
            self._backend.sample(step, masks)
            output = self._backend.collect()
            if masks is not None:
                masks.took(output)
        except BackendError as error:
            if str(error) != "scripted":
                self.world.violated(f"{self.name}: {error}")
            self._broken = True
            if self._hung:
                return
            text = str(error)
            self._when_done(lambda: self._perform(self.session.on_step_failed(epoch, step.step_id, text)))
            return
        if self.hang_next:
            self.hang_next = False
            self._hung = True
            self.world.note(f"{self.name}: its device hangs")
        if self._hung:  # no step of this process ever ends again
            return
        self._when_done(lambda: self._collected(epoch, output))

    def _die_of_it(self) -> None:
        self.kill()
        self.world.after(0.3, self.start)

    def _when_done(self, event: Callable[[], None]) -> None:
        self.world.at(self._device_free_at, self.guard(event))

    def _collected(self, epoch: int, output: StepOutput) -> None:
        message = self.session.on_output(epoch, output, self.world.now)
        if message is not None and self._stream is not None:
            self._stream.send(self, message)

    def drain(self) -> None:
        """SIGTERM, as far as the scheduler sees it."""
        message = self.session.drain()
        if message is not None and self._stream is not None:
            self._stream.send(self, message)


class RouterNode(Node):
    """One router process. `watchers`: who waits for which request; called with each request that has something new."""

    def __init__(self, network: Network, name: str, schedulers: list[SchedulerNode]) -> None:
        super().__init__(network.world, name)
        self.network = network
        self._schedulers = schedulers
        self.watchers: dict[Request, Callable[[], None]] = {}
        self.on_death: list[Callable[[], None]] = []

    def boot(self) -> None:
        settings = SessionSettings(
            incarnation=self.world.random.getrandbits(60), name=self.name, request_stall=REQUEST_STALL
        )
        self.session = RouterSession(settings)
        self._streams: dict[str, Stream] = {}
        self.watchers = {}
        self.every(_TICK / 4, self._tick)
        for scheduler in self._schedulers:
            self._attach(scheduler)

    def died(self) -> None:
        self.network.break_all(self)
        on_death, self.on_death = self.on_death, []
        for event in on_death:
            event()

    def submit(self, request: Request, watcher: Callable[[], None]) -> None:
        """A client's request. Raises OctavoError."""
        self.session.submit(request, self.world.now)
        self.watchers[request] = watcher
        self.pump()

    def hang_up(self, request: Request) -> None:
        """Its client is gone."""
        self.watchers.pop(request, None)
        self.session.cancel(request, scheduler_pb2.CANCEL_REASON_CLIENT, self.world.now)
        self.pump()

    def pump(self) -> None:
        """Do what the session wants."""
        for request in list(self.session.take_changed()):
            watcher = self.watchers.get(request)
            if watcher is not None:
                watcher()
        actions = self.session.take_actions()
        for address, message in actions.messages:
            if address in self._streams:
                self._streams[address].send(self, message)
        for address in actions.cut:
            stream = self._streams.pop(address, None)
            if stream is not None:
                self.world.note(f"{self.name} cuts its stream to {address}")
                stream.close(self)
                self._attach_later(address)

    def _attach(self, scheduler: SchedulerNode) -> None:
        if not scheduler.alive or scheduler.frozen or not self.network.reachable(self, scheduler):
            self._attach_later(scheduler.name)
            return
        stream = Stream(self.network, self, scheduler)
        scheduler.accept(stream)
        address = scheduler.name
        stream.listen(
            self,
            lambda message: self._receive(address, stream, message),
            lambda: self._ended(address, stream),
            lambda message: self._ghost(address, message),
        )
        self._streams[address] = stream
        self.session.link_opened(address, self.world.now)
        self.pump()

    def _attach_later(self, address: str) -> None:
        scheduler = next(s for s in self._schedulers if s.name == address)
        delay = self.world.random.uniform(0.05, 0.2)
        self.world.after(delay, self.guard(lambda: self._attach(scheduler)))

    def _receive(self, address: str, stream: Stream, message: scheduler_pb2.AttachResponse) -> None:
        if self._streams.get(address) is stream:
            self.session.receive(address, message, self.world.now)
            self.pump()

    def _ghost(self, address: str, message: scheduler_pb2.AttachResponse) -> None:
        """A message of an earlier stream."""
        if message.WhichOneof("message") in ("tokens", "admitted", "failed"):
            self.session.receive(address, message, self.world.now)
            self.pump()

    def _ended(self, address: str, stream: Stream) -> None:
        stream.close(self)
        if self._streams.get(address) is stream:
            del self._streams[address]
            self.session.link_closed(address, self.world.now)
            self._attach_later(address)
            self.pump()

    def _tick(self) -> None:
        self.session.tick(self.world.now)
        self.pump()
