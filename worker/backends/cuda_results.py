"""The way of a step's columns to the device and of its result back: a ring of pinned buffers, each with the events of its step.

A slot belongs to the launch thread from `take` to `publish`, to the device until its end event, to the collect thread until it
has read it, and is given out again only then: no pinned buffer is written while a copy is in flight.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field

import numpy as np
import torch

from worker.step import Int32Array, LogprobColumns, RowStatus, StepOutput


@dataclass(slots=True)
class DescribedPositions:
    """Log-probabilities under way: pinned tensors and which step rows they describe."""

    owner: Int32Array  # [P]
    position: Int32Array  # [P]
    wanted: Int32Array  # [P] best tokens asked for
    samples: Int32Array  # [P] index into the step's samples, -1 for a prompt position
    ids: torch.Tensor  # int32 [P, MAX + 1]
    values: torch.Tensor  # float32 [P, MAX + 1]
    ranks: torch.Tensor  # int32 [P]

    def columns(self, status: Int32Array) -> LogprobColumns | None:
        """Those whose token was chosen. The device has finished."""
        fine = (self.samples < 0) | (status[self.samples] == RowStatus.OK) if len(status) else self.samples < 0
        if not fine.any():
            return None
        counts = self.wanted[fine] + 1
        taken = np.arange(self.ids.shape[1])[None, :] < counts[:, None]
        return LogprobColumns(
            owner=self.owner[fine],
            position=self.position[fine],
            rank=self.ranks.numpy()[fine],
            num_entries=counts.astype(np.int32),
            token_ids=self.ids.numpy()[fine][taken],
            logprobs=self.values.numpy()[fine][taken],
        )


@dataclass(slots=True)
class Slot:
    """One place of the ring."""

    result: torch.Tensor  # pinned int32 [2, max_rows]: tokens, status
    columns: torch.Tensor  # pinned int32, of the size of StepColumns: what the step tells the device
    began: torch.cuda.Event
    ended: torch.cuda.Event
    columns_view: Int32Array  # the same memory as `columns`; made once, since making it takes microseconds
    result_view: Int32Array
    result_at: Int32Array  # [2] the address of `result`, its low half first
    step_id: int = 0
    num_samples: int = 0
    described: list[DescribedPositions] = field(default_factory=list)


class ResultRing:
    """Slots in the order of their steps. `take` and `publish` on the launch thread, `collect` on the collect thread."""

    def __init__(self, depth: int, max_rows: int, columns: tuple[int, int]) -> None:
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._published: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._last: Slot | None = None
        for _ in range(depth):
            # Blocking events sleep while they wait: a spinning thread would hold the interpreter's lock or a core.
            events = [torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            result = torch.zeros((2, max_rows), dtype=torch.int32, pin_memory=True)
            told = torch.zeros(columns, dtype=torch.int32, pin_memory=True)
            address = np.array([result.data_ptr()], np.int64).view(np.int32)
            self._free.put(Slot(result, told, events[0], events[1], told.numpy(), result.numpy(), address))

    def take(self) -> Slot:
        """A free slot; waits where `depth` steps have not been collected."""
        return self._free.get()

    def publish(self, slot: Slot) -> None:
        """Hand a slot whose end event is recorded to the collector."""
        self._published.put(slot)

    def give_back(self, slot: Slot) -> None:
        """Free a slot whose step failed before it was published."""
        slot.described.clear()
        self._free.put(slot)

    def collect(self) -> StepOutput:
        """Wait for the oldest published step."""
        slot = self._published.get()
        slot.ended.synchronize()
        last = self._last
        gap_ns = 0 if last is None else max(0, int(last.ended.elapsed_time(slot.began) * 1e6))
        tokens, status = slot.result_view[:, : slot.num_samples].copy()
        fine = status == RowStatus.OK
        output = StepOutput(
            step_id=slot.step_id,
            num_tokens=fine.astype(np.int32),
            row_status=status,
            token_ids=tokens[fine],
            logprobs=merge_columns([found for part in slot.described if (found := part.columns(status)) is not None]),
            device_ns=int(slot.began.elapsed_time(slot.ended) * 1e6),
            gap_ns=gap_ns,
        )
        slot.described.clear()
        if last is not None:  # its end event was still needed for the gap
            self._free.put(last)
        self._last = slot
        return output


def merge_columns(parts: list[LogprobColumns]) -> LogprobColumns | None:
    """One behind another; None for none."""
    if not parts:
        return None
    names = ("owner", "position", "rank", "num_entries", "token_ids", "logprobs")
    return LogprobColumns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
