"""A resume is held to the grammar that its stream began with, and a router that accepted it once need not look again."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from octavo.v1 import common_pb2, inference_pb2

from router.grammar import GrammarChecker
from router.ticket import Ticket, TicketOffice, grammar_hash
from service.errors import Reason
from tests.unit.http_door import data_of, door
from tests.unit.http_requests import CHAT
from tests.unit.router_calls import ask, collect, refuse, say_text
from tests.unit.router_fakes import RouterUnderTest, asset_files, cluster
from tests.unit.tool_calls import BODY, CALL, saying
from tests.unit.tool_templates import QWEN_2, QWEN_3
from tests.unit.waiting import eventually


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[common_pb2.Grammar]:
    """The grammars that any router has been asked to compile, as it asked."""
    grammars: list[common_pb2.Grammar] = []
    check = GrammarChecker.check

    async def counted(checker: GrammarChecker, grammar: common_pb2.Grammar, *more: Any) -> None:
        grammars.append(grammar)
        await check(checker, grammar, *more)

    monkeypatch.setattr(GrammarChecker, "check", counted)
    return grammars


def with_tools() -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest()
    message = request.chat.messages.add(role="user")
    message.content.add(text="hello")
    request.chat.tools.add().update({"type": "function", "function": {"name": "weather"}})
    request.chat.tool_choice.mode = inference_pb2.ToolChoice.MODE_REQUIRED
    request.sampling.seed = 3
    return request


def under_regex() -> inference_pb2.GenerateRequest:
    request = ask(seed=3)
    request.grammar.regex = "(?s:.*)"
    return request


def test_tickets_bind_the_grammar() -> None:
    regex, lark = common_pb2.Grammar(regex="a"), common_pb2.Grammar(lark="a")
    after = common_pb2.Grammar(regex="a", after=common_pb2.Reasoning(closing="</think>"))
    hashes = [grammar_hash(grammar) for grammar in (None, regex, lark, after)]
    assert len(set(hashes)) == 4 and {len(found) for found in hashes} == {32}
    office = TicketOffice(b"secret")
    for found in hashes:
        ticket = Ticket("r", "acme", 1, 2, b"d" * 32, b"p" * 32, found)
        assert office.check(office.issue(ticket), "acme") == ticket


def test_a_resume_with_another_grammar_is_refused() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            request = ask(seed=3)
            request.grammar.regex = "h.*"
            first = await collect(router.stub.Generate(request))
            request.resume.CopyFrom(inference_pb2.Resume(ticket=first[0].started.ticket, seed=3))
            seen = len(scheduler.submits())
            again = await collect(router.stub.Generate(request))
            assert again[0].started.request_id == first[0].started.request_id
            assert len(scheduler.submits()) == seen + 1
            request.grammar.regex = "h.+"
            assert (await refuse(router.stub.Generate(request))).reason is Reason.TICKET_INVALID
            request.ClearField("grammar")
            assert (await refuse(router.stub.Generate(request))).reason is Reason.TICKET_INVALID
            assert len(scheduler.submits()) == seen + 1

    asyncio.run(main())


@pytest.mark.parametrize("asked", [under_regex, with_tools])
def test_a_ticket_is_gone_on_with_at_another_router_that_compiles_nothing(
    asked: Any, looked: list[common_pb2.Grammar]
) -> None:
    """Not even a tokenizer is loaded for it: there is no helper."""

    async def main() -> None:
        async with cluster(saying(CALL, 1), asset_files(chat_template__jinja=QWEN_3.encode())) as (scheduler, router):
            request = asked()
            first = await collect(router.stub.Generate(request))
            deltas = [message.delta for message in first if message.HasField("delta")]
            assert len(looked) == 1 and router.grammars._helper is not None
            state = inference_pb2.ResumeState(token_ids=deltas[0].token_ids, text_bytes=deltas[0].text_bytes)
            request.resume.CopyFrom(inference_pb2.Resume(ticket=first[0].started.ticket, outputs=[state], seed=3))
            async with RouterUnderTest([scheduler.address]) as second:
                again = await collect(second.stub.Generate(request))
                assert deltas[0].text + "".join(message.delta.text for message in again) == CALL
                assert len(looked) == 1 and second.grammars._helper is None and not second.grammars._answers
                assert scheduler.submits()[-1].grammar == looked[0] and len(scheduler.submits()) == 2

    asyncio.run(main())


def test_a_ticket_of_a_parked_stream_is_gone_on_with_and_compiles_nothing(looked: list[common_pb2.Grammar]) -> None:
    async def main() -> None:
        async with cluster(saying(CALL, 1), asset_files(chat_template__jinja=QWEN_3.encode())) as (scheduler, router):
            request = with_tools()
            request.resume_grace_ms = 60_000
            first = await collect(router.stub.Generate(request))
            await eventually(lambda: router.inference.parking.num_parked == 1)
            request.resume.CopyFrom(inference_pb2.Resume(ticket=first[0].started.ticket, seed=3))
            again = await collect(router.stub.Generate(request))
            assert "".join(message.delta.text for message in again) == CALL
            assert len(looked) == 1 and len(scheduler.submits()) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("template", "more", "compiled"),
    [
        (QWEN_3, {"tool_choice": "required"}, ["calls"]),
        (QWEN_3, {"tools": None, "response_format": {"type": "json_object"}}, ["json_schema"]),
        (QWEN_2, {"response_format": {"type": "json_object"}}, ["json_schema", "calls"]),
    ],
)
def test_an_event_is_gone_on_after_and_nothing_is_compiled(
    looked: list[common_pb2.Grammar], template: str, more: dict[str, Any], compiled: list[str]
) -> None:
    async def main() -> None:
        files = asset_files(chat_template__jinja=template.encode())
        async with door(saying(CALL, 1), files=files) as (scheduler, at):
            connection = await at.connect()
            await connection.send("POST", CHAT, BODY | more | {"stream": True, "resume_grace_ms": 60_000})
            status, _ = await connection.head()
            assert status == 200
            events = connection.events()
            seen = [await anext(events) for _ in range(3)]
            await connection.close()
            reply = await at.ask("POST", CHAT, last_event_id=seen[-1].splitlines()[0].removeprefix("id: "))
            assert reply.status == 200
            rest = reply.body.decode().split("\n\n")[:-1]
            assert rest[-1].endswith("[DONE]")
            deltas = [data_of(event)["choices"][0]["delta"] for event in [*seen, *rest[:-1]]]
            calls = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
            told = "".join(calls) or "".join(delta.get("content", "") for delta in deltas)
            assert told == CALL or json.loads(told) == {"city": "Röm"}
            assert [grammar.WhichOneof("kind") for grammar in looked] == compiled and len(scheduler.submits()) == 1

    asyncio.run(main())
