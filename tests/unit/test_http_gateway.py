"""The HTTP door against a scripted scheduler, over real sockets."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import threading
import tracemalloc
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from router.http.fields import Fields
from router.http.protocol import Limits
from router.http.server import HttpServer
from service.settings import CommonSettings, SettingsError
from tests.unit.http_door import Connection, Door, data_of, door, text_of
from tests.unit.test_router_fakes import Say, eventually, tokens
from tests.unit.test_router_service import IDS, TEXT, Message, full_queue, say_text, stay_silent

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
KEYS = "key-of-somebody-0123 team-a\nkey-of-the-admin-0123 ops admin\n"


async def stream(at: Door, path: str = CHAT, **fields: Any) -> Connection:
    """A stream that was asked for, its head not read yet."""
    connection = await at.connect()
    body = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    headers = {name: str(fields.pop(name)) for name in list(fields) if name.startswith("x_")}
    await connection.send("POST", path, body | {"stream": True} | fields, **headers)
    return connection


async def one_token(message: Message, say: Say) -> None:
    if message.HasField("submit"):
        await say(tokens(0, (message.submit.handle, 0, IDS[:1], 0)))


def test_a_chat_is_answered_whole() -> None:
    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            reply = await at.ask(
                "POST", CHAT, {"model": "tiny", "messages": HELLO, "seed": 3, "n": 2, "max_tokens": 30}
            )
            assert reply.status == 200 and reply.headers["content-type"] == "application/json"
            answer = reply.json()
            assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
            assert [c["message"]["content"] for c in answer["choices"]] == [TEXT, TEXT]
            assert [c["index"] for c in answer["choices"]] == [0, 1]
            assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["logprobs"] is None
            usage = answer["usage"]
            assert usage["completion_tokens"] == 2 * (len(IDS) + 1)
            assert usage["prompt_tokens"] == scheduler.submits()[0].num_prompt_tokens
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
            assert reply.headers["x-octavo-seed"] == "3" and reply.headers["x-request-id"].startswith("req-")

    asyncio.run(main())


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_has_all_text_a_usage_and_an_end(path: str) -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            connection = await stream(at, path, stream_options={"include_usage": True}, max_tokens=40)
            status, headers = await connection.head()
            assert status == 200 and headers["content-type"].startswith("text/event-stream")
            events = [event async for event in connection.events()]
            assert events[-1] == "data: [DONE]"
            assert text_of(events) == TEXT
            chunks = [data_of(event) for event in events[:-1]]
            assert len({chunk["id"] for chunk in chunks}) == 1
            assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(IDS) + 1
            assert all(chunk["usage"] is None for chunk in chunks[:-1])
            assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
            assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-2])
            assert not any(event.startswith("id:") for event in events)
            await connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_each_chunk_tells_the_usage_so_far_where_that_is_wanted(path: str, logprobs: bool) -> None:
    more: dict[str, Any] = {"logprobs": True if path == CHAT else 1} if logprobs else {}

    async def main() -> None:
        async with door(say_text) as (_, at):
            options = {"include_usage": True, "continuous_usage_stats": True}
            connection = await stream(at, path, stream_options=options, max_tokens=40, n=2, **more)
            await connection.head()
            *chunks, last = [data_of(event) async for event in connection.events() if event != "data: [DONE]"]
            prompt, total = last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]
            assert last["choices"] == [] and total == 2 * (len(IDS) + 1)
            for index in (0, 1):
                told = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
                counts = [one["completion_tokens"] for one in told]
                assert counts == sorted(counts) and counts[-1] == len(IDS) + 1
                assert path != CHAT or counts[0] == 0  # the role alone
                assert all(one["prompt_tokens"] == prompt for one in told)
                assert all(one["total_tokens"] == prompt + one["completion_tokens"] for one in told)
            connection = await stream(at, path, stream_options=options | {"include_usage": False}, max_tokens=40)
            await connection.head()
            chunks = [data_of(event) async for event in connection.events() if event != "data: [DONE]"]
            assert not any("usage" in chunk for chunk in chunks)  # as vLLM has it

    asyncio.run(main())


def test_several_prompts_are_one_stream() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            connection = await stream(at, "/v1/completions", prompt=["hello", "world"], n=2, echo=True, max_tokens=40)
            await connection.head()
            texts: dict[int, str] = {}
            async for event in connection.events():
                if event != "data: [DONE]":
                    (choice,) = data_of(event)["choices"]
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            assert texts == {0: "hello" + TEXT, 1: "hello" + TEXT, 2: "world" + TEXT, 3: "world" + TEXT}

    asyncio.run(main())


def test_one_prompt_that_is_refused_refuses_all_and_leaves_nothing() -> None:
    async def main() -> None:
        async with door(one_token) as (_, at):
            for streamed in (False, True):
                body = {"prompt": ["hello", "x" * 5_000], "stream": streamed, "max_tokens": 5}
                reply = await at.ask("POST", "/v1/completions", body)
                assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
                assert reply.error["param"] == "prompt"
            await eventually(lambda: at.router.session.num_requests == 0 and at.router.gate.num_inside == 0)

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_hangs_up_cancels_at_once(streamed: bool) -> None:
    async def main() -> None:
        async with door(one_token) as (scheduler, at):
            connections = [await stream(at, stream=streamed, n=2) for _ in range(10)]
            await eventually(lambda: len(scheduler.submits()) == 20)
            if streamed:
                for connection in connections:
                    await connection.head()
            for connection in connections:
                connection.writer.transport.abort()
            await eventually(lambda: len(scheduler.cancels()) == 20, seconds=2)
            assert {c.reason for c in scheduler.cancels()} == {scheduler_pb2.CANCEL_REASON_CLIENT}
            assert at.router.session.num_requests == 0 and at.router.gate.num_inside == 0

    asyncio.run(main())


def test_a_hang_up_is_seen_though_another_request_waits_behind() -> None:
    async def main() -> None:
        async with door(one_token) as (scheduler, at):
            connection = await at.connect()
            for _ in range(2):
                await connection.send("POST", CHAT, {"messages": HELLO})
            await eventually(lambda: len(scheduler.submits()) == 1)
            await asyncio.sleep(0.05)  # the second one has come, too
            connection.writer.transport.abort()
            await eventually(lambda: len(scheduler.cancels()) == 1, seconds=2)
            assert len(scheduler.submits()) == 1 and at.router.gate.num_inside == 0

    asyncio.run(main())


def test_garbage_behind_a_stream_does_not_get_into_it() -> None:
    async def main() -> None:
        async with door(one_token) as (_, at):
            connection = await stream(at)
            await connection.head()
            await connection.send("GET", "/health")  # waits for its turn
            connection.writer.write(b"no http\r\n\r\n")
            async with asyncio.timeout(5):
                rest = await connection.reader.read()
            assert b"HTTP/1.1 400" not in rest
            await eventually(lambda: at.router.session.num_requests == 0)

    asyncio.run(main())


def test_a_full_queue_is_told_with_the_time_to_come_again() -> None:
    async def main() -> None:
        async with door(full_queue) as (_, at):
            for streamed in (False, True):
                reply = await at.ask("POST", CHAT, {"messages": HELLO, "stream": streamed})
                assert reply.status == 429 and reply.error["type"] == "rate_limit_error"
                assert 1 <= int(reply.headers["retry-after"]) <= 10 and int(reply.headers["retry-after-ms"]) <= 10_000

    asyncio.run(main())


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    async def poisonous(message: Message, say: Say) -> None:
        await one_token(message, say)
        if message.HasField("submit"):
            failed = scheduler_pb2.Failed(
                handle=message.submit.handle, reason=common_pb2.ERROR_REASON_POISON, message="worker 10.0.0.7 died"
            )
            await say(scheduler_pb2.AttachResponse(failed=failed))

    async def main() -> None:
        async with door(poisonous) as (_, at):
            connection = await stream(at)
            await connection.head()
            events = [event async for event in connection.events()]
            error = data_of(events[-1])["error"]
            assert error["code"] == "poison" and "10.0.0.7" not in events[-1]
            assert "data: [DONE]" not in events

    asyncio.run(main())


def test_a_stream_that_waits_says_so() -> None:
    async def main() -> None:
        async with door(stay_silent, keep_alive=0.05) as (_, at):
            connection = await stream(at)
            await connection.head()
            events = connection.events()
            assert data_of(await anext(events))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            for _ in range(3):
                assert await anext(events) == ": keep-alive"
            await connection.close()
            await eventually(lambda: at.router.session.num_requests == 0)

    asyncio.run(main())


def test_keys_open_the_routes_and_deny_is_the_default() -> None:
    async def main() -> None:
        async with door(say_text, keys=KEYS) as (scheduler, at):
            for method, path in (
                ("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/version"),
                ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/nope"), ("PUT", CHAT), ("GET", CHAT),
            ):  # fmt: skip
                for headers, why in (
                    ({}, "no key was given: "),
                    ({"authorization": "Bearer wrong-key-0123456789"}, "this key is not known: "),
                    ({"authorization": "key-of-somebody-0123"}, "no key was given: "),
                ):
                    reply = await at.ask(method, path, {"messages": HELLO}, **headers)
                    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), path
                    assert reply.headers["www-authenticate"] == "Bearer"
                    assert (
                        reply.error["message"].startswith(why) and "authorization: Bearer KEY" in reply.error["message"]
                    )
            mine = {"authorization": "Bearer key-of-somebody-0123"}
            assert (await at.ask("POST", CHAT, {"messages": HELLO}, **mine)).status == 200
            assert scheduler.submits()[0].tenant == "team-a"
            assert (await at.ask("GET", "/nope", **mine)).status == 404
            assert (await at.ask("PUT", CHAT, **mine)).status == 405
            assert (await at.ask("GET", "/metrics", **mine)).status == 403
            assert (await at.ask("GET", "/metrics", authorization="Bearer key-of-the-admin-0123")).status == 200
            assert (await at.ask("GET", "/health")).status == 200
            assert (await at.ask("GET", "/ready")).status == 503
            at.gateway.ready = True
            assert (await at.ask("GET", "/ready")).status == 200

    asyncio.run(main())


def test_a_router_that_drains_takes_nothing_new() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            at.router.inference.draining = True
            reply = await at.ask("POST", CHAT, {"messages": HELLO})
            assert reply.status == 503 and reply.headers["x-should-retry"] == "true"

    asyncio.run(main())


def test_models_tokens_and_texts() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            await at.ask("POST", "/tokenize", {"prompt": "x"})  # the model's files have come
            (model,) = (await at.ask("GET", "/v1/models")).json()["data"]
            assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 512)
            assert (await at.ask("GET", "/v1/models/tiny")).json() == model
            assert (await at.ask("GET", "/v1/models/a/b%2Fc")).error["code"] == "model_not_found"
            reply = (
                await at.ask("POST", "/tokenize", {"model": "tiny", "prompt": "hello", "return_token_strs": True})
            ).json()
            assert reply["count"] == 2 and reply["token_strs"] == ["<s>", "hello"] and reply["max_model_len"] == 512
            assert (await at.ask("POST", "/detokenize", {"tokens": reply["tokens"]})).json() == {"prompt": "<s>hello"}
            chat = (await at.ask("POST", "/tokenize", {"messages": HELLO})).json()
            assert chat["count"] > 5 and chat["token_strs"] is None
            wrong = await at.ask("POST", "/tokenize", {})
            assert wrong.status == 400 and wrong.error["param"] == "prompt"
            wrong = await at.ask("POST", "/detokenize", {"tokens": [99_999]})
            assert wrong.status == 400 and wrong.error["param"] == "tokens[0]"

    asyncio.run(main())


def test_large_texts_and_tokens_are_read_and_written_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.app._LARGE", 8)
    threads: set[int] = set()

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.get_ident())
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    zeros = [0] * 2_000  # few bytes, many values
    chat = json.dumps({"messages": HELLO, "return_token_strs": True, "chat_template_kwargs": {"a": zeros}}).encode()
    ids = json.dumps({"tokens": [8] * 2_000}).encode()
    prompt = json.dumps({"prompt": "hello"}).encode() + b" " * 40_000

    async def main() -> None:
        async with door(say_text) as (_, at):
            await at.ask("POST", "/tokenize", {"prompt": "x"})  # the model's files have come
            watch(Fields, "__init__")
            watch(json.JSONEncoder, "encode")
            for path, body in (("/tokenize", chat), ("/tokenize", prompt), ("/detokenize", ids)):
                threads.clear()
                assert (await at.ask("POST", path, body)).status == 200
                assert threads and threading.get_ident() not in threads

    asyncio.run(main())


def test_each_refusal_names_its_field() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            for body, status, param in (
                ({"messages": HELLO, "model": "other"}, 404, "model"),
                ({"messages": HELLO, "top_p": 7}, 400, "top_p"),
                ({"messages": HELLO, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
                ({"messages": HELLO, "n": 65}, 400, "n"),
                ({"messages": []}, 400, "messages"),
                ({"messages": [{"role": "alien", "content": "x"}]}, 400, "messages[0].role"),
                ({"messages": [{"role": "user", "content": "hello " * 600}]}, 400, "messages"),
                ({"messages": HELLO, "guided_regex": "("}, 400, "guided_regex"),
                ({"messages": HELLO, "adapter": "lora"}, 400, "adapter"),
                ({"messages": HELLO, "resume_grace_ms": 5}, 400, "resume_grace_ms"),
                ({"messages": HELLO, "logit_bias": {"5": 101}}, 400, "logit_bias[5]"),
            ):
                reply = await at.ask("POST", CHAT, body)
                assert (reply.status, reply.error["param"]) == (status, param), body
            assert at.router.session.num_requests == 0 and at.router.gate.num_inside == 0

    asyncio.run(main())


def test_what_is_no_request_is_told_so() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            for body, status in (
                (b"", 400), (b"{", 400), (b'{"messages": "\xff"}', 400), (b'{"messages": NaN}', 400), (b"[" * 100_000, 400),
                (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400), (b"{}" + b" " * (17 << 20), 413),
                (b'{"prompt": [' + b"1," * 600_000 + b"1]}", 413), (b'{"n": ' + b"1" * 10_000 + b"}", 400),
            ):  # fmt: skip
                reply = await at.ask("POST", CHAT, body)
                assert reply.status == status, body[:40]
                assert reply.error["message"]
            assert (await at.ask("POST", CHAT, b"{}", content_type="text/plain")).status == 415
            assert (await at.ask("POST", CHAT, b"{}", content_encoding="gzip")).status == 415
            big = {"messages": [{"role": "user", "content": "x" * 200_000}]}
            assert (await at.ask("POST", CHAT, big)).status == 400  # parsed elsewhere, and too long

    asyncio.run(main())


def test_prompts_come_back_with_their_log_probabilities() -> None:
    async def scored(message: Message, say: Say) -> None:
        if not message.HasField("submit"):
            return
        from service.columns import pack

        prompt = message.submit.num_prompt_tokens
        batch = tokens(0, (message.submit.handle, 0, [IDS[0]], common_pb2.FINISH_REASON_LENGTH))
        positions = list(range(1, prompt + 1))
        count = len(positions)
        batch.tokens.logprobs.CopyFrom(
            common_pb2.LogprobColumns(
                owner=pack([0] * count, "int32"),
                position=pack(positions, "int32"),
                rank=pack([2] * count, "int32"),
                num_entries=pack([2] * count, "int32"),
                token_ids=pack([IDS[0], 300] * count, "int32"),
                logprobs=pack([-0.5, -0.25] * count, "float32"),
            )
        )
        await say(batch)

    async def main() -> None:
        async with door(scored) as (_, at):
            body = {"prompt": "hello hello", "echo": True, "logprobs": 1, "max_tokens": 1}
            (choice,) = (await at.ask("POST", "/v1/completions", body)).json()["choices"]
            found = choice["logprobs"]
            assert choice["text"] == "hello hello" + TEXT[: len(choice["text"]) - 11]
            assert (
                found["tokens"][0] == "<s>" and found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            )
            assert found["token_logprobs"][1:] == [-0.5] * (len(found["tokens"]) - 1)
            assert sorted(found["top_logprobs"][1].values()) == [-0.5, -0.25]
            answer = (await at.ask("POST", "/v1/completions", body | {"max_tokens": 0})).json()
            only = answer["choices"][0]
            assert only["text"] == "hello hello" and len(only["logprobs"]["tokens"]) == len(found["tokens"]) - 1
            assert answer["usage"]["completion_tokens"] == 0
            told = (
                await at.ask("POST", "/v1/completions", {"prompt": "hello", "prompt_logprobs": 1, "max_tokens": 1})
            ).json()
            first, second = told["choices"][0]["prompt_logprobs"]
            assert first is None and second["300"]["logprob"] == -0.25

    asyncio.run(main())


def test_an_output_that_ends_before_its_first_token_has_no_log_probabilities() -> None:
    """Nor has the prompt: they come with that token."""

    async def only_the_second(message: Message, say: Say) -> None:
        if message.HasField("submit") and message.submit.index == 0:
            await say(tokens(0, (message.submit.handle, 0, [], common_pb2.FINISH_REASON_ERROR)))
        else:
            await say_text(message, say)

    async def main() -> None:
        async with door(only_the_second) as (_, at):
            body = {"prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 40, "n": 2}
            reply = await at.ask("POST", "/v1/completions", body)
            assert reply.status == 200, reply.body
            failed, whole = reply.json()["choices"]
            assert failed["text"] == "hello" and failed["logprobs"]["tokens"] == []
            assert whole["text"] == "hello" + TEXT and whole["finish_reason"] == "stop"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("asked", "named"), [({"echo": True, "logprobs": 3}, "logprobs"), ({"prompt_logprobs": 3}, None)]
)
def test_too_many_log_probabilities_of_a_prompt_are_refused(
    asked: dict[str, Any], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.resolve.MAX_PROMPT_LOGPROBS", 7)

    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            reply = await at.ask("POST", "/v1/completions", {"prompt": "hello", **asked})
            assert reply.status == 400 and reply.error["param"] == (named or "prompt_logprobs")
            assert scheduler.submits() == []

    asyncio.run(main())


@pytest.mark.parametrize(("asked", "named"), [({"echo": True, "logprobs": 1}, "echo"), ({"prompt_logprobs": 1}, None)])
@pytest.mark.parametrize("more", [{"prompt": ["hello", [IDS[0], IDS[1]]]}, {"prompt": "hello", "n": 2}])
def test_so_are_too_many_of_all_prompts_together(
    asked: dict[str, Any], named: str | None, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of two tokens, or one that two outputs show, with two each."""

    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            body = {"max_tokens": 40, **more, **asked}
            monkeypatch.setattr("router.http.settle.MAX_PROMPT_LOGPROBS", 8)
            reply = await at.ask("POST", "/v1/completions", body)
            assert reply.status == 200 and len(reply.json()["choices"]) == 2
            submitted = len(scheduler.submits())
            monkeypatch.setattr("router.http.settle.MAX_PROMPT_LOGPROBS", 7)
            reply = await at.ask("POST", "/v1/completions", body)
            assert reply.status == 400 and reply.error["param"] == (named or "prompt_logprobs")
            assert "more than 7" in reply.error["message"] and len(scheduler.submits()) == submitted

    asyncio.run(main())


