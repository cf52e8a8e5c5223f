"""`make up`, `ps`, `worker`, `logs` and `down` as one types them, in a checkout whose services are stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.environment import ROOT
from service.probe import probe
from tests.integration.deploy_stand_ins import still_running, taken, write_stand_ins

# They look for the default ports: one at a time.
pytestmark = pytest.mark.xdist_group("deploy-local")


class Checkout:
    """A copy of what `make` runs, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("deploy", "service", "protos"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "client").mkdir()
        write_stand_ins(root)

    def run(self, *arguments: str, expect: int = 0) -> str:
        """`python -m deploy.local ARGUMENTS`; what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "deploy.local", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    @property
    def cluster_file(self) -> Path:
        return self.root / ".run" / "cluster.json"

    def ready(self, name: str) -> dict[str, object]:
        facts: dict[str, object] = json.loads((self.root / ".run" / "ready" / f"{name}.json").read_text())
        return facts

    def comes_back(self, name: str, before: dict[str, object]) -> dict[str, object]:
        """What a killed process's successor says of itself."""
        after, deadline = before, time.monotonic() + 30
        while after["pid"] == before["pid"]:
            assert time.monotonic() < deadline, self.run("ps")
            time.sleep(0.1)
            with contextlib.suppress(
                FileNotFoundError
            ):  # between the old process and the new one there is no ready file
                after = self.ready(name)
        return after

    def break_worker(self) -> None:
        """Workers end before they are ready."""
        (self.root / "worker" / "__main__.py").write_text("raise SystemExit('no weights here')")


@pytest.fixture
def checkout() -> Iterator[Checkout]:
    # Its path is short, as a Unix socket's must be, and holds a space, as paths of users may.
    root = Path(tempfile.mkdtemp(prefix="octavo "))
    made = Checkout(root)
    try:
        yield made
    finally:
        made.run("down")
        shutil.rmtree(root)


def test_a_day_in_the_life(checkout: Checkout) -> None:
    assert "No cluster runs here" in checkout.run("down")
    assert "No cluster runs here" in checkout.run("ps")
    assert "no cluster runs here" in checkout.run("worker", expect=1)

    said = checkout.run("up", "--model", "mock:tiny", "--workers", "2")
    facts = json.loads(checkout.cluster_file.read_text())
    router = facts["router"][0]
    assert facts["model"] == "tiny"
    assert facts["http"] and f"http://{facts['http'][0]}/v1" in said
    assert sorted(facts["metrics"]) == ["router-1", "scheduler-1", "worker-1", "worker-2"]
    assert router in said
    assert "grpcurl -plaintext" in said
    assert "octavo chat --model tiny" in said  # also right once another model is served beside it
    assert probe(router) == "SERVING"

    assert "runs here already" in checkout.run("up")
    assert "make worker MODEL=mock" in checkout.run("up", "--model", "mock")
    assert "make worker MODEL=nobody/nothing" in checkout.run("up", "--model", "nobody/nothing")  # nothing is fetched

    told = checkout.run("up", "--model", "mock:tiny", "--workers", "3", "--backend", "mock")
    assert "Nothing was changed: WORKERS=3 was asked for, 2 runs." in told
    assert "Nothing was changed" not in checkout.run("up", "--model", "mock:tiny", "--workers", "2")
    assert "BACKEND=foo" in checkout.run("up", "--backend", "foo", expect=1)

    assert "worker-3 serves tiny" in checkout.run("worker")
    table = checkout.run("ps")
    for name in ("redis", "scheduler-1", "router-1", "worker-1", "worker-2", "worker-3"):
        assert f"{name} " in table
    assert table.count("serving") == 5
    assert table.count(" running ") == 6 and " starting " not in table  # worker-3 began a moment ago
    log = checkout.run("logs", "--name", "worker-3", "--no-follow")
    assert '"--model", "mock:tiny"' in log
    assert "there are redis, router-1, scheduler-1, worker-1, " in checkout.run("logs", "--name", "router", expect=1)

    pids = [int(str(checkout.ready(name)["pid"])) for name in ("router-1", "scheduler-1", "worker-3")]
    assert "Stopped" in checkout.run("down")
    assert not checkout.cluster_file.exists()
    for pid in pids:  # not by its port, which another program may have by now
        assert not Path(f"/proc/{pid}").exists()
    assert "drained" in (checkout.root / ".run" / "logs" / "worker-3.log").read_text()
    kept = checkout.run("logs", "--name", "worker-3")  # nothing to follow: it ends
    assert "No cluster runs here" in kept and "drained" in kept


def test_taken_ports_are_passed_by_and_a_killed_process_comes_back(checkout: Checkout) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                taken.bind(("127.0.0.1", 50051))
                taken.listen(1)
                break
            except OSError:  # somebody looks whether it is free, in a moment, or has it, which serves as well
                time.sleep(0.1)
        checkout.run("up", "--model", "mock")
        facts = json.loads(checkout.cluster_file.read_text())
        assert facts["router"] != ["127.0.0.1:50051"]
    before = checkout.ready("router-1")
    os.kill(int(str(before["pid"])), signal.SIGKILL)
    assert checkout.comes_back("router-1", before)["address"] == before["address"]


