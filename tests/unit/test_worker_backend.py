"""The torch backend: row state, attention's invariance, poison, windows, preemption, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from worker.backend import BackendError
from worker.backends.torch_backend import TorchBackend, TorchSettings
from worker.backends.torch_rows import RowState
from worker.backends.torch_threads import quiet_threads
from worker.checkpoint.config import parse_config
from worker.checkpoint.weights import expected_tensors
from worker.cpu.attention import SPLIT
from worker.model.attention import AttentionPlan, RowSpan
from worker.model.kv_cache import PagedKVCache
from worker.model.layer_kernels import LayerKernels
from worker.offline import OfflineEngine, OfflineRequest
from worker.step import NewRow, RowStatus, SamplingParams, Step

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
NONE = np.zeros(0, np.int32)
BLOCK = 16
KV_HEADS, HEAD_DIM = 2, 16


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path, CONFIG)


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    generator = torch.Generator().manual_seed(5)
    shapes = expected_tensors(parse_config(Path("config.json"), config))
    tensors = {name: (torch.randn(shape, generator=generator) * 0.3).bfloat16() for name, shape in shapes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_engine(model_dir: Path, **settings: Any) -> OfflineEngine:
    return OfflineEngine(TorchBackend(model_dir, TorchSettings(**{"num_blocks": 64, "poison": True, **settings})))


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def make_step(**changes: Any) -> Step:
    empty = {name: NONE for name in Step.__dataclass_fields__ if name not in ("step_id", "new_rows")}
    return Step(**{"step_id": 1, "new_rows": (), **empty, **changes})


def column(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def new_row(row: int, tokens: list[int], blocks: list[int], **changes: Any) -> NewRow:
    values = {
        "num_prompt_tokens": len(tokens),
        "num_computed": 0,
        "seed": 1,
        "sampling": SamplingParams(temperature=0.0),
    }
    return NewRow(row=row, token_ids=column(*tokens), block_ids=column(*blocks), **{**values, **changes})


def run(backend: TorchBackend, step: Step) -> Any:
    backend.begin(step)
    backend.forward(step)
    backend.sample(step)
    return backend.collect()


def test_tokens_do_not_depend_on_the_schedule(model_dir: Path) -> None:
    """Greedy and sampled rows in bfloat16: alone, together, in chunks, after preemption; logprobs equal to the last bit."""
    engine = make_engine(model_dir)
    sampling = [SamplingParams(temperature=0.0, logprobs=2), SamplingParams(temperature=0.9, top_p=0.9, logprobs=2)]
    requests = [OfflineRequest(ids(n, 3 + 29 * n), 20, sampling[n % 2], seed=n) for n in range(6)]
    whole = engine.generate(requests)
    assert [engine.generate([request])[0] for request in requests] == whole
    assert engine.generate(requests, chunk_size=7) == whole
    assert engine.generate(requests, chunk_size=1, max_rows=2) == whole
    again = [
        OfflineRequest(r.prompt_token_ids, r.max_tokens, r.sampling, r.seed, w.token_ids[:9])
        for r, w in zip(requests, whole, strict=True)
    ]
    for resumed, expected in zip(engine.generate(again[::-1])[::-1], whole, strict=True):
        assert resumed.token_ids == expected.token_ids[9:]
        assert resumed.logprobs == expected.logprobs[9:]


def attention(lengths: list[tuple[int, int]], window: int | None, group: int) -> list[torch.Tensor]:
    """Paged attention of rows that have `start` tokens already and compute `count` more, one result a row."""
    cache = PagedKVCache(1, KV_HEADS, HEAD_DIM, 256, BLOCK, torch.float32, poison=True)
    kernels = attention_kernels(group)
    rows, queries, first, block = [], [], 0, 0
    for number, (start, count) in enumerate(lengths):
        keys_values, all_queries = contents(number, start + count, group)
        needed = -(-(start + count) // BLOCK)
        blocks = np.arange(block, block + needed)[::-1].astype(np.int32)
        block += needed
        positions = np.arange(start + count)
        slots = torch.from_numpy(blocks[positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK)
        # No rotation and no scale: what is stored is what was given.
        heads = torch.cat((torch.zeros(len(positions), KV_HEADS * group, HEAD_DIM), keys_values), 1).flatten(1)
        unturned = torch.ones(1, HEAD_DIM // 2, dtype=torch.complex64)
        kernels.append(heads, unturned, torch.zeros(len(positions), dtype=torch.int64), slots, cache, 0)
        rows.append(RowSpan(start, count, first, blocks))
        queries.append(all_queries[start:])
        first += count
    out = torch.full((first, KV_HEADS * group * HEAD_DIM), torch.nan)
    queries_of_all = torch.cat(queries).flatten(1)
    AttentionPlan(rows, group).attend(kernels.compiled, 0, cache, queries_of_all, out, window)
    return list(out.split([count for _, count in lengths]))


def attention_kernels(group: int) -> LayerKernels:
    config = {**CONFIG, "num_attention_heads": KV_HEADS * group, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return LayerKernels(parse_config(Path("config.json"), config), BLOCK, torch.float32)


def contents(number: int, length: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    longest = 4 * SPLIT
    keys_values = torch.randn(longest, 2 * KV_HEADS, HEAD_DIM, generator=generator)
    queries = torch.randn(longest, KV_HEADS * group, HEAD_DIM, generator=generator)
    return keys_values[:length], queries[:length]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("window", [None, 1, 50, 200])
def test_attention_is_exact_and_keeps_its_bits(window: int | None, group: int) -> None:
    lengths = [(0, 300), (299, 1), (5, 1), (0, 1), (127, 1), (128, 1), (250, 77), (0, 7)]
    together = attention(lengths, window, group)
    for number, (start, count) in enumerate(lengths):
        keys_values, queries = contents(number, start + count, group)
        keys, values = keys_values.repeat_interleave(group, 1).transpose(0, 1).chunk(2)
        scores = queries[start:].transpose(0, 1) @ keys.transpose(1, 2)
        positions = torch.arange(start + count)
        hidden = positions > positions[start:, None]
        if window is not None:
            hidden |= positions <= positions[start:, None] - window
        expected = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1).reshape(count, -1)
        assert torch.allclose(together[number], expected, atol=1e-4)
    # Row 0 again: other neighbours, then token by token at its end, where decodes and a chunk must agree.
    assert torch.equal(attention([(0, 300)], window, group)[0], together[0])
    for position in (0, 127, 128, 255, 299):
        assert torch.equal(attention([(position, 1)], window, group)[0][0], together[0][position])
    assert torch.equal(attention([(293, 7)], window, group)[0], together[0][293:])


def test_blocks_behind_the_window_may_belong_to_others(tmp_path: Path) -> None:
    engine = make_engine(write_model(tmp_path, {**CONFIG, "sliding_window": 20}))
    assert engine.info.kv_groups[0].window == 20
    backend = engine._backend
    assert isinstance(backend, TorchBackend)
    prompt = ids(1, 64)
    one = column(1)
    outputs = []
    for steals in (False, True):
        backend.reset()
        first = run(
            backend,
            make_step(
                new_rows=(new_row(0, prompt, [0, 1, 2, 3, 4]),),
                rows=column(0),
                num_scheduled=column(64),
                num_samples=one,
            ),
        )
        if steals:  # blocks 0 and 1 (positions 0 to 31) are behind what position 64 sees
            run(
                backend,
                make_step(
                    new_rows=(new_row(1, ids(9, 32), [0, 1]),),
                    rows=column(1),
                    num_scheduled=column(32),
                    num_samples=one,
                ),
            )
        second = run(backend, make_step(rows=column(0), num_scheduled=one, num_samples=one))
        outputs.append((first.token_ids.tolist(), second.token_ids.tolist()))
    assert outputs[0] == outputs[1]


def test_a_prefix_in_shared_blocks_is_not_computed_again(model_dir: Path) -> None:
    backend = make_engine(model_dir)._backend
    assert isinstance(backend, TorchBackend)
    prompt = ids(2, 40)
    one = column(1)
    full = run(
        backend,
        make_step(new_rows=(new_row(0, prompt, [5, 6, 7]),), rows=column(0), num_scheduled=column(40), num_samples=one),
    )
    shared = new_row(3, prompt, [5, 6, 9], num_computed=32)
    hit = run(backend, make_step(new_rows=(shared,), rows=column(3), num_scheduled=column(8), num_samples=one))
    assert hit.token_ids.tolist() == full.token_ids.tolist()


def test_poison_shows_a_read_of_something_unwritten(model_dir: Path) -> None:
    backend = make_engine(model_dir)._backend
    assert isinstance(backend, TorchBackend)
    lying = new_row(0, ids(3, 20), [1, 2], num_computed=16)
    output = run(backend, make_step(new_rows=(lying,), rows=column(0), num_scheduled=column(4), num_samples=column(1)))
    assert output.row_status.tolist() == [RowStatus.NAN]
    assert output.num_tokens.tolist() == [0]
    assert output.token_ids.tolist() == []


def test_a_failed_row_does_not_fail_the_steps_that_are_in_flight(model_dir: Path) -> None:
    """With run-ahead the next plan names the row before its failure is known; its neighbour must go on as if alone."""
    none_left = SamplingParams(temperature=0.0, allowed_token_ids=(5,), bad_words=((5,),))
    greedy = SamplingParams(temperature=0.0)
    alone = make_engine(model_dir).generate([OfflineRequest(ids(1, 5), 2, greedy)])[0].token_ids
    backend = TorchBackend(model_dir, TorchSettings(num_blocks=64, poison=True))
    backend.load(lambda *_: None)
    rows = (new_row(0, ids(1, 5), [0], sampling=greedy), new_row(1, ids(2, 5), [1], sampling=none_left))
    both = {"rows": column(0, 1), "num_samples": column(1, 1)}
    first = run(backend, make_step(new_rows=rows, num_scheduled=column(5, 5), **both))
    assert first.row_status.tolist() == [RowStatus.OK, RowStatus.MASK_EMPTY]
    second = run(backend, make_step(num_scheduled=column(1, 1), **both))
    assert [int(first.token_ids[0]), int(second.token_ids[0])] == alone


def test_rows_blocks_and_chunks_arrive_step_by_step(model_dir: Path) -> None:
    backend = make_engine(model_dir)._backend
    assert isinstance(backend, TorchBackend)
    prompt = ids(4, 30)
    start = new_row(2, prompt[:10], [8], num_prompt_tokens=30)
    first = run(backend, make_step(new_rows=(start,), rows=column(2), num_scheduled=column(10), num_samples=column(0)))
    assert first.token_ids.tolist() == [] and first.row_status.tolist() == []
    second = make_step(
        append_rows=column(2), append_block_ids=column(3), chunk_rows=column(2), chunk_lens=column(20),
        chunk_token_ids=column(*prompt[10:]), rows=column(2), num_scheduled=column(20), num_samples=column(1),
    )  # fmt: skip
    expected = make_engine(model_dir).generate([OfflineRequest(prompt, 1)])[0].token_ids
    assert run(backend, second).token_ids.tolist() == expected
    only_frees = make_step(freed_rows=column(2))
    assert run(backend, only_frees).num_tokens.tolist() == []
    with pytest.raises(BackendError, match="row 2: more tokens are scheduled"):
        backend.begin(make_step(rows=column(2), num_scheduled=column(1), num_samples=column(1)))


def test_row_state_refuses_what_does_not_fit() -> None:
    state = RowState(max_rows=2, max_model_len=32, block_size=16)
    with pytest.raises(BackendError, match="row 1: 33 tokens exceed max_model_len 32"):
        state.apply(make_step(new_rows=(new_row(1, [0] * 33, [0]),)))
    with pytest.raises(BackendError, match="row 0: its block table is full"):
        state.apply(make_step(new_rows=(new_row(0, [0], [0, 1, 2]),)))
    with pytest.raises(BackendError, match="row 0: its blocks do not hold"):
        state.apply(
            make_step(
                new_rows=(new_row(0, [0] * 17, [0]),), rows=column(0), num_scheduled=column(17), num_samples=column(1)
            )
        )


def test_prompt_logprobs_cross_chunks_without_a_gap(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    request = OfflineRequest(ids(6, 40), 2, SamplingParams(temperature=0.0, prompt_logprobs=1))
    whole, chunked = engine.generate([request])[0], engine.generate([request], chunk_size=7)[0]
    assert [entry.position for entry in whole.logprobs] == list(range(1, 40))
    assert chunked == whole


def test_warm_up_leaves_nothing_and_collect_wants_a_step(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    before = engine.generate([OfflineRequest(ids(7, 20), 5)])
    engine._backend.warm_up()
    with pytest.raises(BackendError, match="no step has been sampled"):
        engine._backend.collect()
    assert engine.generate([OfflineRequest(ids(7, 20), 5)]) == before


def test_info_names_what_decides_bits(model_dir: Path) -> None:
    info = make_engine(model_dir, max_model_len=100).info
    assert (info.name, info.vocab_size, info.max_model_len) == ("torch", 97, 100)
    assert info.kv_groups[0].bytes_per_block == 2 * 2 * 2 * 16 * 2 * 16
    for part in ("bfloat16", torch.__version__, torch.backends.cpu.get_cpu_capability()):
        assert part in info.numerics
    assert make_engine(model_dir, dtype="float32").info.numerics != info.numerics


def test_offline_refuses_what_can_never_fit(model_dir: Path) -> None:
    engine = make_engine(model_dir, num_blocks=2)
    assert engine.info.max_model_len == 32
    for prompt in ([], ids(1, 30)):
        with pytest.raises(BackendError, match="does not fit"):
            engine.generate([OfflineRequest(prompt, 5)])


def test_quiet_threads_keeps_what_is_set_and_needs_no_torch() -> None:
    environ = {"GOMP_SPINCOUNT": "7"}
    quiet_threads(environ)
    assert environ["GOMP_SPINCOUNT"] == "7"
    assert environ["KMP_BLOCKTIME"] == "0"
    assert "torch" not in vars(sys.modules["worker.backends.torch_threads"])
