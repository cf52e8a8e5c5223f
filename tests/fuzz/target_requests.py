"""A client's requests at the public door: everything that the router does before a scheduler hears of them.

What it accepts, a scheduler and a worker must accept as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

from google.protobuf import struct_pb2
from octavo.v1 import inference_pb2, scheduler_pb2

from router.gate import Gate
from router.inference import Inference
from router.models import ModelDirectory
from router.prepare import Clocks, Preparation, Prepared, TextPool
from router.service import InferenceService
from router.shared_grammar import SharedGrammars
from router.ticket import TicketOffice
from scheduler.codec import decode_submit
from service.errors import OctavoError
from service.keys import Authenticator
from tests.fuzz import messages, values
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.peers import MAX_MODEL_LEN, VOCAB
from tests.fuzz.submits import grammar
from tests.fuzz.target_router import assets, served
from worker.plan_codec import decode_sampling

T = TypeVar("T")
_TENANT = "default"


class _Inline(TextPool):
    """Runs in the caller's thread, which is the one with the limits."""

    async def run(self, size: int, work: Callable[[], T]) -> T:
        return work()


class _Assets:
    async def get(self, digest: bytes) -> Any:
        return assets()


class _Grammars:
    """Compiling is another target's business."""

    async def check(self, grammar: Any, model: Any, assets: Any, tenant: str, asked_by: str = "") -> None:
        return

    def __init__(self) -> None:
        self.shared = SharedGrammars()


class _Context:
    """The part of a gRPC context that unary methods use."""

    async def abort_with_status(self, status: Any) -> None:
        raise _Aborted


class _Aborted(Exception):
    pass


class _Hub:
    class session:
        models = ModelDirectory()

    def now(self) -> float:
        return 100.0


