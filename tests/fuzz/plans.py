"""Plans that are nearly right: counts at the edge of contexts, tables, budgets and vocabularies, and one step beyond."""

from __future__ import annotations

from random import Random

import numpy as np
from octavo.v1 import step_pb2

from service.columns import pack
from tests.fuzz.submits import grammar
from worker.backend import BackendInfo


def edge_plan(random: Random, info: BackendInfo, epoch: int, step_id: int) -> step_pb2.StepPlan:
    """A plan that would make a device write just inside or just outside of what it has."""
    plan = step_pb2.StepPlan(epoch=epoch, step_id=step_id)
    group, longest = info.kv_groups[0], info.max_model_len
    rows: list[int] = []
    counts: list[int] = []
    samples: list[int] = []
    for row in random.sample(range(info.max_rows), random.randint(1, info.max_rows)):
        known = random.choice((1, group.block_size, group.block_size + 1, longest - 1, longest, longest, longest + 1))
        computed = max(0, known - random.choice((1, 1, 1, 2, group.block_size, 0)))
        needed = -(-known // group.block_size)
        blocks = max(0, needed + random.choice((0, 0, 0, 0, -1, 1, 5)))
        plan.new_rows.add(
            row=_near(random, row, info.max_rows),
            token_ids=_ids(random, known, info.vocab_size),
            num_prompt_tokens=random.choice((known, known, 1, longest, longest + 1, 0)) if random.random() < 0.5 else known,
            num_computed=computed,
            block_ids=_ids(random, blocks, group.num_blocks),
            seed=random.getrandbits(64),
            sampling={"top_p": 1, "repetition_penalty": 1, "temperature": random.choice((0, 1))},
        )  # fmt: skip
        if random.random() < 0.1:
            plan.new_rows[-1].grammar.CopyFrom(grammar(random))
        if random.random() < 0.9:
            rows.append(_near(random, row, info.max_rows))
            counts.append(max(0, known - computed + random.choice((0, 0, 0, 0, 1, -1))))
            samples.append(random.choice((1, 1, 1, 0, 2)) if random.random() < 0.3 else 1)
    plan.freed_rows = pack(list(range(info.max_rows)), np.int32)
    plan.rows, plan.num_scheduled = pack(rows, np.int32), pack(counts, np.int32)
    plan.num_samples = pack(samples, np.uint8)
    if random.random() < 0.3:
        plan.append_rows = pack([row for row in rows for _ in range(2)], np.int32)
        plan.append_block_ids = _ids(random, 2 * len(rows), group.num_blocks)
    if random.random() < 0.3:
        lens = [random.choice((1, 1, 2, longest)) for _ in rows]
        plan.chunk_rows, plan.chunk_lens = pack(rows, np.int32), pack(lens, np.int32)
        plan.chunk_token_ids = _ids(random, sum(lens), info.vocab_size)
    return plan


def _near(random: Random, value: int, end: int) -> int:
    return value if random.random() < 0.96 else random.choice((-1, end, value ^ 1))


def _ids(random: Random, count: int, end: int) -> bytes:
    ids = [random.randrange(end) for _ in range(count)]
    if ids and random.random() < 0.05:
        ids[random.randrange(count)] = random.choice((-1, end, 2**31 - 1, -(2**31)))
    return pack(ids, np.int32)
