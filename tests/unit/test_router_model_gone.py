"""What a session does with requests whose model has no worker at the moment."""

from __future__ import annotations

import pytest
from octavo.v1 import scheduler_pb2

from service.errors import OctavoError, Reason
from tests.unit.router_fakes import DIGEST, served
from tests.unit.session_bench import Bench, make_request, start


def test_a_new_request_without_any_worker_is_refused_at_once() -> None:
    bench = Bench()
    with pytest.raises(OctavoError) as caught:
        bench.session.submit(make_request(), 0.0)
    assert caught.value.reason is Reason.NO_WORKER and bench.session.num_requests == 0


def test_a_resumed_request_waits_for_one() -> None:
    bench = Bench()
    request = make_request(resumed=True)
    bench.session.submit(request, 0.0)
    bench.attach("a")
    assert len(bench.submits()) == 1 and request.error is None


def test_who_waits_where_the_last_worker_has_gone_moves_to_where_one_is() -> None:
    bench = Bench("a")
    request = make_request()
    bench.session.submit(request, bench.now)
    assert len(bench.submits()) == 1
    bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList()))
    assert not bench.submits()  # nobody else serves it: the worker may come back
    bench.attach("b")
    messages = bench.session.take_actions().messages
    kinds = [(address, m.WhichOneof("message")) for address, m in messages]
    assert ("a", "cancel") in kinds and ("b", "submit") in kinds
    bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList(models=[served()])))
    assert not bench.sent("cancel")  # and it stays there


def test_a_new_request_waits_a_little_for_a_model_that_has_just_gone() -> None:
    bench = Bench("a")
    bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList()))  # its last worker restarts
    assert bench.session.models.find("tiny").digest == DIGEST and bench.session.models.all() == []
    request = make_request()
    bench.session.submit(request, bench.now)
    assert bench.submits() == []
    bench.tick(3.0)
    bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList(models=[served()])))
    assert len(bench.submits()) == 1 and request.error is None


def test_it_does_not_wait_for_long() -> None:
    bench = Bench("a")
    bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList()))
    request = make_request()
    bench.session.submit(request, bench.now)
    bench.tick(4.9)
    assert request.error is None
    bench.tick(5.1)
    assert request.error is not None and request.error.reason is Reason.NO_WORKER
    with pytest.raises(OctavoError) as caught:  # by now it is refused at once
        bench.session.submit(make_request(), 5.1)
    assert caught.value.reason is Reason.NO_WORKER
    with pytest.raises(OctavoError):
        bench.session.models.find("tiny")


def test_a_new_request_waits_for_the_only_scheduler_that_is_leaving() -> None:
    bench = Bench("a")
    bench.say("a", scheduler_pb2.AttachResponse(go_away=scheduler_pb2.GoAway()))
    request = make_request()
    bench.session.submit(request, bench.now)
    assert bench.submits() == []
    bench.session.link_closed("a", 1.0)
    bench.now = 1.5
    bench.attach("a")
    assert len(bench.submits()) == 1


@pytest.mark.parametrize("reason", [Reason.NO_WORKER, Reason.DRAINING])
def test_a_new_request_that_crossed_the_news_of_an_upgrade_waits(reason: Reason) -> None:
    bench = Bench("a")
    request = make_request()
    bench.session.submit(request, bench.now)
    (submit,) = bench.submits()
    if reason is Reason.NO_WORKER:
        bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList()))
    else:
        bench.say("a", scheduler_pb2.AttachResponse(go_away=scheduler_pb2.GoAway()))
    bench.fail("a", submit.handle, reason)
    assert request.error is None and not bench.submits()
    bench.session.link_closed("a", 0.1)
    bench.now = 0.5
    bench.attach("a")
    assert len(bench.submits()) == 1


def test_while_its_last_worker_leaves_newcomers_wait_and_what_runs_there_may_end() -> None:
    bench = Bench("a")
    running, queued = make_request(), make_request()
    handle = start(bench, running).handle
    bench.say("a", scheduler_pb2.AttachResponse(admitted=scheduler_pb2.Admitted(handle=handle)))
    bench.session.submit(queued, bench.now)
    bench.submits()
    bench.say("a", scheduler_pb2.AttachResponse(models=scheduler_pb2.ModelList(models=[served(workers=0)])))
    newcomer = make_request()
    bench.session.submit(newcomer, bench.now)
    bench.tick(9.0)  # longer than a model lingers that is gone
    assert newcomer.error is None and bench.submits() == []
    bench.attach("b")
    kinds = [(address, m.WhichOneof("message")) for address, m in bench.session.take_actions().messages]
    assert (
        kinds.count(("b", "submit")) == 2 and kinds.count(("a", "cancel")) == 1
    )  # the newcomer and the one that waited
    assert running.sequences[0].link == "a"
