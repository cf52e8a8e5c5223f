"""Prometheus metrics over HTTP, each process with a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.registry import Collector

from service.settings import SettingsError, split_address


class Metrics:
    """A registry and its HTTP endpoint (a daemon thread of prometheus-client)."""

    def __init__(self, *collectors: Collector) -> None:
        """`collectors` beside those of the process itself."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        for collector in collectors:
            self.registry.register(collector)
        self.address = ""

    def redis_up(self) -> Callable[[bool], None]:
        """A gauge of whether Redis answers, for service.discovery.Registry."""
        gauge = Gauge(
            "octavo_redis_up", "1 while Redis answers; without it discovery stays as it was", registry=self.registry
        )
        return lambda up: gauge.set(float(up))

    def start(self, listen: str) -> str:
        """Serve /metrics; returns HOST:PORT. Raises SettingsError where the address can't be bound."""
        host, port = split_address(listen)
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise SettingsError(f"--metrics {listen}: {error}") from None
        self._server = server
        self.address = f"{host}:{server.server_port}"
        return self.address

    def stop(self) -> None:
        """Close the endpoint, if it was ever opened."""
        if self.address:
            self._server.shutdown()
            self._server.server_close()
