"""JSON to the messages of the contracts: every field by its name, and what can't be taken is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from octavo.v1 import inference_pb2

from router.http.ask import Ask, Options
from router.http.body import MAX_VALUES, parse
from router.http.chat import read_chat
from router.http.completions import read_completions
from router.http.errors import RULES, HttpError, problem_of
from service.errors import FieldViolation, OctavoError, Reason

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> inference_pb2.GenerateRequest:
    (request,) = read_chat({"messages": HELLO} | fields, Options()).requests
    return request


def completions(**fields: Any) -> Ask:
    return read_completions({"prompt": "hello"} | fields, Options())


def refused(read: Any, **fields: Any) -> tuple[int, str | None]:
    with pytest.raises(HttpError) as caught:
        read(**fields)
    return caught.value.problem.status, caught.value.problem.param


def test_every_sampling_field_arrives() -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": 3,
        "min_tokens": 2,
        "stop_token_ids": [5, 6],
        "bad_words": ["bad"],
        "allowed_token_ids": [7],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "n": 2,
    }
    for request in (chat(**given), completions(**given).requests[0]):
        for name, value in given.items():
            assert getattr(request.sampling, name) == value, name
        assert set(given) | {"max_tokens"} >= {field.name for field, _ in request.sampling.ListFields()}
    assert chat(stop="x").sampling.stop == ["x"]
    assert chat(stop=["x", "y"]).sampling.stop == ["x", "y"]
    assert dict(chat(logit_bias={"5": 1, "6": -2.5}).sampling.logit_bias) == {5: 1.0, 6: -2.5}
    assert chat(top_k=-1).sampling.top_k == 0
    assert chat(seed=-1).sampling.seed == 2**64 - 1


def test_nothing_given_is_nothing_set() -> None:
    assert chat().sampling == inference_pb2.SamplingParams()
    assert chat(temperature=None, stop=None, tools=None, logprobs=None, user=None).sampling == chat().sampling
    assert completions().requests[0].sampling == inference_pb2.SamplingParams(max_tokens=16)  # OpenAI's default


def test_lengths_and_logprobs_by_their_names() -> None:
    assert chat(max_tokens=3).sampling.max_tokens == 3
    assert chat(max_completion_tokens=4).sampling.max_tokens == 4
    assert refused(chat, max_completion_tokens=4, max_tokens=3) == (400, "max_tokens")
    assert chat(logprobs=True).sampling.logprobs == 0 and chat(logprobs=True).sampling.HasField("logprobs")
    assert chat(logprobs=True, top_logprobs=3).sampling.logprobs == 3
    assert not chat(logprobs=False).sampling.HasField("logprobs")
    assert refused(chat, top_logprobs=3) == (400, "top_logprobs")
    assert refused(chat, logprobs=True, top_logprobs=21) == (400, "top_logprobs")
    assert completions(logprobs=2).requests[0].sampling.logprobs == 2
    assert completions(prompt_logprobs=2).requests[0].sampling.prompt_logprobs == 2


def test_a_conversation_in_all_its_shapes() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
    request = chat(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": parts, "name": "n"},
            # as a client's SDK sends back what it got
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call],
                "provider_specific_fields": {"refusal": None, "reasoning": None},
                "refusal": None,
                "audio": None,
                "annotations": [],
            },
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ],
        chat_template_kwargs={"enable_thinking": False, "deep": {"x": [1]}},
        add_generation_prompt=False,
        continue_final_message=True,
    )
    system, user, assistant, tool = request.chat.messages
    assert system.content[0].text == "s" and user.name == "n"
    assert [part.text for part in user.content] == ["a", "b"]
    assert len(assistant.content) == 0 and assistant.tool_calls[0].name == "f"
    assert list(assistant.tool_calls[0].arguments["x"]) == [1, None]
    assert tool.tool_call_id == "1"
    assert request.chat.template_args["enable_thinking"] is False
    assert request.chat.continue_final_message and not request.chat.add_generation_prompt


def test_prompts_in_all_their_shapes() -> None:
    assert [r.text for r in completions(prompt=["a", "b"]).requests] == ["a", "b"]
    assert list(completions(prompt=[1, 2]).requests[0].token_ids.ids) == [1, 2]
    mixed = completions(prompt=[[1, 2], "x"]).requests
    assert list(mixed[0].token_ids.ids) == [1, 2] and mixed[1].text == "x"
    for wrong, param in (
        (7, "prompt"),
        ([], "prompt"),
        ({}, "prompt"),
        (None, "prompt"),
        ([1, "x"], "prompt[1]"),
        ([-1], "prompt[0]"),
        ([[1], [2**70]], "prompt[1][0]"),
        ([["x"]], "prompt[0][0]"),
        (["x"] * 1_000, "prompt"),
        ([1.5], "prompt[0]"),
    ):
        assert refused(completions, prompt=wrong) == (400, param), wrong
    assert refused(completions, prompt=["x"] * 100, n=64) == (400, "n")
    keys = [r.idempotency_key for r in completions(prompt=["a", "b"], idempotency_key="k").requests]
    assert keys == ["k/0", "k/1"]


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True}}},
            "json_schema",
            '{"type": "integer"}',
        ),
        ({"structured_outputs": {"regex": "a*"}}, "regex", "a*"),
        ({"structured_outputs": {"json": {"type": "string"}}}, "json_schema", '{"type": "string"}'),
        ({"structured_outputs": {"grammar": "start: A"}}, "lark", "start: A"),
        ({"guided_regex": "b+"}, "regex", "b+"),
        ({"guided_json": '{"type":"null"}'}, "json_schema", '{"type":"null"}'),
        ({"guided_grammar": "start: B"}, "lark", "start: B"),
    ],
)  # fmt: skip
def test_grammars_are_handed_on(fields: dict[str, Any], kind: str | None, value: str | None) -> None:
    grammar = chat(**fields).grammar
    assert grammar.WhichOneof("kind") == kind
    assert kind is None or getattr(grammar, kind) == value


def test_choices_are_a_grammar_and_two_grammars_are_none() -> None:
    assert list(chat(guided_choice=["a", "b"]).grammar.choice.values) == ["a", "b"]
    assert list(chat(structured_outputs={"choice": ["a"]}).grammar.choice.values) == ["a"]
    assert refused(chat, guided_choice=[]) == (400, "guided_choice")
    assert refused(chat, guided_regex="a", guided_choice=["a"])[0] == 400
    assert refused(chat, structured_outputs={"regex": "a", "choice": ["a"]}) == (400, "structured_outputs")
    assert refused(chat, structured_outputs={}) == (400, "structured_outputs")
    assert refused(chat, response_format={"type": "xml"}) == (400, "response_format.type")
    assert refused(chat, response_format={"type": "text", "x": 1}) == (400, "response_format.x")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"foo": None}, "foo"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),  # 0 == False in Python
        ({"service_tier": "priority"}, "service_tier"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "reasoning_effort"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"resume": {}}, "resume"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": []}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2**32}, "top_k"),
        ({"n": 10**100}, "n"),
        ({"n": -1}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": {}}, "stop_token_ids"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias.9999999999"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"model": 5}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"bad_words": "x"}, "bad_words"),
        ({"priority": 1e30}, "priority"),
        ({"resume_grace_ms": -1}, "resume_grace_ms"),
    ],
)
def test_what_can_not_be_taken_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(chat, **fields) == (400, param)
    assert refused(completions, **fields) == (400, param)


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [
        ("return_tokens_as_token_ids", False, True),
        ("return_token_ids", False, True),
        ("use_beam_search", False, True),
        ("length_penalty", 1.0, 1.2),
        ("length_penalty", 1, 0),
        ("early_stopping", False, True),
        ("early_stopping", False, "never"),
        ("metadata", {}, {"a": "b"}),
        ("best_of", 1, 2),
    ],
)
def test_what_is_switched_off_is_taken_and_what_is_switched_on_is_not(name: str, off: Any, on: Any) -> None:
    assert chat(**{name: off}) == chat()
    assert completions(**{name: off}).requests == completions().requests
    assert refused(chat, **{name: on}) == refused(completions, **{name: on}) == (400, name)


def test_of_chats_likewise() -> None:
    assert chat(echo=False) == chat()
    assert refused(chat, echo=True) == (400, "echo")
    assert chat(n=3, best_of=3) == chat(n=3)
    assert refused(chat, n=3, best_of=4) == (400, "best_of")
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert refused(chat, stream=True, stream_options=options, resume_grace_ms=5) == (400, "resume_grace_ms")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ([5], "messages[0]"),
        ([{"role": 5}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "foo": 1}], "messages[0].foo"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "user", "content": "x"}] * 20_000, "messages"),
        ([{"role": "user", "content": ["x"] * 6_000}] * 2, "messages[1].content"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}] * 6_000}] * 2, "messages[1].tool_calls"),
    ],
)  # fmt: skip
def test_a_wrong_conversation_names_the_place(messages: Any, param: str) -> None:
    assert refused(chat, messages=messages) == (400, param)


@pytest.mark.parametrize("one", [None, 0, 0.5, "", "é", [], {}, {"a": 1}, [[True]]])
def test_what_is_converted_piece_by_piece_is_bounded_before(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is that of router/validate.py or looser, so what that takes is taken."""
    request = chat(chat_template_kwargs={"a": [one] * 1_000, "bc": one})
    size = request.chat.template_args.ByteSize()
    monkeypatch.setattr("router.http.messages.MAX_STRUCT_BYTES", size)
    assert chat(chat_template_kwargs={"a": [one] * 1_000, "bc": one}) == request
    monkeypatch.undo()
    monkeypatch.setattr("google.protobuf.json_format.ParseDict", None)
    assert refused(chat, chat_template_kwargs={"a": [one] * 300_000}) == (400, "chat_template_kwargs")
    assert refused(chat, chat_template_kwargs={str(key): one for key in range(1_025)}) == (400, "chat_template_kwargs")
    call = {"function": {"name": "f", "arguments": {"a": [one] * 150_000}}}
    monkeypatch.setattr("google.protobuf.json_format.ParseDict", lambda value, into: None)
    called = [{"role": "assistant", "tool_calls": [call, call]}]
    assert refused(chat, messages=called)[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5_000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse(body)
    assert caught.value.problem.status == 400


def test_a_body_that_unfolds_to_too_much_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(HttpError) as caught:
        parse(b"[" + b"[]," * MAX_VALUES + b"[]]")
    assert caught.value.problem.status == 413


def test_each_reason_has_a_status_and_what_went_wrong_inside_stays_inside() -> None:
    assert set(RULES) == set(Reason)
    for reason in Reason:
        problem = problem_of(OctavoError(reason, "10.0.0.7:50061: Traceback", retry_after_ms=1_500))
        assert 400 <= problem.status < 600
        if problem.status >= 500:
            assert "10.0.0.7" not in problem.message and "Traceback" not in problem.message, reason
    full = problem_of(OctavoError(Reason.QUEUE_FULL, "full", retry_after_ms=1_500))
    assert (
        full.status == 429
        and dict(full.headers)["retry-after"] == "2"
        and dict(full.headers)["retry-after-ms"] == "1500"
    )
    assert dict(problem_of(OctavoError(Reason.POISON, "x")).headers)["x-should-retry"] == "false"


def test_a_violation_is_told_by_the_name_that_the_client_used() -> None:
    for fields, path, param in (
        ({"max_completion_tokens": 5}, "sampling.max_tokens", "max_completion_tokens"),
        ({"max_tokens": 5}, "sampling.max_tokens", "max_tokens"),
        ({}, "chat.messages[0].role", "messages[0].role"),
        ({}, "sampling.logit_bias[5]", "logit_bias[5]"),
        ({"guided_regex": "a"}, "grammar", "guided_regex"),
        ({}, "priority", "priority"),
    ):
        names = read_chat({"messages": HELLO} | fields, Options()).names  # type: ignore[operator]
        error = OctavoError(Reason.INVALID_ARGUMENT, "x", violations=[FieldViolation(path, "is wrong")])
        problem = problem_of(error, names)
        assert (problem.param, problem.message) == (param, f"{param}: is wrong")
