"""The whole backend: log-probabilities against transformers, and tokens that do not depend on batch, chunks or blocks."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu_models import write_model
from bench.gpu_offline import GREEDY, OfflineEngine, Request
from worker.backend import BackendError, BackendInfo
from worker.backends.cuda_backend import CudaBackend
from worker.backends.cuda_settings import CudaSettings
from worker.engine import Engine
from worker.step import NewRow, SamplingParams, Step, StepOutput

pytestmark = pytest.mark.gpu

NONE = np.zeros(0, np.int32)
NAMES = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {name: write_model(parent, name, scale=0.08) for name in NAMES} | {
        "llama-1b": write_model(parent, "llama-1b", layers=8),
        "llama-8b": write_model(parent, "llama-8b", layers=4),
    }


@contextmanager
def serving(directory: Path, **settings: object) -> Iterator[tuple[OfflineEngine, BackendInfo]]:
    chosen = {
        "max_rows": 40,
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
        "num_blocks": 4000,
        "poison": True,
        **settings,
    }
    backend = CudaBackend(directory, CudaSettings(**chosen))  # type: ignore[arg-type]
    info = backend.load(lambda what, done, total: None)
    backend.warm_up()
    try:
        yield OfflineEngine(backend, info), info
    finally:
        backend.close()


def prompts(count: int, vocab: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def greedy(engine: OfflineEngine, texts: list[list[int]], outputs: int, **how: object) -> list[list[int]]:
    requests = [Request(text, outputs) for text in texts]
    engine.run(requests, **how)  # type: ignore[arg-type]
    assert all(request.status == 0 and len(request.outputs) == outputs for request in requests)
    return [request.outputs for request in requests]


@pytest.mark.parametrize("name", [*NAMES, "llama-1b", "llama-8b"])
def test_log_probabilities_against_transformers(models: dict[str, Path], name: str) -> None:
    transformers = pytest.importorskip("transformers")
    text = (
        prompts(1, 2048, 1, seed=3)[0]
        + prompts(1, 2048, 1, seed=4)[0] * 0
        + random.Random(5).choices(range(2048), k=699)
    )
    ids = torch.tensor([text], device="cuda")
    exact, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(models[name], dtype=dtype)
        .cuda()(ids)
        .logits[0]
        .double()
        .log_softmax(-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    wanted = torch.tensor(text[1:], device="cuda")[:, None]
    reference = exact[:-1].gather(1, wanted)[:, 0]
    theirs = (rounded[:-1].gather(1, wanted)[:, 0] - reference).norm()
    describing = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1)
    for chunk in (None, 61):
        with serving(models[name]) as (engine, _):
            run = engine.run([Request(text, 3, describing)], chunk=chunk)
        found: dict[int, float] = {}
        best: dict[int, int] = {}
        for _, columns in run.logprobs:
            starts = np.cumsum(columns.num_entries) - columns.num_entries
            for position, start in zip(columns.position.tolist(), starts.tolist(), strict=True):
                found[position], best[position] = float(columns.logprobs[start]), int(columns.token_ids[start + 1])
        assert sorted(found) == list(range(1, len(text) + 3))
        ours = (torch.tensor([found[i] for i in range(1, len(text))], device="cuda").double() - reference).norm()
        assert ours <= 1.25 * theirs, f"error {float(ours):.4f}, transformers in bfloat16 {float(theirs):.4f}"
        gap = exact.topk(2).values.diff(dim=-1).abs()[:, 0]
        clear = [i for i in range(1, len(text)) if float(gap[i - 1]) > 0.2]
        assert clear
        assert [best[i] for i in clear] == [int(exact[i - 1].argmax()) for i in clear]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_depend_on_the_schedule(models: dict[str, Path], name: str) -> None:
    texts = prompts(13, 2048, 300)
    with serving(models[name]) as (engine, info):
        together = greedy(engine, texts, 40)
        assert greedy(engine, texts, 40) == together, "two equal runs differ"
        blocks = list(range(info.kv_groups[0].num_blocks))
        assert greedy(engine, texts, 40, order=random.Random(1).sample(blocks, len(blocks))) == together
        alone = [greedy(engine, [text], 40)[0] for text in texts]
        chunked = greedy(engine, texts, 40, chunk=7)
    with serving(models[name], graphs=False) as (engine, _):
        assert greedy(engine, texts, 40) == together, "graphs change tokens"
    # Up to 16 tokens a step our own kernel multiplies and a row's bits are its own; above, cuBLAS chooses by batch size.
    parted = sum(a != b for a, b in zip(together, alone, strict=True)) + sum(
        a != b for a, b in zip(together, chunked, strict=True)
    )
    assert parted <= 8, f"{parted} of 26 continuations differ"


def test_decode_rows_keep_their_bits_in_batches_of_up_to_16(models: dict[str, Path]) -> None:
    """Prompts of 1 to 16 tokens alone use only our kernels, so not one token may differ."""
    texts = prompts(16, 2048, 1)
    with serving(models["tiny-llama"]) as (engine, _):
        together = greedy(engine, texts, 60)
        assert together == [greedy(engine, [text], 60)[0] for text in texts]


def test_mixed_sampling_runs_with_run_ahead_and_repeats(models: dict[str, Path]) -> None:
    kinds = [
        GREEDY,
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=50),
        SamplingParams(temperature=0.7, repetition_penalty=1.2, logprobs=3),
        SamplingParams(temperature=0.0, min_tokens=5, stop_token_ids=(3, 4), bad_words=((5, 6),), logit_bias={9: 2.0}),
    ]
    texts = prompts(30, 2048, 200)
    with serving(models["tiny-llama"]) as (engine, _):
        runs = []
        for _ in range(2):
            requests = [Request(text, 30, kinds[i % len(kinds)], seed=i) for i, text in enumerate(texts)]
            engine.run(requests)
            runs.append([request.outputs for request in requests])
    assert runs[0] == runs[1]
    assert len({tuple(outputs) for outputs in runs[0]}) > 20


def best_of(
    engine: OfflineEngine, requests: list[Request], **how: object
) -> list[dict[int, tuple[list[int], list[float]]]]:
    """Of each request by position: the token chosen and the two best, with their log-probabilities."""
    run = engine.run(requests, **how)  # type: ignore[arg-type]
    found: dict[int, dict[int, tuple[list[int], list[float]]]] = {id(request): {} for request in requests}
    for rows, columns in run.logprobs:
        starts = np.cumsum(columns.num_entries) - columns.num_entries
        for owner, position, start in zip(
            columns.owner.tolist(), columns.position.tolist(), starts.tolist(), strict=True
        ):
            part = slice(start, start + 3)
            found[id(rows[owner])][position] = columns.token_ids[part].tolist(), columns.logprobs[part].tolist()
    return [found[id(request)] for request in requests]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize(("graphs", "chunk"), [(True, None), (True, 40), (False, None)])
def test_rows_behind_a_shared_prefix_give_the_tokens_of_rows_that_read_it_alone(
    models: dict[str, Path], name: str, graphs: bool, chunk: int | None
) -> None:
    """Rows come while others decode, leave one by one, and some have no prefix: up to near-ties nothing changes."""
    generator = random.Random(31)
    prefix, describing = generator.choices(range(2048), k=1040), SamplingParams(temperature=0.0, logprobs=2)
    tails = [generator.choices(range(2048), k=generator.randint(1, 90)) for _ in range(90)]
    results = []
    for shared_prefix in (True, False):
        settings = {"max_rows": 100, "max_model_len": 2048, "num_blocks": 9000, "graphs": graphs}
        with serving(models[name], shared_prefix=shared_prefix, **settings) as (engine, _):
            blocks = engine.num_blocks(len(prefix))
            engine.run([Request(prefix, 1)])
            requests = []
            for i, tail in enumerate(tails):
                request = Request(tail, 20 + i % 17, describing)
                if i % 10 < 9:
                    request.prompt, request.computed = prefix + tail, len(prefix)
                    request.blocks, request.shared = list(range(blocks)), blocks
                requests.append(request)
            found = best_of(engine, requests, chunk=chunk, order=list(range(blocks, 9000)))
            results.append((found, error_of(models[name], requests, found)))
            backend = engine.backend
            assert isinstance(backend, CudaBackend)
            planner = backend._launcher._prefixes
            assert (planner is not None) == (shared_prefix and backend._ops.shares_prefixes)
            if planner is not None:
                assert planner.lists.num_works.item() > 0, "no step has shared"
    for together, alone in zip(*(found for found, _ in results), strict=True):
        for position in sorted(alone):
            (tokens, values), (expected, reference) = together[position], alone[position]
            assert abs(values[0] - reference[0]) < 0.1 or tokens[0] != expected[0], (position, values, reference)
            if tokens[0] != expected[0]:
                assert abs(reference[1] - reference[2]) < 0.1, "they part where the choice was clear"
                break
    ours, theirs = (error for _, error in results)
    assert ours <= 1.1 * theirs, f"error {ours:.4f}, of rows that read their prefix alone {theirs:.4f}"


def error_of(directory: Path, requests: list[Request], found: list[dict[int, tuple[list[int], list[float]]]]) -> float:
    """Root of the mean square of the outputs' log-probabilities less those of transformers in float32, given the same text."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).cuda()
    differences = []
    for request, described in zip(requests, found, strict=True):
        text = torch.tensor([request.prompt + request.outputs], device="cuda")
        exact = model(text).logits[0, len(request.prompt) - 1 : -1].double().log_softmax(-1)
        wanted = exact.gather(1, text[0, len(request.prompt) :, None])[:, 0].tolist()
        differences += [described[len(request.prompt) + i][1][0] - value for i, value in enumerate(wanted)]
    return float(np.sqrt(np.mean(np.square(differences))))


