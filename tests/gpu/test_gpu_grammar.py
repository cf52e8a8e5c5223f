"""Rows under grammars on the device: masks against worker/sampling, and all the way from a grammar to tokens, steps in flight."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.gpu_models import write_model
from service.grammar import Grammar
from tests.gpu.gpu_harness import ints
from tests.gpu.sampling_rows import PARAMS, make_rows, new_step
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings
from worker.backends.mock import EOS_TOKEN_ID
from worker.backends.mock_assets import mock_assets
from worker.engine import Engine
from worker.grammar.load import load_runner
from worker.sampling.sampler import RowContext
from worker.sampling.sampler import sample as reference_sample
from worker.step import Int32Array, NewRow, RowStatus, SamplingParams, Step, StepOutput

pytestmark = pytest.mark.gpu

NONE = np.zeros(0, np.int32)
ANY = Grammar("regex", ".*")  # the masks of the first test are made by hand


class _Masks:
    def __init__(self, places: list[int], bits: Int32Array) -> None:
        self.places = np.array(places, np.int32)
        self._bits = bits

    def wait(self) -> Int32Array:
        return self._bits.copy()


@pytest.mark.parametrize("vocab", [1000, 50_257])
def test_masked_sampling_equals_the_reference(vocab: int) -> None:
    names = list(PARAMS)
    _, rows, sampler = make_rows(vocab, len(names) + 2)
    generator = np.random.default_rng(vocab)
    contexts: list[RowContext | None] = []
    new = []
    masked = [row for row in range(len(names)) if row % 3]
    for row, name in enumerate(names):
        known = generator.integers(0, vocab, 60).astype(np.int32)
        known[-3:] = (4, 9, 8)
        grammar = ANY if row in masked else None
        new.append(NewRow(row, known, 40, 60, np.arange(4, dtype=np.int32), row + 1, PARAMS[name], grammar))
        contexts.append(RowContext(new[-1].sampling_after_mask, row + 1, known, 40))
    rows.apply(new_step(new))
    words = -(-vocab // 32)
    for trial in range(6):
        bits = generator.integers(-(2**31), 2**31, (len(masked), words), dtype=np.int64).astype(np.int32)
        if trial == 1:
            bits[:] = 0
        elif trial == 2:  # few are allowed
            bits &= generator.integers(0, 50, bits.shape) == 0
        bits[:, -1] &= (1 << (vocab - 32 * (words - 1))) - 1 if vocab % 32 else -1
        logits = torch.randn((len(names), vocab), generator=torch.Generator().manual_seed(trial)) * 3
        sampler.logits[: len(names), :vocab] = logits.cuda()
        rows.fields[:, 0] = 60
        before = rows.counts.clone()
        rows.set_masks(np.array(masked, np.int32), bits.copy())
        sampler.sample(ints(list(range(len(names)))), len(names), True, True)
        tokens, status = sampler.result[:, : len(names)].cpu().numpy()
        expected, expected_status = reference_sample(logits, contexts, _Masks(masked, bits))
        assert status.tolist() == expected_status.tolist()
        fine = expected_status == RowStatus.OK
        wrong = [names[row] for row in np.flatnonzero(fine & (tokens != expected))]
        assert len(wrong) <= 1, wrong  # a near-tie
        rows.counts.copy_(before)
    assert all(int(rows.flags[row]) & 1 for row in masked)


def make_step(step_id: int, rows: list[int], **more: Any) -> Step:
    new = {row.row: row for row in more.get("new_rows", ())}
    counts = [new[row].token_ids.size if row in new else 1 for row in rows]
    fields: dict[str, Any] = dict.fromkeys(Step.__dataclass_fields__, NONE)
    fields |= {"step_id": step_id, "new_rows": (), "rows": np.array(rows, np.int32)}
    fields |= {"num_scheduled": np.array(counts, np.int32), "num_samples": np.ones(len(rows), np.int32)}
    return Step(**(fields | more))


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_in_flight_follow_their_grammars(tmp_path: Path, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two constrained rows beside two others; every step is submitted at once, so the device is always ahead."""
    monkeypatch.setattr("worker.grammar.compiled.PATIENCE", 20.0)
    settings = CudaSettings(max_rows=8, max_num_batched_tokens=256, max_model_len=256, num_blocks=200, graphs=graphs)
    heard: queue.Queue[StepOutput | str | BaseException] = queue.Queue()
    engine = Engine(
        CudaBackend(write_model(tmp_path, "tiny-llama", scale=0.08), settings),
        lambda epoch, output: heard.put(output),
        lambda epoch, step_id, text: heard.put(text),
        heard.put,
    )
    engine.start()
    info = engine.load(lambda what, done, total: None).result(300)
    runner = load_runner(mock_assets(info.vocab_size, info.max_model_len), info.vocab_size)
    assert runner is not None
    engine.use_grammars(runner)

    def new_row(row: int, grammar: Grammar | None, **more: Any) -> NewRow:
        params = SamplingParams(**{"temperature": 1.0, "stop_token_ids": (EOS_TOKEN_ID,), **more})
        tokens, blocks = np.arange(5, 25, dtype=np.int32), np.arange(8, dtype=np.int32) + 8 * row
        return NewRow(row, tokens, 20, 0, blocks, 7 + row, params, grammar)

    def run(grammars: dict[int, Grammar | None]) -> dict[int, list[int]]:
        order = list(grammars)
        new = tuple(new_row(row, grammar) for row, grammar in grammars.items())
        for n in range(1, 26):
            engine.submit(1, make_step(n, order, **({"new_rows": new} if n == 1 else {})))
        outputs = [heard.get(timeout=60) for _ in range(25)]
        assert all(isinstance(output, StepOutput) for output in outputs), outputs
        engine.reset().result(60)
        return {row: [int(output.token_ids[i]) for output in outputs] for i, row in enumerate(order)}  # type: ignore[union-attr]

    plain = run({1: None, 3: None})
    mixed = run({0: Grammar("regex", "[abc]{20}"), 1: None, 2: Grammar("choice", '["yes", "no"]'), 3: None})
    assert {row: mixed[row] for row in plain} == plain
    assert set(mixed[0][:20]) <= set(b"abc") and set(mixed[0][20:]) == {EOS_TOKEN_ID}
    text = bytes(token for token in mixed[2] if token != EOS_TOKEN_ID)
    assert text in (b"yes", b"no") and mixed[2][len(text)] == EOS_TOKEN_ID
    assert engine.close(60)
