"""Compiles kernels for this machine's processor and runs them on the threads of torch's own OpenMP pool.

A second pool on the same cores would halve the speed of both.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import llvmlite.binding as llvm
import torch

from worker.cpu.emitter import COUNTERS

_Arguments = ctypes.c_int64 * (COUNTERS[-1] + 8)


class Kernels:
    """The compiled functions of one module; their code lives as long as this does."""

    def __init__(self, source: str, names: Sequence[str]) -> None:
        self._engine = _compiled(source)
        self._addresses = {name: self._engine.get_function_address(name) for name in names}

    def launch(self, name: str, arguments: Sequence[int], threads: int) -> None:
        """Run `void name(i64 *arguments)` in each of so many threads, and wait for all.

        Pointers stay valid, and what they point at untouched by others, until the call returns.
        """
        packed = _Arguments(*arguments)
        _parallel()(self._addresses[name], ctypes.addressof(packed), threads, 0)


def has_feature(name: str) -> bool:
    """Whether this processor has a feature, by LLVM's name."""
    return bool(llvm.get_host_cpu_features().get(name))


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    # Where 512 bits are to be had, LLVM would still split the vectors on processors that once slowed down for them.
    wide = ",-prefer-256-bit" if has_feature("avx512f") else ""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten() + wide, opt=3
    )
    module = llvm.parse_assembly(source)
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


@functools.cache
def _parallel() -> ctypes._NamedFuncPointer:
    """`GOMP_parallel(function, data, threads, flags)` of torch's own OpenMP runtime; Intel's and LLVM's export it too."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        try:
            parallel = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    raise RuntimeError(
        "torch's OpenMP runtime was not found beside its libraries; the CPU's kernels run on its threads"
    )
