"""The CPU's matrix product, as LLVM IR compiled at start: y = x W^T + b for a few rows of float32 x.

    naive        one row against one column: every weight is read, used once and dropped; the adds of a sum wait for each other
    panels       32 columns of W side by side for each k: a step of the loop is one cache line, 32 independent sums
    tiles        8 rows of x share each line of the panel: 16 sums in registers, 16 multiply-adds for one load
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

import functools

import llvmlite.binding as llvm

COLUMNS = 32  # of a panel: two vectors of 16 floats
TILE = 8  # rows of x that share a panel's line
TAILS = (1, 2, 4, 8)  # the last tile of a product has as few rows as one of these allows
_AHEAD_BYTES = 4096

_VECTOR = "<16 x float>"
_SIXTEENS = "<" + ", ".join(["i32 16"] * 16) + ">"
_UPPER_HALVES = "<" + ", ".join(["i32 -65536"] * 16) + ">"
_ARGUMENTS = (
    ("x", "ptr"),  # float32 [rows][depth]
    ("panels", "ptr"),  # [count][depth][32]
    ("bias", "ptr"),  # float32 [count * 32]
    ("y", "ptr"),  # float32 [full * 8 + tail][count * 32]
    ("rows", "i64"),
    ("full", "i64"),  # tiles of 8 rows before the tail
    ("depth", "i64"),
    ("count", "i64"),  # of panels
    ("next", "ptr"),  # i64, zero before: the next panel to take
    ("thread", "ptr"),  # i64, zero before: the next thread's number
    ("scratch", "ptr"),  # float32 [threads][(full * 8 + tail) * depth]
)


def kernels() -> dict[tuple[bool, int], int]:
    """Addresses of `void product(i64 *arguments)` for (weights are bfloat16, rows of the tail); every thread of a product calls it."""
    engine = _compiled()
    return {
        (narrow, tail): engine.get_function_address(_name(narrow, tail)) for narrow in (True, False) for tail in TAILS
    }


@functools.cache
def _compiled() -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    # Where 512 bits are to be had, LLVM would still split the vectors on processors that once slowed down for them.
    wide = ",-prefer-256-bit" if features.get("avx512f") else ""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten() + wide, opt=3
    )
    module = llvm.parse_assembly(source())
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def source() -> str:
    """The module's IR."""
    parts = [
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
        f"declare {_VECTOR} @llvm.fma.v16f32({_VECTOR}, {_VECTOR}, {_VECTOR})",
    ]
    for narrow in (True, False):
        parts += [_tile(narrow, rows) for rows in TAILS]
        parts += [_product(narrow, tail) for tail in TAILS]
    return "\n".join(parts)


def _name(narrow: bool, tail: int) -> str:
    return f"product_{'bfloat16' if narrow else 'float32'}_{tail}"


def _tile(narrow: bool, rows: int) -> str:
    """y [rows][32] = bias + packed x [depth][rows] times one panel; the sums stay in registers over the whole depth."""
    sums = [(row, half) for row in range(rows) for half in (0, 1)]
    line = COLUMNS * (2 if narrow else 4)
    code = [
        f"define internal void @tile_{'bfloat16' if narrow else 'float32'}_{rows}"
        "(ptr %x, ptr %panel, ptr %bias, ptr %y, i64 %stride, i64 %depth) alwaysinline {",
        "entry:",
        f"  %bias1 = getelementptr {_VECTOR}, ptr %bias, i64 1",
        f"  %start0 = load {_VECTOR}, ptr %bias, align 4",
        f"  %start1 = load {_VECTOR}, ptr %bias1, align 4",
        "  br label %step",
        "step:",
        "  %k = phi i64 [0, %entry], [%k.next, %step]",
        "  %xk = phi ptr [%x, %entry], [%xk.next, %step]",
        "  %wk = phi ptr [%panel, %entry], [%wk.next, %step]",
    ]
    code += [f"  %sum{r}.{h} = phi {_VECTOR} [%start{h}, %entry], [%new{r}.{h}, %step]" for r, h in sums]
    for offset in range(0, line, 64):
        code += [
            f"  %ahead{offset} = getelementptr i8, ptr %wk, i64 {_AHEAD_BYTES + offset}",
            f"  call void @llvm.prefetch.p0(ptr %ahead{offset}, i32 0, i32 3, i32 1)",
        ]
    if narrow:
        code += [
            "  %pairs = load <16 x i32>, ptr %wk, align 4",
            f"  %low = shl <16 x i32> %pairs, {_SIXTEENS}",
            f"  %high = and <16 x i32> %pairs, {_UPPER_HALVES}",
            f"  %w0 = bitcast <16 x i32> %low to {_VECTOR}",
            f"  %w1 = bitcast <16 x i32> %high to {_VECTOR}",
        ]
    else:
        code += [
            f"  %wk1 = getelementptr {_VECTOR}, ptr %wk, i64 1",
            f"  %w0 = load {_VECTOR}, ptr %wk, align 4",
            f"  %w1 = load {_VECTOR}, ptr %wk1, align 4",
        ]
    for row in range(rows):
        code += [
            f"  %at{row} = getelementptr float, ptr %xk, i64 {row}",
            f"  %one{row} = load float, ptr %at{row}, align 4",
            f"  %lane{row} = insertelement {_VECTOR} poison, float %one{row}, i64 0",
            f"  %all{row} = shufflevector {_VECTOR} %lane{row}, {_VECTOR} poison, <16 x i32> zeroinitializer",
        ]
    code += [
        f"  %new{r}.{h} = call {_VECTOR} @llvm.fma.v16f32({_VECTOR} %all{r}, {_VECTOR} %w{h}, {_VECTOR} %sum{r}.{h})"
        for r, h in sums
    ]
    code += [
        "  %k.next = add i64 %k, 1",
        f"  %xk.next = getelementptr float, ptr %xk, i64 {rows}",
        f"  %wk.next = getelementptr i8, ptr %wk, i64 {line}",
        "  %more = icmp ult i64 %k.next, %depth",
        "  br i1 %more, label %step, label %store",
        "store:",
    ]
    for row, half in sums:
        code += [
            f"  %line{row}.{half} = mul i64 %stride, {row}",
            f"  %column{row}.{half} = add i64 %line{row}.{half}, {16 * half}",
            f"  %to{row}.{half} = getelementptr float, ptr %y, i64 %column{row}.{half}",
            f"  store {_VECTOR} %new{row}.{half}, ptr %to{row}.{half}, align 4",
        ]
    return "\n".join([*code, "  ret void", "}"])


