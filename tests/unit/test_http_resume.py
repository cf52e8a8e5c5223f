"""Streams that break and are gone on with at the same router: no character lost, none twice, over HTTP and over gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.http.errors import HttpError
from tests.unit.http_door import data_of, door, text_of
from tests.unit.http_requests import CHAT
from tests.unit.http_resumes import BODY, begin, events_of, id_of, resume
from tests.unit.router_calls import IDS, TEXT, Slowly, ask, say_text, stay_silent
from tests.unit.waiting import eventually

KEYS = "key-of-somebody-0123 team-a\nkey-of-another-01234 team-b\n"
A, B = {"authorization": "Bearer key-of-somebody-0123"}, {"authorization": "Bearer key-of-another-01234"}


@pytest.mark.parametrize("seen", range(1, len(IDS) + 1))  # two tokens are one character, so one event
def test_a_stream_goes_on_after_the_event_that_was_seen_last(seen: int) -> None:
    """Event 1 is the role; then comes one for each token with text."""

    async def main() -> None:
        script = Slowly()
        async with door(script) as (scheduler, at):
            connection, events = await begin(at, BODY | {"stream_options": {"include_usage": True}})
            got = [await anext(events)]
            for _ in range(seen - 1):
                got.append(await script.until(events))
            assert [id_of(event).rpartition(":")[2] for event in got] == [str(number + 1) for number in range(seen)]
            await connection.close()
            await eventually(lambda: at.router.inference.parking.num_parked == 1)
            script.more(100)  # it runs on
            await eventually(lambda: script.said == len(IDS) + 1)
            rest = events_of(await resume(at, id_of(got[-1]), method="GET" if seen % 2 else "POST"))
            assert text_of(got + rest) == TEXT
            assert rest[-1].endswith("data: [DONE]") and data_of(rest[-2])["usage"]["completion_tokens"] == len(IDS) + 1
            numbers = [int(id_of(event).rpartition(":")[2]) for event in got + rest]
            assert numbers == sorted(set(numbers))
            assert data_of(rest[0])["id"] == data_of(got[0])["id"]
            assert len(scheduler.submits()) == 1 and scheduler.cancels() == []

    asyncio.run(main())


def test_what_was_written_but_never_arrived_comes_again() -> None:
    """The server had written more, or all, when the connection broke; it can be gone on with from any event, again and again."""

    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            connection, events = await begin(at)
            got = [event async for event in events]
            assert text_of(got) == TEXT
            await connection.close()
            assert at.router.gate.num_inside == 0  # it is over, but for its memory
            for seen in reversed(range(1, len(got))):
                rest = events_of(await resume(at, id_of(got[seen - 1])))
                assert text_of(got[:seen] + rest) == TEXT and rest[-1].endswith("[DONE]")
            for event in got[1:]:  # all after the first came again, perhaps cut otherwise
                assert (await resume(at, id_of(event))).status == 400
            whole = events_of(await resume(at, id_of(got[-1]).rpartition(":")[0] + ":0"))
            assert text_of(whole) == TEXT and "role" in data_of(whole[0])["choices"][0]["delta"]
            assert len(scheduler.submits()) == 1

    asyncio.run(main())


def test_two_outputs_go_on_each_where_it_stood() -> None:
    async def main() -> None:
        async with door(say_text) as (_, at):
            connection, events = await begin(at, BODY | {"n": 2})
            got = [event async for event in events]
            await connection.close()
            for seen in reversed(range(1, len(got))):
                rest = events_of(await resume(at, id_of(got[seen - 1])))
                texts = {0: "", 1: ""}
                ends: list[int] = []
                for event in [*got[:seen], *rest]:
                    if "[DONE]" not in event:
                        (choice,) = data_of(event)["choices"]
                        texts[choice["index"]] += choice["delta"].get("content", "")
                        ends += [choice["index"]] if choice["finish_reason"] else []
                assert texts == {0: TEXT, 1: TEXT} and sorted(ends) == [0, 1]

    asyncio.run(main())


def test_a_connection_that_is_dead_and_does_not_know_it_is_taken_over() -> None:
    async def main() -> None:
        script = Slowly()
        async with door(script) as (scheduler, at):
            old, events = await begin(at)
            got = [await anext(events)]
            script.more(2)
            got += [await anext(events), await anext(events)]
            task = asyncio.create_task(resume(at, id_of(got[-1])))
            async with asyncio.timeout(5):
                await old.reader.read()  # hung up on
            script.more(100)
            rest = events_of(await task)
            assert text_of(got + rest) == TEXT
            assert len(scheduler.submits()) == 1 and scheduler.cancels() == []
            await old.close()

    asyncio.run(main())


def test_of_two_resumes_at_once_the_last_has_the_stream() -> None:
    async def main() -> None:
        script = Slowly()
        async with door(script) as (scheduler, at):
            old, events = await begin(at)
            got = [await anext(events), await script.until(events)]
            loop, answers = asyncio.get_running_loop(), [bytearray(), bytearray()]

            def again(number: int) -> asyncio.Task[None]:
                async def send(message: Any) -> None:
                    answers[number].extend(message.get("body", b""))

                job = at.gateway.streams.resume(id_of(got[-1]), at.router.inference, "default", {}, send)
                return loop.create_task(job)

            first, last = again(0), again(1)
            await asyncio.wait([first], timeout=10)
            assert first.cancelled()
            script.more(100)
            async with asyncio.timeout(10):
                await last
            assert text_of(got + bytes(answers[1]).decode().split("\n\n")[:-1]) == TEXT
            assert not answers[0] and len(scheduler.submits()) == 1 and scheduler.cancels() == []
            await old.close()

    asyncio.run(main())


def test_a_resume_from_an_event_that_another_has_just_gone_back_before_is_told_so() -> None:
    async def main() -> None:
        script = Slowly()
        async with door(script) as (scheduler, at):
            old, events = await begin(at)
            got = [await anext(events), await script.until(events)]

            async def send(message: Any) -> None:
                pass

            def again(event: str) -> Any:
                return at.gateway.streams.resume(id_of(event), at.router.inference, "default", {}, send)

            first, last = asyncio.create_task(again(got[0])), asyncio.create_task(again(got[1]))
            with pytest.raises(HttpError) as caught:
                async with asyncio.timeout(10):
                    await last
            assert caught.value.problem.status == 400
            await asyncio.wait([first], timeout=10)
            assert at.router.inference.parking.num_parked == 1  # for whoever comes with an event that counts
            script.more(100)
            assert text_of(got[:1] + events_of(await resume(at, id_of(got[0])))) == TEXT
            assert len(scheduler.submits()) == 1
            await old.close()

    asyncio.run(main())


def test_only_its_own_tenant_goes_on_and_strange_ids_are_told_apart() -> None:
    async def main() -> None:
        async with door(stay_silent, keys=KEYS) as (_, at):
            connection, events = await begin(at, BODY | {"resume_grace_ms": 200}, **A)
            event_id = id_of(await anext(events))
            await connection.close()
            await eventually(lambda: at.router.inference.parking.num_parked == 1)
            for wrong, headers, status in (
                (event_id, B, 404),
                (event_id, {}, 401),
                ("req-unknown:1", A, 404),
                ("", A, 400),
                ("x", A, 400),
                (event_id.rpartition(":")[0] + ":99", A, 400),
                (event_id + "9" * 30, A, 400),
            ):
                reply = await resume(at, wrong, **headers)
                assert reply.status == status, (wrong, reply.body)
            await eventually(lambda: at.router.inference.parking.num_parked == 0)
            assert (await resume(at, event_id, **A)).status == 410
            assert (await resume(at, event_id, **B)).status == 404
            answer = await at.ask("GET", CHAT, **A)
            assert answer.status == 405 and answer.json()["error"]["message"].startswith("POST a question here")

    asyncio.run(main())


def test_the_body_of_who_comes_again_is_read_and_kept_nowhere() -> None:
    """Nothing of it is looked at, so nothing of it is to count among the bodies that are held."""
    alive = most = 0

    class Piece(bytes):
        def __new__(cls) -> Piece:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, 1 << 10)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    async def main() -> None:
        async with door(Slowly()) as (_, at):
            left, sent = 1_000, []

            async def receive() -> dict[str, Any]:
                nonlocal left
                if not left:
                    await asyncio.Event().wait()  # it does not hang up
                left -= 1
                return {"type": "http.request", "body": Piece(), "more_body": left > 0}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"last-event-id", b"req-x:1")]}
            await at.gateway.app()(scope | {"query_string": b"", "root_path": ""}, receive, send)
            assert left == 0 and sent[0]["status"] == 404

    asyncio.run(main())
    assert most <= 3


def test_who_has_to_come_again_later_finds_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads that would bring it back have too much to do: that is told, and the stream is kept."""
    monkeypatch.setattr("router.prepare._SHORT", -1)

    async def main() -> None:
        async with door(say_text) as (_, at):
            connection, events = await begin(at)
            got = [event async for event in events]
            await connection.close()
            at.router.pool._max_waiting = 0
            reply = await resume(at, id_of(got[2]))
            assert reply.status == 429
            at.router.pool._max_waiting = 1 << 20
            assert text_of(got[:3] + events_of(await resume(at, id_of(got[2])))) == TEXT

    asyncio.run(main())


