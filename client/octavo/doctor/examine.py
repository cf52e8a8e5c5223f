"""The whole examination: which checks there are, in which order, and what each is given. Everything is asked through `Probes`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from octavo.client.connection import ConnectionProblem
from octavo.doctor import clock, cluster, gpu, host, model_files, packages, ports, redis_server
from octavo.doctor.findings import Finding, Run, Section, note, ok, problem, run
from octavo.models.cache import cache_dir

DEFAULT_MODEL = "smollm2"
_NO_GPU_ARCHITECTURE = "sm_90a"


def _importer(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Everything that looks at the world; tests put their own in. `module` imports one of a checkout's modules."""

    ask: cluster.ReadCluster
    run: Run = run
    facts: Callable[[], host.Host] = host.read_host
    disk: Callable[[str, Path], host.Disk] = host.look_at_disk
    time: Callable[[], clock.Clock] = clock.read_clock
    gpus: Callable[[Run], gpu.Gpus] = gpu.read_gpus
    listeners: Callable[[], Sequence[ports.Listener]] = ports.listeners
    redis: Callable[[str], redis_server.Answer] = redis_server.ask_redis
    installed: packages.Installed = packages.installed_version
    requires: Callable[[str], Sequence[str] | None] = packages.requires_of
    module: Callable[[str], ModuleType] = _importer
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user named. `checkout`: the root of one, None for the client alone."""

    checkout: Path | None = None
    model: str | None = None
    redis: str | None = None
    architecture: str | None = None
    prefix: Path = field(default_factory=lambda: Path(sys.prefix))


def examine(wishes: Wishes, probes: Probes) -> list[Section]:
    """All findings. Starts nothing and changes nothing, except that compiled kernels are kept in the cache."""
    facts = probes.facts()
    gpus = probes.gpus(probes.run)
    judged, config = _model(wishes, probes, facts, gpus)
    sections = [
        Section("machine", tuple(_machine(wishes, probes, facts))),
        Section("environment", tuple(_environment(wishes, probes))),
        Section("GPU", tuple(_gpu(wishes, probes, gpus, config))),
        Section("network", tuple(_network(wishes, probes))),
        Section("model", tuple(judged)),
        Section("cluster", tuple(_cluster(wishes, probes, facts))),
    ]
    if wishes.checkout is None:
        found = (
            "No checkout of Octavo here, so these were not looked at: pinned packages, whether NVRTC compiles the kernels, "
            "the ports of `make up`, a redis-server to start, whether the model is supported and fits."
        )
        sections.append(
            Section("left out", (note("checkout", found, "To serve models: go into a checkout, then octavo doctor"),))
        )
    return sections


def _machine(wishes: Wishes, probes: Probes, facts: host.Host) -> list[Finding]:
    findings = [*host.check_python(facts), *host.check_cpu(facts), *host.check_memory(facts)]
    places = {"model cache": cache_dir(probes.environ)}
    if wishes.checkout is not None:
        places["checkout's disk"] = wishes.checkout
    for what, path in places.items():
        findings += host.check_disk(probes.disk(what, path))
    return [*findings, *host.check_open_files(facts), *clock.check_clock(probes.time())]


def _environment(wishes: Wishes, probes: Probes) -> list[Finding]:
    findings = packages.check_client(probes.requires("octavo"), probes.installed)
    if wishes.checkout is not None:
        findings += probes.module("deploy.doctor").check_environment(wishes.prefix, probes.installed)
    return findings


def _gpu(wishes: Wishes, probes: Probes, gpus: gpu.Gpus, config: object | None) -> list[Finding]:
    findings = gpu.check_gpus(gpus, probes.environ)
    if wishes.checkout is None:
        return findings
    pins = packages.read_requirements(wishes.checkout / "deploy" / "requirements" / "cuda.txt")
    findings += gpu.check_cuda_packages(gpus, pins, probes.installed)
    if any(probes.installed(item.name) is None for item in pins):
        return findings
    able = sorted({device.architecture for device in gpus.devices if device.capability >= gpu.MIN_CAPABILITY})
    if wishes.architecture is not None:
        able = [wishes.architecture]
    elif gpus.devices and not able:
        return findings
    try:
        judge = probes.module("deploy.doctor_model")
    except ModuleNotFoundError as error:
        return [*findings, _missing(wishes, "kernels", error)]
    everything = bool(gpus.devices) or wishes.architecture is not None
    return [*findings, *judge.check_kernels(able or [_NO_GPU_ARCHITECTURE], config, probes.run, everything)]


def _network(wishes: Wishes, probes: Probes) -> list[Finding]:
    findings: list[Finding] = []
    url = wishes.redis or probes.environ.get("OCTAVO_REDIS")
    if wishes.checkout is not None:
        local = probes.module("deploy.doctor")
        findings += local.check_default_ports(probes.listeners())
        findings += redis_server.check_redis_binary(probes.module("deploy.commands").redis_binary(), probes.run)
        url = url or local.redis_url()
    if url is None:
        return [*findings, ok("Redis", "No URL to ask: --redis, OCTAVO_REDIS or a running cluster would name one.")]
    try:
        return [*findings, *redis_server.check_redis(url, probes.redis(url))]
    except ModuleNotFoundError as error:
        return [*findings, _missing(wishes, "Redis", error)]


def _model(wishes: Wishes, probes: Probes, facts: host.Host, gpus: gpu.Gpus) -> tuple[list[Finding], object | None]:
    """The findings, and the model's config where a checkout could read it."""
    model = wishes.model
    if model is None and wishes.checkout is not None:
        model = probes.module("deploy.doctor").model_argument()
    model = model or DEFAULT_MODEL
    if model == "mock" or model.startswith("mock:"):
        return [ok("model", "The mock needs no files.")], None
    findings, directory = model_files.check_cached(model, wishes.model is not None, cache_dir(probes.environ))
    if directory is None or wishes.checkout is None:
        return findings, None
    try:
        judge = probes.module("deploy.doctor_model")
    except ModuleNotFoundError as error:
        return [*findings, _missing(wishes, "config", error)], None
    judged, config = judge.check_config(directory)
    findings += judged
    if config is not None:
        able = (device for device in gpus.devices if device.capability >= gpu.MIN_CAPABILITY)
        devices = [device for device in able if device.memory_total]
        stored = model_files.total_bytes(directory)
        findings += judge.check_fit(config, stored, facts.memory_available, devices)
    return findings, config


def _cluster(wishes: Wishes, probes: Probes, facts: host.Host) -> list[Finding]:
    try:
        findings = cluster.check_cluster(probes.ask())
    except ConnectionProblem as error:
        remedy = "Name it yourself: octavo doctor --address HOST:PORT --scheduler HOST:PORT"
        findings = [problem("cluster", f"{str(error).rstrip('.')}.", remedy)]
    if wishes.checkout is None:
        return findings
    try:
        local = probes.module("deploy.doctor")
        own: list[Finding] = [*local.check_versions(), *local.check_promises(facts.memory_available)]
    except ModuleNotFoundError as error:
        own = [_missing(wishes, "versions and promised memory", error)]
    return findings + own


def _missing(wishes: Wishes, check: str, error: ModuleNotFoundError) -> Finding:
    remedy = f"pip install {error.name}" if wishes.checkout is None else "Install what the services need: make env"
    return note(check, f"Left out, since {error.name} is not installed here.", remedy)
