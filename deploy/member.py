"""One child process of a local cluster: start, signals, log, end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from deploy.commands import Command
from deploy.readiness import ClusterError, ProcessDied, Ready, read_ready

# Receives (process name, line) for each line of output, and (process name, None) once the process has ended or
# closed its output. Called from a thread of the member's own.
Output = Callable[[str, str | None], None]


class Member:
    """One process of a LocalCluster, and its restarts. Methods that wait block."""

    def __init__(self, command: Command, log: Path, cwd: Path, output: Output | None) -> None:
        self.command = command
        self.log = log
        self.served = False  # was ready once: if it has ended since, that was on purpose
        self._cwd = cwd
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def ready(self) -> Ready:
        """What the ready file says. Raises ClusterError while there is none."""
        found = None if self.command.ready_file is None else read_ready(self.command.ready_file)
        if found is None:
            raise ClusterError(f"{self.name} is not ready")
        return found

    @property
    def address(self) -> str:
        """Where it serves: HOST:PORT, for Redis a URL."""
        return self.command.address or self.ready.address

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative is the number of the signal that killed it."""
        return None if self._process is None else self._process.poll()

    def log_text(self) -> str:
        """All it has written, over its restarts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self) -> None:
        """Start the process; `LocalCluster.wait_ready` waits for it."""
        if self._process is not None and self._process.poll() is None:
            raise ClusterError(f"{self.name} runs already")
        if self.command.ready_file is not None:
            self.command.ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command.argv,
                cwd=self._cwd,
                env={**os.environ, **self.command.env},
                stdin=subprocess.DEVNULL,
                stdout=log if self._output is None else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Out of the terminal's group: Ctrl-C must reach the cluster once, through us, in order.
                start_new_session=True,
            )
        if self._output is not None and self._process.stdout is not None:
            arguments = (self._process.stdout, self._output)
            self._reader = threading.Thread(target=self._pump, args=arguments, daemon=True)
            self._reader.start()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.wait(10)

    def suspend(self) -> None:
        """SIGSTOP: alive, and silent."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        """Send a signal to the running process."""
        self._running().send_signal(number)

    def terminate(self) -> None:
        """SIGTERM: drain and end. Nothing happens where it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()

    def wait(self, timeout: float) -> int:
        """The exit code, after at most `timeout` seconds. Raises subprocess.TimeoutExpired."""
        if self._process is None:
            raise ClusterError(f"{self.name} was never started")
        code = self._process.wait(timeout)
        if self._reader is not None:
            self._reader.join(5)
        return code

    def stop(self, timeout: float = 40.0) -> int:
        """SIGTERM, then SIGKILL after `timeout` seconds; the exit code."""
        self.terminate()
        return self.end(timeout)

    def end(self, timeout: float = 40.0) -> int:
        """Wait until a process that was told to stop has ended, SIGKILL after `timeout` seconds; the exit code."""
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.wait(10)

    def death(self) -> ProcessDied | None:
        """How it ended, or None while it runs."""
        code = self.returncode
        return None if code is None else ProcessDied(self.name, _describe(code), self.log)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise ClusterError(f"{self.name} does not run")
        return self._process

    def _pump(self, stream: IO[bytes], output: Output) -> None:
        with stream, self.log.open("ab") as log:
            for line in stream:
                log.write(line)
                log.flush()
                output(self.name, line.decode(errors="replace").rstrip("\n"))
        output(self.name, None)


def _describe(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
