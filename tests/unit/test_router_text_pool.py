"""What is short is worked on at once: a thread would wait for Python's lock, and whoever waits for the thread with it."""

from __future__ import annotations

import asyncio
import threading

import grpc.aio
import pytest
from octavo.v1 import inference_pb2

from router.prepare import TextPool
from tests.unit.router_calls import TEXT, say_one_then_wait, say_the_rest
from tests.unit.router_fakes import FakeScheduler, RouterUnderTest


@pytest.mark.parametrize(("size", "at_once"), [(0, True), (1_024, True), (1_025, False)])
def test_only_what_is_short_is_done_at_once(size: int, at_once: bool) -> None:
    async def main() -> None:
        pool = TextPool(threads=1)
        try:
            thread = await pool.run_plain(size, threading.get_ident)
            assert (thread == threading.get_ident()) == at_once
            with pytest.raises(ZeroDivisionError):
                await pool.run_plain(size, lambda: 1 // 0)
        finally:
            pool.close()

    asyncio.run(main())


def test_a_resume_waits_for_no_thread() -> None:
    """Those of a router that died come all at once, and each hop would cost each of them milliseconds."""

    async def main() -> None:
        scheduler = FakeScheduler(say_one_then_wait)
        async with RouterUnderTest([await scheduler.start()]) as router:
            call = router.stub.Generate(inference_pb2.GenerateRequest(text="hello"))
            started = (await call.read()).started
            delta = (await call.read()).delta
            call.cancel()
            scheduler.script = say_the_rest
            release = threading.Event()
            busy = [router.pool.executor.submit(release.wait, 30.0) for _ in range(8)]  # every thread, and a queue
            try:
                state = inference_pb2.ResumeState(index=0, token_ids=delta.token_ids, text_bytes=delta.text_bytes)
                resume = inference_pb2.Resume(ticket=started.ticket, outputs=[state], seed=started.seed)
                call = router.stub.Generate(inference_pb2.GenerateRequest(text="hello", resume=resume), timeout=20)
                text = delta.text
                while (message := await call.read()) is not grpc.aio.EOF:
                    text += message.delta.text
            finally:
                release.set()
            assert text == TEXT
            assert all(future.result() for future in busy)
        await scheduler.stop()

    asyncio.run(main())
