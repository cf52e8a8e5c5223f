"""Writes LLVM IR for the CPU's kernels: loops, variables, vectors of floats, storage formats, exp.

Arithmetic means what it says: no fast-math flag is set anywhere, so LLVM neither reorders sums nor fuses what is not written as
`fma`. A kernel's bits depend on its source alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

Value = Any  # llvmlite has no types of its own for mypy

POINTER = ir.PointerType()
I16, I32, I64, F32, HALF = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.HalfType()
COUNTERS = (
    32,
    40,
)  # places in a kernel's arguments of counters that its threads share, each in a cache line of its own


def width(*sizes: int) -> int:
    """The widest vector that divides all sizes: up to 16 floats, 512 bits, which LLVM halves where registers have 256."""
    return next(w for w in (16, 8, 4, 2, 1) if all(size % w == 0 for size in sizes))


class Emitter(ir.IRBuilder):  # type: ignore[misc]
    """A function `void name(i64 *arguments)` under construction."""

    def __init__(self, module: Value, name: str) -> None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        super().__init__(function.append_basic_block("entry"))
        self._arguments = function.args[0]

    def arguments(self, names: Sequence[str]) -> Iterator[Value]:
        """The arguments in order; those that end in `_at` are pointers, the others integers."""
        for number, name in enumerate(names):
            kind = POINTER if name.endswith("_at") else I64
            yield self.load(self.at(self._arguments, number, I64), typ=kind, name=name)

    @contextmanager
    def loop(self, end: Value, start: Value = 0, step: int = 1) -> Iterator[Value]:
        """for i in range(start, end, step)"""
        start, end = self.integer(start), self.integer(end)
        before = self.block
        head, body, done = (self.append_basic_block(name) for name in ("for", "do", "done"))
        self.branch(head)
        self.position_at_end(head)
        i = self.phi(I64)
        i.add_incoming(start, before)
        self.cbranch(self.icmp_signed("<", i, end), body, done)
        self.position_at_end(body)
        yield i
        i.add_incoming(self.add(i, I64(step)), self.block)
        self.branch(head)
        self.position_at_end(done)

    def count(self, counter: int) -> Value:
        """Add one to a counter of all threads; what it was."""
        place = self.at(self._arguments, COUNTERS[counter], I64)
        return self.atomic_rmw("add", place, I64(1), "monotonic")

    @contextmanager
    def items(self, count: Value, grain: int = 1) -> Iterator[Value]:
        """Items 0 to count, each in one thread. Threads take the next `grain` from a counter: one that loses its core takes fewer."""
        head, body, done = (self.append_basic_block(name) for name in ("take", "work", "end"))
        self.branch(head)
        self.position_at_end(head)
        first = self.mul(self.count(0), I64(grain))
        self.cbranch(self.icmp_signed("<", first, count), body, done)
        self.position_at_end(body)
        with self.loop(self.minimum(self.add(first, I64(grain)), count), first) as i:
            yield i
        self.branch(head)
        self.position_at_end(done)

    def variable(self, kind: Value, start: Value = None) -> Value:
        """A place on the stack; LLVM makes a register of it where it can."""
        with self.goto_entry_block():
            place = self.alloca(kind)
            place.align = 4
        if start is not None:
            self.store(start, place, align=4)
        return place

    def array(self, kind: Value, size: int) -> Value:
        with self.goto_entry_block():
            place = self.alloca(ir.ArrayType(kind, size))
            place.align = 64
        place.type = POINTER  # llvmlite gives it the array's type, which LLVM has dropped
        return place

    def integer(self, value: Value) -> Value:
        return I64(value) if isinstance(value, int) else value

    def at(self, base: Value, index: Value, kind: Value = F32) -> Value:
        """&base[index]"""
        return self.gep(base, [self.integer(index)], source_etype=kind)

    def sum(self, *terms: Value) -> Value:
        total = self.integer(terms[0])
        for term in terms[1:]:
            total = self.add(total, self.integer(term))
        return total

    def times(self, a: Value, b: Value) -> Value:
        return self.mul(self.integer(a), self.integer(b))

    def minimum(self, a: Value, b: Value) -> Value:
        a, b = self.integer(a), self.integer(b)
        return self.select(self.icmp_signed("<", a, b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        a, b = self.integer(a), self.integer(b)
        return self.select(self.icmp_signed(">", a, b), a, b)

    def splat(self, scalar: Value, size: int) -> Value:
        kind = ir.VectorType(scalar.type, size)
        lane = self.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle(lane, [0] * size)

    def constant(self, value: float, size: int) -> Value:
        return ir.Constant(ir.VectorType(F32, size), [value] * size)

    def integers(self, value: int, size: int, kind: Value = I32) -> Value:
        return ir.Constant(ir.VectorType(kind, size), [value] * size)

    def shuffle(self, vector: Value, lanes: Sequence[int]) -> Value:
        return self.shuffle_vector(
            vector,
            ir.Constant(vector.type, ir.Undefined),
            ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)),
        )

    def read(self, base: Value, index: Value, size: int, storage: str = "float32") -> Value:
        """`size` numbers from base[index] on, widened to float32."""
        if storage == "float32":
            return self.load(self.at(base, index), typ=ir.VectorType(F32, size), align=4)
        place = self.at(base, index, I16)
        if storage == "float16":
            return self.fpext(self.load(place, typ=ir.VectorType(HALF, size), align=2), ir.VectorType(F32, size))
        # A bfloat16 is the upper half of a float32.
        bits = self.zext(self.load(place, typ=ir.VectorType(I16, size), align=2), ir.VectorType(I32, size))
        return self.bitcast(self.shl(bits, self.integers(16, size)), ir.VectorType(F32, size))

    def write(self, vector: Value, base: Value, index: Value) -> None:
        self.store(vector, self.at(base, index), align=4)

    def narrowed(self, vector: Value, storage: str) -> Value:
        """A vector of float32 rounded to nearest, ties to even, in its storage format."""
        size = vector.type.count
        if storage == "float32":
            return vector
        if storage == "float16":
            return self.fptrunc(vector, ir.VectorType(HALF, size))
        bits = self.bitcast(vector, ir.VectorType(I32, size))
        sixteen = self.integers(16, size)
        odd = self.and_(self.lshr(bits, sixteen), self.integers(1, size))
        rounded = self.lshr(self.add(bits, self.add(odd, self.integers(0x7FFF, size))), sixteen)
        nan = self.fcmp_unordered("uno", vector, vector)
        return self.trunc(self.select(nan, self.integers(0x7FC0, size), rounded), ir.VectorType(I16, size))

    def prefetch(self, place: Value) -> None:
        """Ask for the cache line of a place; it need not exist."""
        name = "llvm.prefetch.p0"
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32]), name)
        self.call(function, [place, I32(0), I32(3), I32(1)])

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self._intrinsic("fma", a, b, c)

    def sqrt(self, a: Value) -> Value:
        return self._intrinsic("sqrt", a)

    def _intrinsic(self, name: str, *operands: Value) -> Value:
        kind = operands[0].type
        name = f"llvm.{name}.v{kind.count}f32"
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [kind] * len(operands)), name)
        return self.call(function, operands)

    def x86(self, name: str, *operands: Value, result: Value = None) -> Value:
        """One of LLVM's x86 instructions; `result` is its type where that is not the first operand's."""
        name, kind = f"llvm.x86.{name}", operands[0].type if result is None else result
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [value.type for value in operands]), name)
        return self.call(function, operands)

    def larger(self, a: Value, b: Value) -> Value:
        """a where a > b, else b: a NaN in a is passed over."""
        return self.select(self.fcmp_ordered(">", a, b), a, b)

    def folded(self, vector: Value, two: Any) -> Value:
        """All lanes joined by `two`, halves first: a scalar."""
        size = vector.type.count
        while size > 1:
            size //= 2
            vector = two(self.shuffle(vector, range(size)), self.shuffle(vector, range(size, 2 * size)))
        return self.extract_element(vector, I32(0))

    def exp(self, x: Value) -> Value:
        """e^x within 2 units in the last place; x is cut to -87 .. 88, exp(0) is 1, NaN stays NaN.

        x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite's two-part ln 2), then a polynomial in r with the coefficients of
        Cephes' expf, then n is added to the exponent.
        """
        size = x.type.count

        def number(value: float) -> Value:
            return self.constant(value, size)

        low, high = number(-87.0), number(88.0)
        x = self.select(self.fcmp_ordered("<", x, low), low, x)
        x = self.select(self.fcmp_ordered(">", x, high), high, x)
        # Added to 1.5 * 2^23 a number loses its fraction; its low bits are the integer.
        magic = number(12582912.0)
        shifted = self.fma(x, number(1.44269504088896341), magic)
        n = self.fsub(shifted, magic)
        r = self.fma(n, number(-0.693359375), x)
        r = self.fma(n, number(2.12194440e-4), r)
        p = number(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, number(coefficient))
        p = self.fadd(self.fma(p, self.fmul(r, r), r), number(1.0))
        bits = self.bitcast(shifted, ir.VectorType(I32, size))
        power = self.shl(self.add(bits, self.integers(127, size)), self.integers(23, size))
        return self.fmul(p, self.bitcast(power, ir.VectorType(F32, size)))
