"""The kernels of sm_90a on this machine's processor: products of warpgroups and the tensor memory accelerator are emulated, too."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from tests.emulator.compile import Builder
from tests.emulator.library import EmulatedOps
from tests.gpu.gpu_harness import PagedRows, make_shape
from tests.gpu.test_gpu_attention import check_prefill, check_prefill_behind_a_window
from tests.gpu.test_gpu_layers import check_gemm
from tests.gpu.test_gpu_shared_prefix import Decode, SharedRows, check_shared


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (9, 3, 64), (14, 2, 64), (2, 2, 128), (4, 1, 128), (16, 1, 128)]
)
@pytest.mark.parametrize("window", [0, 40])
def test_prefill(builder: Builder, heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    shape = make_shape(heads, kv_heads, head_dim)
    paged = PagedRows([2, 64, 65, 150, 400], kv_heads, head_dim, device="cpu")
    cuts = [[(3, 0, 50), (2, 0, 33), (4, 0, 256)], [(4, 256, 400), (3, 50, 150), (2, 33, 65), (1, 60, 64)]]
    check_prefill(EmulatedOps(builder, shape, ("prefill_wgmma",), hopper=True), shape, paged, window, cuts)


def test_prefill_reads_nothing_behind_the_window(builder: Builder) -> None:
    shape = make_shape(8, 2, 64)
    check_prefill_behind_a_window(EmulatedOps(builder, shape, hopper=True), shape, "cpu")


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (8, 1, 64), (4, 2, 128), (16, 2, 128)])
@pytest.mark.parametrize("part", [None, 384])
def test_rows_behind_a_shared_prefix(
    builder: Builder, heads: int, kv_heads: int, head_dim: int, part: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of a tile each, as so short a prefix has, and of three."""
    if part:
        monkeypatch.setattr("worker.backends.shared_prefix.part_tokens", lambda *_: part)
    shape = make_shape(heads, kv_heads, head_dim)
    ops = EmulatedOps(builder, shape, ("row_state", "prefix_attention", "decode_attention-prefix"), hopper=True)
    prefixes, members = [640], [(0, 1 + i * 7 % 40) for i in range(32)] + [(0, 300), (0, 257), (-1, 530), (-1, 5)]
    check_shared(Decode(ops, shape, SharedRows(prefixes, members, kv_heads, head_dim, "cpu")), prefixes, members)


@pytest.mark.parametrize(("n", "k"), [(384, 256), (256, 64), (256, 1024)])
def test_products_of_few_rows(builder: Builder, n: int, k: int) -> None:
    heads = n // 64 - 2
    shape = make_shape(heads, 1, 64, hidden=n, wide=512)
    ops = EmulatedOps(builder, shape, ("gemm-64", "gemm-128", "rms_norm", "qkv_epilogue"), hopper=True)
    check_gemm(ops, n, k, heads, (17, 64, 65, 128), "cpu")
