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
from worker.model.rope import RotaryTable, rotate

Plans = Mapping[int | None, AttentionPlan]
"""The step's attention plan for each sliding window that the model has."""


class _Layer:
    """One decoder layer with its products packed."""

    def __init__(self, weights: LayerWeights, config: ModelConfig) -> None:
        self.input_norm = weights.input_norm
        self.post_norm = weights.post_norm
        self.q_norm = weights.q_norm
        self.k_norm = weights.k_norm
        self.qkv = Linear(weights.qkv, weights.qkv_bias)
        self.o = Linear(weights.o, weights.o_bias)
        self.gate_up = Linear(weights.gate_up, weights.gate_up_bias)
        self.down = Linear(weights.down, weights.down_bias)


class Decoder:
    """A model that computes hidden states and logits; it holds weights, never requests."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        self.config = config
        self._embed = weights.embed
        self._layers = [_Layer(layer, config) for layer in weights.layers]
        self._norm = weights.norm
        self._lm_head = Linear(weights.lm_head)
        self._rope = RotaryTable(config.rope, config.head_dim, max_model_len, weights.embed.device)
        self._scale = 1.0 / math.sqrt(config.head_dim)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        write_index: torch.Tensor,
        plans: Plans,
        cache: PagedKVCache,
    ) -> torch.Tensor:
        """Hidden states float32 [tokens, hidden] before the last norm, for token_ids and positions int64 [tokens].

        Keys and values go to the slots of `write_index` (PagedKVCache.index) before attention reads them.
        """
        # The residual stream stays in float32: fewer conversions, and sums that do not lose what layers add.
        hidden = F.embedding(token_ids, self._embed).float()
        angles = self._angles(positions)
        for number, layer in enumerate(self._layers):
            plan = plans[self.config.windows[number]]
            attended = self._attention(
                number, layer, self._normed(hidden, layer.input_norm), angles, write_index, plan, cache
            )
            hidden += layer.o(attended)
            gate, up = layer.gate_up(self._normed(hidden, layer.post_norm)).chunk(2, dim=-1)
            hidden += layer.down(F.silu(gate).mul_(up))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab] of hidden states float32 [n, hidden]."""
        return self._lm_head(self._normed(hidden, self._norm)).float()

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for all query and key heads, float32 [tokens, num_heads + num_kv_heads, head_dim].

        Those of the queries carry attention's 1 / sqrt(head_dim).
        """
        scale = torch.ones(self.config.num_heads + self.config.num_kv_heads, 1)
        scale[: self.config.num_heads] = self._scale
        cos = self._rope.cos.index_select(0, positions).unsqueeze(1) * scale
        sin = self._rope.sin.index_select(0, positions).unsqueeze(1) * scale
        return cos, sin

    def _attention(
        self,
        number: int,
        layer: _Layer,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        write_index: torch.Tensor,
        plan: AttentionPlan,
        cache: PagedKVCache,
    ) -> torch.Tensor:
        config = self.config
        heads = layer.qkv(hidden).view(len(hidden), -1, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated = heads[:, :num_rotated].float()
        if layer.q_norm is not None and layer.k_norm is not None:
            _norm_heads(rotated[:, : config.num_heads], layer.q_norm, config.rms_norm_eps)
            _norm_heads(rotated[:, config.num_heads :], layer.k_norm, config.rms_norm_eps)
        rotated = rotate(rotated, *angles)
        heads[:, config.num_heads : num_rotated].copy_(rotated[:, config.num_heads :])
        cache.write(number, write_index, heads[:, config.num_heads :])
        return plan.attend(number, cache, rotated[:, : config.num_heads]).to(hidden.dtype)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (arXiv:1910.07467) of float32 x, computed in float32, in the dtype of the weights."""
        scaled = x * _inverse_rms(x, self.config.rms_norm_eps)
        return torch.mul(scaled, weight, out=torch.empty_like(x, dtype=weight.dtype))


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis of float32 x, kept as an axis of 1."""
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_heads(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """RMSNorm of each head, in place: heads float32 [tokens, heads, head_dim], weight [head_dim]."""
    heads.mul_(_inverse_rms(heads, eps)).mul_(weight)
