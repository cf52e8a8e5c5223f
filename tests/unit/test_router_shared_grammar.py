"""One copy of a grammar for all requests under it, as long as there are any."""

from __future__ import annotations

import asyncio
import gc

from octavo.v1 import common_pb2, inference_pb2

from router.shared_grammar import SharedGrammars
from tests.unit.router_calls import stay_silent
from tests.unit.router_fakes import cluster


def choice(*values: str) -> common_pb2.Grammar:
    return common_pb2.Grammar(choice=common_pb2.Choices(values=values))


def test_equal_ones_are_one_and_it_goes_with_the_last_that_holds_it() -> None:
    shared = SharedGrammars()
    first, second = shared.share(choice("a", "b")), shared.share(choice("a", "b"))
    other = shared.share(choice("ab"))
    assert first is second and other is not first and len(shared) == 2
    assert first.message == choice("a", "b") and other.message == choice("ab")
    del first
    assert shared.share(choice("a", "b")) is second
    del second, other
    assert len(shared) == 0


def test_it_is_a_copy_of_its_own() -> None:
    shared, given = SharedGrammars(), common_pb2.Grammar(regex="a+")
    held = shared.share(given)
    given.regex = "b+"
    assert held.message.regex == "a+"
    assert shared.share(given) is not held


def test_requests_under_one_grammar_hold_it_once() -> None:
    grammar = common_pb2.Grammar(regex="h.*")

    async def main() -> None:
        async with cluster(stay_silent) as (_, router):
            asked = inference_pb2.GenerateRequest(text="hello", grammar=grammar)
            prepared = [await router.preparation.prepare(asked, f"tenant-{index}", None) for index in range(3)]
            held = [one.request.spec.grammar for one in prepared]
            assert held[0] is not None and held[0].message == grammar
            assert held[1] is held[0] and held[2] is held[0]
            sequence = prepared[2].request.sequences[0]
            sequence.handle = 1
            assert prepared[2].request.submission(sequence, 0.0).grammar == grammar
            assert len(router.grammars.shared) == 1
            prepared.clear()
            held.clear()
            del sequence
            gc.collect()  # a request and its sequences hold each other
            assert len(router.grammars.shared) == 0

    asyncio.run(main())
