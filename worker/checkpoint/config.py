"""config.json of a Llama-family model, parsed and checked.

A config is believed only as far as it is consistent: a head count that does not divide, a scaling factor that is missing
or an activation that the decoder does not compute ends the load here, with the file and the key named. What the file says about
shapes is checked a second time against the tensors (weights.py).
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.checkpoint.errors import CheckpointError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

_MOST = 2**31 - 1
_MOST_LAYERS = 10_000
_TINY = 1e-3  # what is divided by


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How rotary angles grow with the position. Fields that the kind does not use keep their defaults.

    `original_max_position` is the context that the model was trained on before it was extended.
    """

    kind: str  # "default", "linear", "dynamic", "llama3", "yarn"
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: whole numbers as the ends of the ramp


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the decoder needs to know of a model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # [num_layers] sliding window in tokens; None: full attention
    dtype: str  # dtype of the stored weights: "bfloat16", "float16", "float32"

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together."""
        return self.num_kv_heads * self.head_dim


class _Reader:
    """Typed access to one JSON object; every error names the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self._prefix}{key}: {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_whole(value):
            raise self.error(key, f"must be a whole number, not {_show(value)}")
        if value < least:
            raise self.error(key, f"must be at least {least}, not {value}")
        if value > most:
            raise self.error(key, f"must be at most {most}, not {_show(value)}")
        return int(value)

    def number(self, key: str, default: float | None = None, above: float = 0.0, most: float = 1e9) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {_show(value)}")
        if not above < value <= most:  # nor is NaN
            raise self.error(key, f"must be above {above:g} and at most {most:g}, not {value}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_show(value)}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {_show(value)}")
        return value

    def object(self, key: str) -> _Reader:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, not {_show(value)}")
        return _Reader(self.path, value, f"{self._prefix}{key}.")


def _is_whole(value: float) -> bool:
    return isinstance(value, int) or value.is_integer()


def _show(value: Any) -> str:
    """As repr, but short, whatever a file holds."""
    return reprlib.repr(value)


def load_config(model_dir: Path) -> ModelConfig:
    """Read and check `model_dir`/config.json. Raises CheckpointError naming the file and the key."""
    path = model_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return parse_config(path, values)


def parse_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Check the values of a config.json; `path` is for messages only. Raises CheckpointError."""
    read = _Reader(path, values)
    family = _family(read)
    heads = read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads)
    hidden = read.integer("hidden_size")
    if heads % kv_heads:
        raise read.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if not read.has("head_dim") and hidden % heads:
        raise read.error(
            "hidden_size", f"{hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    head_dim = read.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise read.error("head_dim", f"must be even for rotary embeddings, not {head_dim}")
    activation = read.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise read.error("hidden_act", f"{activation!r} is not supported, only silu")
    if read.has("quantization_config"):
        raise read.error("quantization_config", "quantised checkpoints are not supported")
    layers = read.integer("num_hidden_layers", most=_MOST_LAYERS)
    attention_bias = read.flag("attention_bias", False)
    return ModelConfig(
        architecture=family,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        max_position_embeddings=read.integer("max_position_embeddings"),
        rope=_rope(read),
        tie_word_embeddings=read.flag("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and read.flag("mlp_bias", False),
        qk_norm=family == "qwen3",
        windows=_windows(read, family, layers),
        dtype=_dtype(read),
    )


def _family(read: _Reader) -> str:
    names = read.values.get("architectures")
    if not isinstance(names, list) or not names:
        raise read.error("architectures", "is missing")
    for name in names:
        if isinstance(name, str) and name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise read.error(
        "architectures", f"{_show(names[0])} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
    )


def _dtype(read: _Reader) -> str:
    name = read.text("dtype", read.text("torch_dtype", "float32"))
    if name not in ("bfloat16", "float16", "float32"):
        raise read.error("dtype", f"{name!r} is not supported; supported are bfloat16, float16, float32")
    return name


def _windows(read: _Reader, family: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, as transformers decides it for the family."""
    if family == "llama" or not read.has("sliding_window"):
        return (None,) * layers
    window = read.integer("sliding_window")
    if family == "mistral":
        return (window,) * layers
    if not read.flag("use_sliding_window", False):
        return (None,) * layers
    kinds = read.values.get("layer_types")
    if kinds is None:
        first = read.integer("max_window_layers", 28, least=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise read.error("layer_types", f"must list {layers} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise read.error("layer_types", f"{_show(kind)} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(read: _Reader) -> RopeConfig:
    """Rotary parameters, under transformers 5's name (`rope_parameters`) or the older ones (`rope_scaling`, `rope_theta`)."""
    rope = read.object("rope_parameters" if read.has("rope_parameters") else "rope_scaling")
    theta = rope.number("rope_theta", read.number("rope_theta", 10000.0, above=1.0, most=1e15), above=1.0, most=1e15)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if rope.has("partial_rotary_factor") and rope.number("partial_rotary_factor") != 1.0:
        raise rope.error("partial_rotary_factor", "only 1.0 is supported")
    limit = read.integer("max_position_embeddings")
    if kind == "default":
        return RopeConfig("default", theta)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind, theta, _factor(rope), rope.integer("original_max_position_embeddings", limit))
    if kind == "llama3":
        return _llama3(rope, theta)
    if kind == "yarn":
        return _yarn(rope, theta, limit)
    raise rope.error("rope_type", f"{kind!r} is not supported; supported are default, linear, dynamic, llama3, yarn")


def _factor(rope: _Reader) -> float:
    return rope.number("factor", above=_TINY, most=1e6)


def _llama3(rope: _Reader, theta: float) -> RopeConfig:
    low, high = rope.number("low_freq_factor", above=_TINY), rope.number("high_freq_factor", above=_TINY)
    if high <= low:
        raise rope.error("high_freq_factor", f"{high:g} must be above low_freq_factor {low:g}")
    return RopeConfig(
        "llama3",
        theta,
        _factor(rope),
        rope.integer("original_max_position_embeddings"),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: _Reader, theta: float, limit: int) -> RopeConfig:
    original = rope.integer("original_max_position_embeddings", limit)
    factor = _factor(rope) if rope.has("factor") else max(limit / original, _TINY)
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0, above=_TINY),
        beta_slow=rope.number("beta_slow", 1.0, above=_TINY),
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=rope.flag("truncate", True),
    )


def _yarn_attention_factor(rope: _Reader, factor: float) -> float:
    """The temperature of the YaRN paper (arXiv:2309.00071, equation 22), unless the config states it."""
    if rope.has("attention_factor"):
        return rope.number("attention_factor")

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)
