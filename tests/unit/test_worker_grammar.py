"""The grammar thread between the engine's two: masks follow tokens, and what is slow or wrong holds up nobody else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from random import Random
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits

from service.grammar import Grammar, GrammarError
from service.guidance import compile_grammar, load_tokenizer
from worker.backend import BackendError
from worker.backends.mock import EOS_TOKEN_ID, MockBackend, MockSettings
from worker.backends.mock_assets import mock_assets
from worker.engine import Engine
from worker.grammar import compiled as compiled_module
from worker.grammar.compiled import PATIENCE, CompiledGrammars, Start, estimate_bytes
from worker.grammar.load import load_runner
from worker.grammar.masks import StepMasks
from worker.grammar.matcher import Ends
from worker.grammar.rows import ConstrainedRow
from worker.grammar.runner import GrammarRunner
from worker.offline import OfflineEngine, OfflineRequest
from worker.step import Int32Array, NewRow, RowStatus, SamplingParams, Step, StepOutput

VOCAB = 700
NONE = np.zeros(0, np.int32)
ABC = Grammar("regex", "abcdefgh")
SLOW, SLOW_TOO = Grammar("regex", "slow"), Grammar("regex", "slower")
BROKEN = Grammar("regex", "broken")
VOWELS = Grammar(
    "json_schema",
    '{"type": "object", "properties": {"p": {"type": "string", "pattern": "[aeiou][a-z]{18}$"}}, "required": ["p"]}',
)


def ids(*values: int) -> Int32Array:
    return np.array(values, np.int32)


def make_step(step_id: int, rows: list[int], **more: Any) -> Step:
    """One decode, or the prompt of a new row, for each of `rows`."""
    new = {row.row: row for row in more.get("new_rows", ())}
    counts = [new[row].token_ids.size - new[row].num_computed if row in new else 1 for row in rows]
    fields: dict[str, Any] = dict.fromkeys(Step.__dataclass_fields__, NONE)
    fields |= {"step_id": step_id, "new_rows": (), "rows": ids(*rows), "num_scheduled": ids(*counts)}
    fields["num_samples"] = np.ones(len(rows), np.int32)
    return Step(**(fields | more))


def new_row(row: int, grammar: Grammar | None, outputs: bytes = b"", **sampling: Any) -> NewRow:
    tokens = ids(300, 301, 302, *outputs)
    params = SamplingParams(temperature=0.0, stop_token_ids=(EOS_TOKEN_ID,), **sampling)
    return NewRow(row, tokens, 3, 0, np.arange(8, dtype=np.int32) + 8 * row, 1, params, grammar)


class Running:
    """An engine on the mock, with grammars; outputs, failures and deaths as they come."""

    def __init__(self) -> None:
        self.heard: queue.Queue[StepOutput | str | BaseException] = queue.Queue()
        backend = MockBackend(MockSettings(vocab_size=VOCAB, block_size=4, num_blocks=64, max_rows=4, max_model_len=64))
        self.engine = Engine(
            backend,
            lambda epoch, output: self.heard.put(output),
            lambda epoch, step_id, text: self.heard.put(text),
            self.heard.put,
        )
        self.engine.start()
        self.engine.load(lambda what, done, total: None).result(10)
        runner = load_runner(mock_assets(VOCAB, 64), VOCAB)
        assert runner is not None
        self.engine.use_grammars(runner)

    def run(self, *steps: Step) -> list[StepOutput]:
        """All at once, as a scheduler that runs ahead sends them."""
        for step in steps:
            self.engine.submit(1, step)
        outputs = [self.heard.get(timeout=20) for _ in steps]
        assert all(isinstance(output, StepOutput) for output in outputs), outputs
        return outputs  # type: ignore[return-value]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr("worker.grammar.compiled.PATIENCE", 20.0)  # the machine may be busy
    running = Running()
    yield running
    assert running.engine.close(20)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """SLOW and SLOW_TOO are compiled once the event is set, BROKEN never."""
    go_on = threading.Event()

    def compiled(grammar: Grammar, tokenizer: Any) -> LLMatcher:
        if grammar == BROKEN:
            raise GrammarError("broken")
        if grammar in (SLOW, SLOW_TOO) and not go_on.wait(20):
            raise GrammarError("nobody let it go on")
        return compile_grammar(grammar, tokenizer)

    monkeypatch.setattr("worker.grammar.compiled.compile_grammar", compiled)
    yield go_on
    go_on.set()


def text_of(outputs: list[StepOutput], place: int = 0) -> str:
    """Of the sampling row at this place, in steps where all rows have a token."""
    return bytes(int(output.token_ids[place]) for output in outputs).decode("latin-1")


def test_masks_follow_the_tokens_of_steps_that_run_ahead(running: Running) -> None:
    first = make_step(1, [0, 1], new_rows=(new_row(0, ABC), new_row(1, None)))
    outputs = running.run(first, *(make_step(n, [0, 1]) for n in range(2, 9)))
    assert text_of(outputs) == "abcdefgh"
    assert running.run(make_step(9, [0]))[0].token_ids.tolist() == [EOS_TOKEN_ID]
    # A scheduler sees the end late: the row goes on meanwhile, and nothing is wrong with it.
    assert running.run(make_step(10, [0]))[0].token_ids.tolist() == [EOS_TOKEN_ID]


def test_rows_without_a_grammar_get_what_they_would_get_alone(running: Running) -> None:
    steps = [make_step(n, [1]) for n in range(2, 6)]
    alone = running.run(make_step(1, [1], new_rows=(new_row(1, None),)), *steps)
    running.run(make_step(6, [], freed_rows=ids(1)))
    both = [make_step(n, [0, 1]) for n in range(8, 12)]
    beside = running.run(make_step(7, [0, 1], new_rows=(new_row(0, ABC), new_row(1, None))), *both)
    assert [int(output.token_ids[1]) for output in beside] == [int(output.token_ids[0]) for output in alone]


def test_outputs_of_an_earlier_life_are_replayed_wherever_they_come_from(running: Running) -> None:
    (output,) = running.run(make_step(1, [2], new_rows=(new_row(2, ABC, b"abcd"),)))
    assert output.token_ids.tolist() == [ord("e")]
    # The last prompt token and the outputs come as a chunk.
    row = NewRow(3, ids(300, 301), 3, 0, np.arange(8, dtype=np.int32), 1, SamplingParams(temperature=0.0), ABC)
    start = make_step(2, [3], new_rows=(row,), num_samples=np.zeros(1, np.int32))
    more = {"chunk_rows": ids(3), "chunk_lens": ids(4), "chunk_token_ids": ids(302, *b"abc"), "num_scheduled": ids(4)}
    outputs = running.run(start, make_step(3, [3], **more), make_step(4, [3]))
    assert text_of(outputs[1:]) == "de"


def test_a_row_that_is_given_to_another_request_forgets_its_grammar(running: Running) -> None:
    running.run(make_step(1, [0], new_rows=(new_row(0, ABC),)), make_step(2, [0]))
    outputs = running.run(
        make_step(3, [0], freed_rows=ids(0), new_rows=(new_row(0, ABC),)),
        make_step(4, [0]),
        make_step(5, [0], freed_rows=ids(0), new_rows=(new_row(0, None),)),
    )
    assert text_of(outputs[:2]) == "ab" and outputs[2].token_ids[0] >= 258


def test_a_grammar_that_takes_long_to_compile_holds_up_nobody(
    running: Running, compiling: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.run(make_step(1, [2], new_rows=(new_row(2, ABC),)), make_step(2, [], freed_rows=ids(2)))
    monkeypatch.setattr("worker.grammar.compiled.PATIENCE", 0.005)
    rows = (new_row(0, SLOW), new_row(1, None), new_row(2, ABC))
    outputs = running.run(make_step(3, [0, 1, 2], new_rows=rows), *(make_step(n, [0, 1, 2]) for n in range(4, 7)))
    late, ok = RowStatus.MASK_LATE, RowStatus.OK
    assert [output.row_status.tolist() for output in outputs] == [[late, ok, ok]] * 4
    assert bytes(int(output.token_ids[1]) for output in outputs) == b"abcd"
    # Even when it is compiled its row stays behind: tokens are missing in it. Started again, it is like any other.
    compiling.set()
    assert running.run(make_step(7, [0]))[0].row_status.tolist() == [late]
    restarted = make_step(8, [0], freed_rows=ids(0), new_rows=(new_row(0, SLOW),))
    while (output := running.run(restarted)[0]).row_status.tolist() == [late]:
        pass
    assert output.token_ids.tolist() == [ord("s")]


class CountedWaits(threading.Condition):
    """Waits with a limit take no time: they are added to `waited`, seconds."""

    def __init__(self, waited: list[float]) -> None:
        super().__init__()
        self._waited = waited

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        if timeout is None:
            return super().wait_for(predicate, 20)
        if not predicate():
            self._waited.append(timeout)
        return predicate()


def test_steps_wait_once_for_a_grammar_however_often_its_row_starts_again(
    compiling: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    class Masks(StepMasks):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.changed = CountedWaits(waited)

    monkeypatch.setattr("worker.grammar.runner.StepMasks", Masks)
    tokenizer = load_tokenizer(mock_assets(VOCAB, 64)["tokenizer.json"], VOCAB, (EOS_TOKEN_ID,))
    runner = GrammarRunner(tokenizer, VOCAB, (EOS_TOKEN_ID,), clock=lambda: sum(waited))
    runner.start(_raise)
    for step_id in range(60):
        plain = () if step_id else (new_row(1, None),)
        step = make_step(step_id, [0, 1], freed_rows=ids(0), new_rows=(new_row(0, SLOW), *plain))
        runner.expect(step)
        begun = runner.begin(step)
        assert begun is not None
        masks, rows = begun
        masks.wait()
        assert masks.late.tolist() == [True]
        runner.sampled(masks, rows)
        output = StepOutput(step_id, ids(0, 1), ids(RowStatus.MASK_EMPTY, 0), ids(7), None, 0, 0)
        runner.advance(masks, rows, output)
    compiling.set()
    runner.close()
    assert len(waited) == 60 and sum(waited) == PATIENCE


def test_what_nobody_waits_for_any_more_is_not_compiled(compiling: threading.Event) -> None:
    now = 0.0
    tokenizer = load_tokenizer(mock_assets(VOCAB, 64)["tokenizer.json"], VOCAB, (EOS_TOKEN_ID,))
    compiled = CompiledGrammars(tokenizer, lambda: now)
    # Both threads are busy.
    busy = [compiled.get(SLOW), compiled.get(SLOW_TOO)]
    left, wanted = (compiled.get(Grammar("regex", text)) for text in ("left", "wanted"))
    now = 9.0
    assert compiled.get(Grammar("regex", "wanted")) is wanted
    now = 11.0
    last = compiled.get(ABC)
    assert left.compiling.cancelled()
    # Whoever wants it nevertheless has it compiled.
    again = compiled.get(Grammar("regex", "left"))
    compiling.set()
    for start in (*busy, wanted, last, again):
        assert not start.compiling.result(20).is_error()
    compiled.close()


def test_what_is_kept_is_bounded_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest that no row uses goes first, and what runs stays."""
    grammars = [Grammar("regex", f"{letter}{{1,9}}") for letter in "abcde"]
    monkeypatch.setattr("worker.grammar.compiled._KEPT_BYTES", 3 * estimate_bytes(grammars[0]))
    tokenizer = load_tokenizer(mock_assets(VOCAB, 64)["tokenizer.json"], VOCAB, (EOS_TOKEN_ID,))
    compiled = CompiledGrammars(tokenizer, lambda: 0.0)

    def compile_one(index: int) -> Start:
        start = compiled.get(grammars[index])
        start.compiling.result(20)
        return start

    first, second, third = (compile_one(index) for index in range(3))
    row = new_constrained_row(grammars[0])
    compiled.take(grammars[0], first, row)
    fourth = compile_one(3)
    assert compile_one(0) is first and compile_one(2) is third and compile_one(3) is fourth
    assert compile_one(1) is not second
    rows = [new_constrained_row(grammar) for grammar in grammars[1:4]]
    for index, other in enumerate(rows, 1):
        compiled.take(grammars[index], compile_one(index), other)
    # All are in use: more than the bound, until rows end.
    used = [compile_one(index) for index in range(4)]
    assert [compile_one(index) for index in range(4)] == used and used[0] is first
    del row, other
    rows.clear()
    assert compile_one(3) is used[3] and compile_one(2) is used[2] and compile_one(1) is used[1]
    assert compile_one(0) is not first
    compiled.close()