def _product(narrow: bool, tail: int) -> str:
    """What each thread runs: copy x into tiles of its own, [depth][rows of the tile], then take panels until none is left."""
    tile = f"@tile_{'bfloat16' if narrow else 'float32'}_"
    code = [f"define void @{_name(narrow, tail)}(ptr %arguments) {{", "entry:"]
    for number, (name, kind) in enumerate(_ARGUMENTS):
        code += [
            f"  %at.{name} = getelementptr i64, ptr %arguments, i64 {number}",
            f"  %{name} = load {kind}, ptr %at.{name}, align 8",
        ]
    call = "ptr %panel, ptr %bias.panel, ptr"
    return (
        "\n".join(code)
        + f"""
  %stride = mul i64 %count, {COLUMNS}
  %panel.bytes = mul i64 %depth, {COLUMNS * (2 if narrow else 4)}
  %tile.floats = mul i64 %depth, {TILE}
  %full.rows = mul i64 %full, {TILE}
  %all.rows = add i64 %full.rows, {tail}
  %own.floats = mul i64 %all.rows, %depth
  %number = atomicrmw add ptr %thread, i64 1 monotonic
  %own.offset = mul i64 %number, %own.floats
  %own = getelementptr float, ptr %scratch, i64 %own.offset
  %tail.offset = mul i64 %full.rows, %depth
  %own.tail = getelementptr float, ptr %own, i64 %tail.offset
  br label %row
row:
  %r = phi i64 [0, %entry], [%r.next, %row.end]
  %is.tail = icmp uge i64 %r, %full.rows
  %r.tile = udiv i64 %r, {TILE}
  %r.tile.offset = mul i64 %r.tile, %tile.floats
  %r.tile.at = getelementptr float, ptr %own, i64 %r.tile.offset
  %r.in.full = urem i64 %r, {TILE}
  %r.in.tail = sub i64 %r, %full.rows
  %r.base = select i1 %is.tail, ptr %own.tail, ptr %r.tile.at
  %r.in = select i1 %is.tail, i64 %r.in.tail, i64 %r.in.full
  %r.step = select i1 %is.tail, i64 {tail}, i64 {TILE}
  %r.to = getelementptr float, ptr %r.base, i64 %r.in
  %r.is.given = icmp ult i64 %r, %rows
  %r.read = select i1 %r.is.given, i64 %r, i64 0
  %x.offset = mul i64 %r.read, %depth
  %x.row = getelementptr float, ptr %x, i64 %x.offset
  br label %copy
copy:
  %k = phi i64 [0, %row], [%k.next, %copy]
  %from = getelementptr float, ptr %x.row, i64 %k
  %value = load float, ptr %from, align 4
  %to.offset = mul i64 %k, %r.step
  %to = getelementptr float, ptr %r.to, i64 %to.offset
  store float %value, ptr %to, align 4
  %k.next = add i64 %k, 1
  %k.more = icmp ult i64 %k.next, %depth
  br i1 %k.more, label %copy, label %row.end
row.end:
  %r.next = add i64 %r, 1
  %r.more = icmp ult i64 %r.next, %all.rows
  br i1 %r.more, label %row, label %take
take:
  %p = atomicrmw add ptr %next, i64 1 monotonic
  %p.more = icmp ult i64 %p, %count
  br i1 %p.more, label %begin, label %end
begin:
  %panel.offset = mul i64 %p, %panel.bytes
  %panel = getelementptr i8, ptr %panels, i64 %panel.offset
  %column = mul i64 %p, {COLUMNS}
  %bias.panel = getelementptr float, ptr %bias, i64 %column
  %y.panel = getelementptr float, ptr %y, i64 %column
  br label %tiles
tiles:
  %t = phi i64 [0, %begin], [%t.next, %whole]
  %t.more = icmp ult i64 %t, %full
  br i1 %t.more, label %whole, label %rest
whole:
  %t.offset = mul i64 %t, %tile.floats
  %t.x = getelementptr float, ptr %own, i64 %t.offset
  %t.row = mul i64 %t, {TILE}
  %t.y.offset = mul i64 %t.row, %stride
  %t.y = getelementptr float, ptr %y.panel, i64 %t.y.offset
  call void {tile}{TILE}(ptr %t.x, {call} %t.y, i64 %stride, i64 %depth)
  %t.next = add i64 %t, 1
  br label %tiles
rest:
  %rest.y.offset = mul i64 %full.rows, %stride
  %rest.y = getelementptr float, ptr %y.panel, i64 %rest.y.offset
  call void {tile}{tail}(ptr %own.tail, {call} %rest.y, i64 %stride, i64 %depth)
  br label %take
end:
  ret void
}}"""
    )
