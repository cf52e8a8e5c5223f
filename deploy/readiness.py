"""When is a cluster ready: each service's ready file names a living process whose health is SERVING; Redis answers PING.

Whoever starts the processes says whether they live; a dead one ends the wait at once, with the end of its log.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.exceptions import RedisError

from deploy.commands import Command
from service.probe import probe

POLL_SECONDS = 0.1
TAIL_LINES = 25


class ClusterError(Exception):
    """The cluster can't do what was asked; the text is for people."""


class ProcessDied(ClusterError):
    """A process ended while it was waited for."""

    def __init__(self, name: str, how: str, log: Path) -> None:
        super().__init__(f"{name} {how}; the end of {log}:\n{tail(log)}")
        self.name = name


@dataclass(frozen=True, slots=True)
class Ready:
    """What a ready file says."""

    service: str
    name: str
    address: str
    metrics: str
    pid: int
    incarnation: int
    http: str = ""  # of a router that speaks it
    model: str = ""  # these of a worker
    backend: str = ""
    quantization: str = ""
    may_reach_bytes: int = 0  # of memory of its own, once all that it promised is in use; 0: it holds all of it already


def read_ready(path: Path) -> Ready | None:
    """The ready file of a living process, or None: not there yet, or left behind by a process that was killed."""
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    ready = Ready(**{key: facts[key] for key in Ready.__slots__ if key in facts})
    return ready if _lives(ready.pid) else None


def redis_answers(url: str) -> bool:
    """Whether a Redis answers PING at this URL."""
    client = redis.Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0)
    try:
        return bool(client.ping())
    except (RedisError, OSError):
        return False
    finally:
        client.close()


def is_ready(command: Command) -> bool:
    """Whether this process serves now. Blocks for two seconds at most."""
    if command.ready_file is None:
        return command.address is not None and redis_answers(command.address)
    ready = read_ready(command.ready_file)
    return ready is not None and probe(ready.address, tls_ca=trusted_by(command)) == "SERVING"


def setting_of(command: Command, flag: str) -> str | None:
    """The value of a service's flag, named without dashes; from its environment where the command line has none."""
    flags = dict(zip(command.argv, command.argv[1:], strict=False))
    variable = "OCTAVO_" + flag.replace("-", "_").upper()
    return flags.get(f"--{flag}") or command.env.get(variable) or os.environ.get(variable) or None


def trusted_by(command: Command) -> Path | None:
    """The certificates that the process, and so its health check, speaks TLS with; None: it speaks without."""
    trusted = setting_of(command, "tls-ca")
    return Path(trusted) if trusted is not None and setting_of(command, "tls-cert") is not None else None


def wait_ready(
    commands: Iterable[Command],
    death: Callable[[Command], ProcessDied | None],
    timeout: float,
    on_ready: Callable[[Command], None] = lambda command: None,
    on_wait: Callable[[tuple[Command, ...]], None] = lambda waiting: None,
) -> None:
    """Block until all serve. `death` tells how a process ended, if it did; `on_wait` is called at each look.

    Raises ProcessDied at once when one ends, ClusterError after `timeout` seconds.
    """
    waiting = tuple(commands)
    started = time.monotonic()
    while waiting:
        for command in waiting:
            if (died := death(command)) is not None:
                raise died
        still = []
        for command in waiting:
            if is_ready(command):
                on_ready(command)
            else:
                still.append(command)
        waiting = tuple(still)
        on_wait(waiting)
        if waiting and time.monotonic() - started > timeout:
            names = ", ".join(command.name for command in waiting)
            raise ClusterError(f"not ready after {timeout:.0f} s: {names}")
        if waiting:
            time.sleep(POLL_SECONDS)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, for people."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(empty)"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
