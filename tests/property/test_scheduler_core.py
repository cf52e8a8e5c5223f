"""Whatever happens, in whatever order: the tokens of a request don't depend on the schedule, and the books balance."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.core import (
    Reason,
    Request,
    RequestState,
    RowStatus,
    SamplingParams,
    Scheduler,
    Settings,
    WorkerSpec,
)
from tests.property.scheduler_harness import VOCABULARY, Cluster

MAX_MODEL_LEN = 40
MAX_EVENTS = 400

# Prompts share prefixes of many lengths, so that blocks are hit, computed at the same time, evicted and hit again.
FAMILIES = [[(7 * family + 3 * i + i * i) % VOCABULARY for i in range(30)] for family in range(3)]


@st.composite
def worker_specs(draw: st.DrawFn) -> WorkerSpec:
    max_rows = draw(st.integers(1, 8))
    block_size = draw(st.integers(1, 5))
    return WorkerSpec(
        model="m",
        model_digest=b"d" * 32,
        max_rows=max_rows,
        max_num_batched_tokens=draw(st.integers(max_rows, 32)),
        max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        # From "one request just fits" to "a handful".
        num_blocks=-(-draw(st.integers(MAX_MODEL_LEN, 4 * MAX_MODEL_LEN)) // block_size),
        window=draw(st.none() | st.integers(1, 12)),
        run_ahead=draw(st.integers(1, 4)),
    )


Event = tuple[str, Any]

CALM = {"submit": 3, "plan": 6, "deliver": 6, "fill": 1}
ROUGH = {
    "submit": 5,
    "plan": 10,
    "deliver": 9,
    "fill": 1,
    "cancel": 1,
    "resubmit": 1,
    "fail": 0.3,
    "nan": 0.2,
    "empty_mask": 0.2,
    "late_mask": 0.3,
    "remove": 0.2,
    "add": 0.3,
    "detach": 0.1,
    "drain": 0.1,
}


def random_submission(random: Random) -> dict[str, Any]:
    """What Cluster.submit takes."""
    max_tokens = random.randint(1, 16)
    extra = [random.randrange(VOCABULARY) for _ in range(random.randint(0, 3))]
    return {
        "router_id": random.randint(1, 2),
        "prompt": random.choice(FAMILIES)[: random.randint(1, 26)] + extra,
        "sampling": SamplingParams(
            max_tokens=max_tokens,
            min_tokens=random.randint(0, max_tokens),
            stop_token_ids=tuple(random.sample(range(VOCABULARY), random.choice((0, 1, 3, 6)))),
            prompt_logprobs=random.random() < 0.1,
        ),
        "priority": random.randint(0, 2),
        "tenant": random.choice("abc"),
        "cache_salt": random.choice((b"", b"", b"salt")),
    }


def random_events(weights: dict[str, float], seed: int, count: int) -> list[Event]:
    """The first `count` events of an endless stream, so that a failure shrinks to the shortest beginning that shows it."""
    random = Random(seed)
    names = random.choices(list(weights), list(weights.values()), k=MAX_EVENTS)[:count]
    return [(name, random_submission(random) if name == "submit" else random.randrange(1000)) for name in names]


seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(MAX_EVENTS // 4, MAX_EVENTS)
shared_tokens = st.sampled_from((1, 2_048))
fast = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def play(cluster: Cluster, events: list[Event]) -> None:
    """Plays the events against the cluster; numbers choose among the workers or requests that there are."""
    for name, argument in events:
        if name == "submit":
            cluster.submit(**argument)
            continue
        workers = sorted(cluster.devices)
        worker_id = workers[argument % len(workers)] if workers else 0
        has_result = bool(workers) and bool(cluster.devices[worker_id].inbox)
        keys = sorted(cluster.streams)
        if name == "add" and len(workers) < 4:
            cluster.add_worker()
        elif name == "plan" and workers:
            cluster.plan(worker_id)
        elif name == "fill" and workers:
            while cluster.plan(worker_id):
                pass
        elif name == "deliver" and has_result:
            cluster.deliver(worker_id)
        elif name == "fail" and has_result:
            cluster.deliver(worker_id, fail=True)
        elif name == "nan" and has_result:
            cluster.deliver(worker_id, bad_entry=argument)
        elif name == "empty_mask" and has_result:
            cluster.deliver(worker_id, bad_entry=argument, status=RowStatus.MASK_EMPTY)
        elif name == "late_mask" and has_result:
            cluster.deliver(worker_id, bad_entry=argument, status=RowStatus.MASK_LATE)
        elif name == "remove" and workers:
            cluster.remove_worker(worker_id)
        elif name == "drain" and len(workers) > 1:
            cluster.scheduler.drain_worker(worker_id)
        elif name == "cancel" and keys:
            cluster.cancel(keys[argument % len(keys)])
        elif name == "resubmit" and keys:
            cluster.resubmit(keys[argument % len(keys)])
        elif name == "detach" and argument % 5 == 0:
            gone = [key for key in keys if key[0] == 1]
            assert cluster.scheduler.detach_router(1, cluster.now) == len(gone)
            for key in gone:
                cluster.end(key, "cancelled")


@fast
@given(worker_specs(), st.integers(1, 3), seeds, lengths, shared_tokens)
def test_tokens_do_not_depend_on_the_schedule(
    spec: WorkerSpec, num_workers: int, seed: int, length: int, shared: int
) -> None:
    """Arrivals, chunks, prefix hits, preemption and run-ahead, with nothing going wrong: every request ends as it should."""
    cluster = Cluster(Scheduler(Settings(watermark=0.05, max_shared_tokens=shared)), spec, shared)
    for _ in range(num_workers):
        cluster.add_worker()
    play(cluster, random_events(CALM, seed, length))
    cluster.finish_all()
    assert all(stream.ended in ("STOP", "LENGTH") for stream in cluster.done)


@fast
@given(worker_specs(), seeds, lengths, shared_tokens)
def test_tokens_survive_cancels_failures_and_lost_workers(
    spec: WorkerSpec, seed: int, length: int, shared: int
) -> None:
    """The same while workers fail, leave and join, rows hold NaNs, and routers cancel, resubmit and detach."""
    cluster = Cluster(
        Scheduler(Settings(watermark=0.05, max_failures_alone=1000, max_shared_tokens=shared)), spec, shared
    )
    cluster.add_worker()
    cluster.add_worker()
    play(cluster, random_events(ROUGH, seed, length))
    for worker_id in list(cluster.devices):  # those that are draining would leave requests waiting
        cluster.remove_worker(worker_id)
    cluster.finish_all()
    assert all(stream.ended in ("STOP", "LENGTH", "ERROR", "cancelled", "refused") for stream in cluster.done)


@fast
@given(worker_specs(), seeds)
def test_deadlines_hold_while_waiting_and_running(spec: WorkerSpec, seed: int) -> None:
    """A request ends by its deadline at the latest, and exactly once."""
    random = Random(seed)
    cluster = Cluster(Scheduler(), spec)
    cluster.add_worker()
    for _ in range(30):
        cluster.submit(**random_submission(random), deadline=cluster.now + random.randint(0, 9))
        for _ in range(random.randint(0, 6)):
            cluster.plan(1)
            if cluster.devices[1].inbox and random.random() < 0.7:
                cluster.deliver(1)
        cluster.advance(1.0)
        for stream in cluster.streams.values():
            assert stream.request.deadline is not None
            assert stream.request.deadline > cluster.now
    cluster.finish_all()
    assert all(stream.ended in ("STOP", "LENGTH", Reason.DEADLINE) for stream in cluster.done)


def most_important_wait(cluster: Cluster) -> list[Request]:
    """Those of the highest priority that waits."""
    waiting = [s.request for s in cluster.streams.values() if s.request.state is RequestState.WAITING]
    return [r for r in waiting if r.priority == max(other.priority for other in waiting)]


@fast
@given(worker_specs(), seeds, st.sampled_from((0.0, 0.05)))
def test_nobody_waits_for_those_that_are_less_important(spec: WorkerSpec, seed: int, watermark: float) -> None:
    """After each plan of one worker: who waits at the head would not have room even if all of lower priority were gone."""
    random = Random(seed)
    spec = replace(spec, max_num_batched_tokens=1000, window=None)  # the budget is not what they wait for
    cluster = Cluster(Scheduler(Settings(watermark=watermark, prefix_caching=False, max_preempting=100)), spec)
    cluster.add_worker()
    for _ in range(150):
        if random.random() < 0.4:
            cluster.submit(**random_submission(random) | {"priority": random.randint(0, 3)})
        counters = cluster.scheduler.counters
        for_blocks = counters.preemptions - counters.priority_preemptions
        if cluster.plan(1) and counters.preemptions - counters.priority_preemptions == for_blocks:
            (worker,) = cluster.scheduler.snapshot().workers
            waiting = most_important_wait(cluster)
            stays = worker.priority >= waiting[0].priority if waiting else worker.priority >= 0
            if waiting and not stays.all():
                rows_left = spec.max_rows - int(stays.sum())
                reserve = int(watermark * spec.num_blocks) if stays.any() else 0
                free = spec.num_blocks - int(worker.num_blocks[stays].sum()) - reserve
                fit = [r for r in waiting if rows_left and spec.num_blocks_for(r.num_known_tokens) <= free]
                assert len(fit) < len(waiting), "the head of the queue waits for those that are less important"
        if cluster.devices[1].inbox and random.random() < 0.6:
            cluster.deliver(1)
    cluster.finish_all()
    assert all(stream.ended in ("STOP", "LENGTH") for stream in cluster.done)


def test_the_events_above_do_preempt() -> None:
    """Many times and on both grounds, or the properties say nothing of it."""
    spec = WorkerSpec("m", b"d" * 32, 4, 16, MAX_MODEL_LEN, 4, 20)
    total = by_priority = 0
    for seed in range(20):
        cluster = Cluster(Scheduler(Settings(watermark=0.05, max_failures_alone=1000)), spec)
        cluster.add_worker()
        play(cluster, random_events(ROUGH, seed, MAX_EVENTS))
        total += cluster.scheduler.counters.preemptions
        by_priority += cluster.scheduler.counters.priority_preemptions
    assert by_priority > 30
    assert total - by_priority > 10


@fast
@given(worker_specs(), st.integers(1, 3), seeds, lengths)
def test_prefix_cache_changes_nothing_but_work(spec: WorkerSpec, num_workers: int, seed: int, length: int) -> None:
    """The same requests with the prefix cache off end with the same tokens (each is compared with its own reference)."""
    cluster = Cluster(Scheduler(Settings(prefix_caching=False)), spec)
    for _ in range(num_workers):
        cluster.add_worker()
    play(cluster, random_events(CALM, seed, length))
    cluster.finish_all()
    counters = cluster.scheduler.counters
    assert counters.prefix_hits == 0
    assert all(worker.cached_blocks == 0 for worker in cluster.scheduler.snapshot().workers)
