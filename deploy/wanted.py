"""What make's variables ask for: checked before anything starts, and compared with what runs. Errors speak of make's variables."""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.commands import OWN_VARIABLES, has_cuda_packages, is_mock
from deploy.model import DEFAULT_MODEL, check_name, name_of
from deploy.readiness import ClusterError
from deploy.state import Cluster
from service.auth import read_token
from service.keys import ApiKeys
from service.settings import SettingsError, parse, variable_of

RUNTIMES = ("processes", "docker")
BACKENDS = ("auto", "torch", "cuda", "mock")
QUANTIZATIONS = ("none", "int8")
_KEYS = ("OCTAVO_API_KEY", "OCTAVO_API_KEY_LIST")
_SERVICES = ("scheduler", "worker", "router")
_NOT_OF_SERVICES = ("OCTAVO_ADDRESS", "OCTAVO_API_KEY", "OCTAVO_CACHE", "OCTAVO_CUBIN_CACHE")  # but known
_ALIKE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Settings of `make up` or `make worker`; None where nothing was said."""

    model: str | None = None
    workers: int | None = None
    backend: str | None = None
    quantization: str | None = None
    runtime: str | None = None

    def described(self, *names: str) -> str:
        """These settings as one types them after `make up`, those that were not said left out."""
        values = {name: getattr(self, name) for name in names}
        return " ".join(f"{name.upper()}={value}" for name, value in values.items() if value is not None)


def read(*, model: str = "", workers: str = "", backend: str = "", quantization: str = "", runtime: str = "") -> Wanted:
    """The settings from make's variables, empty where they were not given. Raises ClusterError that names the variable."""
    _check_choice("RUNTIME", runtime, RUNTIMES)
    _check_choice("BACKEND", backend, BACKENDS)
    _check_choice("QUANTIZATION", quantization, QUANTIZATIONS)
    if workers and not (workers.isascii() and workers.lstrip("-").isdigit()):
        raise ClusterError(f"WORKERS={workers}: a number is needed")
    if workers and int(workers) < 1:
        raise ClusterError(f"WORKERS={workers}: at least 1 is needed")
    wanted = Wanted(
        model=model or None,
        workers=int(workers) if workers else None,
        backend=backend or None,
        quantization=quantization or None,
        runtime=runtime or None,
    )
    _check_mock(wanted)
    return wanted


def _check_choice(variable: str, value: str, choices: Sequence[str]) -> None:
    if value and value not in choices:
        raise ClusterError(f"{variable}={value}: must be one of {', '.join(choices)}")


def _check_mock(wanted: Wanted) -> None:
    mock = wanted.model is not None and is_mock(wanted.model)
    if mock and wanted.backend in ("torch", "cuda"):
        raise ClusterError(
            f"MODEL={wanted.model} BACKEND={wanted.backend}: a mock has no weights that this backend could run; leave one of them out"
        )
    without = "mock" if mock or wanted.backend == "mock" else "cuda" if wanted.backend == "cuda" else None
    if without is not None and wanted.quantization == "int8":
        raise ClusterError(f"QUANTIZATION=int8: the {without} backend has none; BACKEND=torch runs it on the CPU")


def check_machine(model: str, backend: str | None) -> None:
    """Whether this model and backend could be here, as far as can be told at once and without fetching. Raises ClusterError."""
    check_name(model)
    directory = Path(model).expanduser()
    if not is_mock(model) and directory.is_dir():
        for needed in ("config.json", "tokenizer.json"):
            if not (directory / needed).is_file():
                raise ClusterError(f"MODEL={model}: holds no {needed}, so it is no Hugging Face model directory")
        if not any(directory.glob("*.safetensors")):
            raise ClusterError(f"MODEL={model}: holds no *.safetensors file")
    if backend == "cuda":
        if not has_cuda_packages():
            raise ClusterError(
                "BACKEND=cuda needs more packages: .venv/bin/pip install -r deploy/requirements/cuda.txt"
            )
        if not has_cuda_device():
            raise ClusterError("BACKEND=cuda: the driver tells of no CUDA device; BACKEND=torch runs on the CPU")


