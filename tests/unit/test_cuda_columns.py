"""What a step tells the device: shapes of graphs, and the padding that makes a step one of them. No GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.backends.cuda_columns import MixedShapes, StepColumns, lay_out, pad_decode, pad_mixed
from worker.backends.cuda_model import prefill_tiles
from worker.step import Step

GROUP, TILE_ROWS = 4, 192
NONE = np.zeros(0, np.int32)


def make_step(rows: list[int], scheduled: list[int], samples: list[int]) -> Step:
    columns = (np.array(column, np.int32) for column in (rows, scheduled, samples))
    return Step(1, NONE, (), NONE, NONE, NONE, NONE, NONE, *columns)


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
    layout = lay_out(make_step(list(range(count))[::-1], counts, [1] * (count - 1) + [0]), on_device.width)
    assert layout.total == total
    columns[:6] = layout.columns
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
    ends = np.cumsum(scheduled)
    assert on_device.sample_rows[:count].tolist() == [*range(count - 1, 0, -1), -1]
    assert on_device.last[:count].tolist() == [*(ends[:-1] - 1).tolist(), -1]
    assert on_device.sample_rows[count:].eq(-1).all()


def test_a_decode_step_has_a_token_for_each_row_of_its_bucket() -> None:
    step = make_step([4, 2], [1, 1], [0, 1])
    layout = lay_out(step, 20)
    assert (layout.one_token_each, layout.total) == (True, 2)
    assert (layout.sampling.tolist(), layout.sample_rows.tolist()) == ([1], [2])
    pad_decode(layout.columns, 2, 8)
    assert layout.columns[:3, :8].tolist() == [[4, 2] + [0] * 6, [1, 1] + [0] * 6, list(range(8))]
    assert layout.columns[3:5, :2].tolist() == [[2, -1], [1, -1]]


def test_a_layout_holds_for_the_same_rows_tokens_and_samples_only() -> None:
    layout = lay_out(make_step([4, 2], [1, 1], [1, 1]), 8)
    assert layout.holds_for(make_step([4, 2], [1, 1], [1, 1]))
    for rows, scheduled, samples in (
        ([2, 4], [1, 1], [1, 1]),
        ([4, 2], [1, 2], [1, 1]),
        ([4, 2], [1, 1], [1, 0]),
        ([4], [1], [1]),
        ([], [], []),
    ):
        assert not layout.holds_for(make_step(rows, scheduled, samples))
    empty = lay_out(make_step([], [], []), 8)
    assert (empty.total, empty.sample_rows.size, empty.columns[3:5].max()) == (0, 0, -1)


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
