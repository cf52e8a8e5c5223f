"""Embedding, norms, SiLU, the QKV epilogue and matrix-vector products without a GPU: the checks of tests/gpu on small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from kernels.operands import Parts
from tests.emulator.compile import Builder
from tests.emulator.library import EmulatedOps
from tests.gpu.gpu_harness import error, make_shape, makers
from tests.gpu.test_gpu_layers import (
    check_embedding_norms_and_silu,
    check_fused_products,
    check_matvec,
    check_qkv_epilogue,
)


@pytest.mark.parametrize("hidden", [256, 576])
def test_embedding_norms_and_silu(builder: Builder, hidden: int) -> None:
    check_embedding_norms_and_silu(EmulatedOps(builder, make_shape(hidden=hidden, wide=3 * hidden)), hidden, "cpu")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_qkv_epilogue(builder: Builder, head_dim: int, qk_norm: bool) -> None:
    shape = make_shape(7, 1, head_dim, qk_norm=qk_norm)
    check_qkv_epilogue(EmulatedOps(builder, shape), shape, "cpu")


@pytest.mark.parametrize("k", [512, 576, 3072])
@pytest.mark.parametrize("n", [96, 130])
def test_matvec(builder: Builder, k: int, n: int) -> None:
    ahead = (f"matvec-{k}-8", f"matvec-{k}-16")
    check_matvec(EmulatedOps(builder, make_shape(hidden=k, wide=512), ahead), n, k, "cpu")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "hidden", "biased"),
    [(4, 2, 64, 256, False), (4, 2, 64, 256, True), (3, 1, 64, 576, True), (2, 1, 128, 512, False)],
)
def test_fused_products_give_the_bits_of_the_kernels_they_replace(
    builder: Builder, heads: int, kv_heads: int, head_dim: int, hidden: int, biased: bool
) -> None:
    shape = make_shape(heads, kv_heads, head_dim, hidden=hidden, wide=640)
    check_fused_products(EmulatedOps(builder, shape, ("fused-8", "fused-16")), shape, biased, "cpu")


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_a_norm_and_an_epilogue_add_up_parts_of_a_product(builder: Builder, splits: int) -> None:
    """Of products in parts, which gemm_wgmma.cu leaves: the same bits as of their sums."""
    tokens, shape = 3, make_shape(6, 1, 64, hidden=512)
    ops = EmulatedOps(builder, shape)
    random, ints, poisoned = makers("cpu")
    parts = Parts(random(splits, tokens, 512, seed=1).float(), splits)
    total = parts.sums[0].clone()
    for part in parts.sums[1:]:
        total += part
    product, before = total.to(torch.bfloat16), random(tokens, 512, seed=4)
    bias, norm = random(512, seed=2), random(512, seed=3)
    found, wanted, residuals = poisoned(tokens, 512), poisoned(tokens, 512), (before.clone(), before.clone())
    ops.rms_norm_add_parts(parts, residuals[0], bias, norm, found, tokens, 1e-5)
    ops.rms_norm_add(product, residuals[1], bias, norm, wanted, tokens, 1e-5)
    assert torch.equal(found, wanted) and torch.equal(*residuals)
    cos, sin, place = torch.rand(9, 64), torch.rand(9, 64), ints([0, 7, 5])
    caches, queries = (poisoned(2, 2, 1, 16, 64), poisoned(2, 2, 1, 16, 64)), poisoned(tokens, 512)
    ops.qkv_epilogue(queries, bias, (None, None), cos, sin, place, place, caches[0], tokens, 1e-5, parts)
    ops.qkv_epilogue(product, bias, (None, None), cos, sin, place, place, caches[1], tokens, 1e-5)
    assert torch.equal(queries[:, : 6 * 64], product[:, : 6 * 64])
    assert torch.equal(caches[0].view(torch.int16), caches[1].view(torch.int16))


def test_float16(builder: Builder) -> None:
    ops = EmulatedOps(builder, replace(make_shape(hidden=512, wide=512), float16=True))
    random, _, _ = makers("cpu")
    weight, x = random(96, 512, seed=1, scale=0.05).half(), random(3, 512, seed=2).half()
    out = torch.full((3, 96), torch.nan, dtype=torch.float16)
    ops.matvec(weight, x, out, 3)
    assert error(out, x.double() @ weight.double().t()) < 1e-3
    wide, activated = random(3, 1024, seed=3).half(), torch.full((3, 512), torch.nan, dtype=torch.float16)
    ops.silu_mul(wide, None, activated, 3)
    gate, up = wide.float().chunk(2, -1)
    assert error(activated, F.silu(gate) * up) < 1e-3