@pytest.mark.parametrize("graphs", [True, False])
def test_a_caller_may_have_another_stream(models: dict[str, Path], graphs: bool) -> None:
    """One that is busy: torch's products would come after all of our kernels there."""
    texts = prompts(13, 2048, 300)
    with serving(models["tiny-llama"], graphs=graphs) as (engine, _):
        wanted = greedy(engine, texts, 5)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(1 << 28)
            assert greedy(engine, texts, 5) == wanted


def test_what_does_not_fit_is_told_with_numbers(models: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match=r"MiB free.*weights take.*a block of 16 tokens takes.*so \d+ fit"):
        CudaBackend(models["tiny-llama"], CudaSettings(num_blocks=10**9, max_model_len=64)).load(lambda *_: None)


def test_a_step_that_makes_no_sense_is_refused(models: dict[str, Path]) -> None:
    with (
        serving(models["tiny-llama"]) as (engine, _),
        pytest.raises(BackendError, match="blocks exceed its block table of 64"),
    ):
        engine.run([Request([1] * 1025, 1)])


def test_a_prefix_hit_gives_the_tokens_of_a_whole_prompt(models: dict[str, Path]) -> None:
    """A row that starts with 32 computed tokens in another row's blocks, at the step at which a row computes them all."""
    text = random.Random(8).choices(range(2048), k=50)
    with serving(models["tiny-llama"]) as (engine, _):
        backend = engine.backend
        tokens = []
        for row, computed, blocks in ((0, 0, [7, 3, 9, 11]), (1, 32, [7, 3, 20, 21])):
            new = NewRow(row, np.array(text, np.int32), 50, computed, np.array(blocks, np.int32), 0, GREEDY)
            found = []
            for step_id in range(10):
                here, count = np.array([row], np.int32), np.array([1 if step_id else 50 - computed], np.int32)
                started = (new,) if step_id == 0 else ()
                step = Step(step_id, NONE, started, NONE, NONE, NONE, NONE, NONE, here, count, np.ones(1, np.int32))
                backend.begin(step)
                backend.forward(step)
                backend.sample(step)
                found += backend.collect().token_ids.tolist()
            tokens.append(found)
    assert tokens[0] == tokens[1]


