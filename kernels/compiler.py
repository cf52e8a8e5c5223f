"""From a `.cu` file to a cubin, by NVRTC, through an on-disk cache.

A cubin is machine code for one architecture. It is loaded instead of PTX because the driver may be older than NVRTC and would
refuse newer PTX. The cache key covers the source, every file that it includes from this folder, the options and NVRTC's version:
editing a `.cu` and restarting is the whole development loop.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda.bindings import nvrtc
from cuda.core import Program, ProgramOptions

from kernels.cache import CubinCache
from kernels.resources import KernelResources, parse_resources

SOURCE_DIR = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
"""What the kernels are compiled for in tests. Others of compute capability 8.0 or more work as well."""

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)


class CompileError(Exception):
    """NVRTC refused a kernel; the text holds its log, with file and line."""


@dataclass(frozen=True, slots=True)
class CompiledModule:
    """One source file for one architecture with one set of definitions."""

    source: str
    cubin: bytes
    log: str
    resources: Mapping[str, KernelResources]  # by kernel
    cached: bool


class Compiler:
    """Compiles for one architecture, such as "sm_90a". Needs neither a driver nor a device. Thread-safe."""

    def __init__(self, architecture: str, cubins: CubinCache) -> None:
        self.architecture = architecture
        self._cubins = cubins

    def compile(
        self, source: str, definitions: Mapping[str, int | str], directory: Path = SOURCE_DIR
    ) -> CompiledModule:
        """Compile `directory`/`source` with `-D` definitions. Raises CompileError."""
        text = _read(directory / source)
        key = self._key(source, text, definitions, directory)
        if (entry := self._cubins.load(key)) is not None:
            return CompiledModule(source, entry[0], entry[1], parse_resources(entry[1]), cached=True)
        cubin, log = self._run_nvrtc(source, text, definitions, directory)
        self._cubins.store(key, cubin, log)
        return CompiledModule(source, cubin, log, parse_resources(log), cached=False)

    def _run_nvrtc(
        self, source: str, text: str, definitions: Mapping[str, int | str], directory: Path
    ) -> tuple[bytes, str]:
        options = ProgramOptions(
            name=str(directory / source),
            arch=self.architecture,
            std="c++17",
            include_path=[str(directory), str(SOURCE_DIR), *map(str, cuda_include_paths())],
            define_macro=[(name, str(value)) for name, value in sorted(definitions.items())] or None,
            ptxas_options=["-v"],
        )
        log = io.StringIO()
        try:
            code = Program(text, "c++", options).compile("cubin", logs=log).code
        except Exception as error:
            # cuda.core raises its own error types, whose text is NVRTC's log; none of them is part of its documented API.
            raise CompileError(f"{source} for {self.architecture}: {error}") from error
        if not isinstance(code, bytes):
            raise CompileError(f"{source} for {self.architecture}: NVRTC gave no cubin")
        return code, log.getvalue()

    def _key(self, source: str, text: str, definitions: Mapping[str, int | str], directory: Path) -> str:
        parts = [self.architecture, nvrtc_version(), source, repr(sorted(definitions.items())), text]
        for included in _includes(text, directory):
            parts += [included.name, _read(included)]
        digest = hashlib.sha256()
        for part in parts:
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return f"{Path(source).stem}-{self.architecture}-{digest.hexdigest()[:40]}"


def sources_digest() -> str:
    """SHA-256 (hex) over every kernel source of this folder and the tables that choose between them: what decides a backend's bits."""
    tables = (SOURCE_DIR / "shapes.py", SOURCE_DIR / "product_rows.py")
    digest = hashlib.sha256(nvrtc_version().encode())
    for path in sorted([*SOURCE_DIR.glob("*.cu"), *SOURCE_DIR.glob("*.cuh"), *tables]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def architecture_of(major: int, minor: int) -> str:
    """The target for a device of this compute capability. Hopper's own instructions need the `a` variant."""
    if major < 8:
        raise CompileError(f"compute capability {major}.{minor} is too old: the kernels need 8.0 (Ampere) or newer")
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


@cache
def nvrtc_version() -> str:
    """Such as "13.0"."""
    error, major, minor = nvrtc.nvrtcVersion()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC can't be used: {error}")
    return f"{major}.{minor}"


@cache
def cuda_include_paths() -> tuple[Path, ...]:
    """Where cuda_bf16.h lies: the `nvidia` packages of this environment, else a toolkit. Raises CompileError."""
    candidates: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    if spec is not None and spec.submodule_search_locations is not None:
        candidates += [Path(place) / "cu13" / "include" for place in spec.submodule_search_locations]
    candidates.append(Path("/usr/local/cuda/include"))
    found = tuple(path for path in candidates if (path / "cuda_bf16.h").is_file())
    if not found:
        raise CompileError("cuda_bf16.h not found: install nvidia-cuda-runtime and nvidia-cuda-crt")
    return found


def _includes(text: str, directory: Path) -> list[Path]:
    """Files of this project that `text` includes, directly or not, sorted by path."""
    found: set[Path] = set()
    waiting = [text]
    while waiting:
        for name in _INCLUDE.findall(waiting.pop()):
            path = directory / name if (directory / name).is_file() else SOURCE_DIR / name
            if path.is_file() and path not in found:
                found.add(path)
                waiting.append(_read(path))
    return sorted(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CompileError(f"{path}: {error.strerror}") from error