def has_cuda_device() -> bool:
    """Whether the driver is there and has a device that CUDA_VISIBLE_DEVICES leaves to us; asks it as torch does, without torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return int(driver.cuInit(0)) == 0


def check_environment(services: Sequence[str] = _SERVICES) -> None:
    """Whether the services can use the OCTAVO_* variables that they will inherit, and the files these name. Raises ClusterError."""
    environ = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    for service in services:
        settings_class = _settings_class(service)
        try:
            settings = parse(settings_class, service, ["--redis", "redis://unused"], environ)
            read_token(settings.cluster_token_file)
            ApiKeys.of(
                getattr(settings, "api_keys", None), getattr(settings, "api_key_list", None)
            )  # a router has them
        except SettingsError as error:
            raise ClusterError(f"the {service} can't use an OCTAVO_ variable of the environment: {error}") from None


def _settings_class(service: str) -> type[Any]:
    found: type[Any] = getattr(importlib.import_module(f"{service}.settings"), f"{service.title()}Settings")
    return found


def unused_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each OCTAVO_* variable that somebody may have meant for the services, and that none of them takes."""
    known = {variable_of(item.name) for service in _SERVICES for item in dataclasses.fields(_settings_class(service))}
    known |= set(_NOT_OF_SERVICES)
    lines = []
    for name in sorted(name for name, value in environ.items() if name.startswith("OCTAVO_") and value):
        if name in OWN_VARIABLES and name != "OCTAVO_SCHEDULER":  # that one is also the client's
            lines.append(f"{name} is not used: each process here gets an address and a name of its own")
        elif name not in known and (near := difflib.get_close_matches(name, known, 1, _ALIKE)):
            lines.append(f"{name} is not used: it is no setting; did you mean {near[0]}?")
    return lines


def inherited(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of services that stand in the environment: a worker added later shall have them, too.

    No keys: they are the routers' business, and what a program is given stands in a file.
    """
    return {name: value for name, value in environ.items() if name.startswith("OCTAVO_") and name not in _KEYS}


def differences(wanted: Wanted, running: Cluster, workers: int) -> str:
    """What was asked for and is not what runs, with what to do; empty where all is as asked. `workers`: how many run."""
    have = {
        "model": running.model,
        "workers": workers,
        "backend": running.backend,
        "quantization": running.quantization or "none",
        "runtime": running.runtime,
    }
    asked = {
        "model": None if wanted.model is None else name_of(wanted.model),
        "workers": wanted.workers,
        "backend": None if wanted.backend == "auto" or not running.backend else wanted.backend,
        "quantization": wanted.quantization,
        "runtime": wanted.runtime,
    }
    differing = [name for name, value in asked.items() if value is not None and value != have[name]]
    if not differing and wanted.model is None and running.model != name_of(DEFAULT_MODEL):
        return (
            f"Nothing was changed: {running.model} runs. Where no MODEL is given, make up starts {DEFAULT_MODEL}.\n"
            f"To serve that as well: make worker MODEL={DEFAULT_MODEL}\n"
            f"To have that instead: make down, then make up"
        )
    if not differing:
        return ""
    parts = [f"{name.upper()}={getattr(wanted, name)} was asked for, {have[name]} runs" for name in differing]
    lines = [f"Nothing was changed: {'; '.join(parts)}."]
    if "runtime" not in differing and {"model", "backend", "quantization"} & set(differing):
        lines.append(f"To serve that as well: make worker {wanted.described('model', 'backend', 'quantization')}")
    elif differing == ["workers"] and wanted.workers is not None and wanted.workers > workers:
        lines.append(f"To add {'one' if wanted.workers - workers == 1 else 'each'}: make worker")
    again = wanted.described("model", "workers", "backend", "quantization", "runtime")
    return "\n".join([*lines, f"To have that instead: make down, then make up {again}"])
