"""What a seed means: the cluster, its requests and its faults, all drawn before anything runs."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from service.grammar import Grammar

VOCABULARY = 700
MAX_MODEL_LEN = 160
FAULT_SECONDS = 3.0  # faults and requests begin within this
SETTLE_SECONDS = 40.0  # after which everything must have ended

KINDS = ("kill", "freeze", "part", "cut", "fail", "hang", "drain", "stall", "massacre")


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One client's request, and when the client hangs up, if it does. Times in seconds from the start."""

    number: int
    begin: float
    prompt: tuple[int, ...]
    n: int
    max_tokens: int
    min_tokens: int
    temperature: float
    stop: str
    seed: int
    priority: int
    deadline: float | None
    hang_up: float | None
    poison: bool
    grammar: Grammar | None


@dataclass(frozen=True, slots=True)
class Fault:
    """`target` and `other` are drawn numbers; the node is that modulo how many there are."""

    at: float
    kind: str
    role: str
    target: int
    other: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a seed decides."""

    routers: int
    schedulers: int
    workers: int
    num_blocks: int
    max_rows: int
    step_seconds: float
    prefix_caching: bool
    max_shared_tokens: int
    requests: tuple[RequestPlan, ...]
    faults: tuple[Fault, ...]


_GRAMMARS = (
    Grammar("regex", "(ab|c[0-9]{1,3})+"),
    Grammar("choice", json.dumps(["yes", "no", "perhaps in a while"])),
    Grammar("json_schema", json.dumps({"type": "array", "items": {"enum": ["x", 12, None]}, "minItems": 2})),
    Grammar("lark", 'start: "[" WORD ("," WORD)* "]"\nWORD: / w[0-9]{3}/'),
)


def make_plan(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(f"plan {seed}")
    prefixes = [tuple(rng.randrange(258, 700) for _ in range(rng.randint(4, 40))) for _ in range(3)]
    return Plan(
        routers=rng.randint(1, 2),
        schedulers=rng.choice((1, 1, 2, 2, 3)),
        workers=rng.randint(1, 3),
        num_blocks=rng.choice((45, 64, 200)),  # at least one longest request
        max_rows=rng.choice((3, 6)),
        step_seconds=rng.choice((0.002, 0.01, 0.03)),
        prefix_caching=rng.random() < 0.8,
        max_shared_tokens=random.Random(f"shared {seed}").choice((1, 2_048)),
        requests=tuple(_request(rng, seed, number, prefixes) for number in range(rng.randint(6, 16))),
        faults=tuple(_fault(rng) for _ in range(rng.randint(1, 5))),
    )


def _request(rng: random.Random, seed: int, number: int, prefixes: list[tuple[int, ...]]) -> RequestPlan:
    grammars = random.Random(f"grammar {seed} {number}")
    poison = rng.random() < 0.02
    tail = (7,) * poison + tuple(rng.randrange(258, 700) for _ in range(rng.randint(1, 20)))
    begin = rng.uniform(0, FAULT_SECONDS)
    max_tokens = rng.choice((1, 5, 30, 60, 90))
    return RequestPlan(
        number=number,
        begin=begin,
        prompt=(rng.choice(prefixes) if rng.random() < 0.7 else ()) + tail,
        n=rng.choice((1, 1, 1, 2)),
        max_tokens=max_tokens,
        min_tokens=rng.choice((0, 0, 4)),
        temperature=rng.choice((0.0, 1.0)),
        stop=rng.choice(("", "", "", "w3", "99")),
        seed=rng.getrandbits(64),
        priority=rng.choice((0, 0, 1)),
        deadline=begin + rng.uniform(0.2, 3) if rng.random() < 0.08 else None,
        hang_up=begin + rng.uniform(0, 1.5) if rng.random() < 0.15 else None,
        poison=poison,
        grammar=grammars.choice(_GRAMMARS) if grammars.random() < 0.4 else None,
    )


def _fault(rng: random.Random) -> Fault:
    role = rng.choice(("worker", "worker", "scheduler", "router"))
    kind = rng.choice((*KINDS, "cut", "cut"))  # messages that come late are the rarest trouble
    if kind in ("fail", "hang", "stall", "massacre"):
        role = "worker"
    return Fault(
        at=rng.uniform(0.3, FAULT_SECONDS),
        kind=kind,
        role=role,
        target=rng.randrange(1000),
        other=rng.randrange(1000),
        seconds=rng.choice((0.05, 0.2, 0.5, 1.5)),
    )
