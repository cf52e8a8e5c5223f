"""What ptxas says of a kernel's appetite: registers, stack, spills, static shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class KernelResources:
    """Per kernel: registers a thread; the rest in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse_resources(log: str) -> dict[str, KernelResources]:
    """The report of `ptxas -v` by kernel name. Kernels whose report is incomplete are left out."""
    found: dict[str, KernelResources] = {}
    name = ""
    stack: tuple[int, int, int] | None = None
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            name, stack = entry[1], None
        elif frame := _STACK.search(line):
            stack = (int(frame[1]), int(frame[2]), int(frame[3]))
        elif (used := _USED.search(line)) and name and stack is not None:
            shared = _SHARED.search(line)
            found[name] = KernelResources(int(used[1]), *stack, int(shared[1]) if shared else 0)
            name = ""
    return found
