"""The host's idea of RowFields against the device's, and the host's side of a step's layout."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from kernels.compiler import SOURCE_DIR
from kernels.row_layout import PENALTIES, PROCESS, ROW_FIELDS, ROW_WORDS, TRUNCATE
from worker.backend import BackendError
from worker.backends.cuda_graphs import bucket_for, buckets
from worker.backends.cuda_memory import MemoryPlan
from worker.backends.cuda_model import prefill_tiles
from worker.backends.cuda_rows import allowed_bits

SIZES = {"int": ("i", 4), "u32": ("u", 4), "float": ("f", 4), "u64": ("u", 8)}


def test_row_fields_are_laid_out_as_the_kernels_read_them() -> None:
    text = (SOURCE_DIR / "row_state.cuh").read_text()
    body = re.search(r"struct RowFields \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    offset = 0
    names = []
    for kind, declared in re.findall(r"^\s*(int|u32|float|u64) ([^;]+);", body[1], re.MULTILINE):
        letter, size = SIZES[kind]
        for name in declared.split(", "):
            offset = -(-offset // size) * size
            dtype, place = ROW_FIELDS.fields[name][:2]
            assert (dtype.kind, dtype.itemsize, place) == (letter, size, offset), name
            offset += size
            names.append(name)
    assert tuple(names) == ROW_FIELDS.names
    assert ROW_FIELDS.itemsize == ROW_WORDS * 4 >= offset
    for name, value in (("PROCESS", PROCESS), ("TRUNCATE", TRUNCATE), ("PENALTIES", PENALTIES)):
        assert re.search(rf"constexpr u32 {name} = {value};", text)
    assert f"ROW_WORDS = {ROW_WORDS};" in text


def test_prefill_tiles_cover_every_query_once_longest_first() -> None:
    scheduled, contexts = np.array([5, 1, 130, 64], np.int32), np.array([5, 900, 2000, 64], np.int32)
    tiles = prefill_tiles(scheduled, contexts, group=4, tile_rows=128)
    assert sorted(map(tuple, tiles.tolist())) == [(0, 0), *((2, i) for i in range(5)), (3, 0), (3, 1)]
    assert tiles[0].tolist() == [2, 4]
    assert prefill_tiles(np.array([1, 1], np.int32), np.array([9, 9], np.int32), 4, 128).shape == (0, 2)


def test_buckets_hold_every_batch() -> None:
    for most in (1, 2, 7, 40, 256, 1000):
        sizes = buckets(most)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == most
        assert all(bucket_for(rows, sizes) >= rows for rows in range(1, most + 1))


def test_allowed_bits() -> None:
    bits = allowed_bits((0, 33, 69), 70).view(np.uint32)
    assert bits.tolist() == [1, 2, 32]


def test_memory_that_does_not_suffice_is_told_with_the_numbers() -> None:
    plan = MemoryPlan(
        free=8 << 30, fraction=0.5, weights=2 << 30, workspace=1 << 30, bytes_per_block=1 << 20, block_size=16
    )
    assert plan.num_blocks(None, 16) == 512
    assert plan.num_blocks(100, 1600) == 100
    with pytest.raises(
        BackendError, match=r"513 blocks do not fit.*8,192 MiB free.*gives 4,096.*take 2,048.*so 512 fit"
    ):
        plan.num_blocks(513, 16)
    with pytest.raises(BackendError, match=r"would hold 8192 tokens, one sequence needs 8193.*--max-model-len"):
        plan.num_blocks(None, 8193)
