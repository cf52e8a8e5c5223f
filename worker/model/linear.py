"""Matrix products with weights in the layout that the CPU reads fastest.

In bfloat16 the weights are reordered once, at load, into oneDNN's blocked layout: about 1.6 times as fast at one row as reordering
at each call, and the output bits of a row do not depend on how many rows are computed with it. There is one exception, measured on
AVX512: with more than 1,024 inputs the single-row kernel sums in another order, so such a row is computed twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LONG_INPUT = 1024


class Linear:
    """y = x W^T + b for x [rows, in]; the weight [out, in] is not needed after construction."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight
        self._pair_single_row = self._packed and weight.shape[1] > _LONG_INPUT

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        if self._pair_single_row and x.shape[0] == 1:
            return self._product(x.expand(2, -1).contiguous())[:1]
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return result


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has native bfloat16 products for this weight on this machine."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