def test_many_random_loads_leak_nothing_and_change_nothing(models: dict[str, Path]) -> None:
    generator = random.Random(11)
    texts = prompts(20, 2048, 250, seed=12)
    with serving(models["tiny-mistral"]) as (engine, _):
        first = greedy(engine, texts, 30, chunk=50)
        greedy(engine, prompts(40, 2048, 400, seed=13), 30)
        torch.cuda.synchronize()
        memory = torch.cuda.memory_allocated()
        for seed in range(12):
            noise = prompts(generator.randint(1, 60), 2048, 400, seed=seed)
            sampling = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
            requests = [Request(text, generator.randint(1, 60), sampling, seed=i) for i, text in enumerate(noise)]
            engine.run(requests, chunk=generator.choice([16, 100, None]))
            assert greedy(engine, texts, 30, chunk=50) == first
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= memory + (1 << 20)


def test_the_engine_drives_it_with_two_threads(models: dict[str, Path]) -> None:
    """Launch and collect threads, graphs captured while the other thread waits, and a reset in between."""
    texts = prompts(5, 2048, 100, seed=21)
    with serving(models["tiny-llama"]) as (offline, _):
        expected = greedy(offline, texts, 20, chunk=100)
    backend = CudaBackend(
        models["tiny-llama"], CudaSettings(max_rows=8, max_num_batched_tokens=512, max_model_len=256, num_blocks=80)
    )
    outputs: queue.Queue[StepOutput | str] = queue.Queue()
    engine = Engine(
        backend,
        lambda epoch, output: outputs.put(output),
        lambda epoch, step_id, text: outputs.put(text),
        lambda error: outputs.put(repr(error)),
    )
    engine.start()
    try:
        engine.load(lambda *_: None).result(timeout=300)
        for epoch in (1, 2):
            new = tuple(
                NewRow(
                    i, np.array(text, np.int32), len(text), 0, np.arange(10 * i, 10 * i + 10, dtype=np.int32), 0, GREEDY
                )
                for i, text in enumerate(texts)
            )
            rows, ones = np.arange(5, dtype=np.int32), np.ones(5, np.int32)
            counts = np.array([len(text) for text in texts], np.int32)
            engine.submit(epoch, Step(0, NONE, new, NONE, NONE, NONE, NONE, NONE, rows, counts, ones))
            for step_id in range(1, 20):
                engine.submit(epoch, Step(step_id, NONE, (), NONE, NONE, NONE, NONE, NONE, rows, ones, ones))
            found = [outputs.get(timeout=60) for _ in range(20)]
            assert not [output for output in found if isinstance(output, str)]
            tokens = np.stack([output.token_ids for output in found if isinstance(output, StepOutput)], axis=1)
            assert tokens.tolist() == expected
            engine.reset().result(timeout=60)
    finally:
        engine.close()
