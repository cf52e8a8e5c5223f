"""Write a safetensors file tensor by tensor, so that no more than a piece of one is ever in memory.

Format: 8 bytes little-endian header length, a JSON header padded with spaces to a multiple of 8, the data. The
`safetensors` library writes the same but wants all tensors at once; a 16 GB model need not fit in memory here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt


def write_bfloat16(
    path: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[tuple[str, npt.NDArray[np.uint16]]]
) -> None:
    """Write tensors of `shapes` in bfloat16. `pieces` gives (name, bits) in the order of `shapes`, any number a tensor.

    Raises ValueError when the pieces of a tensor do not add up to its shape, or come out of order.
    """
    with path.open("xb") as file:
        file.write(_header(shapes))
        current = iter(_checked(shapes, pieces))
        for bits in current:
            file.write(np.ascontiguousarray(bits, dtype="<u2").data)


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    # "format": transformers refuses files that do not say for which framework they were laid out.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _checked(
    shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[tuple[str, npt.NDArray[np.uint16]]]
) -> Iterator[npt.NDArray[np.uint16]]:
    source = iter(pieces)
    for name, shape in shapes.items():
        missing = math.prod(shape)
        while missing > 0:
            got, bits = next(source, (None, None))
            if got != name or bits is None or bits.size > missing:
                raise ValueError(f"tensor {name} lacks {missing} values, and a piece of {got} follows")
            missing -= bits.size
            yield bits
    if (extra := next(source, None)) is not None:
        raise ValueError(f"a piece of {extra[0]} follows the last tensor")
