"""The environments of the clients: `python -m tests.clients.environments` makes all of them, side by side, in the user's cache.

Each is made once for its pinned requirements; only that needs a network. Node comes as a Python package, so no machine has to have it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("openai", "langchain", "litellm", "lm_eval", "node")


def cache() -> Path:
    """Where they are kept."""
    return Path(os.environ.get("OCTAVO_CACHE") or Path.home() / ".cache" / "octavo") / "clients"


def environment(name: str) -> Path:
    """The environment of this name, made if it is not there yet. Raises CalledProcessError with pip's or npm's words."""
    wanted = [HERE / "requirements" / f"{name}.txt"]
    if name == "node":
        wanted += [HERE / "package.json", HERE / "package-lock.json"]
    digest = hashlib.sha256(b"\0".join([sys.version.encode(), *(path.read_bytes() for path in wanted)])).hexdigest()
    folder = cache() / f"{name}-{digest[:16]}"
    stamp = folder / "made"
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(name, folder, wanted)
            stamp.touch()
    return folder


def _make(name: str, folder: Path, wanted: list[Path]) -> None:
    _run(sys.executable, "-m", "venv", folder)
    pip = folder / "bin" / "pip"
    _run(pip, "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", wanted[0])  # all are named there
    if name == "node":
        for path in wanted[1:]:
            shutil.copy(path, folder)
        _run(folder / "bin" / "npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", cwd=folder)


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    env = {**os.environ, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()


def main() -> None:
    """Make all that are missing."""
    with ThreadPoolExecutor(len(NAMES)) as threads:
        for name, folder in zip(NAMES, threads.map(environment, NAMES), strict=True):
            print(f"{name}: {folder}", flush=True)


if __name__ == "__main__":
    main()
