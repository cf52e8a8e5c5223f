"""What `octavo doctor` says of a model, its kernels and the checkout."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from octavo.doctor import model_files
from octavo.doctor.findings import Ran, State

from deploy import doctor, doctor_model
from deploy.environment import ROOT, requirements_digest
from tests.unit.doctor_facts import CONFIG, GPU, make_model, only

STORED = 2_500_000_000  # bytes of Llama-3.2-1B


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def test_a_whole_model(model: Path, tmp_path: Path) -> None:
    findings, directory = model_files.check_cached(str(model), True, tmp_path)
    assert (only(findings).state, directory) == (State.OK, model)
    assert model_files.total_bytes(model) == 30
    (model / "tokenizer_config.json").unlink()
    findings, directory = model_files.check_cached(str(model), True, tmp_path)
    assert ([finding.state for finding in findings], directory) == ([State.OK, State.NOTE], model)
    (model / "chat_template.jinja").write_text("x")
    assert only(model_files.check_cached(str(model), True, tmp_path)[0]).state is State.OK


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"{", "no JSON"),
        ("config.json", b"[]", "no JSON object"),
        ("model-2.safetensors", None, "No such file"),
        ("model-2.safetensors", b"abc", "cut short"),
        ("model-2.safetensors", struct.pack("<Q", 2) + b"{}" + b"x", ""),
        ("model-2.safetensors", struct.pack("<Q", 4) + b'{"a"', "no Safetensors"),
        ("model-2.safetensors", struct.pack("<Q", 8) + b'{"a": 1}', "no Safetensors"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "names no file"),
        ("model.safetensors.index.json", b'{"weight_map": 3}', "weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}', "weight_map"),
    ],
)
def test_files_that_are_missing_or_broken(
    model: Path, tmp_path: Path, name: str, content: bytes | None, text: str
) -> None:
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content)
    findings, directory = model_files.check_cached(str(model), True, tmp_path)
    if not text:
        assert directory == model
        return
    assert (only(findings).state, directory) == (State.PROBLEM, None)
    assert text in only(findings).found


def test_a_file_that_is_cut_short(model: Path, tmp_path: Path) -> None:
    shard = model / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    finding = only(model_files.check_cached(str(model), True, tmp_path)[0])
    assert finding.state is State.PROBLEM and "cut short" in finding.found


def test_a_model_that_is_not_in_the_cache(tmp_path: Path) -> None:
    asked, not_asked = (only(model_files.check_cached("ORG/NAME", asked, tmp_path)[0]) for asked in (True, False))
    assert (asked.state, not_asked.state) == (State.PROBLEM, State.NOTE)
    assert "octavo pull ORG/NAME" in asked.remedy
    (tmp_path / "models" / ".ORG--NAME.partial").mkdir(parents=True)
    assert "interrupted" in only(model_files.check_cached("ORG/NAME", True, tmp_path)[0]).found
    assert "ORG/NAME, or one of smollm2" in only(model_files.check_cached("no-name", True, tmp_path)[0]).remedy
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "octavo convert" in only(model_files.check_cached(str(tmp_path / "a.gguf"), True, tmp_path)[0]).remedy


def test_configs(model: Path) -> None:
    findings, config = doctor_model.check_config(model)
    assert only(findings).state is State.OK and config is not None
    (model / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["GPT2LMHeadModel"]}))
    findings, config = doctor_model.check_config(model)
    assert only(findings).state is State.PROBLEM and config is None
    assert "GPT2LMHeadModel" in only(findings).found


def test_what_fits(model: Path) -> None:
    config = doctor_model.load_config(model)
    on_gpu, on_cpu = doctor_model.check_fit(config, STORED, 64 << 30, [GPU])
    # 0.9 of 79 GiB without weights, workspace and graphs; a block is 2 * 16 layers * 512 * 2 bytes * 16 tokens = 512 KiB.
    assert on_gpu.state is State.OK and "KV-cache blocks of 512 KiB" in on_gpu.found
    blocks = int(on_gpu.found.split("about ")[1].split(" ")[0].replace(",", ""))
    assert 130_000 < blocks < 0.9 * (79 << 30) / (512 << 10)
    assert on_cpu.state is State.OK
    small = dataclasses.replace(GPU, memory_free=6 << 30)
    assert doctor_model.check_fit(config, STORED, None, [small])[0].state is State.NOTE
    none = dataclasses.replace(GPU, memory_free=2 << 30)
    on_gpu, on_cpu = doctor_model.check_fit(config, STORED, 1 << 30, [none])
    assert (on_gpu.state, on_cpu.state) == (State.PROBLEM, State.NOTE)
    assert only(doctor_model.check_fit(config, STORED, 1 << 30, [])).state is State.PROBLEM


def test_kernels(model: Path) -> None:
    config = doctor_model.load_config(model)
    asked: list[tuple[Sequence[str], float, Path | None]] = []

    def compiler(out: str, error: str = "") -> Any:
        def run(argv: Sequence[str], timeout: float, directory: Path | None = None) -> Ran:
            asked.append((argv, timeout, directory))
            return Ran(0, out, error)

        return run

    good = json.dumps({"nvrtc": "13.0", "architecture": "sm_90a", "modules": 1, "cached": 0})
    assert only(doctor_model.check_kernels(["sm_90a"], config, compiler(good), False)).state is State.OK
    argv, _, directory = asked[0]
    assert argv[1:4] == ["-m", "kernels.check", "sm_90a"] and directory == ROOT and "--all" not in argv
    assert json.loads(argv[-1])["hidden_size"] == 2048
    doctor_model.check_kernels(["sm_90a"], None, compiler(good), True)
    assert asked[-1][0][-1] == "--all"
    refused = only(doctor_model.check_kernels(["sm_90a"], config, compiler('{"error": "a.cu(3): no\\nmore"}'), True))
    assert refused.state is State.PROBLEM and refused.found.endswith("a.cu(3): no")
    dead = only(doctor_model.check_kernels(["sm_90a"], config, compiler("", "Traceback\nOSError: libnvrtc.so"), False))
    assert dead.state is State.PROBLEM and "libnvrtc.so" in dead.found
    odd = dataclasses.replace(config, head_dim=80)
    assert only(doctor_model.check_kernels(["sm_90a"], odd, compiler(good), True)).state is State.PROBLEM


def test_nvrtc_compiles_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")
    from kernels import check

    assert check.main(["sm_90a"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["modules"], answer["architecture"]) == (1, "sm_90a")
    assert check.main(["sm_1"]) == 1
    assert "sm_1" in json.loads(capsys.readouterr().out)["error"]


def test_the_environment_of_a_checkout(tmp_path: Path) -> None:
    pins = {item.name: item.specifiers[0][1] for item in doctor.read_requirements(doctor.REQUIREMENTS / "local.txt")}
    stamp, packages, along = doctor.check_environment(tmp_path, pins.get)
    assert (stamp.state, packages.state, along.state) == (State.NOTE, State.OK, State.OK)
    alone = only(doctor.check_environment(tmp_path, {"rich": "1"}.get))
    assert alone.state is State.NOTE and "client alone" in alone.found
    assert "make env" in stamp.remedy and packages.check == "packages (local)"
    (tmp_path / ".octavo-client").write_text("old")
    assert "changed since" in doctor.check_environment(tmp_path, pins.get)[0].found
    (tmp_path / ".octavo-client").write_text(requirements_digest("client"))
    assert doctor.check_environment(tmp_path, pins.get)[0].state is State.OK
    short = {name: version for name, version in pins.items() if name != "rich"}
    missing = doctor.check_environment(tmp_path, short.get)[1]
    assert (
        missing.state is State.PROBLEM and "rich==" in missing.found and "deploy.environment client" in missing.remedy
    )
    other = doctor.check_environment(tmp_path, {**pins, "click": "1.0"}.get)[2]
    assert other.state is State.NOTE and "click 1.0" in other.found


def test_processes_that_run_older_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / ".run" / "ready").mkdir(parents=True)
    ready = tmp_path / ".run" / "ready" / "router-1.json"
    facts = {
        "service": "router",
        "name": "router-1",
        "address": "127.0.0.1:1",
        "metrics": "127.0.0.1:2",
        "http": "127.0.0.1:9",
        "incarnation": 1,
    }
    ready.write_text(json.dumps(facts | {"pid": os.getpid()}))
    (tmp_path / ".run" / "cluster.json").write_text('{"redis": "redis://127.0.0.1:3/0", "model_argument": "mock"}')
    (tmp_path / "router").mkdir()
    source = tmp_path / "router" / "a.py"
    source.write_text("")
    os.utime(source, (1, 1))
    assert doctor.check_versions() == []
    assert doctor.own_addresses() == {
        "127.0.0.1:1": "router-1",
        "127.0.0.1:2": "router-1's metrics",
        "127.0.0.1:9": "router-1's HTTP door",
        "127.0.0.1:3": "Redis",
    }
    assert doctor.model_argument() == "mock"
    assert doctor.check_promises(1 << 30) == []
    ready.write_text(json.dumps(facts | {"pid": os.getpid(), "may_reach_bytes": 50 << 30}))
    over = only(doctor.check_promises(20 << 30))
    assert over.state is State.PROBLEM and "20.0 GiB are available" in over.found and "WORKERS=n" in over.remedy
    assert only(doctor.check_promises(60 << 30)).state is State.OK
    os.utime(source, (4e9, 4e9))
    assert "router/a.py" in only(doctor.check_versions()).found
    ready.unlink()
    assert doctor.own_addresses() == {}
    (tmp_path / ".run" / "cluster.json").write_text("[")
    assert doctor.redis_url() is None
