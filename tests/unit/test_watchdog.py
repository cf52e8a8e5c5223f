"""An event loop that stands still is seen, shown, counted and ended; a process that was only stopped is not taken for one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from deploy.cluster import LocalCluster
from service.stacks import task_stacks
from service.watchdog import BEAT_SECONDS, LoopWatchdog, Stillness

STALLS = """
import asyncio, logging, sys, threading
from service.lifecycle import run
from service.settings import CommonSettings

async def bystander():
    await asyncio.Event().wait()

async def serve(life):
    task = asyncio.create_task(bystander())
    await asyncio.sleep(0)
    {stall}

sys.exit(run("example", CommonSettings(stall_seconds=0.2, stall_exit_seconds=0.5), serve))
"""


def test_a_stall_is_shown_counted_and_ended_and_a_turn_forgives(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()
    turned = threading.Event()

    def stuck_here() -> None:
        assert released.wait(30)

    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    async def main() -> LoopWatchdog:
        loop = asyncio.get_running_loop()
        watchdog = LoopWatchdog(loop, 0.2, 0.5, leave=released.set)
        bystander = asyncio.create_task(waits_for_ever())
        await asyncio.sleep(0)
        watchdog.start()
        stuck_here()
        await asyncio.sleep(3 * BEAT_SECONDS)
        turned.set()
        bystander.cancel()
        watchdog.stop()
        return watchdog

    with caplog.at_level(logging.CRITICAL, "octavo.watchdog"):
        watchdog = asyncio.run(main())
    assert turned.is_set()
    assert watchdog.stalls == 1
    assert "stuck_here" in caplog.text
    assert "1 × test_a_stall_is_shown_counted_and_ended_and_a_turn_forgives.<locals>.waits_for_ever at" in caplog.text
    assert "leaving" in caplog.text
    assert watchdog.lag.recent == watchdog.lag.longest > 0.4


def test_only_the_time_counts_in_which_the_judge_was_awake() -> None:
    stillness = Stillness(look_s=0.5)
    assert [stillness.look(7, now) for now in (10.0, 10.5, 11.0)] == [0.0, 0.5, 1.0]
    assert stillness.look(7, 999.0) == 2.0  # the whole process was stopped
    assert stillness.look(8, 999.5) == 0.0
    assert stillness.look(8, 1000.0) == 0.5


def test_a_task_is_shown_where_it_waits_innermost() -> None:
    async def inner(gate: asyncio.Event) -> None:
        await gate.wait()

    async def outer(gate: asyncio.Event) -> None:
        await inner(gate)

    async def main() -> str:
        gate = asyncio.Event()
        tasks = [asyncio.create_task(outer(gate)) for _ in range(3)]
        await asyncio.sleep(0)
        text = task_stacks(asyncio.get_running_loop())
        gate.set()
        await asyncio.gather(*tasks)
        return text

    text = asyncio.run(main())
    assert "4 asyncio tasks" in text
    line = next(line for line in text.splitlines() if "outer" in line)
    assert line.lstrip().startswith("3 × ")
    assert "locks.py" in line  # where Event.wait waits, not where `outer` called it


@pytest.mark.parametrize(
    "stall",
    ["threading.Event().wait()", "[logging.error('x' * 1000) for _ in iter(int, 1)]"],
    ids=["a lock", "a log that nobody reads"],
)
def test_a_process_whose_loop_stands_still_ends_with_code_1(stall: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STALLS.format(stall=stall)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.wait(timeout=60) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    if "x" * 1000 not in said:
        assert "the event loop has not turned" in said
        assert "in serve" in said
        assert "1 × bystander at" in said


def test_a_stopped_process_did_not_stall_and_sigusr1_shows_where_all_stand(tmp_path: Path) -> None:
    flags = {"scheduler": {"stall-seconds": 0.4, "stall-exit-seconds": 0.6}}
    with LocalCluster(redis=False, workers=0, routers=0, flags=flags) as cluster:
        member = cluster.members["scheduler-1"]
        for _ in range(4):
            member.suspend()
            with pytest.raises(subprocess.TimeoutExpired):  # it does not end by itself, stopped as it is
                member.wait(0.8)
            member.resume()
            before = _metric(member.ready.metrics, "octavo_loop_lag_seconds_count")
            while _metric(member.ready.metrics, "octavo_loop_lag_seconds_count") < before + 10:
                pass
        assert _metric(member.ready.metrics, "octavo_loop_stalls_total") == 0
        assert _metric(member.ready.metrics, "octavo_loop_lag_longest_seconds") > 0.5
        assert _metric(member.ready.metrics, "octavo_asyncio_tasks") >= 2
        os.kill(member.pid, signal.SIGUSR1)
        while "asyncio tasks:" not in member.log_text():
            assert member.returncode is None
        text = member.log_text()
        assert "most recent call first" in text  # of the signal's own handler
        assert "thread watchdog:" in text
        assert "1 × SchedulerService.tick_forever at" in text
        assert member.stop() == 0


def _metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
    raise KeyError(name)
