"""The decoder of the Llama family as a sequence of kernels and cuBLAS products.

A layer, with the matrix products in capitals (at most 16 tokens: our matrix-vector kernel; at most 64, GATE_UP in some models at
most 128, where kernels/product_rows.py says so: our tensor-core kernel; else cuBLAS):

    norm · QKV · epilogue (bias, QK norm, rotation, cache append) · attention · O · residual + norm · GATE_UP, silu * up · DOWN

The residual add of one layer's end is fused with the next one's norm. Up to 16 tokens the epilogue is part of QKV, up to 4 the norms
are part of QKV and GATE_UP: five kernels a layer. All tensors are allocated once: a CUDA graph may hold any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.operands import DecodeItems, DecodeScratch, NormInput, Parts, Placing, SharedPrefixes, StepTensors
from kernels.ops import KernelOps
from kernels.product_rows import PARTS_ROWS
from kernels.shapes import FUSED_ROWS, WGMMA_ARCHITECTURE, KernelShape, gemm_rows, gemm_splits, most_decode_items
from worker.checkpoint.config import ModelConfig
from worker.checkpoint.weights import LayerWeights, Weights
from worker.model.rope import rotary_table

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Workspace:
    """Activations of one step and the work lists of attention."""

    token_ids: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    slots: Tensor  # int32 [tokens]
    hidden: Tensor  # [tokens, hidden] the residual
    spare: Tensor  # [FUSED_ROWS, hidden] the residual between attention and MLP, where products normalise their input
    normed: Tensor  # [tokens, hidden]
    qkv: Tensor  # [tokens, qkv]
    attended: Tensor  # [tokens, q_size]
    projected: Tensor  # [tokens, hidden] output of O or DOWN, not yet added
    gate_up: Tensor  # [tokens, 2 * intermediate]
    activated: Tensor  # [tokens, intermediate]
    parts: Tensor  # float32: a product of at most PARTS_ROWS tokens in parts
    items: dict[int, DecodeItems]  # by window
    scratch: DecodeScratch
    prefix_slots: int  # first of the scratch's slots that shared prefixes have for themselves


def allocate_workspace(
    config: ModelConfig,
    shape: KernelShape,
    tokens: int,
    max_rows: int,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    prefix_parts: int,
) -> Workspace:
    """All tensors that a step of `tokens` tokens writes. `prefix_parts`: partial results of a row's shared prefix at most."""

    def ints(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    def elements(columns: int) -> Tensor:
        return torch.zeros((tokens, columns), dtype=dtype, device=device)

    max_items = most_decode_items(shape, max_rows, max_model_len)
    windows = {window or 0 for window in config.windows}
    return Workspace(
        token_ids=ints(tokens),
        positions=ints(tokens),
        slots=ints(tokens),
        hidden=elements(config.hidden_size),
        spare=torch.zeros((FUSED_ROWS, config.hidden_size), dtype=dtype, device=device),
        normed=elements(config.hidden_size),
        qkv=elements(shape.qkv_size),
        attended=elements(shape.q_size),
        projected=elements(config.hidden_size),
        gate_up=elements(2 * config.intermediate_size),
        activated=elements(config.intermediate_size),
        parts=torch.zeros(_parts_size(shape), dtype=torch.float32, device=device),
        items={window: DecodeItems(ints(max_items, 8), ints(1), window) for window in windows},
        scratch=DecodeScratch(
            torch.empty(
                (max_items + max_rows * prefix_parts, config.num_heads * (config.head_dim + 2)),
                dtype=torch.float32,
                device=device,
            ),
            ints(max_rows * config.num_heads),
        ),
        prefix_slots=max_items,
    )


def _parts_size(shape: KernelShape) -> int:
    if not gemm_rows(shape, WGMMA_ARCHITECTURE):
        return 0
    hidden = shape.hidden_size
    products = [(shape.qkv_size, hidden), (hidden, shape.q_size), (hidden, shape.intermediate_size)]
    return PARTS_ROWS * max(gemm_splits(n, k) * n for n, k in products)


class CudaDecoder:
    """Weights, rotary table and workspace; the KV cache is attached once its size is known."""

    def __init__(
        self,
        config: ModelConfig,
        shape: KernelShape,
        weights: Weights,
        ops: KernelOps,
        workspace: Workspace,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.workspace = workspace
        self._shape = shape
        self._weights = weights
        self._ops = ops
        rotations = rotary_table(config.rope, config.head_dim, max_model_len, weights.embed.device)
        # As kernels/qkv_epilogue.cu wants them: [max_model_len, head_dim], the first half of the sines negated.
        self._cos = torch.cat((rotations.real, rotations.real), dim=-1)
        self._sin = torch.cat((-rotations.imag, rotations.imag), dim=-1)
        self._cache: list[Tensor] = []
        self._place = Placing(self._cos, self._sin, workspace.positions, workspace.slots, workspace.qkv)

    def attach_cache(self, cache: Tensor) -> None:
        """`cache` [layers, 2, num_blocks, num_kv_heads, block_size, head_dim]."""
        self._cache = list(cache)

    def forward(
        self,
        tokens: int,
        step: StepTensors,
        rows: int,
        tiles: Tensor | None,
        decodes: bool,
        shared: SharedPrefixes | None = None,
    ) -> None:
        """Enqueue all layers over the prepared `tokens`. Leaves `hidden` and `projected`, whose sum is the last layer's output.

        `tiles`: work list of chunks (prefill_tiles), None if there is none. `decodes`: some row has a single token. `shared`: some
        such rows share a prefix, in a step of more than PARTS_ROWS tokens.
        """
        ops, space, config = self._ops, self.workspace, self.config
        if decodes:
            for window, items in space.items.items():
                ops.plan_decode(step, rows, items, tokens=tokens, shared=None if window else shared)
        if ops.fits_parts(tokens):
            self._forward_in_parts(tokens, step, rows, tiles, decodes)
            return
        fused = ops.fits_fused(tokens)
        if not fused:
            ops.embedding(self._weights.embed, space.token_ids, space.hidden, tokens)
        previous_bias: Tensor | None = None
        for number, layer in enumerate(self._weights.layers):
            if not fused and number == 0:
                ops.rms_norm(space.hidden, layer.input_norm, space.normed, tokens, config.rms_norm_eps)
            elif not fused:
                self._add_and_norm(previous_bias, layer.input_norm, tokens)
            self._qkv(number, layer, previous_bias, tokens)
            self._attention(number, step, tiles, rows if decodes else 0, shared)
            self._product(layer.o, space.attended, space.projected, tokens)
            if not fused:
                self._add_and_norm(layer.o_bias, layer.post_norm, tokens)
            self._mlp(layer, tokens)
            previous_bias = layer.down_bias

    def _forward_in_parts(self, tokens: int, step: StepTensors, rows: int, tiles: Tensor | None, decodes: bool) -> None:
        """The layers where our own tensor-core products take all tokens: what follows each adds up its parts."""
        ops, space, epsilon = self._ops, self.workspace, self.config.rms_norm_eps
        ops.embedding(self._weights.embed, space.token_ids, space.hidden, tokens)
        down: Parts | None = None
        down_bias: Tensor | None = None
        for number, layer in enumerate(self._weights.layers):
            if down is None:
                ops.rms_norm(space.hidden, layer.input_norm, space.normed, tokens, epsilon)
            else:
                ops.rms_norm_add_parts(down, space.hidden, down_bias, layer.input_norm, space.normed, tokens, epsilon)
            qkv = ops.gemm_parts(layer.qkv, space.normed, space.parts, tokens)
            ops.qkv_epilogue(
                space.qkv, layer.qkv_bias, (layer.q_norm, layer.k_norm), self._cos, self._sin, space.positions, space.slots,
                self._cache[number], tokens, epsilon, qkv,
            )  # fmt: skip
            self._attention(number, step, tiles, rows if decodes else 0)
            o = ops.gemm_parts(layer.o, space.attended, space.parts, tokens)
            ops.rms_norm_add_parts(o, space.hidden, layer.o_bias, layer.post_norm, space.normed, tokens, epsilon)
            ops.gemm_silu(layer.gate_up, layer.gate_up_bias, space.normed, space.activated, tokens)
            down, down_bias = ops.gemm_parts(layer.down, space.activated, space.parts, tokens), layer.down_bias
        if down is not None:
            ops.sum_parts(down, space.projected, tokens)

    def load_products(self, first: int, last: int) -> None:
        """Enqueue cuBLAS's products of `first` to `last` tokens, `first` apart: it loads a kernel, in some 15 ms, at its first use.

        What stands in the workspace is overwritten.
        """
        space, layer = self.workspace, self._weights.layers[0]
        for tokens in range(first, last + 1, first):
            for weight, x, out in (
                (layer.qkv, space.normed, space.qkv),
                (layer.o, space.attended, space.projected),
                (layer.gate_up, space.normed, space.gate_up),
                (layer.down, space.activated, space.projected),
            ):
                torch.mm(x[:tokens], weight.t(), out=out[:tokens])

    def logits(self, at: Tensor, count: int, out: Tensor) -> None:
        """out[i] = lm_head(norm(output of token at[i])), float32; `at` int32 [count], -1 for padding, no token twice."""
        ops, space, weights = self._ops, self.workspace, self._weights
        bias = weights.layers[-1].down_bias
        if ops.fits_fused(count):
            x = NormInput(space.projected, space.hidden, bias, weights.norm, at, None, self.config.rms_norm_eps)
            ops.norm_float(weights.lm_head, x, out, count)
            return
        ops.rms_norm_add(
            space.projected, space.hidden, bias, weights.norm, space.normed, count, self.config.rms_norm_eps, at
        )
        if ops.fits_matvec(self.config.hidden_size, count):
            ops.matvec_float(weights.lm_head, space.normed, out, count)
        elif ops.fits_parts(count) and weights.lm_head.shape[0] % 128 == 0:
            ops.gemm_float(weights.lm_head, space.normed, out, count)
        else:
            rows = ops.cublas_rows(weights.lm_head, count, min(len(space.normed), len(out)))
            target = out[:rows, : self.config.vocab_size]
            torch.mm(space.normed[:rows], weights.lm_head.t(), out_dtype=torch.float32, out=target)

    def _qkv(self, number: int, layer: LayerWeights, previous_bias: Tensor | None, tokens: int) -> None:
        ops, space, epsilon = self._ops, self.workspace, self.config.rms_norm_eps
        cache = self._cache[number]
        if ops.fits_fused(tokens):
            if number == 0:
                x = NormInput(None, self._weights.embed, None, layer.input_norm, space.token_ids, space.spare, epsilon)
            else:
                x = NormInput(
                    space.projected, space.hidden, previous_bias, layer.input_norm, None, space.spare, epsilon
                )
            ops.norm_qkv(layer.qkv, layer.qkv_bias, x, self._place, cache, tokens)
        elif ops.fits_qkv(tokens):
            ops.matvec_qkv(layer.qkv, layer.qkv_bias, space.normed, self._place, cache, tokens)
        else:
            self._product(layer.qkv, space.normed, space.qkv, tokens)
            ops.qkv_epilogue(
                space.qkv, layer.qkv_bias, (layer.q_norm, layer.k_norm), self._cos, self._sin, space.positions, space.slots,
                cache, tokens, epsilon,
            )  # fmt: skip

    def _attention(
        self,
        number: int,
        step: StepTensors,
        tiles: Tensor | None,
        decode_rows: int,
        shared: SharedPrefixes | None = None,
    ) -> None:
        ops, space = self._ops, self.workspace
        cache, window = self._cache[number], self.config.windows[number] or 0
        after_prefix = shared is not None and window == 0
        if shared is not None and after_prefix:
            ops.prefix_attention(space.qkv, cache, step, shared, space.scratch)
        if decode_rows:
            items = space.items[window]
            ops.decode_attention(
                space.qkv, cache, step, items, space.scratch, space.attended, decode_rows, after_prefix
            )
        if tiles is not None:
            ops.prefill_attention(space.qkv, cache, step, tiles, window, space.attended)

    def _mlp(self, layer: LayerWeights, tokens: int) -> None:
        ops, space = self._ops, self.workspace
        if ops.fits_fused(tokens):
            x = NormInput(
                space.projected,
                space.spare,
                layer.o_bias,
                layer.post_norm,
                None,
                space.hidden,
                self.config.rms_norm_eps,
            )
            ops.norm_silu(layer.gate_up, layer.gate_up_bias, x, space.activated, tokens)
        elif ops.fits_matvec(self.config.hidden_size, tokens):
            bias = layer.gate_up_bias
            ops.matvec_silu(layer.gate_up, bias, space.normed, space.activated, tokens)
        elif ops.fits_gemm(tokens):
            ops.gemm_silu(layer.gate_up, layer.gate_up_bias, space.normed, space.activated, tokens)
        else:
            self._cublas(layer.gate_up, space.normed, space.gate_up, tokens)
            ops.silu_mul(space.gate_up, layer.gate_up_bias, space.activated, tokens)
        self._product(layer.down, space.activated, space.projected, tokens)

    def _add_and_norm(self, bias: Tensor | None, weight: Tensor, tokens: int) -> None:
        space = self.workspace
        self._ops.rms_norm_add(
            space.projected, space.hidden, bias, weight, space.normed, tokens, self.config.rms_norm_eps
        )

    def _product(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        if self._ops.fits_matvec(weight.shape[1], tokens):
            self._ops.matvec(weight, x, out, tokens)
        else:
            self._cublas(weight, x, out, tokens)

    def _cublas(self, weight: Tensor, x: Tensor, out: Tensor, tokens: int) -> None:
        """out[:tokens] = x weight^T. Rows of `out` behind those may be written, too: of what an older step left in x."""
        rows = self._ops.cublas_rows(weight, tokens, len(x))
        torch.mm(x[:rows], weight.t(), out=out[:rows])


def prefill_tiles(num_scheduled: np.ndarray, context_lens: np.ndarray, group: int, tile_rows: int) -> np.ndarray:
    """Work list int32 [n, 2] (row of the step, tile) of rows with more than one token, the longest tiles first.

    `tile_rows`: pairs (token, query head) of a tile, KernelOps.prefill_tile_rows.

    A tile's cost is the context that its last token sees; starting with the longest keeps the end of the launch even.
    """
    rows = np.flatnonzero(num_scheduled > 1)
    counts = -(-num_scheduled[rows].astype(np.int64) * group // tile_rows)
    owner = np.repeat(rows, counts)
    tile = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    last = np.minimum((tile + 1) * tile_rows // group, num_scheduled[owner])
    cost = context_lens[owner] - num_scheduled[owner] + last
    order = np.argsort(-cost, kind="stable")
    return np.stack((owner[order], tile[order]), axis=1).astype(np.int32)
