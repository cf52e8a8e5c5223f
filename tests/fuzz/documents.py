"""Mutates JSON documents as documents, and any file as bytes."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from tests.fuzz import values

_ODD: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], {"": None}, [None], "NaN", float("nan"), float("inf"), -float("inf"), 0, -1, 1e400, 10**400,
    -(10**30), 1 << 40, 1 << 63, 0.5, 1.0, "\ud800", [0] * 300, {"type": "Sequence"},
)  # fmt: skip


def mutated_json(random: Random, document: Any, dictionary: tuple[Any, ...] = ()) -> bytes:
    """The document with a few values replaced, removed, doubled or moved; a part of the time also with wrong bytes.

    `dictionary` holds values that mean something to the reader.
    """
    if random.random() < 0.03:
        return _nested(random)
    changed = copy.deepcopy(document)
    for _ in range(random.choice((0, 1, 1, 1, 2, 4))):
        changed = _edit(random, changed, dictionary)
    # As Python writes it: NaN, Infinity and lone surrogates included.
    data = json.dumps(changed, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return values.flip(random, data) if random.random() < 0.2 else data


def _edit(random: Random, document: Any, dictionary: tuple[Any, ...]) -> Any:
    places = list(_places(document))
    if not places:
        return _odd(random, dictionary)
    holder, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[values.text(random)[:40]] = holder.pop(key)
    elif kind == 1:
        holder.insert(key, holder[key])
    elif kind == 2:
        other_holder, other_key = random.choice(places)
        holder[key] = copy.deepcopy(other_holder[other_key])
    elif kind == 3 and isinstance(holder[key], str):
        holder[key] = random.choice(
            (holder[key] * 3, holder[key][:-1], holder[key] + values.text(random), holder[key] * 500)
        )
    elif kind in (3, 4) and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = random.choice(
            (holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, holder[key] // 2, 0)
        )
    else:
        holder[key] = _odd(random, dictionary)
    return document


def _odd(random: Random, dictionary: tuple[Any, ...]) -> Any:
    if dictionary and random.random() < 0.35:
        return copy.deepcopy(random.choice(dictionary))
    kind = random.random()
    if kind < 0.6:
        return copy.deepcopy(random.choice(_ODD))
    if kind < 0.85:
        return values.integer(random, -(1 << 63), (1 << 64) - 1)
    return values.text(random)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value below the top; of a long list or object only some, so that they do not drown the rest."""
    found: list[tuple[Any, Any]] = []
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys)[:40]:
        found.append((document, key))
        found += _places(document[key])
    return found


def _nested(random: Random) -> bytes:
    depth = random.choice((50, 900, 5_000, 100_000))
    return b"[" * depth + b"]" * depth if random.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
