"""The running cluster, as its own services tell: health, models, workers, and whether they speak the client's contracts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from octavo.doctor.findings import Finding, note, ok, problem

SERVING = "SERVING"
_AGAIN = "Start it again: make down; make up. Or name where it runs: --address HOST:PORT --scheduler HOST:PORT"
_LOGS = "See why: make logs NAME={name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One process. `health`: SERVING, NOT_SERVING or why no answer came; `same_contracts`: None where it can't be asked."""

    kind: str
    address: str
    health: str
    same_contracts: bool | None = None
    refused: str = ""  # why it did not answer more than its health

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.kind} {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model as a router tells of it."""

    name: str
    workers: int
    ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker as its scheduler tells of it."""

    name: str
    model: str
    digest: str
    backend: str
    address: str
    draining: bool
    running: int
    blocks_used: int
    blocks_total: int
    health: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Everything that was asked. `expected`: somebody said that a cluster is there: an option, a variable, or .run/cluster.json."""

    expected: bool
    routers: tuple[Service, ...] = ()
    schedulers: tuple[Service, ...] = ()
    models: tuple[Model, ...] = ()
    workers: tuple[Worker, ...] = ()


ReadCluster = Callable[[], Cluster]


def check_cluster(cluster: Cluster) -> list[Finding]:
    """Whether it serves, and what to do where it does not."""
    services = (*cluster.routers, *cluster.schedulers)
    if not any(answered(service) for service in services):
        if not cluster.expected:
            return [ok("cluster", "None runs here; `make up` starts one.")]
        asked = ", ".join(service.shown for service in services)
        first = services[0].health if services else "no address"
        return [problem("cluster", f"Nobody answers at {asked}: {first}.", _AGAIN)]
    findings = [_check_service(service) for service in services]
    findings += [_contracts(service) for service in services if service.same_contracts is False]
    if not cluster.schedulers:
        findings.append(
            note("scheduler", "It lies inside the containers' network: neither it nor the workers were asked.")
        )
    if any(answered(service) and not service.refused for service in cluster.schedulers):
        findings += _check_workers(cluster.workers)
    findings += [_check_model(model) for model in cluster.models]
    return findings


def answered(service: Service) -> bool:
    """Whether something that knows gRPC health is there."""
    return service.health in (SERVING, "NOT_SERVING")


def _check_service(service: Service) -> Finding:
    name = f"{service.kind}-1"
    if not answered(service):
        remedy = _AGAIN
        return problem(service.kind, f"{service.address} does not answer: {service.health}.", remedy)
    if service.health != SERVING:
        return problem(service.kind, f"{service.address} is there and does not serve.", _LOGS.format(name=name))
    if service.refused:
        remedy = "Give the right key: --token-file FILE, or OCTAVO_API_KEY for routers and OCTAVO_CLUSTER_TOKEN_FILE for schedulers."
        return problem(service.kind, f"{service.address} serves, and refuses this client: {service.refused}.", remedy)
    contracts = " by the same contracts as this client" if service.same_contracts else ""
    return ok(service.kind, f"{service.address} serves{contracts}")


def _contracts(service: Service) -> Finding:
    return note(
        f"version of {service.kind}",
        f"{service.address} has other contracts than this client: the two are of different versions.",
        "Restart it from this checkout (make down; make up), or install the client of its version.",
    )


def _check_workers(workers: tuple[Worker, ...]) -> list[Finding]:
    if not workers:
        return [
            problem(
                "worker",
                "No worker is enlisted, so nothing can be answered.",
                "make ps; make logs NAME=worker-1; make worker",
            )
        ]
    findings = []
    versions: dict[str, set[str]] = defaultdict(set)
    for worker in workers:
        findings.append(_check_worker(worker))
        versions[worker.model].add(worker.digest)
    for model, digests in versions.items():
        if len(digests) > 1:
            found = f"The workers of {model} hold {len(digests)} versions of it: {', '.join(sorted(item[:12] for item in digests))}."
            findings.append(
                note(
                    f"versions of {model}",
                    found,
                    "Let the old ones go: octavo drain WORKER (octavo workers lists them)",
                )
            )
    return findings


def _check_worker(worker: Worker) -> Finding:
    blocks = f"{worker.running} requests, {worker.blocks_used:,} of {worker.blocks_total:,} blocks in use"
    found = f"{worker.name}: {worker.model} on {worker.backend} at {worker.address}, {blocks}"
    if worker.draining:
        return note("worker", f"{found}; it is draining and takes nothing new.")
    if worker.health == "NOT_SERVING":
        return problem("worker", f"{found}; it is there and does not serve.", _LOGS.format(name=worker.name))
    if worker.health != SERVING:  # it dials its scheduler, which need not mean that we can dial it
        return note(
            "worker", f"{found}; its scheduler has it, but its health can't be asked from here: {worker.health}."
        )
    return ok("worker", found)


def _check_model(model: Model) -> Finding:
    if model.ready:
        return ok("model served", f"{model.name} by {model.workers} worker{'' if model.workers == 1 else 's'}")
    remedy = "Wait a moment; if it stays so: make logs NAME=router-1"
    return problem("model served", f"{model.name}: the router has not got its tokenizer.", remedy)
