"""Paged attention for CPUs: keys and values are read where the block table says they are, and nothing is gathered first.

    naive      all scores of a query, then their softmax, then the sum of the values: the scores of a long chunk fill the caches
    online     128 positions at a time with the running maximum and sum of the softmax (Milakov and Gimelshein, arXiv:1805.02867;
               FlashAttention, arXiv:2205.14135): a tile's scores stay in the level 1 cache
    layout     keys lie in a block as [head_dim][block_size]: 16 positions are one vector, and a score is a sum over head_dim in
               each of its lanes. Values lie as [block_size][head_dim]. Neither pass adds across lanes
    tiles      8 queries share each load and widening of keys and values. A decode's tile is its group of query heads

A tile is consecutive *query rows* of one sequence and one KV head: row r is head r % group of token r // group. Operations bound
prefill, bytes of the cache bound decode.

The result of a query row depends on its own keys and values alone: every sum runs in order of head_dim or of positions, in splits
counted from position 0, whatever tile, chunk or batch the row is in. Places that hold nothing yet are never added, so they may hold
anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from worker.cpu.emitter import F32, I32, I64, Emitter, Value, width

SPLIT = 128
"""Positions between two looks at the running maximum."""

ROWS = 8
"""Query rows of a chunk's tile."""

TILE_FIELDS = 5
"""int64 of a tile: first token of the sequence in this step, first query row, query rows of the sequence, position of its first
token in this step, where its block table starts."""

