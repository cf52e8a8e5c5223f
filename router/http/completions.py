"""Completions: one request of the contracts for each prompt, and the answer, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.v1 import inference_pb2

from router.http.ask import Ask, Options, Streaming, check_grace, take_keep_last
from router.http.errors import Names, Problem, invalid
from router.http.fields import Fields, token_ids
from router.http.grammar import take_grammar
from router.http.jsontext import (
    FINISH_REASONS,
    completion_logprobs,
    dumps,
    dumps_long,
    long_completion_logprobs,
    prompt_logprobs,
    quoted,
    stop_reason,
    usage,
)
from router.http.sampling import take_request, take_sampling
from router.http.tally import Tally

DONE = b"data: [DONE]\n\n"
DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 128
MAX_CHOICES = 1_024


def read_completions(body: dict[str, Any], options: Options) -> Ask:
    """The request; `settle` has to follow. Raises HttpError for what is wrong with it."""
    fields = Fields(body)
    common = inference_pb2.GenerateRequest()
    streaming = Streaming.take(fields)
    params = common.sampling
    take_sampling(fields, params)
    echo = bool(fields.flag("echo"))
    _take_max_tokens(fields, params, 0 if echo else 1)
    if (logprobs := fields.integer("logprobs")) is not None:
        params.logprobs = logprobs
        if echo:
            params.prompt_logprobs = logprobs
    prompt_only = echo and params.max_tokens == 0
    if prompt_only:
        params.max_tokens = 1
    if streaming.stream and (prompt_only or params.HasField("prompt_logprobs")):
        raise invalid(
            "echo" if echo else "prompt_logprobs",
            "can't be combined with stream where no output or prompt log-probabilities are wanted",
        )
    keep_last = take_keep_last(fields)
    fields.only("best_of", params.n if params.HasField("n") else 1)
    fields.only("add_special_tokens", True)
    fields.only("suffix", "")
    grammar = take_grammar(fields, common.grammar)
    take_request(fields, common)
    prompts = _take_prompts(fields)
    fields.finish()
    options.apply(common)
    check_grace(common, streaming)
    names = Names(
        (
            ("sampling.prompt_logprobs", "logprobs" if echo else "prompt_logprobs"),
            ("token_ids.ids", "prompt"),
            ("token_ids", "prompt"),
            ("text", "prompt"),
            ("input", "prompt"),
            ("grammar", grammar or "response_format"),
        )
    )
    ask = Ask(
        requests=[
            _request(common, prompt, index if len(prompts) > 1 else None) for index, prompt in enumerate(prompts)
        ],
        names=names,
        stream=streaming.stream,
        include_usage=streaming.include_usage,
        usage_in_chunks=streaming.usage_in_chunks,
        timeout=options.timeout,
        prompt_only=prompt_only,
        keep_last=keep_last,
        echo=echo,
    )
    if len(ask.requests) * ask.n > MAX_CHOICES:
        raise invalid("n", f"{len(ask.requests)} prompts of {ask.n} outputs are more than {MAX_CHOICES} choices")
    if len(ask.requests) > 1 and common.resume_grace_ms:
        raise invalid("resume_grace_ms", "is for one prompt only")
    return ask


def _take_max_tokens(fields: Fields, params: inference_pb2.SamplingParams, least: int) -> None:
    limit = fields.integer("max_tokens", least)
    params.max_tokens = DEFAULT_MAX_TOKENS if limit is None else limit


def _take_prompts(fields: Fields) -> list[str | list[int]]:
    """A text, token ids, or a list of either."""
    given = fields.take("prompt")
    path = fields.path("prompt")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise invalid(path, "must be a string, a list of token ids, or a list of either")
    if not isinstance(given[0], str | list):
        return [token_ids(given, path)]
    if len(given) > MAX_PROMPTS:
        raise invalid(path, f"must have at most {MAX_PROMPTS} prompts, has {len(given)}")
    prompts: list[str | list[int]] = []
    for index, one in enumerate(given):
        if isinstance(one, str):
            prompts.append(one)
        elif isinstance(one, list):
            prompts.append(token_ids(one, f"{path}[{index}]"))
        else:
            raise invalid(f"{path}[{index}]", "must be a string or a list of token ids")
    return prompts


def _request(
    common: inference_pb2.GenerateRequest, prompt: str | list[int], index: int | None
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest()
    request.CopyFrom(common)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    if request.idempotency_key and index is not None:
        request.idempotency_key += f"/{index}"
    return request


class CompletionView:
    """How a completion is shown. Choice p·n + i is output i of prompt p."""

    def __init__(self, ask: Ask) -> None:
        params = ask.requests[0].sampling
        self._logprobs = params.HasField("logprobs")
        self._prompt_logprobs = params.HasField("prompt_logprobs") and not ask.echo
        self._n = ask.n
        self._asked = ask
        self._created = int(time.time())
        self._head = b""
        self._tally = Tally() if ask.usage_in_chunks else None
        self._tail = b'],"usage":null}\n\n' if ask.include_usage else b"]}\n\n"
        self._usages: dict[tuple[int, int], inference_pb2.Usage] = {}
        self._offsets: dict[int, int] = {}  # characters shown of each choice

    @property
    def _echoes(self) -> Sequence[str]:
        """What the output of each prompt begins with."""
        return self._asked.echoes or [""] * len(self._asked.requests)

    def answer(self, answers: list[inference_pb2.CompleteResponse]) -> bytes:
        """The whole."""
        first = answers[0]
        if self._asked.prompt_only:
            for answer in answers:
                for output in answer.outputs:
                    output.usage.completion_tokens = 0
        total = usage(
            (output.usage for answer in answers for output in answer.outputs),
            (answer.outputs[0].usage for answer in answers),
        )
        # One at a time: as objects, log-probabilities are ten times their text.
        choices = b",".join(
            [
                dumps_long(self._choice(prompt, answer.outputs[0], output), levels=2)
                for prompt, answer in enumerate(answers)
                for output in answer.outputs
            ]
        )
        opening = dumps(self._opening(first.request_id, first.model, first.digest)).encode()
        return b'%s,"choices":[%s],"usage":%s}' % (opening[:-1], choices, dumps(total).encode())

    def _choice(self, prompt: int, first: inference_pb2.Output, output: inference_pb2.Output) -> dict[str, Any]:
        echo, text, entries = self._echoes[prompt], output.text, list(output.logprobs)
        if self._asked.prompt_only:
            text, entries = "", []
        if self._asked.first_tokens and first.prompt_logprobs:  # there are none where it ended before the first token
            entries = [*first.prompt_logprobs, *entries]
            first_token = self._asked.first_tokens[prompt]
            entries[0].token.bytes, entries[0].token.text = first_token, first_token.decode(errors="replace")
            logprobs = long_completion_logprobs(entries, echo + text)
        else:
            logprobs = long_completion_logprobs(entries, text, len(echo))
        choice = {
            "index": prompt * self._n + output.index,
            "text": echo + text,
            "logprobs": logprobs if self._logprobs else None,
            "finish_reason": FINISH_REASONS[output.finish_reason],
            "stop_reason": stop_reason(output),
        }
        if self._prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(first.prompt_logprobs)
        return choice

    def open(self, started: list[inference_pb2.Started]) -> list[bytes]:
        """The first events of a stream: the prompts, where they are echoed."""
        first = started[0]
        if self._tally is not None:
            self._tally.begin(started)
        opening = dumps(self._opening(first.request_id, first.model, first.digest))
        self._head = f'data: {opening[:-1]},"choices":[{{"index":'.encode()
        return [
            self._event(prompt * self._n + index, echo)
            for prompt, echo in enumerate(self._echoes)
            for index in range(self._n)
            if echo
        ]

    def delta(self, prompt: int, delta: inference_pb2.Delta) -> bytes:
        """More text, as an event; nothing where there is none."""
        if self._tally is not None:
            self._tally.add(prompt, delta)
        if not self._logprobs:
            return self._event(prompt * self._n + delta.index, delta.text) if delta.text else b""
        choice = prompt * self._n + delta.index
        offset = self._offsets.get(choice, len(self._echoes[prompt]))
        self._offsets[choice] = offset + len(delta.text)
        return self._event(choice, delta.text, dumps(completion_logprobs(delta.logprobs, delta.text, offset)))

    def finished(self, prompt: int, finished: inference_pb2.Finished) -> bytes:
        """The end of a choice, as an event."""
        self._usages[prompt, finished.index] = finished.usage
        reason = quoted(FINISH_REASONS[finished.finish_reason])
        end = f'{reason},"stop_reason":{dumps(stop_reason(finished))}'
        return self._event(prompt * self._n + finished.index, "", end=end)

    def stand_at(self, told: Mapping[int, tuple[str, bool]]) -> None:
        """Nothing here depends on it."""

    def fail(self, problem: Problem) -> bytes:
        """The last event where it goes wrong: no [DONE] follows."""
        return b"data: " + problem.body() + b"\n\n"

    def close(self) -> list[bytes]:
        """The last events."""
        if not self._asked.include_usage:
            return [DONE]
        firsts = (one for (_, index), one in self._usages.items() if index == 0)
        total = dumps(usage(self._usages.values(), firsts))
        head = self._head[: self._head.rindex(b'{"index"')]
        return [b'%s],"usage":%s}\n\n' % (head, total.encode()), DONE]

    def _event(self, choice: int, text: str, logprobs: str = "null", end: str = "null") -> bytes:
        shown = f'{choice},"text":{quoted(text)},"logprobs":{logprobs},"finish_reason":{end}}}'
        tail = self._tail if self._tally is None else b'],"usage":%s}\n\n' % self._tally.usage(*divmod(choice, self._n))
        return self._head + shown.encode() + tail

    def _opening(self, request_id: str, model: str, digest: str) -> dict[str, Any]:
        return {
            "id": "cmpl-" + request_id.removeprefix("req-"),
            "object": "text_completion",
            "created": self._created,
            "model": model,
            "system_fingerprint": "fp_" + digest[:12],
        }
