"""The emulator names what a kernel does wrong, and goes on with the next launch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from cuda.core import Stream

from kernels.launcher import Float, Int
from kernels.shapes import KernelSpec
from tests.emulator.compile import Builder, BuildError, Mutation
from tests.emulator.guards import guarded
from tests.emulator.library import EmulatedLibrary, EmulatedOps, EmulatorError, emulated_map
from tests.gpu.gpu_harness import ints, make_shape

FOLDER = Path(__file__).parent / "faults"
FAULTS = {
    "nobody_arrives": "block (0, 0) is in a deadlock; 32 threads of warp 0 wait at a barrier; 32 threads of warp 1 wait at a barrier",
    "no_barrier": "arrives at a barrier that was not initialised",
    "beyond_shared_memory": "beyond_shared_memory: block (0, 0) wrote byte 256 of 256 of dynamic shared memory",
    "beyond_the_tensor": "beyond_the_tensor: wrote outside of a tensor (64,) of torch.int32",
    "beyond_an_array": "beyond_an_array: block (0, 0) thread 63: an index beyond its array at faults.cu:",
    "a_lane_leaves": "31 threads of warp 1 meet their warp in __syncwarp; 1 threads of warp 1 have left",
    "lanes_part": "lanes of warp 1 meet in ",
    "a_warp_waits_for_a_block_that_waits_for_it": "1 threads of warp 0 wait at __syncthreads",
    "misaligned_load": "a misaligned access at faults.cu:",
    "misaligned_copy": "an access of 16 bytes is not aligned to them",
    "copies_under_way": "ends while 1 of its copies are under way",
    "source_changes": "the source of a copy has changed while it was under way",
}
CLUSTER_FAULTS = {
    "a_block_leaves": "reads of block 1 of its cluster, which has left",
    "too_early": "reads of another block that may not have begun",
    "no_such_block": "reads of block 2 of a cluster of 2",
    "not_shared": "what it reads of another block does not lie in shared memory",
    "arrives_twice": "arrives twice at its cluster's barrier",
    "does_not_arrive": "waits for its cluster without having arrived",
    "does_not_wait": "ends without having waited for its cluster, where it arrived",
    "a_thread_waits_for_its_block_only": "31 threads of warp 0 wait for their cluster",
}
PRODUCT_FAULTS = {
    "more_bytes_than_expected": "more bytes of tiles come than a barrier expects",
    "fewer_bytes_than_expected": "is in a deadlock; 32 threads of warp 0 wait at a barrier",
    "does_not_begin": "multiplies without products_begin",
    "products_under_way": "ends while 5 of its products are under way",
    "sums_change": "sums have changed while products that add to them were under way",
    "registers_change": "registers of a product have changed while it was under way",
    "lanes_differ": "lanes ask for different products",
    "beyond_the_end": "an operand of a product lies beyond shared memory",
    "other_dimensions": "a tile of 4 dimensions of a tensor of 2",
    "numbers_differ": "barrier 3 is for ",
    "too_few_meet": "is in a deadlock; 32 threads of warp 0 wait at a numbered barrier",
}
NEIGHBOURS = ("neighbours_of_a_cluster", "neighbours_of_a_cluster_in_a_hurry")
KERNELS = ("neighbours", "neighbours_in_a_hurry", "ping_pong", "reads_a_copy", *FAULTS)
NO_STREAM = cast(Stream, None)


@pytest.fixture
def library(builder: Builder) -> EmulatedLibrary:
    clusters = KernelSpec("clusters.cu", {"CLUSTER": 2}, (*NEIGHBOURS, *CLUSTER_FAULTS))
    products = KernelSpec("products.cu", {}, ("squares", "a_tile_on_its_way", *PRODUCT_FAULTS))
    specs = {"faults": KernelSpec("faults.cu", {}, KERNELS), "clusters": clusters, "products": products}
    return EmulatedLibrary(builder, specs, more=FOLDER)


def launch(library: EmulatedLibrary, kernel: str, out: torch.Tensor) -> None:
    library.launch(
        NO_STREAM, "faults", kernel, (1,), 64, out.data_ptr(), shared_bytes=256 if "beyond" in kernel else 1024
    )


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_named(library: EmulatedLibrary, kernel: str) -> None:
    out = ints([0] * 64, "cpu")
    for _ in range(3):
        with pytest.raises(EmulatorError, match=re.escape(FAULTS[kernel])):
            launch(library, kernel, out)
        out = ints([0] * 64, "cpu")  # the guards of the last one are broken
        launch(library, "neighbours", out)
        assert out.tolist() == [(i + 33) % 64 for i in range(64)]


@pytest.mark.parametrize("kernel", CLUSTER_FAULTS)
def test_a_fault_of_a_cluster_is_named(library: EmulatedLibrary, kernel: str) -> None:
    out = ints([0] * 256, "cpu")
    for _ in range(3):
        with pytest.raises(EmulatorError, match=re.escape(CLUSTER_FAULTS[kernel])):
            library.launch(NO_STREAM, "clusters", kernel, (4,), 64, out.data_ptr())
        library.launch(NO_STREAM, "clusters", "neighbours_of_a_cluster", (4,), 64, out.data_ptr())
        assert out.tolist() == [(block ^ 1) * 64 + (i + 33) % 64 for block in range(4) for i in range(64)]


@pytest.mark.parametrize("kernel", PRODUCT_FAULTS)
def test_a_fault_of_products_and_tiles_is_named(library: EmulatedLibrary, kernel: str) -> None:
    tile = guarded(torch.randn(50, 70).to(torch.bfloat16))  # of 64 x 64: rows 50 to 63 are zeros
    out = guarded(torch.zeros(64))

    def run(kernel: str) -> None:
        library.launch(
            NO_STREAM, "products", kernel, (1,), 128, emulated_map(tile, 64), out.data_ptr(), shared_bytes=8192
        )

    for _ in range(3):
        with pytest.raises(EmulatorError, match=re.escape(PRODUCT_FAULTS[kernel])):
            run(kernel)
        run("squares")
        expected = torch.nn.functional.pad(tile[:, :64].float() @ tile[1, :64].float(), (0, 14))
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_a_tile_that_nobody_waits_for_is_named_where_it_comes_too_late(library: EmulatedLibrary) -> None:
    tile, out = guarded(torch.zeros(64, 64, dtype=torch.bfloat16)), guarded(torch.zeros(64))
    with pytest.raises(EmulatorError, match="ends while 1 of its tiles are on their way"):
        for _ in range(50):
            library.launch(
                NO_STREAM,
                "products",
                "a_tile_on_its_way",
                (1,),
                128,
                emulated_map(tile, 64),
                out.data_ptr(),
                shared_bytes=8192,
            )


def test_blocks_of_a_cluster_go_their_own_ways(library: EmulatedLibrary) -> None:
    seen = set()
    for _ in range(20):
        out = ints([0] * 256, "cpu")
        library.launch(NO_STREAM, "clusters", NEIGHBOURS[1], (4,), 64, out.data_ptr())
        seen.add(tuple(out.tolist()))
    assert len(seen) > 3
    with pytest.raises(EmulatorError, match="the grid is not whole clusters"):
        library.launch(NO_STREAM, "clusters", NEIGHBOURS[0], (3,), 64, out.data_ptr())


def test_barriers_have_phases(library: EmulatedLibrary) -> None:
    for _ in range(20):
        out = ints([0] * 64, "cpu")
        launch(library, "ping_pong", out)
        assert int(out[0]) == 32


def test_what_is_not_waited_for_is_missed_sooner_or_later(library: EmulatedLibrary) -> None:
    seen = set()
    for _ in range(20):
        out = ints([0] * 64, "cpu")
        launch(library, "neighbours_in_a_hurry", out)
        seen.add(tuple(out.tolist()))
    assert len(seen) > 5


def test_a_copy_is_there_when_it_was_waited_for(library: EmulatedLibrary) -> None:
    source = ints(list(range(256)), "cpu")
    for waits, expected in ((1, source.tolist()), (0, [-1] * 256)):
        out = ints([0] * 256, "cpu")
        arguments = (source.data_ptr(), out.data_ptr(), Int(waits))
        library.launch(NO_STREAM, "faults", "reads_a_copy", (1,), 64, *arguments, shared_bytes=1024)
        assert out.tolist() == expected


def test_arguments_and_shared_memory_are_those_of_the_kernel(library: EmulatedLibrary) -> None:
    out = ints([0] * 256, "cpu")
    for arguments, text in (
        ((out.data_ptr(),), "1 arguments, the kernel takes 3"),
        ((out.data_ptr(), out.data_ptr(), Float(1)), "argument 2 is of kind f, the kernel takes i"),
        ((out.data_ptr(), Int(0), Int(1)), "argument 1 is of kind i, the kernel takes p"),
    ):
        with pytest.raises(EmulatorError, match=text):
            library.launch(NO_STREAM, "faults", "reads_a_copy", (1,), 64, *arguments, shared_bytes=1024)
    with pytest.raises(EmulatorError, match="50000 bytes of dynamic shared memory were not asked for"):
        library.launch(NO_STREAM, "faults", "neighbours", (1,), 64, out.data_ptr(), shared_bytes=50_000)


def test_a_source_that_does_not_compile_says_where(builder: Builder) -> None:
    ops = EmulatedOps(
        builder, make_shape(), mutation=Mutation("embedding.cu", "VECTORS = HIDDEN / 8", "VECTORS = HIDEN / 8")
    )
    table = torch.zeros(1, 512, dtype=torch.bfloat16)
    with pytest.raises(BuildError, match=r"embedding\.cu:11:.*HIDEN"):
        ops.embedding(table, ints([0], "cpu"), table.clone(), 1)
