"""A sequence that runs and gets nothing is submitted again; one that waits in the queue, or computes a long prompt, is left alone."""

from __future__ import annotations

import itertools
import logging

import pytest
from octavo.v1 import common_pb2, scheduler_pb2

from service.errors import Reason
from tests.unit.router_fakes import tokens
from tests.unit.session_bench import Bench, make_request, output_ids, start

SECRET = 424_242


def admit(bench: Bench, handle: int, address: str = "a") -> None:
    bench.say(address, scheduler_pb2.AttachResponse(admitted=scheduler_pb2.Admitted(handle=handle)))


class Loaded(Bench):
    """A bench whose schedulers say that so many requests wait."""

    def __init__(self, *addresses: str, waiting: int = 0) -> None:
        super().__init__(*addresses)
        self.waiting = waiting

    def pass_time(self, seconds: float) -> list[scheduler_pb2.Submit]:
        """What was submitted meanwhile."""
        until, submits = self.now + seconds, []
        while self.now < until:
            self.now += 0.1
            for address in self.epochs:
                load = scheduler_pb2.Load(waiting=self.waiting, running=1)
                self.say(address, scheduler_pb2.AttachResponse(load=load))
            self.session.tick(self.now)
            submits += self.submits()
        return submits


def test_a_row_that_the_scheduler_forgot_is_submitted_again_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    bench = Loaded("a")
    request = make_request()
    first = start(bench, request)
    admit(bench, first.handle)
    bench.say("a", tokens(0, (first.handle, 0, [SECRET], 0)))
    assert bench.pass_time(29.9) == []
    with caplog.at_level(logging.ERROR, "octavo.router.session"):
        (again,) = bench.pass_time(9.0)
    assert bench.session.stalls == 1
    assert "r: output 0 has got nothing for" in caplog.text
    assert str(SECRET) not in caplog.text
    assert again.handle != first.handle
    assert list(memoryview(again.output_token_ids).cast("i")) == [SECRET]
    bench.say("a", tokens(0, (first.handle, 1, [7], 0)))  # what comes late for the old handle is not taken
    bench.say("a", tokens(0, (again.handle, 1, [8, 9], common_pb2.FINISH_REASON_LENGTH)))
    assert output_ids(request) == [SECRET, 8, 9]
    assert bench.pass_time(100.0) == []
    assert bench.session.stalls == 1


def test_the_old_handle_is_cancelled_and_another_scheduler_is_preferred() -> None:
    bench = Loaded("a", "b")
    bench.session.submit(make_request(), 0.0)
    ((address, submit),) = bench.sent("submit")
    other = {"a": "b", "b": "a"}[address]
    admit(bench, submit.handle, address)  # type: ignore[attr-defined]
    cancelled, submitted = [], []
    while not submitted:
        bench.tick(bench.now + 0.1)
        for to, message in bench.session.take_actions().messages:
            if message.HasField("cancel"):
                cancelled.append((to, message.cancel.handle))
            if message.HasField("submit"):
                submitted.append(to)
        assert bench.now < 60
    assert cancelled == [(address, submit.handle)]  # type: ignore[attr-defined]
    assert submitted == [other]


def test_to_wait_in_the_queue_is_no_stall() -> None:
    bench = Loaded("a", waiting=5)
    submit = start(bench, make_request())
    assert bench.pass_time(400.0) == []
    bench.waiting = 0  # the queue is empty: it can't be in it
    assert len(bench.pass_time(10.0)) == 1
    assert bench.session.stalls == 1
    assert submit.attempt == 0


def test_others_that_wait_are_no_excuse_for_one_that_has_a_row() -> None:
    bench = Loaded("a", waiting=5)
    admit(bench, start(bench, make_request()).handle)
    assert bench.pass_time(29.0) == []
    assert len(bench.pass_time(9.0)) == 1


@pytest.mark.parametrize("loss", ["migrated", "preempted"])
def test_one_that_lost_its_row_waits_until_it_has_one_again(loss: str) -> None:
    bench = Loaded("a", waiting=1)
    handle = start(bench, make_request()).handle
    admit(bench, handle)
    bench.say("a", tokens(0, (handle, 0, [5], 0)))
    message = scheduler_pb2.AttachResponse()
    getattr(message, loss).handle = handle
    bench.say("a", message)
    assert bench.pass_time(400.0) == []
    admit(bench, handle)
    assert bench.pass_time(29.0) == []
    assert len(bench.pass_time(9.0)) == 1


def test_a_long_prompt_has_more_time_for_its_first_token_only() -> None:
    bench = Loaded("a")
    request = make_request()
    object.__setattr__(request.spec, "num_prompt_tokens", 6_000)
    handle = start(bench, request).handle
    admit(bench, handle)
    assert bench.pass_time(89.0) == []
    bench.say("a", tokens(0, (handle, 0, [5], 0)))
    assert bench.pass_time(29.0) == []
    assert len(bench.pass_time(10.0)) == 1


def test_our_own_stall_is_nobodys_fault() -> None:
    bench = Loaded("a")
    handle = start(bench, make_request()).handle
    admit(bench, handle)
    bench.pass_time(1.0)
    bench.now += 500.0
    assert bench.pass_time(28.0) == []
    assert bench.session.stalls == 0


def test_what_stalls_again_and_again_is_asked_for_less_and_less_often_and_fails_in_the_end() -> None:
    bench = Loaded("a")
    request = make_request()
    start(bench, request)
    at = []
    while not request.done:
        at += [bench.now] * len(bench.pass_time(10.0))
        assert bench.now < 20_000
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert gaps[0] < 100
    assert 480 <= gaps[-1] < 500
    assert len(at) == 19  # the first and these make twenty
    assert request.error is not None
    assert request.error.reason is Reason.LOST


def test_who_is_done_is_looked_at_no_more() -> None:
    bench = Loaded("a")
    request, gone = make_request(), make_request()
    handle = start(bench, request).handle
    start(bench, gone)
    bench.say("a", tokens(0, (handle, 0, [5], common_pb2.FINISH_REASON_LENGTH)))
    bench.session.cancel(gone, scheduler_pb2.CANCEL_REASON_CLIENT, bench.now)
    assert not bench.session._homes._watch._due
