"""`make up RUNTIME=docker`: the compose file at the top of the checkout, where an engine answers."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy import show, state
from deploy.environment import ROOT
from deploy.model import DEFAULT_MODEL
from deploy.readiness import ClusterError
from deploy.state import RUN, Cluster

ROUTER, HTTP = "127.0.0.1:50051", "127.0.0.1:50080"  # as docker-compose.yml publishes them
TOKEN_FILE = RUN / "cluster-token"


def compose_program() -> list[str]:
    """The compose command of this machine. Raises ClusterError where there is none, or no engine answers."""
    docker = shutil.which("docker")
    if docker is None:
        raise ClusterError("RUNTIME=docker needs docker, which is not on PATH; plain make up does without")
    asked = subprocess.run(
        [docker, "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        raise ClusterError(f"no Docker engine answers: {asked.stderr.strip()}; plain make up does without")
    plugin = subprocess.run([docker, "compose", "version"], capture_output=True, check=False)
    if plugin.returncode == 0:
        return [docker, "compose"]
    standalone = shutil.which("docker-compose")
    if standalone is None:
        raise ClusterError("docker has no compose: install its plugin or docker-compose 2")
    return [standalone]


def ensure_token() -> Path:
    """The cluster's secret, made on the first use.

    Readable by all inside .run/, which only its owner may enter: the containers' user has another id than ours.
    """
    RUN.mkdir(mode=0o700, exist_ok=True)
    RUN.chmod(0o700)
    if not TOKEN_FILE.exists():
        new = TOKEN_FILE.with_suffix(".new")
        new.write_text(secrets.token_urlsafe(32) + "\n")
        new.chmod(0o444)
        new.replace(TOKEN_FILE)
    return TOKEN_FILE


def up(model: str, workers: int) -> int:
    """Build the images, start everything and wait for the health checks. Returns an exit code."""
    if Path(model).is_dir():
        raise ClusterError("with RUNTIME=docker MODEL is a name to pull, or mock; a directory would have to be mounted")
    program = compose_program()
    ensure_token()
    arguments = ["up", "--build", "--detach", "--wait", "--scale", f"worker={workers}"]
    code = _compose(program, arguments, {"MODEL": model or DEFAULT_MODEL})
    if code != 0:
        raise ClusterError(f"docker compose up failed with exit code {code}")
    token = TOKEN_FILE.relative_to(ROOT)
    cluster = Cluster(
        router=(ROUTER,), http=(HTTP,), scheduler=(), redis=None, model=model, runtime="docker", token_file=str(token)
    )
    state.write(cluster)
    show.summary(cluster)
    return 0


def down() -> None:
    """Stop and remove the containers; images and the volume of models stay."""
    _compose(compose_program(), ["down"])


def ps() -> int:
    """Returns compose's exit code."""
    return _compose(compose_program(), ["ps"])


def logs(name: str | None, follow: bool) -> int:
    """Returns compose's exit code."""
    arguments = ["logs", "--tail", "100", *(["--follow"] if follow else []), *([name] if name else [])]
    return _compose(compose_program(), arguments)


def _compose(program: Sequence[str], arguments: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    return subprocess.run([*program, *arguments], cwd=ROOT, env={**os.environ, **(env or {})}, check=False).returncode
