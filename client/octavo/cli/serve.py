"""`octavo serve`: the whole stack of a checkout in one foreground command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from octavo.cli.problem import CommandProblem

_NO_CHECKOUT = (
    "octavo serve runs the services of a checkout of Octavo: go there first (the wheel holds only the client)"
)


def serve(
    model: Annotated[
        str, typer.Argument(help="Model directory, a name that `octavo pull` knows, or `mock`.", show_default=False)
    ],
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float32 or float16.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="none, or int8: 8-bit products on the CPU, faster and in half the memory.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Context in tokens, prompt and output together.", min=1)
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option(help="Share of the device's memory to use.", min=0.01, max=1.0)
    ] = None,
    backend: Annotated[str | None, typer.Option(help="torch, cuda or mock.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 1,
    host: Annotated[str, typer.Option(help="Address that the router binds for gRPC with --port.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="Port of the router for gRPC. Default: 50051, or the next free one.", min=0, max=65535),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name under which clients ask for the model.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each worker.", min=1)] = None,
) -> None:
    """Serve a model: Redis, scheduler, router and workers, until Ctrl-C.

    OpenAI's API over HTTP is at port 50080 of 127.0.0.1, or the next free one; both addresses are printed once it serves.
    """
    flags = {
        "dtype": dtype,
        "quantization": quantization,
        "max_model_len": max_model_len,
        "memory_fraction": memory_fraction,
        "threads": threads,
    }
    with checkout():
        from deploy.cluster import ServeOptions
        from deploy.cluster import serve as serve_cluster
    chosen = ServeOptions(
        workers=workers,
        listen=None if port is None else f"[{host}]:{port}" if ":" in host and host[0] != "[" else f"{host}:{port}",
        backend=backend,
        served_name=name,
        worker_flags={flag: value for flag, value in flags.items() if value is not None},
    )
    raise typer.Exit(serve_cluster(model, chosen))


@contextmanager
def checkout() -> Iterator[None]:
    """Makes the packages of the checkout importable: it is installed, or the working directory lies in it."""
    if importlib.util.find_spec("deploy") is None:
        root = find_checkout(Path.cwd())
        if root is None:
            raise CommandProblem(_NO_CHECKOUT)
        sys.path.insert(0, str(root))
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == "deploy" or missing.startswith("deploy."):
            raise CommandProblem(_NO_CHECKOUT) from None
        raise CommandProblem(
            f"{missing} is not installed: run `make up` once, or install deploy/requirements"
        ) from None


def find_checkout(start: Path) -> Path | None:
    """The checkout that holds this directory."""
    for directory in (start, *start.parents):
        if (directory / "deploy" / "cluster.py").is_file() and (directory / "protos" / "octavo" / "v1").is_dir():
            return directory
    return None