def test_a_chat_shows_them_once_and_stays_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http.settle.MAX_PROMPT_LOGPROBS", 1)

    async def main() -> None:
        async with door(say_text) as (_, at):
            body = {"messages": [{"role": "user", "content": "x"}], "n": 2, "prompt_logprobs": 1, "max_tokens": 40}
            reply = await at.ask("POST", CHAT, body)
            assert reply.status == 200 and len(reply.json()["choices"]) == 2

    asyncio.run(main())


def test_a_prompt_is_cut_to_its_last_tokens() -> None:
    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            for keep, length in ((2, 2), (-1, 512 - 16)):
                body = {"prompt": "hello world " * 300, "truncate_prompt_tokens": keep}
                assert (await at.ask("POST", "/v1/completions", body)).status == 200
                assert scheduler.submits()[-1].num_prompt_tokens == length
            turns = [{"role": "user", "content": "hello " * 600}]
            assert (
                await at.ask("POST", CHAT, {"messages": turns, "truncate_prompt_tokens": 7, "max_tokens": 9})
            ).status == 200
            assert scheduler.submits()[-1].num_prompt_tokens == 7
            wrong = await at.ask("POST", "/v1/completions", {"prompt": "x", "truncate_prompt_tokens": 0})
            assert wrong.error["param"] == "truncate_prompt_tokens"

    asyncio.run(main())


