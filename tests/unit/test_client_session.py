"""What the client decides without I/O: when to repeat, what to resume with, what to refuse."""

from __future__ import annotations

import pytest
from octavo.client import OctavoError, Reason, RetryPolicy
from octavo.client.request import chat_request, complete_request, prompt_request, tokenize_request
from octavo.client.retry import Attempts
from octavo.client.session import GenerateSession
from octavo.v1 import inference_pb2 as pb

BROKEN = OctavoError(None, "connection reset", broken=True)
QUEUE_FULL = OctavoError(Reason.QUEUE_FULL, "full", retry_after=0.5)


def _session(*, n: int = 1, routers: int = 1, policy: RetryPolicy | None = None) -> GenerateSession:
    request = prompt_request("x", {"n": n, "idempotency_key": "key"})
    return GenerateSession(request, Attempts(policy or RetryPolicy(), routers))


def _started(ticket: bytes = b"t1", digest: str = "d") -> pb.GenerateResponse:
    return pb.GenerateResponse(started=pb.Started(seed=9, ticket=ticket, digest=digest))


def _delta(text: str, end: int, *ids: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=ids, text_bytes=end))


def _finished(index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(index=index))


def test_a_resume_says_exactly_what_was_delivered() -> None:
    session = _session(n=2)
    session.next_request()
    for response in (_started(), _delta("é", 2, 5), _delta("", 2, 6), _delta("ab", 2, 7, index=1), _finished(1)):
        assert session.receive(response) is not None
    session.broke(BROKEN, now=0.0)
    request = session.next_request()
    assert request.resume == pb.Resume(
        ticket=b"t1",
        seed=9,
        outputs=[
            pb.ResumeState(index=0, token_ids=[5, 6], text_bytes=2),
            pb.ResumeState(index=1, token_ids=[7], text_bytes=2, finished=True),
        ],
    )
    assert request.text == "x"
    assert request.attempt == 1
    # The second Started is the client's own business; its ticket is the newer one.
    assert session.receive(_started(b"t2")) is None
    assert session.receive(_delta("c", 3, 8)) is not None
    session.broke(BROKEN, now=0.0)
    resume = session.next_request().resume
    assert resume.ticket == b"t2"
    assert list(resume.outputs[0].token_ids) == [5, 6, 8]


@pytest.mark.parametrize("end", [1, 4], ids=["repeats", "leaves a gap"])
def test_text_that_does_not_join_is_not_delivered(end: int) -> None:
    session = _session()
    session.next_request()
    session.receive(_started())
    session.receive(_delta("ab", 2, 1))
    with pytest.raises(OctavoError, match="PROTOCOL_VIOLATION"):
        session.receive(_delta("c", end, 2))


@pytest.mark.parametrize(
    "responses",
    [[_delta("a", 1, 1)], [_started(), _started()], [_started(), _delta("a", 1, 1, index=1)]],
    ids=["delta first", "started twice", "unknown output"],
)
def test_a_stream_out_of_order_is_refused(responses: list[pb.GenerateResponse]) -> None:
    session = _session()
    session.next_request()
    with pytest.raises(OctavoError, match="PROTOCOL_VIOLATION"):
        for response in responses:
            session.receive(response)


def test_events_of_a_newer_router_are_passed_over() -> None:
    session = _session()
    session.next_request()
    assert session.receive(pb.GenerateResponse()) is None


def test_another_digest_after_a_resume_is_an_error() -> None:
    session = _session()
    session.next_request()
    session.receive(_started())
    session.broke(BROKEN, now=0.0)
    session.next_request()
    with pytest.raises(OctavoError, match="MODEL_CHANGED"):
        session.receive(_started(digest="other"))


def test_it_is_complete_when_all_outputs_have_finished_once() -> None:
    session = _session(n=2)
    session.next_request()
    session.receive(_started())
    assert session.receive(_finished(0)) is not None
    assert session.receive(_finished(0)) is None
    assert not session.complete
    session.receive(_finished(1))
    assert session.complete


def test_what_is_retryable_only_is_not_resumed_after_its_started() -> None:
    session = _session()
    session.next_request()
    assert session.broke(QUEUE_FULL, now=0.0) >= 0.5
    session.next_request()
    session.receive(_started())
    with pytest.raises(OctavoError, match="QUEUE_FULL"):
        session.broke(QUEUE_FULL, now=0.0)


def test_a_stream_without_ticket_is_not_resumed() -> None:
    session = _session()
    session.next_request()
    session.receive(_started(ticket=b""))
    with pytest.raises(OctavoError, match="connection reset"):
        session.broke(BROKEN, now=0.0)


def test_progress_renews_the_number_of_resumes() -> None:
    session = _session(policy=RetryPolicy(resumes=2))
    session.next_request()
    session.receive(_started())
    for length in range(1, 6):
        session.broke(BROKEN, now=0.0)
        session.next_request()
        session.receive(_started())
        session.receive(_delta("a", length, length))
    session.broke(BROKEN, now=0.0)
    session.broke(BROKEN, now=0.0)
    with pytest.raises(OctavoError):
        session.broke(BROKEN, now=0.0)


