"""What it is for a check to find a defect that was sown into a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.emulator.compile import Builder, Mutation
from tests.emulator.library import EmulatedOps, EmulatorError

Make = Callable[..., EmulatedOps]  # of a shape
Check = Callable[[Make], None]


def must_find(builder: Builder, check: Check, mutation: Mutation, hopper: bool = False) -> None:
    """Fails where `check` passes with the defect in twelve orders of threads, warps and blocks."""
    for seed in range(0, 12_000, 1000):
        try:
            check(
                lambda shape, seed=seed, **more: EmulatedOps(
                    builder, shape, mutation=mutation, seed=seed, hopper=hopper, **more
                )
            )
        except (AssertionError, EmulatorError):
            return
    pytest.fail(f"nothing finds it: {mutation}")
