"""Matrix products of float32 activations with weights in 8 bits (worker/cpu/product_int8.py)."""

from __future__ import annotations

import functools

import torch
from llvmlite import ir

from worker.backend import BackendError
from worker.cpu.compiler import Kernels
from worker.cpu.product import COLUMNS
from worker.cpu.product_int8 import GROUP, GROUP_BYTES, OFFSET, QUADS, ROW_WORDS, Form, add_product_int8, best_form
from worker.model.linear import PackedProduct

_PACKED_ROWS = 4096  # of a weight that are float32 at once while it is packed


class Int8Linear(PackedProduct):
    """The weight [out, in] is rounded to 8 bits and not needed after construction; activations are rounded at each product.

    Raises BackendError on a processor that cannot multiply bytes fast.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        out, inputs = weight.shape
        form = supported_form()
        panels = _pack(weight)
        groups = panels.shape[1]
        super().__init__(
            (out, inputs), panels, bias, _kernel(form), form.tile, (groups, GROUP), groups * ROW_WORDS
        )  # fmt: skip

    def weight_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight as it was rounded, float32 [n, in] for int64 ids [n]: an embedding that is the head as well."""
        panels, columns = ids // COLUMNS, ids % COLUMNS
        values, scales = _parts(self._panels)
        whole = (
            values[panels, :, :, columns]
            .float()
            .sub_(OFFSET)
            .mul_(scales[panels, :, columns].float()[:, :, None, None])
        )
        return whole.flatten(1)[:, : self.inputs].contiguous()


def supported_form() -> Form:
    """How this processor multiplies bytes. Raises BackendError where it cannot."""
    form = best_form()
    if form is None:
        raise BackendError("quantization: int8 needs a processor with AVX2, and this one has none; leave it out")
    return form


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """Panels uint8 [count, groups, GROUP_BYTES] of a weight [out, in], filled up with zeros to whole groups and whole panels."""
    out, inputs = weight.shape
    count, groups = -(-out // COLUMNS), -(-inputs // GROUP)
    panels = torch.empty(count, groups, GROUP_BYTES, dtype=torch.uint8)
    step = _PACKED_ROWS // COLUMNS
    for first in range(0, count, step):
        part = panels[first : first + step]
        rows = weight[first * COLUMNS : (first + step) * COLUMNS]
        whole = torch.zeros(len(part) * COLUMNS, groups * GROUP)
        whole[: len(rows), :inputs] = rows
        whole = whole.view(len(part), COLUMNS, groups, QUADS, 4)
        exact = whole.abs().amax((3, 4)) / 127
        scale = exact.bfloat16()
        # Rounded up, lest the largest weight be cut.
        scale = torch.where(scale < exact, scale.nextafter(torch.full_like(scale, torch.inf)), scale)
        divisor = torch.where(scale == 0, 1, scale).float()
        quantized = whole.div_(divisor[:, :, :, None, None]).round_().add_(OFFSET).to(torch.uint8)
        values, scales = _parts(part)
        values.copy_(quantized.permute(0, 2, 3, 1, 4))
        scales.copy_(scale.transpose(1, 2))
    return panels


def _parts(panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of panels: weights + OFFSET, uint8 [count, groups, 8, 32, 4], and scales, bfloat16 [count, groups, 32]."""
    values = panels[:, :, : GROUP * COLUMNS].view(*panels.shape[:2], QUADS, COLUMNS, 4)
    return values, panels[:, :, GROUP * COLUMNS :].view(torch.bfloat16)


@functools.cache
def _kernel(form: Form) -> Kernels:
    module = ir.Module("product_int8")
    add_product_int8(module, "product", form)
    return Kernels(str(module), ["product"])
