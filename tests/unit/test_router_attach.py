"""Attaching: several schedulers, broken ones, assets, and the process as a whole."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2

from router.assets import AssetStore
from router.hub import Outbound
from service.errors import OctavoError, Reason, from_rpc_error
from tests.unit.router_calls import TEXT, Message, say_one_then_wait, say_the_rest
from tests.unit.router_fakes import (
    DIGEST,
    FakeScheduler,
    RouterUnderTest,
    Say,
    asset_files,
    served,
)
from tests.unit.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


def test_a_stream_moves_to_another_scheduler() -> None:
    async def main() -> None:
        schedulers = [FakeScheduler(say_one_then_wait), FakeScheduler(say_one_then_wait)]
        addresses = [await scheduler.start() for scheduler in schedulers]
        async with RouterUnderTest(addresses) as router:
            call = router.stub.Generate(inference_pb2.GenerateRequest(text="hello"))
            text = ""
            while not text:
                text += (await call.read()).delta.text
            (home,) = [s for s in schedulers if s.submits()]
            (other,) = [s for s in schedulers if s is not home]
            other.script = say_the_rest
            await home.stop()
            while (message := await call.read()) is not grpc.aio.EOF:
                text += message.delta.text
            assert text == TEXT
            assert len(other.submits()) == 1 and other.submits()[0].attempt == 1
            router.attachments.set_addresses([other.address])
            await eventually(lambda: router.session.num_attached == 1)
        await other.stop()

    asyncio.run(main())


def test_one_scheduler_serves_two_models() -> None:
    async def main() -> None:
        scheduler = FakeScheduler(say_one_then_wait)
        scheduler.models = [served(), served("second", b"2" * 32)]
        async with RouterUnderTest([await scheduler.start()]) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.stub.Tokenize(inference_pb2.TokenizeRequest(text="x"))
            error = from_rpc_error(caught.value)
            assert error is not None and "second, tiny" in error.message
            for name in ("tiny", "second"):
                await router.stub.Tokenize(inference_pb2.TokenizeRequest(text="x", model=name))
            models = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models
            assert [(m.name, m.ready) for m in models] == [("second", True), ("tiny", True)]
        await scheduler.stop()

    asyncio.run(main())


def test_assets_are_fetched_again_after_a_failure_but_bad_ones_are_not() -> None:
    async def main() -> None:
        answers: list[Any] = [OctavoError(Reason.NO_WORKER, "later"), asset_files(), {"tokenizer.json": b"?"}]
        asked = []

        async def fetch(digest: bytes) -> dict[str, bytes]:
            asked.append(digest)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[no-any-return]

        with ThreadPoolExecutor(1) as executor:
            store = AssetStore(fetch, executor)
            with pytest.raises(OctavoError, match="later"):
                await store.get(DIGEST)
            assert not store.ready(DIGEST)
            assert (await store.get(DIGEST)).eos_token_ids == (1,)
            assert store.ready(DIGEST)
            store.want(set())
            assert store.ready(DIGEST)  # a scheduler may be away for a moment
            for _ in range(2):
                with pytest.raises(OctavoError) as caught:
                    await store.get(b"bad" + bytes(29))
                assert caught.value.reason is Reason.UNSUPPORTED
            assert len(asked) == 3
            await store.close()

    asyncio.run(main())


def test_a_link_that_was_cut_is_dialled_again() -> None:
    """Also while the writer hangs because the scheduler does not read."""

    async def main() -> None:
        scheduler = FakeScheduler(say_one_then_wait)
        async with RouterUnderTest([await scheduler.start()]) as router:
            for epoch in (1, 2):
                await eventually(lambda: router.session.num_attached == 1 and scheduler.epoch == epoch)  # noqa: B023
                router.hub._outbound[scheduler.address].close()
            await eventually(lambda: router.session.num_attached == 1 and scheduler.epoch == 3)
        await scheduler.stop()

    asyncio.run(main())


def test_a_queue_that_nobody_empties_closes() -> None:
    async def main() -> None:
        queue = Outbound()
        message = scheduler_pb2.AttachRequest()
        for _ in range(65_536):
            queue.put(message)
        assert not queue.closed and await queue.get() is message
        queue.put(message)
        queue.put(message)
        assert queue.closed and await queue.get() is None

    asyncio.run(main())


def run_router(*flags: str) -> subprocess.Popen[str]:
    """A router process; its HTTP door on any free port, for the default's is one for all tests that run side by side."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    return subprocess.Popen(
        [sys.executable, "-m", "router", "--http-listen", "127.0.0.1:0", *flags],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_process_serves_once_it_is_attached_and_ends(tmp_path: Path) -> None:
    """It would refuse everybody before a scheduler has said what is served."""
    ready = tmp_path / "ready.json"

    async def main() -> None:
        scheduler = FakeScheduler(nothing)
        port = int((await scheduler.start()).rpartition(":")[2])
        await scheduler.stop()
        address = f"127.0.0.1:{free_port()}"
        process = run_router("--listen", address, "--scheduler", f"127.0.0.1:{port}", "--ready-file", str(ready))
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                service = health_pb2.HealthCheckRequest(service="octavo.v1.InferenceService")
                answer = await health.Check(service, wait_for_ready=True, timeout=30)
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING and not ready.exists()
                await scheduler.start(port)
                await eventually(ready.exists, 30.0)
                answer = await health.Check(service)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
                assert [model.name for model in (await stub.ListModels(inference_pb2.ListModelsRequest())).models] == [
                    "tiny"
                ]
            process.send_signal(signal.SIGTERM)
            _, errors = await asyncio.to_thread(process.communicate, timeout=30)
            assert process.returncode == 0, errors
            assert not ready.exists()
        finally:
            process.kill()
            process.wait()
            await scheduler.stop()

    asyncio.run(main())


