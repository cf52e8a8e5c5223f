"""generation_config.json from a GGUF file: where a model stops, and how it likes to be sampled."""

from __future__ import annotations

from typing import Any

from .gguf_file import GGUFFile
from .gguf_tokenizer import Vocabulary

# Control tokens that end a turn or a document in the families we convert. GGUF names one EOS, and an instruct model
# has several (Llama 3.2: <|eot_id|>, <|eom_id|>, <|end_of_text|>); llama.cpp finds the others by these names too.
_ENDING_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")

_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def generation_config(file: GGUFFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """Token ids (eos: one, or a list whose first is the file's own EOS) and the sampling defaults that the file names."""
    settings: dict[str, Any] = {}
    if vocabulary.bos_token_id is not None:
        settings["bos_token_id"] = vocabulary.bos_token_id
    if eos := eos_token_ids(vocabulary):
        settings["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    if vocabulary.pad_token_id is not None:
        settings["pad_token_id"] = vocabulary.pad_token_id
    for key, name in _SAMPLING.items():
        if key in file.fields:
            number = file.number(key)
            settings[name] = int(number) if name == "top_k" else float(f"{number:.7g}")
    if "temperature" in settings:
        settings["do_sample"] = settings["temperature"] > 0
    return settings


def eos_token_ids(vocabulary: Vocabulary) -> list[int]:
    """All ids after which the model has nothing more to say, the principal one first."""
    found = [*vocabulary.end_token_ids]
    found += [i for i in sorted(vocabulary.special_ids) if vocabulary.tokens[i] in _ENDING_TOKENS]
    return list(dict.fromkeys(found))
