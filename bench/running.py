"""What the measurements through gRPC share: a cluster of processes, loads on it, what each process used, and a report's head."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from octavo.cli.load_report import machine, summarise, versions
from octavo.cli.load_run import LoadResult, run_load
from octavo.cli.load_spec import LoadSpec
from octavo.client import Client
from octavo.v1 import inference_pb2

from deploy.cluster import LocalCluster
from deploy.environment import ROOT

LEASE = {"lease-ms": 5000}  # everything shares one machine's cores here: a busy neighbour is no dead one
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cluster(
    model: str,
    backend: str,
    worker: Mapping[str, Any] | None = None,
    *,
    routers: int = 1,
    everyone: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
) -> LocalCluster:
    """One scheduler, one worker, some routers; the model is served as "m". `everyone`: flags of all; `env`: variables of all."""
    common = {**LEASE, **(everyone or {})}
    flags = {"scheduler": common, "router": common, "worker": {**common, "served-name": "m", **(worker or {})}}
    variables = {service: env or {} for service in flags}
    return LocalCluster(
        redis=False, backend=backend, model=model, routers=routers, flags=flags, env=variables, timeout=timeout
    )


def only_model(client: Client) -> inference_pb2.Model:
    """The only model of a cluster."""
    (model,) = client.list_models()
    return model


def load(running: LocalCluster, processes: int = 1, **shape: Any) -> dict[str, Any]:
    """The figures of one load. Raises RuntimeError where a request failed."""
    return figures_of(run(running, processes, **shape))


def run(running: LocalCluster, processes: int = 1, **shape: Any) -> LoadResult:
    """One load over all routers, with every sample."""
    shape = {"vocab_size": 30_000, "temperature": 0.0} | shape
    spec = LoadSpec(addresses=tuple(running.routers), model="m", **shape)
    return run_load(spec, processes, lambda *_: None)


def figures_of(result: LoadResult) -> dict[str, Any]:
    """`summarise`, where nothing failed. Raises RuntimeError."""
    figures = summarise(result)
    if figures["failed"]:
        raise RuntimeError(f"{figures['failed']} requests failed: {figures['first_error']}")
    return figures


@contextmanager
def cpu_seconds(running: LocalCluster) -> Iterator[dict[str, float]]:
    """Processor seconds of each process of the cluster, by its name, between begin and end; filled in at the end."""
    used: dict[str, float] = {}
    before = {name: _cpu_seconds(member.pid) for name, member in running.members.items()}
    yield used
    used.update({name: _cpu_seconds(member.pid) - before[name] for name, member in running.members.items()})


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def head(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What every report begins with: command, time, commit, machine, driver, versions."""
    found = versions()
    for name in ("torch", "numpy", "cuda-bindings", "cuda-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "device": device(),
        "versions": found,
    }


def device() -> str:
    """Name and driver of each GPU, or "none"."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "none"
    return "; ".join(asked.stdout.split("\n")).strip("; ") if asked.returncode == 0 else "none"


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; OCTAVO_COMMIT where this is no checkout, or "unknown"."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get("OCTAVO_COMMIT", "unknown")
    return name + ("+" if changed else "")
