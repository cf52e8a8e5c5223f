"""The kernels as operations on torch tensors: grids, shared memory and argument order live here, shapes in the `.cu` files.

Every operation enqueues on one stream and returns at once. Outputs are the caller's, so that a CUDA graph sees fixed addresses.
"""

from __future__ import annotations

import math

import torch
from cuda.core import Stream

from kernels.launcher import Float, Int, KernelLibrary
from kernels.operands import DecodeItems, DecodeScratch, Parts, SharedPrefixes, StepTensors, at
from kernels.product_ops import ProductOps
from kernels.shapes import (
    CLUSTER,
    CLUSTER_ROWS,
    DECODE_FEW_ROWS,
    SAMPLE_PARTS,
    TRUNCATED_SHARED_BYTES,
    KernelShape,
    decode_blocks,
    decode_layers,
    decode_shared_bytes,
    decode_split,
    decode_warps,
    few_attended,
    is_roomy,
    most_held,
    norm_threads,
    prefill_shared_bytes,
    prefill_tile_rows,
    sample_parts,
    truncated_shared_bytes,
    truncated_threads,
    wgmma_shared_bytes,
)

Tensor = torch.Tensor


class KernelOps(ProductOps):
    """The operations for one model on one stream."""

    def __init__(
        self, library: KernelLibrary, shape: KernelShape, stream: Stream, multiprocessors: int, matvec_depth: int
    ) -> None:
        super().__init__(library, shape, stream, multiprocessors, matvec_depth)
        self._scale = Float(math.log2(math.e) / math.sqrt(shape.head_dim))
        self._roomy = is_roomy(matvec_depth)
        for name in ("decode_attention", "decode_attention-few", "decode_attention-prefix"):
            if name in library:
                shared_bytes = decode_shared_bytes(shape, name == "decode_attention-few")
                library.allow_shared(name, "decode_attention", shared_bytes)
        library.allow_shared("prefill_attention", "prefill_attention", prefill_shared_bytes(shape))
        library.allow_shared("truncated_sample", "choose_truncated", TRUNCATED_SHARED_BYTES)
        self._clustered = "truncated_sample-cluster" in library
        if self._clustered:
            library.allow_shared("truncated_sample-cluster", "choose_truncated_held", most_held(self._roomy))
        self._wgmma = "prefill_wgmma" in library
        if self._wgmma:
            library.allow_shared("prefill_wgmma", "prefill_wgmma", wgmma_shared_bytes(shape))
            library.allow_shared("prefix_attention", "prefix_attention", wgmma_shared_bytes(shape))

    # Model

    def embedding(self, table: Tensor, token_ids: Tensor, out: Tensor, tokens: int) -> None:
        """out[t] = table[token_ids[t]]."""
        self._launch("embedding", "embedding", (tokens,), 128, at(table), at(token_ids), at(out))

    def rms_norm(self, residual: Tensor, weight: Tensor, out: Tensor, tokens: int, epsilon: float) -> None:
        """out = norm(residual) * weight."""
        threads = norm_threads(self._shape.hidden_size)
        self._launch("rms_norm", "rms_norm", (tokens,), threads, at(residual), at(weight), at(out), Float(epsilon))

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
        arguments = (
            at(x),
            at(residual),
            at(bias),
            at(weight),
            at(rows),
            at(out),
            Float(epsilon),
        )
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
        arguments = (at(residual), at(bias), at(weight), at(out), Float(epsilon))
        threads = norm_threads(self._shape.hidden_size)
        self._launch(
            "rms_norm", "rms_norm_add_parts", (tokens,), threads, at(parts.sums), Int(parts.splits), *arguments
        )

    def silu_mul(self, x: Tensor, bias: Tensor | None, out: Tensor, tokens: int) -> None:
        """out = silu(x[:, :wide]) * x[:, wide:]."""
        blocks = -(-tokens * self._shape.intermediate_size // 8 // 256)
        self._launch("silu_mul", "silu_mul", (blocks,), 256, at(x), at(bias), at(out), Int(tokens))

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
        source = () if parts is None else (at(parts.sums), Int(parts.splits))
        self._launch(
            "qkv_epilogue", "qkv_epilogue" if parts is None else "qkv_epilogue_parts", grid, 128,
            *source, at(qkv), at(bias), at(norms[0]), at(norms[1]), at(cos), at(sin), at(positions), at(slots),
            at(cache), cache.stride(0) // 8, Float(epsilon),
        )  # fmt: skip

    # Attention

    def plan_decode(
        self, step: StepTensors, rows: int, out: DecodeItems, *, tokens: int, shared: SharedPrefixes | None = None
    ) -> None:
        """Fill the work list of the step's single-token rows, of those in `shared` behind their prefixes only (no window then).

        `tokens`: of the whole step, of a graph those that it was captured for; with them the items' size follows (decode_split).
        """
        shape = self._shape
        short, long, most = (
            decode_split(shape, tokens, 0),
            shape.split,
            few_attended(shape),
        )  # a row is long beyond `most`
        self._launch(
            "row_state", "plan_decode", (1,), 1024,
            at(step.rows), at(step.num_scheduled), at(step.q_start), at(step.context_lens),
            at(None if shared is None else shared.prefixes), Int(rows), Int(out.window),
            Int(short), Int(long), Int(most), at(out.items), at(out.num_items),
        )  # fmt: skip

    @property
    def shares_prefixes(self) -> bool:
        """Whether prefix_attention runs here."""
        return self._wgmma

    def prefix_attention(
        self, qkv: Tensor, cache: Tensor, step: StepTensors, shared: SharedPrefixes, scratch: DecodeScratch
    ) -> None:
        """Partial results of shared prefixes, for the decode_attention that stands behind it on the stream.

        What stands before it must be qkv_epilogue, or no kernel of ours, as for decode_attention.
        """
        shape = self._shape
        self._launch(
            "prefix_attention", "prefix_attention", (self._multiprocessors,), 512 if shape.head_dim == 64 else 384,
            self._map(cache.view(-1, shape.head_dim), 16), at(qkv), Int(cache.stride(0) // shape.head_dim),
            at(step.block_table), Int(step.block_table.shape[1]),
            at(shared.works), at(shared.num_works), at(shared.query_tokens), self._scale, at(scratch.partials),
            shared_bytes=wgmma_shared_bytes(shape),
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
        after_prefix: bool = False,
    ) -> None:
        """Attention of the rows in the work list, of `rows` rows in all. `after_prefix`: some of them share a prefix.

        What stands before it on the stream must be qkv_epilogue, matvec_qkv, norm_qkv, prefix_attention, or no kernel of ours: it
        reads what older kernels wrote before its own wait.
        """
        shape = self._shape
        heads = shape.num_kv_heads * shape.decode_tiles
        # Blocks walk over the items, as many as are resident at once: a block that walks has the next item's tokens on their way while
        # it merges. For few rows one a multiprocessor, with all its tokens under way before the wait.
        few = rows <= DECODE_FEW_ROWS and "decode_attention-few" in self._library and not after_prefix
        name = "decode_attention-prefix" if after_prefix else "decode_attention-few" if few else "decode_attention"
        blocks = max(1, self._multiprocessors * decode_blocks(shape, few, self._roomy, self._wgmma) // heads)
        grid = blocks, heads, decode_layers(shape, rows, after_prefix)
        self._launch(
            name, "decode_attention", grid, decode_warps(shape.head_dim, few) * 32,
            at(qkv), at(cache), cache.stride(0) // 8, at(step.block_table), Int(step.block_table.shape[1]),
            at(work.items), at(work.num_items), self._scale, at(scratch.partials), at(scratch.arrived), at(out),
            shared_bytes=decode_shared_bytes(shape, few),
        )  # fmt: skip

    def prefill_attention(
        self, qkv: Tensor, cache: Tensor, step: StepTensors, tiles: Tensor, window: int, out: Tensor
    ) -> None:
        """Attention of the chunks in `tiles` int32 [n, 2], of `prefill_tile_rows` each; a tile of row -1 is none."""
        shape, name = self._shape, "prefill_wgmma" if self._wgmma else "prefill_attention"
        threads = (512 if self._wgmma else 128) if shape.head_dim == 64 else (384 if self._wgmma else 256)
        self._launch(
            name, name, (tiles.shape[0], shape.num_kv_heads), threads,
            *((self._map(cache.view(-1, shape.head_dim), 16),) if self._wgmma else ()),
            at(qkv), at(cache), cache.stride(0) // 8, at(step.block_table), Int(step.block_table.shape[1]), at(step.rows),
            at(step.q_start), at(step.num_scheduled), at(step.context_lens), at(tiles), Int(window), self._scale, at(out),
            shared_bytes=wgmma_shared_bytes(shape) if self._wgmma else prefill_shared_bytes(shape),
        )  # fmt: skip

    @property
    def prefill_tile_rows(self) -> int:
        """Pairs (token, query head) of a tile."""
        return prefill_tile_rows(self._shape.head_dim, self._wgmma)

    # Rows

    def apply_plan(self, arena: Tensor, plan: Tensor, segments_at: int, segments: int) -> None:
        """Spread a plan over the arena: `segments` triples start at plan[segments_at]."""
        self._launch("row_state", "apply_plan", (segments,), 128, at(arena), at(plan), Int(segments_at))

    def copy_words(self, to: Tensor, source: Tensor) -> None:
        """Copy int32 tensors of one size; either may be pinned, and then stays untouched by the host until the step has ended."""
        words = to.numel()
        self._launch("row_state", "copy_words", (-(-words // 256),), 256, at(to), at(source), Int(words))

    def prepare_tokens(
        self,
        step: StepTensors,
        rows: int,
        num_tokens: int,
        fields: Tensor,
        tokens: Tensor,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
    ) -> None:
        """Look up ids, positions and slots of the scheduled tokens and count them as computed.

        A row with num_scheduled 0 is padding, as are its tokens: those up to the next row's, or to `num_tokens`, get -1 for all three.
        """
        self._launch(
            "row_state", "prepare_tokens", (rows,), 128,
            at(step.rows), at(step.num_scheduled), at(step.q_start), at(fields), at(tokens), Int(tokens.shape[1]),
            at(step.block_table), Int(step.block_table.shape[1]), at(token_ids), at(positions), at(slots),
            at(step.context_lens), Int(num_tokens),
        )  # fmt: skip

    def count_tokens(self, jobs: Tensor, fields: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Count tokens of rows with penalties; jobs int32 [n, 4]."""
        arguments = (
            at(jobs),
            at(fields),
            at(tokens),
            Int(tokens.shape[1]),
            at(counts),
            Int(counts.shape[1]),
        )
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
            at(logits), Int(logits.stride(0)), Int(vocab), at(sample_rows), at(fields), at(tokens), Int(tokens.shape[1]),
            at(counts), at(processed), at(raw_state),
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
            "sample", "choose", (rows, sample_parts(rows)), 256,
            at(logits), at(processed), Int(logits.stride(0)), Int(vocab), at(sample_rows), at(fields), at(partial),
            at(raw_state), at(arrived), at(chosen), at(status),
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
        clustered, shared_bytes, holds = self._clustered and rows <= CLUSTER_ROWS, TRUNCATED_SHARED_BYTES, False
        if clustered:
            shared_bytes, holds = truncated_shared_bytes(vocab, self._roomy)
        self._launch(
            "truncated_sample-cluster" if clustered else "truncated_sample",
            "choose_truncated_held" if holds else "choose_truncated",
            (rows * CLUSTER if clustered else rows,), truncated_threads(clustered),
            at(logits), at(processed), Int(logits.stride(0)), Int(vocab), at(sample_rows), at(fields), at(raw_state),
            at(chosen), at(status), shared_bytes=shared_bytes,
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
        host: Tensor | None,
    ) -> None:
        """Append the chosen tokens to their rows and to `result` [2, max_rows], and write them where `host` int32 [2] says: the
        address of pinned int32 [2, max_rows], low half first."""
        self._launch(
            "sample", "commit", (-(-rows // 128),), 128,
            at(chosen), at(status), at(sample_rows), Int(rows), at(fields), at(tokens), Int(tokens.shape[1]),
            at(counts), Int(counts.shape[1]), at(result), Int(result.shape[1]), at(host),
        )  # fmt: skip

    def logprobs(
        self, logits: Tensor, vocab: int, jobs: Tensor, tokens: Tensor, ids: Tensor, values: Tensor, ranks: Tensor
    ) -> None:
        """Describe positions; jobs int32 [n, 4]."""
        self._launch(
            "logprobs", "logprobs", (jobs.shape[0],), 512,
            at(logits), Int(logits.stride(0)), Int(vocab), at(jobs), at(tokens), Int(tokens.shape[1]),
            at(ids), at(values), at(ranks),
        )  # fmt: skip