def test_when_nobody_comes_again_all_is_given_up() -> None:
    async def main() -> None:
        async with door(stay_silent) as (scheduler, at):
            connection, _ = await begin(at, BODY | {"resume_grace_ms": 100})
            await connection.close()
            await eventually(lambda: at.router.inference.parking.num_parked == 1)
            assert scheduler.cancels() == [] and at.router.gate.num_inside == 1
            await eventually(lambda: len(scheduler.cancels()) == 1)
            await eventually(lambda: at.router.session.num_requests == 0 and at.router.gate.num_inside == 0)
            assert not at.router.hub._streams

    asyncio.run(main())


@pytest.mark.parametrize("over_http", [True, False])
def test_who_hangs_up_before_the_first_byte_can_not_come_again(
    over_http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client knows neither id nor ticket."""
    monkeypatch.setattr("router.inference._STARTED_AFTER", 60.0)

    async def main() -> None:
        async with door(stay_silent) as (scheduler, at):
            if over_http:
                connection = await at.connect()
                await connection.send("POST", CHAT, BODY)
                await eventually(lambda: len(scheduler.submits()) == 1)
                await connection.close()
            else:
                request = ask()
                request.resume_grace_ms = 60_000
                call = at.router.stub.Generate(request)
                await eventually(lambda: len(scheduler.submits()) == 1)
                call.cancel()
            await eventually(lambda: len(scheduler.cancels()) == 1)
            assert at.router.inference.parking.num_parked == 0 and at.router.gate.num_inside == 0

    asyncio.run(main())


def test_there_is_room_for_so_many_and_those_that_ended_make_room() -> None:
    async def main() -> None:
        async with door(say_text) as (scheduler, at):
            parking = at.router.inference.parking
            parking._max_parked = 2
            for _ in range(3):
                connection, events = await begin(at)
                assert [event async for event in events]
                await connection.close()
            assert parking.num_parked == 2  # the newest
            scheduler.script = stay_silent
            for count in range(1, 5):
                connection, _ = await begin(at)
                await connection.close()
                await eventually(lambda count=count: at.router.session.num_requests == min(2, count))  # type: ignore[misc]
            assert parking.num_parked == 2
            await eventually(lambda: len(scheduler.cancels()) == 2)
            at.router.inference.parking.close()
            assert parking.num_parked == 0 and at.router.session.num_requests == 0

    asyncio.run(main())


def test_one_that_made_too_much_meanwhile_ends_with_what_it_has() -> None:
    async def main() -> None:
        script = Slowly()
        async with door(script, max_buffered_tokens=3) as (_, at):
            connection, events = await begin(at)
            got = [await anext(events)]
            await connection.close()
            await eventually(lambda: at.router.inference.parking.num_parked == 1)
            script.more(100)
            await eventually(lambda: at.router.session.num_requests == 0)
            rest = events_of(await resume(at, id_of(got[-1])))
            text = text_of([event for event in rest if "error" not in event])
            assert text and TEXT.startswith(text)
            assert data_of(rest[-1])["error"]["code"] == "slow_consumer"

    asyncio.run(main())


def test_a_drain_keeps_nobody_waiting_for_those_who_are_gone() -> None:
    async def main() -> None:
        async with door(stay_silent) as (_, at):
            connection, events = await begin(at)
            event_id = id_of(await anext(events))
            await connection.close()
            await eventually(lambda: at.router.inference.parking.num_parked == 1)
            at.router.inference.draining = True
            at.router.inference.parking.close()
            assert at.router.session.num_requests == 0
            assert (await resume(at, event_id)).status == 503

    asyncio.run(main())
