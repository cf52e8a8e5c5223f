"""Block pool and prefix hashes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scheduler.core import InvalidField, Request, SamplingParams, WorkerSpec
from scheduler.core.block_pool import BlockPool
from scheduler.core.prefix import chain_for, hash_seed, num_cached_blocks

SPEC = WorkerSpec("m", b"d" * 32, max_rows=2, max_num_batched_tokens=8, max_model_len=64, block_size=4, num_blocks=8)


def request(ids: list[int], **options: object) -> Request:
    return Request(1, 1, "m", np.array(ids, np.int32), SamplingParams(4), **options)


def test_evicts_only_when_nothing_is_free_and_tail_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block, name in zip(blocks.tolist(), (b"0", b"1", b"2"), strict=True):
        pool.register(block, name)
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 3, 0)
    pool.allocate(1)
    assert [pool.lookup(name) is not None for name in (b"0", b"1", b"2")] == [True, True, True]
    pool.allocate(1)
    assert [pool.lookup(name) is not None for name in (b"0", b"1", b"2")] == [True, True, False]
    pool.check_integrity()


def test_a_hit_block_has_two_owners_and_outlives_the_first() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.register(int(blocks[0]), b"name")
    pool.touch(blocks.tolist())
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_cached == 1
    pool.touch(blocks.tolist())
    assert (pool.num_used, pool.num_cached) == (1, 0)
    pool.check_integrity()


def test_unregistered_blocks_cannot_be_hit() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.register(int(blocks[0]), b"a")
    pool.register(int(blocks[1]), b"b")
    pool.release(blocks[:1])
    pool.clear_cache()
    assert pool.lookup(b"a") is None
    assert pool.lookup(b"b") is None
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 0, 1)
    pool.check_integrity()


def test_integrity_check_sees_a_block_in_two_places() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.ref_count[:] = 1
    with pytest.raises(RuntimeError, match="free"):
        pool.check_integrity()


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, model_digest=b"e" * 32),
        replace(SPEC, kv_dtype="float8_e4m3fn"),
        replace(SPEC, hash_version=2),
        replace(SPEC, block_size=8),
    ],
)
def test_hash_seed_depends_on_what_the_content_depends_on(other: WorkerSpec) -> None:
    assert hash_seed(SPEC, request([1])) != hash_seed(other, request([1]))


def test_hash_seed_separates_salts_and_adapters_and_never_mixes_them_up() -> None:
    options = [{}, {"cache_salt": b"ab"}, {"adapter": "ab"}, {"adapter": "a", "cache_salt": b"b"}]
    assert len({hash_seed(SPEC, request([1], **option)) for option in options}) == 4


def test_block_hash_covers_all_tokens_before_it() -> None:
    one, two = request([1, 2, 3, 4, 5, 6, 7, 8]), request([9, 2, 3, 4, 5, 6, 7, 8])
    first = chain_for(SPEC, one).extend(one.prompt_token_ids, 2)
    second = chain_for(SPEC, two).extend(two.prompt_token_ids, 2)
    assert first[1] != second[1]


def test_window_needs_only_the_blocks_that_are_still_read() -> None:
    spec = replace(SPEC, window=4)
    pool = BlockPool(8)
    names = [bytes([index]) for index in range(4)]
    blocks = pool.allocate(2).tolist()
    pool.register(blocks[0], names[2])
    assert num_cached_blocks(SPEC, pool, names) == 0
    assert num_cached_blocks(spec, pool, names) == 3  # position 12 reads 9 to 12: block 2 is enough
    wider = replace(spec, window=8)  # position 12 reads 5 to 12: blocks 1 and 2
    assert num_cached_blocks(wider, pool, names) == 0
    pool.register(blocks[1], names[1])
    assert num_cached_blocks(wider, pool, names) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_batched_tokens", 1),
        ("max_rows", 0),
        ("num_blocks", 0),
        ("run_ahead", 5),
        ("window", 0),
        ("block_size", 0),
    ],
)
def test_worker_spec_names_the_wrong_field(field: str, value: int) -> None:
    with pytest.raises(InvalidField) as caught:
        replace(SPEC, **{field: value})
    assert caught.value.field == field or field == "max_rows"


@pytest.mark.parametrize(("field", "most"), [("max_model_len", 2**30), ("block_size", 2**30)])
def test_worker_spec_bounds_the_tokens_of_its_rows_in_whole_blocks(field: str, most: int) -> None:
    assert getattr(replace(SPEC, **{field: most}), field) == most
    with pytest.raises(InvalidField, match="max_model_len: in whole blocks"):
        replace(SPEC, **{field: most + 1})


def test_request_names_the_wrong_field() -> None:
    with pytest.raises(InvalidField, match="prompt_token_ids"):
        request([])
    with pytest.raises(InvalidField, match="prompt_token_ids"):
        request([-1])
    with pytest.raises(InvalidField, match="max_tokens"):
        request([1], output_token_ids=np.arange(4))
