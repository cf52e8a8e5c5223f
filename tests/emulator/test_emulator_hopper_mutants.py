"""Defects sown into the kernels of sm_90a, each of which their checks must find in the emulator."""

from __future__ import annotations

from unittest.mock import patch

import pytest

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from tests.emulator.compile import Builder, Mutation
from tests.emulator.sown import Make, must_find
from tests.gpu.gpu_harness import PagedRows, make_shape
from tests.gpu.test_gpu_attention import check_prefill
from tests.gpu.test_gpu_layers import check_gemm
from tests.gpu.test_gpu_shared_prefix import Decode, SharedRows, check_shared


def prefill(make: Make) -> None:
    for head_dim in (64, 128):
        shape = make_shape(4, 1, head_dim)
        check_prefill(make(shape), shape, PagedRows([65, 520], 1, head_dim, device="cpu"), 0, [])


def prefill_of_heads(make: Make) -> None:
    shape = make_shape(4, 2, 64)
    check_prefill(make(shape), shape, PagedRows([300], 2, 64, device="cpu"), 0, [])


def several_tiles(make: Make) -> None:
    """The warpgroups of a block end at different tiles."""
    shape = make_shape(1, 1, 128)
    check_prefill(make(shape), shape, PagedRows([550], 1, 128, device="cpu"), 0, [[(0, 60, 550)]])


def prefix(make: Make) -> None:
    """In one part, whose tiles follow each other."""
    shape, prefixes, members = make_shape(8, 2, 64), [640], [(0, 1 + i) for i in range(32)] + [(0, 300)]
    with patch("worker.backends.shared_prefix.part_tokens", lambda *_: 640):
        check_shared(Decode(make(shape), shape, SharedRows(prefixes, members, 2, 64, "cpu")), prefixes, members)


def prefix_of_128(make: Make) -> None:
    """The same where two warpgroups take turns."""
    shape, prefixes, members = make_shape(8, 2, 128), [640], [(0, 1 + i) for i in range(32)]
    with patch("worker.backends.shared_prefix.part_tokens", lambda *_: 640):
        check_shared(Decode(make(shape), shape, SharedRows(prefixes, members, 2, 128, "cpu")), prefixes, members)


def products(make: Make) -> None:
    check_gemm(make(make_shape(2, 1, 64, hidden=256, wide=512)), 256, 1024, 2, (17, 65), "cpu")


PREFILL, PREFIX, GEMM = "prefill_wgmma.cu", "prefix_attention.cu", "gemm_wgmma.cu"
TILES, WGMMA = "attention_tiles.cuh", "wgmma.cuh"

