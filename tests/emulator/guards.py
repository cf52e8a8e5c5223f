"""Tensors with guards in front of them and behind them, so that a store outside of one is seen."""

from __future__ import annotations

import weakref

import torch

_GUARD = 16 << 10  # bytes: what a block stores beyond a tensor by mistake hits these and not the heap
_ALIGNMENT = 256
_BYTE = 0xA5
_guarded: list[weakref.ref[torch.Tensor]] = []


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor that is watched as long as it lives."""
    size = tensor.numel() * tensor.element_size()
    room = torch.full((size + 2 * _GUARD + _ALIGNMENT,), _BYTE, dtype=torch.uint8)
    first = _GUARD + -room.data_ptr() % _ALIGNMENT
    copy = room[first : first + size].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    _guarded.append(weakref.ref(copy))
    return copy


def broken_guards() -> str:
    """Says where something stands beside a tensor; empty where nothing does. A broken guard is told once."""
    broken = ""
    alive = []
    for reference in _guarded:
        tensor = reference()
        if tensor is None:
            continue
        room = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        first = tensor.data_ptr() - room.data_ptr()
        end = first + tensor.numel() * tensor.element_size()
        if bool((room[:first] != _BYTE).any()) or bool((room[end:] != _BYTE).any()):
            broken = f"outside of a tensor {tuple(tensor.shape)} of {tensor.dtype}"
        else:
            alive.append(reference)
    _guarded[:] = alive
    return broken
