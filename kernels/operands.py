"""What the operations of ops.py and product_ops.py take, and the address of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launcher import Float

Tensor = torch.Tensor


def at(tensor: Tensor | None) -> int:
    """The address on the device; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


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
    """The work list of decode attention for one window, the longest items first (plan_decode in row_state.cu). All int32."""

    items: Tensor  # [max_items, 8]
    num_items: Tensor  # [1]
    window: int  # 0: full attention


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Which single-token rows of a step read a prefix together (prefix_attention.cu). All int32."""

    prefixes: Tensor  # [max_rows, 2] by row of the step: tokens, first slot of its partial results * 32 + how many; 0, 0: none
    query_tokens: Tensor  # [max_rows] tokens of the step, those of one group behind another's
    works: Tensor  # [max_works, 8]
    num_works: Tensor  # [1]


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What splits of one row, and parts of its shared prefix, hand to the one that merges them."""

    partials: Tensor  # float32 [max_items and slots of prefixes, num_heads * (head_dim + 2)]
    arrived: Tensor  # int32 zeros [max_rows * num_heads]


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
        return (*map(at, tensors), Float(self.epsilon))


@dataclass(frozen=True, slots=True)
class Parts:
    """A product that gemm_parts left as sums of parts of K."""

    sums: Tensor  # float32 [splits, tokens, n] and more
    splits: int
