"""`octavo convert` on GGUF files that lie."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

from octavo.models.errors import ModelError
from octavo.models.gguf_convert import convert_into

from tests.fuzz import values
from tests.fuzz.gguf_bytes import lie, valid, write
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.scratch import scratch


def _attack(random: Random, folder: Path) -> Verdict:
    file = valid(random)
    mutated = True
    kind = random.random()
    if kind < 0.75:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            lie(random, file)
    data = write(file)
    if kind >= 0.98:
        data, mutated = b"GGUF" + random.randbytes(random.randrange(300)), False
    elif kind >= 0.8:
        head = random.randrange(100, 1800)
        data = values.flip(random, data[:head]) + data[head:]
    path, out = folder / "model.gguf", folder / "out"
    path.write_bytes(data)
    out.mkdir(exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # numpy's: arithmetic on what should have been refused
            convert_into(path, out)
    except ModelError as error:
        assert str(path) in str(error)
        return Verdict(mutated, False)
    finally:
        written = {name.name: name.read_bytes() for name in out.iterdir()}
        for name in written:
            (out / name).unlink()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        json.loads(written[name], parse_constant=_no_number)
    return Verdict(mutated, True)


def _no_number(name: str) -> None:
    raise AssertionError(f"{name} was written into a JSON file")


def _episode(random: Random) -> Iterator[Verdict]:
    with scratch() as folder:
        for _ in range(EPISODE):
            yield _attack(random, folder)


TARGET = Target(
    "gguf",
    _episode,
    ("octavo.models.gguf_file", "octavo.models.gguf_config", "octavo.models.gguf_convert", "octavo.models.gguf_tokenizer",
     "octavo.models.gguf_generation", "octavo.models.gguf_weights", "octavo.models.tokenizer_models"),
)  # fmt: skip
