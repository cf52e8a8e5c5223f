"""The HTTP door against a scripted scheduler, over real sockets."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2, scheduler_pb2

from router.http.fields import Fields
from router.http.server import HttpServer
from service.settings import CommonSettings, SettingsError
from tests.unit.http_door import data_of, door, text_of
from tests.unit.http_requests import CHAT, HELLO, one_token, stream
from tests.unit.router_calls import IDS, TEXT, Message, full_queue, say_text, stay_silent
from tests.unit.router_fakes import Say
from tests.unit.waiting import eventually

KEYS = "key-of-somebody-0123 team-a\nkey-of-the-admin-0123 ops admin\n"


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
            for path in ("/nope", "/"):
                answer = await at.ask("GET", path, **mine)
                assert answer.status == 404 and "/v1/models" in answer.json()["error"]["message"]
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


def test_an_address_that_is_taken_is_a_setting_that_can_not_be_used() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            second = HttpServer(at.gateway.app(), CommonSettings(), at.server.address)
            with pytest.raises(SettingsError, match=os.strerror(errno.EADDRINUSE)):
                await second.start()

    asyncio.run(main())
