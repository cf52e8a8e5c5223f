"""The tokens of each choice while it streams, for clients that want a usage in every chunk, as vLLM gives it."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.v1 import inference_pb2


class Tally:
    """Of one stream. Each count is of one choice alone, as vLLM's is; the last chunk has the total."""

    def __init__(self) -> None:
        self._prompts: list[int] = []
        self._counts: dict[tuple[int, int], int] = {}  # output tokens by prompt and output

    def begin(self, started: Iterable[inference_pb2.Started]) -> None:
        """The prompts are known."""
        self._prompts = [one.prompt_tokens for one in started]

    def add(self, prompt: int, delta: inference_pb2.Delta) -> None:
        """More tokens, also where they have no text yet."""
        place = prompt, delta.index
        self._counts[place] = self._counts.get(place, 0) + len(delta.token_ids)

    def usage(self, prompt: int, index: int) -> bytes:
        """As JSON."""
        asked, made = self._prompts[prompt], self._counts.get((prompt, index), 0)
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (asked, made, asked + made)
