"""The engine's two threads over the mock backend, and the mock's honesty about its paged cache."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from worker.backend import BackendError, BackendInfo, FatalBackendError, Progress
from worker.backends.mock import EOS_TOKEN_ID, MockBackend, MockSettings
from worker.backends.mock_assets import mock_assets
from worker.engine import Engine
from worker.hang import HangWatch
from worker.step import Int32Array, NewRow, SamplingParams, Step, StepOutput

NONE = np.zeros(0, np.int32)
GREEDY = SamplingParams(temperature=0.0)


def ids(*values: int) -> Int32Array:
    return np.array(values, np.int32)


def step(step_id: int, rows: Int32Array, counts: Int32Array, samples: Int32Array, **more: Any) -> Step:
    fields: dict[str, Any] = {
        "freed_rows": NONE,
        "new_rows": (),
        "append_rows": NONE,
        "append_block_ids": NONE,
        "chunk_rows": NONE,
        "chunk_lens": NONE,
        "chunk_token_ids": NONE,
    }
    return Step(step_id=step_id, rows=rows, num_scheduled=counts, num_samples=samples, **(fields | more))


def new_row(row: int, tokens: Int32Array, blocks: Int32Array, prompt: int, computed: int = 0, **more: Any) -> NewRow:
    return NewRow(row, tokens, prompt, computed, blocks, more.pop("seed", 1), more.pop("sampling", GREEDY))


def run(backend: MockBackend, work: Step) -> StepOutput:
    backend.begin(work)
    backend.forward(work)
    backend.sample(work)
    return backend.collect()


@pytest.fixture
def backend() -> MockBackend:
    backend = MockBackend(MockSettings(block_size=4, num_blocks=32, max_rows=4, max_model_len=64))
    backend.load(lambda what, done, total: None)
    return backend


def generate(backend: MockBackend, prompt: Int32Array, count: int, row: int = 0, first_block: int = 0) -> list[int]:
    """The tokens of one request alone, prompt in one chunk, blocks in order."""
    blocks = np.arange(first_block, first_block + 8, dtype=np.int32)
    work = step(1, ids(row), ids(prompt.size), ids(1), new_rows=(new_row(row, prompt, blocks, prompt.size),))
    tokens = run(backend, work).token_ids.tolist()
    while len(tokens) < count:
        tokens += run(backend, step(1, ids(row), ids(1), ids(1))).token_ids.tolist()
    run(backend, step(1, NONE, NONE, NONE, freed_rows=ids(row)))
    return tokens


def test_tokens_do_not_depend_on_chunks_rows_or_blocks(backend: MockBackend) -> None:
    prompt = ids(5, 6, 7, 8, 9, 10, 11)
    alone = generate(backend, prompt, 6)
    assert generate(backend, prompt, 6, row=3, first_block=20) == alone
    chunked = step(1, ids(1), ids(3), ids(0), new_rows=(new_row(1, prompt[:3], ids(9), prompt.size),))
    assert run(backend, chunked).token_ids.size == 0
    rest = step(
        2,
        ids(1),
        ids(4),
        ids(1),
        append_rows=ids(1),
        append_block_ids=ids(2),
        chunk_rows=ids(1),
        chunk_lens=ids(4),
        chunk_token_ids=prompt[3:],
    )
    assert run(backend, rest).token_ids.tolist() == alone[:1]
    assert generate(backend, ids(5, 6, 7, 8, 9, 11, 10), 6) != alone


def test_a_prefix_hit_gives_the_same_tokens_and_a_false_one_is_found(backend: MockBackend) -> None:
    prompt = ids(5, 6, 7, 8, 9)
    alone = generate(backend, prompt, 1)  # its first block is block 0
    hit = step(1, ids(2), ids(1), ids(1), new_rows=(new_row(2, prompt, ids(0, 30), 5, computed=4),))
    assert run(backend, hit).token_ids.tolist() == alone
    false = step(1, ids(3), ids(1), ids(1), new_rows=(new_row(3, prompt, ids(25, 30), 5, computed=4),))
    backend.begin(false)
    with pytest.raises(BackendError, match="block table of row 3"):
        backend.forward(false)


def test_seeds_matter_only_when_sampling(backend: MockBackend) -> None:
    def first(seed: int, temperature: float) -> int:
        row = new_row(0, ids(1, 2), ids(0), 2, seed=seed, sampling=SamplingParams(temperature=temperature))
        result = run(backend, step(1, ids(0), ids(2), ids(1), new_rows=(row,)))
        run(backend, step(2, NONE, NONE, NONE, freed_rows=ids(0)))
        return int(result.token_ids[0])

    assert first(1, 0.0) == first(2, 0.0)
    assert first(1, 1.0) != first(2, 1.0)


def test_eos_comes_as_scripted_and_not_before_min_tokens() -> None:
    backend = MockBackend(MockSettings(block_size=4, num_blocks=32, max_rows=4, max_model_len=64, eos_every=1))
    sampling = SamplingParams(temperature=0.0, min_tokens=2)
    row = new_row(0, ids(1), ids(0, 1), 1, sampling=sampling)
    tokens = run(backend, step(1, ids(0), ids(1), ids(1), new_rows=(row,))).token_ids.tolist()
    for step_id in (2, 3):
        tokens += run(backend, step(step_id, ids(0), ids(1), ids(1))).token_ids.tolist()
    assert [token == EOS_TOKEN_ID for token in tokens] == [False, False, True]


def test_logprobs_describe_prompt_and_outputs(backend: MockBackend) -> None:
    sampling = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=0)
    row = new_row(0, ids(1, 2, 3), ids(0, 1), 3, sampling=sampling)
    result = run(backend, step(1, ids(0), ids(3), ids(1), new_rows=(row,)))
    assert result.logprobs is not None
    assert result.logprobs.position.tolist() == [1, 2, 3]
    assert result.logprobs.num_entries.tolist() == [1, 1, 3]
    assert result.logprobs.token_ids.tolist()[:3] == [2, 3, int(result.token_ids[0])]


def test_prompt_logprobs_of_a_chunk_describe_its_own_tokens(backend: MockBackend) -> None:
    """The token after a chunk is not known yet: what lies in its place is nothing to report."""
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=0)
    row = NewRow(0, ids(11, 12), 4, 0, ids(0, 1), 1, sampling)
    first = run(backend, step(1, ids(0), ids(2), ids(0), new_rows=(row,)))
    chunk = {"chunk_rows": ids(0), "chunk_lens": ids(2), "chunk_token_ids": ids(13, 14)}
    second = run(backend, step(2, ids(0), ids(2), ids(1), **chunk))
    assert first.logprobs is not None and second.logprobs is not None
    assert (first.logprobs.position.tolist(), first.logprobs.token_ids.tolist()) == ([1], [12])
    assert (second.logprobs.position.tolist(), second.logprobs.token_ids.tolist()) == ([2, 3], [13, 14])


def test_every_mock_token_has_a_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(mock_assets(400, 64)["tokenizer.json"].decode())
    assert tokenizer.decode(tokenizer.encode("héllo, wörld 漢字").ids) == "héllo, wörld 漢字"
    assert tokenizer.decode([258, 399]) == " w258 w399"
    assert tokenizer.get_vocab_size() == 400


class Harness:
    """An engine whose callbacks land in queues."""

    def __init__(self, backend: MockBackend) -> None:
        self.outputs: queue.Queue[tuple[int, StepOutput]] = queue.Queue()
        self.failures: queue.Queue[tuple[int, int, str]] = queue.Queue()
        self.fatal: queue.Queue[BaseException] = queue.Queue()
        self.engine = Engine(
            backend,
            lambda epoch, output: self.outputs.put((epoch, output)),
            lambda epoch, step_id, text: self.failures.put((epoch, step_id, text)),
            self.fatal.put,
        )
        self.engine.start()


@pytest.fixture
def harness(backend: MockBackend) -> Iterator[Harness]:
    harness = Harness(backend)
    yield harness
    harness.engine.close()


def prefill(step_id: int, row: int = 0) -> Step:
    return step(step_id, ids(row), ids(2), ids(1), new_rows=(new_row(row, ids(1, 2), ids(row), 2),))


def test_outputs_come_in_order_with_their_epoch(harness: Harness) -> None:
    for step_id in (1, 2, 3):
        harness.engine.submit(4, prefill(step_id, row=step_id))
    got = [harness.outputs.get(timeout=10) for _ in range(3)]
    assert [(epoch, output.step_id) for epoch, output in got] == [(4, 1), (4, 2), (4, 3)]


def test_a_failed_step_voids_those_after_it_until_a_reset(harness: Harness) -> None:
    false = step(1, ids(3), ids(1), ids(1), new_rows=(new_row(3, ids(1, 2), ids(25), 2, computed=1),))
    harness.engine.submit(4, false)
    harness.engine.submit(4, prefill(2))
    epoch, step_id, text = harness.failures.get(timeout=10)
    assert (epoch, step_id) == (4, 1)
    assert "block table" in text
    harness.engine.reset()
    harness.engine.submit(5, prefill(1))
    epoch, result = harness.outputs.get(timeout=10)
    assert (epoch, result.step_id) == (5, 1)
    assert harness.outputs.empty()


def test_close_lets_submitted_steps_end_and_may_be_called_twice(backend: MockBackend) -> None:
    harness = Harness(backend)
    harness.engine.submit(4, prefill(1))
    harness.engine.close()
    harness.engine.close()
    assert harness.outputs.qsize() == 1
    assert not [t for t in threading.enumerate() if t.name in ("launch", "collect")]


def test_the_model_is_loaded_by_the_thread_that_runs_it() -> None:
    """One thread, one OpenMP pool: a second pool makes the first one sleep between the products of a step."""
    threads: list[str] = []

    class Watched(MockBackend):
        def load(self, progress: Progress) -> BackendInfo:
            threads.append(threading.current_thread().name)
            return super().load(progress)

        def forward(self, step: Step) -> None:
            threads.append(threading.current_thread().name)
            super().forward(step)

        def close(self) -> None:
            threads.append("closed")
            super().close()

    harness = Harness(Watched(MockSettings(block_size=4, num_blocks=8, max_rows=2, max_model_len=16)))
    assert harness.engine.load(lambda *_: None).result(timeout=10).name == "mock"
    harness.engine.submit(1, prefill(1))
    harness.engine.close()
    assert threads == ["launch", "launch", "closed"]


def test_a_model_that_can_not_be_loaded_leaves_nothing_to_close() -> None:
    class Missing(MockBackend):
        def load(self, progress: Progress) -> BackendInfo:
            raise BackendError("no such file")

        def close(self) -> None:
            raise AssertionError

    harness = Harness(Missing(MockSettings()))
    with pytest.raises(BackendError, match="no such file"):
        harness.engine.load(lambda *_: None).result(timeout=10)
    harness.engine.close()
    assert harness.fatal.empty()


def test_a_fatal_error_reaches_the_process() -> None:
    class Broken(MockBackend):
        def forward(self, step: Step) -> None:
            raise FatalBackendError("the device fell off the bus")

    harness = Harness(Broken(MockSettings(block_size=4, num_blocks=8, max_rows=2, max_model_len=16)))
    harness.engine.submit(1, prefill(1))
    assert isinstance(harness.fatal.get(timeout=10), FatalBackendError)


class Held(MockBackend):
    """A device that ends its steps when it is told to."""

    def __init__(self) -> None:
        super().__init__(MockSettings(block_size=4, num_blocks=8, max_rows=4, max_model_len=16))
        self.begun = threading.Semaphore(0)
        self.release = threading.Semaphore(0)

    def collect(self) -> StepOutput:
        self.begun.release()
        assert self.release.acquire(timeout=30)
        return super().collect()


def test_progress_shows_what_the_device_does_and_a_reset_waits_for_it() -> None:
    backend = Held()
    harness = Harness(backend)
    assert harness.engine.progress() is None
    harness.engine.submit(1, prefill(1, row=0))
    harness.engine.submit(1, prefill(2, row=1))
    assert backend.begun.acquire(timeout=10)
    reset = harness.engine.reset()
    assert not harness.engine.close(timeout=0.01)
    seen = {harness.engine.progress()}
    backend.release.release()
    assert backend.begun.acquire(timeout=10)  # the first has ended, the second is there
    seen.add(harness.engine.progress())
    assert None not in seen
    assert len(seen) == 2
    assert not reset.done()
    backend.release.release()
    reset.result(timeout=10)
    assert harness.outputs.qsize() == 2  # their callbacks had run before it was done
    assert harness.engine.close(timeout=10)
    assert harness.engine.progress() is None


def test_a_scripted_hang_hangs() -> None:
    backend = MockBackend(MockSettings(block_size=4, num_blocks=8, max_rows=2, max_model_len=16, hang_at_step=1))
    harness = Harness(backend)
    harness.engine.submit(1, prefill(1))
    with pytest.raises(queue.Empty):
        harness.failures.get(timeout=0.2)
    assert harness.outputs.empty()
    assert harness.engine.progress() is not None


def test_a_hang_is_told_once_and_ends_the_process_and_progress_forgives() -> None:
    backend = Held()
    harness = Harness(backend)
    told: list[str] = []
    left: list[str] = []
    watch = HangWatch(harness.engine, 10.0, 5.0, told.append, left.append)
    watch.look(0.0)
    harness.engine.submit(1, prefill(1, row=0))
    harness.engine.submit(1, prefill(2, row=1))
    assert backend.begun.acquire(timeout=10)
    for look in range(41):
        watch.look(0.25 * look)
        assert watch.hung == (look == 40)
    watch.look(1e6)  # stopped and continued: counts as half a second at most
    assert told == ["the device has not ended a step for 10.0 s"]
    assert left == []
    backend.release.release()
    assert backend.begun.acquire(timeout=10)
    watch.look(1e6 + 0.25)
    assert not watch.hung
    for look in range(1, 62):
        watch.look(1e6 + 0.25 * (look + 1))
    assert left[0].startswith("the device has hung for 15")
    assert watch.hangs == len(told) == 2
    backend.release.release()
    assert harness.engine.close(timeout=10)
