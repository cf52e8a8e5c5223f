"""What a step enqueues: a replay where its shape has been captured as a graph, else kernel by kernel.

The forward pass and the choice of tokens are graphs of their own, so that only the latter ever waits for a grammar's mask. A step
whose rows have one token each is padded to a bucket of rows; one with chunks to a `MixedShape` if it is short, and is no graph if
it is long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import numpy as np
import torch

from kernels.operands import SharedPrefixes
from kernels.ops import KernelOps
from kernels.product_rows import PARTS_ROWS
from worker.backends.cuda_columns import (
    MixedShape,
    MixedShapes,
    StepColumns,
    StepLayout,
    lay_out,
    pad_decode,
    pad_mixed,
)
from worker.backends.cuda_graphs import GraphCache, bucket_for, buckets
from worker.backends.cuda_model import CudaDecoder, prefill_tiles
from worker.backends.cuda_prefix import PrefixPlanner
from worker.backends.cuda_results import ResultRing, Slot
from worker.backends.cuda_rows import DeviceRows, upload
from worker.backends.cuda_sampler import CudaSampler
from worker.step import Int32Array, Step


class StepLauncher:
    """Owns the graphs and the columns on the device. Only the launch thread uses it, with the backend's stream current."""

    def __init__(
        self,
        ops: KernelOps,
        decoder: CudaDecoder,
        rows: DeviceRows,
        sampler: CudaSampler,
        prefixes: PrefixPlanner | None,
        columns: StepColumns,
        mixed: MixedShapes,
        group: int,
        max_rows: int,
        graphs: GraphCache | None,
    ) -> None:
        """`prefixes` None: rows never read one together; `group`: query heads of a KV head; `graphs` None: always kernel by kernel."""
        self.columns = columns
        self._ops = ops
        self._decoder = decoder
        self._rows = rows
        self._sampler = sampler
        self._prefixes = prefixes
        self._mixed = mixed
        self._group = group
        self._buckets = buckets(max_rows)
        self._graphs = graphs

    def rows_changed(self) -> None:
        """Rows were freed or start anew."""
        if self._prefixes is not None:
            self._prefixes.forget()

    def forward(self, step: Step, layout: StepLayout, slot: Slot) -> None:
        """The model over the step's tokens. `slot` holds the columns until the step has ended."""
        count, total, columns = len(layout.rows), layout.total, slot.columns_view
        shares = self._prefixes is not None and self._prefixes.plan(step, layout.q_start, total)
        known = len(layout.columns)
        columns[:known] = layout.columns
        columns[known - 1, :2] = slot.result_at
        if layout.one_token_each:
            bucket = bucket_for(count, self._buckets) if self._graphs is not None else count
            pad_decode(columns, count, bucket)
            self._ops.copy_words(self.columns.without_tiles, slot.columns[:known])
            self._run(("forward", bucket, shares), partial(self._decode, bucket, shares))
            return
        context_lens = (self._rows.computed[step.rows] + step.num_scheduled).astype(np.int32)
        tiles = prefill_tiles(step.num_scheduled, context_lens, self._group, self._ops.prefill_tile_rows)
        shape = self._mixed.find(total, count, len(tiles))
        if shape is not None:
            pad_mixed(columns, count, total, tiles, shape)
        self._ops.copy_words(self.columns.all, slot.columns)
        if shape is not None:
            self._run((shape, shares), partial(self._decode_and_prefill, shape, shares))
            return
        self._prepare(count, total)
        decodes = bool((step.num_scheduled == 1).any())
        on_device = upload(tiles, self._decoder.workspace.hidden.device)
        self._decoder.forward(total, self.columns.step, count, on_device, decodes, self._shared(shares))

    def sample(self, rows: Int32Array) -> None:
        """A token for each of the permanent `rows`, those of the step that `forward` was last called with."""
        flags = int(np.bitwise_or.reduce(self._rows.flags[rows]))
        processes, truncates = bool(flags & 1), bool(flags & 2)
        bucket = bucket_for(len(rows), self._buckets) if self._graphs is not None else len(rows)
        self._run(("sample", bucket, processes, truncates), partial(self._choose, bucket, processes, truncates))

    def capture_all(self, ring: ResultRing) -> None:
        """All graphs but those of rarer kinds: samples with penalties or truncation, many chunks, chunks beside a shared prefix.

        Waits for the device.
        """
        if self._graphs is None:
            return
        for bucket in self._buckets:
            self._set_nothing(bucket, ring)
            for shares in (False, True) if self._prefixes is not None and bucket > PARTS_ROWS else (False,):
                self._run(("forward", bucket, shares), partial(self._decode, bucket, shares))
            self._run(("sample", bucket, False, False), partial(self._choose, bucket, False, False))
        for shape in self._mixed:
            self._set_nothing(shape, ring)
            self._run((shape, False), partial(self._decode_and_prefill, shape, False))

    def _run(self, key: Hashable, body: Callable[[], None]) -> None:
        if self._graphs is None:
            body()
        else:
            self._graphs.run(key, body)

    def _prepare(self, rows: int, num_tokens: int) -> None:
        space, state = self._decoder.workspace, self._rows
        self._ops.prepare_tokens(
            self.columns.step,
            rows,
            num_tokens,
            state.fields,
            state.tokens,
            space.token_ids,
            space.positions,
            space.slots,
        )

    def _decode(self, bucket: int, shares: bool) -> None:
        self._prepare(bucket, bucket)
        self._decoder.forward(bucket, self.columns.step, bucket, None, True, self._shared(shares))

    def _decode_and_prefill(self, shape: MixedShape, shares: bool) -> None:
        self._prepare(shape.rows, shape.tokens)
        tiles = self.columns.tiles[: shape.tiles]
        self._decoder.forward(shape.tokens, self.columns.step, shape.rows, tiles, True, self._shared(shares))

    def _shared(self, shares: bool) -> SharedPrefixes | None:
        return self._prefixes.lists if shares and self._prefixes is not None else None

    def _choose(self, bucket: int, processes: bool, truncates: bool) -> None:
        self._decoder.logits(self.columns.last, bucket, self._sampler.logits)
        self._sampler.sample(self.columns.sample_rows, bucket, processes, truncates, self.columns.result_at)

    def _set_nothing(self, shape: int | MixedShape, ring: ResultRing) -> None:
        none = np.zeros(0, np.int32)
        nothing = lay_out(Step(0, none, (), none, none, none, none, none, none, none, none), self.columns.width)
        slot = ring.take()
        columns = slot.columns_view
        columns[: len(nothing.columns)] = nothing.columns
        columns[len(nothing.columns) - 1, :2] = slot.result_at
        if isinstance(shape, MixedShape):
            pad_mixed(columns, 0, 0, none, shape)
        else:
            pad_decode(columns, 0, shape)
        self._ops.copy_words(self.columns.all, slot.columns)
        torch.cuda.current_stream().synchronize()
        ring.give_back(slot)
