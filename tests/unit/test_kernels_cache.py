"""The cubin cache: what changes a key, and what a broken, foreign or unwritable cache does."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from kernels.cache import CubinCache
from kernels.compiler import CompiledModule, CompileError, Compiler

SOURCE = '#include "part.cuh"\nextern "C" __global__ void k(int* x) { *x = VALUE + PART; }\n'


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "k.cu").write_text(SOURCE)
    (directory / "part.cuh").write_text("#define PART 1\n")
    return directory


def compile_in(sources: Path, cache: Path, architecture: str = "sm_80", value: int = 1) -> CompiledModule:
    return Compiler(architecture, CubinCache(cache)).compile("k.cu", {"VALUE": value}, sources)


def test_the_key_covers_source_includes_definitions_and_architecture(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = compile_in(sources, cache)
    assert not first.cached
    again = compile_in(sources, cache)
    assert again.cached
    assert (again.cubin, again.log, again.resources) == (first.cubin, first.log, first.resources)
    assert not compile_in(sources, cache, value=2).cached
    assert not compile_in(sources, cache, architecture="sm_90a").cached
    (sources / "part.cuh").write_text("#define PART 2\n")
    assert not compile_in(sources, cache).cached
    (sources / "k.cu").write_text(SOURCE + "\n")
    assert not compile_in(sources, cache).cached


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "foreign"])
def test_a_damaged_entry_is_compiled_again_and_mended(sources: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    sound = compile_in(sources, cache)
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    entry.write_bytes({"empty": b"", "short": content[:-100], "flipped": flipped, "foreign": b"x" * 500}[damage])
    mended = compile_in(sources, cache)
    assert not mended.cached
    assert mended.cubin == sound.cubin
    assert compile_in(sources, cache).cached


def test_many_writers_at_once_leave_whole_entries_and_nothing_else(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        modules = list(pool.map(lambda _: compile_in(sources, cache), range(8)))
    assert len({module.cubin for module in modules}) == 1
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]
    assert compile_in(sources, cache).cached


def test_a_cache_that_cannot_be_written_costs_time_only(sources: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache's directory should be")
    for _ in range(2):
        assert not compile_in(sources, blocked / "cache").cached


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    CubinCache(tmp_path).store("key", b"cubin", "log")
    assert list(tmp_path.iterdir()) == []


def test_an_error_shows_file_and_line(sources: Path, tmp_path: Path) -> None:
    (sources / "k.cu").write_text('extern "C" __global__ void k() {\n  nonsense;\n}\n')
    with pytest.raises(CompileError, match=r'(?s)k\.cu\(2\): error: identifier "nonsense" is undefined'):
        compile_in(sources, tmp_path / "cache")
    with pytest.raises(CompileError, match="No such file"):
        Compiler("sm_80", CubinCache(tmp_path)).compile("missing.cu", {}, sources)
