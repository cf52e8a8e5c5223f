"""What a GGUF file says about a model's shape, as the config.json of transformers.

Fails closed: a key that changes the arithmetic and that config.json cannot express is refused, not dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from .errors import ConvertError, GGUFError
from .gguf_file import GGUFFile

# Keys of GGUF under "<architecture>." that scale activations, or route between experts.
_REFUSED_UNLESS = {
    "expert_count": 0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.temperature_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}

# Llama 3.1 to 3.3 differ in `factor` only; GGUF stores the frequency divisors that come out, not the parameters.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide which tensors there are and of which shape."""

    architecture: str  # GGUF's: llama, qwen2, qwen3
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool


def read_shape(file: GGUFFile) -> ModelShape:
    """Sizes from metadata and the embedding matrix. Raises ConvertError for other families, GGUFError for nonsense."""
    arch = file.string("general.architecture")
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ConvertError(file.path, f"holds architecture {arch!r}; llama, qwen2 and qwen3 can be converted")
    if file.integer("split.count", 1) > 1:
        raise ConvertError(
            file.path, "is one part of a split model: join the parts with llama-gguf-split --merge first"
        )
    _refuse_other_arithmetic(file, arch)
    hidden = _positive(file, f"{arch}.embedding_length")
    heads = _positive(file, f"{arch}.attention.head_count")
    kv_heads = _positive(file, f"{arch}.attention.head_count_kv", heads)
    head_dim = _positive(file, f"{arch}.attention.key_length", hidden // heads)
    if heads % kv_heads:
        raise GGUFError(file.path, f"{arch}.attention.head_count {heads} is no multiple of head_count_kv {kv_heads}")
    if head_dim % 2 or ("attention.key_length" not in _suffixes(file, arch) and hidden % heads):
        raise GGUFError(file.path, f"{arch}.embedding_length {hidden} does not split into {heads} heads of even size")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := file.integer(f"{arch}.{key}", head_dim)) != head_dim:
            raise ConvertError(file.path, f"{arch}.{key} is {value}; only the size of a head, {head_dim}, is supported")
    if (embedding := file.tensors.get("token_embd.weight")) is None:
        raise GGUFError(file.path, "has no tensor token_embd.weight")
    return ModelShape(
        architecture=arch,
        num_hidden_layers=_positive(file, f"{arch}.block_count"),
        hidden_size=hidden,
        intermediate_size=_positive(file, f"{arch}.feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def model_config(file: GGUFFile, shape: ModelShape) -> dict[str, Any]:
    """The config.json of `file`, in the keys that transformers 4 and 5 both read."""
    arch = shape.architecture
    window = file.integer(f"{arch}.attention.sliding_window", 0)
    # Mistral 7B comes under GGUF's architecture `llama`; the window is what sets it apart.
    class_name, model_type = {
        "llama": ("MistralForCausalLM", "mistral") if window else ("LlamaForCausalLM", "llama"),
        "qwen2": ("Qwen2ForCausalLM", "qwen2"),
        "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    }[arch]
    if window and arch != "llama":
        raise ConvertError(file.path, f"{arch}.attention.sliding_window is set, which Qwen applies to some layers only")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _positive(file, f"{arch}.context_length"),
        "rms_norm_eps": _above(file, f"{arch}.attention.layer_norm_rms_epsilon", 0.0),
        "rope_theta": _above(file, f"{arch}.rope.freq_base", 1.0, 10000.0),
        "rope_scaling": rope_scaling(file, shape),
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if arch != "qwen2":
        config["attention_bias"] = False
    if model_type == "llama":
        config["mlp_bias"] = False
    if window:
        config["sliding_window"] = window
    return config


def rope_scaling(file: GGUFFile, shape: ModelShape) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json: llama3 (from the tensor rope_freqs.weight), linear, yarn, or None."""
    arch = shape.architecture
    kind = file.string(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise ConvertError(file.path, f"has both rope_freqs.weight and {arch}.rope.scaling.type {kind}")
        return _llama3_scaling(file, shape)
    if kind == "none" and (old := _above(file, f"{arch}.rope.scale_linear", 0.0, 1.0)) != 1.0:
        return {"rope_type": "linear", "factor": old}
    if kind == "none":
        return None
    factor = _short(file.number(f"{arch}.rope.scaling.factor"))
    if factor < 1.0:
        raise GGUFError(file.path, f"{arch}.rope.scaling.factor is {factor}, below 1")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ConvertError(
            file.path, f"{arch}.rope.scaling.type is {kind!r}; none, linear, yarn and llama3 are supported"
        )
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _positive(file, f"{arch}.rope.scaling.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if f"{arch}.rope.scaling.yarn_{name}" in file.fields:
            scaling[name] = _above(file, f"{arch}.rope.scaling.yarn_{name}", 0.0)
    return scaling


def llama3_divisors(head_dim: int, theta: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3.1's RoPE divides each frequency by; float64 [head_dim / 2].

    Source: `_compute_llama3_parameters` of transformers: short wavelengths stay, long ones are divided by `factor`,
    between them the reciprocals are interpolated.
    """
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((_LLAMA3_CONTEXT / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))


def _llama3_scaling(file: GGUFFile, shape: ModelShape) -> dict[str, Any] | None:
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.shape != (shape.head_dim // 2,) or tensor.tensor_type != gguf.GGMLQuantizationType.F32:
        raise GGUFError(
            file.path, f"tensor rope_freqs.weight of shape {tensor.shape} is not float32 [{shape.head_dim // 2}]"
        )
    with np.errstate(invalid="ignore"):  # signalling NaN
        divisors = tensor.data.view("<f4").astype(np.float64)
    if not np.isfinite(divisors).all():
        raise GGUFError(file.path, "tensor rope_freqs.weight holds infinite or NaN divisors")
    factor = _short(float(divisors.max()))
    if np.array_equal(divisors, np.ones_like(divisors)):
        return None
    theta = _above(file, f"{shape.architecture}.rope.freq_base", 1.0, 10000.0)
    if not factor > 1.0 or not np.allclose(divisors, llama3_divisors(shape.head_dim, theta, factor), rtol=1e-3):
        raise ConvertError(file.path, "tensor rope_freqs.weight does not hold the divisors of Llama 3.1's RoPE scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _refuse_other_arithmetic(file: GGUFFile, arch: str) -> None:
    for suffix, neutral in _REFUSED_UNLESS.items():
        value = file.fields.get(f"{arch}.{suffix}", neutral)
        if value != neutral:
            raise ConvertError(file.path, f"{arch}.{suffix} is {value}, which is not supported")


def _suffixes(file: GGUFFile, arch: str) -> set[str]:
    return {key.removeprefix(f"{arch}.") for key in file.fields if key.startswith(f"{arch}.")}


def _positive(file: GGUFFile, key: str, default: int | None = None) -> int:
    if isinstance(file.fields.get(key), list):
        raise ConvertError(file.path, f"{key} differs from layer to layer, which is not supported")
    if (value := file.integer(key, default)) <= 0:
        raise GGUFError(file.path, f"{key} is {value}")
    return value


def _above(file: GGUFFile, key: str, least: float, default: float | None = None) -> float:
    if (value := _short(file.number(key, default))) <= least:
        raise GGUFError(file.path, f"{key} is {value}, which must be above {least:g}")
    return value


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file's float32 reads 9.999999747378752e-06."""
    return float(str(np.float32(value)))
