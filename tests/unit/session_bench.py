"""A router's session without sockets, and requests for it."""

from __future__ import annotations

from octavo.v1 import common_pb2, scheduler_pb2

from router.output import FinishRules, Output
from router.request import Request, RequestSpec
from router.resolve import sequence_seed
from router.session import RouterSession, SessionSettings
from router.stop import StopStrings
from service.columns import pack
from service.errors import Reason
from tests.unit.router_fakes import DIGEST, assets, byte_level_tokenizer, welcome

ASSETS = assets()
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
HELLO = byte_level_tokenizer().encode("hello world", add_special_tokens=False).ids


def make_request(
    n: int = 1, max_tokens: int = 100, stop: str = "", deadline: float | None = None, resumed: bool = False
) -> Request:
    sampling = common_pb2.SamplingSpec(max_tokens=max_tokens)
    spec = RequestSpec(
        request_id="r",
        tenant="t",
        model="tiny",
        digest=DIGEST,
        seed=9,
        group_id=1,
        priority=0,
        cache_salt=b"salt",
        prompt_column=pack([1, 2, 3], "int32"),
        num_prompt_tokens=3,
        sampling=sampling,
        arrival=0.0,
        deadline=deadline,
        resumed=resumed,
    )
    rules = FinishRules(
        max_tokens=max_tokens, stop_token_ids=frozenset({1}), stops=StopStrings([stop]) if stop else None
    )
    outputs = [Output(i, rules, ASSETS.table.detokenizer(True)) for i in range(n)]
    return Request(spec, outputs, [sequence_seed(9, i) for i in range(n)], ASSETS.table)


class Bench:
    """A session, its clock, and what it sent."""

    def __init__(self, *addresses: str) -> None:
        self.session = RouterSession(SessionSettings(incarnation=1, patience=10.0))
        self.now = 0.0
        self.epochs: dict[str, int] = {}
        for address in addresses:
            self.attach(address)

    def attach(self, address: str, *models: scheduler_pb2.ServedModel) -> None:
        self.session.link_opened(address, self.now)
        self.epochs[address] = self.epochs.get(address, 0) + 1
        self.session.receive(address, welcome(self.epochs[address], *models), self.now)

    def sent(self, kind: str) -> list[tuple[str, object]]:
        """Messages of one kind since the last call; the others are dropped."""
        messages = self.session.take_actions().messages
        return [(address, getattr(m, kind)) for address, m in messages if m.WhichOneof("message") == kind]

    def submits(self) -> list[scheduler_pb2.Submit]:
        return [submit for _, submit in self.sent("submit")]  # type: ignore[misc]

    def say(self, address: str, message: scheduler_pb2.AttachResponse) -> None:
        message.epoch = message.epoch or self.epochs[address]
        self.session.receive(address, message, self.now)

    def fail(self, address: str, handle: int, reason: Reason, retry_after_ms: int = 0) -> None:
        failed = scheduler_pb2.Failed(
            handle=handle, reason=int(reason), message="because", retry_after_ms=retry_after_ms
        )
        self.say(address, scheduler_pb2.AttachResponse(failed=failed))

    def tick(self, now: float) -> None:
        """Let time pass in heartbeats, as a loop that is not stalled does."""
        while self.now < now:
            self.now = min(now, self.now + 0.1)
            for address in self.epochs:
                self.say(address, scheduler_pb2.AttachResponse(load=scheduler_pb2.Load()))
            self.session.tick(self.now)


def start(bench: Bench, request: Request) -> scheduler_pb2.Submit:
    bench.session.submit(request, bench.now)
    return bench.submits()[0]


def output_ids(request: Request, index: int = 0) -> list[int]:
    return list(request.sequences[index].output.token_ids)
