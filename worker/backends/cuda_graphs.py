"""CUDA graphs of the decode step, one pair (forward, sample) for each batch bucket; a second forward where rows share a prefix.

A graph replays its kernels with the addresses and grids that it was captured with, for one launch instead of a hundred. Rows beyond
those of the step are padding: no token, no cache slot, no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


def buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that are captured: dense where the matrix-vector kernel runs, at most 16 apart up to 256, then 64, then 128."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128]
    sizes += list(range(144, 257, 16)) + list(range(320, 513, 64)) + list(range(640, max(max_rows, 640) + 128, 128))
    return (*(size for size in sizes if size < max_rows), max_rows)


def bucket_for(rows: int, sizes: tuple[int, ...]) -> int:
    """The smallest captured size that holds `rows`."""
    return next(size for size in sizes if size >= rows)


class GraphCache:
    """Captured graphs by key. Only the launch thread uses it, with its stream current."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Replay the graph of `key`. The first time `body` runs as it is, which loads its kernels, and is then captured."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        body()
        self._graphs[key] = self._capture(body)

    def _capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads wait for events meanwhile, which the default mode would take for a fault of this capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            body()
        finally:
            graph.capture_end()
        return graph
