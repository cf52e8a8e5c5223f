"""The members of a JSON object, taken one by one and checked as they are taken. What nobody took is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from router.http.errors import invalid, unsupported

_MOST = 2**32 - 1  # what a field of the contracts can hold: no bound that is of use to a client


class Fields:
    """Null counts as absent, as OpenAI's clients mean it."""

    def __init__(self, value: Any, path: str = "") -> None:
        """`path`: of the object in the request, for messages. Raises a 400 for what is no object."""
        if not isinstance(value, dict):
            raise invalid(path or None, "must be an object")
        self._members: dict[str, Any] = dict(value)
        self._path = f"{path}." if path else ""

    def path(self, name: str) -> str:
        """How a member is called in messages."""
        return self._path + name

    def take(self, name: str) -> Any:
        """A member as it stands, or None."""
        return self._members.pop(name, None)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise invalid(self.path(name), "must be a string")
        return value

    def flag(self, name: str) -> bool | None:
        """A boolean."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise invalid(self.path(name), "must be a boolean")
        return value

    def number(self, name: str) -> float | None:
        """A number; whether it is in range is said by router/validate.py."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(self.path(name), "must be a number")
        try:
            return float(value)
        except OverflowError:
            return math.inf

    def integer(self, name: str, low: int = 0, high: int = _MOST) -> int | None:
        """An integer in [low, high]."""
        value = self.take(name)
        return None if value is None else integer(value, self.path(name), low, high)

    def texts(self, name: str) -> list[str] | None:
        """A list of strings."""
        value = self.take(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise invalid(self.path(name), "must be a list of strings")
        return value

    def integers(self, name: str) -> list[int] | None:
        """A list of token ids."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise invalid(self.path(name), "must be a list of integers")
        return token_ids(value, self.path(name))

    def object(self, name: str) -> Fields | None:
        """An object, to be taken apart in turn."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def refuse(self, names: Iterable[str]) -> None:
        """Known, but not done here. Without effect on null."""
        for name in names:
            if self.take(name) is not None:
                raise unsupported(self.path(name))

    def only(self, name: str, *values: Any) -> None:
        """A member that changes nothing where it has one of these values, and is refused with any other."""
        value = self.take(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in values):
            shown = " and ".join(map(json.dumps, values))
            raise unsupported(self.path(name), f"only {shown} is supported by this server")

    def finish(self) -> None:
        """Raises a 400 for the first member that nobody took."""
        for name in self._members:
            raise invalid(self.path(name[:64]), "is no field of this request", "unknown_parameter")


def token_ids(values: list[Any], path: str) -> list[int]:
    """These values as token ids. Hundreds of thousands are looked at without a step of Python for each."""
    if set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= _MOST:
        return values
    return [integer(value, f"{path}[{index}]") for index, value in enumerate(values)]


def integer(value: Any, path: str, low: int = 0, high: int = _MOST) -> int:
    """`value` as an integer in [low, high]. JSON does not tell 5 from 5.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(path, "must be an integer")
    if not low <= value <= high:
        if high < _MOST:
            raise invalid(path, f"must be in [{low}, {high}]")
        raise invalid(path, f"must be at least {low}" if value < low else "is too large")
    return value
