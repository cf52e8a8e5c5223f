"""The Python environment of a checkout: `python3 -m deploy.environment local|dev|client|SERVICE [DIRECTORY]`.

Runs on the system's Python with nothing installed, so it imports the standard library only, and its syntax is old enough
for a Python that is too old to say so. A stamp with the hash of what was asked for is written after a whole installation:
a second run does nothing, an interrupted one starts again where pip's cache ends.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from deploy import pip_progress

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "deploy" / "requirements"
SERVICES = ("router", "scheduler", "worker")
SETS = ("local", "dev", "client", *SERVICES)
WITH_TORCH = ("local", "dev", "worker")
MIN_PYTHON = (3, 11)
PIP = "pip==26.1"
# The public CUDA build of torch 2.13 with its libraries, for when no server tells a size.
_CUDA_BYTES_GUESS = 2_600_000_000


class EnvironmentProblem(Exception):
    """Something is missing on this machine; the text says what to do."""


def check_python() -> None:
    """Raises EnvironmentProblem unless this Python can make an environment."""
    if sys.version_info < MIN_PYTHON:
        found = ".".join(str(part) for part in sys.version_info[:3])
        raise EnvironmentProblem(
            f"Python 3.11 or newer is needed, {sys.executable} is {found}. Name another one: make PYTHON=python3.11 …"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise EnvironmentProblem(
            f"{sys.executable} has no complete venv module. On Debian and Ubuntu: apt-get install python3-venv"
        )


def requirements_digest(wanted: str) -> str:
    """SHA-256 over everything that decides what gets installed."""
    digest = hashlib.sha256(f"{wanted} {PIP} {sys.version_info[:2]}".encode())
    for path in [*sorted(REQUIREMENTS.glob("*.txt")), ROOT / "pyproject.toml"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def ensure(wanted: str, directory: Path) -> bool:
    """Make `directory` an environment that holds the set `wanted`. Returns False where it already did.

    Raises EnvironmentProblem for a missing prerequisite, CalledProcessError where pip failed (it has said why).
    """
    stamp = directory / f".octavo-{wanted}"
    digest = requirements_digest(wanted)
    if stamp.exists() and stamp.read_text() == digest and _has_pip(directory):
        return False
    check_python()
    stamp.unlink(missing_ok=True)
    if not _has_pip(directory):
        print(f"Making a Python environment in {directory}", flush=True)
        # --clear: what an interrupted run left may look like an environment and not be one.
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--disable-pip-version-check", PIP], check=True)
    if wanted in WITH_TORCH and not _has_torch(directory):
        announce_torch(pip)
    log = directory / f"pip-{wanted}.log"
    print(f"Installing what {wanted!r} needs (deploy/requirements/{wanted}.txt)", flush=True)
    pip_progress.install(pip, ["-r", str(REQUIREMENTS / f"{wanted}.txt")], log)
    if wanted in SERVICES:
        _write_path_file(directory)
    else:
        # Our own package last and without its dependencies: they are pinned above. Setuptools is among them.
        own = ["--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
        subprocess.run([*pip, "install", "--disable-pip-version-check", *own], check=True)
    stamp.write_text(digest)
    return True


def announce_torch(pip: list[str]) -> None:
    """Say before a large download that only torch's CUDA build is to be had, and how large it is."""
    torch_pin = _pinned("torch")
    print(f"Asking pip which build of {torch_pin} there is for this Python", flush=True)
    with tempfile.TemporaryDirectory(prefix="octavo-") as scratch:
        report = Path(scratch) / "report.json"
        asked = [*pip, "install", "--dry-run", "-qq", "--report", str(report)]
        if subprocess.run([*asked, torch_pin], check=False).returncode != 0:
            raise EnvironmentProblem(f"pip finds no {torch_pin} for Python {sys.version_info[0]}.{sys.version_info[1]}")
        items = json.loads(report.read_text())["install"]
    versions = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in items}
    if "torch" not in versions or not any(name.startswith(("nvidia-", "cuda-")) for name in versions):
        return
    sizes = [_size_of(item["download_info"]["url"]) for item in items]
    known = sum(size for size in sizes if size is not None)
    amount = f"{known / 1e9:.1f} GB" if None not in sizes else f"about {_CUDA_BYTES_GUESS / 1e9:.1f} GB"
    print(
        f"NOTE: for this Python pip offers only the CUDA build of torch ({versions['torch']}): {amount} to download, and "
        "about three times that on disk.\n"
        "      It also runs without a GPU. For the small CPU build point pip at a folder or an index that has it\n"
        "      (pip's settings: PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) and start again. Ctrl-C stops; nothing is lost.",
        flush=True,
    )


def _pinned(package: str) -> str:
    for line in (REQUIREMENTS / "worker.txt").read_text().splitlines():
        if line.split("==")[0].strip() == package:
            return line.strip()
    raise EnvironmentProblem(f"deploy/requirements/worker.txt pins no {package}")


def _size_of(url: str) -> int | None:
    """Bytes behind a URL, or None where the server does not say."""
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    request = urllib.request.Request(url, method="HEAD")
    try:
        # file: URLs of wheel folders answer with a length too.
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            length = answer.headers.get("Content-Length")
    except (urllib.error.URLError, OSError):
        return None
    return int(length) if length is not None and length.isdigit() else None


def _has_pip(directory: Path) -> bool:
    python = directory / "bin" / "python"
    if not python.exists():
        return False
    command = [str(python), "-c", "import pip, sys; sys.exit(sys.version_info < (3, 11))"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _has_torch(directory: Path) -> bool:
    return any(directory.glob("lib/python*/site-packages/torch/__init__.py"))


def _write_path_file(directory: Path) -> None:
    """Let `python -m SERVICE` find the checkout from anywhere."""
    for packages in directory.glob("lib/python*/site-packages"):
        paths = (ROOT, ROOT / "protos", ROOT / "client")
        (packages / "octavo-checkout.pth").write_text("".join(f"{path}\n" for path in paths))


def main(argv: list[str]) -> int:
    """Returns an exit code."""
    if not 1 <= len(argv) <= 2 or argv[0] not in SETS:
        print(f"usage: python3 -m deploy.environment {'|'.join(SETS)} [DIRECTORY]", file=sys.stderr)
        return 2
    default = ROOT / (f".venv-{argv[0]}" if argv[0] in SERVICES else ".venv")
    directory = Path(argv[1]).resolve() if len(argv) == 2 else default
    try:
        if shutil.disk_usage(ROOT).free < 2 << 30 and not directory.exists():
            print("warning: less than 2 GiB are free on this disk", file=sys.stderr)
        ensure(argv[0], directory)
    except EnvironmentProblem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd[:6])} … failed; run the same command again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
