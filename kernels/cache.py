"""The cubin cache: a directory of checked files that any number of workers read and write at once.

An entry is `<key>.cubin`: SHA-256 of the rest, then a length-prefixed compiler log, then the cubin. Writers make a temporary file and
rename it, so a reader sees a whole entry or none; the checksum catches what a crash or a full disk left behind. A cache that
can't be read or written costs time, never a failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import tempfile
from pathlib import Path

log = logging.getLogger("octavo.kernels")

_DIGEST = hashlib.sha256().digest_size
_LENGTH = struct.Struct("<Q")


def default_directory() -> Path:
    """$OCTAVO_CUBIN_CACHE, else `octavo/cubins` in the user's cache directory."""
    if chosen := os.environ.get("OCTAVO_CUBIN_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo" / "cubins"


class CubinCache:
    """Compiled kernels by key. Owns nothing in memory; safe between processes and threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writable = True

    def load(self, key: str) -> tuple[bytes, str] | None:
        """(cubin, compiler log), or None where there is no sound entry."""
        path = self._path(key)
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        body = entry[_DIGEST:]
        if len(body) < _LENGTH.size or hashlib.sha256(body).digest() != entry[:_DIGEST]:
            log.warning("%s: is damaged; compiling again", path)
            return None
        (log_bytes,) = _LENGTH.unpack_from(body)
        split = _LENGTH.size + log_bytes
        return body[split:], body[_LENGTH.size : split].decode("utf-8", "replace")

    def store(self, key: str, cubin: bytes, compiler_log: str) -> None:
        """Write an entry. The first failure is logged, later ones are not."""
        text = compiler_log.encode()
        body = _LENGTH.pack(len(text)) + text + cubin
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._write(self._path(key), hashlib.sha256(body).digest() + body)
        except OSError as error:
            if self._writable:
                log.warning("the cubin cache %s is not writable (%s); every start compiles", self._directory, error)
            self._writable = False

    def _write(self, path: Path, entry: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self._directory, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(entry)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.cubin"
