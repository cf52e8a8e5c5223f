"""A conversation with a model: its turns, how they are continued, and how they lie in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.cli.problem import CommandProblem
from octavo.cli.terminal import Answer, stderr_console
from octavo.client import Client, GenerateOptions, OctavoError

_KIND = "octavo conversation"
_VERSION = 1

# What /set takes, with the type of its value.
SETTABLE: dict[str, type] = {
    "model": str,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
    "stop": str,
}
_LARGEST_FLOAT, _SMALLEST_FLOAT = 3.4028234e38, 1.1754944e-38  # of the 32 bits that requests hold
# The router's ranges, a test keeps them equal: the least value, the largest, and what is said of others.
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, _LARGEST_FLOAT, "must be a number of at least 0"),
    "top_p": (_SMALLEST_FLOAT, 1.0, "must be in (0, 1]"),
    "top_k": (0, 2**31 - 1, "must be at least 0 and below 2^31"),
    "min_p": (0.0, 1.0, "must be in [0, 1]"),
    "repetition_penalty": (1e-6, 1e6, "must be in [1e-6, 1e6]"),
    "presence_penalty": (-2.0, 2.0, "must be in [-2, 2]"),
    "frequency_penalty": (-2.0, 2.0, "must be in [-2, 2]"),
    "max_tokens": (1, 2**32 - 1, "must be at least 1 and below 2^32"),
    "min_tokens": (0, 2**32 - 1, "must be at least 0 and below 2^32"),
    "seed": (0, 2**64 - 1, "must be at least 0 and below 2^64"),
}


@dataclass(slots=True)
class Conversation:
    """The turns so far, and how they are continued. `asked`: the last question, answered or not."""

    client: Client
    options: GenerateOptions
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    asked: str | None = None

    def ask(self, text: str) -> None:
        """Stream the answer to one more user's turn. After an error the turn is as if never asked. Raises OctavoError."""
        self.asked = text
        head = [("system", self.system)] if self.system else []
        answer = Answer()
        console = stderr_console()
        interrupted = False
        try:
            with self.client.chat([*head, *self.turns, ("user", text)], **self.options) as stream:
                answer.write(stream)
        except KeyboardInterrupt:
            interrupted = True
        except OctavoError:
            if answer.text:
                print(flush=True)
            raise
        print(flush=True)
        console.print(("stopped; " if interrupted else "") + answer.summary(), style="dim")
        # What was said before Ctrl-C belongs to the conversation, too.
        self.turns += [("user", text), ("assistant", answer.text)]

    def retry(self) -> None:
        """Ask the last question again, in place of its answer if it has one. Raises CommandProblem, OctavoError."""
        if self.asked is None:
            raise CommandProblem("nothing was asked yet")
        taken: list[tuple[str, str]] = []
        if len(self.turns) >= 2 and self.turns[-2] == ("user", self.asked):
            taken, self.turns = self.turns[-2:], self.turns[:-2]
        try:
            self.ask(self.asked)
        except OctavoError:
            self.turns += taken  # the old answer is better than none
            raise

    def reset(self, system: str | None) -> None:
        """Forget the turns."""
        self.turns.clear()
        self.system = system
        self.asked = None

    def set(self, name: str, value: str | None) -> None:
        """Change an option from now on; None goes back to the model's own. Raises CommandProblem."""
        if name not in SETTABLE:
            raise CommandProblem(f"{name!r} is none of {', '.join(SETTABLE)}")
        options: dict[str, Any] = dict(self.options)
        options.pop(name, None)
        if value is not None:
            try:
                options[name] = SETTABLE[name](value)
            except ValueError:
                kind = "whole number" if SETTABLE[name] is int else "number"
                raise CommandProblem(f"{name}: {value!r} is no {kind}") from None
            if name in _RANGES:
                least, largest, said = _RANGES[name]
                if not least <= options[name] <= largest:  # so is NaN
                    raise CommandProblem(f"{name} {value}: {said}")
        self.options = options  # type: ignore[assignment]  # the names and types are those of SETTABLE

    def save(self, path: Path) -> None:
        """Write turns and options to a file. Overwrites only an earlier conversation. Raises CommandProblem."""
        if path.exists():
            _read(path)
        messages = [{"role": role, "content": text} for role, text in self.turns]
        document = {"kind": _KIND, "version": _VERSION, "system": self.system, "options": self.options}
        new = path.with_name(f".{path.name}.new")
        try:
            new.write_text(json.dumps(document | {"messages": messages}, ensure_ascii=False, indent=2) + "\n", "utf-8")
            new.replace(path)
        except OSError as error:
            raise CommandProblem(f"{path}: {error.strerror or error}") from None

    def load(self, path: Path) -> None:
        """Go on with the conversation of a file, with its options in place of the present ones. Raises CommandProblem."""
        document = _read(path)
        try:
            turns = [(str(turn["role"]), str(turn["content"])) for turn in document["messages"]]
            options = {str(name): str(value) for name, value in document["options"].items()}
            system = document["system"]
        except (KeyError, TypeError, AttributeError):
            raise CommandProblem(f"{path}: holds no whole conversation") from None
        if not isinstance(system, str | None) or any(role not in ("user", "assistant") for role, _ in turns):
            raise CommandProblem(f"{path}: holds no whole conversation")
        before, self.options = self.options, {}
        try:
            for name, value in options.items():
                self.set(name, value)
        except CommandProblem as error:
            self.options = before
            raise CommandProblem(f"{path}: {error}") from None
        self.turns, self.system = turns, system
        self.asked = next((text for role, text in reversed(turns) if role == "user"), None)


def _read(path: Path) -> dict[str, Any]:
    """Raises CommandProblem unless the file holds a conversation of a version that is known."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandProblem(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("kind") != _KIND:
        raise CommandProblem(f"{path}: is no conversation that /save wrote")
    if document.get("version") != _VERSION:
        raise CommandProblem(f"{path}: was written by another version of octavo")
    return document
