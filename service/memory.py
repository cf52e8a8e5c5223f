"""How much memory a process may hold, and holds, for itself."""

from __future__ import annotations

from pathlib import Path

MOST = 0.9
"""Of the memory that is available, for weights and KV cache of all workers of a host, where nothing is said."""


def own_bytes(pid: int | None = None) -> int:
    """Bytes of a process's private memory that are in use (mapped files left out); this process's if None. 0 where it has ended."""
    try:
        status = Path(f"/proc/{'self' if pid is None else pid}/status").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
