"""`octavo chaos`: faults in a cluster of its own, and every token compared."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from octavo.cli.serve import checkout
from octavo.cli.terminal import stderr_console


def chaos(
    seconds: Annotated[float, typer.Option(help="How long faults come.", min=1.0)] = 60.0,
    seed: Annotated[int, typer.Option(help="Draws the faults.")] = 1,
    streams: Annotated[int, typer.Option(help="Streams at once.", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 3,
    schedulers: Annotated[int, typer.Option(help="Scheduler processes.", min=1)] = 2,
    routers: Annotated[int, typer.Option(help="Router processes.", min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the report to this file as well.")] = None,
) -> None:
    """Kill, stop and part the processes of a cluster of its own (mock model), and compare every token of every stream."""
    with checkout():
        from deploy.chaos import Chaos, ChaosSettings
    settings = ChaosSettings(
        seconds=seconds, seed=seed, streams=streams, workers=workers, schedulers=schedulers, routers=routers
    )
    stderr_console().print(
        f"{seconds:.0f} s of faults among {streams} streams; the running cluster, if any, is left alone"
    )
    try:
        report = asyncio.run(Chaos(settings).run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        stderr_console().print("stopped")
        raise typer.Exit(130) from None
    text = json.dumps(report.as_json(), indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    if not report.survived:
        raise typer.Exit(1)
