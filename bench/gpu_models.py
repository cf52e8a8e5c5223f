"""Models with random weights in the layout of Hugging Face, written to a directory. A fixed seed gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from worker.checkpoint.config import parse_config
from worker.checkpoint.weights import expected_tensors

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def _llama3(factor: float) -> dict[str, Any]:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_scaling": {"factor": factor, "rope_type": "llama3", **scaling}}


SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        **_LLAMA,
        **_llama3(32.0),
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA,
        **_llama3(8.0),
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "tiny-llama": {
        **_LLAMA,
        **_llama3(32.0),
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
    "tiny-mistral": {
        **_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 48,
        "max_position_embeddings": 4096,
        "hidden_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
    "tiny-qwen2": {
        **_LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 4096,
        "hidden_size": 448,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "intermediate_size": 960,
        "vocab_size": 2050,
        "tie_word_embeddings": True,
    },
    "tiny-qwen3": {
        **_LLAMA,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 512,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
}


def write_model(parent: Path, name: str, scale: float = 0.02, seed: int = 1234, layers: int | None = None) -> Path:
    """Write the model `name` of SHAPES below `parent` and return its directory. Norms are near 1, the rest normal(0, scale)."""
    directory = parent / name
    directory.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[name], **({"num_hidden_layers": layers} if layers is not None else {})}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device=device).manual_seed(seed)
    specs = list(expected_tensors(parse_config(directory / "config.json", config)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor_name, shape in specs:
        size = 2 * int(torch.Size(shape).numel())
        header[tensor_name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor_name, shape in specs:
            values = torch.empty(shape, dtype=torch.float32, device=device).normal_(0, scale, generator=generator)
            if "norm" in tensor_name:
                values += 1
            file.write(values.to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes())
    return directory
