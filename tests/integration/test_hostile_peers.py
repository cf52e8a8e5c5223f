"""Peers that are slow, silent, gone or hostile: a clear error or a closed connection, and the stream beside them does not notice."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import grpc
import pytest
from google.protobuf import struct_pb2
from octavo.v1 import common_pb2, inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster
from service.columns import pack
from service.errors import Reason, from_rpc_error
from tests.integration import raw_http2 as h2
from tests.integration.raw_http2 import RawConnection, frame

pytestmark = pytest.mark.xdist_group("hostile")

GENERATE = "/octavo.v1.InferenceService/Generate"
ATTACH = "/octavo.v1.SchedulerService/Attach"
ENLIST = "/octavo.v1.SchedulerService/Enlist"
NO_WINDOW = struct.pack(">HI", 4, 0)  # SETTINGS_INITIAL_WINDOW_SIZE
MB = 1 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    flags = {
        "scheduler": {"lease-ms": 3000},
        "router": {"lease-ms": 3000},
        "worker": {"lease-ms": 3000, "mock-step-ms": 4},
    }
    with LocalCluster(redis=False, flags=flags) as cluster:
        yield cluster
        for member in cluster.members.values():
            assert "Traceback" not in member.log_text(), member.name
            assert metric(member.ready.metrics, "octavo_loop_stalls_total") == 0


def metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
    raise KeyError(name)


def of(cluster: LocalCluster, member: str, name: str) -> float:
    return metric(cluster.members[member].ready.metrics, name)


def request(max_tokens: int = 150, n: int = 1, seed: int = 1) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n, seed=seed, temperature=1.0)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7, 8]), sampling=sampling)


class Neighbour:
    """One stream after the other, on a connection of its own; each must have the tokens of the first, from the first place."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._channel = grpc.insecure_channel(cluster.routers[0])
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._over = threading.Event()
        self._problems: list[str] = []
        self._expected = self._one()[0]
        self.streams = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._channel.close()
        if error is None:
            assert not self._problems, self._problems[:3]
            assert self.streams > 0

    def _one(self) -> tuple[list[int], int]:
        tokens: list[int] = []
        migrations = 0
        for event in self._stub.Generate(request(), timeout=30):
            tokens += event.delta.token_ids
            migrations += event.finished.timing.migrations
        return tokens, migrations

    def _run(self) -> None:
        while True:
            try:
                tokens, migrations = self._one()
            except grpc.RpcError as error:
                self._problems.append(str(error))
                return
            if tokens != self._expected or migrations:
                self._problems.append(f"{len(tokens)} tokens, {migrations} migrations")
            self.streams += 1
            if self._over.is_set():
                return


@pytest.fixture
def neighbour(cluster: LocalCluster) -> Iterator[Neighbour]:
    with Neighbour(cluster) as beside:
        yield beside


def eventually_running(cluster: LocalCluster, most: int, seconds: float = 30.0) -> None:
    """Soon no more rows are taken than that."""
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        until = time.monotonic() + seconds
        while sum(w.running for w in stub.ListWorkers(scheduler_pb2.ListWorkersRequest()).workers) > most:
            assert time.monotonic() < until
            time.sleep(0.02)


