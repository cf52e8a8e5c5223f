"""How long work tells that it goes on. The library never prints; the command draws a bar from these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["wait", "download", "verify", "convert"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. Within a stage `done` never falls; a stage ends with `done == total`.

    `wait` means that another process is preparing the same model; it has neither count nor end.
    """

    stage: Stage
    done: int
    total: int | None  # None: not known beforehand
    unit: Literal["bytes", "tensors", ""]


# Called from the thread that called the library. It may raise to cancel: the work is then cleaned up.
ProgressCallback = Callable[[Progress], None]


def ignore_progress(_progress: Progress) -> None:
    """For callers that do not watch."""
