"""A real grpcurl and a real `buf curl` against a real cluster (mock backend): what people type works as they expect."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo.client.connection import Connection
from octavo.doctor.ask_cluster import read_cluster
from octavo.doctor.cluster import check_cluster
from octavo.doctor.findings import State

from deploy.cluster import LocalCluster
from deploy.environment import ROOT

BIN = Path(sys.executable).parent
INFERENCE = "octavo.v1.InferenceService"
SCHEDULER = "octavo.v1.SchedulerService"
pytestmark = pytest.mark.xdist_group("deploy-tools")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(redis=False, model="mock") as running:
        yield running


def call(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def grpcurl(*arguments: object) -> str:
    """Output of a call that must succeed."""
    done = call("grpcurl", "-plaintext", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def messages(text: str) -> list[dict[str, Any]]:
    """The JSON objects that a stream prints one after the other."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        value, end = decoder.raw_decode(text, at)
        found.append(value)
        at = end + (len(text[end:]) - len(text[end:].lstrip()))
    return found


def request(**more: Any) -> dict[str, Any]:
    return {"model": "mock", "text": "Hello", "sampling": {"temperature": 0, "max_tokens": 5}} | more


def test_every_service_lists_describes_and_answers_health(cluster: LocalCluster) -> None:
    services = {
        INFERENCE: cluster.routers[0],
        SCHEDULER: cluster.schedulers[0],
        "octavo.v1.WorkerService": cluster.addresses("worker")[0],
    }
    for service, address in services.items():
        assert service in grpcurl(address, "list").split()
        assert f"service {service.rpartition('.')[2]} {{" in grpcurl(address, "describe", service)
        for name in ("", service):
            health = grpcurl("-d", json.dumps({"service": name}), address, "grpc.health.v1.Health/Check")
            assert json.loads(health) == {"status": "SERVING"}


def test_generate_streams_and_complete_gives_the_same_text(cluster: LocalCluster) -> None:
    router = cluster.routers[0]
    body = json.dumps(request())
    stream = messages(grpcurl("-d", body, router, f"{INFERENCE}/Generate"))
    assert "started" in stream[0]
    assert stream[-1]["finished"]["finish_reason"] == "FINISH_REASON_LENGTH"
    deltas = [message["delta"] for message in stream if "delta" in message]
    assert sum(len(delta.get("token_ids", [])) for delta in deltas) == 5
    text = "".join(delta.get("text", "") for delta in deltas)

    complete = json.dumps({"request": request()})
    answer = json.loads(grpcurl("-d", complete, router, f"{INFERENCE}/Complete"))
    assert text
    assert text in json.dumps(answer, ensure_ascii=False) or json.dumps(text)[1:-1] in json.dumps(answer)


def test_a_chat_is_accepted_as_the_readme_and_make_up_write_it(cluster: LocalCluster) -> None:
    chat = {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}
    body = {"model": "mock", "chat": chat, "sampling": {"max_tokens": 2}}
    stream = messages(grpcurl("-d", json.dumps(body), cluster.routers[0], f"{INFERENCE}/Generate"))
    assert "finished" in stream[-1]


def test_inspect_shows_the_queue_and_the_worker(cluster: LocalCluster) -> None:
    done = call(
        *("grpcurl", "-plaintext", "-max-time", "2", "-d", '{"max_hz": 10}'),
        *(cluster.schedulers[0], f"{SCHEDULER}/Inspect"),
    )
    assert "DeadlineExceeded" in done.stderr  # it streams until told to stop
    first = messages(done.stdout[: done.stdout.rindex("}") + 1])[0]
    assert first["full"]
    assert [worker["status"]["model"] for worker in first["workers"]] == ["mock"]


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ({"model": "no-such-model"}, "NotFound", "MODEL_UNKNOWN"),
        ({"sampling": {"temperature": -1}}, "InvalidArgument", "INVALID_ARGUMENT"),
        ({"text": "word " * 20_000}, "InvalidArgument", "PROMPT_TOO_LONG"),
        ({"resume": {"ticket": "bm8gdGlja2V0"}}, "InvalidArgument", "TICKET_INVALID"),
    ],
)
def test_errors_carry_their_code_and_reason(
    cluster: LocalCluster, body: dict[str, Any], code: str, reason: str
) -> None:
    done = subprocess.run(
        [str(BIN / "grpcurl"), "-plaintext", "-d", "@", cluster.routers[0], f"{INFERENCE}/Generate"],
        input=json.dumps(request(**body)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"Code: {code}" in done.stderr
    assert reason in done.stderr


def test_buf_curl_calls_over_grpc(cluster: LocalCluster) -> None:
    base = ("curl", "--protocol", "grpc", "--http2-prior-knowledge")
    router = f"http://{cluster.routers[0]}"
    listed = call("buf", *base, "--list-methods", router)
    assert f"{INFERENCE}/Generate" in listed.stdout.split(), listed.stderr
    done = call("buf", *base, "--data", json.dumps(request()), f"{router}/{INFERENCE}/Generate")
    assert done.returncode == 0, done.stderr
    assert messages(done.stdout)[-1]["finished"]["finishReason"] == "FINISH_REASON_LENGTH"
    unknown = json.dumps(request(model="no-such-model"))
    done = call("buf", *base, "--data", unknown, f"{router}/{INFERENCE}/Generate")
    assert done.returncode != 0
    assert json.loads(done.stderr)["code"] == "not_found"


def test_the_doctor_tells_a_sound_cluster_from_one_whose_scheduler_is_away(cluster: LocalCluster) -> None:
    routers, schedulers = Connection(tuple(cluster.routers)), Connection(tuple(cluster.schedulers))
    found = check_cluster(read_cluster(routers, schedulers, expected=True))
    assert [(item.check, item.state) for item in found] == [
        (check, State.OK) for check in ("router", "scheduler", "worker", "model served")
    ]
    assert all("same contracts" in item.found for item in found[:2])
    elsewhere = Connection(("127.0.0.1:1",))
    (scheduler,) = [
        item for item in check_cluster(read_cluster(routers, elsewhere, expected=True)) if item.state is State.PROBLEM
    ]
    assert scheduler.check == "scheduler"
