"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before anything imports torch: one thread a test process, since pytest-xdist runs as many processes as there are cores, and
# thread pools that spin against each other make a step many times slower. The services that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell that runs the tests in its background leaves SIGINT ignored; what they start would inherit that and never see a Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from octavo.models.pull import pull

# An assertion in a helper module says what it compared, as one in a test module does.
pytest.register_assert_rewrite("tests.unit", "tests.integration")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The default model, converted; from the user's cache, shared with `make up`. Downloads 93 MB the first time."""
    return pull("smollm2")
