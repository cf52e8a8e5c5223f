"""The router process: `python -m router --help`."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from octavo.v1 import inference_pb2_grpc

from router.assets import AssetStore
from router.attach import Attachments
from router.hub import Hub
from router.prepare import Clocks, Preparation, TextPool
from router.service import InferenceService
from router.session import RouterSession, SessionSettings
from router.settings import RouterSettings
from router.stats import Stats
from router.ticket import TicketOffice, ticket_key
from service.auth import credentials, read_token
from service.discovery import Registry
from service.errors import OctavoError, Reason
from service.lifecycle import Lifecycle, run
from service.metrics import Metrics
from service.server import PUBLIC_MESSAGE_BYTES, Server, open_channel
from service.settings import SettingsError, exit_on_settings_error, parse

log = logging.getLogger("octavo.router")

SERVICES = ("octavo.v1.InferenceService",)


class Router:
    """The parts of one router process, wired. To be made inside its event loop."""

    def __init__(self, life: Lifecycle, settings: RouterSettings) -> None:
        self._settings = settings
        token = read_token(settings.cluster_token_file)
        self.session = RouterSession(
            SessionSettings(
                incarnation=life.incarnation,
                name=life.name,
                heartbeat=settings.heartbeat_ms / 1e3,
                lease=settings.lease_ms / 1e3,
                patience=settings.patience,
                request_stall=settings.request_stall_seconds,
            )
        )
        self.hub = Hub(
            self.session,
            flush_interval=settings.flush_ms / 1e3,
            max_buffered_tokens=settings.max_buffered_tokens,
            on_models=self.load_assets,
        )
        self.pool = TextPool(settings.text_threads)
        self.attachments = Attachments(self.hub, lambda address: open_channel(settings, address), credentials(token))
        self.assets = AssetStore(self.attachments.fetch_assets, self.pool.executor)
        tickets = TicketOffice(ticket_key(settings.ticket_key_file, token))
        clocks = Clocks(self.hub.now, time.time)
        preparation = Preparation(self.session.models, self.assets, self.pool, tickets, clocks)
        self.metrics = Metrics(life.watchdog)
        stats = Stats(self.metrics.registry, self.session)
        self.service = InferenceService(self.hub, self.assets, preparation, self.pool, stats)

    def load_assets(self) -> None:
        """Have the text side of every model that is served."""
        self.assets.want(self.session.models.digests())

    async def keep_assets(self) -> None:
        """Try again what could not be fetched. Runs until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            self.load_assets()

    async def drain(self) -> None:
        """Take nothing new, let what runs end in time; the rest is told to resume at another router."""
        self.service.draining = True
        deadline = self.hub.now() + self._settings.drain_timeout
        while self.hub.now() < deadline:
            if not self.session.num_requests:
                break
            await asyncio.sleep(0.02)
        for request in self.session.requests():
            self.hub.fail(request, OctavoError(Reason.DRAINING, "this router is shutting down; resume at another"))
        self.hub.detach()

    async def close(self) -> None:
        """End streams, threads and endpoints."""
        await self.attachments.close()
        await self.assets.close()
        self.pool.close()


async def serve(life: Lifecycle, settings: RouterSettings) -> None:
    """Serve until told to stop, then drain."""
    server = Server(settings, SERVICES, PUBLIC_MESSAGE_BYTES)
    router = Router(life, settings)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(router.service, server.grpc)
    registry = Registry(settings.redis) if settings.redis else None
    try:
        address = await server.start()
        router.metrics.start(settings.metrics)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(router.hub.run_clock(settings.heartbeat_ms / 3e3)),
                tasks.create_task(router.keep_assets()),
                tasks.create_task(router.attachments.watch()),
            ]
            router.attachments.set_addresses(settings.scheduler)
            if registry is not None:
                background.append(tasks.create_task(_discover(registry, router, settings)))
            await server.set_serving(True)
            life.announce(address, router.metrics.address)
            await life.stopping.wait()
            await server.set_serving(False)
            await router.drain()
            await server.stop(grace=1.0)
            for task in background:
                task.cancel()
    finally:
        await router.close()
        if router.metrics.address:
            router.metrics.stop()
        if registry is not None:
            await registry.close()


async def _discover(registry: Registry, router: Router, settings: RouterSettings) -> None:
    """Attach to every scheduler that holds a lease, and to those from the flags."""
    await registry.watch(
        "scheduler", lambda peers: router.attachments.set_addresses({*settings.scheduler, *(p.address for p in peers)})
    )


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        settings = parse(RouterSettings, "router")
    except SettingsError as error:
        exit_on_settings_error(error, "router")
    return run("router", settings, lambda life: serve(life, settings))


if __name__ == "__main__":
    sys.exit(main())
