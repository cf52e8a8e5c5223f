"""W1 to W6: prompts as token ids, output lengths, how they arrive, and the figures that others reach with them on one H100.

    w1         one stream, 128 + 512
    w2-64/256  so many streams at once, 128 + 256
    w3         256 requests, 100 to 1,024 tokens in and out, temperature 0.6 (nano-vllm's bench.py, the same draws)
    w4-N       the first token of a prompt of N
    w5         128 requests of 64 + 64 behind a prefix of 2,048 that they share
    w6-one     three requests of 128 + 512, one after the other
    w6-256     512 requests of 128 + 128, 256 at once
    w6-32      512 of these, 32 arrive a second (Poisson)

The token ids are those of the scripts that measured vLLM for repeat 0; each further repeat has others, of the same lengths, so that
no run finds its prompts in the prefix cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Self

VOCABULARY = 128_000  # special tokens left out
NAMES = ("w1", "w2-64", "w2-256", "w3", "w4-8192", "w4-32768", "w5", "w6-one", "w6-256", "w6-32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one run, and how they arrive."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]
    concurrency: int
    rate: float | None = None  # requests a second in an open loop
    temperature: float = 0.0

    def first(self, count: int) -> Self:
        """So many of its requests only."""
        return replace(self, prompts=self.prompts[:count], output_lens=self.output_lens[:count])


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure of a workload, and what to hold it against. Units are those of `figures`; None where nobody has measured it."""

    workload: str
    figure: str
    unit: str
    floor: float | None  # bytes over bandwidth or operations over rate, whichever takes longer
    vllm: float | None  # 0.26.0 with its best settings
    goal: float
    stretch: float | None = None
    higher_is_better: bool = False


def make_workload(name: str, repeat: int = 0, vocab_size: int = VOCABULARY, shrink: int = 1) -> Workload:
    """A workload by name. `shrink` divides all counts and lengths, for small machines. Raises ValueError for an unknown name."""
    kind, _, size = name.partition("-")
    concurrency, rate = None, None
    if name == "w1":
        prompts, lens = _fixed(random.Random(1128), 1, 128, 512, shrink)  # the seeds are those scripts' own
    elif kind == "w2" and size.isdigit():
        prompts, lens = _fixed(random.Random(1000 * int(size) + 128 + repeat), int(size), 128, 256, shrink)
    elif name == "w3":
        prompts, lens = _mixed(shrink)
    elif kind == "w4" and size.isdigit():
        prompts, lens = _fixed(random.Random(1000 + int(size) + repeat), 1, int(size), 1, shrink)
    elif name == "w5":
        prompts, lens = _behind_prefix(random.Random(5000 + repeat), shrink)
    elif name == "w6-one":
        prompts, lens = _fixed(random.Random(repeat), 3, 128, 512, shrink)
        concurrency = 1
    elif kind == "w6" and size.isdigit():
        prompts, lens = _fixed(random.Random(repeat), 512, 128, 128, shrink)
        concurrency, rate = max(1, 256 // shrink), float(size) if size == "32" else None
    else:
        raise ValueError(f"no workload {name!r}; there are {', '.join(NAMES)}")
    if name in ("w1", "w3"):  # these draw the same each time
        prompts = [[(token + repeat) % VOCABULARY for token in prompt] for prompt in prompts]
    if vocab_size < VOCABULARY:
        prompts = [[token % vocab_size for token in prompt] for prompt in prompts]
    return Workload(
        name=name,
        prompts=prompts,
        output_lens=lens,
        concurrency=concurrency or len(prompts),
        rate=rate,
        temperature=0.6 if name == "w3" else 0.0,
    )


def bars(model: str) -> tuple[Bar, ...]:
    """What is known of a model's shape on one H100 80GB, by the name of its directory; empty for others."""
    return _BARS.get(model, ())


def _fixed(rng: random.Random, count: int, prompt: int, output: int, shrink: int) -> tuple[list[list[int]], list[int]]:
    count, prompt, output = (max(1, size // shrink) for size in (count, prompt, output))
    return [_ids(rng, prompt) for _ in range(count)], [output] * count


def _mixed(shrink: int) -> tuple[list[list[int]], list[int]]:
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    lens = [rng.randint(100, 1024) for _ in prompts]
    count = max(1, 256 // shrink)
    return [p[: max(1, len(p) // shrink)] for p in prompts[:count]], [max(1, n // shrink) for n in lens[:count]]


def _behind_prefix(rng: random.Random, shrink: int) -> tuple[list[list[int]], list[int]]:
    count, prefix, tail = max(1, 128 // shrink), max(1, 2048 // shrink), max(1, 64 // shrink)
    shared = _ids(rng, prefix)
    return [shared + _ids(rng, tail) for _ in range(count)], [tail] * count


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


_MS_TOKEN, _TOKENS_S, _TTFT, _SECONDS = "ms_per_token", "tokens_per_s", "ttft_p50_ms", "seconds"

_BARS: dict[str, tuple[Bar, ...]] = {
    "llama-1b": (
        Bar("w1", _MS_TOKEN, "ms", 0.81, 1.68, 1.05, 0.95),
        Bar("w2-64", _TOKENS_S, "/s", 60_000, 23_049, 40_000, 48_000, True),
        Bar("w2-256", _TOKENS_S, "/s", 139_000, 47_102, 85_000, 100_000, True),
        Bar("w3", _TOKENS_S, "/s", 53_000, 21_938, 36_000, 44_000, True),
        Bar("w4-8192", _TTFT, "ms", 29, 44, 46, 42),
        Bar("w4-32768", _TTFT, "ms", 190, 268, 350, 260),
        Bar("w5", _SECONDS, "s", 0.2, 0.47, 0.35, 0.28),
        Bar("w6-one", "itl_p50_ms", "ms", 0.81, 2.15, 1.2, 1.0),
        Bar("w6-256", _TOKENS_S, "/s", None, 13_355, 50_000, 70_000, True),
        Bar("w6-256", "ttft_p50_ms", "ms", None, 338, 110, 80),
        Bar("w6-256", "itl_p99_ms", "ms", None, 39, 25, 15),
        Bar("w6-32", "ttft_p50_ms", "ms", None, 17, 8, 4),
        Bar("w6-32", "ttft_p99_ms", "ms", None, 29, 15, 7.5),
        Bar("w6-32", "itl_p50_ms", "ms", None, 2.6, 1.5, 0.75),
        Bar("w6-32", "itl_p99_ms", "ms", None, 7.7, 5, 2.5),
    ),
    "llama-8b": (
        Bar("w1", _MS_TOKEN, "ms", 4.92, 6.50, 5.6),
        Bar("w2-64", _TOKENS_S, "/s", None, 7_533, 7_533, None, True),
        Bar("w2-256", _TOKENS_S, "/s", None, 16_779, 16_779, None, True),
        Bar("w3", _TOKENS_S, "/s", None, 8_140, 8_140, None, True),
        Bar("w4-8192", _TTFT, "ms", None, 216, 240),
        Bar("w4-32768", _TTFT, "ms", None, 1_217, 1_450),
        Bar("w5", _SECONDS, "s", None, 1.21, 1.21),
    ),
}
