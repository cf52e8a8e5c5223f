"""One output sequence of a request: tokens come in, deltas of text and one end go out.

Tokens are taken as the scheduler confirms them. The finish rules (stop token, stop string, length) are applied here
too, so that a resume can replay them over tokens that were delivered before. Text leaves at token boundaries only: a
delta's text is exactly the text of its tokens, so that `token_ids` and `text_bytes` at a client never part and a resume
can rely on them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.v1 import common_pb2, inference_pb2

from router.detokenize import Detokenizer
from router.stop import StopMatcher, StopStrings

RUNNING = common_pb2.FINISH_REASON_UNSPECIFIED
STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH
_NO_LOGPROBS = inference_pb2.TokenLogprobs()


class ReplayError(ValueError):
    """Delivered tokens or text that this request can't have produced; the text says which."""


@dataclass(frozen=True, slots=True)
class FinishRules:
    """When an output ends. Counts are output tokens."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    stops: StopStrings | None = None
    include_stop: bool = False
    under_grammar: bool = False
    """A stop token ends the output at any time: the worker has chosen it before min_tokens only where nothing else was allowed."""


class Output:
    """Tokens, text and end of one sequence. Owned by its request."""

    def __init__(self, index: int, rules: FinishRules, detokenizer: Detokenizer) -> None:
        self.index = index
        self.token_ids = array("i")  # int32, all confirmed ones: what a resubmission carries
        self.finish_reason: int = RUNNING
        self.stop_match: inference_pb2.StopMatch | None = None
        self.text_bytes = 0
        self._rules = rules
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(rules.stops) if rules.stops is not None else None
        self._fed = 0  # tokens given to the detokenizer
        self._released = 0  # tokens whose text may leave
        self._sent = 0  # tokens that left in deltas
        self._text: list[str] = []  # text of tokens [sent, released)
        # With stop strings: (text, tokens) of complete tokens that may still turn out to be inside one.
        self._held: deque[tuple[str, int]] = deque()
        self._held_characters = 0

    @property
    def num_buffered(self) -> int:
        """Tokens that have not left yet."""
        return len(self.token_ids) - self._sent

    def append(self, token_ids: Sequence[int]) -> int:
        """Take the next tokens; those after an end are dropped. Returns how many were taken."""
        if self.finish_reason:
            return 0
        rules = self._rules
        plain = self._matcher is None and rules.stop_token_ids.isdisjoint(token_ids)
        if plain and len(self.token_ids) + len(token_ids) < rules.max_tokens:
            self.token_ids.extend(token_ids)
            return len(token_ids)
        for taken, token_id in enumerate(token_ids, 1):
            self._append_one(token_id)
            if self.finish_reason:
                return taken
        return len(token_ids)

    def end(self, finish_reason: int) -> None:
        """The scheduler says that the sequence is over. No effect after an end."""
        if self.finish_reason:
            return
        last = self.token_ids[-1] if self.token_ids else None
        if finish_reason == STOP and last is not None and self._fed < len(self.token_ids):
            self._stop_at_token(last)
        else:
            self._finish(finish_reason)

    def replay(self, token_ids: Sequence[int], text_bytes: int) -> None:
        """Stand where a client stands that got these tokens and so much text. Before any append. Raises ReplayError."""
        text = self._replayed(token_ids, text_bytes)
        if text_bytes > len(text):
            raise ReplayError(f"{text_bytes} bytes of text where the tokens give {len(text)}")
        try:
            rest = text[text_bytes:].decode()
        except UnicodeDecodeError:
            raise ReplayError("the text ends inside a character") from None
        self._text = [rest] if rest else []
        self._sent = len(self.token_ids)
        self.text_bytes = text_bytes

    def _replayed(self, token_ids: Sequence[int], text_bytes: int) -> bytes:
        if self.append(token_ids) < len(token_ids):
            raise ReplayError("tokens after the end of the output")
        self._decode()
        text = "".join(self._text).encode()
        while self._held and len(text) < text_bytes:
            # It seems to begin a stop string again, but the tokens that came after it showed that it does not.
            self._release_oldest()
            text = "".join(self._text).encode()
        return text

    def told(self) -> str:
        """The text that was taken so far. Reads nothing that changes while nothing is taken."""
        fresh = Output(self.index, self._rules, self._detokenizer.fresh())
        return fresh._replayed(self.token_ids[: self._sent], self.text_bytes)[: self.text_bytes].decode()

    def rewound(self, token_ids: Sequence[int], num_tokens: int, text_bytes: int) -> Output:
        """This output as it was for a client that got so many tokens and so much text; the rest of `token_ids`, which this one has,
        is yet to be taken. Reads nothing that changes, so that a thread may do it. Raises ReplayError.
        """
        fresh = Output(self.index, self._rules, self._detokenizer.fresh())
        fresh.replay(token_ids[:num_tokens], text_bytes)
        fresh.append(token_ids[num_tokens:])
        return fresh

    def catch_up(self, other: Output) -> None:
        """Take what `other` has got since this one was rewound from it: tokens, and its end."""
        self.append(other.token_ids[len(self.token_ids) :])
        if other.finish_reason:
            self.end(other.finish_reason)

    def take(self, logprobs: dict[int, inference_pb2.TokenLogprobs] | None) -> inference_pb2.GenerateResponse | None:
        """All that may leave now, as one Delta. `logprobs` maps output indices to entries; those that leave are removed from it."""
        self._decode()
        begin, end = self._sent, max(self._released, self._sent)
        if begin == end and not self._text:
            return None
        text = "".join(self._text)
        self.text_bytes += len(text) if text.isascii() else len(text.encode())
        message = inference_pb2.GenerateResponse()
        delta = message.delta  # filled where it stands: to make one and copy it costs three times as much
        delta.index, delta.text, delta.text_bytes = self.index, text, self.text_bytes
        delta.token_ids.extend(self.token_ids[begin:end])
        if logprobs:
            delta.logprobs.extend(logprobs.pop(i, _NO_LOGPROBS) for i in range(begin, end))
        self._text = []
        self._sent = end
        return message

    def _decode(self) -> None:
        """Without stop strings text is made only when it leaves: all tokens since the last time in one go."""
        if self._matcher is not None or self._fed == len(self.token_ids) or self.finish_reason:
            return
        self._release(*self._detokenizer.feed(self.token_ids[self._fed :]))
        self._fed = len(self.token_ids)

    def _append_one(self, token_id: int) -> None:
        rules = self._rules
        self.token_ids.append(token_id)
        count = len(self.token_ids)
        if token_id in rules.stop_token_ids and (rules.under_grammar or count > rules.min_tokens):
            self._stop_at_token(token_id)
            return
        if self._matcher is not None:
            self._fed = count
            self._match(*self._detokenizer.feed((token_id,)))
        if not self.finish_reason and count >= rules.max_tokens:
            self._finish(LENGTH)

    def _stop_at_token(self, token_id: int) -> None:
        """The last token ended the output: it counts, but it has no text."""
        if self._fed < len(self.token_ids) - 1:
            self._release(*self._detokenizer.feed(self.token_ids[self._fed : -1]))
        self._fed = len(self.token_ids)
        self.stop_match = inference_pb2.StopMatch(token_id=token_id)
        self._finish(STOP)

    def _finish(self, finish_reason: int) -> None:
        if self._fed < len(self.token_ids):
            self._release(*self._detokenizer.feed(self.token_ids[self._fed :]))
            self._fed = len(self.token_ids)
        rest = self._detokenizer.finish()
        if self._matcher is None:
            self._release(*rest)
        else:
            self._match(*rest)
        if self.finish_reason:  # the rest held a stop string
            return
        while self._held:
            self._release_oldest()
        self.finish_reason = finish_reason
        self._released = len(self.token_ids)

    def _match(self, text: str, count: int) -> None:
        """Pass complete text by the stop strings; hold what may become one."""
        assert self._matcher is not None
        match = self._matcher.feed(text, allowed=len(self.token_ids) >= self._rules.min_tokens)
        if match is not None:
            everything = "".join([held for held, _ in self._held]) + text[: match.end]
            self._held.clear()
            # After a resume the match may begin in text that was delivered, which can't be taken back.
            kept = len(everything) if self._rules.include_stop else max(0, len(everything) - len(match.text))
            self._text.append(everything[:kept])
            self._released = len(self.token_ids)
            self.stop_match = inference_pb2.StopMatch(text=match.text)
            self.finish_reason = STOP
            return
        if count:
            self._held.append((text, count))
            self._held_characters += len(text)
        hold = self._matcher.held
        while self._held and self._held_characters - len(self._held[0][0]) >= hold:
            self._release_oldest()

    def _release_oldest(self) -> None:
        text, count = self._held.popleft()
        self._held_characters -= len(text)
        self._release(text, count)

    def _release(self, text: str, count: int) -> None:
        if text:
            self._text.append(text)
        self._released += count
