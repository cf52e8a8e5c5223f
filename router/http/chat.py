"""Chat completions: the request as messages of the contracts, and its answer, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from octavo.v1 import inference_pb2

from router.http.ask import Ask, Options, Streaming, check_grace, take_keep_last
from router.http.errors import Names, Problem, invalid
from router.http.fields import Fields
from router.http.grammar import take_grammar
from router.http.jsontext import (
    FINISH_REASONS,
    chat_logprobs,
    dumps,
    dumps_long,
    long_chat_logprobs,
    prompt_logprobs,
    quoted,
    stop_reason,
    usage,
)
from router.http.messages import EFFORT, take_chat, take_effort
from router.http.sampling import take_request, take_sampling
from router.http.tally import Tally
from router.http.told import Told
from router.http.tools import take_tools
from router.speech.manner import PLAIN, Thought
from router.validate import MAX_LOGPROBS

DONE = b"data: [DONE]\n\n"
_OPEN = b'},"logprobs":null,"finish_reason":null}]'


def read_chat(body: dict[str, Any], options: Options) -> Ask:
    """The request. Raises HttpError for what is wrong with it."""
    fields = Fields(body)
    request = inference_pb2.GenerateRequest()
    streaming = Streaming.take(fields)
    take_tools(fields, request.chat, take_chat(fields, request.chat))
    effort = take_effort(fields, EFFORT, request.chat)
    take_sampling(fields, request.sampling)
    limit = _take_max_tokens(fields, request.sampling)
    _take_logprobs(fields, request.sampling)
    if streaming.stream and request.sampling.HasField("prompt_logprobs"):
        raise invalid("prompt_logprobs", "can't be combined with stream")
    keep_last = take_keep_last(fields)
    if keep_last is not None and request.chat.tools:
        raise invalid("truncate_prompt_tokens", "can't be combined with tools")
    include_reasoning = fields.flag("include_reasoning")
    fields.only("echo", False)
    fields.only("best_of", request.sampling.n if request.sampling.HasField("n") else 1)
    grammar = take_grammar(fields, request.grammar)
    take_request(fields, request)
    fields.finish()
    options.apply(request)
    check_grace(request, streaming)
    names = Names(
        (
            ("sampling.max_tokens", limit),
            ("sampling.logprobs", "top_logprobs"),
            ("chat.template_args", "chat_template_kwargs"),
            ("chat.", ""),
            ("chat", "messages"),
            ("input", "messages"),
            ("grammar", grammar or "response_format"),
        )
    )
    return Ask(
        requests=[request],
        names=names,
        stream=streaming.stream,
        include_usage=streaming.include_usage,
        usage_in_chunks=streaming.usage_in_chunks,
        timeout=options.timeout,
        keep_last=keep_last,
        include_reasoning=include_reasoning is not False,
        effort=effort,
    )


def _take_max_tokens(fields: Fields, params: inference_pb2.SamplingParams) -> str:
    """The newer name goes before the older one. Returns the one that was used."""
    older, newer = fields.integer("max_tokens", 1), fields.integer("max_completion_tokens", 1)
    if older is not None and newer is not None and older != newer:
        raise invalid("max_tokens", "must not differ from max_completion_tokens")
    limit = older if newer is None else newer
    if limit is not None:
        params.max_tokens = limit
    return "max_tokens" if newer is None else "max_completion_tokens"


def _take_logprobs(fields: Fields, params: inference_pb2.SamplingParams) -> None:
    wanted, count = fields.flag("logprobs"), fields.integer("top_logprobs")
    if count and not wanted:
        raise invalid("top_logprobs", "needs logprobs: true")
    if count is not None and count > MAX_LOGPROBS:
        raise invalid("top_logprobs", f"must be in [0, {MAX_LOGPROBS}]")
    if wanted:
        params.logprobs = count or 0


class ChatView:
    """How a chat completion is shown."""

    def __init__(self, ask: Ask) -> None:
        self._logprobs = ask.requests[0].sampling.HasField("logprobs")
        self._n = ask.n
        self._ask = ask
        self._named = ask.wants_named_call
        self._request_id = ""
        self._told: dict[int, Told] = {}  # by output, where its text is to be taken apart
        self._include_usage = ask.include_usage
        self._created = int(time.time())
        self._head = b""
        self._tally = Tally() if ask.usage_in_chunks else None
        self._tail = b'],"usage":null}\n\n' if ask.include_usage else b"]}\n\n"
        self._plain_tail = _OPEN[:-1] + self._tail
        self._usages: dict[int, inference_pb2.Usage] = {}
        self._thoughts: dict[int, int | None] = {}  # tokens of reasoning

    def answer(self, answers: list[inference_pb2.CompleteResponse]) -> bytes:
        """The whole."""
        (answer,) = answers
        self._request_id = answer.request_id
        outputs = answer.outputs
        choices = [
            {
                "index": output.index,
                "message": {"role": "assistant", "refusal": None} | self._message(output),
                "logprobs": long_chat_logprobs(output.logprobs) if self._logprobs else None,
                "finish_reason": self._finish_reason(output),
                "stop_reason": stop_reason(output),
            }
            for output in outputs
        ]
        whole: dict[str, Any] = {
            **self._opening(answer.request_id, answer.model, answer.digest, "chat.completion"),
            "choices": choices,
            "usage": usage(
                (output.usage for output in outputs), (outputs[0].usage,), [self._thought(one) for one in outputs]
            ),
        }
        if outputs[0].prompt_logprobs:
            whole["prompt_logprobs"] = prompt_logprobs(outputs[0].prompt_logprobs)
        return dumps_long(whole)

    def open(self, started: list[inference_pb2.Started]) -> list[bytes]:
        """The first events of a stream: the role of each choice."""
        (one,) = started
        self._request_id = one.request_id
        opening = dumps(self._opening(one.request_id, one.model, one.digest, "chat.completion.chunk"))
        self._head = f'data: {opening[:-1]},"choices":[{{"index":'.encode()
        if self._tally is not None:
            self._tally.begin(started)
        role = b',"delta":{"role":"assistant","content":""'
        return [b"%s%d%s%s" % (self._head, index, role, self._plain_end(index)) for index in range(self._n)]

    def delta(self, prompt: int, delta: inference_pb2.Delta) -> bytes:
        """More text, as an event; nothing where there is none."""
        if self._tally is not None:
            self._tally.add(prompt, delta)
        if self._ask.manner is not PLAIN:
            return self._taken_apart(delta)
        if self._logprobs:
            shown = dumps(chat_logprobs(delta.logprobs))
            text = f'{delta.index},"delta":{{"content":{quoted(delta.text)}}},"logprobs":{shown},"finish_reason":null}}'
            return self._head + text.encode() + self._end(delta.index)
        text = delta.text
        if not text:
            return b""
        end = self._plain_end(delta.index)
        return b'%s%d,"delta":{"content":%s%s' % (self._head, delta.index, quoted(text).encode(), end)

    def finished(self, prompt: int, finished: inference_pb2.Finished) -> bytes:
        """The end of a choice, as an event."""
        self._usages[finished.index] = finished.usage
        last = "{}" if self._ask.manner is PLAIN else dumps(self._telling(finished.index).finish())
        self._thoughts[finished.index] = self._thought(finished)
        text = (
            f'{finished.index},"delta":{last},"logprobs":null,"finish_reason":{quoted(self._finish_reason(finished))},'
            f'"stop_reason":{dumps(stop_reason(finished))}}}'
        )
        return self._head + text.encode() + self._end(finished.index)

    def stand_at(self, told: Mapping[int, tuple[str, bool]]) -> None:
        """The client comes again, with so much of each output's text."""
        self._told.clear()
        for index, (text, _) in told.items():
            self._telling(index).feed(text, None if text else ())

    def fail(self, problem: Problem) -> bytes:
        """The last event where it goes wrong: no [DONE] follows."""
        return b"data: " + problem.body() + b"\n\n"

    def close(self) -> list[bytes]:
        """The last events."""
        if not self._include_usage:
            return [DONE]
        total = dumps(usage(self._usages.values(), (self._usages[0],), self._thoughts.values()))
        head = self._head[: self._head.rindex(b'{"index"')]
        return [b'%s],"usage":%s}\n\n' % (head, total.encode()), DONE]

    def _end(self, index: int) -> bytes:
        """What ends an event of this choice."""
        return self._tail if self._tally is None else b'],"usage":%s}\n\n' % self._tally.usage(0, index)

    def _plain_end(self, index: int) -> bytes:
        """The same after text without log-probabilities."""
        return self._plain_tail if self._tally is None else _OPEN[:-1] + self._end(index)

    def _telling(self, index: int) -> Told:
        told = self._told.get(index)
        if told is None:
            ask = self._ask
            told = Told(ask.manner, self._request_id, index, reasoning=ask.include_reasoning)
            self._told[index] = told
        return told

    def _message(self, output: inference_pb2.Output) -> dict[str, Any]:
        if self._ask.manner is PLAIN:
            return {"content": output.text}
        return self._telling(output.index).message(output.text, output.token_ids)

    def _taken_apart(self, delta: inference_pb2.Delta) -> bytes:
        """All that the text tells in one event, so that a client has seen it or has not."""
        told = self._telling(delta.index).feed(delta.text, delta.token_ids)
        if not told and not self._logprobs:
            return b""
        shown = dumps(chat_logprobs(delta.logprobs)) if self._logprobs else "null"
        text = f'{delta.index},"delta":{dumps(told)},"logprobs":{shown},"finish_reason":null}}'
        return self._head + text.encode() + self._end(delta.index)

    def _thought(self, ended: inference_pb2.Output | inference_pb2.Finished) -> int | None:
        """Tokens of reasoning, once the output was told; None where nobody knows, or where the model marks none."""
        return None if self._ask.manner.thought is Thought.NONE else self._telling(ended.index).reasoning_tokens(ended)

    def _finish_reason(self, ended: inference_pb2.Output | inference_pb2.Finished) -> str:
        """As OpenAI has it: calls that were asked for by name are no reason."""
        reason = FINISH_REASONS[ended.finish_reason]
        told = self._told.get(ended.index)
        return "tool_calls" if told is not None and told.called and reason == "stop" and not self._named else reason

    def _opening(self, request_id: str, model: str, digest: str, kind: str) -> dict[str, Any]:
        return {
            "id": "chatcmpl-" + request_id.removeprefix("req-"),
            "object": kind,
            "created": self._created,
            "model": model,
            "system_fingerprint": "fp_" + digest[:12],
        }
