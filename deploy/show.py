"""What `make up` and `make ps` tell people."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deploy import readiness
from deploy.commands import Command
from deploy.environment import ROOT
from deploy.readiness import read_ready
from deploy.state import Cluster
from deploy.supervise import State, Supervisor
from service.probe import probe


def wait(commands: Sequence[Command], supervisor: Supervisor, timeout: float) -> None:
    """Wait until all serve, with a line for each process. Raises what readiness.wait_ready raises."""
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as bars:
        tasks = {command.name: bars.add_task(command.name, total=1) for command in commands}
        readiness.wait_ready(
            commands,
            lambda command: supervisor.death(command.name),
            timeout,
            on_ready=lambda command: bars.update(tasks[command.name], completed=1),
        )


def processes(states: Mapping[str, State], ready: Path) -> None:
    """A table of the processes, with addresses and health."""
    rows = [("name", "state", "pid", "uptime", "address", "health", "metrics")]
    for state in states.values():
        told = read_ready(ready / f"{state.name}.json")
        rows.append(
            (
                state.name,
                # The process runner calls a process starting for its first seconds, whatever it says itself.
                "running" if told and state.state == "STARTING" else state.state.lower(),
                str(state.pid or "-"),
                f"{state.uptime} s",
                "-" if told is None else f"{told.address}, http {told.http}" if told.http else told.address,
                probe(told.address).lower() if told else "-",
                f"http://{told.metrics}/metrics" if told else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def summary(cluster: Cluster, already: bool = False) -> None:
    """Addresses, and three commands that work when pasted."""
    print("\nA cluster runs here already." if already else "\nThe cluster is ready.")
    how = ", ".join(filter(None, (cluster.backend, cluster.quantization)))
    lines = {
        "model": f"{cluster.model}   ({how})" if how else cluster.model,
        "router": f"{', '.join(cluster.router)}   (gRPC, with reflection and health)",
        "http": ", ".join(f"http://{address}/v1" for address in cluster.http) + "   (OpenAI's API)"
        if cluster.http
        else "none",
        "scheduler": ", ".join(cluster.scheduler) or "inside the compose network",
        "redis": cluster.redis or "none",
    }
    for key, value in lines.items():
        print(f"  {key:10} {value}")
    for name, address in cluster.metrics.items():
        print(f"  {'metrics':10} http://{address}/metrics   ({name})")
    print("\nTry:")
    for command in tries(cluster):
        print(f"  {command}")
    print("\nmake ps, make logs, make worker, make down; make help tells more.")


def tries(cluster: Cluster) -> list[str]:
    """The three commands to try, for a shell in the checkout."""
    router = cluster.router[0]
    request = {
        "model": cluster.model,
        "chat": {
            "messages": [
                {"role": "user", "content": [{"text": "What is the capital of France? Answer in one sentence."}]}
            ],
        },
        "sampling": {"temperature": 0, "max_tokens": 32},
    }
    header, variable = "", ""
    if cluster.token_file is not None:
        path = shlex.quote(cluster.token_file)
        header = f'-H "authorization: Bearer $(cat {path})" '
        variable = f"OCTAVO_CLUSTER_TOKEN_FILE={path} "
    call = f"{_tool('grpcurl')} -plaintext {header}-d {shlex.quote(json.dumps(request))} {router}"
    octavo, model = variable + _tool("octavo"), shlex.quote(cluster.model)
    return [
        f"{call} octavo.v1.InferenceService/Generate",
        f"{octavo} chat --model {model}",
        f"{octavo} generate --model {model} --max-tokens 32 {shlex.quote('The capital of France is')}",
    ]


def _tool(name: str) -> str:
    """A program of this environment as one types it in the checkout."""
    path = Path(sys.executable).parent / name
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return shlex.quote(str(shown))
