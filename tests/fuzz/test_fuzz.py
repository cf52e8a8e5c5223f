"""10,000 hostile inputs at each boundary: no crash, no hang, no exception that the boundary does not document.

OCTAVO_FUZZ_INPUTS and OCTAVO_FUZZ_SEED ask for more, or for others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from random import Random
from unittest import mock

import numpy as np
import pytest
from octavo.v1 import common_pb2

from service.logprobs import Logprobs
from tests.fuzz import harness
from tests.fuzz.harness import EPISODE, Finding, Target, Verdict, replay, run
from tests.fuzz.targets import TARGETS

_INPUTS = os.environ.get("OCTAVO_FUZZ_INPUTS")
_SEED = int(os.environ.get("OCTAVO_FUZZ_SEED", "0"))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of hostile templates
@pytest.mark.parametrize("name", TARGETS)
def test_hostile_inputs(name: str, record_property: Callable[[str, object], None]) -> None:
    report = run(TARGETS[name], _SEED, int(_INPUTS) if _INPUTS else None)
    record_property("fuzz", str(report))
    ran, there = report.lines
    # The inputs are about something: most come from valid ones, some get through, and they reach most of the code.
    assert report.mutated > 0.5 * report.inputs
    assert 0.05 < report.accepted / report.inputs < 0.95
    assert ran > 0.6 * there


def _believed(columns: common_pb2.LogprobColumns, vocab_size: int) -> Logprobs:
    ints = (columns.owner, columns.position, columns.rank, columns.num_entries, columns.token_ids)
    whole = [np.frombuffer(data[: len(data) // 4 * 4], np.int32) for data in ints]
    return Logprobs(*whole, np.frombuffer(columns.logprobs[: len(columns.logprobs) // 4 * 4], np.float32))


MUTANTS: dict[str, tuple[str, Callable[[], AbstractContextManager[object]]]] = {
    "a worker checks no range": ("worker", lambda: mock.patch("worker.plan_codec.check_range")),
    "a worker checks no sampling": ("worker", lambda: mock.patch("service.sampling._require")),
    "a scheduler checks no vocabulary": ("scheduler", lambda: mock.patch("scheduler.codec._check_vocabulary")),
    "a scheduler checks no log-probabilities": (
        "scheduler",
        lambda: mock.patch("scheduler.codec.unpack_logprobs", _believed),
    ),
    "a router checks no range": ("router", lambda: mock.patch("router.batch.check_range")),
    "a router takes any model": ("router", lambda: mock.patch("router.session.checked", tuple)),
    "a router checks no request": ("requests", lambda: mock.patch("router.prepare.check_request")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_defect_is_found(name: str) -> None:
    target, sow = MUTANTS[name]
    with sow(), pytest.raises(Finding):
        for seed in range(3):
            run(TARGETS[target], seed, 5_000)


def _target(what: Callable[[int], object]) -> Target:
    def episode(random: Random) -> Iterator[Verdict]:
        for number in range(EPISODE):
            what(number)
            yield Verdict(mutated=True, accepted=True)

    return Target("probe", episode, ("service.columns",))


def _spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (lambda: 1 // 0, ZeroDivisionError),
        (lambda: bytearray(100 << 30), MemoryError),
        (_spin, harness.TooLong),
    ],
)
def test_a_finding_replays(
    what: Callable[[], object], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "_CPU_SECONDS", 0.1)
    target = _target(lambda number: what() if number == 7 else None)
    with pytest.raises(Finding, match=error.__name__) as caught:
        run(target, 3, 100)
    index = re.search(r"--seed 3 --index (\d+)", str(caught.value))
    assert index is not None and int(index[1]) == 7
    with pytest.raises(error):
        replay(target, 3, 7)
    replay(target, 3, 6)


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, again = (run(TARGETS["worker"], 5, 500) for _ in range(2))
    assert (first.accepted, first.mutated, first.lines) == (again.accepted, again.mutated, again.lines)
