"""The CPU's matrix product with 8-bit weights: y = x W^T + b for rows of float32 x, most of it in integers.

    weights      32 of a column share a scale (llama.cpp's Q8_0 groups alike): w = scale * q. That is 8.5 bits instead of 16
    activations  32 of a row share a scale, chosen from these 32 alone. One scale for a whole row was ten times as far from the
                 unquantised model: a few channels of a transformer are a hundred times the others, and took all 127 steps
    sums         those of a group are integers: one instruction adds four products in each of 16 lanes (AVX-512 VNNI), where float32
                 needs four. Only the group's sum becomes float32, is scaled and added to the row's
    panels       32 columns, tiles of rows, prefetch and the shared list of panels are those of worker/cpu/product.py

The sum of a row and a column runs over groups in rising order, and integer sums are exact, so that neither a row's neighbours nor the
number of threads nor the instructions that a processor has change a bit.

The instruction takes unsigned bytes times signed ones. Weights are stored as q + 128; what that adds is 128 times the group's sum of
activations, and the sum starts at minus that.

A panel is a sequence of groups: 8 lines [32 columns][4 weights] uint8, then 32 scales in bfloat16: 1,088 bytes.
"""

from __future__ import annotations

from enum import Enum

from llvmlite import ir

from worker.cpu.compiler import has_feature
from worker.cpu.emitter import F32, I16, I32, Emitter, Value
from worker.cpu.product import COLUMNS, tails, tile_rows

GROUP = 32  # weights, or activations, that share a scale
GROUP_BYTES = GROUP * COLUMNS + 2 * COLUMNS
ROW_WORDS = GROUP // 4 + 2  # 32-bit words of a row's group in scratch: its bytes, start of its sums, scale
QUADS = GROUP // 4
_AHEAD_BYTES = 4096
OFFSET = 128
I8 = ir.IntType(8)
_ARGUMENTS = (
    "x_at",  # float32 [rows][groups * 32]
    "panels_at",  # [count][groups][GROUP_BYTES]
    "bias_at",  # float32 [count * 32]
    "y_at",  # float32 [full * tile + tail][count * 32]
    "rows",
    "full",  # whole tiles before the tail
    "tail",  # rows of the tail, one of `tails`
    "groups",
    "count",  # of panels
    "scratch_at",  # int32 [threads][(full * tile + tail) * groups * ROW_WORDS]
)


class Form(Enum):
    """How a processor multiplies bytes. All give the same bits."""

    VNNI_512 = 16  # 32-bit lanes of a register
    VNNI_256 = 8
    AVX2 = -8  # the same width, by way of 16-bit numbers

    @property
    def lanes(self) -> int:
        return abs(self.value)

    @property
    def tile(self) -> int:
        return tile_rows(self is Form.VNNI_512)


def best_form() -> Form | None:
    """The fastest form that this processor has; None where it has none."""
    if has_feature("avx512vnni"):
        return Form.VNNI_512
    if has_feature("avxvnni"):
        return Form.VNNI_256
    return Form.AVX2 if has_feature("avx2") else None


def add_product_int8(module: Value, name: str, form: Form) -> None:
    """Each thread quantises x into tiles of its own, [groups][ROW_WORDS][rows of the tile], then takes panels."""
    e = Emitter(module, name)
    x_at, panels_at, bias_at, y_at, rows, full, tail, groups, count, scratch_at = e.arguments(_ARGUMENTS)
    tile = form.tile
    full_rows = e.times(full, tile)
    row_words = e.times(groups, ROW_WORDS)
    own = e.at(scratch_at, e.mul(e.count(1), e.mul(e.sum(full_rows, tail), row_words)))
    own_tail = e.at(own, e.mul(full_rows, row_words))
    with e.loop(full) as number:
        first = e.times(number, tile)
        _quantize(e, x_at, first, rows, groups, e.at(own, e.mul(first, row_words)), e.integer(tile))
    _quantize(e, x_at, full_rows, rows, groups, own_tail, tail)
    stride = e.times(count, COLUMNS)
    with e.items(count) as taken:
        column = e.times(taken, COLUMNS)
        panel = e.at(panels_at, e.times(e.mul(taken, groups), GROUP_BYTES), I8)
        bias, y = e.at(bias_at, column), e.at(y_at, column)
        with e.loop(full) as number:
            first = e.times(number, tile)
            _tile(
                e,
                e.at(own, e.mul(first, row_words)),
                panel,
                bias,
                e.at(y, e.mul(first, stride)),
                stride,
                groups,
                form,
                tile,
            )
        y_tail = e.at(y, e.mul(full_rows, stride))
        for size in tails(tile):
            with e.if_then(e.icmp_signed("==", tail, e.integer(size))):
                _tile(e, own_tail, panel, bias, y_tail, stride, groups, form, size)
    e.ret_void()


