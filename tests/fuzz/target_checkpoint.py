"""A worker's checkpoint: Safetensors headers, their index, config.json and the digest, from files that lie."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.fuzz import documents, values
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.scratch import scratch
from worker.backends.torch_backend import longest_context
from worker.checkpoint.config import load_config, parse_config
from worker.checkpoint.digest import DigestError, model_digest, read_assets
from worker.checkpoint.errors import CheckpointError
from worker.checkpoint.safetensors import find_tensors
from worker.checkpoint.weights import StoredWeights, expected_tensors
from worker.model.rope import rotary_table

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 4,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32", "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "sliding_window": None, "rope_scaling": None, "eos_token_id": 2,
}  # fmt: skip
_SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 1.0},
)  # fmt: skip
_WORDS = (
    *_SCALINGS, "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "yarn", "llama3", "bfloat16", 16,
    [["LlamaForCausalLM"]], ["sliding_attention"], 10**12, 1e308, 1e-308, 10**400,
)  # fmt: skip
_HEADER_WORDS = (
    "F32",
    "BF16",
    "F16",
    "I64",
    "BOOL",
    [0, 0],
    [0, -1],
    [4, 0],
    [1 << 62, 1 << 62],
    [float("inf"), 1],
    [1.5],
    [[1]],
    ["1", "2"],
    [12, 8],
)


@functools.cache
def _tensors() -> tuple[dict[str, Any], bytes]:
    """Header and data of the whole model."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in expected_tensors(parse_config(Path("config.json"), _CONFIG)):
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header, bytes(at)


class _World:
    def __init__(self, random: Random, folder: Path) -> None:
        self.random = random
        self.folder = folder
        (folder / "tokenizer.json").write_bytes(b"{}")

    def attack(self) -> Verdict:
        random, folder = self.random, self.folder
        header, data = _tensors()
        config = dict(_CONFIG)
        if random.random() < 0.5:
            config["rope_scaling"] = dict(random.choice(_SCALINGS))
        if random.random() < 0.3:
            config |= {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "use_sliding_window": True,
                       "layer_types": ["sliding_attention"]}  # fmt: skip
        written = json.dumps(header).encode()
        config_bytes = json.dumps(config).encode()
        mutated = True
        kind = random.random()
        if kind < 0.45:
            config_bytes = documents.mutated_json(random, config, _WORDS)
        elif kind < 0.85:
            written = documents.mutated_json(random, header, _HEADER_WORDS)
        else:
            mutated = False
        whole = struct.pack("<Q", len(written)) + written + data
        if kind >= 0.95:
            whole = values.flip(random, whole[:200]) + whole[200:]
            mutated = True
        elif kind >= 0.9:
            whole = random.randbytes(random.randrange(200))
        elif kind >= 0.85:
            whole = struct.pack("<Q", values.integer(random, 0, (1 << 64) - 1)) + random.randbytes(
                random.randrange(100)
            )
        (folder / "config.json").write_bytes(config_bytes)
        self._write_weights(whole)
        return Verdict(mutated, self._load())

    def _write_weights(self, whole: bytes) -> None:
        """In one file, or as the one shard of an index, which may lie as well."""
        random, folder = self.random, self.folder
        index = folder / "model.safetensors.index.json"
        index.unlink(missing_ok=True)
        (folder / "model.safetensors").write_bytes(whole)
        if random.random() < 0.15:
            names = [name for name in _tensors()[0] if name != "__metadata__"]
            document = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
            words = ("/etc/passwd", "..", "config.json", "absent.safetensors")
            index.write_bytes(documents.mutated_json(random, document, words))

    def _load(self) -> bool:
        accepted = True
        try:
            model_digest(self.folder, read_assets(self.folder))
        except DigestError:
            accepted = False
        try:
            config = load_config(self.folder)
            # What a backend does with numbers that were accepted.
            longest = longest_context(config)
            assert longest > 0
            if config.head_dim <= 1024:
                rotary_table(config.rope, config.head_dim, min(longest, 64), torch.device("cpu"))
            find_tensors(self.folder)
            weights = StoredWeights(self.folder, config, torch.float32, lambda what, done, total: None)
            read = [weights.embed(), *weights.layers(), weights.norm()]
            if not config.tie_word_embeddings:
                read.append(weights.lm_head())
            assert len(read) >= config.num_layers + 2
        except CheckpointError:
            return False
        return accepted


def _episode(random: Random) -> Iterator[Verdict]:
    with scratch() as folder:
        world = _World(random, folder)
        for _ in range(EPISODE):
            yield world.attack()


TARGET = Target(
    "checkpoint",
    _episode,
    (
        "worker.checkpoint.config",
        "worker.checkpoint.safetensors",
        "worker.checkpoint.digest",
        "worker.checkpoint.weights",
    ),
)
