"""Runs a target over many inputs, under limits of time and memory for each, and counts what came of them.

Inputs come in *episodes*: an episode builds fresh state from its own random generator and takes EPISODE inputs, so that input number
`index` replays by running its episode again. An exception that a target lets through is a finding; so are a hang and a crash.
"""

from __future__ import annotations

import faulthandler
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FrameType

from tests.fuzz.coverage import LineCoverage

EPISODE = 25
_CPU_SECONDS = 5.0  # processor time of one input
_WALL_SECONDS = 300.0  # of an episode that waits for something that never comes
_MEMORY_BYTES = 3 << 30  # beyond what is mapped already: a length that lies must not be believed
_MEASURED = 12  # one episode in so many is traced


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one input. `mutated`: from a valid one; otherwise invented. `accepted`: not refused."""

    mutated: bool
    accepted: bool


Episode = Callable[[Random], Iterator[Verdict]]


@dataclass(frozen=True, slots=True)
class Target:
    """One boundary. `episode` yields EPISODE verdicts; `modules` are those whose lines are counted."""

    name: str
    episode: Episode
    modules: Sequence[str]
    inputs: int = 10_000


@dataclass(slots=True)
class Report:
    """Figures of a run."""

    name: str
    inputs: int = 0
    mutated: int = 0
    accepted: int = 0
    seconds: float = 0.0
    lines: tuple[int, int] = (0, 0)
    missed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ran, there = self.lines
        return (
            f"{self.name:12} {self.inputs:7,} inputs, {self.mutated / self.inputs:4.0%} mutated from valid ones, "
            f"{self.accepted / self.inputs:4.0%} accepted; {ran} of {there} lines ({ran / there:.0%}); {self.seconds:.1f} s of CPU"
        )


class Finding(AssertionError):
    """An input that did what no input may do; names how to replay it."""


class TooLong(BaseException):
    """The processor time of one input is used up. Not an Exception: nothing may take it for a refusal."""


def run(target: Target, seed: int = 0, inputs: int | None = None) -> Report:
    """Run `inputs` inputs. Raises Finding."""
    report = Report(target.name)
    coverage = LineCoverage(target.modules)
    began = time.process_time()
    total = inputs or target.inputs
    with _limits():
        for number in range(-(-total // EPISODE)):
            if number % _MEASURED == 0:
                with coverage.measure():
                    _episode(target, seed, number, report)
            else:
                _episode(target, seed, number, report)
    report.seconds = time.process_time() - began
    report.lines = coverage.counts()
    report.missed = coverage.missed()
    return report


def replay(target: Target, seed: int, index: int) -> None:
    """Run the episode of one input, up to it. Raises what it raises."""
    episode = target.episode(_random(target, seed, index // EPISODE))
    with _limits():
        for _ in range(index % EPISODE + 1):
            signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
            next(episode)
        if index % EPISODE == EPISODE - 1:
            next(episode, None)  # what an episode looks at when all is over belongs to its last input


def _random(target: Target, seed: int, number: int) -> Random:
    return Random(f"{target.name} {seed} {number}")  # a text is hashed with SHA-512: the same in every process


def _episode(target: Target, seed: int, number: int, report: Report) -> None:
    faulthandler.dump_traceback_later(_WALL_SECONDS, exit=True)
    done = 0
    try:
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        for verdict in target.episode(_random(target, seed, number)):
            done += 1
            report.inputs += 1
            report.mutated += verdict.mutated
            report.accepted += verdict.accepted
            signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    except BaseException as error:
        index = number * EPISODE + min(done, EPISODE - 1)
        where = f"input {index} of seed {seed}: python -m tests.fuzz {target.name} --seed {seed} --index {index}"
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Finding(f"{type(error).__name__}: {error}\n{where}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
    assert done == EPISODE, f"{target.name}: an episode of {done} inputs"


@contextmanager
def _limits() -> Iterator[None]:
    """Processor time by SIGPROF, so that a busy machine is no finding; memory by RLIMIT_AS."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {_CPU_SECONDS:g} s of CPU")

    handler = signal.signal(signal.SIGPROF, too_long)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:  # noqa: PTH123 - a pseudo file
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY_BYTES, hard))
    logging.disable(logging.CRITICAL)  # a line for each refusal
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)
