"""Environments: prerequisites, stamps, pins; what the services import; the shape of a release."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import environment, import_check, pip_progress
from deploy.environment import REQUIREMENTS, ROOT, EnvironmentProblem
from router.settings import RouterSettings
from scheduler.settings import SchedulerSettings
from service.settings import CommonSettings, parse


def test_an_old_python_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(EnvironmentProblem, match=r"3\.11 or newer"):
        environment.check_python()


def test_a_python_without_venv_is_told_which_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find(name))
    with pytest.raises(EnvironmentProblem, match="python3-venv"):
        environment.check_python()


def test_nothing_is_installed_while_the_stamp_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installs: list[list[str]] = []

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "lib/python3.11/site-packages").mkdir(parents=True)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(pip_progress, "install", lambda pip, arguments, log: installs.append(arguments))
    assert environment.ensure("router", tmp_path)
    assert installs == [["-r", str(REQUIREMENTS / "router.txt")]]
    assert not environment.ensure("router", tmp_path)
    assert len(installs) == 1

    monkeypatch.setattr(environment, "PIP", "pip==0")  # another installation is wanted now
    assert environment.ensure("router", tmp_path)


def test_an_interrupted_installation_leaves_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    stamp = tmp_path / ".octavo-scheduler"
    stamp.write_text("an older installation")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(pip_progress, "install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        environment.ensure("scheduler", tmp_path)
    assert not stamp.exists()


def _report(path: Path, builds: dict[str, str], folder: Path) -> None:
    items = []
    for name, version in builds.items():
        wheel = folder / f"{name}.whl"
        wheel.write_bytes(b"x" * 1_500_000)
        items.append({"metadata": {"name": name, "version": version}, "download_info": {"url": wheel.as_uri()}})
    path.write_text(json.dumps({"install": items}))


@pytest.mark.parametrize(
    ("builds", "said"),
    [
        ({"torch": "2.13.0", "nvidia-cublas": "13.1"}, "only the CUDA build of torch (2.13.0): 0.0 GB"),
        ({"torch": "2.13.0+cpu", "sympy": "1.14"}, None),
    ],
)
def test_a_large_torch_is_announced(
    builds: dict[str, str],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        assert "--dry-run" in command
        assert command[-1].startswith("torch==")
        _report(Path(command[command.index("--report") + 1]), builds, tmp_path)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", answer)
    environment.announce_torch(["pip"])
    out = capsys.readouterr().out
    assert ("NOTE" in out) == (said is not None)
    assert said is None or said in out


def test_everything_is_pinned_and_torch_is_the_workers_alone() -> None:
    pins = {path.name: path.read_text() for path in REQUIREMENTS.glob("*.txt")}
    for name, text in pins.items():
        for line in text.splitlines():
            if line and not line.startswith(("#", "-r ", "-c ")):
                assert re.match(r"[A-Za-z0-9_.-]+==[^ ]+( ;.*)?$", line), f"{name}: {line}"
    assert [name for name, text in pins.items() if re.search(r"^torch==", text, re.M)] == ["worker.txt"]
    assert not {"-r worker.txt"} & set((pins["router.txt"] + pins["scheduler.txt"] + pins["client.txt"]).splitlines())
    for line in pins["base.txt"].splitlines():
        if line.startswith("grpcio"):
            assert line.endswith("==1.82.3")


@pytest.mark.parametrize("service", import_check.WITHOUT_TORCH)
def test_router_and_scheduler_import_without_torch(service: str) -> None:
    command = [sys.executable, "-m", "deploy.import_check", service, "--forbid-torch"]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}:{ROOT / 'client'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch not loaded" in done.stdout


def test_a_worker_imports_where_there_is_no_cuda() -> None:
    program = "import sys; sys.modules['cuda'] = None; from deploy import import_check; sys.exit(import_check.main(['worker']))"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}:{ROOT / 'client'}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_import_check_sees_an_import_of_torch(tmp_path: Path) -> None:
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "__init__.py").touch()
    (tmp_path / "router" / "__main__.py").touch()
    (tmp_path / "router" / "heavy.py").write_text("import torch")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from deploy import import_check;"
        "import_check.ROOT = Path(sys.argv[1]); sys.exit(import_check.main(['router', '--forbid-torch']))"
    )
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "torch is only for worker/ and kernels/" in done.stderr


def test_compose_file_and_images_name_what_exists() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "deploy/install.sh" in dockerfile
    assert "USER octavo" in dockerfile
    assert "HEALTHCHECK" in dockerfile
    compose = Path(sys.executable).parent / "docker-compose"
    done = subprocess.run(
        [compose, "--file", ROOT / "docker-compose.yml", "config", "--format", "json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert sorted(services) == ["redis", "router", "scheduler", "worker"]
    for name in ("router", "scheduler", "worker"):
        assert services[name]["build"]["args"]["SERVICE"] == name
        assert services[name]["secrets"][0]["source"] == "cluster_token"
    assert [port["host_ip"] for port in services["router"]["ports"]] == ["127.0.0.1"] * 2
    for name, kind in (("router", RouterSettings), ("scheduler", SchedulerSettings), ("worker", CommonSettings)):
        told = {key: value or "" for key, value in services[name]["environment"].items()}
        assert parse(kind, name, [], told).metrics == "0.0.0.0:9100"  # and it does not refuse to start
