"""From a client's message to a request that can be submitted: model, tokens, defaults, ticket, resume."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import numpy as np
from octavo.v1 import common_pb2, inference_pb2

from router.assets import AssetStore, ModelAssets
from router.grammar import GrammarChecker
from router.models import KnownModel, ModelDirectory
from router.output import Output, ReplayError
from router.request import Request, RequestSpec
from router.resolve import ModelLimits, Resolved, check_prompt, resolve, sequence_seed
from router.speech.choice import grammar_of, manner_of
from router.speech.manner import PLAIN, Manner
from router.ticket import Ticket, TicketOffice, grammar_hash, invalid
from router.validate import Violations, check_request, too_long
from service.columns import pack
from service.errors import OctavoError, Reason

T = TypeVar("T")

# Text in bytes that is worked on at once, 0.2 ms. In a thread it would wait for Python's lock, 5 ms each time that the event loop is
# busy: 64 streams that came from a router that had died waited 200 ms for one another.
_SHORT = 1_024


class TextPool:
    """Threads for templates and tokenizers, with a bound on the text that waits for them."""

    def __init__(self, threads: int = 2, max_waiting_bytes: int = 64 << 20) -> None:
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._max_waiting = max_waiting_bytes
        self._waiting = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """`work()` in a thread; `size` is its text in bytes. Raises QUEUE_FULL where too much waits already."""
        if self._waiting + size > self._max_waiting:
            raise OctavoError(Reason.QUEUE_FULL, "too much text waits to be tokenized", retry_after_ms=200)
        self._waiting += size
        future = asyncio.get_running_loop().run_in_executor(self.executor, work)
        future.add_done_callback(lambda _: self._release(size))
        return await future

    async def run_plain(self, size: int, work: Callable[[], T]) -> T:
        """`run` for work that takes time by its size alone, at once where that is little: a tokenizer's, and no template's."""
        return work() if size <= _SHORT else await self.run(size, work)

    def _release(self, size: int) -> None:
        self._waiting -= size

    def close(self) -> None:
        """Let the threads end; what waits is dropped."""
        self.executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Clocks:
    """`now`: the session's steady clock, seconds; `wall`: Unix time, seconds, for tickets and templates only."""

    now: Callable[[], float]
    wall: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Ready to be submitted. `started` lacks only the cached tokens. `manner`: how the outputs are to be read."""

    request: Request
    started: inference_pb2.Started
    manner: Manner = PLAIN


class Preparation:
    """Prepares requests. Holds nothing of any of them."""

    def __init__(
        self,
        models: ModelDirectory,
        assets: AssetStore,
        pool: TextPool,
        grammars: GrammarChecker,
        tickets: TicketOffice,
        clocks: Clocks,
    ) -> None:
        self._models = models
        self._assets = assets
        self._pool = pool
        self._grammars = grammars
        self._tickets = tickets
        self._clocks = clocks

    def check_ticket(self, message: inference_pb2.GenerateRequest, tenant: str) -> Ticket:
        """The ticket of a resume. Raises TICKET_INVALID."""
        return self._tickets.check(message.resume.ticket, tenant)

    async def prepare(self, message: inference_pb2.GenerateRequest, tenant: str, deadline: float | None) -> Prepared:
        """Raises OctavoError for whatever is wrong with the request. `deadline` is on the steady clock."""
        now, wall = self._clocks.now(), self._clocks.wall()
        check_request(message)
        ticket = self._tickets.check(message.resume.ticket, tenant) if message.HasField("resume") else None
        model = self._pinned(ticket, message.model) if ticket else self._models.find(message.model)
        assets = await self._assets.get(model.digest)
        limits = ModelLimits(model.max_model_len, model.vocab_size)
        accepted = wall if ticket is None else ticket.arrival_ms / 1e3
        shown = ""
        kind = message.WhichOneof("input")
        if kind == "chat":
            shown, prompt = await self.tokenize_chat(message.chat, assets, limits, accepted, limits.max_model_len)
        else:
            prompt = await self.tokenize(message, assets, limits, accepted)
        check_prompt(
            prompt, limits, given=kind == "token_ids", field="chat.messages" if kind == "chat" else kind or "input"
        )
        column = pack(prompt, np.int32)
        manner, grammar, asked_by = await self._reading(message, model.name, assets, shown)
        hashes = hashlib.sha256(column).digest(), grammar_hash(grammar)
        if ticket is not None and ticket.prompt_hash != hashes[0]:
            raise invalid("the ticket belongs to a request with another prompt")
        if ticket is not None and ticket.grammar_hash != hashes[1]:
            raise invalid("the ticket belongs to a request with another grammar")
        spec_of = await self._resolve(message.sampling, assets, limits, len(prompt), under_grammar=grammar is not None)
        if grammar is not None and ticket is None:  # else a router of this cluster has seen that it can be compiled
            if grammar.calls.or_json_schema and message.HasField(
                "grammar"
            ):  # so that it is named where it is what is wrong
                await self._grammars.check(message.grammar, model, assets, tenant)
            await self._grammars.check(grammar, model, assets, tenant, asked_by)
        if ticket is None:
            seed = message.sampling.seed if message.sampling.HasField("seed") else secrets.randbits(64)
            ticket = Ticket(_new_id(), tenant, round(wall * 1e3), seed, model.digest, *hashes)
        spec = RequestSpec(
            request_id=ticket.request_id,
            tenant=tenant,
            model=model.name,
            digest=model.digest,
            seed=ticket.seed,
            group_id=int.from_bytes(hashlib.blake2b(ticket.request_id.encode(), digest_size=8).digest(), "little"),
            priority=message.priority,
            cache_salt=hashlib.sha256(b"octavo tenant" + tenant.encode()).digest(),
            prompt_column=column,
            num_prompt_tokens=len(prompt),
            sampling=spec_of.sampling,
            grammar=None if grammar is None else self._grammars.shared.share(grammar),
            # A clock that was set back must not make a request younger than it is.
            arrival=now - max(0.0, wall - accepted),
            deadline=deadline,
            resumed=message.HasField("resume"),
            message_size=message.ByteSize(),
        )
        request = _request(spec, spec_of, assets)
        if message.HasField("resume"):
            delivered = sum(len(state.token_ids) for state in message.resume.outputs)
            await self._pool.run_plain(4 * delivered, lambda: _replay(request, message.resume, limits))
        return Prepared(request, self._started(spec, ticket), manner)

    async def _resolve(
        self,
        params: inference_pb2.SamplingParams,
        assets: ModelAssets,
        limits: ModelLimits,
        num_prompt_tokens: int,
        *,
        under_grammar: bool,
    ) -> Resolved:
        """In a thread only where words are tokenized or a list may be as long as the vocabulary: a hop costs more than the rest."""
        if not params.bad_words and not params.allowed_token_ids:
            return resolve(params, assets, limits, num_prompt_tokens, under_grammar=under_grammar)
        return await self._pool.run(
            0, lambda: resolve(params, assets, limits, num_prompt_tokens, under_grammar=under_grammar)
        )

    async def _reading(
        self, message: inference_pb2.GenerateRequest, name: str, assets: ModelAssets, shown: str
    ) -> tuple[Manner, common_pb2.Grammar | None, str]:
        """How the outputs are to be read, the grammar that holds them, and the field that asked for it. Tools may be a megabyte: they
        are looked at in a thread.
        """
        given = message.grammar if message.HasField("grammar") else None

        def work() -> tuple[Manner, common_pb2.Grammar | None, str]:
            manner = manner_of(message.chat, assets.dialect, shown, given, name) if shown else PLAIN
            return manner, *grammar_of(message.chat, manner, given)

        return await self._pool.run(message.chat.ByteSize(), work) if message.chat.tools else work()

    async def tokenize(
        self,
        message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest,
        assets: ModelAssets,
        limits: ModelLimits,
        accepted: float,
    ) -> list[int]:
        """The prompt's token ids. Raises PROMPT_TOO_LONG where its size alone shows it, before any tokenizing."""
        kind = message.WhichOneof("input")
        most = limits.max_model_len if isinstance(message, inference_pb2.GenerateRequest) else None
        if isinstance(message, inference_pb2.GenerateRequest) and kind == "token_ids":
            if len(message.token_ids.ids) > limits.max_model_len:
                wrong = f"{len(message.token_ids.ids)} prompt tokens exceed the model's context of {limits.max_model_len} tokens"
                raise too_long("token_ids", wrong)
            return list(message.token_ids.ids)
        if kind == "text":
            add_special = not isinstance(message, inference_pb2.TokenizeRequest) or (
                message.add_special_tokens or not message.HasField("add_special_tokens")
            )
            _check_size(message.text, assets, limits, "text")
            return await self._pool.run_plain(
                len(message.text), lambda: assets.encode_text(message.text, add_special, most)
            )
        return (await self.tokenize_chat(message.chat, assets, limits, accepted, most))[1]

    async def tokenize_chat(
        self,
        chat: inference_pb2.Chat,
        assets: ModelAssets,
        limits: ModelLimits,
        accepted: float,
        most: int | None = None,
    ) -> tuple[str, list[int]]:
        """The rendered template and its token ids, `most` at most. Raises PROMPT_TOO_LONG and what rendering raises."""

        def work() -> tuple[str, list[int]]:
            prompt = assets.render(chat, datetime.fromtimestamp(accepted))
            _check_size(prompt, assets, limits, "chat.messages")
            return prompt, assets.encode_rendered(prompt, most)

        return await self._pool.run(chat.ByteSize(), work)

    def _pinned(self, ticket: Ticket, name: str) -> KnownModel:
        model = self._models.by_digest(ticket.digest)
        if model is not None:
            return model
        self._models.find(name)  # MODEL_UNKNOWN or NO_WORKER, if it is not served at all
        raise OctavoError(Reason.MODEL_CHANGED, "the version of the model that the stream began with is gone")

    def _started(self, spec: RequestSpec, ticket: Ticket) -> inference_pb2.Started:
        return inference_pb2.Started(
            request_id=spec.request_id,
            model=spec.model,
            digest=spec.digest.hex(),
            seed=spec.seed,
            ticket=self._tickets.issue(ticket),
            prompt_tokens=spec.num_prompt_tokens,
        )


