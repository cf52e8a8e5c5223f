"""Clients: each asks for one thing, checks every token that comes, and goes on at another router when its own dies."""

from __future__ import annotations

from octavo.v1 import common_pb2, inference_pb2

from router.output import Output
from router.request import Request, RequestSpec
from router.resolve import sequence_seed
from router.shared_grammar import SharedGrammar
from service.columns import pack
from service.errors import OctavoError, Reason
from tests.simulation.grammars import message_of
from tests.simulation.nodes import DIGEST, MODEL, RouterNode
from tests.simulation.plan import RequestPlan
from tests.simulation.reference import assets, rules_of, undisturbed
from tests.simulation.world import World
from worker.backends.mock import EOS_TOKEN_ID

_RETRY = 0.1
# What a client that was never served is told; it may try again later.
_REFUSALS = {Reason.NO_WORKER, Reason.QUEUE_FULL, Reason.DRAINING, Reason.MODEL_CHANGED}


class _Received:
    """One output as the client has it."""

    def __init__(self, expected: Output) -> None:
        self.expected = expected
        self.tokens: list[int] = []
        self.text = ""
        self.finished = 0


class Client:
    """One request from its first try to its end."""

    def __init__(self, world: World, plan: RequestPlan, routers: list[RouterNode]) -> None:
        self.name = f"request {plan.number}"
        self._world = world
        self._plan = plan
        self._routers = routers
        seeds = [sequence_seed(plan.seed, index) for index in range(plan.n)]
        self._received = [_Received(undisturbed(plan, index, seed)) for index, seed in enumerate(seeds)]
        self._seeds = seeds
        self._router: RouterNode | None = None
        self._request: Request | None = None
        self._accepted = False
        self.ended = ""  # "finished", "refused", "deadline" or "hung up"
        self.migrations = 0
        start = world.now
        self._arrival = start + plan.begin
        self._deadline = None if plan.deadline is None else start + plan.deadline
        world.at(self._arrival, self._try)
        if plan.hang_up is not None:
            world.at(start + plan.hang_up, self._hang_up)

    def _try(self) -> None:
        if self.ended:
            return
        living = [router for router in self._routers if router.alive and not router.frozen]
        if not living:
            self._world.after(_RETRY, self._try)
            return
        router = self._world.random.choice(living)
        request = self._make_request()
        try:
            router.submit(request, router.guard(lambda: self._take(request)))
        except OctavoError as error:
            self._failed(error)
            return
        self._router, self._request = router, request
        router.on_death.append(lambda: self._lost(request))
        self._take(request)

    def _make_request(self) -> Request:
        plan = self._plan
        sampling = common_pb2.SamplingSpec(
            max_tokens=plan.max_tokens,
            min_tokens=plan.min_tokens,
            temperature=plan.temperature,
            top_p=1,
            repetition_penalty=1,
            stop_token_ids=pack([EOS_TOKEN_ID], "int32"),
        )
        spec = RequestSpec(
            request_id=self.name,
            tenant="t",
            model=MODEL,
            digest=DIGEST,
            seed=plan.seed,
            group_id=plan.number + 1,
            priority=plan.priority,
            cache_salt=b"salt",
            prompt_column=pack(list(plan.prompt), "int32"),
            num_prompt_tokens=len(plan.prompt),
            sampling=sampling,
            arrival=self._arrival,
            deadline=self._deadline,
            resumed=self._accepted,
            grammar=None if plan.grammar is None else SharedGrammar(message_of(plan.grammar)),
        )
        outputs = []
        for index, received in enumerate(self._received):
            output = Output(index, rules_of(plan), assets().table.detokenizer(True))
            if received.tokens:
                output.replay(received.tokens, len(received.text.encode()))
            outputs.append(output)
        return Request(spec, outputs, self._seeds, assets().table)

    def _take(self, request: Request) -> None:
        """What the router has for us now; the stream to it is as short as can be, so that a death loses what was not taken."""
        if request is not self._request or self.ended:
            return
        for message in request.take():
            self._accepted = True
            if message.HasField("delta"):
                self._delta(message.delta)
            else:
                self._finished(message.finished)
        if request.error is not None:
            self._request = None
            self._failed(request.error)
        elif all(received.finished for received in self._received):
            self.ended = "finished"
            self._world.note(f"{self.name} is finished")

    def _delta(self, delta: inference_pb2.Delta) -> None:
        received = self._received[delta.index]
        if received.finished:
            self._world.violated(f"{self.name}.{delta.index}: text after the end")
        received.tokens += delta.token_ids
        received.text += delta.text
        expected = list(received.expected.token_ids)
        if received.tokens != expected[: len(received.tokens)]:
            self._world.violated(f"{self.name}.{delta.index}: tokens {received.tokens} are no beginning of {expected}")

    def _finished(self, finished: inference_pb2.Finished) -> None:
        received = self._received[finished.index]
        received.finished += 1
        expected = received.expected
        whole = expected.take(None)
        text = whole.delta.text if whole is not None else ""
        got = (received.tokens, received.text, finished.finish_reason, finished.usage.completion_tokens)
        wanted = (list(expected.token_ids), text, expected.finish_reason, len(expected.token_ids))
        if received.finished > 1:
            # A resume says again how an output ended that had ended before.
            if self.migrations == 0 or finished.finish_reason != expected.finish_reason:
                self._world.violated(f"{self.name}.{finished.index} ends a second time")
        elif got != wanted:
            self._world.violated(f"{self.name}.{finished.index} ends as {got}, not as {wanted}")

    def _lost(self, request: Request) -> None:
        """The router is dead."""
        if request is self._request and not self.ended:
            self._request = None
            self.migrations += 1
            self._world.note(f"{self.name} lost its router")
            self._world.after(_RETRY, self._try)

    def _failed(self, error: OctavoError) -> None:
        if error.reason is Reason.DEADLINE and self._deadline is not None and self._world.now >= self._deadline:
            self.ended = "deadline"
        elif error.reason is Reason.POISON and self._plan.poison:
            self.ended = "poison"
        elif error.reason in _REFUSALS and not self._accepted:
            self.ended = "refused"
        elif error.rule.resumable:
            self.migrations += 1
            self._world.after(_RETRY, self._try)
        else:
            self._world.violated(f"{self.name} failed: {error}")
            self.ended = "failed"
        self._world.note(f"{self.name}: {error} -> {self.ended or 'again'}")

    def _hang_up(self) -> None:
        if self.ended:
            return
        self.ended = "hung up"
        self._world.note(f"{self.name} hangs up")
        router, request = self._router, self._request
        if router is not None and request is not None and router.alive:
            router.guard(lambda: router.hang_up(request))()
