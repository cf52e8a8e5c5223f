"""The decoder of the Llama family: one function for every architecture that `ModelConfig` describes.

    h = embed[ids]
    each layer:  h += O(attention(rope(QKV(norm(h)))));  h += down(silu(gate(norm(h))) * up(norm(h)))
    logits = lm_head(norm(h))

Qwen2 adds biases to Q, K, V; Qwen3 normalises each head of Q and K; Mistral sees a sliding window. Tokens of all rows lie behind one
another ("flattened"); only attention knows of rows, through its plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from worker.checkpoint.config import ModelConfig
from worker.checkpoint.weights import LayerWeights, Weights
from worker.model.attention import AttentionPlan
from worker.model.kv_cache import PagedKVCache
from worker.model.linear import Linear
from worker.model.rope import adjacent_pairs, rotary_table, rotate

Plans = Mapping[int | None, AttentionPlan]
"""The step's attention plan for each sliding window that the model has."""


class _Layer:
    """One decoder layer with its products packed."""

    def __init__(self, weights: LayerWeights, config: ModelConfig) -> None:
        rotated = adjacent_pairs(config.num_heads + config.num_kv_heads, config.head_dim)
        order = torch.cat((rotated, torch.arange(len(rotated), len(weights.qkv))))
        within = adjacent_pairs(1, config.head_dim)
        self.input_norm = weights.input_norm.float()
        self.post_norm = weights.post_norm.float()
        self.q_norm = None if weights.q_norm is None else weights.q_norm.float()[within]
        self.k_norm = None if weights.k_norm is None else weights.k_norm.float()[within]
        self.qkv = Linear(weights.qkv[order], None if weights.qkv_bias is None else weights.qkv_bias[order])
        self.o = Linear(weights.o, weights.o_bias)
        self.gate_up = Linear(weights.gate_up, weights.gate_up_bias)
        self.down = Linear(weights.down, weights.down_bias)


class Decoder:
    """A model that computes hidden states and logits; it holds weights, never requests."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        self.config = config
        self._embed = weights.embed
        self._layers = [_Layer(layer, config) for layer in weights.layers]
        self._norm = weights.norm.float()
        self._lm_head = Linear(weights.lm_head)
        self._rope = rotary_table(config.rope, config.head_dim, max_model_len, weights.embed.device)
        self._eps = torch.full((1, 1), config.rms_norm_eps)
        # Attention's 1 / sqrt(head_dim) rides on the rotation of the queries.
        self._scale = torch.ones(config.num_heads + config.num_kv_heads, 1)
        self._scale[: config.num_heads] = 1.0 / math.sqrt(config.head_dim)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        write_index: torch.Tensor,
        plans: Plans,
        cache: PagedKVCache,
    ) -> torch.Tensor:
        """Hidden states float32 [tokens, hidden] before the last norm, for token_ids and positions int64 [tokens].

        Keys and values go to the slots of `write_index` (PagedKVCache.slot_index) before attention reads them.
        """
        # All activations are float32: no conversions, and sums that do not lose what layers add. The weights and the KV cache are
        # in the model's dtype.
        hidden = F.embedding(token_ids, self._embed).float()
        rotations = self._rope.index_select(0, positions).unsqueeze(1) * self._scale
        for number, layer in enumerate(self._layers):
            plan = plans[self.config.windows[number]]
            attended = self._attention(
                number, layer, self._normed(hidden, layer.input_norm), rotations, write_index, plan, cache
            )
            hidden += layer.o(attended)
            gate, up = layer.gate_up(self._normed(hidden, layer.post_norm)).chunk(2, dim=-1)
            hidden += layer.down(F.silu(gate).mul_(up))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab] of hidden states float32 [n, hidden]."""
        return self._lm_head(self._normed(hidden, self._norm))

    def _attention(
        self,
        number: int,
        layer: _Layer,
        hidden: torch.Tensor,
        rotations: torch.Tensor,
        write_index: torch.Tensor,
        plan: AttentionPlan,
        cache: PagedKVCache,
    ) -> torch.Tensor:
        config = self.config
        heads = layer.qkv(hidden).view(len(hidden), -1, config.head_dim)
        queries, keys_values = heads[:, : config.num_heads], heads[:, config.num_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            keys = keys_values[:, : config.num_kv_heads]
            queries.copy_(_rms_norm(queries, layer.q_norm, self._eps))
            keys.copy_(_rms_norm(keys, layer.k_norm, self._eps))
        rotate(heads[:, : config.num_heads + config.num_kv_heads], rotations)
        cache.write(number, write_index, keys_values)
        return plan.attend(number, cache, queries)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _rms_norm(x, weight, self._eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """RMSNorm (arXiv:1910.07467) of float32 x [..., n] over its last axis; float32 weight [n], eps [1, 1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.addcmul(eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * inverse).mul_(weight)
