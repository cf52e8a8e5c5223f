"""Do routers list the models of the workers: the last part of a cluster's readiness. A router gets a model's tokenizer, by way of the
scheduler, a moment after the worker serves, and until then nobody can ask for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from deploy.commands import Command
from deploy.readiness import POLL_SECONDS, ClusterError, ProcessDied, read_ready, setting_of, trusted_by
from service.auth import read_token
from service.probe import direct_channel

_ASK_SECONDS = 2.0
_NOT_FOR_US = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where a router is asked, and with which secret."""

    address: str
    tls_ca: Path | None = None
    secret: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, command: Command) -> Door:
        """The gRPC door of a router that is ready. Raises ClusterError where it has ended."""
        ready = None if command.ready_file is None else read_ready(command.ready_file)
        if ready is None:
            raise ClusterError(f"{command.name} has just ended")
        token, keys = setting_of(command, "cluster-token-file"), setting_of(command, "api-keys")
        secret = _secret(token, keys, os.environ.get("OCTAVO_API_KEY_LIST"))
        return cls(address=ready.address, tls_ca=trusted_by(command), secret=secret)

    @classmethod
    def at(cls, address: str, environ: Mapping[str, str] = os.environ) -> Door:
        """The door of a router whose settings are those of the environment."""
        keys = environ.get("OCTAVO_API_KEYS"), environ.get("OCTAVO_API_KEY_LIST")
        secret = _secret(environ.get("OCTAVO_CLUSTER_TOKEN_FILE"), *keys)
        trusted = environ.get("OCTAVO_TLS_CA") if environ.get("OCTAVO_TLS_CERT") else None
        return cls(address=address, tls_ca=Path(trusted) if trusted else None, secret=secret)


def _secret(token_file: str | None, keys_file: str | None, keys: str | None) -> str | None:
    """The cluster's token, else the first key of the file or of the list."""
    if token_file:
        return read_token(Path(token_file))
    text = Path(keys_file).read_text() if keys_file else (keys or "").replace(",", "\n")
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return next((words[0] for words in lines if words), None)


def lists_all(door: Door, models: Collection[str]) -> bool:
    """Whether this router would serve all these models now. Blocks for two seconds at most."""
    from octavo.v1 import inference_pb2, inference_pb2_grpc  # where no model is expected nobody needs the stubs

    metadata = () if door.secret is None else (("authorization", f"Bearer {door.secret}"),)
    with direct_channel(door.address, door.tls_ca) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            answer = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=_ASK_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            return error.code() in _NOT_FOR_US  # it serves, and that is all that it tells us
    return set(models) <= {model.name for model in answer.models if model.ready}


def models_of(commands: Iterable[Command]) -> set[str]:
    """What the workers among these processes serve, as their ready files say."""
    files = (command.ready_file for command in commands if command.service == "worker")
    ready = (read_ready(path) for path in files if path is not None)
    return {each.model for each in ready if each is not None and each.model}


def wait_listed(
    doors: Iterable[Door],
    models: Collection[str],
    timeout: float,
    death: Callable[[], ProcessDied | None] = lambda: None,
) -> None:
    """Block until each router lists each model. Raises what `death` returns, and ClusterError after `timeout` seconds."""
    waiting = list(doors) if models else []
    until = time.monotonic() + timeout
    while waiting := [door for door in waiting if not lists_all(door, models)]:
        died = death()
        if died is not None:
            raise died
        if time.monotonic() > until:
            where = ", ".join(door.address for door in waiting)
            raise ClusterError(
                f"not ready after {timeout:.0f} s: the router at {where} does not list {', '.join(models)}"
            )
        time.sleep(POLL_SECONDS)
