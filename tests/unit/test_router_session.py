"""The session without sockets: exactly once, whatever schedulers do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from octavo.v1 import scheduler_pb2

from router.resolve import sequence_seed
from service.columns import pack
from service.errors import Reason
from tests.unit.router_fakes import DIGEST, served, tokens, welcome
from tests.unit.session_bench import HELLO, LENGTH, STOP, Bench, make_request, output_ids, start


def test_hello_then_submit_with_the_epoch_of_welcome() -> None:
    bench = Bench()
    bench.session.link_opened("a", 0.0)
    (hello,) = bench.session.take_actions().messages
    assert hello[1].epoch == 0 and hello[1].hello.incarnation == 1
    bench.session.receive("a", welcome(41), 0.0)
    bench.session.submit(make_request(), 0.5)
    ((address, message),) = bench.session.take_actions().messages
    assert (address, message.epoch) == ("a", 41)
    assert message.submit.waited_ms == 500 and message.submit.digest == DIGEST


def test_tokens_that_come_twice_are_taken_once() -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    bench.say("a", tokens(0, (handle, 0, [10, 11], 0)))
    bench.say("a", tokens(0, (handle, 0, [10, 11], 0)))
    bench.say("a", tokens(0, (handle, 1, [11, 12], 0)))
    bench.say("a", tokens(0, (handle, 3, [13], 0)))
    assert output_ids(request) == [10, 11, 12, 13]
    assert bench.session.dropped_tokens == 3
    assert bench.submits() == []


def test_a_gap_is_submitted_again() -> None:
    bench = Bench("a")
    request = make_request()
    first = start(bench, request)
    bench.say("a", tokens(0, (first.handle, 0, [10], 0)))
    bench.say("a", tokens(0, (first.handle, 2, [12], 0)))
    messages = [m for _, m in bench.session.take_actions().messages]
    assert [m.WhichOneof("message") for m in messages] == ["cancel", "submit"]
    again = messages[1].submit
    assert messages[0].cancel.handle == first.handle != again.handle
    assert again.attempt == 1 and again.output_token_ids == pack([10], "int32")
    bench.say("a", tokens(0, (first.handle, 1, [77], 0)))  # of the life that was given up
    bench.say("a", tokens(0, (again.handle, 1, [11], 0)))
    assert output_ids(request) == [10, 11]


def test_a_message_of_an_old_epoch_is_dropped() -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    bench.say("a", tokens(99, (handle, 0, [10], 0)))
    assert output_ids(request) == []


def test_a_broken_stream_goes_on_at_another_scheduler() -> None:
    bench = Bench("a", "b")
    request = make_request(n=3)
    bench.session.submit(request, bench.now)
    placed = [(address, m.submit) for address, m in bench.session.take_actions().messages if m.HasField("submit")]
    home = placed[0][0]
    other = "b" if home == "a" else "a"
    handles = {submit.index: submit.handle for address, submit in placed if address == home}
    for index, handle in handles.items():
        bench.say(home, tokens(0, (handle, 0, [10 + index, 20], 0)))
    bench.now = 2.0
    bench.session.link_closed(home, bench.now)
    moved = bench.sent("submit")
    assert {address for address, _ in moved} == {other}
    for _, submit in moved:
        assert isinstance(submit, scheduler_pb2.Submit)
        assert submit.output_token_ids == pack([10 + submit.index, 20], "int32")
        assert submit.waited_ms == 2000 and submit.attempt == 1
        assert submit.seed == sequence_seed(9, submit.index)
    assert len({sequence_seed(9, i) for i in range(64)}) == 64


def test_a_lone_scheduler_that_restarts_gets_everything_again() -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    bench.say("a", tokens(0, (handle, 0, [10], 0)))
    bench.now = 1.0
    bench.session.link_closed("a", 1.0)
    assert bench.submits() == [] and request.error is None
    bench.attach("a")
    (submit,) = bench.submits()
    assert submit.output_token_ids == pack([10], "int32")
    bench.say("a", tokens(0, (submit.handle, 1, [11, 1], STOP)))
    assert output_ids(request) == [10, 11, 1] and request.done
    assert request.take()[-1].finished.timing.migrations == 1


def test_an_accepted_request_waits_for_a_scheduler_but_not_for_ever() -> None:
    bench = Bench("a")
    request = make_request()
    start(bench, request)
    bench.session.link_closed("a", 1.0)
    bench.epochs.clear()
    bench.now = 1.0
    bench.tick(10.5)
    assert request.error is None
    bench.tick(12.0)
    assert request.error is not None and request.error.reason is Reason.NO_WORKER


def test_another_digest_is_no_place_to_go_on() -> None:
    bench = Bench("a")
    request = make_request()
    start(bench, request)
    bench.session.link_closed("a", 0.0)
    bench.attach("a", served(digest=b"x" * 32))
    assert bench.submits() == []
    bench.tick(12.0)
    assert request.error is not None and request.error.reason is Reason.MODEL_CHANGED


def test_a_silent_scheduler_is_left_and_a_stalled_router_judges_nobody() -> None:
    bench = Bench("a", "b")
    bench.session.tick(0.0)
    bench.session.tick(5.0)  # our own loop stood still
    assert bench.session.take_actions().cut == []
    for step in range(1, 5):
        bench.session.receive("b", scheduler_pb2.AttachResponse(epoch=1, load=scheduler_pb2.Load()), 5.0 + step / 10)
        bench.session.tick(5.0 + step / 10)
    assert bench.session.take_actions().cut == ["a"]


def test_heartbeats_go_out() -> None:
    bench = Bench("a")
    bench.tick(1.0)
    assert 9 <= len(bench.sent("heartbeat")) <= 11


def test_a_stop_string_cancels_with_the_count() -> None:
    bench = Bench("a")
    request = make_request(stop="wor")
    handle = start(bench, request).handle
    bench.say("a", tokens(0, (handle, 0, HELLO, 0)))
    ((_, cancel),) = bench.sent("cancel")
    assert isinstance(cancel, scheduler_pb2.Cancel)
    assert cancel.reason == scheduler_pb2.CANCEL_REASON_STOP_STRING
    assert cancel.num_output_tokens == len(output_ids(request))
    messages = request.take()
    assert "".join(m.delta.text for m in messages) == "hello "
    assert messages[-1].finished.stop_match.text == "wor"


def test_a_handle_is_free_only_after_the_acknowledgement() -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    bench.session.cancel(request, scheduler_pb2.CANCEL_REASON_CLIENT, 0.0)
    link = bench.session._links.by_address["a"]
    assert link.cancelling == {handle} and not link.running
    bench.say("a", tokens(0, (handle, 0, [10], STOP)))  # crossed with the cancel
    assert link.cancelling == {handle}
    bench.say("a", scheduler_pb2.AttachResponse(cancelled=scheduler_pb2.Cancelled(handle=handle)))
    assert not link.cancelling
    bench.session.cancel(request, scheduler_pb2.CANCEL_REASON_CLIENT, 0.0)
    assert len(bench.sent("cancel")) == 1


def test_a_deadline_ends_the_request_and_frees_its_row() -> None:
    bench = Bench("a")
    request = make_request(deadline=1.0)
    submit = start(bench, request)
    assert submit.remaining_ms == 1000
    bench.tick(1.05)
    assert request.error is not None and request.error.reason is Reason.DEADLINE
    ((_, cancel),) = bench.sent("cancel")
    assert isinstance(cancel, scheduler_pb2.Cancel) and cancel.reason == scheduler_pb2.CANCEL_REASON_DEADLINE


def test_a_deadline_holds_while_no_scheduler_is_there() -> None:
    bench = Bench("a")
    request = make_request(deadline=1.0)
    start(bench, request)
    bench.session.link_closed("a", 0.0)
    bench.epochs.clear()
    bench.tick(1.05)
    assert request.error is not None and request.error.reason is Reason.DEADLINE


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.NO_WORKER, Reason.POISON, Reason.PROMPT_TOO_LONG])
def test_a_refusal_of_the_only_scheduler_is_told_at_once(reason: Reason) -> None:
    bench = Bench("a")
    request = make_request(n=2)
    handle = start(bench, request).handle
    bench.fail("a", handle, reason)
    assert request.error is not None and request.error.reason is reason
    assert request.done and bench.session.num_requests == 0
    assert len(bench.sent("cancel")) == 1  # the sibling


@pytest.mark.parametrize("reason", [Reason.LOST, Reason.NO_WORKER, Reason.DRAINING])
def test_what_was_accepted_is_submitted_again(reason: Reason) -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    bench.say("a", tokens(0, (handle, 0, [10], 0)))
    bench.fail("a", handle, reason)
    bench.tick(2.0)
    (submit,) = bench.submits()
    assert submit.output_token_ids == pack([10], "int32") and request.error is None


def test_a_request_that_never_gets_on_is_given_up() -> None:
    bench = Bench("a")
    request = make_request(resumed=True)
    handle = start(bench, request).handle
    failures = 0
    while request.error is None:
        bench.fail("a", handle, Reason.LOST)
        failures += 1
        bench.tick(bench.now + 1.5)
        submits = bench.submits()
        if submits:
            handle = submits[0].handle
    assert request.error.reason is Reason.LOST and failures == 20


def test_go_away_moves_what_can_be_moved() -> None:
    bench = Bench("a", "b")
    request = make_request()
    bench.session.submit(request, 0.0)
    ((home, _),) = bench.sent("submit")
    bench.say(home, scheduler_pb2.AttachResponse(go_away=scheduler_pb2.GoAway(remaining_ms=1000)))
    messages = bench.session.take_actions().messages
    assert [(a == home, m.WhichOneof("message")) for a, m in messages] == [(True, "cancel"), (False, "submit")]
    bench.session.submit(make_request(), 0.0)
    assert all(address != home for address, _ in bench.sent("submit"))


def test_a_lone_scheduler_that_goes_keeps_its_requests_to_the_end() -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    bench.say("a", scheduler_pb2.AttachResponse(go_away=scheduler_pb2.GoAway(remaining_ms=1000)))
    bench.say("a", tokens(0, (handle, 0, [10, 1], STOP)))
    assert request.done and request.error is None


def test_columns_that_do_not_fit_cost_the_stream() -> None:
    bench = Bench("a")
    request = make_request()
    start(bench, request)
    bad = scheduler_pb2.TokenBatch(handles=pack([1], "uint32"), num_tokens=pack([3], "int32"))
    bench.say("a", scheduler_pb2.AttachResponse(tokens=bad))
    assert bench.session.take_actions().cut == ["a"]
    assert request.error is None  # it waits for another stream
    bench.attach("a")
    assert len(bench.submits()) == 1


@pytest.mark.parametrize("break_it", [lambda w: setattr(w.welcome, "protocol", 2), lambda w: setattr(w, "epoch", 0)])
def test_a_welcome_that_we_do_not_speak_costs_the_stream(
    break_it: Callable[[scheduler_pb2.AttachResponse], None],
) -> None:
    bench = Bench()
    bench.session.link_opened("a", 0.0)
    message = welcome(1)
    break_it(message)
    bench.session.receive("a", message, 0.0)
    assert bench.session.take_actions().cut == ["a"] and bench.session.num_attached == 0


@pytest.mark.parametrize(
    "lie",
    [
        {"digest": b"short"},
        {"vocab_size": 2**31},
        {"vocab_size": 0},
        {"max_model_len": 2**31},
        {"max_model_len": 0},
        {"name": ""},
        {"workers": 2**32 - 1},
    ],
)
def test_a_served_model_that_cannot_be_costs_the_stream(lie: dict[str, object]) -> None:
    bad = served()
    for name, value in lie.items():
        setattr(bad, name, value)
    bench = Bench("a")
    bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList(models=[served(), bad])))
    assert bench.session.take_actions().cut == ["a"] and not bench.session.models.all()
    bench.session.link_opened("b", 0.0)
    bench.session.receive("b", welcome(1, bad), 0.0)
    assert bench.session.take_actions().cut == ["b"] and not bench.session.models.all()


def test_logprobs_of_tokens_that_did_not_come_are_not_kept() -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    message = tokens(0, (handle, 0, [10], 0))
    columns = message.tokens.logprobs
    columns.owner = pack([0] * 4, "int32")
    columns.position = pack([3, 4, 500, 2**31 - 2], "int32")
    columns.rank = columns.num_entries = pack([1] * 4, "int32")
    columns.token_ids = pack([10] * 4, "int32")
    columns.logprobs = pack([float("inf")] * 4, "float32")
    bench.say("a", message)
    assert list(request.sequences[0].logprobs) == [0]
    assert request.sequences[0].logprobs[0].token.logprob == -9999.0  # infinity is no JSON number


def test_a_length_end_of_the_scheduler_needs_no_cancel() -> None:
    bench = Bench("a")
    request = make_request(max_tokens=2)
    handle = start(bench, request).handle
    bench.say("a", tokens(0, (handle, 0, [10, 11], LENGTH)))
    assert request.done and bench.sent("cancel") == []
    assert request.take()[-1].finished.finish_reason == LENGTH


def test_an_end_that_lies_behind_is_not_ours() -> None:
    bench = Bench("a")
    request = make_request()
    handle = start(bench, request).handle
    bench.say("a", tokens(0, (handle, 0, [10, 11, 12], 0)))
    bench.say("a", tokens(0, (handle, 0, [10], LENGTH)))
    (submit,) = bench.submits()
    assert submit.output_token_ids == pack([10, 11, 12], "int32") and not request.done


def test_detach_says_goodbye() -> None:
    bench = Bench("a", "b")
    bench.session.detach()
    assert len(bench.sent("detach")) == 2


def test_outputs_of_a_request_that_has_failed_are_not_submitted_again() -> None:
    bench = Bench("a")
    request = make_request(n=3)
    bench.session.submit(request, bench.now)
    for sequence in request.sequences:
        sequence.tries = 20
    bench.submits()
    bench.session.link_closed("a", bench.now)
    assert request.error is not None and request.error.reason is Reason.LOST
    bench.attach("a")
    bench.tick(bench.now + 2)
    assert bench.submits() == []
