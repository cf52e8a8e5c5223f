"""Products in 8 bits: what they compute, whose bits depend on nobody, and whose errors stay in their row."""

from __future__ import annotations

import pytest
import torch

from worker.backend import BackendError
from worker.cpu.compiler import has_feature
from worker.cpu.product_int8 import GROUP, Form, best_form
from worker.model import linear_int8
from worker.model.linear_int8 import Int8Linear

NEEDS = {Form.VNNI_512: "avx512vnni", Form.VNNI_256: "avxvnni", Form.AVX2: "avx2"}
SHAPES = [(96, 64), (576, 1536), (3072, 576), (100, 2048), (33, 17), (1, 1)]


def make(out: int, inputs: int) -> tuple[Int8Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, inputs, generator=generator) * 0.05).bfloat16()
    bias = torch.randn(out, generator=generator)
    return Int8Linear(weight, bias), weight, bias


def activations(rows: int, inputs: int) -> torch.Tensor:
    """Some channels are a hundred times the others, as in real models."""
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    x[:, :: max(1, inputs // 3)] *= 100
    return x


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each 32 of a row as 127ths of their largest, float64."""
    rows, inputs = x.shape
    whole = torch.nn.functional.pad(x, (0, -inputs % GROUP)).view(rows, -1, GROUP)
    largest = whole.abs().amax(2, keepdim=True)
    inverse = torch.where(largest == 0, 0, 127 / largest)
    return ((whole * inverse).round().double() * (largest / 127)).view(rows, -1)[:, :inputs]


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_products_are_those_of_the_rounded_numbers(out: int, inputs: int) -> None:
    """Only the sums of groups are in float32: all else is exact once both sides are rounded."""
    linear, _, bias = make(out, inputs)
    x = activations(9, inputs)
    weight = linear.weight_rows(torch.arange(out)).double()
    terms = rounded(x).abs() @ weight.abs().t() + bias.abs()
    assert ((linear(x) - (rounded(x) @ weight.t() + bias)).abs() <= 4e-6 * terms + 1e-6).all()


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_weights_lose_half_a_step_at_most(out: int, inputs: int) -> None:
    linear, weight, _ = make(out, inputs)
    back = linear.weight_rows(torch.arange(out))
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % GROUP)).view(out, -1, GROUP)
    step = (padded.abs().amax(2, keepdim=True) / 127 * (1 + 2**-7)).expand_as(padded).reshape(out, -1)[:, :inputs]
    assert ((back - weight.float()).abs() <= step / 2).all()
    picked = torch.tensor([out - 1, 0, out // 2])
    assert torch.equal(linear.weight_rows(picked), back[picked])
    assert linear.weight_rows(picked).is_contiguous()


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_a_row_keeps_its_bits_among_others(out: int, inputs: int) -> None:
    linear, _, _ = make(out, inputs)
    x = activations(300, inputs)
    all_rows = linear(x)
    for count in (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 64, 127, 129, 240):
        assert torch.equal(linear(x[:count]), all_rows[:count])
        assert torch.equal(linear(x[-count:]), all_rows[-count:])


@pytest.mark.parametrize("form", list(Form))
def test_all_processors_give_the_same_bits(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_feature(NEEDS[form]):
        pytest.skip(f"this processor has no {NEEDS[form]}")
    monkeypatch.setattr(linear_int8, "best_form", lambda: Form.AVX2)
    for out, inputs in SHAPES:
        x = activations(21, inputs)
        expected = make(out, inputs)[0](x)
        with monkeypatch.context() as patch:
            patch.setattr(linear_int8, "best_form", lambda: form)
            linear = make(out, inputs)[0]
        for count in (1, 2, 5, 8, 21):
            assert torch.equal(linear(x[:count]), expected[:count])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    linear, _, _ = make(576, 1536)
    x = activations(21, 1536)
    expected, before = linear(x), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(linear(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_shows(bad: float) -> None:
    linear, _, _ = make(96, 64)
    x = activations(9, 64)
    good = linear(x)
    x[4, 40] = bad
    spoilt = linear(x)
    assert not spoilt[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(spoilt[others], good[others])


def test_extremes() -> None:
    """Zeros, the largest and the smallest numbers, full-scale sums of the deepest product there is."""
    linear = Int8Linear(torch.zeros(40, 64))
    assert torch.equal(linear(activations(3, 64)), torch.zeros(3, 40))
    assert torch.equal(make(96, 64)[0](torch.zeros(1, 64))[0], make(96, 64)[2])
    assert linear(torch.empty(0, 64)).shape == (0, 40)
    tiny = Int8Linear(torch.eye(64))(torch.full((1, 64), 1e-42))
    assert torch.equal(tiny, torch.zeros(1, 64))
    assert Int8Linear(torch.full((1, 32), -1e37))(torch.full((1, 32), 1e-36)).item() == pytest.approx(-320, rel=0.02)
    deep = Int8Linear(torch.full((32, 65_536), -1.0))(torch.full((1, 65_536), -1.0))
    assert deep[0].tolist() == pytest.approx([65_536.0] * 32, rel=0.01)


def test_activations_may_be_a_view() -> None:
    linear, _, _ = make(64, 32)
    wide = activations(5, 64)
    assert torch.equal(linear(wide[:, ::2]), linear(wide[:, ::2].clone()))


def test_a_processor_without_the_instructions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cpu.product_int8.has_feature", lambda name: False)
    assert best_form() is None
    with pytest.raises(BackendError, match="int8 needs a processor with AVX2"):
        make(32, 32)
