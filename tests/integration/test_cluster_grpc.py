"""A real cluster as strangers see it: grpcurl and buf over reflection, every method once, and each error with its reason."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

from deploy.cluster import LocalCluster
from service.errors import OctavoError, Reason, from_rpc_error

BIN = Path(sys.executable).parent
INFERENCE = "octavo.v1.InferenceService"
SCHEDULER = "octavo.v1.SchedulerService"
CODES = {code.value[0]: code.name for code in grpc.StatusCode}

pytestmark = pytest.mark.xdist_group("cluster")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    flags = {
        "scheduler": {"lease-ms": 2000, "max-waiting": 3},
        "worker": {"max-model-len": 256, "max-rows": 2, "mock-step-ms": 10},
    }
    with LocalCluster(redis=True, flags=flags) as cluster:
        yield cluster


def grpcurl(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [BIN / "grpcurl", "-plaintext", "-max-time", "30", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def call(address: str, method: str, **request: Any) -> list[dict[str, Any]]:
    """The answers of a method, decoded from grpcurl's JSON documents."""
    text = grpcurl("-d", json.dumps(request), address, method).stdout
    decoder, answers, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        answer, end = decoder.raw_decode(text, at)
        answers.append(answer)
        at = end + 1
    return answers


def error_of(address: str, method: str, *flags: str, **request: Any) -> tuple[str, str, list[dict[str, Any]]]:
    """Code, ErrorInfo reason and details of a call that must fail."""
    done = grpcurl(*flags, "-format-error", "-d", json.dumps(request), address, method, check=False)
    assert done.returncode != 0, done.stdout
    status = json.loads(done.stderr[done.stderr.index("{") :])
    details = status.get("details", [])
    reason = next((d["reason"] for d in details if d["@type"].endswith("ErrorInfo")), "")
    return CODES[status["code"]], reason, details


def test_reflection_lists_and_describes_every_service(cluster: LocalCluster) -> None:
    worker = call(cluster.schedulers[0], f"{SCHEDULER}/ListWorkers")[0]["workers"][0]["address"]
    for address, service in (
        (cluster.routers[0], INFERENCE),
        (cluster.schedulers[0], SCHEDULER),
        (worker, "octavo.v1.WorkerService"),
    ):
        assert service in grpcurl(address, "list").stdout.split()
        assert "service" in grpcurl(address, "describe", service).stdout
        health = call(address, "grpc.health.v1.Health/Check", service=service)
        assert health == [{"status": "SERVING"}]
    assert call(worker, "octavo.v1.WorkerService/GetInfo")[0]["hello"]["model"] == "mock"


def test_generate_streams_started_deltas_finished(cluster: LocalCluster) -> None:
    request = {"model": "mock", "text": "hello", "sampling": {"max_tokens": 5, "temperature": 0}}
    events = call(cluster.routers[0], f"{INFERENCE}/Generate", **request)
    assert "started" in events[0]
    assert "finished" in events[-1]
    assert events[-1]["finished"]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert events[-1]["finished"]["usage"] == {"prompt_tokens": 5, "completion_tokens": 5}
    text = "".join(event["delta"]["text"] for event in events if "delta" in event)
    (complete,) = call(cluster.routers[0], f"{INFERENCE}/Complete", request=request)
    assert complete["outputs"][0]["text"] == text
    assert len(complete["outputs"][0]["token_ids"]) == 5


def test_tokenize_detokenize_models_and_assets(cluster: LocalCluster) -> None:
    router = cluster.routers[0]
    (tokens,) = call(router, f"{INFERENCE}/Tokenize", model="mock", text="héllo")
    (text,) = call(router, f"{INFERENCE}/Detokenize", model="mock", token_ids=tokens["token_ids"])
    assert text["text"] == "héllo"
    (models,) = call(router, f"{INFERENCE}/ListModels")
    assert [(m["name"], m["max_model_len"], m["ready"]) for m in models["models"]] == [("mock", 256, True)]
    names = [a["chunk"].get("name") for a in call(router, f"{INFERENCE}/GetModelAssets", model="mock")]
    assert "tokenizer.json" in names


