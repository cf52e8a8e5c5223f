"""How to serve a model on one GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from worker.backend import BackendError
from worker.backends.cuda_memory import GPU_FRACTION

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class CudaSettings:
    """How to serve a model on one GPU. None means: decide from the model and the device."""

    dtype: str = "auto"  # auto: as stored, bfloat16 for float32 checkpoints
    max_model_len: int | None = None
    max_rows: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float = GPU_FRACTION  # of the memory that is free at the start
    device: int = 0
    capture_at_start: bool = False  # capture every bucket's graphs in warm_up; else each at its first use
    graphs: bool = True
    shared_prefix: bool = True  # many rows behind one prefix read it together (kernels/prefix_attention.cu)
    cubin_cache: Path | None = None
    poison: bool = False  # tests: cache and activations that nobody has written are NaN

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise BackendError(
                f"dtype: {self.dtype!r} is none of auto, {', '.join(DTYPES)}, which the cuda backend computes in"
            )
        for name in ("max_model_len", "max_rows", "max_num_batched_tokens", "block_size", "num_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BackendError(f"{name}: must be at least 1, not {value}")
        if self.max_rows > 65535:
            raise BackendError(f"max_rows: at most 65,535, not {self.max_rows}")
        if not 0 < self.memory_fraction <= 1:
            raise BackendError(f"memory_fraction: must be above 0 and at most 1, not {self.memory_fraction}")
