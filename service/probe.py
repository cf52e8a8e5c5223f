"""Asks a process whether it serves: `python -m service.probe HOST:PORT [SERVICE]`; exit code 0 means it does.

Health checks are open to everyone, so no cluster token is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2


def direct_channel(address: str, tls_ca: Path | None = None) -> grpc.Channel:
    """A channel for a question or two: not answered by a connection that an earlier one left behind, nor through a proxy."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    if tls_ca is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(tls_ca.read_bytes()), options=options)


def probe(address: str, service: str = "", timeout: float = 2.0, tls_ca: Path | None = None) -> str:
    """The health of `service` ("" is the whole process): SERVING, NOT_SERVING, or why no answer came. Blocks up to `timeout` s."""
    with direct_channel(address, tls_ca) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("address", help="HOST:PORT or unix:PATH")
    parser.add_argument("service", nargs="?", default="", help="full service name; the whole process if absent")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds [2]")
    parser.add_argument("--tls-ca", type=Path, help="PEM certificates to trust")
    given = parser.parse_args(argv)
    health = probe(given.address, given.service, given.timeout, given.tls_ca)
    print(health)
    return 0 if health == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
