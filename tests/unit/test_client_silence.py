"""When a client takes a silent router for dead, and that it then goes on at another one."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref

import pytest
from octavo.client import AsyncClient, Client, Event, RetryPolicy
from octavo.client.silence import Silence
from octavo.v1 import inference_pb2 as pb

from tests.unit.client_events import TOTAL, check_exactly_once
from tests.unit.client_fake_router import FakeRouter, Play

BRISK = pb.Heartbeat(interval_ms=50, lease_ms=200)


def test_the_lease_counts_from_the_last_word() -> None:
    silence = Silence(first_word=3.0)
    silence.dialled(10.0)
    assert not silence.over(12.9)
    silence.agreed(pb.Heartbeat(interval_ms=100, lease_ms=300))
    silence.listening(13.0)
    assert silence.due_at == pytest.approx(13.3)
    assert not silence.over(13.29)
    assert silence.over(13.31)


def test_each_silence_has_to_be_twice_as_long() -> None:
    silence = Silence(first_word=1.0)
    silence.dialled(0.0)
    assert silence.over(1.05)
    silence.dialled(2.0)
    assert not silence.over(3.5)
    assert silence.over(4.05)


def test_a_stream_that_flows_for_a_while_is_trusted_again() -> None:
    silence = Silence(first_word=1.0)
    silence.dialled(0.0)
    assert silence.over(1.05)
    silence.dialled(2.0)
    assert silence.over(4.05)
    silence.dialled(5.0)
    for now, lease in ((8.9, 4.0), (9.1, 2.0), (13.0, 2.0), (13.2, 1.0), (20.0, 1.0)):  # half after each four seconds
        silence.listening(now)
        assert silence.due_at == pytest.approx(now + lease)


def test_an_own_stall_is_not_the_routers_silence() -> None:
    silence = Silence(first_word=1.0)
    silence.dialled(0.0)
    assert not silence.over(5.0)  # asked four seconds late: this process stood still
    assert silence.due_at == pytest.approx(5.5)
    assert silence.over(5.6)


def test_terms_without_a_lease_change_nothing() -> None:
    silence = Silence(first_word=1.0)
    silence.dialled(0.0)
    silence.agreed(pb.Heartbeat())
    assert silence.due_at == pytest.approx(1.0)


async def _async_events(addresses: list[str], policy: RetryPolicy) -> list[Event]:
    async with AsyncClient(addresses, retry=policy) as client:
        return [event async for event in client.generate("hi", max_tokens=TOTAL)]


def _sync_events(addresses: list[str], policy: RetryPolicy) -> list[Event]:
    with Client(addresses, retry=policy) as client:
        return list(client.generate("hi", max_tokens=TOTAL))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("when", ["before started", "in its output"])
def test_a_frozen_router_is_left_for_another(kind: str, when: str) -> None:
    never = threading.Event()
    frozen = Play(gate=never) if when == "before started" else Play(hang_at=4, terms=BRISK)
    # Terms that become shorter than the first word's must count at once.
    policy = RetryPolicy(first_word=0.3 if when == "before started" else 60.0)
    with FakeRouter([frozen]) as first, FakeRouter([Play(terms=BRISK)]) as second:
        addresses = [first.address, second.address]
        events = _sync_events(addresses, policy) if kind == "sync" else asyncio.run(_async_events(addresses, policy))
        check_exactly_once(events)
        assert first.requests[0].heartbeats
        assert len(second.requests) == 1
        assert bool(second.requests[0].resume.ticket) == (when == "in its output")
        never.set()
        if when == "in its output":  # the fake hears of it where it is not blocked itself
            assert first.cancelled.acquire(timeout=10)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_reader_that_takes_its_time_is_no_silence(kind: str) -> None:
    with FakeRouter([Play(terms=BRISK)]) as first, FakeRouter() as second:
        addresses = [first.address, second.address]
        if kind == "sync":
            with Client(addresses) as client, client.generate("hi", max_tokens=TOTAL) as stream:
                events = []
                for event in stream:
                    events.append(event)
                    time.sleep(0.25)
        else:

            async def main() -> list[Event]:
                events = []
                async with AsyncClient(addresses) as client, client.generate("hi", max_tokens=TOTAL) as stream:
                    async for event in stream:
                        events.append(event)
                        await asyncio.sleep(0.25)
                return events

            events = asyncio.run(main())
        check_exactly_once(events)
        assert second.requests == []


def test_with_one_router_no_heartbeats_are_asked_for() -> None:
    with FakeRouter() as router:
        check_exactly_once(_sync_events([router.address], RetryPolicy()))
        assert not router.requests[0].heartbeats


def test_the_watcher_ends_and_keeps_no_stream_alive() -> None:
    with FakeRouter([Play(hang_at=2, terms=pb.Heartbeat(interval_ms=1, lease_ms=60_000))]) as router:
        client = Client([router.address, router.address])
        stream = client.generate("hi", max_tokens=TOTAL)
        next(stream)
        assert any(thread.name == "octavo-silence" for thread in threading.enumerate())
        gone = weakref.ref(stream)
        del stream
        until = time.monotonic() + 10
        while gone() is not None or any(thread.name == "octavo-silence" for thread in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.02)
        client.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_whole_answer_too_goes_on_at_another_router(kind: str) -> None:
    with FakeRouter([Play(hang_at=4, terms=BRISK)]) as first, FakeRouter([Play(terms=BRISK)]) as second:
        addresses = [first.address, second.address]
        if kind == "sync":
            with Client(addresses) as client:
                answer = client.complete("hi", max_tokens=TOTAL)
        else:

            async def main() -> pb.CompleteResponse:
                async with AsyncClient(addresses) as client:
                    return await client.complete("hi", max_tokens=TOTAL)

            answer = asyncio.run(main())
        assert list(answer.outputs[0].token_ids) == list(range(1000, 1000 + TOTAL))
        assert second.requests[0].resume.ticket
