"""The router's check of grammars: answers, and what a hostile grammar or a broken helper costs (its own request, nothing else)."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from octavo.v1 import common_pb2

from router import grammar_helper
from router.assets import ModelAssets
from router.grammar import GrammarChecker
from router.models import KnownModel
from service.errors import OctavoError, Reason
from service.lifecycle import _loop_factory
from worker.backends.mock_assets import mock_assets

LoopFactory = Callable[[], asyncio.AbstractEventLoop] | None
MODEL = KnownModel("m", b"d" * 32, 160, 700, 1)
ASSETS = ModelAssets.load(mock_assets(700, 160))


@asynccontextmanager
async def checker(*command: str, patience: float = 60.0) -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(command, patience) if command else GrammarChecker(patience=patience)
    try:
        yield made
    finally:
        await made.close()
        assert made._helper is None


async def reason_of(check: Coroutine[Any, Any, None]) -> OctavoError | None:
    try:
        await check
    except OctavoError as error:
        return error
    return None


def regex(text: str) -> common_pb2.Grammar:
    return common_pb2.Grammar(regex=text)


def script(answers: str) -> tuple[str, str, str]:
    """A helper that runs these lines with `jobs()`, which yields the first frame of each job, and `answer(text)`."""
    return (
        sys.executable,
        "-c",
        "import sys, time, os, json\n"
        "from router.grammar_helper import frame, read_frame\n"
        "def jobs():\n"
        "    while (head := read_frame(sys.stdin.buffer)) is not None:\n"
        "        [read_frame(sys.stdin.buffer) for _ in range(2 if head[:1] == b'T' else 1)]\n"
        "        yield head\n"
        "def answer(problem):\n"
        "    sys.stdout.buffer.write(frame(json.dumps({'problem': problem}).encode())); sys.stdout.buffer.flush()\n"
        + answers,
    )


def test_good_ones_pass_and_bad_ones_are_named() -> None:
    async def main() -> None:
        async with checker() as grammars:
            for good in (regex("a+"), common_pb2.Grammar(json_schema="{}"), common_pb2.Grammar(lark="start: <eos>")):
                assert await reason_of(grammars.check(good, MODEL, ASSETS, "t")) is None
            bad = {"regex": "a((", "json_schema": "[", "lark": "start: <no_such_token>"}
            for kind, text in bad.items():
                error = await reason_of(grammars.check(common_pb2.Grammar(**{kind: text}), MODEL, ASSETS, "t"))
                assert error is not None and error.reason is Reason.GRAMMAR_INVALID
                assert error.violations[0].field == f"grammar.{kind}"
                assert len(error.violations[0].description) < 600

    asyncio.run(main())


def test_the_end_of_the_helper_is_no_news_where_the_router_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with checker() as grammars:
            with caplog.at_level(logging.INFO, "octavo.router.grammar"):
                await grammars.check(regex("a"), MODEL, ASSETS, "t")
                await grammars.close()

    asyncio.run(main())
    assert [record.message.partition(" in process")[0] for record in caplog.records] == ["compiling grammars"]


def test_what_would_overflow_a_stack_is_refused_and_the_next_one_is_answered() -> None:
    """Here it overflows that of the helper, which is smaller than any of a worker's."""
    rules = "\n".join(f'r{i}: "a" r{i + 1}' for i in range(5_000))

    async def main() -> None:
        async with checker() as grammars:
            deep = common_pb2.Grammar(lark=f'start: r0\n{rules}\nr5000: "b"')
            error = await reason_of(grammars.check(deep, MODEL, ASSETS, "t"))
            assert error is not None and error.reason is Reason.GRAMMAR_INVALID and "nested too deeply" in error.message
            assert await reason_of(grammars.check(regex("a"), MODEL, ASSETS, "t")) is None

    asyncio.run(main())


def test_answers_are_kept_and_shared() -> None:
    lines = "for head in jobs():\n    answer('' if head[:1] == b'T' else f'{time.monotonic_ns()}')\n"

    async def main() -> None:
        async with checker(*script(lines)) as grammars:
            same = [grammars.check(regex("a"), MODEL, ASSETS, "t") for _ in range(9)]
            errors = await asyncio.gather(*map(reason_of, same))
            again = await reason_of(grammars.check(regex("a"), MODEL, ASSETS, "t"))
            assert len({str(error) for error in [*errors, again]}) == 1
            other = await reason_of(grammars.check(regex("b"), MODEL, ASSETS, "t"))
            assert str(other) != str(again)

    asyncio.run(main())


def test_no_more_answers_are_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.grammar._KEPT", 3)

    async def main() -> None:
        async with checker() as grammars:
            for number in range(9):
                await grammars.check(regex(f"a{{{number}}}b"), MODEL, ASSETS, "t")
            assert len(grammars._answers) <= 4

    asyncio.run(main())


