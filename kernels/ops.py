"""The kernels as operations on torch tensors: grids, shared memory and argument order live here, shapes in the `.cu` files.

Every operation enqueues on one stream and returns at once. Outputs are the caller's, so that a CUDA graph sees fixed addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from cuda.core import Stream

from kernels.launcher import Float, Int, KernelLibrary
from kernels.shapes import (
    DECODE_FEW_ROWS,
    FUSED_ROWS,
    GEMM_ROWS,
    GEMM_SHARED_BYTES,
    MATVEC_ROWS,
    NORM_KERNELS,
    SAMPLE_PARTS,
    KernelShape,
    decode_shared_bytes,
    decode_warps,
    gemm_splits,
    is_roomy,
    matvec_shared_bytes,
    matvec_warps,
    norm_threads,
    normed_shared_bytes,
    prefill_shared_bytes,
    prefill_tile_rows,
    wgmma_shared_bytes,
)

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Addresses that every attention call of a step shares. All int32."""

    rows: Tensor  # [rows] permanent row
    num_scheduled: Tensor  # [rows]
    q_start: Tensor  # [rows] first token
    context_lens: Tensor  # [rows] after this step
    block_table: Tensor  # [max_rows, max_blocks]


@dataclass(frozen=True, slots=True)
class DecodeItems:
    """The work list of decode attention for one window. All int32."""

    items: Tensor  # [max_items, 8]
    num_items: Tensor  # [1]
    window: int  # 0: full attention


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What splits of one row hand to the one that merges them."""

    partials: Tensor  # float32 [max_items, num_heads * (head_dim + 2)]
    arrived: Tensor  # int32 zeros [max_rows * num_kv_heads * tiles]


@dataclass(frozen=True, slots=True)
class Placing:
    """Where a step's queries, keys and values go, and how they are rotated."""

    cos: Tensor  # float32 [max_model_len, head_dim]
    sin: Tensor  # the same, its first half negated
    positions: Tensor  # int32 [tokens]
    slots: Tensor  # int32 [tokens]
    qkv: Tensor  # [tokens, qkv]


@dataclass(frozen=True, slots=True)
class NormInput:
    """x = norm(residual[rows] + added[rows] + bias) * weight, and where the new residual goes (not where the old one is)."""

    added: Tensor | None
    residual: Tensor
    bias: Tensor | None
    weight: Tensor
    rows: Tensor | None  # int32 [tokens]; None: as they stand
    out: Tensor | None
    epsilon: float

    def arguments(self) -> tuple[int | Float, ...]:
        """All but the number of tokens."""
        tensors = (self.added, self.residual, self.bias, self.weight, self.rows, self.out)
        return (*map(_at, tensors), Float(self.epsilon))


@dataclass(frozen=True, slots=True)
class Parts:
    """A product that gemm_parts left as sums of parts of K."""

    sums: Tensor  # float32 [splits, tokens, n] and more
    splits: int


