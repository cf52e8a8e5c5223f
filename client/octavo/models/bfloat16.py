"""bfloat16 in numpy, which has no such type: as the upper 16 bits of a float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bits (uint16, same shape), to nearest and ties to even, as torch does.

    Adding 0x7FFF carries into the upper half for everything past the middle; the lowest bit kept is added too, so that
    the middle itself goes to the even neighbour. Overflow becomes infinity by the same carry. NaN stays NaN (quiet).
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        rounded[is_nan] = (bits[is_nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return rounded


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The exact float32 values of bfloat16 bits; same shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_finite(bits: npt.NDArray[np.uint16]) -> bool:
    """Whether no value is infinite or NaN: those have all eight exponent bits set."""
    return not ((bits & np.uint16(0x7F80)) == np.uint16(0x7F80)).any()
