"""The responses API for plain text: the request as messages of the contracts, and its answer, whole or in events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from octavo.v1 import common_pb2, inference_pb2

from router.http.ask import Ask, Options, Streaming, check_grace, take_keep_last
from router.http.errors import Names, Problem, invalid
from router.http.fields import Fields
from router.http.grammar import take_format, take_grammar
from router.http.jsontext import dumps, dumps_long
from router.http.messages import Room, take_effort, take_message, take_template
from router.http.sampling import take_request, take_sampling
from router.http.told import Told
from router.speech.manner import PLAIN
from router.validate import MAX_MESSAGES

_LENGTH = common_pb2.FINISH_REASON_LENGTH
_STATUS: dict[int, str] = {
    _LENGTH: "incomplete",
    common_pb2.FINISH_REASON_ABORT: "incomplete",
    common_pb2.FINISH_REASON_ERROR: "failed",
}
_ECHOED = ("instructions", "temperature", "top_p", "max_output_tokens")


def read_responses(body: dict[str, Any], options: Options) -> Ask:
    """The request. Raises HttpError for what is wrong with it."""
    fields = Fields(body)
    request = inference_pb2.GenerateRequest()
    stream = bool(fields.flag("stream"))
    stream_options = fields.object("stream_options")
    if stream_options is not None:
        stream_options.only("include_obfuscation", False)
        stream_options.finish()
    room = Room()
    _take_input(fields, request.chat, room)
    take_template(fields, request.chat, room)
    if (limit := fields.integer("max_output_tokens", 1)) is not None:
        request.sampling.max_tokens = limit
    text = fields.object("text")
    grammar = ""
    if text is not None:
        grammar = "text.format" if take_format(text, "format", request.grammar, flat=True) else ""
        text.refuse(("verbosity",))
        text.finish()
    effort = _take_reasoning(fields, request.chat)
    extra = take_grammar(fields, request.grammar) if not grammar else ""
    fields.only("n", 1)
    fields.only("background", False)
    fields.only("truncation", "disabled")
    keep_last = take_keep_last(fields)
    fields.only("include", [])
    fields.only("top_logprobs", 0)
    fields.only("max_tool_calls", 0)
    fields.refuse(
        ("previous_response_id", "conversation", "prompt", "logprobs", "prompt_logprobs", "context_management")
    )
    take_sampling(fields, request.sampling)
    take_request(fields, request)
    fields.finish()
    options.apply(request)
    check_grace(request, Streaming(stream))
    names = Names(
        (
            ("sampling.max_tokens", "max_output_tokens"),
            ("chat.template_args", "chat_template_kwargs"),
            ("chat.messages", "input"),
            ("chat", "input"),
            ("grammar", extra or "text.format"),
        )
    )
    return Ask(
        requests=[request], names=names, stream=stream, timeout=options.timeout, keep_last=keep_last, effort=effort
    )


def _take_reasoning(fields: Fields, chat: inference_pb2.Chat) -> str:
    """The member that says how much to think, "" for none."""
    reasoning = fields.object("reasoning")
    if reasoning is None:
        return ""
    effort = take_effort(reasoning, "effort", chat)
    reasoning.refuse(("summary", "generate_summary"))
    reasoning.finish()
    return effort


def _take_input(fields: Fields, chat: inference_pb2.Chat, room: Room) -> None:
    if (instructions := fields.text("instructions")) is not None:
        chat.messages.add(role="system").content.add(text=instructions)
    given = fields.take("input")
    if isinstance(given, str):
        chat.messages.add(role="user").content.add(text=given)
        return
    if not isinstance(given, list) or len(given) > MAX_MESSAGES:
        raise invalid(fields.path("input"), f"must be a string or a list of at most {MAX_MESSAGES} messages")
    for index, item in enumerate(given):
        message = Fields(item, f"{fields.path('input')}[{index}]")
        message.only("type", "message")  # a call or its output would be another
        message.only("status", "completed", "incomplete")
        message.text("id")
        take_message(message, chat, room)


class ResponseView:
    """How a response is shown: what the model answers, without what it thinks."""

    def __init__(self, ask: Ask, body: dict[str, Any]) -> None:
        self._ask = ask
        self._told: Told | None = None
        self._done_is_due = False
        self._echoed = {name: body.get(name) for name in _ECHOED}
        self._effort = (body.get("reasoning") or {}).get("effort")
        # Without tools neither changes anything; they come back as they were sent.
        self._parallel_tool_calls = bool(body.get("parallel_tool_calls"))
        self._tool_choice = body.get("tool_choice") or "none"
        self._created = int(time.time())
        self._number = 0
        self._text: list[str] = []
        self._text_bytes = 0
        self._response: dict[str, Any] = {}
        self._item: dict[str, Any] = {}
        self._end: inference_pb2.Finished | None = None

    def answer(self, answers: list[inference_pb2.CompleteResponse]) -> bytes:
        """The whole."""
        (answer,) = answers
        (output,) = answer.outputs
        self._begin(answer.request_id, answer.model)
        told = self._telling()
        text = output.text if told is None else told.message(output.text, output.token_ids)["content"] or ""
        return dumps_long(self._whole(text, output))

    def open(self, started: list[inference_pb2.Started]) -> list[bytes]:
        """The first events of a stream."""
        (one,) = started
        self._begin(one.request_id, one.model)
        item = {**self._item, "status": "in_progress"}
        return [
            self._event("response.created", response=self._response),
            self._event("response.in_progress", response=self._response),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place(), part=_part("")),
        ]

    def delta(self, prompt: int, delta: inference_pb2.Delta) -> bytes:
        """More text, as an event; nothing where there is none."""
        told = self._telling()
        if told is not None:
            return self._further(told.feed(delta.text, delta.token_ids))
        if not delta.text:
            return b""
        kept = delta.text_bytes - len(delta.text.encode())
        if kept < self._text_bytes:  # after a resume some of it comes again
            self._text = ["".join(self._text).encode()[:kept].decode()]
        self._text.append(delta.text)
        self._text_bytes = delta.text_bytes
        return self._event("response.output_text.delta", **self._place(), delta=delta.text, logprobs=[])

    def finished(self, prompt: int, finished: inference_pb2.Finished) -> bytes:
        """The end of the text, as an event."""
        self._end = finished
        told = self._telling()
        if told is not None and (last := self._further(told.finish())):
            self._done_is_due = True
            return last
        return self._done()

    def _further(self, told: dict[str, Any]) -> bytes:
        text: str = told.get("content", "")
        if not text:
            return b""
        self._text.append(text)
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def _done(self) -> bytes:
        return self._event("response.output_text.done", **self._place(), text="".join(self._text), logprobs=[])

    def close(self) -> list[bytes]:
        """The last events."""
        end = self._end
        assert end is not None
        text = "".join(self._text)
        whole = self._whole(text, end)
        return [
            *([self._done()] if self._done_is_due else []),
            self._event("response.content_part.done", **self._place(), part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def stand_at(self, told: Mapping[int, tuple[str, bool]]) -> None:
        """The client comes again, with so much of the output's text, and its end or not."""
        text, ended = told[0]
        self._told = None
        telling = self._telling()
        assert telling is not None
        self._text = [telling.feed(text, None if text else ()).get("content", "")]
        if ended:
            self._text.append(telling.finish().get("content", ""))
        else:
            self._done_is_due = False

    def fail(self, problem: Problem) -> bytes:
        """The last event where it goes wrong."""
        return self._event("error", code=problem.code, message=problem.message, param=problem.param)

    def _telling(self) -> Told | None:
        """What takes the text apart, where it has parts."""
        if self._told is None and self._ask.manner is not PLAIN:
            self._told = Told(self._ask.manner, "", 0, reasoning=False)
        return self._told

    def _begin(self, request_id: str, model: str) -> None:
        name = request_id.removeprefix("req-")
        self._item = {"id": f"msg_{name}", "type": "message", "role": "assistant", "content": []}
        self._response = {
            "id": f"resp_{name}",
            "object": "response",
            "created_at": self._created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": self._parallel_tool_calls,
            "tool_choice": self._tool_choice,
            "tools": [],
            "reasoning": {"effort": self._effort, "summary": None},
            "store": False,
            "previous_response_id": None,
            "truncation": "disabled",
            "metadata": {},
            "usage": None,
            **self._echoed,
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": 0, "content_index": 0}

    def _whole(self, text: str, ended: inference_pb2.Output | inference_pb2.Finished) -> dict[str, Any]:
        reason, used = ended.finish_reason, ended.usage
        told = self._telling()
        thought = 0 if told is None else told.reasoning_tokens(ended)
        status = _STATUS.get(reason, "completed")
        item = {
            **self._item,
            "status": "completed" if status == "completed" else "incomplete",
            "content": [_part(text)],
        }
        return {
            **self._response,
            "status": status,
            "error": {"code": "server_error", "message": "the output can't be sampled"} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == _LENGTH else None,
            "output": [item],
            "usage": {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {"cached_tokens": used.cached_tokens},
                "output_tokens": used.completion_tokens,
                **({} if thought is None else {"output_tokens_details": {"reasoning_tokens": thought}}),
                "total_tokens": used.prompt_tokens + used.completion_tokens,
            },
        }

    def _event(self, kind: str, **members: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        data = dumps({"type": kind, "sequence_number": number, **members})
        return f"event: {kind}\ndata: {data}\n\n".encode()


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