_MASKED = -1e30
_ARGUMENTS = (
    "q_at",  # float32 [tokens][q_stride], scaled
    "q_stride",
    "out_at",  # float32 [tokens][num_heads * head_dim]
    "keys_at",  # [kv_heads][blocks][head_dim][block_size]
    "values_at",  # [kv_heads][blocks][block_size][head_dim]
    "head_stride",  # numbers of one KV head in either
    "tiles_at",  # int64 [num_tiles][TILE_FIELDS]
    "tables_at",  # int32, block tables of all sequences
    "num_tiles",
    "window",  # positions that a query sees; huge where there is no sliding window
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's attention is compiled for."""

    kv_heads: int
    group: int  # query heads of a KV head
    head_dim: int
    block_size: int
    storage: str  # of the cache: bfloat16, float16 or float32


def add_attention(module: Value, name: str, shape: Shape, rows: int) -> None:
    """Add the kernel for tiles of so many query rows, fewer at the end of a sequence. It takes `_ARGUMENTS`."""
    e = Emitter(module, name)
    q_at, q_stride, out_at, keys_at, values_at, head_stride, tiles_at, tables_at, num_tiles, window = e.arguments(
        _ARGUMENTS
    )
    lanes = width(shape.block_size, SPLIT)
    tile = _Tile(e, shape, rows, lanes)
    with e.items(e.times(num_tiles, shape.kv_heads)) as item:
        # The last tiles of a chunk see the most positions; they come first, so that no thread ends with a long one.
        number = e.sub(e.sub(num_tiles, I64(1)), e.sdiv(item, I64(shape.kv_heads)))
        head = e.srem(item, I64(shape.kv_heads))
        fields_at = e.at(tiles_at, e.times(number, TILE_FIELDS), I64)
        token, first, count, start, table = (e.load(e.at(fields_at, i, I64), typ=I64) for i in range(TILE_FIELDS))
        head_offset = e.mul(head, head_stride)
        scalar = I32 if shape.storage == "float32" else ir.IntType(16)
        tile.keys_at = e.at(keys_at, head_offset, scalar)
        tile.values_at = e.at(values_at, head_offset, scalar)
        tile.table_at = e.at(tables_at, table, I32)
        tile.window = window
        tile.begin(q_at, q_stride, token, first, count, start, head)
        lowest = e.maximum(e.sum(e.sub(tile.positions[0], window), 1), 0)
        end = e.add(tile.positions[-1], I64(1))
        first_split = e.times(e.sdiv(lowest, I64(SPLIT)), SPLIT)
        with e.loop(end, first_split, SPLIT) as split:
            begin = e.maximum(split, e.times(e.sdiv(lowest, I64(lanes)), lanes))
            tile.visit(begin, e.minimum(e.sum(split, SPLIT), end))
        tile.finish(out_at)
    e.ret_void()


class _Tile:
    """One tile's state on the stack: maximum, sum and weighted values of each row, and the scores of the current split."""

    def __init__(self, e: Emitter, shape: Shape, rows: int, lanes: int) -> None:
        self._e, self._shape, self._rows, self._lanes = e, shape, rows, lanes
        self._width = width(shape.head_dim)
        self._side = max(
            2, min(8, 16 // rows)
        )  # vectors that a row's registers hold: 16 sums in flight hide an addition's delay
        self._scores = e.array(F32, rows * self._row_floats)
        self._maxima = e.array(F32, rows)
        self._sums = e.array(F32, rows * lanes)
        self._factors = e.array(F32, rows)
        self._output = e.array(F32, rows * shape.head_dim)
        self._positions = e.array(I64, rows)
        self.keys_at = self.values_at = self.table_at = self.window = None
        self.positions: list[Value] = []

    @property
    def _row_floats(self) -> int:
        return SPLIT + self._side * self._lanes  # the last vectors of a split may repeat its end

    def begin(
        self, q_at: Value, q_stride: Value, token: Value, first: Value, count: Value, start: Value, head: Value
    ) -> None:
        e, shape = self._e, self._shape
        self.positions, self._queries, self._places = [], [], []
        for r in range(self._rows):
            # A tile that reaches past the last row repeats it: the same bits are written twice.
            row = e.minimum(e.sum(first, r), e.sub(count, I64(1)))
            index = e.sdiv(row, I64(shape.group))
            query_head = e.sum(e.times(head, shape.group), e.srem(row, I64(shape.group)))
            within = e.times(query_head, shape.head_dim)
            self.positions.append(e.add(start, index))
            self._queries.append(e.at(q_at, e.sum(e.mul(e.add(token, index), q_stride), within)))
            all_heads = shape.kv_heads * shape.group * shape.head_dim
            self._places.append(e.sum(e.times(e.add(token, index), all_heads), within))
            e.store(self.positions[r], e.at(self._positions, r, I64))
            e.store(F32(_MASKED), e.at(self._maxima, r))
            e.write(e.constant(0.0, self._lanes), self._sums, I64(r * self._lanes))
        with e.loop(self._rows * shape.head_dim, step=self._width) as i:
            e.write(e.constant(0.0, self._width), self._output, i)

    def visit(self, begin: Value, end: Value) -> None:
        """Take in the positions begin .. end: at most SPLIT of them; begin is the first of a vector."""
        e = self._e
        vectors = e.sdiv(e.sum(e.sub(end, begin), self._lanes - 1), I64(self._lanes))
        self._score(begin, vectors)
        with e.loop(self._rows) as row:
            self._soften(row, begin, vectors)
        for d in range(0, self._shape.head_dim, self._side * self._width):
            self._weigh(d, min(self._side, (self._shape.head_dim - d) // self._width), begin, end)

    def _block(self, position: Value) -> tuple[Value, Value]:
        """Where the block of a position starts in one head's run, and the position's place in it."""
        e, size = self._e, self._shape.block_size
        entry = e.at(self.table_at, e.sdiv(position, I64(size)), I32)
        block = e.sext(e.load(entry, typ=I32), I64)
        return e.times(block, size * self._shape.head_dim), e.srem(position, I64(size))

    def _score(self, begin: Value, vectors: Value) -> None:
        e, shape, lanes = self._e, self._shape, self._lanes
        zero = e.constant(0.0, lanes)
        with e.loop(vectors, step=self._side) as vector:
            keys = []
            for c in range(self._side):
                at = e.minimum(e.sum(vector, c), e.sub(vectors, I64(1)))
                base, place = self._block(e.add(begin, e.times(at, lanes)))
                keys.append(e.add(base, place))
            sums = [[e.variable(zero.type, zero) for _ in keys] for _ in range(self._rows)]
            with e.loop(shape.head_dim) as d:
                offset = e.times(d, shape.block_size)
                k = [e.read(self.keys_at, e.add(key, offset), lanes, shape.storage) for key in keys]
                for r in range(self._rows):
                    q = e.splat(e.load(e.at(self._queries[r], d), typ=F32), lanes)
                    for c, total in enumerate(sums[r]):
                        e.store(e.fma(q, k[c], e.load(total, typ=zero.type)), total)
            for r in range(self._rows):
                for c, total in enumerate(sums[r]):
                    column = e.times(e.sum(vector, c), lanes)
                    e.write(e.load(total, typ=zero.type), self._scores, e.sum(column, r * self._row_floats))

    def _soften(self, row: Value, begin: Value, vectors: Value) -> None:
        """Turn one row's scores into weights relative to the maximum so far."""
        e, lanes = self._e, self._lanes
        scores = e.at(self._scores, e.times(row, self._row_floats))
        masked = e.constant(_MASKED, lanes)
        position = e.load(e.at(self._positions, row, I64), typ=I64)
        behind = e.sub(position, self.window)
        latest = e.splat(e.trunc(position, I32), lanes)
        earliest = e.splat(e.trunc(e.maximum(behind, -1), I32), lanes)
        steps = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        best = e.variable(masked.type, masked)
        with e.loop(vectors) as vector:
            first = e.trunc(e.add(begin, e.times(vector, lanes)), I32)
            key = e.add(e.splat(first, lanes), steps)
            visible = e.and_(e.icmp_signed("<=", key, latest), e.icmp_signed(">", key, earliest))
            at = e.times(vector, lanes)
            score = e.select(visible, e.read(scores, at, lanes), masked)
            e.write(score, scores, at)
            e.store(e.larger(score, e.load(best, typ=masked.type)), best)
        highest = e.folded(e.load(best, typ=masked.type), e.larger)
        maximum = e.at(self._maxima, row)
        old = e.load(maximum, typ=F32)
        new = e.larger(highest, old)
        e.store(new, maximum)
        factor = e.exp(e.splat(e.fsub(old, new), lanes))
        e.store(e.extract_element(factor, I32(0)), e.at(self._factors, row))
        sums = e.at(self._sums, e.times(row, lanes))
        total = e.variable(masked.type, e.fmul(e.read(sums, I64(0), lanes), factor))
        highest = e.splat(new, lanes)
        with e.loop(vectors) as vector:
            at = e.times(vector, lanes)
            score = e.read(scores, at, lanes)
            weight = e.select(
                e.fcmp_ordered("==", score, masked), e.constant(0.0, lanes), e.exp(e.fsub(score, highest))
            )
            e.write(weight, scores, at)
            e.store(e.fadd(e.load(total, typ=masked.type), weight), total)
        e.write(e.load(total, typ=masked.type), sums, I64(0))

    def _weigh(self, d: int, side: int, begin: Value, end: Value) -> None:
        """Add the values of the positions begin .. end to the output's columns d .. d + side * width, weighted."""
        e, shape, size = self._e, self._shape, self._width
        kind = ir.VectorType(F32, size)
        totals = []
        for r in range(self._rows):
            factor = e.splat(e.load(e.at(self._factors, r), typ=F32), size)
            places = [r * shape.head_dim + d + c * size for c in range(side)]
            totals.append([e.variable(kind, e.fmul(e.read(self._output, I64(p), size), factor)) for p in places])
        with e.loop(end, begin, self._lanes) as first:
            base, place = self._block(first)
            value_at = e.sum(base, e.times(place, shape.head_dim), d)
            column = e.sub(first, begin)
            with e.loop(e.minimum(e.sub(end, first), self._lanes)) as i:
                offset = e.add(value_at, e.times(i, shape.head_dim))
                values = [e.read(self.values_at, e.sum(offset, c * size), size, shape.storage) for c in range(side)]
                for r in range(self._rows):
                    weight = e.load(e.at(self._scores, e.sum(column, i, r * self._row_floats)), typ=F32)
                    weight = e.splat(weight, size)
                    for total, value in zip(totals[r], values, strict=True):
                        e.store(e.fma(weight, value, e.load(total, typ=kind)), total)
        for r in range(self._rows):
            for c, total in enumerate(totals[r]):
                e.write(e.load(total, typ=kind), self._output, I64(r * shape.head_dim + d + c * size))

    def finish(self, out_at: Value) -> None:
        e, shape = self._e, self._shape
        for r in range(self._rows):
            total = e.folded(e.read(self._sums, I64(r * self._lanes), self._lanes), e.fadd)
            total = e.splat(total, self._width)
            for d in range(0, shape.head_dim, self._width):
                output = e.read(self._output, I64(r * shape.head_dim + d), self._width)
                e.write(e.fdiv(output, total), out_at, e.sum(self._places[r], d))
