"""A tiny model with SmolLM2's tokenizer and random weights: its logits are noise, so its tokens are what a grammar makes of noise."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from llguidance import LLTokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer

from service.guidance import load_tokenizer
from worker.backend import BackendInfo
from worker.backends.torch_backend import TorchBackend, TorchSettings
from worker.checkpoint.config import parse_config
from worker.checkpoint.weights import expected_tensors
from worker.grammar.load import load_runner
from worker.grammar.runner import GrammarRunner
from worker.offline import OfflineEngine
from worker.step import SamplingParams

_CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 49_152,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "sliding_window": None,
    "torch_dtype": "float32",
}
SAMPLING = SamplingParams(temperature=1.0, stop_token_ids=(2, 0))  # SmolLM2's ends
_ASSETS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")


def grammar_runner(tokenizer_of: Path, info: BackendInfo) -> GrammarRunner:
    """For the tokenizer of a model directory."""
    assets = {name: path.read_bytes() for name in _ASSETS if (path := tokenizer_of / name).exists()}
    runner = load_runner(assets, info.vocab_size)
    assert runner is not None
    return runner


def tiny_engine(folder: Path, tokenizer_of: Path) -> OfflineEngine:
    """Writes the model into `folder` and loads it."""
    generator = torch.Generator().manual_seed(11)
    shapes = expected_tensors(parse_config(Path("config.json"), _CONFIG))
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes}
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    save_file(tensors, folder / "model.safetensors")
    backend = TorchBackend(folder, TorchSettings(num_blocks=64 * 40, max_rows=64, max_model_len=640, threads=1))
    return OfflineEngine(backend, grammars=lambda info: grammar_runner(tokenizer_of, info))


def llguidance_tokenizer(folder: Path) -> LLTokenizer:
    """Of SmolLM2."""
    return load_tokenizer((folder / "tokenizer.json").read_bytes(), 49_152, SAMPLING.stop_token_ids)


def noise_prompts(names: Iterable[str]) -> dict[str, list[int]]:
    """Four tokens for each, drawn from its name."""
    return {name: [Random(name).randrange(3, 49_152) for _ in range(4)] for name in names}


def sampling_with_bias(tokenizer: Tokenizer) -> SamplingParams:
    """How noise is sampled."""
    return replace(SAMPLING, logit_bias=ending_bias(tokenizer), top_k=200)


def ending_bias(tokenizer: Tokenizer) -> dict[int, float]:
    """Noise rambles: of 49,152 tokens in a string few end it. So what closes something is made likelier and white space rarer, as any
    request may (logit_bias); the grammar still decides what is allowed.
    """
    bias: dict[int, float] = {}
    for text, token_id in tokenizer.get_vocab().items():
        text = text.replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t").replace("č", "\r")
        if not text.strip():
            bias[token_id] = -5.0
        elif set(text) <= set('"}]') and len(text) <= 3:
            bias[token_id] = 3.0
    return bias
