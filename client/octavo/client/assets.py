"""Files of a model from the chunks they travel in."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.client.errors import OctavoError, Reason
from octavo.v1 import common_pb2


def assemble(chunks: Iterable[common_pb2.AssetChunk]) -> dict[str, bytes]:
    """File name to content. Raises OctavoError (PROTOCOL_VIOLATION) where chunks do not make whole files."""
    contents: dict[str, bytearray] = {}
    sizes: dict[str, int] = {}
    name = ""
    for chunk in chunks:
        if chunk.name:
            name = chunk.name
            if name in contents:
                raise OctavoError(Reason.PROTOCOL_VIOLATION, f"the router sent {name} twice")
            contents[name], sizes[name] = bytearray(), chunk.size
        if not name:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, "the router sent a file without its name")
        contents[name] += chunk.data
    for name, content in contents.items():
        if len(content) != sizes[name]:
            raise OctavoError(
                Reason.PROTOCOL_VIOLATION, f"{name} has {len(content)} bytes, the router promised {sizes[name]}"
            )
    return {name: bytes(content) for name, content in contents.items()}
