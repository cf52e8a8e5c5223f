"""Structured output, proven: 500 schemas with noise for logits, 20 with SmolLM2. `python -m tests.grammar` prints what came out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.grammar.judge import Verdict, candidates, choose, decode, problem_of
from tests.grammar.schemas import made
from tests.grammar.tiny import (
    SAMPLING,
    grammar_runner,
    llguidance_tokenizer,
    noise_prompts,
    sampling_with_bias,
    tiny_engine,
)
from worker.backends.torch_backend import TorchBackend, TorchSettings
from worker.offline import OfflineEngine

# What llguidance does not do, by schema; each is refused with these words, and none is bent to what it does do.
REFUSED = {
    "azure-pipelines.json": "more than a grammar may have",
    "bamboo-spec.json": "min/maxProperties",
    "bitbucket-pipelines.json": "uniqueItems",
    "buildkite.json": "not",
    "circle-ci.json": "propertyNames",
    "citation-file-format.json": "uniqueItems",
    "compose-spec.json": "uniqueItems",
    "dependabot.json": "uniqueItems",
    "drone-ci.json": "not present in a registry",
    "github-actions.json": "then",
    "github-issue-forms.json": "uniqueItems",
    "github-workflows-require-timeout.json": "oneOf",
    "github-workflows.json": "not",
    "gitlab-ci.json": "then",
    "meltano.json": "propertyNames",
    "mergify.json": "Unknown format",
    "readthedocs.json": "then",
    "renovate.json": "more than a grammar may have",
    "snapcraft.json": "uniqueItems",
    "taskfile.json": "oneOf",
    "travis.json": "uniqueItems",
    "woodpecker-ci.json": "then",
}
COVERED = {
    *(
        "properties",
        "required",
        "additionalProperties",
        "enum",
        "const",
        "items",
        "minItems",
        "maxItems",
        "prefixItems",
    ),
    *("anyOf", "$ref", "$defs", "pattern", "minLength", "maxLength", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum"),
}


def test_the_generator_covers_what_it_says() -> None:
    text = json.dumps([made(seed) for seed in range(500)])
    assert {word for word in COVERED if text.count(f'"{word}":') < 50} == set()
    assert made(7) == made(7) and len({json.dumps(made(seed)) for seed in range(500)}) == 500


def test_the_judge_finds_what_is_wrong() -> None:
    schema = {"type": "object", "required": ["a"]}
    assert problem_of('{"a": 1}', schema) == ""
    assert "required" in problem_of("{}", schema) and problem_of("{", schema)


@pytest.mark.slow
def test_500_schemas_with_noise_for_logits(tmp_path: Path, smollm2_dir: Path) -> None:
    verdict = Verdict()
    schemas = choose(candidates(500), 500, llguidance_tokenizer(smollm2_dir), verdict)
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    engine = tiny_engine(tmp_path, smollm2_dir)
    decode(engine, tokenizer, schemas, noise_prompts(schemas), sampling_with_bias(tokenizer), verdict)
    engine.close()
    assert len(schemas) == 500
    real = {name: why for name, why in verdict.refused.items() if not name.startswith("made")}
    assert {name: REFUSED[name] in why for name, why in real.items()} == dict.fromkeys(REFUSED, True)
    made_up = {name: why for name, why in verdict.refused.items() if name not in real}
    assert len(made_up) <= 10 and all("a range of numbers that excludes" in why for why in made_up.values()), made_up
    assert verdict.wrong == {}
    assert verdict.ends["stop"] >= 0.95 * 500, verdict.ends
    # Not all of them are as short as can be.
    assert verdict.tokens > 20 * 500
    assert len(set(verdict.texts.values())) > 0.8 * 500


@pytest.mark.slow
def test_20_schemas_with_smollm2(smollm2_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    verdict = Verdict()
    made_up = {f"made {seed}": made(seed) for seed in range(1_000, 1_030)}
    schemas = choose(made_up, 20, llguidance_tokenizer(smollm2_dir), verdict)
    question = "<|im_start|>user\nWrite a JSON document with these keys: {}<|im_end|>\n<|im_start|>assistant\n"
    prompts = {
        name: tokenizer.encode(question.format(", ".join(schema.get("properties", ())))).ids
        for name, schema in schemas.items()
    }
    backend = TorchBackend(smollm2_dir, TorchSettings(max_model_len=640, num_blocks=20 * 40))
    engine = OfflineEngine(backend, grammars=lambda info: grammar_runner(smollm2_dir, info))
    # What loops, a small model repeats for ever; as in any request a penalty is what helps against that.
    sampling = replace(SAMPLING, temperature=0.7, top_p=0.9, frequency_penalty=0.5)
    decode(engine, tokenizer, schemas, prompts, sampling, verdict)
    engine.close()
    assert verdict.wrong == {}
    # Some of these schemas have no bound (a chain, keys of any length), and it is a small model.
    assert len(schemas) == 20 and verdict.ends["stop"] >= 15, verdict.ends
