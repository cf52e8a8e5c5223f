"""The converted default model against the golden file: weights, tokenizations, chat template, stop tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy as np
import pytest
from octavo.models.bfloat16 import from_bfloat16
from octavo.models.cache import resolve
from tokenizers import Tokenizer

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def weights(smollm2_dir: Path) -> dict[str, np.ndarray]:
    """All tensors as float32, read without the library that wrote them."""
    data = np.memmap(smollm2_dir / "model.safetensors", dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    del header["__metadata__"]
    wanted = {name: header[name] for name in GOLDEN["weights"]}
    tensors = {}
    for name, entry in wanted.items():
        first, last = entry["data_offsets"]
        assert entry["dtype"] == "BF16"
        bits = data[start + first : start + last].view(np.uint16)
        tensors[name] = from_bfloat16(bits).reshape(entry["shape"])
    return tensors


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.mark.parametrize("name", GOLDEN["weights"])
def test_weight_statistics(weights: dict[str, np.ndarray], name: str) -> None:
    expected, values = GOLDEN["weights"][name], weights[name].astype(np.float64)
    assert list(values.shape) == expected["shape"]
    assert values.flat[: len(expected["first"])].tolist() == expected["first"]
    assert values.mean() == pytest.approx(expected["mean"], rel=1e-6, abs=1e-9)
    # The golden file has the estimate with n - 1.
    assert values.std(ddof=1) == pytest.approx(expected["std"], rel=1e-6)


@pytest.mark.parametrize("case", GOLDEN["tokenization"], ids=lambda case: repr(case["text"])[:30])
def test_tokenization(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    encoding = tokenizer.encode(case["text"])
    assert encoding.ids == case["token_ids"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == case["text"]


def test_prompts_and_outputs(tokenizer: Tokenizer) -> None:
    for case in GOLDEN["cases"]:
        assert tokenizer.encode(case["prompt"]).ids == case["prompt_token_ids"]
        assert tokenizer.decode(case["output_token_ids"]) == case["output_text"]


def test_chat_template_gives_the_golden_prompt(smollm2_dir: Path) -> None:
    config = json.loads((smollm2_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    messages = [{"role": "user", "content": "Name three primary colours."}]
    assert template.render(messages=messages, add_generation_prompt=True) == GOLDEN["cases"][1]["prompt"]
    assert not config["add_bos_token"]


def test_generation_config(smollm2_dir: Path) -> None:
    generation = json.loads((smollm2_dir / "generation_config.json").read_text(encoding="utf-8"))
    # <|im_end|> first; <|endoftext|> ends a document.
    assert generation["eos_token_id"] == [GOLDEN["eos_token_id"], 0]
    assert generation["temperature"] == 0.2 and generation["do_sample"] is True


def test_config(smollm2_dir: Path) -> None:
    config = json.loads((smollm2_dir / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 100000.0
    assert config["rope_scaling"] is None


def test_resolve_finds_what_was_pulled(smollm2_dir: Path) -> None:
    assert resolve("smollm2") == smollm2_dir
