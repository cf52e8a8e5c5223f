"""Packed products: as exact as float32, and a row's bits alone are its bits among others."""

from __future__ import annotations

import pytest
import torch

from worker.cpu.compiler import has_feature
from worker.model.linear import Linear

ROWS = (1, 2, 3, 5, 7, 8, 13, 14, 15, 16, 17, 28, 31, 64, 100, 121, 240)


def make(out: int, inputs: int, dtype: torch.dtype) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, inputs, generator=generator) * 0.05).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    return Linear(weight, bias), weight, bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out", "inputs"), [(96, 64), (576, 1536), (3072, 576), (100, 2048), (33, 17)])
def test_a_row_keeps_its_bits_among_others(out: int, inputs: int, dtype: torch.dtype) -> None:
    linear, _, _ = make(out, inputs, dtype)
    x = torch.randn(512, inputs, generator=torch.Generator().manual_seed(1))
    all_rows = linear(x)
    for count in ROWS:
        assert torch.equal(linear(x[:count]), all_rows[:count])
        assert torch.equal(linear(x[-count:]), all_rows[-count:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_float32(dtype: torch.dtype) -> None:
    linear, weight, bias = make(300, 500, dtype)
    x = torch.randn(9, 500, generator=torch.Generator().manual_seed(2))
    exact = x.double() @ weight.double().t() + bias.double()
    assert linear(x).dtype == torch.float32
    assert (linear(x) - exact).abs().max() < 1e-5


def test_weights_are_not_rounded() -> None:
    """The smallest and the largest numbers of bfloat16 and float32 come back as they are."""
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.tensor([[2.0**-120, 3.0e38, -(2.0**-20) * 1.9921875]], dtype=dtype)
        assert torch.equal(Linear(weight)(torch.eye(3)).t(), weight.float())


def test_no_rows_and_one_column() -> None:
    assert Linear(torch.ones(5, 4))(torch.empty(0, 4)).shape == (0, 5)
    assert Linear(torch.ones(1, 1))(torch.full((3, 1), 2.0)).tolist() == [[2.0], [2.0], [2.0]]


def test_activations_may_be_a_view() -> None:
    linear, _, _ = make(64, 32, torch.bfloat16)
    wide = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(linear(wide[:, ::2]), linear(wide[:, ::2].clone()))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    linear, _, _ = make(576, 1536, torch.bfloat16)
    x = torch.randn(21, 1536, generator=torch.Generator().manual_seed(4))
    expected, before = linear(x), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(linear(x), expected)
    finally:
        torch.set_num_threads(before)


def test_small_tiles_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX-512 takes tiles of two rows."""
    x = torch.randn(240, 576, generator=torch.Generator().manual_seed(5))
    wide, weight, bias = make(960, 576, torch.bfloat16)
    monkeypatch.setattr("worker.model.linear.has_feature", lambda name: not wide_tiles())
    narrow = Linear(weight, bias)
    assert {wide._tile, narrow._tile} == {2, 8}
    for count in ROWS:
        assert torch.equal(narrow(x[:count]), wide(x[:count]))


def wide_tiles() -> bool:
    """Whether this processor takes the larger tiles by itself."""
    return bool(has_feature("avx512f"))
