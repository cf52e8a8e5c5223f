"""What the host decides and refuses of products before it launches any kernel."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

pytest.importorskip("cuda.core", reason="deploy/requirements/cuda.txt is not installed")

import torch

from kernels.launcher import KernelLibrary
from kernels.product_ops import ProductOps
from kernels.product_rows import _CUBLAS_ROWS, PARTS_ROWS, cublas_rows
from kernels.shapes import KernelShape
from worker.backends.cuda_columns import MixedShapes
from worker.backends.cuda_graphs import buckets
from worker.backends.cuda_model import CudaDecoder


@pytest.mark.parametrize("product", ["gemm_parts", "gemm_float"])
def test_products_in_parts_take_no_more_rows_than_their_scratch_holds(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.product_ops.tile_map", MagicMock())  # it asks the driver
    library = MagicMock(KernelLibrary)
    ops = ProductOps(library, MagicMock(KernelShape), MagicMock(), 132, 4)
    weight, x, out = torch.zeros(128, 64), torch.zeros(PARTS_ROWS + 1, 64), torch.zeros(8, PARTS_ROWS + 1, 128)
    getattr(ops, product)(weight, x, out, PARTS_ROWS)
    library.launch.assert_called_once()
    with pytest.raises(AssertionError):
        getattr(ops, product)(weight, x, out, PARTS_ROWS + 1)
    library.launch.assert_called_once()


def test_cublas_is_asked_for_more_rows_where_that_was_measured_faster() -> None:
    padded = set(buckets(512)) | {shape.tokens for shape in MixedShapes(256, 8192, 4, 128)}
    assert _CUBLAS_ROWS
    for (n, k), table in _CUBLAS_ROWS.items():
        for rows, more in table.items():
            assert rows in padded, "no step has so many"
            assert PARTS_ROWS < rows < more == cublas_rows(n, k, rows)
            assert more not in table, "and more still would be faster"
    assert cublas_rows(6144, 4096, 225) == 225
    assert cublas_rows(17, 4096, 224) == 224


@pytest.mark.parametrize("measured", [True, False])
def test_cublas_is_never_asked_for_rows_that_the_tensors_do_not_have(measured: bool) -> None:
    library = MagicMock(KernelLibrary)
    library.__contains__.side_effect = lambda name: measured and name == "gemm-64"
    ops = ProductOps(library, MagicMock(KernelShape), MagicMock(), 132, 4)
    weight = torch.empty(6144, 4096, device="meta")
    assert ops.cublas_rows(weight, 224, 8192) == (256 if measured else 224)
    assert ops.cublas_rows(weight, 224, 255) == 224


@pytest.mark.parametrize(("tiles", "most"), [((), 0), ((64,), 64), ((64, 128), 128)])
def test_silu_takes_as_many_rows_as_the_largest_build_that_there_is(tiles: tuple[int, ...], most: int) -> None:
    library = MagicMock(KernelLibrary)
    library.__contains__.side_effect = lambda name: name in {f"gemm-{rows}" for rows in tiles}
    ops = ProductOps(library, MagicMock(KernelShape), MagicMock(), 132, 4)
    assert [rows for rows in range(1, 300) if ops.fits_gemm(rows)] == list(range(17, most + 1))
    assert [rows for rows in range(1, 300) if ops.fits_parts(rows)] == list(range(17, min(most, PARTS_ROWS) + 1))


@pytest.mark.parametrize(("normed", "logits"), [(96, 84), (84, 96)])
def test_the_heads_rows_are_bounded_by_both_of_its_tensors(
    normed: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, product = MagicMock(CudaDecoder), MagicMock()
    decoder._ops = MagicMock(**{f"fits_{which}.return_value": False for which in ("fused", "matvec", "parts")})
    decoder._ops.cublas_rows.side_effect = lambda weight, tokens, most: most
    decoder.workspace, decoder.config, decoder._weights = MagicMock(), MagicMock(vocab_size=5), MagicMock()
    decoder.workspace.normed = torch.zeros(normed, 16)
    decoder._weights.lm_head = torch.zeros(5, 16)
    monkeypatch.setattr("worker.backends.cuda_model.torch.mm", product)
    CudaDecoder.logits(decoder, torch.zeros(80), 80, torch.zeros(logits, 8))
    assert product.call_args.args[0].shape == (84, 16)
    assert product.call_args.kwargs["out"].shape == (84, 5)


def test_more_rows_than_there_are_change_nothing_for_those() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(5, 16, generator=generator), torch.randn(8, 16, generator=generator)
    x[4:] = torch.nan  # what an older step left
    out = torch.full((8, 5), 7.0)
    decoder = MagicMock(CudaDecoder)
    decoder._ops = MagicMock(**{"cublas_rows.return_value": 6})
    CudaDecoder._cublas(decoder, weight, x, out, 4)
    decoder._ops.cublas_rows.assert_called_once_with(weight, 4, 8)
    assert torch.allclose(out[:4], x[:4] @ weight.t())
    assert out[4:6].isnan().all()
    assert bool((out[6:] == 7).all())
