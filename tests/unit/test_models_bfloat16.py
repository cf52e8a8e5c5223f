"""bfloat16 rounding, and the safetensors writer against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from octavo.models.bfloat16 import from_bfloat16, is_finite, to_bfloat16
from octavo.models.safetensors_stream import write_bfloat16
from safetensors.torch import load_file


def test_rounding_agrees_with_torch_on_all_kinds_of_bits() -> None:
    generator = np.random.default_rng(1)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    # Every upper half, with the lower half at, just under and just over the middle.
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([bits, upper | 0x7FFF, upper | 0x8000, upper | 0x8001, upper, upper | 0xFFFF])
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    got = to_bfloat16(values)
    nan = np.isnan(values)
    assert np.array_equal(got[~nan], expected[~nan])
    assert np.isnan(from_bfloat16(got[nan])).all()


def test_is_finite_sees_overflow_by_rounding() -> None:
    largest = np.array([3.4028235e38], np.float32)
    assert np.isfinite(largest).all() and not is_finite(to_bfloat16(largest))
    assert is_finite(to_bfloat16(np.array([0.0, -1e38], np.float32)))


def test_written_file_reads_back(tmp_path: Path) -> None:
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([-0.5, 2.0], np.float32)
    pieces = [("a", to_bfloat16(a[:2])), ("a", to_bfloat16(a[2:])), ("b", to_bfloat16(b))]
    write_bfloat16(tmp_path / "x.safetensors", {"a": (3, 4), "b": (2,)}, pieces)
    tensors = load_file(tmp_path / "x.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"a": torch.bfloat16, "b": torch.bfloat16}
    assert np.array_equal(tensors["a"].float().numpy(), a) and np.array_equal(tensors["b"].float().numpy(), b)


@pytest.mark.parametrize("pieces", [[("a", 3)], [("a", 5)], [("b", 4)], [("a", 4), ("a", 1)], []])
def test_pieces_that_do_not_add_up(tmp_path: Path, pieces: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="piece of"):
        write_bfloat16(tmp_path / "x", {"a": (4,)}, ((name, np.zeros(n, np.uint16)) for name, n in pieces))
