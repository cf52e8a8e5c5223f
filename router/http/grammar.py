"""What the output has to look like: OpenAI's response_format, vLLM's structured_outputs and guided_*, as the contracts' Grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from octavo.v1 import common_pb2

from router.http.errors import invalid, unsupported
from router.http.fields import Fields

_ANY_OBJECT = '{"type":"object"}'


def take_grammar(fields: Fields, grammar: common_pb2.Grammar) -> str:
    """Fills `grammar`; returns the member that asked for it, "" for none. Raises a 400 where several do."""
    asked = [name for name, take in _SOURCES.items() if take(fields, name, grammar)]
    if len(asked) > 1:
        raise invalid(asked[1], f"can't be combined with {asked[0]}")
    return asked[0] if asked else ""


def take_format(fields: Fields, name: str, grammar: common_pb2.Grammar, *, flat: bool = False) -> bool:
    """A response_format; `flat`: as the responses API has it, without an object of its own for a schema. Returns whether it asks for
    anything. Raises a 400.
    """
    given = fields.object(name)
    if given is None:
        return False
    kind = given.take("type")
    if kind == "text":
        given.finish()
        return False
    if kind == "json_object":
        grammar.json_schema = _ANY_OBJECT
    elif kind == "json_schema":
        inner = given if flat else given.object("json_schema")
        if inner is None:
            raise invalid(given.path("json_schema"), "is missing")
        for word in ("name", "description"):
            inner.text(word)
        inner.flag("strict")  # it is always
        grammar.json_schema = _schema(inner.take("schema"), inner.path("schema"))
        if inner is not given:
            inner.finish()
    else:
        raise unsupported(given.path("type"), "must be text, json_object or json_schema")
    given.finish()
    return True


def _structured_outputs(fields: Fields, name: str, grammar: common_pb2.Grammar) -> bool:
    given = fields.object(name)
    if given is None:
        return False
    asked = [
        key
        for key, take in (
            ("json", _json),
            ("regex", _regex),
            ("choice", _choice),
            ("grammar", _lark),
            ("json_object", _json_object),
        )
        if take(given, key, grammar)
    ]
    given.only("disable_fallback", False)
    given.only("disable_any_whitespace", False)
    given.only("disable_additional_properties", False)
    given.refuse(("whitespace_pattern", "structural_tag"))
    given.finish()
    if len(asked) != 1:
        raise invalid(fields.path(name), "must have exactly one of json, regex, choice, grammar and json_object")
    return True


def _json(fields: Fields, name: str, grammar: common_pb2.Grammar) -> bool:
    schema = fields.take(name)
    if schema is None:
        return False
    grammar.json_schema = _schema(schema, fields.path(name))
    return True


def _json_object(fields: Fields, name: str, grammar: common_pb2.Grammar) -> bool:
    if not fields.flag(name):
        return False
    grammar.json_schema = _ANY_OBJECT
    return True


def _regex(fields: Fields, name: str, grammar: common_pb2.Grammar) -> bool:
    regex = fields.text(name)
    if regex is None:
        return False
    grammar.regex = regex
    return True


def _lark(fields: Fields, name: str, grammar: common_pb2.Grammar) -> bool:
    lark = fields.text(name)
    if lark is None:
        return False
    grammar.lark = lark
    return True


def _choice(fields: Fields, name: str, grammar: common_pb2.Grammar) -> bool:
    values = fields.texts(name)
    if values is None:
        return False
    if not values or not all(values):
        raise invalid(fields.path(name), "must have entries, none of them empty")
    grammar.choice.values.extend(values)
    return True


def _schema(schema: Any, path: str) -> str:
    """As JSON text; vLLM takes a text as well."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict | bool):
        raise invalid(path, "must be a JSON schema")
    return json.dumps(schema, ensure_ascii=False)


_SOURCES: dict[str, Callable[[Fields, str, common_pb2.Grammar], bool]] = {
    "response_format": take_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _lark,
}
