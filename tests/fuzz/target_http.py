"""Bodies at the HTTP door: JSON that is hardly any, and requests that are hardly any.

What is accepted must be fit for a scheduler and a worker, and every refusal one that OpenAI's clients understand.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

from router.http.ask import Ask, Options, check_text
from router.http.body import parse
from router.http.chat import ChatView, read_chat
from router.http.completions import CompletionView, read_completions
from router.http.errors import HttpError, Problem, problem_of
from router.http.models import TokenizeAsk, detokenize, read_detokenize, tokenize
from router.http.responses import ResponseView, read_responses
from router.http.settle import settle
from router.http.view import View
from router.inference import Inference
from service.errors import OctavoError
from tests.fuzz.documents import mutated_json
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.peers import VOCAB
from tests.fuzz.target_requests import World

_SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
_NAMED = {"type": "function", "function": {"name": "f"}}
_WORDS: tuple[Any, ...] = (
    "text", "json_object", "function", "user", "assistant", "tool", "required", "auto", "none", _TOOL, _NAMED,
    [1, 2, 3], [[1], "x"], {"5": 1.0}, "good",
    {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}, ["a", "b"], 20, 21, 64, 65, 32_000, VOCAB, VOCAB - 1,
)  # fmt: skip


class _World(World):
    """The parts of a router that read requests, and the HTTP door before them."""

    async def attack(self) -> Verdict:
        kind = self.random.randrange(10)
        document, path = self._document(kind)
        mutated = self.random.random() < 0.85
        data = mutated_json(self.random, document, _WORDS) if mutated else self._invented()
        try:
            await self._take(path, parse(data))
        except HttpError as error:
            self._check(error.problem)
            return Verdict(mutated, False)
        except OctavoError as error:
            self._check(problem_of(error))
            return Verdict(mutated, False)
        except UnicodeEncodeError as error:
            self._check(check_text(error).problem)
            return Verdict(mutated, False)
        return Verdict(mutated, True)

    async def _take(self, path: str, body: dict[str, Any]) -> None:
        inference: Inference = self.inference
        if path == "tokenize":
            json.loads((await tokenize(TokenizeAsk.read(body), inference))[1]())
            return
        if path == "detokenize":
            json.loads((await detokenize(read_detokenize(body), inference))[1]())
            return
        ask: Ask
        view: View
        if path == "chat":
            ask = read_chat(body, Options())
            view = ChatView(ask)
        elif path == "completions":
            ask = read_completions(body, Options())
            view = CompletionView(ask)
        else:
            ask = read_responses(body, Options())
            view = ResponseView(ask, body)
        await settle(ask, inference)
        for request in ask.requests:
            request.SerializeToString()
        started = []
        for request in ask.requests[:3]:
            try:
                prepared = await self.preparation.prepare(request, "default", None)
            except OctavoError as error:
                raise HttpError(problem_of(error, ask.names)) from None
            self.submit(prepared)
            started.append(prepared.started)
        if len(started) == len(ask.requests):
            b"".join(view.open(started)).decode()

    def _check(self, problem: Problem) -> None:
        assert 400 <= problem.status < 500, problem
        error = json.loads(problem.body())["error"]
        assert error["message"] and len(problem.body()) < 10_000
        for _, value in problem.headers:
            value.encode("latin-1")

    def _invented(self) -> bytes:
        return self.random.randbytes(self.random.randrange(40))

    def _document(self, kind: int) -> tuple[dict[str, Any], str]:
        random = self.random
        common: dict[str, Any] = {"model": "good", "max_tokens": random.randint(2, 9), "stream": random.random() < 0.3}
        if random.random() < 0.5:
            common |= {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "n": 2, "stop": ["zzz"]}
        if random.random() < 0.4:
            common |= {
                "logit_bias": {"260": 1.5},
                "stop_token_ids": [260],
                "bad_words": ["x"],
                "presence_penalty": 1,
                "user": "u",
            }
        if random.random() < 0.1:
            common |= {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}}
        if kind < 4:
            turns = [
                {"role": "system", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "n"},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, null]}'}}]},
            ]  # fmt: skip
            more = {
                "messages": turns,
                "chat_template_kwargs": {"x": [1, {"y": None}]},
                "logprobs": True,
                "top_logprobs": 2,
            }
            if random.random() < 0.1:
                more["reasoning_effort"] = random.choice(("low", "high", "none"))
            if random.random() < 0.4:
                choice = random.choice(("none", "auto", "required", _NAMED))
                common |= {"tools": [_TOOL], "tool_choice": choice, "parallel_tool_calls": random.random() < 0.5}
                common |= {"include_reasoning": random.random() < 0.5}
                turns += [{"role": "tool", "content": "4", "tool_call_id": "1"}]
                turns += [{"role": "assistant", "content": "so", "reasoning_content": "hm"}]
            return common | more, "chat"
        if kind < 7:
            prompt = random.choice(("hello", [5, 6], ["hello", [7, 8]], ["a", "b"]))
            more = {"prompt": prompt, "logprobs": 1} | ({} if common["stream"] else {"echo": True})
            return common | more | ({"truncate_prompt_tokens": 3} if random.random() < 0.2 else {}), "completions"
        if kind == 7:
            given = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
            shape = {
                "model": "good",
                "input": given,
                "instructions": "be",
                "max_output_tokens": 5,
                "text": {"format": {"type": "text"}},
            }
            return shape, "responses"
        if kind == 8:
            return {
                "model": "good",
                "prompt": "hello",
                "add_special_tokens": True,
                "return_token_strs": True,
            }, "tokenize"
        return {"model": "good", "tokens": [1, 2, 300]}, "detokenize"


def _episode(random: Random) -> Iterator[Verdict]:
    world = _World(random)
    loop = asyncio.new_event_loop()
    secrets = SimpleNamespace(randbits=random.getrandbits, token_hex=lambda count: random.randbytes(count).hex())
    try:
        with mock.patch("router.prepare.secrets", secrets):
            for _ in range(EPISODE):
                yield loop.run_until_complete(world.attack())
    finally:
        loop.close()
        world.close()


TARGET = Target(
    "http",
    _episode,
    (
        "router.http.fields",
        "router.http.sampling",
        "router.http.messages",
        "router.http.grammar",
        "router.http.body",
        "router.http.errors",
    ),
)
