"""The machine: Python, processor, memory, disk, open files."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from octavo.doctor.findings import Finding, note, ok, problem, size_of

MIN_PYTHON = (3, 11)
_PROC = Path("/proc")
_GROUP = Path("/sys/fs/cgroup")
_LEAST_MEMORY, _MEMORY = 1 << 30, 2 << 30
_LEAST_DISK, _DISK = 1 << 30, 5 << 30
_LEAST_FILES, _FILES = 1024, 4096

# What the kernels of worker/cpu and torch gain from, best last, as /proc/cpuinfo spells it.
_EXTENSIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Facts of this machine; None where it does not tell."""

    python: tuple[int, int, int]
    executable: str
    system: str
    machine: str
    libc: str
    cpu_name: str
    cpu_flags: frozenset[str] | None
    cores: int  # that this process may run on
    quota: float | None  # cores' worth of time that the container grants
    memory_total: int | None
    memory_available: int | None  # within the container's limit, if there is one
    open_files: tuple[int, int] | None  # soft and hard limit


@dataclass(frozen=True, slots=True)
class Disk:
    """Where something is or will be written. `free` in bytes."""

    what: str
    path: Path
    free: int
    writable: bool


def read_host(proc: Path = _PROC, group: Path = _GROUP) -> Host:
    """Ask the operating system. Never fails: what can't be read is None."""
    fields = _cpu_fields(proc / "cpuinfo")
    memory = _meminfo(proc / "meminfo")
    return Host(
        python=(sys.version_info[0], sys.version_info[1], sys.version_info[2]),
        executable=sys.executable,
        system=platform.system(),
        machine=platform.machine(),
        libc=platform.libc_ver()[0],
        cpu_name=fields.get("model name", platform.processor() or platform.machine()),
        cpu_flags=frozenset(fields["flags"].split()) if "flags" in fields else None,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota=_quota(group / "cpu.max"),
        memory_total=memory.get("MemTotal"),
        memory_available=_within_limit(memory.get("MemAvailable"), group),
        open_files=_open_files(),
    )


def look_at_disk(what: str, path: Path) -> Disk:
    """The file system under `path`, or under where it would be made."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return Disk(what, path, shutil.disk_usage(there).free, os.access(there, os.W_OK))


def check_python(host: Host) -> list[Finding]:
    """The interpreter and the platform."""
    version = ".".join(map(str, host.python))
    if host.python[:2] < MIN_PYTHON:
        findings = [
            problem(
                "Python",
                f"{version} ({host.executable}) is too old: 3.11 or newer is needed.",
                "Install Python 3.11 or newer and name it: make up PYTHON=python3.11",
            )
        ]
    else:
        findings = [ok("Python", f"{version} ({host.executable})")]
    where = f"{host.system} on {host.machine}"
    if (host.system, host.machine, host.libc) == ("Linux", "x86_64", "glibc"):
        return [*findings, ok("platform", f"{where} with glibc")]
    libc = f" with {host.libc or 'another libc than glibc'}" if host.system == "Linux" else ""
    return [
        *findings,
        note("platform", f"{where}{libc}: the client runs here; the services are made for Linux on x86_64 with glibc."),
    ]


def check_cpu(host: Host) -> list[Finding]:
    """Cores, and the instructions that decide how fast the CPU backend is."""
    amount = f"{host.cores} core{'' if host.cores == 1 else 's'}"
    if host.quota is not None and host.quota < host.cores:
        amount += f", of which the container gets {host.quota:g} cores' worth of time"
    if host.cpu_flags is None:
        return [note("processor", f"{host.cpu_name}, {amount}; its instruction sets can't be read here.")]
    known = [name for flag, name in _EXTENSIONS.items() if flag in host.cpu_flags]
    found = f"{host.cpu_name}, {amount}; {', '.join(known) or 'no AVX2'}"
    if "avx2" in host.cpu_flags:
        return [ok("processor", found)]
    return [note("processor", f"{found}: a model on the CPU will be several times slower than on one with AVX2.")]


def check_memory(host: Host) -> list[Finding]:
    """Whether a small model and its processes fit at all; section "model" counts for the model chosen."""
    free = host.memory_available
    if free is None:
        return [note("memory", "This system does not tell how much memory is available.")]
    found = f"{size_of(free)} available" + (f" of {size_of(host.memory_total)}" if host.memory_total else "")
    if free < _LEAST_MEMORY:
        return [
            problem(
                "memory",
                f"{found}: even the smallest model needs 1 GiB.",
                "End other programs, or raise the container's limit.",
            )
        ]
    if free < _MEMORY:
        return [note("memory", f"{found}: enough for smollm2 and little else.")]
    return [ok("memory", found)]


def check_disk(disk: Disk) -> list[Finding]:
    """Room and permission to write."""
    found = f"{size_of(disk.free)} free at {disk.path}"
    if not disk.writable:
        return [problem(disk.what, f"{disk.path} can't be written by this user.", _other_place(disk))]
    if disk.free < _LEAST_DISK:
        return [problem(disk.what, f"{found}: too little.", f"Free some space. {_other_place(disk)}")]
    if disk.free < _DISK:
        return [note(disk.what, f"{found}: enough for small models.")]
    return [ok(disk.what, found)]


def _other_place(disk: Disk) -> str:
    if disk.what == "model cache":
        return "Or choose another directory for models: export OCTAVO_CACHE=/path/with/room"
    return "Or make the checkout on another disk."


def check_open_files(host: Host) -> list[Finding]:
    """A router holds a file for each connection."""
    if host.open_files is None:
        return [note("open files", "This system has no such limit to read.")]
    soft, hard = host.open_files
    found = "no limit" if soft < 0 else f"{soft:,} may be open in a process"
    if not 0 <= soft < _FILES:
        return [ok("open files", found)]
    wanted = 65_536 if hard < 0 else min(65_536, hard)
    if wanted <= soft:
        remedy = (
            "Raise the hard limit in /etc/security/limits.conf (nofile 65536), log in again and restart the cluster."
        )
    else:
        remedy = f"In the shell that starts the cluster: ulimit -n {wanted}"
    if soft < _LEAST_FILES:
        return [problem("open files", f"{found}: too few for a server.", remedy)]
    return [note("open files", f"{found}: each connection of a client takes one.", remedy)]


def _cpu_fields(path: Path) -> dict[str, str]:
    """The fields of the first processor."""
    fields: dict[str, str] = {}
    for line in _text(path).partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def _meminfo(path: Path) -> dict[str, int]:
    sizes = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[0].isdigit():
            sizes[name] = int(words[0]) * 1024
    return sizes


def _within_limit(available: int | None, group: Path) -> int | None:
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if available is None or not limit.isdigit() or not used.isdigit():
        return available
    return min(available, max(0, int(limit) - int(used)))


def _quota(path: Path) -> float | None:
    granted, _, period = _text(path).strip().partition(" ")
    return int(granted) / int(period) if granted.isdigit() and period.isdigit() and int(period) else None


def _open_files() -> tuple[int, int] | None:
    try:
        import resource
    except ModuleNotFoundError:  # not a POSIX system
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or hidden by a container: it does not tell
        return ""
