"""Asks the system for a model's files before anything else of a start, so that the disk works while Python imports.

Imports nothing heavy.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

_WINDOW_BYTES = 1 << 20  # the kernel cuts a longer wish down to about this

log = logging.getLogger("octavo.worker")


def prefetch(model_dir: Path) -> threading.Thread:
    """Read ahead every *.safetensors of a directory into the page cache, in the background."""
    thread = threading.Thread(
        target=_wish, args=(sorted(model_dir.glob("*.safetensors")),), name="prefetch", daemon=True
    )
    thread.start()
    return thread


def _wish(files: list[Path]) -> None:
    try:
        for path in files:
            with path.open("rb") as file:
                for offset in range(0, path.stat().st_size, _WINDOW_BYTES):
                    os.posix_fadvise(file.fileno(), offset, _WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
    except OSError as error:
        # Only a head start: whoever loads the file says what is wrong with it.
        log.info("no read-ahead of the weights: %s", error)