MUTANTS = {
    "sums are read while products add to them": (
        prefill,
        Mutation(TILES, "keys + at.stage * TILE_VECTORS);\n  products_wait<0>();", "keys + at.stage * TILE_VECTORS);"),
    ),
    "keys are multiplied before they are there": (
        prefill,
        Mutation(TILES, "barrier_wait(&b.full[0][next.stage], next.phase);", ""),
    ),
    "values are multiplied before they are there": (
        prefill,
        Mutation(TILES, "barrier_wait(&b.full[1][at.stage], at.phase);\n    turns.take();", "turns.take();"),
    ),
    "keys are given back before the products have ended": (
        prefill,
        Mutation(
            TILES,
            "products_wait<1>();\n    if (elected) barrier_arrive(&b.empty[0][next.stage]);",
            "if (elected) barrier_arrive(&b.empty[0][next.stage]);\n    products_wait<1>();",
        ),
    ),
    "values are given back before the products have ended": (
        prefill,
        Mutation(
            TILES,
            "    products_wait<0>();\n    if (elected) barrier_arrive(&b.empty[1][at.stage]);\n    settled",
            "    if (elected) barrier_arrive(&b.empty[1][at.stage]);\n    products_wait<0>();\n    settled",
        ),
    ),
    "scores are read before they are there": (prefill, Mutation(TILES, "products_wait<1>();", "products_wait<2>();")),
    "weights change while products read them": (
        prefill,
        Mutation(
            TILES,
            "    products_wait<0>();\n    if (elected) barrier_arrive(&b.empty[1][at.stage]);\n    settled(w.o);\n    "
            "apply(w, s, shrink, p);",
            "    apply(w, s, shrink, p);\n    products_wait<0>();\n    if (elected) barrier_arrive(&b.empty[1][at.stage]);",
        ),
    ),
    "nobody gives the first turn": (
        prefill,
        Mutation(TILES, "if (group == 1 && left > 0) arrive_at(own(0), 256);", ""),
    ),
    "one turn too few": (prefill, Mutation(TILES, "left > 1 || (left == 1 && group == 0)", "left > 1")),
    "turns that the other does not take": (
        several_tiles,
        Mutation(PREFILL, "min(last, last_of(others)) - t.first", "last - t.first"),
    ),
    "the row's last tile comes with what lies behind it": (
        prefill,
        Mutation(PREFILL, "(tile + 1) * TILE_KEYS <= t.end", "tile * TILE_KEYS <= t.end"),
    ),
    "tiles of another head": (
        prefill_of_heads,
        Mutation(PREFILL, "int first_row = kv_head * BLOCK_SIZE", "int first_row = 0"),
    ),
    "panels of a tile are exchanged": (
        prefill,
        Mutation(TILES, "cache, full, panel * 64,", "cache, full, (panel ^ (PANELS - 1)) * 64,"),
    ),
    "a stage is given back twice": (
        prefill,
        Mutation(
            TILES, "if (elected) barrier_arrive(&b.empty[0][at.stage]);", "barrier_arrive(&b.empty[0][at.stage]);"
        ),
    ),
    "nobody says that products begin": (
        prefill,
        Mutation(TILES, "products_begin();\n  start_scores", "start_scores"),
    ),
    "a warpgroup does not wait for its queries": (prefill, Mutation(PREFILL, "warpgroup_sync(group);", "")),
    "pieces lie where they come": (
        prefill,
        Mutation(PREFILL, "panel_place(part * 16 + i, chunk % 8)", "(part * 16 + i) * 8 + chunk % 8"),
    ),
    "older sums are not scaled": (prefill, Mutation(TILES, "w.o[i] *= shrink[i / 2 % 2];", "")),
    "copies are handed over before they have come": (prefill, Mutation(PREFILL, "copies_done<0>();\n", "")),
    "lanes hand over before all have copied": (
        prefill,
        Mutation(PREFILL, "publish_to_products();\n  __syncwarp();", "publish_to_products();"),
    ),
    "panels of values are as far apart as rows of queries": (
        prefill,
        Mutation(TILES, "operand(values, PANEL_VECTORS * 16)", "operand(values, PANEL_VECTORS * 8)"),
    ),
    "prefix tiles of another head": (
        prefix,
        Mutation(PREFIX, "first_row + at % KV_HEADS * BLOCK_SIZE", "first_row"),
    ),
    "prefix keys for values": (prefix, Mutation(PREFIX, "kind ? values_row : 0", "0")),
    "prefix stages are filled before they are free": (
        prefix,
        Mutation(PREFIX, "barrier_wait(&b.empty[kind][stage], n / STAGES % 2 ^ 1);", ""),
    ),
    "a prefix of fewer turns than tiles": (
        prefix_of_128,
        Mutation(PREFIX, "CONSUMERS == 2 ? last - w.first_tile : 0", "group == 0 ? last - w.first_tile : 1"),
    ),
    "a tile's bytes are not all waited for": (
        products,
        Mutation(
            GEMM,
            "barrier_expect(&ring.full[at.stage], vectors * 16);",
            "barrier_expect(&ring.full[at.stage], vectors * 8);",
        ),
    ),
    "more bytes are waited for than come": (
        products,
        Mutation(
            GEMM,
            "barrier_expect(&ring.full[at.stage], vectors * 16);",
            "barrier_expect(&ring.full[at.stage], vectors * 32);",
        ),
    ),
    "a stage is filled while it is multiplied": (
        products,
        Mutation(GEMM, "products_wait<1>();", "products_wait<2>();"),
    ),
    "stages are filled before they are free": (
        products,
        Mutation(GEMM, "barrier_wait(&ring.empty[at.stage], at.phase ^ 1);", ""),
    ),
    "sums are stored before they are there": (
        products,
        Mutation(GEMM, "products_wait<0>();\n      release();", "release();"),
    ),
    "weights are multiplied before they are there": (
        products,
        Mutation(GEMM, "barrier_wait(&ring_w.full[of_w.stage], of_w.phase);", ""),
    ),
    "a ring's phases stay": (products, Mutation(GEMM, "stage = 0, phase ^= 1", "stage = 0")),
    "steps of k are a tile apart": (products, Mutation(GEMM, "operand(w) + i * 2", "operand(w) + i * 4")),
}


@pytest.mark.parametrize("defect", MUTANTS)
def test_a_defect_is_found(builder: Builder, defect: str) -> None:
    must_find(builder, *MUTANTS[defect], hopper=True)
