"""Every family against transformers on small random models: prefill, chunked prefill and decode, past the trained context too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from worker.backends.torch_backend import TorchBackend, TorchSettings
from worker.offline import OfflineEngine, OfflineRequest
from worker.step import SamplingParams

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "smollm2-tied": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 33}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": {**YARN, "rope_theta": 10000.0}, "max_position_embeddings": 256}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def make_model(tmp_path: Path, case: str) -> Any:
    """A random model saved in float32; biases and norms are randomised too, since their defaults hide errors."""
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{"tie_word_embeddings": False, **SHAPE, **changes})
    torch.manual_seed(len(case))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.normal_(0.5, 0.3)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if case == "qwen3" else "1GB")
    return model


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_agree_with_transformers(tmp_path: Path, case: str) -> None:
    model = make_model(tmp_path, case)
    length, outputs = 200, 8
    if case == "qwen2-yarn":
        length = 170
    ids = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], length).tolist()
    engine = OfflineEngine(
        TorchBackend(
            tmp_path,
            TorchSettings(max_model_len=length + outputs if case != "qwen2-yarn" else 256, num_blocks=60, poison=True),
        )
    )
    sampling = SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=3)
    short = OfflineRequest(ids[:5], outputs, sampling)
    request = OfflineRequest(ids, outputs, sampling)
    # The second run mixes decodes of the short row with chunks of the long one.
    whole, chunked = engine.generate([request])[0], engine.generate([short, request], chunk_size=37)[1]
    for result in (whole, chunked):
        sequence = ids + result.token_ids
        with torch.inference_mode():
            expected = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        assert [entry.position for entry in result.logprobs] == list(range(1, len(sequence)))
        for entry in result.logprobs:
            row = expected[entry.position - 1]
            assert entry.token_id == sequence[entry.position]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)
            assert [value for _, value in entry.best] == pytest.approx(row.topk(3).values.tolist(), abs=2e-4)


def test_old_rope_scaling_names_mean_the_same(tmp_path: Path) -> None:
    from worker.checkpoint.config import parse_config

    base = {**SHAPE, "architectures": ["LlamaForCausalLM"]}
    new = parse_config(tmp_path, {**base, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}})
    old_scaling = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    old = parse_config(tmp_path, {**base, "rope_theta": 500000.0, "rope_scaling": old_scaling})
    assert new == old
    assert new.rope.theta == 500000.0
