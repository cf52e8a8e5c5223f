"""Ties a process to its supervisor: `python deploy/tied.py COMMAND [ARGUMENT...]` becomes the command, which gets SIGTERM once the
supervisor is gone: supervisord, or `octavo serve`. A killed one would leave its processes behind otherwise, where no `make down`
finds them.

Standard library only, and quick: it runs before each start of a process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Never returns. Where the system has no such signal (it is Linux's), the command runs without."""
    supervisor = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))  # outlives exec
    if os.getppid() != supervisor:  # gone before it was asked for
        sys.exit(1)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
