"""The worker process: `python -m worker --help`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from octavo.v1 import worker_pb2_grpc
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from service.discovery import Peer, Registry
from service.lifecycle import Lifecycle, run
from service.metrics import Metrics
from service.server import PUBLIC_MESSAGE_BYTES, Server
from service.settings import SettingsError, exit_on_settings_error, parse
from worker.backend import BackendError
from worker.backends.select import Selection, identity_of, select
from worker.backends.torch_memory import may_reach_bytes
from worker.backends.torch_threads import quiet_threads
from worker.checkpoint.prefetch import prefetch
from worker.engine import Engine
from worker.enlist import Enlistment
from worker.grammar.load import load_runner, vocabulary_of
from worker.hang import HangWatch
from worker.service import WorkerService
from worker.session import Identity
from worker.settings import WorkerSettings
from worker.step import StepOutput

log = logging.getLogger("octavo.worker")

SERVICES = ("octavo.v1.WorkerService",)


class _WorkerCollector(Collector):
    """The enlistment's counters, read when scraped."""

    def __init__(self, enlistment: Enlistment) -> None:
        self._enlistment = enlistment

    def collect(self):  # type: ignore[no-untyped-def]  # prometheus-client leaves it untyped
        worker = self._enlistment
        yield CounterMetricFamily("octavo_worker_steps", "Steps run", value=worker.steps)
        yield CounterMetricFamily("octavo_worker_tokens", "Tokens sampled", value=worker.tokens)
        yield CounterMetricFamily(
            "octavo_worker_device_seconds", "Device time spent in steps", value=worker.device_ns / 1e9
        )
        yield HistogramMetricFamily(
            "octavo_worker_gap_seconds",
            "Device time idle before a step",
            buckets=worker.gaps.cumulative(),
            sum_value=worker.gaps.sum_ns / 1e9,
        )
        yield GaugeMetricFamily("octavo_worker_enlisted", "1 while enlisted", value=float(worker.session.epoch != 0))


async def serve(life: Lifecycle, settings: WorkerSettings) -> None:
    """Load, serve until told to stop, drain."""
    server = Server(settings, SERVICES, PUBLIC_MESSAGE_BYTES)
    selection = await asyncio.to_thread(select, settings)  # imports torch and reads the model's headers: seconds
    loop = asyncio.get_running_loop()

    def on_output(epoch: int, output: StepOutput) -> None:
        loop.call_soon_threadsafe(enlistment.on_output, epoch, output)

    def on_failure(epoch: int, step_id: int, text: str) -> None:
        loop.call_soon_threadsafe(enlistment.on_failure, epoch, step_id, text)

    engine = Engine(selection.backend, on_output, on_failure, _die, life.trace)
    engine.start()
    hang = HangWatch(engine, settings.hang_seconds, settings.hang_exit_seconds, life.dump_stacks, _leave)
    metrics = Metrics(life.watchdog, hang)
    registry = Registry(settings.redis, metrics.redis_up()) if settings.redis else None
    try:
        identity = await _load(engine, selection, life)
        enlistment = Enlistment(settings, identity, engine, life.trace)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(identity, enlistment), server.grpc)
        metrics.registry.register(_WorkerCollector(enlistment))
        await metrics.start(settings.metrics, life.stopping)
        address = await server.start(life.stopping)
        identity.hello.address = address
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(enlistment.run())
            running.add_done_callback(lambda _: life.stopping.set())  # also when a scheduler lets it go
            background = [tasks.create_task(_keep_health(server, enlistment, hang)), tasks.create_task(hang.run())]
            if registry is not None:
                background.append(
                    tasks.create_task(registry.watch("scheduler", _follow(enlistment, settings.scheduler)))
                )
            ready = tasks.create_task(_announce(life, enlistment, address, metrics.address, identity))
            await life.stopping.wait()
            await server.set_serving(False)
            enlistment.drain()
            await asyncio.wait([running], timeout=settings.drain_timeout)
            for task in (running, ready, *background):
                task.cancel()
        await server.stop(grace=0.5)
    finally:
        await server.close()
        if not await asyncio.to_thread(engine.close, settings.hang_seconds):
            _leave("the device does not end its steps")
        if metrics.address:
            metrics.stop()
        if registry is not None:
            await registry.close()


async def _load(engine: Engine, selection: Selection, life: Lifecycle) -> Identity:
    said = -math.inf

    def progress(what: str, done: int, total: int) -> None:
        nonlocal said
        if done == total or time.monotonic() - said > 1:  # a log is read by people
            said = time.monotonic()
            log.info("loading %s: %d of %d", what, done, total)

    vocab_size = vocabulary_of(selection.assets)
    loading = asyncio.create_task(asyncio.to_thread(load_runner, selection.assets, vocab_size))  # beside the weights
    try:
        info = await asyncio.wrap_future(engine.load(progress))
    except BackendError as error:
        raise SettingsError(str(error)) from None
    finally:
        grammars = await loading
    if grammars is not None and info.vocab_size != vocab_size:
        log.warning("no grammars: config.json says %d tokens, the model has %d", vocab_size, info.vocab_size)
        grammars = None
    if grammars is not None:
        engine.use_grammars(grammars)
    return identity_of(selection, info, life.incarnation, life.name, grammars=grammars is not None)


def _follow(enlistment: Enlistment, fixed: tuple[str, ...]) -> Callable[[frozenset[Peer]], None]:
    """The schedulers from the flags, and those that hold leases."""

    def changed(peers: frozenset[Peer]) -> None:
        enlistment.set_schedulers({*fixed, *(peer.address for peer in peers)})

    return changed


async def _announce(life: Lifecycle, enlistment: Enlistment, address: str, metrics: str, identity: Identity) -> None:
    """Ready once a scheduler has welcomed us: the first real step has run already."""
    await enlistment.welcomed.wait()
    hello = identity.hello
    life.announce(
        address,
        metrics,
        model=hello.model,
        backend=hello.backend,
        quantization=hello.quantization,
        may_reach_bytes=may_reach_bytes(identity.info),
        scheduler=enlistment.scheduler,
    )


async def _keep_health(server: Server, enlistment: Enlistment, hang: HangWatch) -> None:
    """SERVING while enlisted and steps come back; a hung device makes the worker unready."""
    serving = False
    while True:
        now = enlistment.welcomed.is_set() and not hang.hung
        if now != serving:
            serving = now
            await server.set_serving(serving)
        await asyncio.sleep(0.1)


def _die(error: BaseException) -> None:
    """An engine thread ended: nothing can be saved in this process."""
    log.critical("the engine died", exc_info=error)
    logging.shutdown()
    os._exit(1)


def _leave(why: str) -> None:
    """The device hangs: what waits for it would wait for ever, the interpreter's own end, too."""
    log.critical("leaving: %s", why)
    logging.shutdown()
    os._exit(1)


def main() -> int:
    """Entry point; returns the exit code."""
    quiet_threads()  # before anything imports torch
    try:
        settings = parse(WorkerSettings, "worker")
    except SettingsError as error:
        exit_on_settings_error(error, "worker")
    if (directory := Path(settings.model)).is_dir():
        prefetch(directory)  # while torch is imported
    return run("worker", settings, lambda life: serve(life, settings))


if __name__ == "__main__":
    sys.exit(main())
