"""Read a GGUF file: its metadata and where its tensors lie.

Written anew instead of taking gguf.GGUFReader because a file is not to be trusted: every count and length is checked
against the bytes that are left before anything is done with it (a lying array length keeps GGUFReader busy for ever),
and it is several times as fast on a vocabulary. Format: docs/gguf.md in the ggml project, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from .errors import GGUFError

_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MIN_FIELD_BYTES = 8 + 4 + 1  # length of the key, type, value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # length of the name, n_dims, type, offset

_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor in the file. `shape` is in numpy's order (the file has it reversed); `data` is its raw bytes, uint8 [n]."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


class GGUFFile:
    """An open GGUF file. Raises GGUFError for anything malformed, before a single weight is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # An empty file cannot be mapped. As a plain array: slicing the memmap class is slow.
            empty = path.stat().st_size == 0
            self._bytes = np.empty(0, np.uint8) if empty else np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        except OSError as error:
            raise GGUFError(path, f"cannot be read: {error.strerror or error}") from error
        self._position = 0
        tensor_count, field_count = self._read_header()
        self.fields: dict[str, Any] = self._read_fields(field_count)
        self.tensors: dict[str, GGUFTensor] = self._read_tensors(tensor_count)

    # -- typed access to the metadata -------------------------------------------------------------------------------

    def string(self, key: str, default: str | None = None) -> str:
        return str(self._field(key, str, default))

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._field(key, int, default))

    def number(self, key: str, default: float | None = None) -> float:
        found = self._field(key, float | int, default)
        try:
            value = float(found)
        except OverflowError:
            raise GGUFError(self.path, f"{key} is {found}") from None
        if not abs(value) <= _MAX_FLOAT32:  # nor is NaN
            raise GGUFError(self.path, f"{key} is {value}")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return bool(self._field(key, bool, default))

    def array(self, key: str) -> list[Any]:
        return list(self._field(key, list, None))

    def _field(self, key: str, kind: Any, default: Any) -> Any:
        value = self.fields.get(key, default)
        if value is None:
            raise GGUFError(self.path, f"has no {key}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise GGUFError(self.path, f"{key} is of type {type(value).__name__}, which was not expected")
        return value

    # -- parsing ----------------------------------------------------------------------------------------------------

    def _read_header(self) -> tuple[int, int]:
        if self._take(4, "the magic number") != b"GGUF":
            raise GGUFError(self.path, "is not a GGUF file")
        version = self._uint32("the version")
        if version not in (2, 3):
            raise GGUFError(self.path, f"is GGUF version {version} or big-endian; 2 and 3, little-endian, can be read")
        tensor_count = self._count("the number of tensors", _MIN_TENSOR_BYTES)
        return tensor_count, self._count("the number of keys", _MIN_FIELD_BYTES)

    def _read_fields(self, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for index in range(count):
            key = self._string(f"key {index}")
            if key in fields:
                raise GGUFError(self.path, f"has {key} twice")
            fields[key] = self._value(key, self._value_type(key))
        return fields

    def _value(self, key: str, value_type: GGUFValueType) -> Any:
        if value_type is GGUFValueType.STRING:
            return self._string(key)
        if value_type is not GGUFValueType.ARRAY:
            return self._numbers(key, value_type, 1)[0]
        item_type = self._value_type(key)
        if item_type is GGUFValueType.ARRAY:
            raise GGUFError(self.path, f"{key} is an array of arrays, which no known model has")
        if item_type is GGUFValueType.STRING:
            return [self._string(key) for _ in range(self._count(key, 8))]
        return self._numbers(key, item_type, self._count(key, _SCALARS[item_type].itemsize))

    def _read_tensors(self, count: int) -> dict[str, GGUFTensor]:
        headers = [self._tensor_header(index) for index in range(count)]
        alignment = self.integer("general.alignment", _DEFAULT_ALIGNMENT)
        if alignment <= 0 or alignment & (alignment - 1):
            raise GGUFError(self.path, f"general.alignment is {alignment}, not a power of two")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, tensor_type, offset in headers:
            if name in tensors:
                raise GGUFError(self.path, f"has tensor {name} twice")
            data = self._tensor_data(name, shape, tensor_type, start + offset)
            tensors[name] = GGUFTensor(name, tensor_type, shape, data)
        return tensors

    def _tensor_header(self, index: int) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string(f"the name of tensor {index}")
        n_dims = self._uint32(name)
        if not 1 <= n_dims <= _MAX_DIMENSIONS:
            raise GGUFError(self.path, f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self._uint64(name) for _ in range(n_dims))[::-1]
        number = self._uint32(name)
        try:
            tensor_type = GGMLQuantizationType(number)
        except ValueError:
            raise GGUFError(self.path, f"tensor {name} is of type {number}, which is unknown") from None
        return name, shape, tensor_type, self._uint64(name)

    def _tensor_data(
        self, name: str, shape: tuple[int, ...], tensor_type: GGMLQuantizationType, start: int
    ) -> npt.NDArray[np.uint8]:
        block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if 0 in shape or shape[-1] % block:
            raise GGUFError(
                self.path, f"tensor {name} of shape {shape} is no whole number of {tensor_type.name} blocks"
            )
        end = start + math.prod(shape) // block * block_bytes
        if end > self._bytes.size:
            raise GGUFError(
                self.path, f"is truncated: tensor {name} ends at byte {end}, the file at {self._bytes.size}"
            )
        return self._bytes[start:end]

    # -- primitives: all reading goes through _take ------------------------------------------------------------------

    def _take(self, n_bytes: int, what: str) -> bytes:
        end = self._position + n_bytes
        if end > self._bytes.size:
            raise GGUFError(
                self.path, f"is truncated: {what} wants {n_bytes} bytes at {self._position} of {self._bytes.size}"
            )
        taken = self._bytes[self._position : end].tobytes()
        self._position = end
        return taken

    def _uint32(self, what: str) -> int:
        return int(struct.unpack("<I", self._take(4, what))[0])

    def _uint64(self, what: str) -> int:
        return int(struct.unpack("<Q", self._take(8, what))[0])

    def _count(self, what: str, item_bytes: int) -> int:
        """A number of items of at least `item_bytes` each, which the rest of the file can hold."""
        count = self._uint64(what)
        if count * item_bytes > self._bytes.size - self._position:
            raise GGUFError(
                self.path, f"is truncated or lies: {what} announces {count} items, more than the file holds"
            )
        return count

    def _string(self, what: str) -> str:
        raw = self._take(self._uint64(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(self.path, f"{what} is not valid UTF-8") from None

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._uint32(key)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise GGUFError(self.path, f"{key} is of type {number}, which is unknown") from None

    def _numbers(self, key: str, value_type: GGUFValueType, count: int) -> list[Any]:
        dtype = _SCALARS[value_type]
        values: list[Any] = np.frombuffer(self._take(count * dtype.itemsize, key), dtype).tolist()
        return values
