"""Decode under many schemas at once and judge what came out: whatever ends with `stop` must parse and validate."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from jsonschema.validators import validator_for
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from service.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarError
from service.guidance import compile_grammar
from tests.grammar.schemas import Schema, made, real
from worker.offline import OfflineEngine, OfflineRequest
from worker.step import SamplingParams

MAX_TOKENS = 512


@dataclass(slots=True)
class Verdict:
    """What became of the schemas. `refused` and `wrong` say why, by name."""

    refused: dict[str, str] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    texts: dict[str, str] = field(default_factory=dict)


def candidates(count: int) -> dict[str, Schema]:
    """The real schemas, then enough made ones for `count` that can be compiled."""
    return real() | {f"made {seed}": made(seed) for seed in range(count + count // 10)}


def choose(candidates: dict[str, Schema], count: int, tokenizer: LLTokenizer, verdict: Verdict) -> dict[str, Schema]:
    """The first `count` that can be compiled. Those before them that can't be are noted as refused."""
    chosen: dict[str, Schema] = {}
    for name, schema in candidates.items():
        if len(chosen) == count:
            break
        text = json.dumps(schema, separators=(",", ":"))
        try:
            if len(text) > MAX_GRAMMAR_BYTES:
                raise GrammarError(f"{len(text)} bytes are more than a grammar may have")
            compile_grammar(Grammar("json_schema", text), tokenizer)
        except GrammarError as error:
            verdict.refused[name] = str(error)
            continue
        chosen[name] = schema
    return chosen


def decode(
    engine: OfflineEngine,
    tokenizer: Tokenizer,
    schemas: Mapping[str, Schema],
    prompts: Mapping[str, list[int]],
    sampling: SamplingParams,
    verdict: Verdict,
) -> None:
    """One output for each schema, each from its own seed, into the verdict."""
    requests = [
        OfflineRequest(
            prompts[name], MAX_TOKENS, sampling, seed=seed, grammar=Grammar("json_schema", json.dumps(schema))
        )
        for seed, (name, schema) in enumerate(schemas.items())
    ]
    for (name, schema), result in zip(schemas.items(), engine.generate(requests), strict=True):
        verdict.ends[result.finish_reason] += 1
        verdict.tokens += len(result.token_ids)
        ids = [token_id for token_id in result.token_ids if token_id not in sampling.stop_token_ids]
        text = verdict.texts[name] = tokenizer.decode(ids, skip_special_tokens=False)
        if result.finish_reason == "error":
            verdict.wrong[name] = f"ended with {result.status.name}"
        elif result.finish_reason == "stop" and (problem := problem_of(text, schema)):
            verdict.wrong[name] = problem


def problem_of(text: str, schema: Schema) -> str:
    """Why a text is no instance of the schema; empty if it is one."""
    try:
        instance = json.loads(text)
    except ValueError as error:
        return f"{error}: {text[:200]}"
    error = next(validator_for(schema)(schema).iter_errors(instance), None)
    return "" if error is None else f"{error.message[:200]}: {text[:200]}"
