"""The router process: `python -m router --help`."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
import time
from pathlib import Path

from octavo.v1 import inference_pb2_grpc

from router.assets import AssetStore
from router.attach import Attachments
from router.gate import Gate
from router.grammar import GrammarChecker
from router.http.app import Gateway
from router.http.server import HttpServer
from router.hub import Hub
from router.idempotency import IdempotencyKeys
from router.inference import Inference
from router.prepare import Clocks, Preparation, TextPool
from router.pulse import Terms
from router.service import InferenceService
from router.session import RouterSession, SessionSettings
from router.settings import RouterSettings
from router.shared_keys import SharedKeys
from router.stats import Stats
from router.ticket import TicketOffice, ticket_key
from service.auth import check_binding, credentials, read_token
from service.discovery import Peer, Registry
from service.keys import ApiKeys, Authenticator
from service.lifecycle import Lifecycle, run
from service.metrics import Metrics
from service.server import PUBLIC_MESSAGE_BYTES, Server, open_channel
from service.settings import SettingsError, exit_on_settings_error, parse

log = logging.getLogger("octavo.router")

SERVICES = ("octavo.v1.InferenceService",)
_SECOND_SCHEDULER_SECONDS = 1.0
# Of tokens towards a router that is behind: a few steps of 256 rows. The rest waits at the scheduler, which merges it, so that a busy
# router gets fewer and larger batches and not a queue of old ones.
_ATTACH_WINDOW_BYTES = 16 << 10


class Router:
    """The parts of one router process, wired. To be made inside its event loop."""

    def __init__(self, life: Lifecycle, settings: RouterSettings, authenticator: Authenticator) -> None:
        token = read_token(settings.cluster_token_file)
        self.session = RouterSession(
            SessionSettings(
                incarnation=life.incarnation,
                name=life.name,
                lease=settings.lease_ms / 1e3,
                patience=settings.patience,
                request_stall=settings.request_stall_seconds,
            )
        )
        self.hub = Hub(
            self.session,
            flush_interval=settings.flush_ms / 1e3,
            max_buffered_tokens=settings.max_buffered_tokens,
            brisk=Terms(settings.heartbeat_ms / 1e3, settings.lease_ms / 1e3),
            on_models=self.load_assets,
        )
        self.hub.trace = life.trace
        self.pool = TextPool(settings.text_threads)
        self.attachments = Attachments(
            self.hub, lambda address: open_channel(settings, address, _ATTACH_WINDOW_BYTES), credentials(token)
        )
        self.assets = AssetStore(self.attachments.fetch_assets, self.pool.executor)
        self.grammars = GrammarChecker()
        tickets = TicketOffice(ticket_key(settings.ticket_key_file, token))
        clocks = Clocks(self.hub.now, time.time)
        preparation = Preparation(self.session.models, self.assets, self.pool, self.grammars, tickets, clocks)
        self.metrics = Metrics(life.watchdog)
        self._stats = Stats(self.metrics.registry, self.session)
        gate = Gate(settings.max_requests)
        self.inference = Inference(
            self.hub,
            self.assets,
            preparation,
            self.pool,
            self._stats,
            gate,
            max_parked=settings.max_parked,
            max_buffered_tokens=settings.max_buffered_tokens,
        )
        self._stats.watch_parked(lambda: self.inference.parking.num_parked)
        self.service = InferenceService(self.inference, authenticator)
        self.gateway = Gateway(
            self.inference, self.pool, authenticator, self.metrics.registry, settings.http_keep_alive_seconds
        )

    async def share_keys(self, url: str, me: Peer) -> None:
        """Idempotency keys hold for all routers from now on. Runs until cancelled."""
        shared = SharedKeys(url, me, self._stats.alone)
        keys = self.inference.keys = IdempotencyKeys(self.hub.now, shared)
        try:
            await shared.listen(keys.taken_over)
        finally:
            await keys.close()
            await shared.close()

    def load_assets(self) -> None:
        """Have the text side of every model that is served."""
        self.assets.want(self.session.models.digests())

    async def keep_assets(self) -> None:
        """Try again what could not be fetched. Runs until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            self.load_assets()

    async def attached(self, stopping: asyncio.Event) -> None:
        """Until schedulers have said what they serve: all that are known, or within a second of the first."""
        first = math.inf
        while not stopping.is_set():
            now, attached = self.hub.now(), self.session.num_attached
            first = min(first, now) if attached else math.inf
            if attached and (attached >= self.attachments.num_known or now > first + _SECOND_SCHEDULER_SECONDS):
                return
            await asyncio.sleep(0.01)

    def set_serving(self, serving: bool) -> None:
        """Tell those who ask over HTTP whether to send requests here."""
        self.gateway.ready = serving

    async def close(self) -> None:
        """End streams, threads and endpoints."""
        await self.attachments.close()
        await self.assets.close()
        await self.grammars.close()
        self.pool.close()


