"""One run: build the cluster of a seed, let its faults happen, then hold it to what must be true."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from scheduler.core.integrity import check_integrity
from tests.simulation.clients import Client
from tests.simulation.network import Network
from tests.simulation.nodes import RouterNode, SchedulerNode, WorkerNode
from tests.simulation.plan import FAULT_SECONDS, SETTLE_SECONDS, Fault, Plan, make_plan
from tests.simulation.world import Node, World

STALLED = "sequences got nothing and were submitted again"


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a seed."""

    seed: int
    violations: list[str]
    log: list[str]
    ends: Counter[str]
    faults: Counter[str]
    tokens: int


class Cluster:
    """The nodes of a plan."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.world = World(seed)
        self.network = Network(self.world)
        self.schedulers = [SchedulerNode(self.network, f"scheduler-{i}", plan) for i in range(plan.schedulers)]
        for scheduler in self.schedulers:
            scheduler.peers = self.schedulers
        self.workers = [WorkerNode(self.network, f"worker-{i}", plan, self.schedulers) for i in range(plan.workers)]
        self.routers = [RouterNode(self.network, f"router-{i}", self.schedulers) for i in range(plan.routers)]
        for node in self.nodes:
            node.start()
        self.world.run(self.world.now + 1.0)  # everyone has found everyone
        self.clients = [Client(self.world, request, self.routers) for request in plan.requests]
        self.happened: Counter[str] = Counter()
        for fault in plan.faults:
            self.world.after(fault.at, lambda fault=fault: self._happen(fault))  # type: ignore[misc]

    @property
    def nodes(self) -> list[Node]:
        return [*self.schedulers, *self.workers, *self.routers]

    def _happen(self, fault: Fault) -> None:
        group: list[Node] = list(
            {"worker": self.workers, "scheduler": self.schedulers, "router": self.routers}[fault.role]
        )
        node = group[fault.target % len(group)]
        if not node.alive:
            return
        self.happened[f"{fault.kind} {fault.role}"] += 1
        if fault.kind == "kill" or (fault.kind == "drain" and fault.role != "worker"):
            self._kill(node, fault.seconds)
        elif fault.kind == "massacre":
            for worker in self.workers:
                self._kill(worker, self.world.random.uniform(0.05, fault.seconds + 0.1))
        elif fault.kind == "freeze":
            node.freeze()
            self.world.after(fault.seconds, node.thaw)
        elif fault.kind in ("part", "cut"):
            others: list[Node] = list(self.schedulers) if fault.role != "scheduler" else [*self.workers, *self.routers]
            other = others[fault.other % len(others)]
            if fault.kind == "part":
                self.network.part(node, other, fault.seconds)
            else:
                for stream in self.network.between(node, other):
                    self.world.note(f"the stream of {node.name} and {other.name} breaks")
                    stream.cut()
        elif isinstance(node, WorkerNode):
            self._trouble(node, fault)

    def _kill(self, node: Node, seconds: float) -> None:
        node.kill()
        self.world.after(seconds, node.start)

    def _trouble(self, worker: WorkerNode, fault: Fault) -> None:
        if fault.kind == "fail":
            worker.fail_next = True
        elif fault.kind == "hang":
            worker.hang_next = True
            # A worker whose device hangs is unready; its supervisor starts it anew in the end.
            self.world.after(5.0, lambda: self._kill(worker, 0.2))
        elif fault.kind == "stall":
            # A step takes long, and meanwhile the stream may break: its result comes in another epoch.
            worker.stall_next = fault.seconds
            if fault.other % 3:
                for stream in self.network.between(worker):
                    self.world.after(0.04, stream.cut)
        else:
            worker.guard(worker.drain)()
            self.world.after(1.0 + fault.seconds, lambda: self._kill(worker, 0.2))


def run(seed: int) -> Report:
    """Play a seed to its end."""
    plan = make_plan(seed)
    cluster = Cluster(seed, plan)
    world = cluster.world
    world.run(world.now + FAULT_SECONDS)
    until = world.now + SETTLE_SECONDS
    while world.now < until and not all(client.ended for client in cluster.clients):
        world.run(world.now + 0.5)
    for client in cluster.clients:
        if not client.ended:
            world.violated(f"{client.name} has not ended {SETTLE_SECONDS:.0f} s after the last fault")
    world.run(max(world.now, 100.0 + 1.0 + FAULT_SECONDS + 1.5) + 1.0)
    _check_nothing_is_held(cluster)
    world.run(world.now + 7.0)  # restarts that are still due, acknowledgements, leases
    _check_schedulers(cluster)
    tokens = sum(len(received.tokens) for client in cluster.clients for received in client._received)
    ends = Counter(client.ended or "never" for client in cluster.clients)
    return Report(seed, world.violations, world.log, ends, cluster.happened, tokens)


def _check_nothing_is_held(cluster: Cluster) -> None:
    """A second after the last client has gone or got its last token, and the last fault is over, nobody works for anyone."""
    for scheduler in cluster.schedulers:
        load = scheduler.hub.core.load()
        if scheduler.alive and (load.running or load.waiting):
            cluster.world.violated(f"{scheduler.name} still runs {load.running} and holds {load.waiting} requests")


def _check_schedulers(cluster: Cluster) -> None:
    """Everything came home."""
    for scheduler in cluster.schedulers:
        core = scheduler.hub.core
        try:
            check_integrity(core._state)
        except RuntimeError as error:
            cluster.world.violated(f"{scheduler.name}: {error}")
        for worker in core._state.workers.values():
            if worker.pool.num_available != worker.spec.num_blocks:
                cluster.world.violated(f"{scheduler.name}: blocks of worker {worker.worker_id} did not come home")
            if worker.rows.num_free != worker.spec.max_rows:
                cluster.world.violated(f"{scheduler.name}: rows of worker {worker.worker_id} did not come home")
    for router in cluster.routers:
        if router.session.num_requests:
            cluster.world.violated(f"{router.name} still has {router.session.num_requests} requests")
        if router.session.stalls:
            cluster.world.violated(f"{router.name}: {router.session.stalls} {STALLED}")
