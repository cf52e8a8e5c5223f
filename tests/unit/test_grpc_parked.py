"""A gRPC stream that was cut goes on at the same router, where its call is parked, or elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from octavo.v1 import inference_pb2

from router.parking import rewind
from service.errors import Reason
from tests.unit.router_calls import IDS, TEXT, Slowly, ask, collect, refuse, say_text
from tests.unit.router_calls import text_of as grpc_text_of
from tests.unit.router_fakes import cluster
from tests.unit.waiting import eventually


@pytest.mark.parametrize("delivered", [0, 1, 3, 5])
def test_grpc_goes_on_at_the_same_router_without_a_new_submission(delivered: int) -> None:
    async def main() -> None:
        script = Slowly()
        async with cluster(script) as (scheduler, router):
            request = ask(seed=11)
            request.resume_grace_ms = 60_000
            request.idempotency_key = "k"
            call = router.stub.Generate(request)
            started = (await call.read()).started
            deltas: list[inference_pb2.Delta] = []
            while len(deltas) < delivered:
                script.more(1)
                deltas.append((await call.read()).delta)
            call.cancel()
            await eventually(lambda: router.inference.parking.num_parked == 1)
            script.more(100)
            state = inference_pb2.ResumeState(
                token_ids=[i for d in deltas for i in d.token_ids], text_bytes=deltas[-1].text_bytes if deltas else 0
            )
            request.resume.CopyFrom(inference_pb2.Resume(ticket=started.ticket, outputs=[state], seed=11))
            request.attempt = 1
            again = await collect(router.stub.Generate(request))
            assert again[0].started.request_id == started.request_id
            assert "".join(d.text for d in deltas) + grpc_text_of(again) == TEXT
            assert again[-1].finished.usage.completion_tokens == len(IDS) + 1
            assert len(scheduler.submits()) == 1 and scheduler.cancels() == []
            await eventually(lambda: router.gate.num_inside == 0)

    asyncio.run(main())


@pytest.mark.parametrize("hangs_up", [False, True])
def test_grpc_goes_on_with_a_call_that_has_ended_and_leaves_nothing_behind(hangs_up: bool) -> None:
    """Its last bytes were lost with the connection. What a resume takes for it, key and heartbeats, is given back like all else."""

    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            inference, pulse = router.inference, router.hub._pulse
            request = ask(seed=11)
            request.resume_grace_ms, request.idempotency_key, request.heartbeats = 60_000, "k", True
            whole = await collect(router.stub.Generate(request))
            await eventually(lambda: inference.parking.num_parked == 1)
            delta = next(m.delta for m in whole if m.HasField("delta"))
            state = inference_pb2.ResumeState(token_ids=delta.token_ids, text_bytes=delta.text_bytes)
            ticket = next(m.started for m in whole if m.HasField("started")).ticket
            request.resume.CopyFrom(inference_pb2.Resume(ticket=ticket, outputs=[state], seed=11))
            request.attempt = 1
            again = router.stub.Generate(request)
            if hangs_up:
                await again.read()
                again.cancel()
            else:
                assert delta.text + grpc_text_of(await collect(again)) == TEXT
            await eventually(lambda: inference.parking.num_parked == 1)
            inference.parking.close()
            assert not inference.keys._claims and not pulse._terms
            request.ClearField("resume")
            request.attempt = 0
            assert (await refuse(router.stub.Generate(request))).reason is Reason.DUPLICATE_REQUEST  # it has run
            assert len(scheduler.submits()) == 1 and router.gate.num_inside == 0

    asyncio.run(main())


def test_grpc_falls_back_to_an_ordinary_resume_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            request = ask(seed=11, logprobs=1)
            request.resume_grace_ms = 60_000
            whole = await collect(router.stub.Generate(request))
            assert router.inference.parking.num_parked == 1
            delta = next(m.delta for m in whole if m.HasField("delta"))
            state = inference_pb2.ResumeState(token_ids=delta.token_ids, text_bytes=delta.text_bytes)
            request.resume.CopyFrom(inference_pb2.Resume(ticket=whole[0].started.ticket, outputs=[state], seed=11))
            again = await collect(router.stub.Generate(request))
            assert delta.text + grpc_text_of(again) == TEXT and len(scheduler.submits()) == 2
            request.resume.ticket = b"forged"
            assert (await refuse(router.stub.Generate(request))).reason is Reason.TICKET_INVALID
            unary = inference_pb2.CompleteRequest(request=ask())
            unary.request.resume_grace_ms = 5
            assert (await refuse(router.stub.Complete(unary))).violations[0].field == "resume_grace_ms"
            await eventually(lambda: router.session.num_requests == 0 and router.gate.num_inside == 0)

    asyncio.run(main())


def test_grpc_takes_over_a_call_that_is_still_open() -> None:
    async def main() -> None:
        script = Slowly()
        async with cluster(script) as (scheduler, router):
            request = ask(seed=11)
            request.resume_grace_ms = 60_000
            old = router.stub.Generate(request)
            started = (await old.read()).started
            script.more(1)
            delta = (await old.read()).delta
            state = inference_pb2.ResumeState(token_ids=delta.token_ids, text_bytes=delta.text_bytes)
            request.resume.CopyFrom(inference_pb2.Resume(ticket=started.ticket, outputs=[state], seed=11))
            again = asyncio.create_task(collect(router.stub.Generate(request)))
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                while await old.read() is not grpc.aio.EOF:
                    pass
            script.more(100)
            assert delta.text + grpc_text_of(await again) == TEXT
            assert len(scheduler.submits()) == 1
            await eventually(lambda: router.gate.num_inside == 0)

    asyncio.run(main())


def test_of_two_grpc_resumes_at_once_the_first_is_told_and_the_last_has_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        script, entered = Slowly(), asyncio.Event()

        async def slowly(*args: Any) -> None:
            if not entered.is_set():  # the first one stays here
                entered.set()
                await asyncio.Event().wait()
            await rewind(*args)

        monkeypatch.setattr("router.inference.rewind", slowly)
        async with cluster(script) as (scheduler, router):
            request = ask(seed=11)
            request.resume_grace_ms = 60_000
            old = router.stub.Generate(request)
            started = (await old.read()).started
            old.cancel()
            await eventually(lambda: router.inference.parking.num_parked == 1)
            request.resume.CopyFrom(inference_pb2.Resume(ticket=started.ticket, seed=11))
            first = asyncio.create_task(refuse(router.stub.Generate(request)))
            await entered.wait()
            last = asyncio.create_task(collect(router.stub.Generate(request)))
            async with asyncio.timeout(10):
                assert (await first).reason is Reason.DUPLICATE_REQUEST
                script.more(100)
                assert grpc_text_of(await last) == TEXT
            assert len(scheduler.submits()) == 1 and scheduler.cancels() == []

    asyncio.run(main())