def _quantize(e: Emitter, x_at: Value, first: Value, rows: Value, groups: Value, to: Value, size: Value) -> None:
    """Rows first .. first + size of x in 8 bits; those past the end repeat the first row of x, and nobody reads their results.

    A NaN or an infinity makes its group's scale one, and so its own row's results, nobody else's. A group below 3.7e-37 counts as
    zeros: its inverse would be infinite, and the low bits of infinities and NaNs are 0.
    """
    lanes = 16
    magic = 12582912.0  # 1.5 * 2^23: a number added to it is rounded to an integer, which its low bits are
    integers = ir.VectorType(I32, lanes)
    with e.loop(size) as r:
        row = e.add(first, r)
        row = e.select(e.icmp_signed("<", row, rows), row, e.integer(0))
        row_at, to_row = e.at(x_at, e.mul(row, e.times(groups, GROUP))), e.at(to, r)
        with e.loop(groups) as group:
            numbers = [e.read(row_at, e.sum(e.times(group, GROUP), i), lanes) for i in (0, lanes)]
            # Without its sign a float compares as an integer does, and a NaN above all others.
            bits = [e.and_(e.bitcast(x, integers), e.integers(0x7FFFFFFF, lanes)) for x in numbers]
            two = e.select(e.icmp_unsigned(">", bits[0], bits[1]), bits[0], bits[1])
            largest = e.folded(two, lambda a, b: e.select(e.icmp_unsigned(">", a, b), a, b))
            largest = e.bitcast(largest, F32)
            nothing = e.fcmp_ordered("==", largest, F32(0.0))
            inverse = e.splat(e.select(nothing, F32(0.0), e.fdiv(F32(127.0), largest)), lanes)
            rounded = [e.bitcast(e.fma(x, inverse, e.constant(magic, lanes)), integers) for x in numbers]
            bytes_ = [e.trunc(q, ir.VectorType(I8, lanes)) for q in rounded]
            total = e.folded(e.add(*(e.sext(b, integers) for b in bytes_)), e.add)
            words = [e.bitcast(b, ir.VectorType(I32, lanes // 4)) for b in bytes_]
            place = e.at(to_row, e.mul(e.times(group, ROW_WORDS), size))
            for quad in range(QUADS):
                word = e.extract_element(words[quad * 4 // lanes], I32(quad % (lanes // 4)))
                e.store(word, e.at(place, e.times(size, quad), I32))
            e.store(e.mul(total, I32(-OFFSET)), e.at(place, e.times(size, QUADS), I32))
            e.store(e.fdiv(largest, F32(127.0)), e.at(place, e.times(size, QUADS + 1)))


def _tile(
    e: Emitter, x: Value, panel: Value, bias: Value, y: Value, stride: Value, groups: Value, form: Form, rows: int
) -> None:
    """y [rows][32] = bias + tile x [groups][ROW_WORDS][rows] times one panel; the sums stay in registers over the whole depth."""
    lanes = form.lanes
    floats, integers = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    parts = range(0, COLUMNS, lanes)
    starts = [e.read(bias, e.integer(part), lanes) for part in parts]
    sums = [[e.variable(floats, start) for start in starts] for _ in range(rows)]
    with e.loop(groups) as group:
        line = e.at(panel, e.times(group, GROUP_BYTES), I8)
        words = e.at(x, e.times(group, ROW_WORDS * rows), I32)
        counts = [
            [e.splat(e.load(e.at(words, QUADS * rows + r, I32), typ=I32), lanes)] * len(parts) for r in range(rows)
        ]
        for quad in range(QUADS):
            for byte in range(0, 4 * COLUMNS, 64):
                e.prefetch(e.at(line, 4 * COLUMNS * quad + byte + _AHEAD_BYTES, I8))
            at = [e.at(line, 4 * (COLUMNS * quad + part), I8) for part in parts]
            weights = [e.load(place, typ=integers, align=4) for place in at]
            for r in range(rows):
                value = e.splat(e.load(e.at(words, quad * rows + r, I32), typ=I32), lanes)
                counts[r] = [_dot(e, c, w, value, form) for c, w in zip(counts[r], weights, strict=True)]
        scales_at = e.at(line, GROUP * COLUMNS, I8)
        scales = [e.read(e.at(scales_at, part, I16), e.integer(0), lanes, "bfloat16") for part in parts]
        for r in range(rows):
            own = e.splat(e.load(e.at(words, (QUADS + 1) * rows + r, I32), typ=F32), lanes)
            for count, scale, total in zip(counts[r], scales, sums[r], strict=True):
                both = e.fmul(scale, own)
                e.store(e.fma(e.sitofp(count, floats), both, e.load(total, typ=floats)), total)
    for r, totals in enumerate(sums):
        for part, total in zip(parts, totals, strict=True):
            e.write(e.load(total, typ=floats), y, e.sum(e.times(stride, r), part))


def _dot(e: Emitter, total: Value, weights: Value, values: Value, form: Form) -> Value:
    """total + the four products in each 32-bit lane of unsigned bytes and signed ones."""
    lanes = form.lanes
    if form is not Form.AVX2:
        return e.x86(f"avx512.vpdpbusd.{32 * lanes}", total, weights, values)
    halves, eight = ir.VectorType(I16, 2 * lanes), e.integers(8, 2 * lanes, I16)
    w, v = e.bitcast(weights, halves), e.bitcast(values, halves)
    even = e.x86(
        "avx2.pmadd.wd", e.and_(w, e.integers(255, 2 * lanes, I16)), e.ashr(e.shl(v, eight), eight), result=total.type
    )
    odd = e.x86("avx2.pmadd.wd", e.lshr(w, eight), e.ashr(v, eight), result=total.type)
    return e.add(total, e.add(even, odd))
