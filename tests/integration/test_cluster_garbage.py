"""Bytes that are no gRPC at every port of real processes: nobody dies, and the cluster goes on serving."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import struct
from collections.abc import Iterator

import grpc
import pytest
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2

from deploy.cluster import LocalCluster
from deploy.environment import ROOT

pytestmark = pytest.mark.xdist_group("cluster")

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _HEADERS, _DATA, _GOAWAY, _CONTINUATION = 4, 1, 0, 7, 9
_ROUNDS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(redis=False) as cluster:
        yield cluster


def _frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header as HPACK writes one that is in no table; lengths below 2^7 or with one continuation byte or more."""

    def text(data: bytes) -> bytes:
        if len(data) < 127:
            return bytes((len(data),)) + data
        rest, out = len(data) - 127, bytearray((127,))
        while rest >= 128:
            out.append(rest % 128 + 128)
            rest //= 128
        out.append(rest)
        return bytes(out) + data

    return b"\x00" + text(name) + text(value)


def _call(path: bytes) -> bytes:
    """The headers of a gRPC call."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"x"),
        (b"te", b"trailers"),
    )
    return b"".join(_literal(*pair) for pair in (*fields, (b"content-type", b"application/grpc")))


def _garbage(generator: random.Random) -> list[bytes]:
    """What one round says, a connection each."""
    hello = _PREFACE + _frame(_SETTINGS, 0, 0, b"")
    attach = _frame(_HEADERS, 4, 1, _call(b"/octavo.v1.SchedulerService/Attach"))
    enlist = _frame(_HEADERS, 4, 1, _call(b"/octavo.v1.SchedulerService/Enlist"))
    generate = _frame(_HEADERS, 4, 1, _call(b"/octavo.v1.InferenceService/Generate"))
    noise = generator.randbytes(generator.randrange(1, 4096))
    return [
        b"",
        noise,
        _PREFACE[: generator.randrange(len(_PREFACE))],
        _PREFACE + noise,
        hello + noise,
        hello + _frame(generator.randrange(256), generator.randrange(256), generator.getrandbits(31), noise[:200]),
        hello + _frame(_DATA, 0, 1, b"x", length=(1 << 24) - 1),
        hello + _frame(_HEADERS, 4, 1, noise[:1000]),
        hello + _frame(_HEADERS, 4, 1, _call(b"/" + b"a" * 8000)),
        hello
        + b"".join(_frame(_HEADERS if i == 0 else _CONTINUATION, 0, 1, b"\x00\x01a\x01b" * 2000) for i in range(40)),
        hello + _frame(_GOAWAY, 0, 0, noise[:8]),
        *(
            hello + call + _frame(_DATA, 1, 1, message)
            for call in (attach, enlist, generate)
            for message in (
                b"\x00" + struct.pack(">I", len(noise)) + noise,
                b"\x00\xff\xff\xff\xff" + noise,  # a message of 4 GiB
                b"\x01\x00\x00\x00\x04junk",  # compressed, with nothing
                struct.pack(">BI", 0, 0),
            )
        ),
        b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n" + noise,
    ]


def _say(address: str, data: bytes, generator: random.Random) -> None:
    """Connect, send all in pieces, at times read, and hang up, at times with a reset."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as connection,
        contextlib.suppress(ConnectionError, TimeoutError),
    ):
        connection.settimeout(0.2)
        at = 0
        while at < len(data):
            size = generator.randrange(1, 20_000)
            connection.sendall(data[at : at + size])
            at += size
        if generator.random() < 0.5:
            connection.recv(4096)
        if generator.random() < 0.3:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_garbage_at_every_port_harms_nobody(cluster: LocalCluster) -> None:
    generator = random.Random(7)
    before = _generate(cluster)
    addresses = [address for m in cluster.members.values() for address in (m.address, m.ready.metrics) if address]
    assert len(addresses) == 6  # router, scheduler and worker, each with its metrics
    for _ in range(_ROUNDS):
        for address in addresses:
            for data in _garbage(generator):
                _say(address, data, generator)
    assert _generate(cluster) == before
    for member in cluster.members.values():
        assert member.returncode is None, member.name
        # gRPC itself logs one where a connection goes away under an answer; none may lead through our code.
        ours = re.findall(rf'File "{re.escape(str(ROOT))}/(?!.venv).*', member.log_text())
        assert not ours, ours


_NO_MESSAGE = b"\x0a\xff"  # a field longer than the message


@pytest.mark.parametrize("method", ["Generate", "Complete", "Tokenize", "Detokenize", "ListModels", "GetModelAssets"])
def test_a_request_that_is_no_message_is_refused_by_name(cluster: LocalCluster, method: str) -> None:
    assert _status(cluster.routers[0], f"InferenceService/{method}", [_NO_MESSAGE]) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["FetchAssets", "ListWorkers", "Inspect"])
def test_so_is_one_to_the_scheduler(cluster: LocalCluster, method: str) -> None:
    assert (
        _status(cluster.schedulers[0], f"SchedulerService/{method}", [_NO_MESSAGE]) is grpc.StatusCode.INVALID_ARGUMENT
    )


def test_a_stream_that_breaks_the_protocol_is_told_so(cluster: LocalCluster) -> None:
    hello = scheduler_pb2.AttachRequest(hello=scheduler_pb2.RouterHello(incarnation=1, protocol=1)).SerializeToString()
    early = scheduler_pb2.AttachRequest(epoch=1).SerializeToString()
    for method in ("Attach", "Enlist"):
        code = _status(cluster.schedulers[0], f"SchedulerService/{method}", [_NO_MESSAGE])
        assert code is grpc.StatusCode.FAILED_PRECONDITION
    for later in (_NO_MESSAGE, early):
        code = _status(cluster.schedulers[0], "SchedulerService/Attach", [hello, later])
        assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "UNKNOWN" not in cluster.members["scheduler-1"].log_text()


def test_random_messages_in_good_framing(cluster: LocalCluster) -> None:
    generator = random.Random(8)
    before = _generate(cluster)
    for address, methods in (
        (cluster.schedulers[0], ("SchedulerService/Attach", "SchedulerService/Enlist", "SchedulerService/Inspect")),
        (cluster.routers[0], ("InferenceService/Generate", "InferenceService/Complete", "InferenceService/Tokenize")),
    ):
        for _ in range(200):
            data = generator.randbytes(generator.randrange(100))
            code = _status(address, generator.choice(methods), [data])
            assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), data
    assert _generate(cluster) == before
    for member in cluster.members.values():
        assert member.returncode is None, member.name


def _status(address: str, method: str, messages: list[bytes]) -> grpc.StatusCode | None:
    """How a call ends that sends these bytes as its messages."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/octavo.v1.{method}", lambda data: data, lambda data: data)(
            iter(messages), timeout=10
        )
        try:
            for number, _ in enumerate(call):
                if number > 3:
                    call.cancel()
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return None


def _generate(cluster: LocalCluster) -> list[int]:
    """Tokens of one stream; waits for a cluster that is still coming up."""
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=range(20)),
            sampling=inference_pb2.SamplingParams(max_tokens=50, ignore_eos=True, temperature=0),
        )
        ids: list[int] = []
        for event in stub.Generate(request, timeout=30, wait_for_ready=True):
            ids += event.delta.token_ids
    assert len(ids) == 50
    return ids
