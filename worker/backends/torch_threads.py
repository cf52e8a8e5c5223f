"""Thread settings that must stand in the environment before torch is imported. Imports no torch itself."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_SPIN_COUNT = "10000"


def quiet_threads(environ: MutableMapping[str, str] | None = None) -> None:
    """Bound how long OpenMP's threads spin for the next parallel region before they sleep.

    A step has some 400 regions a few microseconds apart. With a tenth of this bound each begins with a wake-up by the kernel, and
    a step of 16 rows took 1.4 times as long on two cores; ten times the bound brought nothing more and takes the cores from
    neighbours. Between steps the threads sleep.

    The worker's main calls this first; what the operator has set stays. GOMP_* is GNU's runtime (torch's wheels), KMP_* is
    Intel's, whose unit is milliseconds.
    """
    target = os.environ if environ is None else environ
    target.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    target.setdefault("KMP_BLOCKTIME", "0")
