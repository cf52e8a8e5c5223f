"""The seam between the worker and a device.

`torch` is the reference and the CPU backend, `cuda` runs the kernels of kernels/, `mock` computes a hash instead of a model and
needs no torch. A backend owns weights, KV cache and row state. One thread (the launch thread of worker/engine.py) drives it, in the
order in which the operations stand below. `collect` alone is called by another thread, once for each step that was sampled; it may
lag behind by up to the run-ahead depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from worker.step import Int32Array, Step, StepOutput

Progress = Callable[[str, int, int], None]
"""(what, done, total): called while weights load."""


class BackendError(Exception):
    """The device or a load failed. The text is for an operator and names what to do."""


class FatalBackendError(BackendError):
    """The device can't be used any more (a CUDA error): the process must end."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """One kind of KV cache: all layers that share a block table."""

    id: int
    block_size: int  # tokens a block
    num_blocks: int
    bytes_per_block: int  # over all layers of the group
    window: int | None  # sliding window in tokens; None: full attention


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a backend can hold, known once `load` has returned."""

    name: str  # "torch", "cuda", "mock"
    numerics: str  # everything that decides bits: kernels' version, architecture, dtype; hashed into numerics_digest
    kv_dtype: str  # of the KV cache, as "bfloat16"
    vocab_size: int
    max_model_len: int
    max_rows: int
    max_num_batched_tokens: int
    kv_groups: tuple[KVGroup, ...]


class Masks(Protocol):
    """What the constrained rows of a step may choose."""

    @property
    def places(self) -> Int32Array:
        """int32 [C]: their indices into the step's sampling rows."""

    def wait(self) -> Int32Array:
        """int32 [C, vocab / 32], one bit a token, the lowest bit first. A row of zeros ends as MASK_EMPTY."""


class Backend(Protocol):
    """A device that runs steps."""

    def load(self, progress: Progress) -> BackendInfo:
        """Load weights and allocate the KV cache. Raises BackendError in words, before anything is served."""

    def warm_up(self) -> None:
        """Run one real step, so that the first request pays for nothing."""

    def reset(self) -> None:
        """Forget every row and block table (a new epoch). Steps already enqueued have been collected."""

    def begin(self, step: Step) -> None:
        """Apply the step's changes to row state: freed rows, new rows, appended blocks and tokens."""

    def forward(self, step: Step) -> None:
        """Enqueue the model over the scheduled tokens; keys and values go through the block table."""

    def sample(self, step: Step, masks: Masks | None = None) -> None:
        """Enqueue the choice of one token in each sampling row; it becomes the row's next known token.

        `masks`: of the sampling rows that decode under a grammar; waited for after everything else was done, for they may wait for
        the result of the step before.
        """

    def collect(self) -> StepOutput:
        """Wait for the oldest step that was sampled and not collected yet, and return what it made."""

    def close(self) -> None:
        """Release the device."""
