"""Columns: arrays as `bytes` fields. Little-endian, fixed width, and checked before anything indexes with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import OctavoError, Reason


def pack(values: npt.ArrayLike, dtype: npt.DTypeLike) -> bytes:
    """`values` as the bytes of a column of `dtype`."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()


def unpack(name: str, data: bytes, dtype: npt.DTypeLike, length: int | None = None) -> npt.NDArray[Any]:
    """The array of a column, read-only, without a copy.

    Raises PROTOCOL_VIOLATION, naming the column, where its bytes are not `length` (or a whole number of) elements.
    """
    little = np.dtype(dtype).newbyteorder("<")
    if len(data) % little.itemsize:
        raise violation(name, f"{len(data)} bytes are not a whole number of {little.name}")
    if length is not None and len(data) != length * little.itemsize:
        raise violation(name, f"{len(data) // little.itemsize} elements where {length} belong")
    return np.frombuffer(data, dtype=little)


def check_range(name: str, values: npt.NDArray[Any], low: int, high: int) -> None:
    """Raises PROTOCOL_VIOLATION unless low <= values < high everywhere."""
    if values.size and (values.min() < low or values.max() >= high):
        raise violation(name, f"a value outside [{low}, {high})")


def violation(name: str, what: str) -> OctavoError:
    """A PROTOCOL_VIOLATION that names the column."""
    return OctavoError(Reason.PROTOCOL_VIOLATION, f"column {name}: {what}")
