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
    model: Annotated[str, typer.Option(help="mock, a name to pull, or a directory.")] = "mock",
    seconds: Annotated[float, typer.Option(help="How long faults come.", min=1.0)] = 60.0,
    seed: Annotated[int, typer.Option(help="Draws the faults.")] = 1,
    streams: Annotated[int | None, typer.Option(help="Streams at once [64, of a real model 8].", min=1)] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes [3, of a real model 2].", min=1)] = None,
    schedulers: Annotated[int, typer.Option(help="Scheduler processes.", min=1)] = 2,
    routers: Annotated[int, typer.Option(help="Router processes.", min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the report to this file as well.")] = None,
) -> None:
    """Kill, stop, part and restart the processes of a cluster of its own, and compare every token of every stream."""
    with checkout():
        from deploy.chaos import Chaos, ChaosSettings, as_document
    sizes = {name: value for name, value in (("streams", streams), ("workers", workers)) if value is not None}
    settings = ChaosSettings.of(model, seconds=seconds, seed=seed, schedulers=schedulers, routers=routers, **sizes)
    stderr_console().print(
        f"{seconds:.0f} s of faults among {settings.streams} streams; the running cluster, if any, is left alone"
    )
    try:
        report = asyncio.run(Chaos(settings).run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        stderr_console().print("stopped")
        raise typer.Exit(130) from None
    text = json.dumps(as_document(settings, report), indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    if not report.survived:
        raise typer.Exit(1)
