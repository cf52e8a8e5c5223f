"""What `octavo doctor` finds in a checkout: its environment, the ports of `make up`, and a Redis to start.

Imports the standard library and octavo.doctor only, so that it can say of everything else that it is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from octavo.doctor.findings import Finding, note, ok, problem, size_of
from octavo.doctor.packages import Installed, check_packages, read_requirements
from octavo.doctor.ports import Listener, check_ports

from deploy.commands import DEFAULT_LISTEN, METRICS_LISTEN
from deploy.environment import REQUIREMENTS, ROOT, SETS, requirements_digest

_SET_ORDER = (
    "dev",
    "local",
    "worker",
    "router",
    "scheduler",
    "client",
)  # the largest that is there says what to expect


def check_environment(prefix: Path, installed: Installed) -> list[Finding]:
    """Packages and pins of the environment at `prefix` against deploy/requirements."""
    made = [name for name in _SET_ORDER if name in SETS and (prefix / f".octavo-{name}").is_file()]
    wanted = made[0] if made else "local"
    file = f"deploy/requirements/{wanted}.txt"
    if not made and installed("torch") is None and installed("numpy") is None:
        found = f"{prefix} holds the client alone; `make up` makes an environment for the services in .venv."
        return [note("environment", found, "Look at that one: .venv/bin/octavo doctor")]
    remedy = f"{sys.executable} -m pip install -r {file}" if not made else _remake(prefix, wanted)
    findings = [_check_stamp(prefix, wanted, made)]
    findings += check_packages(
        f"packages ({wanted})", read_requirements(REQUIREMENTS / f"{wanted}.txt"), installed, remedy
    )
    along = [item for item in read_requirements(REQUIREMENTS / "constraints.txt") if installed(item.name) is not None]
    return findings + check_packages("what these need", along, installed, remedy, exact=False)


def _check_stamp(prefix: Path, wanted: str, made: list[str]) -> Finding:
    if not made:
        found = f"{prefix} was not made by `make up`."
        return note("environment", found, "Make one: make env. Then use .venv/bin/octavo")
    if (prefix / f".octavo-{wanted}").read_text(encoding="utf-8") != requirements_digest(wanted):
        found = f"{prefix} was made for {wanted!r}, and what that asks for has changed since."
        return note("environment", found, _remake(prefix, wanted))
    return ok("environment", f"{prefix}, made for {wanted!r} and up to date")


def _remake(prefix: Path, wanted: str) -> str:
    return f"In the checkout: python3 -m deploy.environment {wanted} {prefix}"


def check_default_ports(found: Iterable[Listener]) -> list[Finding]:
    """The ports that `make up` asks for first."""
    try:
        from deploy.ports import is_free
    except ModuleNotFoundError as error:
        return [note("ports", f"Left out, since {error.name} is not installed.")]
    wanted = {"the router": DEFAULT_LISTEN["router"], "its HTTP door": DEFAULT_LISTEN["http"]}
    wanted |= {"the scheduler": DEFAULT_LISTEN["scheduler"], "Redis": DEFAULT_LISTEN["redis"]}
    wanted |= {"the first metrics page": METRICS_LISTEN}
    return check_ports(wanted, is_free, found, own_addresses())


def own_addresses() -> dict[str, str]:
    """What the living processes of this checkout's cluster serve: address to name."""
    from deploy.readiness import read_ready

    own: dict[str, str] = {}
    for path in sorted((ROOT / ".run" / "ready").glob("*.json")):
        ready = read_ready(path)
        if ready is not None:
            own |= {ready.address: ready.name, ready.metrics: f"{ready.name}'s metrics"}
            if ready.http:
                own[ready.http] = f"{ready.name}'s HTTP door"
    url = redis_url()
    if own and url is not None:
        own[url.removeprefix("redis://").partition("/")[0]] = "Redis"
    return own


def redis_url() -> str | None:
    """The Redis of the cluster that .run/cluster.json tells of."""
    return _told("redis")


def model_argument() -> str | None:
    """The model that the running cluster was started with: a directory, or a mock."""
    return _told("model_argument")


def _told(key: str) -> str | None:
    try:
        value = json.loads((ROOT / ".run" / "cluster.json").read_text(encoding="utf-8")).get(key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):  # the section "cluster" says what is wrong with the file
        return None
    return value if isinstance(value, str) and value else None


def check_versions() -> list[Finding]:
    """Whether the living processes of this checkout's cluster run the code that lies here now."""
    from deploy.readiness import read_ready

    findings = []
    for path in sorted((ROOT / ".run" / "ready").glob("*.json")):
        ready = read_ready(path)
        if ready is None:
            continue
        changed = _newer_than(path.stat().st_mtime, ready.service)
        if changed is not None:
            found = f"{ready.name} was started before {changed.relative_to(ROOT)} was changed: it runs older code."
            findings.append(note(f"version of {ready.name}", found, "make down; make up"))
    return findings


def check_promises(available: int | None) -> list[Finding]:
    """Whether the workers of this checkout's cluster may still take more memory than there is. `available` in bytes."""
    from deploy.memory import promised_bytes

    promised = promised_bytes(ROOT / ".run" / "ready")
    if not promised or available is None:
        return []
    found = (
        f"The workers here may still take {size_of(promised)} for their KV caches; {size_of(available)} are available"
    )
    if promised > available:
        remedy = "Let them share: make down, then make up WORKERS=n. Or leave room: OCTAVO_MEMORY_FRACTION=0.3 make up"
        return [problem("promised memory", f"{found}: they could run out of memory.", remedy)]
    return [ok("promised memory", found)]


def _newer_than(started: float, service: str) -> Path | None:
    """A source file of the service that was written after it started."""
    folders = [ROOT / "service", ROOT / service, ROOT / "protos"]
    folders += [ROOT / "kernels"] if service == "worker" else []
    sources = (path for folder in folders for pattern in ("*.py", "*.cu", "*.cuh") for path in folder.rglob(pattern))
    return next((path for path in sources if path.stat().st_mtime > started), None)
