"""A folder in memory for files that are written and read thousands of times."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")


@contextmanager
def scratch() -> Iterator[Path]:
    """The folder; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        yield Path(name)
