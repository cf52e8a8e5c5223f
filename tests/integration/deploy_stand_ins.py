"""Stand-ins for the services, for tests of what starts them: the same flags, ready files, health and signals, and no work."""

from __future__ import annotations

import contextlib
import socket
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

# The services' own library, without the services: serves health, writes its arguments down, ends at SIGTERM.
SETTINGS = '''
    from dataclasses import dataclass
    from service.settings import CommonSettings, flag

    @dataclass(frozen=True, kw_only=True)
    class Settings(CommonSettings):
        """A stand-in."""
        scheduler: tuple[str, ...] = flag("scheduler", ())
        model: str = flag("model", "")
        backend: str = flag("backend", "", ("", "auto", "torch", "cuda", "mock"))
        served_name: str | None = flag("served name", None)
        quantization: str = flag("quantization", "none")
        threads: int = flag("threads", 0)
        memory_fraction: float = flag("memory fraction", 0.9)
        http_listen: str = flag("address of the HTTP door", "")
        ticket_key_file: str | None = flag("key of resume tickets", None)
        crash: str = flag("how to fail", "")

    CLASS = Settings
'''
STAND_IN = """
    import json, os, sys
    from service.lifecycle import run
    from service.server import Server
    from service.settings import SettingsError, exit_on_settings_error, parse
    from SERVICE.settings import Settings

    async def serve(life):
        settings = life.settings
        if settings.crash:
            raise SettingsError("told to fail: " + settings.crash)
        server = Server(settings, [], 1 << 20)
        address = await server.start()
        await server.set_serving(True)
        print("arguments " + json.dumps(sys.argv[1:]), flush=True)
        told = {"quantization": settings.quantization, "backend": settings.backend} if "SERVICE" == "worker" else {}
        life.announce(address, "127.0.0.1:1", http=settings.http_listen, **told)
        await life.stopping.wait()
        print("drained", flush=True)
        await server.stop(0)

    try:
        settings = parse(Settings, "SERVICE")
    except SettingsError as error:
        exit_on_settings_error(error, "SERVICE")
    sys.exit(run("SERVICE", settings, serve))
"""


def still_running(pids: Iterable[str], seconds: float) -> list[str]:
    """Those of the processes that have not ended within `seconds`. One of which nobody has asked how has ended, too."""
    waiting, until = list(pids), time.monotonic() + seconds
    while (waiting := list(filter(_runs, waiting))) and time.monotonic() < until:
        time.sleep(0.05)
    return waiting


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def taken(address: str) -> Iterator[None]:
    """Another program has HOST:PORT, as soon as who has it now is gone."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + 10
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            try:
                holder.bind((host, int(port)))
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.01)
        holder.listen(1)
        yield


def write_stand_ins(root: Path) -> None:
    """Put the packages router, scheduler and worker into `root`."""
    for service in ("router", "scheduler", "worker"):
        (root / service).mkdir()
        (root / service / "__init__.py").touch()
        main = textwrap.dedent(STAND_IN).replace("SERVICE", service)
        (root / service / "__main__.py").write_text(main)
        settings = textwrap.dedent(SETTINGS).replace("CLASS", f"{service.title()}Settings")
        (root / service / "settings.py").write_text(settings)
