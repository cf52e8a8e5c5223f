"""Where models lie on disk, and how one gets there whole or not at all.

A model directory is built in a staging directory beside its final place, flushed, and renamed. Whoever builds holds
an flock on a lock file, which the kernel drops when its holder dies; so a staging directory seen by the holder of the
lock is a dead builder's and may be removed, and a directory under its final name is always complete.
"""

from __future__ import annotations

import difflib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import CacheError, ModelNotFoundError
from .packaged import PACKAGED
from .progress import Progress, ProgressCallback, ignore_progress

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """$OCTAVO_CACHE, else $XDG_CACHE_HOME/octavo, else ~/.cache/octavo. Nothing is created."""
    env = os.environ if environ is None else environ
    if own := env.get("OCTAVO_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = env.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path there is to be ignored.
    base = Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "octavo"


def is_repo_id(model: str) -> bool:
    """Whether `model` has the form ORG/NAME and cannot leave the cache as a path."""
    return _REPO_ID.fullmatch(model) is not None and ".." not in model


def entry_path(model: str, cache: Path) -> Path:
    """Where alias or ORG/NAME lies in the cache, be it there or not.

    Raises ModelNotFoundError when `model` is neither.
    """
    if model in PACKAGED:
        return cache / "models" / PACKAGED[model].entry_name
    if is_repo_id(model):
        return cache / "models" / model.replace("/", "--")
    known = sorted(PACKAGED)
    meant = difflib.get_close_matches(model, [*known, "mock"], 1)
    raise ModelNotFoundError(
        f"{model!r} is neither a directory, an alias ({', '.join(known)}), of the form ORG/NAME, nor mock"
        + "".join(f"; did you mean {name}?" for name in meant)
    )


def resolve(model: str, cache: Path | None = None) -> Path:
    """The directory of `model`: a path to one, or an alias or ORG/NAME that was pulled. Never downloads.

    A directory wins over a name in the cache. Raises ModelNotFoundError, saying which command helps.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"{path} holds no config.json: not a Hugging Face model directory")
        return path.absolute()
    if path.is_file():
        hint = f"; `octavo convert {model} DIR` makes one" if path.suffix == ".gguf" else ""
        raise ModelNotFoundError(f"{path} is a file; a model is a directory{hint}")
    entry = entry_path(model, cache or cache_dir())
    if not entry.is_dir():
        raise ModelNotFoundError(f"{model} is not in the cache ({entry.parent}): run `octavo pull {model}`")
    return entry


def publish(
    target: Path,
    build: Callable[[Path], None],
    *,
    progress: ProgressCallback = ignore_progress,
    reuse: bool = True,
    keep_partial: bool = False,
) -> Path:
    """Let `build(staging)` fill a directory and make it appear as `target`, in one step.

    Of several processes that publish the same target one builds and the others wait for it. What exists is returned
    with `reuse`, refused with CacheError without. When `build` fails nothing is left; with `keep_partial` the staging
    directory stays, for a download to go on from, and `build` gets it as it was.
    """
    if reuse and target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock"), progress):
            if reuse and target.is_dir():
                return target
            if target.is_dir() and any(target.iterdir()):
                raise CacheError(f"{target} exists and is not empty: give another directory or remove it")
            _build_and_rename(target, build, keep_partial)
    except OSError as error:
        raise CacheError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _build_and_rename(target: Path, build: Callable[[Path], None], keep_partial: bool) -> None:
    staging = target.with_name(f".{target.name}.partial")
    if staging.exists() and not keep_partial:
        shutil.rmtree(staging)
    staging.mkdir(exist_ok=True)
    try:
        build(staging)
        _flush_tree(staging)
        staging.replace(target)
    except BaseException:  # also KeyboardInterrupt: whatever ended the build, its remains go
        if not keep_partial or not any(staging.iterdir()):
            shutil.rmtree(staging)
        raise
    _flush(target.parent)


@contextmanager
def _locked(path: Path, progress: ProgressCallback) -> Iterator[None]:
    """Hold an exclusive lock on `path`, and remove the file at the end."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _wait_for_lock(descriptor, progress)
            if _is_still_at(descriptor, path):
                try:
                    yield
                finally:
                    path.unlink()
                return
        finally:
            os.close(descriptor)


def _wait_for_lock(descriptor: int, progress: ProgressCallback) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(Progress("wait", 0, None, ""))
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_still_at(descriptor: int, path: Path) -> bool:
    # The holder before us unlinked the file that we waited on; a lock on it would exclude nobody.
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flush_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _flush(path)
    _flush(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
