"""`--quantization`: who takes it, what it keeps, and that such a worker is another model to everybody else."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from service.settings import SettingsError
from worker.backend import BackendError
from worker.backends import select as selection
from worker.backends.select import identity_of, select
from worker.backends.torch_backend import TorchBackend, TorchSettings
from worker.checkpoint.config import load_config, parse_config
from worker.checkpoint.weights import LayerWeights, StoredWeights, expected_tensors
from worker.model.decoder import pack
from worker.offline import OfflineEngine, OfflineRequest
from worker.settings import WorkerSettings
from worker.step import SamplingParams

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],  # biases at Q, K and V
    "vocab_size": 97,
    "hidden_size": 80,  # two groups and a half
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


def write_model(folder: Path, **changes: Any) -> Path:
    config = {**CONFIG, **changes}
    generator = torch.Generator().manual_seed(5)
    shapes = expected_tensors(parse_config(Path("config.json"), config))
    tensors = {name: (torch.randn(shape, generator=generator) * 0.3).bfloat16() for name, shape in shapes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_engine(folder: Path, quantization: str = "int8", **settings: Any) -> OfflineEngine:
    given = {"num_blocks": 64, "poison": True, "quantization": quantization, **settings}
    return OfflineEngine(TorchBackend(folder, TorchSettings(**given)))


def worker_settings(folder: Path, **changes: Any) -> WorkerSettings:
    given = {"scheduler": ("127.0.0.1:1",), "model": str(folder), "backend": "torch", **changes}
    return WorkerSettings(**given)


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def test_tokens_do_not_depend_on_the_schedule(tmp_path: Path) -> None:
    """As without: alone, together, in chunks, after preemption; log-probabilities equal to the last bit."""
    engine = make_engine(write_model(tmp_path))
    sampling = [SamplingParams(temperature=0.0, logprobs=2), SamplingParams(temperature=0.9, top_p=0.9, logprobs=2)]
    requests = [OfflineRequest(ids(n, 3 + 29 * n), 20, sampling[n % 2], seed=n) for n in range(6)]
    whole = engine.generate(requests)
    assert [engine.generate([request])[0] for request in requests] == whole
    assert engine.generate(requests, chunk_size=7) == whole
    again = [
        OfflineRequest(r.prompt_token_ids, r.max_tokens, r.sampling, r.seed, w.token_ids[:9])
        for r, w in zip(requests, whole, strict=True)
    ]
    for resumed, expected in zip(engine.generate(again[::-1])[::-1], whole, strict=True):
        assert resumed.logprobs == expected.logprobs[9:]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_near_the_model_and_not_the_model(tmp_path: Path, tied: bool, dtype: str) -> None:
    write_model(tmp_path, tie_word_embeddings=tied)
    request = OfflineRequest(ids(1, 60), 1, SamplingParams(temperature=0.0, prompt_logprobs=0))
    plain, int8 = (
        np.array([entry.logprob for entry in make_engine(tmp_path, kind, dtype=dtype).generate([request])[0].logprobs])
        for kind in ("none", "int8")
    )
    distance = np.abs(plain - int8).mean()
    assert 0 < distance < 0.2 * np.abs(plain - plain.mean()).mean()


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_is_let_go_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    write_model(tmp_path, tie_word_embeddings=tied)
    config = load_config(tmp_path)
    weights = StoredWeights(tmp_path, config, torch.bfloat16, lambda what, done, total: None)
    alive: list[weakref.ref[torch.Tensor]] = []
    read, embed = weights.layers, weights.embed

    def layers() -> Iterator[LayerWeights]:
        for layer in read():
            alive.extend(weakref.ref(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down"))
            yield layer
            del layer
            assert all(held() is None for held in alive)

    def embedding() -> torch.Tensor:
        table = embed()
        alive.append(weakref.ref(table))
        return table

    monkeypatch.setattr(weights, "layers", layers)
    monkeypatch.setattr(weights, "embed", embedding)
    packed = pack(weights, config, int8=True)
    assert len(packed.layers) == 3
    assert len(alive) == 13
    assert packed.embed(torch.tensor([3])).shape == (1, 80)


def test_another_digest_and_other_numerics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of one never goes on at the other: they are versions of a model, and a scheduler wants the second admitted."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path)
    hellos = {}
    for kind in ("none", "int8"):
        chosen = select(worker_settings(tmp_path, quantization=kind, num_blocks=8))
        hellos[kind] = identity_of(chosen, chosen.backend.load(lambda what, done, total: None), 1, "w").hello
    assert hellos["none"].model_digest != hellos["int8"].model_digest
    assert hellos["none"].numerics_digest != hellos["int8"].numerics_digest
    assert hellos["none"].tokenizer_digest == hellos["int8"].tokenizer_digest
    assert {kind: hello.quantization for kind, hello in hellos.items()} == {"none": "", "int8": "int8"}
    assert "int8" in make_engine(tmp_path).info.numerics
    again = select(worker_settings(tmp_path, quantization="int8"))
    assert again.model_digest == hellos["int8"].model_digest


def test_other_backends_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path)
    for changes in ({"backend": "mock"}, {"model": "mock"}):
        with pytest.raises(SettingsError, match="--quantization int8: the mock backend has none"):
            select(worker_settings(tmp_path, quantization="int8", **changes))
    monkeypatch.setattr(selection, "_device_kind", lambda settings: "cuda")
    with pytest.raises(SettingsError, match="the cuda backend has none; --backend torch"):
        select(worker_settings(tmp_path, quantization="int8", backend="auto"))


def test_what_cannot_be_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="quantization: 'int4' is none of none, int8"):
        TorchSettings(quantization="int4")
    write_model(tmp_path)
    monkeypatch.setattr("worker.cpu.product_int8.has_feature", lambda name: False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackendError, match="int8 needs a processor with AVX2"):
        make_engine(tmp_path)