def test_inspect_shows_queue_workers_and_counters(cluster: LocalCluster) -> None:
    call(
        cluster.routers[0],
        f"{INFERENCE}/Complete",
        request={"model": "mock", "text": "x", "sampling": {"max_tokens": 1}},
    )
    (view,) = call(cluster.schedulers[0], f"{SCHEDULER}/Inspect", once=True, rows=True)
    assert view["full"] is True
    assert view["workers"][0]["status"]["blocks_total"] > 0
    assert int(view["queue"]["counters"]["submitted"]) > 0


def test_buf_curl_speaks_to_it_too(cluster: LocalCluster) -> None:
    url = f"http://{cluster.routers[0]}/{INFERENCE}/Complete"
    request = {"request": {"model": "mock", "text": "hello", "sampling": {"maxTokens": 3}}}
    done = subprocess.run(
        [BIN / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(request), url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["outputs"][0]["tokenIds"]) == 3


@pytest.mark.parametrize(
    ("request_fields", "code", "reason", "field"),
    [
        ({"text": "x", "sampling": {"top_p": 2}}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "sampling.top_p"),
        ({"text": "x", "sampling": {"n": 100}}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "sampling.n"),
        ({}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "input"),
        ({"token_ids": {"ids": [40000]}}, "INVALID_ARGUMENT", "INVALID_ARGUMENT", "token_ids"),
        ({"text": "x" * 300}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", None),
        ({"model": "other", "text": "x"}, "NOT_FOUND", "MODEL_UNKNOWN", None),
        ({"text": "x", "grammar": {"regex": "a(("}}, "INVALID_ARGUMENT", "GRAMMAR_INVALID", "grammar.regex"),
        ({"text": "x", "adapter": "a"}, "UNIMPLEMENTED", "UNSUPPORTED", None),
        ({"text": "x", "resume": {"ticket": "AAAA"}}, "INVALID_ARGUMENT", "TICKET_INVALID", None),
    ],
)
def test_each_wrong_request_names_its_reason(
    cluster: LocalCluster, request_fields: dict[str, Any], code: str, reason: str, field: str | None
) -> None:
    found_code, found_reason, details = error_of(
        cluster.routers[0], f"{INFERENCE}/Generate", **({"model": "mock"} | request_fields)
    )
    assert (found_code, found_reason) == (code, reason)
    if field is not None:
        violations = next(d["field_violations"] for d in details if d["@type"].endswith("BadRequest"))
        assert any(violation["field"].startswith(field) for violation in violations), violations


def test_an_unknown_worker_cannot_be_drained(cluster: LocalCluster) -> None:
    code, reason, _ = error_of(cluster.schedulers[0], f"{SCHEDULER}/DrainWorker", incarnation=1)
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


def test_metrics_are_served(cluster: LocalCluster) -> None:
    for name, member in cluster.members.items():
        if member.command.ready_file is None:
            continue
        address = json.loads(member.command.ready_file.read_text())["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert f"octavo_{name.split('-')[0]}" in text


def stream(channel: grpc.Channel, **fields: Any) -> Any:
    """A Generate call of 200 tokens, started."""
    request = inference_pb2.GenerateRequest(
        model="mock", text="hi", sampling=inference_pb2.SamplingParams(max_tokens=200), **fields
    )
    return inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=30)


def drain(call: Any) -> None:
    for _ in call:
        pass


def reason_of(error: grpc.RpcError) -> tuple[str, OctavoError | None]:
    return error.code().name, from_rpc_error(error)  # type: ignore[attr-defined]


def test_a_full_queue_is_said_at_once_with_a_time_to_come_again(cluster: LocalCluster) -> None:
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        calls = [stream(channel) for _ in range(10)]  # two run, three wait
        found = []
        for call in calls:
            try:
                next(call)
                while cluster_is_busy(call):
                    pass
            except grpc.RpcError as error:
                found.append(reason_of(error))
            call.cancel()
        come_again(channel)  # who does when told is served; and what follows finds room
    assert found, "nobody was refused"
    for code, error in found:
        assert code == "RESOURCE_EXHAUSTED"
        assert error is not None
        assert error.reason is Reason.QUEUE_FULL
        assert error.retry_after_ms > 0


def come_again(channel: grpc.Channel) -> None:
    """Ask until there is room."""
    until = time.monotonic() + 10
    while True:
        try:
            next(stream(channel))
            return
        except grpc.RpcError as error:
            _, told = reason_of(error)
            assert told is not None and told.reason is Reason.QUEUE_FULL and time.monotonic() < until
            time.sleep(told.retry_after_ms / 1e3)


def cluster_is_busy(call: Any) -> bool:
    """Reads one message; False once text has come."""
    return not next(call).HasField("delta")


def test_a_deadline_ends_the_request_everywhere(cluster: LocalCluster) -> None:
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        request = inference_pb2.GenerateRequest(
            model="mock", text="hi", sampling=inference_pb2.SamplingParams(max_tokens=200)
        )
        with pytest.raises(grpc.RpcError) as caught:
            drain(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert_all_free(cluster)


def test_an_idempotency_key_runs_once(cluster: LocalCluster) -> None:
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        first = stream(channel, idempotency_key="k")
        next(first)
        with pytest.raises(grpc.RpcError) as caught:
            drain(stream(channel, idempotency_key="k"))
        first.cancel()
    code, error = reason_of(caught.value)
    assert code == "ALREADY_EXISTS"
    assert error is not None
    assert error.reason is Reason.DUPLICATE_REQUEST


def test_a_hang_up_frees_everything_within_a_second(cluster: LocalCluster) -> None:
    with grpc.insecure_channel(cluster.routers[0]) as channel:
        for _ in range(2):
            call = stream(channel)
            while cluster_is_busy(call):
                pass
            call.cancel()
    assert_all_free(cluster)


def assert_all_free(cluster: LocalCluster) -> None:
    """No request runs and no block is owned, soon."""
    with grpc.insecure_channel(cluster.schedulers[0]) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        until = time.monotonic() + 5
        while True:
            (worker,) = stub.ListWorkers(scheduler_pb2.ListWorkersRequest()).workers
            if worker.running == 0 and worker.blocks_used == 0:
                return
            assert time.monotonic() < until, worker
            time.sleep(0.05)


def test_without_a_worker_the_answer_comes_at_once(tmp_path: Path) -> None:
    with LocalCluster(redis=False, workers=0) as cluster:
        code, reason, _ = error_of(cluster.routers[0], f"{INFERENCE}/Generate", model="mock", text="x")
    assert (code, reason) == ("UNAVAILABLE", "NO_WORKER")


def test_with_a_token_every_method_but_health_needs_it(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-secret-of-enough-characters\n")
    flags = {name: {"cluster-token-file": str(token)} for name in ("scheduler", "worker", "router")}
    with LocalCluster(redis=False, flags=flags) as cluster:
        for address, stub, request in (
            (cluster.routers[0], inference_pb2_grpc.InferenceServiceStub, inference_pb2.ListModelsRequest()),
            (cluster.schedulers[0], scheduler_pb2_grpc.SchedulerServiceStub, scheduler_pb2.ListWorkersRequest()),
        ):
            method = f"{INFERENCE}/ListModels" if address in cluster.routers else f"{SCHEDULER}/ListWorkers"
            bearer = "authorization: Bearer a-secret-of-enough-characters"
            assert grpcurl("-H", bearer, "-d", "{}", address, method).returncode == 0
            with grpc.insecure_channel(address) as channel:
                for metadata in ((), (("authorization", "Bearer wrong"),)):
                    with pytest.raises(grpc.RpcError) as caught:
                        getattr(stub(channel), method.rpartition("/")[2])(request, metadata=metadata, timeout=10)
                    code, error = reason_of(caught.value)
                    assert (code, error and error.reason) == ("UNAUTHENTICATED", Reason.UNAUTHENTICATED)
            with grpc.insecure_channel(address) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert check.status == health_pb2.HealthCheckResponse.SERVING
