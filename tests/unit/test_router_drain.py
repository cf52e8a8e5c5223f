"""A router that shuts down: nothing slips in that was on its way, and nobody loses the end of an answer."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from octavo.v1 import inference_pb2

import router.service
from router.parking import rewind
from service.errors import Reason
from tests.unit.http_door import door
from tests.unit.http_resumes import BODY, begin, id_of, resume
from tests.unit.router_calls import TEXT, ask, collect, refuse, say_text, stay_silent, text_of
from tests.unit.router_fakes import FakeScheduler, cluster
from tests.unit.waiting import eventually


async def waits(drain: asyncio.Task[None]) -> bool:
    await asyncio.wait([drain], timeout=0.1)
    return not drain.done()


def test_a_request_that_is_being_prepared_when_the_drain_begins_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        go = asyncio.Event()
        async with cluster(say_text) as (scheduler, under_test):
            prepare = under_test.preparation.prepare

            async def slowly(*args: Any) -> Any:
                await go.wait()
                return await prepare(*args)

            monkeypatch.setattr(under_test.preparation, "prepare", slowly)
            request = ask()
            request.idempotency_key = "k"
            refusal = asyncio.create_task(refuse(under_test.stub.Generate(request)))
            await eventually(lambda: under_test.gate.num_inside == 1)
            drain = asyncio.create_task(under_test.inference.drain(20.0))
            assert await waits(drain)
            go.set()
            assert (await refusal).reason is Reason.DRAINING
            await drain
            assert scheduler.submits() == [] and not under_test.inference.keys._claims

    asyncio.run(main())


def test_an_answer_that_is_not_written_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        ended, go, write = asyncio.Event(), asyncio.Event(), router.service._write

        async def slowly(context: Any, message: inference_pb2.GenerateResponse) -> None:
            if message.HasField("finished"):
                ended.set()
                await go.wait()
            await write(context, message)

        monkeypatch.setattr("router.service._write", slowly)
        async with cluster(say_text) as (_, under_test):
            answer = asyncio.create_task(collect(under_test.stub.Generate(ask())))
            await ended.wait()
            await eventually(lambda: under_test.gate.num_inside == 1 and under_test.session.num_requests == 0)
            drain = asyncio.create_task(under_test.inference.drain(20.0))
            assert await waits(drain)
            go.set()
            messages = await answer
            assert text_of(messages) == TEXT and messages[-1].HasField("finished")
            await drain

    asyncio.run(main())


def test_what_takes_too_long_is_told_to_resume_elsewhere() -> None:
    async def main() -> None:
        async with cluster(stay_silent) as (_, under_test):
            call = under_test.stub.Generate(ask())
            assert (await call.read()).HasField("started")
            await under_test.inference.drain(0.0)
            assert (await refuse(call.read())).reason is Reason.DRAINING
            await eventually(lambda: under_test.gate.num_inside == 0)

    asyncio.run(main())


@pytest.mark.parametrize("over_http", [True, False])
def test_a_resume_that_is_under_way_is_sent_elsewhere(over_http: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        entered, go = asyncio.Event(), asyncio.Event()

        async def slowly(*args: Any) -> None:
            entered.set()
            await go.wait()
            await rewind(*args)

        monkeypatch.setattr("router.inference.rewind", slowly)
        async with door(stay_silent) as (scheduler, at):
            under_test = at.router
            attempt: asyncio.Task[Any]
            if over_http:
                connection, events = await begin(at, BODY)
                event_id = id_of(await anext(events))
                await connection.close()
                await eventually(lambda: under_test.inference.parking.num_parked == 1)
                attempt = asyncio.create_task(resume(at, event_id))
            else:
                request = ask(seed=11)
                request.resume_grace_ms, request.idempotency_key = 60_000, "k"
                call = under_test.stub.Generate(request)
                ticket = (await call.read()).started.ticket
                call.cancel()
                await eventually(lambda: under_test.inference.parking.num_parked == 1)
                request.resume.CopyFrom(inference_pb2.Resume(ticket=ticket, seed=11))
                request.attempt = 1
                attempt = asyncio.create_task(refuse(under_test.stub.Generate(request)))
            await entered.wait()
            drain = asyncio.create_task(under_test.inference.drain(20.0))
            assert await waits(drain)
            go.set()
            answer = await attempt
            assert answer.status == 503 if over_http else answer.reason is Reason.DRAINING
            await drain
            await eventually(lambda: len(scheduler.cancels()) == 1)
            assert len(scheduler.submits()) == 1 and not under_test.inference.keys._claims
            assert under_test.inference.parking.num_parked == 0 and under_test.gate.num_inside == 0

    asyncio.run(main())


class Speechless(FakeScheduler):
    """One that never welcomes a router."""

    async def _serve(self, request_iterator: Any, context: Any) -> bool:
        return await asyncio.Event().wait()


def test_who_has_said_goodbye_dials_nobody_again_and_waits_for_no_welcome(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        speechless = Speechless(say_text)
        await speechless.start()
        async with cluster(say_text) as (scheduler, under_test):
            attachments = under_test.attachments
            attachments.set_addresses([scheduler.address, speechless.address])
            await eventually(lambda: len(under_test.session._links.by_address) == 2)
            streams = list(attachments._tasks.values())
            with caplog.at_level(logging.INFO, "octavo.router.attach"):
                await under_test.inference.drain(0.0)
                done, _ = await asyncio.wait(streams, timeout=10)
            assert len(done) == 2 and scheduler.epoch == 1
            assert [record.levelname for record in caplog.records if scheduler.address in record.message] == ["INFO"]
        await speechless.stop()

    asyncio.run(main())
