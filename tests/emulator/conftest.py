"""The kernels' sources compiled for this machine's processor; skipped, with the reason, where it has no C++ compiler."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="deploy/requirements/cuda.txt is not installed")

from tests.emulator.compile import Builder, find_compiler


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """What all tests compile with; under pytest-xdist its processes share what they compile."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler here (c++ or g++)")  # nothing of Octavo needs one but these tests
    base = tmp_path_factory.getbasetemp()
    builder = Builder(compiler, (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator")
    yield builder
    builder.close()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
