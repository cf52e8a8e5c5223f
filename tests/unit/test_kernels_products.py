"""What the host refuses of products before it launches any kernel."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

pytest.importorskip("cuda.core", reason="deploy/requirements/cuda.txt is not installed")

import torch

from kernels.launcher import KernelLibrary
from kernels.product_ops import ProductOps
from kernels.shapes import PARTS_ROWS, KernelShape


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
