"""Command lines, environments, ports, Redis and models of the local cluster."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from deploy import local, plan
from deploy.commands import Command, is_mock, redis_command, service_command, visible_gpus, worker_env
from deploy.memory import promised_bytes
from deploy.model import Model, resolve
from deploy.ports import NoFreePort, free_address, is_free
from deploy.readiness import ClusterError, read_ready, tail
from deploy.state import Cluster
from deploy.supervise import Supervisor
from deploy.wanted import Wanted
from service.memory import own_bytes
from service.settings import parse
from worker.settings import WorkerSettings


def test_flags_become_arguments(tmp_path: Path) -> None:
    flags = {"listen": "127.0.0.1:0", "max_rows": 8, "redis": None, "scheduler": ["a:1", "b:2"]}
    command = service_command("worker", "worker-1", tmp_path, flags, {"X": "1"})
    assert command.argv == (
        *(sys.executable, "-m", "worker", "--name", "worker-1"),
        *("--ready-file", str(tmp_path / "ready" / "worker-1.json")),
        *("--listen", "127.0.0.1:0", "--max-rows", "8", "--scheduler", "a:1", "--scheduler", "b:2"),
    )
    assert command.env["X"] == "1"


def test_no_variable_gives_all_processes_one_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {
        "OCTAVO_LISTEN": "127.0.0.1:7777",
        "OCTAVO_ADVERTISE": "127.0.0.1:7778",
        "OCTAVO_REDIS": "redis://elsewhere",
        "OCTAVO_MAX_ROWS": "8",
    }
    added = service_command("worker", "worker-2", tmp_path, {"scheduler": "a:1"}, dict(environ))  # as make worker does
    for command in (service_command("worker", "worker-1", tmp_path, {"scheduler": "a:1"}), added):
        settings = parse(WorkerSettings, "worker", command.argv[3:], {**environ, **command.env})
        assert (settings.listen, settings.advertise, settings.redis) == ("127.0.0.1:0", None, None)
        assert settings.max_rows == 8


def test_redis_listens_on_a_socket_unless_told_otherwise(tmp_path: Path) -> None:
    assert redis_command(Path("r"), tmp_path).address == f"unix://{tmp_path}/redis.sock"
    tcp = redis_command(Path("r"), tmp_path, "127.0.0.1:7000")
    assert tcp.address == "redis://127.0.0.1:7000/0"
    assert "--bind 127.0.0.1 --port 7000" in " ".join(tcp.argv)


@pytest.mark.parametrize(
    ("value", "gpus"), [("0,1", ("0", "1")), ("", ()), ("-1", ()), ("GPU-abc, 3", ("GPU-abc", "3"))]
)
def test_gpus_are_those_the_environment_allows(value: str, gpus: tuple[str, ...]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == gpus


def test_workers_go_round_over_the_gpus() -> None:
    given = [worker_env(number, ("4", "7"), None)["CUDA_VISIBLE_DEVICES"] for number in (1, 2, 3)]
    assert given == ["4", "7", "4"]
    assert worker_env(1, ("4",), "mock") == {}
    assert worker_env(1, (), None) == {}


def test_a_taken_port_is_passed_by() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        chosen: set[str] = set()
        found = free_address(f"127.0.0.1:{port}", chosen)
        assert int(found.rpartition(":")[2]) > port
        assert chosen == {found}
        assert free_address(found, chosen) != found
        with pytest.raises(NoFreePort):
            free_address(f"127.0.0.1:{port}", set(), tries=1)


def test_a_mock_is_a_model_by_name() -> None:
    assert resolve("mock") == Model("mock", "mock", None, "mock")
    assert resolve("mock:tiny") == Model("mock:tiny", "tiny", None, "mock")
    assert resolve("mock:tiny", "other").name == "other"
    assert is_mock("mock:a")
    assert not is_mock("mockingbird")


def test_a_directory_is_a_model_and_a_missing_one_is_said(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == Model(str(tmp_path), tmp_path.name, tmp_path.name, None)
    with pytest.raises(ClusterError, match="no such directory"):
        resolve(str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="neither a directory"):
        resolve("no-such-alias")


def test_a_ready_file_of_a_dead_process_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    text = '{"service": "s", "name": "n", "address": "a", "metrics": "m", "pid": PID, "incarnation": 7}'
    assert read_ready(path) is None
    path.write_text(text.replace("PID", str(os.getpid())))
    ready = read_ready(path)
    assert ready is not None
    assert ready.incarnation == 7
    path.write_text(text.replace("PID", "4194305"))  # above the kernel's largest pid
    assert read_ready(path) is None


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == "(no log)"
    log.write_text("")
    assert tail(log) == "(empty)"
    log.write_bytes(b"x" * 100_000 + b"\n" + b"".join(b"%d \xff\n" % number for number in range(50)))
    assert tail(log, 2) == "48 \ufffd\n49 \ufffd"


@pytest.fixture
def no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "redis_binary", lambda: None)
    monkeypatch.setattr(plan, "worker_gpus", lambda backend: ())


def test_without_redis_addresses_are_fixed_and_it_is_said(
    no_redis: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {command.name: command for command in plan.plan(resolve("mock"), 2, tmp_path)}
    assert list(commands) == ["scheduler-1", "worker-1", "worker-2", "router-1"]
    assert "no redis-server" in capsys.readouterr().out
    scheduler = commands["scheduler-1"].argv
    address = scheduler[scheduler.index("--listen") + 1]
    assert "--scheduler" not in scheduler
    for name in ("worker-1", "worker-2", "router-1"):
        argv = commands[name].argv
        assert argv[argv.index("--scheduler") + 1] == address
    metrics = [command.argv[command.argv.index("--metrics") + 1] for command in commands.values()]
    assert len(set(metrics)) == 4


def test_workers_on_one_cpu_share_its_cores(no_redis: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    one, two = (plan.plan(resolve("mock"), workers, tmp_path) for workers in (1, 2))
    assert all("--threads" not in command.argv for command in one)
    shares = [c.argv[c.argv.index("--threads") + 1] for c in two if c.service == "worker"]
    assert shares == ["4", "4"]


def test_workers_that_start_together_share_the_memory(
    no_redis: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fractions(workers: int) -> list[str | None]:
        commands = plan.plan(resolve(str(tmp_path)), workers, tmp_path)
        argvs = [command.argv for command in commands if command.service == "worker"]
        return [argv[argv.index("--memory-fraction") + 1] if "--memory-fraction" in argv else None for argv in argvs]

    assert fractions(1) == [None]
    assert fractions(2) == ["0.45", "0.45"]
    assert sum(map(float, map(str, fractions(7)))) <= 0.9
    monkeypatch.setenv("OCTAVO_MEMORY_FRACTION", "0.6")
    assert fractions(2) == ["0.3", "0.3"]
    monkeypatch.setattr(plan, "worker_gpus", lambda backend: ("0", "1"))
    assert fractions(2) == [None, None]
    assert fractions(3) == ["0.3"] * 3  # two of them on one GPU


def test_what_running_workers_may_still_take_is_promised(tmp_path: Path) -> None:
    facts = {"service": "worker", "name": "n", "address": "a", "metrics": "m", "incarnation": 7}
    holds = own_bytes()
    assert holds > 1 << 20
    for name, pid, may_reach in (("one", os.getpid(), holds + (5 << 30)), ("dead", 4194305, 9 << 30)):
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | {"pid": pid, "may_reach_bytes": may_reach}))
    (tmp_path / "all taken.json").write_text(json.dumps(facts | {"pid": os.getpid(), "may_reach_bytes": 1}))
    assert 4 << 30 < promised_bytes(tmp_path) < 6 << 30


def test_quantization_reaches_each_worker(no_redis: None, tmp_path: Path) -> None:
    commands = plan.plan(resolve(str(tmp_path)), 2, tmp_path, "int8")
    for command in commands:
        given = command.argv[command.argv.index("--quantization") + 1] if "--quantization" in command.argv else None
        assert given == ("int8" if command.service == "worker" else None)


@pytest.mark.parametrize(
    ("running", "asked", "model", "expected"),
    [
        (None, None, None, ("none", "m")),
        ("int8", None, None, ("int8", "m")),  # as the others, or the scheduler would not admit it
        (None, "int8", None, ("int8", "m-int8")),  # beside the others
        ("int8", "none", None, ("none", "m-unquantized")),
        ("int8", None, "mock:other", (None, "other")),
    ],
)
def test_a_worker_is_added_as_the_others_or_by_another_name(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    running: str | None,
    asked: str | None,
    model: str | None,
    expected: tuple[str | None, str],
) -> None:
    cluster = Cluster(
        router=("r",), scheduler=("s",), redis=None, model="m", model_argument=str(tmp_path), quantization=running
    )
    added: list[Command] = []

    class FakeSupervisor:
        def __init__(self, directory: Path) -> None:
            pass

        def is_running(self) -> bool:
            return True

        def states(self) -> dict[str, str]:
            return {"worker-1": "RUNNING"}

        def add(self, command: Command) -> None:
            added.append(command)

    monkeypatch.setattr(local, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(local, "worker_gpus", lambda backend: ())
    monkeypatch.setattr(local, "promised_bytes", lambda ready: 7)
    monkeypatch.setattr(local, "describe", lambda *a: cluster)
    monkeypatch.setattr(local.state, "read", lambda: cluster)
    monkeypatch.setattr(local.state, "write", lambda cluster: None)
    monkeypatch.setattr(local.show, "wait", lambda *a: None)
    assert local.add_worker(Wanted(model=model, quantization=asked), 1.0) == 0
    argv = added[0].argv
    quantization = argv[argv.index("--quantization") + 1] if "--quantization" in argv else None
    name = argv[argv.index("--served-name") + 1] if "--served-name" in argv else "other"
    assert (quantization, name) == expected
    assert ("--promised-bytes 7" in " ".join(argv)) == (model is None)  # a mock takes no memory


@pytest.mark.parametrize(("name", "text"), [("a" * 100, "too long"), ("100%", "percent")])
def test_a_path_the_process_runner_cannot_take_is_said_before_anything_is_written(
    tmp_path: Path, name: str, text: str
) -> None:
    # A relative path keeps the short case short wherever the tests run.
    directory = Path(name) if text == "percent" else tmp_path / name
    with pytest.raises(ClusterError, match=text):
        Supervisor(directory).launch([])
    assert not directory.exists()
