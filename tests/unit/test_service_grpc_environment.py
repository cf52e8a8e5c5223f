"""gRPC's core reads its environment once, when it is loaded: whatever a process wants of it must be there before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_LOOK = """
import os, sys
import {service}
assert "grpc" not in sys.modules, "it was loaded first"
print(os.environ["GRPC_EXPERIMENTS"])
"""


@pytest.mark.parametrize("service", ["router", "scheduler", "worker"])
@pytest.mark.parametrize("chosen", [None, "", "tcp_frame_size_tuning"])
def test_a_service_sets_up_grpc_before_it_is_loaded_unless_an_operator_has(service: str, chosen: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    if chosen is not None:
        env["GRPC_EXPERIMENTS"] = chosen
    command = [sys.executable, "-c", _LOOK.format(service=service)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert found == ("-event_engine_client,-event_engine_listener" if chosen is None else chosen)
