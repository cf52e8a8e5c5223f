"""The decoder of the Llama family: one function for every architecture that `ModelConfig` describes.

    h = embed[ids]
    each layer:  h += O(attention(rope(QKV(norm(h)))));  h += down(silu(gate(norm(h))) * up(norm(h)))
    logits = lm_head(norm(h))

Qwen2 adds biases to Q, K, V; Qwen3 normalises each head of Q and K; Mistral sees a sliding window. Tokens of all rows lie behind one
another ("flattened"); only attention knows of rows, through its plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from worker.checkpoint.config import ModelConfig
from worker.checkpoint.weights import LayerWeights, StoredWeights
from worker.model.attention import AttentionPlan
from worker.model.kv_cache import PagedKVCache
from worker.model.layer_kernels import LayerKernels
from worker.model.linear import Linear
from worker.model.linear_int8 import Int8Linear
from worker.model.rope import adjacent_pairs, rotary_table


class _Layer:
    """One decoder layer with its products packed."""

    def __init__(self, weights: LayerWeights, config: ModelConfig, product: type[Linear | Int8Linear]) -> None:
        rotated = adjacent_pairs(config.num_heads + config.num_kv_heads, config.head_dim)
        order = torch.cat((rotated, torch.arange(len(rotated), len(weights.qkv))))
        within = adjacent_pairs(1, config.head_dim)
        self.input_norm = weights.input_norm.float()
        self.post_norm = weights.post_norm.float()
        self.q_norm = None if weights.q_norm is None else weights.q_norm.float()[within]
        self.k_norm = None if weights.k_norm is None else weights.k_norm.float()[within]
        self.qkv = product(weights.qkv[order], None if weights.qkv_bias is None else weights.qkv_bias[order])
        self.o = product(weights.o, weights.o_bias)
        self.gate_up = product(weights.gate_up, weights.gate_up_bias)
        self.down = product(weights.down, weights.down_bias)


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """All weights of a model as products read them."""

    embed: Callable[[torch.Tensor], torch.Tensor]  # float32 [n, hidden] for int64 ids [n]
    layers: tuple[_Layer, ...]
    norm: torch.Tensor  # float32 [hidden]
    lm_head: Linear | Int8Linear


def pack(weights: StoredWeights, config: ModelConfig, int8: bool = False) -> PackedWeights:
    """Read and pack one matrix after the other: beside what is packed only the current one is held as it was stored.

    Raises CheckpointError, or BackendError where this processor has no products of 8-bit numbers.
    """
    product = Int8Linear if int8 else Linear
    embed, lm_head = _pack_ends(weights, config, int8)
    # map, since a loop's variable would hold a layer while the next is read.
    layers = tuple(map(functools.partial(_Layer, config=config, product=product), weights.layers()))
    return PackedWeights(embed, layers, weights.norm().float(), lm_head)


def _pack_ends(
    weights: StoredWeights, config: ModelConfig, int8: bool
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Linear | Int8Linear]:
    """Embedding and head. In 8 bits tied ones share their memory."""
    if int8:
        packed = Int8Linear(weights.embed())
        return packed.weight_rows, packed if config.tie_word_embeddings else Int8Linear(weights.lm_head())
    table = weights.embed()
    return lambda ids: F.embedding(ids, table).float(), Linear(
        table if config.tie_word_embeddings else weights.lm_head()
    )


class Decoder:
    """A model that computes hidden states and logits; it holds weights, never requests."""

    def __init__(
        self, config: ModelConfig, weights: PackedWeights, max_model_len: int, block_size: int, dtype: torch.dtype
    ) -> None:
        self.config = config
        self._embed = weights.embed
        self._layers = weights.layers
        self._norm = weights.norm
        self._lm_head = weights.lm_head
        self._rope = rotary_table(config.rope, config.head_dim, max_model_len, weights.norm.device)
        self._kernels = LayerKernels(config, block_size, dtype)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        plan: AttentionPlan,
        cache: PagedKVCache,
    ) -> torch.Tensor:
        """Hidden states float32 [tokens, hidden] before the last norm, for token_ids, positions and cache slots int64 [tokens].

        Keys and values go to their slots before attention reads them.
        """
        # All activations are float32: no conversions, and sums that do not lose what layers add. The KV cache is in the model's
        # dtype, and so are the weights unless they are quantised.
        kernels = self._kernels
        hidden = self._embed(token_ids)
        delta = torch.zeros_like(
            hidden
        )  # what the layer before adds; the next norm reads the sum anyway, so it also adds
        attended = hidden.new_empty((len(hidden), self.config.num_heads * self.config.head_dim))
        for number, layer in enumerate(self._layers):
            heads = layer.qkv(kernels.norm(hidden, delta, layer.input_norm))
            self._norm_heads(heads, layer)
            kernels.append(heads, self._rope, positions, slots, cache, number)
            plan.attend(kernels.compiled, number, cache, heads, attended, self.config.windows[number])
            delta = layer.o(attended)
            delta = layer.down(kernels.silu(layer.gate_up(kernels.norm(hidden, delta, layer.post_norm))))
        return hidden.add_(delta)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab] of hidden states float32 [n, hidden], which stay as they are."""
        copy = hidden.clone()
        return self._lm_head(self._kernels.norm(copy, torch.zeros_like(copy), self._norm))

    def _norm_heads(self, heads: torch.Tensor, layer: _Layer) -> None:
        """Qwen3: each head of Q and K is normalised, in place."""
        if layer.q_norm is None or layer.k_norm is None:
            return
        config = self.config
        each = heads.view(len(heads), -1, config.head_dim)
        queries, keys = each[:, : config.num_heads], each[:, config.num_heads : -config.num_kv_heads]
        queries.copy_(F.rms_norm(queries, (config.head_dim,), layer.q_norm, config.rms_norm_eps))
        keys.copy_(F.rms_norm(keys, (config.head_dim,), layer.k_norm, config.rms_norm_eps))