def test_other_routers_are_asked_before_anyone_waits() -> None:
    attempts = Attempts(RetryPolicy(retries=9), 3)
    delays = []
    routers = [attempts.router]
    for _ in range(6):
        delays.append(attempts.failed(BROKEN, 0.0, may_repeat=True))
        routers.append(attempts.router)
    assert routers == [0, 1, 2, 0, 1, 2, 0]
    assert [delay > 0 for delay in delays] == [False, False, True, False, False, True]
    assert delays[5] > delays[2]


def test_a_defect_is_tried_once_more() -> None:
    attempts = Attempts(RetryPolicy(), 1)
    error = OctavoError(Reason.INTERNAL, "bug")
    attempts.failed(error, 0.0, may_repeat=True)
    with pytest.raises(OctavoError, match="bug"):
        attempts.failed(error, 0.0, may_repeat=True)


def test_nobody_waits_past_the_deadline_or_for_hours() -> None:
    with pytest.raises(OctavoError, match="QUEUE_FULL"):
        Attempts(RetryPolicy(), 1, deadline=10.4).failed(QUEUE_FULL, 10.0, may_repeat=True)
    quota = OctavoError(Reason.QUOTA, "used up", retry_after=3600.0)
    with pytest.raises(OctavoError, match="QUOTA"):
        Attempts(RetryPolicy(), 1).failed(quota, 0.0, may_repeat=True)
    with pytest.raises(OctavoError, match="DEADLINE"):
        Attempts(RetryPolicy(), 1, deadline=10.0).remaining(10.0)


def test_options_land_in_their_fields() -> None:
    request = prompt_request(
        [1, 2],
        {"model": "m", "temperature": 0.0, "stop": "END", "logit_bias": {3: 1.5}, "choice": ["a", "b"], "priority": -1},
    )
    assert list(request.token_ids.ids) == [1, 2]
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert list(request.sampling.stop) == ["END"]
    assert request.sampling.logit_bias[3] == 1.5
    assert list(request.grammar.choice.values) == ["a", "b"]
    assert (request.model, request.priority) == ("m", -1)


def test_a_schema_may_be_a_mapping() -> None:
    assert prompt_request("x", {"json_schema": {"type": "integer"}}).grammar.json_schema == '{"type": "integer"}'
    assert prompt_request("x", {"json_schema": "{}"}).grammar.json_schema == "{}"
    with pytest.raises(OctavoError, match=r"grammar\.json_schema"):
        prompt_request("x", {"json_schema": {"type": object()}})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"stop": [3]}, "sampling.stop"),
        ({"model": 7}, "model"),
        ({"logit_bias": {"a": 1.0}}, "sampling.logit_bias"),
        ({"regex": "a", "choice": ["b"]}, "grammar"),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_field(options: dict[str, object], field: str) -> None:
    with pytest.raises(OctavoError, match="INVALID_ARGUMENT") as caught:
        prompt_request("x", options)  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [field]


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        prompt_request("x", {"temprature": 1.0})  # type: ignore[typeddict-unknown-key]


def test_turns_in_all_their_forms() -> None:
    turn = pb.ChatMessage(role="user", content=[pb.ContentPart(text="c")])
    request = chat_request(
        [("system", "a"), {"role": "user", "content": "b", "name": "Ada"}, turn], {}, tools=[{"a": 1}]
    )
    assert [(m.role, m.content[0].text, m.name) for m in request.chat.messages] == [
        ("system", "a", ""),
        ("user", "b", "Ada"),
        ("user", "c", ""),
    ]
    assert request.chat.tools[0]["a"] == 1


@pytest.mark.parametrize(
    "turn", [{"role": "user"}, {"role": "user", "content": 3}, ("user",), {"role": "u", "content": "", "x": "y"}]
)
def test_a_malformed_turn_names_itself(turn: object) -> None:
    with pytest.raises(OctavoError, match=r"chat\.messages\[1\]"):
        chat_request([("user", "fine"), turn], {})  # type: ignore[list-item]


def test_exactly_one_input() -> None:
    for call in (complete_request, tokenize_request):
        extra = ({},) if call is complete_request else ("", None)
        with pytest.raises(TypeError):
            call(None, None, *extra)  # type: ignore[operator]
        with pytest.raises(TypeError):
            call("a", [("user", "b")], *extra)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("routers", "error", "tries"),
    [
        (1, BROKEN, 3),
        (2, BROKEN, 12),
        (2, OctavoError(Reason.DRAINING, "leaving"), 12),
        (2, QUEUE_FULL, 3),
    ],
)
def test_a_new_request_is_patient_with_routers_that_are_restarted(routers: int, error: OctavoError, tries: int) -> None:
    attempts = Attempts(RetryPolicy(), routers)
    waited = 0.0
    for _ in range(tries):
        waited += attempts.failed(error, 0.0, may_repeat=True)
    with pytest.raises(OctavoError):
        attempts.failed(error, 0.0, may_repeat=True)
    if tries == 12:
        assert waited > 3.0  # a restart takes a second or two