def test_a_process_whose_port_was_taken_while_it_was_down_comes_back(checkout: Checkout) -> None:
    """Such ports lie among those that outgoing connections get; and a connection may last."""
    checkout.run("up", "--model", "mock")
    before = checkout.ready("scheduler-1")
    os.kill(int(str(before["pid"])), signal.SIGKILL)
    with taken(str(before["address"])):
        until = time.monotonic() + 30
        log = checkout.root / ".run" / "logs" / "scheduler-1.log"
        while "scheduler: --listen" not in log.read_text():  # the first try has ended
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
    assert checkout.comes_back("scheduler-1", before)["address"] == before["address"]


def test_a_process_that_dies_again_and_again_ends_the_start(checkout: Checkout) -> None:
    """It lives longer than what the process runner takes for a failed start, and is started again each time."""
    (checkout.root / "worker" / "__main__.py").write_text(
        "import sys, time\ntime.sleep(2)\nsys.exit('no weights here')"
    )
    said = checkout.run("up", "--model", "mock", expect=1)
    how = "it ended (with exit code 1|and was started again); "  # as one looks before supervisord starts it again, or after
    assert re.search(f"worker-1 does not stay up: {how}", said) and "no weights here" in said


def test_a_process_that_dies_at_the_start_ends_it_with_its_log(checkout: Checkout) -> None:
    checkout.break_worker()
    said = checkout.run("up", "--model", "mock", expect=1)
    assert "worker-1 does not stay up: it ended as soon as it was started; " in said and "BACKOFF" not in said
    assert "no weights here" in said
    assert "No cluster runs here" in checkout.run("ps")


def test_a_worker_that_fails_leaves_the_cluster_as_it_was(checkout: Checkout) -> None:
    checkout.run("up", "--model", "mock")
    router = json.loads(checkout.cluster_file.read_text())["router"][0]
    checkout.break_worker()
    assert "no weights here" in checkout.run("worker", expect=1)
    main = checkout.root / "worker" / "__main__.py"
    main.write_text("raise SystemExit('nor here')")
    said = checkout.run("worker", expect=1)
    assert "nor here" in said and "no weights here" not in said  # not what an earlier try had said
    assert "worker-2" not in checkout.run("ps")
    assert probe(router) == "SERVING"


def test_an_interrupted_start_is_cleaned_up_by_the_next(checkout: Checkout) -> None:
    checkout.run("up", "--model", "mock")
    checkout.cluster_file.unlink()  # as if make up had been killed before the end
    assert "stopping what is left" in checkout.run("up", "--model", "mock")
    assert checkout.cluster_file.exists()


def test_what_a_killed_supervisor_ran_ends_with_it(checkout: Checkout) -> None:
    checkout.run("up", "--model", "mock")
    supervisor = int((checkout.root / ".run" / "supervisord.pid").read_text())
    services = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    assert len(services) >= 3
    os.kill(supervisor, signal.SIGKILL)
    left = still_running(services, 30)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []
    assert "No cluster runs here" in checkout.run("ps")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--workers", "0"), "at least 1"),
        (("--workers", "abc"), "WORKERS=abc: a number is needed"),
        (("--runtime", "foo"), "RUNTIME=foo: must be one of"),
        (("--backend", "foo"), "BACKEND=foo: must be one of"),
        (("--quantization", "int4"), "QUANTIZATION=int4: must be one of"),
        (("--model", "mock", "--backend", "torch"), "MODEL=mock BACKEND=torch: a mock"),
        (("--model", "deploy"), "MODEL=deploy: holds no config.json"),
        (("--model", "/no/such/directory"), "no such directory"),
    ],
)
def test_what_cannot_be_started_is_said_in_a_sentence(
    checkout: Checkout, arguments: tuple[str, ...], text: str
) -> None:
    said = checkout.run("up", *arguments, expect=1)
    assert text in said
    assert "Traceback" not in said and "usage:" not in said
    assert not (checkout.root / ".run" / "supervisord.conf").exists()  # nothing was started before it was said


def test_bad_settings_in_the_environment_start_nothing(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEYS", "/no/such/keys")
    monkeypatch.setenv("OCTAVO_LEASE_MS", "many")
    assert "--lease-ms: 'many'" in checkout.run("up", "--model", "mock", expect=1)
    assert not (checkout.root / ".run" / "supervisord.conf").exists()


def test_a_reader_that_leaves_is_no_error(checkout: Checkout) -> None:
    """`make up | head -1`"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deploy.local", "up", "--model", "mock"],
            cwd=checkout.root,
            env={**os.environ, "PYTHONPATH": str(checkout.root)},
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.cluster_file.exists()
