"""A cluster in miniature around the scheduler core: mock devices that really keep a KV cache, and routers that keep score.

The mock model's value at a position is a hash of its token, the position and the values of all positions that it attends to, read back
through the block table of its row. A wrong block table, a block that two requests own, a bad prefix hit or a block that is freed too
early therefore changes the tokens, and `reference` says what they should have been.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from scheduler.core import (
    FinishReason,
    Request,
    RequestKey,
    RequestState,
    RowStatus,
    SamplingParams,
    Scheduler,
    SchedulerError,
    StepPlan,
    StepResult,
    WorkerSpec,
)
from scheduler.core.state import MASK_DELAY

VOCABULARY = 40
MODULUS = (1 << 61) - 1
GARBAGE = 987_654_321


def value_of(token: int, position: int, attended: int) -> int:
    """What the mock model keeps in the KV cache for one position."""
    return (token * 1_000_003 + position * 7_919 + attended * 31 + 17) * 6_364_136_223_846_793_005 % MODULUS


def token_of(value: int) -> int:
    """Greedy sampling of the mock model."""
    return (value >> 20) % VOCABULARY


def reference(request: Request, window: int | None, max_model_len: int) -> tuple[list[int], FinishReason]:
    """Output tokens and finish reason of the undisturbed sequential run of a request without outputs."""
    params, tokens, values = request.sampling, request.prompt_token_ids.tolist(), []
    num_prompt = len(tokens)
    while True:
        while len(values) < len(tokens):
            position = len(values)
            start = 0 if window is None else max(0, position - window + 1)
            values.append(value_of(tokens[position], position, sum(values[start:])))
        tokens.append(token_of(values[-1]))
        num_outputs = len(tokens) - num_prompt
        if tokens[-1] in params.stop_token_ids and num_outputs >= params.min_tokens:
            return tokens[num_prompt:], FinishReason.STOP
        if num_outputs >= params.max_tokens or len(tokens) >= max_model_len:
            return tokens[num_prompt:], FinishReason.LENGTH


@dataclass
class DeviceRow:
    """What a worker keeps of a row."""

    key: RequestKey
    tokens: list[int]
    blocks: list[int]
    computed: int


@dataclass
class Device:
    """A worker: applies plans in order. Step results wait in the inbox until the test asks for them."""

    spec: WorkerSpec
    rows: dict[int, DeviceRow] = field(default_factory=dict)
    inbox: deque[tuple[StepPlan, set[RequestKey]]] = field(default_factory=deque)
    owner: dict[int, RequestKey] = field(default_factory=dict)  # rows once all plans in the inbox are done

    def __post_init__(self) -> None:
        self.cache = [GARBAGE] * (self.spec.num_blocks * self.spec.block_size)
        self.forgot = False

    def send(self, plan: StepPlan) -> set[RequestKey]:
        """Takes a plan from the scheduler; returns the requests that it names."""
        for row in plan.freed_rows.tolist():
            self.owner.pop(row, None)
        for new in plan.new_rows:
            assert new.row not in self.owner
            self.owner[new.row] = new.request.key
        named = {self.owner[row] for row in plan.rows.tolist()}
        self.inbox.append((plan, named))
        return named

    def forget(self) -> None:
        """A step failed: every row and block is gone."""
        self.rows.clear()
        self.cache = [GARBAGE] * len(self.cache)

    def run(self, *, fail: bool, bad_entry: int | None, status: RowStatus) -> StepResult:
        """Runs the oldest plan. A plan that names rows which a failed step forgot fails too."""
        plan, _ = self.inbox.popleft()
        none = np.empty(0, np.int32)
        new = {entry.row for entry in plan.new_rows}
        if fail or any(row not in self.rows and row not in new for row in plan.rows.tolist()):
            self.forget()
            return StepResult(plan.step_id, none, none, ok=False)
        self.update_rows(plan)
        sampled = self.forward(plan)
        row_status = np.zeros(len(sampled), np.uint8)
        if sampled and bad_entry is not None:
            row_status[bad_entry % len(sampled)] = status
        good = row_status == 0
        token_ids = np.array(sampled, np.int32)[good]
        return StepResult(plan.step_id, good.astype(np.uint8), token_ids, row_status if row_status.any() else None)

    def update_rows(self, plan: StepPlan) -> None:
        """Frees, new rows, block appends, chunk tokens: in this order."""
        for row in plan.freed_rows.tolist():
            self.rows.pop(row, None)
        for new in plan.new_rows:
            tokens, blocks = new.token_ids.tolist(), new.block_ids.tolist()
            assert 0 <= new.num_computed < len(tokens)
            self.rows[new.row] = DeviceRow(new.request.key, tokens, blocks, new.num_computed)
        for row, block in zip(plan.append_rows.tolist(), plan.append_block_ids.tolist(), strict=True):
            self.rows[row].blocks.append(block)
        ids = plan.chunk_token_ids.tolist()
        for row, length in zip(plan.chunk_rows.tolist(), plan.chunk_lens.tolist(), strict=True):
            self.rows[row].tokens += ids[:length]
            del ids[:length]
        assert not ids

    def forward(self, plan: StepPlan) -> list[int]:
        """Computes and samples. Rows see what other rows wrote in earlier steps, not in this one: on a GPU they run together."""
        writes: dict[int, int] = {}
        sampled = []
        for row_id, count, samples in zip(
            plan.rows.tolist(), plan.num_scheduled.tolist(), plan.num_samples.tolist(), strict=True
        ):
            row = self.rows[row_id]
            own: dict[int, int] = {}
            value = GARBAGE
            for position in range(row.computed, row.computed + count):
                start = 0 if self.spec.window is None else max(0, position - self.spec.window + 1)
                slots = [self.slot(row, p) for p in range(start, position)]
                attended = sum(own.get(slot, self.cache[slot]) for slot in slots)
                value = value_of(row.tokens[position], position, attended)
                own[self.slot(row, position)] = value
            row.computed += count
            assert not writes.keys() & own.keys(), "two rows write one slot in one step"
            writes.update(own)
            if samples:
                assert row.computed == len(row.tokens), "a row that samples has computed all its tokens"
                row.tokens.append(token_of(value))
                sampled.append(row.tokens[-1])
        for slot, value in writes.items():
            self.cache[slot] = value
        return sampled

    def slot(self, row: DeviceRow, position: int) -> int:
        """Where the KV cache keeps a position."""
        return row.blocks[position // self.spec.block_size] * self.spec.block_size + position % self.spec.block_size


@dataclass
class Stream:
    """What a router knows of one request."""

    request: Request
    expected: list[int]
    expected_finish: FinishReason
    tokens: list[int] = field(default_factory=list)
    ended: str = ""


class Cluster:
    """Scheduler, devices and routers, driven call by call. Everything is checked after each call."""

    def __init__(self, scheduler: Scheduler, spec: WorkerSpec, max_shared_tokens: int = 2_048) -> None:
        """`max_shared_tokens` is the scheduler's setting."""
        self.scheduler, self.spec, self.max_shared_tokens = scheduler, spec, max_shared_tokens
        self.devices: dict[int, Device] = {}
        self.streams: dict[RequestKey, Stream] = {}
        self.done: list[Stream] = []
        self.now = 0.0
        self._last_worker = self._last_handle = 0

    # What the test does -------------------------------------------------------------------------------------------------

    def add_worker(self, spec: WorkerSpec | None = None) -> int:
        self._last_worker += 1
        self.devices[self._last_worker] = Device(spec or self.spec)
        self.scheduler.add_worker(self._last_worker, spec or self.spec)
        return self._last_worker

    def remove_worker(self, worker_id: int) -> None:
        del self.devices[worker_id]
        self.scheduler.remove_worker(worker_id, self.now)
        self.collect()

    def submit(self, router_id: int, prompt: list[int], sampling: SamplingParams, **options: object) -> bool:
        """False if the scheduler refuses it."""
        self._last_handle += 1
        request = Request(
            router_id, self._last_handle, "m", np.array(prompt, np.int32), sampling, arrival=self.now, **options
        )
        expected, finish = reference(request, self.spec.window, self.spec.max_model_len)
        try:
            self.scheduler.submit(request, self.now)
        except SchedulerError:
            return False
        self.streams[request.key] = Stream(request, expected, finish)
        self.collect()
        return True

    def cancel(self, key: RequestKey) -> None:
        assert self.scheduler.cancel(key, self.now)
        assert not self.scheduler.cancel(key, self.now)
        self.end(key, "cancelled")
        self.collect()

    def resubmit(self, key: RequestKey) -> None:
        """What a router does on a gap: cancel, and submit again with the tokens so far, under the same handle."""
        old = self.streams[key]
        assert self.scheduler.cancel(key, self.now)
        outputs = np.array(old.tokens, np.int32)
        again = Request(
            *key,
            "m",
            old.request.prompt_token_ids,
            old.request.sampling,
            outputs,
            cache_salt=old.request.cache_salt,
            tenant=old.request.tenant,
            priority=old.request.priority,
            arrival=old.request.arrival,
        )
        try:
            self.scheduler.submit(again, self.now)
        except SchedulerError:
            self.end(key, "refused")
        else:
            old.request = again
        self.collect()

    def plan(self, worker_id: int) -> bool:
        """One step planned and sent; False if there was nothing to do."""
        running = [s.request for s in self.streams.values() if s.request.state is RequestState.RUNNING]
        before = self.scheduler.counters.priority_preemptions
        plan = self.scheduler.plan(worker_id, self.now)
        if plan is not None:
            self.check_plan(worker_id, plan)
            lost = [request for request in running if request.state is not RequestState.RUNNING]
            self.check_preemptions(plan, lost, self.scheduler.counters.priority_preemptions - before)
        self.collect()
        return plan is not None

    def deliver(
        self, worker_id: int, *, fail: bool = False, bad_entry: int | None = None, status: RowStatus = RowStatus.NAN
    ) -> None:
        """The oldest plan runs and its result comes back."""
        device = self.devices[worker_id]
        result = device.run(fail=fail, bad_entry=bad_entry, status=status)
        for columns in self.scheduler.apply(worker_id, result, self.now):
            tokens = columns.token_ids.tolist()
            for handle, first, count, finish in zip(
                columns.handles.tolist(),
                columns.first_output_index.tolist(),
                columns.num_tokens.tolist(),
                columns.finish_reason.tolist(),
                strict=True,
            ):
                key = (columns.router_id, handle)
                stream = self.streams[key]
                if count or finish:
                    assert first == len(stream.tokens), "first_output_index has a gap"
                stream.tokens += tokens[:count]
                del tokens[:count]
                if finish:
                    self.end(key, FinishReason(finish).name)
            assert not tokens
        self.collect()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.expire(self.now)
        deadline = self.scheduler.next_deadline()
        assert deadline is None or deadline > self.now
        self.collect()

    def finish_all(self, max_rounds: int = 3000) -> None:
        """Lets everything run to its end."""
        if not self.devices:
            self.add_worker()
        for _ in range(max_rounds):
            for worker_id in self.scheduler.workers_to_plan():
                self.plan(worker_id)
            busy = [worker_id for worker_id, device in self.devices.items() if device.inbox]
            for worker_id in busy:
                self.deliver(worker_id)
            if not busy and not self.scheduler.snapshot().num_parked:
                break
            self.advance(MASK_DELAY)
        assert not self.streams, f"{len(self.streams)} requests never end"
        for worker in self.scheduler.snapshot().workers:
            assert worker.used_blocks == 0
            assert worker.rows.size == 0
        load = self.scheduler.load()
        assert (load.waiting, load.running) == (0, 0)

    # What must hold -----------------------------------------------------------------------------------------------------

    def check_plan(self, worker_id: int, plan: StepPlan) -> None:
        device = self.devices[worker_id]
        assert int(plan.num_scheduled.sum()) <= device.spec.max_num_batched_tokens, "over the token budget"
        if plan.rows.size > 1:
            shared = max(self.max_shared_tokens, 2 * device.spec.max_rows)
            assert int(plan.num_scheduled.sum()) <= shared, "a step that several share is too long"
        assert np.unique(plan.rows).size == plan.rows.size
        assert (plan.num_scheduled >= 1).all()
        in_flight = {key for d in self.devices.values() for _, named in d.inbox for key in named}
        for new in plan.new_rows:
            assert new.request.key not in in_flight, "planned again while a plan in flight names it"
            if not new.request.reads_prefix_cache:
                assert new.num_computed == 0, "prompt log-probabilities need every token computed"
        device.send(plan)
        assert len(device.inbox) <= device.spec.run_ahead

    def check_preemptions(self, plan: StepPlan, lost: list[Request], count: int) -> None:
        """`lost` are the requests that the plan took from their rows, `count` of them for the sake of a higher priority."""
        assert count <= len(lost)
        gained = [new.request.priority for new in plan.new_rows]
        if count:
            assert gained, "preempted in vain"
            outranked = [request for request in lost if request.priority < max(gained)]
            assert len(outranked) >= count, "preempted by an equal"
        if count == len(lost):
            for request in lost:  # for each there was someone more important, and nobody as unimportant was left alone
                assert all(request.priority < priority for priority in gained), (
                    "who lost its place was overtaken by an equal"
                )

    def collect(self) -> None:
        self.scheduler.check_integrity()
        self.scheduler.take_admitted()
        for failed in self.scheduler.take_failed():
            self.end((failed.router_id, failed.handle), failed.reason)

    def end(self, key: RequestKey, how: str) -> None:
        """Each request ends exactly once, with the tokens of the undisturbed run as far as they go."""
        stream = self.streams.pop(key)
        stream.ended = how
        self.done.append(stream)
        assert stream.tokens == stream.expected[: len(stream.tokens)], "the schedule changed the tokens"
        if how in ("STOP", "LENGTH"):
            assert how == stream.expected_finish.name
            assert len(stream.tokens) == len(stream.expected)
        else:
            assert len(stream.tokens) < len(stream.expected)
