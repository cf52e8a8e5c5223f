"""The tokenizers, templates and configurations of the models that workers hold, by digest, for routers without a volume."""

from __future__ import annotations

from collections.abc import Iterator, Set

from octavo.v1 import common_pb2

from service.errors import OctavoError, Reason

_MAX_MODEL_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20
_MAX_FILES = 64
_MAX_NAME_CHARACTERS = 255
_KEEP_UNSERVED = 4


class Incoming:
    """Assets that a worker is sending. Raises PROTOCOL_VIOLATION when they are too large or out of order."""

    def __init__(self) -> None:
        self._files: dict[str, bytearray] = {}
        self._current: bytearray | None = None
        self._bytes = 0

    def add(self, chunk: common_pb2.AssetChunk) -> None:
        """The next chunk."""
        if chunk.name:
            if len(chunk.name) > _MAX_NAME_CHARACTERS or len(self._files) >= _MAX_FILES:
                raise OctavoError(Reason.PROTOCOL_VIOLATION, f"more than {_MAX_FILES} asset files, or a name too long")
            self._current = self._files.setdefault(chunk.name, bytearray())
        if self._current is None:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, "an asset chunk without a file name")
        self._bytes += len(chunk.data)
        if self._bytes > _MAX_MODEL_BYTES:
            raise OctavoError(Reason.PROTOCOL_VIOLATION, f"assets of more than {_MAX_MODEL_BYTES >> 20} MiB")
        self._current += chunk.data

    def files(self) -> dict[str, bytes]:
        """What came, by file name."""
        return {name: bytes(data) for name, data in self._files.items()}


class AssetStore:
    """Complete assets by model digest. Owned by the hub."""

    def __init__(self) -> None:
        self._models: dict[bytes, dict[str, bytes]] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._models

    def put(self, digest: bytes, files: dict[str, bytes]) -> None:
        """A worker has sent everything."""
        self._models.pop(digest, None)  # it is the latest now
        self._models[digest] = files

    def forget_unserved(self, served: Set[bytes]) -> None:
        """Keep what workers hold, and the latest few others: a worker that restarts takes its model away only for a moment."""
        unserved = [digest for digest in self._models if digest not in served]
        for digest in unserved[: max(0, len(unserved) - _KEEP_UNSERVED)]:
            del self._models[digest]

    def chunks(self, digest: bytes) -> Iterator[common_pb2.AssetChunk]:
        """The files in pieces of 1 MiB. Raises NO_WORKER where they are not here (yet)."""
        files = self._models.get(digest)
        if files is None:
            raise OctavoError(Reason.NO_WORKER, "no worker has sent this model's assets yet", retry_after_ms=200)
        return _chunks(files)


def _chunks(files: dict[str, bytes]) -> Iterator[common_pb2.AssetChunk]:
    for name, data in files.items():
        for start in range(0, max(len(data), 1), _CHUNK_BYTES):
            chunk = common_pb2.AssetChunk(data=data[start : start + _CHUNK_BYTES])
            if start == 0:
                chunk.name, chunk.size = name, len(data)
            yield chunk
