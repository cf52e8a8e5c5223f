"""How `make down` waits for the process runner, without one."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from deploy import supervise
from deploy.supervise import Supervisor


def test_a_process_that_has_ended_is_gone_though_nobody_asked_about_it() -> None:
    assert supervise._lives(os.getpid())
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child.pid}").exists()
    assert not supervise._lives(child.pid)
    child.wait()
    assert not supervise._lives(child.pid)


@pytest.mark.parametrize(
    ("state", "trouble", "code", "told"),
    [
        ("EXITED", "Bad exit code 1", 1, "it ended with exit code 1"),
        ("EXITED", "Bad exit code -1", -1, "it was killed by a signal"),
        ("EXITED", "", 2, "it ended with exit code 2"),
        ("BACKOFF", "Exited too quickly (process log may have details)", 1, "it ended as soon as it was started"),
        ("FATAL", "can't find command '/none'", 0, "it can't be started (can't find command '/none')"),
        ("RUNNING", "", 0, "it ended and was started again"),
    ],
)
def test_how_a_process_ended_is_told(state: str, trouble: str, code: int, told: str) -> None:
    facts = {"statename": state, "spawnerr": trouble, "exitstatus": code, "stop": 1}
    assert supervise._how_it_ended(facts) == told


def test_who_waits_for_the_end_has_supervisord_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps for up to a second wherever a process has ended and the next one is to be stopped."""
    monkeypatch.setattr(supervise, "STOP_SECONDS", 3)
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as sleeper:
        sleeper.bind(f"{directory}/supervisor.sock")
        sleeper.listen()
        sleeper.setblocking(False)

        def lives(pid: int) -> bool:
            try:
                sleeper.accept()[0].close()
            except BlockingIOError:
                return True
            return False

        supervisor = Supervisor(Path(directory))
        monkeypatch.setattr(supervisor, "_rpc", Mock())
        monkeypatch.setattr(supervise, "_lives", lives)
        supervisor.shutdown()
