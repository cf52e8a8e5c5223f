"""Packed products: as exact as float32, and a row's bits alone are its bits among others."""

from __future__ import annotations

import pytest
import torch

from worker.model.linear import Linear, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="no FBGEMM on this machine")

ROWS = (1, 2, 3, 5, 7, 8, 13, 14, 15, 16, 17, 28, 31, 64, 100, 121, 240)


def make(out: int, inputs: int, dtype: torch.dtype) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, inputs, generator=generator) * 0.05).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    return Linear(weight, bias), weight, bias


@pytest.mark.parametrize(("out", "inputs"), [(96, 64), (576, 1536), (3072, 576), (100, 2048), (33, 17)])
def test_a_row_keeps_its_bits_among_others(out: int, inputs: int) -> None:
    linear, _, _ = make(out, inputs, torch.bfloat16)
    x = torch.randn(512, inputs, generator=torch.Generator().manual_seed(1))
    all_rows = linear(x)
    for count in ROWS:
        assert torch.equal(linear(x[:count]), all_rows[:count])
        assert torch.equal(linear(x[-count:]), all_rows[-count:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_float32(dtype: torch.dtype) -> None:
    linear, weight, bias = make(300, 500, dtype)
    x = torch.randn(9, 500, generator=torch.Generator().manual_seed(2))
    exact = x.double() @ weight.double().t() + bias.double()
    assert linear(x).dtype == torch.float32
    assert (linear(x) - exact).abs().max() < 1e-5


def test_small_and_large_weights() -> None:
    """What float16 holds less exactly than bfloat16 is below 2**-17; what it can't hold at all is not packed."""
    tiny = torch.tensor([[2.0**-17 * 1.5, 2.0**-20 * 1.9921875]], dtype=torch.bfloat16)
    assert Linear(tiny)(torch.tensor([[1.0, 0.0]])).item() == 2.0**-17 * 1.5
    assert abs(Linear(tiny)(torch.tensor([[0.0, 1.0]])).item() - 2.0**-20 * 1.9921875) <= 2.0**-25
    huge = torch.tensor([[70000.0]], dtype=torch.bfloat16)
    assert not can_pack(huge)
    assert Linear(huge)(torch.ones(1, 1)).item() == float(huge.item())


def test_float32_is_left_as_it_is() -> None:
    weight = torch.randn(5, 4)
    assert not can_pack(weight)
    assert torch.equal(Linear(weight)(torch.eye(4)), weight.t())