def test_a_helper_that_dies_costs_one_answer() -> None:
    lines = "for head in jobs():\n    os._exit(9) if head[:1] == b'G' else answer('')\n"

    async def main() -> None:
        async with checker(*script(lines)) as grammars:
            for text in ("a", "b"):
                error = await reason_of(grammars.check(regex(text), MODEL, ASSETS, "t"))
                assert error is not None and error.reason is Reason.GRAMMAR_INVALID and "too much" in error.message

    asyncio.run(main())


async def kill_idle(grammars: GrammarChecker) -> None:
    helper = grammars._helper
    assert helper is not None
    helper.kill()
    await helper.wait()


@pytest.mark.parametrize("factory", [None, _loop_factory()], ids=["asyncio", "the service's"])
def test_a_helper_that_was_killed_while_idle_costs_nobody_an_answer(factory: LoopFactory) -> None:
    """A pipe whose reader has gone behaves differently on each loop."""
    other = KnownModel("other", b"o" * 32, 160, 700, 1)

    async def main() -> None:
        async with checker() as grammars:
            await grammars.check(regex("a"), MODEL, ASSETS, "t")
            for text, model in (("b", MODEL), ("c", other), ("d", MODEL)):
                await kill_idle(grammars)
                assert await reason_of(grammars.check(regex(text), model, ASSETS, "t")) is None

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@pytest.mark.parametrize("death", ["os._exit(9)", "raise MemoryError"])
def test_a_helper_that_earlier_jobs_wore_out_costs_nobody_an_answer(death: str) -> None:
    lines = (
        "from router import grammar_helper\n"
        "done = 0\n"
        "def check(data, tokenizer):\n"
        "    global done\n"
        "    done += 1\n"
        f"    if done > 1: {death}\n"
        "grammar_helper._check = check\n"
        "sys.exit(grammar_helper.main())\n"
    )

    async def main() -> None:
        async with checker(*script(lines)) as grammars:
            helpers = set()
            for text in ("a", "b", "c"):
                assert await reason_of(grammars.check(regex(text), MODEL, ASSETS, "t")) is None
                helpers.add(grammars._helper)
            assert len(helpers) == 3

    asyncio.run(main())


def test_a_helper_that_hangs_is_ended_and_the_loop_turns_meanwhile() -> None:
    lines = "for head in jobs():\n    time.sleep(1000) if head[:1] == b'G' else answer('')\n"

    async def main() -> None:
        async with checker(*script(lines), patience=1.0) as grammars:
            task = asyncio.create_task(reason_of(grammars.check(regex("a"), MODEL, ASSETS, "t")))
            turns = 0
            while not task.done():
                await asyncio.sleep(0.01)
                turns += 1
            error = await task
            assert error is not None and error.reason is Reason.QUEUE_FULL and error.retry_after_ms
            assert turns >= 3
            assert not grammars._answers  # it may have been the machine's fault

    asyncio.run(main())


def test_who_gives_up_does_not_end_it_for_the_others() -> None:
    async def main() -> None:
        async with checker() as grammars:
            first = asyncio.create_task(grammars.check(regex("a"), MODEL, ASSETS, "t"))
            second = asyncio.create_task(grammars.check(regex("a"), MODEL, ASSETS, "t"))
            await asyncio.sleep(0)
            first.cancel()
            await second
            assert first.cancelled() or first.cancelling()

    asyncio.run(main())


def test_too_many_at_a_time_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.grammar._MAX_WAITING", 2)

    async def main() -> None:
        async with checker() as grammars:
            tasks = [
                asyncio.create_task(reason_of(grammars.check(regex(f"a{n}"), MODEL, ASSETS, "t"))) for n in range(5)
            ]
            errors = await asyncio.gather(*tasks)
            refused = [error for error in errors if error is not None]
            assert len(refused) == 3 and {error.reason for error in refused} == {Reason.QUEUE_FULL}

    asyncio.run(main())


_COUNTS_ITS_JOBS = (
    "done = 0\n"
    "for head in jobs():\n"
    "    done += head[:1] == b'G'\n"
    "    answer('' if head[:1] == b'T' else f'job {done}')\n"
)


def asking(grammars: GrammarChecker, tenant: str, text: str) -> asyncio.Task[OctavoError | None]:
    return asyncio.create_task(reason_of(grammars.check(regex(text), MODEL, ASSETS, tenant)))


async def answers_of(*tasks: asyncio.Task[OctavoError | None]) -> list[str]:
    """Such as "job 1", or the reason why it was none."""
    errors = await asyncio.gather(*tasks)
    return [e.violations[0].description if e and e.violations else e.reason.name if e else "" for e in errors]


