"""The CPU's kernels one by one against torch in double precision, with poison where nothing may be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llvmlite import ir

from worker.backend import BackendError
from worker.checkpoint.config import parse_config
from worker.cpu.compiler import Kernels
from worker.cpu.emitter import Emitter
from worker.model import layer_kernels
from worker.model.attention import AttentionPlan, RowSpan
from worker.model.kv_cache import PagedKVCache
from worker.model.layer_kernels import LayerKernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 16,
    hidden: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    intermediate: int = 96,
) -> LayerKernels:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    return LayerKernels(parse_config(Path("config.json"), config), block_size, dtype)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_exp_is_good_to_two_units_in_the_last_place() -> None:
    module = ir.Module("exp")
    e = Emitter(module, "exp")
    x_at, out_at, count = e.arguments(("x_at", "out_at", "count"))
    with e.loop(count, step=16) as i:
        e.write(e.exp(e.read(x_at, i, 16)), out_at, i)
    e.ret_void()
    x = torch.cat(
        (torch.linspace(-87, 88, 1 << 16), torch.tensor([0.0] * 12 + [torch.nan, -1e30, torch.inf, -torch.inf]))
    )
    out = torch.empty_like(x)
    Kernels(str(module), ["exp"]).launch("exp", (x.data_ptr(), out.data_ptr(), len(x)), 1)
    exact = x[:-16].double().exp()
    assert ((out[:-16] - exact) / exact).abs().max() < 2 * 2.0**-23
    assert (out[-16:-4] == 1).all()
    assert out[-4].isnan()
    assert out[-3] < 1e-37 and out[-2] > 1e38 and out[-1] < 1e-37


@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (9, 100), (33, 7)])
def test_norm_adds_what_the_layer_before_left(rows: int, hidden: int) -> None:
    x, wide, weight = random(rows, hidden), random(rows, hidden + 5, seed=2), random(hidden, seed=3)
    delta = wide[:, :hidden]  # a view, as a product may return it
    total = x + delta
    exact = total.double() / (total.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    out = make(hidden=hidden).norm(x, delta, weight)
    assert torch.equal(x, total)
    assert (out - exact).abs().max() < 1e-5


def test_silu_reaches_its_limits_and_keeps_nan() -> None:
    kernels = make(intermediate=6)
    gate = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 3e38, torch.nan], [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]])
    up = torch.full_like(gate, 2.0)
    out = kernels.silu(torch.cat((gate, up), 1))
    assert torch.allclose(out[1], torch.nn.functional.silu(gate[1]) * 2, rtol=1e-6)
    assert out[0, :5].tolist() == pytest.approx([0.0, 0.0, 0.0, 200.0, 6e38], abs=1e-7) or out[0, 4].isinf()
    assert out[0, 5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(16, 16), (20, 5), (128, 32), (6, 1)])
def test_append_rotates_scales_and_stores(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    heads, kv_heads, blocks, tokens = 6, 2, 40, 11
    kernels = make(heads, kv_heads, head_dim, block_size=block_size, dtype=dtype)
    cache = PagedKVCache(2, kv_heads, head_dim, blocks, block_size, dtype, poison=True)
    given = random(tokens, heads + 2 * kv_heads, head_dim)
    given[3, heads] = torch.nan
    angles = random(64, head_dim // 2, seed=2)
    rotations = torch.polar(torch.ones_like(angles), angles)
    positions = torch.arange(tokens) * 5
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(3))[:tokens]
    work = given.flatten(1).clone()
    kernels.append(work, rotations, positions, slots, cache, 1)
    turned = torch.view_as_real(
        torch.view_as_complex(given.unflatten(-1, (-1, 2))) * rotations[positions][:, None]
    ).flatten(-2)
    queries = work.view_as(given)[:, :heads]
    assert torch.allclose(queries, turned[:, :heads] * head_dim**-0.5, atol=1e-6)
    keys = (
        cache._data[1, 0].view(kv_heads, blocks, head_dim, block_size).transpose(2, 3).reshape(kv_heads, -1, head_dim)
    )
    values = cache._data[1, 1].view(kv_heads, -1, head_dim)
    expected = given[:, heads + kv_heads :].to(dtype)
    assert torch.equal(values[:, slots].transpose(0, 1), expected)
    stored = keys[:, slots].transpose(0, 1).float()
    assert torch.allclose(
        stored, turned[:, heads : heads + kv_heads], atol=1e-6, rtol=dtype_error(dtype), equal_nan=True
    )
    untouched = torch.ones(blocks * block_size, dtype=torch.bool)
    untouched[slots] = False
    assert keys[:, untouched].isnan().all() and values[:, untouched].isnan().all()
    assert cache._data[0].isnan().all()


def dtype_error(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"), [(3, 64, 16), (1, 20, 5), (4, 128, 32), (12, 6, 1), (2, 80, 8), (5, 16, 200)]
)
def test_attention_reads_what_it_should_and_nothing_else(
    dtype: torch.dtype, group: int, head_dim: int, block_size: int
) -> None:
    """Ragged rows with and without a window; every place of the cache that nobody wrote is NaN."""
    kv_heads = 2
    kernels = make(kv_heads * group, kv_heads, head_dim, block_size=block_size, dtype=dtype)
    lengths = [(0, 1), (0, 37), (130, 1), (127, 2), (257, 9), (40, 1)]
    needed = [-(-(start + count) // block_size) for start, count in lengths]
    order = np.random.default_rng(1).permutation(sum(needed)).astype(np.int32)
    cache = PagedKVCache(1, kv_heads, head_dim, sum(needed), block_size, dtype, poison=True)
    spans, contents, first, block = [], [], 0, 0
    for number, (start, count) in enumerate(lengths):
        blocks = order[block : block + needed[number]]
        block += needed[number]
        positions = np.arange(start + count)
        keys_values = random(start + count, 2 * kv_heads, head_dim, seed=number).to(dtype).float()
        slots = torch.from_numpy(blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size)
        heads = torch.cat((torch.zeros(len(positions), kv_heads * group, head_dim), keys_values), 1).flatten(1)
        unturned = torch.ones(1, head_dim // 2, dtype=torch.complex64)
        kernels.append(heads, unturned, torch.zeros(len(positions), dtype=torch.int64), slots, cache, 0)
        spans.append(RowSpan(start, count, first, blocks))
        contents.append(keys_values)
        first += count
    queries = random(first, kv_heads * group * head_dim, seed=9) * head_dim**-0.5
    for window in (None, 1, 50, 130):
        out = torch.full_like(queries, torch.nan)
        AttentionPlan(spans, group).attend(kernels.compiled, 0, cache, queries, out, window)
        for span, keys_values in zip(spans, contents, strict=True):
            part = slice(span.first, span.first + span.count)
            expected = reference(queries[part], keys_values, span, group, window)
            assert (out[part] - expected).abs().max() < 1e-5


def reference(
    queries: torch.Tensor, keys_values: torch.Tensor, span: RowSpan, group: int, window: int | None
) -> torch.Tensor:
    keys, values = keys_values.double().repeat_interleave(group, 1).transpose(0, 1).chunk(2)
    heads = queries.double().view(span.count, len(keys), -1).transpose(0, 1)
    position = torch.arange(span.start, span.start + span.count)[:, None]
    key = torch.arange(span.start + span.count)
    hidden = (key > position) if window is None else (key > position) | (key <= position - window)
    weights = (heads @ keys.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ values).transpose(0, 1).flatten(1)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    kernels = make(heads=1, kv_heads=1)
    cache = PagedKVCache(1, 1, 16, 20, 16, torch.float32, poison=True)
    keys_values = random(300, 2, 16)
    keys_values[:, 0] *= 200.0
    heads = torch.cat((torch.zeros(300, 1, 16), keys_values), 1).flatten(1)
    unturned = torch.ones(1, 8, dtype=torch.complex64)
    kernels.append(heads, unturned, torch.zeros(300, dtype=torch.int64), torch.arange(300), cache, 0)
    span = RowSpan(0, 300, 0, np.arange(19, dtype=np.int32))
    queries = random(300, 16, seed=2)
    out = torch.empty_like(queries)
    AttentionPlan([span], 1).attend(kernels.compiled, 0, cache, queries, out, None)
    assert (out - reference(queries, keys_values, span, 1, None)).abs().max() < 1e-3


def test_float16_is_refused_where_the_processor_cannot_store_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_kernels, "has_feature", lambda name: name != "f16c")
    with pytest.raises(BackendError, match="float16 needs a processor with F16C"):
        make(dtype=torch.float16)
    make(dtype=torch.bfloat16)
