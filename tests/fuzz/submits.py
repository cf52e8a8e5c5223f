"""Valid Submits of every kind, to be mutated."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from octavo.v1 import common_pb2, scheduler_pb2

from service.columns import pack


def ids(random: Random, vocab: int, low: int, high: int) -> bytes:
    """A column of token ids, `low` to `high` of them."""
    return pack([random.randrange(vocab) for _ in range(random.randint(low, high))], np.int32)


def sampling(random: Random, vocab: int) -> common_pb2.SamplingSpec:
    """How a sequence samples, with everything that there is used some of the time."""
    spec = common_pb2.SamplingSpec(
        temperature=random.choice((0.0, 0.7, 1.0)), top_p=random.choice((0.5, 1.0)), top_k=random.choice((0, 5)),
        min_p=random.choice((0.0, 0.1)), repetition_penalty=random.choice((1.0, 1.2)), max_tokens=random.randint(1, 12),
        presence_penalty=random.choice((0.0, 0.5)), frequency_penalty=random.choice((0.0, -0.5)),
        min_tokens=random.choice((0, 0, 1, 3)),
    )  # fmt: skip
    if random.random() < 0.5:
        spec.stop_token_ids = ids(random, vocab, 1, 4)
    if random.random() < 0.2:
        spec.allowed_token_ids = ids(random, vocab, 1, 9)
    if random.random() < 0.2:
        spec.bad_words.add(token_ids=ids(random, vocab, 1, 3))
    if random.random() < 0.2:
        spec.logit_bias[random.randrange(vocab)] = random.uniform(-100, 100)
    if random.random() < 0.4:
        spec.logprobs = random.randint(0, 20)
    if random.random() < 0.2:
        spec.prompt_logprobs = random.randint(0, 5)
    return spec


def grammar(random: Random) -> common_pb2.Grammar:
    """One of each kind, or none."""
    return random.choice(
        (
            common_pb2.Grammar(json_schema='{"type": "integer"}'),
            common_pb2.Grammar(regex="[a-c]{2,5}"),
            common_pb2.Grammar(lark='start: "x" INT?\nINT: /[0-9]+/'),
            common_pb2.Grammar(choice=common_pb2.Choices(values=["yes", "no"])),
            common_pb2.Grammar(),
        )
    )


def submit(random: Random, handle: int, model: str, digest: bytes, vocab: int) -> scheduler_pb2.Submit:
    """A request, new or resumed."""
    prompt = ids(random, vocab, 1, 24)
    fields: dict[str, Any] = {
        "handle": handle, "request_id": f"r{handle}", "task": scheduler_pb2.TASK_GENERATE, "model": model,
        "tenant": random.choice(("", "a", "b")), "cache_salt": random.choice((b"", b"salt")),
        "priority": random.choice((0, 0, 5, -5)), "seed": random.getrandbits(64), "waited_ms": random.randrange(500),
        "sampling": sampling(random, vocab), "prompt": [scheduler_pb2.Segment(token_ids=prompt)],
        "num_prompt_tokens": len(prompt) // 4,
    }  # fmt: skip
    message = scheduler_pb2.Submit(**fields)
    if random.random() < 0.5:
        message.digest = digest
    if random.random() < 0.25:
        message.output_token_ids = ids(random, vocab, 1, 6)
        message.sampling.max_tokens += 6
    if random.random() < 0.2:
        message.grammar.CopyFrom(grammar(random))
    if random.random() < 0.2:
        message.remaining_ms = random.randrange(3000)
    if random.random() < 0.1:
        message.suspect_group, message.failures_alone = random.randrange(1, 4), random.randrange(4)
    return message
