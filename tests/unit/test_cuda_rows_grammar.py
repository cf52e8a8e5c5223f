"""What the cuda backend tells the device of rows under a grammar, without a device: flags, addresses, masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.row_layout import PROCESS, ROW_FIELDS
from service.grammar import Grammar
from worker.backends.cuda_rows import DeviceRows
from worker.step import NewRow, SamplingParams, Step

NONE = np.zeros(0, np.int32)
VOCAB = 70


class _Ops:
    """Does on the host what kernels/row_state.cu does."""

    def apply_plan(self, arena: torch.Tensor, plan: torch.Tensor, words: int, segments: int) -> None:
        for to, source, length in plan[words:].view(segments, 3).tolist():
            arena[to : to + length] = plan[source : source + length]


def make_rows(*new: NewRow) -> DeviceRows:
    ops: Any = _Ops()
    rows = DeviceRows(ops, 4, 64, 16, VOCAB, torch.device("cpu"))
    rows.apply(Step(1, NONE, new, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE))
    return rows


def new_row(row: int, grammar: Grammar | None, **sampling: Any) -> NewRow:
    params = SamplingParams(temperature=0.0, **sampling)
    return NewRow(row, np.arange(3, dtype=np.int32), 3, 0, np.zeros(1, np.int32), 1, params, grammar)


def fields_of(rows: DeviceRows, row: int) -> Any:
    return rows.fields[row].numpy().view(ROW_FIELDS)[0]


def test_a_row_under_a_grammar_reads_its_own_mask() -> None:
    grammar = Grammar("regex", "a")
    rows = make_rows(new_row(1, grammar, min_tokens=3, stop_token_ids=(2,)), new_row(2, None))
    masked, plain = fields_of(rows, 1), fields_of(rows, 2)
    assert masked["flags"] == PROCESS and plain["flags"] == 0 and plain["allowed"] == 0
    assert masked["min_tokens"] == 0  # the mask has it
    rows.set_masks(np.array([1], np.int32), np.array([[5, -1, 63]], np.int32))
    at = (int(masked["allowed"]) - rows._masks.data_ptr()) // 4
    assert rows._masks.view(-1)[at : at + 3].tolist() == [5, -1, 63]
    assert rows._masks.view(4, 3)[2].tolist() == [0, 0, 0]


def test_allowed_ids_hold_within_a_mask_and_go_with_the_row() -> None:
    rows = make_rows(new_row(3, Grammar("regex", "a"), allowed_token_ids=(0, 33)))
    rows.set_masks(np.array([3], np.int32), np.full((1, 3), -1, np.int32))
    assert rows._masks[3].tolist() == [1, 2, 0]
    again = Step(2, np.array([3], np.int32), (new_row(3, Grammar("regex", "a")),), *[NONE] * 8)
    rows.apply(again)
    rows.set_masks(np.array([3], np.int32), np.full((1, 3), -1, np.int32))
    assert rows._masks[3].tolist() == [-1, -1, -1]
