"""A cluster that has nothing to do is stopped: nothing about that is alarming."""

from __future__ import annotations

import re

import pytest
from octavo.client import Client

from deploy.cluster import LocalCluster

pytestmark = pytest.mark.xdist_group("redis")


def test_a_clean_stop_warns_of_nothing_and_nobody_dials_again() -> None:
    # Long leases: the machine may be busy, and nothing here is about deaths.
    lease = {"lease-ms": 5000}
    with LocalCluster(flags={"scheduler": lease, "router": lease, "worker": lease}) as cluster:
        with Client(cluster.routers[0]) as client:
            client.complete("x", max_tokens=8, regex="[ab]+")
        said = {}
        for name in ("router-1", "worker-1", "scheduler-1"):
            assert cluster.members[name].stop() == 0
            said[name] = cluster.members[name].log_text()
        assert not re.findall(r"^[-\d]+ [:,\d]+ [WEC] .*", "\n".join(said.values()), re.MULTILINE)
        assert said["scheduler-1"].count("router router-1 left") == 1
        assert "has ended" not in said["router-1"]