class KernelOps:
    """The operations for one model on one stream."""

    def __init__(
        self, library: KernelLibrary, shape: KernelShape, stream: Stream, multiprocessors: int, matvec_depth: int
    ) -> None:
        self._library = library
        self._shape = shape
        self._stream = stream
        self._depth = matvec_depth
        self._roomy = is_roomy(matvec_depth)
        self._multiprocessors = multiprocessors
        # Two blocks a multiprocessor stream weights; a third place is left for the next kernel's first copies.
        self._matvec_blocks = 2 * multiprocessors
        self._scale = Float(math.log2(math.e) / math.sqrt(shape.head_dim))
        for few in (False, True):
            name = "decode_attention-few" if few else "decode_attention"
            if name in library:
                library.allow_shared(name, "decode_attention", decode_shared_bytes(shape, few, self._roomy))
        library.allow_shared("prefill_attention", "prefill_attention", prefill_shared_bytes(shape))
        self._wgmma = "prefill_wgmma" in library
        if self._wgmma:
            library.allow_shared("prefill_wgmma", "prefill_wgmma", wgmma_shared_bytes(shape))
        for k in {shape.hidden_size, shape.q_size, shape.intermediate_size}:
            for rows in (8, 16):
                name = f"matvec-{k}-{rows}"
                if name in library:
                    for kernel in ("matvec", "matvec_float", "matvec_silu"):
                        library.allow_shared(name, kernel, matvec_shared_bytes(k, rows, matvec_depth))
        if "gemm" in library:
            for kernel in ("gemm_parts", "gemm_float", "gemm_silu"):
                library.allow_shared("gemm", kernel, GEMM_SHARED_BYTES)
        for rows in (8, 16):
            if f"fused-{rows}" in library:
                shared = matvec_shared_bytes(shape.hidden_size, rows, matvec_depth)
                library.allow_shared(f"fused-{rows}", "matvec_qkv", shared)
        if "fused-8" in library:
            for kernel in NORM_KERNELS:
                shared = normed_shared_bytes(shape.hidden_size, FUSED_ROWS, matvec_depth)
                library.allow_shared("fused-8", kernel, shared)

    # Model

    def embedding(self, table: Tensor, token_ids: Tensor, out: Tensor, tokens: int) -> None:
        """out[t] = table[token_ids[t]]."""
        self._launch("embedding", "embedding", (tokens,), 128, _at(table), _at(token_ids), _at(out))

    def rms_norm(self, residual: Tensor, weight: Tensor, out: Tensor, tokens: int, epsilon: float) -> None:
        """out = norm(residual) * weight."""
        threads = norm_threads(self._shape.hidden_size)
        self._launch("rms_norm", "rms_norm", (tokens,), threads, _at(residual), _at(weight), _at(out), Float(epsilon))

    def rms_norm_add(
        self,
        x: Tensor,
        residual: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        out: Tensor,
        tokens: int,
        epsilon: float,
        rows: Tensor | None = None,
    ) -> None:
        """residual += x + bias; out = norm(residual) * weight. With `rows`, of those tokens only."""
        arguments = (_at(x), _at(residual), _at(bias), _at(weight), _at(rows), _at(out), Float(epsilon))
        self._launch("rms_norm", "rms_norm_add", (tokens,), norm_threads(self._shape.hidden_size), *arguments)

    def rms_norm_add_parts(
        self,
        parts: Parts,
        residual: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        out: Tensor,
        tokens: int,
        epsilon: float,
    ) -> None:
        """rms_norm_add of a product that is still in parts."""
        arguments = (_at(residual), _at(bias), _at(weight), _at(out), Float(epsilon))
        threads = norm_threads(self._shape.hidden_size)
        self._launch(
            "rms_norm", "rms_norm_add_parts", (tokens,), threads, _at(parts.sums), Int(parts.splits), *arguments
        )

    def silu_mul(self, x: Tensor, bias: Tensor | None, out: Tensor, tokens: int) -> None:
        """out = silu(x[:, :wide]) * x[:, wide:]."""
        blocks = -(-tokens * self._shape.intermediate_size // 8 // 256)
        self._launch("silu_mul", "silu_mul", (blocks,), 256, _at(x), _at(bias), _at(out), Int(tokens))

    def qkv_epilogue(
        self,
        qkv: Tensor,
        bias: Tensor | None,
        norms: tuple[Tensor | None, Tensor | None],
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: Tensor,
        tokens: int,
        epsilon: float,
        parts: Parts | None = None,
    ) -> None:
        """Bias, QK norm, rotation in place; keys and values into `cache` [2, blocks, kv_heads, block_size, head_dim].

        With `parts` the product is read from there, and only the queries are written to `qkv`.
        """
        shape = self._shape
        heads_per_block = 128 // (shape.head_dim // 8)
        grid = (tokens, -(-(shape.num_heads + 2 * shape.num_kv_heads) // heads_per_block))
        source = () if parts is None else (_at(parts.sums), Int(parts.splits))
        self._launch(
            "qkv_epilogue", "qkv_epilogue" if parts is None else "qkv_epilogue_parts", grid, 128,
            *source, _at(qkv), _at(bias), _at(norms[0]), _at(norms[1]), _at(cos), _at(sin), _at(positions), _at(slots),
            _at(cache), cache.stride(0) // 8, Float(epsilon),
        )  # fmt: skip

    def fits_matvec(self, k: int, tokens: int) -> bool:
        """Whether the matrix-vector kernel takes a product of `tokens` rows over `k` columns."""
        return tokens <= MATVEC_ROWS and f"matvec-{k}-8" in self._library

    def fits_fused(self, tokens: int) -> bool:
        """Whether the products that normalise their input themselves take `tokens` rows."""
        return tokens <= FUSED_ROWS and "fused-8" in self._library

    def fits_qkv(self, tokens: int) -> bool:
        """Whether matvec_qkv takes `tokens` rows."""
        return tokens <= MATVEC_ROWS and "fused-8" in self._library

    def matvec(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        """out = x weight^T for at most 16 tokens; `out` in the model's dtype."""
        n = weight.shape[0]
        arguments = (_at(weight), _at(x), _at(out), Int(n), Int(tokens))
        self._matvec(weight, tokens, "matvec", -(-n // 16), *arguments)

    def matvec_float(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        """The same with `out` in float32, its rows out.stride(0) apart."""
        n = weight.shape[0]
        stride = Int(out.stride(0))
        self._matvec(
            weight, tokens, "matvec_float", -(-n // 16), _at(weight), _at(x), _at(out), Int(n), Int(tokens), stride
        )

    def matvec_silu(self, weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, tokens: int) -> None:
        """out = silu(gate) * up for a weight of gate rows, then up rows."""
        n = weight.shape[0] // 2
        arguments = (_at(weight), _at(bias), _at(x), _at(out), Int(n), Int(tokens))
        self._matvec(weight, tokens, "matvec_silu", -(-n // 8), *arguments)

    def _matvec(self, weight: Tensor, tokens: int, kernel: str, blocks: int, *arguments: int | Int) -> None:
        k, rows = weight.shape[1], 8 if tokens <= 8 else 16
        blocks = min(blocks, self._matvec_blocks)
        shared = matvec_shared_bytes(k, rows, self._depth)
        self._launch(f"matvec-{k}-{rows}", kernel, (blocks,), matvec_warps(k) * 32, *arguments, shared_bytes=shared)

    def matvec_qkv(
        self,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        place: Placing,
        cache: Tensor,
        tokens: int,
    ) -> None:
        """Product, bias, rotation and append for at most 16 tokens; of place.qkv only the queries are written."""
        rows, blocks = 8 if tokens <= 8 else 16, -(-weight.shape[0] // 16)
        shared = matvec_shared_bytes(weight.shape[1], rows, self._depth)
        arguments: tuple[int | Int, ...] = (*_qkv(weight, bias, place, cache), _at(x), Int(tokens))
        self._fused(f"fused-{rows}", "matvec_qkv", blocks, shared, *arguments)

    def norm_qkv(
        self,
        weight: Tensor,
        bias: Tensor | None,
        x: NormInput,
        place: Placing,
        cache: Tensor,
        tokens: int,
    ) -> None:
        """matvec_qkv of a norm, for at most 4 tokens."""
        arguments: tuple[int | Int | Float, ...]
        arguments = (*_qkv(weight, bias, place, cache), *x.arguments(), Int(tokens))
        self._normed("matvec_norm_qkv", -(-weight.shape[0] // 16), tokens, *arguments)

    def norm_silu(self, weight: Tensor, bias: Tensor | None, x: NormInput, out: Tensor, tokens: int) -> None:
        """matvec_silu of a norm, for at most 4 tokens."""
        n = weight.shape[0] // 2
        arguments = (_at(weight), _at(bias), _at(out), Int(n), *x.arguments(), Int(tokens))
        self._normed("matvec_norm_silu", -(-n // 8), tokens, *arguments)

    def norm_float(self, weight: Tensor, x: NormInput, out: Tensor, tokens: int) -> None:
        """matvec_float of a norm, for at most 4 tokens. The new residual is not written."""
        n = weight.shape[0]
        added = (_at(x.added), _at(x.residual), _at(x.bias), _at(x.weight), _at(x.rows), Float(x.epsilon))
        arguments = (_at(weight), _at(out), Int(n), Int(out.stride(0)), *added, Int(tokens))
        self._normed("matvec_norm_float", -(-n // 16), tokens, *arguments)

    def _normed(self, kernel: str, blocks: int, tokens: int, *arguments: int | Int | Float) -> None:
        shared = normed_shared_bytes(self._shape.hidden_size, tokens, self._depth)
        self._fused("fused-8", kernel, blocks, shared, *arguments)

    def _fused(self, module: str, kernel: str, blocks: int, shared: int, *arguments: int | Int | Float) -> None:
        blocks, threads = min(blocks, self._matvec_blocks), matvec_warps(self._shape.hidden_size) * 32
        self._launch(module, kernel, (blocks,), threads, *arguments, shared_bytes=shared)

    def fits_gemm(self, tokens: int) -> bool:
        """Whether gemm_parts and gemm_silu take `tokens` rows."""
        return MATVEC_ROWS < tokens <= GEMM_ROWS and "gemm" in self._library

    def gemm_parts(self, weight: Tensor, x: Tensor, scratch: Tensor, tokens: int) -> Parts:
        """x weight^T for at most 64 tokens, in parts in `scratch` float32 (any shape, large enough)."""
        n, k = weight.shape
        splits = gemm_splits(n, k)
        arguments = (_at(weight), _at(x), _at(scratch), Int(n), Int(k), Int(tokens))
        self._gemm("gemm_parts", (n // 128, splits), *arguments)
        return Parts(scratch, splits)

    def gemm_silu(self, weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, tokens: int) -> None:
        """matvec_silu for at most 64 tokens."""
        n, k = weight.shape[0] // 2, weight.shape[1]
        arguments = (_at(weight), _at(bias), _at(x), _at(out), Int(n), Int(k), Int(tokens))
        self._gemm("gemm_silu", (n // 64,), *arguments)

    def gemm_float(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        """matvec_float for at most 64 tokens; the weight's rows are a multiple of 128."""
        n, k = weight.shape
        arguments = (_at(weight), _at(x), _at(out), Int(k), Int(tokens), Int(out.stride(0)))
        self._gemm("gemm_float", (n // 128,), *arguments)

    def sum_parts(self, parts: Parts, out: Tensor, tokens: int) -> None:
        """out [tokens, n] = the sums of a product in parts."""
        vectors = tokens * out.shape[1] // 4
        arguments = (_at(parts.sums), _at(out), Int(parts.splits), Int(vectors))
        self._launch("gemm", "sum_parts", (-(-vectors // 256),), 256, *arguments)

    def _gemm(self, kernel: str, grid: tuple[int, ...], *arguments: int | Int) -> None:
        self._launch("gemm", kernel, grid, 384, *arguments, shared_bytes=GEMM_SHARED_BYTES)

    # Attention

    def plan_decode(self, step: StepTensors, rows: int, out: DecodeItems) -> None:
        """Fill the work list of the step's single-token rows."""
        self._launch(
            "row_state", "plan_decode", (1,), 1024,
            _at(step.rows), _at(step.num_scheduled), _at(step.q_start), _at(step.context_lens), Int(rows), Int(out.window),
            _at(out.items), _at(out.num_items),
        )  # fmt: skip

    def decode_attention(
        self,
        qkv: Tensor,
        cache: Tensor,
        step: StepTensors,
        work: DecodeItems,
        scratch: DecodeScratch,
        out: Tensor,
        rows: int,
    ) -> None:
        """Attention of the rows in the work list, of `rows` rows in all.

        What stands before it on the stream must be qkv_epilogue, matvec_qkv, norm_qkv, or no kernel of ours: it reads what older
        kernels wrote before its own wait.
        """
        shape = self._shape
        heads, warps = shape.num_kv_heads * shape.decode_tiles, decode_warps(shape.head_dim)
        # Blocks walk over the items: as many as are resident at once, or more for large heads, where late starters even out the end.
        # For few rows one a multiprocessor, with all its tokens under way before the wait.
        few = rows <= DECODE_FEW_ROWS and "decode_attention-few" in self._library
        each = 1 if few else 2 if shape.head_dim == 64 else 8
        blocks = max(1, self._multiprocessors * each // heads)
        self._launch(
            "decode_attention-few" if few else "decode_attention", "decode_attention", (blocks, heads), warps * 32,
            _at(qkv), _at(cache), cache.stride(0) // 8, _at(step.block_table), Int(step.block_table.shape[1]),
            _at(work.items), _at(work.num_items), self._scale, _at(scratch.partials), _at(scratch.arrived), _at(out),
            shared_bytes=decode_shared_bytes(shape, few, self._roomy),
        )  # fmt: skip

    def prefill_attention(
        self, qkv: Tensor, cache: Tensor, step: StepTensors, tiles: Tensor, window: int, out: Tensor
    ) -> None:
        """Attention of the chunks in `tiles` int32 [n, 2], of `prefill_tile_rows` each."""
        shape, name = self._shape, "prefill_wgmma" if self._wgmma else "prefill_attention"
        threads = (512 if self._wgmma else 128) if shape.head_dim == 64 else (384 if self._wgmma else 256)
        self._launch(
            name, name, (tiles.shape[0], shape.num_kv_heads), threads,
            _at(qkv), _at(cache), cache.stride(0) // 8, _at(step.block_table), Int(step.block_table.shape[1]), _at(step.rows),
            _at(step.q_start), _at(step.num_scheduled), _at(step.context_lens), _at(tiles), Int(window), self._scale, _at(out),
            shared_bytes=wgmma_shared_bytes(shape) if self._wgmma else prefill_shared_bytes(shape),
        )  # fmt: skip

    @property
    def prefill_tile_rows(self) -> int:
        """Pairs (token, query head) of a tile."""
        return prefill_tile_rows(self._shape.head_dim, self._wgmma)

    # Rows

    def apply_plan(self, arena: Tensor, plan: Tensor, segments_at: int, segments: int) -> None:
        """Spread a plan over the arena: `segments` triples start at plan[segments_at]."""
        self._launch("row_state", "apply_plan", (segments,), 128, _at(arena), _at(plan), Int(segments_at))

    def copy_words(self, to: Tensor, source: Tensor) -> None:
        """Copy int32 tensors of one size; either may be pinned, and then stays untouched by the host until the step has ended."""
        words = to.numel()
        self._launch("row_state", "copy_words", (-(-words // 256),), 256, _at(to), _at(source), Int(words))

    def prepare_tokens(
        self,
        step: StepTensors,
        rows: int,
        fields: Tensor,
        tokens: Tensor,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
    ) -> None:
        """Look up ids, positions and slots of the scheduled tokens and count them as computed."""
        self._launch(
            "row_state", "prepare_tokens", (rows,), 128,
            _at(step.rows), _at(step.num_scheduled), _at(step.q_start), _at(fields), _at(tokens), Int(tokens.shape[1]),
            _at(step.block_table), Int(step.block_table.shape[1]), _at(token_ids), _at(positions), _at(slots),
            _at(step.context_lens),
        )  # fmt: skip

    def count_tokens(self, jobs: Tensor, fields: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Count tokens of rows with penalties; jobs int32 [n, 4]."""
        arguments = (_at(jobs), _at(fields), _at(tokens), Int(tokens.shape[1]), _at(counts), Int(counts.shape[1]))
        self._launch("row_state", "count_tokens", (jobs.shape[0],), 1024, *arguments)

    # Sampling

    def process_logits(
        self,
        logits: Tensor,
        vocab: int,
        sample_rows: Tensor,
        rows: int,
        fields: Tensor,
        tokens: Tensor,
        counts: Tensor,
        processed: Tensor,
        raw_state: Tensor,
    ) -> None:
        """Biases, masks and penalties of the rows that have any, into `processed`."""
        self._launch(
            "process_logits", "process_logits", (rows, SAMPLE_PARTS), 256,
            _at(logits), Int(logits.stride(0)), Int(vocab), _at(sample_rows), _at(fields), _at(tokens), Int(tokens.shape[1]),
            _at(counts), _at(processed), _at(raw_state),
        )  # fmt: skip

    def choose(
        self,
        logits: Tensor,
        processed: Tensor,
        vocab: int,
        sample_rows: Tensor,
        rows: int,
        fields: Tensor,
        scratch: tuple[Tensor, Tensor, Tensor],
        chosen: Tensor,
        status: Tensor,
    ) -> None:
        """One token for each row without truncation. scratch: partial [rows, parts, 2], raw_state [rows], arrived [rows]."""
        partial, raw_state, arrived = scratch
        self._launch(
            "sample", "choose", (rows, SAMPLE_PARTS), 256,
            _at(logits), _at(processed), Int(logits.stride(0)), Int(vocab), _at(sample_rows), _at(fields), _at(partial),
            _at(raw_state), _at(arrived), _at(chosen), _at(status),
        )  # fmt: skip

    def choose_truncated(
        self,
        logits: Tensor,
        processed: Tensor,
        vocab: int,
        sample_rows: Tensor,
        rows: int,
        fields: Tensor,
        raw_state: Tensor,
        chosen: Tensor,
        status: Tensor,
    ) -> None:
        """One token for each row with top_k, top_p or min_p."""
        self._launch(
            "truncated_sample", "choose_truncated", (rows,), 1024,
            _at(logits), _at(processed), Int(logits.stride(0)), Int(vocab), _at(sample_rows), _at(fields), _at(raw_state),
            _at(chosen), _at(status),
        )  # fmt: skip

    def commit(
        self,
        chosen: Tensor,
        status: Tensor,
        sample_rows: Tensor,
        rows: int,
        fields: Tensor,
        tokens: Tensor,
        counts: Tensor,
        result: Tensor,
    ) -> None:
        """Append the chosen tokens to their rows and to `result` [2, max_rows]."""
        self._launch(
            "sample", "commit", (-(-rows // 128),), 128,
            _at(chosen), _at(status), _at(sample_rows), Int(rows), _at(fields), _at(tokens), Int(tokens.shape[1]),
            _at(counts), Int(counts.shape[1]), _at(result), Int(result.shape[1]),
        )  # fmt: skip

    def logprobs(
        self, logits: Tensor, vocab: int, jobs: Tensor, tokens: Tensor, ids: Tensor, values: Tensor, ranks: Tensor
    ) -> None:
        """Describe positions; jobs int32 [n, 4]."""
        self._launch(
            "logprobs", "logprobs", (jobs.shape[0],), 512,
            _at(logits), Int(logits.stride(0)), Int(vocab), _at(jobs), _at(tokens), Int(tokens.shape[1]),
            _at(ids), _at(values), _at(ranks),
        )  # fmt: skip

    def _launch(
        self,
        module: str,
        kernel: str,
        grid: tuple[int, ...],
        block: int,
        *arguments: int | Int | Float,
        shared_bytes: int = 0,
    ) -> None:
        self._library.launch(self._stream, module, kernel, grid, block, *arguments, shared_bytes=shared_bytes)


def _qkv(weight: Tensor, bias: Tensor | None, place: Placing, cache: Tensor) -> tuple[int, ...]:
    tensors = (weight, bias, place.cos, place.sin, place.positions, place.slots, place.qkv, cache)
    return (*map(_at, tensors), cache.stride(0))


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
