"""A cluster that speaks TLS with a token, and its clients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cluster import LocalCluster
from service.probe import probe
from tests.integration.certificates import write_certificate

BIN = Path(sys.executable).parent

pytestmark = pytest.mark.xdist_group("cluster")


def test_services_and_clients_speak_tls(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    token = tmp_path / "token"
    token.write_text("a-secret-of-enough-characters\n")
    secure = {
        "tls-cert": str(certificate),
        "tls-key": str(key),
        "tls-ca": str(certificate),
        "cluster-token-file": str(token),
    }
    trust, credentials = ["--tls-ca", str(certificate)], ["--token-file", str(token)]
    with LocalCluster(redis=True, flags=dict.fromkeys(("scheduler", "worker", "router"), secure)) as cluster:
        (router,), (scheduler,) = cluster.routers, cluster.schedulers

        def octavo(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([BIN / "octavo", *arguments], capture_output=True, text=True, timeout=60, check=False)

        generate = ["generate", "--address", router, "--max-tokens", "3", "hello"]
        done = octavo(*generate, *trust, *credentials)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
        assert "UNAUTHENTICATED" in octavo(*generate, *trust).stderr
        assert "UNAVAILABLE" in octavo(*generate, *credentials).stderr
        assert octavo("inspect", "--once", "--scheduler", scheduler, *trust, *credentials).returncode == 0
        assert probe(router, tls_ca=certificate) == "SERVING"
        assert probe(router).startswith("UNAVAILABLE")
        for member in cluster.members.values():
            assert "a-secret" not in member.log_text()
