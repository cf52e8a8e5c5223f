"""Grammars are compiled before a request is accepted: who sends a bad one is told what is wrong with it, and no worker is bothered.

That happens in a process of its own (router/grammar_helper.py), started at the first grammar: a hostile one can use up its time and
memory, not ours. Only where a fresh helper dies of it is that the grammar's fault: one that has run before may have been killed, or be
worn out. Answers are kept by the grammar's hash; those who ask for the same one wait for the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections import OrderedDict

from octavo.v1 import common_pb2

from router.assets import ModelAssets
from router.grammar_helper import frame
from router.models import KnownModel
from service.errors import FieldViolation, OctavoError, Reason

log = logging.getLogger("octavo.router.grammar")

_KEPT = 1_024
_MAX_WAITING = 64
_ANSWER_BYTES = 1 << 16
_TOO_MUCH = "it can't be compiled: it takes too much time or memory, or is nested too deeply"


class HelperGone(Exception):
    """The helper has ended, or was ended, in the middle of a job."""


class GrammarChecker:
    """Says whether grammars can be compiled. Owned by the event loop."""

    def __init__(
        self, command: tuple[str, ...] = (sys.executable, "-m", "router.grammar_helper"), patience: float = 10.0
    ) -> None:
        """`patience`: seconds that one job may take, however slow the machine is; its processor time is bounded by the helper."""
        self._command = command
        self._patience = patience
        self._answers: OrderedDict[bytes, asyncio.Task[str]] = OrderedDict()
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._helper: asyncio.subprocess.Process | None = None
        self._tokenizers: dict[bytes, str] = {}  # that the helper was given, and what is wrong with them

    async def check(self, grammar: common_pb2.Grammar, model: KnownModel, assets: ModelAssets) -> None:
        """Raises GRAMMAR_INVALID, naming the field, UNSUPPORTED where the model can't follow any, QUEUE_FULL where too many wait."""
        data = grammar.SerializeToString(deterministic=True)
        key = hashlib.sha256(model.digest + data).digest()
        task = self._answers.get(key)
        if task is None:
            if self._waiting >= _MAX_WAITING:
                raise OctavoError(Reason.QUEUE_FULL, "too many grammars wait to be compiled", retry_after_ms=500)
            self._waiting += 1
            task = asyncio.create_task(self._ask(data, model, assets))
            self._answers[key] = task
            task.add_done_callback(lambda done: self._settle(key, done))
        self._answers.move_to_end(key)
        # Whoever gives up does not end it for the others.
        problem = await asyncio.shield(task)
        if problem:
            field = f"grammar.{grammar.WhichOneof('kind')}"
            violation = FieldViolation(field, problem)
            raise OctavoError(Reason.GRAMMAR_INVALID, f"{field}: {problem}", violations=[violation])

    async def close(self) -> None:
        """End the helper and whatever waits for it."""
        tasks = list(self._answers.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end_helper()

    def _settle(self, key: bytes, task: asyncio.Task[str]) -> None:
        self._waiting -= 1
        failed = task.cancelled() or task.exception() is not None
        if failed and self._answers.get(key) is task:
            del self._answers[key]
        done = [kept for kept, answer in self._answers.items() if answer.done()]
        for kept in done[: max(0, len(self._answers) - _KEPT)]:
            del self._answers[kept]

    async def _ask(self, data: bytes, model: KnownModel, assets: ModelAssets) -> str:
        """What is wrong with a grammar; empty if nothing is."""
        async with self._turn:
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
        log.info("compiling grammars in process %d", self._helper.pid)
        return self._helper

    async def _end_helper(self) -> None:
        helper, self._helper = self._helper, None
        self._tokenizers.clear()
        if helper is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            helper.kill()
        code = await helper.wait()
        log.info("the process that compiles grammars has ended: %d", code)
