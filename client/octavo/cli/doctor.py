"""`octavo doctor`: what is wrong with this machine or the cluster, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from octavo.cli import options
from octavo.cli.problem import CommandProblem
from octavo.cli.serve import checkout
from octavo.cli.terminal import stderr_console, stdout_console
from octavo.client.connection import CLUSTER_FILE, connect_to
from octavo.doctor.ask_cluster import read_cluster
from octavo.doctor.cluster import Cluster
from octavo.doctor.examine import Probes, Wishes, examine
from octavo.doctor.findings import Finding, Section, State, count
from rich.table import Table
from rich.text import Text

_STYLES = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A directory, or a name as `octavo pull` takes it. Default: the running model, then smollm2.",
        ),
    ] = None,
    redis: Annotated[
        str | None, typer.Option(help="URL of Redis. Default: $OCTAVO_REDIS, then that of the running cluster.")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="Compile all kernels for this one, such as sm_90a. Default: that of the GPUs here.", metavar="SM"
        ),
    ] = None,
    address: options.Address = None,
    scheduler: options.Scheduler = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Check this machine, its GPUs, ports, Redis, the model and the running cluster, and say what to do.

    Ends with exit code 1 where there is a problem.
    """

    def ask() -> Cluster:
        named = (address, scheduler, os.environ.get("OCTAVO_ADDRESS"), os.environ.get("OCTAVO_SCHEDULER"))
        told = CLUSTER_FILE.is_file()
        routers = connect_to(address, token_file=token_file, tls=tls, tls_ca=tls_ca)
        schedulers = connect_to(scheduler, service="scheduler", token_file=token_file, tls=tls, tls_ca=tls_ca)
        hidden = told and not any(named) and _tells_no_scheduler()
        return read_cluster(routers, None if hidden else schedulers, expected=any(named) or told)

    wishes = Wishes(checkout=_find_checkout(), model=model, redis=redis, architecture=architecture)
    with stderr_console().status("examining; kernels that were never compiled take a minute"):
        sections = examine(wishes, Probes(ask=ask))
    problems = count(sections, State.PROBLEM)
    if as_json:
        print(json.dumps(as_document(sections), indent=2))
    else:
        console = stdout_console()
        console.print(picture(sections))
        notes = count(sections, State.NOTE)
        console.print(f"{_plural(problems, 'problem')}, {_plural(notes, 'note')}", highlight=False)
    if problems:
        raise typer.Exit(1)


def picture(sections: Sequence[Section]) -> Table:
    """For people: a line for each finding, with what to do under it."""
    table = Table("", "check", "state", "found")
    for section in sections:
        title = section.title
        for finding in section.findings:
            table.add_row(
                Text(title), Text(finding.check), Text(finding.state, style=_STYLES[finding.state]), _found(finding)
            )
            title = ""
        table.add_section()
    return table


def _found(finding: Finding) -> Text:
    text = Text(finding.found)
    if finding.remedy:
        text.append(f"\n→ {finding.remedy}", style="bold")
    return text


def as_document(sections: Sequence[Section]) -> dict[str, Any]:
    """For machines."""
    return {
        "problems": count(sections, State.PROBLEM),
        "notes": count(sections, State.NOTE),
        "findings": [
            {"section": section.title} | dataclasses.asdict(finding)
            for section in sections
            for finding in section.findings
        ],
    }


def _tells_no_scheduler() -> bool:
    """Whether the cluster of .run/cluster.json keeps its scheduler to itself, as the one in containers does."""
    return not json.loads(CLUSTER_FILE.read_text()).get("scheduler")


def _find_checkout() -> Path | None:
    """The root of the checkout that is installed or holds the working directory; its packages can be imported from now on."""
    try:
        with checkout():
            from deploy.environment import ROOT
    except CommandProblem:
        return None
    return ROOT


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
