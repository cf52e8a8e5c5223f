"""Every kernel compiles for every architecture without a GPU, and the hot ones keep everything in registers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from bench.gpu_kernel_times import measured_specs
from kernels.cache import CubinCache, default_directory
from kernels.compiler import ARCHITECTURES, SOURCE_DIR, CompileError, Compiler, architecture_of
from kernels.resources import parse_resources
from kernels.shapes import (
    KernelShape,
    KernelSpec,
    ShapeError,
    decode_shared_bytes,
    decode_split,
    kernel_specs,
    matvec_warps,
    most_decode_items,
    most_held,
    truncated_shared_bytes,
    truncated_spec,
)

LLAMA_1B = KernelShape(2048, 8192, 32, 8, 64, 16, qk_norm=False, float16=False)
LLAMA_8B = KernelShape(4096, 14336, 32, 8, 128, 16, qk_norm=False, float16=False)
HOT = {
    "matvec",
    "matvec_float",
    "matvec_silu",
    "decode_attention",
    "prefill_attention",
    "prefill_wgmma",
    "prefix_attention",
    "matvec_qkv",
    "matvec_norm_qkv",
    "matvec_norm_silu",
    "matvec_norm_float",
    "gemm_parts",
    "gemm_float",
    "gemm_silu",
    "rms_norm_add",
    "rms_norm_add_parts",
    "silu_mul",
    "qkv_epilogue",
    "choose",
    "choose_truncated",
    "choose_truncated_held",
}


def all_specs(architecture: str) -> list[KernelSpec]:
    """What the two shapes need; for the second one only what depends on it."""
    first, second = kernel_specs(LLAMA_1B, 8, architecture), kernel_specs(LLAMA_8B, 8, architecture)
    attention = (
        "decode_attention",
        "decode_attention-prefix",
        "prefill_attention",
        "prefill_wgmma",
        "prefix_attention",
    )
    names = (*attention, "matvec-14336-16", "fused-8")
    return [*first.values(), *(second[name] for name in names if name in second)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_hot_ones_do_not_spill(architecture: str) -> None:
    compiler = Compiler(architecture, CubinCache(default_directory()))
    specs = all_specs(architecture)
    with ThreadPoolExecutor(2) as pool:
        modules = list(pool.map(lambda spec: compiler.compile(spec.source, spec.definitions), specs))
    for spec, module in zip(specs, modules, strict=True):
        assert module.cubin[:4] == b"\x7fELF"
        assert set(module.resources) == set(spec.kernels), spec.source
        for name, resources in module.resources.items():
            if name in HOT:
                assert (resources.spill_stores, resources.spill_loads, resources.stack) == (0, 0, 0), (
                    f"{name}: {module.log}"
                )
        assert "C75" not in module.log, (
            f"{spec.source}: the assembler serializes products or ignores a register request"
        )


def test_every_source_is_in_the_list() -> None:
    assert {path.name for path in SOURCE_DIR.glob("*.cu")} == {spec.source for spec in all_specs("sm_90a")}


@pytest.mark.parametrize("path", sorted(SOURCE_DIR.glob("*.cu")), ids=lambda path: path.name)
def test_a_source_says_what_it_computes_what_bounds_it_and_how_it_got_there(path: Path) -> None:
    header = path.read_text().split("#include")[0]
    assert "// Bound by " in header
    assert "// Ladder\n//   1. " in header
    assert "(this one)" in header or "mma.sync" in header


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 8, 16, 32])
def test_decode_attention_fits_into_the_shared_memory_of_every_architecture(head_dim: int, group: int) -> None:
    shape = KernelShape(2048, 8192, 2 * group, 2, head_dim, 16, qk_norm=False, float16=False)
    assert decode_shared_bytes(shape, few=False) <= 99 << 10  # sm_89, sm_120
    assert decode_shared_bytes(shape, few=True) <= 163 << 10  # sm_80
    assert "decode_attention-few" not in kernel_specs(shape, 4, "sm_89")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 8, 32])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_decode_attention_keeps_everything_in_registers(architecture: str, group: int, head_dim: int) -> None:
    shape = KernelShape(2048, 8192, 2 * group, 2, head_dim, 16, qk_norm=False, float16=False)
    compiler, specs = Compiler(architecture, CubinCache(default_directory())), kernel_specs(shape, 8, architecture)
    for name in ("decode_attention", "decode_attention-few"):
        module = compiler.compile(specs[name].source, specs[name].definitions)
        (resources,) = module.resources.values()
        assert (resources.spill_stores, resources.spill_loads, resources.stack) == (0, 0, 0), module.log


@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B])
def test_decode_attention_of_few_rows_starts_beside_the_product_before_it(shape: KernelShape) -> None:
    compiler, specs = Compiler("sm_90a", CubinCache(default_directory())), kernel_specs(shape, 8, "sm_90a")

    def registers(module: str, kernel: str) -> int:
        resources = compiler.compile(specs[module].source, specs[module].definitions).resources[kernel]
        return -(-resources.registers // 8) * 8 * 32 * int(specs[module].definitions["WARPS"])

    few = registers("decode_attention-few", "decode_attention")
    assert all(few + registers("fused-8", kernel) <= 64 << 10 for kernel in ("matvec_norm_qkv", "matvec_qkv"))


@pytest.mark.parametrize(
    ("architecture", "room", "blocks"), [("sm_90a", 228, 3), ("sm_100", 228, 3), ("sm_120", 100, 1)]
)
def test_slices_of_a_row_fit_into_shared_memory(architecture: str, room: int, blocks: int) -> None:
    roomy, spec = room > 160, truncated_spec(architecture, clustered=True)
    (used,) = {
        resources.shared
        for resources in Compiler(architecture, CubinCache(default_directory()))
        .compile(spec.source, spec.definitions)
        .resources.values()
    }
    shared_bytes, holds = truncated_shared_bytes(128_256, roomy)
    assert holds and spec.definitions["BLOCKS"] == blocks
    assert blocks * (used + shared_bytes + 1024) <= room << 10  # the system keeps 1 KiB of each block's
    assert used + most_held(roomy) + 1024 <= room << 10
    assert [truncated_shared_bytes(vocab, roomy)[1] for vocab in (1, 151_936, 2_000_000)] == [True, True, False]


def test_only_measured_shapes_leave_cublas() -> None:
    assert "gemm-64" in kernel_specs(LLAMA_1B, 8, "sm_90a")
    assert "gemm-64" not in kernel_specs(LLAMA_1B, 8, "sm_100")
    assert "gemm-64" in kernel_specs(LLAMA_8B, 8, "sm_90a")
    assert "gemm-64" not in kernel_specs(replace(LLAMA_8B, intermediate_size=14_208), 8, "sm_90a")
    assert "gemm-128" in kernel_specs(LLAMA_1B, 8, "sm_90a")
    assert "gemm-128" not in kernel_specs(LLAMA_8B, 8, "sm_90a")


def test_measurements_have_what_a_model_leaves_to_cublas() -> None:
    for shape in (LLAMA_1B, LLAMA_8B):
        assert {"gemm-64", "gemm-128"} <= measured_specs(shape, 8, "sm_90a").keys()
    assert measured_specs(LLAMA_1B, 8, "sm_90a") == kernel_specs(LLAMA_1B, 8, "sm_90a")
    assert measured_specs(LLAMA_8B, 8, "sm_100") == kernel_specs(LLAMA_8B, 8, "sm_100")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 7, 32])
def test_prefix_attention_of_any_group_keeps_everything_in_registers(group: int, head_dim: int) -> None:
    shape = KernelShape(2048, 8192, 2 * group, 2, head_dim, 16, qk_norm=False, float16=False)
    compiler = Compiler("sm_90a", CubinCache(default_directory()))
    specs = kernel_specs(shape, 8, "sm_90a")
    for name in ("prefix_attention", "decode_attention-prefix"):
        module = compiler.compile(specs[name].source, specs[name].definitions)
        (resources,) = module.resources.values()
        assert (resources.spill_stores, resources.spill_loads, resources.stack) == (0, 0, 0), module.log
        assert "C75" not in module.log, module.log
    for architecture in ("sm_80", "sm_100"):
        assert "prefix_attention" not in kernel_specs(shape, 8, architecture)


def test_float16_compiles_too() -> None:
    shape = KernelShape(512, 512, 8, 2, 64, 16, qk_norm=True, float16=True)
    compiler = Compiler("sm_80", CubinCache(default_directory()))
    for name in ("decode_attention", "prefill_attention", "qkv_epilogue", "matvec-512-8"):
        spec = kernel_specs(shape, 4, "sm_80")[name]
        assert compiler.compile(spec.source, spec.definitions).cubin


@pytest.mark.parametrize(("split", "few_split"), [(1024, 512), (512, 1024), (256, 128)])
def test_work_lists_hold_what_any_step_needs(split: int, few_split: int) -> None:
    shape = replace(LLAMA_1B, split=split, few_split=few_split)
    assert [decode_split(shape, tokens, 900) for tokens in (1, 16, 17, 512)] == [few_split, few_split, split, split]
    assert [decode_split(shape, 1, 16 * few_split + more) for more in (0, 1)] == [few_split, split]
    assert f"'LARGEST_SPLIT': {max(split, few_split)}" in str(kernel_specs(shape, 8, "sm_90a")["row_state"].definitions)
    for context in (1, 511, 512, 513, 8192, 8193, 9000, 40_000):
        for rows in (1, 16, 17, 40):
            for begin in {0, max(0, context - 300)}:
                sizes = [decode_split(shape, tokens, context - begin) for tokens in range(1, 41) if tokens >= rows]
                needed = max(rows * ((context - 1) // size - begin // size + 1) for size in sizes)
                assert needed <= most_decode_items(shape, rows, context)
                assert needed <= most_decode_items(shape, 40, context)


def test_shapes_that_the_kernels_do_not_cover_are_named() -> None:
    for name in ("split", "few_split"):
        with pytest.raises(ShapeError, match=f"^{name}: must be a multiple of 128, not 192"):
            replace(LLAMA_1B, **{name: 192})
    with pytest.raises(ShapeError, match="head_dim"):
        KernelShape(2048, 8192, 32, 8, 80, 16, qk_norm=False, float16=False)
    with pytest.raises(ShapeError, match="block_size"):
        KernelShape(2048, 8192, 32, 8, 64, 24, qk_norm=False, float16=False)
    with pytest.raises(CompileError, match=r"7\.5"):
        architecture_of(7, 5)
    assert architecture_of(9, 0) == "sm_90a"
    assert [matvec_warps(k) for k in (2048, 576, 896, 100)] == [8, 6, 7, 0]


def test_the_report_of_the_assembler_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function 'a' for 'sm_90a'\n"
        "ptxas         .     256 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 34 registers, used 1 barriers, 256 bytes cumulative stack size, 4896 bytes smem\n"
        "ptxas info    : Compiling entry function 'unfinished' for 'sm_90a'\n"
    )
    found = parse_resources(log)
    assert set(found) == {"a"}
    assert (found["a"].registers, found["a"].stack, found["a"].spill_stores, found["a"].spill_loads, found["a"].shared) == (
        34, 256, 12, 16, 4896,
    )  # fmt: skip
