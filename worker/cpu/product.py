"""The CPU's matrix product: y = x W^T + b for rows of float32 x.

    naive        one row against one column: every weight is read, used once and dropped; the adds of a sum wait for each other
    panels       32 columns of W side by side for each k: a step of the loop is one cache line, 32 independent sums
    tiles        8 rows of x share each line of the panel: 16 sums in registers, 16 multiply-adds for one load. A processor without
                 AVX-512 has registers for 2 rows: with 8 it spent its time in spills (438 ms instead of 272 for 128 rows)
    prefetch     lines are asked for 4 KiB before they are needed; without that, reading and arithmetic took turns, not together
    shared list  threads take the next panel from a counter, so one that loses its core to a neighbour takes fewer

At one row the bytes of W bound it: 10.5 ms for the 269 MB of SmolLM2, where the memory of two cores allows 9.4; 16 rows take 22 ms.
FBGEMM's float16 panels take 14.3 and 33. The method is that of Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication" (2008).

The sum of a row and a column runs over k in rising order with fused multiply-adds, whatever tile the row is in: its bits do not
depend on its neighbours or on the number of threads.

A panel is [in][32] weights. In bfloat16 column j and column j + 16 share a 32-bit word, low and high half: a bfloat16 is the upper
half of a float32, so one shift and one mask widen 32 weights.
"""

from __future__ import annotations

from llvmlite import ir

from worker.cpu.emitter import F32, I32, Emitter, Value

COLUMNS = 32  # of a panel: two vectors of 16 floats
_LANES = 16
_AHEAD_BYTES = 4096
_ARGUMENTS = (
    "x_at",  # float32 [rows][depth]
    "panels_at",  # [count][depth][32], bfloat16 or float32
    "bias_at",  # float32 [count * 32]
    "y_at",  # float32 [full * tile + tail][count * 32]
    "rows",
    "full",  # whole tiles before the tail
    "tail",  # rows of the tail, one of `tails`
    "depth",
    "count",  # of panels
    "scratch_at",  # float32 [threads][(full * tile + tail) * depth]
)


def tile_rows(wide_registers: bool) -> int:
    """Rows of x that share a panel's line: as many as have their sums in registers (32 of 512 bits, or 16 of 256)."""
    return 8 if wide_registers else 2


def tails(tile: int) -> tuple[int, ...]:
    """The last tile of a product has as few rows as one of these allows."""
    return tuple(rows for rows in (1, 2, 4, 8) if rows <= tile)


def add_product(module: Value, name: str, narrow: bool, tile: int) -> None:
    """Each thread copies x into tiles of its own, [depth][rows of the tile], then takes panels of bfloat16 (narrow) or float32."""
    e = Emitter(module, name)
    x_at, panels_at, bias_at, y_at, rows, full, tail, depth, count, scratch_at = e.arguments(_ARGUMENTS)
    full_rows = e.times(full, tile)
    own = e.at(scratch_at, e.mul(e.count(1), e.mul(e.sum(full_rows, tail), depth)))
    own_tail = e.at(own, e.mul(full_rows, depth))
    with e.loop(full) as number:
        first = e.times(number, tile)
        _copy(e, x_at, first, rows, depth, e.at(own, e.mul(first, depth)), e.integer(tile))
    _copy(e, x_at, full_rows, rows, depth, own_tail, tail)
    stride = e.times(count, COLUMNS)
    with e.items(count) as taken:
        column = e.times(taken, COLUMNS)
        panel = e.at(panels_at, e.times(e.mul(taken, depth), _LANES if narrow else COLUMNS), I32)
        bias, y = e.at(bias_at, column), e.at(y_at, column)
        with e.loop(full) as number:
            first = e.times(number, tile)
            y_tile = e.at(y, e.mul(first, stride))
            _tile(e, e.at(own, e.mul(first, depth)), panel, bias, y_tile, stride, depth, narrow, tile)
        y_tail = e.at(y, e.mul(full_rows, stride))
        for size in tails(tile):
            with e.if_then(e.icmp_signed("==", tail, e.integer(size))):
                _tile(e, own_tail, panel, bias, y_tail, stride, depth, narrow, size)
    e.ret_void()


def _copy(e: Emitter, x_at: Value, first: Value, rows: Value, depth: Value, to: Value, size: Value) -> None:
    """Rows first .. first + size of x, transposed; those past the end repeat the first row of x, and nobody reads their results."""
    with e.loop(size) as r:
        row = e.add(first, r)
        row = e.select(e.icmp_signed("<", row, rows), row, e.integer(0))
        row_at, to_row = e.at(x_at, e.mul(row, depth)), e.at(to, r)
        with e.loop(depth) as k:
            e.store(e.load(e.at(row_at, k), typ=F32), e.at(to_row, e.mul(k, size)))


def _tile(
    e: Emitter, x: Value, panel: Value, bias: Value, y: Value, stride: Value, depth: Value, narrow: bool, rows: int
) -> None:
    """y [rows][32] = bias + packed x [depth][rows] times one panel; the sums stay in registers over the whole depth."""
    kind = ir.VectorType(F32, _LANES)
    words = _LANES if narrow else COLUMNS
    starts = [e.read(bias, e.integer(half * _LANES), _LANES) for half in (0, 1)]
    sums = [[e.variable(kind, start) for start in starts] for _ in range(rows)]
    with e.loop(depth) as k:
        line = e.at(panel, e.times(k, words), I32)
        for word in range(0, words, 16):
            e.prefetch(e.at(line, word + _AHEAD_BYTES // 4, I32))
        weights = _pairs(e, line) if narrow else [e.read(line, e.integer(half * _LANES), _LANES) for half in (0, 1)]
        for r, totals in enumerate(sums):
            value = e.splat(e.load(e.at(x, e.sum(e.times(k, rows), r)), typ=F32), _LANES)
            for weight, total in zip(weights, totals, strict=True):
                e.store(e.fma(value, weight, e.load(total, typ=kind)), total)
    for r, totals in enumerate(sums):
        for half, total in enumerate(totals):
            e.write(e.load(total, typ=kind), y, e.sum(e.times(stride, r), half * _LANES))


def _pairs(e: Emitter, line: Value) -> list[Value]:
    """32 bfloat16 as two vectors of float32."""
    pairs = e.load(line, typ=ir.VectorType(I32, _LANES), align=4)
    low = e.shl(pairs, e.integers(16, _LANES))
    high = e.and_(pairs, e.integers(-65536, _LANES))
    return [e.bitcast(half, ir.VectorType(F32, _LANES)) for half in (low, high)]
