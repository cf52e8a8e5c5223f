"""Turn a GGUF file of the Llama family into a Hugging Face model directory, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cache import publish
from .gguf_config import model_config, read_shape
from .gguf_file import GGUFFile
from .gguf_generation import generation_config
from .gguf_tokenizer import build_tokenizer, read_vocabulary, tokenizer_config
from .gguf_weights import check_tensors, write_weights
from .progress import Progress, ProgressCallback, ignore_progress


def convert(
    gguf_path: Path,
    out_dir: Path,
    progress: ProgressCallback = ignore_progress,
    *,
    generation: Mapping[str, float | bool] | None = None,
) -> Path:
    """Write `out_dir` (absent or empty before) with config.json, generation_config.json, the tokenizer's files and
    model.safetensors in bfloat16; returns it. It appears whole or not at all.

    Architectures llama, qwen2, qwen3; any tensor type that the gguf library can dequantise. `generation` adds sampling
    defaults. Raises GGUFError for a malformed file, ConvertError for a model that cannot be expressed, CacheError when
    the directory is taken or cannot be written.
    """
    return publish(
        out_dir.absolute(),
        lambda staging: convert_into(gguf_path, staging, progress, generation=generation),
        progress=progress,
        reuse=False,
    )


def convert_into(
    gguf_path: Path,
    directory: Path,
    progress: ProgressCallback = ignore_progress,
    *,
    generation: Mapping[str, float | bool] | None = None,
) -> None:
    """As `convert`, into an existing directory, with nothing atomic about it."""
    file = GGUFFile(gguf_path)
    shape = read_shape(file)
    wanted = check_tensors(file, shape)
    vocabulary = read_vocabulary(file, shape.vocab_size)
    generation_settings = generation_config(file, vocabulary)
    # The ids belong into config.json too: transformers takes them from there where there is no generation_config.json.
    token_ids = {key: value for key, value in generation_settings.items() if key.endswith("_token_id")}
    _write_json(directory / "config.json", model_config(file, shape) | token_ids)
    _write_json(directory / "generation_config.json", generation_settings | dict(generation or {}))
    build_tokenizer(file.path, vocabulary).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(file, vocabulary))

    converted = 0

    def one_done() -> None:
        nonlocal converted
        converted += 1
        progress(Progress("convert", converted, len(wanted), "tensors"))

    write_weights(file, wanted, shape.head_dim, directory / "model.safetensors", one_done)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
