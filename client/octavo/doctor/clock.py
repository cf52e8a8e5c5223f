"""The clock: TLS certificates, logs and traces of several machines depend on it, tokens' order does not."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

from octavo.doctor.findings import Finding, note, ok, problem

_DAY = 86_400.0
_MOST_APART = 1.0  # seconds between this machine and Redis's
_TIMEX_BYTES = 256  # the kernel's struct timex is 208 bytes on 64-bit Linux
_STATUS_AT = 40
_UNSYNCHRONISED = 0x40


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Seconds since the epoch. `synchronised`: what the kernel has been told; None where it can't be asked."""

    now: float
    installed: float  # when this package was put here, which can't be in the future
    synchronised: bool | None


def read_clock() -> Clock:
    """Ask the kernel; changes nothing."""
    return Clock(now=time.time(), installed=Path(__file__).stat().st_mtime, synchronised=_synchronised())


def check_clock(clock: Clock) -> list[Finding]:
    """Whether the time can be right, and whether anything keeps it right."""
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(clock.now))
    if clock.now < clock.installed - _DAY:
        made = time.strftime("%Y-%m-%d", time.gmtime(clock.installed))
        return [
            problem(
                "clock",
                f"{shown} is before these programs were installed ({made}): certificates will be refused.",
                "Set the clock: sudo timedatectl set-ntp true",
            )
        ]
    if clock.synchronised is False:
        remedy = "Where machines form one cluster, let NTP keep their clocks: sudo timedatectl set-ntp true"
        return [note("clock", f"{shown}; nothing tells the kernel that it is synchronised.", remedy)]
    return [ok("clock", shown + (", synchronised" if clock.synchronised else ""))]


def check_clock_of_redis(ahead: float) -> list[Finding]:
    """`ahead`: seconds that Redis's machine is ahead of this one."""
    if abs(ahead) <= _MOST_APART:
        return [ok("clock of Redis", f"{abs(ahead):.2f} s apart from this machine's")]
    which = "ahead of" if ahead > 0 else "behind"
    return [
        note(
            "clock of Redis",
            f"{abs(ahead):.1f} s {which} this machine's: logs of the two can't be compared.",
            "On both machines: sudo timedatectl set-ntp true",
        )
    ]


def _synchronised() -> bool | None:
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):  # not Linux
        return None
    # Zeroes mean: change nothing, only tell.
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    if adjtimex(timex) < 0 or ctypes.sizeof(ctypes.c_long) != 8:
        return None
    status = int.from_bytes(timex.raw[_STATUS_AT : _STATUS_AT + 4], "little")
    return not status & _UNSYNCHRONISED
