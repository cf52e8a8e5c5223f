"""A router's session between a hostile scheduler and a good one: the stream Attach, seen from below."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from random import Random

import numpy as np
from octavo.v1 import common_pb2, scheduler_pb2

from router.assets import ModelAssets
from router.output import FinishRules, Output
from router.request import Request, RequestSpec
from router.resolve import sequence_seed
from router.session import RouterSession, SessionSettings
from router.stop import StopStrings
from router.ticket import Ticket, TicketOffice
from service.columns import pack
from service.errors import OctavoError
from tests.fuzz import messages
from tests.fuzz.harness import EPISODE, Target, Verdict
from tests.fuzz.peers import DIGEST, MAX_MODEL_LEN, MODEL, VOCAB
from worker.backends.mock_assets import mock_assets

_COLUMNS = {"handles": 4, "first_output_index": 4, "num_tokens": 4, "finish_reason": 1, "token_ids": 4}
_EVIL, _GOOD = "evil:1", "good:1"
_ENDS = (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_ERROR)


@functools.cache
def assets() -> ModelAssets:
    """Of the mock model."""
    return ModelAssets.load(mock_assets(VOCAB, MAX_MODEL_LEN))


def served() -> scheduler_pb2.ServedModel:
    """The model that both schedulers serve."""
    return scheduler_pb2.ServedModel(
        name=MODEL, digest=DIGEST, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB, workers=1
    )


class _Scheduler:
    """What a scheduler would say next, of the requests that it has got. Its tokens are a count, so that anyone can check them."""

    def __init__(self, random: Random, epoch: int) -> None:
        self.random = random
        self.epoch = epoch
        self.running: dict[int, scheduler_pb2.Submit] = {}
        self.at: dict[int, int] = {}

    def take(self, message: scheduler_pb2.AttachRequest) -> list[scheduler_pb2.AttachResponse]:
        """Answers that are due at once."""
        kind = message.WhichOneof("message")
        if kind == "hello":
            welcome = scheduler_pb2.RouterWelcome(
                incarnation=1, protocol=1, heartbeat_ms=100, lease_ms=300, models=[served()]
            )
            return [self._say(welcome=welcome)]
        if kind == "submit":
            submit = message.submit
            self.running[submit.handle] = submit
            self.at[submit.handle] = len(submit.output_token_ids) // 4
            return [self._say(admitted=scheduler_pb2.Admitted(handle=submit.handle, digest=DIGEST, cached_tokens=1))]
        if kind == "cancel":
            self.running.pop(message.cancel.handle, None)
            return [self._say(cancelled=scheduler_pb2.Cancelled(handle=message.cancel.handle))]
        return []

    def step(self) -> scheduler_pb2.AttachResponse:
        """The next tokens of all that runs here."""
        handles, firsts, sizes, ends, ids = [], [], [], [], []
        logprobs = common_pb2.LogprobColumns()
        for entry, (handle, submit) in enumerate(list(self.running.items())):
            size, at = self.random.randint(0, 3), self.at[handle]
            size = min(size, submit.sampling.max_tokens - at)
            handles.append(handle)
            firsts.append(at)
            sizes.append(size)
            ids += [token_at(submit.num_prompt_tokens, at + i) for i in range(size)]
            self.at[handle] += size
            done = self.at[handle] >= submit.sampling.max_tokens
            ends.append(common_pb2.FINISH_REASON_LENGTH if done else 0)
            if done:
                del self.running[handle]
            if submit.sampling.HasField("logprobs"):
                for position in range(submit.num_prompt_tokens + at, submit.num_prompt_tokens + at + size):
                    logprobs.owner += pack([entry], np.int32)
                    logprobs.position += pack([position], np.int32)
                    logprobs.rank += pack([1], np.int32)
                    logprobs.num_entries += pack([2], np.int32)
                    logprobs.token_ids += pack([5, 6], np.int32)
                    logprobs.logprobs += pack([-0.5, -1.5], np.float32)
        batch = scheduler_pb2.TokenBatch(
            handles=pack(handles, np.uint32), first_output_index=pack(firsts, np.int32), num_tokens=pack(sizes, np.int32),
            finish_reason=pack(ends, np.uint8), token_ids=pack(ids, np.int32),
        )  # fmt: skip
        if logprobs.owner:
            batch.logprobs.CopyFrom(logprobs)
        return self._say(tokens=batch)

    def other(self) -> scheduler_pb2.AttachResponse:
        """A message of another kind."""
        random = self.random
        handle = random.choice(list(self.running)) if self.running else random.randrange(4)
        kind = random.randrange(6)
        if kind == 0:
            return self._say(load=scheduler_pb2.Load(waiting=1, running=1, workers=1, kv_used=0.5))
        if kind == 1:
            return self._say(models=scheduler_pb2.ModelList(models=[served()]))
        if kind == 2:
            return self._say(migrated=scheduler_pb2.Migrated(handle=handle, suspect_group=3, failures_alone=1))
        if kind == 3:
            self.running.pop(handle, None)
            reason = random.choice(common_pb2.ErrorReason.values())
            return self._say(failed=scheduler_pb2.Failed(handle=handle, reason=reason, message="because"))
        if kind == 4:
            return self._say(preempted=scheduler_pb2.Preempted(handle=handle))
        return self._say(go_away=scheduler_pb2.GoAway(remaining_ms=100))

    def _say(self, **message: object) -> scheduler_pb2.AttachResponse:
        return scheduler_pb2.AttachResponse(epoch=self.epoch, **message)  # type: ignore[arg-type]


def token_at(num_prompt_tokens: int, index: int) -> int:
    """The right token, by the good scheduler's rule."""
    return 258 + (7 * num_prompt_tokens + index) % (VOCAB - 258)


