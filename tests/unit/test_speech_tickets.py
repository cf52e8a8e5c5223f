"""A resume is held to the grammar that its stream began with, and a router that accepted it once need not look again."""

from __future__ import annotations

import asyncio

from octavo.v1 import common_pb2, inference_pb2

from router.ticket import Ticket, TicketOffice, grammar_hash
from service.errors import Reason
from tests.unit.test_router_fakes import cluster
from tests.unit.test_router_service import ask, collect, refuse, say_text


def test_tickets_bind_the_grammar() -> None:
    regex, lark = common_pb2.Grammar(regex="a"), common_pb2.Grammar(lark="a")
    after = common_pb2.Grammar(regex="a", after=common_pb2.Reasoning(closing="</think>"))
    hashes = [grammar_hash(grammar) for grammar in (None, regex, lark, after)]
    assert len(set(hashes)) == 4 and {len(found) for found in hashes} == {32}
    office = TicketOffice(b"secret")
    for found in hashes:
        ticket = Ticket("r", "acme", 1, 2, b"d" * 32, b"p" * 32, found)
        assert office.check(office.issue(ticket), "acme") == ticket


def test_a_resume_with_another_grammar_is_refused() -> None:
    async def main() -> None:
        async with cluster(say_text) as (scheduler, router):
            request = ask(seed=3)
            request.grammar.regex = "h.*"
            first = await collect(router.stub.Generate(request))
            request.resume.CopyFrom(inference_pb2.Resume(ticket=first[0].started.ticket, seed=3))
            seen = len(scheduler.submits())
            again = await collect(router.stub.Generate(request))
            assert again[0].started.request_id == first[0].started.request_id
            assert len(scheduler.submits()) == seen + 1
            request.grammar.regex = "h.+"
            assert (await refuse(router.stub.Generate(request))).reason is Reason.TICKET_INVALID
            request.ClearField("grammar")
            assert (await refuse(router.stub.Generate(request))).reason is Reason.TICKET_INVALID
            assert len(scheduler.submits()) == seen + 1

    asyncio.run(main())