class World:
    """What a router does with a request before a scheduler hears of it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        models = _Hub.session.models
        models.update([served()], 0.0)
        pool = _Inline(1)
        self.preparation = Preparation(
            models,
            _Assets(),
            pool,
            _Grammars(),  # type: ignore[arg-type]
            TicketOffice(b"s"),
            Clocks(lambda: 100.0, lambda: 1_750_000_000.0),  # type: ignore[arg-type]
        )
        hub: Any = _Hub()
        self.inference = Inference(hub, _Assets(), self.preparation, pool, None, Gate(9))  # type: ignore[arg-type]
        self.service = InferenceService(self.inference, Authenticator())
        self.resumable: list[inference_pb2.GenerateRequest] = []

    def close(self) -> None:
        self.preparation._pool.close()

    async def attack(self) -> Verdict:
        kind = self.random.random()
        if kind < 0.8:
            return await self._generate()
        if kind < 0.9:
            request = inference_pb2.TokenizeRequest(model="good")
            if self.random.random() < 0.5:
                request.text = "hello é 😀"
            else:
                request.chat.CopyFrom(self._chat())
            return await self._unary(request, self.service.Tokenize)
        ids = [self.random.randrange(VOCAB) for _ in range(9)]
        return await self._unary(inference_pb2.DetokenizeRequest(model="good", token_ids=ids), self.service.Detokenize)

    async def _unary(self, request: Any, method: Callable[[Any, Any], Awaitable[Any]]) -> Verdict:
        message, mutated = self._maybe(request)
        if message is None:
            return Verdict(mutated, False)
        try:
            (await method(message, _Context())).SerializeToString()
        except _Aborted:
            return Verdict(mutated, False)
        return Verdict(mutated, True)

    async def _generate(self) -> Verdict:
        request = self._request()
        if self.resumable and self.random.random() < 0.4:
            request = self.random.choice(self.resumable)
        message, mutated = self._maybe(request)
        if message is None:
            return Verdict(mutated, False)
        try:
            prepared = await self.preparation.prepare(message, _TENANT, 120.0 if self.random.random() < 0.3 else None)
        except OctavoError as error:
            error.to_status()
            return Verdict(mutated, False)
        self.submit(prepared)
        self._keep(message, prepared)
        return Verdict(mutated, True)

    def submit(self, prepared: Prepared) -> None:
        """The same checks further down find nothing; what is left of a resume can be read."""
        prepared.started.SerializeToString()
        for sequence in prepared.request.sequences:
            if sequence.output.finish_reason:
                continue
            sequence.handle = 1  # the session gives it
            submit = prepared.request.submission(sequence, 101.0)
            wire = scheduler_pb2.Submit.FromString(submit.SerializeToString())
            decoded = decode_submit(wire, 1, VOCAB, 101.0)
            assert decoded.num_known_tokens < MAX_MODEL_LEN
            decode_sampling(wire.sampling, VOCAB)
        for message in prepared.request.take():
            message.SerializeToString()

    def _keep(self, message: inference_pb2.GenerateRequest, prepared: Prepared) -> None:
        again = inference_pb2.GenerateRequest()
        again.CopyFrom(message)
        again.resume.ticket, again.resume.seed = prepared.started.ticket, prepared.started.seed
        ids = [self.random.randrange(258, VOCAB) for _ in range(self.random.randrange(6))]
        del again.resume.outputs[:]
        again.resume.outputs.add(index=0, token_ids=ids, text_bytes=len(assets().decode(ids, True).encode()))
        self.resumable = [*self.resumable[-4:], again]

    def _maybe(self, message: Any) -> tuple[Any, bool]:
        kind = self.random.random()
        if kind < 0.2:
            return message, True
        if kind < 0.88:
            return messages.mutated(self.random, message), True
        return messages.invented(self.random, type(message)), False

    def _request(self) -> inference_pb2.GenerateRequest:
        random = self.random
        request = inference_pb2.GenerateRequest(model="good", idempotency_key="k", priority=1)
        kind = random.randrange(3)
        if kind == 0:
            request.text = "hello world"
        elif kind == 1:
            request.chat.CopyFrom(self._chat())
        else:
            request.token_ids.ids.extend(random.randrange(VOCAB) for _ in range(random.randint(1, 20)))
        if self.random.random() < 0.2:
            request.grammar.CopyFrom(grammar(self.random))
        params = request.sampling
        params.max_tokens, params.min_tokens = random.randint(2, 9), random.randint(0, 2)
        if random.random() < 0.5:
            params.temperature, params.top_p, params.top_k, params.min_p = 0.5, 0.9, 5, 0.1
            params.repetition_penalty, params.presence_penalty, params.frequency_penalty = 1.1, 0.5, -0.5
        if random.random() < 0.5:
            params.stop.extend(["stop", "w9"])
            params.stop_token_ids.append(260)
            params.bad_words.append("bad")
            params.allowed_token_ids.extend([260, 261])
            params.logit_bias[260] = 5
        if random.random() < 0.5:
            params.seed, params.n, params.logprobs, params.prompt_logprobs = 7, random.randint(1, 3), 2, 1
        return request

    def _chat(self) -> inference_pb2.Chat:
        chat = inference_pb2.Chat(add_generation_prompt=True)
        for role in ("system", "user"):
            message = chat.messages.add(role=role, name="n")
            message.content.add(text="hello")
        call = chat.messages.add(role="assistant").tool_calls.add(id="1", name="f")
        call.arguments.update({"a": 1.0, "b": ["x", {"c": None}]})
        chat.tools.add().update({"type": "function"})
        chat.template_args.update({"x": self.random.choice((1, "y", [1, 2]))})
        if self.random.random() < 0.3:  # what JSON can't write
            chat.template_args.fields["z"].CopyFrom(struct_pb2.Value(number_value=values.number(self.random)))
        return chat


def _episode(random: Random) -> Iterator[Verdict]:
    world = World(random)
    loop = asyncio.new_event_loop()
    secrets = SimpleNamespace(randbits=random.getrandbits, token_hex=lambda count: random.randbytes(count).hex())
    try:
        with mock.patch("router.prepare.secrets", secrets):  # so that ids and seeds replay
            for _ in range(EPISODE):
                yield loop.run_until_complete(world.attack())
    finally:
        loop.close()
        world.close()


TARGET = Target(
    "requests",
    _episode,
    ("router.prepare", "router.validate", "router.resolve", "router.template", "router.chat", "router.ticket", "router.stop",
     "router.output", "service.sampling", "scheduler.codec"),
)  # fmt: skip
