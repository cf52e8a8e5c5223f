"""What an output's text tells, as members of OpenAI's messages: content, reasoning, calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.v1 import inference_pb2

from router.speech.count import ThoughtCount
from router.speech.manner import Manner
from router.speech.split import CallArguments, CallBegan, Content, Event, Reasoning, Splitter


class Told:
    """One output. Calls have the same ids wherever and however often they are told."""

    def __init__(self, manner: Manner, request_id: str, index: int, *, reasoning: bool) -> None:
        """`reasoning`: whether it is wanted."""
        self._splitter = Splitter(manner)
        self._count = ThoughtCount(manner)
        self._ids = f"call_{request_id.removeprefix('req-')}-{index}-"
        self._reasoning = reasoning
        self.called = False

    def feed(self, text: str, token_ids: Sequence[int] | None) -> dict[str, Any]:
        """The members of a delta with further text; none where it tells nothing. `token_ids`: of this text; None: not known."""
        if token_ids is None:
            self._count.forget()
        else:
            self._count.feed(token_ids)
        return self._delta(self._splitter.feed(text))

    def finish(self) -> dict[str, Any]:
        """The members of the last delta."""
        return self._delta(self._splitter.finish())

    def reasoning_tokens(self, ended: inference_pb2.Output | inference_pb2.Finished) -> int | None:
        """How many tokens the thought has, once the whole output was told, which `ended` like this; None where nobody knows."""
        splitter = self._splitter
        by_token = ended.HasField("stop_match") and ended.stop_match.HasField("token_id")
        return self._count.total(began=splitter.has_thought, over=not splitter.thinking, ended_by_token=by_token)

    def message(self, text: str, token_ids: Sequence[int]) -> dict[str, Any]:
        """The members of a whole message with this text. Nothing may have been fed before."""
        self._count.feed(token_ids)
        told = self._delta(self._splitter.feed(text) + self._splitter.finish())
        message: dict[str, Any] = {"content": told.get("content", None if self.called else "")}
        if self._reasoning:
            message["reasoning_content"] = message["reasoning"] = told.get("reasoning")
        if self.called:
            message["tool_calls"] = [
                {"id": call["id"], "type": "function", "function": call["function"]} for call in told["tool_calls"]
            ]
        return message

    def _delta(self, events: list[Event]) -> dict[str, Any]:
        content, reasoning = "", ""
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            if isinstance(event, Content):
                content += event.text
            elif isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, CallBegan):
                self.called = True
                calls[event.number] = {
                    "index": event.number,
                    "id": f"{self._ids}{event.number}",
                    "type": "function",
                    "function": {"name": event.name, "arguments": ""},
                }
            elif isinstance(event, CallArguments):
                call = calls.setdefault(event.number, {"index": event.number, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        delta: dict[str, Any] = {}
        if content:
            delta["content"] = content
        if reasoning and self._reasoning:
            delta["reasoning_content"] = delta["reasoning"] = reasoning  # vLLM's older name and its newer one
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta
