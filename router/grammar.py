"""Grammars are compiled before a request is accepted: who sends a bad one is told what is wrong with it, and no worker is bothered.

That happens in a process of its own (router/grammar_helper.py), started at the first grammar: a hostile one can use up its time and
memory, not ours. Only where a fresh helper dies of it is that the grammar's fault: one that has run before may have been killed, or be
worn out. Answers are kept by the grammar's hash; those who ask for the same one wait for the same answer. One helper runs one job at a
time, so tenants take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from octavo.v1 import common_pb2

from router.assets import ModelAssets
from router.grammar_helper import frame
from router.models import KnownModel
from router.shared_grammar import SharedGrammars
from service.errors import FieldViolation, OctavoError, Reason

log = logging.getLogger("octavo.router.grammar")

_KEPT = 1_024
_NICE = 5  # of the helper: streams that flow, or are resumed here in hundreds, go before grammars that come
_MAX_WAITING = 64  # for one tenant alone; for all together twice as many
_ANSWER_BYTES = 1 << 16
_TOO_MUCH = "it can't be compiled: it takes too much time or memory, or is nested too deeply"


class HelperGone(Exception):
    """The helper has ended, or was ended, in the middle of a job."""


@dataclass(slots=True, eq=False)
class _Job:
    """A grammar that is not answered yet. Whoever asks for it while it waits puts it into the queue of their tenant."""

    key: bytes
    turn: asyncio.Event
    task: asyncio.Task[str]
    askers: Counter[str] = field(default_factory=Counter)  # by tenant; none that is zero


class GrammarChecker:
    """Says whether grammars can be compiled. Owned by the event loop.

    Tenants take turns. The bound is fair as that of router/gate.py is: a newcomer is measured by the mean of what its tenant and all
    tenants have here. A job that nobody waits for any more is not begun.
    """

    def __init__(
        self, command: tuple[str, ...] = (sys.executable, "-m", "router.grammar_helper"), patience: float = 10.0
    ) -> None:
        """`patience`: seconds that one job may take, however slow the machine is; its processor time is bounded by the helper."""
        self.shared = SharedGrammars()
        self._command = command
        self._patience = patience
        self._answers: OrderedDict[bytes, str] = OrderedDict()
        self._jobs: dict[bytes, _Job] = {}
        self._queues: OrderedDict[str, dict[bytes, _Job]] = OrderedDict()  # by tenant, who is next first; none is empty
        self._running: _Job | None = None
        self._served = ""  # the tenant whose turn it is
        self._helper: asyncio.subprocess.Process | None = None
        self._tokenizers: dict[bytes, str] = {}  # that the helper was given, and what is wrong with them

    async def check(
        self,
        grammar: common_pb2.Grammar,
        model: KnownModel,
        assets: ModelAssets,
        tenant: str,
        asked_by: str = "grammar",
    ) -> None:
        """Raises GRAMMAR_INVALID, naming the field that asked for it, UNSUPPORTED where the model can't follow any, and QUEUE_FULL
        where too many wait.
        """
        data = grammar.SerializeToString(deterministic=True)
        key = hashlib.sha256(model.digest + data).digest()
        problem = self._answers.get(key)
        if problem is None:
            problem = await self._wait(self._jobs.get(key) or self._new_job(key, data, model, assets, tenant), tenant)
        else:
            self._answers.move_to_end(key)
        if problem:
            path = f"grammar.{grammar.WhichOneof('kind')}" if asked_by == "grammar" else asked_by
            violation = FieldViolation(path, problem)
            raise OctavoError(Reason.GRAMMAR_INVALID, f"{path}: {problem}", violations=[violation])

    async def close(self) -> None:
        """End the helper and whatever waits for it."""
        self._queues.clear()
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end_helper(logging.DEBUG)

    # Turns ---------------------------------------------------------------------------------------------------------------

    def _new_job(self, key: bytes, data: bytes, model: KnownModel, assets: ModelAssets, tenant: str) -> _Job:
        """Raises QUEUE_FULL."""
        own = sum(tenant in job.askers for job in self._jobs.values())
        if own + len(self._jobs) >= 2 * _MAX_WAITING:
            raise OctavoError(Reason.QUEUE_FULL, "too many grammars wait to be compiled", retry_after_ms=500)
        turn = asyncio.Event()
        job = self._jobs[key] = _Job(key, turn, asyncio.create_task(self._ask(turn, data, model, assets)))
        job.task.add_done_callback(lambda task: self._settle(job, task))
        return job

    async def _wait(self, job: _Job, tenant: str) -> str:
        """The answer to a job. Whoever gives up does not end it for the others."""
        job.askers[tenant] += 1
        if not job.turn.is_set():
            self._queues.setdefault(tenant, {})[job.key] = job
            self._give_turn()
        try:
            return await asyncio.shield(job.task)
        finally:
            job.askers[tenant] -= 1
            if not job.askers[tenant]:
                del job.askers[tenant]
                self._unqueue(job, tenant)
            if not job.askers and not job.turn.is_set():
                job.task.cancel()
                self._forget(job)

    def _give_turn(self) -> None:
        if self._running is None and self._queues:
            self._served, queue = next(iter(self._queues.items()))
            job = next(iter(queue.values()))
            for tenant in job.askers:
                self._unqueue(job, tenant)
            self._running = job
            job.turn.set()

    def _unqueue(self, job: _Job, tenant: str) -> None:
        queue = self._queues.get(tenant, {})
        if queue.pop(job.key, None) is not None and not queue:
            del self._queues[tenant]

    def _forget(self, job: _Job) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]

    def _settle(self, job: _Job, task: asyncio.Task[str]) -> None:
        self._forget(job)
        if not task.cancelled() and task.exception() is None:
            self._answers[job.key] = task.result()
            if len(self._answers) > _KEPT:
                self._answers.popitem(last=False)
        if self._running is job:
            self._running = None
            if self._served in self._queues:  # only now: who came meanwhile goes first
                self._queues.move_to_end(self._served)
            self._give_turn()

    # The helper ----------------------------------------------------------------------------------------------------------

    async def _ask(self, turn: asyncio.Event, data: bytes, model: KnownModel, assets: ModelAssets) -> str:
        """What is wrong with a grammar; empty if nothing is."""
        await turn.wait()
        try:
            while True:
                fresh = self._helper is None
                try:
                    problem = await self._give_tokenizer(model, assets, fresh=fresh)
                    if problem:
                        raise OctavoError(Reason.UNSUPPORTED, f"grammar: {problem}")
                    return await self._job([b"G" + model.digest, data])
                except HelperGone:
                    # One that has run before may have died since, or of the memory that earlier jobs left it.
                    if fresh:
                        return _TOO_MUCH
        except TimeoutError:
            await self._end_helper()
            text = "the grammar was not compiled in time"
            raise OctavoError(Reason.QUEUE_FULL, text, retry_after_ms=1_000) from None
        except asyncio.CancelledError:
            await self._end_helper()  # its answer would be taken for that to another question
            raise

    async def _give_tokenizer(self, model: KnownModel, assets: ModelAssets, *, fresh: bool) -> str:
        """Have the helper know the model's tokenizer; why it can't be used, if so. Raises HelperGone unless the helper is `fresh`."""
        if self._helper is None or model.digest not in self._tokenizers:
            eos = [token_id for token_id in assets.eos_token_ids if token_id < model.vocab_size]
            shape = json.dumps({"vocab_size": model.vocab_size, "eos_token_ids": eos}).encode()
            try:
                problem = await self._job([b"T" + model.digest, shape, assets.files["tokenizer.json"]])
            except HelperGone:
                if not fresh:
                    raise
                problem = "the model's tokenizer takes too much time or memory"
            self._tokenizers[model.digest] = problem
            while len(self._tokenizers) > 4:  # the helper keeps as many
                del self._tokenizers[next(iter(self._tokenizers))]
        return self._tokenizers[model.digest]

    async def _job(self, frames: list[bytes]) -> str:
        """Raises HelperGone and TimeoutError."""
        async with asyncio.timeout(self._patience):
            helper = self._helper or await self._start_helper()
            assert helper.stdin is not None and helper.stdout is not None
            try:
                for data in frames:
                    if helper.stdin.is_closing():
                        raise HelperGone  # uvloop's pipes would raise a RuntimeError
                    helper.stdin.write(frame(data))
                    await helper.stdin.drain()
                size = int.from_bytes(await helper.stdout.readexactly(4), "little")
                if size > _ANSWER_BYTES:
                    raise HelperGone
                answer = json.loads(await helper.stdout.readexactly(size))
            except (asyncio.IncompleteReadError, ConnectionError, ValueError, HelperGone):
                await self._end_helper()
                raise HelperGone from None
        return str(answer["problem"])

    async def _start_helper(self) -> asyncio.subprocess.Process:
        # Nothing of ours that it does not need: it runs what others wrote.
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._helper = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
        )
        with contextlib.suppress(ProcessLookupError):  # it may have ended: the first answer that does not come says so
            nice = os.getpriority(os.PRIO_PROCESS, self._helper.pid)
            os.setpriority(os.PRIO_PROCESS, self._helper.pid, min(19, nice + _NICE))
        log.info("compiling grammars in process %d", self._helper.pid)
        return self._helper

    async def _end_helper(self, level: int = logging.INFO) -> None:
        """`level`: how much of a news its end is."""
        helper, self._helper = self._helper, None
        self._tokenizers.clear()
        if helper is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            helper.kill()
        code = await helper.wait()
        log.log(level, "the process that compiles grammars has ended: %d", code)
