"""The scheduler process: `python -m scheduler --help`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time

from octavo.v1 import scheduler_pb2_grpc
from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from scheduler.core import Settings
from scheduler.hub import Hub, HubSettings
from scheduler.inspect import counters
from scheduler.service import SchedulerService
from scheduler.settings import SchedulerSettings
from scheduler.spread import Spreader
from service.auth import credentials, read_token
from service.discovery import Peer, Registry
from service.lifecycle import Lifecycle, run
from service.metrics import Metrics
from service.server import INTERNAL_MESSAGE_BYTES, Server, open_channel
from service.settings import SettingsError, exit_on_settings_error, parse

log = logging.getLogger("octavo.scheduler")

SERVICES = ("octavo.v1.SchedulerService",)


class _SchedulerCollector(Collector):
    """The core's counters and load, read when scraped (from another thread: plain reads of numbers)."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def collect(self):  # type: ignore[no-untyped-def]  # prometheus-client leaves it untyped
        load = self._hub.core.load()
        yield GaugeMetricFamily("octavo_scheduler_waiting", "Requests that wait", value=load.waiting)
        yield GaugeMetricFamily("octavo_scheduler_running", "Requests in rows", value=load.running)
        yield GaugeMetricFamily("octavo_scheduler_workers", "Workers enlisted", value=load.workers)
        yield GaugeMetricFamily(
            "octavo_scheduler_kv_used", "Share of blocks owned by running requests", value=load.kv_used
        )
        for name, value in counters(self._hub).items():
            yield CounterMetricFamily(f"octavo_scheduler_{name}", f"Total of {name.replace('_', ' ')}", value=value)


async def serve(life: Lifecycle, settings: SchedulerSettings) -> None:
    """Serve until told to stop, then let running requests end."""
    server = Server(settings, SERVICES, INTERNAL_MESSAGE_BYTES)
    token = read_token(settings.cluster_token_file)
    core = Settings(
        max_waiting_requests=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_shared_tokens=settings.max_shared_tokens,
        watermark=settings.watermark,
        no_worker_timeout=settings.no_worker_timeout,
    )
    hub_settings = HubSettings(
        settings.heartbeat_ms, settings.lease_ms, settings.run_ahead, settings.max_run_ahead, core=core
    )
    hub = Hub(hub_settings, life.incarnation, first_epoch=secrets.randbits(62))
    hub.trace = life.trace
    service = SchedulerService(hub, settings.heartbeat_ms / 3e3)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(service, server.grpc)
    metrics = Metrics(life.watchdog)
    metrics.registry.register(_SchedulerCollector(hub))
    hub.on_recovery = Histogram(
        "octavo_scheduler_recovery_seconds",
        "From the loss of a request's worker until it is planned again",
        buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0),
        registry=metrics.registry,
    ).observe
    registry = Registry(settings.redis, metrics.redis_up()) if settings.redis else None
    try:
        await metrics.start(settings.metrics, life.stopping)
        address = await server.start(life.stopping)  # last: peers come at once, and need the clock
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(service.tick_forever())]
            spreader = Spreader(hub, lambda to: open_channel(settings, to), credentials(token), time.monotonic)
            spreader.set_peers(settings.peer)
            if settings.spread_seconds:
                background.append(tasks.create_task(spreader.run(settings.spread_seconds)))
            lease: asyncio.Task[None] | None = None
            if registry is not None:
                background.append(tasks.create_task(_discover(registry, spreader, address, settings)))
                peer = Peer(address, str(life.incarnation), life.name)
                lease = tasks.create_task(registry.hold("scheduler", peer, life.stopping))
            await server.set_serving(True)
            life.announce(address, metrics.address)
            await life.stopping.wait()
            await server.set_serving(False)
            await _drain(hub, settings.drain_timeout)
            for task in background:
                task.cancel()
            if lease is not None:
                await lease
        await server.stop(grace=0.5)
    finally:
        await server.close()
        metrics.stop()
        if registry is not None:
            await registry.close()


async def _discover(registry: Registry, spreader: Spreader, address: str, settings: SchedulerSettings) -> None:
    """Know the other schedulers."""
    await registry.watch(
        "scheduler", lambda peers: spreader.set_peers({*settings.peer, *(p.address for p in peers)} - {address})
    )


async def _drain(hub: Hub, timeout: float) -> None:
    """Accept nothing new; wait for what runs; then let everyone go."""
    hub.begin_drain(int(timeout * 1e3))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while loop.time() < deadline:
        load = hub.core.load()
        if load.waiting + load.running == 0:
            break
        await asyncio.sleep(0.05)
    else:
        log.warning("drain timeout: requests that still run move to another scheduler")
    hub.dismiss()


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        settings = parse(SchedulerSettings, "scheduler")
    except SettingsError as error:
        exit_on_settings_error(error, "scheduler")
    return run("scheduler", settings, lambda life: serve(life, settings))


if __name__ == "__main__":
    sys.exit(main())
