"""The cache: names, and that a directory appears whole, once, or not at all, whatever dies meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from octavo.models.cache import cache_dir, entry_path, publish, resolve
from octavo.models.errors import CacheError, ModelNotFoundError
from octavo.models.progress import Progress

SPAWN = multiprocessing.get_context("spawn")


def test_cache_dir_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir({"OCTAVO_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/octavo")
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "octavo"
    assert cache_dir({}) == tmp_path / ".cache" / "octavo"


def test_resolve_prefers_a_directory_and_explains_the_rest(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve(str(model), tmp_path)
    (model / "config.json").write_text("{}")
    assert resolve(str(model), tmp_path) == model
    gguf = tmp_path / "x.gguf"
    gguf.touch()
    with pytest.raises(ModelNotFoundError, match="octavo convert"):
        resolve(str(gguf), tmp_path)
    with pytest.raises(ModelNotFoundError, match="octavo pull smollm2"):
        resolve("smollm2", tmp_path)
    entry = entry_path("org/name", tmp_path)
    entry.mkdir(parents=True)
    assert resolve("org/name", tmp_path) == entry


@pytest.mark.parametrize("name", ["", "..", "a/../b", "../x", "a/b/c", "/etc", "a/..", ".a/b", "nothing"])
def test_names_that_are_no_models(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        entry_path(name, tmp_path)


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def build(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "model", build)
    assert list(tmp_path.iterdir()) == []


def test_keep_partial_hands_the_rest_to_the_next_call(tmp_path: Path) -> None:
    def fail(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise CacheError("network")

    def finish(staging: Path) -> None:
        assert (staging / "half").read_text() == "x"

    with pytest.raises(CacheError, match="network"):
        publish(tmp_path / "model", fail, keep_partial=True)
    publish(tmp_path / "model", finish, keep_partial=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_keep_partial_leaves_no_empty_directory(tmp_path: Path) -> None:
    def fail(staging: Path) -> None:
        raise CacheError("no such model")

    with pytest.raises(CacheError, match="no such model"):
        publish(tmp_path / "model", fail, keep_partial=True)
    assert list(tmp_path.iterdir()) == []


def test_occupied_target_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CacheError, match="not empty"):
        publish(tmp_path, lambda _: None, reuse=False)
    assert (tmp_path / "mine").read_text() == "x"


def test_unwritable_place_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot write"):
        publish(tmp_path / "file" / "model", lambda _: None)


def _publish_logged(target: Path, log: Path, start: float) -> None:
    def build(staging: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        (staging / "whole").write_text("x")

    while time.time() < start:
        time.sleep(0.005)
    publish(target, build)
    assert (target / "whole").read_text() == "x"


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    target, log = tmp_path / "cache" / "model", tmp_path / "log"
    start = time.time() + 0.5
    processes = [SPAWN.Process(target=_publish_logged, args=(target, log, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().splitlines()) == 1
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_threads_at_once_build_once_and_hear_that_they_wait(tmp_path: Path) -> None:
    builds: list[int] = []
    heard: list[Progress] = []
    building, waiting = threading.Event(), threading.Event()

    def build(staging: Path) -> None:
        builds.append(1)
        building.set()
        assert waiting.wait(30)

    def hear(progress: Progress) -> None:
        heard.append(progress)
        waiting.set()

    first = threading.Thread(target=publish, args=(tmp_path / "model", build))
    first.start()
    assert building.wait(30)
    publish(tmp_path / "model", build, progress=hear)
    first.join()
    assert builds == [1] and heard == [Progress("wait", 0, None, "")]


def _publish_and_hang(target: Path, started: Path) -> None:
    def build(staging: Path) -> None:
        (staging / "half").write_text("x")
        started.touch()
        signal.pause()

    publish(target, build)


def test_remains_of_a_killed_builder_are_cleaned_up(tmp_path: Path) -> None:
    target, started = tmp_path / "cache" / "model", tmp_path / "started"
    process = SPAWN.Process(target=_publish_and_hang, args=(target, started))
    process.start()
    while not started.exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not target.exists() and (target.parent / ".model.partial" / "half").exists()
    publish(target, lambda staging: (staging / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"nor mock; did you mean smollm2\?"):
        entry_path("smolm2", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"did you mean mock\?"):
        entry_path("mok", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"nor mock$"):
        entry_path("zzzz", tmp_path)
