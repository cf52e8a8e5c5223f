"""Fields are counted without parsing, and a message of too many is refused before it costs anything."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from octavo.v1 import inference_pb2

from service.wire import find_excess

REQUEST = inference_pb2.GenerateRequest.DESCRIPTOR


def count(message: Message) -> int:
    """Fields and entries, as they are serialised."""
    total = 0
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values = value.values() if field.message_type.fields_by_name["value"].message_type else ()
            total += 3 * len(value) + sum(count(one) for one in values)  # an entry has a key and a value
        elif field.is_repeated and field.is_packed:
            total += 1
        else:
            values = value if field.is_repeated else [value]
            total += len(values)
            if field.type == field.TYPE_MESSAGE:
                total += sum(count(one) for one in values)
    return total


def a_request() -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(model="m", priority=-3, heartbeats=True)
    for number in range(5):
        message = request.chat.messages.add()
        message.role = "user"
        message.content.add().text = "x" * 200 * number
    request.chat.template_args.update({"deep": {"er": [1, None, {"a": "b"}]}})
    request.sampling.temperature = 0.5
    request.sampling.stop.extend(["a", "", "c"])
    request.sampling.logit_bias.update({7: 1.0, 300: -2.0})
    request.resume.outputs.add(index=1, token_ids=range(1000))
    return request


def test_all_fields_are_counted_and_none_twice() -> None:
    request = a_request()
    data, total = request.SerializeToString(), count(request)
    assert find_excess(total, data, REQUEST) == ""
    assert find_excess(total - 1, data, REQUEST) != ""


@pytest.mark.parametrize(
    ("fill", "path"),
    [
        (lambda r: r.sampling.stop.extend([""] * 1000), "sampling.stop"),
        (lambda r: r.sampling.logit_bias.update(dict.fromkeys(range(1000), 1.0)), "sampling.logit_bias"),
        (lambda r: [r.resume.outputs.add() for _ in range(1000)], "resume.outputs"),
        (lambda r: [r.chat.messages.add().content.add() for _ in range(1000)], "chat.messages"),
    ],
)
def test_the_field_that_is_too_many_is_named(fill: object, path: str) -> None:
    request = inference_pb2.GenerateRequest(model="m")
    fill(request)  # type: ignore[operator]
    assert find_excess(500, request.SerializeToString(), REQUEST).startswith(path)


def test_unknown_fields_count_too() -> None:
    assert find_excess(100, b"\xf8\x7f\x00" * 101, REQUEST) == "unknown fields"


def test_a_number_without_an_end_is_left_to_the_parser_at_once() -> None:
    endless = b"\x08" + b"\xff" * 100 + b"\x01"
    assert find_excess(10, endless + b"\x38\x00" * 20, REQUEST) == ""
    with pytest.raises(DecodeError):
        inference_pb2.GenerateRequest.FromString(endless)
    longest = b"\x38" + b"\xff" * 9 + b"\x01"  # -1
    assert inference_pb2.GenerateRequest.FromString(longest).priority == -1
    assert find_excess(10, longest * 11, REQUEST) == "priority"


@given(st.binary(max_size=300))
def test_what_the_parser_refuses_is_left_to_it(data: bytes) -> None:
    excess = find_excess(1000, data, REQUEST)
    assert excess == ""


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_damage_never_raises(noise: bytes, at: int, byte: int) -> None:
    whole = bytearray(a_request().SerializeToString())
    whole[at % len(whole)] = byte
    data = bytes(whole[: max(1, len(whole) - at)]) + noise
    excess = find_excess(100_000, data, REQUEST)
    try:
        inference_pb2.GenerateRequest.FromString(data)
    except DecodeError:
        return
    assert excess == ""
