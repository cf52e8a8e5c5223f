"""Heartbeats to clients: when a stream has to speak, and what its client is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from octavo.v1 import inference_pb2, scheduler_pb2

from router.pulse import BRISK, CALM, Pulse, Terms
from router.service import _beating
from tests.unit.router_calls import IDS, Message
from tests.unit.router_fakes import Say, cluster, tokens
from tests.unit.waiting import eventually


def test_a_stream_speaks_when_it_was_silent_for_its_interval() -> None:
    pulse: Pulse[str] = Pulse(BRISK)
    pulse.join("a", 0.0)
    pulse.join("b", 0.5)
    assert pulse.due(0.9) == []
    assert pulse.due(1.1) == [("a", CALM)]
    assert pulse.due(1.2) == []  # it counts as having spoken
    pulse.spoke("b", 1.4)
    assert pulse.due(1.6) == []
    assert pulse.due(2.5) == [("a", CALM), ("b", CALM)]


def test_the_first_token_makes_it_brisk_once() -> None:
    pulse: Pulse[str] = Pulse(Terms(0.2, 0.6))
    pulse.join("a", 0.0)
    assert pulse.hasten("a", 0.1) == Terms(0.2, 0.6)
    assert pulse.hasten("a", 0.2) is None
    assert pulse.due(0.25) == []
    assert pulse.due(0.35) == [("a", Terms(0.2, 0.6))]


def test_streams_that_did_not_ask_or_left_are_never_due() -> None:
    pulse: Pulse[str] = Pulse(BRISK)
    pulse.spoke("stranger", 0.0)
    assert pulse.hasten("stranger", 0.0) is None
    pulse.join("a", 0.0)
    pulse.leave("a")
    pulse.leave("a")
    assert pulse.due(100.0) == []


async def pause_after_a_token(message: Message, say: Say) -> None:
    """One token, then nothing for longer than a brisk lease, then the end."""
    if message.HasField("submit"):
        await say(tokens(0, (message.submit.handle, 0, IDS[:1], 0)))
        await asyncio.sleep(0.5)
        await say(tokens(0, (message.submit.handle, 1, IDS[1:2], 2)))


@pytest.mark.parametrize("asked", [True, False])
def test_a_stream_that_asked_for_heartbeats_gets_them(asked: bool) -> None:
    async def main() -> list[inference_pb2.GenerateResponse]:
        async with cluster(pause_after_a_token, brisk=Terms(0.05, 0.15)) as (_, router):
            request = inference_pb2.GenerateRequest(text="hello", heartbeats=asked)
            return [message async for message in router.stub.Generate(request)]

    messages = asyncio.run(main())
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds[0] == "started" and kinds[-1] == "finished"
    beats = [message.heartbeat for message in messages if message.HasField("heartbeat")]
    if not asked:
        assert beats == [] and not messages[0].started.HasField("heartbeat")
        return
    assert messages[0].started.heartbeat == inference_pb2.Heartbeat(interval_ms=1000, lease_ms=3000)
    brisk = inference_pb2.Heartbeat(interval_ms=50, lease_ms=150)
    assert kinds[1:3] == ["heartbeat", "delta"] and messages[1].heartbeat == brisk
    assert len(beats) >= 4 and all(beat == brisk for beat in beats)


def test_preparing_for_long_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.service.CALM", Terms(0.01, 0.03))

    class Context:
        written = 0

        async def write(self, message: Any) -> None:
            assert message.HasField("heartbeat")
            self.written += 1

    async def main() -> None:
        context, free = Context(), asyncio.Event()

        async def prepare() -> Any:
            await free.wait()
            return "prepared"

        waiting = asyncio.create_task(_beating(prepare(), context))
        await eventually(lambda: context.written >= 3)
        free.set()
        assert await waiting == "prepared"

        cancelled = asyncio.Event()

        async def endless() -> Any:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        waiting = asyncio.create_task(_beating(endless(), context))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert cancelled.is_set()

    asyncio.run(main())


def test_a_slow_queue_beats_calmly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(message: scheduler_pb2.AttachRequest, say: Say) -> None:
        if message.HasField("submit"):
            await asyncio.sleep(1.5)
            await say(tokens(0, (message.submit.handle, 0, IDS[:1], 2)))

    async def main() -> list[inference_pb2.GenerateResponse]:
        async with cluster(late) as (_, router):
            request = inference_pb2.GenerateRequest(text="hello", heartbeats=True)
            return [message async for message in router.stub.Generate(request)]

    messages = asyncio.run(main())
    beat = next(m.heartbeat for m in messages if m.HasField("heartbeat"))
    assert beat == inference_pb2.Heartbeat(interval_ms=1000, lease_ms=3000)
