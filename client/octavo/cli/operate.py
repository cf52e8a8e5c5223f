"""`octavo drain` and `octavo admit`: what an operator tells a scheduler."""

from __future__ import annotations

from typing import Annotated

import typer
from octavo.cli import options
from octavo.cli.problem import CommandProblem
from octavo.cli.terminal import stderr_console

_DIGEST_BYTES = 32


def drain(
    worker: Annotated[str, typer.Argument(help="Its name or its incarnation, as `octavo workers` shows them.")],
    scheduler: options.Scheduler = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Give a worker no new requests; its process ends when the running ones are done."""
    with options.open_admin(scheduler, token_file, tls, tls_ca) as admin:
        found = [status for status in admin.list_workers() if worker in (status.name, f"{status.incarnation:016x}")]
        if not found:
            raise CommandProblem(f"no worker {worker!r} is enlisted with this scheduler")
        if len(found) > 1:
            raise CommandProblem(f"{len(found)} workers are named {worker!r}; give an incarnation")
        admin.drain_worker(found[0].incarnation)
    stderr_console().print(f"{found[0].name} gets nothing new; {found[0].running} requests run there")


def admit(
    model: Annotated[str, typer.Argument(help="Name under which requests ask for it.")],
    digest: Annotated[
        str, typer.Argument(help="SHA-256 of the new version, hexadecimal, as the refused worker's log says.")
    ],
    scheduler: options.Scheduler = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Allow workers with another version of a model beside those that serve it now; requests stay with theirs."""
    try:
        value = bytes.fromhex(digest)
    except ValueError:
        value = b""
    if len(value) != _DIGEST_BYTES:
        raise CommandProblem("the digest must be 64 hexadecimal digits")
    with options.open_admin(scheduler, token_file, tls, tls_ca) as admin:
        admin.admit_digest(model, value)
    stderr_console().print(f"{digest[:12]}… is admitted as {model}")
