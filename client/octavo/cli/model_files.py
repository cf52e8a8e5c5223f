"""`octavo pull` and `octavo convert`: models on disk. The libraries they need come with the extra `octavo[models]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from octavo.cli.problem import CommandProblem
from octavo.cli.terminal import stderr_console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from octavo.models.progress import Progress as Report
    from octavo.models.progress import ProgressCallback

_STAGES = {
    "wait": "waiting for another process",
    "download": "downloading",
    "verify": "verifying",
    "convert": "converting",
}


def pull(
    model: Annotated[str, typer.Argument(help="`smollm2`, or ORG/NAME on Hugging Face.", show_default=False)],
) -> None:
    """Download a model, convert it if needed, and print its directory."""
    with _extra():
        from octavo.models.pull import pull as pull_model
    with _bars(model) as report, _model_errors():
        directory = pull_model(model, report)
    print(directory)


def convert(
    file: Annotated[Path, typer.Argument(help="GGUF file.", show_default=False)],
    directory: Annotated[
        Path, typer.Argument(help="Directory to write; must not exist or be empty.", show_default=False)
    ],
) -> None:
    """Convert a Llama-family GGUF file to a Hugging Face directory in bfloat16."""
    with _extra():
        from octavo.models.gguf_convert import convert as convert_file
    with _bars(file.name) as report, _model_errors():
        written = convert_file(file, directory, report)
    print(written)


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandProblem(f"{error.name} is not installed: pip install 'octavo[models]'") from None


@contextmanager
def _model_errors() -> Iterator[None]:
    from octavo.models.errors import ModelError

    with _extra():
        try:
            yield
        except ModelError as error:
            raise CommandProblem(str(error)) from None


@contextmanager
def _bars(name: str) -> Iterator[ProgressCallback]:
    """Progress bars on stderr, one for each stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), _AmountColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr_console()) as bars:
        tasks = {}

        def show(report: Report) -> None:
            if report.stage not in tasks:
                label = f"{name}: {_STAGES[report.stage]}"
                tasks[report.stage] = bars.add_task(label, total=report.total, unit=report.unit)
            bars.update(tasks[report.stage], completed=report.done, total=report.total)

        yield show


class _AmountColumn(ProgressColumn):
    """Bytes as sizes, everything else as a count."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn(binary_units=True)
        self._tensors = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if unit == "bytes":
            return self._bytes.render(task)
        return self._tensors.render(task) if unit == "tensors" else Text()
