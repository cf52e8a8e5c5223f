"""OpenAI's API on a real cluster, over real sockets: answers, streams, hang-ups, refusals, slow readers, drains, keys, TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster
from tests.integration.certificates import write_certificate

pytestmark = pytest.mark.xdist_group("cluster")

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
LEASE = {"lease-ms": 3000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    flags: dict[str, dict[str, Any]] = {
        "scheduler": LEASE | {"max-waiting": 3},
        "router": LEASE,
        "worker": LEASE | {"max-model-len": 1024, "max-rows": 2, "mock-step-ms": 10},
    }
    with LocalCluster(redis=False, flags=flags) as cluster:
        yield cluster


def ask(
    address: str, path: str, body: Any = None, method: str = "POST", tls: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request of its own connection."""
    connection = (
        http.client.HTTPConnection(address, timeout=30)
        if tls is None
        else http.client.HTTPSConnection(address, timeout=30, context=tls)
    )
    try:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"content-type": "application/json", **named})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def open_stream(address: str, **fields: Any) -> http.client.HTTPResponse:
    """A chat stream whose head has come."""
    connection = http.client.HTTPConnection(address, timeout=30)
    body = json.dumps({"messages": HELLO, "stream": True, "ignore_eos": True} | fields)
    connection.request("POST", CHAT, body, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    return answer


def events_of(answer: http.client.HTTPResponse) -> list[dict[str, Any]]:
    """All chunks up to the end, which must be [DONE]."""
    *chunks, done = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def content(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def worker_of(cluster: LocalCluster) -> scheduler_pb2.WorkerStatus:
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        (worker,) = stub.ListWorkers(scheduler_pb2.ListWorkersRequest()).workers
        return worker


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "too late"
        time.sleep(0.02)


def all_free(cluster: LocalCluster) -> bool:
    worker = worker_of(cluster)
    return worker.running == 0 and worker.blocks_used == 0


def test_http_and_grpc_give_the_same_text(cluster: LocalCluster) -> None:
    fields = {"model": "mock", "temperature": 0, "max_tokens": 12, "seed": 4}
    status, _, body = ask(cluster.gateways[0], CHAT, {"messages": HELLO} | fields)
    assert status == 200
    whole = json.loads(body)["choices"][0]["message"]["content"]
    assert content(events_of(open_stream(cluster.gateways[0], **fields))) == whole
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        request = inference_pb2.GenerateRequest(
            model="mock",
            chat=inference_pb2.Chat(messages=[{"role": "user", "content": [{"text": "hello"}]}]),  # type: ignore[list-item]
            sampling=inference_pb2.SamplingParams(temperature=0, max_tokens=12, seed=4),
        )
        answer = inference_pb2_grpc.InferenceServiceStub(channel).Complete(
            inference_pb2.CompleteRequest(request=request), timeout=30
        )
    assert answer.outputs[0].text == whole


def test_completions_score_their_prompts(cluster: LocalCluster) -> None:
    fields = {"prompt": ["hello", [104, 105]], "max_tokens": 2, "echo": True, "logprobs": 2, "ignore_eos": True}
    status, _, body = ask(cluster.gateways[0], "/v1/completions", fields)
    assert status == 200
    first, second = json.loads(body)["choices"]
    assert first["text"].startswith("hello") and second["text"].startswith("hi")
    assert first["logprobs"]["tokens"][:5] == list("hello") and len(first["logprobs"]["tokens"]) == 7
    assert first["logprobs"]["token_logprobs"][0] is None and None not in first["logprobs"]["token_logprobs"][1:]
    assert len(first["logprobs"]["top_logprobs"][3]) == 3  # the chosen one and the two best
    assert "".join(first["logprobs"]["tokens"]) == first["text"]
    assert first["logprobs"]["text_offset"][:6] == [0, 1, 2, 3, 4, 5]


def test_log_probabilities_stream_with_their_tokens(cluster: LocalCluster) -> None:
    chunks = events_of(open_stream(cluster.gateways[0], max_tokens=5, logprobs=True, top_logprobs=2))
    entries = [
        entry
        for c in chunks
        for choice in c["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert len(entries) == 5 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert "".join(entry["token"] for entry in entries) == content(chunks)
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"]


def test_a_cached_prompt_is_told(cluster: LocalCluster) -> None:
    long = [{"role": "user", "content": "the same long prompt " * 10}]
    for expected in (False, True):
        _, _, body = ask(cluster.gateways[0], CHAT, {"messages": long, "max_tokens": 1})
        cached = json.loads(body)["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 0) is expected


@pytest.mark.parametrize("streamed", [True, False])
def test_a_closed_connection_frees_rows_and_blocks(cluster: LocalCluster, streamed: bool) -> None:
    connections = []
    for _ in range(2):
        sock = socket.create_connection(cluster.gateways[0].rsplit(":", 1))  # type: ignore[arg-type]
        body = json.dumps({"messages": HELLO, "stream": streamed, "max_tokens": 900, "ignore_eos": True}).encode()
        sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                     % (CHAT.encode(), len(body), body))  # fmt: skip
        connections.append(sock)
    wait_until(lambda: worker_of(cluster).running == 2)
    for sock in connections:
        sock.close()
    wait_until(lambda: all_free(cluster), 5)


def test_a_full_queue_is_429_with_the_time_to_come_again(cluster: LocalCluster) -> None:
    streams, refused = [], []
    for _ in range(10):  # two run, three wait
        try:
            streams.append(open_stream(cluster.gateways[0], max_tokens=900))
        except AssertionError:
            refused.append(ask(cluster.gateways[0], CHAT, {"messages": HELLO, "max_tokens": 900}))
    assert refused
    for status, headers, body in refused:
        assert status == 429 and int(headers["retry-after"]) >= 1 and int(headers["retry-after-ms"]) > 0
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
    for stream in streams:
        stream.close()
    wait_until(lambda: all_free(cluster))


def test_what_is_no_request_is_refused_and_nothing_breaks(cluster: LocalCluster) -> None:
    address = cluster.gateways[0]
    for body, status in (
        (b"{", 400), (b"[]", 400), (b'{"messages": NaN}', 400), (b"[" * 200_000, 400), (b'{"x": "\xff\xfe"}', 400),
        (b'{"n": 1' + b"0" * 5_000 + b"}", 400), (json.dumps({"messages": HELLO, "n": 10**40}).encode(), 400),
        (json.dumps({"messages": HELLO, "temperature": 1e400}).encode(), 400), (b" " * (17 << 20), 413),
        (json.dumps({"prompt": [1] * 600_000}).encode(), 413), (json.dumps({"messages": HELLO, "model": "x"}).encode(), 404),
        (json.dumps({"messages": HELLO, "tools": [{}]}).encode(), 400),
    ):  # fmt: skip
        found, _, answer = ask(address, CHAT, body)
        error = json.loads(answer)["error"]
        assert found == status and error["message"] and "Traceback" not in answer.decode(), body[:40]
    assert ask(address, "/v1/nope", {})[0] == 404
    assert ask(address, CHAT, {}, method="PATCH")[0] == 405
    assert ask(address, "/health", method="GET")[0] == ask(address, "/ready", method="GET")[0] == 200
    assert b"octavo_router_requests_total" in ask(address, "/metrics", method="GET")[2]
    assert "Traceback" not in cluster.members["router-1"].log_text()


def test_a_reader_that_stops_is_cut_off() -> None:
    """Its row is free long before it notices: what waits for it is bounded."""
    flags: dict[str, dict[str, Any]] = {
        "scheduler": LEASE,
        "router": LEASE | {"max-buffered-tokens": 500},
        "worker": LEASE | {"max-model-len": 200_000, "num-blocks": 20_000},
    }
    with LocalCluster(redis=False, flags=flags) as cluster:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, _, port = cluster.gateways[0].rpartition(":")
        sock.connect((host, int(port)))
        body = json.dumps(
            {"messages": HELLO, "stream": True, "max_tokens": 190_000, "ignore_eos": True, "n": 4}
        ).encode()
        sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                     % (CHAT.encode(), len(body), body))  # fmt: skip
        wait_until(lambda: worker_of(cluster).running > 0)
        wait_until(lambda: all_free(cluster), 60)
        wait_until(lambda: b'outcome="SLOW_CONSUMER"' in ask(cluster.gateways[0], "/metrics", method="GET")[2])
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65_536):
                received = received[-100:] + data
        assert received and not received.endswith(
            b"0\r\n\r\n"
        )  # hung up on: the answer's end is missing, as any client sees
        sock.close()


def test_a_drain_takes_nothing_new_and_lets_streams_end() -> None:
    flags: dict[str, dict[str, Any]] = {
        "scheduler": LEASE,
        "router": LEASE | {"drain-timeout": 30},
        "worker": LEASE | {"mock-step-ms": 10},
    }
    with LocalCluster(redis=False, flags=flags) as cluster:
        address = cluster.gateways[0]
        kept = http.client.HTTPConnection(address, timeout=30)
        kept.request("GET", "/ready")
        assert kept.getresponse().read() and kept.sock is not None
        stream = open_stream(address, max_tokens=150)
        parked = open_stream(address, max_tokens=5_000, resume_grace_ms=60_000)
        parked.close()
        texts: list[list[dict[str, Any]]] = []
        reader = threading.Thread(target=lambda: texts.append(events_of(stream)))
        reader.start()
        router = cluster.members["router-1"]
        router.signal(signal.SIGTERM)
        wait_until(lambda: "draining" in router.log_text())
        kept.request("GET", "/ready")
        answer = kept.getresponse()
        assert answer.status == 503 and answer.read()
        status, headers, body = ask(address, CHAT, {"messages": HELLO})
        assert status == 503 and json.loads(body)["error"]["code"] == "draining" and headers["x-should-retry"] == "true"
        began = time.monotonic()
        reader.join(30)
        assert len(texts) == 1 and texts[0][-1]["choices"][0]["finish_reason"] == "length"
        assert router.wait(20) == 0 and time.monotonic() - began < 20  # nothing waited for the one that is gone
        assert "Traceback" not in router.log_text()


def test_a_stream_goes_on_after_its_connection_broke(cluster: LocalCluster) -> None:
    fields = {"max_tokens": 120, "temperature": 0, "seed": 9}
    whole = content(events_of(open_stream(cluster.gateways[0], **fields)))
    body = json.dumps({"messages": HELLO, "stream": True, "ignore_eos": True, "resume_grace_ms": 30_000} | fields)
    for lines_read in (2, 10, 40):
        connection = http.client.HTTPConnection(cluster.gateways[0], timeout=30)
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        seen, last = "", ""
        for _ in range(lines_read):
            line = answer.readline().decode()
            if line.startswith("id: "):
                last = line[4:].strip()
            elif line.startswith("data: "):
                seen += content([json.loads(line[6:])])
                number = last
        connection.close()
        answer.close()
        nobody = b"octavo_router_requests_parked 0.0"
        wait_until(lambda nobody=nobody: nobody not in ask(cluster.gateways[0], "/metrics", method="GET")[2])  # type: ignore[misc]
        status, _, rest = ask(cluster.gateways[0], CHAT, method="GET", last_event_id=number)
        assert status == 200
        chunks = [json.loads(line[6:]) for line in rest.decode().splitlines() if line.startswith("data: {")]
        assert seen + content(chunks) == whole
    wait_until(lambda: all_free(cluster))


def test_octavo_bench_measures_any_server_that_speaks_it(cluster: LocalCluster, tmp_path: Path) -> None:
    url, result = f"http://{cluster.gateways[0]}/v1", tmp_path / "result.json"
    shape = ["--requests", "6", "-c", "2", "--output-len", "9", "--json", str(result)]
    done = subprocess.run(
        [Path(sys.executable).parent / "octavo", "bench", "--openai", url, *shape],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(result.read_text())["results"]
    assert (figures["finished"], figures["failed"], figures["output_tokens"]) == (6, 0, 54)
    assert figures["ttft_ms"]["count"] == 6


def test_keys_and_tls(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("key-of-somebody-0123 team-a\nkey-of-the-admin-0123 ops admin\n")
    router = LEASE | {
        "api-keys": str(keys),
        "tls-cert": str(certificate),
        "tls-key": str(key),
        "tls-ca": str(certificate),
    }
    secure = {name: value for name, value in router.items() if name.startswith("tls")}
    flags: dict[str, dict[str, Any]] = {"scheduler": LEASE | secure, "worker": LEASE | secure, "router": router}
    with LocalCluster(redis=False, flags=flags) as cluster:
        trust = ssl.create_default_context(cafile=str(certificate))
        address = cluster.gateways[0]
        assert ask(address, "/health", method="GET", tls=trust)[0] == 200
        assert ask(address, CHAT, {"messages": HELLO}, tls=trust)[0] == 401
        mine, admin = "Bearer key-of-somebody-0123", "Bearer key-of-the-admin-0123"
        assert ask(address, CHAT, {"messages": HELLO, "max_tokens": 2}, tls=trust, authorization=mine)[0] == 200
        assert ask(address, "/metrics", method="GET", tls=trust, authorization=mine)[0] == 403
        assert ask(address, "/metrics", method="GET", tls=trust, authorization=admin)[0] == 200
        with pytest.raises((http.client.HTTPException, OSError)):  # plain text at a TLS port
            ask(address, "/health", method="GET")
        assert "key-of-" not in cluster.members["router-1"].log_text()


def test_strangers_are_not_served_without_keys() -> None:
    flags = {"router": {"http-listen": "0.0.0.0:0"}}
    with pytest.raises(Exception, match=r"--http-listen 0\.0\.0\.0:\d+ is reachable from other machines"):
        LocalCluster(redis=False, workers=0, flags=flags).__enter__()
