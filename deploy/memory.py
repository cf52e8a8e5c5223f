"""How local workers share a machine's memory: the pages of a KV cache on the CPU come as they are written, so each is a promise.

Workers that start together get an equal part of --memory-fraction, or of MOST, each; one that is added later takes of what those that
run have not been promised.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.readiness import read_ready
from service.memory import MOST, own_bytes


def fraction_of_each(workers: int, gpus: Sequence[str], environ: Mapping[str, str] = os.environ) -> float | None:
    """The --memory-fraction of workers that start together on one machine's CPU, or go round over `gpus`; None: as usual."""
    sharing = -(-workers // len(gpus)) if gpus else workers
    if sharing == 1:
        return None
    whole = float(environ.get("OCTAVO_MEMORY_FRACTION") or 0) or MOST
    return int(whole / sharing * 1e4) / 1e4  # never up: the sum must not be more than the whole


def promised_bytes(ready: Path) -> int:
    """Memory that the living workers with a ready file in this folder may still take, beyond what they hold now."""
    files = (read_ready(path) for path in sorted(ready.glob("*.json")))
    return sum(max(0, each.may_reach_bytes - own_bytes(each.pid)) for each in files if each is not None)
