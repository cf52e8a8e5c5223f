"""Safetensors files: where each tensor lies, checked before anything is read.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. Read here rather
than by the library so that every fault names its file and tensor. Source: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import mmap
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.checkpoint.errors import CheckpointError

_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit
_MAX_DIMENSIONS = 16
_ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `num_bytes` bytes at `offset` (from the start of the file) in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def find_tensors(model_dir: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint, single-file or sharded. Raises CheckpointError naming file and tensor."""
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    if index.exists():
        return _read_sharded(model_dir, index)
    if single.exists():
        return {entry.name: entry for entry in read_header(single)}
    raise CheckpointError(f"{model_dir}: holds neither model.safetensors nor model.safetensors.index.json")


def _read_sharded(model_dir: Path, index: Path) -> dict[str, TensorEntry]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: is not an index with a weight_map: {error!r}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} must be a file name without folders")
        for entry in read_header(model_dir / shard):
            if entry.name in tensors:
                raise CheckpointError(f"{entry.file}: tensor {entry.name} is also in {tensors[entry.name].file.name}")
            tensors[entry.name] = entry
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{model_dir / shard}: tensor {name} is missing, {index.name} promises it there")
    return tensors


def read_header(path: Path) -> Iterator[TensorEntry]:
    """The tensors of one file. Raises CheckpointError for a header or an extent that the file does not bear out."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: is truncated or no Safetensors file (header of {length} bytes in a file of {size})"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the Safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the Safetensors header must be a JSON object")
    for name, value in header.items():
        if name != "__metadata__":
            yield _entry(path, name, value, 8 + length, size)


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    try:
        dtype, shape = value["dtype"], tuple(value["shape"])
        begin, end = value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name}: the header entry is malformed: {error!r}") from error
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZE:
        raise CheckpointError(f"{path}: tensor {name}: dtype {reprlib.repr(dtype)} is unknown")
    if len(shape) > _MAX_DIMENSIONS or not all(type(number) is int for number in (*shape, begin, end)):
        raise CheckpointError(
            f"{path}: tensor {name}: shape {reprlib.repr(shape)} or its offsets are not whole numbers"
        )
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * _ITEM_SIZE[dtype]:
        raise CheckpointError(f"{path}: tensor {name}: {end - begin} bytes do not hold shape {list(shape)} of {dtype}")
    if data_start + end > size:
        raise CheckpointError(
            f"{path}: is truncated: tensor {name} ends at byte {data_start + end}, the file has {size}"
        )
    return TensorEntry(name, path, dtype, shape, data_start + begin, end - begin)


def map_file(path: Path) -> mmap.mmap:
    """Map a file copy-on-write: pages are read when a tensor is copied out of it, and never written back."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be mapped: {error}") from error
