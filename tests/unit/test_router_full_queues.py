"""Where a session goes with requests when schedulers are full, or have refused some."""

from __future__ import annotations

import pytest
from octavo.v1 import scheduler_pb2

from router.link import Link
from service.errors import OctavoError, Reason
from tests.unit.router_fakes import tokens
from tests.unit.session_bench import HELLO, STOP, Bench, make_request, start


def test_a_full_scheduler_is_passed_over_for_another() -> None:
    bench = Bench("a", "b")
    request = make_request()
    bench.session.submit(request, 0.0)
    ((home, submit),) = bench.sent("submit")
    bench.fail(home, submit.handle, Reason.QUEUE_FULL)  # type: ignore[attr-defined]
    ((other, again),) = bench.sent("submit")
    assert other != home and request.error is None
    bench.fail(other, again.handle, Reason.QUEUE_FULL)  # type: ignore[attr-defined]
    assert request.error is not None and request.error.reason is Reason.QUEUE_FULL


def test_it_is_asked_again_after_a_second_at_the_latest_and_other_kinds_at_once() -> None:
    bench = Bench("a")
    first = start(bench, make_request())
    bench.fail("a", first.handle, Reason.QUEUE_FULL, retry_after_ms=5_000)
    with pytest.raises(OctavoError) as caught:
        bench.session.check_room("tiny", "t", 0, 100, bench.now + 0.5)
    assert (caught.value.reason, caught.value.retry_after_ms) == (
        Reason.QUEUE_FULL,
        5_000,
    )  # from now on, so that not all come at once
    bench.session.check_room("tiny", "other", 0, 100, bench.now + 0.5)
    bench.session.check_room("tiny", "t", 1, 100, bench.now + 0.5)
    bench.session.check_room("tiny", "t", 0, 100, bench.now + 1.0)
    bench.session.check_room("tiny", "t", 0, 100, bench.now + 0.5)  # once asked again it is not full until it says so
    bench.fail("a", start(bench, make_request()).handle, Reason.QUEUE_FULL, retry_after_ms=200)
    bench.session.check_room("tiny", "t", 0, 100, bench.now + 0.2)


def test_a_queue_that_has_emptied_is_full_for_nobody() -> None:
    bench = Bench("a")
    first = start(bench, make_request())
    bench.fail("a", first.handle, Reason.QUEUE_FULL, retry_after_ms=900)
    bench.say("a", scheduler_pb2.AttachResponse(load=scheduler_pb2.Load(waiting=3)))
    with pytest.raises(OctavoError):
        bench.session.check_room("tiny", "t", 0, 100, bench.now)
    bench.say("a", scheduler_pb2.AttachResponse(load=scheduler_pb2.Load(waiting=0)))
    bench.session.check_room("tiny", "t", 0, 100, bench.now)


def test_a_queue_full_of_long_prompts_may_have_room_for_a_short_one() -> None:
    bench = Bench("a")
    first, second, third = (make_request() for _ in range(3))
    for request, size in ((first, 9_000), (second, 300), (third, 9_000)):
        object.__setattr__(request.spec, "message_size", size)
    bench.fail("a", start(bench, first).handle, Reason.QUEUE_FULL, retry_after_ms=900)
    bench.session.check_room("tiny", "t", 0, 8_999, bench.now)
    with pytest.raises(OctavoError):
        bench.session.check_room("tiny", "t", 0, 9_000, bench.now)
    bench.fail("a", start(bench, second).handle, Reason.QUEUE_FULL, retry_after_ms=900)  # nor for this one
    bench.session.check_room("tiny", "t", 0, 299, bench.now)
    with pytest.raises(OctavoError):
        bench.session.check_room("tiny", "t", 0, 300, bench.now)
    bench.fail("a", start(bench, third).handle, Reason.QUEUE_FULL, retry_after_ms=900)
    with pytest.raises(OctavoError):  # what is known of short ones stays true
        bench.session.check_room("tiny", "t", 0, 300, bench.now)


def test_one_of_two_schedulers_with_room_is_enough() -> None:
    bench = Bench("a", "b")
    request = make_request()
    bench.session.submit(request, bench.now)
    ((home, submit),) = bench.sent("submit")
    bench.fail(home, submit.handle, Reason.QUEUE_FULL, retry_after_ms=900)  # type: ignore[attr-defined]
    bench.session.check_room("tiny", "t", 0, 100, bench.now)
    ((other, again),) = bench.sent("submit")
    assert other != home
    bench.fail(other, again.handle, Reason.QUEUE_FULL, retry_after_ms=400)  # type: ignore[attr-defined]
    with pytest.raises(OctavoError) as caught:
        bench.session.check_room("tiny", "t", 0, 100, bench.now)
    assert caught.value.retry_after_ms == 400


def test_kinds_that_were_full_do_not_pile_up() -> None:
    link = Link("a", 0.0)
    for number in range(1000):
        link.note_full(f"tenant-{number}", 0, 100, 0.5, now=float(number))
    assert len(link.full) < 300


@pytest.mark.parametrize("told", [False, True])
def test_who_was_told_that_it_is_accepted_is_not_refused_by_a_full_scheduler_after_its_own_was_lost(told: bool) -> None:
    bench = Bench("a")
    request = make_request()
    start(bench, request)
    request.started_told = told  # it waits, and its client has had Started
    bench.session.link_closed("a", bench.now)
    bench.attach("a")
    bench.tick(0.5)
    (again,) = bench.submits()
    bench.fail("a", again.handle, Reason.QUEUE_FULL, retry_after_ms=200)
    if not told:
        assert request.error is not None and request.error.reason is Reason.QUEUE_FULL
        return
    assert request.error is None
    bench.tick(2.0)
    (third,) = bench.submits()
    bench.say("a", tokens(0, (third.handle, 0, [*HELLO, 1], STOP)))
    assert request.done and request.error is None


@pytest.mark.parametrize("with_tokens", [True, False])
def test_who_refused_a_newcomer_takes_it_once_it_was_accepted_elsewhere(with_tokens: bool) -> None:
    bench = Bench("a", "b")
    request = make_request()
    bench.session.submit(request, bench.now)
    ((first, submit),) = bench.sent("submit")
    bench.fail(first, submit.handle, Reason.QUEUE_FULL, retry_after_ms=200)  # type: ignore[attr-defined]
    ((second, again),) = bench.sent("submit")
    assert second != first
    handle = again.handle  # type: ignore[attr-defined]
    bench.say(second, scheduler_pb2.AttachResponse(admitted=scheduler_pb2.Admitted(handle=handle)))
    if with_tokens:
        bench.say(second, tokens(0, (handle, 0, [10], 0)))
    bench.session.link_closed(second, bench.now)
    del bench.epochs[second]
    bench.tick(0.5)
    ((home, resumed),) = bench.sent("submit")
    assert home == first and resumed.accepted  # type: ignore[attr-defined]
