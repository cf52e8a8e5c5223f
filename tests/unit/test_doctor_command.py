"""What `octavo doctor` says of a cluster, and the whole examination: the client alone, a checkout, the command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from octavo.cli import doctor as command
from octavo.cli.main import app
from octavo.client.connection import Connection, ConnectionProblem
from octavo.doctor import ask_cluster, clock, gpu, host, redis_server
from octavo.doctor.cluster import Cluster, Model, Service, Worker, check_cluster
from octavo.doctor.examine import Probes, Wishes, examine
from octavo.doctor.findings import Finding, Ran, Section, State, note, ok, problem
from octavo.v1 import scheduler_pb2
from typer.testing import CliRunner

from deploy import doctor
from deploy.environment import ROOT
from tests.unit.client_fake_router import FakeRouter
from tests.unit.doctor_facts import GPU, HOST, make_model, only


def service(kind: str = "router", health: str = "SERVING", **fields: Any) -> Service:
    return Service(kind=kind, address="127.0.0.1:1", health=health, **fields)


WORKER = Worker(
    name="w", model="m", digest="aa", backend="mock", address="127.0.0.1:2", draining=False, running=0,
    blocks_used=0, blocks_total=8, health="SERVING",
)  # fmt: skip
SOUND = Cluster(
    expected=True,
    routers=(service(same_contracts=True),),
    schedulers=(service("scheduler"),),
    models=(Model(name="m", workers=1, ready=True),),
    workers=(WORKER,),
)


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({}, State.OK, "by the same contracts"),
        ({"routers": (service(same_contracts=False),)}, State.NOTE, "other contracts"),
        ({"routers": (service(health="NOT_SERVING"),)}, State.PROBLEM, "does not serve"),
        ({"routers": (service(health="UNAVAILABLE: refused"),)}, State.PROBLEM, "refused"),
        ({"routers": (service(refused="UNAUTHENTICATED: no key"),)}, State.PROBLEM, "refuses this client"),
        ({"workers": ()}, State.PROBLEM, "No worker is enlisted"),
        ({"workers": (dataclasses.replace(WORKER, draining=True),)}, State.NOTE, "draining"),
        ({"workers": (dataclasses.replace(WORKER, health="NOT_SERVING"),)}, State.PROBLEM, "does not serve"),
        ({"workers": (dataclasses.replace(WORKER, health="UNAVAILABLE: x"),)}, State.NOTE, "can't be asked from here"),
        ({"schedulers": (), "workers": ()}, State.NOTE, "containers' network"),
        ({"workers": (WORKER, dataclasses.replace(WORKER, digest="bb"))}, State.NOTE, "2 versions"),
        ({"models": (Model(name="m", workers=1, ready=False),)}, State.PROBLEM, "tokenizer"),
    ],
)
def test_clusters(changes: dict[str, Any], state: State, text: str) -> None:
    findings = check_cluster(dataclasses.replace(SOUND, **changes))
    odd = [finding for finding in findings if finding.state is not State.OK] or findings[:1]
    assert only(odd).state is state
    assert text in only(odd).found


def test_no_cluster() -> None:
    away = (service(health="UNAVAILABLE: refused"),)
    nowhere = Cluster(expected=False, routers=away, schedulers=away)
    assert only(check_cluster(nowhere)).state is State.OK
    assert only(check_cluster(dataclasses.replace(nowhere, expected=True))).state is State.PROBLEM
    # A scheduler that refuses to tell of its workers is not one without workers.
    refusing = dataclasses.replace(SOUND, schedulers=(service("scheduler", refused="UNAUTHENTICATED"),), workers=())
    assert [item.check for item in check_cluster(refusing) if item.state is State.PROBLEM] == ["scheduler"]


class HealthyRouter(FakeRouter):
    """The scripted router and scheduler, with health and reflection as the services have them."""

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server()
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        names = ("octavo.v1.InferenceService", "octavo.v1.SchedulerService", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server


def test_a_cluster_is_asked() -> None:
    status = scheduler_pb2.WorkerStatus(name="w0", model="m", model_digest=b"\xab", backend="mock", blocks_total=9)
    with HealthyRouter(workers=[status]) as router:
        status.address = router.address
        connection = Connection((router.address,))
        found = ask_cluster.read_cluster(connection, connection, expected=True)
        assert all(finding.state is State.OK for finding in check_cluster(found))
        (worker,) = found.workers
        assert (worker.name, worker.digest, worker.health, worker.blocks_total) == ("w0", "ab", "SERVING", 9)
        assert [item.same_contracts for item in (*found.routers, *found.schedulers)] == [True, True]
    found = ask_cluster.read_cluster(connection, connection, expected=True)
    assert only(check_cluster(found)).state is State.PROBLEM


def test_a_router_that_has_just_started_is_given_a_moment() -> None:
    with HealthyRouter(unready=3) as router:
        found = ask_cluster.read_cluster(Connection((router.address,)), None, expected=True)
    assert found.models == (Model(name="fake", workers=1, ready=True),)


def test_a_cluster_that_wants_a_key_and_one_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.SimpleNamespace(name=scheduler_pb2.DESCRIPTOR.name, serialized_pb=b"other")
    monkeypatch.setitem(ask_cluster._FILES, "scheduler", other)
    with HealthyRouter(token="sixteen characters") as router:
        connection = Connection((router.address,))
        found = ask_cluster.read_cluster(connection, connection, expected=True)
    assert found.schedulers[0].same_contracts is False
    assert "UNAUTHENTICATED" in found.routers[0].refused
    assert health_pb2.HealthCheckResponse(status=1).SerializeToString() in ask_cluster._HEALTH


def probes(**changes: Any) -> Probes:
    def ask() -> Cluster:
        return SOUND

    values: dict[str, Any] = {
        "ask": ask,
        "run": lambda argv, timeout, directory=None: Ran(0, "Redis server v=7 \n"),
        "facts": lambda: HOST,
        "disk": lambda what, path: host.Disk(what, path, 1 << 40, True),
        "time": lambda: clock.Clock(now=2e9, installed=1e9, synchronised=True),
        "gpus": lambda run: gpu.Gpus(),
        "listeners": list,
        "redis": lambda url: redis_server.Answer(version="7"),
        "installed": {"octavo": "0.1"}.get,
        "requires": lambda name: [],
        "environ": {"OCTAVO_CACHE": "/nowhere"},
    }
    return Probes(**values | changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def findings(sections: Sequence[Section], title: str) -> list[Finding]:
    return [finding for section in sections if section.title == title for finding in section.findings]


def test_the_client_alone_checks_what_it_can_and_says_what_not() -> None:
    def forbidden(name: str) -> Any:
        raise AssertionError(f"{name} belongs to a checkout")

    sections = examine(Wishes(model="mock"), probes(module=forbidden))
    assert [section.title for section in sections] == [
        "machine", "environment", "GPU", "network", "model", "cluster", "left out",
    ]  # fmt: skip
    assert all(finding.state is not State.PROBLEM for section in sections for finding in section.findings)
    assert "NVRTC" in only(findings(sections, "left out")).found


def test_in_a_checkout_everything_is_looked_at(model: Path) -> None:
    asked: list[Sequence[str]] = []

    def run(argv: Sequence[str], timeout: float, directory: Path | None = None) -> Ran:
        asked.append(argv)
        out = {"nvrtc": "13.0", "modules": 20, "cached": 20} if "kernels.check" in argv else "Redis server v=7"
        return Ran(0, json.dumps(out))

    pins = {item.name: item.specifiers[0][1] for name in ("local", "cuda") for item in doctor.read_requirements(
        doctor.REQUIREMENTS / f"{name}.txt"
    )}  # fmt: skip
    seen = probes(run=run, installed=pins.get, gpus=lambda run: gpu.Gpus(devices=(GPU, GPU)))
    sections = examine(Wishes(checkout=ROOT, model=str(model), redis="redis://there/0"), seen)
    compiled = [argv for argv in asked if "kernels.check" in argv]
    assert len(compiled) == 1 and "--all" in compiled[0] and "sm_90a" in compiled[0]
    assert {"config", "fits into memory", "fits into GPU 0"} <= {item.check for item in findings(sections, "model")}
    assert {"port 50051", "Redis", "clock of Redis"} <= {item.check for item in findings(sections, "network")}
    assert "kernels (sm_90a)" in {item.check for item in findings(sections, "GPU")}


def test_what_is_not_installed_is_left_out_by_name(model: Path) -> None:
    def no_versions() -> list[Finding]:
        raise ModuleNotFoundError(name="grpc_health")

    local = types.SimpleNamespace(**vars(doctor) | {"check_versions": no_versions})

    def module(name: str) -> Any:
        if name == "deploy.doctor_model":
            raise ModuleNotFoundError(name="numpy")
        return local if name == "deploy.doctor" else sys.modules[name]

    def no_redis(url: str) -> redis_server.Answer:
        raise ModuleNotFoundError(name="redis")

    def broken() -> Cluster:
        raise ConnectionProblem(".run/cluster.json: is no JSON")

    seen = probes(module=module, redis=no_redis, ask=broken)
    sections = examine(Wishes(checkout=ROOT, model=str(model), redis="redis://there/0"), seen)
    assert any("numpy is not installed" in item.found for item in findings(sections, "model"))
    assert any("redis is not installed" in item.found for item in findings(sections, "network"))
    cluster, versions = findings(sections, "cluster")
    assert cluster.state is State.PROBLEM and "cluster.json" in cluster.found
    assert versions.state is State.NOTE and "grpc_health is not installed" in versions.found


@pytest.mark.parametrize("told", [[], ["127.0.0.1:1"]])
def test_a_scheduler_inside_containers_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OCTAVO_ADDRESS", "OCTAVO_SCHEDULER", "OCTAVO_CLUSTER_TOKEN_FILE", "OCTAVO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    asked: list[Cluster] = []
    monkeypatch.setattr(command, "examine", lambda wishes, probes: asked.append(probes.ask()) or [])  # type: ignore[func-returns-value]
    (tmp_path / ".run").mkdir()
    with HealthyRouter() as router:
        (tmp_path / ".run" / "cluster.json").write_text(json.dumps({"router": [router.address], "scheduler": told}))
        assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 0
    assert [item.address for item in asked[0].schedulers] == told
    assert asked[0].expected and asked[0].routers[0].health == "SERVING"


@pytest.mark.parametrize(("last", "code"), [(note("c", "so", "x"), 0), (problem("c", "[bold]no[/]", "do: this"), 1)])
def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: Finding, code: int) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "examine", lambda wishes, probes: [Section("one", (ok("a", "fine"), last))])
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert shown.exit_code == code
    assert last.found in shown.stdout and f"→ {last.remedy}" in shown.stdout
    assert f"{code} problem{'s' * (1 - code)}, {1 - code} note" in shown.stdout
    document = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert (document["problems"], document["notes"]) == (code, 1 - code)
    assert document["findings"][1] == {"section": "one"} | dataclasses.asdict(last)


def test_the_wheel_alone_runs_it(tmp_path: Path) -> None:
    """Without torch, numpy, redis and a checkout; from the files that the wheel holds."""
    blocked = "import sys; [sys.modules.__setitem__(name, None) for name in ('torch', 'numpy', 'redis', 'deploy', 'worker')]; "
    program = blocked + "from octavo.cli.main import main; main()"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "protos"), str(ROOT / "client")))}
    arguments = ["doctor", "--json", "--model", "mock", "--address", "127.0.0.1:1", "--scheduler", "127.0.0.1:1"]
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1, ran.stderr
    document = json.loads(ran.stdout)
    assert {item["section"] for item in document["findings"]} >= {"machine", "GPU", "cluster", "left out"}
    assert [item["state"] for item in document["findings"] if item["section"] == "cluster"] == ["problem"]
