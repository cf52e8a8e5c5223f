"""Fixtures of tests that start real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.commands import redis_binary, redis_command
from deploy.member import Member
from deploy.readiness import wait_ready


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    """A Redis of this test's own, on a socket in a folder."""
    binary = redis_binary()
    assert binary is not None, "the test environment installs a redis-server"
    directory = tmp_path_factory.mktemp("r")
    command = redis_command(binary, directory)
    member = Member(command, directory / "redis.log", Path.cwd(), None)
    member.start()
    wait_ready([command], lambda _: member.death(), 30.0)
    member.served = True
    yield member
    member.kill()