def _request(spec: RequestSpec, resolved: Resolved, assets: ModelAssets) -> Request:
    outputs = [
        Output(index, resolved.rules, assets.table.detokenizer(resolved.skip_special_tokens))
        for index in range(resolved.n)
    ]
    seeds = [sequence_seed(spec.seed, index) for index in range(resolved.n)]
    return Request(spec, outputs, seeds, assets.table)


def _replay(request: Request, resume: inference_pb2.Resume, limits: ModelLimits) -> None:
    """Bring each output to where the client stands. Raises INVALID_ARGUMENT."""
    wrong = Violations()
    wrong.require(resume.seed == request.spec.seed, "resume.seed", "must be the seed that Started told")
    for position, state in enumerate(resume.outputs):
        sequence = request.sequences[state.index]
        path = f"resume.outputs[{position}]"
        if len(state.token_ids) > limits.max_model_len:
            wrong.add(f"{path}.token_ids", f"must have at most {limits.max_model_len} entries, the model's context")
            continue
        if any(token_id >= limits.vocab_size for token_id in state.token_ids):
            wrong.add(f"{path}.token_ids", f"ids must be below the vocabulary size {limits.vocab_size}")
            continue
        try:
            sequence.output.replay(state.token_ids, state.text_bytes)
        except ReplayError as error:
            wrong.add(path, str(error))
            continue
        ended = bool(sequence.output.finish_reason)
        wrong.require(ended or not state.finished, f"{path}.finished", "these tokens do not end the output")
        sequence.finished_sent = state.finished
    wrong.raise_if_any()


def _check_size(text: str, assets: ModelAssets, limits: ModelLimits, field: str) -> None:
    most = assets.max_characters_a_token
    if len(text) > limits.max_model_len * most:
        raise too_long(
            field,
            f"{len(text)} characters can't fit into the model's context of {limits.max_model_len} tokens, which hold"
            f" at most {most} characters each",
        )


def _new_id() -> str:
    return "req-" + secrets.token_hex(12)
