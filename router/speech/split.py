"""A model's text taken apart, as it comes: content, reasoning, and calls of tools. No I/O.

What is told depends on the text alone, not on how it is cut into pieces. White space around marks and calls is dropped, where it is
not longer than _MOST_SPACE; what turns out to be no call is content, unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.speech.calls import ObjectScanner, heads_of, read_call
from router.speech.dialect import THINK, THOUGHT
from router.speech.manner import Manner, Thought

_PYTHON_TAG = "<|python_tag|>"  # of Llama 3, before calls
_MOST_SPACE = 64


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegan:
    """A call of this function; calls are numbered from 0."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, which are JSON."""

    number: int
    text: str


Event = Content | Reasoning | CallBegan | CallArguments


class Splitter:
    """Takes one output apart. Time and memory grow with the text and no faster."""

    def __init__(self, manner: Manner) -> None:
        self.num_calls = 0
        self.has_thought = False
        self._manner = manner
        self._events: list[Event] = []
        self._held = ""  # text that may be part of a mark, or white space before one
        self._long_space = False  # the white space that comes is the rest of a run that was too long to be held
        self._skip_space = False  # white space that comes first is dropped
        self._raw: list[str] = []  # of the call that is being read, from before its mark
        self._scanner = ObjectScanner()
        calls = manner.calls
        self._heads = heads_of(manner.functions, calls.arguments) if calls is not None and manner.exact else {}
        self._step: Callable[[str], str | None] = self._answer
        if manner.thought is Thought.OPEN:
            self._begin_thought()
        elif manner.thought is Thought.ALLOWED:
            self._step = self._before_thought
        else:
            self._begin_answer()

    def feed(self, text: str) -> list[Event]:
        """What this further text tells."""
        rest: str | None = self._held + text
        self._held = ""
        while rest:
            rest = self._step(rest)
        return self._take()

    def finish(self) -> list[Event]:
        """What is left where the output ends."""
        held, self._held = self._held, ""
        # Under a grammar a mark that has begun is one, of a call whose name is not known yet. It is no content.
        unfinished = self._manner.exact and self._step in (self._call_beginning, self._call_head)
        unfinished |= self._manner.first and self._step in (self._first, self._before_thought)
        if self._step == self._thought:
            self._tell(Reasoning, held.rstrip())
        elif unfinished:
            pass
        elif self._step in (self._call_beginning, self._call):
            self._tell(Content, "".join(self._raw) + held)
        elif self._step != self._after_call and not (self.num_calls and not held.strip()):
            self._tell(Content, held)
        return self._take()

    # Each step takes the text that is there and returns what the next step gets; None where more has to come.

    def _before_thought(self, text: str) -> str | None:
        bare = text.lstrip()
        if len(text) - len(bare) > _MOST_SPACE or not (bare.startswith(THINK) or THINK.startswith(bare)):
            self._begin_answer()
            return text
        if not bare.startswith(THINK):
            return self._hold(text)
        self._begin_thought()
        return bare[len(THINK) :]

    @property
    def thinking(self) -> bool:
        """Whether a thought has begun and not ended."""
        return self._step == self._thought

    def _begin_thought(self) -> None:
        self.has_thought = True
        self._step = self._thought
        self._skip_space = True

    def _thought(self, text: str) -> str | None:
        return self._until(THOUGHT, text, Reasoning, self._thought_over)

    def _thought_over(self, space: str) -> None:
        self._begin_answer()
        self._skip_space = True

    def _begin_answer(self) -> None:
        calls = self._manner.calls
        self._skip_space = self._long_space = False
        if calls is None:
            self._step = self._answer
        elif self._manner.first and calls.opening.strip():
            self._step = self._first
            self._skip_space = bool(self.num_calls)
        else:
            self._step = self._before_mark if calls.opening.strip() else self._bare_beginning

    def _answer(self, text: str) -> None:
        self._tell(Content, self._skipped(text))

    def _first(self, text: str) -> str | None:
        """Where a call begins or none comes any more."""
        assert self._manner.calls is not None
        mark = self._manner.calls.opening.strip()
        text = self._skipped(text)
        if text and not text.startswith(mark):
            if mark.startswith(text):
                return self._hold(text)
            self._step = self._answer
            return text
        if text:
            self._mark_found("")
        return text[len(mark) :]

    def _before_mark(self, text: str) -> str | None:
        assert self._manner.calls is not None
        return self._until(self._manner.calls.opening.strip(), text, Content, self._mark_found)

    def _mark_found(self, space: str) -> None:
        assert self._manner.calls is not None
        self._raw = [space + self._manner.calls.opening.strip()]
        self._step = self._call_beginning

    def _call_beginning(self, text: str) -> str | None:
        bare = text.lstrip()
        if len(text) - len(bare) <= _MOST_SPACE and not bare:
            return self._hold(text)
        if not bare.startswith("{") or len(text) - len(bare) > _MOST_SPACE:
            return self._no_call(text)
        self._begin_call(text[: len(text) - len(bare)])
        return bare

    def _bare_beginning(self, text: str) -> str | None:
        """Where the output begins that may be calls without a mark."""
        text = self._skipped(text)
        bare = text.lstrip()
        if self._manner.exact and bare and (bare is not text or not text.startswith("{")):
            self._step = (
                self._answer
            )  # under a grammar calls stand at the very beginning, and what begins otherwise is text
            return text
        tagged = bare.startswith(_PYTHON_TAG)
        rest = bare[len(_PYTHON_TAG) :].lstrip() if tagged else bare
        if len(text) - len(rest) > _MOST_SPACE + len(_PYTHON_TAG):
            self._step = self._answer
            return text
        if not rest or (not tagged and _PYTHON_TAG.startswith(rest)):
            return self._hold(text)
        if not rest.startswith("{"):
            self._step = self._answer
            return text
        self._begin_call(text[: len(text) - len(rest)])
        return rest

    def _begin_call(self, before: str) -> None:
        self._raw.append(before)
        self._scanner = ObjectScanner()
        self._step = self._call_head if self._manner.exact else self._call

    def _call(self, text: str) -> str | None:
        """Until the object is whole: only then it is known what it is."""
        end = self._scanner.feed(text)
        if end < 0:
            self._raw.append(text)
            return None
        pieces = [*self._raw, text[:end]]
        whole = "".join(pieces)
        call = read_call(whole[whole.index("{") :], self._manner.functions)
        if call is None:
            self._raw = pieces
            return self._no_call(text[end:])
        name, arguments = call
        self._events += [CallBegan(self.num_calls, name), CallArguments(self.num_calls, arguments)]
        self._call_over()
        return text[end:]

    def _call_head(self, text: str) -> str | None:
        """Under a grammar, as far as the arguments."""
        for name, head in self._heads.items():
            if text.startswith(head):
                self._events.append(CallBegan(self.num_calls, name))
                self._step = self._exact_call
                return text[len(head) :]
        if any(head.startswith(text) for head in self._heads.values()):
            return self._hold(text)
        self._step = self._call  # not what the grammar says: read it as without one
        return text

    def _exact_call(self, text: str) -> str | None:
        end = self._scanner.feed(text)
        self._tell_arguments(text if end < 0 else text[:end])
        if end < 0:
            return None
        self._step = self._call_end
        return text[end:]

    def _call_end(self, text: str) -> str | None:
        """The brace after the arguments."""
        bare = text.lstrip()
        if not bare:
            return None
        self._call_over()
        return bare.removeprefix("}")

    def _call_over(self) -> None:
        self.num_calls += 1
        self._raw = []
        self._step = self._after_call

    def _after_call(self, text: str) -> str | None:
        assert self._manner.calls is not None
        closing = self._manner.calls.closing.strip()
        bare = text.lstrip()
        if closing:
            near = len(text) - len(bare) <= _MOST_SPACE
            if near and bare.startswith(closing):
                self._begin_answer()
                return bare[len(closing) :]
            if near and closing.startswith(bare):
                return self._hold(text)
            self._begin_answer()
            return text
        rest = bare[1:].lstrip() if bare.startswith(";") else bare
        if len(text) - len(rest) > _MOST_SPACE or (rest and not rest.startswith("{")):
            self._step = self._answer
            return text
        if not rest:
            return self._hold(text)
        self._begin_call(text[: len(text) - len(rest)])
        return rest

    def _no_call(self, text: str) -> str:
        """What was taken for a call is content, and so may be the text after it."""
        assert self._manner.calls is not None
        self._tell(Content, "".join(self._raw))
        self._raw = []
        self._skip_space = self._long_space = False
        marked = self._manner.calls.opening.strip() and not self._manner.first
        self._step = self._before_mark if marked else self._answer
        return text

    def _until(self, mark: str, text: str, kind: type[Content | Reasoning], found: Callable[[str], None]) -> str | None:
        """Tell what stands before the mark, its last white space only once more text has come. `found` gets that white space."""
        text = self._skipped(text)
        if self._long_space:
            bare = text.lstrip()
            self._tell(kind, text[: len(text) - len(bare)])
            self._long_space = not bare
            text = bare
        at = text.find(mark)
        before = text[: len(text) - _overlap(text, mark)] if at < 0 else text[:at]
        told = before.rstrip()
        if len(before) - len(told) > _MOST_SPACE:
            told = before
            self._long_space = at < 0 and len(before) == len(text)
        self._tell(kind, told)
        if at < 0:
            return self._hold(text[len(told) :])
        found(before[len(told) :])
        return text[at + len(mark) :]

    def _skipped(self, text: str) -> str:
        if not self._skip_space:
            return text
        bare = text.lstrip()
        self._skip_space = not bare
        return bare

    def _hold(self, text: str) -> str | None:
        self._held = text
        return None

    def _tell(self, kind: type[Content | Reasoning], text: str) -> None:
        if text:
            self._events.append(kind(text))

    def _tell_arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self.num_calls, text))

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` with which `mark` begins."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