def eventually(cluster: LocalCluster, member: str, name: str, most: float, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while (value := of(cluster, member, name)) > most:
        assert time.monotonic() < until, (member, name, value)
        time.sleep(0.1)


def test_a_client_that_takes_nothing_loses_its_rows_and_is_told_once_it_reads(
    cluster: LocalCluster, neighbour: Neighbour
) -> None:
    before = of(cluster, "router-1", "process_resident_memory_bytes")
    with RawConnection(cluster.routers[0], settings=NO_WINDOW) as raw:
        stream = raw.call(GENERATE, request(8_000, n=8).SerializeToString(), end=True)
        frames = raw.frames()
        for kind, _, number, _ in frames:  # headers come, and then nothing may
            if (kind, number) == (h2.HEADERS, stream):
                break
        eventually_running(cluster, 1)
        assert of(cluster, "router-1", "process_resident_memory_bytes") < before + 50 * MB
        raw.send(frame(h2.WINDOW_UPDATE, 0, stream, struct.pack(">I", MB)))
        trailers = next(p for kind, flags, _, p in frames if kind == h2.HEADERS and flags & h2.END_STREAM)
        assert b"which does not read them" in trailers


def test_a_client_that_never_reads_its_socket_costs_one_row_for_20_seconds(
    cluster: LocalCluster, neighbour: Neighbour
) -> None:
    connections = of(cluster, "router-1", "process_open_fds")
    silent = [RawConnection(cluster.routers[0], preface=False) for _ in range(200)]
    half = [RawConnection(cluster.routers[0], preface=False) for _ in range(20)]
    for raw in half:
        raw.send(h2.PREFACE[:9])
    gone = [
        RawConnection(cluster.routers[0]) for _ in range(4)
    ]  # never acknowledges a ping: as one whose cable was cut
    for raw in gone:
        raw.call(GENERATE, request(8_000).SerializeToString(), end=True)
    idle = RawConnection(cluster.routers[0])
    eventually(cluster, "router-1", "process_open_fds", connections, seconds=60)
    eventually_running(cluster, 1)
    assert all(raw.closed_within(10) for raw in [*silent, *half, *gone, idle])
    for raw in [*silent, *half, *gone, idle]:
        raw.close()


def test_streams_that_never_say_hello_are_ended(cluster: LocalCluster) -> None:
    with Neighbour(cluster):
        tasks = of(cluster, "scheduler-1", "octavo_asyncio_tasks")
        with RawConnection(cluster.schedulers[0]) as raw:
            streams = {raw.call(path) for path in [ATTACH, ENLIST] * 150}
            for kind, flags, stream, payload in raw.frames():
                if kind == h2.HEADERS and flags & h2.END_STREAM:
                    assert b"no Hello within 5 s" in payload
                    streams.discard(stream)
                    if not streams:
                        break
        assert not streams
        eventually(cluster, "scheduler-1", "octavo_asyncio_tasks", tasks)


def test_a_connection_has_a_bounded_number_of_streams(cluster: LocalCluster, neighbour: Neighbour) -> None:
    with RawConnection(cluster.routers[0]) as raw:
        for _ in range(10_000):
            raw.call(GENERATE)
        refused = 0
        for kind, _, _, payload in raw.frames():
            refused += kind == h2.RST_STREAM and payload[3] in (7, 11)  # REFUSED_STREAM, ENHANCE_YOUR_CALM
            if refused > 100:
                break
        assert refused > 100
    eventually(cluster, "router-1", "octavo_asyncio_tasks", 40)


@pytest.mark.parametrize("service", ["router-1", "scheduler-1"])
def test_floods_of_frames_cost_the_sender_its_connection(
    cluster: LocalCluster, neighbour: Neighbour, service: str
) -> None:
    address = cluster.members[service].address
    with RawConnection(address) as raw:
        raw.send(frame(h2.PING, 0, 0, b"12345678") * 100)
        last = next(payload for kind, _, _, payload in raw.frames() if kind == h2.GOAWAY)
        assert last[4:8] == struct.pack(">I", 11)  # ENHANCE_YOUR_CALM
        assert raw.closed_within(30)
    path = GENERATE if service == "router-1" else ATTACH
    with RawConnection(address) as raw, contextlib.suppress(OSError):
        for _ in range(20_000):
            stream = raw.call(path)
            raw.send(frame(h2.RST_STREAM, 0, stream, struct.pack(">I", 8)))
    with RawConnection(address) as raw, contextlib.suppress(OSError):
        raw.socket.settimeout(5.0)
        for _ in range(20):
            raw.send(frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 70_000)) * 1_000)
    eventually(cluster, service, "octavo_asyncio_tasks", 40)
    assert cluster.members[service].returncode is None


def _attach(cluster: LocalCluster) -> tuple[RawConnection, int, int]:
    raw = RawConnection(cluster.schedulers[0])
    hello = scheduler_pb2.AttachRequest(hello=scheduler_pb2.RouterHello(incarnation=5, protocol=1, name="hostile"))
    stream = raw.call(ATTACH, hello.SerializeToString())
    data = next(p for kind, _, number, p in raw.frames() if kind == h2.DATA and number == stream)
    welcome = scheduler_pb2.AttachResponse.FromString(data[5 : 5 + int.from_bytes(data[1:5], "big")])
    assert welcome.HasField("welcome")
    return raw, stream, welcome.epoch


