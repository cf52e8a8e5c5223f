"""What measurements of single kernels share: times from replays of graphs, what the device can do, and a library of kernels."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cuda.core import Device, Stream

from kernels.cache import CubinCache, default_directory
from kernels.compiler import Compiler, architecture_of
from kernels.launcher import KernelLibrary
from kernels.ops import KernelOps
from kernels.shapes import GEMM_TILES, KernelShape, KernelSpec, gemm_rows, gemm_spec, kernel_specs

Body = Callable[[], object]


def seconds_of(bodies: Sequence[Body], repeats: int = 15) -> float:
    """Time of one body, from replays of a graph of all of them."""
    for body in bodies:
        body()
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    for body in bodies:
        body()
    graph.capture_end()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3 / len(bodies))
    return float(statistics.median(times))


def random(*size: int) -> torch.Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.05


def ints(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


class Bench:
    """Collects rows of (name, seconds, bytes, operations)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        copied = torch.zeros(1 << 30, dtype=torch.int32, device="cuda")
        target = torch.empty_like(copied)
        self.bandwidth = 8 * copied.numel() / seconds_of([lambda: torch.neg(copied, out=target)])
        a, b = random(8192, 8192), random(8192, 8192)
        self.operations = 2 * 8192**3 / seconds_of([lambda: torch.mm(a, b)], 7)

    def add(self, name: str, bodies: Sequence[Body], num_bytes: float = 0, operations: float = 0) -> None:
        """Time it and print its row."""
        seconds = seconds_of(bodies)
        row: dict[str, Any] = {"name": name, "us": round(seconds * 1e6, 2)}
        if num_bytes:
            row |= {
                "TB_per_s": round(num_bytes / seconds / 1e12, 3),
                "share": round(num_bytes / seconds / self.bandwidth, 3),
            }
        if operations:
            row |= {
                "TFLOP_per_s": round(operations / seconds / 1e12, 1),
                "share": round(operations / seconds / self.operations, 3),
            }
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def measured_specs(shape: KernelShape, matvec_depth: int, architecture: str) -> dict[str, KernelSpec]:
    """What a worker compiles, and gemm_wgmma.cu for all numbers of rows that it takes: which of them cuBLAS gets is to be measured."""
    specs = kernel_specs(shape, matvec_depth, architecture)
    if gemm_rows(shape, architecture):
        specs |= {tile.name: gemm_spec(tile, {"FLOAT16": 1} if shape.float16 else {}) for tile in GEMM_TILES}
    return specs


def make_ops(shape: KernelShape) -> KernelOps:
    Device(0).set_current()
    properties = torch.cuda.get_device_properties(0)
    architecture = architecture_of(properties.major, properties.minor)
    compiler = Compiler(architecture, CubinCache(default_directory()))
    depth = 8 if Device(0).properties.max_shared_memory_per_block_optin >= 160 * 1024 else 4
    library = KernelLibrary(compiler, measured_specs(shape, depth, architecture), 0, overlap=properties.major >= 9)
    stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
    return KernelOps(library, shape, stream, properties.multi_processor_count, depth)
