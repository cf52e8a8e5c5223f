"""A model's own kernels beside its products: compiled for its sizes when it is loaded."""

from __future__ import annotations

import torch
from llvmlite import ir

from worker.backend import BackendError
from worker.checkpoint.config import ModelConfig
from worker.cpu.attention import ROWS, Shape, add_attention
from worker.cpu.compiler import Kernels, has_feature
from worker.cpu.elementwise import GRAIN, add_append, add_norm, add_silu
from worker.model.kv_cache import PagedKVCache


class LayerKernels:
    """Norm, append, attention and activation of one model. Activations are float32 [tokens, n], the last axis contiguous."""

    def __init__(self, config: ModelConfig, block_size: int, dtype: torch.dtype) -> None:
        group = config.num_heads // config.num_kv_heads
        storage = str(dtype).removeprefix("torch.")
        if storage == "float16" and not has_feature("f16c"):
            raise BackendError(
                "dtype: float16 needs a processor with F16C, this one has none; take bfloat16 or float32"
            )
        shape = Shape(config.num_kv_heads, group, config.head_dim, block_size, storage)
        module = ir.Module("layer")
        sizes = sorted({min(group, ROWS), ROWS})
        for rows in sizes:
            add_attention(module, f"attention_{rows}", shape, rows)
        add_norm(module, "norm", config.hidden_size)
        add_silu(module, "silu", config.intermediate_size)
        add_append(module, "append", shape)
        self.compiled = Kernels(str(module), (*(f"attention_{rows}" for rows in sizes), "norm", "silu", "append"))
        self._eps = torch.tensor(config.rms_norm_eps, dtype=torch.float32)
        self._scale = torch.tensor(config.head_dim**-0.5, dtype=torch.float32)

    def norm(self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x += delta, in place; the norm of the sum."""
        out = torch.empty_like(x)
        self._launch(
            "norm", len(x),
            x.data_ptr(), delta.data_ptr(), delta.stride(0), weight.data_ptr(), out.data_ptr(), self._eps.data_ptr(), len(x),
        )  # fmt: skip
        return out

    def silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [tokens, 2 n]: [tokens, n]."""
        out = gate_up.new_empty((len(gate_up), gate_up.shape[1] // 2))
        self._launch(
            "silu", len(out), gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), len(out)
        )  # fmt: skip
        return out

    def append(
        self,
        heads: torch.Tensor,
        rotations: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cache: PagedKVCache,
        layer: int,
    ) -> None:
        """Rotate and scale the queries of heads [tokens, (heads + 2 kv_heads) * head_dim] in place; keys and values go to the cache.

        rotations complex64 [positions, head_dim / 2], positions and slots int64 [tokens].
        """
        self._launch(
            "append", len(heads),
            heads.data_ptr(), heads.stride(0), rotations.data_ptr(), positions.data_ptr(), slots.data_ptr(),
            cache.keys_at(layer), cache.values_at(layer), cache.head_stride, self._scale.data_ptr(), len(heads),
        )  # fmt: skip

    def _launch(self, name: str, rows: int, *arguments: int) -> None:
        threads = min(torch.get_num_threads(), -(-rows // GRAIN))
        self.compiled.launch(name, arguments, threads)
