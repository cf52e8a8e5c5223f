"""/v1/responses, whole and in events, against a scripted scheduler."""

from __future__ import annotations

import asyncio

from tests.unit.http_door import data_of, door
from tests.unit.router_calls import IDS, TEXT, say_text


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
