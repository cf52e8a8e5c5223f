"""Settings: one frozen dataclass for each service, filled from flags, then from OCTAVO_* variables, then from defaults."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

S = TypeVar("S", bound="CommonSettings")

_SHORT_NAME = 16  # characters; no secret of ours is as short


class SettingsError(Exception):
    """A setting that can't be used; one sentence that names it."""


def flag(help_text: str, default: Any, choices: Sequence[str] = ()) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help_text, "choices": tuple(choices)})


def secret(help_text: str) -> Any:
    """A text that only its OCTAVO_* variable gives: a command line is seen by everybody on the machine. It is never shown."""
    return field(default=None, repr=False, metadata={"help": help_text, "choices": (), "secret": True})


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every service takes."""

    listen: str = flag("address to serve gRPC on, HOST:PORT (port 0: any free one) or unix:PATH", "127.0.0.1:0")
    metrics: str = flag("address to serve Prometheus /metrics on, HOST:PORT (port 0: any free one)", "127.0.0.1:0")
    metrics_open: bool = flag(
        "serve /metrics on an address that other machines reach: they need no key, so the network has to be private",
        False,
    )
    advertise: str | None = flag("address under which others reach --listen, if it differs", None)
    redis: str | None = flag("Redis URL for discovery; without it addresses come from flags", None)
    ready_file: Path | None = flag("JSON file written once the service is ready, removed at exit", None)
    name: str | None = flag("name shown to people", None)
    log_level: str = flag("least severe level to log", "info", ("debug", "info", "warning", "error"))
    cluster_token_file: Path | None = flag("file with the secret that the cluster's processes share", None)
    tls_cert: Path | None = flag("PEM certificate chain to serve with", None)
    tls_key: Path | None = flag("PEM private key of --tls-cert", None)
    tls_ca: Path | None = flag("PEM certificates to trust when dialling others", None)
    drain_timeout: float = flag("seconds that running work may take after SIGTERM", 30.0)
    heartbeat_ms: int = flag("milliseconds between heartbeats", 75)
    lease_ms: int = flag("milliseconds of silence after which a peer is taken for dead", 250)
    trace_dir: Path | None = flag("where the spans of the last steps are written at SIGUSR2 and at the end", None)
    stall_seconds: float = flag(
        "seconds without a turn of the event loop after which stacks are logged (0: never)", 5.0
    )
    stall_exit_seconds: float = flag("and after which the process ends with exit code 1 (0: never)", 60.0)

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_ms < self.lease_ms:
            raise SettingsError("--heartbeat-ms must be above 0 and below --lease-ms")
        if self.drain_timeout < 0:
            raise SettingsError("--drain-timeout must not be negative")
        if min(self.stall_seconds, self.stall_exit_seconds) < 0:
            raise SettingsError("--stall-seconds and --stall-exit-seconds must not be negative")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key belong together")
        if not self.metrics_open and not is_loopback(self.metrics):
            raise SettingsError(
                f"--metrics {self.metrics} is reachable from other machines, and nobody is asked for a key there: bind 127.0.0.1, or"
                " set --metrics-open true where the network is private"
            )


def parse(
    cls: type[S],
    prog: str,
    argv: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> S:
    """The settings of a process. Raises SettingsError; `--help` prints and exits."""
    env = os.environ if env is None else env
    secrets = [item for item in dataclasses.fields(cls) if "secret" in item.metadata]
    epilog = "".join(f"{variable_of(item.name)} in the environment: {item.metadata['help']}. " for item in secrets)
    description = f"{cls.__doc__} Each flag may also be given as a variable: --log-level as OCTAVO_LOG_LEVEL."
    parser = _Parser(prog=f"python -m {prog}", description=description, epilog=epilog, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item in secrets:
            continue
        parser.add_argument(
            _flag_name(item.name),
            dest=item.name,
            action="append" if _is_tuple(hints[item.name]) else "store",
            metavar="VALUE",
            help=_help(item).replace("%", "%%"),
        )
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        raw = given.get(item.name)
        if raw is None:
            variable = env.get(variable_of(item.name))
            if variable is None or variable == "":
                continue
            raw = variable.split(",") if _is_tuple(hints[item.name]) else variable
        values[item.name] = _convert(item, hints[item.name], raw)
    return cls(**values)


def exit_on_settings_error(error: SettingsError, prog: str) -> NoReturn:
    """One sentence on stderr and exit code 2."""
    print(f"{prog}: {error}", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _, found, words = message.partition("unrecognized arguments: ")
        if found:  # a value among them may be a secret
            flags = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
            message = f"{found}{' '.join(flags) or 'a value that belongs to no flag'}"
        raise SettingsError(message)


def variable_of(name: str) -> str:
    """The variable of a setting."""
    return "OCTAVO_" + name.upper()


def unreadable(flag_name: str, path: Path, error: OSError | ValueError) -> SettingsError:
    """Why a file of secrets can't be used, in one sentence. Its name is left out where it may be a secret: somebody gave the thing
    itself. A file that is there has a name that may be told; so has one whose folder is there, or a short word.
    """
    if isinstance(error, OSError):
        why = os.strerror(error.errno) if error.errno else "it can't be read"
    elif isinstance(error, UnicodeDecodeError):
        why = "it can't be decoded as UTF-8"
    else:
        why = str(error)
    try:
        nameable = path.exists() or (path.parent.is_dir() and (len(path.parts) > 1 or len(str(path)) < _SHORT_NAME))
    except (OSError, ValueError):  # longer than any name, or with a zero byte
        nameable = False
    if nameable and len(str(path).split()) == 1:
        return SettingsError(f"{flag_name} {path}: {why}")
    variable = variable_of(flag_name.removeprefix("--").replace("-", "_"))
    what = "a file, and not what belongs in one"
    return SettingsError(f"{flag_name} (or {variable}) takes the name of {what}; no file has the name that was given")


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _convert(item: dataclasses.Field[Any], hint: Any, raw: Any) -> Any:
    if _is_tuple(hint):
        return tuple(part for part in raw if part)
    kind = hint
    if isinstance(hint, types.UnionType):
        kind = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    choices = item.metadata["choices"]
    if choices and raw not in choices:
        raise SettingsError(f"{_flag_name(item.name)}: {raw!r} is none of {', '.join(choices)}")
    if kind is bool:
        if raw.lower() not in ("0", "1", "false", "true", "no", "yes"):
            raise SettingsError(f"{_flag_name(item.name)}: {raw!r} is neither true nor false")
        return raw.lower() in ("1", "true", "yes")
    try:
        return kind(raw)
    except ValueError:
        raise SettingsError(f"{_flag_name(item.name)}: {raw!r} is no {kind.__name__}") from None


def _help(item: dataclasses.Field[Any]) -> str:
    choices = item.metadata["choices"]
    one_of = f"; one of {', '.join(choices)}" if choices else ""
    return f"{item.metadata['help']}{one_of} [{_show(item.default)}]"


def _show(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return str(default)


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can be reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = split_address(address)[0]
    return host in ("localhost", "::1") or host.startswith("127.")


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT in parts, IPv6 hosts in brackets. Raises SettingsError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{address!r} is not HOST:PORT")
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in bare and host != f"[{bare}]":
        raise SettingsError(f"{address!r}: an IPv6 address stands in brackets, [{bare}]:{port}")
    try:
        bare.encode("idna")  # as looking it up does
    except UnicodeError:
        raise SettingsError(f"{address!r}: no host can have this name") from None
    return bare, int(port)
