"""Embedding, norms, SiLU, the QKV epilogue and matrix-vector products against float32 on the same device."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from kernels.operands import NormInput, Placing
from kernels.ops import KernelOps
from kernels.product_rows import PARTS_ROWS
from kernels.shapes import KernelShape
from tests.gpu.gpu_harness import error, make_ops, make_shape, makers, on

pytestmark = pytest.mark.gpu


def check_embedding_norms_and_silu(ops: KernelOps, hidden: int, device: str) -> None:
    """For a shape of intermediate size 3 * hidden."""
    random, ints, poisoned = makers(device)
    table, ids = random(100, hidden), ints([5, 99, 0, 5, -1])
    out = poisoned(5, hidden)
    ops.embedding(table, ids, out, 5)
    assert torch.equal(out, table[[5, 99, 0, 5, 0]])

    weight, bias = random(hidden, seed=1), random(hidden, seed=2)
    residual, x = random(5, hidden, seed=3), random(5, hidden, seed=4)
    ops.rms_norm(residual, weight, out, 5, 1e-5)
    assert error(out, F.rms_norm(residual.float(), (hidden,), weight.float(), 1e-5)) < 5e-3
    expected_sum = (residual + (x + bias)).float()
    before = residual.clone()
    gathered = poisoned(3, hidden)
    ops.rms_norm_add(x, residual, bias, weight, gathered, 3, 1e-5, ints([4, -1, 2]))
    expected = F.rms_norm(expected_sum, (hidden,), weight.float(), 1e-5)
    assert error(gathered[[0, 2]], expected[[4, 2]]) < 5e-3
    assert torch.isnan(gathered[1]).all()
    assert torch.equal(residual[[0, 1, 3]], before[[0, 1, 3]])
    ops.rms_norm_add(x, before, bias, weight, out, 5, 1e-5)
    assert torch.equal(before.float(), expected_sum)
    assert error(out, expected) < 5e-3

    wide = random(7, 6 * hidden, seed=5)
    activated = poisoned(7, 3 * hidden)
    ops.silu_mul(wide, None, activated, 7)
    gate, up = wide.float().chunk(2, -1)
    assert error(activated, F.silu(gate) * up) < 5e-3


@pytest.mark.parametrize("hidden", [576, 2048, 4096])
def test_embedding_norms_and_silu(hidden: int) -> None:
    check_embedding_norms_and_silu(make_ops(make_shape(hidden=hidden, wide=3 * hidden)), hidden, "cuda")


def check_qkv_epilogue(ops: KernelOps, shape: KernelShape, device: str) -> None:
    random, ints, poisoned = makers(device)
    heads, kv_heads, head_dim, qk_norm, tokens = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.qk_norm, 9
    qkv = random(tokens, shape.qkv_size, seed=1)
    bias, q_norm, k_norm = random(shape.qkv_size, seed=2), random(head_dim, seed=3), random(head_dim, seed=4)
    angles = torch.outer(torch.arange(40.0), torch.rand(head_dim // 2)).to(device)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    positions, slots = ints([3, 17, 0, 39, 5, 6, 7, 8, -1]), ints([35, 2, 79, 16, 0, 1, 50, 51, -1])
    cache = poisoned(2, 5, kv_heads, 16, head_dim)
    x = (qkv + bias).float().view(tokens, -1, head_dim)
    q, k, v = x.split((heads, kv_heads, kv_heads), 1)
    if qk_norm:
        q, k = F.rms_norm(q, (head_dim,), q_norm.float(), 1e-6), F.rms_norm(k, (head_dim,), k_norm.float(), 1e-6)
    at = positions.clamp(min=0).long()
    q, k = (part * cos[at][:, None] + part.roll(head_dim // 2, -1) * sin[at][:, None] for part in (q, k))
    untouched = qkv[8].clone()
    ops.qkv_epilogue(qkv, bias, (q_norm, k_norm), cos, sin, positions, slots, cache, tokens, 1e-6)
    assert error(qkv[:8, : shape.q_size].view(8, heads, head_dim), q[:8]) < 5e-3
    assert torch.equal(qkv[8], untouched)
    written = cache.transpose(2, 3).reshape(2, 80, kv_heads, head_dim)
    place = slots[:8].long()
    assert error(written[0, place], k[:8]) < 5e-3
    assert torch.equal(written[1, place].float(), v[:8])
    others = torch.ones(80, dtype=torch.bool, device=device).index_fill(0, place, False)
    assert torch.isnan(written[:, others]).all()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_qkv_epilogue(head_dim: int, qk_norm: bool) -> None:
    shape = make_shape(7, 1, head_dim, qk_norm=qk_norm)
    check_qkv_epilogue(make_ops(shape), shape, "cuda")


def check_matvec(ops: KernelOps, n: int, k: int, device: str) -> None:
    random, _, poisoned = makers(device)
    weight, x = random(n, k, seed=1, scale=0.05), random(16, k, seed=2)
    exact = x.double() @ weight.double().t()
    alone = []
    for tokens in (1, 2, 3, 7, 8, 9, 15, 16):
        out, floats = poisoned(17, n), poisoned(17, n + 6, dtype=torch.float32)
        ops.matvec(weight, x[:tokens].clone(), out, tokens)
        ops.matvec_float(weight, x[:tokens].clone(), floats, tokens)
        assert error(out[:tokens], exact[:tokens]) < 4e-3
        assert error(floats[:tokens, :n], exact[:tokens]) < 1e-5
        assert torch.isnan(out[tokens:]).all()
        assert torch.isnan(floats[:, n:]).all()
        alone.append(floats[0, :n].clone())
    for results in zip(*alone, strict=True):
        assert all(torch.equal(results[0], other) for other in results), (
            "a row's bits depend on how many rows there are"
        )
    silu, bias = poisoned(16, n // 2), random(n, seed=3)
    ops.matvec_silu(weight, bias, x, silu, 16)
    gate, up = ((exact.to(torch.bfloat16) + bias).double()).chunk(2, -1)
    assert error(silu, F.silu(gate) * up) < 8e-3


@pytest.mark.parametrize("k", [512, 576, 2048, 8192])
@pytest.mark.parametrize("n", [96, 2050])
def test_matvec(k: int, n: int) -> None:
    check_matvec(make_ops(make_shape(hidden=k, wide=512)), n, k, "cuda")


def check_fused_products(ops: KernelOps, shape: KernelShape, biased: bool, device: str) -> None:
    """For a shape of intermediate size 640."""
    random, ints, poisoned = makers(device)
    kv_heads, head_dim, hidden = shape.num_kv_heads, shape.head_dim, shape.hidden_size
    qkv_weight, wide_weight = (
        random(shape.qkv_size, hidden, seed=1, scale=0.05),
        random(1280, hidden, seed=2, scale=0.05),
    )
    head = random(1003, hidden, seed=3, scale=0.05)
    bias = random(shape.qkv_size, seed=4) if biased else None
    wide_bias, added_bias = (random(1280, seed=5), random(hidden, seed=6)) if biased else (None, None)
    weight, table = random(hidden, seed=7), random(50, hidden, seed=8)
    angles = torch.outer(torch.arange(40.0), torch.rand(head_dim // 2)).to(device)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    for tokens in (1, 2, 3, 4, 5, 8, 9, 16):
        residual, added = random(tokens, hidden, seed=9), random(tokens, hidden, seed=10)
        positions, slots = ints(list(range(3, 3 + tokens))), ints([(7 * i + 5) % 80 for i in range(tokens)])
        if tokens > 1:
            positions[tokens - 1], slots[tokens - 1] = -1, -1

        def place(qkv: torch.Tensor, positions: torch.Tensor = positions, slots: torch.Tensor = slots) -> Placing:
            return Placing(cos, sin, positions, slots, qkv)

        summed, normed = residual.clone(), poisoned(tokens, hidden)
        ops.rms_norm_add(added, summed, added_bias, weight, normed, tokens, 1e-5)
        qkv, cache = poisoned(tokens, shape.qkv_size), poisoned(2, 5, kv_heads, 16, head_dim)
        ops.matvec(qkv_weight, normed, qkv, tokens)
        ops.qkv_epilogue(qkv, bias, (None, None), cos, sin, positions, slots, cache, tokens, 1e-5)
        activated, logits = poisoned(tokens, 640), poisoned(tokens, 1004, dtype=torch.float32)
        ops.matvec_silu(wide_weight, wide_bias, normed, activated, tokens)
        ops.matvec_float(head, normed, logits, tokens)
        valid = slice(0, max(1, tokens - 1))

        def same(left: torch.Tensor, right: torch.Tensor) -> bool:
            return torch.equal(left.view(torch.int16), right.view(torch.int16))

        fused, written = poisoned(tokens, shape.qkv_size), poisoned(2, 5, kv_heads, 16, head_dim)
        ops.matvec_qkv(qkv_weight, bias, normed, place(fused), written, tokens)
        assert same(fused[valid, : shape.q_size].contiguous(), qkv[valid, : shape.q_size].contiguous())
        assert same(written, cache)
        if tokens > 4:
            assert not ops.fits_fused(tokens)
            continue
        fused, written = poisoned(tokens + 1, shape.qkv_size), poisoned(2, 5, kv_heads, 16, head_dim)
        out = poisoned(tokens + 1, hidden)
        x = NormInput(added, residual, added_bias, weight, None, out, 1e-5)
        ops.norm_qkv(qkv_weight, bias, x, place(fused), written, tokens)
        assert same(fused[valid, : shape.q_size].contiguous(), qkv[valid, : shape.q_size].contiguous())
        assert same(written, cache)
        assert torch.equal(out[:tokens], summed)
        assert torch.isnan(out[tokens:]).all()
        silu, found = poisoned(tokens + 1, 640), poisoned(tokens + 1, 1004, dtype=torch.float32)
        ops.norm_silu(wide_weight, wide_bias, x, silu, tokens)
        assert torch.equal(silu[:tokens], activated)
        assert torch.isnan(silu[tokens:]).all()
        order = list(range(tokens))[::-1]
        gathered = NormInput(added, residual, added_bias, weight, ints(order), None, 1e-5)
        ops.norm_float(head, gathered, found, tokens)
        assert torch.equal(found[:tokens, :1003], logits[order, :1003])
        assert torch.isnan(found[tokens:]).all()
        assert torch.isnan(found[:, 1003:]).all()
        # Without anything to add, rows of a table: what the first layer does with token ids, padding being -1.
        ids = ints([(11 * i + 49) % 50 for i in range(tokens)])
        if tokens > 1:
            ids[tokens - 1] = -1
        rows = table[ids.clamp(min=0).long()]
        ops.rms_norm(rows, weight, normed, tokens, 1e-5)
        ops.matvec_silu(wide_weight, wide_bias, normed, activated, tokens)
        ops.norm_silu(wide_weight, wide_bias, NormInput(None, table, None, weight, ids, out, 1e-5), silu, tokens)
        assert torch.equal(silu[:tokens], activated)
        assert torch.equal(out[:tokens], rows)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "hidden"),
    [(8, 2, 64, 512), (9, 3, 64, 576), (8, 2, 128, 4096), (32, 8, 64, 2048)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_fused_products_give_the_bits_of_the_kernels_they_replace(
    heads: int, kv_heads: int, head_dim: int, hidden: int, biased: bool
) -> None:
    shape = make_shape(heads, kv_heads, head_dim, hidden=hidden, wide=640)
    check_fused_products(make_ops(shape), shape, biased, "cuda")


def check_gemm(ops: KernelOps, n: int, k: int, heads: int, counts: Sequence[int], device: str) -> None:
    """A weight of n x k for each of `counts` rows: products in parts with what adds them up, floats, and gate and up with silu.

    For `ops` of a shape whose hidden_size is n and whose queries, keys and values are n wide, where n is at most 4,096: `heads` of 64.
    """
    random, ints, poisoned = makers(device)
    most = max(counts)
    weight, x, bias = random(n, k, seed=1, scale=0.05), random(most, k, seed=2), random(n, seed=3)
    exact = x.double() @ weight.double().t()
    norm, before = random(n, seed=4), random(most, n, seed=5)
    cos, sin = on(device, torch.rand(300, 64)), on(device, torch.rand(300, 64))
    alone, silu_alone = [], []
    for tokens in counts:
        mine = on(device, x[:tokens].clone())
        silu = poisoned(tokens + 1, n // 2)
        ops.gemm_silu(weight, bias, mine, silu, tokens)
        gate, up = ((exact[:tokens].to(torch.bfloat16) + bias).double()).chunk(2, -1)
        assert error(silu[:tokens], F.silu(gate) * up) < 8e-3
        assert torch.isnan(silu[tokens:]).all()
        silu_alone.append(silu[3].clone())
        if tokens > PARTS_ROWS:
            continue
        scratch = poisoned(8, PARTS_ROWS + 1, n, dtype=torch.float32)
        parts = ops.gemm_parts(weight, mine, scratch, tokens)
        sums = scratch.view(-1)[: parts.splits * tokens * n].view(parts.splits, tokens, n)
        assert error(sums.double().sum(0), exact[:tokens]) < 1e-5
        assert torch.isnan(scratch.view(-1)[parts.splits * tokens * n :]).all()
        rounded = poisoned(tokens + 1, n)
        ops.sum_parts(parts, rounded, tokens)
        assert error(rounded[:tokens], exact[:tokens]) < 4e-3
        assert torch.isnan(rounded[tokens:]).all()
        floats = poisoned(tokens + 1, n + 4, dtype=torch.float32)
        ops.gemm_float(weight, mine, floats, tokens)
        assert error(floats[:tokens, :n], exact[:tokens]) < 1e-5
        assert torch.isnan(floats[tokens:]).all()
        assert torch.isnan(floats[:, n:]).all()
        alone.append((sums[:, 3].clone(), floats[3, :n].clone()))
        if n > 4096:
            continue
        found, wanted = poisoned(tokens, n), poisoned(tokens, n)
        residuals = on(device, before[:tokens].clone()), on(device, before[:tokens].clone())
        ops.rms_norm_add_parts(parts, residuals[0], bias, norm, found, tokens, 1e-5)
        ops.rms_norm_add(rounded, residuals[1], bias, norm, wanted, tokens, 1e-5)
        assert torch.equal(found, wanted)
        assert torch.equal(*residuals)
        kv_heads = (n // 64 - heads) // 2
        caches = poisoned(2, 17, kv_heads, 16, 64), poisoned(2, 17, kv_heads, 16, 64)
        place, queries = ints(list(range(tokens))), poisoned(tokens, n)
        product = on(device, rounded[:tokens].clone())
        ops.qkv_epilogue(queries, bias, (None, None), cos, sin, place, place, caches[0], tokens, 1e-5, parts)
        ops.qkv_epilogue(product, bias, (None, None), cos, sin, place, place, caches[1], tokens, 1e-5)
        assert torch.equal(queries[:, : heads * 64], product[:, : heads * 64])
        assert torch.equal(caches[0].view(torch.int16), caches[1].view(torch.int16))
    for results in (*zip(*alone, strict=True), silu_alone):
        assert all(torch.equal(results[0], other) for other in results), (
            "a row's bits depend on how many rows there are"
        )


@pytest.mark.parametrize(("n", "k"), [(384, 256), (256, 64), (2048, 2048), (2048, 8192), (16896, 256), (28672, 256)])
def test_tensor_core_products_and_what_adds_up_their_parts(n: int, k: int) -> None:
    heads = n // 64 - 2 if n < 4096 else 2
    ops = make_ops(make_shape(heads, 1, 64, hidden=n if n < 4096 else 256, wide=512))
    if not ops.fits_gemm(17):
        pytest.skip("gemm_wgmma.cu is for sm_90a")
    check_gemm(ops, n, k, heads, (17, 24, 33, 63, 64, 65, 127, 128), "cuda")
