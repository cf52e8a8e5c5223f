"""Schemas to decode under: made from a seed, and the real ones inside PyPI's check-jsonschema.

The made ones cover objects (required and optional keys, other keys), enums and constants, arrays with bounds, anyOf, $ref (also
recursive), patterns, string lengths and ranges of integers and numbers. What an output may hold is bounded by its schema, so that
random tokens come to an end: strings of 12 characters, arrays of 4 items, 3 levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from random import Random
from typing import Any

Schema = dict[str, Any]
_PATTERNS = (
    "^[A-Z]{2}-[0-9]{1,4}$",
    "^(red|green|blue)( light)?$",
    "^[a-f0-9]{8}$",
    "^v[0-9]+\\.[0-9]+$",
    "^\\d{4}-\\d{2}-\\d{2}$",
    "^$|^x{2,5}$",
)
_WORDS = ("id", "name", "kind", "größe", "a b", 'say "hi"', "x/y", "n", "tags", "left", "right", "value")


def made(seed: int) -> Schema:
    """The schema of a seed."""
    rng = Random(f"schema {seed}")
    schema = rng.choice((_object, _object, _object, _array, _any_of))(rng, 3)
    schema["$defs"] = {
        "leaf": _scalar(rng),
        "pair": _object(rng, 1),
        "chain": {
            "type": "object",
            "properties": {"value": _scalar(rng), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/chain"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        },
    }
    return schema


def real() -> dict[str, Schema]:
    """File name to schema: those that check-jsonschema 0.39.0 brings along."""
    found: dict[str, Schema] = {}
    for folder in ("vendor", "custom"):
        for path in (files("check_jsonschema") / "builtin_schemas" / folder).iterdir():
            if path.name.endswith(".json"):
                found[path.name] = json.loads(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def _any(rng: Random, depth: int) -> Schema:
    if depth <= 0 or rng.random() < 0.45:
        return _scalar(rng)
    nested: tuple[Callable[[Random, int], Schema], ...] = (_object, _object, _array, _any_of, _ref)
    return rng.choice(nested)(rng, depth)


def _object(rng: Random, depth: int) -> Schema:
    keys = rng.sample(_WORDS, rng.choice((0, 1, 2, 3, 3, 4, 4, 5)))
    schema: Schema = {"type": "object", "properties": {key: _any(rng, depth - 1) for key in keys}}
    schema["required"] = [key for key in keys if rng.random() < 0.75]
    schema["additionalProperties"] = rng.choice((False, False, False, {"type": "integer", "minimum": 0, "maximum": 9}))
    return schema


def _array(rng: Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": _any(rng, depth - 1), "maxItems": rng.randint(1, 4)}
    if rng.random() < 0.6:
        schema["minItems"] = rng.randint(1, schema["maxItems"])
    if rng.random() < 0.2:
        schema["prefixItems"] = [_scalar(rng) for _ in range(rng.randint(1, schema["maxItems"]))]
    return schema


def _any_of(rng: Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _ref(rng: Random, depth: int) -> Schema:
    return {"$ref": f"#/$defs/{rng.choice(('leaf', 'pair', 'chain'))}"}


def _scalar(rng: Random) -> Schema:
    return rng.choice((_string, _string, _integer, _number, _enum, _plain))(rng)


def _string(rng: Random) -> Schema:
    if rng.random() < 0.4:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    low = rng.choice((0, 0, 1, 5))
    return {"type": "string", "minLength": low, "maxLength": rng.randint(max(low, 1), 12)}


def _integer(rng: Random) -> Schema:
    low = rng.randint(-1_000, 1_000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.choice((0, 1, 17, 400, 10**6))}
    return {"type": "integer", rng.choice(("exclusiveMinimum", "minimum")): low} if rng.random() < 0.2 else schema


def _number(rng: Random) -> Schema:
    low = round(rng.uniform(-100, 100), rng.randint(0, 3))
    return {
        "type": "number",
        "minimum": low,
        rng.choice(("maximum", "exclusiveMaximum")): low + rng.choice((0.5, 3, 1e4)),
    }


def _enum(rng: Random) -> Schema:
    values = ["a", "bc", "mehr Licht", 'q"', 7, -1.5, None, True, [1, 2], {"k": "v"}]
    return rng.choice(({"enum": rng.sample(values, rng.randint(1, 5))}, {"const": rng.choice(values)}))


def _plain(rng: Random) -> Schema:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}
