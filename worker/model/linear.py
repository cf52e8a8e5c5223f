"""Matrix products of float32 activations with weights in the layout that the CPU reads fastest.

bfloat16 and float16 weights are packed once, at load, into FBGEMM's float16 panels (Khudia et al. 2021, arXiv:2101.05615): they stay
half as large as float32, and each is widened in a register on its way into a float32 multiply-add. On processors without
matrix units that is as fast as bfloat16 instructions at one row and 1.4 times as fast over a prompt, activations need no rounding,
and a row's sums run in one order however many rows are computed with it (held by tests/unit/test_worker_linear.py).

float16 holds a bfloat16 number exactly from 2**-17 up, and a smaller one to within 2**-25.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LARGEST = 65504.0  # in float16


class Linear:
    """y = x W^T + b for float32 x [rows, in] and y [rows, out]; the weight [out, in] is not needed after construction."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._packed = None
        if can_pack(weight):
            wide = None if bias is None else bias.float()
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), wide)
            del self._weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return F.linear(x.to(self._weight.dtype), self._weight, self._bias).float()
        result: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return result


def can_pack(weight: torch.Tensor) -> bool:
    """Whether FBGEMM runs on this machine and float16 can stand for this weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float16)
        and "fbgemm" in torch.backends.quantized.supported_engines
        and bool(weight.abs().max() <= _LARGEST)
    )
