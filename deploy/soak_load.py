"""What a soak asks of a cluster: every kind of call, well-formed and not, ended well, hung up on and cut by deadlines."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import grpc
from octavo.client import AsyncClient, OctavoError, Reason
from octavo.v1 import inference_pb2 as pb
from octavo.v1 import scheduler_pb2, scheduler_pb2_grpc

# What a bad request, a deadline, or more load than fits may be answered with. Anything else is a finding.
_EXPECTED = {Reason.DEADLINE, Reason.QUEUE_FULL}
_CALLS_PER_CONNECTION = 40


class Load:
    """One client's endless mix, drawn from a seed. `done` counts calls by kind, `problems` holds what should not have come."""

    def __init__(self, routers: list[str], schedulers: list[str], seed: str) -> None:
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self._routers = routers
        self._schedulers = schedulers
        self._random = random.Random(seed)
        kinds: list[tuple[Callable[[AsyncClient], Awaitable[None]], int]] = [
            (self._whole, 30),
            (self._hang_up, 20),
            (self._refused, 10),
            (self._several, 8),
            (self._stop_string, 8),
            (self._deadline, 6),
            (self._complete, 8),
            (self._chat, 5),
            (self._text, 4),
            (self._inspect, 1),
        ]
        self._kinds, self._weights = [kind for kind, _ in kinds], [weight for _, weight in kinds]

    async def run(self, over: asyncio.Event) -> None:
        """One call after the other until it is over; now and then on a new connection."""
        while not over.is_set():
            order = self._random.sample(self._routers, len(self._routers))
            async with AsyncClient(order) as client:
                for _ in range(_CALLS_PER_CONNECTION):
                    if over.is_set():
                        return
                    (kind,) = self._random.choices(self._kinds, self._weights)
                    await self._one(kind, client)

    async def _one(self, kind: Callable[[AsyncClient], Awaitable[None]], client: AsyncClient) -> None:
        name = kind.__name__.removeprefix("_")
        try:
            await kind(client)
        except OctavoError as error:
            if error.reason not in _EXPECTED:
                self.problems.append(f"{name}: {error}")
            name = f"{name} {error.reason.name if error.reason else 'broken'}".lower()
        except grpc.aio.AioRpcError as error:
            self.problems.append(f"{name}: {error.code().name}: {error.details()}")
        self.done[name] += 1

    def _prompt(self) -> list[int]:
        """Some share a prefix, so that blocks are shared and evicted."""
        shared = self._random.choice(((), range(300, 364), range(400, 600)))
        return [*shared, *(self._random.randrange(258, 30_000) for _ in range(self._random.randint(1, 200)))]

    def _length(self) -> int:
        return self._random.choice((1, 5, 20, 60, 150, 400))

    async def _whole(self, client: AsyncClient) -> None:
        length = self._length()
        result = await client.generate(self._prompt(), max_tokens=length, ignore_eos=True, timeout=120).result()
        if len(result.outputs[0].token_ids) != length:
            self.problems.append(f"whole: {len(result.outputs[0].token_ids)} tokens where {length} were asked for")

    async def _hang_up(self, client: AsyncClient) -> None:
        left = self._random.choice((0, 1, 3, 20))
        async with client.generate(self._prompt(), max_tokens=400, ignore_eos=True, timeout=120) as stream:
            async for _ in stream:
                left -= 1
                if left < 0:
                    return

    async def _refused(self, client: AsyncClient) -> None:
        wrong = self._random.randrange(4)
        try:
            if wrong == 0:
                await client.generate([5], top_p=2.0).result()
            elif wrong == 1:
                await client.generate([5], model="nobody").result()
            elif wrong == 2:
                await client.complete([5] * 20_000)
            else:
                await client.generate("a" * 1_000_000).result()
        except OctavoError as error:
            if error.reason in (Reason.INVALID_ARGUMENT, Reason.MODEL_UNKNOWN, Reason.PROMPT_TOO_LONG):
                return
            raise
        self.problems.append(f"refused: number {wrong} was served")

    async def _several(self, client: AsyncClient) -> None:
        n = self._random.randint(2, 4)
        await client.generate(self._prompt(), n=n, max_tokens=self._length(), temperature=1.0, timeout=120).result()

    async def _stop_string(self, client: AsyncClient) -> None:
        stop = [self._random.choice(("w3", "99", "7"))]
        await client.generate(self._prompt(), stop=stop, max_tokens=200, ignore_eos=True, timeout=120).result()

    async def _deadline(self, client: AsyncClient) -> None:
        seconds = self._random.uniform(0.02, 0.5)
        await client.generate(self._prompt(), max_tokens=2_000, ignore_eos=True, timeout=seconds).result()

    async def _complete(self, client: AsyncClient) -> None:
        await client.complete(self._prompt(), max_tokens=self._length(), logprobs=2, timeout=120)

    async def _chat(self, client: AsyncClient) -> None:
        turns = [{"role": "user", "content": f"hello {self._random.random()}"}]
        await client.chat(turns, max_tokens=20, timeout=120).result()

    async def _text(self, client: AsyncClient) -> None:
        answer: pb.TokenizeResponse = await client.tokenize("some text to take apart " * self._random.randint(1, 50))
        await client.detokenize(list(answer.token_ids))
        await client.list_models()

    async def _inspect(self, client: AsyncClient) -> None:
        """Look on for a moment, then hang up."""
        async with grpc.aio.insecure_channel(self._random.choice(self._schedulers)) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            call = stub.Inspect(scheduler_pb2.InspectRequest(max_hz=20, rows=True))
            for _ in range(self._random.randint(1, 20)):
                await call.read()
            call.cancel()
