"""How many tokens of an output are its reasoning."""

from __future__ import annotations

from collections.abc import Sequence

from router.speech.manner import Manner, Thought


class ThoughtCount:
    """Counts the tokens between the marks, which have to be tokens themselves. The splitter, which reads the text, has the last word:
    where it saw a mark that came in pieces, nobody knows the count.
    """

    def __init__(self, manner: Manner) -> None:
        self._marks = manner.thought_tokens
        self._inside = manner.thought is Thought.OPEN
        self._over = False
        self._count = 0

    def feed(self, token_ids: Sequence[int]) -> None:
        """Further tokens of the output."""
        if self._marks is None or self._over:
            return
        opening, closing = self._marks
        ids = list(token_ids)
        if not self._inside:
            if opening not in ids:
                return
            del ids[: ids.index(opening) + 1]
            self._inside = True
        if closing in ids:
            del ids[ids.index(closing) :]
            self._over = True
        self._count += len(ids)

    def forget(self) -> None:
        """Text came without its tokens."""
        self._marks = None

    def total(self, *, began: bool, over: bool, ended_by_token: bool) -> int | None:
        """Tokens, None for unknown. `began`, `over`: whether the text has a thought, and its end; `ended_by_token`: whether the last
        token has no text.
        """
        if not began:
            return 0
        if self._marks is None or not self._inside or over != self._over:
            return None
        return self._count - (ended_by_token and not over)
