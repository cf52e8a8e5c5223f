"""What MODEL means: a directory, a name to pull, or the mock. `python -m deploy.model MODEL` pulls and prints the directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.commands import is_mock
from deploy.readiness import ClusterError

if TYPE_CHECKING:
    from rich.progress import TaskID

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a worker takes it. `name` is what clients ask for."""

    argument: str
    name: str
    served_name: str | None
    backend: str | None


def name_of(model: str) -> str:
    """What clients would ask for, found without fetching anything."""
    if is_mock(model):
        return model.partition(":")[2] or "mock"
    directory = Path(model).expanduser()
    return directory.resolve().name if directory.is_dir() else model


def resolve(model: str, served_name: str | None = None, backend: str | None = None) -> Model:
    """Find or fetch a model. Shows progress where it downloads. Raises ClusterError."""
    name = served_name or name_of(model)
    if is_mock(model):
        return Model(model, name, served_name, "mock")
    check_name(model)
    directory = Path(model).expanduser()
    if directory.is_dir():
        return Model(str(directory.resolve()), name, name, backend)
    return Model(str(_pull(model)), name, name, backend)


def check_name(model: str) -> None:
    """Whether this is a directory, a mock, or a name that could be pulled; nothing is fetched. Raises ClusterError."""
    from octavo.models.cache import cache_dir, entry_path
    from octavo.models.errors import ModelNotFoundError

    if is_mock(model) or Path(model).expanduser().is_dir():
        return
    if model.startswith(("/", "./", "../", "~")):
        raise ClusterError(f"no such directory: {model}")
    try:
        entry_path(model, cache_dir())
    except ModelNotFoundError as error:
        raise ClusterError(str(error)) from None


def _pull(model: str) -> Path:
    # Heavy, and the mock does without.
    from octavo.models.errors import ModelError
    from octavo.models.progress import Progress as Report
    from octavo.models.pull import pull
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(report: Report) -> None:
            if report.stage not in tasks:
                tasks[report.stage] = bars.add_task(f"{model}: {report.stage}", total=report.total)
            bars.update(tasks[report.stage], completed=report.done, total=report.total)

        try:
            return pull(model, show)
        except ModelError as error:
            raise ClusterError(str(error)) from error


def main(argv: list[str]) -> int:
    """Returns an exit code."""
    if len(argv) != 1:
        print("usage: python -m deploy.model MODEL", file=sys.stderr)
        return 2
    try:
        print(resolve(argv[0]).argument)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
