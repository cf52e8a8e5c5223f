"""`octavo bench`: load on a running cluster, and what it measured."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from octavo.cli import load_report, options
from octavo.cli.load_http import first_model
from octavo.cli.load_run import LoadResult, run_load
from octavo.cli.load_spec import LoadSpec
from octavo.cli.problem import NO_MODEL, CommandProblem
from octavo.cli.terminal import stderr_console, stdout_console
from octavo.client import Client, OctavoError
from octavo.client.admin import AdminClient
from octavo.client.connection import Connection
from octavo.v1 import inference_pb2 as pb
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_ABANDON_AFTER = 3  # tokens
_LEAK_SECONDS = 5.0


def bench(
    model: options.Model = "",
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", help="Streams open at once.", min=1)] = 1,
    requests: Annotated[
        int | None, typer.Option("--requests", help="Requests in all. Default: 4 × concurrency.", min=1)
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Instead of a closed loop: Poisson arrivals, so many a second.", min=0.0001)
    ] = None,
    input_len: Annotated[int, typer.Option(help="Prompt tokens.", min=1)] = 64,
    output_len: Annotated[int, typer.Option(help="Output tokens.", min=1)] = 64,
    prefix_len: Annotated[int, typer.Option(help="Prompt tokens that all requests share.", min=0)] = 0,
    prompt: Annotated[str | None, typer.Option(help="This text as every prompt, instead of random token ids.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", min=0.0)] = None,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Let the model end its output.")] = False,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.", min=0)] = 0,
    warmup: Annotated[int, typer.Option(help="Requests before the clock starts.", min=0)] = 1,
    processes: Annotated[int, typer.Option("--processes", "-p", help="Load-generator processes.", min=1)] = 1,
    abandon: Annotated[
        int | None,
        typer.Option(help=f"Open so many streams, hang up after {_ABANDON_AFTER} tokens, then look for leaks.", min=1),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.", min=0.001)] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
    keep_samples: Annotated[bool, typer.Option("--samples", help="Write every sample, too.")] = False,
    openai: Annotated[
        str | None,
        typer.Option(
            help="Base URL of any server that speaks OpenAI's API (http://HOST:PORT/v1), instead of our gRPC."
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="With --openai: random prompts have token ids below it.", min=1)
    ] = 10_000,
    address: options.Address = None,
    scheduler: options.Scheduler = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the API key or the cluster token. Default: the key $OCTAVO_API_KEY, then $OCTAVO_CLUSTER_TOKEN_FILE; with"
            " --openai the key $OPENAI_API_KEY alone.",
            rich_help_panel="Connection",
        ),
    ] = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
) -> None:
    """Measure TTFT, ITL, TPOT, end-to-end latency and tokens a second of a running cluster, or of another server (--openai).

    A server that takes no token ids needs --prompt; one that knows no ignore_eos, --stop-at-eos.
    """
    if prefix_len > input_len:
        raise typer.BadParameter("--prefix-len is above --input-len")
    if openai is not None:
        connection = _other_server(openai, token_file, tls_ca)
        served = pb.Model(name=model or _first_model(connection), vocab_size=vocab_size)
    else:
        connection = options.router_connection(address, token_file, tls, tls_ca)
        served = _choose_model(connection, model)
    spec = LoadSpec(
        addresses=connection.addresses,
        openai=openai is not None,
        token=connection.token,
        tls=connection.tls,
        tls_ca=None if connection.tls_ca is None else connection.tls_ca.decode(),
        model=served.name,
        vocab_size=served.vocab_size,
        requests=abandon or requests or 4 * concurrency,
        concurrency=concurrency,
        rate=rate,
        input_len=input_len,
        output_len=output_len,
        prefix_len=prefix_len,
        prompt=prompt,
        temperature=temperature,
        ignore_eos=not stop_at_eos,
        seed=seed,
        warmup=warmup,
        abandon_after=_ABANDON_AFTER if abandon else None,
        timeout=timeout,
    )
    result = _run_with_bar(spec, processes)
    summary = load_report.summarise(result)
    if abandon:
        with options.open_admin(scheduler, token_file, tls, tls_ca) as admin:
            summary["leaks"] = watch_release(admin, last_hang_up(result))
    _report(spec, summary, result, json_file, keep_samples)
    if summary["failed"] == summary["requests"]:
        raise CommandProblem(f"every request failed: {summary['first_error']}")


def _other_server(url: str, token_file: Path | None, tls_ca: Path | None) -> Connection:
    """The key comes from the file or $OPENAI_API_KEY: our own cluster's is nobody else's business."""
    try:
        token = token_file.read_text().strip() if token_file else os.environ.get("OPENAI_API_KEY")
        return Connection((url,), token=token or None, tls_ca=None if tls_ca is None else tls_ca.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise CommandProblem(str(error)) from None


def _first_model(connection: Connection) -> str:
    ca = None if connection.tls_ca is None else connection.tls_ca.decode()
    try:
        return asyncio.run(first_model(connection.addresses[0], connection.token, ca))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CommandProblem(f"{connection.addresses[0]} names no model ({error}); name one with --model") from None


def _choose_model(connection: Connection, name: str) -> pb.Model:
    with Client(connection) as client:
        models = client.list_models()
    if not name and len(models) == 1:
        return models[0]
    for model in models:
        if model.name == name:
            return model
    if not models:
        raise CommandProblem(NO_MODEL)
    known = ", ".join(model.name for model in models)
    raise CommandProblem(f"name a model with --model; served now: {known}")


def _run_with_bar(spec: LoadSpec, processes: int) -> LoadResult:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as bars:
        task = bars.add_task("requests", total=spec.requests)
        return run_load(spec, processes, lambda done: bars.update(task, completed=done))


def _report(
    spec: LoadSpec, summary: dict[str, Any], result: LoadResult, json_file: Path | None, keep_samples: bool
) -> None:
    console = stdout_console()
    console.print(load_report.table(summary))
    for reason, count in sorted(summary["errors"].items()):
        console.print(f"{count} × {reason}", style="red", markup=False)
    if summary["first_error"]:
        console.print(f"first: {summary['first_error']}", style="red", markup=False)
    if leaks := summary.get("leaks"):
        console.print(
            f"{summary['abandoned']} hung up; {leaks['seconds']:.2f} s after the last: {leaks['blocks_used']} blocks owned, "
            f"{leaks['running']} rows running"
        )
    if json_file is not None:
        written = load_report.document(spec, summary, result.samples if keep_samples else None)
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(written, indent=2) + "\n")
        except OSError as error:
            raise CommandProblem(f"{json_file}: {error.strerror or error}") from None


def last_hang_up(result: LoadResult) -> float:
    """When the last stream was abandoned, on the monotonic clock."""
    return max((sample["end"] for sample in result.samples), default=time.monotonic())


def watch_release(admin: AdminClient, since: float, limit: float = _LEAK_SECONDS) -> dict[str, Any]:
    """Ask the scheduler until no worker's block is owned and no row runs, or for `limit` seconds; what it said last.

    `seconds` count from `since`. Other clients' requests count as leaks, so measure on an idle cluster.
    """
    begin = time.monotonic()
    while True:
        try:
            workers = admin.list_workers()
        except OctavoError as error:
            raise CommandProblem(f"the scheduler can't be asked about leaks: {error}") from None
        now = time.monotonic()
        used = sum(worker.blocks_used for worker in workers)
        running = sum(worker.running for worker in workers)
        if (used == 0 and running == 0) or now - begin >= limit:
            return {"seconds": now - since, "blocks_used": used, "running": running}
        time.sleep(0.02)
