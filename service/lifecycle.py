"""How a process starts, becomes ready, drains and ends: the same for all services.

Exit codes: 0 after a drain (SIGTERM, SIGINT), also of a process that waits for its address, 2 for a setting that can't be used, 1 for
anything else, such as an address that somebody else has: another try may help. A second signal ends the process at once. SIGUSR1
shows in the log where every thread and every asyncio task stands. So does an event loop that stands still, which ends the process if
it goes on (service/watchdog.py). With --trace-dir, SIGUSR2 writes where the time of the last steps went.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from service.binding import AddressTaken
from service.settings import CommonSettings, SettingsError
from service.stacks import all_stacks
from service.trace import Trace
from service.watchdog import LoopWatchdog

log = logging.getLogger("octavo")

_SWITCH_SECONDS = 0.0005
"""How long a thread may keep Python's lock from another that wants it: by default 5 ms, which is four steps of a small model."""


class Lifecycle:
    """What a running process knows of itself: its incarnation, and whether it shall stop."""

    def __init__(self, service: str, settings: CommonSettings) -> None:
        self.service = service
        self.settings = settings
        self.incarnation = secrets.randbits(63) | 1
        self.name = settings.name or f"{service}-{self.incarnation:x}"[: len(service) + 9]
        self.stopping = asyncio.Event()
        self.trace = None if settings.trace_dir is None else Trace(settings.trace_dir, self.name)
        self._loop = asyncio.get_running_loop()
        self.watchdog = LoopWatchdog(self._loop, settings.stall_seconds, settings.stall_exit_seconds)

    def dump_stacks(self, why: str) -> None:
        """Log where every thread and every asyncio task stands."""
        log.critical("%s\n%s", why, all_stacks(self._loop))

    def announce(self, address: str, metrics: str, **more: Any) -> None:
        """Write the ready file, then say so: the process serves now."""
        # What is here by now stays. Looked at in each full collection, it would stop the event loop for 10 to 20 ms each time.
        gc.collect()
        gc.freeze()
        if self.settings.ready_file is not None:
            facts = {
                "service": self.service,
                "name": self.name,
                "address": address,
                "metrics": metrics,
                "pid": os.getpid(),
                "incarnation": self.incarnation,
            }
            _write_atomically(self.settings.ready_file, json.dumps(facts | more))
        said = "".join(f", {key} {value}" for key, value in more.items() if value)
        log.info("ready: %s at %s%s, metrics at http://%s/metrics", self.name, address, said, metrics)

    def withdraw(self) -> None:
        """Remove the ready file."""
        if self.settings.ready_file is not None:
            self.settings.ready_file.unlink(missing_ok=True)


def run(service: str, settings: CommonSettings, serve: Callable[[Lifecycle], Awaitable[None]]) -> int:
    """Run `serve` on an event loop until it returns; it must return soon after `stopping` is set. Returns the exit code."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname).1s {settings.name or service} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    sys.setswitchinterval(_SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(_main(service, settings, serve))
        except SettingsError as error:
            return _told(service, error)
        except BaseExceptionGroup as group:
            settings_errors = group.subgroup(SettingsError)
            if settings_errors is not None:
                return _told(service, _first_leaf(settings_errors))
            log.exception("%s failed", service)
            return 1
        except Exception:  # the process ends with it: log it whole
            log.exception("%s failed", service)
            return 1
    return 0


def _told(service: str, error: BaseException) -> int:
    print(f"{service}: {error}", file=sys.stderr)
    return 1 if isinstance(error, AddressTaken) else 2


async def _main(service: str, settings: CommonSettings, serve: Callable[[Lifecycle], Awaitable[None]]) -> None:
    life = Lifecycle(service, settings)
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if life.stopping.is_set():
            log.warning("second signal: leaving at once")
            os._exit(1)
        log.info("stopping: draining for up to %.0f s", settings.drain_timeout)
        life.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    _dump_on_signal(life, loop)
    if life.trace is not None:
        _write_on_signal(life.trace, loop)
    life.watchdog.start()
    try:
        await serve(life)
    except AddressTaken:
        if not life.stopping.is_set():  # else nobody misses it
            raise
    finally:
        life.withdraw()
        life.watchdog.stop()
        if life.trace is not None:
            life.trace.write()


def _dump_on_signal(life: Lifecycle, loop: asyncio.AbstractEventLoop) -> None:
    """SIGUSR1: the loop tells all it knows. Before that the signal's own handler writes the threads' stacks, which needs neither the
    loop nor Python's lock."""
    loop.add_signal_handler(signal.SIGUSR1, life.dump_stacks, "SIGUSR1")
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=True)


def _write_on_signal(trace: Trace, loop: asyncio.AbstractEventLoop) -> None:
    """SIGUSR2: write the spans, on a thread of their own."""
    loop.add_signal_handler(signal.SIGUSR2, lambda: threading.Thread(target=trace.write, name="trace").start())


def _first_leaf(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not installed with every service, and not needed
        return None
    return uvloop.new_event_loop


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
