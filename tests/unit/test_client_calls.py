"""Both clients against a scripted router over real gRPC."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from octavo.client import AsyncClient, Client, ConnectionProblem, Event, OctavoError, Reason, RetryPolicy
from octavo.client.assets import assemble
from octavo.client.connection import connect_to
from octavo.v1 import common_pb2
from octavo.v1 import inference_pb2 as pb

from service import errors as service_errors
from tests.unit.client_events import TOTAL, check_exactly_once
from tests.unit.client_fake_router import SEED, TICKET, FakeRouter, Play, whole_text

FAST = RetryPolicy(initial_backoff=0.01, max_backoff=0.05)


def _error(name: str, retry_after_ms: int = 0) -> service_errors.OctavoError:
    return service_errors.OctavoError(service_errors.Reason[name], f"it is {name}", retry_after_ms=retry_after_ms)


async def _events(addresses: list[str]) -> list[Event]:
    async with AsyncClient(addresses, retry=FAST) as client:
        return [event async for event in client.generate("hi", max_tokens=TOTAL)]


def _both(addresses: list[str]) -> Iterator[list[Event]]:
    with Client(addresses, retry=FAST) as client:
        yield list(client.generate("hi", max_tokens=TOTAL))
    yield asyncio.run(_events(addresses))


BREAKS = {
    "closed": Play(break_at=4),
    "unavailable": Play(break_at=4, code=grpc.StatusCode.UNAVAILABLE),
    "draining": Play(break_at=4, error=_error("DRAINING")),
    "lost at once": Play(break_at=0, error=_error("LOST")),
    "slow consumer": Play(break_at=6, error=_error("SLOW_CONSUMER")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_stream_goes_on_at_another_router(name: str) -> None:
    with FakeRouter([BREAKS[name], BREAKS[name]]) as first, FakeRouter() as second:
        for events in _both([first.address, second.address]):
            check_exactly_once(events)
            resume = second.requests[-1].resume
            assert (resume.ticket, resume.seed) == (TICKET, SEED)
        assert (len(first.requests), len(second.requests)) == (2, 2)


def test_a_router_that_dies_in_the_middle() -> None:
    with FakeRouter([Play(hang_at=4)]) as first, FakeRouter() as second:
        with Client([first.address, second.address], retry=FAST) as client:
            events = []
            for event in client.generate("hi", max_tokens=TOTAL):
                events.append(event)
                if isinstance(event, pb.Delta) and event.token_ids[-1] == 1003:
                    first.kill()
            check_exactly_once(events)
            # The router that answered is the one asked first from now on.
            check_exactly_once(list(client.generate("hi", max_tokens=TOTAL)))
        assert len(second.requests) == 2
        assert list(second.requests[0].resume.outputs[0].token_ids) == [1000, 1001, 1002, 1003]


def test_many_breaks_and_several_outputs() -> None:
    plays = [
        Play(break_at=2),
        Play(break_at=4),
        Play(break_at=6, error=_error("LOST")),
        Play(refuse=_error("NO_WORKER")),
        Play(),
    ]
    with FakeRouter(plays) as router, Client(router.address, retry=FAST) as client:
        response = client.generate("hi", max_tokens=TOTAL, n=3, idempotency_key="k").result()
        assert [output.text for output in response.outputs] == [whole_text(TOTAL)] * 3
        assert [request.attempt for request in router.requests] == [0, 1, 2, 3, 4]
        assert response.seed == SEED


def test_a_retryable_refusal_is_retried_when_told() -> None:
    plays = [Play(refuse=_error("QUEUE_FULL", retry_after_ms=20)), Play()]
    with FakeRouter(plays) as router, Client(router.address, retry=FAST) as client:
        check_exactly_once(list(client.generate("hi", max_tokens=TOTAL)))
        assert not router.requests[1].HasField("resume")


def test_retries_end() -> None:
    with FakeRouter([Play(refuse=_error("NO_WORKER"))]) as router, Client(router.address, retry=FAST) as client:
        with pytest.raises(OctavoError) as caught:
            list(client.generate("hi"))
        assert caught.value.reason is Reason.NO_WORKER
        assert len(router.requests) == 1 + FAST.retries


@pytest.mark.parametrize("name", ["PROMPT_TOO_LONG", "POISON", "MODEL_UNKNOWN", "TICKET_INVALID"])
def test_what_can_not_be_repeated_is_raised(name: str) -> None:
    for play in (Play(refuse=_error(name)), Play(break_at=2, error=_error(name))):
        with FakeRouter([play]) as router, Client(router.address, retry=FAST) as client:
            with pytest.raises(OctavoError) as caught:
                list(client.generate("hi"))
            assert caught.value.reason is Reason[name]
            assert len(router.requests) == 1


def test_a_router_that_lies_is_found_out() -> None:
    with FakeRouter([Play(break_at=2), Play(skip_bytes=1)]) as router, Client(router.address, retry=FAST) as client:
        stream = client.generate("hi")
        with pytest.raises(OctavoError, match="PROTOCOL_VIOLATION"):
            list(stream)
        assert list(stream) == []


def test_closing_a_sync_stream_cancels_the_call() -> None:
    with FakeRouter([Play(hang_at=2)]) as router, Client(router.address) as client:
        with client.generate("hi") as stream:
            assert next(stream.text()) == whole_text(2)
        assert router.cancelled.acquire(timeout=10)
        assert list(stream) == []

        stream = client.generate("hi")  # closed by another thread while this one waits
        assert isinstance(next(stream), pb.Started)
        next(stream)
        threading.Timer(0.05, stream.close).start()
        assert list(stream) == []
        assert router.cancelled.acquire(timeout=10)

        text = client.generate("hi").text()  # dropped
        next(text)
        del text
        gc.collect()
        assert router.cancelled.acquire(timeout=10)


def test_closing_an_async_stream_cancels_the_call() -> None:
    async def run(router: FakeRouter) -> None:
        async with AsyncClient(router.address) as client:
            async with client.generate("hi") as stream:
                assert await anext(stream.text()) == whole_text(2)
            assert await asyncio.to_thread(router.cancelled.acquire, timeout=10)

            stream = client.generate("hi")  # closed by another task while this one waits
            asyncio.get_running_loop().call_later(0.05, lambda: asyncio.ensure_future(stream.aclose()))
            assert len([event async for event in stream]) == 2
            assert await asyncio.to_thread(router.cancelled.acquire, timeout=10)

            stream = client.generate("hi")  # its task is cancelled
            assert isinstance(await anext(stream), pb.Started)
            reader = asyncio.ensure_future(stream.result())
            await asyncio.sleep(0.05)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert await asyncio.to_thread(router.cancelled.acquire, timeout=10)

            async for _ in client.generate("hi").text():  # dropped
                break
            gc.collect()
            assert await asyncio.to_thread(router.cancelled.acquire, timeout=10)

    with FakeRouter([Play(hang_at=2)]) as router:
        asyncio.run(run(router))


def test_a_close_ends_the_wait_between_two_tries() -> None:
    plays = [Play(refuse=_error("QUEUE_FULL", retry_after_ms=20_000))]
    with FakeRouter(plays) as router, Client(router.address) as client:
        stream = client.generate("hi")
        threading.Timer(0.2, stream.close).start()
        assert list(stream) == []


def test_a_deadline_bounds_resumes_too() -> None:
    plays = [Play(break_at=2), Play(refuse=_error("LOST", retry_after_ms=100)), Play(hang_at=2)]
    with FakeRouter(plays) as router, Client(router.address, retry=FAST) as client:
        with pytest.raises(OctavoError) as caught:
            list(client.generate("hi", timeout=1.0))
        assert caught.value.reason is Reason.DEADLINE
        first, _, third = router.deadlines
        # gRPC rounds what is left up, to at most two digits.
        assert first is not None and third is not None and third < first <= 1.1


def test_a_slow_start_is_waited_for() -> None:
    gate = threading.Event()
    with FakeRouter([Play(gate=gate)]) as router, Client(router.address) as client:
        stream = client.generate("hi", max_tokens=TOTAL)
        threading.Timer(0.1, gate.set).start()
        check_exactly_once(list(stream))


def test_the_single_calls_of_both_clients() -> None:
    async def run(address: str) -> None:
        async with AsyncClient(address, retry=FAST) as client:
            assert (await client.complete("hi", seed=1)).outputs[0].text == whole_text(2)
            assert list((await client.tokenize(messages=[("user", "ab")])).token_ids) == [97, 98]
            assert await client.detokenize([97, 98]) == "ab"
            assert [model.name for model in await client.list_models()] == ["fake"]
            assert await client.get_model_assets() == {"a.json": b"abcd", "b.txt": b"x"}
            assert (await client.chat([("user", "x")]).result()).outputs[0].text == whole_text(6)

    with FakeRouter() as router:
        with Client(router.address, retry=FAST) as client:
            assert client.complete(messages=[("user", "x")]).outputs[0].text == whole_text(2)
            assert list(client.tokenize("ab", add_special_tokens=False).token_ids) == [97, 98]
            assert client.detokenize([97, 98], skip_special_tokens=False) == "ab"
            assert [model.name for model in client.list_models()] == ["fake"]
            assert client.get_model_assets() == {"a.json": b"abcd", "b.txt": b"x"}
            assert client.stream(pb.GenerateRequest(text="x")).result().outputs[0].text == whole_text(6)
        asyncio.run(run(router.address))
        tokenize = next(request for request in router.unary if isinstance(request, pb.TokenizeRequest))
        assert tokenize.HasField("add_special_tokens") and not tokenize.add_special_tokens


def test_single_calls_are_retried_and_their_errors_read() -> None:
    with FakeRouter(unary_errors=[_error("LOST"), _error("NO_WORKER"), _error("MODEL_UNKNOWN")]) as router:
        with Client(router.address, retry=FAST) as client, pytest.raises(OctavoError) as caught:
            client.tokenize("x")
        assert caught.value.reason is Reason.MODEL_UNKNOWN
        assert len(router.unary) == 3
        router.unary_errors += [_error("LOST")]
        with Client(["127.0.0.1:1", router.address], retry=FAST) as client:
            assert client.complete("x").request_id == "r1"


def test_the_token_is_sent() -> None:
    with FakeRouter(token="a secret of the cluster") as router:
        with Client(router.address, token="a secret of the cluster") as client:
            assert client.list_models()
            assert client.generate("x").result().outputs
        with Client(router.address) as client, pytest.raises(OctavoError) as caught:
            client.list_models()
        assert caught.value.reason is Reason.UNAUTHENTICATED


def test_where_the_routers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert connect_to(environ={}).addresses == ("127.0.0.1:50051",)
    assert connect_to(service="scheduler", environ={}).addresses == ("127.0.0.1:50061",)
    (tmp_path / ".run").mkdir()
    cluster = tmp_path / ".run" / "cluster.json"
    cluster.write_text(json.dumps({"router": ["127.0.0.1:7"], "scheduler": ["127.0.0.1:8"], "redis": None}))
    assert connect_to(environ={}).addresses == ("127.0.0.1:7",)
    assert connect_to(service="scheduler", environ={}).addresses == ("127.0.0.1:8",)
    assert connect_to(environ={"OCTAVO_ADDRESS": "a:1, b:2"}).addresses == ("a:1", "b:2")
    assert connect_to(["c:3"], environ={"OCTAVO_ADDRESS": "a:1"}).addresses == ("c:3",)


def test_what_opens_a_router_and_a_scheduler(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("cluster-token\n")
    (tmp_path / "key").write_text("key-of-file\n")
    environ = {"OCTAVO_API_KEY": "key", "OCTAVO_CLUSTER_TOKEN_FILE": str(tmp_path / "token")}
    assert connect_to(environ=environ).metadata == (("authorization", "Bearer key"),)
    assert connect_to(service="scheduler", environ=environ).token == "cluster-token"
    assert connect_to(token_file=tmp_path / "key", environ=environ).token == "key-of-file"
    assert connect_to(token="given", environ=environ).token == "given"
    assert connect_to(environ={}).metadata == ()
    with pytest.raises(ConnectionProblem, match="OCTAVO_API_KEY: a token is one line"):
        connect_to(environ={"OCTAVO_API_KEY": "two\nlines"})


def test_settings_that_can_not_be_used_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionProblem, match="no address"):
        connect_to(" , ", environ={})
    with pytest.raises(ConnectionProblem, match="absent"):
        connect_to(environ={"OCTAVO_CLUSTER_TOKEN_FILE": str(tmp_path / "absent")})
    with pytest.raises(ConnectionProblem, match=r"ca\.pem"):
        connect_to(tls_ca=tmp_path / "ca.pem", environ={})
    (tmp_path / ".run").mkdir()
    for content in ("{", "[]", '{"router": "x"}'):
        (tmp_path / ".run" / "cluster.json").write_text(content)
        with pytest.raises(ConnectionProblem, match=r"cluster\.json"):
            connect_to(environ={})


def test_assets_must_be_whole() -> None:
    for chunks in (
        [common_pb2.AssetChunk(name="a", size=2, data=b"x")],
        [common_pb2.AssetChunk(data=b"x")],
        [common_pb2.AssetChunk(name="a", size=0), common_pb2.AssetChunk(name="a", size=0)],
    ):
        with pytest.raises(OctavoError, match="PROTOCOL_VIOLATION"):
            assemble(chunks)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_whole_answer_is_asked_for_again_as_another_attempt(kind: str) -> None:
    """Or a key that ran for an answer that was lost would be refused."""
    with FakeRouter(unary_errors=[_error("LOST")]) as router:
        if kind == "sync":
            with Client(router.address, retry=FAST) as client:
                client.complete("hi", idempotency_key="k")
        else:

            async def main() -> None:
                async with AsyncClient(router.address, retry=FAST) as client:
                    await client.complete("hi", idempotency_key="k")

            asyncio.run(main())
        assert len(router.unary) == 2 and router.unary[-1].request.attempt == 1
