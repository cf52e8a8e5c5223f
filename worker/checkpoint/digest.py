"""What a worker tells others about its model: the files that routers need, and digests that say which model it is.

The model digest is SHA-256 over config, tokenizer, template, Safetensors headers, and the first and last 4 KiB of each tensor: it
tells apart any two models that were not made to collide, and takes milliseconds instead of minutes. It is cached beside the
user's other caches, by (path, size, mtime, inode) of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

ASSET_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100 << 20


class DigestError(Exception):
    """A model directory that can't be read; the text names the file."""


def read_assets(model_dir: Path) -> dict[str, bytes]:
    """The asset files of a model directory, by name. Raises DigestError."""
    assets = {}
    for name in ASSET_NAMES:
        path = model_dir / name
        try:
            assets[name] = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DigestError(f"{path}: {error.strerror}") from None
    for needed in ("config.json", "tokenizer.json"):
        if needed not in assets:
            raise DigestError(f"{model_dir / needed}: no such file; a model directory needs it")
    return assets


def quantized_digest(digest: bytes, quantization: str) -> bytes:
    """The digest of the model that is left of another once it is quantised: streams never move between the two. 32 bytes."""
    return hashlib.sha256(digest + b"quantization " + quantization.encode()).digest()


def assets_digest(assets: dict[str, bytes], names: Iterable[str] = ASSET_NAMES) -> bytes:
    """SHA-256 over the named files that exist, each with its name and length. 32 bytes."""
    total = hashlib.sha256()
    for name in names:
        if name in assets:
            total.update(struct.pack("<I", len(name)) + name.encode())
            total.update(struct.pack("<Q", len(assets[name])) + assets[name])
    return total.digest()


def tokenizer_digest(assets: dict[str, bytes]) -> bytes:
    """SHA-256 over tokenizer and template. 32 bytes."""
    return assets_digest(assets, _TOKENIZER_NAMES)


def model_digest(model_dir: Path, assets: dict[str, bytes], cache_dir: Path | None = None) -> bytes:
    """SHA-256 that names this model. 32 bytes. Raises DigestError."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise DigestError(f"{model_dir}: holds no *.safetensors file")
    weights = _cached_weights_digest(files, cache_dir)
    return hashlib.sha256(assets_digest(assets) + weights).digest()


def _cached_weights_digest(files: list[Path], cache_dir: Path | None) -> bytes:
    if cache_dir is None:
        return _weights_digest(files)
    facts = []
    for path in files:
        stat = path.stat()
        facts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    entry = cache_dir / "digests" / key
    try:
        cached = bytes.fromhex(entry.read_text())
        if len(cached) == 32:
            return cached
    except (OSError, ValueError):
        pass  # not cached yet, or a torn write: compute it
    digest = _weights_digest(files)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = entry.with_suffix(f".{os.getpid()}")
        part.write_text(digest.hex())
        part.replace(entry)
    except OSError:
        pass  # a cache that can't be written costs time, not correctness
    return digest


def _weights_digest(files: list[Path]) -> bytes:
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                total.update(path.name.encode())
                _digest_safetensors(file.fileno(), path, total)
        except OSError as error:
            raise DigestError(f"{path}: {error.strerror}") from None
    return total.digest()


def _digest_safetensors(descriptor: int, path: Path, total: hashlib._Hash) -> None:
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise DigestError(f"{path}: too short to be a Safetensors file")
    (header_len,) = struct.unpack("<Q", prefix)
    if header_len > min(_MAX_HEADER_BYTES, size - 8):
        raise DigestError(f"{path}: truncated, or not a Safetensors file (its header says {header_len} bytes)")
    header = os.pread(descriptor, header_len, 8)
    total.update(header)
    try:
        spans = sorted(item["data_offsets"] for name, item in json.loads(header).items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DigestError(f"{path}: its Safetensors header is not valid") from None
    base = 8 + header_len
    for span in spans:
        if not (isinstance(span, list) and len(span) == 2 and all(isinstance(x, int) for x in span)):
            raise DigestError(f"{path}: its Safetensors header is not valid")
        start, end = base + span[0], base + span[1]
        if not base <= start <= end <= size:
            raise DigestError(f"{path}: truncated: a tensor ends at byte {end} of {size}")
        total.update(os.pread(descriptor, min(_SAMPLE_BYTES, end - start), start))
        total.update(os.pread(descriptor, min(_SAMPLE_BYTES, end - start), max(start, end - _SAMPLE_BYTES)))