def new_constrained_row(grammar: Grammar) -> ConstrainedRow:
    return ConstrainedRow(grammar, Ends.of(SamplingParams(), (EOS_TOKEN_ID,)), 3, 3)


def test_a_row_holds_its_start_as_long_as_it_runs(
    running: Running, compiling: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that waited until it was compiled, too."""
    monkeypatch.setattr("worker.grammar.compiled._KEPT_BYTES", 0)
    compiled: list[Grammar] = []
    inner = compiled_module.compile_grammar
    monkeypatch.setattr(
        "worker.grammar.compiled.compile_grammar",
        lambda grammar, tokenizer: (compiled.append(grammar), inner(grammar, tokenizer))[1],
    )
    add_done_callback = Future.add_done_callback

    def waited_for(future: Future[Any], callback: Callable[[Future[Any]], object]) -> None:
        add_done_callback(future, callback)
        compiling.set()

    monkeypatch.setattr(Future, "add_done_callback", waited_for)
    running.run(make_step(1, [0], new_rows=(new_row(0, SLOW),)))
    running.run(make_step(2, [0, 1], new_rows=(new_row(1, ABC),)))
    running.run(make_step(3, [0, 1, 2], new_rows=(new_row(2, SLOW),)))
    assert compiled == [SLOW, ABC]
    running.run(make_step(4, [1], freed_rows=ids(0, 2)))
    running.run(make_step(5, [1, 3], new_rows=(new_row(3, ABC),)))  # who asks next drops what nobody uses
    running.run(make_step(6, [1, 3, 0], new_rows=(new_row(0, SLOW),)))
    assert compiled == [SLOW, ABC, SLOW]


def test_a_grammar_that_can_not_be_compiled_here_ends_its_row_only(
    running: Running, compiling: threading.Event
) -> None:
    rows = (new_row(0, BROKEN), new_row(1, ABC))
    outputs = running.run(make_step(1, [0, 1], new_rows=rows), make_step(2, [0, 1]))
    assert [output.row_status.tolist() for output in outputs] == [[RowStatus.MASK_EMPTY, RowStatus.OK]] * 2
    assert text_of(outputs) == "ab"


def test_outputs_that_the_grammar_does_not_allow_end_their_row_only(running: Running) -> None:
    rows = (new_row(0, ABC, b"abX"), new_row(1, ABC, b"ab"))
    (output,) = running.run(make_step(1, [0, 1], new_rows=rows))
    assert output.row_status.tolist() == [RowStatus.MASK_EMPTY, RowStatus.OK]
    assert output.token_ids.tolist() == [ord("c")]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 states of a lexer, which two outputs of VOWELS use up: 50,000 are used up by seven where the vocabulary is real."""
    limits = LLParserLimits(step_lexer_fuel=100_000, step_max_items=25_000, max_lexer_states=100)
    monkeypatch.setattr("service.guidance._limits", lambda: limits)


def vowels(seed: int, count: int = 15) -> bytes:
    """The beginning of an output of VOWELS."""
    return b'{"p":"' + bytes(Random(seed).choices(b"abcde", k=count))


def test_rows_whose_lexer_others_have_used_up_start_again_with_another(running: Running, narrow: None) -> None:
    late, ok = [RowStatus.MASK_LATE], [RowStatus.OK]
    (output,) = running.run(make_step(1, [1], new_rows=(new_row(1, VOWELS, vowels(0, 2)),)))
    assert output.row_status.tolist() == ok
    b = [*vowels(0, 2), int(output.token_ids[0])]
    for step_id in range(2, 30, 2):
        output, beside = running.run(
            make_step(step_id, [0], freed_rows=ids(0), new_rows=(new_row(0, VOWELS, vowels(step_id)),)),
            make_step(step_id + 1, [1]),
        )
        if output.row_status.tolist() != ok:
            break
        b.append(int(beside.token_ids[0]))
    # Neither is to blame: each goes on with a lexer that has room, as do others.
    assert [output.row_status.tolist(), beside.row_status.tolist()] == [late, late]
    again = (new_row(0, VOWELS, vowels(step_id)), new_row(1, VOWELS, bytes(b)), new_row(2, VOWELS))
    outputs = running.run(
        make_step(30, [0, 1, 2], freed_rows=ids(0, 1), new_rows=again), *(make_step(n, [0, 1, 2]) for n in (31, 32))
    )
    assert [output.row_status.tolist() for output in outputs] == [ok * 3] * 3


def test_a_row_that_would_use_up_a_lexer_alone_ends(running: Running, narrow: None) -> None:
    """Though it never comes first: fewer and fewer share a lexer with it."""
    wide = new_row(0, VOWELS, vowels(0, 50).replace(b"b", b"u"))
    small = [new_row(row, VOWELS, b'{"p":"') for row in (1, 2, 3)]
    statuses: list[list[int]] = []
    # How fast a lexer is there decides whether it is alone at the second or at the third start: whoever asks before shares it.
    while not statuses or (statuses[-1][3] == RowStatus.MASK_LATE and len(statuses) < 3):
        step = make_step(len(statuses) + 1, [1, 2, 3, 0], freed_rows=ids(0, 1, 2, 3), new_rows=(*small, wide))
        statuses.append(running.run(step)[0].row_status.tolist())
    assert statuses[0][3] == RowStatus.MASK_LATE
    assert statuses[-1] == [RowStatus.OK] * 3 + [RowStatus.MASK_EMPTY]


def test_a_driver_without_a_scheduler_starts_them_again_itself(narrow: None) -> None:
    engine = OfflineEngine(
        MockBackend(MockSettings(vocab_size=VOCAB, block_size=4, num_blocks=96, max_rows=6, max_model_len=64)),
        grammars=lambda info: load_runner(mock_assets(VOCAB, 64), VOCAB) or pytest.fail("no runner"),
    )
    sampling = SamplingParams(temperature=0.0, stop_token_ids=(EOS_TOKEN_ID,), logprobs=0, prompt_logprobs=0)
    prompt = (300, 301, 302)
    requests = [OfflineRequest(prompt, 24, sampling, 1, tuple(vowels(seed)), VOWELS) for seed in range(6)]
    results = engine.generate(requests, chunk_size=7)
    engine.close()
    assert [(result.finish_reason, len(result.token_ids)) for result in results] == [("length", 3)] * 6
    for result in results:
        positions = [described.position for described in result.logprobs]
        assert positions == sorted(set(positions))


def test_a_start_serves_so_many_rows(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its lexer has grown to is given back some time."""
    monkeypatch.setattr("worker.grammar.compiled._ROWS", 2)
    compiled: list[Grammar] = []
    monkeypatch.setattr(
        "worker.grammar.compiled.compile_grammar",
        lambda grammar, tokenizer: (compiled.append(grammar), compile_grammar(grammar, tokenizer))[1],
    )
    for step_id in range(1, 6):
        step = make_step(step_id, [0], freed_rows=ids(0), new_rows=(new_row(0, ABC),))
        assert running.run(step)[0].token_ids.tolist() == [ord("a")]
    assert compiled == [ABC] * 3


@pytest.mark.parametrize("where", ["begin", "forward", "sample", "collect"])
def test_a_failed_step_leaves_nobody_waiting(running: Running, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running.run(make_step(1, [0], new_rows=(new_row(0, ABC),)))

    def fail(*args: Any) -> Any:
        raise BackendError("scripted")

    with monkeypatch.context() as patched:
        patched.setattr(MockBackend, where, fail)
        running.engine.submit(1, make_step(2, [0]))
        running.engine.submit(1, make_step(3, [0]))
        assert "scripted" in str(running.heard.get(timeout=20))
        running.engine.reset().result(20)
    while not running.heard.empty():
        running.heard.get()
    outputs = running.run(make_step(1, [0], new_rows=(new_row(0, ABC),)), make_step(2, [0]))
    assert text_of(outputs) == "ab"


def test_a_dead_grammar_thread_ends_the_process(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.grammar.runner.RowMatcher", _no_matcher())
    running.engine.submit(1, make_step(1, [0], new_rows=(new_row(0, ABC),)))
    assert isinstance(running.heard.get(timeout=20), ZeroDivisionError)
    # The launch thread would wait for ever; in the test it is let go.
    assert running.engine._grammars is not None
    monkeypatch.undo()
    _release(running)


def _no_matcher() -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise ZeroDivisionError

    return fail


def _raise(error: BaseException) -> None:
    raise error


def _release(running: Running) -> None:
    runner = running.engine._grammars
    assert runner is not None
    for row in list(runner._waiting):
        runner._give_up(row, late=False)
