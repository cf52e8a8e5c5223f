"""`make up`'s process runner: supervisord, with its configuration written here and its commands over a Unix socket.

Supervisor was chosen over honcho (foreground only, no restarts, no commands) and circus (ZeroMQ sockets, event-loop stack of its own):
a daemon with plain files, a log for each process, restarts, ordered stop, and programs that can be added while it runs.
A process that ends with 0 (drained) or 2 (settings) stays down; any other end starts it again, also a port that somebody has by now.
Where supervisord itself is killed, its processes end, too (deploy/tied.py).
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from deploy.commands import SERVICE_ORDER, Command, tied
from deploy.environment import ROOT
from deploy.readiness import ClusterError, ProcessDied, tail

STOP_SECONDS = 40  # a drain takes 30 at most
_SOCKET_PATH_BYTES = 107 - len(".1234567")  # supervisord binds SOCKET.PID first
_LIVING = ("STARTING", "RUNNING", "STOPPING")
_DOWN = (ConnectionRefusedError, FileNotFoundError, ConnectionResetError, BrokenPipeError)


@dataclass(frozen=True, slots=True)
class State:
    """What supervisord says about a process. `uptime` in seconds."""

    name: str
    state: str
    pid: int
    uptime: int
    detail: str


class Supervisor:
    """One supervisord, its configuration, logs and socket in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.logs = directory / "logs"
        self._config = directory / "supervisord.conf"
        self._programs = directory / "programs"
        self._socket = directory / "supervisor.sock"

    def is_running(self) -> bool:
        """Whether a supervisord answers there."""
        try:
            self._rpc().getState()
        except _DOWN:
            return False
        return True

    def launch(self, commands: Sequence[Command]) -> None:
        """Start supervisord in the background with these processes; nothing of an earlier run is kept. Raises ClusterError."""
        if len(str(self._socket).encode()) > _SOCKET_PATH_BYTES:
            raise ClusterError(
                f"the path of this checkout is too long for a Unix socket ({self._socket}); clone it into a shorter one"
            )
        if "%" in str(self.directory):
            raise ClusterError(f"supervisord can't work below a path with a percent sign: {self.directory}")
        for folder in (self.logs, self._programs, self.directory / "ready"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for command in commands:
            self._write_program(command)
        self._config.write_text(self._configuration())
        daemon = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self._config)]
        done = subprocess.run(daemon, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ClusterError(f"supervisord does not start: {done.stderr.strip() or done.stdout.strip()}")
        deadline = time.monotonic() + 15
        while not self.is_running():
            if time.monotonic() > deadline:
                raise ClusterError(f"supervisord does not answer:\n{tail(self.directory / 'supervisord.log')}")
            time.sleep(0.05)

    def add(self, command: Command) -> None:
        """Start one more process in the running supervisord; its log begins anew, whatever an earlier try of this name said."""
        for log in self.logs.glob(f"{command.name}.log*"):
            log.unlink()
        self._write_program(command)
        rpc = self._rpc()
        rpc.reloadConfig()
        rpc.addProcessGroup(command.name)

    def remove(self, name: str) -> None:
        """Stop a process and forget it."""
        rpc = self._rpc()
        try:
            rpc.stopProcessGroup(name, True)
        except xmlrpc.client.Fault as fault:
            if fault.faultString.split(":")[0] != "BAD_NAME":  # it was never added
                raise
        else:
            rpc.removeProcessGroup(name)
        (self._programs / f"{name}.conf").unlink(missing_ok=True)

    def states(self) -> dict[str, State]:
        """All processes by name."""
        found = {}
        for item in self._rpc().getAllProcessInfo():
            facts: Mapping[str, Any] = item
            uptime = facts["now"] - facts["start"] if facts["statename"] == "RUNNING" else 0
            found[facts["name"]] = State(facts["name"], facts["statename"], facts["pid"], uptime, _how_it_ended(facts))
        return found

    def death(self, name: str) -> ProcessDied | None:
        """How a process that was to become ready ended, also where supervisord has started it again; None while it never did."""
        state = self.states()[name]
        if state.state in _LIVING and not state.detail:
            return None
        how = f"does not stay up: {state.detail}" if state.detail else "does not stay up"
        return ProcessDied(name, how, self.logs / f"{name}.log")

    def shutdown(self) -> None:
        """Stop all processes in order, then supervisord itself; returns once it is gone. Nothing happens where none runs."""
        try:
            rpc = self._rpc()
            pid = rpc.getPID()
            rpc.shutdown()
        except _DOWN:
            return
        deadline = time.monotonic() + STOP_SECONDS * len(SERVICE_ORDER)
        while _lives(pid):
            if time.monotonic() > deadline:
                raise ClusterError(f"supervisord (pid {pid}) does not end")
            self._wake()
            time.sleep(0.05)

    def _wake(self) -> None:
        """Have supervisord look whether a process has ended: by itself it does so once a second, and stops the next one only then."""
        with contextlib.suppress(*_DOWN), socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(self._socket))

    def _rpc(self) -> Any:
        # A proxy for each use: its connection would not survive a restart of supervisord.
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        return xmlrpc.client.ServerProxy("http://localhost", transport=transport).supervisor

    def _configuration(self) -> str:
        return _section(
            "supervisord",
            {
                "logfile": self.directory / "supervisord.log",
                "pidfile": self.directory / "supervisord.pid",
                "directory": ROOT,
                "umask": "022",
            },
        ) + (
            _section("unix_http_server", {"file": self._socket, "chmod": "0700"})
            + _section(
                "rpcinterface:supervisor",
                {"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
            )
            + _section("supervisorctl", {"serverurl": f"unix://{self._socket}"})
            # Relative to this file: supervisor splits the value at spaces, and a path may hold some.
            + _section("include", {"files": "programs/*.conf"})
        )

    def _write_program(self, command: Command) -> None:
        for key, value in command.env.items():
            if '"' in value or "\n" in value:  # and it is not told here: it may be a secret
                raise ClusterError(f"supervisord can't hold a double quote or the end of a line in {key}")
        quoted = ",".join(f'{key}="{value}"' for key, value in command.env.items())
        options = {
            "command": shlex.join(tied(command.argv)).replace("%", "%%"),
            "environment": quoted.replace("%", "%%"),
            "directory": ROOT,
            "priority": SERVICE_ORDER.index(command.service) + 1,
            "startsecs": 1,
            "autorestart": "unexpected",
            "exitcodes": "0,2",
            "startretries": 30,  # each a second later than the one before: Redis ends at once where its port is taken
            "stopwaitsecs": STOP_SECONDS,
            "redirect_stderr": "true",
            "stdout_logfile": self.logs / f"{command.name}.log",
            "stdout_logfile_maxbytes": "50MB",
            "stdout_logfile_backups": 1,
        }
        path = self._programs / f"{command.name}.conf"
        path.write_text(_section(f"program:{command.name}", options))


def _lives(pid: int) -> bool:
    """Whether a process runs. One that has ended may wait for its parent to ask about it: in a container, for long."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _how_it_ended(facts: Mapping[str, Any]) -> str:
    """In plain words; empty for one that never ended."""
    trouble = str(facts["spawnerr"])
    if trouble.startswith("Exited too quickly"):  # supervisord keeps no exit code of an early end
        return "it ended as soon as it was started"
    if trouble and not trouble.startswith("Bad exit code"):
        return f"it can't be started ({trouble})"
    if not facts["stop"]:
        return ""
    if facts["statename"] in _LIVING:  # supervisord has forgotten how
        return "it ended and was started again"
    code = int(facts["exitstatus"])
    return f"it ended with exit code {code}" if code >= 0 else "it was killed by a signal"


def _section(name: str, options: Mapping[str, object]) -> str:
    lines = [f"[{name}]"]
    for key, value in options.items():
        text = str(value)
        if "\n" in text or " ;" in text:
            raise ClusterError(f"supervisord can't hold this value of {key}: {text!r}")
        lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n\n"
