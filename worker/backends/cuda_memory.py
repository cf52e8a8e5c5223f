"""How device memory is shared out, and what to say when it does not suffice."""

from __future__ import annotations

from dataclasses import dataclass

from worker.backend import BackendError

_MIB = 1 << 20
GRAPHS_BYTES = 512 * _MIB
"""Set aside for CUDA graphs and the libraries' own workspaces, which are allocated after the KV cache."""

GPU_FRACTION = 0.9
"""Of the free memory of a GPU, where nothing is said."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes. `free` is what the device had before anything was loaded."""

    free: int
    fraction: float
    weights: int
    workspace: int  # activations, logits, row state
    bytes_per_block: int
    block_size: int

    @property
    def for_blocks(self) -> int:
        """What is left for the KV cache."""
        return int(self.free * self.fraction) - self.weights - self.workspace - GRAPHS_BYTES

    def num_blocks(self, asked: int | None, longest: int) -> int:
        """Blocks of the KV cache. `longest`: tokens that one sequence must be able to hold. Raises BackendError with the numbers."""
        fits = max(0, self.for_blocks // self.bytes_per_block)
        if asked is not None and asked > fits:
            raise BackendError(f"num_blocks: {asked} blocks do not fit. {self.describe(fits)}")
        blocks = fits if asked is None else asked
        if blocks * self.block_size < longest:
            raise BackendError(
                f"The KV cache would hold {blocks * self.block_size} tokens, one sequence needs {longest}. "
                f"{self.describe(fits)} Lower --max-model-len, --max-rows or --max-num-batched-tokens, or raise --memory-fraction."
            )
        return blocks

    def describe(self, fits: int) -> str:
        """The numbers as a sentence."""
        return (
            f"Of {self.free / _MIB:,.0f} MiB free, the fraction {self.fraction:g} gives {self.free * self.fraction / _MIB:,.0f}; "
            f"weights take {self.weights / _MIB:,.0f}, workspace and row state {self.workspace / _MIB:,.0f}, graphs "
            f"{GRAPHS_BYTES / _MIB:,.0f}; a block of {self.block_size} tokens takes {self.bytes_per_block / _MIB:.2f}, so {fits} fit."
        )