def test_headers_say_what_no_field_of_openai_says() -> None:
    async def main() -> None:
        async with door(stay_silent) as (_, at):
            headers = {"idempotency_key": "k", "x_octavo_timeout_ms": "300"}
            reply = await at.ask("POST", CHAT, {"messages": HELLO}, **headers)
            assert reply.status == 504 and reply.error["code"] == "deadline"
            first = await stream(at, idempotency_key="k")
            await first.head()
            reply = await at.ask("POST", CHAT, {"messages": HELLO}, idempotency_key="k")
            assert reply.status == 409 and reply.headers["x-should-retry"] == "false"
            await first.close()
            for name in ("x-octavo-timeout-ms", "x-octavo-resume-grace-ms", "x-stainless-retry-count"):
                reply = await at.ask("POST", CHAT, {"messages": HELLO}, **{name: "soon"})
                assert (reply.status, reply.error["param"]) == (400, name)

    asyncio.run(main())


def test_a_request_that_does_not_come_is_hung_up_on() -> None:
    limits = Limits(header_seconds=0.2, body_seconds=0.3, idle_seconds=1, header_bytes=4_000, max_connections=3)

    async def answer(at: Door, *pieces: bytes) -> bytes:
        connection = await at.connect()
        for piece in pieces:
            connection.writer.write(piece)
            await connection.writer.drain()
        async with asyncio.timeout(5):
            data = await connection.reader.read()
        await connection.close()
        return data

    async def main() -> None:
        async with door(say_text, limits=limits) as (_, at):
            assert b" 408 " in await answer(at, b"")
            assert b" 408 " in await answer(at, b"POST / HTTP/1.1\r\nx: ")
            post = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
            assert b" 408 " in await answer(at, post + b"content-length: 10\r\n\r\n{")
            assert b" 408 " in await answer(at, post + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
            assert b" 431 " in await answer(at, b"GET / HTTP/1.1\r\nx: " + b"x" * 5_000)
            assert b" 431 " in await answer(at, b"GET / HTTP/1.1\r\nx: " + b"x" * 9_000 + b"\r\n\r\n")
            assert b" 431 " in await answer(at, b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n")
            assert b" 400 " in await answer(at, b"\x16\x03\x01 no http\r\n\r\n")
            assert b" 400 " in await answer(at, b"GET http://[ HTTP/1.1\r\n\r\n")
            idle = await at.connect()
            await idle.send("GET", "/health")
            assert (await idle.reply()).status == 200
            async with asyncio.timeout(5):
                assert await idle.reader.read() == b""  # after its second
            held = [await at.connect() for _ in range(3)]
            assert b" 503 " in await answer(at, b"")
            for connection in held:
                await connection.close()

    asyncio.run(main())


def test_an_offer_of_another_protocol_is_declined_and_the_body_is_read() -> None:
    """As Java's client does: HTTP/2 on every first request, with a body."""

    async def main() -> None:
        async with door(say_text) as (_, at):
            connection = await at.connect()
            offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAABk"}
            for _ in range(2):
                await connection.send("POST", "/v1/completions", {"prompt": "hello", "max_tokens": 40}, **offer)
                assert (await connection.reply()).json()["choices"][0]["text"] == TEXT
            head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
            body = b'{"prompt": "hello", "max_tokens": 40}'
            for piece in (head, b"content-length: %d\r\n\r\n" % len(body), body[:5], body[5:]):
                connection.writer.write(piece)
                await connection.writer.drain()
                await asyncio.sleep(0.01)
            assert (await connection.reply()).json()["choices"][0]["text"] == TEXT
            await connection.close()
            assert (await at.ask("CONNECT", "x:443")).status == 405

    asyncio.run(main())


def test_bodies_that_are_read_at_once_have_a_bound() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            at.gateway._bodies._max_bytes = 100_000
            held = await at.connect()
            held.writer.write(
                b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 90000\r\n\r\n"
            )
            held.writer.write(b" " * 80_000)
            await eventually(lambda: at.gateway._bodies._held >= 80_000)
            reply = await at.ask("POST", CHAT, {"messages": HELLO, "user": "x" * 30_000})
            assert reply.status == 429
            await held.close()
            await eventually(lambda: at.gateway._bodies._held == 0)
            assert (await at.ask("POST", CHAT, {"messages": HELLO, "user": "x" * 30_000})).status == 200

    asyncio.run(main())


def test_one_connection_serves_many_requests() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            connection = await at.connect()
            for _ in range(3):
                await connection.send("POST", CHAT, {"messages": HELLO})
                assert (await connection.reply()).json()["choices"][0]["message"]["content"] == TEXT
            for _ in range(2):  # pipelined
                await connection.send("GET", "/health")
            for _ in range(2):
                assert (await connection.reply()).status == 200
            await connection.close()

    asyncio.run(main())


def test_what_the_door_forwards_is_what_grpc_would_have_got() -> None:
    """The same request by both doors gives the same submission."""

    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            await at.ask(
                "POST",
                CHAT,
                {"messages": HELLO, "seed": 5, "temperature": 0.5, "stop": ["zzz"], "logit_bias": {"7": 1}},
            )
            request = inference_pb2.GenerateRequest(
                chat=inference_pb2.Chat(messages=[{"role": "user", "content": [{"text": "hello"}]}]),  # type: ignore[list-item]
                sampling=inference_pb2.SamplingParams(seed=5, temperature=0.5, stop=["zzz"], logit_bias={7: 1}),
            )
            await at.router.stub.Complete(inference_pb2.CompleteRequest(request=request))
            first, second = scheduler.submits()
            for submit in (first, second):
                for name in ("handle", "request_id", "group_id", "waited_ms"):
                    submit.ClearField(name)
            assert first == second

    asyncio.run(main())


def test_a_response_is_answered_whole_and_in_events() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            body = {
                "model": "tiny",
                "input": "hello",
                "instructions": "be brief",
                "max_output_tokens": 40,
                "temperature": 0.5,
            }
            whole = (await at.ask("POST", "/v1/responses", body)).json()
            assert whole["status"] == "completed" and whole["output"][0]["content"][0]["text"] == TEXT
            assert whole["usage"]["output_tokens"] == len(IDS) + 1 and whole["usage"]["input_tokens_details"] == {
                "cached_tokens": 0
            }
            assert whole["temperature"] == 0.5 and whole["instructions"] == "be brief"
            assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
            sent = {"parallel_tool_calls": True, "tool_choice": "auto"}
            echoed = (await at.ask("POST", "/v1/responses", body | sent)).json()
            assert {name: echoed[name] for name in sent} == sent
            turns = [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                # as it came
                {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant",
                 "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
            ]  # fmt: skip
            connection = await at.connect()
            await connection.send("POST", "/v1/responses", {"input": turns, "stream": True, "resume_grace_ms": 9_000})
            await connection.head()
            events = [event async for event in connection.events()]
            kinds = [data_of(event)["type"] for event in events]
            assert kinds[:4] == [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added",
            ]
            assert kinds[-4:] == [
                "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
            ]  # fmt: skip
            assert [f"event: {kind}" for kind in kinds] == [event.splitlines()[1] for event in events]
            assert "".join(data_of(e)["delta"] for e in events if data_of(e)["type"].endswith("text.delta")) == TEXT
            assert data_of(events[-1])["response"]["output"][0]["content"][0]["text"] == TEXT
            assert [data_of(event)["sequence_number"] for event in events] == list(range(len(events)))
            seen = events[5].splitlines()[0].removeprefix("id: ")
            rest = (await at.ask("GET", "/v1/responses", last_event_id=seen)).body.decode().split("\n\n")[:-1]
            assert data_of(rest[-1])["response"]["output"][0]["content"][0]["text"] == TEXT
            assert "".join(data_of(e).get("delta", "") for e in events[:6] + rest) == TEXT

    asyncio.run(main())


def test_a_response_refuses_what_is_no_plain_text() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            for more, param in (
                ({"previous_response_id": "resp_1"}, "previous_response_id"),
                ({"tools": [{"type": "web_search"}]}, "tools"),
                ({"store": True}, "store"),
                ({"background": True}, "background"),
                ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
                ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
                ({"reasoning": {"depth": 1}}, "reasoning.depth"),
                ({"reasoning": "low"}, "reasoning"),
                ({"input": [{"type": "function_call_output"}]}, "input[0].type"),
                ({"input": 5}, "input"),
                ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 5}}}}, "text.format"),
                ({"max_output_tokens": 0}, "max_output_tokens"),
                ({"foo": 1}, "foo"),
            ):
                reply = await at.ask("POST", "/v1/responses", {"input": "hello"} | more)
                assert (reply.status, reply.error["param"]) == (400, param), more

    asyncio.run(main())


def test_an_address_that_is_taken_is_a_setting_that_can_not_be_used() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            second = HttpServer(at.gateway.app(), CommonSettings(), at.server.address)
            with pytest.raises(SettingsError, match=os.strerror(errno.EADDRINUSE)):
                await second.start()

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_refused_request_is_freed_at_once(streamed: bool) -> None:
    """Not when the collector of cycles comes: an exception keeps every frame that it passed, and those keep the request."""

    async def main() -> None:
        async with door(say_text) as (_, at):
            big = json.dumps({"prompt": "x" * 10_000_000, "stream": streamed}).encode()
            assert (await at.ask("POST", "/v1/completions", big)).status == 400
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                for _ in range(4):
                    assert (await at.ask("POST", "/v1/completions", big)).status == 400
                assert tracemalloc.get_traced_memory()[0] < 15_000_000
            finally:
                tracemalloc.stop()
                gc.enable()

    asyncio.run(main())
