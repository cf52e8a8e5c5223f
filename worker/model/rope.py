"""Rotary position embeddings (RoFormer, arXiv:2104.09864) and the ways to stretch them past the trained context."""

from __future__ import annotations

import math

import torch

from worker.checkpoint.config import RopeConfig


def rotary_table(rope: RopeConfig, head_dim: int, max_model_len: int, device: torch.device) -> torch.Tensor:
    """The rotation of each pair of dimensions at each position as a complex number: complex64 [max_model_len, head_dim / 2]."""
    frequencies = inverse_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    return torch.polar(torch.full_like(angles, rope.attention_factor), angles).to(device)


def adjacent_pairs(num_heads: int, head_dim: int) -> torch.Tensor:
    """Order of the rows of a projection that makes pairs adjacent: int64 [num_heads * head_dim].

    Checkpoints of the Llama family pair dimension i with i + head_dim / 2. Beside one another they are one complex number, and
    queries and keys in the same new order have the same products.
    """
    half = torch.arange(head_dim // 2)
    order = torch.stack((half, half + head_dim // 2), dim=1).view(-1)
    return (torch.arange(num_heads).unsqueeze(1) * head_dim + order).view(-1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2].

    `dynamic` changes nothing within the trained context, and the backend does not serve it beyond: its angles would depend on the
    length that a sequence reaches later, which keys in a cache cannot follow.
    """
    base = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base, head_dim)
    return base


def _llama3(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's: slow dimensions are stretched, fast ones kept, those between blended (transformers' modeling_rope_utils)."""
    wavelength = 2 * math.pi / base
    low_wavelength = rope.original_max_position / rope.low_freq_factor
    high_wavelength = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * base / rope.factor + smooth * base
    stretched = torch.where(wavelength > low_wavelength, base / rope.factor, base)
    between = (wavelength <= low_wavelength) & (wavelength >= high_wavelength)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeConfig, base: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): a ramp between stretched and kept over the number of rotations."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return base / rope.factor * (1 - kept) + base * kept
