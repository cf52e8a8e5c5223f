"""When messages leave, and which scheduler requests go to."""

from __future__ import annotations

import random

from router.flush import FlushPolicy
from router.placement import Candidate, affinity, choose
from service.columns import pack


def test_light_load_leaves_at_once() -> None:
    policy: FlushPolicy[int] = FlushPolicy(interval=0.008, burst=8)
    for step in range(100):
        assert policy.mark(0, step * 0.002)
    assert policy.due_at is None


def test_heavy_load_waits_for_the_window_and_is_merged() -> None:
    policy: FlushPolicy[int] = FlushPolicy(interval=0.008, burst=4, per_message=0.002)
    assert [policy.mark(key, 0.0) for key in range(6)] == [True] * 4 + [False] * 2
    assert policy.due_at == 0.008
    for key in (5, 4, 5, 1):
        assert not policy.mark(key, 0.004)
    assert policy.take(0.008) == [4, 5, 1]
    assert policy.due_at is None


def test_a_few_streams_of_a_fast_model_wait_for_a_moment_only_and_many_are_merged() -> None:
    """Steps of 1 ms, a token for every stream in each: at 20 streams no token waits for long, at 200 eight go into a message."""
    for streams, longest, merged in ((8, 0.0, 1.0), (20, 0.0021, 2.1), (200, 0.008, 7.5)):
        policy: FlushPolicy[int] = FlushPolicy(interval=0.008, burst=16, per_message=1e-4)
        since: dict[int, float] = {}
        messages, worst = 0, 0.0
        for step in range(2_000):
            now = step * 0.001
            for key in range(streams):
                if policy.mark(key, now):
                    messages += 1
                else:
                    since.setdefault(key, now)
            due_at = policy.due_at
            if due_at is not None and due_at < now + 0.001:
                for key in policy.take(due_at):
                    worst = max(worst, due_at - since.pop(key))
                    messages += 1
        assert worst <= longest + 1e-9
        assert streams * 2_000 / messages >= merged * 0.9
        if streams < 100:
            assert streams * 2_000 / messages <= 2.5


def test_no_one_waits_longer_than_the_interval() -> None:
    """Any arrivals: each mark leaves at once or at a window's end that is at most one interval away."""
    generator = random.Random(1)
    policy: FlushPolicy[int] = FlushPolicy(interval=0.008, burst=2, per_message=1.0)
    now, since, messages = 0.0, {}, 0
    for _ in range(5_000):
        now += generator.expovariate(3_000)
        due_at = policy.due_at
        if due_at is not None and now >= due_at:
            for key in policy.take(due_at):
                assert due_at - since.pop(key) <= 0.008 + 1e-9
                messages += 1
        key = generator.randrange(8)
        if policy.mark(key, now):
            messages += 1
            assert key not in since
        else:
            since.setdefault(key, now)
    assert messages <= (now / 0.008 + 1) * (8 + 2)


def test_a_stream_that_is_gone_is_forgotten() -> None:
    policy: FlushPolicy[int] = FlushPolicy(burst=0)
    policy.mark(1, 0.0)
    policy.forget(1)
    policy.forget(2)
    assert policy.due_at is None and policy.take(1.0) == []


def keys(count: int) -> list[bytes]:
    return [affinity(b"salt", pack([i] * 300, "int32")) for i in range(count)]


def test_requests_with_one_prefix_go_to_one_scheduler() -> None:
    idle = [Candidate(name, 1, 0) for name in "abc"]
    for key in keys(50):
        assert len({choose(order, key) for order in (idle, idle[::-1])}) == 1
    prefix = list(range(256))
    assert affinity(b"s", pack([*prefix, 1], "int32")) == affinity(b"s", pack([*prefix, 2], "int32"))
    assert affinity(b"s", pack(prefix, "int32")) != affinity(b"t", pack(prefix, "int32"))


def test_a_scheduler_that_comes_takes_only_its_share() -> None:
    three = [Candidate(name, 1, 0) for name in "abc"]
    four = [*three, Candidate("d", 1, 0)]
    before = [choose(three, key) for key in keys(400)]
    after = [choose(four, key) for key in keys(400)]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"d"} and 60 < len(moved) < 140


def test_no_scheduler_gets_more_than_its_bound() -> None:
    """Even if all requests share one prefix, and in proportion to workers."""
    workers = {"a": 1, "b": 1, "c": 2}
    load = dict.fromkeys(workers, 0)
    (key,) = keys(1)
    for _ in range(400):
        load[choose([Candidate(name, workers[name], load[name]) for name in workers], key)] += 1
    assert all(load[name] <= 1.25 * 400 * workers[name] / 4 + 1 for name in workers)
    assert sum(load.values()) == 400


def test_nothing_waits_longer_than_the_interval() -> None:
    """However many streams there are and however long writing takes: 256 of them at 50 µs are more than a window."""
    policy: FlushPolicy[int] = FlushPolicy(interval=0.008, burst=16)
    generator = random.Random(1)
    now = 0.0
    for _ in range(500):
        for key in range(generator.randint(1, 256)):
            now += generator.expovariate(20_000.0)
            policy.mark(key, now)
            due_at = policy.due_at
            assert due_at is None or due_at <= now + 0.008
        if policy.due_at is not None:
            now = max(now, policy.due_at)
            now += 50e-6 * len(policy.take(now))
