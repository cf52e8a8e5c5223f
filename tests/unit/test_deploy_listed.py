"""A cluster is ready once its routers list the models of its workers, not a moment before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deploy.commands import service_command
from deploy.listed import Door, lists_all, models_of, wait_listed
from deploy.readiness import ClusterError, ProcessDied
from tests.unit.client_fake_router import FakeRouter


def test_a_router_without_the_tokenizer_is_waited_for() -> None:
    with FakeRouter(unready=3) as router:
        wait_listed([Door(address=router.address)], {"fake"}, 30.0)
        assert len(router.unary) == 3  # the first two times it could not serve it yet


def test_what_no_router_lists_ends_the_wait(tmp_path: Path) -> None:
    with FakeRouter() as router:
        door = Door(address=router.address)
        assert lists_all(door, {"fake"}) and not lists_all(door, {"fake", "other"})
        with pytest.raises(ClusterError, match="does not list other"):
            wait_listed([door], {"other"}, 0.0)
        with pytest.raises(ProcessDied, match="worker-1 ended"):
            wait_listed([door], {"other"}, 30.0, lambda: ProcessDied("worker-1", "ended", tmp_path / "log"))
    assert not lists_all(door, {"fake"})  # it has ended
    wait_listed([door], set(), 0.0)  # where no worker is, nothing is expected


def test_a_router_is_asked_with_its_secret_and_one_that_tells_us_nothing_counts(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# comment\n\nsecret-of-sixteen-letters tenant\n")
    with FakeRouter(token="secret-of-sixteen-letters") as router:
        ready = {"service": "router", "name": "r", "address": router.address, "metrics": "m", "pid": os.getpid()}
        command = service_command("router", "router-1", tmp_path, {"api-keys": keys})
        assert command.ready_file is not None
        with pytest.raises(ClusterError, match="router-1 has just ended"):
            Door.of(command)
        command.ready_file.parent.mkdir()
        command.ready_file.write_text(json.dumps(ready | {"incarnation": 1}))
        assert lists_all(Door.of(command), {"fake"}) and not lists_all(Door.of(command), {"other"})
        listed = "secret-of-sixteen-letters tenant, another-of-sixteen-letters tenant"
        for environ in ({"OCTAVO_API_KEYS": str(keys)}, {"OCTAVO_API_KEY_LIST": listed}):
            door = Door.at(router.address, environ)
            assert lists_all(door, {"fake"}) and not lists_all(door, {"other"})
        assert lists_all(Door(address=router.address), {"other"})  # it serves, which is all we may know


def test_what_workers_serve_is_in_their_ready_files(tmp_path: Path) -> None:
    command = service_command("worker", "worker-1", tmp_path, {})
    assert models_of([command]) == set()
    assert command.ready_file is not None
    command.ready_file.parent.mkdir()
    facts = {"service": "worker", "name": "w", "address": "a", "metrics": "m", "pid": os.getpid(), "incarnation": 1}
    command.ready_file.write_text(json.dumps(facts | {"model": "m"}))
    assert models_of([command]) == {"m"}
