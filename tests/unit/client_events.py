"""What a client must have got when all is over, whatever happened to its streams."""

from __future__ import annotations

from octavo.client import Event
from octavo.v1 import inference_pb2 as pb

from tests.unit.client_fake_router import whole_text

TOTAL = 9  # tokens that the tests ask for


def check_exactly_once(events: list[Event], total: int = TOTAL) -> None:
    """Started, every token of the fake router once and in order, Finished."""
    deltas = [event for event in events if isinstance(event, pb.Delta)]
    assert [type(event) for event in events].count(pb.Started) == 1
    assert isinstance(events[0], pb.Started)
    assert isinstance(events[-1], pb.Finished)
    assert [token for delta in deltas for token in delta.token_ids] == list(range(1000, 1000 + total))
    assert "".join(delta.text for delta in deltas) == whole_text(total)
