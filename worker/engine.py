"""Two threads and a backend: one launches steps, one waits for their results. A third makes the masks of rows under a grammar.

The launch thread also loads the model: what a library keeps for each thread (OpenMP's pool, the current CUDA device) is then there
once. With two pools GNU's OpenMP sees more threads than cores and stops spinning, which doubles the time of a step on two cores.
It applies and enqueues steps in the order of the plans and never waits for the device; the collect thread hands each
output to a callback. Between them stand at most as many steps as the scheduler lets run ahead. Both sleep in a queue when there is
nothing to do. Used by the gRPC shell (worker/enlist.py) and directly, as a library.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from service.trace import Trace
from worker.backend import Backend, BackendInfo, FatalBackendError, Progress
from worker.grammar.masks import StepMasks
from worker.grammar.rows import ConstrainedRow
from worker.grammar.runner import GrammarRunner
from worker.step import Step, StepOutput

log = logging.getLogger("octavo.engine")


@dataclass(frozen=True, slots=True)
class _Load:
    progress: Progress
    done: Future[BackendInfo]


@dataclass(frozen=True, slots=True)
class _Reset:
    done: Future[None]


@dataclass(frozen=True, slots=True)
class _Close:
    pass


@dataclass(frozen=True, slots=True)
class _Work:
    epoch: int
    step: Step


@dataclass(frozen=True, slots=True)
class _Launched:
    work: _Work
    constrained: tuple[StepMasks, list[ConstrainedRow]] | None


class Engine:
    """Owns a backend from `start` to `close`. Callbacks run on the engine's threads."""

    def __init__(
        self,
        backend: Backend,
        on_output: Callable[[int, StepOutput], None],
        on_failure: Callable[[int, int, str], None],
        on_fatal: Callable[[BaseException], None],
        trace: Trace | None = None,
    ) -> None:
        """on_output(epoch, output), on_failure(epoch, step_id, text): that step and all after it until `reset` are void."""
        self._backend = backend
        self._on_output = on_output
        self._on_failure = on_failure
        self._on_fatal = on_fatal
        self._trace = trace
        self._commands: queue.SimpleQueue[_Load | _Work | _Reset | _Close] = queue.SimpleQueue()
        self._launched: queue.Queue[_Launched | _Close] = queue.Queue()
        self._grammars: GrammarRunner | None = None
        self._loaded = False
        self._void = False  # a step failed; nothing runs until the next reset
        # Each counter is written by one thread: what the device was given, what of it the launch and the collect thread saw end.
        self._begun = self._ended_at_launch = self._ended = 0
        self._threads = [
            threading.Thread(target=self._guard, args=(self._launch_loop,), name="launch", daemon=True),
            threading.Thread(target=self._guard, args=(self._collect_loop,), name="collect", daemon=True),
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def load(self, progress: Progress) -> Future[BackendInfo]:
        """Load the model and run a first step. `progress` is called on the launch thread. The future raises BackendError."""
        done: Future[BackendInfo] = Future()
        self._commands.put(_Load(progress, done))
        return done

    def use_grammars(self, grammars: GrammarRunner) -> None:
        """From now on rows may decode under grammars. Before the first step; the engine owns the runner."""
        grammars.start(self._on_fatal)
        self._grammars = grammars

    def submit(self, epoch: int, step: Step) -> None:
        """Run a step after all those before it."""
        if self._grammars is not None:
            self._grammars.expect(step)
        self._commands.put(_Work(epoch, step))

    def reset(self) -> Future[None]:
        """Forget every row, after the steps submitted so far have ended; done then, and their callbacks have run."""
        done: Future[None] = Future()
        self._commands.put(_Reset(done))
        return done

    def progress(self) -> int | None:
        """A number that changes whenever the device begins or ends a step or a reset; None while it has nothing to do."""
        begun, ended = self._begun, self._ended_at_launch + self._ended
        return begun + ended if begun > ended else None

    def close(self, timeout: float | None = None) -> bool:
        """Let submitted steps end, stop both threads and release the backend. Idempotent. False: they did not in `timeout` s."""
        self._commands.put(_Close())
        until = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _launch_loop(self) -> None:
        while True:
            command = self._commands.get()
            if isinstance(command, _Work):
                if not self._void:
                    self._launch(command)
                continue
            if isinstance(command, _Load):
                self._load(command)
                continue
            self._launched.join()
            if isinstance(command, _Close):
                self._launched.put(command)
                if self._grammars is not None:
                    self._grammars.close()
                if self._loaded:
                    self._backend.close()
                return
            self._begun += 1
            self._backend.reset()
            if self._grammars is not None:
                self._grammars.reset()
            self._void = False
            self._ended_at_launch += 1
            command.done.set_result(None)

    def _load(self, command: _Load) -> None:
        try:
            info = self._backend.load(command.progress)
            self._backend.warm_up()
        except Exception as error:  # noqa: BLE001 - whoever waits for the future decides
            command.done.set_exception(error)
        else:
            self._loaded = True
            command.done.set_result(info)

    def _launch(self, work: _Work) -> None:
        self._begun += 1
        began = self._trace.now() if self._trace is not None else 0
        try:
            # First of all, so that masks are made while the model runs.
            constrained = None if self._grammars is None else self._grammars.begin(work.step)
            self._backend.begin(work.step)
            self._backend.forward(work.step)
            self._backend.sample(work.step, None if constrained is None else constrained[0])
            if constrained is not None and self._grammars is not None:
                self._grammars.sampled(*constrained)
        except FatalBackendError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, this step failed and the rows are in doubt
            self._fail(work, error)
            self._ended_at_launch += 1
        else:
            if self._trace is not None:
                self._trace.add("launch", work.step.step_id, began)
            self._launched.put(_Launched(work, constrained))

    def _collect_loop(self) -> None:
        while True:
            launched = self._launched.get()
            if isinstance(launched, _Close):
                return
            work = launched.work
            try:
                output = self._backend.collect()
                if self._trace is not None:
                    ended = self._trace.now()
                    self._trace.add("device", output.step_id, ended - output.device_ns, ended)
                if launched.constrained is not None and self._grammars is not None:
                    self._grammars.advance(*launched.constrained, output)
                if not self._void:
                    self._on_output(work.epoch, output)
            except FatalBackendError:
                raise
            except Exception as error:  # noqa: BLE001 - as in _launch
                self._fail(work, error)
            finally:
                self._ended += 1
                self._launched.task_done()

    def _fail(self, work: _Work, error: Exception) -> None:
        log.exception("step %d of epoch %d failed", work.step.step_id, work.epoch)
        self._void = True
        if self._grammars is not None:
            self._grammars.void()
        self._on_failure(work.epoch, work.step.step_id, f"{type(error).__name__}: {error}")

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:  # noqa: BLE001 - a dead engine thread must end the process, not hang it
            self._on_fatal(error)