def test_grammars_whose_askers_have_gone_are_not_compiled() -> None:
    async def main() -> None:
        async with checker(*script(_COUNTS_ITS_JOBS)) as grammars:
            tasks = [asking(grammars, "a", f"a{number}") for number in range(64)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert len(grammars._jobs) == 1 and not grammars._queues  # the one that has begun
            assert await answers_of(asking(grammars, "a", "c"), asking(grammars, "b", "b")) == ["job 3", "job 2"]
            assert not grammars._jobs

    asyncio.run(main())


def test_who_asks_at_once_for_what_was_given_up_does_not_meet_its_end() -> None:
    async def main() -> None:
        async with checker(*script(_COUNTS_ITS_JOBS)) as grammars:

            async def insist() -> list[str]:
                try:
                    await grammars.check(regex("2"), MODEL, ASSETS, "a")
                except asyncio.CancelledError:
                    error = await reason_of(grammars.check(regex("2"), MODEL, ASSETS, "a"))
                    return [error.violations[0].description] if error else []
                return []

            first, second = asking(grammars, "a", "1"), asyncio.create_task(insist())
            await asyncio.sleep(0)
            second.cancel()
            assert await answers_of(first) + await second == ["job 1", "job 2"]

    asyncio.run(main())


def test_tenants_take_turns_and_none_keeps_the_others_out() -> None:
    async def main() -> None:
        async with checker(*script(_COUNTS_ITS_JOBS)) as grammars:
            flood = [asking(grammars, "a", f"a{number}") for number in range(70)]
            await asyncio.sleep(0)
            others = [asking(grammars, tenant, tenant) for tenant in ("b", "c")]
            # What another tenant waits for too comes when it is the turn of either.
            shared = asking(grammars, "b", "a60")
            assert await answers_of(*others, shared) == ["job 2", "job 3", "job 5"]
            found = await answers_of(*flood)
            assert found[64:] == ["QUEUE_FULL"] * 6
            assert found[:2] == ["job 1", "job 4"] and found[60] == "job 5" and found[63] == "job 66"

    asyncio.run(main())


def test_what_one_tenant_gives_up_another_still_waits_for() -> None:
    async def main() -> None:
        async with checker(*script(_COUNTS_ITS_JOBS)) as grammars:
            first, given_up, kept = asking(grammars, "a", "1"), asking(grammars, "a", "2"), asking(grammars, "b", "2")
            await asyncio.sleep(0)
            given_up.cancel()
            assert await answers_of(first, kept) == ["job 1", "job 2"]

    asyncio.run(main())


def test_a_model_without_an_end_token_takes_no_grammar() -> None:
    files = {**ASSETS.files, "config.json": b"{}", "generation_config.json": b"{}", "tokenizer_config.json": b"{}"}
    endless = ModelAssets.load(files)

    async def main() -> None:
        async with checker() as grammars:
            error = await reason_of(grammars.check(regex("a"), MODEL, endless, "t"))
            assert error is not None and error.reason is Reason.UNSUPPORTED and "end-of-sequence" in error.message

    asyncio.run(main())


def test_the_helper_ends_with_its_router_and_knows_none_of_its_secrets() -> None:
    program = (
        "import asyncio, os\n"
        "from tests.unit.test_router_grammar import ASSETS, MODEL, regex\n"
        "from router.grammar import GrammarChecker\n"
        "async def main():\n"
        "    grammars = GrammarChecker()\n"
        "    await grammars.check(regex('a'), MODEL, ASSETS, 't')\n"
        "    print(grammars._helper.pid, flush=True)\n"
        "    with open(f'/proc/{grammars._helper.pid}/environ', 'rb') as file:\n"
        "        print(b'SECRET' in file.read(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SECRET": "x"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    pid, knows = done.stdout.split()
    assert knows == "False"
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until, "the helper outlives its router"
        time.sleep(0.02)


def test_the_helper_gives_way_to_its_router() -> None:
    async def main() -> None:
        async with checker() as grammars:
            assert await reason_of(grammars.check(regex("a"), MODEL, ASSETS, "t")) is None
            assert grammars._helper is not None
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            assert os.getpriority(os.PRIO_PROCESS, grammars._helper.pid) == min(19, nice + 5)

    asyncio.run(main())


def in_child(work: Any) -> tuple[int, float]:
    """Runs `work` in a forked child; its wait status, and the processor time that it used in seconds."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except MemoryError:
            code = 77
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return status, usage.ru_utime + usage.ru_stime


def test_processor_time_and_memory_end_the_helper_not_the_router() -> None:
    def spin() -> None:
        grammar_helper._bound()
        grammar_helper._allow_cpu(1)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            pass

    def eat() -> None:
        grammar_helper._bound()
        bytearray(2 * grammar_helper._MEMORY_BYTES)

    status, used = in_child(spin)
    assert os.WIFSIGNALED(status)
    assert used < 1.4  # the kernel's own count, which a busy machine doesn't stretch
    assert os.waitstatus_to_exitcode(in_child(eat)[0]) == 77
