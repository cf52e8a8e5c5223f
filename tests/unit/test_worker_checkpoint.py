"""Checkpoints that cannot be served are refused with the file and the tensor or key named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.backend import BackendError
from worker.backends.torch_backend import TorchBackend, TorchSettings
from worker.backends.torch_memory import check_sequence_fits, choose_num_blocks
from worker.checkpoint.config import load_config, parse_config
from worker.checkpoint.digest import DigestError, model_digest
from worker.checkpoint.errors import CheckpointError
from worker.checkpoint.prefetch import prefetch
from worker.checkpoint.safetensors import find_tensors
from worker.checkpoint.weights import StoredWeights, expected_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NORM = "model.layers.1.input_layernorm.weight"


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = parse_config(Path("config.json"), CONFIG)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_tensors(config)}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path) -> Any:
    weights = StoredWeights(folder, load_config(folder), torch.float32, quiet)
    return SimpleNamespace(embed=weights.embed(), layers=list(weights.layers()), norm=weights.norm())


def test_projections_are_fused_in_order_and_converted(tmp_path: Path) -> None:
    tensors = make_tensors()
    write(tmp_path, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    seen: list[tuple[int, int]] = []
    weights = StoredWeights(
        tmp_path, load_config(tmp_path), torch.float32, lambda what, done, total: seen.append((done, total))
    )
    layers = list(weights.layers())
    prefix = "model.layers.1.self_attn."
    expected = torch.cat([tensors[f"{prefix}{name}_proj.weight"].bfloat16().float() for name in "qkv"])
    assert torch.equal(layers[1].qkv, expected)
    gate_up = torch.cat(
        [tensors[f"model.layers.0.mlp.{name}_proj.weight"].bfloat16().float() for name in ("gate", "up")]
    )
    assert torch.equal(layers[0].gate_up, gate_up)
    for name in ("model.embed_tokens", "lm_head", "model.norm"):
        stored = {"model.embed_tokens": weights.embed, "lm_head": weights.lm_head, "model.norm": weights.norm}[name]()
        assert torch.equal(stored, tensors[f"{name}.weight"].bfloat16().float())
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path) -> None:
    tensors = make_tensors()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(tmp_path).layers[0].down, tensors["model.layers.0.mlp.down_proj.weight"])
    index["weight_map"][names[0]] = "b.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"b\.safetensors: tensor {names[0]} is missing"):
        load(tmp_path)
    index["weight_map"][names[0]] = "../b.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="without folders"):
        load(tmp_path)


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(8)


def _shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.zeros(9)


def _dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.zeros(8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, f"tensor {NORM} is missing"),
        (_extra, r"model.safetensors: tensor model.layers.2.input_layernorm.weight is not part of the model"),
        (_shape, rf"model.safetensors: tensor {NORM} has shape \[9\], config.json asks for \[8\]"),
        (_dtype, rf"model.safetensors: tensor {NORM} has dtype I8"),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = make_tensors()
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, tensors))


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, make_tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated"):
        load(tmp_path)


def test_a_header_that_lies_about_an_extent_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"tensor x: 8 bytes do not hold shape \[3\] of F32"):
        load(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, True]},
        {"dtype": "F32", "shape": [1] * 17 + [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
    ],
)
def test_a_header_entry_that_is_no_tensor_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor x"):
        load(tmp_path)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    weights = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_bytes(deep)
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        load_config(tmp_path)
    weights.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(CheckpointError, match="header is not JSON"):
        find_tensors(tmp_path)
    with pytest.raises(DigestError, match="header is not valid"):
        model_digest(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_bytes(deep)
    with pytest.raises(CheckpointError, match=r"index\.json: is not an index"):
        find_tensors(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: 'GPT2LMHeadModel' is not supported"),
        ({"architectures": None}, "architectures: is missing"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"hidden_size": "8"}, "hidden_size: must be a whole number"),
        ({"hidden_size": 10}, "hidden_size: 10 is no multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be at least 1"),
        ({"head_dim": 3}, "head_dim: must be even"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: must be above 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised"),
        ({"torch_dtype": "float8"}, "dtype: 'float8' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type: 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": 4}, "rope_scaling: must be an object"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: must be true or false"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window: must be at least 1"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures: ['LlamaForCausalLM'] is not supported"),
        ({"hidden_size": float("inf")}, "hidden_size: must be a whole number"),
        ({"hidden_size": float("nan")}, "hidden_size: must be a whole number"),
        ({"vocab_size": 10**400}, "vocab_size: must be at most"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: must be at most 10000"),  # a list of so many is made
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: must be above 0 and at most"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: must be above 0 and at most"),
        ({"rope_theta": 1.0}, "rope_theta: must be above 1"),  # YaRN divides by its logarithm
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "rope_scaling.factor: must be above"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1e-308}}, "rope_scaling.beta_fast: must be above"),
    ],
)
def test_a_config_that_lies_names_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(Path("dir/config.json"), {**CONFIG, **change})
    assert str(caught.value).startswith("dir/config.json: ")
    assert message in str(caught.value)


def test_a_config_that_disagrees_with_the_tensors_names_both(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(), {**CONFIG, "intermediate_size": 13})
    with pytest.raises(
        CheckpointError, match=r"mlp\.gate_proj\.weight has shape \[12, 8\], config\.json asks for \[13, 8\]"
    ):
        load(tmp_path)


def test_out_of_memory_is_a_sentence_with_numbers() -> None:
    gib = 2**30
    assert choose_num_blocks(None, 0.5, 4 * gib, gib, 100) == 2
    # Nothing said: half of what the weights leave, but a model that takes most of the memory may have what is left to MOST.
    assert choose_num_blocks(None, None, 21 * gib, gib, 100, weights=1 * gib) == 10
    assert choose_num_blocks(None, None, 20 * gib, gib, 100, weights=17 * gib) == 1
    with pytest.raises(BackendError, match=r"0\.9 of the 20\.00 GiB available"):
        choose_num_blocks(None, None, 20 * gib, gib, 100, weights=18 * gib)
    assert choose_num_blocks(None, 1.0, 4 * gib, gib, 3) == 3
    with pytest.raises(
        BackendError, match=r"9 KV cache blocks of 1024\.00 MiB need 9\.00 GiB, 4\.00 GiB are available"
    ):
        choose_num_blocks(9, 0.5, 4 * gib, gib, 100)
    with pytest.raises(BackendError, match="less than one KV cache block"):
        choose_num_blocks(None, 0.1, 4 * gib, gib, 100)
    assert choose_num_blocks(None, 0.5, 20 * gib, gib, 100, weights=3 * gib, promised=6 * gib) == 4
    with pytest.raises(
        BackendError, match=r"20.00 GiB available, 15.00 GiB are promised to other workers, 2.00 GiB hold"
    ):
        choose_num_blocks(None, 0.5, 20 * gib, gib, 100, weights=2 * gib, promised=15 * gib)
    with pytest.raises(BackendError, match=r"4 KV cache blocks .* 5\.00 GiB are available, 2\.00 GiB hold the weights"):
        choose_num_blocks(4, 0.5, 5 * gib, gib, 100, weights=2 * gib)


def test_workers_that_share_never_promise_more_than_all_whoever_looks_first() -> None:
    """Each takes its share of what it saw: before or after the others have loaded their weights and filled their caches."""
    gib, free, weights = 2**30, 100, 16
    for seen_by_second in (free, free - weights, free - 45):
        first = choose_num_blocks(None, 0.45, free * gib, gib, 1000, weights=weights * gib)
        second = choose_num_blocks(None, 0.45, seen_by_second * gib, gib, 1000, weights=weights * gib)
        assert first + second + 2 * weights <= 0.9 * free
    with pytest.raises(BackendError, match=r"max_model_len 100 needs 7 KV cache blocks .* there are 6"):
        check_sequence_fits(6, 16, 100, gib)


def test_more_context_than_the_model_has_is_refused(tmp_path: Path) -> None:
    backend = TorchBackend(write(tmp_path, make_tensors()), TorchSettings(max_model_len=65))
    with pytest.raises(BackendError, match="max_model_len: 65 is more than the 64"):
        backend.load(quiet)


@pytest.mark.parametrize(
    "bad", [{"dtype": "int8"}, {"max_rows": 0}, {"memory_fraction": 0.0}, {"memory_fraction": 1.5}]
)
def test_settings_out_of_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=next(iter(bad))):
        TorchSettings(**bad)


def test_read_ahead_is_only_a_wish(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    thread = prefetch(tmp_path)
    thread.join(10)
    assert not thread.is_alive()
