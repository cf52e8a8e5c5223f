"""The tensors of a GGUF file as those of a Hugging Face checkpoint, in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from . import bfloat16
from .errors import ConvertError, GGUFError
from .gguf_config import ModelShape
from .gguf_file import GGUFFile, GGUFTensor
from .safetensors_stream import write_bfloat16

_PIECE_ELEMENTS = 1 << 23  # 32 MB as float32: what is in memory of a tensor at a time
_NOT_WEIGHTS = frozenset({"rope_freqs.weight"})  # read by gguf_config


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the checkpoint: which tensor of the GGUF file it is, its shape, and whether its rows are permuted."""

    name: str
    source: str
    shape: tuple[int, ...]
    permuted: bool = False


def targets(shape: ModelShape) -> Iterator[Target]:
    """All tensors of a checkpoint of `shape`, in the order of the file."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    yield Target("model.embed_tokens.weight", "token_embd.weight", (vocab, hidden))
    for layer in range(shape.num_hidden_layers):
        for name, source, dims, permuted in _layer_tensors(shape):
            yield Target(f"model.layers.{layer}.{name}", f"blk.{layer}.{source}", dims, permuted)
    yield Target("model.norm.weight", "output_norm.weight", (hidden,))
    if not shape.tie_word_embeddings:
        yield Target("lm_head.weight", "output.weight", (vocab, hidden))


def _layer_tensors(shape: ModelShape) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
    hidden, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q_rows, kv_rows = shape.num_attention_heads * head, shape.num_key_value_heads * head
    # llama.cpp rotates neighbouring elements for its architecture `llama`, so its converter reorders the rows of q and k.
    permuted = shape.architecture == "llama"
    yield "input_layernorm.weight", "attn_norm.weight", (hidden,), False
    yield "self_attn.q_proj.weight", "attn_q.weight", (q_rows, hidden), permuted
    yield "self_attn.k_proj.weight", "attn_k.weight", (kv_rows, hidden), permuted
    yield "self_attn.v_proj.weight", "attn_v.weight", (kv_rows, hidden), False
    yield "self_attn.o_proj.weight", "attn_output.weight", (hidden, q_rows), False
    if shape.architecture == "qwen2":
        yield "self_attn.q_proj.bias", "attn_q.bias", (q_rows,), False
        yield "self_attn.k_proj.bias", "attn_k.bias", (kv_rows,), False
        yield "self_attn.v_proj.bias", "attn_v.bias", (kv_rows,), False
    if shape.architecture == "qwen3":
        yield "self_attn.q_norm.weight", "attn_q_norm.weight", (head,), False
        yield "self_attn.k_norm.weight", "attn_k_norm.weight", (head,), False
    yield "post_attention_layernorm.weight", "ffn_norm.weight", (hidden,), False
    yield "mlp.gate_proj.weight", "ffn_gate.weight", (inner, hidden), False
    yield "mlp.up_proj.weight", "ffn_up.weight", (inner, hidden), False
    yield "mlp.down_proj.weight", "ffn_down.weight", (hidden, inner), False


def check_tensors(file: GGUFFile, shape: ModelShape) -> dict[str, Target]:
    """The targets by name, each found in the file with its shape and a type that can be dequantised.

    Raises GGUFError for a missing or wrongly shaped tensor, ConvertError for one too many or of an unsupported type.
    """
    wanted: dict[str, Target] = {}
    for target in targets(shape):  # lazily: a block_count that lies ends at the first missing layer
        if (tensor := file.tensors.get(target.source)) is None:
            raise GGUFError(file.path, f"has no tensor {target.source}")
        if tensor.shape != target.shape:
            raise GGUFError(file.path, f"tensor {target.source} has shape {tensor.shape}, not {target.shape}")
        if not can_dequantise(tensor.tensor_type):
            raise ConvertError(
                file.path, f"tensor {target.source} is of type {tensor.tensor_type.name}, which cannot be dequantised"
            )
        wanted[target.name] = target
    known = {target.source for target in wanted.values()} | _NOT_WEIGHTS
    if unknown := sorted(file.tensors.keys() - known):
        raise ConvertError(file.path, f"tensor {unknown[0]} has no place in a {shape.architecture} model")
    return wanted


def can_dequantise(tensor_type: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf library turns blocks of this type into float32; asked of it with one block of zeros."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), tensor_type)
    except NotImplementedError:
        return False
    return True


def write_weights(
    file: GGUFFile, wanted: Mapping[str, Target], head_dim: int, out: Path, done: Callable[[], Any]
) -> None:
    """Dequantise `wanted` into the safetensors file `out`; calls `done()` after each tensor."""

    def pieces() -> Iterator[tuple[str, npt.NDArray[np.uint16]]]:
        for target in wanted.values():
            for values in _dequantise(file.tensors[target.source], head_dim):
                bits = bfloat16.to_bfloat16(unpermute(values, head_dim) if target.permuted else values)
                if not bfloat16.is_finite(bits):
                    raise GGUFError(file.path, f"tensor {target.source} holds infinite or NaN weights")
                yield target.name, bits
            done()

    write_bfloat16(out, {target.name: target.shape for target in wanted.values()}, pieces())


def unpermute(rows: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's reordering of q_proj and k_proj; [heads * head_dim, columns] of whole heads, same shape.

    Within a head the checkpoint has the first halves of all rotated pairs, then the second halves; the GGUF file has
    them in pairs: GGUF row 2 i + j is checkpoint row i + j * head_dim / 2.
    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py, inverted.
    """
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _dequantise(tensor: GGUFTensor, head_dim: int) -> Iterator[npt.NDArray[np.float32]]:
    """Float32 pieces of whole rows (and, unless the tensor ends, of whole heads); [rows, columns]."""
    columns = tensor.shape[-1]
    raw = tensor.data.reshape(math.prod(tensor.shape[:-1]), -1)
    step = max(1, _PIECE_ELEMENTS // columns // head_dim) * head_dim
    for start in range(0, raw.shape[0], step):
        # A copy: the library's views want aligned memory, which a mapped file does not promise.
        piece = np.array(raw[start : start + step])
        with np.errstate(all="ignore"):  # overflow gives infinity, which the caller reports with the tensor's name
            values = gguf.dequantize(piece, tensor.tensor_type)
        yield np.asarray(values, dtype=np.float32).reshape(-1, columns)
