"""Redis: is there a server to start, and does one answer at the URL that the cluster is given?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from octavo.doctor.clock import check_clock_of_redis
from octavo.doctor.findings import Finding, Run, note, ok, problem

_TIMEOUT = 2.0
_INSTALL = "apt-get install redis-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came from a URL. `ahead`: seconds by which its clock is ahead of ours; `error`: why nothing came."""

    version: str = ""
    ahead: float = 0.0
    error: str = ""


def ask_redis(url: str) -> Answer:
    """PING, INFO and TIME, two seconds each at most. Raises ModuleNotFoundError without the package `redis`."""
    import redis
    from redis.exceptions import RedisError

    try:
        client = redis.Redis.from_url(url, socket_connect_timeout=_TIMEOUT, socket_timeout=_TIMEOUT)
    except ValueError as error:
        return Answer(error=str(error))
    try:
        client.ping()
        version = str(client.info("server")["redis_version"])
        begin = time.time()
        seconds, micros = client.time()
        # The answer was made somewhere between the two looks at our clock.
        return Answer(version=version, ahead=seconds + micros / 1e6 - (begin + time.time()) / 2)
    except (RedisError, OSError) as error:
        return Answer(error=str(error))
    finally:
        client.close()


def check_redis_binary(binary: Path | None, run: Run) -> list[Finding]:
    """The server that `make up` would start."""
    check = "redis-server"
    if binary is None:
        return [note(check, "None here: the processes of `make up` get fixed addresses instead.", _INSTALL)]
    ran = run([str(binary), "--version"], 10.0)
    if ran.code != 0:
        return [problem(check, f"{binary} does not run: {ran.last_words}", _INSTALL)]
    version = next((word.removeprefix("v=") for word in ran.out.split() if word.startswith("v=")), "unknown version")
    return [ok(check, f"{version} ({binary})")]


def check_redis(url: str, answer: Answer) -> list[Finding]:
    """The Redis that discovery asks."""
    shown = without_password(url)
    if answer.error:
        remedy = f"Start one (`make up` does), or name another: octavo doctor --redis URL. To look closer: redis-cli -u {shown} ping"
        return [problem("Redis", f"No answer from {shown}: {answer.error.rstrip('.')}.", remedy)]
    return [ok("Redis", f"{answer.version} answers at {shown}"), *check_clock_of_redis(answer.ahead)]


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    try:
        parts = urlsplit(url)
        if "@" not in parts.netloc:
            return url
    except ValueError:
        return "the URL given"
    return parts._replace(netloc="…@" + parts.netloc.rpartition("@")[2]).geturl()
