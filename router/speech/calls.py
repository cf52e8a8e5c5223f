"""Calls in a model's text, as JSON: where one ends, and what it says. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable
from typing import NoReturn

_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')
_SPACE = re.compile(r"[ \t\r\n]*")


class ObjectScanner:
    """Finds the end of a JSON object in text that comes in pieces. Looks at each character once, and judges nothing but nesting."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """`text` follows. The index after the object's last character, or -1 where it goes on."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return -1
            at = found.end()
            mark = found[0]
            if mark == "\\":
                self._escaped = True
            elif mark == '"':
                self._in_string = not self._in_string
            elif mark in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return -1


def read_call(text: str, functions: Container[str]) -> tuple[str, str] | None:
    """Name and arguments, as JSON text, of a whole call; None where it is no call of these functions."""
    try:
        members = _members(text)
        name = json.loads(members.get("name", "0"))
        arguments = members.get("arguments", members.get("parameters", "{}"))
        value = _DECODER.decode(arguments)
        if isinstance(value, str):  # some models write the arguments as text
            arguments, value = value, _DECODER.decode(value)
    except (ValueError, RecursionError):
        return None
    if not isinstance(name, str) or name not in functions or not isinstance(value, dict):
        return None
    return name, arguments


def heads_of(functions: Iterable[str], arguments: str) -> dict[str, str]:
    """By name, what a grammar writes before the arguments of a call (service/guidance.py); `arguments`: the member that holds them."""
    return {name: f'{{"name": {json.dumps(name)}, {json.dumps(arguments)}: ' for name in functions}


def _members(text: str) -> dict[str, str]:
    """The members of a JSON object as they are written. Raises ValueError."""
    members: dict[str, str] = {}
    at = _after_space(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError
    at = _after_space(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _after_space(text, at)
        if not isinstance(key, str) or text[at : at + 1] != ":":
            raise ValueError
        begins = _after_space(text, at + 1)
        _, at = _DECODER.raw_decode(text, begins)
        members[key] = text[begins:at]
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
            if text[at : at + 1] != '"':
                raise ValueError
        elif text[at : at + 1] != "}":
            raise ValueError
    if _after_space(text, at + 1) != len(text):
        raise ValueError
    return members


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _no_json(word: str) -> NoReturn:
    raise ValueError(word)  # NaN and infinity, which Python's decoder would take


# What a number is worth is not asked, and Python makes no integer of more than 4,300 digits.
_DECODER = json.JSONDecoder(parse_constant=_no_json, parse_int=float)
