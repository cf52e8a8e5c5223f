"""GPU tests run where torch sees a CUDA device and are skipped, with the reason, where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def on_stream() -> Iterator[None]:
    """Every test has its own stream, as a backend has, and ends with the device idle and without an error."""
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()