def test_a_process_that_ends_beats_until_the_scheduler_has_let_it_go() -> None:
    async def main() -> None:
        scheduler = FakeScheduler(nothing)

        def lets_go(message: Message) -> bool:
            """At the first beat after the goodbye, and not before."""
            return message.HasField("heartbeat") and any(each.HasField("detach") for each in scheduler.received)

        scheduler.lets_go = lets_go
        await scheduler.start()
        process = run_router("--listen", "127.0.0.1:0", "--scheduler", scheduler.address)
        try:
            await eventually(lambda: len(scheduler.received) > 0, 30.0)
            process.send_signal(signal.SIGTERM)
            _, errors = await asyncio.to_thread(process.communicate, timeout=30)
            assert process.returncode == 0 and " W " not in errors, errors
            kinds = [message.WhichOneof("message") for message in scheduler.received]
            assert kinds[-2:] == ["detach", "heartbeat"] and scheduler.epoch == 1
        finally:
            process.kill()
            process.wait()
            await scheduler.stop()

    asyncio.run(main())


def test_a_process_that_waits_for_a_scheduler_can_be_stopped(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    process = run_router("--listen", address, "--scheduler", "127.0.0.1:1")
    try:
        with grpc.insecure_channel(address) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def nothing(message: scheduler_pb2.AttachRequest, say: Say) -> None:
    """A scheduler that says nothing more than its welcome."""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--scheduler"),
        (("--scheduler", "nonsense"), "HOST:PORT"),
        (("--scheduler", "h:1", "--flush-ms", "0"), "--flush-ms"),
        (("--scheduler", "h:1", "--listen", "0.0.0.0:0"), "--listen"),
        (
            ("--scheduler", "h:1", "--api-keys", "k-3f1c9a7be20d4c55a1f0e6b2"),
            "--api-keys (or OCTAVO_API_KEYS) takes the name of a file",
        ),
    ],
)
def test_settings_that_can_not_be_used_end_with_2(flags: tuple[str, ...], message: str) -> None:
    process = run_router(*flags)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert message in errors and "Traceback" not in errors


def test_bytes_that_are_no_message_cost_the_stream_and_nothing_more() -> None:
    async def main() -> None:
        attached = asyncio.Semaphore(0)

        async def attach(requests: Any, context: Any) -> None:
            attached.release()
            await context.write(b"\x0a\xff")

        async def fetch(request: Any, context: Any) -> None:
            await context.write(b"\x0a\xff")

        methods = {
            "Attach": grpc.stream_stream_rpc_method_handler(attach),
            "FetchAssets": grpc.unary_stream_rpc_method_handler(fetch),
        }
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("octavo.v1.SchedulerService", methods),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with RouterUnderTest([]) as router:
            watching = asyncio.create_task(router.attachments.watch())
            router.attachments.set_addresses([address])
            for _ in range(2):  # it dials again
                await asyncio.wait_for(attached.acquire(), 10)
            with pytest.raises(OctavoError) as caught:
                await router.attachments.fetch_assets(DIGEST)
            assert caught.value.reason is Reason.NO_WORKER
            assert not watching.done()
            watching.cancel()
        await server.stop(0)

    asyncio.run(main())
