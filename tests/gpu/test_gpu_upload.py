"""Weights that readers put on the device: every bit, every dtype, and what becomes of a file that shrinks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worker.checkpoint import upload as module
from worker.checkpoint.errors import CheckpointError
from worker.checkpoint.safetensors import TensorEntry
from worker.checkpoint.upload import Upload

pytestmark = pytest.mark.gpu

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write(path: Path, tensors: list[torch.Tensor]) -> list[TensorEntry]:
    """The bytes of the tensors behind 13 bytes of something else, so that nothing is aligned."""
    entries, data = [], bytes(13)
    for number, tensor in enumerate(tensors):
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        entries.append(TensorEntry(f"t{number}", path, NAMES[tensor.dtype], tuple(tensor.shape), len(data), len(raw)))
        data += raw
    path.write_bytes(data)
    return entries


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_arrives(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4096)
    generator = torch.Generator().manual_seed(1)
    sizes = [(1,), (333, 77), (2048,), (64, 1024), (5, 3, 7)] * 3
    tensors = [
        torch.randn(size, generator=generator).to(stored) for size, stored in zip(sizes, list(NAMES) * 5, strict=True)
    ]
    entries = write(tmp_path / "weights", tensors)
    device = torch.device("cuda", torch.cuda.current_device())
    seen: list[int] = []
    with Upload(device) as upload:
        targets = [torch.full(tensor.shape, torch.nan, dtype=dtype, device=device) for tensor in tensors]
        for entry, tensor, target in zip(entries, tensors, targets, strict=True):
            upload.add(entry, tensor.dtype, target)
        upload.start()
        upload.wait(lambda what, done, total: seen.append(total - done))
    for tensor, target in zip(tensors, targets, strict=True):
        assert torch.equal(target.cpu(), tensor.to(dtype))
    assert seen[-1] == 0


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    (entry,) = write(tmp_path / "weights", [torch.zeros(1000, dtype=torch.bfloat16)])
    (tmp_path / "weights").write_bytes(bytes(100))
    device = torch.device("cuda", torch.cuda.current_device())
    with Upload(device) as upload:
        upload.add(entry, torch.bfloat16, torch.empty(1000, dtype=torch.bfloat16, device=device))
        upload.start()
        with pytest.raises(CheckpointError, match=r"weights: tensor t0 ends at byte 100"):
            upload.wait(lambda what, done, total: None)


def test_leaving_early_ends_the_readers(tmp_path: Path) -> None:
    (entry,) = write(tmp_path / "weights", [torch.zeros(1 << 20, dtype=torch.bfloat16)])
    device = torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(ZeroDivisionError), Upload(device) as upload:
        for _ in range(200):
            upload.add(entry, torch.bfloat16, torch.empty(1 << 20, dtype=torch.bfloat16, device=device))
        upload.start()
        raise ZeroDivisionError
    assert all(reader.done() for reader in upload._readers)
