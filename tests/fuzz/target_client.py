"""The client's session under a hostile router."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from octavo.client.errors import OctavoError
from octavo.client.retry import Attempts, RetryPolicy
from octavo.client.session import Collector, GenerateSession
from octavo.v1 import inference_pb2 as pb

from tests.fuzz import messages
from tests.fuzz.harness import EPISODE, Target, Verdict


class _World:
    def __init__(self, random: Random) -> None:
        self.random = random
        self._begin()

    def _begin(self) -> None:
        request = pb.GenerateRequest(text="x", attempt=self.random.choice((0, 3)))
        request.sampling.n = self.random.randint(1, 3)
        self.session = GenerateSession(request, Attempts(RetryPolicy(), 1))
        self.collector = Collector()
        self.bytes = dict.fromkeys(range(request.sampling.n), 0)
        self.greeted = False
        self.session.next_request().SerializeToString()

    def attack(self) -> Verdict:
        random = self.random
        message: pb.GenerateResponse | None = self._valid()
        kind, mutated = random.random(), True
        if kind < 0.5:
            message = messages.mutated(random, message)
        elif kind < 0.6:
            message, mutated = messages.invented(random, pb.GenerateResponse), False
        if message is None:
            return Verdict(mutated, False)
        try:
            event = self.session.receive(message)
        except OctavoError as error:
            assert str(error)
            self._begin()
            return Verdict(mutated, False)
        self.greeted |= message.HasField("started")
        if event is not None:
            self.collector.add(event)
            if isinstance(event, pb.Delta):
                self.bytes[event.index] += len(event.text.encode())
                assert self.bytes[event.index] == event.text_bytes  # nothing is missing, nothing came twice
        self.collector.response().SerializeToString()
        if self.session.complete:
            self._begin()
        elif random.random() < 0.2:
            try:
                self.session.broke(None, 1.0)
                self.session.next_request().SerializeToString()
                self.greeted = False
            except OctavoError:
                self._begin()
        return Verdict(mutated, True)

    def _valid(self) -> pb.GenerateResponse:
        random = self.random
        if not self.greeted:
            started = pb.Started(request_id="r", model="m", digest="ab", seed=5, ticket=b"t", prompt_tokens=4)
            return pb.GenerateResponse(started=started)
        index = random.choice(list(self.bytes))
        if random.random() < 0.15:
            usage = pb.Usage(prompt_tokens=4, completion_tokens=5)
            return pb.GenerateResponse(
                finished=pb.Finished(index=index, finish_reason="FINISH_REASON_STOP", usage=usage)
            )
        text = random.choice(("hello", "é", "😀", ""))
        total = self.bytes[index] + len(text.encode())
        return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=[4, 5], text_bytes=total))


def _episode(random: Random) -> Iterator[Verdict]:
    world = _World(random)
    for _ in range(EPISODE):
        yield world.attack()


TARGET = Target("client", _episode, ("octavo.client.session", "octavo.client.retry"))
