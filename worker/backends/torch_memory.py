"""How many blocks of KV cache this machine can hold. Errors are sentences with numbers."""

from __future__ import annotations

from pathlib import Path

from service.memory import MOST, own_bytes
from worker.backend import BackendError, BackendInfo

_GIB = 1024.0**3


def available_bytes() -> int:
    """Memory that can be taken without swapping: the kernel's estimate, within the container's limit if there is one."""
    available = _meminfo_available(Path("/proc/meminfo"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no cgroup v2 here, or no limit to read: the kernel's estimate stands alone
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def _meminfo_available(path: Path) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise BackendError(f"{path}: has no MemAvailable line; set the number of blocks explicitly")


def choose_num_blocks(
    num_blocks: int | None,
    memory_fraction: float | None,
    available: int,
    bytes_per_block: int,
    most_useful: int,
    *,
    weights: int = 0,
    promised: int = 0,
) -> int:
    """The number of blocks to allocate: as set, else what the fraction holds besides the weights, at most `most_useful`.

    All in bytes. Without a fraction half of what the weights leave, so that others find room, and never more than MOST of all. The
    fraction is of what was `available` before the weights were loaded, without what is `promised` to other workers:
    so workers that start together, each with its part of the fraction, promise no more than all of it, whoever looks first.
    Raises BackendError where not even one block fits, or where what was set does not.
    """
    left = max(0, available - promised)
    besides = "".join(
        f", {size / _GIB:.2f} GiB {what}"
        for size, what in ((promised, "are promised to other workers"), (weights, "hold the weights"))
        if size
    )
    if num_blocks is not None:
        need = num_blocks * bytes_per_block
        if need > left - weights:
            raise BackendError(
                f"out of memory: {num_blocks} KV cache blocks of {bytes_per_block / 2**20:.2f} MiB need "
                f"{need / _GIB:.2f} GiB, {available / _GIB:.2f} GiB are available{besides}; lower num_blocks"
            )
        return num_blocks
    room = int(left * (memory_fraction or MOST)) - weights
    if memory_fraction is None:
        room = min(room, (left - weights) // 2)
    fitting = room // bytes_per_block
    if fitting < 1:
        raise BackendError(
            f"out of memory: {memory_fraction or MOST:g} of the {available / _GIB:.2f} GiB available{besides}, leaves less than one "
            f"KV cache block of {bytes_per_block / 2**20:.2f} MiB; raise memory_fraction or free memory"
        )
    return min(fitting, most_useful)


def may_reach_bytes(info: BackendInfo) -> int:
    """What this process will hold once its KV cache is full: the cache's pages come as they are written. 0 for other backends, which
    hold all that they ever will."""
    if info.name != "torch":
        return 0
    return own_bytes() + sum(group.num_blocks * group.bytes_per_block for group in info.kv_groups)


def check_sequence_fits(num_blocks: int, block_size: int, max_model_len: int, bytes_per_block: int) -> None:
    """Raise BackendError unless one sequence of max_model_len tokens fits."""
    needed = -(-max_model_len // block_size)
    if needed > num_blocks:
        raise BackendError(
            f"out of memory: one sequence of max_model_len {max_model_len} needs {needed} KV cache blocks "
            f"({needed * bytes_per_block / _GIB:.2f} GiB), there are {num_blocks} "
            f"({num_blocks * bytes_per_block / _GIB:.2f} GiB); lower max_model_len or give the cache more memory"
        )
