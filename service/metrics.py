"""Prometheus metrics over HTTP, each process with a registry of its own."""

from __future__ import annotations

import asyncio
import logging
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Gauge, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.registry import Collector

from service.binding import not_bound, patiently
from service.settings import split_address

log = logging.getLogger("octavo.metrics")

_MAX_CONNECTIONS = 16
_IDLE_SECONDS = 10.0


class _Handler(WSGIRequestHandler):
    timeout = _IDLE_SECONDS  # a connection that says nothing holds its thread no longer

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    """A few connections at once, each a thread; what comes beyond is hung up on."""

    daemon_threads = True
    timeout = 0  # of `handle_request`, which is called once someone is there; who hung up meanwhile holds nobody up

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)
        self._told, self._tell = socket.socketpair()

    def serve_until_told(self) -> None:
        """Serve until `tell`; it ends at once then, where `serve_forever` would look twice a second."""
        with self._told, selectors.DefaultSelector() as ready:
            ready.register(self, selectors.EVENT_READ)
            ready.register(self._told, selectors.EVENT_READ)
            while not any(key.fileobj is self._told for key, _ in ready.select()):
                self.handle_request()

    def tell(self) -> None:
        """Serve no longer."""
        self._tell.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):  # who hangs up or says nothing is no error of ours
            log.debug("a connection to /metrics broke")
        else:
            log.exception("/metrics failed")


class Metrics:
    """A registry and its HTTP endpoint (daemon threads)."""

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

    async def start(self, listen: str, stopping: asyncio.Event | None = None) -> str:
        """Serve /metrics; returns HOST:PORT. Raises SettingsError where the address can't be bound.

        `stopping`: a taken one is waited for no longer.
        """
        host, port = split_address(listen)

        async def bind() -> _Server:
            try:
                return await asyncio.to_thread(_Server, host, port)  # it may have to resolve a name
            except OSError as error:
                raise not_bound("--metrics", listen, error) from None

        self._server = await patiently(bind, stopping)
        self._server.set_app(make_wsgi_app(self.registry))
        self._thread = threading.Thread(target=self._server.serve_until_told, name="metrics", daemon=True)
        self._thread.start()
        self.address = f"{host}:{self._server.server_port}"
        return self.address

    def stop(self) -> None:
        """Close the endpoint, if it was ever opened."""
        if self.address:
            self._server.tell()
            self._thread.join()
            self._server.server_close()