def test_a_router_that_stops_reading_costs_a_bounded_buffer_and_its_rows_come_back(
    cluster: LocalCluster, neighbour: Neighbour
) -> None:
    before = of(cluster, "scheduler-1", "process_resident_memory_bytes")
    raw, stream, epoch = _attach(cluster)
    digest = cluster_digest(cluster)

    def say(**message: object) -> None:
        attach = scheduler_pb2.AttachRequest(epoch=epoch, **message)  # type: ignore[arg-type]
        raw.send(frame(h2.DATA, 0, stream, h2.message(attach.SerializeToString())))

    with raw:
        for handle in range(1, 101):
            submit = scheduler_pb2.Submit(
                handle=handle,
                request_id=f"r{handle}",
                task=scheduler_pb2.TASK_GENERATE,
                model="mock",
                digest=digest,
                sampling=common_pb2.SamplingSpec(max_tokens=4_000, temperature=1.0),
                prompt=[scheduler_pb2.Segment(token_ids=pack([handle, 2, 3], "int32"))],
                num_prompt_tokens=3,
            )
            say(submit=submit)
        for _ in range(20):  # alive, but it reads nothing
            say(heartbeat=scheduler_pb2.RouterHeartbeat())
            time.sleep(0.1)
        assert of(cluster, "scheduler-1", "process_resident_memory_bytes") < before + 80 * MB
        eventually_running(cluster, 1)  # and when it says nothing either, its lease ends


def cluster_digest(cluster: LocalCluster) -> bytes:
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        return bytes(stub.ListWorkers(scheduler_pb2.ListWorkersRequest()).workers[0].model_digest)


def test_a_worker_that_enlists_and_reads_nothing_is_dropped(cluster: LocalCluster, neighbour: Neighbour) -> None:
    hello = scheduler_pb2.WorkerHello(
        incarnation=77,
        protocol=1,
        model="other",
        model_digest=bytes(32),
        hash_version=1,
        vocab_size=1_000,
        max_model_len=64,
        max_rows=4,
        max_num_batched_tokens=64,
        name="hostile",
    )
    hello.kv_groups.add(id=0, block_size=4, num_blocks=64, bytes_per_block=1)
    with (
        RawConnection(cluster.schedulers[0], settings=NO_WINDOW) as raw,
        grpc.insecure_channel(cluster.schedulers[0]) as channel,
    ):
        raw.call(ENLIST, scheduler_pb2.EnlistRequest(hello=hello).SerializeToString())
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        for wanted in (2, 1):
            until = time.monotonic() + 20
            while len(stub.ListWorkers(scheduler_pb2.ListWorkersRequest()).workers) != wanted:
                assert time.monotonic() < until
    with socket.create_connection(("127.0.0.1", int(cluster.schedulers[0].rpartition(":")[2]))) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 100)


def _nested(depth: int) -> struct_pb2.Struct:
    inner = struct_pb2.Struct(fields={"a": struct_pb2.Value(string_value="x")})
    for _ in range(depth):
        inner = struct_pb2.Struct(fields={"a": struct_pb2.Value(struct_value=inner)})
    return inner


def _chat(**parts: object) -> inference_pb2.GenerateRequest:
    one = inference_pb2.ChatMessage(role="user", content=[inference_pb2.ContentPart(text="x")])
    chat = inference_pb2.Chat(**({"messages": [one]} | parts))  # type: ignore[arg-type]
    return inference_pb2.GenerateRequest(chat=chat, sampling=inference_pb2.SamplingParams(max_tokens=2))


def _sampling(**params: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="a", sampling=inference_pb2.SamplingParams(**params))  # type: ignore[arg-type]


