"""Workers are evened out over schedulers: who decides what, and how a worker is let go."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest

from scheduler.hub import Hub, HubSettings
from scheduler.spread import Spreader, choose_move
from tests.unit.hub_cluster import DIGEST, Cluster, hello, submit

A, B = b"a" * 32, b"b" * 32


@pytest.mark.parametrize(
    ("mine", "elsewhere", "move"),
    [
        ({A: 3}, {"x": {A: 0}}, (A, "x")),
        ({A: 2}, {"x": {A: 1}}, None),
        ({A: 2}, {"x": {}}, (A, "x")),
        ({A: 1}, {"x": {}}, None),
        ({A: 4}, {"x": {A: 3}, "y": {A: 1}}, (A, "y")),
        ({A: 1, B: 3}, {"x": {A: 0, B: 0}}, (B, "x")),
        ({A: 5}, {}, None),
    ],
)
def test_a_worker_moves_where_it_evens_the_counts(mine: Any, elsewhere: Any, move: Any) -> None:
    assert choose_move(mine, elsewhere) == move


@pytest.mark.parametrize("start", [(6, 0, 0), (3, 3, 0), (5, 1, 0, 0), (1, 1, 1)])
def test_schedulers_that_decide_at_once_come_to_rest(start: tuple[int, ...]) -> None:
    counts = list(start)
    for _ in range(20):
        moves = []
        for index, count in enumerate(counts):
            others = {str(other): {A: counts[other]} for other in range(len(counts)) if other != index}
            moves.append(choose_move({A: count}, others))
        for index, move in enumerate(moves):
            if move is not None:
                counts[index] -= 1
                counts[int(move[1])] += 1
    assert max(counts) - min(counts) <= 1 and moves == [None] * len(counts)


def test_an_idle_worker_is_sent_at_once_and_one_at_a_time() -> None:
    cluster = Cluster()
    second = cluster.enlist(hello(2))
    cluster.enlist(hello(3))
    cluster.say(submit=submit(1))
    cluster.hub.plan(0.0)
    cluster.hub.redial(DIGEST, "other:1", 1.0)
    sent = [w for w in cluster.hub.workers.values() if w.redial]
    assert len(sent) == 1 and sent[0].closing and sent[0] is not cluster.worker  # that one is at work
    messages = []
    while (message := sent[0].take(1.0)) is not None:
        messages.append(message)
    assert messages[-1].redial.address == "other:1"
    cluster.hub.redial(DIGEST, "other:1", 1.0)
    assert sum(bool(w.redial) for w in cluster.hub.workers.values()) == 1
    assert cluster.hub.count_workers() == Counter({DIGEST: 2})
    assert second in (sent[0], *cluster.hub.workers.values())


def test_what_takes_too_long_goes_to_the_workers_that_stay() -> None:
    cluster = Cluster(redial_patience_s=5.0)
    cluster.say(submit=submit(1, max_tokens=20))
    cluster.hub.plan(0.0)
    cluster.enlist(hello(2))
    cluster.say(submit=submit(2, max_tokens=20))
    cluster.hub.plan(0.0)
    assert all(cluster.hub.core.num_running(w) == 1 for w in cluster.hub.workers)
    cluster.hub.redial(DIGEST, "other:1", 1.0)
    (going,) = (w for w in cluster.hub.workers.values() if w.redial)
    for now in (3.0, 5.9, 6.0):
        for worker in cluster.hub.workers.values():
            worker.heard_at = now
        cluster.hub.tick(now)
        assert going.closing == (now >= 6.0)
    cluster.hub.worker_gone(going, 6.0)
    assert not cluster.hub.core._state.suspects  # it did not die
    load = cluster.hub.core.load()
    assert (load.running, load.waiting, load.workers) == (1, 1, 1)


def test_the_last_worker_of_a_model_stays() -> None:
    cluster = Cluster()
    cluster.hub.redial(DIGEST, "other:1", 1.0)
    assert not cluster.worker.redial and not cluster.worker.draining


def test_a_scheduler_that_does_not_answer_gets_no_worker() -> None:
    async def main() -> None:
        hub = Hub(HubSettings(), incarnation=1)
        spreader = Spreader(hub, grpc.aio.insecure_channel, (), lambda: 0.0)
        spreader.set_peers(["127.0.0.1:1"])
        assert await spreader._ask() == {}

    asyncio.run(main())


def test_an_operators_drain_outranks_a_move() -> None:
    cluster = Cluster()
    cluster.say(submit=submit(1, max_tokens=20))
    cluster.hub.plan(0.0)
    cluster.enlist(hello(2))
    cluster.say(submit=submit(2, max_tokens=20))
    cluster.hub.plan(0.0)
    cluster.hub.redial(DIGEST, "other:1", 1.0)
    (going,) = (w for w in cluster.hub.workers.values() if w.redial)
    cluster.hub.drain_worker(going)
    cluster.hub.core.cancel((cluster.router.peer_id, 1), 2.0)
    cluster.hub.core.cancel((cluster.router.peer_id, 2), 2.0)
    cluster.hub._leaving.release_if_done(going)
    messages = list(iter(lambda: going.take(2.0), None))
    assert messages[-1].HasField("go_away") and not any(message.HasField("redial") for message in messages)


def test_a_scheduler_that_leaves_says_nothing_against_requests() -> None:
    cluster = Cluster()
    cluster.say(submit=submit(1, max_tokens=20))
    cluster.hub.plan(0.0)
    cluster.hub.begin_drain(0)
    cluster.hub.dismiss()
    cluster.hub.worker_gone(cluster.worker, 1.0)
    assert not cluster.hub.core._state.suspects
