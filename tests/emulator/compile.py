"""From a kernel's source to a shared library for this machine: the sources of kernels/, but for the headers that cuda/ has its own of.

Nothing is written outside the directory given. Several processes may share one: what one has compiled the others load.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kernels.compiler import SOURCE_DIR
from kernels.shapes import KernelSpec

SHIM_DIR = Path(__file__).parent / "cuda"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
_CHECKS = ("-fsanitize=alignment,bounds",)  # what they find goes to device.cpp
_INCLUDE = re.compile(r'^#include ["<]([^">]+)[">]', re.MULTILINE)
# Memory whose size the launch says is the runtime's; a host compiler has no such declaration.
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


class BuildError(Exception):
    """The C++ compiler refused a source; the text holds what it said."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A defect to be found: `old`, which stands in `source` once, becomes `new`."""

    source: str
    old: str
    new: str


def find_compiler() -> str | None:
    """The path of this machine's C++ compiler."""
    return shutil.which("c++") or shutil.which("g++")


class Builder:
    """Compiles with `compiler` into `directory`. Thread-safe."""

    def __init__(self, compiler: str, directory: Path) -> None:
        self._compiler = compiler
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._builds: dict[str, Future[ctypes.CDLL]] = {}
        self._runtime = self._pool.submit(self._build_runtime)

    def close(self) -> None:
        """Wait for what is being compiled."""
        self._pool.shutdown(cancel_futures=True)

    def start(
        self, spec: KernelSpec, mutation: Mutation | None = None, more: Path | None = None
    ) -> Future[ctypes.CDLL]:
        """Compile unless that was begun before. `more`: a directory of further sources. The future raises BuildError."""
        sources = _included(spec.source, _sources(mutation, more))
        unit = _unit(spec, sources)
        key = _digest(unit, *(part for item in sorted(sources.items()) for part in item))
        if key not in self._builds:
            self._builds[key] = self._pool.submit(self._build, key, Path(spec.source).stem, unit, sources)
        return self._builds[key]

    def _build(self, key: str, name: str, unit: str, sources: Mapping[str, str]) -> ctypes.CDLL:
        runtime = self._runtime.result()
        target = self._directory / f"{name}-{key}.so"
        with self._locked(key):
            if not target.exists():
                folder = self._directory / key
                folder.mkdir(exist_ok=True)
                for file, text in sources.items():
                    (folder / file).write_text(text)
                compiled = folder / "unit.o"
                self._run([*_FLAGS, *_CHECKS, "-I", str(folder), "-x", "c++", "-c", "-", "-o", str(compiled)], unit)
                self._run(["-shared", str(compiled), str(runtime), "-o", str(folder / "unit.so")])
                (folder / "unit.so").rename(target)
                shutil.rmtree(folder)
        return ctypes.CDLL(str(target))

    def _build_runtime(self) -> Path:
        target = self._directory / "runtime.so"
        with self._locked("runtime"):
            if not target.exists():
                made = self._directory / "runtime.part"
                self._run([*_FLAGS, "-shared", *map(str, sorted(SHIM_DIR.glob("*.cpp"))), "-o", str(made)])
                made.rename(target)
        return target

    def _run(self, arguments: Sequence[str], text: str = "") -> None:
        done = subprocess.run([self._compiler, *arguments], input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(done.stderr)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._directory / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _sources(mutation: Mutation | None, more: Path | None) -> dict[str, str]:
    """Every file that a unit may include, by name."""
    folders = [SOURCE_DIR, SHIM_DIR, *([more] if more else [])]
    files = {path.name: path for folder in folders for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".h")}
    texts = {name: path.read_text() for name, path in files.items()}
    if mutation is not None:
        if texts[mutation.source].count(mutation.old) != 1:
            raise ValueError(f"{mutation.source} does not hold once: {mutation.old}")
        texts[mutation.source] = texts[mutation.source].replace(mutation.old, mutation.new)
    dynamic = r"static \1* const \2 = reinterpret_cast<\1*>(emulator::dynamic_shared);"
    return {name: _DYNAMIC_SHARED.sub(dynamic, text) for name, text in texts.items()}


def _included(source: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Those that `source` includes, directly or not, and itself."""
    found: dict[str, str] = {}
    waiting = [source, "emulator.h"]
    while waiting:
        name = waiting.pop()
        if name in texts and name not in found:
            found[name] = texts[name]
            waiting += _INCLUDE.findall(texts[name])
    return found


def _unit(spec: KernelSpec, sources: Mapping[str, str]) -> str:
    """What is compiled. The namespace keeps a kernel's names, and its variables in shared memory, to itself."""
    clustered = any("__cluster_dims__(CLUSTER, 1, 1)" in text for text in sources.values())
    lines = ['#include "emulator.h"', *(f"#define {name} {value}" for name, value in spec.definitions.items())]
    lines.append(f"#define EMULATED_CLUSTER {spec.definitions.get('CLUSTER', 1) if clustered else 1}")
    lines += ["namespace {", f'#include "{spec.source}"', "}"]
    return "\n".join([*lines, *(f"EMULATE({kernel})" for kernel in spec.kernels)]) + "\n"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()[:32]
