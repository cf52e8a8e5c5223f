"""The `octavo` command put together. Errors end as one sentence on stderr and exit code 1, wrong usage as 2."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated, Any

import typer
from octavo.cli import bench, chaos, chat, doctor, generate, inspect, model_files, operate, serve
from octavo.cli.problem import CommandProblem, sentence
from octavo.cli.terminal import stderr_console
from octavo.client import ConnectionProblem, OctavoError
from typer.core import TyperGroup


def _told() -> tuple[type[Exception], ...]:
    """What ends as one sentence: the client's errors, and those of the checkout's packages where a command has loaded them."""
    cluster = getattr(sys.modules.get("deploy.readiness"), "ClusterError", None)
    return (OctavoError, ConnectionProblem, CommandProblem, *([cluster] if cluster is not None else []))


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _told() as error:
            stderr_console().print(f"error: {sentence(error)}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    help="Octavo, an LLM server of gRPC microservices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(version())
        raise typer.Exit


def version() -> str:
    """Of the installed package; a checkout that was not installed has none."""
    try:
        return importlib.metadata.version("octavo")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (checkout)"


@app.callback()
def _root(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Octavo, an LLM server of gRPC microservices."""


for _panel, _commands in {
    "Ask": (generate.generate, chat.chat, generate.models, generate.tokenize),
    "Models": (model_files.pull, model_files.convert),
    "Run": (
        serve.serve,
        inspect.workers,
        inspect.inspect,
        operate.drain,
        operate.admit,
        bench.bench,
        chaos.chaos,
        doctor.doctor,
    ),
}.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)


def main() -> None:
    """Entry point of the installed command."""
    app(prog_name="octavo")


if __name__ == "__main__":
    main()
