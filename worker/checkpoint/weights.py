"""Weights of a Llama-family model, from mapped Safetensors straight into fused tensors of the target dtype.

Projections that read the same input are fused into one matrix (Q, K, V; gate, up), so that a layer is four products.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from worker.backend import Progress
from worker.checkpoint.config import ModelConfig
from worker.checkpoint.errors import CheckpointError
from worker.checkpoint.safetensors import TensorEntry, find_tensors, map_file
from worker.checkpoint.upload import Upload

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in], as checkpoints store them; biases are None where the family has none."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [q_size + 2 * kv_size, hidden]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    o: torch.Tensor  # [hidden, q_size]
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, intermediate]
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model. `lm_head` is `embed` itself where the embeddings are tied."""

    embed: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [vocab, hidden]


class StoredWeights:
    """A checkpoint on disk, read piece by piece: who packs a layer before it reads the next never holds two copies of a model."""

    def __init__(self, model_dir: Path, config: ModelConfig, dtype: torch.dtype, progress: Progress) -> None:
        """Raises CheckpointError naming file and tensor."""
        tensors = find_tensors(model_dir)
        _check_names(model_dir, config, tensors)
        self._config = config
        self._reader = _TensorReader(tensors, dtype, torch.device("cpu"), _MappedCopy(tensors, progress))

    def embed(self) -> torch.Tensor:
        """[vocab, hidden]"""
        return self._reader.fused(["model.embed_tokens.weight"])

    def layers(self) -> Iterator[LayerWeights]:
        """The layers in order."""
        return (_read_layer(self._reader, self._config, layer) for layer in range(self._config.num_layers))

    def norm(self) -> torch.Tensor:
        """[hidden]"""
        return self._reader.fused(["model.norm.weight"])

    def lm_head(self) -> torch.Tensor:
        """[vocab, hidden]; not stored where the embeddings are tied."""
        return self._reader.fused(["lm_head.weight"])


def upload_weights(model_dir: Path, config: ModelConfig, dtype: torch.dtype, upload: Upload) -> Weights:
    """Allocate the weights on `upload`'s device and let it fill them: they hold nothing before upload.wait() has returned.

    Raises CheckpointError naming file and tensor before any is copied.
    """
    tensors = find_tensors(model_dir)
    _check_names(model_dir, config, tensors)
    weights = _read(_TensorReader(tensors, dtype, upload.device, upload.add), config)
    upload.start()
    return weights


def _read(reader: _TensorReader, config: ModelConfig) -> Weights:
    embed = reader.fused(["model.embed_tokens.weight"])
    layers = tuple(_read_layer(reader, config, layer) for layer in range(config.num_layers))
    lm_head = embed if config.tie_word_embeddings else reader.fused(["lm_head.weight"])
    return Weights(embed, layers, reader.fused(["model.norm.weight"]), lm_head)


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor that a checkpoint of this config holds."""
    hidden, wide = config.hidden_size, config.intermediate_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    projections = [
        ("self_attn.q_proj", config.q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", config.kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", config.kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, config.q_size, config.o_bias),
        ("mlp.gate_proj", wide, hidden, config.mlp_bias),
        ("mlp.up_proj", wide, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, wide, config.mlp_bias),
    ]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, rows, columns, bias in projections:
            yield f"{prefix}.{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}.{name}.bias", (rows,)
        if config.qk_norm:
            yield f"{prefix}.self_attn.q_norm.weight", (config.head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (config.head_dim,)


def _check_names(model_dir: Path, config: ModelConfig, tensors: dict[str, TensorEntry]) -> None:
    expected = dict(expected_tensors(config))
    for name, shape in expected.items():
        entry = tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{model_dir}: tensor {name} is missing (config.json asks for it)")
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}"
            )
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{entry.file}: tensor {name} has dtype {entry.dtype}; supported are F32, F16, BF16")
    for name, entry in tensors.items():
        if name not in expected and not _may_be_ignored(name, config):
            raise CheckpointError(f"{entry.file}: tensor {name} is not part of the model that config.json describes")


def _may_be_ignored(name: str, config: ModelConfig) -> bool:
    """Tied heads are sometimes stored twice, and old Llama checkpoints hold the rotary frequencies as a buffer."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


class _TensorReader:
    """Allocates tensors and has them filled from files, several into one where they are fused along the first axis."""

    def __init__(
        self,
        tensors: dict[str, TensorEntry],
        dtype: torch.dtype,
        device: torch.device,
        copy: Callable[[TensorEntry, torch.dtype, torch.Tensor], None],
    ) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._device = device
        self._copy = copy

    def fused(self, names: list[str]) -> torch.Tensor:
        entries = [self._tensors[name] for name in names]
        rows = sum(entry.shape[0] for entry in entries)
        target = torch.empty((rows, *entries[0].shape[1:]), dtype=self._dtype, device=self._device)
        start = 0
        for entry in entries:
            self._copy(entry, _DTYPES[entry.dtype], target[start : start + entry.shape[0]])
            start += entry.shape[0]
        return target


class _MappedCopy:
    """Copies at once, out of mapped files."""

    def __init__(self, tensors: dict[str, TensorEntry], progress: Progress) -> None:
        self._progress = progress
        self._maps: dict[Path, mmap.mmap] = {}
        self._done = 0
        self._total = sum(entry.num_bytes for entry in tensors.values())

    def __call__(self, entry: TensorEntry, dtype: torch.dtype, target: torch.Tensor) -> None:
        if entry.file not in self._maps:
            self._maps[entry.file] = map_file(entry.file)
        count = entry.num_bytes // dtype.itemsize
        source = torch.frombuffer(self._maps[entry.file], dtype=dtype, count=count, offset=entry.offset)
        target.copy_(source.view(entry.shape))
        self._done += entry.num_bytes
        self._progress("weights", self._done, self._total)


def _read_layer(reader: _TensorReader, config: ModelConfig, layer: int) -> LayerWeights:
    prefix = f"model.layers.{layer}"
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]

    def read(names: list[str], what: str = "weight") -> torch.Tensor:
        return reader.fused([f"{prefix}.{name}.{what}" for name in names])

    def optional(wanted: bool, make: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        return make() if wanted else None

    return LayerWeights(
        input_norm=read(["input_layernorm"]),
        qkv=read(qkv),
        qkv_bias=optional(config.qkv_bias, lambda: read(qkv, "bias")),
        q_norm=optional(config.qk_norm, lambda: read(["self_attn.q_norm"])),
        k_norm=optional(config.qk_norm, lambda: read(["self_attn.k_norm"])),
        o=read(["self_attn.o_proj"]),
        o_bias=optional(config.o_bias, lambda: read(["self_attn.o_proj"], "bias")),
        post_norm=read(["post_attention_layernorm"]),
        gate_up=read(["mlp.gate_proj", "mlp.up_proj"]),
        gate_up_bias=optional(config.mlp_bias, lambda: read(["mlp.gate_proj", "mlp.up_proj"], "bias")),
        down=read(["mlp.down_proj"]),
        down_bias=optional(config.mlp_bias, lambda: read(["mlp.down_proj"], "bias")),
    )