async def serve(life: Lifecycle, settings: RouterSettings) -> None:
    """Serve until told to stop, then drain."""
    keys = ApiKeys.of(settings.api_keys, settings.api_key_list)
    server = Server(settings, SERVICES, PUBLIC_MESSAGE_BYTES, keys)
    router = Router(life, settings, server.authenticator)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(router.service, server.grpc)
    http = _http_server(router, settings, server.authenticator)
    registry = Registry(settings.redis, router.metrics.redis_up()) if settings.redis else None
    try:
        await router.metrics.start(settings.metrics, life.stopping)
        http_address = "" if http is None else await http.start(life.stopping)
        address = await server.start(life.stopping)  # last: clients of ours come at once, and find nothing served
        me = Peer(address, str(life.incarnation), life.name)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(router.hub.run_clock(settings.heartbeat_ms / 3e3)),
                tasks.create_task(router.keep_assets()),
                tasks.create_task(router.attachments.watch()),
            ]
            if settings.api_keys is not None:
                background.append(tasks.create_task(_follow_keys(server.authenticator, settings.api_keys)))
            if http is not None:
                background += [tasks.create_task(http.keep_time()), tasks.create_task(router.gateway.streams.watch())]
            router.attachments.set_addresses(settings.scheduler)
            lease: asyncio.Task[None] | None = None
            drained = asyncio.Event()  # until then the keys of what runs here are ours
            if registry is not None and settings.redis is not None:
                background.append(tasks.create_task(_discover(registry, router, settings)))
                background.append(tasks.create_task(router.share_keys(settings.redis, me)))
                lease = tasks.create_task(registry.hold("router", me, drained))
            await router.attached(life.stopping)
            await server.set_serving(True)
            router.set_serving(True)
            life.announce(address, router.metrics.address, http=http_address)
            await life.stopping.wait()
            await server.set_serving(False)
            router.set_serving(False)
            await router.inference.drain(settings.drain_timeout)
            await asyncio.gather(server.stop(grace=1.0), *([] if http is None else [http.stop(grace=1.0)]))
            # While the clock runs: a side that is silent before its stream ends is cut off.
            await router.attachments.close()
            drained.set()
            if lease is not None:
                await lease
            for task in background:
                task.cancel()
    finally:
        await server.close()
        if http is not None:
            await http.stop(grace=0.0)
        await router.close()
        if router.metrics.address:
            router.metrics.stop()
        if registry is not None:
            await registry.close()


def _http_server(router: Router, settings: RouterSettings, authenticator: Authenticator) -> HttpServer | None:
    """The second door, if it is wanted. Raises SettingsError for an unsafe binding."""
    if settings.http_listen == "none":
        return None
    token = read_token(settings.cluster_token_file)
    check_binding(
        settings, token, has_keys=authenticator.keys is not None, flag="--http-listen", listen=settings.http_listen
    )
    return HttpServer(router.gateway.app(), settings, settings.http_listen)


async def _follow_keys(authenticator: Authenticator, path: Path) -> None:
    """Read the API keys again at each SIGHUP; a file that can't be used changes nothing. Streams that run go on. Until cancelled."""
    loop = asyncio.get_running_loop()
    again = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, again.set)
    try:
        while True:
            await again.wait()
            again.clear()
            try:
                authenticator.keys = await loop.run_in_executor(None, ApiKeys.read, path)
            except SettingsError as error:
                log.error("the API keys stay as they were: %s", error)
            else:
                log.info("read %d API keys", len(authenticator.keys.callers))
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


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
