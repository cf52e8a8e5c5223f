"""What a step tells the device: shapes of graphs, and the padding that makes a step one of them. No GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.backends.cuda_columns import MixedShapes, StepColumns, fill_columns, pad_decode, pad_mixed
from worker.backends.cuda_model import prefill_tiles

GROUP, TILE_ROWS = 4, 192


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(40, 256))
def test_a_padded_step_covers_each_token_once_and_loses_nothing(counts: list[int], max_rows: int) -> None:
    scheduled = np.array(counts, np.int32)
    total, count = int(scheduled.sum()), len(counts)
    shapes = MixedShapes(max_rows, 8192, GROUP, TILE_ROWS)
    tiles = prefill_tiles(scheduled, scheduled, GROUP, TILE_ROWS)
    shape = shapes.find(total, count, len(tiles))
    if shape is None:
        assert total > 512 or len(tiles) > total * GROUP // TILE_ROWS + 32
        return
    assert count < shape.rows <= max_rows + 1
    assert total <= shape.tokens <= 512
    assert len(tiles) <= shape.tiles <= shapes.max_tiles
    assert shape.tokens - total < max(16, total), "half of a step or more is padding"
    on_device = StepColumns(max_rows, shapes.max_tiles, torch.zeros(1, 1, dtype=torch.int32), torch.device("cpu"))
    columns = np.full(on_device.size, 77, np.int32)
    q_start = np.cumsum(scheduled) - scheduled
    fill_columns(columns, np.arange(count)[::-1], scheduled, q_start, np.zeros(0), np.zeros(0), 1 << 40 | 5)
    pad_mixed(columns, count, total, tiles, shape)
    on_device.all.copy_(torch.from_numpy(columns))
    # As kernels/row_state.cu has it: a row's tokens, or what reaches to the next row's where it has none.
    starts, owners = on_device.step.q_start.tolist(), []
    for row in range(shape.rows):
        length = int(on_device.step.num_scheduled[row])
        end = starts[row + 1] if row + 1 < shape.rows else shape.tokens
        owners += list(range(starts[row], starts[row] + length if length else end))
    assert owners == list(range(shape.tokens))
    assert on_device.tiles[: len(tiles)].tolist() == tiles.tolist()
    assert on_device.tiles[len(tiles) : shape.tiles, 0].eq(-1).all()
    assert on_device.sample_rows.eq(-1).all()
    assert on_device.result_at[:2].tolist() == [5, 1 << 8]


def test_a_decode_step_has_a_token_for_each_row_of_its_bucket() -> None:
    columns = np.full((8, 20), 77, np.int32)
    fill_columns(columns, np.array([4, 2]), np.ones(2), np.arange(2), np.array([2]), np.array([1]), 8)
    pad_decode(columns, 2, 8)
    assert columns[:3, :8].tolist() == [[4, 2] + [0] * 6, [1, 1] + [0] * 6, list(range(8))]
    assert columns[3:5, :2].tolist() == [[2, -1], [1, -1]]


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 8), (1, 16), (4, 16), (256, 100), (256, 8192)])
def test_shapes_fit_into_what_a_worker_has(max_rows: int, max_tokens: int) -> None:
    shapes = MixedShapes(max_rows, max_tokens, GROUP, TILE_ROWS)
    for shape in shapes:
        assert shape.tokens <= max_tokens
        assert shape.rows <= max_rows + 1
        assert shape.tiles <= shapes.max_tiles
    assert shapes.find(max_tokens + 1, 1, 1) is None
    largest = max((shape.tokens for shape in shapes), default=0)
    assert shapes.find(largest + 1, 1, 1) is None
    if largest:
        assert shapes.find(largest, max_rows, 1) is not None
        assert shapes.find(largest, 1, 10_000) is None
