"""From a model's files to what decodes under grammars."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from service.grammar import GrammarError, eos_token_ids
from service.guidance import load_tokenizer
from worker.grammar.runner import GrammarRunner

log = logging.getLogger("octavo.grammar")


def vocabulary_of(assets: Mapping[str, bytes]) -> int:
    """What config.json says, before the model is loaded; 0 where it says nothing of use."""
    try:
        size = _json(assets, "config.json").get("vocab_size")
    except GrammarError:
        return 0
    return size if isinstance(size, int) and 0 < size < 2**31 else 0


def load_runner(assets: Mapping[str, bytes], vocab_size: int) -> GrammarRunner | None:
    """A runner for the model's tokenizer, not started; None, and a line in the log, where the model can't decode under grammars.

    Holds Python's lock for a second where the vocabulary is large: for the start, before anyone waits.
    """
    try:
        eos = tuple(token_id for token_id in model_eos(assets) if token_id < vocab_size)
        tokenizer = load_tokenizer(assets.get("tokenizer.json", b""), vocab_size, eos)
    except GrammarError as error:
        log.warning("no grammars with this model: %s", error)
        return None
    return GrammarRunner(tokenizer, vocab_size, eos)


def model_eos(assets: Mapping[str, bytes]) -> tuple[int, ...]:
    """The model's end-of-sequence tokens, as routers find them. Raises GrammarError for files that are no JSON objects."""
    config, generation, tokenizer_config = (
        _json(assets, name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    return eos_token_ids(config, generation, tokenizer_config, lambda text: _token_id(assets, text))


def _token_id(assets: Mapping[str, bytes], text: str) -> int | None:
    for token in _json(assets, "tokenizer.json").get("added_tokens") or ():
        if isinstance(token, dict) and token.get("content") == text and isinstance(token.get("id"), int):
            return int(token["id"])
    return None


def _json(assets: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(assets.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise GrammarError(f"{name}: no JSON object")
    return value