class _World:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 50.0
        self.session = RouterSession(SessionSettings(incarnation=1, patience=1000.0))
        self.office = TicketOffice(b"secret")
        self.epoch = random.getrandbits(40)
        self.schedulers: dict[str, _Scheduler] = {}
        self.good: list[Request] = []
        self.requests: list[Request] = []
        self.texts: dict[Request, dict[int, int]] = {}
        self.waiting: list[scheduler_pb2.AttachResponse] = []
        self._open(_GOOD)
        self._settle()
        self._submit(good=True)
        self._submit(good=True)
        self._open(_EVIL)
        self._submit(good=False)
        self._settle()

    def _open(self, address: str) -> None:
        self.epoch += 1
        self.schedulers[address] = _Scheduler(self.random, self.epoch)
        if address == _EVIL:
            self.waiting.clear()
        self.session.link_opened(address, self.now)

    def attack(self) -> Verdict:
        random, evil = self.random, self.schedulers[_EVIL]
        self.now += 0.02
        if not self.waiting:
            self.waiting.append(evil.step() if random.random() < 0.7 else evil.other())
        message: scheduler_pb2.AttachResponse | None = self.waiting.pop(0)
        assert message is not None
        kind, mutated = random.random(), True
        if kind < 0.88 and kind > (0.7 if message.HasField("welcome") else 0.25):
            if message.HasField("tokens") and random.random() < 0.3:
                message.tokens.CopyFrom(messages.other_number(random, message.tokens, _COLUMNS))
            else:
                message = messages.mutated(random, message)
        elif kind >= 0.88:
            mutated = False
            message = messages.invented(random, scheduler_pb2.AttachResponse)
            if message is not None and random.random() < 0.8:
                message.epoch = evil.epoch
        if message is None:
            self._lose_evil()
        else:
            self.session.receive(_EVIL, message, self.now)
        accepted = not self._settle()
        if random.random() < 0.2:
            self._submit(good=False)
        if random.random() < 0.1 and self.requests:
            victim = random.choice(self.requests)
            self.session.cancel(victim, scheduler_pb2.CANCEL_REASON_CLIENT, self.now)
        self._settle()
        return Verdict(mutated, accepted and message is not None)

    def _lose_evil(self) -> None:
        self.session.link_closed(_EVIL, self.now)
        self._open(_EVIL)

    def _submit(self, good: bool) -> None:
        request = self._request(len(self.good) + len(self.requests))
        (self.good if good else self.requests).append(request)
        self.texts[request] = {}
        try:
            self.session.submit(request, self.now)
        except OctavoError:
            assert not good
        for model in self.session.models.all():
            # Whatever a scheduler says that it serves, a ticket for it can be issued and read.
            ticket = Ticket("r", "default", 1, 2, model.digest, b"p" * 32)
            assert self.office.check(self.office.issue(ticket), "default") == ticket
            assert 0 < model.vocab_size <= 2**31 and 0 < model.max_model_len <= 2**31

    def _request(self, number: int) -> Request:
        random = self.random
        prompt, max_tokens, n = [random.randrange(VOCAB) for _ in range(random.randint(1, 9))], random.randint(1, 30), 1
        sampling = common_pb2.SamplingSpec(max_tokens=max_tokens, top_p=1, repetition_penalty=1)
        if random.random() < 0.5:
            sampling.logprobs = 1
        if random.random() < 0.3:
            sampling.prompt_logprobs = 1
        if random.random() < 0.2:
            n = 3
        spec = RequestSpec(
            request_id=f"r{number}", tenant="t", model=MODEL, digest=DIGEST, seed=9, group_id=number, priority=0,
            cache_salt=b"salt", prompt_column=pack(prompt, np.int32), num_prompt_tokens=len(prompt), sampling=sampling,
            arrival=self.now, deadline=self.now + 5 if random.random() < 0.1 and number > 1 else None,
            resumed=random.random() < 0.2,
        )  # fmt: skip
        stops = StopStrings(["zzz", "w3"]) if random.random() < 0.3 and number > 1 else None
        rules = FinishRules(max_tokens=max_tokens, stops=stops)
        outputs = [Output(i, rules, assets().table.detokenizer(True)) for i in range(n)]
        return Request(spec, outputs, [sequence_seed(9, i) for i in range(n)], assets().table)

    def _settle(self) -> bool:
        """The good scheduler works, the clients read, the shell does what the session asks. Whether the hostile stream was cut."""
        cut = False
        self.session.tick(self.now)
        good = self.schedulers[_GOOD]
        self.session.receive(_GOOD, good.step(), self.now)
        while (actions := self.session.take_actions()).messages or actions.cut:
            for address, message in actions.messages:
                message.SerializeToString()
                answers = self.schedulers[address].take(message)
                if address == _EVIL:
                    self.waiting += answers
                    continue
                for answer in answers:
                    self.session.receive(address, answer, self.now)
            for address in actions.cut:
                assert address == _EVIL, "a hostile scheduler cost the good one its stream"
                cut = True
                self._open(_EVIL)
        for request in list(self.session.take_changed()):
            self._read(request)
        return cut

    def _read(self, request: Request) -> None:
        """What a client gets is whole: bytes add up, every index ends once."""
        for message in request.take():
            message.SerializeToString()
            if message.HasField("delta"):
                seen = self.texts[request]
                before = seen.get(message.delta.index, 0)
                assert message.delta.text_bytes == before + len(message.delta.text.encode())
                seen[message.delta.index] = message.delta.text_bytes
        if request.error is not None:
            request.error.to_status()

    def finish(self) -> None:
        """The good scheduler's requests have got exactly their tokens."""
        self.session.link_closed(_EVIL, self.now)
        for _ in range(200):
            if all(request.done for request in self.good):
                break
            self.now += 0.05
            self._settle()
        for request in self.good:
            assert request.error is None, request.error
            for sequence in request.sequences:
                spec, ids = request.spec, list(sequence.output.token_ids)
                assert ids == [token_at(spec.num_prompt_tokens, i) for i in range(spec.sampling.max_tokens)]


def _episode(random: Random) -> Iterator[Verdict]:
    world = _World(random)
    for _ in range(EPISODE):
        yield world.attack()
    world.finish()


TARGET = Target(
    "router",
    _episode,
    ("router.session", "router.batch", "router.logprobs", "router.models", "router.request", "router.output", "router.link",
     "router.links", "router.exactly_once", "router.ticket", "service.logprobs", "service.columns"),
)  # fmt: skip
