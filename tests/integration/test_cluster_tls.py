"""A cluster that speaks TLS with a token, and its clients."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.cluster import LocalCluster
from service.probe import probe

BIN = Path(sys.executable).parent

pytestmark = pytest.mark.xdist_group("cluster")


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "octavo test")])
    today = datetime.datetime.now(datetime.UTC)
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(today - datetime.timedelta(days=1)).not_valid_after(
        today + datetime.timedelta(days=1)
    )
    certificate = builder.add_extension(addresses, critical=False).sign(key, hashes.SHA256())
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return paths


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
