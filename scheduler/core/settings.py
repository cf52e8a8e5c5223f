"""What the core is told at start: its own settings, and what each worker says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.core.errors import InvalidField

MAX_RUN_AHEAD = 4
MAX_ROWS = 1 << 16
MAX_BLOCKS = 1 << 23
MAX_ROW_TOKENS = 1 << 31
"""max_rows times max_model_len in whole blocks. What a worker says of itself is not believed beyond these: tables are made of it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Policy of one scheduler. Raises InvalidField."""

    max_waiting_requests: int = 4_096
    """Requests that one tenant alone may have waiting, over all models. Several share up to twice as many, as waiting.py says;
    requests of lower priority don't count, but all together are never more than four times as many."""
    max_waiting_tokens: int = 16_000_000
    """The same of their prompt and output ids: 8 to 12 bytes each in this process."""
    watermark: float = 0.01
    """Share of a worker's blocks that stays available when a request is admitted beside others. Running requests may
    use it, so that a newcomer isn't preempted by the next block that its neighbours need."""
    max_candidates: int = 16
    """Waiting requests looked at in one plan beyond those that are admitted and those that the worker could never run."""
    max_preempting: int = 8
    """Waiting requests that take the place of running ones of lower priority in one plan."""
    max_shared_tokens: int = 2_048
    """Tokens of a step in which several rows compute, where it is less than a worker's budget: long enough for an H100 to multiply at
    full speed (7 ms at a billion weights), short enough for those who wait for their next token. At least twice a worker's rows."""
    prefix_caching: bool = True
    no_worker_timeout: float = 60.0
    """Seconds that requests wait for a worker of their model after the last one left, before they fail."""
    max_failures_alone: int = 5
    """Failed steps or lost workers that ran nothing but one request and got no token further, before it fails as POISON."""

    def __post_init__(self) -> None:
        for name in (
            "max_waiting_requests",
            "max_waiting_tokens",
            "max_candidates",
            "max_shared_tokens",
            "max_preempting",
            "max_failures_alone",
        ):
            if getattr(self, name) < 1:
                raise InvalidField(name, "must be at least 1")
        if not 0.0 <= self.watermark < 1.0:
            raise InvalidField("watermark", "must be in [0, 1)")
        if self.no_worker_timeout < 0:
            raise InvalidField("no_worker_timeout", "must not be negative")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker holds and can take, from its Hello. Raises InvalidField."""

    model: str
    model_digest: bytes
    max_rows: int
    """Rows, so requests that run at once (max_num_seqs)."""
    max_num_batched_tokens: int
    """Token budget of a step; at least max_rows, so that a decode always fits."""
    max_model_len: int
    block_size: int
    num_blocks: int
    window: int | None = None
    """Sliding window in tokens: position p reads the keys (p - window, p]. None is full attention."""
    kv_dtype: str = "bfloat16"
    hash_version: int = 1
    run_ahead: int = 2
    """Plans in flight at most, 1 to 4."""
    grammars: bool = False
    """Whether it decodes under grammars."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_model_len", "block_size", "num_blocks"):
            if not 1 <= getattr(self, name) <= 2**31 - 1:
                raise InvalidField(name, "must be in [1, 2^31)")
        if self.max_rows > MAX_ROWS:
            raise InvalidField("max_rows", f"must be at most {MAX_ROWS}")
        if self.num_blocks > MAX_BLOCKS:
            raise InvalidField("num_blocks", f"must be at most {MAX_BLOCKS}")
        if self.max_rows * self.max_blocks_per_row * self.block_size > MAX_ROW_TOKENS:
            raise InvalidField("max_model_len", f"in whole blocks, times max_rows must be at most {MAX_ROW_TOKENS}")
        if not self.max_rows <= self.max_num_batched_tokens <= 2**31 - 1:
            raise InvalidField("max_num_batched_tokens", f"must be at least max_rows = {self.max_rows}")
        if self.window is not None and self.window < 1:
            raise InvalidField("window", "must be at least 1")
        if not 1 <= self.run_ahead <= MAX_RUN_AHEAD:
            raise InvalidField("run_ahead", f"must be in [1, {MAX_RUN_AHEAD}]")

    @property
    def max_blocks_per_row(self) -> int:
        """Width of the block table."""
        return -(-self.max_model_len // self.block_size)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that one request owns at most while its first `num_tokens` tokens are computed."""
        blocks = -(-num_tokens // self.block_size)
        if self.window is None:
            return blocks
        # Keys of the window before a chunk, the chunk itself, and one block that either end may cut.
        span = self.window + self.max_num_batched_tokens
        return min(blocks, -(-span // self.block_size) + 1)

    def first_live_block(self, position: int) -> int:
        """Index of the first block that a query at `position` still reads; those before it are behind the window."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.block_size
