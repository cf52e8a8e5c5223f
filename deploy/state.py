"""The state of the checkout's cluster under .run/: who serves where (cluster.json), logs, the process runner's files."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from deploy.environment import ROOT
from deploy.readiness import ClusterError
from service.probe import probe

RUN = ROOT / ".run"
CLUSTER_FILE = RUN / "cluster.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Addresses of the running cluster, as clients find them."""

    router: tuple[str, ...]
    scheduler: tuple[str, ...]
    http: tuple[str, ...] = ()  # of the routers
    redis: str | None
    metrics: Mapping[str, str] = field(default_factory=dict)  # by process name, HOST:PORT
    model: str = ""  # the name to ask for
    model_argument: str = ""  # the worker's --model
    backend: str = ""  # of the first worker, as it says itself
    quantization: str | None = None  # in the same way; None: none
    runtime: str = "processes"
    token_file: str | None = None  # where the cluster wants a token


def read() -> Cluster | None:
    """The cluster that .run/cluster.json tells of, or None."""
    try:
        facts = json.loads(CLUSTER_FILE.read_text())
    except FileNotFoundError:
        return None
    return Cluster(**facts | {key: tuple(facts.get(key, ())) for key in ("router", "scheduler", "http")})


def write(cluster: Cluster) -> None:
    """Replace .run/cluster.json in one step."""
    RUN.mkdir(mode=0o700, exist_ok=True)
    new = CLUSTER_FILE.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(dataclasses.asdict(cluster), indent=2) + "\n")
    new.replace(CLUSTER_FILE)


def forget() -> None:
    """Remove .run/cluster.json."""
    CLUSTER_FILE.unlink(missing_ok=True)


@contextlib.contextmanager
def published(cluster: Cluster) -> Iterator[None]:
    """The cluster stands in .run/cluster.json while this lasts, unless a living one is told of there."""
    other = read()
    mine = other is None or all(probe(address) != "SERVING" for address in other.router)
    if mine:
        write(cluster)
    try:
        yield
    finally:
        if mine and read() == cluster:
            forget()


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One `make up`, `down` or `worker` at a time. Raises ClusterError where another one is at work."""
    RUN.mkdir(mode=0o700, exist_ok=True)
    with (RUN / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError("another make up, down or worker is at work in this checkout") from None
        yield
