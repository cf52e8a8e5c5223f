"""What lies between a layer's products, one kernel for each: residual and RMSNorm, rotation and append, SiLU·mul.

Memory bounds all three; written as chains of library calls each would read and write its activations up to five times.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from worker.cpu.attention import Shape
from worker.cpu.emitter import F32, I16, I64, Emitter, Value, width

NORM_ARGUMENTS = (
    "x_at",  # float32 [rows][size]; becomes x + delta
    "delta_at",  # float32 [rows][delta_stride]
    "delta_stride",
    "weight_at",  # float32 [size]
    "out_at",  # float32 [rows][size]
    "eps_at",  # float32
    "rows",
)
SILU_ARGUMENTS = (
    "gate_up_at",  # float32 [rows][stride]: gate, then up
    "stride",
    "out_at",  # float32 [rows][size]
    "rows",
)
APPEND_ARGUMENTS = (
    "heads_at",  # float32 [tokens][stride]: query heads, which are rotated and scaled in place, key heads, value heads
    "stride",
    "rotations_at",  # complex64 [positions][head_dim / 2]
    "positions_at",  # int64 [tokens]
    "slots_at",  # int64 [tokens]: block * block_size + place in the block
    "keys_at",  # the cache, as worker/cpu/attention.py reads it
    "values_at",
    "head_stride",
    "scale_at",  # float32, of the queries
    "tokens",
)
GRAIN = 4  # rows that a thread takes at a time


def add_norm(module: Value, name: str, size: int) -> None:
    """x += delta; out = x / sqrt(mean(x^2) + eps) * weight (RMSNorm, arXiv:1910.07467). A row's sum has `width(size)` lanes."""
    e = Emitter(module, name)
    x_at, delta_at, delta_stride, weight_at, out_at, eps_at, rows = e.arguments(NORM_ARGUMENTS)
    lanes = width(size)
    kind = ir.VectorType(F32, lanes)
    eps = e.load(eps_at, typ=F32)
    with e.items(rows, GRAIN) as row:
        x = e.at(x_at, e.times(row, size))
        out = e.at(out_at, e.times(row, size))
        delta = e.at(delta_at, e.mul(row, delta_stride))
        squares = e.variable(kind, e.constant(0.0, lanes))
        with e.loop(size, step=lanes) as i:
            value = e.fadd(e.read(x, i, lanes), e.read(delta, i, lanes))
            e.write(value, x, i)
            e.store(e.fma(value, value, e.load(squares, typ=kind)), squares)
        mean = e.fdiv(e.folded(e.load(squares, typ=kind), e.fadd), F32(size))
        inverse = e.fdiv(e.constant(1.0, lanes), e.sqrt(e.splat(e.fadd(mean, eps), lanes)))
        with e.loop(size, step=lanes) as i:
            e.write(e.fmul(e.fmul(e.read(x, i, lanes), inverse), e.read(weight_at, i, lanes)), out, i)
    e.ret_void()


def add_silu(module: Value, name: str, size: int) -> None:
    """out = gate / (1 + exp(-gate)) * up"""
    e = Emitter(module, name)
    gate_up_at, stride, out_at, rows = e.arguments(SILU_ARGUMENTS)
    lanes = width(size)
    one = e.constant(1.0, lanes)
    with e.items(rows, GRAIN) as row:
        gate_at = e.at(gate_up_at, e.mul(row, stride))
        up_at = e.at(gate_at, size)
        out = e.at(out_at, e.times(row, size))
        with e.loop(size, step=lanes) as i:
            gate = e.read(gate_at, i, lanes)
            activated = e.fdiv(gate, e.fadd(one, e.exp(e.fneg(gate))))
            e.write(e.fmul(activated, e.read(up_at, i, lanes)), out, i)
    e.ret_void()


def add_append(module: Value, name: str, shape: Shape) -> None:
    """Rotate queries and keys (RoPE, arXiv:2104.09864; pairs adjacent), scale the queries, store keys and values in the cache."""
    e = Emitter(module, name)
    named: dict[str, Any] = dict(zip(APPEND_ARGUMENTS, e.arguments(APPEND_ARGUMENTS), strict=True))
    lanes = width(shape.head_dim)
    size, queries = shape.head_dim, shape.kv_heads * shape.group
    scale = e.splat(e.load(named["scale_at"], typ=F32), lanes)
    number = F32 if shape.storage == "float32" else I16
    with e.items(named["tokens"], GRAIN) as token:
        heads_at = e.at(named["heads_at"], e.mul(token, named["stride"]))
        position = e.load(e.at(named["positions_at"], token, I64), typ=I64)
        rotations = e.at(named["rotations_at"], e.times(position, size))
        slot = e.load(e.at(named["slots_at"], token, I64), typ=I64)
        block = e.times(e.sdiv(slot, I64(shape.block_size)), size * shape.block_size)
        place = e.srem(slot, I64(shape.block_size))
        with e.loop(queries) as head:
            for d in range(0, size, lanes):
                at = e.sum(e.times(head, size), d)
                e.write(e.fmul(_rotated(e, heads_at, at, rotations, d, lanes), scale), heads_at, at)
        with e.loop(shape.kv_heads) as head:
            keys_at = e.at(named["keys_at"], e.mul(head, named["head_stride"]), number)
            values_at = e.at(named["values_at"], e.mul(head, named["head_stride"]), number)
            for d in range(0, size, lanes):
                at = e.sum(e.times(head, size), queries * size + d)
                key = e.narrowed(_rotated(e, heads_at, at, rotations, d, lanes), shape.storage)
                for lane in range(lanes):
                    target = e.at(keys_at, e.sum(block, place, (d + lane) * shape.block_size), number)
                    e.store(e.extract_element(key, ir.IntType(32)(lane)), target, align=2)
                at = e.sum(at, shape.kv_heads * size)
                value = e.narrowed(e.read(heads_at, at, lanes), shape.storage)
                e.store(value, e.at(values_at, e.sum(block, e.times(place, size), d), number), align=2)
    e.ret_void()


def _rotated(e: Emitter, heads_at: Value, at: Value, rotations: Value, d: int, lanes: int) -> Value:
    """(a + ib)(cos + i sin) for pairs of lanes."""
    x = e.read(heads_at, at, lanes)
    r = e.read(rotations, I64(d), lanes)
    cosines = e.shuffle(r, [i & ~1 for i in range(lanes)])
    sines = e.shuffle(r, [i | 1 for i in range(lanes)])
    signs = ir.Constant(ir.VectorType(F32, lanes), [1.0 if i & 1 else -1.0 for i in range(lanes)])
    swapped = e.shuffle(x, [i ^ 1 for i in range(lanes)])
    return e.fma(swapped, e.fmul(sines, signs), e.fmul(x, cosines))
