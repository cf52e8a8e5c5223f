"""A service whose address is taken waits for it, then says so in one sentence, which names the flag, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.environment import ROOT


@pytest.fixture(scope="module")
def taken() -> Iterator[str]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        yield f"127.0.0.1:{holder.getsockname()[1]}"


PATHS = os.pathsep.join(str(path) for path in (ROOT, ROOT / "protos", ROOT / "client"))
FOR_EVER = """
import runpy, sys, service.binding
service.binding.PATIENCE_SECONDS = 1e9
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def end_of(service: str, *flags: str) -> tuple[int, list[str]]:
    """Exit code, and the lines written that are no ordinary log."""
    done = subprocess.run(
        [sys.executable, "-m", service, "--scheduler" if service != "scheduler" else "--peer", "127.0.0.1:1", *flags],
        env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()


@contextlib.contextmanager
def waiting_for_ever(service: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """The process once it waits for a port; it has to be ended. One that stays for a minute is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", FOR_EVER, service, *flags],
        env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            said = ""
            while "; trying for " not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            yield process
        finally:
            watchdog.cancel()


@pytest.mark.parametrize(
    ("service", "more"),
    [
        ("router", ("--http-listen", "none")),
        ("scheduler", ()),
        ("worker", ("--model", "mock")),
    ],
)
@pytest.mark.parametrize("flag", ["--listen", "--metrics"])
def test_a_taken_port_is_one_sentence(taken: str, service: str, more: tuple[str, ...], flag: str) -> None:
    code, lines = end_of(service, flag, taken, *(() if flag == "--listen" else ("--listen", "127.0.0.1:0")), *more)
    sentence = f"{flag} {taken}: Address already in use"
    assert len([line for line in lines if line.endswith(f"{sentence}; trying for 3 s")]) == 1
    lines = [line for line in lines if " I " not in line]  # a worker tells how it loads
    assert (code, lines) == (1, [f"{service}: {sentence}"])


def test_a_taken_http_port_is_one_sentence(taken: str) -> None:
    code, lines = end_of("router", "--listen", "127.0.0.1:0", "--http-listen", taken)
    assert (code, lines[1:]) == (1, [f"router: --http-listen {taken}: Address already in use"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("service", "more", "flag"),
    [
        ("scheduler", (), "--listen"),
        ("scheduler", ("--listen", "127.0.0.1:0"), "--metrics"),
        ("router", ("--listen", "127.0.0.1:0", "--scheduler", "127.0.0.1:1"), "--http-listen"),
        ("worker", ("--model", "mock", "--scheduler", "127.0.0.1:1"), "--listen"),
    ],
)
def test_who_waits_for_a_port_stops_when_told(
    taken: str, service: str, more: tuple[str, ...], flag: str, number: signal.Signals
) -> None:
    """With patience that never ends, so that it is the signal that ends it."""
    if flag != "--metrics":
        more = (*more, "--metrics", "127.0.0.1:0")
    with waiting_for_ever(service, *more, flag, taken) as process:
        process.send_signal(number)
        assert process.stdout is not None
        rest = process.stdout.read()
    assert (process.returncode, [line for line in rest.splitlines() if " I " not in line]) == (0, [])


@pytest.mark.parametrize(
    ("service", "more", "flag"),
    [
        ("scheduler", (), "--metrics"),
        ("router", ("--http-listen", "none", "--scheduler", "127.0.0.1:1"), "--metrics"),
        ("router", ("--metrics", "127.0.0.1:0", "--scheduler", "127.0.0.1:1"), "--http-listen"),
        ("worker", ("--model", "mock", "--scheduler", "127.0.0.1:1"), "--metrics"),
    ],
)
def test_who_waits_for_another_port_has_no_peers_yet(
    taken: str, service: str, more: tuple[str, ...], flag: str
) -> None:
    """They would be cut off by a scheduler whose clock does not run yet, and by its end."""
    with tempfile.TemporaryDirectory() as folder:
        door = Path(folder) / "s"
        with waiting_for_ever(service, "--listen", f"unix:{door}", *more, flag, taken) as process:
            there = door.exists()
            process.kill()
        assert not there


def test_a_host_that_is_not_ours_and_a_socket_without_a_folder(tmp_path: Path) -> None:
    code, lines = end_of("scheduler", "--listen", "localhost.invalid:0", "--cluster-token-file", str(_token(tmp_path)))
    assert code == 2 and len(lines) == 1 and "--listen localhost.invalid:0: " in lines[0] and "Errno" not in lines[0]
    code, lines = end_of("scheduler", "--listen", f"unix:{tmp_path}/none/s")
    assert code == 2 and "its folder must exist" in lines[-1]


def _token(folder: Path) -> Path:
    path = folder / "token"
    path.write_text("a" * 40)
    path.chmod(0o600)
    return path