ABSURD = {
    "a text of 10 MB": (
        lambda: inference_pb2.GenerateRequest(text="a b " * 2_500_000),
        "text: 10000000 characters can't fit into the model's context of",
    ),
    "token ids of 10 MB": (
        lambda: inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5] * 10_000_000)),
        "prompt tokens exceed",
    ),
    "a million stop strings": (lambda: _sampling(stop=[f"s{i}" for i in range(1_000_000)]), "sampling.stop:"),
    "a million bad words": (lambda: _sampling(bad_words=["word"] * 1_000_000), "sampling.bad_words:"),
    "a million biases": (lambda: _sampling(logit_bias=dict.fromkeys(range(1_000_000), 1.0)), "sampling.logit_bias:"),
    "three million allowed ids": (lambda: _sampling(allowed_token_ids=[3] * 3_000_000), "sampling.allowed_token_ids:"),
    "n": (lambda: _sampling(n=2**31), "sampling.n:"),
    "max_tokens": (lambda: _sampling(max_tokens=2**31 - 1), "output tokens exceed"),
    "NaN": (lambda: _sampling(temperature=float("nan"), top_p=float("inf")), "sampling.temperature:"),
    "a model's name of 10 MB": (lambda: inference_pb2.GenerateRequest(model="é" * 5_000_000, text="a"), "no model"),
    "a key of 10 MB": (
        lambda: inference_pb2.GenerateRequest(text="a", idempotency_key="k" * 10_000_000),
        "idempotency_key",
    ),
    "100,000 messages": (lambda: _chat(messages=[inference_pb2.ChatMessage(role="user")] * 100_000), "chat.messages"),
    "10,000 unknown roles": (
        lambda: _chat(messages=[inference_pb2.ChatMessage(role="r" * 200)] * 10_000),
        "chat.messages[0].role: must be one of",
    ),
    "500,000 parts": (
        lambda: _chat(
            messages=[inference_pb2.ChatMessage(role="user", content=[inference_pb2.ContentPart()] * 500_000)]
        ),
        "chat.messages.content",
    ),
    "200,000 tools": (lambda: _chat(tools=[_nested(1)] * 200_000), "chat.tools"),
    "500,000 template arguments": (
        lambda: _chat(
            template_args=struct_pb2.Struct(
                fields={str(i): struct_pb2.Value(null_value=struct_pb2.NULL_VALUE) for i in range(500_000)}
            )
        ),
        "chat.template_args",
    ),
    "10 MB of template arguments": (
        lambda: _chat(template_args=struct_pb2.Struct(fields={"a": struct_pb2.Value(string_value="x" * 10_000_000)})),
        "chat: tools and arguments",
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_requests_are_refused_by_name_and_leave_nothing(
    cluster: LocalCluster, neighbour: Neighbour, name: str
) -> None:
    make, text = ABSURD[name]
    absurd = make()
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(absurd, timeout=60))
            error = from_rpc_error(caught.value)
            assert error is not None
            assert error.reason in (Reason.INVALID_ARGUMENT, Reason.PROMPT_TOO_LONG, Reason.MODEL_UNKNOWN)
            assert text in error.message
            assert len(error.message) < 600


def test_refused_requests_do_not_pile_up(cluster: LocalCluster, neighbour: Neighbour) -> None:
    """What a refusal keeps is freed when it is refused, not when Python next looks for cycles."""
    absurd = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5] * 10_000_000))
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        sizes = []
        for _ in range(8):
            with pytest.raises(grpc.RpcError):
                list(stub.Generate(absurd, timeout=60))
            sizes.append(of(cluster, "router-1", "process_resident_memory_bytes"))
    assert max(sizes) < min(sizes) + 250 * MB  # each is parsed into 80 MB


def test_what_is_deep_or_odd_but_allowed_is_served(cluster: LocalCluster, neighbour: Neighbour) -> None:
    odd = "\u202e\u0000\ufffd\U0010ffff e\u0301"
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for one in (
            _chat(template_args=_nested(20)),
            _chat(tools=[_nested(20)] * 10),
            inference_pb2.GenerateRequest(
                text=odd * 10, sampling=inference_pb2.SamplingParams(max_tokens=3, stop=[odd, "\u0000"])
            ),
        ):
            assert list(stub.Generate(one, timeout=30))[-1].HasField("finished")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[5] * 2_000_000), timeout=30)
        assert "token_ids: must have at most" in str(caught.value.details())


def test_a_resume_with_millions_of_tokens_is_refused(cluster: LocalCluster, neighbour: Neighbour) -> None:
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        started = next(stub.Generate(request(5), timeout=30)).started
        again = request(5)
        again.resume.CopyFrom(
            inference_pb2.Resume(
                ticket=started.ticket,
                seed=started.seed,
                outputs=[inference_pb2.ResumeState(index=0, token_ids=[5] * 4_000_000)],
            )
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(again, timeout=30))
        assert "resume.outputs[0].token_ids: must have at most" in str(caught.value.details())
