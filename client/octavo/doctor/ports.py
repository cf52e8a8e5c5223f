"""Ports of this machine: who listens where, by Linux's /proc."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.doctor.findings import Finding, note, ok

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket. `pid` and `program` are unknown (0, "") where the process belongs to another user."""

    host: str
    port: int
    pid: int
    program: str

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.program} (process {self.pid})" if self.pid else "a process of another user"


def listeners(proc: Path = Path("/proc")) -> list[Listener]:
    """All listening TCP sockets of this network namespace; empty where the system has no /proc."""
    sockets: dict[str, tuple[str, int]] = {}  # by inode
    for name in ("tcp", "tcp6"):
        for fields in _rows(proc / "net" / name):
            if len(fields) > 9 and fields[3] == _LISTEN:
                sockets[fields[9]] = _address(fields[1])
    owners = _owners(proc, sockets.keys()) if sockets else {}
    found = []
    for inode, (host, port) in sockets.items():
        pid, program = owners.get(inode, (0, ""))
        found.append(Listener(host, port, pid, program))
    return found


def check_ports(
    wanted: Mapping[str, str],
    is_free: Callable[[str, int], bool],
    found: Iterable[Listener],
    own: Mapping[str, str],
) -> list[Finding]:
    """Whether `wanted` (what for, to HOST:PORT) can be bound; `own` names what of this checkout's cluster serves at an address."""
    by_port: dict[int, list[Listener]] = {}
    for listener in found:
        by_port.setdefault(listener.port, []).append(listener)
    findings = []
    for purpose, address in wanted.items():
        host, _, port = address.rpartition(":")
        check = f"port {port}"
        if address in own:
            findings.append(ok(check, f"taken by {own[address]} of this checkout's cluster"))
        elif is_free(host.strip("[]"), int(port)):
            findings.append(ok(check, f"free, for {purpose}"))
        else:
            who = ", ".join(sorted({listener.shown for listener in by_port.get(int(port), [])}))
            taken = f"taken by {who}" if who else "taken by a connection or a process that can't be seen from here"
            findings.append(note(check, f"{taken}: `make up` gives {purpose} the next free port and says which."))
    return findings


def _rows(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text(encoding="ascii").splitlines()[1:]]
    except OSError:  # no IPv6, or no /proc
        return []


def _address(text: str) -> tuple[str, int]:
    """`0100007F:C383` as host and port: words of 4 bytes, each in the machine's order."""
    digits, _, port = text.partition(":")
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    return str(ipaddress.ip_address(b"".join(words))), int(port, 16)


def _owners(proc: Path, inodes: Iterable[str]) -> dict[str, tuple[int, str]]:
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    owners: dict[str, tuple[int, str]] = {}
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            for file in (process / "fd").iterdir():
                inode = wanted.get(str(file.readlink()))
                if inode is not None:
                    owners[inode] = (int(process.name), _program(process))
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
    return owners


def _program(process: Path) -> str:
    """Its command, short; services of ours run as `python -m SERVICE`."""
    words = [word for word in (process / "cmdline").read_bytes().decode(errors="replace").split("\0") if word]
    if not words:
        return "?"
    shown = [Path(words[0]).name, *words[1:3]]
    return " ".join(shown)[:60]
